"""The simulators by name: their suites of tasks, environments and scripted experts.

Tabletop, embedded, and LIBERO have four suites of ten tasks each: `tabletop_*`, and `libero_spatial`, `libero_object`,
`libero_goal`, `libero_10`. Importing this needs neither simulator; making an environment imports the one it needs.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

from vlarft.run.cameras import find_camera
from vlarft.sim.demonstrator import Demonstrator, NoPlanError
from vlarft.sim.env import Env, Suite
from vlarft.sim.experts import Expert
from vlarft.sim.gl import FAST, FULL
from vlarft.sim.libero_env import LiberoEnv, visuals_label
from vlarft.sim.libero_experts import LiberoExpert
from vlarft.sim.libero_install import package_folder
from vlarft.sim.libero_tasks import LIBERO_SUITES
from vlarft.sim.tabletop import TabletopEnv
from vlarft.sim.tasks import TABLETOP_SUITES


class Simulator(NamedTuple):
    suites: Mapping[str, Suite]
    env: type[Env]
    expert: Callable[..., Demonstrator] | None = None  # expert(env, seed, speed=..., action_noise=..., ...)
    image_size: int = 64  # side of the images of its gymnasium environments [px]


SIMULATORS: dict[str, Simulator] = {
    "tabletop": Simulator(TABLETOP_SUITES, TabletopEnv, Expert),
    "libero": Simulator(LIBERO_SUITES, LiberoEnv, LiberoExpert, 256),
}


def simulator_of(suite: str) -> Simulator:
    """Return the simulator that has a suite.

    Raises:
        ValueError: unknown suite.
    """
    for simulator in SIMULATORS.values():
        if suite in simulator.suites:
            return simulator
    known = [name for simulator in SIMULATORS.values() for name in simulator.suites]
    raise ValueError(f"unknown suite {suite!r}; the suites are: {', '.join(known)}")


def task_names(suite: str) -> list[str]:
    """Return the names of a suite's tasks, in order.

    Raises:
        ValueError: unknown suite.
    """
    return [task.name for task in simulator_of(suite).suites[suite].tasks]


def task_indices(suite: str, tasks: Sequence[int | str] | None) -> list[int]:
    """Return the indices of tasks given by index or name, each once; of all tasks for None.

    Raises:
        ValueError: unknown suite or task.
    """
    tasks = range(len(task_names(suite))) if tasks is None else tasks
    return list(dict.fromkeys(task_index(suite, task) for task in tasks))


def instructions_of(suite: str, tasks: Sequence[int | str] | None) -> list[str]:
    """Return the instructions of tasks, as `task_indices`."""
    return [simulator_of(suite).suites[suite].tasks[task].instruction for task in task_indices(suite, tasks)]


def task_index(suite: str, task: int | str) -> int:
    """Return the index of a task given by index or name.

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


def visuals_of(suite: str, *, fast_rendering: bool = False) -> str | None:
    """Return which meshes and textures a suite is rendered with here; None where all installations have the same.

    Args:
        suite: name of a suite.
        fast_rendering: see `make_env`; it simplifies the meshes.

    Raises:
        ValueError: unknown suite.
        ImportError, FileNotFoundError: LIBERO or its assets are missing; the message says how to get them.
    """
    simulator_of(suite)
    if suite not in LIBERO_SUITES:
        return None
    package_folder()  # raises if LIBERO is missing
    return visuals_label(FAST if fast_rendering else FULL)


def check_rendering(
    suite: str, cameras: Sequence[str], wanted_by: str = "make_env", *, fast_rendering: bool = False
) -> None:
    """Check that a suite's simulator renders these cameras in this way.

    Args:
        suite: name of a suite.
        cameras: names of cameras, the simulator's or those of another data format, see `run.cameras`.
        wanted_by: who asks for them, for the error.
        fast_rendering: see `make_env`.

    Raises:
        ValueError: unknown suite, a camera that its simulator lacks, or one that fast rendering is not for.
    """
    if fast_rendering and suite not in LIBERO_SUITES:
        raise ValueError(f"fast_rendering is a setting of LIBERO's renderer; {suite} has none")
    available = simulator_of(suite).env.available_cameras
    views = {camera: find_camera(available, camera) for camera in cameras}
    if fast_rendering and "eye_in_hand" in views.values():
        raise ValueError(
            f"{wanted_by} wants camera eye_in_hand of {suite}, which is too near for the simplified meshes of fast "
            "rendering: leave out --fast-rendering (--no-fast-rendering with preset libero)"
        )
    if missing := [camera for camera, view in views.items() if view is None]:
        raise ValueError(
            f"{wanted_by} wants camera {', '.join(map(repr, missing))} of {suite}, which renders only "
            f"{', '.join(available)}: ask for one of these, or give a policy that was trained on it (--camera)"
        )


def make_env(
    suite: str,
    task: int | str,
    image_size: int | tuple[int, int] = 64,
    *,
    cameras: Sequence[str] | None = None,
    horizon: int | None = None,
    fast_rendering: bool = False,
) -> Env:
    """Make the environment of one task.

    Args:
        suite: name of a suite.
        task: index or name of a task of the suite.
        image_size: side of the square images in pixels, or (height, width).
        cameras: names of the images that `Env.observe` renders, see `check_rendering`; None = the simulator's first,
            () = none.
        horizon: control steps after which an episode ends, if fewer than the suite has.
        fast_rendering: LIBERO alone: other pixels in less time, see `gl.RenderConfig`.

    Raises:
        ValueError: unknown suite, task or camera, or one that fast rendering is not for.
        ImportError, FileNotFoundError: the simulator or its assets are missing; the message says how to get them.
    """
    simulator, index = simulator_of(suite), task_index(suite, task)
    cameras = simulator.env.available_cameras[:1] if cameras is None else tuple(cameras)
    check_rendering(suite, cameras, fast_rendering=fast_rendering)
    size = (image_size, image_size) if isinstance(image_size, int) else tuple(image_size)
    env = simulator.env(suite, index, size, cameras, **({"rendering": FAST} if fast_rendering else {}))
    env.horizon = min(env.horizon, horizon or env.horizon)
    return env


def make_expert(env: Env, seed: int, **settings: float) -> Demonstrator:
    """Make the scripted expert of an environment.

    Args:
        env: the environment, reset before the expert acts.
        seed: seed of the action noise.
        settings: speed, action_noise, gripper_flips, persistence, see `demonstrator.ScriptedExpert`.

    Raises:
        NoPlanError: the simulator has no expert, or its expert has no plan for the task.
    """
    expert = simulator_of(env.suite).expert
    if expert is None:
        raise NoPlanError(f"{env.suite} has no scripted expert; record a policy instead")
    return expert(env, seed, **settings)
