"""Success of LIBERO's scripted experts on the benchmark's initial states.

    python studies/libero_experts.py --suites libero_goal libero_spatial libero_object
    python studies/libero_experts.py --suites libero_10 --tasks 0 1 2 3 4 5 6 7 8
    python eval_libero.py --policies runs/libero_experts/episodes.jsonl random --suites libero_object --episodes 20

The last command plays the recorded actions again, open loop, through the evaluation. The experts were written while
looking at initial states 20 to 49 (and, of libero_object and libero_spatial, at sampled starts); states 0 to 19, the
default here, were not used for that. Expected: at least 90 % of each task, but for task 9 of libero_10, which is
refused: its microwave has no plan.

Writes <out-dir>/episodes.jsonl, one line an episode in the format of eval_libero.py, appended as its task ends, so that
the same command goes on where it was stopped (another version of the expert needs another folder); and the JSON, in
which the rows of tasks that were not asked for stay.
"""

from __future__ import annotations

import json
import shlex
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from stages import commit
from tqdm import tqdm

from vlarft.run.checkpoint import append_line, open_run, write_atomic
from vlarft.run.config import opt, parse
from vlarft.sim import LIBERO_SUITES, make_env, task_names
from vlarft.sim.libero_experts import LiberoExpert
from vlarft.sim.perturb import Perturbation
from vlarft.sim.workers import run_jobs
from vlarft.statistics import wilson_interval


@dataclass(frozen=True)
class Config:
    out: str = opt("runs/libero_experts.json", "JSON file to write")
    out_dir: str = opt("runs/libero_experts", "folder of the recorded episodes")
    suites: tuple[str, ...] = opt(("libero_object", "libero_spatial"), "suites to run")
    tasks: tuple[int, ...] = opt(tuple(range(10)), "tasks of each suite")
    states: tuple[int, ...] = opt(tuple(range(20)), "initial states of each task")
    noise: float = opt(0.0, "standard deviation of the action noise, action units")
    speed: float = opt(1.0, "largest translation, action units")
    perturb: str | None = opt(None, 'perturbed starts, for example "object:2.5"; none = the plain states')
    workers: int = opt(1, "worker processes; 0 plays in this process")


PRESETS = {"paper": Config(), "smoke": Config(suites=("libero_object",), tasks=(0,), states=(0,), workers=0)}


def play(config: Config, suite: str, task: int, states: list[int]) -> list[dict]:
    """Records of the expert's episodes, as eval_libero.py writes them."""
    env = make_env(suite, task, 64)
    perturb = None if config.perturb is None else Perturbation.parse(config.perturb)
    records = []
    for state in states:
        env.reset(init_state=state, perturb=perturb)
        expert = LiberoExpert(env, seed=state, action_noise=config.noise, speed=config.speed)
        actions, done = [], False
        while not done:
            actions.append(expert.act().executed.astype(np.float32))
            success, done = env.step(actions[-1])
        record = {"policy": "expert", "suite": suite, "task": task, "init_state": state, "success": success}
        record |= {"steps": len(actions), "rejected_starts": env.num_rejected, "visuals": env.visuals}
        records.append({**record, "actions": [[float(f"{number:.9g}") for number in action] for action in actions]})
    return records


def main(config: Config) -> dict:
    """Plays what is missing, prints a line per task, writes the figures."""
    open_run(config.out_dir, config, ignore=("out", "suites", "tasks", "states", "workers"))
    log = Path(config.out_dir) / "episodes.jsonl"
    whole = [line for line in (log.read_text() if log.is_file() else "").splitlines(True) if line.endswith("\n")]
    write_atomic(log, lambda tmp: tmp.write_text("".join(whole)))  # without a line that a kill cut short
    records = [json.loads(line) for line in whole]
    done = {(r["suite"], r["task"], r["init_state"]) for r in records}
    jobs = []
    for suite in config.suites:
        for task in config.tasks:
            if todo := [s for s in config.states if (suite, task, s) not in done]:
                jobs.append((config, suite, task, todo))
    with log.open("ab", buffering=0) as file:
        for _, played, _ in tqdm(run_jobs(play, jobs, config.workers), total=len(jobs), desc="tasks", disable=None):
            records += played
            for record in played:
                append_line(file, json.dumps(record))
    rows = []
    for suite in config.suites:
        for task in config.tasks:
            own = [r for r in records if r["suite"] == suite and r["task"] == task and r["init_state"] in config.states]
            settings = {"states": list(config.states), "noise": config.noise, "speed": config.speed}
            settings |= {"perturb": config.perturb, "command": shlex.join(["python", *sys.argv]), "commit": commit()}
            won = sum(r["success"] for r in own)
            rate, low, high = wilson_interval(won, len(own))
            row = {"suite": suite, "task": task, "name": task_names(suite)[task], "visuals": own[0]["visuals"]}
            row |= {"successes": won, "episodes": len(own), "rate": rate, "wilson_95": [round(low, 4), round(high, 4)]}
            row["mean_steps"] = round(sum(r["steps"] for r in own) / len(own), 1)
            row["rejected_starts"] = sum(r["rejected_starts"] for r in own)
            rows.append({**row, **settings})
            print(f"{suite:15s} {row['name'][:70]:70s} {won:3d}/{len(own)}  {row['mean_steps']:.0f} steps", flush=True)
    for suite in config.suites:
        own = [row for row in rows if row["suite"] == suite]
        won, played = (sum(row[key] for row in own) for key in ("successes", "episodes"))
        print(f"{suite}: {won}/{played}, lowest task {min(row['rate'] for row in own):.0%} ({own[0]['visuals']})")
    out = Path(config.out)
    asked = {(row["suite"], row["task"]) for row in rows}
    kept = json.loads(out.read_text())["rows"] if out.is_file() else []
    rows += [row for row in kept if (row["suite"], row["task"]) not in asked]
    rows.sort(key=lambda row: (list(LIBERO_SUITES).index(row["suite"]), row["task"]))
    report = {"rows": rows}
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(report, indent=1) + "\n")
    return report


if __name__ == "__main__":
    main(parse(Config, PRESETS, sys.argv[1:], __doc__))
