"""Write every table and figure of the documentation that comes from a JSON file.

    python studies/tables.py                  rewrites the tables in README.md and docs/, redraws docs/images/
    python studies/tables.py --no-figures     the tables alone; figures need matplotlib

A page says where a table belongs by a pair of comments, and everything between them is replaced:

    <!-- table: grid, tabletop_goal -->
    <!-- end -->

The names are the keys of `TABLES`. Figures are redrawn from the same files. Takes some ten seconds; changes nothing
where the files in results/ have not changed, which a test asserts.
"""

import json
import re
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import cells
import figures
import outcomes
import reliability_tables as reliability
import speed_tables as speed
import stage_tables as stage
from findings import findings_table
from labels import CELLS
from outcomes import GRIPPER, LONG, RESAMPLED, ZERO
from records import read

from vlarft.run.config import opt, parse

ROOT = Path(__file__).resolve().parents[1]
BLOCK = re.compile(r"(<!-- table: (.+?) -->\n).*?(<!-- end -->)", re.DOTALL)
read = cache(read)


@dataclass(frozen=True)
class Config:
    figures: bool = opt(True, "redraw the figures as well")


PRESETS = {"paper": Config()}
SUITES = "tabletop_object", "tabletop_spatial", "tabletop_goal", "tabletop_long"
EXTRA, EXTRA_LONG, PAPER = "extra SFT", "extra SFT, 400 steps", "RFT R3, demonstrations only"
RIVALS = (
    *((arm, EXTRA) for arm in ("RFT R3", PAPER, "RFT divergence", "RFT R1 per step", LONG, "regression", ZERO)),
    *((arm, EXTRA_LONG) for arm in (LONG, ZERO)),
    *((arm, "regression") for arm in (LONG, PAPER)),
    (LONG, ZERO),
    (PAPER, "RFT R3"),
    (PAPER, "RFT R1 per step"),
    (f"{LONG}, x_0 = 0", ZERO),
    (f"{EXTRA_LONG}, x_0 = 0", ZERO),
    (f"{PAPER}, x_0 = 0", ZERO),
    (f"{PAPER}, x_0 = 0", f"{LONG}, x_0 = 0"),
    (f"{PAPER}, x_0 = 0", f"{EXTRA_LONG}, x_0 = 0"),
    (GRIPPER, ZERO),
    (RESAMPLED, "SFT"),
)
ROUGH_RIVALS = (
    *((arm, EXTRA) for arm in ("RFT R3", "RFT divergence", "RFT R1 per step")),
    ("RFT R1 per step", "RFT divergence"),
    *((f"{arm}, gripper sampled", GRIPPER) for arm in ("RFT R3", "RFT divergence", "RFT R1 per step", EXTRA)),
)
SECOND_RIVALS = (LONG, EXTRA_LONG), (f"{LONG}, x_0 = 0", ZERO), (f"{EXTRA_LONG}, x_0 = 0", ZERO)
PERTURBED_RIVALS = tuple((arm, EXTRA) for arm in ("RFT R3", "RFT divergence", LONG))
COURSES = (
    *("RFT R3", "RFT R3, averaged", "RFT R3, symmetric", "RFT R3, on-policy", PAPER),
    *("RFT divergence", "RFT divergence, averaged", "RFT divergence, symmetric", "RFT divergence, steady"),
    *("RFT divergence, on-policy", "RFT divergence, on-policy, averaged", "RFT R1 per step"),
)
COLOUR = "colour errors weighed heavier †"  # the option is gone; commit c324b71 can repeat the runs
ACTIONS, POSES = "actions drive the frames", "poses drive the frames"
EPISODES = {  # of failures.py: actions' noise of the experts, and the policy
    "runs/study_rough/tabletop_spatial/seed0": "rough",
    "runs/study/tabletop_spatial/seed0": "usual",
}


def result(name: str) -> dict:
    """Read a JSON file of results/ that is no study's."""
    return json.loads((ROOT / "results" / f"{name}.json").read_text())


def grid() -> dict:
    return read("grid")["runs"]


def imagination_changes() -> list[str]:
    """List the arms of imagination_study.py that change one thing, after the preset as it is."""
    names = dict.fromkeys(name.split("/")[1] for name in read("imagination")["runs"])
    return [ACTIONS, *sorted(set(names) - {ACTIONS, "before", COLOUR, POSES})]


