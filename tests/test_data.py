"""data: LIBERO's layout written and read, the split, the windows."""

import json
import os
import shutil
from dataclasses import replace
from unittest.mock import Mock

import h5py
import numpy as np
import pytest
import torch
from conftest import every_camera

from vlarft.data import Episode, WindowSampler, load_episodes, split_episodes
from vlarft.data.check import check
from vlarft.data.consistency import check_places
from vlarft.data.episode import episode_digests, no_ops
from vlarft.data.frames import map_file
from vlarft.data.hdf5 import demo_names, write_demo, write_task_attrs
from vlarft.data.windows import pick_frames
from vlarft.run.pixels import to_bytes, to_floats


def random_actions(rng, steps):
    """Six random motions, and a gripper that opens and closes."""
    return np.concatenate([rng.uniform(-1, 1, (steps, 6)), rng.choice([-1.0, 1.0], (steps, 1))], 1)


def arrays(steps, seed=0, size=(6, 8)):
    rng = np.random.default_rng(seed)
    return {
        "images": {"agentview": rng.integers(0, 256, (steps, *size, 3), dtype=np.uint8)},
        "actions": random_actions(rng, steps),
        "intended_actions": random_actions(rng, steps),
        "proprio": rng.uniform(-1, 1, (steps, 8)),
        "states": rng.normal(size=(steps, 5)),
    }


def write(path, demos=3, steps=12, instruction="lift the cup", size=(6, 8)):
    path.parent.mkdir(parents=True, exist_ok=True)
    with h5py.File(path, "w") as file:
        data = file.create_group("data")
        write_task_attrs(data, instruction, {"suite": "s"})
        for i in range(demos):
            write_demo(data, i, **arrays(steps + i, i, size), attrs={"seed": i, "kind": "expert"})
    return path


def test_round_trip(tmp_path):
    path = write(tmp_path / "suite" / "lift_demo.hdf5")
    episodes = load_episodes(tmp_path, with_states=True)
    assert [len(e) for e in episodes] == [12, 13, 14]
    expected = arrays(13, 1)
    episode = episodes[1]
    assert (episode.name, episode.instruction) == ("suite/lift_demo/demo_1", "lift the cup")
    np.testing.assert_array_equal(episode.images, expected["images"]["agentview"])
    np.testing.assert_allclose(episode.actions, expected["actions"], rtol=1e-6)
    np.testing.assert_allclose(episode.intended, expected["intended_actions"], rtol=1e-6)
    np.testing.assert_allclose(episode.proprio, expected["proprio"], rtol=1e-6)
    np.testing.assert_array_equal(episode.states, expected["states"])
    with h5py.File(path) as file:
        assert dict(file["data"].attrs)["num_demos"] == 3
        assert file["data"].attrs["total"] == 12 + 13 + 14
        robot = file["data/demo_0/robot_states"][()]
        assert robot.shape == (12, 9)
        np.testing.assert_allclose(np.linalg.norm(robot[:, 5:], axis=1), 1)  # a unit quaternion
        assert file["data/demo_0/rewards"][()].tolist() == [0] * 11 + [1]


def test_demonstrations_are_sorted_by_number(tmp_path):
    with h5py.File(write(tmp_path / "s" / "a_demo.hdf5", demos=12)) as file:
        assert demo_names(file["data"])[2:11:8] == ["demo_2", "demo_10"]


def test_half_written_demonstration_is_ignored_and_replaced(tmp_path):
    path = write(tmp_path / "s" / "a_demo.hdf5", demos=2)
    with h5py.File(path, "a") as file:
        file["data"].create_group("demo_2").create_dataset("actions", data=np.zeros((4, 7)))
    assert len(load_episodes(path)) == 2
    with h5py.File(path, "a") as file:
        write_demo(file["data"], 2, **arrays(9))
    assert [len(e) for e in load_episodes(path)] == [12, 13, 9]
    with h5py.File(path, "a") as file:
        for name in demo_names(file["data"]):
            del file[f"data/{name}"].attrs["num_samples"]
    with pytest.raises(FileNotFoundError, match="has no successful demonstrations"):  # interrupted in its first ones
        load_episodes(path)


def test_images_of_libero_are_turned(tmp_path):
    path = write(tmp_path / "s" / "a_demo.hdf5", demos=1)
    upright = load_episodes(path)[0].images
    with h5py.File(path, "a") as file:
        del file["data"].attrs["image_convention"]
    np.testing.assert_array_equal(load_episodes(path)[0].images, upright[:, ::-1, ::-1])


