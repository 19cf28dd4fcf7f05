"""Plans for what does not leave its place in LIBERO: drawers, knobs, and a plate that is pushed along the table."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from vlarft.sim.demonstrator import CLOSE, OPEN
from vlarft.sim.libero_geometry import Grasp, axis_rotation, downward, knob_grasps, rim_grasps, tilted
from vlarft.sim.libero_motion import Motion, Plan
from vlarft.sim.libero_physics import LiberoPhysics

_SLIDE, _HINGE = 2, 3  # MuJoCo's joint types
_TILTS = (1.5, 1.3, 1.1, 0.9)  # of the palm at a drawer's handle, from pointing down, rad; level ones hold firmest
_TURN = 1.1  # of the hand that turns a knob on, rad: it is on at 0.5, but the fingers slip


class Drawer(NamedTuple):
    body: str
    out: np.ndarray  # (3,) direction in which it opens
    opened: float  # how far, metres
    bar: np.ndarray  # (3,) centre of its handle
    along: np.ndarray  # (3,) direction of the handle's bar
    thick: float  # half thickness of the bar, metres


def drawer_of(physics: LiberoPhysics, region: str) -> Drawer | None:
    """Return the drawer that a region is in, as it is now, or None."""
    joints = getattr(physics.libero.object_sites_dict.get(region), "joints", None) or []
    if len(joints) != 1 or physics.model.joint(joints[0]).type[0] != _SLIDE:
        return None
    model, data = physics.model, physics.data
    joint = model.joint(joints[0])
    body = int(joint.bodyid[0])
    low, high = joint.range
    sign = 1.0 if high > -low else -1.0
    out = sign * data.xaxis[joint.id]
    own = np.flatnonzero((model.geom_bodyid == body) & ((model.geom_contype > 0) | (model.geom_conaffinity > 0)))
    bar = own[np.argmax(data.geom_xpos[own] @ out)]  # the handle is what stands out
    size, axes = model.geom_size[bar], data.geom_xmat[bar].reshape(3, 3)
    return Drawer(
        body=model.body(body).name,
        out=out,
        opened=float(sign * data.qpos[joint.qposadr[0]]),
        bar=data.geom_xpos[bar].copy(),
        along=axes[:, np.argmax(size)].copy(),
        thick=float(size.min()),
    )


def has_knob(physics: LiberoPhysics, name: str) -> bool:
    """Return whether a fixture has one hinge, about the vertical."""
    joints = physics.libero.get_object(name).joints if name in physics.fixtures else []
    if len(joints) != 1 or physics.model.joint(joints[0]).type[0] != _HINGE:
        return False
    return abs(physics.data.xaxis[physics.model.joint(joints[0]).id][2]) > 0.9


def open_drawer(motion: Motion, region: str, attempt: int, *, width: float = 0.147) -> Plan:
    """Pinch the handle's bar from the front and pull until the drawer is `width` open."""
    physics = motion.physics
    drawer = drawer_of(physics, region)
    options = []
    for tilt in _TILTS:
        for offset in (0.0, 0.02, -0.02):
            across = np.cross(drawer.along, -drawer.out)
            rotation = tilted(drawer.out, tilt, finger_axis=across, hand=physics.hand_rotation)
            point = drawer.bar + offset * drawer.along
            pulled = Grasp(point + (width - drawer.opened) * drawer.out, rotation)
            options.append([Grasp(point, rotation), Grasp(point + 0.09 * drawer.out, rotation), pulled])
    (point, rotation), (front, _), _ = motion.choose(options, attempt, clear=2)
    yield from motion.travel(front, rotation, OPEN)
    yield from motion.go(front, rotation, OPEN)
    yield from motion.grasp(point, rotation)
    for _ in range(60):
        now = drawer_of(physics, region)
        if now.opened >= width - 0.002 or np.linalg.norm(physics.hand_position - now.bar) > 0.06:
            break
        line = point + (now.opened + 0.1 - drawer.opened) * drawer.out
        yield motion.action(line, rotation, CLOSE)
    yield from motion.let_go(rotation)
    yield from motion.go(physics.hand_position + 0.08 * drawer.out, rotation, OPEN, tolerance=0.02)
    # upright again before anything else: the ways from a level hand to other poses pass the arm's limits
    away = physics.hand_position + 0.03 * drawer.out + np.array([0.0, 0.0, 0.10])
    upright = downward(np.array([0.0, 1.0]))
    for _ in range(30):
        if motion.turn(upright) < 0.4:
            break
        yield motion.action(away, upright, OPEN)


