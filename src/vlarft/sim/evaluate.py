"""Evaluation episodes, several side by side, in any simulator of `vlarft.sim.suites`.

What plays is an actor: a policy, chance, or a recording.

Shapes: B episodes, T chunk steps, A action dim, M noisy flow steps.
"""

import functools
import hashlib
import time
from collections.abc import Sequence
from typing import Any, Literal, Protocol

import numpy as np
import torch
from torch import Tensor

from vlarft.data.episode import RobotState
from vlarft.flow import X0, initial_noise
from vlarft.planning import Planner
from vlarft.policy import VLAPolicy
from vlarft.run.pixels import to_floats
from vlarft.sim.env import Env, Observation
from vlarft.sim.perturb import Perturbation
from vlarft.sim.suites import make_env

PlayNoise = Literal[X0, "stochastic"]


def chunk_noise(
    noise: PlayNoise, shape: tuple[int, ...], seed: int, suite: str, task: int, state: int, chunk: int
) -> Tensor:
    """Return the random numbers (`shape`) of one chunk of one episode, a pure function of the arguments; see
    `flow.initial_noise`, the gripper being the last dimension. "stochastic" ones are sampled.
    """
    key = f"{seed}/{suite}/{task}/{state}/{chunk}".encode()
    number = int.from_bytes(hashlib.blake2b(key, digest_size=7).digest(), "big")
    source = torch.Generator().manual_seed(number)
    return initial_noise("sampled" if noise == "stochastic" else noise, shape, (shape[-1] - 1,), source)


class Actor(Protocol):
    """Whatever decides: a policy, chance, a recording."""

    cameras: tuple[str, ...]  # the images it is shown; with none, its observations are None and nothing is rendered

    def __call__(self, states: Sequence[int], chunk: int, observations: Sequence[Observation | None]) -> np.ndarray:
        """Choose actions (B, T, A), raw.

        Args:
            states: B initial states, which name the episodes.
            chunk: number of the chunk in its episode, from 0.
            observations: B, of the present states.
        """
        ...


class PolicyActor:
    """A policy on one task, with random numbers that are a function of (seed, suite, task, state, chunk) alone.

    Args:
        policy: in eval mode; it is shown the cameras of its configuration.
        suite, task: the task, for the random numbers.
        seed: seed of the noise.
        noise: x_0 of the deterministic flow: "sampled", "zero", or "gripper", sampled for the gripper and 0 elsewhere;
            or "stochastic", the policy that reinforcement fine-tuning samples, with the same x_0 as "sampled".
        num_flow_steps: Euler steps of the deterministic flow.
    """

    def __init__(
        self, policy: VLAPolicy, suite: str, task: int, *, seed: int, noise: PlayNoise, num_flow_steps: int
    ) -> None:
        self.policy, self.suite, self.task = policy, suite, task
        self.cameras = policy.cfg.cameras
        self.seed, self.noise, self.num_flow_steps = seed, noise, num_flow_steps

    @torch.no_grad()
    def __call__(self, states: Sequence[int], chunk: int, observations: Sequence[Observation]) -> np.ndarray:
        flow = self.policy.cfg.flow

        def random_numbers(shape: tuple[int, ...], suite: str) -> Tensor:
            noise = [chunk_noise(self.noise, shape, self.seed, suite, self.task, state, chunk) for state in states]
            return torch.stack(noise)  # (B, *shape)

        noise, step_noise = random_numbers((flow.chunk, flow.action_dim), self.suite), None
        if self.noise == "stochastic":
            shape = flow.num_steps, flow.chunk, flow.action_dim  # (K, T, A)
            step_noise = random_numbers(shape, f"{self.suite}/steps")
        actions = self.policy.act(observations, noise=noise, step_noise=step_noise, num_steps=self.num_flow_steps)
        return actions.cpu().numpy()


class PlanningActor(PolicyActor):
    """A policy that imagines several chunks and plays the best, see `planning.Planner`.

    The first candidate is the chunk that `PolicyActor` plays; the others are from other random x_0.

    Args:
        planner: has the policy.
        candidates: number of chunks to choose from.
        execute: actions of a chunk that are executed, after which the robot still moves.
        others: arguments of `PolicyActor` after the policy; `noise` is no "stochastic" one.
    """

    def __init__(self, planner: Planner, candidates: int, suite: str, task: int, execute: int, **others: Any) -> None:
        super().__init__(planner.policy, suite, task, **others)
        self.planner, self.candidates, self.execute = planner, candidates, execute
        self.first_frames: dict[int, Tensor] = {}  # of the episodes, by initial state
        self.motions: dict[int, Tensor] = {}  # the proprio's last change, as the world model's robot predicts it

    @torch.no_grad()
    def __call__(self, states: Sequence[int], chunk: int, observations: Sequence[Observation]) -> np.ndarray:
        flow, device = self.policy.cfg.flow, self.policy.device
        proprio = torch.as_tensor(np.stack([obs["proprio"] for obs in observations]), device=device).float()
        if chunk == 0:
            images = to_floats(np.stack([obs[self.cameras[0]] for obs in observations]), device)
            self.first_frames = dict(zip(states, images, strict=True))
            self.motions = dict(zip(states, torch.zeros_like(proprio), strict=True))

        def random_numbers(state: int, candidate: int) -> Tensor:
            noise, suite = ("sampled", f"{self.suite}/plan {candidate}") if candidate else (self.noise, self.suite)
            return chunk_noise(noise, (flow.chunk, flow.action_dim), self.seed, suite, self.task, state, chunk)

        noise = torch.stack([torch.stack([random_numbers(s, n) for n in range(self.candidates)]) for s in states])
        first_frames = torch.stack([self.first_frames[s] for s in states])
        motion = torch.stack([self.motions[s] for s in states])
        plan = self.planner.choose(observations, first_frames, noise.to(device), self.num_flow_steps, motion)
        _, robot = self.planner.model.robot.rollout(RobotState(proprio, motion), plan.actions[:, : self.execute])
        self.motions |= dict(zip(states, robot.motion, strict=True))
        return plan.actions.cpu().numpy()