def test_failed_demonstrations_serve_the_world_model_only(tmp_path):
    path = write(tmp_path / "s" / "a_demo.hdf5", demos=2)
    with h5py.File(path, "a") as file:
        write_demo(file["data"], 2, **arrays(9), success=False, attrs={"kind": "failed"})
        write_demo(file["data"], 3, **arrays(9), success=True, attrs={"kind": "noisy"})  # noise that got lucky
    assert len(load_episodes(path)) == 2
    assert [e.kind for e in load_episodes(path, successes_only=False)] == ["expert", "expert", "failed", "noisy"]


def test_episodes_of_several_places(tmp_path):
    one, two = tmp_path / "a" / "s" / "x_demo.hdf5", tmp_path / "b" / "s" / "y_demo.hdf5"
    for path, demos in ((one, 3), (two, 2)):
        write(path, demos, size=(16, 24))
    found = load_episodes([tmp_path / "b", str(one)])
    assert [e.name for e in found] == [e.name for e in (*load_episodes(two), *load_episodes(one))]
    names = ["s/y_demo/demo_1", "s/x_demo/demo_2", "s/y_demo/demo_0"]
    assert [e.name for e in load_episodes([one, two], names=names)] == names
    assert [e.name for e in load_episodes([one, two], names=names[1:2])] == names[1:2]  # none of the other place
    with pytest.raises(ValueError, match=r"/x_demo.hdf5 \+ \S+/y_demo.hdf5 lacks 1 of 4 named .*'s/z_demo/demo_0'"):
        load_episodes([one, two], names=[*names, "s/z_demo/demo_0"])
    with pytest.raises(FileNotFoundError, match="no_place does not exist"):
        load_episodes([one, tmp_path / "no_place"])
    budgets = [e.images.budget for e in found]
    assert len({id(budget) for budget in budgets}) == 1  # all places share what is kept in memory


def test_places_that_do_not_fit_together(tmp_path):
    folders = [tmp_path / name for name in "abc"]
    for folder, demos in zip(folders, (1, 2, 3)):
        write(folder / "s" / f"{'x' if folder.name == 'a' else 'y'}_demo.hdf5", demos, size=(16, 24))
    with pytest.raises(
        ValueError, match=r"/b and \S+/c both have an episode 's/y_demo/demo_0' \(2 such .*older 's' in"
    ):
        load_episodes(folders)
    (e,) = load_episodes(folders[0])
    other = replace(e, name="o")
    check_places({"one": [e], "two": [other]}, "agentview")
    for changes, message in (
        ({"actions": e.actions[:, 1:]}, "one and two: .* action dimensions: 7 in s/x_demo/demo_0, 6 in o; train on"),
        ({"proprio": e.proprio[:, 1:]}, "one and two: .* proprio dimensions: 8 in s/x_demo/demo_0, 7 in o; train on"),
        ({"fps": 5.0}, "one and two: .* fps"),
        ({"absolute": True}, "one and two: .* actions .absolute.: False in s/x_demo/demo_0, True in o"),
        ({"images": e.images[:, :9]}, "one has images of 16x24, two of 9x24"),
    ):
        with pytest.raises(ValueError, match=message):
            check_places({"one": [replace(e, fps=20.0)], "two": [replace(other, **changes)]}, "c")


def test_errors_name_file_and_field(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"does not exist; make some with: python collect_demos.py"):
        load_episodes(tmp_path / "none")
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match=r"has no \*.hdf5 files"):
        load_episodes(tmp_path / "empty")
    path = write(tmp_path / "s" / "a_demo.hdf5")
    with pytest.raises(ValueError, match=r"a_demo.hdf5: data/demo_0 has no camera 'wrist'; it has agentview"):
        load_episodes(path, camera="wrist")
    with pytest.raises(ValueError, match="lacks 1 of 1 named episodes, first 's/a_demo/demo_9'"):
        load_episodes(path, names=["s/a_demo/demo_9"])
    with h5py.File(path, "a") as file:
        file["data/demo_1/actions"][3, 2] = np.nan
    with pytest.raises(ValueError, match=r"data/demo_1/actions has nan at row 3, column 2"):
        load_episodes(path)
    with h5py.File(path, "a") as file:
        del file["data/demo_1/actions"]
        file["data/demo_1/actions"] = np.zeros((13, 6))
    with pytest.raises(ValueError, match=r"data/demo_1/actions must have shape \(T, 7\), got \(13, 6\)"):
        load_episodes(path)
    path.write_bytes(path.read_bytes()[:5000])
    with pytest.raises(ValueError, match="a_demo.hdf5 is not a readable HDF5 file.*truncated"):
        load_episodes(path)


@pytest.mark.parametrize("name", ["observations", "data"])
def test_other_layouts_are_refused(tmp_path, name):
    with h5py.File(tmp_path / "x.hdf5", "w") as file:
        file[name] = np.zeros(3)
    with pytest.raises(ValueError, match=rf"has no group 'data' \(found \['{name}'\]\); expected LIBERO's layout"):
        load_episodes(tmp_path / "x.hdf5")
    assert len(check(tmp_path)[0].errors) == 1


