"""TabletopEnv: a floating parallel gripper over a table, with LIBERO's action and observation interface.

Actions are (7,) in [-1, 1]: dx, dy, dz (1 = 5 cm), a rotation vector in the world frame (1 = 0.5 rad), gripper (-1
open, +1 close). As in LIBERO's OSC_POSE the goal of a step is the present pose plus the action, followed by a
critically damped controller, so that a constant action of 1 moves the hand 2 cm a step. Images are rendered only when
`observe` is called.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from vlarft.run.optional import optional
from vlarft.sim.env import Env, Observation, StepResult, checked_action, checked_state, start_seed
from vlarft.sim.gl import import_mujoco
from vlarft.sim.perturb import Perturbation
from vlarft.sim.raycast import RaycastConfig, RaycastRenderer
from vlarft.sim.scenes import DRAWER_TRAVEL, KNOB_TURN, sample_layout, scene_xml, surface_of
from vlarft.sim.tabletop_perturb import Layout, displaced
from vlarft.sim.tasks import TABLETOP_SUITES, Goal

_OPEN_WIDTH = 0.08  # metres between the open fingers


@dataclass(frozen=True)
class TabletopConfig:
    control_freq: int = 20  # control steps per second (LIBERO)
    num_substeps: int = 10  # physics steps of 5 ms per control step
    position_scale: float = 0.05  # metres per unit of action (LIBERO)
    rotation_scale: float = 0.5  # radians per unit of action (LIBERO)
    max_tilt: float = 0.8  # radians of pitch and roll
    low: tuple[float, float, float] = (-0.23, -0.20, 0.012)  # bounds of the commanded hand position, metres
    high: tuple[float, float, float] = (0.23, 0.20, 0.24)
    start_jitter: tuple[float, float, float] = (0.03, 0.03, 0.015)  # uniform +- on the hand's start, metres
    settle_steps: int = 6  # control steps simulated before the first observation


class TabletopEnv(Env):
    """One task of one suite; made by `suites.make_env`.

    Args:
        suite: a key of `TABLETOP_SUITES`.
        task_index: index of a task of the suite.
        image_size: (height, width) of the images in pixels.
        cameras: images to observe; `eye_in_hand` is the camera on the hand.
        config: physics and controller.

    Raises:
        ImportError: mujoco is not installed, or too old.
    """

    available_cameras = ("agentview", "eye_in_hand")

    def __init__(
        self,
        suite: str,
        task_index: int,
        image_size: tuple[int, int],
        cameras: tuple[str, ...],
        *,
        config: TabletopConfig = TabletopConfig(),
    ) -> None:
        with optional("the tabletop suites need mujoco >= 3.5", "sim"):
            mujoco = import_mujoco()
        if tuple(int(part) for part in mujoco.__version__.split(".")[:2]) < (3, 5):
            raise ImportError(
                f'the tabletop suites need mujoco >= 3.5, found {mujoco.__version__}: pip install -U -e ".[sim]"'
            )
        super().__init__(TABLETOP_SUITES, suite, task_index, cameras)
        self._mujoco = mujoco
        self.config = config
        self.task = TABLETOP_SUITES[suite].tasks[task_index]
        self.scene = self.task.scene
        self.model = mujoco.MjModel.from_xml_string(
            scene_xml(self.scene, 1.0 / config.control_freq / config.num_substeps)
        )
        self.data = mujoco.MjData(self.model)
        self._renderer = RaycastRenderer(self.model, RaycastConfig(image_size=image_size))
        self.items = {item.name: item for item in self.scene.items}
        self._body = {self.model.body(i).name: i for i in range(self.model.nbody)}
        self._hand = self._body["hand"]
        self._state_kind = mujoco.mjtState.mjSTATE_INTEGRATION
        self._ready = False

    # Episodes

    def reset(
        self, init_state: int | None = None, seed: int | None = None, perturb: Perturbation | None = None
    ) -> None:
        """Start an episode, see `Env.reset`: everything is placed anew by the start's own random numbers."""
        numbers = start_seed(self.suite, self.task_index, init_state, seed)
        rng = np.random.default_rng(numbers)
        layout = sample_layout(self.scene, rng)
        jitter = np.asarray(self.config.start_jitter)
        hand = np.asarray(self.scene.start) + rng.uniform(-jitter, jitter)
        self.num_rejected = 0
        self.place(layout, hand)
        if perturb is None:
            self.settle()
        else:
            self.num_rejected = self._displace(layout, hand, perturb, np.random.default_rng([*numbers, 1]))

    def _displace(self, layout: Layout, hand: np.ndarray, perturb: Perturbation, rng: np.random.Generator) -> int:
        """Place and settle a displaced copy of the start that has just been placed; return how many were rejected.

        A copy is rejected where things interpenetrate, leave the reachable table, or fall while settling.
        """
        plain_depth = self._depth()
        bounds = np.asarray(self.config.low), np.asarray(self.config.high)

        def attempt() -> bool:
            start = displaced(self.task, bounds, layout, hand, perturb, rng)
            if start is None:
                return False
            self.place(*start)
            if self._depth() > plain_depth + perturb.max_depth:
                return False
            self.settle()
            return all(abs(self.position(name)[2] - start[0][name][2]) < 0.005 for name in self.items)

        return perturb.first_valid(attempt, f"{self.suite}/{self.task_name}")

    def place(self, layout: Layout, hand: np.ndarray) -> None:
        """Write a layout and a hand position (3,) into the physics; call `settle` next."""
        mj, model, data = self._mujoco, self.model, self.data
        mj.mj_resetData(model, data)
        for fixture in self.scene.fixtures:
            model.body_pos[self._body[fixture.name]] = layout[fixture.name][:3]
        for name in self.items:
            x, y, z, yaw = layout[name]
            data.joint(name).qpos[:] = x, y, z, math.cos(yaw / 2.0), 0.0, 0.0, math.sin(yaw / 2.0)
        data.qpos[:3] = hand
        data.qpos[6:8] = 0.5 * _OPEN_WIDTH
        data.ctrl[:] = data.qpos[:8]
        mj.mj_forward(model, data)

    def settle(self) -> None:
        """Let everything come to rest while the hand stands still, and set the clock to zero."""
        self._mujoco.mj_step(self.model, self.data, self.config.settle_steps * self.config.num_substeps)
        self.data.time = 0.0
        self._mujoco.mj_forward(self.model, self.data)
        self.num_steps = 0
        self._ready = True

    def step(self, action: np.ndarray) -> StepResult:
        """Advance one control step, see `Env.step`."""
        action = checked_action(action, self._ready)
        data, config = self.data, self.config
        data.ctrl[:3] = np.clip(data.qpos[:3] + config.position_scale * action[:3], config.low, config.high)
        data.ctrl[3:6] = self._angles_after(config.rotation_scale * action[3:6])
        data.ctrl[6:8] = 0.5 * _OPEN_WIDTH if action[6] < 0.0 else 0.0
        self._mujoco.mj_step(self.model, data, config.num_substeps)
        self._update_poses()
        self.num_steps += 1
        success = self.success()
        return StepResult(success, success or self.num_steps >= self.horizon)

    def observe(self) -> Observation:
        """Render now: an image (H, W, 3) uint8 per camera, "proprio" (8,) float32 and "instruction"."""
        images = {name: self._renderer.render(self.data, camera) for name, camera in self.views.items()}
        return {**images, "proprio": self.proprio(), "instruction": self.instruction}

    def proprio(self) -> np.ndarray:
        """Return (8,) float32: hand position [m], axis-angle [rad], finger positions [m], the second <= 0."""
        qpos = self.data.qpos
        return np.concatenate([qpos[:3], _axis_angle(*qpos[3:6]), [qpos[6], -qpos[7]]]).astype(np.float32)

    # Whole state

    def get_state(self) -> np.ndarray:
        """Return one float64 vector: step count, integration state, fixture positions."""
        mj, model = self._mujoco, self.model
        state = np.empty(mj.mj_stateSize(model, self._state_kind))
        mj.mj_getState(model, self.data, state, self._state_kind)
        fixtures = [model.body_pos[self._body[f.name]] for f in self.scene.fixtures]
        return np.concatenate([[self.num_steps], state, *fixtures])

    def set_state(self, state: np.ndarray) -> None:
        """Continue from a vector of `get_state`, see `Env.set_state`."""
        mj, model = self._mujoco, self.model
        size = mj.mj_stateSize(model, self._state_kind)
        state = checked_state(state, 1 + size + 3 * len(self.scene.fixtures), f"{self.suite}/{self.task_name}")
        mj.mj_resetData(model, self.data)
        for fixture, position in zip(self.scene.fixtures, state[1 + size :].reshape(-1, 3)):
            model.body_pos[self._body[fixture.name]] = position
        mj.mj_setState(model, self.data, state[1 : 1 + size], self._state_kind)
        self._update_poses()
        self.num_steps = int(state[0])
        self._ready = True

    # Privileged state, for the expert and the success test

    @property
    def hand_position(self) -> np.ndarray:
        """(3,) point between the finger tips, metres."""
        return self.data.qpos[:3].copy()

    @property
    def hand_angles(self) -> np.ndarray:
        """(3,) yaw, pitch, roll of the hand, radians."""
        return self.data.qpos[3:6].copy()

    @property
    def finger_width(self) -> float:
        """Gap between the fingers, metres. The sum of both travels: grasps are seldom symmetric."""
        return float(self.data.qpos[6] + self.data.qpos[7])

    def position(self, body: str) -> np.ndarray:
        """Return the origin (3,) of an item or fixture [m]."""
        return self.data.xpos[self._body[body]].copy()

    def yaw(self, body: str) -> float:
        """Return the yaw of an item [rad]."""
        rotation = self.data.xmat[self._body[body]]
        return math.atan2(rotation[3], rotation[0])

    def joint(self, name: str) -> float:
        """Return the position of a drawer [m] or knob [rad]."""
        return float(self.data.joint(name).qpos[0])

    def released(self, item: str) -> bool:
        """Return whether the fingers are clear of the item: open wider than it by 1 cm, or 6 cm away."""
        apart = np.linalg.norm(self.position(item) - self.data.qpos[:3])
        return self.finger_width > min(self.items[item].width + 0.01, _OPEN_WIDTH - 0.006) or apart > 0.06

    def achieved(self, goal: Goal) -> bool:
        """Return whether one goal holds in the present state."""
        if goal.kind == "open":
            return self.joint("drawer") > 0.75 * DRAWER_TRAVEL
        if goal.kind == "turn":
            return self.joint("knob") > 0.8 * KNOB_TURN
        position, target = self.position(goal.item), self.position(goal.target)
        surface = surface_of(self.scene, goal.target)
        inside = bool(np.all(np.abs(position - target)[:2] < surface.reach))
        if goal.kind == "push":
            return inside
        item = self.items[goal.item]
        height = position[2] - target[2] - surface.height
        return inside and 0.0 < height < max(item.size) + 0.012 and self.released(goal.item)

    def success(self) -> bool:
        """Return whether all goals of the task hold at once."""
        return all(self.achieved(goal) for goal in self.task.goals)

    def _depth(self) -> float:
        """Return the deepest penetration among the present contacts [m]."""
        contacts = self.data.contact.dist
        return float(max(0.0, -contacts.min())) if len(contacts) else 0.0

    def _update_poses(self) -> None:
        """Compute the poses of the present qpos: mj_step leaves those of one substep before."""
        self._mujoco.mj_kinematics(self.model, self.data)
        self._mujoco.mj_camlight(self.model, self.data)

    def _angles_after(self, rotation_vector: np.ndarray) -> tuple[float, float, float]:
        """Return yaw, pitch, roll after a world-frame rotation of the present hand, tilt limited, yaw continuous."""
        yaw, pitch, roll = self.data.qpos[3:6]
        if not rotation_vector.any():
            return yaw, pitch, roll
        angle = float(np.linalg.norm(rotation_vector))
        delta = np.empty(9)
        quat = np.empty(4)
        self._mujoco.mju_axisAngle2Quat(quat, rotation_vector / angle, angle)
        self._mujoco.mju_quat2Mat(delta, quat)
        r = delta.reshape(3, 3) @ self.data.xmat[self._hand].reshape(3, 3)  # Rz(yaw) Ry(pitch) Rx(roll)
        limit = self.config.max_tilt
        new_yaw = math.atan2(r[1, 0], r[0, 0])
        new_yaw = yaw + math.remainder(new_yaw - yaw, 2.0 * math.pi)
        new_pitch = math.asin(max(-1.0, min(1.0, -r[2, 0])))
        new_roll = math.atan2(r[2, 1], r[2, 2])
        return new_yaw, max(-limit, min(limit, new_pitch)), max(-limit, min(limit, new_roll))


def _axis_angle(yaw: float, pitch: float, roll: float) -> np.ndarray:
    """Return the rotation vector (3,) of Rz(yaw) Ry(pitch) Rx(roll)."""
    cy, sy = math.cos(yaw / 2.0), math.sin(yaw / 2.0)
    cp, sp = math.cos(pitch / 2.0), math.sin(pitch / 2.0)
    cr, sr = math.cos(roll / 2.0), math.sin(roll / 2.0)
    w = cy * cp * cr + sy * sp * sr
    vector = np.array([cy * cp * sr - sy * sp * cr, cy * sp * cr + sy * cp * sr, sy * cp * cr - cy * sp * sr])
    norm = float(np.linalg.norm(vector))
    if norm < 1e-12:
        return np.zeros(3)
    return vector / norm * 2.0 * math.remainder(math.atan2(norm, w), math.pi)
