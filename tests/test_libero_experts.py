"""The LIBERO experts' geometry and choice of grasps, without LIBERO; with LIBERO, one task of each kind."""

import math
from types import SimpleNamespace

import numpy as np
import pytest
from conftest import libero_missing

from vlarft.sim import make_env
from vlarft.sim.libero_experts import LiberoExpert
from vlarft.sim.libero_geometry import (
    Grasp,
    axis_rotation,
    knob_grasps,
    rim_grasps,
    room_above,
    tilted,
    top_grasps,
    way_out,
)
from vlarft.sim.libero_ik import Pose
from vlarft.sim.libero_motion import Motion

DOWN = np.array([0.0, 0.0, -1.0])
REST = np.array([[0.0, 1.0, 0.0], [1.0, 0.0, 0.0], [0.0, 0.0, -1.0]])


def box(low, high, step=0.005):
    lines = [np.linspace(a, b, max(2, math.ceil((b - a) / step) + 1)) for a, b in zip(low, high)]
    return np.stack(np.meshgrid(*lines, indexing="ij"), -1).reshape(-1, 3)


def ring(radius, height, centre=(0.0, 0.0)):
    angles = np.linspace(0.0, 2.0 * math.pi, 73)[:-1]
    circle = np.stack([centre[0] + radius * np.cos(angles), centre[1] + radius * np.sin(angles)], -1)
    return np.concatenate([np.c_[circle, np.full(72, z)] for z in np.linspace(0.0, height, 13)])


def shapes_of(points):
    return SimpleNamespace(points=lambda name: points)


def test_rotations_by_hand():
    np.testing.assert_allclose(axis_rotation([0, 0, 1], 0.5 * math.pi) @ [1, 0, 0], [0, 1, 0], atol=1e-12)
    np.testing.assert_allclose(axis_rotation([1, 0, 0], 0.5 * math.pi) @ DOWN, [0, 1, 0], atol=1e-12)
    axis = np.array([2.0, -1.0, 2.0]) / 3.0
    one = axis_rotation(axis, 0.7)
    np.testing.assert_allclose(one @ one.T, np.eye(3), atol=1e-12)
    np.testing.assert_allclose(one @ axis, axis, atol=1e-12)
    assert np.trace(one) == pytest.approx(1.0 + 2.0 * math.cos(0.7))


@pytest.mark.parametrize("tilt", [0.0, 0.9, 1.5])
def test_a_tilted_hand_looks_against_the_front_and_turns_the_short_way(tilt):
    out = np.array([0.0, 1.0, 0.0])
    level = tilted(out, tilt, finger_axis=np.array([1.0, 0.0, 0.0]), hand=REST)
    assert np.linalg.det(level) == pytest.approx(1.0)
    np.testing.assert_allclose(level[:, 2], [0.0, -math.sin(tilt), -math.cos(tilt)], atol=1e-12)
    assert abs(level[0, 0]) == pytest.approx(1.0)  # fingers along the handle
    if tilt:
        upright = tilted(out, tilt, finger_axis=np.array([0.0, 0.0, 1.0]), hand=REST)
        other = upright @ np.diag([-1.0, -1.0, 1.0])
        assert np.trace(upright @ REST.T) > np.trace(other @ REST.T)
        assert abs(upright[0, 0]) < 1e-12  # they close from above and below


def test_a_box_is_taken_across_and_a_wide_pot_by_its_knob():
    brick = box((-0.02, -0.06, 0.0), (0.02, 0.06, 0.10))
    grasp = top_grasps(shapes_of(brick), "brick")[0]
    assert abs(grasp.rotation[0, 0]) == pytest.approx(1.0, abs=0.05)  # along x, where it is narrow
    np.testing.assert_allclose(grasp.point, [0.0, 0.0, 0.07], atol=1e-3)
    flat = top_grasps(shapes_of(box((-0.02, -0.04, 0.4), (0.02, 0.04, 0.417))), "flat")[0]
    assert flat.point[2] == pytest.approx(0.411)  # lower, the finger tips would touch the table
    pot = np.concatenate(
        [box((-0.045, -0.045, 0.0), (0.045, 0.045, 0.12)), box((-0.005,) * 2 + (0.12,), (0.005,) * 2 + (0.137,))]
    )
    assert top_grasps(shapes_of(pot), "pot") == []
    knob = top_grasps(shapes_of(pot), "pot", reach=0.010)
    assert knob and all(np.allclose(g.point, [0.0, 0.0, 0.127], atol=2e-3) for g in knob)


def test_a_rim_is_found_beside_a_handle():
    mug = np.concatenate([ring(0.04, 0.10), box((-0.004, -0.09, 0.03), (0.004, -0.04, 0.07))])
    for handle, worst in ((True, 0.004), (False, 0.01)):
        away = [np.linalg.norm(g.point[:2]) - 0.036 for g in rim_grasps(shapes_of(mug), "mug", handle=handle)]
        outer = [a for a in away if a > -0.012]  # the others are the insets
        assert (max(map(abs, outer)) < worst) == handle