def test_writer_checks_its_arrays(tmp_path):
    with h5py.File(tmp_path / "x.hdf5", "w") as file:
        data = file.create_group("data")
        good = arrays(5)
        with pytest.raises(ValueError, match="states has 4 rows, expected 5"):
            write_demo(data, 0, **{**good, "states": good["states"][:4]})
        with pytest.raises(ValueError, match="images of agentview must be uint8"):
            write_demo(data, 0, **{**good, "images": {"agentview": np.zeros((5, 6, 8, 3))}})


def episode(name, steps, gripper_change=None):
    intended = np.full((steps, 7), 0.5, np.float32)
    intended[:, -1] = -1
    if gripper_change is not None:
        intended[gripper_change:, -1] = 1
    proprio = np.tile(np.arange(steps, dtype=np.float32)[:, None], (1, 8))
    images = np.zeros((steps, 4, 4, 3), np.uint8) + np.arange(steps, dtype=np.uint8)[:, None, None, None]
    return Episode(name, f"task {name}", images, proprio, intended.copy(), intended)


def test_split_is_fixed_by_names_and_seed():
    episodes = [episode(f"e{i}", 10) for i in range(50)]
    train, val = split_episodes(episodes, 1 / 50, seed=0)
    assert (len(train), len(val)) == (49, 1)
    again = split_episodes(episodes[::-1], 1 / 50, seed=0)
    assert [e.name for e in again[0]] == [e.name for e in train]
    assert {e.name for e in train} | {e.name for e in val} == {e.name for e in episodes}
    assert [e.name for e in split_episodes(episodes, 1 / 50, seed=1)[1]] != [e.name for e in val]
    # a world model that also sees failures holds out the demonstrations that the policy holds out
    others = [replace(episode(f"x{i}", 10), kind="noisy", success=False) for i in range(30)]
    policy, model = split_episodes(episodes, 0.1, 0)[1], split_episodes([*others, *episodes], 0.1, 0)[1]
    assert [e.name for e in model if e.kind == "expert"] == [e.name for e in policy] and len(model) == 8
    assert [len(part) for part in split_episodes([episodes[0], others[0]], 0.1, 0)] == [1, 1]
    own = [replace(e, name=f"own/{i}", kind="policy") for i, e in enumerate(episodes)]
    before, after = (split_episodes(found, 0.1, 0)[1] for found in ([*others, *episodes], [*others, *episodes, *own]))
    assert [e.name for e in after if e.kind != "policy"] == [e.name for e in before]  # added later: the rest stays
    assert len(after) == len(before) + round(0.1 * len(own))
    assert [len(part) for part in split_episodes([episodes[0], others[0]], 0.9, 0)] == [1, 1]
    groups = [replace(e, name=f"own/{i:02}", kind="policy", start=f"start {i // 5}") for i, e in enumerate(episodes)]
    held_out = split_episodes([*episodes, *groups], 0.2, 0)[1]
    of_groups = [e.start for e in held_out if e.kind == "policy"]
    assert len(of_groups) == 10 and len(set(of_groups)) == 2  # two of ten starts, with all of their attempts
    mixed = [replace(e, name=f"x{i}", start=f"{i}", success=False) for i, e in enumerate(episodes)]
    mixed += [replace(e, start=f"{i}") for i, e in enumerate(episodes)]
    train, val = split_episodes(mixed, 0.2, 0)  # a success and a failure from each start, on one side
    assert len(val) == 20 and not {e.start for e in train} & {e.start for e in val}
    with pytest.raises(ValueError, match="at least 2 episodes, got 1"):
        split_episodes(episodes[:1], 0.5, 0)
    with pytest.raises(ValueError, match="got 1.5"):
        split_episodes(episodes, 1.5, 0)


def test_window_by_hand():
    sampler = WindowSampler([episode("a", 20, gripper_change=7)], num_frames=9, chunk=8)
    assert len(sampler) == 12  # starts 0..11
    batch = sampler.windows(np.array([[0, 3]]))
    assert (batch.frames[0, :, 0, 0, 0] * 255).round().tolist() == list(range(3, 12))
    assert batch.frames.shape == (1, 9, 3, 4, 4)
    assert batch.proprio[0, 0] == 3 and batch.motion[0, 0] == 1
    assert batch.proprio_after[0, :, 0].tolist() == list(range(4, 12))
    start, end = sampler.windows(np.array([[0, 0]])), sampler.windows(np.array([[0, 15]]))
    assert not start.motion.any() and end.proprio_after[0, :, 0].tolist() == [16, 17, 18, 19, 19, 19, 19, 19]
    assert all(torch.equal(a, b) for a, b in zip(batch.robot, (batch.proprio, batch.motion)))
    assert batch.intended[0, :, -1].tolist() == [-1] * 4 + [1] * 4
    assert batch.key_position[0].tolist() == [7, 7, 7]  # where the gripper closes
    assert batch.instructions == ["task a"]
    late = sampler.windows(np.array([[0, 8]]))
    assert late.key_position[0].tolist() == [19, 19, 19]  # no further event: the episode's end


