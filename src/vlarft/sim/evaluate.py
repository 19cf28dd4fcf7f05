"""A policy plays evaluation episodes, several side by side: what eval_libero.py and a fine-tuning run's curves share.

Shapes: B episodes, T chunk steps, A action dim, M noisy flow steps.
"""

import hashlib
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from vlarft import distributed
from vlarft.config import opt
from vlarft.policy import PolicyConfig, VLAPolicy
from vlarft.sim.perturb import Perturbation
from vlarft.sim.tabletop import NUM_INITIAL_STATES, make_env

PlayNoise = Literal["sampled", "zero", "stochastic"]


@dataclass(frozen=True)
class SuccessConfig:
    """Success rate in the simulator while a policy trains."""

    success_interval: int | None = opt(None, "steps between success rates in the simulator (Tabletop); none: never")
    success_suite: str = opt("tabletop_object", "suite of those")
    success_tasks: tuple[int, ...] = opt((0, 1, 2, 3, 4, 5, 6, 7, 8, 9), "tasks of those")
    success_episodes: int = opt(10, "episodes a task of those, the last ones of the evaluation states")


def success_rate(cfg: SuccessConfig, policy: PolicyConfig, weights: dict[str, Tensor], seed: int) -> dict[str, float]:
    """Success rate of the deterministic policy, played by the main process alone; all processes get it.

    Args:
        cfg: what is played.
        policy, weights: the policy, whole and with adapters merged.
        seed: of x_0.
    """
    wins = [0.0]
    if distributed.is_main():
        whole = VLAPolicy(policy).eval()
        whole.load_state_dict(weights)
        states = range(NUM_INITIAL_STATES - cfg.success_episodes, NUM_INITIAL_STATES)
        played = [play_episodes(whole, cfg.success_suite, task, states, seed=seed) for task in cfg.success_tasks]
        wins = [float(record["success"]) for records in played for record in records]
    return distributed.max_across_ranks({"success_rate": sum(wins) / len(wins)})


def chunk_noise(
    noise: PlayNoise, shape: tuple[int, ...], seed: int, suite: str, task: int, state: int, chunk: int
) -> Tensor:
    """Random numbers (`shape`) of one chunk of one episode: a pure function of the arguments; all 0 for "zero"."""
    if noise == "zero":
        return torch.zeros(shape)
    key = f"{seed}/{suite}/{task}/{state}/{chunk}".encode()
    number = int.from_bytes(hashlib.blake2b(key, digest_size=7).digest(), "big")
    return torch.randn(shape, generator=torch.Generator().manual_seed(number))


@torch.no_grad()
def play_episodes(
    policy: VLAPolicy,
    suite: str,
    task: int,
    states: Sequence[int],
    *,
    seed: int = 0,
    noise: PlayNoise = "sampled",
    execute: int = 8,
    num_flow_steps: int = 10,
    perturb: Perturbation | None = None,
) -> list[dict]:
    """Play one task from several initial states side by side.

    Args:
        policy: in eval mode.
        suite, task: of the simulator.
        states: initial states.
        seed: of the noise, which depends on (seed, suite, task, state, chunk) alone.
        noise: x0 of the deterministic flow, "sampled" or "zero"; or "stochastic", the policy that reinforcement
            fine-tuning samples, with the same x0 as "sampled".
        execute: actions of a chunk that are executed before the next is planned.
        num_flow_steps: Euler steps of the deterministic flow.
        perturb: of the starts.

    Returns:
        One record per episode: suite, task, init_state, success, steps, seconds, rejected_starts, actions (steps, A).
    """
    started = time.monotonic()
    envs = []
    for state in states:
        env = make_env(suite, task, image_size=policy.vlm.image_size)
        env.reset(init_state=state, perturb=perturb)
        envs.append(env)
    played: list[list[np.ndarray]] = [[] for _ in states]
    success = [False] * len(states)
    active = list(range(len(states)))
    chunk, flow = 0, policy.cfg.flow
    while active:
        observations = [envs[i].observe() for i in active]  # one frame a chunk is all that the policy sees
        keys = [(seed, suite, task, states[i], chunk) for i in active]
        x0 = torch.stack([chunk_noise(noise, (flow.chunk, flow.action_dim), *key) for key in keys])
        steps = None
        if noise == "stochastic":
            shape = (len(flow.scored_steps), flow.chunk, flow.action_dim)
            steps = torch.stack([chunk_noise(noise, shape, seed, f"{suite}/steps", *key[2:]) for key in keys])
        actions = policy.act(
            np.stack([o["agentview"] for o in observations]),
            [o["instruction"] for o in observations],
            np.stack([o["proprio"] for o in observations]),
            noise=x0,
            step_noise=steps,
            num_steps=num_flow_steps,
        )
        ended = set()
        for i, row in zip(active, actions.cpu().numpy()):
            for action in row[:execute]:
                result = envs[i].step(action)
                played[i].append(action)
                if result.done:
                    success[i] = result.success
                    ended.add(i)
                    break
        active = [i for i in active if i not in ended]
        chunk += 1
    seconds = (time.monotonic() - started) / len(states)
    return [
        {
            "suite": suite,
            "task": task,
            "init_state": state,
            "success": bool(ok),
            "steps": len(actions),
            "seconds": round(seconds, 4),
            "rejected_starts": env.num_rejected,
            "actions": np.round(np.stack(actions), 5).tolist(),
        }
        for state, ok, actions, env in zip(states, success, played, envs)
    ]
