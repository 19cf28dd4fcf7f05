"""Time LIBERO's evaluation against a plain serial loop, on the same starts: are the outcomes the same, and how fast?

    python benchmarks/libero_evaluation.py --policy runs/libero/libero_object/sft

The plain loop is what public evaluation scripts do: one process of one thread, one episode after the other, robosuite's
own control step (without its observables, which public scripts compute too), an image at every step, one observation
per call of the policy. `eval_libero.py` renders where a chunk begins only, calls the policy for many episodes at once,
computes a control step's positions once, and has a worker for each core. Both render with the same settings, so that
the policy sees the same pixels, and play from x_0 = 0. Rounding differs between one observation and ten, and the
simulator amplifies it: the report counts equal outcomes and equal numbers of steps. Writes one JSON file, with the
minutes that 500 episodes take at each pace.
"""

import os
import sys
import tempfile
import time
from dataclasses import dataclass, replace
from pathlib import Path
from unittest.mock import patch

import numpy as np
import torch
from timing import machine

from vlarft.policy import VLAPolicy
from vlarft.run.checkpoint import write_json
from vlarft.run.config import opt, parse, to_dict
from vlarft.sim import LIBERO_SUITES, make_env, task_index
from vlarft.sim.libero_physics import LiberoPhysics

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # where the stage scripts are, which are no package
import eval_libero

EXECUTED = 8  # actions of a chunk, as in eval_libero.py


@dataclass(frozen=True)
class Config:
    policy: str = opt("runs/libero/libero_object/sft", "policy to play")
    suite: str = opt("libero_object", "suite to play")
    tasks: tuple[str, ...] = opt(("0", "1"), "tasks")
    episodes: int = opt(10, "initial states per task")
    workers: int = opt(os.cpu_count() or 1, "worker processes of eval_libero.py")
    out: str = opt("runs/benchmarks/libero_evaluation.json", "JSON file to write")


PRESETS = {"paper": Config(), "smoke": Config(suite="tabletop_object", tasks=("0",), episodes=2, workers=0)}


@torch.no_grad()
def plain_loop(cfg: Config, fast: bool) -> dict[tuple[int, int], tuple[bool, int]]:
    """Play as public scripts do: (task, initial state) -> success and steps."""
    policy, outcomes = VLAPolicy.load(cfg.policy).for_playing(), {}
    zero = torch.zeros(1, policy.cfg.flow.chunk, policy.cfg.flow.action_dim)
    for task in (task_index(cfg.suite, name) for name in cfg.tasks):
        env = make_env(cfg.suite, task, policy.vlm.image_size, cameras=policy.cfg.cameras, fast_rendering=fast)
        for state in range(cfg.episodes):
            env.reset(init_state=state)
            chunk: list[np.ndarray] = []
            done = False
            while not done:
                observation = env.observe()
                chunk = chunk or list(policy.act([observation], noise=zero)[0].numpy())[:EXECUTED]
                result = env.step(chunk.pop(0))
                done = result.done
            outcomes[task, state] = result.success, env.num_steps
    return outcomes


def main(cfg: Config) -> dict:
    """Time both; write the JSON file and return its content."""
    torch.set_num_threads(1)
    fast = cfg.suite in LIBERO_SUITES
    started = time.perf_counter()
    with patch.object(LiberoPhysics, "_libero_step", lambda physics, action: physics.libero.step(action)):
        plain = plain_loop(cfg, fast)
    seconds = {"plain serial loop": time.perf_counter() - started}
    with tempfile.TemporaryDirectory() as folder:
        evaluation = replace(
            eval_libero.PRESETS["libero" if fast else "small"], policies=(cfg.policy,), suites=(cfg.suite,),
            tasks=cfg.tasks, episodes=cfg.episodes, workers=cfg.workers, noise="zero", out_dir=folder,
        )  # fmt: skip
        started = time.perf_counter()
        eval_libero.main(evaluation)
        seconds["eval_libero.py"] = time.perf_counter() - started
        ours = eval_libero.earlier_records(evaluation, eval_libero.check(evaluation))
    pairs = [(plain[record["task"], record["init_state"]], (record["success"], record["steps"])) for record in ours]
    same, same_steps = sum(one[0] == other[0] for one, other in pairs), sum(one == other for one, other in pairs)
    report = {
        "command": "python benchmarks/libero_evaluation.py",
        "config": to_dict(cfg),
        **machine("cpu"),
        "episodes": len(plain),
        "same_outcome": same,
        "same_outcome_and_steps": same_steps,
        "seconds": seconds,
        "times_as_long": seconds["plain serial loop"] / seconds["eval_libero.py"],
        "minutes_of_500": {name: spent / len(plain) * 500 / 60 for name, spent in seconds.items()},
    }
    write_json(cfg.out, report)
    print(f"{same} of {len(plain)} outcomes are the same, {same_steps} with their numbers of steps")
    print(f"{report['times_as_long']:.1f} times as fast")
    print("500 episodes: " + ", ".join(f"{name} {m:.0f} min" for name, m in report["minutes_of_500"].items()))
    return report


if __name__ == "__main__":
    main(parse(Config, PRESETS, sys.argv[1:], __doc__))
