"""Moving LIBERO's hand: which grasp the arm can reach, and plans that take the hand to poses.

A plan is a generator of actions (7,), each a function of the present state. Metres and radians in the world frame.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from vlarft.sim.demonstrator import CLOSE, OPEN, ramp
from vlarft.sim.libero_geometry import Grasp, Shapes
from vlarft.sim.libero_ik import Scratch, rotation_vector
from vlarft.sim.libero_physics import LiberoPhysics

_CLOSING_STEPS = 9  # the gripper's ramp takes 8
_SETTLING_STEPS = 3  # at the grasp, open: a policy that learned from it may close a little early and still grasps

Plan = Iterator[np.ndarray]


class Motion:
    """The hand of one task.

    Args:
        physics: the physics of the task.
        speed: largest translation in action units; 1 is about 1.2 cm a step.
    """

    def __init__(self, physics: LiberoPhysics, speed: float) -> None:
        self.physics, self.speed = physics, speed
        self.shapes = Shapes(physics)
        self._scratch = Scratch(physics)

    def choose(
        self,
        options: Sequence[Sequence[Grasp]],
        skip: int,
        *,
        clear: int = 1,
        fingers: float = 0.04,
        room: bool = False,
    ) -> list[Grasp]:
        """Return the first option whose poses the arm reaches and where it touches nothing, or a later one.

        Args:
            options: each a list of poses, the first that of the grasp; best option first.
            skip: number of good options to pass over: those tried before.
            clear: number of poses, from the first, at which the robot must touch nothing.
            fingers: how far each finger is open there, metres.
            room: whether the fingers, 2 cm open, must touch nothing at the last pose either.
        """
        rated = []
        for rank, option in enumerate(options):
            poses = [self._scratch.solve(*pose) for pose in option]
            depth = sum(self._scratch.robot_depth(pose.joints, fingers) for pose in poses[:clear])
            if room:
                depth += self._scratch.robot_depth(poses[-1].joints, 0.02)
            # the arm is stretched at -0.47 rad of its elbow; the controller does not bring it back from there
            stretched = max(p.joints[3] for p in poses) + 0.9
            strain = sum(p.error for p in poses) + max(0.0, stretched)
            strain += max(0.0, 0.3 - min(p.margin for p in poses))  # the hand turns slowly near a limit, or not at all
            if depth < 0.001 and strain < 0.01:
                if skip == 0:
                    return list(option)
                skip -= 1
            rated.append((depth + strain, rank))
        return list(options[min(rated)[1]])

    def wait(self, steps: int = 15) -> Plan:
        """Wait while something falls: some initial states of libero_10 start with things in the air."""
        physics = self.physics
        first = physics.model.body_dofadr[list(physics.objects.values())]
        for _ in range(steps):
            if (np.abs(physics.data.qvel[first + 2]) < 0.1).all():  # the third of a free joint's six is upwards
                break
            yield from self.hold(physics.hand_position, physics.hand_rotation, OPEN, 1)

    def travel(self, point: np.ndarray, rotation: np.ndarray, gripper: float, height: float = 0.05) -> Plan:
        """Go to a place `height` above `point`, over everything between."""
        above = point + np.array([0.0, 0.0, height])
        clear = self.clearance(self.physics.hand_position, point, "") + 0.01
        for _ in range(80):
            hand = self.physics.hand_position
            apart = float(np.linalg.norm(above[:2] - hand[:2]))
            if apart < 0.012 and self.turn(rotation) < 0.12:
                return
            aim = above.copy()
            aim[2] = above[2] + max(0.0, clear - above[2]) * ramp(apart, 0.02, 0.08)
            yield self.action(aim, rotation, gripper, sideways=ramp(hand[2] - aim[2], -0.05, -0.02))

    def clearance(self, start: np.ndarray, end: np.ndarray, held: str) -> float:
        """Return the height (z) over everything but `held` in a corridor between two points."""
        points = self.shapes.others(held)
        line = end[:2] - start[:2]
        share = np.clip((points[:, :2] - start[:2]) @ line / max(float(line @ line), 1e-9), 0.0, 1.0)
        apart = np.linalg.norm(points[:, :2] - start[:2] - share[:, None] * line, axis=1)
        near = points[apart < 0.10]
        return float(near[:, 2].max(initial=min(start[2], end[2]))) + 0.025

    def go(
        self, point: np.ndarray, rotation: np.ndarray, gripper: float, *, tolerance: float = 0.01, steps: int = 40
    ) -> Plan:
        """Go straight to a pose."""
        for _ in range(steps):
            if np.linalg.norm(point - self.physics.hand_position) < tolerance and self.turn(rotation) < 0.1:
                return
            yield self.action(point, rotation, gripper)

    def grasp(self, point: np.ndarray, rotation: np.ndarray) -> Plan:
        """Go straight to a pose with open fingers, come to rest and close them."""
        yield from self.go(point, rotation, OPEN, tolerance=0.006, steps=30)
        yield from self.hold(point, rotation, OPEN, _SETTLING_STEPS)
        yield from self.hold(point, rotation, CLOSE, _CLOSING_STEPS)

    def hold(self, point: np.ndarray, rotation: np.ndarray, gripper: float, steps: int) -> Plan:
        """Stay at a pose, or come closer to it, while the fingers move."""
        for _ in range(steps):
            yield self.action(point, rotation, gripper)

    def let_go(self, rotation: np.ndarray) -> Plan:
        """Open the fingers where they are."""
        point, width = self.physics.hand_position, self.physics.finger_width
        for step in range(14):
            if self.physics.finger_width > min(width + 0.03, 0.074) and step > 4:
                break
            yield self.action(point, rotation, OPEN)

    def release(self, rotation: np.ndarray, height: float = 0.08) -> Plan:
        """Open the fingers where they are, then leave upwards."""
        yield from self.let_go(rotation)
        yield from self.go(self.physics.hand_position + np.array([0.0, 0.0, height]), rotation, OPEN, tolerance=0.02)

    def turn(self, rotation: np.ndarray) -> float:
        """Return the angle to a rotation of the hand."""
        return float(np.linalg.norm(rotation_vector(rotation @ self.physics.hand_rotation.T)))

    def action(self, point: np.ndarray, rotation: np.ndarray, gripper: float, sideways: float = 1.0) -> np.ndarray:
        """Return the action of proportional control towards a pose, limited in speed."""
        error = 20.0 * (point - self.physics.hand_position)
        error[:2] *= sideways
        error *= min(1.0, self.speed / max(float(np.linalg.norm(error)), 1e-9))
        turn = np.clip(4.0 * rotation_vector(rotation @ self.physics.hand_rotation.T), -self.speed, self.speed)
        return np.array([*error, *turn, gripper])
