"""Scripted experts for LIBERO from privileged state: all of libero_spatial, libero_object and libero_goal, most of
libero_10.

An expert goes through the goals of its task: drawers are opened and knobs turned first, then things are placed, then
drawers closed. Placing is here; drawers, knobs and pushing are in libero_articulated.py. A plan is a generator of
actions, each a function of the present state: approach, grasp, carry, let go, check whether it worked, and if not try
again another way. There is no plan to reach through a door, the microwave's: its task is refused.
"""

from __future__ import annotations

import math

import numpy as np

from vlarft.sim.demonstrator import CLOSE, OPEN, NoPlanError, ScriptedExpert, ramp
from vlarft.sim.libero_articulated import close_drawer, drawer_of, has_knob, open_drawer, push, turn_knob
from vlarft.sim.libero_env import LiberoEnv
from vlarft.sim.libero_geometry import Grasp, axis_rotation, rim_grasps, room_above, top_grasps, way_out
from vlarft.sim.libero_motion import Motion, Plan
from vlarft.sim.libero_physics import LiberoPhysics

_BOWLS = ("akita_black_bowl",)
_MUGS = ("porcelain_mug", "white_yellow_mug", "red_coffee_mug")
_ORDER = {"open": 0, "turnon": 0, "on": 1, "in": 1, "close": 2}
_ATTEMPTS = 4


