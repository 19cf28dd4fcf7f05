"""What decides whether fine-tuning inside the world model helps: one factor at a time, from one plateaued policy.

    python demo.py                                              makes the demonstrations and a tokenizer
    python benchmarks/world_model.py                            trains the world models
    python benchmarks/sft_study.py                              trains the policies
    python benchmarks/rft_factors.py                            fine-tunes and plays every cell

Every cell is one training. Up to the cells named "plateau", one option is changed against the first cell, which is
fine-tuning with R3 as `train_rft.py --preset tiny` does it, from the policy of "twice as long" in the world model of
"three times as long"; the others go on from the policy of "four times as long". All cells play the same starts, plain
and perturbed. Finished cells are not run again.

Few demonstrations (docs/study.md): the same cells from another policy, in a world model that saw more,

    python collect_demos.py --preset tiny --demos-per-task 20 --out-dir runs/few/demos
    python train_sft.py --preset tiny --demos runs/few/demos --steps 2600 --out-dir runs/few/sft/twice_as_long
    python benchmarks/rft_factors.py --demos runs/few/demos --policies runs/few/sft --start "twice as long" --no-gate \
        --runs runs/few/rft --out results/rft_few.json --cells "plateau, R1, credit per step" "plateau, extra SFT" ...

Writes one JSON: success rates with their 95 % intervals, the paired difference to the policy that was fine-tuned, and
what changed in the deterministic policy's chunks at held-out starts: their true error in the simulator, and how far the
draws lie apart.
"""

import re
import sys
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from statistics import mean
from typing import Literal, NamedTuple

from chunks import difference, measure
from stages import Starts, check_known, machine, rate, read_lines, run_once, show_rate

from vlarft.checkpoint import write_json
from vlarft.config import opt, parse, to_dict
from vlarft.metrics import paired_difference


class Cell(NamedTuple):
    """Flags of `train_rft.py`, an arm of `world_model.py` and one of `sft_study.py`; or flags of `train_sft.py`; or no
    script, for the policy as it is.

    x0: where the flow starts when the policy is played and its true error measured.
    """

    flags: tuple[str, ...] = ()
    world_model: str = "three times as long"
    policy: str = "twice as long"
    script: str | None = "train_rft.py"
    x0: Literal["sampled", "zero"] = "sampled"


def sft(*flags: str, policy: str = "twice as long") -> Cell:
    """More supervised training, at a tenth of the peak learning rate."""
    return Cell(("--lr", "3e-4", "--warmup", "10", *flags), policy=policy, script="train_sft.py")


TWO_STEPS = ("--noisy-steps", "8", "9", "--sigma-min", "0.04", "--sigma-max", "0.12")
SLOW = ("--steps", "80", "--lr", "3e-5", "--sigma-lr", "3e-4")
HEAD = ("--train", "head", "--key-batch", "0")
REGRESSION = ("--objective", "regression", "--lr", "1e-4", "--steps", "200", "--draws", "3", *HEAD)
PLATEAU, ATTEMPTS = "four times as long", "three times as long with on-policy attempts"


def plateau(*flags: str, world_model: str = "three times as long", steps: int = 80) -> Cell:
    """From the policy at its plateau."""
    return Cell(("--steps", str(steps), *flags), world_model, policy=PLATEAU)