def test_actions_beyond_the_end_hold_still():
    sampler = WindowSampler([episode("a", 5, gripper_change=2)], num_frames=1, chunk=8)
    batch = sampler.windows(np.array([[0, 3]]))
    assert batch.intended[0, :2, 0].tolist() == [0.5, 0.5]
    assert batch.intended[0, 2:, :-1].abs().max() == 0
    assert batch.intended[0, 2:, -1].tolist() == [1] * 6


def test_batches_depend_on_their_seed_alone():
    sampler = WindowSampler([episode("a", 30), episode("b", 40)], num_frames=9)
    one, two = sampler.batch(8, 0, 5), sampler.batch(8, 0, 5)
    assert torch.equal(one.index, two.index)
    assert not torch.equal(one.index, sampler.batch(8, 0, 6).index)
    assert sampler.names(8, 0, 5) == list(dict.fromkeys(sampler.episodes[i].name for i, _ in one.index.tolist()))
    halves = [sampler.batch(8, 0, 5, part=(r, 2)).index for r in range(2)]
    assert torch.equal(torch.cat(halves), one.index)


def test_failures_are_half_of_the_windows_at_most():
    won, lost = episode("won", 20), replace(episode("lost", 200), success=False)
    for episodes, share in (([won, lost], 0.5), ([won, replace(lost, success=True)], 0.94), ([lost], 1.0)):
        index = WindowSampler(episodes, num_frames=9).batch(2000, 0).index
        assert (index[:, 0] == len(episodes) - 1).float().mean().item() == pytest.approx(share, abs=0.03)
        assert len(set(index[index[:, 0] == len(episodes) - 1, 1].tolist())) > 180  # of 192
    few = WindowSampler([replace(won, success=False), replace(lost, success=True)], num_frames=9)
    assert (few.batch(2000, 0).index[:, 0] == 0).float().mean().item() == pytest.approx(12 / 204, abs=0.03)


def test_context_frame_comes_from_before_the_segment():
    sampler = WindowSampler([episode("a", 60)], num_frames=9, context_lookback=15)
    batch = sampler.batch(200, 1)
    back = batch.index[:, 1] - (batch.context_frame[:, 0, 0, 0] * 255).round().long()
    inside = batch.index[:, 1] >= 15
    assert back[inside].min() == 1 and back[inside].max() == 15
    halves = [sampler.batch(200, 1, part=(r, 2)).context_frame for r in range(2)]
    assert torch.equal(torch.cat(halves), batch.context_frame)  # the same for any number of processes
    plain = WindowSampler([episode("a", 60)], num_frames=9).batch(20, 1)
    assert torch.equal(plain.context_frame, plain.frames[:, 0])


def test_context_frame_may_come_from_anywhere_in_the_episode_so_far():
    sampler = WindowSampler([episode("a", 60)], num_frames=9, context_lookback=None)
    batch = sampler.batch(2000, 1)
    context = (batch.context_frame[:, 0, 0, 0] * 255).round().long()
    start = batch.index[:, 1]
    assert context.min() == 0 and (context <= start).all()
    assert {(c, s) for c, s in zip(context.tolist(), start.tolist()) if s == 2} == {(0, 2), (1, 2), (2, 2)}
    assert (context[start == 40].float().mean() - 20).abs() < 6  # uniform over the 41 frames


def test_context_frame_may_be_the_first_of_the_episode():
    sampler = WindowSampler([episode("a", 60)], num_frames=9, context_lookback=-1)
    for batch in (sampler.batch(200, 1), sampler.spread(200)):
        assert not batch.context_frame[:, 0, 0, 0].any() and batch.index[:, 1].max() > 40
    starts = np.array([[0, 40]])
    assert torch.equal(sampler.windows(starts).context_frame, sampler.windows(starts).frames[:, 0])  # frame t, if asked


def test_spread_covers_the_episodes():
    sampler = WindowSampler([episode("a", 30), episode("b", 30)], num_frames=9)
    assert sampler.spread(4).index[:, 0].tolist() == [0, 0, 1, 1]
    assert len(sampler.spread(10**6).index) == len(sampler)


