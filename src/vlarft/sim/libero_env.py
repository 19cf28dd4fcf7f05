"""LiberoEnv: one LIBERO task behind the interface of `Env`.

Conventions are those of the public policies and data sets: actions (7,) of OSC_POSE (1 = 5 cm, 0.5 rad; gripper -1
open, +1 close) at 20 Hz; images with both axes flipped, `raw[::-1, ::-1]`, which is upright and mirrored left to right;
proprio (8,) of hand position, axis-angle and finger positions. Ten wait steps with the gripper opening follow every
reset, before the first observation. Physics needs no renderer; images are rendered when `observe` is called.
"""

from __future__ import annotations

import functools
from typing import Any

import numpy as np

from vlarft.sim.env import Env, Observation, StepResult, Task, checked_action, checked_state, start_seed
from vlarft.sim.gl import FULL, GLRenderer, RenderConfig
from vlarft.sim.libero_install import assets_folder, assets_label, package_folder
from vlarft.sim.libero_perturb import perturb_start
from vlarft.sim.libero_physics import LiberoPhysics
from vlarft.sim.libero_tasks import LIBERO_SUITES
from vlarft.sim.perturb import Perturbation

_CAMERAS = {"agentview": "agentview", "eye_in_hand": "robot0_eye_in_hand"}  # ours -> robosuite's
_START_NOISE = 0.02  # rad on the arm's joints, robosuite's default, which the benchmark's initial states contain too
_DEMONSTRATION_SEEDS = 1_000_000  # LIBERO's sampler is seeded with this and more; evaluation places fixtures with 0


class LiberoEnv(Env):
    """One task of one LIBERO suite; made by `suites.make_env`.

    Args:
        suite: a key of `LIBERO_SUITES`.
        task_index: index of a task of the suite.
        image_size: (height, width) of the images in pixels; the public pipelines use 256.
        cameras: images to observe; `eye_in_hand` is robosuite's robot0_eye_in_hand.
        rendering: quality of the images; anything but the default changes pixels.

    Raises:
        ImportError, FileNotFoundError: LIBERO or its assets are missing; the message says how to get them.
    """

    available_cameras = tuple(_CAMERAS)

    def __init__(
        self,
        suite: str,
        task_index: int,
        image_size: tuple[int, int],
        cameras: tuple[str, ...],
        *,
        rendering: RenderConfig = FULL,
    ) -> None:
        super().__init__(LIBERO_SUITES, suite, task_index, cameras)
        self.physics = LiberoPhysics(suite, self.task_name)
        self.visuals = visuals_label(rendering)
        self._size, self._rendering = image_size, rendering
        self._renderer: GLRenderer | None = None
        self._ready = False
        self._success = False

    def reset(
        self, init_state: int | None = None, seed: int | None = None, perturb: Perturbation | None = None
    ) -> None:
        """Start an episode from one of the benchmark's initial states, or from LIBERO's own sampler; see `Env.reset`.

        With a `seed`, things are placed as the task's file says, and the arm starts a little off its rest. (In
        libero_object the wanted thing always stands at the same place.)
        """
        numbers = start_seed(self.suite, self.task_index, init_state, seed)
        physics = self.physics
        physics.reset(0 if seed is None else _DEMONSTRATION_SEEDS + seed)
        if init_state is not None:
            physics.load(initial_states(self.suite, self.task_index)[init_state])
        else:
            noise = np.random.default_rng([seed, 2]).normal(0.0, _START_NOISE, len(physics.joints))
            physics.data.qpos[physics.joints] += noise
        physics.start()
        self.num_rejected = 0
        if perturb is None:
            physics.settle()
        else:
            self.num_rejected = perturb_start(physics, perturb, np.random.default_rng(numbers))
        self.num_steps, self._success, self._ready = 0, physics.solved(), True

    def step(self, action: np.ndarray) -> StepResult:
        """Advance one control step, see `Env.step`."""
        self._success = self.physics.step(checked_action(action, self._ready))
        self.num_steps += 1
        return StepResult(self._success, self._success or self.num_steps >= self.horizon)

    def observe(self) -> Observation:
        """Render now: an image (H, W, 3) uint8 per camera, both axes flipped, "proprio" (8,) float32, "instruction".

        Raises:
            RuntimeError: this machine cannot render; the message says what to install.
        """
        physics = self.physics
        if self.cameras and self._renderer is None:
            self._renderer = GLRenderer(physics.model, self._size, self._rendering)
        images = {
            name: self._renderer.render(physics.data, _CAMERAS[camera])[::-1, ::-1].copy()
            for name, camera in self.views.items()
        }
        return {**images, "proprio": physics.proprio(), "instruction": self.instruction}

    def success(self) -> bool:
        """Return LIBERO's success test after the last step."""
        return self._success

    def get_state(self) -> np.ndarray:
        """Return one float64 vector: steps, success, then the state of the physics."""
        return np.concatenate([[self.num_steps, self._success], self.physics.get_state()])

    def set_state(self, state: np.ndarray) -> None:
        """Continue from a vector of `get_state`, see `Env.set_state`."""
        state = checked_state(state, 2 + self.physics.state_size, self.physics.name)
        self.physics.set_state(state[2:])
        self.num_steps, self._success, self._ready = int(state[0]), bool(state[1]), True

    # Demonstrations are stored as LIBERO's own are

    def recorded(self, obs: Observation) -> dict[str, Any]:
        """Return a row of LIBERO's layout, see `Env.recorded`: images as rendered, and the joints of the arm."""
        images = {camera: obs[camera][::-1, ::-1] for camera in self.cameras}
        columns = {"states": self.physics.libero_state(), "joint_states": self.physics.joint_states()}
        return {"images": images, "proprio": obs["proprio"], **columns}

    @classmethod
    def demo_attrs(cls, suite: str, task: Task) -> dict[str, Any]:
        """Return what LIBERO's own files say of their images and task, see `Env.demo_attrs`."""
        return {"upright": False, "bddl_file_name": f"{suite}/{task.name}.bddl"}


def visuals_label(rendering: RenderConfig) -> str:
    """Return what reports call the meshes and textures that are rendered.

    Raises:
        FileNotFoundError: no assets.
    """
    simplified = f", meshes simplified to {1000 * rendering.mesh_cell:g} mm" if rendering.mesh_cell else ""
    return assets_label(assets_folder()) + simplified


@functools.lru_cache(maxsize=8)
def initial_states(suite: str, task: int) -> np.ndarray:
    """Return (50, 1 + nq + nv) float64, the benchmark's initial states of a task: time, positions, velocities.

    Raises:
        FileNotFoundError: the installed LIBERO has no such file.
    """
    import torch

    path = package_folder() / "init_files" / suite / f"{LIBERO_SUITES[suite].tasks[task].name}.pruned_init"
    if not path.is_file():
        raise FileNotFoundError(f"LIBERO's initial states are not at {path}; install hf-libero again")
    return np.asarray(torch.load(path, weights_only=False))  # a pickled array of LIBERO's own package
