"""Where the things of a LIBERO scene are, as points of their collision boxes, and where a parallel gripper fits.

Metres and radians in the world frame; z is up. A grasp is a position of the point between the finger tips and the
rotation of the hand, whose x column the fingers move along and whose z column points out of the palm.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np

from vlarft.sim.libero_physics import LiberoPhysics

_REACH = 0.030  # how far the fingers reach below the top of what they hold
_FINGER = 0.012  # half width of a finger, and its thickness
_PALM = 0.032  # half thickness of the hand, which is 20 cm wide
_OPEN = 0.040  # a finger's travel
_CLEAR = 0.011  # height over the table at which the tips do not touch it


class Grasp(NamedTuple):
    point: np.ndarray  # (3,)
    rotation: np.ndarray  # (3, 3)


class Shapes:
    """Collision geometry of the objects and fixtures of a task, as points 1.5 cm apart or less."""

    def __init__(self, physics: LiberoPhysics) -> None:
        self.physics = physics
        model = physics.model
        solid = (model.geom_contype > 0) | (model.geom_conaffinity > 0)
        self._geom: dict[str, np.ndarray] = {}  # (N,) geom of each point
        self._local: dict[str, np.ndarray] = {}  # (N, 3) in the frame of its geom
        for name, root in {**physics.objects, **physics.fixtures}.items():
            inside = np.zeros(model.nbody, bool)
            inside[root] = True
            for body in range(root + 1, model.nbody):  # parents come before their children
                inside[body] |= inside[model.body_parentid[body]]
            geoms = np.flatnonzero(inside[model.geom_bodyid] & solid)
            lattices = [_lattice(model.geom_size[g], capsule=model.geom_type[g] == 3) for g in geoms]
            self._geom[name] = np.repeat(geoms, [len(lattice) for lattice in lattices])
            self._local[name] = np.concatenate([*lattices, np.zeros((0, 3))])

    def __contains__(self, name: str) -> bool:
        return name in self._geom

    def points(self, name: str, body: str | None = None) -> np.ndarray:
        """Return points (N, 3) of the collision boxes of one body of the thing, or of all its bodies."""
        model, data = self.physics.model, self.physics.data
        geom, local = self._geom[name], self._local[name]
        if body is not None:
            own = model.geom_bodyid[geom] == model.body(body).id
            geom, local = geom[own], local[own]
        return np.einsum("pij,pj->pi", data.geom_xmat[geom].reshape(-1, 3, 3), local) + data.geom_xpos[geom]

    def others(self, *names: str) -> np.ndarray:
        """Return points (N, 3) of everything but these."""
        return np.concatenate([np.zeros((0, 3)), *(self.points(name) for name in self._geom if name not in names)])


def _lattice(size: np.ndarray, capsule: bool) -> np.ndarray:
    half = np.array([size[0], size[0], size[0] + size[1]]) if capsule else size
    lines = [np.linspace(-h, h, max(2, math.ceil(2.0 * h / 0.015) + 1)) for h in half]
    return np.stack(np.meshgrid(*lines, indexing="ij"), -1).reshape(-1, 3)


def downward(finger_axis: np.ndarray) -> np.ndarray:
    """Return the rotation (3, 3) of a hand that points down, its fingers along a horizontal axis (3,)."""
    x = np.array([finger_axis[0], finger_axis[1], 0.0])
    x /= np.linalg.norm(x)
    if x[1] < 0.0:  # at rest the x column is +y; the fingers are alike, so never turn further than 90 degrees
        x = -x
    z = np.array([0.0, 0.0, -1.0])
    return np.stack([x, np.cross(z, x), z], -1)


def axis_rotation(axis: np.ndarray, angle: float) -> np.ndarray:
    """Return the rotation (3, 3) by `angle` [rad] about a unit vector (3,): Rodrigues' formula."""
    x, y, z = axis
    cross = np.array([[0.0, -z, y], [z, 0.0, -x], [-y, x, 0.0]])
    return np.eye(3) + math.sin(angle) * cross + (1.0 - math.cos(angle)) * cross @ cross


def tilted(out: np.ndarray, tilt: float, *, finger_axis: np.ndarray, hand: np.ndarray) -> np.ndarray:
    """Return the rotation (3, 3) of a hand that points against `out`, for the front of a thing.

    Args:
        out: (3,) horizontal unit vector out of the thing.
        tilt: angle of the palm from pointing down, rad; half pi points straight against `out`.
        finger_axis: (3,) along which the fingers move, made perpendicular to where the palm points.
        hand: (3, 3) present rotation: of the two ways to turn, the nearer one is taken.
    """
    z = -math.sin(tilt) * out - math.cos(tilt) * np.array([0.0, 0.0, 1.0])
    x = finger_axis - (finger_axis @ z) * z
    x /= np.linalg.norm(x)
    ways = [np.stack([sign * x, np.cross(z, sign * x), z], -1) for sign in (1.0, -1.0)]
    return max(ways, key=lambda rotation: float(np.trace(rotation @ hand.T)))


