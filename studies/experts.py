"""Success of the scripted experts on the 50 evaluation states of every tabletop task, with and without action noise.

    python studies/experts.py

Expected: at least 98 % of the states of every task without noise, at least 90 % with the noise of `collect_demos.py`.
"""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

from vlarft.run.config import opt, parse
from vlarft.sim import NUM_INITIAL_STATES, TABLETOP_SUITES, make_env, task_names
from vlarft.sim.experts import Expert
from vlarft.sim.perturb import Perturbation
from vlarft.statistics import wilson_interval


@dataclass(frozen=True)
class Config:
    out: str = opt("runs/tabletop_experts.json", "JSON file to write")
    suites: tuple[str, ...] = opt(tuple(TABLETOP_SUITES), "suites to run")
    tasks: int = opt(10, "the first so many tasks of each suite")
    states: int = opt(NUM_INITIAL_STATES, "the first so many evaluation states of each task")
    noises: tuple[float, ...] = opt((0.0, 0.2), "standard deviations of the action noise, action units")
    perturb: str | None = opt(None, 'perturbed starts, for example "object:2.5"; none = the plain states')


PRESETS = {"paper": Config(), "smoke": Config(tasks=1, states=2)}


def main(config: Config) -> dict:
    """Runs, prints and writes the figures."""
    perturb = None if config.perturb is None else Perturbation.parse(config.perturb)
    rows = []
    for suite in config.suites:
        for task, name in enumerate(tqdm(task_names(suite)[: config.tasks], desc=suite, disable=None)):
            env = make_env(suite, task)
            for noise in config.noises:
                outcomes, lengths, rejected = [], [], 0
                for state in range(config.states):
                    env.reset(init_state=state, perturb=perturb)
                    rejected += env.num_rejected
                    expert = Expert(env, seed=state, action_noise=noise)
                    while not (result := env.step(expert.act().executed)).done:
                        pass
                    outcomes.append(result.success)
                    lengths.append(env.num_steps)
                won = sum(outcomes)
                _, low, high = wilson_interval(won, len(outcomes))
                rows.append(
                    {
                        "suite": suite,
                        "task": task,
                        "name": name,
                        "noise": noise,
                        "successes": won,
                        "episodes": len(outcomes),
                        "rate": won / len(outcomes),
                        "wilson_95": [round(low, 4), round(high, 4)],
                        "mean_steps": round(sum(lengths) / len(lengths), 1),
                        "max_steps": max(lengths),
                        "rejected_starts": rejected,
                    }
                )
                print(f"{suite:17s} {name[:60]:60s} noise {noise:.1f}: {won:3d}/{len(outcomes)}", flush=True)
    report = {
        "command": "python studies/experts.py",
        "perturb": config.perturb,
        "lowest_rate": {
            str(noise): min(row["rate"] for row in rows if row["noise"] == noise) for noise in config.noises
        },
        "rows": rows,
    }
    Path(config.out).parent.mkdir(parents=True, exist_ok=True)
    Path(config.out).write_text(json.dumps(report, indent=1) + "\n")
    print("lowest rate by noise:", report["lowest_rate"])
    return report


if __name__ == "__main__":
    main(parse(Config, PRESETS, sys.argv[1:], __doc__))
