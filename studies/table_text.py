"""Rates, paired differences and changes of a policy's chunks as the text of markdown tables."""

from collections.abc import Iterable, Sequence

from vlarft.statistics import paired_difference, wilson_interval

STUDENT = {
    2: 12.71, 3: 4.303, 4: 3.182, 5: 2.776, 6: 2.571, 7: 2.447, 8: 2.365, 9: 2.306, 10: 2.262, 11: 2.228, 12: 2.201,
    13: 2.179, 14: 2.160, 15: 2.145, 16: 2.131, 17: 2.120, 18: 2.110, 19: 2.101, 20: 2.093, 21: 2.086, 22: 2.080,
    23: 2.074, 24: 2.069, 25: 2.064, 26: 2.060, 27: 2.056, 28: 2.052, 29: 2.048, 30: 2.045, 31: 2.042,
}  # fmt: skip  # 97.5 % quantiles, by the number of values


def table(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Format a markdown table."""
    lines = [heads, *rows]
    return "\n".join([table_row(heads), "|---" * len(heads) + "|", *map(table_row, lines[1:])])


def table_row(cells: Sequence[str]) -> str:
    """Format a row of a markdown table."""
    return "| " + " | ".join(cells) + " |"


def share(won: int, episodes: int) -> dict[str, float]:
    """Compute the success rate with its 95 % Wilson interval."""
    return dict(zip(("rate", "low", "high"), wilson_interval(won, episodes))) | {"episodes": episodes}


def difference(only_first: int, only_second: int, episodes: int) -> dict[str, float]:
    """Compute `paired_difference` from counts of the starts that one of two policies wins alone."""
    rest = episodes - only_first - only_second
    first = [True] * only_first + [False] * (only_second + rest)
    second = [False] * only_first + [True] * only_second + [False] * rest
    return paired_difference(first, second)._asdict()


def percent(found: dict[str, float]) -> str:
    """Format a success rate."""
    return f"{100 * found['rate']:.1f} % [{100 * found['low']:.1f}, {100 * found['high']:.1f}]"


def points(apart: dict | None) -> str:
    """Format a difference of success rates, in percentage points; empty where there is none."""
    if apart is None:
        return ""
    return f"{100 * apart['difference']:+.1f} [{100 * apart['low']:+.1f}, {100 * apart['high']:+.1f}]"


def signed(differences: Iterable[float]) -> str:
    """Format differences of single runs, in percentage points."""
    return ", ".join(f"{100 * value:+.1f}" for value in differences)


def shift(kind: str, change: dict[str, float]) -> str:
    """Format a `chunks.difference`: standard deviation over x_0 in percent of what it was, a true error in mm."""
    if kind == "std":
        return f"{100 * change['mean'] / change['before']:+.0f} %"
    return f"{1e3 * change['mean']:+.2f} ± {1e3 * change['standard_error']:.2f}"


def mean_over_seeds(values: Sequence[float]) -> tuple[float, float]:
    """Compute the mean over several seeds, and half of its 95 % interval by Student's t."""
    mean, count = sum(values) / len(values), len(values)
    if count > max(STUDENT):
        raise ValueError(f"{count} seeds: the table of Student's quantiles ends at {max(STUDENT)}")
    return mean, STUDENT[count] * (sum((v - mean) ** 2 for v in values) / (count - 1) / count) ** 0.5


def over_seeds(values: Sequence[float], digits: int) -> str:
    """Format the mean over seeds with its 95 % interval; one seed alone has none."""
    if len(values) == 1:
        return f"{values[0]:.{digits}f}"
    mean, half = mean_over_seeds(values)
    return f"{mean:.{digits}f} [{mean - half:.{digits}f}, {mean + half:.{digits}f}]"


def interval(values: Sequence[float], digits: int = 2) -> str:
    """Format the ends of an interval."""
    return f"[{values[0]:.{digits}f}, {values[1]:.{digits}f}]"