def failure_labels() -> dict[str, str]:
    """Return what failures.py's files are called."""
    found = {}
    for name in read("failures")["files"]:
        experts = next(label for start, label in EPISODES.items() if name.startswith(start + "/"))
        run, kind = name.split("/")[-3:-1]
        policy = "SFT" if run == "sft" else run.replace("_", " ")
        policy += {"eval_none": "", "eval_none_zero": ", x_0 = 0", "eval_none_gripper": ", gripper sampled"}[kind]
        found[name] = f"{experts} experts: {outcomes.arm(policy)}"
    return found


def named(report: dict, start: str) -> list[str]:
    """List the cells of a report that go on from one policy, in the order of the labels."""
    having = {name for name, found in report["cells"].items() if found["policy"] == start}
    return [name for name in CELLS if name in having]


def factors(start: str, table: Callable = cells.cell_table, **how: str) -> str:
    report = read("factors")
    return table(report, named(report, start), **how)


TABLES: dict[str, Callable[[], str]] = {
    "findings": lambda: findings_table(grid()),
    "grid": lambda: outcomes.success_table(grid()),
    "grid, compared": lambda: outcomes.rivals_table(grid(), RIVALS),
    "grid, by SFT's outcome": lambda: outcomes.fates_table(grid()),
    **{f"grid, {suite}": lambda suite=suite: outcomes.success_table(grid(), suite) for suite in SUITES},
    **{f"grid, {suite}, chunks": lambda suite=suite: outcomes.chunk_table(grid()[suite]) for suite in SUITES},
    "grid, true error in training": lambda: outcomes.course_table(grid(), "tabletop_spatial", COURSES),
    "gates, gains": lambda: outcomes.gain_table(outcomes.gated_runs(grid()), 0.25),
    "gates, 32 starts": lambda: stage.gates_table(read("gates"), read("gates_again")),
    "perturbed": lambda: outcomes.starts_table(read("perturbed")["runs"]["tabletop_spatial"]),
    "perturbed, compared": lambda: outcomes.rivals_table(read("perturbed")["runs"], PERTURBED_RIVALS),
    "perturbed, chunks": lambda: outcomes.chunk_table(read("perturbed")["runs"]["tabletop_spatial"]),
    "second round": lambda: outcomes.success_table(read("second_round")["runs"]),
    "second round, compared": lambda: outcomes.rivals_table(read("second_round")["runs"], SECOND_RIVALS),
    "second round, chunks": lambda: outcomes.chunk_table(read("second_round")["runs"]["tabletop_spatial"]),
    "ten tasks": lambda: outcomes.counted_table(read("ten_tasks")["starts"]),
    "rough": lambda: outcomes.success_table(read("rough")["runs"]),
    "rough, compared": lambda: outcomes.rivals_table(read("rough")["runs"], ROUGH_RIVALS),
    "rough, chunks": lambda: outcomes.chunk_table(read("rough")["runs"]["tabletop_spatial"]),
    "rough, dimensions": lambda: outcomes.dimension_table(read("rough")["runs"], "tabletop_spatial"),
    "closed loop": lambda: stage.closed_loop_table(read("closed_loop")),
    "closed loop, judged": lambda: stage.closed_loop_table(read("closed_loop_judged")),
    "closed loop, gate": lambda: stage.closed_loop_gate_table(read("closed_loop_judged")),
    "failures": lambda: stage.failures_table(read("failures")["files"], failure_labels()),
    "clean": lambda: cells.cell_table(read("clean"), rival="study, R1"),
    "factors, 5200 steps": lambda: factors("four times as long", rival="plateau, regression"),
    "factors, 2600 steps": lambda: factors("twice as long"),
    "factors, 2600 steps, starts": lambda: factors("twice as long", cells.start_table),
    "factors, 1300 steps": lambda: factors("default"),
    "few, 20": lambda: cells.cell_table(read("few"), rival="plateau, regression"),
    "few, 5": lambda: cells.cell_table(read("few5")),
    "grid factors": lambda: cells.cell_table(read("grid_factors"), rival="study, R1"),
    "grid factors, seed 1": lambda: cells.cell_table(read("grid_factors_seed1")),
    "grid factors, seed 2": lambda: cells.cell_table(read("grid_factors_seed2")),
    "longer world model": lambda: stage.longer_table(read("grid_factors_again"), read("gates_again")),
    "longer world model, cells": lambda: cells.cell_table(read("grid_factors_again"), rival="study, R1"),
    "longer world model, seeds": lambda: cells.repeated_table(read("grid_factors_again")),
    "sft": lambda: stage.sft_table(read("sft")),
    "world model": lambda: stage.wm_table(read("world_model")),
    "world model, imagination": lambda: stage.imagination_table(read("world_model")),
    "imagination": lambda: stage.imagination_arms_table(read("imagination"), ("before", ACTIONS, POSES, COLOUR)),
    "imagination, gains": lambda: stage.imagination_gains_table(read("imagination"), ACTIONS, "before"),
    "imagination, poses": lambda: stage.imagination_gains_table(read("imagination"), POSES, ACTIONS),
    "imagination, changes": lambda: stage.imagination_arms_table(
        read("imagination"), imagination_changes(), "tabletop_object", "0"
    ),
    "exploration": lambda: stage.exploration_table(read("exploration")),
    "group ranking": lambda: stage.ranking_table({"demo's, refreshed": read("group_ranking")}),
    "libero, minutes": lambda: stage.libero_minutes_table(read("libero")),
    "libero, curve": lambda: stage.libero_curve_table(read("libero")),
    "libero, frames": lambda: stage.libero_frames_table(read("libero")),
    "libero, plain": lambda: stage.libero_arms_table(read("libero"), perturbed=False),
    "libero, displaced": lambda: stage.libero_arms_table(read("libero"), perturbed=True),
    "libero, released": lambda: stage.libero_arms_table(read("libero_released")),
    "libero, evaluation": lambda: speed.libero_evaluation_table(result("libero_evaluation")),
    "demo": lambda: stage.demo_table(result("demo")),
    "demo, world model": lambda: stage.demo_world_model_table(result("demo")),
    "tabletop experts": lambda: stage.experts_table(result("tabletop_experts")),
    "libero experts": lambda: stage.experts_table(result("libero_experts")),
    "rft step": lambda: speed.step_table(result("rft_step")),
    "rft step, pixels": lambda: speed.step_table(result("rft_step_pixels")),
    "rft step, faster": lambda: speed.faster_table(
        {"a quarter of the tokens": result("rft_step"), "pixels": result("rft_step_pixels")}
    ),
    "rollout": lambda: speed.rollout_table(result("rollout")),
    "episodes": lambda: speed.episodes_table(result("episodes")),
    "precision": lambda: speed.precision_table(
        {
            "AMX": result("precision"),
            "AMX, 128 pixels": result("precision_128"),
            "AVX512-BF16": result("precision_avx512"),
        }
    ),
    "formats": lambda: stage.formats_table(read("precision")),
    "undone": lambda: speed.undone_table(result("undone")),
    "pixels, decode": lambda: speed.pixels_table(result("pixels")["decode"], "decode"),
    "pixels, reward": lambda: speed.pixels_table(result("pixels")["reward"], "reward (L1 and SSIM)"),
    "distinct": lambda: speed.distinct_table(result("distinct")),
    "training": lambda: speed.training_table(result("training")),
    "reliability, files": lambda: reliability.damaged_table(result("reliability")),
    "reliability, writers": lambda: reliability.interrupted_table(result("reliability")),
    "reliability, command lines": lambda: reliability.refused_table(result("reliability")),
    "reliability, breakages": lambda: reliability.noticed_table(result("mutations")),
    "reliability, commands": lambda: reliability.commands_of(result("reliability")),
    "head": lambda: speed.head_table(result("policy")),
}


