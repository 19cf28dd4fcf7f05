"""The tabletop environment: interface, dynamics, determinism, success, and the 40 tasks."""

import hashlib
import os
import subprocess
import sys

import numpy as np
import pytest

from vlarft.sim import NUM_INITIAL_STATES, TABLETOP_SUITES, make_env, task_names
from vlarft.sim.experts import Expert
from vlarft.sim.suites import task_index

mujoco = pytest.importorskip("mujoco")

ALL_TASKS = [(suite, task) for suite in TABLETOP_SUITES for task in range(10)]


@pytest.fixture(scope="module")
def env():
    return make_env("tabletop_object", 0, 64)


def action(**axes):
    order = ("x", "y", "z", "rx", "ry", "rz", "gripper")
    return np.array([axes.get(name, -1.0 if name == "gripper" else 0.0) for name in order])


def episode_digest(suite, task, seed):
    """Hash of states, proprio and images of a noisy episode of 20 steps."""
    env = make_env(suite, task, 32, cameras=("agentview", "eye_in_hand"))
    env.reset(seed=seed)
    expert = Expert(env, seed=seed, action_noise=0.5, gripper_flips=0.2)
    digest = hashlib.sha256()
    for _ in range(20):
        obs = env.observe()
        for part in (env.get_state(), obs["agentview"], obs["eye_in_hand"], obs["proprio"]):
            digest.update(part.tobytes())
        env.step(expert.act().executed)
    return digest.hexdigest()


def test_four_suites_of_ten_tasks():
    assert list(TABLETOP_SUITES) == ["tabletop_spatial", "tabletop_object", "tabletop_goal", "tabletop_long"]
    names = [name for suite in TABLETOP_SUITES for name in task_names(suite)]
    assert len(names) == 40 and all(
        len(task_names(suite)) == len(set(task_names(suite))) == 10 for suite in TABLETOP_SUITES
    )
    blocks = TABLETOP_SUITES["tabletop_object"].tasks[:4]
    assert all(task.scene is blocks[0].scene and len(task.scene.items) == 4 for task in blocks)
    assert len({task.instruction for task in blocks}) == 4


def test_unknown_suite_and_task_name_the_valid_ones():
    with pytest.raises(ValueError, match="unknown suite 'libero_moon'; the suites are: tabletop_spatial, tabletop_obj"):
        make_env("libero_moon", 0)
    with pytest.raises(ValueError, match=r"unknown task 10 of tabletop_goal; give 0\.\.9 or one of: put_the_red_block"):
        make_env("tabletop_goal", 10)
    with pytest.raises(ValueError, match="unknown task 'fly' of tabletop_goal"):
        make_env("tabletop_goal", "fly")
    assert task_index("tabletop_goal", "open_the_drawer") == task_index("tabletop_goal", "7") == 7


def test_observation_interface(env):
    env.reset(init_state=0)
    obs = env.observe()
    assert set(obs) == {"agentview", "proprio", "instruction"}
    assert obs["agentview"].shape == (64, 64, 3) and obs["agentview"].dtype == np.uint8
    assert obs["proprio"].shape == (8,) and obs["proprio"].dtype == np.float32
    assert obs["instruction"] == "pick up the red block and place it in the bin"
    np.testing.assert_allclose(obs["proprio"][:3], env.hand_position, atol=1e-6)
    np.testing.assert_allclose(obs["proprio"][3:], [0, 0, 0, 0.04, -0.04], atol=1e-3)
    wide = make_env("tabletop_object", 0, (24, 40), cameras=("agentview", "eye_in_hand"))
    wide.reset(seed=0)
    assert wide.observe()["agentview"].shape == wide.observe()["eye_in_hand"].shape == (24, 40, 3)


