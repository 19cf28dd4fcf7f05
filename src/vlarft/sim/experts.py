"""Scripted experts from privileged state.

The expert keeps no phase: each action is a function of the present physics state (which goal is open, is the item between the fingers, how
far to go), nearly everywhere smooth, so that noise and perturbations never leave it waiting for a trigger it missed.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np

from vlarft.sim.scenes import SURFACES
from vlarft.sim.tabletop import TabletopEnv
from vlarft.sim.tasks import Goal

_OPEN, _CLOSE = -1.0, 1.0


class ExpertAction(NamedTuple):
    executed: np.ndarray  # (7,) what to give to env.step
    intended: np.ndarray  # (7,) the same without noise


class Expert:
    """Acts in one environment towards the first of its goals that does not hold yet.

    Args:
        env: the environment, reset before `act`.
        seed: seed of the action noise.
        action_noise: standard deviation of the noise on the three translations, in action units; rotations get half of it. The
            noise is an AR(1) process, so that its effect on the path is larger than that of white noise.
        gripper_flips: share of steps whose gripper command is reversed.
        speed: largest translation in action units; 1 is 2 cm a step.
        persistence: correlation of successive noise values.
    """

    def __init__(
        self,
        env: TabletopEnv,
        seed: int = 0,
        *,
        action_noise: float = 0.0,
        gripper_flips: float = 0.0,
        speed: float = 0.5,
        persistence: float = 0.5,
    ) -> None:
        if action_noise < 0.0:
            raise ValueError(f"action_noise must be >= 0, got {action_noise}")
        if not 0.0 <= gripper_flips <= 1.0:
            raise ValueError(f"gripper_flips must be in [0, 1], got {gripper_flips}")
        if not 0.0 < speed <= 1.0:
            raise ValueError(f"speed must be in (0, 1], got {speed}")
        if not 0.0 <= persistence < 1.0:
            raise ValueError(f"persistence must be in [0, 1), got {persistence}")
        self.env = env
        self.action_noise = action_noise
        self.gripper_flips = gripper_flips
        self.speed = speed
        self.persistence = persistence
        self._rng = np.random.default_rng(seed)
        self._noise = self._rng.standard_normal(6)

    def act(self) -> ExpertAction:
        """The action for the present state; after success it holds still with the gripper open."""
        open_goals = [goal for goal in self.env.task.goals if not self.env.achieved(goal)]
        if not open_goals:
            still = np.array([0.0, 0.0, 0.0, 0.0, 0.0, 0.0, _OPEN])
            return ExpertAction(still, still.copy())
        intended = self._towards(open_goals[0])
        fresh = math.sqrt(1.0 - self.persistence**2) * self._rng.standard_normal(6)
        self._noise = self.persistence * self._noise + fresh
        noise = self.action_noise * self._noise * np.array([1.0, 1.0, 1.0, 0.5, 0.5, 0.5])
        executed = intended.copy()
        executed[:6] = np.clip(intended[:6] + noise, -1.0, 1.0)
        if self._rng.random() < self.gripper_flips:
            executed[6] = -intended[6]
        return ExpertAction(executed, intended)

    def _towards(self, goal: Goal) -> np.ndarray:
        return self._place(goal)

    def _place(self, goal: Goal) -> np.ndarray:
        """Grasp from above, carry over everything, let go just above the target, rise."""
        env = self.env
        hand, width = env.hand_position, env.finger_width
        item, position = env.items[goal.item], env.position(goal.item)
        surface = SURFACES[goal.target]
        aim = env.position(goal.target) + np.array([*goal.offset, surface.height + item.half_height + surface.drop])
        offset = position - hand
        over_aim = bool(np.all(np.abs(position - aim)[:2] < 0.012))
        if over_aim and position[2] < aim[2] + 0.006 or self._on_target(goal):
            up = np.array([hand[0], hand[1], env.scene.travel_height])
            return self._move(up, 0.0, _OPEN, slow=_ramp(width - item.width, 0.0, 0.015))
        between = abs(offset[0]) < 0.5 * width + 0.004 and abs(offset[1]) < 0.018 and abs(offset[2]) < 0.018
        if between and width < item.width + 0.004:
            return self._travel(aim - offset, 0.0, _CLOSE)
        # A hand that has begun to close keeps closing over a wider range, so that noise does not reopen it.
        tolerance = 0.010 if width > 0.07 else 0.018
        grasp = np.array([position[0], position[1], max(position[2], 0.014)])
        near = np.linalg.norm(grasp[:2] - hand[:2]) < tolerance and abs(grasp[2] - hand[2]) < tolerance
        return self._travel(grasp, 0.0, _CLOSE if near else _OPEN)

    def _on_target(self, goal: Goal) -> bool:
        """The item lies on the target, whether or not the fingers are clear of it."""
        env = self.env
        item, surface = env.items[goal.item], SURFACES[goal.target]
        gap = env.position(goal.item) - env.position(goal.target)
        resting = gap[2] < surface.height + item.half_height + surface.drop + 0.006
        return resting and bool(np.all(np.abs(gap[:2]) < surface.reach))

    def _travel(self, point: np.ndarray, yaw: float, gripper: float) -> np.ndarray:
        """Towards `point` through a funnel above it: sideways only at travelling height, down only when nearly over it."""
        hand = self.env.hand_position
        distance = float(np.linalg.norm(point[:2] - hand[:2]))
        height = point[2] + (self.env.scene.travel_height - point[2]) * _ramp(distance, 0.012, 0.05)
        sideways = _ramp(hand[2] - height, -0.045, -0.015)
        return self._move(np.array([point[0], point[1], height]), yaw, gripper, sideways=sideways)

    def _move(
        self, point: np.ndarray, yaw: float, gripper: float, sideways: float = 1.0, slow: float = 1.0
    ) -> np.ndarray:
        """Proportional control, limited in speed; the hand is kept upright at `yaw`."""
        env = self.env
        error = (point - env.hand_position) / env.config.position_scale
        error[:2] *= sideways
        error *= slow * min(1.0, self.speed / max(float(np.linalg.norm(error)), 1e-9))
        turn = yaw - env.hand_angles[0], -env.hand_angles[1], -env.hand_angles[2]
        z, y, x = (float(np.clip(angle / env.config.rotation_scale, -0.6, 0.6)) for angle in turn)
        return np.array([*error, x, y, z, gripper])


def _ramp(value: float, low: float, high: float) -> float:
    """Smooth step from 0 at `low` to 1 at `high`."""
    t = min(max((value - low) / (high - low), 0.0), 1.0)
    return t * t * (3.0 - 2.0 * t)
