"""What decides whether fine-tuning inside the world model helps: one factor at a time, from one plateaued policy.

    python demo.py                                              makes the demonstrations and a tokenizer
    python studies/wm_study.py                            trains the world models
    python studies/sft_study.py                              trains the policies
    python studies/rft_factors.py                            fine-tunes and plays every cell

Every cell is one training. Up to the cells named "plateau", one option is changed against the first cell, which is
fine-tuning with R3 as `train_rft.py --preset tiny` does it, from the policy of "twice as long" in the world model of
"three times as long"; the others go on from the policy of "four times as long" (factor_cells.py). All cells play the
same starts, plain and perturbed. Finished cells are not run again.

The cells named "study" change one option of an arm of `rft_study.py`, and go on from its policy in its world model:

    python studies/rft_study.py --suites tabletop_spatial --seeds 0
    python studies/rft_factors.py --suite tabletop_spatial --demos runs/study/tabletop_spatial/demos \
        --policies runs/study/tabletop_spatial/seed0 --world-models runs/study/tabletop_spatial \
        --runs runs/study/tabletop_spatial/seed0/factors --out results/rft_study_factors.json \
        --rival "study, R1" --cells "study, R1" "study, R1, half the noise" ...

World models that only they have (WORLD_MODELS in factor_cells.py) are trained there first.
results/rft_study_factors_seed1.json and _seed2.json are the same from the policies of the study's other seeds,
results/rft_study_factors_again.json from seed 0's, trained again on another processor.

Few demonstrations (docs/study.md): the same cells from another policy, in a world model that saw more,

    python collect_demos.py --preset tiny --demos-per-task 20 --out-dir runs/few/demos
    python train_sft.py --preset tiny --demos runs/few/demos --steps 2600 --out-dir runs/few/sft/twice_as_long
    python studies/rft_factors.py --demos runs/few/demos --policies runs/few/sft --start "twice as long" --no-gate \
        --runs runs/few/rft --out results/rft_few.json --cells "plateau, R1, credit per step" "plateau, extra SFT" ...

Five demonstrations a task of the study's suite, in its world model where a cell needs one,

    python collect_demos.py --preset tiny --suites tabletop_spatial --tasks 0 1 2 3 --demos-per-task 5 \
        --out-dir runs/few5/demos
    python train_sft.py --preset tiny --demos runs/few5/demos --steps 2600 --out-dir runs/few5/sft
    python train_sft.py --preset tiny --demos runs/few5/demos --steps 400 --out-dir runs/few5/early
    python studies/rft_factors.py --suite tabletop_spatial --demos runs/few5/demos --policies runs/few5 \
        --world-models runs/study/tabletop_spatial --no-gate --runs runs/few5/rft --out results/rft_few5.json \
        --rival "study, R1" --cells "study, R1" "study, x_0 = 0" "study, extra SFT" "study, regression" ...

Experts without action noise, which is 0.08 otherwise (rough ones are a matter of rft_study.py, --action-noise),

    python collect_demos.py --preset tiny --suites tabletop_spatial --tasks 0 1 2 3 --demos-per-task 50 \
        --action-noise 0 --out-dir runs/noise_0/demos
    python train_sft.py --preset tiny --demos runs/noise_0/demos --steps 2600 --out-dir runs/noise_0/sft
    python studies/rft_factors.py --suite tabletop_spatial --demos runs/noise_0/demos --policies runs/noise_0 \
        --world-models runs/study/tabletop_spatial --no-gate --runs runs/noise_0/rft --out results/rft_noise_0.json \
        --rival "study, R1" --cells "study, R1" "study, x_0 = 0" "study, extra SFT" "study, regression"

Writes one JSON: success rates with their 95 % intervals, the paired difference to the policy that was fine-tuned, and
what changed in the deterministic policy's chunks at held-out starts: their true error in the simulator, and how far the
draws lie apart. Outcomes start by start, too, in the order of tasks and initial states (1 = success; older cells are
without). The file gathers cells, of any invocation with the same settings and policies; under "repeated" what those
with several seeds of the fine-tuning say together, under "world_models" the last row of the logs of those trained here.
"""

import re
import sys
from dataclasses import dataclass
from pathlib import Path
from statistics import mean

import torch
from chunks import difference, measure
from factor_cells import CELLS, WORLD_MODELS
from stages import Starts, check_known, machine, rate, read_lines, read_report, run_once
from tables import percent, points, shift, table_row

from vlarft.run.checkpoint import write_json
from vlarft.run.config import opt, parse
from vlarft.statistics import paired_difference