def pages() -> list[Path]:
    """List README and all pages of docs/."""
    return [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md")), ROOT / "studies" / "README.md"]


def render(text: str) -> str:
    """Render a page with its tables as the JSON files have them.

    Raises:
        ValueError: a name that is not in `TABLES`, or a block without its end.
    """
    starts = re.findall(r"<!-- table: (.+?) -->", text)
    if unknown := [name for name in starts if name not in TABLES]:
        raise ValueError(f"no table {unknown[0]!r}; there are: {', '.join(TABLES)}")
    if not len(starts) == text.count("<!-- end -->") == len(BLOCK.findall(text)):
        raise ValueError(f"{len(starts)} tables begin, {text.count('<!-- end -->')} end: each needs <!-- end -->")
    return BLOCK.sub(lambda match: f"{match[1]}{TABLES[match[2]]()}\n{match[3]}", text)


def tables_in(text: str) -> Iterator[str]:
    """Yield the tables of a page, without their markers."""
    for match in BLOCK.finditer(text):
        yield match[0][len(match[1]) : -len(match[3])]


def main(cfg: Config) -> None:
    """Rewrite the tables, redraw the figures."""
    for page in pages():
        if (after := render(before := page.read_text())) != before:
            page.write_text(after)
            print(f"{page.relative_to(ROOT)} rewritten")
    if cfg.figures:
        images = ROOT / "docs" / "images"
        figures.draw_findings(grid(), images / "findings.png")
        figures.draw_gates(outcomes.gated_runs(grid()), 0.25, images / "trust_gate.png")


if __name__ == "__main__":
    main(parse(Config, PRESETS, sys.argv[1:], __doc__))