PER_STEP = ("--credit", "frame", "--ratio-per", "step")
TO_GO = ("--credit", "to_go", "--ratio-per", "step")
HELD = ("--mse-weight", "1")
SHARED = ("--group-x0", "shared")
MIRRORED = ("--mirrored",)
BROAD = ("--starts", "24", "--group", "4")
QUARTER = ("--sigma-min", "0.02", "--sigma-max", "0.05")
COSINE = ("--decay", "cosine")
QUARTER_RATE = ("--lr", "2.5e-5", "--sigma-lr", "2.5e-4")
CELLS = {
    "R3": Cell(),
    "extra SFT": sft("--steps", "1000"),
    "extra SFT head": sft("--steps", "1000", *HEAD),
    "R1": Cell(("--reward", "r1")),
    "R2": Cell(("--reward", "r2")),
    "RWR": Cell(("--algorithm", "rwr")),
    "simulator's true error": Cell(("--reward", "simulator")),
    "simulator, noise on two steps": Cell(("--reward", "simulator", *TWO_STEPS)),
    "simulator, two steps, lr 3e-5": Cell(("--reward", "simulator", *TWO_STEPS, *SLOW)),
    "R3, noise on two steps": Cell(TWO_STEPS),
    "R3, two steps, lr 3e-5": Cell((*TWO_STEPS, *SLOW)),
    "Flow-SDE": Cell(("--noise", "flow_sde")),
    "100 steps": Cell(("--steps", "100")),
    "seed 1": Cell(("--seed", "1")),
    "seed 2": Cell(("--seed", "2")),
    "world model: a third of the steps": Cell(world_model="default"),
    "world model: demonstrations only": Cell(world_model="demonstrations only"),
    "world model: no stale frames": Cell(world_model="no stale frames"),
    "plateau, divergence, credit per step, on-policy attempts": plateau(
        "--reward", "divergence", *PER_STEP, world_model=ATTEMPTS
    ),
    "plateau, R3, on-policy attempts": plateau(*HELD, world_model=ATTEMPTS),
    "plateau, R3, 40 steps, flow-matching weight 0.1": Cell(policy=PLATEAU),
    "plateau, x_0 = 0": Cell(policy=PLATEAU, script=None, x0="zero"),
    "plateau, R3": plateau(*HELD),
    "plateau, divergence": plateau("--reward", "divergence", *HELD),
    "plateau, R1": plateau("--reward", "r1", *HELD),
    "plateau, simulator": plateau("--reward", "simulator", *HELD),
    "plateau, simulator, flow-matching weight 0.1": plateau("--reward", "simulator"),
    "plateau, simulator, flow-matching weight 0": plateau("--reward", "simulator", "--mse-weight", "0"),
    "plateau, divergence, credit per step": plateau("--reward", "divergence", *PER_STEP),
    "plateau, R1, credit per step": plateau("--reward", "r1", *PER_STEP),
    "plateau, R3, credit per step": plateau("--reward", "r3", *PER_STEP),
    "plateau, R1, credit per step, shared x_0": plateau("--reward", "r1", *PER_STEP, *SHARED),
    "plateau, R3, credit per step, shared x_0": plateau("--reward", "r3", *PER_STEP, *SHARED),
    "plateau, divergence, credit per step, shared x_0": plateau("--reward", "divergence", *PER_STEP, *SHARED),
    "plateau, R1, credit per step, mirrored": plateau("--reward", "r1", *PER_STEP, *MIRRORED),
    "plateau, R1, credit per step, 24 starts of 4": plateau("--reward", "r1", *PER_STEP, *BROAD),
    "plateau, R1, credit per step, mirrored, 24 starts of 4": plateau("--reward", "r1", *PER_STEP, *MIRRORED, *BROAD),
    "plateau, R3, mirrored, 24 starts of 4": plateau(*HELD, *MIRRORED, *BROAD),
    "plateau, divergence, credit per step, mirrored, 24 starts of 4": plateau(
        "--reward", "divergence", *PER_STEP, *MIRRORED, *BROAD
    ),
    "plateau, R3, credit per step, mirrored": plateau("--reward", "r3", *PER_STEP, *MIRRORED),
    "plateau, R3, mirrored": plateau(*HELD, *MIRRORED),
    "plateau, divergence, credit per step, mirrored": plateau("--reward", "divergence", *PER_STEP, *MIRRORED),
    "plateau, R1, credit per step, quarter of the noise": plateau("--reward", "r1", *PER_STEP, *QUARTER),
    "plateau, R3, credit per step, quarter of the noise": plateau("--reward", "r3", *PER_STEP, *QUARTER),
    "plateau, divergence, credit per step, quarter of the noise": plateau(
        "--reward", "divergence", *PER_STEP, *QUARTER
    ),
    "plateau, R1, credit per step, cosine": plateau("--reward", "r1", *PER_STEP, *COSINE),
    "plateau, R1, credit per step, mirrored, slow": plateau(
        "--reward", "r1", *PER_STEP, *MIRRORED, *QUARTER_RATE, steps=320
    ),
    "plateau, divergence, credit per step, mirrored, slow": plateau(
        "--reward", "divergence", *PER_STEP, *MIRRORED, *QUARTER_RATE, steps=320
    ),
    "plateau, divergence, credit per step, mirrored, 24 starts of 4, slow": plateau(
        "--reward", "divergence", *PER_STEP, *MIRRORED, *BROAD, *QUARTER_RATE, steps=320
    ),
    "plateau, R3, mirrored, slow": plateau(*HELD, *MIRRORED, *QUARTER_RATE, steps=320),
    "plateau, R3, two chunks": plateau(*HELD, "--chunks", "2"),
    "plateau, R3, credit to go": plateau(*TO_GO),
    "plateau, simulator, credit to go": plateau("--reward", "simulator", *TO_GO),
    "plateau, extra SFT": sft("--steps", "1000", policy=PLATEAU),
    "plateau, regression": sft(*REGRESSION, policy=PLATEAU),
    "plateau, RWR": plateau("--algorithm", "rwr", *HELD),
    "policy: half the steps": Cell(policy="default"),
    "policy: half the steps, x_0 = 0": Cell(policy="default", script=None, x0="zero"),
    "policy: half the steps, extra SFT": sft("--steps", "1000", policy="default"),
    "common random numbers": Cell(("--imagination", "common")),
    "independent draws": Cell(("--imagination", "sample")),
    "no perceptual term": Cell(("--perceptual", "none")),
    "advantage without std": Cell(("--no-divide-by-std",)),
    "executed actions as reference": Cell(("--reference", "executed")),
    "group of 6": Cell(("--group", "6")),
    "half the noise": Cell(("--sigma-min", "0.04", "--sigma-max", "0.1")),
    "twice the noise": Cell(("--sigma-min", "0.16", "--sigma-max", "0.4")),
    "gripper left out": Cell(("--noisy-dims", "0", "1", "2", "3", "4", "5")),
    "lr 3e-5": Cell(("--lr", "3e-5")),
    "lr 3e-4": Cell(("--lr", "3e-4")),
    "no flow-matching term": Cell(("--mse-weight", "0")),
    "flow-matching weight 1": Cell(("--mse-weight", "1")),
    "KL to the policy": Cell(("--kl-weight", "0.1")),
    "last frame only": Cell(("--over-frames", "last")),
}


