"""Rates and paired differences over the runs that rft_study.py gathers: suites and seeds.

Outcomes are text, "1" for a success and "0" for a failure, start by start in one order for all policies.
"""

from collections.abc import Sequence

from stages import rate, show_rate

from vlarft.metrics import paired_difference

RIVALS = "SFT", "extra SFT", "RWR", "regression"  # that the others are compared with
ALL = "all"  # suites, or kinds of starts


def compare(runs: Sequence[dict[str, str]]) -> dict[str, dict]:
    """Rates of each policy, and paired differences to `RIVALS`.

    Args:
        runs: of each seed and suite, name -> outcomes start by start, "0" or "1". A policy is compared with a rival
            over the runs that have both.
    """
    found: dict[str, dict] = {}
    for name in dict.fromkeys(name for run in runs for name in run):
        own = [run[name] for run in runs if name in run]
        found[name] = {"all": _rate("".join(own)), "runs": [_rate(outcomes) for outcomes in own]}
        for rival in RIVALS:
            pairs = [(run[rival], run[name]) for run in runs if rival in run and name in run]
            if pairs and rival != name:
                pooled = _against("".join(a for a, _ in pairs), "".join(b for _, b in pairs))
                apart = [_against(*pair)["difference"] for pair in pairs]
                found[name][f"against {rival}"] = {**pooled, "runs": apart}
    return found


def _rate(outcomes: str) -> dict[str, float]:
    return rate([won == "1" for won in outcomes])


def _against(first: str, second: str) -> dict[str, float]:
    return paired_difference([won == "1" for won in first], [won == "1" for won in second])._asdict()


def summarise(runs: dict[str, dict[str, dict]]) -> dict[str, dict]:
    """`compare` of the seeds of each suite, and of all suites, for each kind of start and for all kinds together."""
    found = {}
    for suite in (*runs, ALL):
        entries = [e for name, seeds in runs.items() if suite in (name, ALL) for e in seeds.values()]
        kinds = list(dict.fromkeys(kind for e in entries for kind in e["outcomes"]))
        found[suite] = {kind: compare([e["outcomes"].get(kind, {}) for e in entries]) for kind in kinds}
        found[suite][ALL] = compare([_all_kinds(e["outcomes"]) for e in entries])
    return found


def _all_kinds(outcomes: dict[str, dict[str, str]]) -> dict[str, str]:
    """Outcomes of the policies that played every kind of start, one kind after the other."""
    names = [name for name in next(iter(outcomes.values())) if all(name in found for found in outcomes.values())]
    return {name: "".join(found[name] for found in outcomes.values()) for name in names}


def table(summary: dict) -> str:
    """One row per policy, suite and kind of start."""
    lines = []
    for suite, kinds in summary.items():
        for kind, found in kinds.items():
            lines.append(f"{suite}, starts: {kind}")
            for name, values in found.items():
                lines.append(f"  {name:<16} {show_rate(values['all'], values.get('against SFT'))}")
    return "\n".join(lines)