def test_a_knob_is_taken_across_its_ridge_at_its_pivot():
    knob = np.concatenate(
        [box((-0.045, -0.045, 0.0), (0.045, 0.045, 0.02)), box((-0.04, -0.012, 0.02), (0.04, 0.012, 0.045))]
    )
    grasps = knob_grasps(knob, np.array([0.0, 0.0, 0.01]))
    np.testing.assert_allclose(grasps[0].point, [0.0, 0.0, 0.035], atol=1e-9)
    assert abs(grasps[0].rotation[1, 0]) > 0.98  # along y
    assert knob_grasps(box((-0.05, -0.05, 0.0), (0.05, 0.05, 0.02)), np.zeros(3)) == []


def test_the_way_out_from_under_is_the_short_one_and_free():
    bowl, drawer = ring(0.05, 0.05), box((0.0, -0.2, 0.15), (0.2, 0.2, 0.2))
    assert not way_out(bowl, np.concatenate([box((0.06, -0.1, 0.15), (0.2, 0.1, 0.2))])).any()
    shift = way_out(bowl, drawer)
    assert np.linalg.norm(shift) == pytest.approx(0.07)  # radius and 1.5 cm, in steps of 1 cm
    assert shift[0] < -0.065
    wall = box((-0.13, -0.3, 0.0), (-0.10, 0.3, 0.2))
    assert not way_out(bowl, np.concatenate([drawer, wall])).any()  # no room between the two


def test_room_above_is_what_the_hand_keeps_from_a_drawer():
    drawer = box((0.0, -0.3, 1.0), (0.3, 0.3, 1.1))
    for away in (0.05, 0.10):  # fingers along y, so that the hand is thin in x: 3.2 cm to each side
        assert room_above(Grasp(np.array([-away, 0.0, 0.9]), REST), drawer) == pytest.approx(away - 0.032, abs=1e-6)
    across = Grasp(np.array([-0.10, 0.0, 0.9]), REST[:, [1, 0, 2]] * [1.0, 1.0, 1.0])
    assert room_above(across, drawer) == pytest.approx(0.10 - 0.09 - 0.032, abs=1e-6)  # fingers along x: it would touch
    leant = Grasp(np.array([-0.05, 0.0, 0.9]), axis_rotation(REST[:, 0], 0.4) @ REST)
    mirrored = Grasp(np.array([-0.05, 0.0, 0.9]), axis_rotation(REST[:, 0], -0.4) @ REST)
    rooms = sorted([room_above(leant, drawer), room_above(mirrored, drawer)])
    assert rooms[0] < 0.018 < rooms[1]  # leaning away makes room, until the finger is nearest
    assert room_above(leant, np.zeros((0, 3))) == 0.1


def scratch(depths, strains, margin=1.0):
    """Poses are named by the x of their point; the arm's elbow is bent."""
    joints = np.array([0.0, 0.0, 0.0, -2.0, 0.0, 0.0, 0.0])

    def solve(point, rotation):
        return Pose(joints + np.eye(7)[0] * point[0], strains.get(point[0], 0.0), margin)

    def robot_depth(pose, fingers=0.04):
        return depths.get((round(float(pose[0]), 6), fingers), depths.get(round(float(pose[0]), 6), 0.0))

    return SimpleNamespace(solve=solve, robot_depth=robot_depth)


def choose(options, skip=0, *, depths=None, strains=None, margin=1.0, **settings):
    motion = Motion.__new__(Motion)
    motion._scratch = scratch(depths or {}, strains or {}, margin)
    poses = [[Grasp(np.array([float(x), 0.0, 0.0]), REST) for x in option] for option in options]
    return [int(grasp.point[0]) for grasp in motion.choose(poses, skip, **settings)]


def test_the_first_grasp_that_is_free_and_within_reach_is_chosen():
    options = [(1, 2), (3, 4), (5, 6)]
    assert choose(options) == [1, 2]
    assert choose(options, depths={1: 0.01}) == [3, 4]
    assert choose(options, depths={2: 0.01}) == [1, 2]  # on the way only the reach counts
    assert choose(options, depths={2: 0.01}, clear=2) == [3, 4]
    assert choose(options, strains={1: 0.05, 4: 0.05}) == [5, 6]
    assert choose(options, skip=1) == [3, 4]
    assert choose(options, skip=7) == [1, 2]  # all tried: the best
    assert choose(options, depths={1: 0.03, 3: 0.02, 5: 0.04}) == [3, 4]
    assert choose(options, depths={(2, 0.02): 0.01}, room=True) == [3, 4]
    assert choose([(1, 2)], margin=0.1) == [1, 2]


@pytest.mark.skipif(bool(libero_missing()), reason=libero_missing() or "LIBERO is here")
@pytest.mark.slow
@pytest.mark.parametrize(
    ("suite", "task"),
    [
        ("libero_goal", "open_the_middle_drawer_of_the_cabinet"),
        ("libero_goal", "push_the_plate_to_the_front_of_the_stove"),
        ("libero_goal", "turn_on_the_stove"),
        ("libero_goal", "put_the_wine_bottle_on_the_rack"),
        ("libero_10", 3),  # a bowl into a drawer, which is closed
        ("libero_10", 5),  # a book into a compartment that it just fits
        ("libero_10", 8),  # two pots by their knobs
    ],
)
def test_a_task_of_each_kind_is_solved(suite, task):
    env = make_env(suite, task, 64)
    env.reset(init_state=40)
    expert = LiberoExpert(env)
    for _ in range(env.horizon):
        if env.step(expert.act().executed).done:
            break
    assert env.success()
    np.testing.assert_array_equal(expert.act().executed, [0, 0, 0, 0, 0, 0, -1])
