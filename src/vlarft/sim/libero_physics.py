"""LIBERO's compiled task: physics, robot and things by name, without episodes and images.

LIBERO's own reset leaves four things behind, which are reset or seeded here: the fixtures' places (not part of the
benchmark's initial states, sampled anew by every reset), the gripper's ramp, the controller's goal and rest posture,
and the solver's warm start. Poses are brought up to date after a step, where LIBERO shows those of 2 ms before.
"""

from __future__ import annotations

import math

import numpy as np

from vlarft.sim.env import checked_state
from vlarft.sim.libero_install import import_libero, package_folder

WAIT_STEPS = 10  # of the public evaluation scripts: things settle
WAIT_ACTION = np.array([0.0, 0.0, 0.0, 0.0, 0.0, 0.0, -1.0])
_NO_POSE = {"pos": "0 0 0", "quat": "1 0 0 0"}


class LiberoPhysics:
    """The physics of one task.

    Args:
        suite: a key of `LIBERO_SUITES`.
        task_name: name of a task of the suite.

    Raises:
        ImportError, FileNotFoundError: LIBERO or its assets are missing; the message says how to get them.
    """

    def __init__(self, suite: str, task_name: str) -> None:
        wrapper = import_libero()
        import mujoco

        self.mujoco = mujoco
        self.name = f"{suite}/{task_name}"
        with _seeded(0):
            control = wrapper.ControlEnv(
                bddl_file_name=str(package_folder() / "bddl_files" / suite / f"{task_name}.bddl"),
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
        self.joints = np.asarray(self.robot._ref_joint_pos_indexes)  # (7,) of the arm in qpos
        self.fingers = np.asarray(self.robot._ref_gripper_joint_pos_indexes)  # (2,) in qpos
        self.grip_site = self.robot.eef_site_id
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

    # Starts

    def reset(self, seed: int) -> None:
        """Let LIBERO's own sampler place everything, with this seed for numpy's global generator."""
        with _seeded(seed):
            self.robot.gripper.current_action = np.zeros(2)
            self._replace_fixtures()
            self.libero.reset()

    def _replace_fixtures(self) -> None:
        """Put the fixtures back where the model was compiled with them, as a hard reset does.

        LIBERO's sampler adds a fixture's new position to that of its sites, which must not hold the last one already.
        """
        for body, (position, rotation) in self._compiled.items():
            self.model.body_pos[body], self.model.body_quat[body] = position, rotation
        self.mujoco.mj_resetData(self.model, self.data)
        self.mujoco.mj_forward(self.model, self.data)

    def load(self, state: np.ndarray) -> None:
        """Write time, positions and velocities, (1 + nq + nv,), as LIBERO's own files hold them; call `start` next."""
        data, nq, nv = self.data, self.model.nq, self.model.nv
        data.time, data.qpos[:], data.qvel[:] = state[0], state[1 : 1 + nq], state[1 + nq : 1 + nq + nv]

    def start(self) -> None:
        """Forget the last episode's controls and forces, and compute everything from positions and velocities."""
        self.data.ctrl[:] = 0.0
        self.data.qacc_warmstart[:] = 0.0
        self.forward()

    def settle(self) -> None:
        """Take the wait steps, after which the episode begins."""
        for _ in range(WAIT_STEPS):
            self._libero_step(WAIT_ACTION)
        self._update_poses()

    # Steps

    def step(self, action: np.ndarray) -> bool:
        """Take one control step; return LIBERO's own success test, made in its own step."""
        success = bool(self._libero_step(action)[2])
        self._update_poses()
        return success

    def _libero_step(self, action: np.ndarray) -> tuple:
        """Take LIBERO's own control step, without what it computes twice.

        In each of its 25 substeps robosuite calls `mj_forward` twice, which the controller reads, and then `mj_step`,
        which computes all of it again. MuJoCo's two halves of a step around the controller give the same bits.
        """
        sim, fresh = self.libero.sim, False

        def first_half() -> None:
            nonlocal fresh
            if not fresh:
                self.mujoco.mj_step1(self.model, self.data)
            fresh = True

        def second_half() -> None:
            nonlocal fresh
            self.mujoco.mj_step2(self.model, self.data)
            fresh = False

        sim.forward, sim.step = first_half, second_half  # in front of the methods of their class
        try:
            return self.libero.step(action)
        finally:
            del sim.forward, sim.step

    def forward(self) -> None:
        """Compute poses, contacts and forces of the present positions."""
        self.mujoco.mj_forward(self.model, self.data)

    def solved(self) -> bool:
        """Return LIBERO's success test in the present state."""
        return bool(self.libero._check_success())

    def achieved(self, goal: list[str]) -> bool:
        """Return whether one of `goals` holds in the present state."""
        return bool(self.libero._eval_predicate(goal))

    def _update_poses(self) -> None:
        self.mujoco.mj_kinematics(self.model, self.data)
        self.mujoco.mj_camlight(self.model, self.data)

    # Whole state

    @property
    def state_size(self) -> int:
        """Length of a vector of `get_state`."""
        return sum(self._state_sizes)

    @property
    def _state_sizes(self) -> tuple[int, ...]:
        """Numbers of the physics, gripper ramp, controller goal position and rotation, rest posture, fixtures."""
        size = self.mujoco.mj_stateSize(self.model, self._state_kind)
        return size, 2, 3, 9, len(self.joints), 7 * len(self.fixtures)

    def get_state(self) -> np.ndarray:
        """Return all that decides the future, one float64 vector: physics, gripper, controller, fixtures."""
        model, controller = self.model, self.robot.controller
        state = np.empty(self._state_sizes[0])
        self.mujoco.mj_getState(model, self.data, state, self._state_kind)
        fixtures = [np.concatenate([model.body_pos[b], model.body_quat[b]]) for b in self.fixtures.values()]
        goal = controller.goal_pos, np.ravel(controller.goal_ori)
        return np.concatenate([state, self.robot.gripper.current_action, *goal, controller.initial_joint, *fixtures])

    def set_state(self, state: np.ndarray) -> None:
        """Continue from a vector of `get_state` of the same task, bit for bit.

        Raises:
            ValueError: a vector of another length.
        """
        model, controller = self.model, self.robot.controller
        state = checked_state(state, self.state_size, self.name)
        physics, ramp, goal, turn, rest, places = np.split(state, np.cumsum(self._state_sizes)[:-1])
        for body, place in zip(self.fixtures.values(), places.reshape(-1, 7)):
            model.body_pos[body], model.body_quat[body] = place[:3], place[3:]
        self.mujoco.mj_setState(model, self.data, physics, self._state_kind)
        self.robot.gripper.current_action = ramp.copy()
        controller.goal_pos, controller.goal_ori = goal.copy(), turn.reshape(3, 3)
        controller.initial_joint, controller.new_update = rest.copy(), True
        self._update_poses()
        self.libero._post_process()  # the light of a stove, which LIBERO sets after its steps, not from the state

    # Measurements

    @property
    def hand_position(self) -> np.ndarray:
        """(3,) point between the finger tips [m]."""
        return self.data.site_xpos[self.grip_site].copy()

    @property
    def hand_rotation(self) -> np.ndarray:
        """(3, 3) orientation of the hand; the fingers move along its x axis, z points out of the palm."""
        return self.data.site_xmat[self.grip_site].reshape(3, 3).copy()

    @property
    def finger_width(self) -> float:
        """Gap between the fingers [m]."""
        left, right = self.data.qpos[self.fingers]
        return float(left - right)

    def position(self, name: str) -> np.ndarray:
        """Return the origin (3,) of an object or fixture [m]."""
        return self.data.xpos[self.libero.obj_body_id[name]].copy()

    def proprio(self) -> np.ndarray:
        """Return (8,) float32: hand position [m], axis-angle [rad], finger positions [m], the second <= 0."""
        w, *xyz = self.data.xquat[self._hand_body]
        w = max(-1.0, min(1.0, w))
        sine = math.sqrt(1.0 - w * w)
        rotation = np.zeros(3) if sine < 1e-9 else np.array(xyz) * 2.0 * math.acos(w) / sine
        return np.concatenate([self.hand_position, rotation, self.data.qpos[self.fingers]]).astype(np.float32)

    def joint_states(self) -> np.ndarray:
        """Return the joint angles (7,) of the arm [rad], float32."""
        return self.data.qpos[self.joints].astype(np.float32)

    def libero_state(self) -> np.ndarray:
        """Return (1 + nq + nv,) float64 time, positions and velocities, the state that LIBERO's own files hold."""
        return np.concatenate([[self.data.time], self.data.qpos, self.data.qvel])


class _seeded:
    """numpy's global generator, which LIBERO uses, seeded for a while and then as before."""

    def __init__(self, seed: int) -> None:
        self._seed = seed

    def __enter__(self) -> None:
        self._before = np.random.get_state()  # noqa: NPY002
        np.random.seed(self._seed)  # noqa: NPY002

    def __exit__(self, *_: object) -> None:
        np.random.set_state(self._before)  # noqa: NPY002
