"""What decides whether fine-tuning inside the world model helps: one factor at a time, from one policy.

    python studies/base.py                                      makes the demonstrations and a tokenizer
    python studies/wm_study.py                                  trains the world models
    python studies/sft_study.py                                 trains the policies
    python studies/rft_factors.py                               fine-tunes and plays every cell

Every cell (factor_cells.py) is one training with one option changed. The first ones start from the SFT policy "twice as
long", those named "plateau" from "four times as long", both in the world model "three times as long". Those named
"study" change one option of an arm of `rft_study.py`, and go on from its policy in its world model; they need --demos,
--policies, --world-models, --suite and --runs. docs/studies/ has their commands, and what came out. All cells play the
same starts, plain and perturbed. Finished cells are not run again.

Writes one JSON. Under "cells": the flags of each and the commit that measured it; outcomes start by start, in the order
of tasks and initial states (1 = success); and under "chunks" what changed in the deterministic policy's chunks at
held-out starts: their true error in the simulator, as played and from x_0 = 0, and their standard deviation over x_0.
Under "base" the same of the policies that cells go on from; under "world_models" the last row of the logs of those that
were trained here. The file gathers cells, of any invocation with the same settings and policies. cells.py computes
success and gains from it.
"""

import re
import sys
from dataclasses import dataclass
from pathlib import Path
from statistics import mean

from cells import cell_table
from chunks import difference, measure
from factor_cells import CELLS, WORLD_MODELS
from records import rounded, write
from stages import Starts, check_known, commit, fine_tuning, machine, read_lines, read_report, run_once

from vlarft.run.config import opt, parse


@dataclass(frozen=True)
class Config:
    demos: str = opt("runs/base/demos", "demonstrations")
    world_models: str = opt("runs/world_model", "folder of wm_study.py's arms")
    policies: str = opt("runs/sft_study", "folder of sft_study.py's arms")
    runs: str = opt("runs/rft_factors", "folder for the cells")
    out: str = opt("runs/rft_factors.json", "JSON file to write")
    cells: tuple[str, ...] = opt(tuple(name for name in CELLS if not name.startswith("study")), "cells to run")
    start: str | None = opt(None, "arm of sft_study.py that all cells start from; none: each cell's own")
    gate: bool = opt(True, "the trust gate before the first step, which needs episodes that the world model never saw")
    suite: str = opt("tabletop_object", "suite of the demonstrations")
    tasks: tuple[str, ...] = opt(("0", "1", "2", "3"), "tasks of the demonstrations")
    perturb: tuple[str, ...] = opt(("none", "object:2.5", "robot:20"), "starts to play; none = the plain ones")
    episodes: int = opt(50, "initial states per task")
    error_starts: int = opt(256, "held-out starts of the true error")
    error_samples: int = opt(3, "chunks that the policy samples at each of them")
    steps: int = opt(40, "steps of a fine-tuning, where the cell does not say")
    stage_preset: str = opt("tiny", "preset of the stages")


FREE = "demos", "world_models", "policies", "runs", "out", "cells"  # may differ in one JSON file
PRESETS = {
    "paper": Config(),
    "smoke": Config(
        cells=("R3", "extra SFT head"), tasks=("0",), perturb=("none", "robot:20"), episodes=1, error_starts=4,
        error_samples=2, steps=1, stage_preset="smoke",
    ),
}  # fmt: skip


def arm(folder: str, name: str) -> Path:
    """Return the checkpoint of an arm of another study.

    Raises:
        FileNotFoundError: it was not trained.
    """
    path = Path(folder) / name.replace(" ", "_") / "model.safetensors"
    if not path.is_file():
        raise FileNotFoundError(f"no checkpoint at {path}: run the study that trains the arm {name!r} first")
    return path


def world_model(cfg: Config, name: str) -> Path:
    """Return the checkpoint of a world model: of another study, or one that is trained here, unless that is done."""
    if name not in WORLD_MODELS:
        return arm(cfg.world_models, name)
    steps, flags = WORLD_MODELS[name]
    # word by word as in rft_study.py, which may have trained the same one
    words = ["--preset", cfg.stage_preset, "--pose-dims", 0, "--tokenizer", arm(cfg.world_models, "tokenizer")]
    words += ["--steps", steps, "--demos", cfg.demos, *flags]
    return run_once(Path(cfg.world_models) / name.replace(" ", "_"), "train_wm.py", *words) / "model.safetensors"


def play(cfg: Config, folder: Path, policy: Path, x0: str = "sampled") -> dict[str, str]:
    """Play a policy on every kind of start; return its outcomes: perturbation -> start by start, tasks in their order,
    initial states in theirs (1 = success).
    """
    starts = Starts(cfg.suite, cfg.tasks, cfg.episodes, cfg.stage_preset)
    found = {
        perturb: starts.play(folder / f"eval_{re.sub('[:/]', '_', perturb)}", policy, perturb, "--noise", x0)
        for perturb in cfg.perturb
    }
    return {kind: "".join(str(int(won)) for _, won in sorted(of.items())) for kind, of in found.items()}