def test_every_block_is_five_pixels_wide_and_of_its_colour(env):
    # from a height at which the hand hides nothing
    env.reset(init_state=3)
    env.data.qpos[2] = 0.24
    mujoco.mj_forward(env.model, env.data)
    image = env.observe()["agentview"].astype(int)
    red, green, blue = image[..., 0], image[..., 1], image[..., 2]
    masks = {
        "red": red > 2 * np.maximum(green, blue) + 20,
        "green": green > 2 * np.maximum(red, blue) + 20,
        "blue": blue > 2 * np.maximum(red, green) + 20,
        "yellow": np.minimum(red, green) > 3 * blue + 20,
    }
    for name, mask in masks.items():
        assert len(np.unique(np.nonzero(mask)[1])) >= 5, name


def test_constant_action_moves_two_centimetres_a_step(env):
    env.reset(seed=1)
    start = env.hand_position
    for _ in range(4):
        env.step(action(x=-1.0, gripper=1.0))
    before = env.hand_position
    env.step(action(x=-1.0, gripper=1.0))
    moved = env.hand_position - before
    assert moved[0] == pytest.approx(-0.0201, abs=0.001) and np.abs(moved[1:]).max() < 5e-4
    assert np.abs(env.hand_position - start)[1:].max() < 1e-3


@pytest.mark.parametrize("axis,index", [("rx", 0), ("ry", 1), ("rz", 2)])
def test_rotation_action_turns_about_its_world_axis(env, axis, index):
    env.reset(seed=1)
    for _ in range(3):
        env.step(action(**{axis: 0.3}))
    vector = env.proprio()[3:6]
    assert 0.1 < vector[index] < 0.45
    assert np.abs(np.delete(vector, index)).max() < 0.02


def test_axis_angle_is_that_of_the_hand(env):
    rotation = pytest.importorskip("scipy.spatial.transform").Rotation
    env.reset(seed=2)
    rng = np.random.default_rng(0)
    for _ in range(12):
        env.step(rng.uniform(-1, 1, 7))
        matrix = env.data.body("hand").xmat.reshape(3, 3)
        np.testing.assert_allclose(env.proprio()[3:6], rotation.from_matrix(matrix).as_rotvec(), atol=1e-5)


def test_gripper_opens_and_closes(env):
    env.reset(seed=1)
    for _ in range(8):
        env.step(action(gripper=1.0))
    assert env.finger_width < 0.002 and abs(env.proprio()[6]) < 2e-3
    for _ in range(8):
        env.step(action(gripper=-1.0))
    assert env.finger_width > 0.078 and env.proprio()[7] < -0.038


@pytest.mark.parametrize(
    "bad,message",
    [
        (np.zeros(6), r"shape \(7,\) = dx, dy, dz, 3 rotations, gripper; got shape \(6,\)"),
        (np.zeros((1, 7)), r"got shape \(1, 7\)"),
        (np.array([0, 0, np.nan, 0, 0, 0, 0]), "NaN or infinity"),
        (np.array([0, 0, np.inf, 0, 0, 0, 0]), "NaN or infinity"),
    ],
)
def test_bad_actions_are_refused(env, bad, message):
    env.reset(seed=0)
    with pytest.raises(ValueError, match=message):
        env.step(bad)


def test_reset_arguments_and_order():
    env = make_env("tabletop_object", 0)
    with pytest.raises(RuntimeError, match="call reset before step"):
        env.step(np.zeros(7))
    for arguments, message in (
        ({}, "either init_state or seed"),
        ({"init_state": 0, "seed": 0}, "either init_state or seed"),
        ({"init_state": NUM_INITIAL_STATES}, r"init_state must be 0\.\.49, got 50"),
        ({"seed": -1}, "seed must be >= 0, got -1"),
    ):
        with pytest.raises(ValueError, match=message):
            env.reset(**arguments)


def test_actions_are_clipped(env):
    ends = []
    for scale in (1.0, 7.0):
        env.reset(seed=4)
        env.step(scale * np.array([1, -1, 1, 1, 1, -1, 1.0]))
        ends.append(env.get_state())
    np.testing.assert_array_equal(*ends)


