"""The paper's perturbed starts (Tables 3 and 8) in LIBERO.

Objects are the things that a task's goals name first, goals what they name second; the thing that a drawer or a knob
belongs to is both. Whatever stands on a thing moves with it, and so does what it stands on. The robot starts with its
hand displaced, its arm by inverse kinematics.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from vlarft.sim.libero_ik import Scratch

if TYPE_CHECKING:
    from vlarft.sim.libero_env import LiberoEnv
    from vlarft.sim.perturb import Perturbation

_FALL = 0.01  # metres that a thing may end higher or lower than in the plain start


def perturb_start(env: LiberoEnv, perturbation: Perturbation, rng: np.random.Generator) -> int:
    """Displaces and settles a start that has been placed but not settled; `LiberoEnv.reset` calls it.

    A draw is rejected when something is deeper in something else than in the plain start by more than `max_depth`
    (some of the benchmark's own starts overlap), when fixtures overlap, when the arm does not reach, and when a thing
    falls or is pushed up while settling.

    Args:
        env: the environment.
        perturbation: what moves how far.
        rng: source of randomness.

    Returns:
        Number of rejected draws.

    Raises:
        ValueError: nothing that the perturbation names can move in this task.
        RuntimeError: `max_tries` draws were all rejected.
    """
    half = half_ranges(env, perturbation)
    if not half and not perturbation.robot_mm:
        raise ValueError(
            f"{env.suite}/{env.task_name}: its goal is a region of the table, nothing that {perturbation} could move; "
            "leave the task out with --tasks, or perturb its object"
        )
    start, controller = env.get_state(), dict(vars(env.robot.controller))
    plain, apart = _depths(env), _fixture_gap(env)
    env.settle()
    heights = {name: env.position(name)[2] for name in env.objects}
    scratch = Scratch(env)
    for rejected in range(perturbation.max_tries):
        env.set_state(start)
        vars(env.robot.controller).update(controller)  # what it saw last, which its first step refers to
        moved = set()
        for body, metres in half.items():
            shift = perturbation.shift(rng, metres)
            for name in moves_with(env, body):
                _move(env, name, shift)
                moved.add(name)
        env._mujoco.mj_forward(env.model, env.data)
        reached = True
        if perturbation.robot_mm:
            pose = scratch.solve(env.hand_position + perturbation.hand_shift(rng), env.hand_rotation)
            reached = pose.error < 0.002
            _set_arm(env, pose.joints)
        now = _depths(env)
        deeper = any(depth > plain.get(pair, 0.0) + perturbation.max_depth for pair, depth in now.items())
        if deeper or not reached or (moved & set(env.fixtures) and _fixture_gap(env) < min(apart, 0.0)):
            continue
        env.settle()
        if all(abs(env.position(name)[2] - height) < _FALL for name, height in heights.items()):
            return rejected
    raise RuntimeError(
        f"{env.suite}/{env.task_name}: no valid start in {perturbation.max_tries} draws of {perturbation}; "
        "ask for smaller displacements"
    )


def half_ranges(env: LiberoEnv, perturbation: Perturbation) -> dict[str, float]:
    """Thing to displace -> half range in metres; one that is both object and goal takes the larger, once."""
    half: dict[str, float] = {}
    for goal in env.goals:
        for name, cm in ((goal[1], perturbation.object_cm), (goal[-1], perturbation.goal_cm)):
            thing = _owner(env, name)
            if cm > 0.0 and thing is not None:
                half[thing] = max(half.get(thing, 0.0), cm / 100.0)
    return half


def moves_with(env: LiberoEnv, thing: str) -> set[str]:
    """A thing, what it stands on at the start, and all that stands on that."""
    support: dict[str, str] = {}
    for predicate, *names in env.libero.parsed_problem["initial_state"]:
        if predicate in ("on", "in") and (base := _owner(env, names[1])) is not None:
            support[names[0]] = base

    def root(name: str) -> str:
        while name in support:
            name = support[name]
        return name

    return {name for name in (*env.objects, *env.fixtures) if root(name) == root(thing)}


def _owner(env: LiberoEnv, name: str) -> str | None:
    """The object or fixture that a name of a goal means: itself, or the one that a region belongs to."""
    if name in env.objects or name in env.fixtures:
        return name
    site = env.libero.object_sites_dict.get(name)
    owner = getattr(site, "parent_name", None)
    return owner if owner in env.objects or owner in env.fixtures else None


def _move(env: LiberoEnv, name: str, shift: np.ndarray) -> None:
    model, data = env.model, env.data
    if name in env.fixtures:
        model.body_pos[env.fixtures[name], :2] += shift
        return
    joint = model.body_jntadr[env.objects[name]]
    position, velocity = model.jnt_qposadr[joint], model.jnt_dofadr[joint]
    data.qpos[position : position + 2] += shift
    data.qvel[velocity : velocity + 6] = 0.0


def _set_arm(env: LiberoEnv, joints: np.ndarray) -> None:
    """A new rest posture: the controller's goal follows, or the first step would pull the arm back."""
    env.data.qpos[env._joints] = joints
    env.data.qvel[env.robot._ref_joint_vel_indexes] = 0.0
    env._mujoco.mj_forward(env.model, env.data)
    controller = env.robot.controller
    controller.update(force=True)
    controller.update_initial_joints(joints)
    controller.reset_goal()


def _depths(env: LiberoEnv) -> dict[tuple[int, int], float]:
    """Pair of bodies in contact -> deepest penetration [m]."""
    found: dict[tuple[int, int], float] = {}
    for contact in env.data.contact[: env.data.ncon]:
        first, second = sorted(int(env.model.geom_bodyid[geom]) for geom in (contact.geom1, contact.geom2))
        found[first, second] = max(found.get((first, second), 0.0), -float(contact.dist))
    return found


def _fixture_gap(env: LiberoEnv) -> float:
    """Smallest distance between two fixtures, negative where they overlap [m]: the physics makes no such contacts."""
    model = env.model
    solid = (model.geom_contype > 0) | (model.geom_conaffinity > 0)
    geoms = []
    for root in env.fixtures.values():
        own = np.flatnonzero((model.body_rootid[model.geom_bodyid] == model.body_rootid[root]) & solid)
        geoms.append([int(g) for g in own if _inside(model, model.geom_bodyid[g], root)])
    pairs = ((a, b) for i, first in enumerate(geoms) for second in geoms[:i] for a in first for b in second)
    distance = env._mujoco.mj_geomDistance
    return min((distance(model, env.data, a, b, 0.05, None) for a, b in pairs), default=0.05)


def _inside(model, body: int, root: int) -> bool:
    while body > 0 and body != root:
        body = model.body_parentid[body]
    return body == root