def _measure(cfg: Config, folder: Path, policy: Path, x0: str = "sampled") -> dict[str, list[float]]:
    x0s = dict.fromkeys(("sampled", "zero", x0))
    return measure(folder / "chunks.json", policy, cfg.demos, cfg.error_starts, cfg.error_samples, tuple(x0s))


def folder_of(cfg: Config, name: str) -> Path:
    """Return where a cell lies."""
    return Path(cfg.runs) / "_".join(re.findall(r"[\w'.-]+", name))


def last_row(checkpoint: Path) -> dict | None:
    """Read the last row of a training's log; none where it was too short to log."""
    log = checkpoint.with_name("log.jsonl")
    rows = read_lines(log) if log.is_file() else []
    return rows[-1] if rows else None


def base_of(cfg: Config, start: str) -> dict:
    """Measure the policy that cells go on from: outcomes, means of its chunks' errors, its training log's last row."""
    checkpoint = arm(cfg.policies, start)
    parts = cfg, Path(cfg.runs) / f"base_{start.replace(' ', '_')}", checkpoint
    chunks = {name: mean(values) for name, values in _measure(*parts).items()}
    measured = {"outcomes": play(*parts), "chunks": chunks, "training": last_row(checkpoint)}
    return rounded({"commit": commit(), "machine": machine(), **measured})


def run_cell(cfg: Config, name: str) -> dict:
    """Train and play one cell, unless that is done."""
    cell, folder = CELLS[name], folder_of(cfg, name)
    start = cfg.start or cell.policy
    policy = trained = arm(cfg.policies, start)
    log: list[dict] = []
    if cell.script:
        tunes = cell.script == "train_rft.py"
        script = fine_tuning(cell.flags) if tunes else cell.script
        words = [script, "--preset", cfg.stage_preset, "--demos", cfg.demos]
        if tunes:
            words += ["--policy", policy, "--world-model", world_model(cfg, cell.world_model)]
            words += ["--gate-threshold", "none"] if cfg.gate else ["--gate-starts", 0]
            words += [] if "--steps" in cell.flags else ["--steps", cfg.steps]
        else:
            words += ["--init", policy]
        trained = run_once(folder, *words, *cell.flags) / "model.safetensors"
        log = read_lines(folder / "log.jsonl")
    before = Path(cfg.runs) / f"base_{start.replace(' ', '_')}"
    old, new = _measure(cfg, before, policy), _measure(cfg, folder, trained, cell.x0)
    changes = {"played": (old["sampled"], new[cell.x0])} | {kind: (old[kind], new[kind]) for kind in ("zero", "std")}
    entry = {
        "commit": commit(),
        "machine": machine(),
        "flags": " ".join(cell.flags),
        "policy": start,
        "world_model": cell.world_model if cell.script == "train_rft.py" else None,
        "x0": cell.x0,
        "minutes": max((row["minutes"] for row in log if "minutes" in row), default=None),
        "gate": {key: value for row in log[:1] for key, value in row.items() if key.startswith("gate")},
        "reward": {"first": log[0]["reward"], "last": log[-1]["reward"]} if log and "reward" in log[0] else None,
        "chunks": {kind: difference(*pair) for kind, pair in changes.items()},
        "outcomes": play(cfg, folder, trained, cell.x0),
    }
    return rounded(entry)


def recorded(before: dict) -> dict[str, str]:
    """Return where an entry was measured first; that it is read again changes nothing."""
    return {name: before[name] for name in ("commit", "machine") if name in before}


def main(cfg: Config) -> dict:
    """Run what is missing; return what the JSON file holds.

    Raises:
        ValueError: an unknown cell, or a JSON file of other settings or another policy.
    """
    check_known(cfg.cells, CELLS, "cell")
    report = {"command": "python studies/rft_factors.py", "base": {}} | read_report(cfg, "cells", FREE)
    cells = report["cells"]
    for name in cfg.cells:
        start = cfg.start or CELLS[name].policy
        base = base_of(cfg, start)
        if report["base"].get(start, base)["chunks"] != base["chunks"]:
            raise ValueError(f"{cfg.out} holds cells of another policy {start!r}: give another file as --out")
        report["base"][start] = base | recorded(report["base"].get(start, {}))
        cells[name] = run_cell(cfg, name) | recorded(cells.get(name, {}))
        if (model := cells[name]["world_model"]) in WORLD_MODELS:
            report.setdefault("world_models", {})[model] = rounded(last_row(world_model(cfg, model)))
        write(cfg.out, report)
    print("\n" + cell_table(report))
    return report


if __name__ == "__main__":
    main(parse(Config, PRESETS, sys.argv[1:], __doc__))
