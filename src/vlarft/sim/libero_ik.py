"""Arm poses for a pose of the hand, and what the robot would touch there, tried on a copy of the physics state."""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np

from vlarft.sim.libero_physics import LiberoPhysics

_DAMPING = 0.05
_ITERATIONS = 60


class Pose(NamedTuple):
    joints: np.ndarray  # (7,) arm angles, rad
    error: float  # of the hand, metres plus 0.1 m per rad
    margin: float  # of the joint nearest to one of its limits, rad


class Scratch:
    """A second `MjData` of the same physics, to try poses on."""

    def __init__(self, physics: LiberoPhysics) -> None:
        self._mujoco, self._physics = physics.mujoco, physics
        self._data = physics.mujoco.MjData(physics.model)
        model = physics.model
        self._dofs = model.jnt_dofadr[model.dof_jntid[np.asarray(physics.robot._ref_joint_vel_indexes)]]
        names = [model.body(b).name for b in range(model.nbody)]
        robot = np.array([name.startswith(("robot0", "gripper0", "mount0")) for name in names])
        self._robot_geom = robot[model.geom_bodyid]

    def solve(self, point: np.ndarray, rotation: np.ndarray) -> Pose:
        """Solve by damped least squares, from the present arm pose.

        Args:
            point: (3,) where the point between the finger tips should be, metres.
            rotation: (3, 3) of the hand.
        """
        mj, physics, data = self._mujoco, self._physics, self._data
        mj.mj_copyData(data, physics.model, physics.data)
        site, joints = physics.grip_site, physics.joints
        low, high = physics.model.jnt_range[physics.model.dof_jntid[self._dofs]].T
        jacobian = np.zeros((6, physics.model.nv))
        for _ in range(_ITERATIONS):
            mj.mj_kinematics(physics.model, data)
            mj.mj_comPos(physics.model, data)
            turn = rotation_vector(rotation @ data.site_xmat[site].reshape(3, 3).T)
            error = np.concatenate([point - data.site_xpos[site], turn])
            size = float(np.linalg.norm(error[:3]) + 0.1 * np.linalg.norm(turn))
            if size < 1e-4:
                break
            mj.mj_jacSite(physics.model, data, jacobian[:3], jacobian[3:], site)
            j = jacobian[:, self._dofs]
            step = j.T @ np.linalg.solve(j @ j.T + _DAMPING**2 * np.eye(6), error)
            step *= min(1.0, 0.3 / max(float(np.abs(step).max()), 1e-9))
            data.qpos[joints] = np.clip(data.qpos[joints] + step, low, high)
        found = data.qpos[joints].copy()
        return Pose(found, size, float(np.minimum(found - low, high - found).min()))

    def robot_depth(self, joints: np.ndarray, fingers: float = 0.04) -> float:
        """Return how deep in other things the robot would be [m].

        Args:
            joints: (7,) angles of the arm.
            fingers: how far each finger is open [m].
        """
        physics, data = self._physics, self._data
        self._mujoco.mj_copyData(data, physics.model, physics.data)
        data.qpos[physics.joints] = joints
        data.qpos[physics.fingers] = fingers, -fingers
        self._mujoco.mj_kinematics(physics.model, data)
        self._mujoco.mj_comPos(physics.model, data)
        self._mujoco.mj_collision(physics.model, data)
        contact = data.contact
        if not len(contact.dist):
            return 0.0
        first, second = self._robot_geom[contact.geom].T
        return float(max(0.0, -contact.dist[first != second].min(initial=0.0)))


def rotation_vector(rotation: np.ndarray) -> np.ndarray:
    """Return the axis times the angle [rad], (3,), of a rotation matrix (3, 3)."""
    cosine = np.clip((np.trace(rotation) - 1.0) / 2.0, -1.0, 1.0)
    angle = math.acos(cosine)
    axis = np.array([rotation[2, 1] - rotation[1, 2], rotation[0, 2] - rotation[2, 0], rotation[1, 0] - rotation[0, 1]])
    sine = math.sin(angle)
    if sine > 1e-6:
        return axis * (angle / (2.0 * sine))
    if cosine > 0.0:
        return 0.5 * axis
    column = rotation + np.eye(3)  # half a turn: each column is along the axis
    column = column[:, np.argmax(np.linalg.norm(column, axis=0))]
    return column / np.linalg.norm(column) * math.pi
