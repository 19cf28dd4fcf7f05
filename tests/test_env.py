"""The Env interface: a new simulator takes one class and one entry; the camera is the one that was requested."""

import dataclasses
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import collect_demos
import eval_libero
from vlarft.data import Episode, load_episodes
from vlarft.policy import VLAPolicy
from vlarft.sim import SIMULATORS, Env, StepResult, make_env, make_expert, task_index, task_names
from vlarft.sim.demonstrator import NoPlanError, ScriptedExpert
from vlarft.sim.env import Suite, Task, checked_action, checked_state, start_seed
from vlarft.sim.evaluate import PolicyActor, RandomActor, ReplayActor, chunk_noise, play_episodes
from vlarft.sim.record import PolicyPlayer, record
from vlarft.sim.replay import TabletopOutcomes, replay_frames
from vlarft.sim.suites import Simulator, check_rendering

TOY_SUITES = {"toy_line": Suite(horizon=40, tasks=(Task("go_right", "go right"), Task("go_on", "go on")))}
SHADES = {"agentview": 100, "side": 200}


class LineEnv(Env):
    """A point on a line, which actions along x push; solved beyond 1. Images are grey, brighter to the right."""

    available_cameras = tuple(SHADES)

    def __init__(self, suite, task_index, image_size, cameras):
        super().__init__(TOY_SUITES, suite, task_index, cameras)
        self.size = image_size

    def reset(self, init_state=None, seed=None, perturb=None):
        numbers = start_seed(self.suite, self.task_index, init_state, seed)
        self.x, self.num_steps = np.random.default_rng(numbers).uniform(-0.5, 0.0), 0

    def step(self, action):
        self.x += 0.1 * checked_action(action, True)[0]
        self.num_steps += 1
        return StepResult(self.success(), self.success() or self.num_steps >= self.horizon)

    def observe(self):
        images = {c: np.full((*self.size, 3), SHADES[c] + round(20 * self.x), np.uint8) for c in self.cameras}
        return {**images, "proprio": np.full(8, self.x, np.float32), "instruction": self.instruction}

    def success(self):
        return self.x > 1.0

    def get_state(self):
        return np.array([self.num_steps, self.x])

    def set_state(self, state):
        self.num_steps, self.x = int(state[0]), checked_state(state, 2, self.task_name)[1]


class LineExpert(ScriptedExpert):
    def __init__(self, env, seed=0, *, speed=1.0, **noise):
        super().__init__(env, seed, speed, **noise)

    def intend(self):
        return np.array([self.speed, 0, 0, 0, 0, 0, 1.0])


@pytest.fixture
def toy(monkeypatch):
    monkeypatch.setitem(SIMULATORS, "toy", Simulator(TOY_SUITES, LineEnv, LineExpert))


def seeing(policy: VLAPolicy, *cameras: str) -> VLAPolicy:
    """The policy as if it had been trained on these cameras."""
    policy.cfg = dataclasses.replace(policy.cfg, cameras=cameras)
    return policy


