"""The paper's perturbed starts (Tables 3 and 8) on the table: displaced copies of a start's layout.

Objects are the items that a task's goals move, goals the bodies that they are moved to; a drawer or a knob is both. A
body that stands on another at the start moves together with it and with whatever else stands there.
"""

from __future__ import annotations

import numpy as np

from vlarft.sim.perturb import Perturbation
from vlarft.sim.scenes import Scene
from vlarft.sim.tasks import TabletopTask

_FIXTURES = {"open": "cabinet", "turn": "dial"}  # the body that a goal without an item is about

Layout = dict[str, np.ndarray]  # body -> (x, y, z, yaw)


def displaced(
    task: TabletopTask,
    bounds: tuple[np.ndarray, np.ndarray],
    layout: Layout,
    hand: np.ndarray,
    perturbation: Perturbation,
    rng: np.random.Generator,
) -> tuple[Layout, np.ndarray] | None:
    """Sample one displaced copy of a start.

    Args:
        task: what stands on the table, and the goals.
        bounds: (3,) lowest and highest hand position [m]; things must stay inside them, too.
        layout: of the plain start.
        hand: (3,) hand position of the plain start [m].
        perturbation: what moves how far.
        rng: source of random numbers.

    Returns:
        Layout and hand position, or None where something left the bounds or two fixtures overlap.
    """
    goals = [(_FIXTURES.get(g.kind, g.item), _FIXTURES.get(g.kind, g.target)) for g in task.goals]
    moved = {name: pose.copy() for name, pose in layout.items()}
    for body, metres in perturbation.half_ranges(goals).items():
        shift = perturbation.shift(rng, metres)
        for name in _moves_with(task.scene, body):
            moved[name][:2] += shift
    start = hand + perturbation.hand_shift(rng)
    valid = _reachable(bounds, moved, start) and not _fixtures_overlap(task.scene, moved)
    return (moved, start) if valid else None


def _moves_with(scene: Scene, body: str) -> set[str]:
    support = {spot.body: spot.on for spot in scene.spots}
    base = support[body] or body
    return {base, *(name for name, on in support.items() if on == base)}


def _reachable(bounds: tuple[np.ndarray, np.ndarray], layout: Layout, hand: np.ndarray) -> bool:
    low, high = bounds
    inside = all(np.all(low[:2] <= pose[:2]) and np.all(pose[:2] <= high[:2]) for pose in layout.values())
    return inside and bool(np.all(low <= hand) and np.all(hand <= high))


def _fixtures_overlap(scene: Scene, layout: Layout) -> bool:
    """Return whether fixtures' footprints intersect; the physics makes no contacts between things that cannot move."""
    solid = [fixture for fixture in scene.fixtures if fixture.kind != "mat"]
    return any(
        np.all(np.abs(layout[a.name] - layout[b.name])[:2] < np.add(a.half, b.half))
        for i, a in enumerate(solid)
        for b in solid[:i]
    )
