"""What makes a small policy learn from scratch: training arms on the same demonstrations, one factor each.

    python demo.py                                                    makes the demonstrations
    python studies/sft_study.py --out results/sft_study.json       trains and measures every arm

Each arm is `train_sft.py --preset tiny` with the flags of `ARMS`, with success rates along the way, then
`eval_libero.py` on all initial states of the tasks; all arms play the same starts. Finished arms are not run again.
Writes one JSON: success rate with its 95 % interval, paired difference to the first arm, held-out loss, and the curve
of success rates against steps and minutes; and a picture of the curves.
"""

import sys
from dataclasses import dataclass
from pathlib import Path

from stages import Panel, call, check_known, draw_curves, machine, rate, read_lines, show_rate

from vlarft.metrics import paired_difference
from vlarft.run.checkpoint import write_json
from vlarft.run.config import opt, parse, to_dict

ARMS = {
    "default": [],
    "twice as long": ["--steps", "2600"],
    "four times as long": ["--steps", "5200"],
    "no key-position loss": ["--key-weight", "0", "--key-batch", "0"],
    "one draw per image": ["--noise-samples", "1"],
    "no average of weights": ["--ema", "none"],
    "constant learning rate": ["--schedule", "constant", "--lr", "1e-3"],
    "no augmentation": ["--augment", "none"],
}


@dataclass(frozen=True)
class Config:
    demos: str = opt("runs/demo/demos", "demonstrations")
    runs: str = opt("runs/sft_study", "folder for the arms")
    out: str = opt("results/sft_study.json", "JSON file to write")
    figure: str = opt("docs/images/sft_study.png", "picture of the curves to write")
    arms: tuple[str, ...] = opt(tuple(ARMS), "arms to run; the first is the one that others are compared with")
    suite: str = opt("tabletop_object", "suite of the demonstrations")
    tasks: tuple[str, ...] = opt(("0", "1", "2", "3"), "tasks of the demonstrations")
    episodes: int = opt(50, "initial states per task")
    curve_interval: int = opt(325, "steps between success rates along the way")
    curve_episodes: int = opt(20, "episodes per task of those")
    stage_preset: str = opt("tiny", "preset of the stages")


PRESETS = {
    "paper": Config(),
    "smoke": Config(
        arms=("default", "no key-position loss"), tasks=("0",), episodes=2, curve_interval=2, curve_episodes=1,
        stage_preset="smoke",
    ),
}  # fmt: skip


def run_arm(cfg: Config, name: str) -> dict:
    """Train one arm, and play every start with it, unless that is done."""
    folder = Path(cfg.runs) / name.replace(" ", "_")
    curve = ["--success-suite", cfg.suite, "--success-tasks", *cfg.tasks, "--success-episodes", cfg.curve_episodes]
    curve += ["--success-interval", cfg.curve_interval]
    preset = ["--preset", cfg.stage_preset]
    command = call("train_sft.py", *preset, "--demos", cfg.demos, "--out-dir", folder, *curve, *ARMS[name])
    where = ["--suites", cfg.suite, "--tasks", *cfg.tasks, "--episodes", cfg.episodes, "--out-dir", folder / "eval"]
    call("eval_libero.py", *preset, "--policies", folder / "model.safetensors", *where)
    log = read_lines(folder / "log.jsonl")
    played = read_lines(folder / "eval" / "episodes.jsonl")
    outcomes = {f"{record['task']}/{record['init_state']}": record["success"] for record in played}
    measured = [row for row in log if "success_rate" in row]
    return {
        "command": command,
        "steps": max(row["step"] for row in log) + 1,
        "minutes": max(row["minutes"] for row in log if "minutes" in row),
        "success": rate(list(outcomes.values())),
        "val_flow_mse": [row["val_flow_mse"] for row in log if "val_flow_mse" in row][-1],
        "curve": [{k: row[k] for k in ("step", "minutes", "success_rate")} for row in measured],
        "outcomes": outcomes,
    }


def compare(arms: dict[str, dict]) -> None:
    """Add to every arm but the first the paired difference to it; drops the outcomes, which nobody reads."""
    first, *others = arms.values()
    starts = sorted(first["outcomes"])
    for arm in others:
        pairs = ([which["outcomes"][start] for start in starts] for which in (first, arm))
        arm["against_first"] = paired_difference(*pairs)._asdict()
    for arm in arms.values():
        del arm["outcomes"]


def table(arms: dict[str, dict]) -> str:
    """One row per arm."""
    lines = [f"{'arm':<24} steps  minutes  success rate [95 % interval]        against the first"]
    for name, arm in arms.items():
        shown = show_rate(arm["success"], arm.get("against_first"))
        lines.append(f"{name:<24} {arm['steps']:5d}  {arm['minutes']:7.1f}  {shown}")
    return "\n".join(lines)


def main(cfg: Config) -> dict:
    """Run the arms; returns what the JSON file holds.

    Raises:
        ValueError: an unknown arm.
    """
    check_known(cfg.arms, ARMS, "arm")
    arms = {name: run_arm(cfg, name) for name in cfg.arms}
    compare(arms)
    report = {
        "command": "python studies/sft_study.py",
        "config": to_dict(cfg),
        "seed": 0,
        "machine": machine(),
        "arms": arms,
    }
    write_json(cfg.out, report)
    curves = {name: [(p["step"] + 1, p["success_rate"]) for p in arm["curve"]] for name, arm in arms.items()}
    draw_curves([Panel(f"SFT from scratch, {cfg.suite}", "step", curves)], Path(cfg.figure))
    print("\n" + table(arms))
    return report


if __name__ == "__main__":
    main(parse(Config, PRESETS, sys.argv[1:], __doc__.splitlines()[0]))
