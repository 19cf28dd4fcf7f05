"""The paper's perturbed start states (Tables 3 and 8): objects, goals, the robot, or all of them are displaced.

Tables 3 and 8 give half ranges; displacements here are uniform in them. The robot's are read as millimetres, since
+-20 cm would leave the table. Table 8's two dimensions are directions here: 1 is x for objects and goals, and the
height for the robot; 2 is y, and the robot's horizontal offset.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from vlarft.sim.scenes import Scene
from vlarft.sim.tasks import Goal

if TYPE_CHECKING:
    from vlarft.sim.tabletop import TabletopEnv

_FORMS = (
    'one of "object:CM", "goal:CM", "robot:MM", "all:CM/CM/MM", for example object:2.5 or all:2.5/2.5/20, perhaps with '
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
    max_depth: float = 1e-3  # a start with contacts this much deeper than in the plain start is rejected, metres
    max_tries: int = 500

    def __post_init__(self) -> None:
        for name in ("object_cm", "goal_cm", "robot_mm"):
            if not (math.isfinite(getattr(self, name)) and getattr(self, name) >= 0.0):
                raise ValueError(f"{name} must be a finite number >= 0, got {getattr(self, name)}")

    @classmethod
    def parse(cls, text: str) -> Perturbation:
        """Reads the command-line form: "object:2.5", "goal:5", "robot:20" or "all:2.5/2.5/20" (cm, cm, mm).

        With ":x" or ":y" (object, goal), ":height" or ":horizontal" (robot), ":1" or ":2" (all) in one direction.

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
            raise ValueError(f"perturbation {text!r} holds something that is not a number; write {_FORMS}") from None
        return cls(
            **dict(zip(fields[kind], values, strict=True)),
            direction=_DIRECTIONS[kind][direction] if direction else None,
        )

    def shift(self, rng: np.random.Generator, metres: float) -> np.ndarray:
        """(2,) displacement in x and y of an object or goal, uniform in +-metres."""
        return rng.uniform(-metres, metres, size=2) * {None: (1, 1), 1: (1, 0), 2: (0, 1)}[self.direction]

    def hand_shift(self, rng: np.random.Generator) -> np.ndarray:
        """(3,) displacement of the hand in metres."""
        kept = {None: (1, 1, 1), 1: (0, 0, 1), 2: (1, 1, 0)}[self.direction]
        return rng.uniform(-1.0, 1.0, size=3) * self.robot_mm / 1000.0 * kept

    def apply(self, env: TabletopEnv, layout: dict[str, np.ndarray], hand: np.ndarray, rng: np.random.Generator) -> int:
        """Places and settles a displaced copy of a start state; `TabletopEnv.reset` calls it.

        A draw is rejected when things interpenetrate, leave the reachable table, or fall while settling.

        Args:
            env: the environment to place in.
            layout: body name -> (x, y, z, yaw) of the plain start.
            hand: (3,) hand position of the plain start, metres.
            rng: source of randomness.

        Returns:
            Number of rejected draws.

        Raises:
            RuntimeError: `max_tries` draws were all rejected.
        """
        env.place(layout, hand)
        plain_depth = _depth(env)
        half = _half_ranges(env, self)
        for rejected in range(self.max_tries):
            moved = {name: pose.copy() for name, pose in layout.items()}
            for body, metres in half.items():
                shift = self.shift(rng, metres)
                for name in _moves_with(env.scene, body):
                    moved[name][:2] += shift
            start = hand + self.hand_shift(rng)
            if not _reachable(env, moved, start) or _fixtures_overlap(env.scene, moved):
                continue
            env.place(moved, start)
            if _depth(env) > plain_depth + self.max_depth:
                continue
            env.settle()
            if all(abs(env.position(name)[2] - moved[name][2]) < 0.005 for name in env.items):
                return rejected
        raise RuntimeError(
            f"{env.suite}/{env.task_name}: no valid start in {self.max_tries} draws of {self}; "
            "ask for smaller displacements"
        )


def _half_ranges(env: TabletopEnv, perturbation: Perturbation) -> dict[str, float]:
    """Body to displace -> half range in metres; a body that is both object and goal takes the larger, once."""
    half: dict[str, float] = {}
    for goal in env.task.goals:
        for body, cm in ((_object(goal), perturbation.object_cm), (_target(goal), perturbation.goal_cm)):
            if cm > 0.0:
                half[body] = max(half.get(body, 0.0), cm / 100.0)
    return half


def _object(goal: Goal) -> str:
    return {"open": "cabinet", "turn": "dial"}.get(goal.kind, goal.item)


def _target(goal: Goal) -> str:
    return {"open": "cabinet", "turn": "dial"}.get(goal.kind, goal.target)


def _moves_with(scene: Scene, body: str) -> set[str]:
    """A body that stands on another at the start moves together with it and with whatever else stands there."""
    support = {spot.body: spot.on for spot in scene.spots}
    base = support[body] or body
    return {base, *(name for name, on in support.items() if on == base)}


def _reachable(env: TabletopEnv, layout: dict[str, np.ndarray], hand: np.ndarray) -> bool:
    low, high = np.asarray(env.config.low), np.asarray(env.config.high)
    inside = all(np.all(low[:2] <= pose[:2]) and np.all(pose[:2] <= high[:2]) for pose in layout.values())
    return inside and bool(np.all(low <= hand) and np.all(hand <= high))


def _fixtures_overlap(scene: Scene, layout: dict[str, np.ndarray]) -> bool:
    """Footprints of two fixtures intersect; the physics makes no contacts between things that cannot move."""
    solid = [fixture for fixture in scene.fixtures if fixture.kind != "mat"]
    return any(
        np.all(np.abs(layout[a.name] - layout[b.name])[:2] < np.add(a.half, b.half))
        for i, a in enumerate(solid)
        for b in solid[:i]
    )


def _depth(env: TabletopEnv) -> float:
    """Deepest penetration among the present contacts, metres."""
    contacts = env.data.contact.dist
    return float(max(0.0, -contacts.min())) if len(contacts) else 0.0
