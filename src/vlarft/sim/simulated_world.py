"""A simulator as the world of closed-loop reinforcement learning: true dynamics, true outcomes, worker processes.

Shapes: E episodes, B of them played at once, T chunk steps, A action dim.
"""

import functools
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from vlarft.closed_loop import Answer
from vlarft.run.pixels import to_floats
from vlarft.run.random import numpy_generator
from vlarft.sim.env import Env, Observation
from vlarft.sim.suites import make_env
from vlarft.sim.workers import Workers, one_thread
from vlarft.success import Referee, SuccessModel


class Place(NamedTuple):
    """One task, how its observations are rendered, and the most actions of an episode, if fewer than the suite has."""

    suite: str
    task: int
    image_size: int
    cameras: tuple[str, ...]
    horizon: int | None = None
    fast_rendering: bool = False


class Played(NamedTuple):
    """Where a chunk led: the simulator's state, what is seen there, and see `Answer`."""

    state: np.ndarray
    observation: Observation
    success: bool
    steps: int
    done: bool
    frames: tuple[np.ndarray, ...] = ()  # of the first camera after each action, for a judge


@functools.lru_cache(maxsize=20)  # the tasks of two suites of LIBERO
def environment(place: Place) -> Env:
    """Make a task's environment, once in each process."""
    options = {"cameras": place.cameras, "horizon": place.horizon, "fast_rendering": place.fast_rendering}
    return make_env(place.suite, place.task, place.image_size, **options)


def first(place: Place, seed: int) -> Played:
    """Reset to the start of a seed."""
    env = environment(place)
    env.reset(seed=seed)
    return Played(env.get_state(), env.observe(), False, 0, False)


def after(
    place: Place, chunks: Mapping[int, tuple[np.ndarray, np.ndarray]], with_frames: bool = False
) -> dict[int, Played]:
    """Play chunks of some episodes.

    Args:
        place: their task.
        chunks: number of an episode -> its state, actions (T, A).
        with_frames: render after each action, and play on after a success; else the first success ends an episode.
    """
    env, results = environment(place), {}
    for episode, (state, chunk) in chunks.items():
        env.set_state(state)
        before, frames = env.num_steps, []
        for action in chunk:
            success = env.step(action).success
            if with_frames:
                frames.append(env.observe()[place.cameras[0]])
            done = env.num_steps >= env.horizon or (success and not with_frames)
            if done:
                break
        steps = env.num_steps - before
        results[episode] = Played(env.get_state(), env.observe(), success, steps, done, tuple(frames))
    return results


class SimulatedWorld:
    """Episodes of several tasks in turn, from random starts that are disjoint from the evaluation's.

    An episode does not depend on the number of workers, nor on the others.

    Args:
        places: the tasks, which the starts of one batch after the other are of in turn.
        starts: S, of each batch.
        workers: processes; 0 plays in this one. `close` ends them.
        judge: success model that decides from the true frames in place of the simulator's own test.
    """

    def __init__(self, places: Sequence[Place], starts: int, workers: int, judge: SuccessModel | None = None) -> None:
        self.places, self.starts, self.judge = list(places), starts, judge
        self.workers = Workers(workers, start=one_thread)
        self.names: list[str] = []  # of the present batch's starts: suite/task/seed
        self.where: list[Place] = []  # of each episode
        self.now: dict[int, Played] = {}  # each episode after its latest chunk

    def close(self) -> None:
        """End the worker processes."""
        self.workers.close()

    def begin(self, group: int, *numbers: int) -> list[Observation]:
        """Put `group` episodes at each start; its seed depends on `numbers` alone, see `World.begin`."""
        seeds = numpy_generator("simulated starts", *numbers).integers(2**31, size=self.starts)
        first_start = numbers[-1] * self.starts  # of the step: a batch goes on where the one before it ended
        jobs = [(self.places[(first_start + s) % len(self.places)], int(seed)) for s, seed in enumerate(seeds)]
        self.names = [f"{place.suite}/{place.task}/{seed}" for place, seed in jobs]
        found = {job: result for job, result, _ in self.workers.run(first, jobs)}
        self.where = [job[0] for job in jobs for _ in range(group)]
        self.now = dict(enumerate(found[job] for job in jobs for _ in range(group)))
        if self.judge is not None:
            seen = [self.now[e].observation for e in self.now]
            cameras = [place.cameras[0] for place in self.where]
            images = self._images([obs[camera] for obs, camera in zip(seen, cameras, strict=True)])
            self.referee = Referee(self.judge, images, [obs["instruction"] for obs in seen])
        return [played.observation for played in self.now.values()]

    def step(self, episodes: Sequence[int], actions: Tensor) -> Answer:
        """Play a chunk (B, T, A) of each episode, see `World.step`."""
        chunks = dict(zip(episodes, actions.cpu().numpy().astype(np.float32), strict=True))
        jobs = []
        for place in dict.fromkeys(self.where[e] for e in episodes):
            here = [e for e in episodes if self.where[e] == place]
            for part in np.array_split(here, min(len(here), max(1, self.workers.count))):
                states = {e: (self.now[e].state, chunks[e]) for e in part.tolist()}
                jobs.append((place, states, self.judge is not None))
        for _, results, _ in self.workers.run(after, jobs):
            self.now |= results
        ended = [self.now[e] for e in episodes]
        success, steps, done = (
            torch.tensor([getattr(p, name) for p in ended]) for name in ("success", "steps", "done")
        )
        if self.judge is not None:
            # an episode at its horizon has fewer frames: the last one stands for those that are missing
            frames = [p.frames + p.frames[-1:] * (actions.shape[1] - len(p.frames)) for p in ended]
            solved = self.referee.success_at(episodes, torch.stack([self._images(row) for row in frames]))
            success = solved <= steps
            steps, done = torch.where(success, solved, steps), done | success
        return Answer([played.observation for played in ended], success, steps, done)

    def _images(self, images: Sequence[np.ndarray]) -> Tensor:
        """Stack images as (N, C, H, W) in [0, 1] on the judge's device."""
        return to_floats(np.stack(images), next(self.judge.parameters()).device)
