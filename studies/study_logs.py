"""What `rft_study.py` takes from the logs of its runs."""

from pathlib import Path

from stages import read_lines


def minutes_of(run: Path) -> float:
    """Wall time of a training [min]: of a fine-tuning, that of its steps, without gates and diagnostics."""
    rows = read_lines(run / "log.jsonl")
    if "policy_s" in rows[-1]:
        return sum(row[name] for row in rows for name in ("policy_s", "world_model_s", "update_s")) / 60
    return max(row["minutes"] for row in rows if "minutes" in row)


def trust_gates(policies: dict[str, Path]) -> dict[str, dict[str, float]]:
    """What the gate said before the first step of the fine-tunings that have one: arm -> figures."""
    found = {}
    for name, path in policies.items():
        first = read_lines(path.parent / "log.jsonl")[0]
        if gate := {key: value for key, value in first.items() if key.startswith("gate")}:
            found[name] = gate
    return found


def courses(policies: dict[str, Path]) -> dict[str, list[dict[str, float]]]:
    """How true error and spread of the fine-tunings went, at the held-out starts of their diagnostics: arm -> rows, in
    metres and in normalised units.
    """
    names = "step", "true_error", "true_error_mean_action", "spread_x", "spread_y", "spread_z", "spread_gripper"
    found = {}
    for name, path in policies.items():
        rows = read_lines(path.parent / "log.jsonl")
        if rows := [{key: row[key] for key in names if key in row} for row in rows if "true_error" in row]:
            found[name] = rows
    return found


def curves(runs: Path) -> dict[str, list[dict[str, float]]]:
    """Success rates while the policies of a seed trained: folder -> [{step, minutes, success_rate}]."""
    found, names = {}, ("step", "minutes", "success_rate")
    for folder in sorted(runs.iterdir()):
        log = folder / "log.jsonl"
        rows = read_lines(log) if log.is_file() else []
        if rows := [{name: row[name] for name in names} for row in rows if "success_rate" in row]:
            found[folder.name] = rows
    return found
