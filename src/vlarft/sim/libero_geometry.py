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
    """Collision geometry of the named objects and fixtures of one environment."""

    def __init__(self, env: LiberoEnv) -> None:
        self.env = env
        model = env.model
        self.geoms: dict[str, np.ndarray] = {}
        for name, root in {**env.objects, **env.fixtures}.items():
            inside = model.body_rootid == model.body_rootid[root] if model.body_rootid[root] == root else None
            if inside is None:
                inside = np.zeros(model.nbody, bool)
                inside[root] = True
                for body in range(root + 1, model.nbody):  # parents come before their children
                    inside[body] = inside[model.body_parentid[body]]
            solid = (model.geom_contype > 0) | (model.geom_conaffinity > 0)
            self.geoms[name] = np.flatnonzero(inside[model.geom_bodyid] & solid)

    def points(self, name: str, per_edge: int = 3, body: str | None = None) -> np.ndarray:
        """(N, 3) a lattice of points of each collision box, of one body of the thing or of all."""
        model, data = self.env.model, self.env.data
        geoms = self.geoms[name]
        if body is not None:
            geoms = geoms[model.geom_bodyid[geoms] == model.body(body).id]
        return self._lattice(geoms, per_edge)

    def others(self, *names: str) -> np.ndarray:
        """(N, 3) points of everything but these."""
        return np.concatenate([self.points(name) for name in self.geoms if name not in names] or [np.zeros((0, 3))])

    def _lattice(self, geoms: np.ndarray, per_edge: int) -> np.ndarray:
        model, data = self.env.model, self.env.data
        line = np.linspace(-1.0, 1.0, per_edge)
        unit = np.stack(np.meshgrid(line, line, line, indexing="ij"), -1).reshape(-1, 3)
        half = model.geom_size[geoms].copy()
        round_ = model.geom_type[geoms] == 3  # capsules: radius, half length
        half[round_] = np.stack([half[round_, 0], half[round_, 0], half[round_, :2].sum(1)], -1)
        local = unit[None] * half[:, None]
        world = np.einsum("gij,gpj->gpi", data.geom_xmat[geoms].reshape(-1, 3, 3), local)
        return (world + data.geom_xpos[geoms][:, None]).reshape(-1, 3)


def downward(finger_axis: np.ndarray) -> np.ndarray:
    """(3, 3) rotation of a hand that looks down, its fingers along a horizontal axis (3,), turned the short way."""
    x = np.array([finger_axis[0], finger_axis[1], 0.0])
    x /= np.linalg.norm(x)
    if x[1] < 0.0:  # at rest the x column is +y; the fingers are alike, so never turn further than 90 degrees
        x = -x
    z = np.array([0.0, 0.0, -1.0])
    return np.stack([x, np.cross(z, x), z], -1)


def top_grasps(shapes: Shapes, name: str) -> list[Grasp]:
    """Grasps from above at the narrow sides of a thing, best first; empty where it is too wide."""
    points = shapes.points(name, per_edge=7)
    top, bottom = points[:, 2].max(), points[:, 2].min()
    depth = min(_REACH, top - bottom - 0.007)
    level = top - depth
    slab = points[points[:, 2] > level - 0.012]
    obstacles = shapes.others(name)
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
        cost = width + 0.02 * turn + 0.05 * _blocked(obstacles, point, u, (-1.0, 1.0))
        found.append((cost, Grasp(point, rotation)))
    return [grasp for _, grasp in sorted(found, key=lambda pair: pair[0])]


def rim_grasps(shapes: Shapes, name: str, depth: float = 0.028, angles: int = 16) -> list[Grasp]:
    """Grasps of a round thing's rim, one finger in and one out, best first."""
    points = shapes.points(name)
    centre = 0.5 * (points[:, :2].max(0) + points[:, :2].min(0))
    obstacles = shapes.others(name)
    found = []
    for angle in np.arange(angles) * 2.0 * math.pi / angles:
        u = np.array([math.cos(angle), math.sin(angle)])
        ahead, across = (points[:, :2] - centre) @ u, (points[:, :2] - centre) @ np.array([-u[1], u[0]])
        sector = points[(np.abs(across) < 0.02) & (ahead > 0.02)]
        if not len(sector):
            continue
        top = sector[:, 2].max()  # of this side: the thing may stand askew
        radius = ((sector[sector[:, 2] > top - 0.012, :2] - centre) @ u).max()
        point = np.array([*(centre + (radius - 0.004) * u), top - min(depth, top - points[:, 2].min() - 0.007)])
        rotation = downward(np.array([*u, 0.0]))
        turn = math.acos(np.clip(rotation[1, 0], -1.0, 1.0))
        cost = 0.02 * turn + 0.05 * _blocked(obstacles, point, u, (1.0,))
        found.append((cost, Grasp(point, rotation)))
    return [grasp for _, grasp in sorted(found, key=lambda pair: pair[0])]


def _blocked(obstacles: np.ndarray, point: np.ndarray, u: np.ndarray, sides: tuple[float, ...]) -> float:
    """How many of the open fingers' places are taken by something else: 0 free, 1 or more taken, less nearly so."""
    total = 0.0
    across = np.array([-u[1], u[0]])
    near = obstacles[obstacles[:, 2] > point[2] - 0.012]
    for side in sides:
        finger = point[:2] + side * (_OPEN + _FINGER) * u
        apart = near[:, :2] - finger
        gap = np.maximum(np.abs(apart @ u) - _FINGER, np.abs(apart @ across) - 2.0 * _FINGER)
        closest = gap.min(initial=1.0)
        total += 1.0 if closest < 0.003 else math.exp(-closest / 0.02) * 0.5
    palm = obstacles[obstacles[:, 2] > point[2] + 0.05]
    apart = palm[:, :2] - point[:2]
    inside = (np.abs(apart @ u) < 0.11) & (np.abs(apart @ across) < 0.04)
    return total + 2.0 * float(inside.any())
