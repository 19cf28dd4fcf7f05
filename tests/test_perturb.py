"""Perturbed starts: what moves, by how much, and what is rejected."""

import numpy as np
import pytest

from vlarft.sim import make_env
from vlarft.sim.perturb import Perturbation

pytest.importorskip("mujoco")


def shifts(env, perturb, states=12):
    """Displacements (states, 3) of hand, items and fixtures against the plain starts."""
    bodies = [*env.items, *(fixture.name for fixture in env.scene.fixtures)]
    moved = {name: [] for name in ("hand", *bodies)}
    for state in range(states):
        poses = []
        for each in (None, perturb):
            env.reset(init_state=state, perturb=each)
            poses.append({"hand": env.hand_position, **{body: env.position(body) for body in bodies}})
        for name in moved:
            moved[name].append(poses[1][name] - poses[0][name])
    return {name: np.array(values) for name, values in moved.items()}


def test_parse_reads_the_command_line_form():
    assert Perturbation.parse("object:2.5") == Perturbation(object_cm=2.5)
    assert Perturbation.parse("goal:5") == Perturbation(goal_cm=5.0)
    assert Perturbation.parse("robot:20") == Perturbation(robot_mm=20.0)
    assert Perturbation.parse("all:2.5/2.5/20") == Perturbation(2.5, 2.5, 20.0)
    assert Perturbation.parse("object:5:x") == Perturbation(object_cm=5.0, direction=1)
    assert Perturbation.parse("robot:20:horizontal") == Perturbation(robot_mm=20.0, direction=2)
    assert Perturbation.parse("all:5/5/50:1") == Perturbation(5.0, 5.0, 50.0, direction=1)


@pytest.mark.parametrize(
    "text",
    ["object", "table:3", "all:3", "object:1/2", "all:1/2/x", "object:", "", "object:5:z", "robot:20:x", "goal:5:"],
)
def test_parse_errors_show_the_forms(text):
    with pytest.raises(ValueError, match="object:CM"):
        Perturbation.parse(text)


@pytest.mark.parametrize("text", ["object:-1", "robot:nan", "goal:inf"])
def test_ranges_must_be_finite_and_positive(text):
    with pytest.raises(ValueError, match="must be a finite number >= 0"):
        Perturbation.parse(text)


@pytest.mark.parametrize(
    "text,movers",
    [
        ("object:2.5", {"red_block": 0.025}),
        ("goal:2.5", {"bin": 0.025}),
        ("all:2/4/0", {"red_block": 0.02, "bin": 0.04}),
    ],
)
def test_only_the_named_things_move_and_within_range(text, movers):
    moved = shifts(make_env("tabletop_object", 0), Perturbation.parse(text))
    for name, values in moved.items():
        largest = np.abs(values[:, :2]).max()
        if name in movers:
            assert 0.4 * movers[name] < largest <= movers[name] + 1e-3, name
        else:
            assert largest < 1e-4, name


@pytest.mark.parametrize(("text", "still"), [("object:3:x", 1), ("object:3:y", 0)])
def test_one_direction_of_table_8(text, still):
    moved = shifts(make_env("tabletop_object", 0), Perturbation.parse(text))["red_block"]
    assert np.abs(moved[:, still]).max() < 1e-3 and np.abs(moved[:, 1 - still]).max() > 0.01


@pytest.mark.parametrize(("text", "moving"), [("robot:20:height", [2]), ("robot:20:horizontal", [0, 1])])
def test_the_hand_moves_in_one_direction_of_table_8(text, moving):
    moved = np.abs(shifts(make_env("tabletop_spatial", 0), Perturbation.parse(text))["hand"]).max(axis=0)
    assert [axis for axis in range(3) if moved[axis] > 0.008] == moving
    assert all(moved[axis] < 1e-3 for axis in range(3) if axis not in moving)


def test_robot_moves_in_height_and_sideways_in_millimetres():
    moved = shifts(make_env("tabletop_spatial", 0), Perturbation.parse("robot:20"))
    assert np.all(np.abs(moved["hand"]).max(axis=0) > 0.008)
    assert np.abs(moved.pop("hand")).max() <= 0.021
    assert all(np.abs(values).max() < 1e-4 for values in moved.values())


def test_a_block_and_what_it_stands_on_move_together():
    moved = shifts(make_env("tabletop_spatial", "6"), Perturbation.parse("object:3"), states=6)
    np.testing.assert_allclose(moved["block_1"][:, :2], moved["shelf"][:, :2], atol=1e-3)
    assert np.abs(moved["shelf"]).max() > 0.01 and np.abs(moved["block_2"]).max() < 1e-4


def test_drawer_is_both_object_and_goal_and_moves_once():
    env = make_env("tabletop_goal", "open_the_drawer")
    for text in ("object:2", "goal:2", "all:2/2/0"):
        moved = shifts(env, Perturbation.parse(text), states=6)
        assert 0.005 < np.abs(moved["cabinet"][:, :2]).max() <= 0.02 + 1e-9, text


def test_same_state_same_draw():
    env = make_env("tabletop_long", 0)
    states = []
    for _ in range(2):
        env.reset(init_state=4, perturb=Perturbation.parse("all:5/5/50"))
        states.append(env.get_state())
    np.testing.assert_array_equal(*states)


def test_items_that_overlap_are_rejected_and_counted():
    env = make_env("tabletop_spatial", 4)  # the block stands next to the can
    rejected, perturb = 0, Perturbation.parse("object:9")
    for state in range(40):
        env.reset(init_state=state)
        plain = {name: env.position(name) for name in env.items if name != "block_1"}
        env.reset(init_state=state, perturb=perturb)
        rejected += env.num_rejected
        # An overlapping start would push the other things aside.
        assert all(np.abs(env.position(name) - position).max() < 1e-3 for name, position in plain.items())
    assert rejected > 0
    env.reset(init_state=0)
    assert env.num_rejected == 0


def test_fixtures_that_overlap_are_rejected():
    env = make_env("tabletop_long", "open_the_drawer_and_turn_the_knob")
    cabinet, dial = (next(f for f in env.scene.fixtures if f.name == name) for name in ("cabinet", "dial"))
    rejected, perturb = 0, Perturbation.parse("goal:5")
    for state in range(20):
        env.reset(init_state=state, perturb=perturb)
        rejected += env.num_rejected
        gap = np.abs(env.position("cabinet") - env.position("dial"))[:2]
        assert np.any(gap >= np.add(cabinet.half, dial.half))
    assert rejected > 0


def test_impossible_displacement_is_an_error():
    env = make_env("tabletop_object", 0)
    with pytest.raises(RuntimeError, match="no valid start in 3 tries"):
        env.reset(init_state=0, perturb=Perturbation(object_cm=5000.0, max_tries=3))