def close_drawer(motion: Motion, region: str, attempt: int) -> Plan:
    """Push the handle with the closed fingers, past where the drawer is flush."""
    physics = motion.physics
    drawer = drawer_of(physics, region)
    options = []
    for tilt in _TILTS:
        for offset in (0.0, 0.02, -0.02):
            rotation = tilted(drawer.out, tilt, finger_axis=drawer.along, hand=physics.hand_rotation)
            point = drawer.bar + offset * drawer.along + (drawer.thick + 0.014) * drawer.out
            front = point + 0.03 * drawer.out
            pushed = Grasp(point - drawer.opened * drawer.out, rotation)
            above = Grasp(front + np.array([0.0, 0.0, 0.05]), rotation)
            options.append([above, Grasp(front, rotation), Grasp(point, rotation), pushed])
    _, (front, rotation), (point, _), _ = motion.choose(options, attempt, clear=2, fingers=0.0)
    yield from motion.travel(front, rotation, CLOSE)
    yield from motion.go(front, rotation, CLOSE)
    for _ in range(70):
        now = drawer_of(physics, region)
        if physics.achieved(["close", region]):
            break
        yield motion.action(point + (now.opened - drawer.opened - 0.1) * drawer.out, rotation, CLOSE)
    yield from motion.go(physics.hand_position + 0.08 * drawer.out, rotation, CLOSE, tolerance=0.02)


def turn_knob(motion: Motion, name: str, attempt: int) -> Plan:
    """Grasp the knob's ridge from above and turn it, in the direction that its range allows, until it is on."""
    physics = motion.physics
    joint = physics.model.joint(physics.libero.get_object(name).joints[0])
    low, high = joint.range
    axis = physics.data.xaxis[joint.id] * (1.0 if high > -low else -1.0)
    points = motion.shapes.points(name, physics.model.body(int(joint.bodyid[0])).name)
    options = []
    for grasp in knob_grasps(points, physics.data.xanchor[joint.id]):
        turned = axis_rotation(axis, _TURN) @ grasp.rotation
        options.append([grasp, Grasp(grasp.point, turned)])
    (point, start), _ = motion.choose(options, attempt)
    yield from motion.travel(point, start, OPEN)
    yield from motion.grasp(point, start)
    rotation = start
    for step in range(40):
        if physics.achieved(["turnon", name]):
            break
        rotation = axis_rotation(axis, min(1.6 * _TURN, 0.08 * (step + 1))) @ start  # askew fingers turn it less
        yield motion.action(point, rotation, CLOSE)
    yield from motion.release(rotation)


def push(motion: Motion, name: str, xy: np.ndarray, attempt: int) -> Plan:
    """Pinch the rim of a flat thing and drag it along the table to `xy` (2,)."""
    physics = motion.physics
    way = np.array([*(xy - physics.position(name)[:2]), 0.0])
    options = [
        [g, Grasp(g.point + 0.5 * way, g.rotation), Grasp(g.point + way, g.rotation)]
        for g in rim_grasps(motion.shapes, name)
    ]
    point, rotation = motion.choose(options, attempt)[0]
    yield from motion.travel(point, rotation, OPEN)
    yield from motion.grasp(point, rotation)
    level = physics.hand_position[2] + 0.003
    for _ in range(80):
        left = xy - physics.position(name)[:2]
        if np.linalg.norm(left) < 0.01 or np.linalg.norm(physics.position(name) - physics.hand_position) > 0.14:
            break
        yield motion.action(np.array([*(physics.hand_position[:2] + left), level]), rotation, CLOSE)
    yield from motion.release(rotation)