def test_start_states_differ_between_numbers_streams_and_tasks(env):
    other = make_env("tabletop_object", 1)
    states = []
    for each in (env, other):
        for kind in ("init_state", "seed"):
            for number in range(3):
                each.reset(**{kind: number})
                states.append(tuple(np.round(each.get_state(), 12)))
    assert len(set(states)) == len(states)


@pytest.mark.parametrize("suite,task", ALL_TASKS[::3])
def test_starts_are_at_rest_apart_and_unsolved(suite, task):
    env = make_env(suite, task)
    for state in range(0, NUM_INITIAL_STATES, 10):
        env.reset(init_state=state)
        assert not env.success()
        assert np.abs(env.data.qvel).max() < 0.02
        dist = env.data.contact.dist
        assert len(dist) == 0 or dist.min() > -1e-3
        before = {name: env.position(name) for name in env.items}
        for _ in range(10):
            env.step(action())
        for name, position in before.items():
            assert np.abs(env.position(name) - position).max() < 1e-3, name


@pytest.mark.parametrize("suite,task", [("tabletop_object", 8), ("tabletop_long", 9)])
def test_same_seed_is_bitwise_the_same_here_and_in_another_process(suite, task):
    here = episode_digest(suite, task, 5)
    assert here == episode_digest(suite, task, 5) != episode_digest(suite, task, 6)
    code = f"import sys; sys.path.insert(0, {os.path.dirname(__file__)!r}); import test_tabletop as t; "
    code += f"print(t.episode_digest({suite!r}, {task}, 5))"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert run.stdout.strip() == here


def test_an_earlier_episode_leaves_no_trace():
    fresh, used = (make_env("tabletop_goal", 7, 32) for _ in range(2))
    used.reset(seed=8)
    expert = Expert(used, seed=8)
    for _ in range(30):
        used.step(expert.act().executed)
    for env in (fresh, used):
        env.reset(init_state=2)
    np.testing.assert_array_equal(fresh.get_state(), used.get_state())
    np.testing.assert_array_equal(fresh.observe()["agentview"], used.observe()["agentview"])


def test_state_vector_continues_bitwise():
    env, other = make_env("tabletop_goal", 0, 32), make_env("tabletop_goal", 0, 32)
    env.reset(seed=3)
    expert = Expert(env, seed=1, action_noise=0.3)
    actions = []
    for step in range(40):
        if step == 20:
            state = env.get_state()
        actions.append(expert.act().executed)
        env.step(actions[-1])
    other.set_state(state)
    assert other.num_steps == 20
    np.testing.assert_array_equal(other.get_state(), state)
    for each in actions[20:]:
        other.step(each)
    np.testing.assert_array_equal(other.get_state(), env.get_state())
    np.testing.assert_array_equal(other.observe()["agentview"], env.observe()["agentview"])
    with pytest.raises(ValueError, match=r"state of tabletop_goal/put_the_red_block_on_the_plate has shape \(\d+,\)"):
        other.set_state(state[:-1])


def test_horizon_ends_an_episode():
    env = make_env("tabletop_object", 0)
    env.reset(seed=0)
    results = [env.step(action()) for _ in range(env.horizon)]
    assert not any(result.done for result in results[:-1])
    assert results[-1].done and not results[-1].success


def put(env, item, position):
    env.data.joint(item).qpos[:3] = position
    mujoco.mj_forward(env.model, env.data)


def test_block_in_the_bin_counts_only_when_released_and_low(env):
    env.reset(seed=0)
    floor = np.add(env.position("bin"), [0.0, 0.0, 0.004 + 0.02])
    put(env, "red_block", floor)
    assert env.success()
    put(env, "red_block", np.add(floor, [0.0, 0.0, 0.06]))
    assert not env.success()
    put(env, "red_block", np.add(floor, [0.05, 0.0, 0.0]))
    assert not env.success()
    put(env, "red_block", floor)
    env.data.qpos[:3] = floor
    env.data.qpos[6:8] = 0.02  # fingers on its sides
    mujoco.mj_forward(env.model, env.data)
    assert not env.success()
    env.reset(seed=0)
    put(env, "green_block", floor)
    assert not env.success()


