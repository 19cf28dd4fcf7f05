"""LiberoEnv: one LIBERO task behind the interface of `TabletopEnv`.

Conventions are those of the public policies and data sets: actions (7,) of OSC_POSE (1 = 5 cm, 0.5 rad; gripper -1
open, +1 close) at 20 Hz; images with both axes flipped, `raw[::-1, ::-1]`, which is upright and mirrored left to right;
proprio (8,) of hand position, axis-angle and finger positions. Ten wait steps with the gripper opening follow every
reset, before the first observation. Physics needs no renderer; images are rendered when `observe` is called.

An episode is a function of its start and its actions, bit for bit, on one machine and installation. LIBERO's own reset
leaves four things behind, which are reset or seeded here: the fixtures' places (not part of the benchmark's initial
states, drawn anew by every reset), the gripper's ramp, the controller's goal and rest posture, the solver's warm start.
Poses are brought up to date after a step, where LIBERO shows those of 2 ms before.
"""

from __future__ import annotations

import functools
import math
import zlib
from typing import TYPE_CHECKING

import numpy as np

from vlarft.sim.gl import FULL, GLRenderer, RenderConfig
from vlarft.sim.libero_install import assets_folder, assets_label, import_libero, package_folder
from vlarft.sim.suites import SUITES, StepResult, check_start, checked_action, task_index

if TYPE_CHECKING:
    from vlarft.sim.perturb import Perturbation

WAIT_STEPS = 10  # of the public evaluation scripts: things settle
WAIT_ACTION = np.array([0.0, 0.0, 0.0, 0.0, 0.0, 0.0, -1.0])
_CAMERAS = {"agentview": "agentview", "wrist": "robot0_eye_in_hand"}
_NO_POSE = {"pos": "0 0 0", "quat": "1 0 0 0"}
_START_NOISE = 0.02  # rad on the arm's joints, robosuite's default, which the benchmark's initial states contain too
_DEMONSTRATION_SEEDS = 1_000_000  # LIBERO's sampler is seeded with this and more; evaluation places fixtures with 0


