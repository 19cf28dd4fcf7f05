"""What makes a small policy learn from scratch: training arms on the same demonstrations, one factor each.

    python studies/base.py                makes the demonstrations
    python studies/sft_study.py           trains and measures every arm

Each arm is `train_sft.py --preset tiny` with the flags of `ARMS`, then `eval_libero.py` on all initial states of the
tasks; all arms play the same starts. Finished arms are not run again. Writes one JSON: episodes that each arm wins, the
starts that only it or only the first arm wins, and its held-out loss. docs/policy.md says what came out.
"""

import sys
from dataclasses import dataclass
from pathlib import Path

from records import rounded, write
from stage_tables import sft_table
from stages import call, check_known, commit, machine, read_lines

from vlarft.run.config import opt, parse, to_dict

ARMS = {
    "default": [],
    "twice as long": ["--steps", "2600"],
    "four times as long": ["--steps", "5200"],
    "no key-position loss": ["--key-weight", "0", "--key-batch", "0"],
    "one sample of tau and noise per image": ["--noise-samples", "1"],
    "no average of weights": ["--ema", "none"],
    "constant learning rate": ["--schedule", "constant", "--lr", "1e-3"],
    "no augmentation": ["--augment", "none"],
}


@dataclass(frozen=True)
class Config:
    demos: str = opt("runs/base/demos", "demonstrations")
    runs: str = opt("runs/sft_study", "folder for the arms")
    out: str = opt("runs/sft_study.json", "JSON file to write")
    arms: tuple[str, ...] = opt(tuple(ARMS), "arms to run; the first is the one that others are compared with")
    suite: str = opt("tabletop_object", "suite of the demonstrations")
    tasks: tuple[str, ...] = opt(("0", "1", "2", "3"), "tasks of the demonstrations")
    episodes: int = opt(50, "initial states per task")
    stage_preset: str = opt("tiny", "preset of the stages")


PRESETS = {
    "paper": Config(),
    "smoke": Config(
        arms=("default", "no key-position loss"), tasks=("0",), episodes=2, stage_preset="smoke",
    ),
}  # fmt: skip


def run_arm(cfg: Config, name: str) -> dict:
    """Train one arm, and play every start with it, unless that is done."""
    folder = Path(cfg.runs) / name.replace(" ", "_")
    preset = ["--preset", cfg.stage_preset]
    command = call("train_sft.py", *preset, "--demos", cfg.demos, "--out-dir", folder, *ARMS[name])
    where = ["--suites", cfg.suite, "--tasks", *cfg.tasks, "--episodes", cfg.episodes, "--out-dir", folder / "eval"]
    call("eval_libero.py", *preset, "--policies", folder / "model.safetensors", *where)
    log = read_lines(folder / "log.jsonl")
    played = read_lines(folder / "eval" / "episodes.jsonl")
    return {
        "commit": commit(),
        "command": command,
        "steps": max(row["step"] for row in log) + 1,
        "minutes": max(row["minutes"] for row in log if "minutes" in row),
        "val_flow_mse": [row["val_flow_mse"] for row in log if "val_flow_mse" in row][-1],
        "outcomes": {f"{record['task']}/{record['init_state']}": record["success"] for record in played},
    }


def count(arms: dict[str, dict]) -> None:
    """Replace outcomes by counts: wins, and the starts that only the first arm or only this one wins."""
    won = {name: arm.pop("outcomes") for name, arm in arms.items()}
    base, *_ = won.values()
    for name, arm in arms.items():
        arm["success"] = {"won": sum(won[name].values()), "episodes": len(base)}
        if won[name] is not base:
            alone = [(base[start], won[name][start]) for start in base]
            arm["success"] |= {"only_first": alone.count((True, False)), "only_this": alone.count((False, True))}


def main(cfg: Config) -> dict:
    """Run the arms; return what the JSON file holds.

    Raises:
        ValueError: an unknown arm.
    """
    check_known(cfg.arms, ARMS, "arm")
    arms = {name: run_arm(cfg, name) for name in cfg.arms}
    count(arms)
    report = {"command": "python studies/sft_study.py", "settings": to_dict(cfg), "seed": 0, "machine": machine()}
    report = rounded(report | {"arms": arms})
    write(cfg.out, report)
    print("\n" + sft_table(report))
    return report


if __name__ == "__main__":
    main(parse(Config, PRESETS, sys.argv[1:], __doc__))
