"""Evaluations and collections as LeRobot data sets: what the policy saw and did, outcomes, kills, repeated commands."""

import dataclasses
import json
import sys
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from conftest import every_camera

import collect_demos
import eval_libero
from vlarft.data import load_episodes
from vlarft.data.convert import main as convert
from vlarft.data.episodes import demo_files
from vlarft.sim import make_env, make_expert
from vlarft.sim.evaluate import PolicyActor
from vlarft.sim.record import record
from vlarft.sim.replay import replay_episodes

pytest.importorskip("mujoco")
CODEC = 4  # mean error of a pixel's colours, of 255, in mp4 with 64 px: it keeps colour at half the resolution


def error(one, two):
    return np.abs(np.asarray(one).astype(int) - np.asarray(two)).mean()


def expert_actions(state):
    env = make_env("tabletop_object", 0, 16)
    env.reset(init_state=state)
    arrays, success = record(env, make_expert(env, 0, speed=0.9, action_noise=0.0), idle_steps=0)
    assert success
    return arrays["actions"]


@pytest.fixture
def config(policy_file, tmp_path, monkeypatch):
    """An evaluation in which the policy wins from state 0, and fails from state 1; `seen` has what it was shown."""
    seen, good = {}, expert_actions(0)

    class WinsOnce(PolicyActor):
        def __call__(self, states, chunk, observations):
            actions = super().__call__(states, chunk, observations)
            for i, state in enumerate(states):
                seen[state, chunk] = observations[i]
                if state == 0:
                    rest = good[8 * chunk :][:8]
                    actions[i, : len(rest)] = rest
            return actions

    monkeypatch.setattr(eval_libero, "PolicyActor", WinsOnce)
    config = dataclasses.replace(
        eval_libero.PRESETS["smoke"],
        policies=(str(policy_file),),
        workers=0,
        out_dir=str(tmp_path / "eval"),
        lerobot=str(tmp_path / "recorded"),
    )
    return config, seen


