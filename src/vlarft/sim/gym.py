"""The simulators as gymnasium environments: `vlarft/Tabletop-v0` and `vlarft/Libero-v0`.

    import gymnasium
    import vlarft.sim.gym  # registers them

    env = gymnasium.make("vlarft/Tabletop-v0", suite="tabletop_object", task=0)
    envs = gymnasium.make_vec("vlarft/Tabletop-v0", num_envs=4, vectorization_mode="async", suite="tabletop_goal")

A command that takes nothing but an id imports this module by itself: `vlarft.sim.gym:vlarft/Tabletop-v0`.

Observations are {"pixels": {camera: (H, W, 3) uint8}, "agent_pos": (8,) float32}, LeRobot's names; the instruction is
the attribute `task_description`. Actions are (7,) in [-1, 1]. The reward is 1 in the step that solves the task, which
ends the episode, else 0; at the suite's horizon the episode is truncated.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from importlib.util import find_spec
from types import ModuleType
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from vlarft.run.optional import optional
from vlarft.sim.env import NUM_INITIAL_STATES, Observation
from vlarft.sim.suites import SIMULATORS, make_env, task_index, task_names

if TYPE_CHECKING:
    import gymnasium

_IDS = {"vlarft/Tabletop-v0": "tabletop", "vlarft/Libero-v0": "libero"}  # -> simulator


def import_gymnasium() -> ModuleType:
    """Import gymnasium, or say which extra installs it.

    Raises:
        ImportError: it is missing.
    """
    with optional("these environments need gymnasium >= 1.0", "gym"):
        import gymnasium
    return gymnasium


class _TaskEnv:
    """One task; `task_env` makes it a subclass of gymnasium.Env, which is imported when it is needed.

    task, task_description: name of the task and instruction.

    Args:
        simulator: key of `SIMULATORS`.
        suite, task, image_size, cameras, horizon, options: see `suites.make_env`; image_size None = the simulator's.
        evaluation: start from the evaluation states, not from starts of demonstrations, which are disjoint from them.
        render_mode: "rgb_array" = `render` returns the image of the first camera.
    """

    metadata: ClassVar[dict[str, Any]] = {"render_modes": ["rgb_array"], "render_fps": 20}

    def __init__(
        self,
        simulator: str,
        suite: str,
        task: int | str,
        *,
        image_size: int | tuple[int, int] | None = None,
        cameras: Sequence[str] | None = None,
        horizon: int | None = None,
        evaluation: bool = False,
        render_mode: str | None = None,
        **options: Any,
    ) -> None:
        spaces = import_gymnasium().spaces
        if suite not in SIMULATORS[simulator].suites:
            raise ValueError(
                f"{simulator} has no suite {suite!r}; its suites are {', '.join(SIMULATORS[simulator].suites)}"
            )
        if render_mode not in (None, "rgb_array"):
            raise ValueError(f"render_mode {render_mode!r}: give 'rgb_array' or None")
        image_size = image_size or SIMULATORS[simulator].image_size
        self._env = make_env(suite, task, image_size, cameras=cameras, horizon=horizon, **options)
        if render_mode and not self._env.cameras:
            raise ValueError(f"render_mode {render_mode!r} needs a camera, got cameras {cameras!r}")
        self.evaluation, self.render_mode = evaluation, render_mode
        self.task, self.task_description = self._env.task_name, self._env.instruction
        self._max_episode_steps = self._env.horizon  # where LeRobot looks for it
        size = (image_size, image_size) if isinstance(image_size, int) else tuple(image_size)
        image = spaces.Box(0, 255, (*size, 3), np.uint8)
        self.observation_space = spaces.Dict(
            {
                "pixels": spaces.Dict(dict.fromkeys(self._env.cameras, image)),
                "agent_pos": spaces.Box(-np.inf, np.inf, (8,), np.float32),
            }
        )
        self.action_space = spaces.Box(-1.0, 1.0, (7,), np.float32)
        self._seen: Observation = {}

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """Start an episode: `Env.reset(seed=seed)`, or with `evaluation`, initial state `seed` modulo 50.

        Args:
            seed: >= 0; None = sample one from the generator of the last seed.
            options: {"init_state": 0..49} names an initial state; other entries are ignored.
        """
        super().reset(seed=seed)  # of gymnasium.Env: seeds self.np_random
        init_state = (options or {}).get("init_state")
        if init_state is None:
            start = int(self.np_random.integers(2**31)) if seed is None else seed
            init_state = start % NUM_INITIAL_STATES if self.evaluation else None
        self._env.reset(init_state=init_state, seed=start if init_state is None else None)
        return self._observe(), {"is_success": False}

    def step(self, action: np.ndarray) -> tuple[dict[str, Any], float, bool, bool, dict[str, Any]]:
        """Advance one control step; see `Env.step`."""
        success, done = self._env.step(action)
        return self._observe(), float(success), success, done and not success, {"is_success": success}

    def render(self) -> np.ndarray | None:
        """Return the first camera's image of the present observation, (H, W, 3) uint8; None without render_mode.

        Raises:
            RuntimeError: no reset yet.
        """
        if self.render_mode is None:
            return None
        if not self._seen:
            raise RuntimeError("call reset before render")
        return self._seen[self._env.cameras[0]]

    def _observe(self) -> dict[str, Any]:
        self._seen = self._env.observe()
        pixels = {camera: self._seen[camera] for camera in self._env.cameras}
        return {"pixels": pixels, "agent_pos": self._seen["proprio"]}


@functools.cache
def _env_class() -> type:
    return type("TaskEnv", (_TaskEnv, import_gymnasium().Env), {})


def task_env(simulator: str, suite: str, task: int | str = 0, **options: Any) -> gymnasium.Env:
    """Make the gymnasium environment of one task: what `gymnasium.make` calls for the ids above.

    Args:
        simulator: "tabletop" or "libero", fixed by the id.
        suite: name of a suite of that simulator; by default tabletop_object or libero_object.
        task: index or name of a task of the suite.
        options: image_size (64, LIBERO 256), cameras, horizon, evaluation, render_mode; see `suites.make_env`. With
            `evaluation`, episodes start from the 50 evaluation states, otherwise from starts of demonstrations.

    Raises:
        ValueError: unknown suite, task or camera.
        ImportError, FileNotFoundError: gymnasium, the simulator or its assets are missing.
    """
    return _env_class()(simulator, suite, task, **options)


def register() -> None:
    """Register the ids with gymnasium; a second call changes nothing.

    Raises:
        ImportError: gymnasium is missing.
    """
    gymnasium = import_gymnasium()
    for name, simulator in _IDS.items():
        if name not in gymnasium.registry:
            kwargs = {"simulator": simulator, "suite": f"{simulator}_object"}
            gymnasium.register(name, entry_point="vlarft.sim.gym:task_env", kwargs=kwargs)


def vector_envs(
    suite: str,
    tasks: Sequence[int | str] | None = None,
    *,
    n_envs: int = 1,
    use_async_envs: bool = False,
    **options: Any,
) -> dict[str, dict[int, gymnasium.vector.VectorEnv]]:
    """Make the vector environments of a suite's tasks in the form of LeRobot's EnvHub, on the evaluation states.

    Args:
        suite: name of a suite.
        tasks: indices or names; None = all.
        n_envs: environments of each task.
        use_async_envs: a process for each environment, all started now, instead of this one for all.
        options: see `task_env`.

    Returns:
        {suite: {index of the task: its vector environment}}.
    """
    vector = import_gymnasium().vector
    simulator = next((name for name, s in SIMULATORS.items() if suite in s.suites), None)
    indices = [task_index(suite, task) for task in (task_names(suite) if tasks is None else tasks)]
    options = {"evaluation": True, "render_mode": "rgb_array", **options}

    def vector_env(index: int) -> gymnasium.vector.VectorEnv:
        make = functools.partial(task_env, simulator, suite, index, **options)
        return (vector.AsyncVectorEnv if use_async_envs else vector.SyncVectorEnv)([make] * n_envs)

    return {suite: {index: vector_env(index) for index in indices}}


if find_spec("gymnasium"):  # without it, nothing asks for an id
    register()