class LiberoEnv:
    """One task of one LIBERO suite.

    Args:
        suite: libero_spatial, libero_object, libero_goal or libero_10.
        task: index or name of a task of the suite.
        image_size: side of the square images in pixels, or (height, width); the public pipelines use 256.
        wrist: also observe the camera on the hand.
        rendering: quality of the images; anything but the default changes pixels.

    Raises:
        ValueError: unknown suite or task.
        ImportError, FileNotFoundError: LIBERO or its assets are missing; the message says how to get them.
    """

    def __init__(
        self,
        suite: str,
        task: int | str,
        image_size: int | tuple[int, int] = 256,
        *,
        wrist: bool = False,
        rendering: RenderConfig = FULL,
    ) -> None:
        index = task_index(suite, task)
        wrapper = import_libero()
        import mujoco

        self._mujoco = mujoco
        self.suite = suite
        self.task_index = index
        self.task_name = SUITES[suite].tasks[index].name
        self.instruction = SUITES[suite].tasks[index].instruction
        self.horizon = SUITES[suite].horizon
        self.visuals = assets_label(assets_folder())
        self.cameras = ("agentview", "wrist") if wrist else ("agentview",)
        self._size = (image_size, image_size) if isinstance(image_size, int) else tuple(image_size)
        self._rendering = rendering
        self._renderer: GLRenderer | None = None
        with _seeded(0):
            control = wrapper.ControlEnv(
                bddl_file_name=str(package_folder() / "bddl_files" / suite / f"{self.task_name}.bddl"),
                has_offscreen_renderer=False,
                use_camera_obs=False,
                hard_reset=False,  # a hard reset compiles the model again, for seconds
                ignore_done=True,
            )
        self.libero = control.env
        # Observations are read from the physics when asked for; LIBERO's own are computed at each of 25 substeps.
        self.libero._update_observables = lambda force=False: None
        self.libero._get_observations = lambda force_update=False: {}
        self.robot = self.libero.robots[0]
        self.model, self.data = self.libero.sim.model._model, self.libero.sim.data._data
        self._state_kind = mujoco.mjtState.mjSTATE_INTEGRATION
        self._joints = np.asarray(self.robot._ref_joint_pos_indexes)
        self._fingers = np.asarray(self.robot._ref_gripper_joint_pos_indexes)
        self._grip_site = self.robot.eef_site_id
        self._hand_body = self.model.body(self.robot.robot_model.eef_name).id
        bodies = self.libero.obj_body_id
        self.fixtures = {n: bodies[n] for n in self.libero.fixtures_dict if n in bodies}
        roots = {n: self.libero.fixtures_dict[n].get_obj() for n in self.fixtures}
        self._compiled = {
            body: [np.array(roots[n].get(key, default).split(), float) for key, default in _NO_POSE.items()]
            for n, body in self.fixtures.items()
        }
        self.objects = {n: bodies[n] for n in self.libero.objects_dict}
        self.goals: list[list[str]] = self.libero.parsed_problem["goal_state"]
        self._ready = False
        self._success = False
        self.num_steps = 0
        self.num_rejected = 0

    # Episodes

    def reset(
        self, init_state: int | None = None, seed: int | None = None, perturb: Perturbation | None = None
    ) -> None:
        """Starts an episode from one of the benchmark's initial states, or from LIBERO's own sampler.

        Args:
            init_state: 0..49, the benchmark's.
            seed: >= 0, start of a demonstration: things are placed as the task's file says, by this seed, and the arm
                starts a little off its rest. (In libero_object the wanted thing always stands at the same place.)
            perturb: shift of objects, goals or robot applied to the start; drawn from the same seed.

        Raises:
            ValueError: neither or both of init_state and seed, or out of range.
        """
        check_start(init_state, seed)
        with _seeded(0 if seed is None else _DEMONSTRATION_SEEDS + seed):
            self.robot.gripper.current_action = np.zeros(2)
            self._replace_fixtures()
            self.libero.reset()
        data = self.data
        if init_state is not None:
            numbers = initial_states(self.suite, self.task_index)[init_state]
            nq, nv = self.model.nq, self.model.nv
            data.time, data.qpos[:], data.qvel[:] = numbers[0], numbers[1 : 1 + nq], numbers[1 + nq : 1 + nq + nv]
        else:
            data.qpos[self._joints] += np.random.default_rng([seed, 2]).normal(0.0, _START_NOISE, len(self._joints))
        data.ctrl[:] = 0.0
        data.qacc_warmstart[:] = 0.0
        self._mujoco.mj_forward(self.model, data)
        self._ready = True
        self.num_rejected = 0
        if perturb is None:
            self.settle()
        else:
            from vlarft.sim.libero_perturb import perturb_start

            entropy = [
                zlib.crc32(self.suite.encode()),
                self.task_index,
                int(seed is not None),
                int(init_state or seed or 0),
            ]
            self.num_rejected = perturb_start(self, perturb, np.random.default_rng(entropy))

    def _replace_fixtures(self) -> None:
        """Put the fixtures back where the model was compiled with them, as a hard reset does.

        LIBERO's sampler adds a fixture's new position to that of its sites, which must not hold the last one already.
        """
        for body, (position, rotation) in self._compiled.items():
            self.model.body_pos[body], self.model.body_quat[body] = position, rotation
        self._mujoco.mj_resetData(self.model, self.data)
        self._mujoco.mj_forward(self.model, self.data)

    def settle(self) -> None:
        """The wait steps, after which the episode begins."""
        for _ in range(WAIT_STEPS):
            self.libero.step(WAIT_ACTION)
        self._update_poses()
        self.num_steps, self._success = 0, bool(self.libero._check_success())

    def step(self, action: np.ndarray) -> StepResult:
        """One control step of 1/20 s.

        Args:
            action: (7,), clipped to [-1, 1].

        Raises:
            ValueError: wrong shape or NaN.
            RuntimeError: no reset yet.
        """
        action = checked_action(action, self._ready)
        self._success = bool(self.libero.step(action)[2])  # LIBERO's own test, in its own step
        self._update_poses()
        self.num_steps += 1
        return StepResult(self._success, self._success or self.num_steps >= self.horizon)

    def observe(self) -> dict[str, np.ndarray | str]:
        """Renders now.

        Returns:
            "agentview" and, if asked for, "wrist": (H, W, 3) uint8, both axes flipped; "proprio": (8,) float32;
            "instruction".

        Raises:
            RuntimeError: this machine cannot render; the message says what to install.
        """
        if self._renderer is None:
            self._renderer = GLRenderer(self.model, self._size, self._rendering)
        images = {c: self._renderer.render(self.data, _CAMERAS[c])[::-1, ::-1].copy() for c in self.cameras}
        return {**images, "proprio": self.proprio(), "instruction": self.instruction}

    def proprio(self) -> np.ndarray:
        """(8,) float32: hand position [m], axis-angle [rad], finger positions [m], the second <= 0."""
        w, *xyz = self.data.xquat[self._hand_body]
        w = max(-1.0, min(1.0, w))
        sine = math.sqrt(1.0 - w * w)
        rotation = np.zeros(3) if sine < 1e-9 else np.array(xyz) * 2.0 * math.acos(w) / sine
        return np.concatenate([self.hand_position, rotation, self.data.qpos[self._fingers]]).astype(np.float32)

    def joint_states(self) -> np.ndarray:
        """(7,) float32 joint angles of the arm [rad]."""
        return self.data.qpos[self._joints].astype(np.float32)

    def libero_state(self) -> np.ndarray:
        """(1 + nq + nv,) float64 time, positions and velocities, the state that LIBERO's own files hold."""
        return np.concatenate([[self.data.time], self.data.qpos, self.data.qvel])

    def success(self) -> bool:
        """LIBERO's success test after the last step."""
        return self._success

    # Whole state

    def get_state(self) -> np.ndarray:
        """All that decides the future, one float64 vector: steps, success, physics, gripper, controller, fixtures."""
        mj, model, controller = self._mujoco, self.model, self.robot.controller
        state = np.empty(mj.mj_stateSize(model, self._state_kind))
        mj.mj_getState(model, self.data, state, self._state_kind)
        fixtures = [np.concatenate([model.body_pos[b], model.body_quat[b]]) for b in self.fixtures.values()]
        return np.concatenate(
            [
                [self.num_steps, self._success],
                state,
                self.robot.gripper.current_action,
                controller.goal_pos,
                np.ravel(controller.goal_ori),
                controller.initial_joint,
                *fixtures,
            ]
        )

    def set_state(self, state: np.ndarray) -> None:
        """Continues from a vector of `get_state` of the same task, bit for bit.

        Raises:
            ValueError: a vector of another length.
        """
        mj, model, controller = self._mujoco, self.model, self.robot.controller
        size = mj.mj_stateSize(model, self._state_kind)
        parts = (2, size, 2, 3, 9, len(self._joints), 7 * len(self.fixtures))
        state = np.asarray(state, dtype=np.float64)
        if state.shape != (sum(parts),):
            raise ValueError(f"state of {self.suite}/{self.task_name} has shape ({sum(parts)},), got {state.shape}")
        head, physics, ramp, goal, turn, rest, places = np.split(state, np.cumsum(parts)[:-1])
        for body, place in zip(self.fixtures.values(), places.reshape(-1, 7)):
            model.body_pos[body], model.body_quat[body] = place[:3], place[3:]
        mj.mj_setState(model, self.data, physics, self._state_kind)
        self.robot.gripper.current_action = ramp.copy()
        controller.goal_pos, controller.goal_ori, controller.initial_joint = (
            goal.copy(),
            turn.reshape(3, 3),
            rest.copy(),
        )
        controller.new_update = True
        self._update_poses()
        self.num_steps, self._success, self._ready = int(head[0]), bool(head[1]), True

    # What the expert may know

    @property
    def hand_position(self) -> np.ndarray:
        """(3,) point between the finger tips, metres."""
        return self.data.site_xpos[self._grip_site].copy()

    @property
    def hand_rotation(self) -> np.ndarray:
        """(3, 3) orientation of the hand; the fingers move along its x axis, z points out of the palm."""
        return self.data.site_xmat[self._grip_site].reshape(3, 3).copy()

    @property
    def finger_width(self) -> float:
        """Gap between the fingers, metres."""
        left, right = self.data.qpos[self._fingers]
        return float(left - right)

    def position(self, name: str) -> np.ndarray:
        """(3,) origin of an object or fixture, metres."""
        return self.data.xpos[self.libero.obj_body_id[name]].copy()

    def achieved(self, goal: list[str]) -> bool:
        """Whether one of `goals` holds in the present state."""
        return bool(self.libero._eval_predicate(goal))

    def _update_poses(self) -> None:
        self._mujoco.mj_kinematics(self.model, self.data)
        self._mujoco.mj_camlight(self.model, self.data)


@functools.lru_cache(maxsize=8)
def initial_states(suite: str, task: int) -> np.ndarray:
    """(50, 1 + nq + nv) float64, the benchmark's initial states of a task: time, positions, velocities.

    Raises:
        FileNotFoundError: the installed LIBERO has no such file.
    """
    import torch

    path = package_folder() / "init_files" / suite / f"{SUITES[suite].tasks[task].name}.pruned_init"
    if not path.is_file():
        raise FileNotFoundError(f"LIBERO's initial states are not at {path}; install hf-libero again")
    return np.asarray(torch.load(path, weights_only=False))  # a pickled array of LIBERO's own package


class _seeded:
    """numpy's global generator, which LIBERO draws from, seeded for a while and then as before."""

    def __init__(self, seed: int) -> None:
        self._seed = seed

    def __enter__(self) -> None:
        self._before = np.random.get_state()  # noqa: NPY002
        np.random.seed(self._seed)  # noqa: NPY002 - LIBERO draws from it

    def __exit__(self, *_: object) -> None:
        np.random.set_state(self._before)  # noqa: NPY002
