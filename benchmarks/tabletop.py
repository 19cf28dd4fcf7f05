"""Measure the Tabletop suites' control steps per second on one core, with and without an image at every step.

    OMP_NUM_THREADS=1 python benchmarks/tabletop.py

Plays recorded actions of the expert from one start per suite. Expected on one server core of the 2020s: 300 or more
steps per second with a 64 px image at every step.
"""

from __future__ import annotations

import json
import os
import platform
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from vlarft.run.config import opt, parse
from vlarft.sim import TABLETOP_SUITES, make_env
from vlarft.sim.experts import Expert
from vlarft.sim.tabletop import TabletopEnv


@dataclass(frozen=True)
class Config:
    out: str = opt("runs/benchmarks/tabletop_speed.json", "JSON file to write")
    steps: int = opt(600, "control steps measured per suite and image size")
    image_sizes: tuple[int, ...] = opt((64, 128, 256), "sides of the images [px]")
    task: int = opt(0, "task of each suite")


PRESETS = {"paper": Config(), "smoke": Config(steps=20, image_sizes=(64,))}


def main(config: Config) -> dict:
    """Measure, print and write the rates."""
    import mujoco

    rows = []
    for suite in TABLETOP_SUITES:
        actions = _expert_actions(make_env(suite, config.task))
        for size in (0, *config.image_sizes):
            env = make_env(suite, config.task, max(size, 1))
            wall, cpu = steps_per_second(env, actions, config.steps, images=size > 0)
            rates = {"steps_per_second": round(wall, 1), "steps_per_cpu_second": round(cpu, 1)}
            rows.append({"suite": suite, "image_size": size or None, **rates})
            what = f"{size} px" if size else "no image"
            print(f"{suite:18s} {what:9s} {wall:6.0f} steps/s, {cpu:6.0f} per CPU second", flush=True)
    report = {
        "command": "OMP_NUM_THREADS=1 python benchmarks/tabletop.py",
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f} at the end",
        "mujoco": mujoco.__version__,
        "steps": config.steps,
        "rows": rows,
    }
    Path(config.out).parent.mkdir(parents=True, exist_ok=True)
    Path(config.out).write_text(json.dumps(report, indent=1) + "\n")
    return report


def steps_per_second(env: TabletopEnv, actions: np.ndarray, steps: int, images: bool) -> tuple[float, float]:
    """Step, and if `images` also observe, through the recorded actions; resets are included.

    Returns:
        Steps per second of wall time, and per second of CPU time, which depends less on other programs.
    """
    env.reset(seed=0)
    env.observe()
    wall, cpu = time.perf_counter(), time.process_time()
    for i in range(steps):
        if i % len(actions) == 0:
            env.reset(seed=0)
        if images:
            env.observe()
        env.step(actions[i % len(actions)])
    return steps / (time.perf_counter() - wall), steps / (time.process_time() - cpu)


def _expert_actions(env: TabletopEnv) -> np.ndarray:
    env.reset(seed=0)
    expert, actions = Expert(env), []
    while not actions or not env.success():
        actions.append(expert.act().executed)
        if env.step(actions[-1]).done:
            break
    return np.array(actions)


if __name__ == "__main__":
    main(parse(Config, PRESETS, sys.argv[1:], __doc__))
