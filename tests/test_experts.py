"""The experts: every task once, noise and speed, recovery."""

import dataclasses
import json

import numpy as np
import pytest

from vlarft.sim import TABLETOP_SUITES, make_env
from vlarft.sim.experts import Expert

pytest.importorskip("mujoco")


def play(env, expert, steps=None):
    for _ in range(steps or env.horizon):
        result = env.step(expert.act().executed)
        if result.done:
            return result
    return result


@pytest.mark.parametrize("suite", list(TABLETOP_SUITES))
def test_every_task_of_a_suite_succeeds_without_noise(suite):
    for task in range(10):
        env = make_env(suite, task)
        env.reset(seed=100 + task)
        assert play(env, Expert(env)).success, env.task_name


@pytest.mark.parametrize("suite", list(TABLETOP_SUITES))
def test_demonstration_noise_is_survived(suite):
    won = 0
    for task in range(0, 10, 3):
        env = make_env(suite, task)
        env.reset(seed=200 + task)
        won += play(env, Expert(env, seed=task, action_noise=0.2)).success
    assert won >= 3


def test_pace_is_that_of_libero():
    env = make_env("tabletop_object", 2)
    lengths, moved = [], []
    for seed in range(5):
        env.reset(seed=seed)
        expert, before = Expert(env), env.hand_position
        while not env.step(expert.act().executed).done:
            moved.append(np.linalg.norm(env.hand_position - before))
            before = env.hand_position
        lengths.append(env.num_steps)
    assert 45 <= np.mean(lengths) <= 100
    assert 0.008 <= np.quantile(moved, 0.75) <= 0.02 and max(moved) <= 0.025


def test_without_noise_executed_is_intended():
    env = make_env("tabletop_goal", 0)
    env.reset(seed=0)
    action = Expert(env).act()
    np.testing.assert_array_equal(action.executed, action.intended)
    assert action.executed.shape == (7,) and np.abs(action.executed).max() <= 1.0
    assert np.linalg.norm(action.intended[:3]) <= 0.5 + 1e-9


def test_noise_has_the_asked_size_and_persistence():
    env = make_env("tabletop_object", 0)
    env.reset(seed=0)  # the state is left alone, so the intention is constant
    expert = Expert(env, seed=3, action_noise=0.1, persistence=0.5)
    noise = []
    for _ in range(4000):
        action = expert.act()
        noise.append(action.executed - action.intended)
    noise = np.array(noise)
    np.testing.assert_allclose(noise[:, :6].std(axis=0), [0.1] * 3 + [0.05] * 3, rtol=0.1)
    assert np.corrcoef(noise[:-1, 0], noise[1:, 0])[0, 1] == pytest.approx(0.5, abs=0.05)
    assert not noise[:, 6].any()
    flips = Expert(env, seed=3, gripper_flips=0.25)
    assert np.mean([(a := flips.act()).executed[6] != a.intended[6] for _ in range(2000)]) == pytest.approx(
        0.25, abs=0.04
    )


def test_noise_repeats_with_its_seed():
    env = make_env("tabletop_object", 0)
    env.reset(seed=0)
    first, again, other = (Expert(env, seed=seed, action_noise=0.2).act().executed for seed in (1, 1, 2))
    np.testing.assert_array_equal(first, again)
    assert np.abs(first - other).max() > 0.01


def test_speed_scales_the_motion():
    env = make_env("tabletop_object", 0)
    lengths = []
    for speed in (0.3, 0.6, 1.0):
        env.reset(seed=0)
        assert play(env, Expert(env, speed=speed)).success
        lengths.append(env.num_steps)
    assert lengths[0] > 1.5 * lengths[1] > 1.5 * lengths[2]


def test_expert_picks_up_again_what_it_dropped():
    env = make_env("tabletop_object", 0)
    env.reset(seed=0)
    expert = Expert(env)
    while env.position("red_block")[2] < 0.07:
        env.step(expert.act().executed)
    for _ in range(4):
        env.step(np.array([0, 0, 0, 0, 0, 0, -1.0]))
    assert env.position("red_block")[2] < 0.05
    assert play(env, expert).success


def test_expert_recovers_from_a_turned_hand():
    env = make_env("tabletop_object", 1)
    env.reset(seed=0)
    for _ in range(6):
        env.step(np.array([0, 0, 0, 0.4, 0.3, 0.6, 1.0]))
    assert np.abs(env.hand_angles).max() > 0.3
    assert play(env, Expert(env)).success


def test_after_success_it_holds_still_and_open():
    env = make_env("tabletop_object", 0)
    env.reset(seed=0)
    expert = Expert(env, action_noise=0.2)
    assert play(env, expert).success
    np.testing.assert_array_equal(expert.act().executed, [0, 0, 0, 0, 0, 0, -1])


@pytest.mark.parametrize(
    "arguments,message",
    [
        ({"action_noise": -0.1}, "action_noise must be >= 0, got -0.1"),
        ({"speed": 0.0}, r"speed must be in \(0, 1\], got 0.0"),
        ({"gripper_flips": 2.0}, r"gripper_flips must be in \[0, 1\], got 2.0"),
        ({"persistence": 1.0}, r"persistence must be in \[0, 1\), got 1.0"),
    ],
)
def test_bad_settings(arguments, message):
    with pytest.raises(ValueError, match=message):
        Expert(make_env("tabletop_object", 0), **arguments)


