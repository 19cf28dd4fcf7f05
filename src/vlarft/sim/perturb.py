"""The paper's perturbed start states (Tables 3 and 8): objects, goals, the robot, or all of them are displaced.

Tables 3 and 8 give half ranges; displacements are uniform in them. The robot's numbers are taken as millimetres, since
20 cm would leave the table. Table 8's two dimensions are directions here: 1 is x for objects and goals, and the height
for the robot; 2 is y, and the robot's horizontal offset.

This file says what moves and how far. How it is moved: tabletop_perturb.py, libero_perturb.py.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np

_FORMS = (
    'one of "object:CM", "goal:CM", "robot:MM", "all:CM/CM/MM", for example object:2.5 or all:2.5/2.5/20, or with '
    "one direction of Table 8: object:2.5:x, goal:5:y, robot:20:height, robot:20:horizontal, all:5/5/50:1"
)
_DIRECTIONS = {
    "object": {"x": 1, "y": 2},
    "goal": {"x": 1, "y": 2},
    "robot": {"height": 1, "horizontal": 2},
    "all": {"1": 1, "2": 2},
}


@dataclass(frozen=True)
class Perturbation:
    object_cm: float = 0.0  # half range of the manipulated objects' x and y
    goal_cm: float = 0.0  # half range of the goals' x and y
    robot_mm: float = 0.0  # half range of the hand's start height and of its x and y
    direction: int | None = None  # 1 or 2, see above; None displaces in both
    max_depth: float = 1e-3  # a start whose contacts are deeper than the plain start's by more is rejected, metres
    max_tries: int = 500

    def __post_init__(self) -> None:
        for name in ("object_cm", "goal_cm", "robot_mm"):
            if not (math.isfinite(getattr(self, name)) and getattr(self, name) >= 0.0):
                raise ValueError(f"{name} must be a finite number >= 0, got {getattr(self, name)}")

    @classmethod
    def parse(cls, text: str) -> Perturbation:
        """Read the command-line form: "object:2.5", "goal:5", "robot:20" or "all:2.5/2.5/20" (cm, cm, mm).

        Append ":x" or ":y" (object, goal), ":height" or ":horizontal" (robot), ":1" or ":2" (all) for one direction.

        Raises:
            ValueError: another form.
        """
        kind, _, rest = text.partition(":")
        numbers, _, direction = rest.partition(":")
        fields = {"object": ("object_cm",), "goal": ("goal_cm",), "robot": ("robot_mm",)}
        fields["all"] = ("object_cm", "goal_cm", "robot_mm")
        parts = numbers.split("/")
        known = kind in fields and len(parts) == len(fields[kind])
        if not known or (direction and direction not in _DIRECTIONS[kind]) or text.endswith(":"):
            raise ValueError(f"perturbation {text!r} is not {_FORMS}")
        try:
            values = [float(part) for part in parts]
        except ValueError:
            raise ValueError(f"perturbation {text!r} has something that is not a number; write {_FORMS}") from None
        return cls(
            **dict(zip(fields[kind], values, strict=True)),
            direction=_DIRECTIONS[kind][direction] if direction else None,
        )

    def shift(self, rng: np.random.Generator, metres: float) -> np.ndarray:
        """Sample the displacement (2,) in x and y of an object or goal, uniform in +-metres."""
        return rng.uniform(-metres, metres, size=2) * {None: (1, 1), 1: (1, 0), 2: (0, 1)}[self.direction]

    def hand_shift(self, rng: np.random.Generator) -> np.ndarray:
        """Sample the displacement (3,) of the hand [m]."""
        kept = {None: (1, 1, 1), 1: (0, 0, 1), 2: (1, 1, 0)}[self.direction]
        return rng.uniform(-1.0, 1.0, size=3) * self.robot_mm / 1000.0 * kept

    def half_ranges(self, goals: Iterable[tuple[str | None, str | None]]) -> dict[str, float]:
        """Return body -> half range of its displacement [m].

        Args:
            goals: the object and the goal that each of the task's goals names, None for what cannot move. A body named
                as both takes the larger range, once.
        """
        half: dict[str, float] = {}
        for bodies in goals:
            for body, cm in zip(bodies, (self.object_cm, self.goal_cm), strict=True):
                if cm > 0.0 and body is not None:
                    half[body] = max(half.get(body, 0.0), cm / 100.0)
        return half

    def first_valid(self, attempt: Callable[[], bool], where: str) -> int:
        """Try random displacements until one is valid.

        Args:
            attempt: places the next displacement and says whether it is valid.
            where: the task, for the error.

        Returns:
            Number of rejected displacements.

        Raises:
            RuntimeError: `max_tries` displacements were all rejected.
        """
        for rejected in range(self.max_tries):
            if attempt():
                return rejected
        raise RuntimeError(
            f"{where}: no valid start in {self.max_tries} tries of {self}; ask for smaller displacements"
        )