class LiberoExpert(ScriptedExpert):
    """Acts in one environment towards its goals, one after the other.

    Args:
        env: the environment, reset before `act`.
        seed: seed of the action noise.
        speed: largest translation in action units; 1 is about 1.2 cm a step.
        noise: settings of `ActionNoise`.

    Raises:
        ValueError: a setting out of range.
        NoPlanError: a goal that there is no plan for.
    """

    def __init__(self, env: LiberoEnv, seed: int = 0, *, speed: float = 1.0, **noise: float) -> None:
        super().__init__(env, seed, speed, **noise)
        self.physics = env.physics
        if other := [goal for goal in self.physics.goals if not _has_plan(self.physics, goal)]:
            raise NoPlanError(
                f"{self.physics.name}: the expert has no plan for {' '.join(other[0])}; it places things on and in "
                "others, opens and closes drawers, turns knobs on and drags plates. Leave this task out"
            )
        self._motion = Motion(self.physics, speed)
        self._plan = self._solve()

    def intend(self) -> np.ndarray | None:
        """Return the next action (7,) of the plan, or None after its last attempt."""
        return next(self._plan, None)

    def _solve(self) -> Plan:
        yield from self._motion.wait()
        for attempt in range(_ATTEMPTS):
            for goal in sorted(self.physics.goals, key=lambda goal: _ORDER[goal[0]]):
                if not self.physics.achieved(goal):
                    yield from self._reach(goal, attempt)

    def _reach(self, goal: list[str], attempt: int) -> Plan:
        kind, name = goal[0], goal[1]
        if kind == "open":
            yield from open_drawer(self._motion, name, attempt)
        elif kind == "close":
            yield from close_drawer(self._motion, name, attempt)
        elif kind == "turnon":
            yield from turn_knob(self._motion, name, attempt)
        elif name.startswith("plate"):
            yield from push(self._motion, name, self.physics.libero.sim.data.get_site_xpos(goal[2])[:2].copy(), attempt)
        else:
            drawer = drawer_of(self.physics, goal[2])
            if drawer is not None and drawer.opened < 0.14:
                yield from open_drawer(self._motion, goal[2], attempt)
            yield from self._place(name, goal[2], attempt)

    # Placing

    def _place(self, name: str, target: str, attempt: int) -> Plan:
        """Grasp, carry, let go; `attempt` grasps have been tried before and are passed over."""
        physics, motion = self.physics, self._motion
        xy, height = self._landing(name, target)
        in_drawer = drawer_of(physics, target) is not None
        up = np.array([0.0, 0.0, 0.09])
        travel = np.array([*xy, height]) - physics.position(name)
        turn = self._landing_turn(name, target)
        options = []
        for point, rotation in self._grasps(name, target):
            way_in = [Grasp(point + share * up, rotation) for share in ((0, 0.7, 1.4, 2.1) if in_drawer else (0, 1))]
            turned = turn @ rotation
            options.append([*way_in, Grasp(point + travel + up, turned), Grasp(point + travel, turned)])
        if not options:
            return  # it lies on its side, too wide for the fingers
        grasp = motion.choose(options, attempt, clear=len(way_in), room=in_drawer)[0]
        yield from motion.travel(grasp.point, grasp.rotation, OPEN)
        yield from motion.grasp(grasp.point, grasp.rotation)
        before = physics.position(name)[2]
        if in_drawer:
            shift = way_out(motion.shapes.points(name), motion.shapes.others(name))
            if shift.any():
                aside = physics.hand_position + np.array([*shift, 0.02])
                yield from motion.go(aside, grasp.rotation, CLOSE, tolerance=0.015, steps=25)
        lift = physics.hand_position + np.array([0.0, 0.0, 0.06])
        yield from motion.go(lift, grasp.rotation, CLOSE, tolerance=0.02, steps=15)
        rotation = grasp.rotation
        if physics.position(name)[2] > before + 0.01:
            rotation = turn @ rotation
            yield from self._carry(name, target, rotation)
        yield from motion.release(rotation)

    def _grasps(self, name: str, target: str) -> list[Grasp]:
        if not name.startswith(_BOWLS + _MUGS):
            return top_grasps(self._motion.shapes, name) or top_grasps(self._motion.shapes, name, reach=0.010)
        grasps = rim_grasps(self._motion.shapes, name, handle=name.startswith(_MUGS))
        if drawer_of(self.physics, target) is None:
            return grasps
        # an open drawer may be over the thing: the hand can lean to the side, its fingers still along the radius and a
        # little higher, and take the other of the two turns that do the same, where the last joint has more room
        half_turn = np.diag([-1.0, -1.0, 1.0])
        leaning = []
        for angle in (0.4, -0.4, 0.6, -0.6, 0.8, -0.8):
            for point, rotation in grasps:
                higher = point + np.array([0.0, 0.0, 0.02 * abs(angle)])
                leant = axis_rotation(rotation[:, 0], angle) @ rotation
                leaning += [Grasp(higher, leant), Grasp(higher, leant @ half_turn)]
        others = self._motion.shapes.others(name)
        over = others[others[:, 2] > self._motion.shapes.points(name)[:, 2].max()]
        return sorted(grasps + leaning, key=lambda grasp: -min(0.02, room_above(grasp, over)))

    def _carry(self, name: str, target: str, rotation: np.ndarray) -> Plan:
        """Carry the object over the target and down; the hand goes where the object in it has to be."""
        physics, motion = self.physics, self._motion
        xy, height = self._landing(name, target)
        grip = physics.hand_rotation.T @ (physics.position(name) - physics.hand_position)
        for phase, steps in (("over", 80), ("down", 40)):
            for _ in range(steps):
                hand, held = physics.hand_position, motion.shapes.points(name)
                offset = self._centre(name, target) - hand
                if np.linalg.norm(physics.hand_rotation.T @ (physics.position(name) - hand) - grip) > 0.04:
                    return  # lost on the way
                bottom = held[:, 2].min() - hand[2]
                point = np.array([xy[0] - offset[0], xy[1] - offset[1], height - bottom])
                if phase == "over":
                    clear = motion.clearance(hand, point, name) - bottom
                    apart = float(np.linalg.norm(point[:2] - hand[:2]))
                    if apart < 0.012 and motion.turn(rotation) < 0.15:
                        break
                    point[2] = max(clear, point[2])
                    sideways = ramp(hand[2] - point[2], -0.03, -0.005)
                    yield motion.action(point, rotation, CLOSE, sideways=sideways)
                else:
                    if abs(point[2] - hand[2]) < 0.006:
                        break
                    yield motion.action(point, rotation, CLOSE)

    def _centre(self, name: str, target: str) -> np.ndarray:
        """Return the point (3,) of an object that goes over its landing place: its origin, or a fitted one's centre."""
        if not self._is_fitted(target):
            return self.physics.position(name)
        points = self._motion.shapes.points(name)
        return 0.5 * (points.max(0) + points.min(0))

    def _landing(self, name: str, target: str) -> tuple[np.ndarray, float]:
        """Return where an object's centre goes (2,), and its lowest point at release [m]."""
        physics, shapes = self.physics, self._motion.shapes
        if target in physics.objects:
            return self._on_top(target, physics.position(target)[:2], physics.position(target)[2])
        site = physics.model.site(target).id
        place, axes = physics.data.site_xpos[site].copy(), physics.data.site_xmat[site].reshape(3, 3)
        base = getattr(physics.libero.object_sites_dict.get(target), "parent_name", None) or ""
        xy = place[:2] + self._slot(name, target)
        if base.startswith("basket"):
            return xy, shapes.points(base)[:, 2].max() - 0.04
        if base.startswith("wine_rack"):  # its shelf is a trough, in which the bottle's foot is pressed
            foot = place + 0.03 * axes[2]
            return foot[:2], foot[2] - 0.02
        if (drawer := drawer_of(physics, target)) is not None:
            xy = xy + 0.012 * drawer.out[:2]  # away from the cabinet over it
            points = shapes.points(base, drawer.body)
            return xy, points[np.linalg.norm(points[:, :2] - xy, axis=1) < 0.04][:, 2].max() + 0.008
        if self._is_fitted(target):
            return xy, place[2] - 0.02
        return self._on_top(base, xy, place[2])

    def _on_top(self, base: str, xy: np.ndarray, otherwise: float) -> tuple[np.ndarray, float]:
        points = self._motion.shapes.points(base) if base in self._motion.shapes else np.zeros((0, 3))
        near = points[np.linalg.norm(points[:, :2] - xy, axis=1) < 0.04]
        return xy, (near[:, 2].max() if len(near) else otherwise) + 0.008

    def _is_fitted(self, target: str) -> bool:
        """Return whether a target is a compartment of a fixture, open at the top."""
        site = self.physics.libero.object_sites_dict.get(target)
        inside = ["in", target] in [[goal[0], goal[-1]] for goal in self.physics.goals]
        return inside and getattr(site, "parent_name", None) in self.physics.fixtures and not site.joints

    def _landing_turn(self, name: str, target: str) -> np.ndarray:
        """Return the rotation (3, 3) about the vertical that lays a thing's longer side along its compartment's."""
        if not self._is_fitted(target):
            return np.eye(3)
        points = self._motion.shapes.points(name)[:, :2]
        longer = np.linalg.svd(points - points.mean(0), full_matrices=False)[2][0]
        site = self.physics.model.site(target).id
        extent = np.abs(self.physics.data.site_xmat[site].reshape(3, 3)) @ self.physics.model.site_size[site]
        wanted = 0.0 if extent[0] > extent[1] else 0.5 * math.pi
        angle = math.remainder(wanted - math.atan2(longer[1], longer[0]), math.pi)
        return axis_rotation(np.array([0.0, 0.0, 1.0]), angle)

    def _slot(self, name: str, target: str) -> np.ndarray:
        """Return the offset (2,) of an object's place where several go to one target: side by side."""
        own = [goal[1] for goal in self.physics.goals if len(goal) == 3 and goal[2] == target]
        return np.array([(own.index(name) - 0.5 * (len(own) - 1)) * 0.08, 0.0])


def _has_plan(physics: LiberoPhysics, goal: list[str]) -> bool:
    kind, *names = goal
    if kind in ("open", "close"):
        return drawer_of(physics, names[0]) is not None
    if kind == "turnon":
        return has_knob(physics, names[0])
    return kind in ("on", "in")