def test_the_count_of_wins_plays_no_task_twice(tmp_path, load_benchmark, monkeypatch):
    script = load_benchmark("experts")
    smoke = {"suites": ("tabletop_object",), "noises": (0.0,), "out": str(tmp_path / "out.json")}
    first = dataclasses.replace(script.PRESETS["smoke"], **smoke)
    script.main(first)
    played, play = [], script.play
    monkeypatch.setattr(script, "play", lambda cfg, *job: played.append(job) or play(cfg, *job))
    report = script.main(dataclasses.replace(first, tasks=(0, 1), noises=(0.0, 0.2)))
    assert played == [("tabletop_object", 1, 0.0), ("tabletop_object", 0, 0.2), ("tabletop_object", 1, 0.2)]
    assert json.loads((tmp_path / "out.json").read_text()) == report
    noises = report["suites"]["tabletop_object"]
    assert {noise: list(tasks) for noise, tasks in noises.items()} == {"0": ["0", "1"], "0.2": ["0", "1"]}
    assert noises["0"]["0"]["outcomes"] == "1" and noises["0"]["0"]["steps"] < noises["0.2"]["0"]["steps"]
    with pytest.raises(ValueError, match="holds suites with states 1, not 2"):
        script.main(dataclasses.replace(first, states=2))


def test_the_table_of_wins_has_the_lowest_task(load_benchmark):
    tables = load_benchmark("stage_tables")
    tasks = {"0": {"outcomes": "1101", "steps": 50.0}, "1": {"outcomes": "1111", "steps": 70.0}}
    noisy = {"0": {"outcomes": "0101", "steps": 90.0}}
    lines = tables.experts_table({"suites": {"tabletop_object": {"0": tasks, "0.2": noisy}}}).splitlines()
    assert lines[0] == "| suite | tasks | without noise | lowest task | noise 0.2 | lowest task | steps |"
    assert lines[2] == "| tabletop_object | 2 | 7/8 | 3/4 | 2/4 | 2/4 | 60 |"
    other = {"tabletop_goal": {"0.2": noisy}, "tabletop_object": {"0.2": noisy, "0": tasks}}  # in any order
    assert tables.experts_table({"suites": other}).splitlines()[2:] == [
        "| tabletop_goal | 1 |  |  | 2/4 | 2/4 |  |",
        "| tabletop_object | 2 | 7/8 | 3/4 | 2/4 | 2/4 | 60 |",
    ]


def test_the_benchmark_of_tabletop_runs_at_smoke_size(tmp_path, load_benchmark):
    script = load_benchmark("tabletop")
    report = script.main(dataclasses.replace(script.PRESETS["smoke"], out=str(tmp_path / "out.json"), steps=10))
    assert json.loads((tmp_path / "out.json").read_text()) == report and len(report["rows"]) == 8


def test_failures_are_told_apart(tmp_path, load_benchmark, capsys):
    script = load_benchmark("failures")
    env = make_env("tabletop_spatial", 0)
    env.reset(init_state=3)
    expert, actions, lifted, done = Expert(env), [], None, False
    while not done:
        actions.append(expert.act().executed)
        done = env.step(actions[-1]).done
        if lifted is None and max(env.position(name)[2] for name in env.items) > 0.08:
            lifted = len(actions)
    held = np.repeat(actions[lifted - 1][None] * np.eye(7)[6], 100, 0)  # the block stays in the fingers
    plays = {
        "success": actions,
        "never closed": np.stack(actions) * np.array([1, 1, 1, 1, 1, 1, 0]) - np.eye(7)[6],
        "nothing lifted": [*-np.eye(7)[[6]], *np.eye(7)[[6]], *-np.eye(7)[[6]], *np.eye(7)[[6]]],
        "lifted, not placed": [*actions[:lifted], *held],
    }
    names = []
    for kind, played in plays.items():
        names.append(tmp_path / kind / "episodes.jsonl")
        names[-1].parent.mkdir()
        (names[-1].parent / "config.json").write_text(json.dumps({"perturb": None}))
        record = {"suite": "tabletop_spatial", "task": 0, "init_state": 3, "success": kind == "success", "policy": "a"}
        names[-1].write_text(json.dumps({**record, "actions": np.asarray(played).tolist()}) + "\n")
    cfg = script.Config(episodes=tuple(map(str, names)), out=str(tmp_path / "failures.json"))
    report = script.main(cfg)
    assert json.loads((tmp_path / "failures.json").read_text()) == json.loads(json.dumps(report))
    for kind, found in zip(plays, report["files"].values()):
        assert found["counts"] == {name: int(name == kind) for name in script.ENDS}, kind
    found = dict(zip(plays, report["files"].values()))
    assert found["success"]["closes"] is None and found["never closed"]["closes"] == 0
    assert found["nothing lifted"]["closes"] == 2 and found["nothing lifted"]["late_motion"] < 0.01
    assert "| 100.0 % [20.7, 100.0] |" in capsys.readouterr().out
    (names[0].parent / "config.json").write_text(json.dumps({"perturb": "object:5"}))
    with pytest.raises(ValueError, match="task 0, initial state 3: success False when played again, True on record"):
        script.main(dataclasses.replace(cfg, episodes=(str(names[0]),)))
    with pytest.raises(ValueError, match="no --episodes: give episodes.jsonl files"):
        script.main(script.Config())
    with pytest.raises(ValueError, match="episodes of libero_goal: only Tabletop's can be looked into"):
        script.failures([{**record, "suite": "libero_goal"}], None)
    with pytest.raises(ValueError, match="episodes of 2 policies, a and b: evaluate them apart"):
        script.failures([record, {**record, "policy": "b"}], None)
