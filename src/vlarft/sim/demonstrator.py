"""What all demonstrators share: their actions, the noise on them, and the frame of a scripted expert."""

from __future__ import annotations

import math
from typing import NamedTuple, Protocol

import numpy as np

from vlarft.sim.env import Env

OPEN, CLOSE = -1.0, 1.0  # gripper commands


class ExpertAction(NamedTuple):
    executed: np.ndarray  # (7,) what to give to env.step
    intended: np.ndarray  # (7,) the same without noise


class Demonstrator(Protocol):
    """Whoever acts in an environment, from its present state."""

    def act(self) -> ExpertAction:
        """Return the next action; after success one that keeps still."""
        ...


class NoPlanError(ValueError):
    """A task that no scripted expert has a plan for."""


def keep_still() -> ExpertAction:
    """Return the action without motion, the gripper open."""
    still = np.array([0.0, 0.0, 0.0, 0.0, 0.0, 0.0, OPEN])
    return ExpertAction(still, still.copy())


class ActionNoise:
    """Noise on a demonstrator's actions: AR(1), so that its effect on the path is larger than that of white noise.

    Args:
        seed: seed of the noise.
        action_noise: standard deviation on the three translations, in action units; rotations get half of it.
        gripper_flips: share of steps whose gripper command is reversed.
        persistence: correlation of successive values.

    Raises:
        ValueError: a setting out of range.
    """

    def __init__(
        self, seed: int, action_noise: float = 0.0, gripper_flips: float = 0.0, persistence: float = 0.5
    ) -> None:
        if action_noise < 0.0:
            raise ValueError(f"action_noise must be >= 0, got {action_noise}")
        if not 0.0 <= gripper_flips <= 1.0:
            raise ValueError(f"gripper_flips must be in [0, 1], got {gripper_flips}")
        if not 0.0 <= persistence < 1.0:
            raise ValueError(f"persistence must be in [0, 1), got {persistence}")
        self.action_noise, self.gripper_flips, self.persistence = action_noise, gripper_flips, persistence
        self._rng = np.random.default_rng(seed)
        self._noise = self._rng.standard_normal(6)

    def add(self, intended: np.ndarray) -> ExpertAction:
        """Add the next noise value to an action (7,)."""
        fresh = math.sqrt(1.0 - self.persistence**2) * self._rng.standard_normal(6)
        self._noise = self.persistence * self._noise + fresh
        noise = self.action_noise * self._noise * np.array([1.0, 1.0, 1.0, 0.5, 0.5, 0.5])
        executed = intended.copy()
        executed[:6] = np.clip(intended[:6] + noise, -1.0, 1.0)
        if self._rng.random() < self.gripper_flips:
            executed[6] = -intended[6]
        return ExpertAction(executed, intended)


class ScriptedExpert:
    """Acts from privileged state until its task is solved, with noise on its actions. Subclasses write `intend`.

    Args:
        env: the environment, reset before `act`.
        seed: seed of the action noise.
        speed: largest translation in action units.
        noise: settings of `ActionNoise`.

    Raises:
        ValueError: a setting out of range.
    """

    def __init__(self, env: Env, seed: int, speed: float, **noise: float) -> None:
        if not 0.0 < speed <= 1.0:
            raise ValueError(f"speed must be in (0, 1], got {speed}")
        self.env, self.speed = env, speed
        self._noise = ActionNoise(seed, **noise)

    def act(self) -> ExpertAction:
        """Return the action for the present state; after success, or without a plan, it keeps still."""
        intended = None if self.env.success() else self.intend()
        return keep_still() if intended is None else self._noise.add(intended)

    def intend(self) -> np.ndarray | None:
        """Return the action (7,) towards the next goal, or None where there is no plan left."""
        raise NotImplementedError


def ramp(value: float, low: float, high: float) -> float:
    """Step smoothly from 0 at `low` to 1 at `high`."""
    t = min(max((value - low) / (high - low), 0.0), 1.0)
    return t * t * (3.0 - 2.0 * t)