@dataclass(frozen=True)
class Config:
    demos: str = opt("runs/demo/demos", "demonstrations")
    world_models: str = opt("runs/world_model", "folder of world_model.py's arms")
    policies: str = opt("runs/sft_study", "folder of sft_study.py's arms")
    runs: str = opt("runs/rft_factors", "folder for the cells")
    out: str = opt("results/rft_factors.json", "JSON file to write")
    cells: tuple[str, ...] = opt(tuple(name for name in CELLS if not name.startswith("study")), "cells to run")
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


FREE = "demos", "world_models", "policies", "runs", "out", "cells", "rival"  # may differ in one JSON file
ADDED = "outcomes", "training"  # of a policy, which older files are without
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


def world_model(cfg: Config, name: str) -> Path:
    """The checkpoint of a world model: of another study, or one that is trained here, unless that is done."""
    if name not in WORLD_MODELS:
        return arm(cfg.world_models, name)
    steps, flags = WORLD_MODELS[name]
    words = ["--preset", cfg.stage_preset, "--demos", cfg.demos, "--tokenizer", arm(cfg.world_models, "tokenizer")]
    folder = Path(cfg.world_models) / name.replace(" ", "_")
    return run_once(folder, "train_wm.py", *words, "--steps", steps, *flags) / "model.safetensors"


def play(cfg: Config, folder: Path, policy: Path, x0: str = "sampled") -> dict[str, str]:
    """Outcomes of a policy on every kind of start: perturbation -> start by start, tasks in their order, initial states
    in theirs (1 = success).
    """
    starts = Starts(cfg.suite, cfg.tasks, cfg.episodes, cfg.stage_preset)
    found = {
        perturb: starts.play(folder / f"eval_{re.sub('[:/]', '_', perturb)}", policy, perturb, "--noise", x0)
        for perturb in cfg.perturb
    }
    return {kind: "".join(str(int(won)) for _, won in sorted(of.items())) for kind, of in found.items()}


def wins(outcomes: str) -> list[bool]:
    """`play`'s string of one kind of start, or of several in a row."""
    return [outcome == "1" for outcome in outcomes]


def compare(base: dict[str, str], own: dict[str, str]) -> dict[str, dict]:
    """Rates on every kind of start and on all of them, and paired differences to the policy before."""
    before, after = ({**of, "all": "".join(of.values())} for of in (base, own))
    return {
        kind: {**rate(wins(of)), "against_base": paired_difference(wins(before[kind]), wins(of))._asdict()}
        for kind, of in after.items()
    }


def _measure(cfg: Config, folder: Path, policy: Path, x0: str = "sampled") -> dict[str, list[float]]:
    x0s = dict.fromkeys(("sampled", "zero", x0))
    return measure(folder / "chunks.json", policy, cfg.demos, cfg.error_starts, cfg.error_draws, tuple(x0s))


def folder_of(cfg: Config, name: str) -> Path:
    """Where a cell lies."""
    return Path(cfg.runs) / "_".join(re.findall(r"[\w'.-]+", name))


def against(rival: dict[str, str], own: dict[str, str]) -> dict:
    """Paired difference of a cell's outcomes to another one's, over all starts."""
    return paired_difference(*(wins("".join(of[kind] for kind in own)) for of in (rival, own)))._asdict()


def last_row(checkpoint: Path) -> dict | None:
    """The last row of a training's log; none where it was too short to log."""
    log = checkpoint.with_name("log.jsonl")
    rows = read_lines(log) if log.is_file() else []
    return rows[-1] if rows else None


def base_of(cfg: Config, start: str) -> dict:
    """Rates of the policy that cells go on from, means of its chunks' errors, the last row of its training's log."""
    parts = cfg, Path(cfg.runs) / f"base_{start.replace(' ', '_')}", arm(cfg.policies, start)
    outcomes = play(*parts)
    rates = {kind: rate(wins(found)) for kind, found in outcomes.items()}
    chunks = {f"chunks_{name}": mean(values) for name, values in _measure(*parts).items()}
    return rates | chunks | {"outcomes": outcomes, "training": last_row(arm(cfg.policies, start))}


def run_cell(cfg: Config, name: str) -> dict:
    """Train and play one cell, unless that is done."""
    cell, folder = CELLS[name], folder_of(cfg, name)
    start = cfg.start or cell.policy
    policy = trained = arm(cfg.policies, start)
    log: list[dict] = []
    if cell.script:
        words = [cell.script, "--preset", cfg.stage_preset, "--demos", cfg.demos]
        if cell.script == "train_rft.py":
            words += ["--policy", policy, "--world-model", world_model(cfg, cell.world_model)]
            words += ["--no-gate-stop", "--gate-interval", 1000] if cfg.gate else ["--gate-starts", 0]
            words += [] if "--steps" in cell.flags else ["--steps", cfg.steps]
        else:
            words += ["--init", policy]
        trained = run_once(folder, *words, *cell.flags) / "model.safetensors"
        log = read_lines(folder / "log.jsonl")
    before = Path(cfg.runs) / f"base_{start.replace(' ', '_')}"
    base, old, new = play(cfg, before, policy), _measure(cfg, before, policy), _measure(cfg, folder, trained, cell.x0)
    outcomes = play(cfg, folder, trained, cell.x0)
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
        "success": compare(base, outcomes),
        "outcomes": outcomes,
    }


