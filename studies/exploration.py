"""How much noise should a policy explore with that learns from outcomes, where time is short?

    python studies/exploration.py                    seeds 0 and 1, which the README's demos do not use

A policy of few demonstrations a task, trained by SFT, then by `train_rl.py` in the simulator, 50 steps of 64
episodes. The arms differ in the bounds of a flow step's standard deviation. Each policy plays the same starts from
x_0 = 0. Two stages run side by side, finished ones are not run again; the JSON file gathers outcomes start by start
(1 = success).
"""

import sys
from dataclasses import dataclass
from pathlib import Path
from statistics import mean

from records import rounded, write
from stage_tables import exploration_table
from stages import ROOT, check_known, commit, machine, read_lines, read_report

from vlarft.run.config import opt, parse
from vlarft.run.stages import Stage, run_stages

FEW = {"tiny": 10, "smoke": 2}  # demonstrations a task
RL = {"tiny": {"steps": 50, "starts": 8}, "smoke": {}}
ARMS = {
    "sigma 0.08 to 0.2": {},  # the script's default, and the demo's
    "sigma 0.16 to 0.4": {"sigma_min": 0.16, "sigma_max": 0.4},
}


@dataclass(frozen=True)
class Config:
    out_dir: str = opt("runs/exploration", "folder for all runs")
    out: str = opt("runs/exploration.json", "JSON file that gathers the runs")
    seeds: tuple[int, ...] = opt((0, 1), "seeds of demonstrations, SFT and RL")
    arms: tuple[str, ...] = opt(tuple(ARMS), "arms to run")
    episodes: int = opt(50, "initial states per task")
    stage_preset: str = opt("tiny", "preset of the stages")

    def __post_init__(self) -> None:
        check_known(self.arms, ARMS, "arm")


PRESETS = {"paper": Config(), "smoke": Config(seeds=(0,), episodes=2, stage_preset="smoke")}


def stages(cfg: Config) -> list[Stage]:
    """List the stages of all seeds, those of an arm after those of the arms before it."""
    common, found = {"preset": cfg.stage_preset}, []
    out = {seed: Path(cfg.out_dir) / f"seed{seed}" for seed in cfg.seeds}

    def add(of: int, name: str, script: str, after: str = "", **flags: object) -> None:
        flags = {**common, "seed": of, **flags, "out_dir": out[of] / name}
        found.append(Stage(f"seed{of} {name}", ROOT / script, flags, (f"seed{of} {after}",) if after else ()))

    for seed in cfg.seeds:
        few = {"demos_per_task": FEW[cfg.stage_preset], "noisy_per_task": 0}
        add(seed, "few", "collect_demos.py", seed=1000 * seed, **few)
        add(seed, "sft", "train_sft.py", "few", split_seed=seed, demos=out[seed] / "few")
    for arm in cfg.arms:
        flags = {"world": "simulator", "workers": 0, **RL[cfg.stage_preset], **ARMS[arm]}
        for seed, own in out.items():
            add(seed, f"rl {arm}", "train_rl.py", "sft", policy=own / "sft", demos=own / "few", **flags)
    play = {"noise": "zero", "episodes": cfg.episodes, "batch_size": 50, "workers": 0}
    for name in ("sft", *(f"rl {arm}" for arm in cfg.arms)):
        for seed, own in out.items():
            add(seed, f"eval {name}", "eval_libero.py", name, policies=own / name, **play)
    return found


def outcomes(folder: Path) -> str:
    """Return the outcomes of an evaluation in the order of its starts, 1 = success."""
    records = sorted(read_lines(folder / "episodes.jsonl"), key=lambda r: (r["suite"], r["task"], r["init_state"]))
    return "".join(str(int(record["success"])) for record in records)


def main(cfg: Config) -> dict:
    """Run what is missing; return what the JSON file holds."""
    report = read_report(cfg, "runs", free=("out_dir", "out", "seeds", "arms"))
    report = {"command": "python studies/exploration.py", "machine": machine(), **report}
    Path(cfg.out_dir).mkdir(parents=True, exist_ok=True)
    ran = run_stages(Path(cfg.out_dir), stages(cfg), at_once=2)
    for seed in cfg.seeds:
        own, run = Path(cfg.out_dir) / f"seed{seed}", report["runs"].setdefault(str(seed), {"arms": {}})
        run |= {"commit": commit(), "SFT": outcomes(own / "eval sft")}
        for arm in cfg.arms:
            log = read_lines(own / f"rl {arm}" / "log.jsonl")
            found = {
                "minutes": ran[f"seed{seed} rl {arm}"]["seconds"] / 60,
                "while_training": mean(row["success"] for row in log[-10:]),
                "outcomes": outcomes(own / f"eval rl {arm}"),
            }
            run["arms"][arm] = rounded(found)
    write(cfg.out, report)
    print("\n" + exploration_table(report))
    return report


if __name__ == "__main__":
    main(parse(Config, PRESETS, sys.argv[1:], __doc__))
