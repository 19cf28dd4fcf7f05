"""Tabletop's scripted expert, from privileged state.

It keeps no phase: each action is a function of the present physics state (which goal is open, is the item between the
fingers, how far to go), smooth nearly everywhere, so that noise and perturbations never leave it waiting for a trigger
that it missed.
"""

from __future__ import annotations

import math

import numpy as np

from vlarft.sim.demonstrator import CLOSE, OPEN, ScriptedExpert, ramp
from vlarft.sim.scenes import KNOB_TURN, surface_of
from vlarft.sim.tabletop import TabletopEnv
from vlarft.sim.tasks import Goal

_HANDLE_WIDTH = 0.014  # of drawer handle and knob, metres


class Expert(ScriptedExpert):
    """Acts in one environment towards the first of its goals that does not hold yet.

    Args:
        env: the environment, reset before `act`.
        seed: seed of the action noise.
        speed: largest translation in action units; 1 is 2 cm a step.
        noise: settings of `ActionNoise`.
    """

    env: TabletopEnv

    def __init__(self, env: TabletopEnv, seed: int = 0, *, speed: float = 0.5, **noise: float) -> None:
        super().__init__(env, seed, speed, **noise)

    def intend(self) -> np.ndarray:
        """Return the action (7,) towards the first open goal."""
        return self._towards(next(goal for goal in self.env.task.goals if not self.env.achieved(goal)))

    def _towards(self, goal: Goal) -> np.ndarray:
        if goal.kind == "open":
            return self._open_drawer()
        if goal.kind == "turn":
            return self._turn_knob()
        if goal.kind == "push":
            return self._push(goal)
        return self._place(goal)

    def _place(self, goal: Goal) -> np.ndarray:
        """Grasp from above, carry over everything, let go just above the target, rise."""
        env = self.env
        hand, width = env.hand_position, env.finger_width
        item, position = env.items[goal.item], env.position(goal.item)
        surface = surface_of(env.scene, goal.target)
        aim = env.position(goal.target)
        aim[2] += surface.height + item.half_height + surface.drop
        over = np.abs(position - aim)[:2]
        low = position[2] < aim[2] + 0.006
        holds = self._holds(item.width, position)
        if low and (np.all(over < 0.010) or (np.all(over < surface.reach) and not holds)):
            up = np.array([hand[0], hand[1], env.scene.travel_height])
            return self._move(up, env.hand_angles[0], OPEN, slow=ramp(width - item.width, 0.0, 0.015))
        if holds:
            return self._travel(aim - position + hand, 0.0, CLOSE, goal.item)
        yaw = math.remainder(env.yaw(goal.item), math.pi) if item.elongated else 0.0
        return self._grasp(np.array([position[0], position[1], max(position[2], 0.014)]), yaw, goal.item)

    def _open_drawer(self) -> np.ndarray:
        handle = self.env.position("drawer")
        if self._holds(_HANDLE_WIDTH, handle):
            return self._move(handle - np.array([0.0, 0.1, 0.0]), 0.0, CLOSE)
        return self._grasp(handle, 0.0)

    def _turn_knob(self) -> np.ndarray:
        knob, angle = self.env.position("knob") + np.array([0.0, 0.0, 0.004]), self.env.joint("knob")
        if self._holds(_HANDLE_WIDTH, knob):
            return self._move(knob, min(angle + 0.25, KNOB_TURN + 0.1), CLOSE)
        return self._grasp(knob, angle)

    def _push(self, goal: Goal) -> np.ndarray:
        """Push a disc away from the camera with the closed fingers; open ones would wedge it and lift it."""
        env = self.env
        hand, position = env.hand_position, env.position(goal.item)
        behind = position[1] - env.items[goal.item].size[0]
        low = 0.014
        if abs(hand[0] - position[0]) < 0.02 and hand[1] < behind + 0.015 and hand[2] < low + 0.014:
            ahead = 0.1 * ramp(hand[2] - low, 0.010, 0.005)
            return self._move(np.array([position[0], hand[1] + ahead, low]), 0.0, CLOSE)
        return self._travel(np.array([position[0], behind - 0.018, low]), 0.0, CLOSE, goal.item)

    def _holds(self, width: float, position: np.ndarray) -> bool:
        """Return whether a thing of this width at this position is in the closed fingers."""
        env = self.env
        offset = np.abs(position - env.hand_position)
        between = offset[0] < 0.5 * width + 0.006 and offset[1] < 0.018 and offset[2] < 0.018
        return bool(between and env.finger_width < width + 0.004)

    def _grasp(self, point: np.ndarray, yaw: float, item: str = "") -> np.ndarray:
        """Travel to `point` and close the fingers there."""
        hand = self.env.hand_position
        # A hand that has begun to close keeps closing over a wider range, so that noise does not reopen it.
        tolerance = 0.010 if self.env.finger_width > 0.07 else 0.018
        near = np.linalg.norm(point[:2] - hand[:2]) < tolerance and abs(point[2] - hand[2]) < tolerance
        return self._travel(point, yaw, CLOSE if near else OPEN, item)

    def _travel(self, point: np.ndarray, yaw: float, gripper: float, item: str = "") -> np.ndarray:
        """Move towards `point` through a funnel above it: sideways only at travelling height, down only nearly over it.

        Do not move sideways while an item other than `item`, such as one just put down, is between the fingers.
        """
        env = self.env
        hand = env.hand_position
        distance = float(np.linalg.norm(point[:2] - hand[:2]))
        height = point[2] + (env.scene.travel_height - point[2]) * ramp(distance, 0.012, 0.05)
        sideways = ramp(hand[2] - height, -0.045, -0.015)
        for name, other in env.items.items():
            position = env.position(name)
            if name != item and np.linalg.norm(position[:2] - hand[:2]) < 0.04:
                sideways *= ramp(hand[2] - position[2] - other.half_height, 0.008, 0.018)
        return self._move(np.array([point[0], point[1], height]), yaw, gripper, sideways=sideways)

    def _move(
        self, point: np.ndarray, yaw: float, gripper: float, sideways: float = 1.0, slow: float = 1.0
    ) -> np.ndarray:
        """Return the action of proportional control, limited in speed; the hand is kept upright at `yaw`."""
        env = self.env
        error = (point - env.hand_position) / env.config.position_scale
        error[:2] *= sideways
        error *= slow * min(1.0, self.speed / max(float(np.linalg.norm(error)), 1e-9))
        turn = yaw - env.hand_angles[0], -env.hand_angles[1], -env.hand_angles[2]
        z, y, x = (float(np.clip(angle / env.config.rotation_scale, -0.6, 0.6)) for angle in turn)
        return np.array([*error, x, y, z, gripper])
