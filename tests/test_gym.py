"""The simulators as gymnasium environments: gymnasium's checks, starts, vector environments, LeRobot's EnvHub."""

import importlib.util
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest

gymnasium = pytest.importorskip("gymnasium")
from conftest import libero_missing  # noqa: E402
from gymnasium.utils.env_checker import check_env  # noqa: E402

import vlarft.sim.gym  # noqa: E402
from vlarft.sim import make_env, task_names  # noqa: E402
from vlarft.sim.gym import vector_envs  # noqa: E402

ROOT = Path(__file__).parents[1]
ACTION = np.array([0.3, 0.0, -0.4, 0.0, 0.0, 0.0, 1.0], np.float32)


def tabletop(**options):
    return gymnasium.make("vlarft/Tabletop-v0", **{"suite": "tabletop_object", "task": 1, **options})


def envhub():
    spec = importlib.util.spec_from_file_location("hub_env", ROOT / "integrations" / "envhub" / "env.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("evaluation", [False, True])
def test_gymnasium_checks_it(evaluation):
    env = tabletop(evaluation=evaluation, render_mode="rgb_array", cameras=("agentview", "eye_in_hand"))
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        check_env(env.unwrapped)
    texts = [str(w.message) for w in warned]
    # a robot's joints and positions have no bounds of their own
    assert all("Box observation space m" in text and "infinity" in text for text in texts), texts
    assert env.unwrapped.render().shape == (64, 64, 3)


@pytest.mark.skipif(bool(libero_missing()), reason=f"LIBERO: {libero_missing()}")
def test_gymnasium_checks_libero():
    check_env(gymnasium.make("vlarft/Libero-v0", suite="libero_goal", task=2, image_size=64).unwrapped)


def test_an_episode_is_that_of_the_simulator():
    env, plain = tabletop(horizon=3), make_env("tabletop_object", 1, horizon=3)
    obs, info = env.reset(seed=7)
    plain.reset(seed=7)
    assert info == {"is_success": False}
    assert env.unwrapped.task_description == plain.instruction and env.unwrapped.task == plain.task_name
    for step in range(3):
        expected = plain.observe()
        np.testing.assert_array_equal(obs["pixels"]["agentview"], expected["agentview"])
        np.testing.assert_array_equal(obs["agent_pos"], expected["proprio"])
        plain.step(ACTION)
        obs, reward, terminated, truncated, info = env.step(ACTION)
        assert (reward, terminated, truncated, info) == (0.0, False, step == 2, {"is_success": False})


def test_success_is_rewarded_and_terminates():
    env = tabletop()
    env.reset(seed=0)
    env.unwrapped._env.success = lambda: True
    _, reward, terminated, truncated, info = env.step(ACTION)
    assert (reward, terminated, truncated, info) == (1.0, True, False, {"is_success": True})


def test_where_episodes_start():
    plain = make_env("tabletop_object", 1)

    def state_of(env, **reset):
        env.reset(**reset)
        return env.unwrapped._env.get_state().tolist()

    def plain_state(**reset):
        plain.reset(**reset)
        return plain.get_state().tolist()

    env, evaluation = tabletop(), tabletop(evaluation=True)
    assert state_of(env, seed=53) == plain_state(seed=53)
    assert state_of(evaluation, seed=53) == plain_state(init_state=3)
    for one in (env, evaluation):  # LeRobot gives an option of its own
        assert state_of(one, seed=53, options={"init_state": 4, "other": 1}) == plain_state(init_state=4)
    first = state_of(env, seed=5), state_of(env), state_of(env)
    assert first == (state_of(env, seed=5), state_of(env), state_of(env)) and first[1] != first[2]
    with pytest.raises(ValueError, match="init_state must be 0..49, got 50"):
        env.reset(options={"init_state": 50})


@pytest.mark.parametrize("mode", ["sync", "async"])
def test_vector_environments(mode):
    suite = {"suite": "tabletop_goal", "task": 2, "horizon": 2}
    envs = gymnasium.make_vec("vlarft/Tabletop-v0", num_envs=2, vectorization_mode=mode, **suite)
    obs, _ = envs.reset(seed=[3, 4])
    assert obs["pixels"]["agentview"].shape == (2, 64, 64, 3) and obs["agent_pos"].shape == (2, 8)
    for seed, row in zip((3, 4), obs["agent_pos"], strict=True):
        plain = make_env("tabletop_goal", 2)
        plain.reset(seed=seed)
        np.testing.assert_array_equal(row, plain.observe()["proprio"])
    for expected in ([False, False], [True, True]):
        _, _, _, truncated, info = envs.step(np.stack([ACTION, -ACTION]))
        assert truncated.tolist() == expected and info["is_success"].tolist() == [False, False]
    envs.close()


@pytest.mark.parametrize("use_async_envs", [False, True])
def test_envhub(use_async_envs, monkeypatch):
    """What LeRobot's rollout asks of a hub's environments."""
    module = envhub()
    monkeypatch.setattr(module, "TASKS", (0, task_names("tabletop_object")[3]))
    made = module.make_env(n_envs=2, use_async_envs=use_async_envs)
    assert list(made) == ["tabletop_object"] and list(made["tabletop_object"]) == [0, 3]
    for task, envs in made["tabletop_object"].items():
        assert isinstance(envs, gymnasium.vector.VectorEnv) and envs.num_envs == 2
        obs, _ = envs.reset(seed=[1000, 1001], options={"lerobot_new_rollout": True})
        plain = make_env("tabletop_object", task)
        for state, row in enumerate(obs["agent_pos"]):  # seed 1000 is state 0
            plain.reset(init_state=state)
            np.testing.assert_array_equal(row, plain.observe()["proprio"])
        assert obs["pixels"]["agentview"].dtype == np.uint8
        assert envs.call("_max_episode_steps") == (plain.horizon,) * 2
        assert envs.call("task_description") == (plain.instruction,) * 2
        assert envs.call("task") == (plain.task_name,) * 2
        assert envs.call("render")[0].shape == (64, 64, 3)
        assert envs.unwrapped.metadata["render_fps"] == 20
        _, _, _, _, info = envs.step(np.stack([ACTION, ACTION]))
        assert info["is_success"].tolist() == [False, False]
        envs.close()


def test_all_tasks_by_default():
    made = vector_envs("tabletop_long", n_envs=1, cameras=(), render_mode=None)
    assert list(made["tabletop_long"]) == list(range(len(task_names("tabletop_long"))))


def test_size_of_the_images(monkeypatch):
    asked = []
    monkeypatch.setattr(vlarft.sim.gym, "make_env", lambda suite, task, size, **options: asked.append(size) or 1 / 0)
    for simulator, suite in (("tabletop", "tabletop_goal"), ("libero", "libero_goal")):
        with pytest.raises(ZeroDivisionError):
            vlarft.sim.gym.task_env(simulator, suite, 0)
    assert asked == [64, 256]  # as the registered ids, and the package of LeRobot


def test_errors():
    with pytest.raises(ValueError, match="tabletop has no suite 'libero_goal'; its suites are tabletop_spatial, "):
        tabletop(suite="libero_goal")
    with pytest.raises(ValueError, match="unknown task 'x' of tabletop_object"):
        tabletop(task="x")
    with pytest.raises(ValueError, match="unknown suite 'x'"):
        vector_envs("x")
    with pytest.raises(ValueError, match="render_mode 'rgb_array' needs a camera"):
        vector_envs("tabletop_object", (0,), cameras=())


def test_a_missing_package_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "gymnasium", None)
    with pytest.raises(ImportError, match=r"need gymnasium >= 1.0: pip install -e \".\[gym\]\""):
        vector_envs("tabletop_object")


def test_an_id_imports_its_module():
    """In a new process, as commands that take nothing but an id do; and the package itself does not import it."""
    code = (
        "import sys, gymnasium, vlarft.sim; assert 'vlarft.sim.gym' not in sys.modules\n"
        "env = gymnasium.make('vlarft.sim.gym:vlarft/Tabletop-v0'); print(env.unwrapped.task_description)"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    env = make_env("tabletop_object", 0)
    assert run.stdout.strip() == env.instruction