@dataclass(frozen=True)
class Config:
    demos: str = opt("runs/demo/demos", "demonstrations")
    world_models: str = opt("runs/world_model", "folder of world_model.py's arms")
    policies: str = opt("runs/sft_study", "folder of sft_study.py's arms")
    runs: str = opt("runs/rft_factors", "folder for the cells")
    out: str = opt("results/rft_factors.json", "JSON file to write")
    cells: tuple[str, ...] = opt(tuple(CELLS), "cells to run")
    rival: str | None = opt(None, "cell that the others are compared with, start by start, beside the policy before")
    start: str | None = opt(None, "arm of sft_study.py that all cells start from; none: each cell's own")
    gate: bool = opt(True, "the trust gate before the first step, which needs episodes that the world model never saw")
    suite: str = opt("tabletop_object", "suite of the demonstrations")
    tasks: tuple[str, ...] = opt(("0", "1", "2", "3"), "tasks of the demonstrations")
    perturb: tuple[str, ...] = opt(("none", "object:2.5", "robot:20"), "starts to play; none = the plain ones")
    episodes: int = opt(50, "initial states per task")
    error_starts: int = opt(256, "held-out starts of the true error")
    error_draws: int = opt(3, "chunks that the policy samples at each of them")
    steps: int = opt(40, "steps of a fine-tuning, where the cell does not say")
    stage_preset: str = opt("tiny", "preset of the stages")


PRESETS = {
    "paper": Config(),
    "smoke": Config(
        cells=("R3", "extra SFT head"), tasks=("0",), perturb=("none", "robot:20"), episodes=1, error_starts=4,
        error_draws=2, steps=1, stage_preset="smoke",
    ),
}  # fmt: skip


def arm(folder: str, name: str) -> Path:
    """The checkpoint of an arm of another study.

    Raises:
        FileNotFoundError: it was not trained.
    """
    path = Path(folder) / name.replace(" ", "_") / "model.safetensors"
    if not path.is_file():
        raise FileNotFoundError(f"no checkpoint at {path}: run the study that trains the arm {name!r} first")
    return path


def play(cfg: Config, folder: Path, policy: Path, x0: str = "sampled") -> dict[str, dict[tuple, bool]]:
    """Outcomes of a policy on every kind of start: perturbation -> (task, initial state) -> success."""
    starts = Starts(cfg.suite, cfg.tasks, cfg.episodes, cfg.stage_preset)
    return {
        perturb: starts.play(folder / f"eval_{perturb.replace(':', '_')}", policy, perturb, "--noise", x0)
        for perturb in cfg.perturb
    }


def compare(base: dict[str, dict], own: dict[str, dict]) -> dict[str, dict]:
    """Rates on every kind of start and on all of them, and paired differences to the policy before."""
    kinds = {perturb: list(found) for perturb, found in own.items()}
    before = {perturb: [base[perturb][start] for start in starts] for perturb, starts in kinds.items()}
    after = {perturb: [own[perturb][start] for start in starts] for perturb, starts in kinds.items()}
    before["all"], after["all"] = (list(chain.from_iterable(found.values())) for found in (before, after))
    return {
        kind: {**rate(after[kind]), "against_base": paired_difference(before[kind], after[kind])._asdict()}
        for kind in after
    }