def test_frames_are_picked_in_order_and_by_seed(demos):
    sampler = WindowSampler(load_episodes(demos), 9, 9)
    batch = sampler.batch(3, 0)
    batch = batch._replace(frames=torch.arange(27.0).reshape(3, 9, 1, 1, 1))
    picked = pick_frames(batch, 4, 3, (0, 1), 1, 2).flatten(1)
    assert picked.shape == (3, 4) and (picked.diff(dim=1) > 0).all()
    assert ((picked >= 9 * torch.arange(3)[:, None]) & (picked < 9 * torch.arange(1, 4)[:, None])).all()
    assert torch.equal(picked, pick_frames(batch, 4, 3, (0, 1), 1, 2).flatten(1))
    assert not torch.equal(picked, pick_frames(batch, 4, 3, (0, 1), 1, 3).flatten(1))
    last = batch._replace(frames=batch.frames[2:])
    assert torch.equal(pick_frames(last, 4, 3, (2, 3), 1, 2).flatten(1), picked[2:])
    assert pick_frames(batch, 9, 3, (0, 1), 0) is batch.frames


def test_sample_frames_are_the_first_of_evenly_spaced_windows(demos):
    sampler = WindowSampler(load_episodes(demos), 9, 9)
    assert torch.equal(sampler.sample_frames(4), sampler.spread(4).frames[:, 0])
    assert len(sampler.sample_frames(10**6)) == len(sampler)
    usual = sampler.sample_frames().median(dim=0).values
    assert usual.shape == (3, 64, 64) and (usual[:, 0, 0] - 120 / 255).abs().max() < 1e-6


def test_window_errors():
    with pytest.raises(ValueError, match="no episode has the 9 frames of a window; the longest has 5, a"):
        WindowSampler([episode("a", 5)], num_frames=9)
    with pytest.warns(UserWarning, match="1 of 2 episodes are shorter than a window of 9 frames .* first short"):
        assert len(WindowSampler([episode("short", 5), episode("long", 12)], num_frames=9)) == 4
    with pytest.raises(ValueError, match="no episodes to draw windows from: this split is empty"):
        WindowSampler([])
    big = Episode("b", "t", np.zeros((20, 8, 8, 3), np.uint8), *[np.zeros((20, n), np.float32) for n in (8, 7, 7)])
    with pytest.raises(ValueError, match=r"differ in image size: \[\(4, 4\), \(8, 8\)\]"):
        WindowSampler([episode("a", 20), big])


def libero_original(path, compression=None, chunks=None):
    """A file as LIBERO's own scripts write it: upside down, 20 Hz in env_args, no attribute of ours."""
    rng = np.random.default_rng(0)
    path.parent.mkdir(parents=True, exist_ok=True)
    views = {k: rng.integers(0, 256, (15, 128, 128, 3), dtype=np.uint8) for k in ("agentview", "eye_in_hand")}
    with h5py.File(path, "w") as file:
        data = file.create_group("data")
        data.attrs["env_args"] = json.dumps({"type": 1, "env_kwargs": {"control_freq": 20}})
        data.attrs["problem_info"] = json.dumps({"language_instruction": "put the bowl on the stove"})
        demo = data.create_group("demo_0")
        demo.attrs["num_samples"] = 15
        demo["actions"] = random_actions(rng, 15)
        demo["obs/ee_states"], demo["obs/gripper_states"] = rng.normal(size=(15, 6)), rng.normal(size=(15, 2))
        for name, images in views.items():
            demo.create_dataset(f"obs/{name}_rgb", data=images, compression=compression, chunks=chunks)
    return views


@pytest.mark.parametrize(
    ("compression", "chunks"),
    [(None, None), (None, (4, 128, 128, 3)), ("gzip", (4, 128, 128, 3)), ("lzf", (4, 128, 128, 3)), ("gzip", True)],
)
def test_original_files_are_read_in_any_storage(tmp_path, compression, chunks):
    path = tmp_path / "libero_goal" / "put_demo.hdf5"
    views = libero_original(path, compression, chunks)
    (episode,) = every_camera(tmp_path)
    assert (episode.instruction, episode.fps, episode.images.shape) == (
        "put the bowl on the stove",
        20,
        (15, 128, 128, 3),
    )
    assert list(episode.cameras) == ["agentview", "eye_in_hand"]
    for name, images in views.items():
        np.testing.assert_array_equal(episode.cameras[name], images[:, ::-1, ::-1])
        np.testing.assert_array_equal(episode.cameras[name][3:12], images[3:12, ::-1, ::-1])
        np.testing.assert_array_equal(episode.cameras[name][-1], images[-1, ::-1, ::-1])
    assert isinstance(episode.images, np.ndarray) == (chunks is None)  # a view of the file
    episode = load_episodes(tmp_path, "image", cache_bytes=128 * 128 * 3 * 6)[0]  # RLDS' name; room for six frames
    for t in (0, 6, 9, 2):
        np.testing.assert_array_equal(episode.images[t : t + 5], views["agentview"][t : t + 5, ::-1, ::-1])


