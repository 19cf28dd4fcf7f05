"""The interface of a simulated task: what everything that plays, records or evaluates uses, and no more.

A new simulator is one file with a subclass of `Env`, and one entry of `suites.SIMULATORS`.
"""

from __future__ import annotations

import zlib
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import numpy as np

from vlarft.run.cameras import find_camera
from vlarft.sim.perturb import Perturbation

NUM_INITIAL_STATES = 50  # per task, as in LIBERO
CONTROL_FREQ = 20  # control steps per second, as in LIBERO

Observation = Mapping[str, Any]  # camera -> image (H, W, 3) uint8, upright; "proprio": (P,) float32; "instruction": str


@dataclass(frozen=True)
class Task:
    name: str  # as in the names of demonstration files
    instruction: str  # what the robot is told


@dataclass(frozen=True)
class Suite:
    horizon: int  # control steps after which an episode ends
    tasks: tuple[Task, ...]


class StepResult(NamedTuple):
    success: bool
    done: bool  # success, or the horizon is reached


class Env(ABC):
    """One task of one suite; `suites.make_env` calls `Class(suite, task_index, image_size, cameras, **options)`.

    An episode is a function of its start and its actions, bit for bit.

    available_cameras: names of the images that the simulator can render; the first is the default.
    suite, task_index, task_name, instruction: the task.
    horizon: control steps after which an episode ends.
    cameras: names of the images that `observe` renders.
    views: each of these names -> the simulator's camera, whose name in another data format it may be (`find_camera`).
    num_steps: control steps since the start.
    num_rejected: perturbed starts that the last `reset` rejected.
    visuals: which meshes and textures are rendered, where installations differ; None = all have the same.

    Args:
        suites: the simulator's suites by name.
        suite: a key of `suites`.
        task_index: index of a task of the suite.
        cameras: images to observe, some of `available_cameras` or their names in another data format.
    """

    available_cameras: ClassVar[tuple[str, ...]]
    visuals: str | None = None

    def __init__(self, suites: Mapping[str, Suite], suite: str, task_index: int, cameras: tuple[str, ...]) -> None:
        task = suites[suite].tasks[task_index]
        self.suite, self.task_index, self.task_name, self.instruction = suite, task_index, task.name, task.instruction
        self.horizon, self.cameras = suites[suite].horizon, cameras
        self.views = {name: find_camera(self.available_cameras, name) or name for name in cameras}
        self.num_steps = self.num_rejected = 0

    @abstractmethod
    def reset(
        self, init_state: int | None = None, seed: int | None = None, perturb: Perturbation | None = None
    ) -> None:
        """Start an episode: give either `init_state` or `seed`.

        Args:
            init_state: 0..49, one of the fixed evaluation states.
            seed: >= 0, start of a demonstration; these starts are disjoint from the evaluation states.
            perturb: displacement of objects, goals or robot, sampled with the same seed.

        Raises:
            ValueError: neither or both of init_state and seed, or out of range.
        """

    @abstractmethod
    def step(self, action: np.ndarray) -> StepResult:
        """Advance one control step, 1/20 s.

        Args:
            action: (7,), clipped to [-1, 1].

        Raises:
            ValueError: wrong shape or NaN.
            RuntimeError: no reset yet.
        """

    @abstractmethod
    def observe(self) -> Observation:
        """Render the present state."""

    @abstractmethod
    def success(self) -> bool:
        """Return whether the task is solved in the present state."""

    @abstractmethod
    def get_state(self) -> np.ndarray:
        """Return all that decides the future, as one float64 vector."""

    @abstractmethod
    def set_state(self, state: np.ndarray) -> None:
        """Continue from a vector of `get_state` of the same task, bit for bit.

        Raises:
            ValueError: a vector of another length.
        """

    def recorded(self, obs: Observation) -> dict[str, Any]:
        """Return what a demonstration file stores of the present state: one row of `data.hdf5.write_demo`'s arguments.

        Args:
            obs: `observe` of the present state.
        """
        images = {camera: obs[camera] for camera in self.cameras}
        return {"images": images, "proprio": obs["proprio"], "states": self.get_state()}

    @classmethod
    def demo_attrs(cls, suite: str, task: Task) -> dict[str, Any]:
        """Return arguments of `data.hdf5.write_task_attrs` that describe how a task's demonstrations are stored."""
        return {}


def start_seed(suite: str, task_index: int, init_state: int | None, seed: int | None) -> list[int]:
    """Check the arguments of `Env.reset`; return a seed for numpy that no other start of any task shares.

    Raises:
        ValueError: neither or both of init_state and seed, or out of range.
    """
    if (init_state is None) == (seed is None):
        raise ValueError(f"give either init_state or seed, got init_state={init_state}, seed={seed}")
    if init_state is not None and not 0 <= init_state < NUM_INITIAL_STATES:
        raise ValueError(f"init_state must be 0..{NUM_INITIAL_STATES - 1}, got {init_state}")
    if seed is not None and seed < 0:
        raise ValueError(f"seed must be >= 0, got {seed}")
    return [zlib.crc32(suite.encode()), task_index, int(seed is not None), int(init_state if seed is None else seed)]


def checked_action(action: np.ndarray, ready: bool) -> np.ndarray:
    """Check the argument of `Env.step`; return it as (7,) float64, clipped to [-1, 1].

    Args:
        action: (7,).
        ready: whether `reset` has been called.

    Raises:
        ValueError: wrong shape or NaN.
        RuntimeError: not ready.
    """
    action = np.asarray(action, dtype=np.float64)
    if action.shape != (7,):
        raise ValueError(f"action must have shape (7,) = dx, dy, dz, 3 rotations, gripper; got shape {action.shape}")
    if not np.isfinite(action).all():
        raise ValueError(f"action holds NaN or infinity: {action.tolist()}")
    if not ready:
        raise RuntimeError("call reset before step")
    return np.clip(action, -1.0, 1.0)


def checked_state(state: np.ndarray, size: int, where: str) -> np.ndarray:
    """Check the argument of `Env.set_state`; return it as (size,) float64.

    Raises:
        ValueError: another shape.
    """
    state = np.asarray(state, dtype=np.float64)
    if state.shape != (size,):
        raise ValueError(f"state of {where} has shape ({size},), got {state.shape}")
    return state
