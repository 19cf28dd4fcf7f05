"""What `rft_study.py` takes from the logs of its runs."""

from pathlib import Path

from records import columns
from stages import read_lines

# the columns of a course, by the names in `train_rft.py`'s log: standard deviations over x_0 in normalised units
COURSE = "step", "std_x", "std_y", "std_z", "std_gripper"


def minutes_of(run: Path) -> float:
    """Return the wall time of a training [min]: of a fine-tuning, that of its steps, without gates and diagnostics."""
    rows = read_lines(run / "log.jsonl")
    if "policy_s" in rows[-1]:
        return sum(row[name] for row in rows for name in ("policy_s", "world_model_s", "update_s")) / 60
    return max(row["minutes"] for row in rows if "minutes" in row)


def trust_gates(policies: dict[str, Path]) -> dict[str, dict[str, float]]:
    """Read what the gate said before the first step of the fine-tunings that have one: arm -> figures."""
    found = {}
    for name, path in policies.items():
        first = read_lines(path.parent / "log.jsonl")[0]
        if gate := {key: value for key, value in first.items() if key.startswith("gate")}:
            found[name] = gate
    return found


def courses(policies: dict[str, Path]) -> dict[str, dict[str, list]]:
    """Read the standard deviation over x_0 in the course of the fine-tunings, at the held-out starts of their
    diagnostics: arm -> name -> one value per diagnosis.
    """
    found = {}
    for name, path in policies.items():
        rows = read_lines(path.parent / "log.jsonl")
        if rows := [{key: row[key] for key in COURSE} for row in rows if "std_x" in row]:
            found[name] = columns(rows)
    return found