def test_liberos_own_files_hold_what_is_seen_after_each_action(tmp_path):
    """As create_dataset.py writes them: the state before each action, and the observation after it."""
    path = tmp_path / "libero_goal" / "LIVING_ROOM_SCENE2_put_the_bowl_on_the_stove_demo.hdf5"
    views = libero_original(path)
    with h5py.File(path, "a") as file:
        file["data"].attrs["macros_image_convention"] = "opengl"
        file["data"].attrs["problem_info"] = json.dumps({"language_instruction": "put the akita black bowl there"})
        demo = file["data/demo_0"]
        demo["states"] = np.arange(15.0)[:, None]
        actions, poses = demo["actions"][()], demo["obs/ee_states"][()]
    (episode,) = load_episodes(path, with_states=True)
    assert len(episode) == len(episode.images) == 14 and episode.instruction == "put the bowl on the stove"
    np.testing.assert_array_equal(episode.images[:], views["agentview"][:-1, ::-1, ::-1])
    np.testing.assert_allclose(episode.proprio[:, :6], poses[:-1], rtol=1e-6)
    np.testing.assert_allclose(episode.actions, actions[1:], rtol=1e-6)
    assert episode.states[:, 0].tolist() == list(range(1, 15)) and episode.intended is episode.actions
    with h5py.File(path, "a") as file:  # in chunks that are inflated on access
        images = file["data/demo_0/obs"]
        del images["agentview_rgb"]
        images.create_dataset("agentview_rgb", data=views["agentview"], chunks=(4, 128, 128, 3), compression="gzip")
    np.testing.assert_array_equal(load_episodes(path)[0].images[:], views["agentview"][:-1, ::-1, ::-1])
    with h5py.File(path, "a") as file:
        file["data"].attrs["macros_image_convention"] = "opencv"
    with pytest.raises(
        ValueError, match="macros_image_convention is 'opencv', expected 'opengl', images that are upside"
    ):
        load_episodes(path)


def test_unfinished_folders_are_left_out_and_named(demos, tmp_path):
    shutil.copytree(demos, tmp_path / "demos")
    for name in ("push_demo.parts", "other.tmp"):
        (tmp_path / "demos" / name).mkdir()
        (tmp_path / "demos" / name / "demo_0.hdf5").write_bytes(b"half")
    with pytest.warns(UserWarning, match="is of a collection or conversion that was not finished") as told:
        assert len(load_episodes(tmp_path / "demos")) == len(load_episodes(demos))
    assert {str(w.message).split(" is of ")[0] for w in told} == {
        str(tmp_path / "demos" / name) for name in ("push_demo.parts", "other.tmp")
    }


@pytest.mark.parametrize("scene", ["", "LIVING_ROOM_SCENE2_"])
def test_regenerated_files_without_attributes_are_read(tmp_path, scene):
    """As OpenVLA's regenerate_libero_dataset.py writes them: failed demonstrations are left out, nothing is noted."""
    original = tmp_path / "libero_goal" / "put_demo.hdf5"
    regenerated = tmp_path / "no_noops" / f"{scene}put_both_pots_on_the_stove_demo.hdf5"
    views = libero_original(original)
    regenerated.parent.mkdir()
    with h5py.File(original) as source, h5py.File(regenerated, "w") as file:
        data = file.create_group("data")
        for number in (10, 0, 2):
            demo = data.create_group(f"demo_{number}")
            for name in ("actions", "obs"):
                source.copy(source[f"data/demo_0/{name}"], demo)
    episodes = load_episodes(regenerated)
    names = [f"no_noops/{scene}put_both_pots_on_the_stove_demo/demo_{n}" for n in (0, 2, 10)]
    assert [e.name for e in episodes] == names
    assert {(e.instruction, e.fps, e.kind, e.success) for e in episodes} == {
        ("put both pots on the stove", None, "expert", True)
    }
    expected = load_episodes(original)[0]
    for e in episodes:
        np.testing.assert_array_equal(e.actions, expected.actions)
        np.testing.assert_array_equal(e.proprio, expected.proprio)
        np.testing.assert_array_equal(e.images, views["agentview"][:, ::-1, ::-1])


