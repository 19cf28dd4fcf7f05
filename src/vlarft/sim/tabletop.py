"""TabletopEnv: a floating parallel gripper over a table, with LIBERO's action and observation interface.

Actions are (7,) in [-1, 1]: dx, dy, dz (1 = 5 cm), a rotation vector in the world frame (1 = 0.5 rad), gripper (-1
open, +1 close). As in LIBERO's OSC_POSE the goal of a step is the present pose plus the action, followed by a
critically damped controller, so that a constant action of 1 moves the hand 2 cm a step. Images are rendered only when
`observe` is called.
"""

from __future__ import annotations

import math
import zlib
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from vlarft.sim.scenes import DRAWER_TRAVEL, KNOB_TURN, sample_layout, scene_xml, surface_of
from vlarft.sim.suites import StepResult, check_start, checked_action, task_index
from vlarft.sim.tasks import TABLETOP_SUITES, Goal

if TYPE_CHECKING:
    from vlarft.sim.perturb import Perturbation

_EVALUATION, _DEMONSTRATION = 0, 1  # disjoint streams of start states
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


class TabletopEnv:
    """One task of one suite.

    Args:
        suite: a key of `TABLETOP_SUITES`.
        task: index or name of a task of the suite.
        image_size: side of the square images in pixels, or (height, width).
        wrist: also observe the camera on the hand.
        config: physics and controller.

    Raises:
        ValueError: unknown suite or task.
        ImportError: mujoco is not installed, or too old.
    """

    def __init__(
        self,
        suite: str,
        task: int | str,
        image_size: int | tuple[int, int] = 64,
        *,
        wrist: bool = False,
        config: TabletopConfig = TabletopConfig(),
    ) -> None:
        index = task_index(suite, task)
        try:
            import mujoco
        except ImportError as error:
            raise ImportError('the tabletop suites need mujoco >= 3.5: pip install "vlarft[sim]"') from error
        if tuple(int(part) for part in mujoco.__version__.split(".")[:2]) < (3, 5):
            raise ImportError(
                f'the tabletop suites need mujoco >= 3.5, found {mujoco.__version__}: pip install -U "vlarft[sim]"'
            )
        from vlarft.sim.raycast import RaycastConfig, RaycastRenderer

        self._mujoco = mujoco
        self.config = config
        self.suite = suite
        self.task_index = index
        self.task = TABLETOP_SUITES[suite].tasks[index]
        self.task_name = self.task.name
        self.instruction = self.task.instruction
        self.horizon = TABLETOP_SUITES[suite].horizon
        self.scene = self.task.scene
        self.cameras = ("agentview", "wrist") if wrist else ("agentview",)
        self.model = mujoco.MjModel.from_xml_string(
            scene_xml(self.scene, 1.0 / config.control_freq / config.num_substeps)
        )
        self.data = mujoco.MjData(self.model)
        size = (image_size, image_size) if isinstance(image_size, int) else tuple(image_size)
        self._renderer = RaycastRenderer(self.model, RaycastConfig(image_size=size))
        self.items = {item.name: item for item in self.scene.items}
        self._body = {self.model.body(i).name: i for i in range(self.model.nbody)}
        self._hand = self._body["hand"]
        self._state_kind = mujoco.mjtState.mjSTATE_INTEGRATION
        self._ready = False
        self.num_steps = 0
        self.num_rejected = 0

    # Episodes

    def reset(
        self, init_state: int | None = None, seed: int | None = None, perturb: Perturbation | None = None
    ) -> None:
        """Starts an episode from one of the fixed evaluation states or from a demonstration seed.

        Args:
            init_state: 0..49, evaluation state.
            seed: >= 0, demonstration state, from a stream disjoint from the evaluation states.
            perturb: shift of objects, goals or robot applied to the start state; drawn from the same seed.

        Raises:
            ValueError: neither or both of init_state and seed, or out of range.
        """
        check_start(init_state, seed)
        stream, number = (_EVALUATION, init_state) if seed is None else (_DEMONSTRATION, seed)
        entropy = [zlib.crc32(self.suite.encode()), self.task_index, stream, int(number)]
        rng = np.random.default_rng(entropy)
        layout = sample_layout(self.scene, rng)
        jitter = np.asarray(self.config.start_jitter)
        hand = np.asarray(self.scene.start) + rng.uniform(-jitter, jitter)
        self.num_rejected = 0
        if perturb is None:
            self.place(layout, hand)
            self.settle()
        else:
            self.num_rejected = perturb.apply(self, layout, hand, np.random.default_rng([*entropy, 1]))

    def place(self, layout: dict[str, np.ndarray], hand: np.ndarray) -> None:
        """Writes a layout (body name -> x, y, z, yaw) and a hand position into the physics; call `settle` next."""
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
        """Lets everything come to rest with the hand held still, and sets the clock to zero."""
        self._mujoco.mj_step(self.model, self.data, self.config.settle_steps * self.config.num_substeps)
        self.data.time = 0.0
        self._mujoco.mj_forward(self.model, self.data)
        self.num_steps = 0
        self._ready = True

    def step(self, action: np.ndarray) -> StepResult:
        """One control step of 1/20 s.

        Args:
            action: (7,), clipped to [-1, 1].

        Raises:
            ValueError: wrong shape or NaN.
            RuntimeError: no reset yet.
        """
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

    def observe(self) -> dict[str, np.ndarray | str]:
        """Renders now.

        Returns:
            "agentview" and, if asked for, "wrist": (H, W, 3) uint8, upright; "proprio": (8,) float32; "instruction".
        """
        images = {camera: self._renderer.render(self.data, camera) for camera in self.cameras}
        return {**images, "proprio": self.proprio(), "instruction": self.instruction}

    def proprio(self) -> np.ndarray:
        """(8,) float32: hand position [m], axis-angle [rad], finger positions [m], the second <= 0 as in LIBERO."""
        qpos = self.data.qpos
        return np.concatenate([qpos[:3], _axis_angle(*qpos[3:6]), [qpos[6], -qpos[7]]]).astype(np.float32)

    # Whole state

    def get_state(self) -> np.ndarray:
        """All that decides the future, as one float64 vector: step count, integration state, fixture positions."""
        mj, model = self._mujoco, self.model
        state = np.empty(mj.mj_stateSize(model, self._state_kind))
        mj.mj_getState(model, self.data, state, self._state_kind)
        fixtures = [model.body_pos[self._body[f.name]] for f in self.scene.fixtures]
        return np.concatenate([[self.num_steps], state, *fixtures])

    def set_state(self, state: np.ndarray) -> None:
        """Continues from a vector of `get_state` of the same task, bit for bit.

        Raises:
            ValueError: a vector of another length.
        """
        mj, model = self._mujoco, self.model
        size = mj.mj_stateSize(model, self._state_kind)
        state = np.asarray(state, dtype=np.float64)
        expected = 1 + size + 3 * len(self.scene.fixtures)
        if state.shape != (expected,):
            raise ValueError(f"state of {self.suite}/{self.task_name} has shape ({expected},), got {state.shape}")
        mj.mj_resetData(model, self.data)
        for fixture, position in zip(self.scene.fixtures, state[1 + size :].reshape(-1, 3)):
            model.body_pos[self._body[fixture.name]] = position
        mj.mj_setState(model, self.data, state[1 : 1 + size], self._state_kind)
        self._update_poses()
        self.num_steps = int(state[0])
        self._ready = True

    # What the expert and the success test may know

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
        """(3,) origin of an item or fixture, metres."""
        return self.data.xpos[self._body[body]].copy()

    def yaw(self, body: str) -> float:
        """Yaw of an item, radians."""
        rotation = self.data.xmat[self._body[body]]
        return math.atan2(rotation[3], rotation[0])

    def joint(self, name: str) -> float:
        """Position of a drawer (metres) or knob (radians)."""
        return float(self.data.joint(name).qpos[0])

    def released(self, item: str) -> bool:
        """The fingers are clear of the item: open wider than it by 1 cm, or 6 cm away."""
        apart = np.linalg.norm(self.position(item) - self.data.qpos[:3])
        return self.finger_width > min(self.items[item].width + 0.01, _OPEN_WIDTH - 0.006) or apart > 0.06

    def achieved(self, goal: Goal) -> bool:
        """Whether one goal holds in the present state."""
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
        """All goals of the task hold at once."""
        return all(self.achieved(goal) for goal in self.task.goals)

    def _update_poses(self) -> None:
        """Poses of the present qpos; mj_step leaves them one substep behind, which images and success would show."""
        self._mujoco.mj_kinematics(self.model, self.data)
        self._mujoco.mj_camlight(self.model, self.data)

    def _angles_after(self, rotation_vector: np.ndarray) -> tuple[float, float, float]:
        """Yaw, pitch, roll after a world-frame rotation of the present hand, tilt limited, yaw continuous."""
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
    """(3,) rotation vector of Rz(yaw) Ry(pitch) Rx(roll)."""
    cy, sy = math.cos(yaw / 2.0), math.sin(yaw / 2.0)
    cp, sp = math.cos(pitch / 2.0), math.sin(pitch / 2.0)
    cr, sr = math.cos(roll / 2.0), math.sin(roll / 2.0)
    w = cy * cp * cr + sy * sp * sr
    vector = np.array([cy * cp * sr - sy * sp * cr, cy * sp * cr + sy * cp * sr, sy * cp * cr - cy * sp * sr])
    norm = float(np.linalg.norm(vector))
    if norm < 1e-12:
        return np.zeros(3)
    return vector / norm * 2.0 * math.remainder(math.atan2(norm, w), math.pi)