def test_drawer_knob_push_and_stack_predicates():
    checks = {"open_the_drawer": ("drawer", 0.06, 0.04), "turn_the_knob": ("knob", 1.0, 0.5)}
    for name, (joint, enough, short) in checks.items():
        env = make_env("tabletop_goal", name)
        env.reset(seed=0)
        for value, expected in ((short, False), (enough, True)):
            env.data.joint(joint).qpos[0] = value
            mujoco.mj_forward(env.model, env.data)
            assert env.success() is expected
    env = make_env("tabletop_goal", "push_the_plate_onto_the_mat")
    env.reset(seed=0)
    put(env, "plate", np.add(env.position("mat"), [0.02, -0.02, 0.01]))
    assert env.success()
    env = make_env("tabletop_goal", "stack_the_blue_block_on_the_red_block")
    env.reset(seed=0)
    put(env, "blue_block", np.add(env.position("red_block"), [0.01, 0.0, 0.04]))
    assert env.success()
    put(env, "blue_block", np.add(env.position("red_block"), [0.04, 0.0, 0.0]))
    assert not env.success()


def test_long_tasks_need_both_goals_at_once():
    env = make_env("tabletop_long", "open_the_drawer_and_turn_the_knob")
    env.reset(seed=0)
    for drawer, knob, expected in ((0.07, 0.0, False), (0.0, 1.1, False), (0.07, 1.1, True)):
        env.data.joint("drawer").qpos[0], env.data.joint("knob").qpos[0] = drawer, knob
        mujoco.mj_forward(env.model, env.data)
        assert env.success() is expected


def test_import_needs_no_mujoco_and_making_an_env_says_how_to_get_it():
    code = (
        "import sys; sys.modules['mujoco'] = None\n"
        "import vlarft.sim, vlarft.sim.experts, vlarft.sim.perturb, vlarft.sim.raycast\n"
        "assert 'torch' not in sys.modules\n"
        "try: vlarft.sim.make_env('tabletop_goal', 0)\n"
        "except ImportError as error: print(error)"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert 'pip install -e ".[sim]"' in run.stdout


@pytest.mark.parametrize("renderer", ["egl", "osmesa", "bogus"])
def test_a_missing_renderer_is_an_error_of_libero_alone(renderer):
    code = (
        "import importlib.abc, sys\n"
        "class Missing(importlib.abc.MetaPathFinder):\n"  # as PyOpenGL fails without the library
        "    def find_spec(self, name, path, target=None):\n"
        "        if name in ('mujoco.egl', 'mujoco.osmesa'):\n"
        "            raise AttributeError(\"'NoneType' object has no attribute 'eglQueryString'\")\n"
        "sys.meta_path.insert(0, Missing())\n"
        "import vlarft.sim, vlarft.sim.gl as gl\n"
        "env = vlarft.sim.make_env('tabletop_goal', 0)\n"
        "env.reset(seed=0)\n"
        "print(env.observe()['agentview'].std() > 1, __import__('os').environ['MUJOCO_GL'])\n"
        "gl.ctypes.util.find_library = lambda name: None\n"
        "try: gl.GLRenderer(env.model, (8, 8))\n"
        "except RuntimeError as error: print(error)"
    )
    variables = {**os.environ, "MUJOCO_GL": renderer}
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=variables)
    assert run.returncode == 0, run.stderr
    first, second = run.stdout.splitlines()
    assert first == f"True {renderer}"
    expected = {"egl": "apt-get install libegl1", "osmesa": "apt-get install libosmesa6", "bogus": "MUJOCO_GL=bogus"}
    assert expected[renderer] in second


def test_an_old_mujoco_is_refused(monkeypatch):
    monkeypatch.setattr(mujoco, "__version__", "3.4.9")
    with pytest.raises(ImportError, match=r"need mujoco >= 3\.5, found 3\.4\.9"):
        make_env("tabletop_goal", 0)