def test_instructions_that_are_not_there(tmp_path):
    path = tmp_path / "demo.hdf5"
    libero_original(path)

    def attribute(name, value):
        with h5py.File(path, "a") as file:
            del file["data"].attrs[name]
            if value is not None:
                file["data"].attrs[name] = value

    def fails(text):
        with pytest.raises(ValueError, match=text):
            load_episodes(path)

    attribute("problem_info", None)
    fails("attribute problem_info of 'data' has no language_instruction; .*name the file <instruction>_demo.hdf5")
    path = path.rename(tmp_path / "lift_it_demo.h5")
    assert load_episodes(path)[0].instruction == "lift it"
    with h5py.File(path, "a") as file:
        file["data"].attrs["problem_info"] = "{}"
    fails("lift_it_demo.h5: attribute problem_info of 'data' has no language_instruction")  # not guessed
    attribute("problem_info", "{")
    fails(r"attribute problem_info of 'data' is not JSON \(.*, got '\{'")
    attribute("problem_info", "[1]")
    fails(r"attribute problem_info of 'data' must be a JSON object, got '\[1\]'")
    attribute("problem_info", '{"language_instruction": null}')
    fails("has no language_instruction")
    attribute("problem_info", '{"language_instruction": ["lift", "it"]}')
    assert load_episodes(path)[0].instruction == "lift it"
    attribute("env_args", "none")
    fails("attribute env_args of 'data' is not JSON")


def test_damaged_images_are_refused_when_they_are_looked_at(tmp_path):
    path = write(tmp_path / "s" / "a_demo.hdf5", demos=1)
    with h5py.File(path) as file:
        place = file["data/demo_0/obs/agentview_rgb"].id.get_chunk_info(1)
    content = bytearray(path.read_bytes())
    content[place.byte_offset : place.byte_offset + 8] = b"\0" * 8
    path.write_bytes(content)
    images = load_episodes(path)[0].images
    assert images[:8].shape == (8, 6, 8, 3)
    with pytest.raises(ValueError, match=r"data/demo_0/obs/agentview_rgb, frames from 8 on: .*damaged file"):
        images[8]
    report, episodes = check(path)  # goes through every chunk
    assert len(report.errors) == 1 and "agentview_rgb, frames from 8 on: " in report.errors[0] and not episodes


def test_gripper_in_other_units_is_refused(tmp_path):
    path = write(tmp_path / "s" / "a_demo.hdf5")
    with h5py.File(path, "a") as file:
        for demo in file["data"].values():
            demo["actions"][:, 6] = np.linspace(0, 1, len(demo["actions"]))
    with pytest.raises(
        ValueError, match=r"the gripper action \(dimension 6\) lies in \[0, 1\], never below 0; .*data.convert"
    ):
        load_episodes(path)
    with h5py.File(path, "a") as file:
        file["data/demo_1/actions"][:, 6] = 80
    with pytest.raises(
        ValueError, match=r"s/a_demo/demo_1: the gripper action \(dimension 6\) lies in \[80, 80\]; expected -1 open"
    ):
        load_episodes(path)
    with h5py.File(path, "a") as file:  # of one operator alone
        file["data/demo_0/actions"][:, 6] = np.where(np.arange(len(file["data/demo_0/actions"])) % 9 < 8, 1, -1)
        file["data/demo_1/actions"][:, 6] = np.where(np.arange(len(file["data/demo_1/actions"])) % 9 < 8, 1, 0)
    with pytest.raises(
        ValueError, match=r"s/a_demo/demo_1, one of 2 such episodes: .* lies in \[0, 1\], never below 0"
    ):
        load_episodes(path)


def test_images_of_two_sizes_in_one_place_are_refused(tmp_path):
    write(tmp_path / "s" / "a_demo.hdf5")
    with h5py.File(write(tmp_path / "s" / "b_demo.hdf5"), "a") as file:
        for demo in file["data"].values():
            images = demo["obs/agentview_rgb"][:, ::2, ::2]
            del demo["obs/agentview_rgb"]
            demo["obs/agentview_rgb"] = images
    with pytest.raises(
        ValueError, match=r"episodes differ in image size: .* in s/a_demo/demo_0, .* in s/b_demo/demo_0"
    ):
        load_episodes(tmp_path)


def test_hand_positions_at_gripper_changes_by_hand():
    one = episode("a", 7)
    one = replace(one, intended=one.intended.copy(), proprio=np.arange(56, dtype=np.float32).reshape(7, 8))
    one.intended[:, 6] = [-1, -1, 1, 1, 1, -1, -1]
    assert (WindowSampler([one], 1, 8).key_positions[0][:, 0] / 8).tolist() == [2, 2, 5, 5, 5, 6, 6]


def test_names_do_not_depend_on_how_the_path_is_written(tmp_path, monkeypatch):
    write(tmp_path / "set" / "a_demo.hdf5")
    monkeypatch.chdir(tmp_path / "set")
    names = [e.name for e in load_episodes(tmp_path / "set")]
    assert names[0] == "set/a_demo/demo_0" and [e.name for e in load_episodes(".")] == names
    assert [e.name for e in load_episodes("a_demo.hdf5")] == names


