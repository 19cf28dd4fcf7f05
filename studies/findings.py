"""The eight policies of docs/findings.md: their gains over SFT, as trained and played from x_0 = 0."""

from statistics import mean
from typing import NamedTuple

from outcomes import LONG, ZERO, against, played, rate
from table_text import percent, points, table

ROWS = {
    "SFT": "SFT alone",
    "extra SFT": "extra SFT, as long as R3 takes",
    "extra SFT, 400 steps": "extra SFT, as long as R1 takes",
    "regression": "regression through the flow, as long as R3 takes",
    LONG: "RFT, R1, 400 steps, no world model",
    "RFT R3": "RFT, R3 (the paper's reward), 80 steps",
    "RFT R3, demonstrations only": "RFT, R3, 80 steps, world model of demonstrations alone",
    "RFT divergence": "RFT, divergence, 80 steps",
}


class Gain(NamedTuple):
    """Paired differences to SFT over all starts, from the sampled x_0 and from x_0 = 0; None where not played."""

    label: str
    runs: int
    minutes: float
    sampled: dict | None
    zero: dict | None


def gains(runs: dict[str, dict[str, dict]]) -> list[Gain]:
    """Compute the rows, from the runs of rft_study.py."""
    every = played(runs)
    entries = [entry for seeds in runs.values() for entry in seeds.values()]
    found = []
    for name, label in ROWS.items():
        minutes = [entry["minutes"][name] for entry in entries if name in entry["minutes"]]
        sampled = None if name == "SFT" else against(every, "SFT", name)
        zero = ZERO if name == "SFT" else f"{name}, x_0 = 0"
        found.append(Gain(label, len(minutes), mean(minutes), sampled, against(every, "SFT", zero)))
    return found


def findings_table(runs: dict[str, dict[str, dict]]) -> str:
    """Tabulate the success of SFT, and gains over it."""
    every = played(runs)
    sft = percent(rate("".join(run["SFT"] for run in every)))
    rows = [
        [of.label, str(of.runs), f"{of.minutes:.0f}", _shown(of.sampled, of.runs) or sft, _shown(of.zero, of.runs)]
        for of in gains(runs)
    ]
    return table(["policy", "runs", "minutes", "success, or gain over SFT", "gain if played from x_0 = 0"], rows)


def _shown(found: dict | None, runs: int) -> str:
    """Format a gain, with its number of runs where that is not the row's."""
    return points(found) + (f" ({len(found['runs'])} runs)" if found and len(found["runs"]) != runs else "")