def _measure(cfg: Config, folder: Path, policy: Path) -> dict[str, list[float]]:
    return measure(folder / "chunks.json", policy, cfg.demos, cfg.error_starts, cfg.error_draws)


def folder_of(cfg: Config, name: str) -> Path:
    """Where a cell lies."""
    return Path(cfg.runs) / "_".join(re.findall(r"[\w'.-]+", name))


def against(cfg: Config, rival: str, name: str) -> dict:
    """Paired difference of a played cell to another one, over all starts."""
    both = [play(cfg, folder_of(cfg, cell), folder_of(cfg, cell) / "model.safetensors") for cell in (rival, name)]
    starts = [(kind, start) for kind, found in both[0].items() for start in found]
    return paired_difference(*([found[kind][start] for kind, start in starts] for found in both))._asdict()


def run_cell(cfg: Config, name: str) -> dict:
    """Train and play one cell, unless that is done."""
    cell, folder = CELLS[name], folder_of(cfg, name)
    start = cfg.start or cell.policy
    policy = trained = arm(cfg.policies, start)
    log: list[dict] = []
    if cell.script:
        words = [cell.script, "--preset", cfg.stage_preset, "--demos", cfg.demos]
        if cell.script == "train_rft.py":
            words += ["--policy", policy, "--world-model", arm(cfg.world_models, cell.world_model)]
            words += ["--no-gate-stop", "--gate-interval", 1000] if cfg.gate else ["--gate-starts", 0]
            words += [] if "--steps" in cell.flags else ["--steps", cfg.steps]
        else:
            words += ["--init", policy]
        trained = run_once(folder, *words, *cell.flags) / "model.safetensors"
        log = read_lines(folder / "log.jsonl")
    before = Path(cfg.runs) / f"base_{start.replace(' ', '_')}"
    base, old, new = play(cfg, before, policy), _measure(cfg, before, policy), _measure(cfg, folder, trained)
    return {
        "flags": list(cell.flags),
        "policy": start,
        "world_model": cell.world_model if cell.script == "train_rft.py" else None,
        "x0": cell.x0,
        "minutes": max((row["minutes"] for row in log if "minutes" in row), default=None),
        "gate": {key: value for row in log[:1] for key, value in row.items() if key.startswith("gate")},
        "reward": {"first": log[0]["reward"], "last": log[-1]["reward"]} if log and "reward" in log[0] else None,
        "true_error_change": difference(old["sampled"], new[cell.x0]),
        "true_error_change_from_zero": difference(old["zero"], new["zero"]),
        "spread_change": difference(old["spread"], new["spread"]),
        "success": compare(base, play(cfg, folder, trained, cell.x0)),
    }


def table(cells: dict[str, dict]) -> str:
    """One row per cell: all starts together."""
    lines = []
    for name, cell in cells.items():
        found, error = cell["success"]["all"], cell["true_error_change"]
        line = f"{name:<36} {show_rate(found, found['against_base'])}"
        line += f"   {1e3 * error['mean']:+.2f} +- {1e3 * error['standard_error']:.2f} mm"
        lines.append(f"{line}   spread {cell['spread_change']['mean']:+.4f}")
    return "\n".join(lines)


def main(cfg: Config) -> dict:
    """Run what is missing; returns what the JSON file holds.

    Raises:
        ValueError: an unknown cell.
    """
    check_known(cfg.cells, CELLS, "cell")
    if cfg.rival is not None:
        check_known((cfg.rival,), cfg.cells, "rival among the cells")
    report = {
        "command": "python benchmarks/rft_factors.py",
        "config": to_dict(cfg),
        "machine": machine(),
        "base": {},
        "cells": {},
    }
    for name in cfg.cells:
        report["cells"][name] = run_cell(cfg, name)
        base = cfg.start or CELLS[name].policy
        if base not in report["base"]:
            parts = cfg, Path(cfg.runs) / f"base_{base.replace(' ', '_')}", arm(cfg.policies, base)
            report["base"][base] = {kind: rate(list(found.values())) for kind, found in play(*parts).items()}
            report["base"][base] |= {f"chunks_{name}": mean(values) for name, values in _measure(*parts).items()}
        write_json(cfg.out, report)
    for name in cfg.cells:
        if cfg.rival not in (None, name):
            report["cells"][name]["against_rival"] = against(cfg, cfg.rival, name)
    write_json(cfg.out, report)
    print("\n" + table(report["cells"]))
    return report


if __name__ == "__main__":
    main(parse(Config, PRESETS, sys.argv[1:], __doc__.splitlines()[0]))