def top_grasps(shapes: Shapes, name: str, reach: float = _REACH) -> list[Grasp]:
    """Return grasps from above at the narrow sides of a thing, narrow and little turned ones first; none if too wide.

    The fingers reach `reach` metres below its top: a little for the lid's knob of a pot that is too wide itself. The
    caller checks whether the fingers have room.
    """
    points = shapes.points(name)
    top, bottom = points[:, 2].max(), points[:, 2].min()
    depth = min(reach, top - bottom - _CLEAR)
    level = top - depth
    slab = points[points[:, 2] > level - 0.4 * reach]
    found = []
    for angle in np.arange(0.0, math.pi, math.pi / 36):
        u = np.array([math.cos(angle), math.sin(angle)])
        v = np.array([-u[1], u[0]])
        along, across = slab[:, :2] @ u, slab[:, :2] @ v
        middle = 0.5 * (across.max() + across.min())
        between = along[np.abs(across - middle) < 1.5 * _FINGER]
        if not len(between):
            continue
        width = between.max() - between.min()
        if width > 2.0 * _OPEN - 0.006:
            continue
        centre = 0.5 * (between.max() + between.min()) * u + middle * v
        rotation = downward(np.array([*u, 0.0]))
        point = np.array([*centre, level])
        turn = math.acos(np.clip(rotation[1, 0], -1.0, 1.0))  # away from the hand's rest
        cost = width + 0.02 * turn
        found.append((cost, Grasp(point, rotation)))
    return [grasp for _, grasp in sorted(found, key=lambda pair: pair[0])]


def rim_grasps(
    shapes: Shapes, name: str, depth: float = 0.028, angles: int = 16, *, handle: bool = False
) -> list[Grasp]:
    """Return grasps of a round thing's rim, one finger in and one out, little turned ones first.

    With a `handle` at its side, below the rim, the centre is that of the rim alone.
    """
    points = shapes.points(name)
    round_part = points[points[:, 2] > points[:, 2].max() - 0.012] if handle else points
    centre = 0.5 * (round_part[:, :2].max(0) + round_part[:, :2].min(0))
    found = []
    for angle in np.arange(angles) * 2.0 * math.pi / angles:
        u = np.array([math.cos(angle), math.sin(angle)])
        ahead, across = (points[:, :2] - centre) @ u, (points[:, :2] - centre) @ np.array([-u[1], u[0]])
        sector = points[(np.abs(across) < 0.02) & (ahead > 0.02)]
        if not len(sector):
            continue
        top = sector[:, 2].max()  # of this side: the thing may stand askew
        radius = ((sector[sector[:, 2] > top - 0.012, :2] - centre) @ u).max()
        rotation = downward(np.array([*u, 0.0]))
        turn = math.acos(np.clip(rotation[1, 0], -1.0, 1.0))
        for inset in (0.0, 0.02):  # further in where there is no room for the outer finger; closing evens it out
            level = top - min(depth, top - points[:, 2].min() - _CLEAR)
            point = np.array([*(centre + (radius - 0.004 - inset) * u), level])
            cost = 0.02 * turn + 0.5 * inset
            found.append((cost, Grasp(point, rotation)))
    return [grasp for _, grasp in sorted(found, key=lambda pair: pair[0])]


def knob_grasps(points: np.ndarray, pivot: np.ndarray, depth: float = 0.010, angles: int = 36) -> list[Grasp]:
    """Return grasps of a knob's ridge from above, little turned and narrow ones first; none if it is too wide.

    Args:
        points: (N, 3) of the knob.
        pivot: (3,) on its axis.
        depth: how far the point between the finger tips is below the ridge's top, metres.
        angles: directions of the fingers to try.
    """
    top = points[:, 2].max()
    ridge = points[points[:, 2] > top - 2.0 * depth, :2] - pivot[:2]
    found = []
    for angle in np.arange(angles) * math.pi / angles:
        u = np.array([math.cos(angle), math.sin(angle)])
        along = (ridge @ u)[np.abs(ridge @ np.array([-u[1], u[0]])) < 1.5 * _FINGER]
        if not len(along) or 2.0 * np.abs(along).max() > 2.0 * _OPEN - 0.006:
            continue
        rotation = downward(np.array([*u, 0.0]))
        turn = math.acos(np.clip(rotation[1, 0], -1.0, 1.0))
        found.append((np.ptp(along) + 0.02 * turn, Grasp(np.array([*pivot[:2], top - depth]), rotation)))
    return [grasp for _, grasp in sorted(found, key=lambda pair: pair[0])]


def way_out(own: np.ndarray, others: np.ndarray, farthest: float = 0.12) -> np.ndarray:
    """Return the shortest shift (2,) that takes a thing out from under others without touching them; zero if free.

    Args:
        own: (N, 3) points of the thing.
        others: (M, 3) points of the rest.
        farthest: longest shift to try, metres; zero is returned where none up to it is free.
    """
    centre = 0.5 * (own[:, :2].max(0) + own[:, :2].min(0))
    radius = np.linalg.norm(own[:, :2] - centre, axis=1).max()
    beside = others[others[:, 2] > own[:, 2].min(), :2] - centre
    over = others[others[:, 2] > own[:, 2].max(), :2] - centre
    if not (np.linalg.norm(over, axis=1) < radius).any():
        return np.zeros(2)
    for distance in np.arange(0.01, farthest + 0.005, 0.01):
        for angle in np.arange(24) * math.pi / 12:
            shift = distance * np.array([math.cos(angle), math.sin(angle)])
            if (np.linalg.norm(beside - shift, axis=1) > radius + 0.015).all():
                return shift
    return np.zeros(2)


def room_above(grasp: Grasp, over: np.ndarray) -> float:
    """Return the sideways room [m] of the open hand on its way straight down; negative where it would touch.

    Args:
        grasp: where it goes.
        over: (N, 3) points of what is higher than the thing it grasps.
    """
    x, z = grasp.rotation[:, 0], grasp.rotation[:, 2]
    fingers = [grasp.point + side * x for side in (-_OPEN, _OPEN)]
    palm = [grasp.point - back * z + side * x for back in (0.06, 0.11) for side in (-0.09, -0.03, 0.03, 0.09)]
    room = 0.1
    for points, radius in ((fingers, _FINGER), (palm, _PALM)):
        for point in points:
            swept = over[over[:, 2] > point[2] - radius, :2]
            room = min(room, float(np.linalg.norm(swept - point[:2], axis=1).min(initial=1.0)) - radius)
    return room