def test_an_evaluation_comes_back_as_the_policy_saw_it(config, capsys):
    config, seen = config
    eval_libero.main(config)
    assert f"2 episodes -> {config.lerobot}" in capsys.readouterr().out
    lines = (Path(config.out_dir) / "episodes.jsonl").read_text().splitlines()
    records = sorted(map(json.loads, lines), key=lambda r: r["init_state"])
    episodes = load_episodes(config.lerobot, successes_only=False)
    assert [e.name for e in episodes] == ["recorded/episode_000000", "recorded/episode_000001"]
    assert [e.success for e in episodes] == [r["success"] for r in records] == [True, False]
    again = replay_episodes(records, size=64)
    for state, (e, played, exact) in enumerate(zip(episodes, records, again, strict=True)):
        assert e.outcome_known and e.kind == "policy" and e.fps == 20 and not e.absolute
        assert e.gripper_dims == (6,) and e.held_dims == () and e.start == f"evaluated tabletop_object/0/{state}"
        assert e.instruction == "pick up the red block and place it in the bin"
        np.testing.assert_array_equal(e.actions, np.float32(played["actions"]))
        assert len(e) == played["steps"] and e.images.shape == (len(e), 64, 64, 3)
        for chunk in range(-(-len(e) // 8)):
            shown = seen[state, chunk]
            np.testing.assert_array_equal(e.proprio[8 * chunk], shown["proprio"])
            np.testing.assert_array_equal(exact.images[8 * chunk], shown["agentview"])
        assert error(e.images, exact.images) < CODEC
        assert error(e.images[1:], exact.images[1:]) < error(e.images[1:], exact.images[:-1])  # no frame off
    table = pq.read_table(Path(config.lerobot) / "data/chunk-000/file-000.parquet").to_pydict()
    flags = [False] * (len(episodes[0]) - 1) + [True] + [False] * len(episodes[1])
    assert table["next.success"] == flags


def test_outcomes_are_in_the_frames_alone_as_well(config):
    """A program that keeps only LeRobot's own fields: next.success, as our reader takes it."""
    config, _ = config
    eval_libero.main(config)
    path = Path(config.lerobot) / "meta/episodes/chunk-000/file-000.parquet"
    pq.write_table(pq.read_table(path).drop_columns(["success"]), path)
    assert [(e.success, e.outcome_known) for e in every_camera(Path(config.lerobot))] == [(True, True), (False, True)]


def test_several_policies_have_a_data_set_each(config, tmp_path):
    config, _ = config
    eval_libero.main(dataclasses.replace(config, lerobot=None))
    eval_libero.main(dataclasses.replace(config, lerobot=str(tmp_path / "later")))
    assert len(every_camera(tmp_path / "later")) == 2
    recording = str(Path(config.out_dir) / "episodes.jsonl")
    both = dataclasses.replace(config, policies=(*config.policies, recording), out_dir=str(tmp_path / "both"))
    eval_libero.main(both)
    assert not Path(config.lerobot).exists()
    one, other = (every_camera(tmp_path / f"recorded_policy{i}") for i in (0, 1))
    for a, b in zip(one, other, strict=True):
        np.testing.assert_array_equal(a.actions, b.actions)
        np.testing.assert_array_equal(a.images, b.images)
        assert a.success == b.success and a.name != b.name


def test_a_killed_recording_is_no_data_set_and_the_command_goes_on(config, tmp_path, monkeypatch):
    config, _ = config

    def killed(records, **options):
        yield next(replay_episodes(records, **options))
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(eval_libero, "replay_episodes", killed)
        eval_libero.main(config)
    assert not Path(config.lerobot).exists()
    with pytest.raises(FileNotFoundError, match="has no .*hdf5 files, no meta/info.json"):
        demo_files(tmp_path)
    monkeypatch.setattr(eval_libero, "play", lambda *_: pytest.fail("played again"))
    eval_libero.main(config)
    assert len(every_camera(tmp_path)) == 2 and not (tmp_path / "recorded.tmp").exists()
    before = (Path(config.lerobot) / "meta/info.json").stat().st_mtime_ns
    eval_libero.main(config)  # complete: nothing is written again
    assert (Path(config.lerobot) / "meta/info.json").stat().st_mtime_ns == before
    other = dataclasses.replace(config, perturb="object:2.5", out_dir=str(tmp_path / "other"), lerobot=None)
    monkeypatch.undo()
    eval_libero.main(other)
    with pytest.raises(FileExistsError, match="recorded exists, with 2 episodes of another run"):
        eval_libero.main(dataclasses.replace(other, lerobot=config.lerobot))
    (Path(config.out_dir) / "episodes.jsonl").unlink()  # as many episodes as there, but others
    with pytest.raises(FileExistsError, match="with 2 episodes; 2 are to be recorded, 2 of them not made yet"):
        eval_libero.main(config)


def test_another_folder_or_package_is_asked_for_before_the_first_episode(config, tmp_path, monkeypatch):
    config, _ = config
    monkeypatch.setattr(eval_libero, "play", lambda *_: pytest.fail("played"))
    with pytest.raises(ValueError, match="--lerobot: the random policy's gripper"):
        eval_libero.main(dataclasses.replace(config, policies=("random",)))
    with pytest.raises(ValueError, match="images of 65 x 65: videos, as in .*recorded, need an even --image-size"):
        eval_libero.main(dataclasses.replace(config, image_size=65, out_dir=str(tmp_path / "odd")))
    Path(config.lerobot).mkdir()
    with pytest.raises(FileExistsError, match="recorded exists, with no episodes; 2 are to be recorded, 2 of them not"):
        eval_libero.main(config)
    Path(config.lerobot).rmdir()
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    with pytest.raises(ImportError, match=r'pyarrow: pip install -e "\.\[formats\]"'):
        eval_libero.main(config)


def test_a_simulator_that_has_changed_is_noticed():
    records = [{"suite": "tabletop_object", "task": 0, "init_state": 0, "success": True, "actions": [[0.0] * 7] * 3}]
    with pytest.raises(RuntimeError, match="tabletop_object/0/0 ended in success when .* failure when its actions"):
        list(replay_episodes(records, size=16))


def test_both_cameras_are_recorded():
    actions = expert_actions(1).tolist()
    record_of = {"suite": "tabletop_object", "task": 0, "init_state": 1, "success": True, "actions": actions}
    (episode,) = replay_episodes([record_of], size=16, cameras=("agentview", "eye_in_hand"))
    assert list(episode.cameras) == ["agentview", "eye_in_hand"] and episode.success
    assert (episode.cameras["agentview"] != episode.cameras["eye_in_hand"]).any()


@pytest.fixture
def collection(policy_file, tmp_path, monkeypatch):
    """One demonstration and two attempts of a policy in Tabletop, the second of which wins."""
    real = collect_demos._demonstrator

    def wins_once(config, env, kind, seed, speed):
        wins = kind == "policy" and seed == collect_demos.FIRST_ON_POLICY + 1
        return make_expert(env, seed, speed=0.9) if wins else real(config, env, kind, seed, speed)

    monkeypatch.setattr(collect_demos, "_demonstrator", wins_once)
    return dataclasses.replace(
        collect_demos.PRESETS["smoke"],
        tasks=("0",),
        demos_per_task=1,
        policy=str(policy_file),
        policy_per_task=2,
        workers=1,
        out_dir=str(tmp_path / "demos"),
        lerobot=str(tmp_path / "recorded"),
    )


def test_a_collection_comes_back(collection):
    collect_demos.main(collection)
    before, after = every_camera(Path(collection.out_dir)), every_camera(Path(collection.lerobot))
    assert [(e.kind, e.success) for e in after] == [("expert", True), ("policy", False), ("policy", True)]
    for a, b in zip(before, after, strict=True):
        assert (a.kind, a.success, a.instruction, a.fps) == (b.kind, b.success, b.instruction, b.fps)
        assert b.outcome_known and (a.grippers, a.held_dims) == (b.grippers, b.held_dims)
        for name in ("actions", "intended", "proprio"):
            np.testing.assert_array_equal(getattr(a, name), getattr(b, name))
        assert error(a.images, b.images) < CODEC


def test_a_killed_or_outdated_collection(collection, tmp_path, monkeypatch):
    real = collect_demos.read_episodes

    def killed(*args, **options):
        yield next(real(*args, **options))
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(collect_demos, "read_episodes", killed)
        collect_demos.main(collection)
    assert not Path(collection.lerobot).exists() and demo_files(tmp_path)[0] == "hdf5"
    with monkeypatch.context() as patch:
        patch.setattr(collect_demos, "make_demo", lambda job: pytest.fail("made again"))
        collect_demos.main(collection)
        collect_demos.main(collection)  # complete
        more = dataclasses.replace(collection, demos_per_task=2)
        with pytest.raises(FileExistsError, match="with 3 episodes; 4 are to be recorded, 1 of them not made yet"):
            collect_demos.main(more)
    collect_demos.main(dataclasses.replace(more, lerobot=None))
    with pytest.raises(FileExistsError, match="with 3 episodes; 4 are to be recorded, 0 of them not made yet"):
        collect_demos.main(more)
    with pytest.raises(ValueError, match="lies in --out-dir, whose files are HDF5"):
        dataclasses.replace(collection, lerobot=str(Path(collection.out_dir) / "recorded"))


def test_unknown_outcomes_stay_unknown_in_the_frames(collection, tmp_path):
    """Of some, next.success is null; where the first is unknown, there is no such feature."""
    import h5py

    collect_demos.main(dataclasses.replace(collection, lerobot=None))
    path = next(Path(collection.out_dir).rglob("*.hdf5"))
    for name, known in (("demo_20000", [True, False, True]), ("demo_0", [False, False, True])):
        with h5py.File(path, "a") as file:
            del file["data"][name].attrs["success"]
        root = tmp_path / name
        convert([collection.out_dir, str(root), "--format", "lerobot"])
        info = json.loads((root / "meta/info.json").read_text())
        assert ("next.success" in info["features"]) == known[0]
        with pytest.warns(UserWarning, match="do not say whether they succeeded"):
            assert [e.outcome_known for e in every_camera(root)] == known
