"""The paper's perturbed starts (Tables 3 and 8) in LIBERO.

Objects are the things that a task's goals name first, goals what they name second; the thing that a drawer or a knob
belongs to is both. Whatever stands on a thing moves with it, and so does what it stands on. The robot's hand is
displaced, its arm follows by inverse kinematics.
"""

from __future__ import annotations

import numpy as np

from vlarft.sim.libero_ik import Scratch
from vlarft.sim.libero_physics import LiberoPhysics
from vlarft.sim.perturb import Perturbation

_FALL = 0.01  # a thing may settle this much higher or lower than in the plain start, metres


def perturb_start(physics: LiberoPhysics, perturbation: Perturbation, rng: np.random.Generator) -> int:
    """Displace and settle a start that has been placed but not settled; `LiberoEnv.reset` calls it.

    A displacement is rejected when two bodies are deeper in each other than in the plain start by more than `max_depth`
    (some of the benchmark's own starts overlap), when fixtures overlap, when the arm does not reach, and when a thing
    falls or is pushed up while settling.

    Args:
        physics: the physics of the task.
        perturbation: what moves how far.
        rng: source of random numbers.

    Returns:
        Number of rejected displacements.

    Raises:
        ValueError: nothing that the perturbation names can move in this task.
        RuntimeError: `max_tries` displacements were all rejected.
    """
    half = perturbation.half_ranges((_owner(physics, g[1]), _owner(physics, g[-1])) for g in physics.goals)
    if not half and not perturbation.robot_mm:
        raise ValueError(
            f"{physics.name}: its goal is a region of the table, nothing that {perturbation} could move; "
            "leave the task out with --tasks (in another --out-dir), or perturb its object"
        )
    start, controller = physics.get_state(), dict(vars(physics.robot.controller))
    plain, apart = _depths(physics), _fixture_gap(physics)
    physics.settle()
    heights = {name: physics.position(name)[2] for name in physics.objects}
    scratch = Scratch(physics)

    def attempt() -> bool:
        physics.set_state(start)
        vars(physics.robot.controller).update(controller)  # what it saw last, which its first step refers to
        moved = set()
        for body, metres in half.items():
            shift = perturbation.shift(rng, metres)
            for name in moves_with(physics, body):
                _move(physics, name, shift)
                moved.add(name)
        physics.forward()
        reached = True
        if perturbation.robot_mm:
            pose = scratch.solve(physics.hand_position + perturbation.hand_shift(rng), physics.hand_rotation)
            reached = pose.error < 0.002
            _set_arm(physics, pose.joints)
        now = _depths(physics)
        deeper = any(depth > plain.get(pair, 0.0) + perturbation.max_depth for pair, depth in now.items())
        if deeper or not reached or (moved & set(physics.fixtures) and _fixture_gap(physics) < min(apart, 0.0)):
            return False
        physics.settle()
        return all(abs(physics.position(name)[2] - height) < _FALL for name, height in heights.items())

    return perturbation.first_valid(attempt, physics.name)


def moves_with(physics: LiberoPhysics, thing: str) -> set[str]:
    """Return a thing, what it stands on at the start, and all that stands on that."""
    support: dict[str, str] = {}
    for predicate, *names in physics.libero.parsed_problem["initial_state"]:
        if predicate in ("on", "in") and (base := _owner(physics, names[1])) is not None:
            support[names[0]] = base

    def root(name: str) -> str:
        while name in support:
            name = support[name]
        return name

    return {name for name in (*physics.objects, *physics.fixtures) if root(name) == root(thing)}


def _owner(physics: LiberoPhysics, name: str) -> str | None:
    """Return the object or fixture that a name of a goal means: itself, or the one that a region belongs to."""
    if name in physics.objects or name in physics.fixtures:
        return name
    site = physics.libero.object_sites_dict.get(name)
    owner = getattr(site, "parent_name", None)
    return owner if owner in physics.objects or owner in physics.fixtures else None


def _move(physics: LiberoPhysics, name: str, shift: np.ndarray) -> None:
    model, data = physics.model, physics.data
    if name in physics.fixtures:
        model.body_pos[physics.fixtures[name], :2] += shift
        return
    joint = model.body_jntadr[physics.objects[name]]
    position, velocity = model.jnt_qposadr[joint], model.jnt_dofadr[joint]
    data.qpos[position : position + 2] += shift
    data.qvel[velocity : velocity + 6] = 0.0


def _set_arm(physics: LiberoPhysics, joints: np.ndarray) -> None:
    """Set the arm's rest posture: the controller's goal follows, or the first step would pull the arm back."""
    physics.data.qpos[physics.joints] = joints
    physics.data.qvel[physics.robot._ref_joint_vel_indexes] = 0.0
    physics.forward()
    controller = physics.robot.controller
    controller.update(force=True)
    controller.update_initial_joints(joints)
    controller.reset_goal()


def _depths(physics: LiberoPhysics) -> dict[tuple[int, int], float]:
    """Return pair of bodies in contact -> deepest penetration [m]."""
    found: dict[tuple[int, int], float] = {}
    for contact in physics.data.contact[: physics.data.ncon]:
        first, second = sorted(int(physics.model.geom_bodyid[geom]) for geom in (contact.geom1, contact.geom2))
        found[first, second] = max(found.get((first, second), 0.0), -float(contact.dist))
    return found


def _fixture_gap(physics: LiberoPhysics) -> float:
    """Return the smallest distance between two fixtures [m], negative where they overlap.

    The physics makes no contacts between things that cannot move.
    """
    model = physics.model
    solid = (model.geom_contype > 0) | (model.geom_conaffinity > 0)
    geoms = []
    for root in physics.fixtures.values():
        own = np.flatnonzero((model.body_rootid[model.geom_bodyid] == model.body_rootid[root]) & solid)
        geoms.append([int(g) for g in own if _inside(model, model.geom_bodyid[g], root)])
    pairs = ((a, b) for i, first in enumerate(geoms) for second in geoms[:i] for a in first for b in second)
    distance = physics.mujoco.mj_geomDistance
    return min((distance(model, physics.data, a, b, 0.05, None) for a, b in pairs), default=0.05)


def _inside(model, body: int, root: int) -> bool:
    while body > 0 and body != root:
        body = model.body_parentid[body]
    return body == root
