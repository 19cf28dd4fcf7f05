"""The suites of both benchmarks by name, and what their environments have in common.

Eight suites of ten tasks: `tabletop_*`, embedded, and `libero_spatial`, `libero_object`, `libero_goal`, `libero_10`.
Importing this needs neither simulator; `make_env` imports the one it needs.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from vlarft.sim.libero_tasks import LIBERO_SUITES, LiberoSuite
from vlarft.sim.tasks import TABLETOP_SUITES, Suite

if TYPE_CHECKING:
    from vlarft.sim.libero_env import LiberoEnv
    from vlarft.sim.tabletop import TabletopEnv

NUM_INITIAL_STATES = 50  # of every task, as in LIBERO
SUITES: dict[str, Suite | LiberoSuite] = {**TABLETOP_SUITES, **LIBERO_SUITES}


class StepResult(NamedTuple):
    success: bool
    done: bool  # success, or the horizon is reached


def check_start(init_state: int | None, seed: int | None) -> None:
    """What `reset` of either environment takes: one of the evaluation states, or a demonstration's seed.

    Raises:
        ValueError: neither or both, or out of range.
    """
    if (init_state is None) == (seed is None):
        raise ValueError(f"give either init_state or seed, got init_state={init_state}, seed={seed}")
    if init_state is not None and not 0 <= init_state < NUM_INITIAL_STATES:
        raise ValueError(f"init_state must be 0..{NUM_INITIAL_STATES - 1}, got {init_state}")
    if seed is not None and seed < 0:
        raise ValueError(f"seed must be >= 0, got {seed}")


def checked_action(action: np.ndarray, ready: bool) -> np.ndarray:
    """What `step` of either environment takes: (7,), clipped to [-1, 1], float64.

    Raises:
        ValueError: wrong shape or NaN.
        RuntimeError: not ready, for want of a reset.
    """
    action = np.asarray(action, dtype=np.float64)
    if action.shape != (7,):
        raise ValueError(f"action must have shape (7,) = dx, dy, dz, 3 rotations, gripper; got shape {action.shape}")
    if not np.isfinite(action).all():
        raise ValueError(f"action holds NaN or infinity: {action.tolist()}")
    if not ready:
        raise RuntimeError("call reset before step")
    return np.clip(action, -1.0, 1.0)


def task_names(suite: str) -> list[str]:
    """Names of the tasks of a suite, in order.

    Raises:
        ValueError: unknown suite.
    """
    if suite not in SUITES:
        raise ValueError(f"unknown suite {suite!r}; the suites are: {', '.join(SUITES)}")
    return [task.name for task in SUITES[suite].tasks]


def task_index(suite: str, task: int | str) -> int:
    """Index of a task given by index or name.

    Raises:
        ValueError: unknown suite or task.
    """
    names = task_names(suite)
    if isinstance(task, str) and task in names:
        return names.index(task)
    digits = str(task)
    if digits.isdigit() and int(digits) < len(names):
        return int(digits)
    raise ValueError(f"unknown task {task!r} of {suite}; give 0..{len(names) - 1} or one of: {', '.join(names)}")


def make_env(suite: str, task: int | str, image_size: int | tuple[int, int] = 64, **options) -> TabletopEnv | LiberoEnv:
    """The environment of one task; see `TabletopEnv` and `LiberoEnv`, whose methods are the same.

    Args:
        suite: a key of `SUITES`.
        task: index or name of a task of the suite.
        image_size: side of the square images in pixels, or (height, width).
        options: further arguments of the environment's class.

    Raises:
        ValueError: unknown suite or task.
        ImportError, FileNotFoundError: the simulator or its assets are missing; the message says how to get them.
    """
    index = task_index(suite, task)
    if suite in LIBERO_SUITES:
        from vlarft.sim.libero_env import LiberoEnv

        return LiberoEnv(suite, index, image_size, **options)
    from vlarft.sim.tabletop import TabletopEnv

    return TabletopEnv(suite, index, image_size, **options)