def test_a_file_that_was_made_again_is_read_again(tmp_path):
    """Also where h5py reads the images, from a handle that stays open."""
    path = write(tmp_path / "set" / "a_demo.hdf5", demos=1)

    def store(shade):
        with h5py.File(path, "r") as old, h5py.File(tmp_path / "new", "w") as new:
            old.copy("data", new)
            images = np.full_like(new["data/demo_0/obs/agentview_rgb"][:], shade)
            del new["data/demo_0/obs/agentview_rgb"]
            new.create_dataset("data/demo_0/obs/agentview_rgb", data=images, compression="lzf")
        (tmp_path / "new").replace(path)
        return load_episodes(path)[0].images[0].max()

    assert [store(7), store(9)] == [7, 9]


def test_files_in_memory_are_not_kept_open(tmp_path, monkeypatch):
    """Data sets have more files than a process may open; a file larger than memory is mapped in another way."""
    (tmp_path / "a").write_bytes(bytes(range(200)))
    (tmp_path / "empty").touch()
    opened = len(os.listdir("/proc/self/fd"))
    contents = [map_file(tmp_path / "a") for _ in range(9)]
    assert len(os.listdir("/proc/self/fd")) == opened
    with monkeypatch.context() as patch:
        patch.setattr(torch, "from_file", Mock(side_effect=RuntimeError("unable to mmap")))
        contents.append(map_file(tmp_path / "a"))
    for content in contents:
        assert content.tolist() == list(range(200)) and content.dtype == np.uint8 and not content.flags.writeable
    assert map_file(tmp_path / "empty").shape == (0,)


def test_absolute_targets_are_repeated_beyond_the_end():
    sampler = WindowSampler([replace(episode("a", 5, gripper_change=2), absolute=True)], num_frames=1, chunk=8)
    assert sampler.windows(np.array([[0, 3]])).intended[0, 2:].unique(dim=0).tolist() == [[0.5] * 6 + [1]]


def test_no_ops_by_hand():
    actions = np.zeros((6, 7), np.float32)
    actions[:, 6] = [-1, -1, 1, 1, 1, 1]
    actions[4, 1] = 0.5
    one = replace(episode("a", 6), actions=actions, intended=actions)
    one = replace(one, proprio=np.zeros((6, 8), np.float32))
    assert no_ops(one).tolist() == [True, True, False, True, False, True]  # 2 closes the gripper, 4 moves
    closing = one.proprio.copy()
    closing[4:, 6] = 0.005  # after action 3 the fingers are elsewhere: they still close
    assert no_ops(replace(one, proprio=closing)).tolist() == [True, True, False, False, False, True]
    targets = np.cumsum(actions, 0)
    targets[:, 6] = actions[:, 6]
    held = replace(one, actions=targets, intended=targets, absolute=True)
    assert no_ops(held).tolist() == [False, True, False, True, False, True]  # the first target may be a move


def test_the_digest_is_of_all_but_the_pixels():
    one, two = episode("a", 7), episode("b", 5)
    one = replace(one, images=Mock(spec=["shape"], shape=one.images.shape))  # nothing else of them is looked at
    before = episode_digests([one, two])
    assert episode_digests([two, one]) == before and before.keys() == {"a", "b"} and len(before["a"]) == 12
    changes = (
        {"actions": one.actions + 0.1},
        {"intended": one.intended + 0.1},
        {"proprio": one.proprio + 0.1},
        {"instruction": "push"},
        {"success": not one.success},
        {"kind": "noisy"},
        {"absolute": not one.absolute},
        {"gripper_dims": ()},
        {"held_dims": (0,)},
        {"images": Mock(spec=["shape"], shape=(7, 1, 2, 3))},
    )
    changed = [episode_digests([replace(one, **change), two]) for change in changes]
    assert len({before["a"], *(of["a"] for of in changed)}) == 1 + len(changes) and {of["b"] for of in changed} == {
        before["b"]
    }


def test_images_and_frames_by_hand():
    images = np.arange(24, dtype=np.uint8).reshape(2, 4, 3) + 231  # (H, W, C)
    frames = to_floats(images)
    assert frames.shape == (3, 2, 4) and frames.dtype == torch.float32
    assert frames[2, 1, 0] == torch.tensor(images[1, 0, 2] / 255, dtype=torch.float32)
    assert to_bytes(frames[None]).shape == (1, 2, 4, 3) and torch.equal(to_bytes(frames), torch.from_numpy(images))
    outside = torch.tensor([-0.1, 0.499 / 255, 0.501 / 255, 1.1])
    assert to_bytes(outside[:, None, None]).flatten().tolist() == [0, 0, 1, 255]
