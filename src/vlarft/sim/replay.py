"""Recorded episodes played again, bit for bit and at any resolution, and other actions played from their states."""

from collections.abc import Iterable, Iterator, Mapping
from itertools import groupby
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vlarft.data.episodes import Episode
from vlarft.run.pixels import to_floats
from vlarft.sensitivity import TrueOutcome
from vlarft.sim.env import CONTROL_FREQ
from vlarft.sim.perturb import Perturbation
from vlarft.sim.suites import make_env
from vlarft.sim.tabletop import TabletopEnv
from vlarft.sim.tasks import TABLETOP_SUITES


def replay_frames(
    suite: str,
    task: int,
    init_state: int,
    actions: np.ndarray,
    *,
    size: int = 160,
    every: int = 2,
    perturb: Perturbation | None = None,
    **options,
) -> list[np.ndarray]:
    """Play recorded actions from an evaluation state, and render every n-th step.

    Args:
        suite, task, init_state: the start.
        actions: (T, 7) raw actions.
        size: side of the frames [px].
        every: control steps between frames; the last step is always rendered.
        perturb: as in the recorded episode.
        options: further arguments of `make_env`; without `cameras`, the simulator's first camera is rendered.

    Returns:
        Frames, each (size, size, 3) uint8.
    """
    env = make_env(suite, task, image_size=size, **options)
    env.reset(init_state=init_state, perturb=perturb)
    (camera,) = env.cameras
    frames = [env.observe()[camera]]
    for step, action in enumerate(actions, 1):
        env.step(np.asarray(action, dtype=np.float32))
        if step % every == 0 or step == len(actions):
            frames.append(env.observe()[camera])
    return frames


def replay_episodes(
    records: Iterable[Mapping[str, Any]], *, size: int, perturb: Perturbation | None = None, **options
) -> Iterator[Episode]:
    """Play a policy's evaluation episodes again, and yield them as a data set holds them.

    Args:
        records: of `evaluate.play_episodes`; one simulator is made for those of one task that follow each other.
        size: side of the images [px].
        perturb: as in the recorded episodes.
        options: further arguments of `make_env`; without `cameras`, the simulator's first camera is rendered.

    Raises:
        RuntimeError: an episode ends otherwise than it was recorded.
    """
    for (suite, task), group in groupby(records, lambda r: (r["suite"], r["task"])):
        env = make_env(suite, task, image_size=size, **options)
        for record in group:
            env.reset(init_state=record["init_state"], perturb=perturb)
            actions, observations, success = np.array(record["actions"], np.float32), [], False
            for action in actions:
                observations.append(env.observe())
                success = env.step(action).success
            name = start = f"{suite}/{task}/{record['init_state']}"
            if perturb is not None:
                start = f"{name} {perturb}"
            if success != record["success"]:
                raise RuntimeError(
                    f"episode {name} ended in {('failure', 'success')[record['success']]} when it was recorded, and in "
                    f"{('failure', 'success')[success]} when its actions were played again: the simulator has changed "
                    "since; evaluate into another --out-dir"
                )
            cameras = {camera: np.stack([obs[camera] for obs in observations]) for camera in env.cameras}
            yield Episode(
                name=name,
                start=f"evaluated {start}",
                instruction=env.instruction,
                images=cameras[env.cameras[0]],
                proprio=np.stack([obs["proprio"] for obs in observations]),
                actions=actions,
                intended=actions,
                success=success,
                kind="policy",
                cameras=cameras,
                fps=CONTROL_FREQ,
                gripper_dims=(6,),
            )


def check_replays(episode: Episode) -> None:
    """Check that the simulator can be put into the states of an episode.

    Raises:
        ValueError: the episode has no states, or is not of Tabletop.
    """
    if episode.states is None or (episode.env_args or {}).get("suite") not in TABLETOP_SUITES:
        raise ValueError(f"true errors need Tabletop demonstrations with states; {episode.name} is none")


class TabletopOutcomes:
    """Plays action chunks from recorded states of Tabletop demonstrations; one simulator per task and camera."""

    def __init__(self) -> None:
        self.environments: dict[tuple, TabletopEnv] = {}

    def play(self, episode: Episode, start: int, chunks: np.ndarray) -> TrueOutcome:
        """Play P chunks, each from the episode's recorded state, and render with the camera of `episode.images`.

        Args:
            episode: with states.
            start: step of the recorded state.
            chunks: (P, T, A) raw actions.

        Raises:
            ValueError: the episode has no states, or is not of Tabletop.
        """
        places, frames = self._play(episode, start, chunks, render=True)
        images = to_floats(np.stack(frames))
        return TrueOutcome(images.unflatten(0, chunks.shape[:2]), self._error(places, chunks))

    def state_error(self, episode: Episode, start: int, chunks: np.ndarray) -> Tensor:
        """Return the state error (P, T) of `play` without rendering."""
        return self._error(self._play(episode, start, chunks, render=False)[0], chunks)

    def _play(self, episode: Episode, start: int, chunks: np.ndarray, render: bool) -> tuple[list, list]:
        check_replays(episode)
        args = episode.env_args
        cameras = tuple(name for name, images in episode.cameras.items() if images is episode.images)
        key = args["suite"], args["task"], cameras
        if key not in self.environments:
            size = episode.images.shape[1:3]
            self.environments[key] = make_env(*key[:2], image_size=size, cameras=cameras or None)
        env = self.environments[key]
        frames, places = [], []
        for chunk in chunks:
            env.set_state(episode.states[start])
            for action in chunk:
                env.step(action)
                if render:
                    frames.append(env.observe()[env.cameras[0]])
                objects = [env.position(name) for name in env.items]
                places.append(np.stack([env.hand_position, [env.finger_width, 0, 0], *objects]))
        return places, frames

    @staticmethod
    def _error(places: list, chunks: np.ndarray) -> Tensor:
        positions = torch.from_numpy(np.stack(places)).unflatten(0, chunks.shape[:2])  # (P, T, bodies, 3)
        return (positions - positions[:1]).norm(dim=-1).sum(dim=-1)
