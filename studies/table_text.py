"""What the studies' markdown tables show: rates, paired differences and changes of the chunks as text."""

from collections.abc import Sequence


def table_row(cells: Sequence[str]) -> str:
    """A row of a markdown table."""
    return "| " + " | ".join(cells) + " |"


def percent(found: dict[str, float]) -> str:
    """A `rate` for a table."""
    return f"{100 * found['rate']:.1f} % [{100 * found['low']:.1f}, {100 * found['high']:.1f}]"


def points(apart: dict | None) -> str:
    """A paired difference for a table, in points."""
    if apart is None:
        return ""
    return f"{100 * apart['difference']:+.1f} [{100 * apart['low']:+.1f}, {100 * apart['high']:+.1f}]"


def shift(kind: str, change: dict[str, float]) -> str:
    """A `chunks.difference` for a table: of the spread in percent, of a true error in mm."""
    if kind == "spread":
        return f"{100 * change['mean'] / change['before']:+.0f} %"
    return f"{1e3 * change['mean']:+.2f} ± {1e3 * change['standard_error']:.2f} mm"