def repeated(base: dict[str, dict], cells: dict[str, dict]) -> dict[str, dict]:
    """Cells that were run with several seeds of the fine-tuning, against their policy and against each other: "runs",
    the differences seed by seed, and their mean with an interval of 95 % over the starts. That does not hold what other
    seeds would do: see how far the runs lie apart.
    """
    groups: dict[str, list[dict]] = {}
    for name, cell in cells.items():
        if "outcomes" in cell:
            groups.setdefault(re.sub(r", seed \d+$", "", name), []).append(cell)
    groups = {name: group for name, group in groups.items() if len(group) > 1}
    won = {name: torch.tensor([wins("".join(c["outcomes"].values())) for c in group]) for name, group in groups.items()}
    before = {
        start: torch.tensor([wins("".join(of["outcomes"].values()))]) for start, of in base.items() if "outcomes" in of
    }
    found = {}
    for name, own in won.items():
        start = groups[name][0]["policy"]
        others = {other: of for other, of in won.items() if other != name and groups[other][0]["policy"] == start}
        runs = (own.double() - before[start].double()).mean(1).tolist()
        against = {other: over_starts(of, own) for other, of in others.items()}
        found[name] = {"runs": runs, "against_base": over_starts(before[start], own), "against": against}
    return found


def over_starts(first: torch.Tensor, second: torch.Tensor) -> dict[str, float]:
    """Mean difference of outcomes (runs, starts) on the same starts, with its 95 % interval; each start counts once,
    with the mean of its runs.
    """
    change = second.double().mean(0) - first.double().mean(0)
    middle, half = change.mean().item(), 1.96 * change.std().item() / len(change) ** 0.5
    return {"difference": middle, "low": middle - half, "high": middle + half}


def table(cells: dict[str, dict]) -> str:
    """Markdown, one row per cell: all starts together, what changed in the chunks, what the gate said."""
    heads = "cell", "success", "against the policy before", "against the rival", "true error", "from x_0 = 0", "spread"
    lines = [table_row([*heads, "gate"]), "|---" * (len(heads) + 1) + "|"]
    for name, cell in cells.items():
        found, gate = cell["success"]["all"], cell["gate"].get("gate")
        row = [name, percent(found), points(found["against_base"]), points(cell.get("against_rival"))]
        row += [shift(kind, cell[f"true_error_change{of}"]) for kind, of in (("sampled", ""), ("zero", "_from_zero"))]
        row += [shift("spread", cell["spread_change"]), "" if gate is None else f"{gate:.2f}"]
        lines.append(table_row(row))
    return "\n".join(lines)


def main(cfg: Config) -> dict:
    """Run what is missing; returns what the JSON file holds.

    Raises:
        ValueError: an unknown cell, or a JSON file of other settings or another policy.
    """
    check_known(cfg.cells, CELLS, "cell")
    report = {"command": "python studies/rft_factors.py", "base": {}} | read_report(cfg, "cells", FREE)
    report["machine"] = machine()
    cells = report["cells"]
    if cfg.rival is not None:
        check_known((cfg.rival,), (*cfg.cells, *(n for n in cells if "outcomes" in cells[n])), "rival among the cells")
    for name in cfg.cells:
        start = cfg.start or CELLS[name].policy
        base = base_of(cfg, start)
        if report["base"].get(start, base) | {name: base[name] for name in ADDED} != base:
            raise ValueError(f"{cfg.out} holds cells of another policy {start!r}: give another file as --out")
        report["base"][start], cells[name] = base, run_cell(cfg, name)
        if (model := cells[name]["world_model"]) in WORLD_MODELS:
            report.setdefault("world_models", {})[model] = last_row(world_model(cfg, model))
        write_json(cfg.out, report)
    for name, cell in cells.items():
        if cfg.rival not in (None, name) and "outcomes" in cell:
            cell["against_rival"] = {"rival": cfg.rival, **against(cells[cfg.rival]["outcomes"], cell["outcomes"])}
    report["repeated"] = repeated(report["base"], cells)
    write_json(cfg.out, report)
    print("\n" + table(cells))
    for name, found in report["repeated"].items():
        print(f"{name}, {len(found['runs'])} seeds: {points(found['against_base'])} against the policy before")
    return report


if __name__ == "__main__":
    main(parse(Config, PRESETS, sys.argv[1:], __doc__.splitlines()[0]))
