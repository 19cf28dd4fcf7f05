"""Scripted experts for LIBERO from privileged state: pick and place, which is all of libero_object and libero_spatial.

Goals of other kinds (drawers, knobs, doors) have no plan yet and are refused.

A plan is a generator of actions, each a function of the present state: approach, grasp, carry, let go, look whether it
worked, and else try again another way.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from vlarft.sim.experts import ActionNoise, ExpertAction, ramp
from vlarft.sim.libero_env import LiberoEnv
from vlarft.sim.libero_geometry import Grasp, Shapes, rim_grasps, top_grasps
from vlarft.sim.libero_ik import Scratch, rotation_vector

_OPEN, _CLOSE = -1.0, 1.0
_RIMS = ("akita_black_bowl", "porcelain_mug", "white_yellow_mug", "red_coffee_mug")
_CLOSING_STEPS = 9  # the gripper's ramp takes 8
_ATTEMPTS = 4

Plan = Iterator[np.ndarray]


class LiberoExpert:
    """Acts in one environment towards its goals, one after the other.

    Args:
        env: the environment, reset before `act`.
        seed: of the action noise.
        action_noise, gripper_flips, persistence: as those of Tabletop's `Expert`.
        speed: largest translation in action units; 1 is about 1.2 cm a step.

    Raises:
        ValueError: a speed outside (0, 1], or a goal that is neither on nor in something.
    """

    def __init__(
        self,
        env: LiberoEnv,
        seed: int = 0,
        *,
        action_noise: float = 0.0,
        gripper_flips: float = 0.0,
        speed: float = 1.0,
        persistence: float = 0.5,
    ) -> None:
        if not 0.0 < speed <= 1.0:
            raise ValueError(f"speed must be in (0, 1], got {speed}")
        if other := [goal for goal in env.goals if goal[0] not in ("on", "in")]:
            raise ValueError(
                f"{env.suite}/{env.task_name}: the expert has no plan for {' '.join(other[0])}; it places things on "
                "and in others. Choose tasks of libero_object and libero_spatial"
            )
        self.env, self.speed = env, speed
        self.shapes = Shapes(env)
        self._scratch = Scratch(env)
        self._noise = ActionNoise(seed, action_noise, gripper_flips, persistence)
        self._plan = self._solve()

    def act(self) -> ExpertAction:
        """The action for the present state; after success, or out of ideas, it holds still with the gripper open."""
        still = np.array([0.0, 0.0, 0.0, 0.0, 0.0, 0.0, _OPEN])
        if self.env.success():
            return ExpertAction(still, still.copy())
        intended = next(self._plan, None)
        return ExpertAction(still, still.copy()) if intended is None else self._noise.add(intended)

    def _solve(self) -> Plan:
        for attempt in range(_ATTEMPTS):
            for goal in self.env.goals:
                if not self.env.achieved(goal):
                    yield from self._place(goal[1], goal[2], attempt)

    def _place(self, name: str, target: str, attempt: int) -> Plan:
        """Grasp, carry, let go; `attempt` passes over the grasps that were tried before."""
        grasps = (rim_grasps if name.startswith(_RIMS) else top_grasps)(self.shapes, name)
        xy, height = self._landing(name, target)
        travel = np.array([*xy, height]) - self.env.position(name)
        grasp = self._free(grasps, attempt, travel)
        yield from self._travel(grasp.point, grasp.rotation, _OPEN)
        yield from self._go(grasp.point, grasp.rotation, _OPEN, tolerance=0.006, steps=30)
        yield from self._hold(grasp.rotation, _CLOSE, _CLOSING_STEPS)
        before = self.env.position(name)[2]
        lift = self.env.hand_position + np.array([0.0, 0.0, 0.06])
        yield from self._go(lift, grasp.rotation, _CLOSE, tolerance=0.02, steps=15)
        if self.env.position(name)[2] > before + 0.01:
            yield from self._carry(name, target, grasp.rotation)
        yield from self._release(grasp.rotation)

    def _free(self, grasps: list[Grasp], skip: int, travel: np.ndarray) -> Grasp:
        """The best grasp that the arm reaches without touching anything, and also after `travel`; or a later one."""
        rated = []
        for rank, grasp in enumerate(grasps):
            pose = self._scratch.solve(grasp.point, grasp.rotation)
            depth = self._scratch.robot_depth(pose.joints)
            over = travel + np.array([0.0, 0.0, 0.09])
            poses = (pose, *(self._scratch.solve(grasp.point + way, grasp.rotation) for way in (over, travel)))
            # the arm is stretched at -0.47 rad of its elbow; one that passes that point does not find back
            stretched = max(p.joints[3] for p in poses) + 0.9
            strain = sum(p.error for p in poses) + max(0.0, stretched)
            if depth < 0.001 and strain < 0.01:
                if skip == 0:
                    return grasp
                skip -= 1
            rated.append((depth + strain, rank, grasp))
        return min(rated)[2]

    def _carry(self, name: str, target: str, rotation: np.ndarray) -> Plan:
        """Over the target and down, the object held; where the hand goes follows from where the object is in it."""
        env = self.env
        xy, height = self._landing(name, target)
        grip = env.position(name) - env.hand_position
        for phase, steps in (("over", 80), ("down", 40)):
            for _ in range(steps):
                hand, held = env.hand_position, self.shapes.points(name)
                offset = env.position(name) - hand
                if np.linalg.norm(offset - grip) > 0.04:
                    return  # lost on the way
                bottom = held[:, 2].min() - hand[2]
                point = np.array([xy[0] - offset[0], xy[1] - offset[1], height - bottom])
                if phase == "over":
                    clear = self._clearance(hand, point, name) - bottom
                    apart = float(np.linalg.norm(point[:2] - hand[:2]))
                    if apart < 0.012:
                        break
                    point[2] = max(clear, point[2])
                    sideways = ramp(hand[2] - point[2], -0.03, -0.005)
                    yield self._action(point, rotation, _CLOSE, sideways=sideways)
                else:
                    if abs(point[2] - hand[2]) < 0.006:
                        break
                    yield self._action(point, rotation, _CLOSE)

    def _landing(self, name: str, target: str) -> tuple[np.ndarray, float]:
        """Where an object's centre goes, and its lowest point at release."""
        env = self.env
        if target in env.objects:
            xy = env.position(target)[:2]
            base = target
        else:
            xy = env.libero.sim.data.get_site_xpos(target)[:2].copy()
            base = env.libero.object_sites_dict[target].parent_name if target in env.libero.object_sites_dict else ""
        points = self.shapes.points(base) if base in self.shapes else np.zeros((0, 3))
        if base.startswith("basket"):
            return xy, points[:, 2].max() - 0.04
        near = points[np.linalg.norm(points[:, :2] - xy, axis=1) < 0.04]
        top = near[:, 2].max() if len(near) else env.libero.sim.data.get_site_xpos(target)[2]
        return xy, top + 0.008

    # Motion

    def _travel(self, point: np.ndarray, rotation: np.ndarray, gripper: float) -> Plan:
        """To a place a little above `point`, over everything between."""
        above = point + np.array([0.0, 0.0, 0.05])
        clear = self._clearance(self.env.hand_position, point, "") + 0.01
        for _ in range(80):
            hand = self.env.hand_position
            apart = float(np.linalg.norm(above[:2] - hand[:2]))
            if apart < 0.012 and self._turn(rotation) < 0.12:
                return
            aim = above.copy()
            aim[2] = above[2] + max(0.0, clear - above[2]) * ramp(apart, 0.02, 0.08)
            yield self._action(aim, rotation, gripper, sideways=ramp(hand[2] - aim[2], -0.05, -0.02))

    def _clearance(self, start: np.ndarray, end: np.ndarray, held: str) -> float:
        """Height (z) over everything but `held` in a corridor between two points."""
        points = self.shapes.others(held)
        line = end[:2] - start[:2]
        share = np.clip((points[:, :2] - start[:2]) @ line / max(float(line @ line), 1e-9), 0.0, 1.0)
        apart = np.linalg.norm(points[:, :2] - start[:2] - share[:, None] * line, axis=1)
        near = points[apart < 0.10]
        return float(near[:, 2].max(initial=min(start[2], end[2]))) + 0.025

    def _go(
        self, point: np.ndarray, rotation: np.ndarray, gripper: float, *, tolerance: float = 0.01, steps: int = 40
    ) -> Plan:
        for _ in range(steps):
            if np.linalg.norm(point - self.env.hand_position) < tolerance and self._turn(rotation) < 0.1:
                return
            yield self._action(point, rotation, gripper)

    def _hold(self, rotation: np.ndarray, gripper: float, steps: int) -> Plan:
        point = self.env.hand_position
        for _ in range(steps):
            yield self._action(point, rotation, gripper)

    def _release(self, rotation: np.ndarray) -> Plan:
        """Opens the fingers where they are, then leaves upwards."""
        point, width = self.env.hand_position, self.env.finger_width
        for step in range(14):
            if self.env.finger_width > min(width + 0.03, 0.074) and step > 4:
                break
            yield self._action(point, rotation, _OPEN)
        yield from self._rise(rotation)

    def _rise(self, rotation: np.ndarray, height: float = 0.08) -> Plan:
        yield from self._go(self.env.hand_position + np.array([0.0, 0.0, height]), rotation, _OPEN, tolerance=0.02)

    def _turn(self, rotation: np.ndarray) -> float:
        return float(np.linalg.norm(rotation_vector(rotation @ self.env.hand_rotation.T)))

    def _action(self, point: np.ndarray, rotation: np.ndarray, gripper: float, sideways: float = 1.0) -> np.ndarray:
        """Proportional control towards a pose, limited in speed."""
        error = 20.0 * (point - self.env.hand_position)
        error[:2] *= sideways
        error *= min(1.0, self.speed / max(float(np.linalg.norm(error)), 1e-9))
        turn = np.clip(4.0 * rotation_vector(rotation @ self.env.hand_rotation.T), -self.speed, self.speed)
        return np.array([*error, *turn, gripper])