class RandomActor:
    """Uniform actions, a function of (seed, suite, task, state, chunk): the success rate of chance."""

    cameras = ()

    def __init__(self, suite: str, task: int, *, seed: int) -> None:
        self.suite, self.task, self.seed = suite, task, seed

    def __call__(self, states: Sequence[int], chunk: int, observations: Sequence[dict | None]) -> np.ndarray:
        keys = [f"random/{self.seed}/{self.suite}/{self.task}/{state}/{chunk}".encode() for state in states]
        seeds = [int.from_bytes(hashlib.blake2b(key, digest_size=7).digest(), "big") for key in keys]
        return np.stack([np.random.default_rng(seed).uniform(-1.0, 1.0, (8, 7)) for seed in seeds])


class ReplayActor:
    """Recorded actions, played open loop; after the last one it keeps still.

    Args:
        recorded: initial state -> (steps, A) raw actions.
        execute: actions of a chunk that `play_episodes` executes, so that none is left out.
    """

    cameras = ()

    def __init__(self, recorded: dict[int, np.ndarray], execute: int = 8) -> None:
        self.recorded, self.execute = recorded, execute

    def __call__(self, states: Sequence[int], chunk: int, observations: Sequence[dict | None]) -> np.ndarray:
        rows = []
        for state in states:
            rest = self.recorded[state][self.execute * chunk :]
            actions = np.asarray(rest[: self.execute], dtype=np.float32).reshape(-1, 7)
            still = np.zeros((self.execute - len(actions), 7), dtype=np.float32)
            still[:, 6] = self.recorded[state][-1][6]
            rows.append(np.concatenate([actions, still]))
        return np.stack(rows)


@functools.lru_cache(maxsize=1)  # one simulator a process: LIBERO's take seconds to make
def _environment(suite: str, task: int, image_size: int, cameras: tuple[str, ...], options: tuple) -> Env:
    return make_env(suite, task, image_size, cameras=cameras, **dict(options))


def play_episodes(
    actor: Actor,
    suite: str,
    task: int,
    states: Sequence[int],
    *,
    image_size: int,
    execute: int = 8,
    perturb: Perturbation | None = None,
    **options,
) -> list[dict]:
    """Play one task from several initial states side by side, in one simulator that takes turns.

    Args:
        actor: what decides.
        suite, task: the task.
        states: initial states.
        image_size: side of the rendered frames [px].
        execute: actions of a chunk that are executed before the next is planned.
        perturb: perturbation of the starts.
        options: further arguments of `make_env`.

    Returns:
        One record per episode: suite, task, init_state, success, steps, seconds, chunk_ms (what the actor took for a
        chunk of one episode [ms]), rejected_starts, actions (steps, A), and the environment's visuals where
        installations differ.

    Raises:
        ValueError: the simulator lacks a camera of the actor, see `suites.check_rendering`.
    """
    started = time.monotonic()
    env = _environment(suite, task, image_size, actor.cameras, tuple(options.items()))
    saved, rejected = [], []
    for state in states:
        env.reset(init_state=state, perturb=perturb)
        saved.append(env.get_state())
        rejected.append(env.num_rejected)
    played: list[list[np.ndarray]] = [[] for _ in states]
    success = [False] * len(states)
    active, chunk, deciding, chunks = list(range(len(states))), 0, 0.0, 0

    def observation(i: int) -> Observation | None:
        if not actor.cameras:
            return None
        env.set_state(saved[i])
        return env.observe()

    while active:
        observations = [observation(i) for i in active]  # one per chunk
        asked = time.monotonic()
        actions = actor([states[i] for i in active], chunk, observations)
        deciding, chunks = deciding + time.monotonic() - asked, chunks + len(active)
        ended = set()
        for i, row in zip(active, actions, strict=True):
            env.set_state(saved[i])
            for action in row[:execute].astype(np.float32):
                result = env.step(action)
                played[i].append(action)
                if result.done:
                    success[i] = result.success
                    ended.add(i)
                    break
            saved[i] = env.get_state()
        active = [i for i in active if i not in ended]
        chunk += 1
    seconds = (time.monotonic() - started) / len(states)
    visuals = {} if env.visuals is None else {"visuals": env.visuals}
    return [
        {
            "suite": suite,
            "task": task,
            "init_state": state,
            "success": bool(success[i]),
            "steps": len(played[i]),
            "seconds": round(seconds, 4),
            "chunk_ms": round(1000 * deciding / chunks, 3),
            "rejected_starts": rejected[i],
            **visuals,
            # nine digits tell every float32: what is recorded is what was played
            "actions": [[float(f"{number:.9g}") for number in action] for action in played[i]],
        }
        for i, state in enumerate(states)
    ]