def test_a_new_simulator_is_one_class_and_one_entry(toy):
    assert task_names("toy_line") == ["go_right", "go_on"] and task_index("toy_line", "go_on") == 1
    with pytest.raises(ValueError, match="unknown suite 'toy_lane'; the suites are: .*libero_10, toy_line"):
        make_env("toy_lane", 0)
    records = play_episodes(RandomActor("toy_line", 0, seed=0), "toy_line", 0, [0, 1], image_size=8)
    assert [(r["init_state"], r["steps"], r["success"]) for r in records] == [(0, 40, False), (1, 40, False)]
    assert "visuals" not in records[0]
    (won,) = play_episodes(ReplayActor({3: np.eye(7)[[0] * 40]}), "toy_line", 0, [3], image_size=8)
    assert won["success"] and 10 < won["steps"] < 17
    films = [
        replay_frames("toy_line", 0, 3, won["actions"], size=8, every=5, **options)
        for options in ({}, {"cameras": ("side",)})
    ]
    assert len(films[0]) == 1 + -(-won["steps"] // 5) and films[0][0].shape == (8, 8, 3)
    assert 90 <= films[0][0].max() <= 100 and 120 <= films[0][-1].max() < 125
    assert all((side - front == 100).all() for front, side in zip(*films, strict=True))


def test_its_episodes_are_recorded(toy):
    env = make_env("toy_line", 0, 8, cameras=("side", "agentview"))
    env.reset(seed=4)
    arrays, success = record(env, make_expert(env, 0, speed=0.5, action_noise=0.1), idle_steps=2)
    steps, x = len(arrays["actions"]), arrays["states"][:, 1]
    assert success and x[-3] < 1.0 < x[-2] == x[-1]  # a state is that before its action
    assert list(arrays["images"]) == ["side", "agentview"] and arrays["images"]["side"].shape == (steps, 8, 8, 3)
    np.testing.assert_allclose(arrays["intended_actions"][0], [0.5, 0, 0, 0, 0, 0, 1])
    assert arrays["actions"].dtype == np.float32 and np.abs(arrays["actions"] - arrays["intended_actions"]).max() > 0.01


def test_the_scripts_collect_and_evaluate_it_like_any_other(toy, tmp_path):
    settings = {
        "suites": ("toy_line",),
        "tasks": None,
        "image_size": 8,
        "workers": 1,
        "out_dir": str(tmp_path / "demos"),
    }
    collect_demos.main(dataclasses.replace(collect_demos.PRESETS["smoke"], demos_per_task=2, **settings))
    episodes = load_episodes(tmp_path / "demos", with_states=True)
    assert sorted(e.instruction for e in episodes) == ["go on"] * 2 + ["go right"] * 2
    assert all(abs(int(e.images[0].max()) - (100 + 20 * e.states[0, 1])) <= 0.5 for e in episodes)
    settings |= {"workers": 0, "out_dir": str(tmp_path / "eval")}
    config = dataclasses.replace(eval_libero.PRESETS["smoke"], policies=("random",), animate=1, **settings)
    assert eval_libero.main(config)["policies"][0]["all"]["episodes"] == 4
    assert (tmp_path / "eval" / "policy0_toy_line_0_0_failure.gif").is_file()


def test_an_expert_is_optional(toy, monkeypatch):
    env = make_env("toy_line", 0, 8)
    monkeypatch.setitem(SIMULATORS, "toy", Simulator(TOY_SUITES, LineEnv))
    with pytest.raises(NoPlanError, match="toy_line has no scripted expert; record a policy instead"):
        make_expert(env, 0)


def test_an_env_that_lacks_a_method_cannot_be_made():
    with pytest.raises(TypeError, match="abstract"):
        type("Half", (Env,), {"reset": lambda self: None})()


def test_start_seeds_are_all_different():
    starts = [{"init_state": n, "seed": None} for n in range(50)] + [{"init_state": None, "seed": n} for n in range(50)]
    numbers = [tuple(start_seed(suite, task, **start)) for suite in "ab" for task in (0, 1) for start in starts]
    assert len(set(numbers)) == len(numbers) == 400


def test_an_actor_without_cameras_renders_nothing(toy, monkeypatch):
    monkeypatch.setattr(LineEnv, "observe", lambda self: pytest.fail("rendered"))
    play_episodes(RandomActor("toy_line", 1, seed=0), "toy_line", 1, [0], image_size=8)


def test_a_policy_is_shown_the_cameras_of_its_configuration(policy_file):
    pytest.importorskip("mujoco")
    env = make_env("tabletop_object", 0, 64, cameras=("eye_in_hand", "agentview"))
    env.reset(init_state=2)
    obs, noise = env.observe(), chunk_noise("sampled", (8, 7), 0, "tabletop_object", 0, 2, 0)
    assert np.abs(obs["agentview"].astype(int) - obs["eye_in_hand"]).mean() > 5
    played = []
    for camera in ("agentview", "eye_in_hand"):
        policy = seeing(VLAPolicy.load(policy_file), camera)
        actor = PolicyActor(policy, "tabletop_object", 0, seed=0, noise="sampled", num_flow_steps=2)
        (episode,) = play_episodes(actor, "tabletop_object", 0, [2], image_size=64)
        played.append(torch.tensor(episode["actions"][:8]))
        torch.testing.assert_close(played[-1], policy.act(obs, noise=noise, num_steps=2), atol=1e-5, rtol=0)
    assert (played[0] - played[1]).abs().max() > 1e-3


def test_a_camera_may_have_its_name_in_another_data_format(policy_file, tmp_path):
    """A policy of lerobot-train sees `image`."""
    env = make_env("tabletop_object", 0, 64, cameras=("agentview", "eye_in_hand"))
    for own, other in (("agentview", "image"), ("eye_in_hand", "image2"), ("eye_in_hand", "wrist_image")):
        played, recorded = [], []
        for camera in (own, other):
            policy = seeing(VLAPolicy.load(policy_file), camera)
            actor = PolicyActor(policy, "tabletop_object", 0, seed=0, noise="zero", num_flow_steps=2)
            (episode,) = play_episodes(actor, "tabletop_object", 0, [2], image_size=64, horizon=8)
            played.append(episode["actions"])
            env.reset(init_state=2)
            recorded.append(PolicyPlayer(policy, env, 0, 0.0).act().executed)
        assert played[0] == played[1] and np.array_equal(*recorded)
        check_rendering("libero_goal", (other,))
    with pytest.raises(ValueError, match="wants camera eye_in_hand of libero_goal, which is too near"):
        check_rendering("libero_goal", ("image", "wrist_image"), fast_rendering=True)


def test_a_camera_that_the_simulator_lacks_is_an_error_before_any_episode(toy, policy_file, tmp_path):
    lacking = r"which renders only agentview, eye_in_hand: ask for one of these, or give a policy that was trained on"
    policy = seeing(VLAPolicy.load(policy_file), "agentview", "side")
    actor = PolicyActor(policy, "tabletop_object", 0, seed=0, noise="zero", num_flow_steps=1)
    with pytest.raises(ValueError, match=f"wants camera 'side' of tabletop_object, {lacking}"):
        play_episodes(actor, "tabletop_object", 0, [0], image_size=64)
    path, out_dir = tmp_path / "side.safetensors", tmp_path / "eval"
    seeing(VLAPolicy.load(policy_file), "side").save(path)
    settings = {"policies": ("random", str(path)), "suites": ("toy_line", "libero_goal"), "workers": 0}
    with pytest.raises(ValueError, match=f"side.safetensors wants camera 'side' of libero_goal, {lacking}"):
        eval_libero.main(dataclasses.replace(eval_libero.PRESETS["smoke"], **settings, out_dir=str(out_dir)))
    assert not (out_dir / "episodes.jsonl").exists()
    with pytest.raises(ValueError, match="make_env wants camera 'wrist', 'side' of tabletop_goal"):
        make_env("tabletop_goal", 0, 64, cameras=("wrist", "agentview", "side"))
    with pytest.raises(ValueError, match="unknown suite 'moon'"):
        check_rendering("moon", ())


def test_true_outcomes_are_rendered_with_the_demonstrations_camera():
    pytest.importorskip("mujoco")
    env = make_env("tabletop_object", 0, 16, cameras=("agentview", "eye_in_hand"))
    env.reset(seed=0)
    arrays, _ = record(env, make_expert(env, 0), 0)
    cameras, actions = arrays["images"], arrays["actions"]
    columns = {"proprio": arrays["proprio"], "actions": actions, "intended": actions, "states": arrays["states"]}
    for images in cameras.values():
        args = {"suite": "tabletop_object", "task": 0}
        episode = Episode("demo", "", images, **columns, env_args=args, cameras=cameras)
        outcome = TabletopOutcomes().play(episode, 3, actions[None, 3:5])
        assert torch.equal(outcome.frames[0], torch.from_numpy(images[4:6]).permute(0, 3, 1, 2) / 255)


def test_a_recorded_policy_is_shown_its_cameras(toy, policy_file):
    env = make_env("toy_line", 0, 8, cameras=("side",))
    with pytest.raises(ValueError, match=r"the policy sees camera agentview, the environment renders side: .*view',\)"):
        PolicyPlayer(VLAPolicy.load(policy_file), env, 0, 0.0)
    env.reset(seed=0)
    arrays, _ = record(env, PolicyPlayer(seeing(VLAPolicy.load(policy_file), "side"), env, 0, 0.0), 0)
    assert list(arrays["images"]) == ["side"] and len(arrays["actions"]) == 40


def test_a_recorded_policy_plays_on_after_success(toy):
    """A hand that rests after a success alone would tell the outcome without the things in the picture."""
    right = SimpleNamespace(cfg=SimpleNamespace(cameras=()), act=lambda obs, generator: torch.full((8, 7), 0.5))
    env = make_env("toy_line", 0, 8)
    env.reset(seed=4)
    arrays, success = record(env, PolicyPlayer(right, env, 0, 0.1), idle_steps=5)
    assert success and (arrays["states"][-5:, 1] > 1).all() and arrays["states"][-6, 1] < 1
    assert (arrays["intended_actions"] == 0.5).all()
    assert (np.abs(arrays["actions"] - 0.5)[-5:, :6] > 0).all()  # and so does the noise
