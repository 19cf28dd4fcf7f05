"""Where things of a LIBERO scene are, as points of their collision boxes, and where a parallel gripper fits.

Metres and radians in the world frame; z is up. A grasp is a position of the point between the finger tips and the
rotation of the hand, whose x column the fingers move along and whose z column points out of the palm.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

if TYPE_CHECKING:
    from vlarft.sim.libero_env import LiberoEnv

_REACH = 0.030  # how far the fingers reach below the top of what they hold
_FINGER = 0.012  # half width of a finger, and its thickness
_OPEN = 0.040  # a finger's travel


class Grasp(NamedTuple):
    point: np.ndarray  # (3,)
    rotation: np.ndarray  # (3, 3)


class Shapes:
    """Collision geometry of the named objects and fixtures of one environment, as points 1.5 cm apart or less."""

    def __init__(self, env: LiberoEnv) -> None:
        self.env = env
        model = env.model
        solid = (model.geom_contype > 0) | (model.geom_conaffinity > 0)
        self._geom: dict[str, np.ndarray] = {}  # (N,) geom of each point
        self._local: dict[str, np.ndarray] = {}  # (N, 3) in the frame of its geom
        for name, root in {**env.objects, **env.fixtures}.items():
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
        """(N, 3) points of the collision boxes, of one body of the thing or of all."""
        model, data = self.env.model, self.env.data
        geom, local = self._geom[name], self._local[name]
        if body is not None:
            own = model.geom_bodyid[geom] == model.body(body).id
            geom, local = geom[own], local[own]
        return np.einsum("pij,pj->pi", data.geom_xmat[geom].reshape(-1, 3, 3), local) + data.geom_xpos[geom]

    def others(self, *names: str) -> np.ndarray:
        """(N, 3) points of everything but these."""
        return np.concatenate([np.zeros((0, 3)), *(self.points(name) for name in self._geom if name not in names)])


def _lattice(size: np.ndarray, capsule: bool) -> np.ndarray:
    half = np.array([size[0], size[0], size[0] + size[1]]) if capsule else size
    lines = [np.linspace(-h, h, max(2, math.ceil(2.0 * h / 0.015) + 1)) for h in half]
    return np.stack(np.meshgrid(*lines, indexing="ij"), -1).reshape(-1, 3)


def downward(finger_axis: np.ndarray) -> np.ndarray:
    """(3, 3) rotation of a hand that looks down, its fingers along a horizontal axis (3,), turned the short way."""
    x = np.array([finger_axis[0], finger_axis[1], 0.0])
    x /= np.linalg.norm(x)
    if x[1] < 0.0:  # at rest the x column is +y; the fingers are alike, so never turn further than 90 degrees
        x = -x
    z = np.array([0.0, 0.0, -1.0])
    return np.stack([x, np.cross(z, x), z], -1)


def top_grasps(shapes: Shapes, name: str) -> list[Grasp]:
    """Grasps from above at the narrow sides of a thing, narrow and little turned ones first; none if it is too wide.

    Whether the fingers have room is the caller's to find out.
    """
    points = shapes.points(name)
    top, bottom = points[:, 2].max(), points[:, 2].min()
    depth = min(_REACH, top - bottom - 0.007)
    level = top - depth
    slab = points[points[:, 2] > level - 0.012]
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


def rim_grasps(shapes: Shapes, name: str, depth: float = 0.028, angles: int = 16) -> list[Grasp]:
    """Grasps of a round thing's rim, one finger in and one out, little turned ones first."""
    points = shapes.points(name)
    centre = 0.5 * (points[:, :2].max(0) + points[:, :2].min(0))
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
            level = top - min(depth, top - points[:, 2].min() - 0.007)
            point = np.array([*(centre + (radius - 0.004 - inset) * u), level])
            cost = 0.02 * turn + 0.5 * inset
            found.append((cost, Grasp(point, rotation)))
    return [grasp for _, grasp in sorted(found, key=lambda pair: pair[0])]
