"""Conversions: lossless round trips, units and sizes, and a LeRobot data set as its readers expect it."""

import json
import re
import resource
import shutil
from dataclasses import replace
from types import SimpleNamespace

import h5py
import numpy as np
import pyarrow.parquet as pq
import pytest
import ranks
from conftest import every_camera, files_of

from vlarft.data import load_episodes, split_episodes
from vlarft.data.convert import main, resize
from vlarft.data.hdf5 import write_demo, write_task_attrs
from vlarft.data.lerobot_writer import write_lerobot


def sources(root, steps=13, size=(32, 48), wide=7):
    """Two tasks, two cameras, noisy actions beside intended ones, a failed attempt."""
    rng = np.random.default_rng(0)
    for task in ("lift", "push"):
        path = root / "suite" / f"{task}_demo.hdf5"
        path.parent.mkdir(parents=True, exist_ok=True)
        with h5py.File(path, "w") as file:
            data = file.create_group("data")
            write_task_attrs(data, f"{task} the cup", {"suite": "suite"}, 10)
            for i in range(3):
                intended = rng.uniform(-1, 1, (steps + i, 7)).astype(np.float32)
                intended[:, 6] = np.where(np.arange(steps + i) < 5, -1, 1)
                images = rng.integers(0, 256, (2, steps + i, 1, 1, 3), dtype=np.uint8)
                images = images + np.zeros((1, 1, *size, 1), np.uint8)
                images[:, :, : size[0] // 2] //= 2  # the upper half is darker
                write_demo(
                    data,
                    i,
                    images={"agentview": images[0], "eye_in_hand": images[1]},
                    actions=np.clip(intended + 0.1, -1, 1),
                    intended_actions=intended,
                    proprio=rng.normal(size=(steps + i, 8)).astype(np.float32),
                    states=rng.normal(size=(steps + i, 5)),
                    joint_states=rng.normal(size=(steps + i, 7)),
                    success=i < 2,
                    attrs={"kind": "expert" if i < 2 else "failed"},
                )
    return every_camera(root)


def same(one, two, tolerance=0):
    """Episodes are equal but for their names and the names of cameras."""
    assert (one.instruction, one.success, one.kind, one.fps) == (two.instruction, two.success, two.kind, two.fps)
    for name in ("actions", "intended", "proprio"):
        np.testing.assert_array_equal(getattr(one, name), getattr(two, name))
    assert len(one.cameras) == len(two.cameras) == 2
    for a, b in zip(one.cameras.values(), two.cameras.values()):
        assert np.abs(np.asarray(a).astype(int) - np.asarray(b)).mean() <= tolerance


@pytest.mark.parametrize(("options", "tolerance"), [(["--images", "png"], 0), ([], 2), (["--codec", "av1"], 3)])
def test_there_and_back(tmp_path, options, tolerance):
    before = sources(tmp_path / "hdf5")
    main([str(tmp_path / "hdf5"), str(tmp_path / "lerobot"), "--format", "lerobot", *options])
    middle = every_camera(tmp_path / "lerobot")
    assert [e.name for e in middle] == [f"lerobot/episode_{i:06d}" for i in range(6)]
    assert list(middle[0].cameras) == ["image", "image2"] and len(load_episodes(tmp_path / "lerobot")) == 4
    main([str(tmp_path / "lerobot"), str(tmp_path / "back"), "--format", "hdf5"])
    after = every_camera(tmp_path / "back")
    assert [e.name for e in after[2:4]] == ["back/lift_the_cup_demo/demo_2", "back/push_the_cup_demo/demo_0"]
    assert list(after[0].cameras) == ["agentview", "eye_in_hand"]
    for one, two, three in zip(before, middle, after, strict=True):
        same(one, two, tolerance)
        same(one, three, tolerance)


def test_hdf5_keeps_states(tmp_path):
    sources(tmp_path / "a")
    before = load_episodes(tmp_path / "a", with_states=True)
    main([str(tmp_path / "a"), str(tmp_path / "b"), "--format", "hdf5", "--camera", "eye_in_hand"])
    after = load_episodes(tmp_path / "b", "eye_in_hand", with_states=True)
    for one, two in zip(before, after, strict=True):
        np.testing.assert_array_equal(one.states, two.states)
        assert list(two.cameras) == ["eye_in_hand"]


def test_hdf5_holds_what_is_known_alone(tmp_path):
    """Neither joints, which no episode has, nor the end of an episode whose outcome is not known."""
    sources(tmp_path / "a")
    with h5py.File(tmp_path / "a/suite/push_demo.hdf5", "a") as file:
        del file["data/demo_1"].attrs["success"]
    main([str(tmp_path / "a"), str(tmp_path / "b"), "--format", "hdf5"])
    with h5py.File(tmp_path / "b/push_the_cup_demo.hdf5") as file:
        demos = list(file["data"].values())
        assert [("success" in d.attrs, "rewards" in d, "dones" in d) for d in demos] == [
            (i != 1,) * 3 for i in range(3)
        ]
        assert [demos[i]["dones"][-1] for i in (0, 2)] == [1, 0] and not any("joint_states" in d["obs"] for d in demos)
    assert [e.outcome_known for e in load_episodes(tmp_path / "b", successes_only=False)][3:] == [True, False, True]


def test_a_lerobot_set_is_as_its_format_says(tmp_path):
    before = sources(tmp_path / "hdf5")
    main([str(tmp_path / "hdf5"), str(tmp_path / "set"), "--format", "lerobot"])
    info = json.loads((tmp_path / "set/meta/info.json").read_text())
    assert (info["codebase_version"], info["fps"], info["total_episodes"]) == ("v3.0", 10, 6)
    assert info["total_frames"] == sum(map(len, before))
    assert info["features"]["observation.images.image"]["dtype"] == "video"
    assert info["features"]["action"]["shape"] == [7] and info["features"]["timestamp"]["dtype"] == "float32"
    episodes = pq.read_table(tmp_path / "set/meta/episodes/chunk-000/file-000.parquet").to_pylist()
    key = "videos/observation.images.image2"
    assert [e["dataset_from_index"] for e in episodes] == np.cumsum([0, *map(len, before)])[:-1].tolist()
    assert episodes[1][f"{key}/from_timestamp"] == pytest.approx(1.3) and episodes[1][f"{key}/file_index"] == 0
    assert episodes[3]["tasks"] == ["push the cup"]
    frames = pq.read_table(tmp_path / "set/data/chunk-000/file-000.parquet")
    assert frames["index"].to_pylist() == list(range(info["total_frames"]))
    assert frames["task_index"].to_pylist()[0] == 0 and frames["task_index"].to_pylist()[-1] == 1
    tasks = pq.read_table(tmp_path / "set/meta/tasks.parquet")
    assert json.loads(tasks.schema.metadata[b"pandas"])["index_columns"] == ["task"]
    stats = json.loads((tmp_path / "set/meta/stats.json").read_text())
    actions = np.concatenate([e.actions for e in before])
    np.testing.assert_allclose(stats["action"]["mean"], actions.mean(0), atol=1e-5)
    np.testing.assert_allclose(stats["action"]["q99"], np.quantile(actions, 0.99, axis=0), atol=1e-5)
    pixels = np.concatenate([np.asarray(e.images) for e in before]) / 255
    np.testing.assert_allclose(np.ravel(stats["observation.images.image"]["mean"]), pixels.mean((0, 1, 2)), atol=0.02)


def test_places_of_several_formats_and_conventions(tmp_path):
    before = sources(tmp_path / "demos")
    options = ["--format", "lerobot", "--images", "png", "--kind", "policy"]
    main([str(tmp_path / "demos"), str(tmp_path / "played"), *options])
    main([str(tmp_path / "demos"), str(tmp_path / "turned"), *options, "--turn"])
    main([str(tmp_path / "demos"), str(tmp_path / "small"), *options, "--size", "16", "24"])
    both = load_episodes([tmp_path / "demos", tmp_path / "played"], successes_only=False)
    assert [e.name for e in both[:6]] == [e.name for e in before]
    assert [e.name for e in both[6:]] == [f"played/episode_{i:06d}" for i in range(6)]
    assert {e.kind for e in both[6:]} == {"policy"}
    with pytest.raises(ValueError, match=r"images of \S+/turned look like those of \S+/demos turned by 180 .* --turn"):
        load_episodes([tmp_path / "demos", tmp_path / "turned"], successes_only=False)
    with pytest.raises(ValueError, match=r"/demos has images of 32x48, \S+/small of 16x24: .* --size H W"):
        load_episodes([tmp_path / "demos", tmp_path / "small"], successes_only=False)
    with pytest.raises(FileNotFoundError, match="/played has no successful demonstrations"):
        load_episodes([tmp_path / "demos", tmp_path / "played"])


def test_attempts_of_a_policy_are_for_world_models(tmp_path):
    sources(tmp_path / "hdf5")
    for name, marks in (("demos", []), ("attempts", ["--kind", "policy"])):
        main([str(tmp_path / "hdf5"), str(tmp_path / "all" / name), "--format", "lerobot", "--images", "png", *marks])
    both = load_episodes(tmp_path / "all", successes_only=False)
    assert [e.kind for e in both] == ["policy"] * 6 + [e.kind for e in both[6:]] and both[6].kind == "expert"
    assert [e.success for e in both[:6]] == [e.success for e in both[6:]] == [True, True, False] * 2
    alone = load_episodes(tmp_path / "all")
    assert [e.name for e in alone] == [e.name for e in load_episodes(tmp_path / "all" / "demos")]
    apart = split_episodes(load_episodes(tmp_path / "all" / "demos", successes_only=False), 0.3, 0)[1]
    together = split_episodes(both, 0.3, 0)[1]
    assert [e.name for e in together if e.kind != "policy"] == [e.name for e in apart]


@pytest.mark.parametrize("form", ["hdf5", "lerobot"])
def test_attempts_of_one_start_stay_known_as_such(tmp_path, form):
    sources(tmp_path / "sources")
    for path in (tmp_path / "sources").rglob("*.hdf5"):
        with h5py.File(path, "a") as file:
            for i, demo in enumerate(file["data"].values()):
                demo.attrs["seed"] = i // 2
    main([str(tmp_path / "sources"), str(tmp_path / "new"), "--format", form])
    first, second = (load_episodes(tmp_path / name, successes_only=False) for name in ("sources", "new"))
    assert [e.start for e in first] == [e.start for e in second] and None not in {e.start for e in first}


def test_intended_actions_are_of_all_episodes_or_of_none(tmp_path):
    sources(tmp_path / "all")
    path = sorted((tmp_path / "all").rglob("*.hdf5"))[0]
    with h5py.File(path, "a") as file:
        for demo in file["data"].values():
            del demo["intended_actions"]
    with pytest.raises(ValueError, match="has the demonstrator's intended actions, the episodes before it have none"):
        main([str(tmp_path / "all"), str(tmp_path / "new"), "--format", "lerobot", "--images", "png"])
    assert not (tmp_path / "new").exists()


def test_units_and_sizes(tmp_path):
    before = sources(tmp_path / "a")
    with h5py.File(tmp_path / "a/suite/lift_demo.hdf5", "a") as file:
        for demo in file["data"].values():
            for name in ("actions", "intended_actions"):
                demo[name][:, 6] = 50 - 50 * demo[name][:, 6]  # 100 open, 0 closed
            demo["actions"][2:4, :6] = 0
            demo["intended_actions"][2:4, :6] = 0
            for name in ("obs/ee_states", "obs/gripper_states"):
                demo[name][3:5] = demo[name][2]  # the robot rests
    (tmp_path / "a/suite/push_demo.hdf5").unlink()
    options = ["--gripper", "100", "0", "--drop-no-ops", "--size", "16", "16", "--centre-crop", "--turn"]
    main([str(tmp_path / "a"), str(tmp_path / "b"), "--format", "lerobot", "--images", "png", *options])
    after = load_episodes(tmp_path / "b", successes_only=False)
    kept = [t for t in range(13) if t not in (2, 3)]
    np.testing.assert_allclose(after[0].intended[:, 6], before[0].intended[kept, 6], atol=1e-6)
    np.testing.assert_array_equal(after[0].actions[:, :6], before[0].actions[kept, :6])
    assert after[0].images.shape == (11, 16, 16, 3)
    true = np.asarray(before[0].images)[kept]
    np.testing.assert_array_equal(np.asarray(after[0].images)[:, 0, 0], true[:, -1, 0])  # plain colours, turned
    np.testing.assert_array_equal(np.asarray(after[0].images)[:, -1, 0], true[:, 0, 0])


def test_centre_crop_keeps_proportions():
    images = np.zeros((1, 40, 80, 3), np.uint8)
    images[:, :, 20:60] = 255
    assert (resize(images, (20, 20), centre_crop=True) == 255).all()
    assert (resize(images, (20, 20), centre_crop=False)[0, :, :3] == 0).all()


def test_absolute_is_kept(tmp_path):
    sources(tmp_path / "a")
    main([str(tmp_path / "a"), str(tmp_path / "b"), "--format", "lerobot", "--images", "png", "--absolute"])
    assert all(e.absolute for e in load_episodes(tmp_path / "b"))
    with pytest.raises(ValueError, match=r"7 action and 8 proprio .*, absolute actions, .*; LIBERO's HDF5 layout"):
        main([str(tmp_path / "b"), str(tmp_path / "c"), "--format", "hdf5"])


def test_refusals(tmp_path):
    sources(tmp_path / "a", size=(31, 48))
    arguments = [str(tmp_path / "a"), str(tmp_path / "b"), "--format", "lerobot"]
    with pytest.raises(ValueError, match=r"observation.images.image is 31 x 48; videos need even sizes: give PNG"):
        main(arguments)
    with pytest.raises(ValueError, match="has no camera 'front'; it has agentview, eye_in_hand"):
        main([*arguments, "--camera", "front"])
    main([*arguments, "--images", "png"])
    with pytest.raises(FileExistsError, match="b exists; remove it, or give another folder"):
        main([*arguments, "--images", "png"])
    with pytest.raises(SystemExit):
        main([*arguments, "--gripper", "1", "1"])


def test_cameras_of_one_name_and_other_frequencies_are_refused(tmp_path):
    sources(tmp_path / "hdf5")
    with pytest.raises(ValueError, match="has 10 fps, --fps is 20, and nothing is resampled"):
        main([str(tmp_path / "hdf5"), str(tmp_path / "a"), "--format", "lerobot", "--fps", "20"])
    main([str(tmp_path / "hdf5"), str(tmp_path / "b"), "--format", "hdf5", "--fps", "10"])
    for path in (tmp_path / "b").glob("*.hdf5"):
        with h5py.File(path, "a") as file:
            for demo in file["data"].values():
                demo["obs/image_rgb"] = demo["obs/agentview_rgb"]
    for form in ("hdf5", "lerobot"):
        with pytest.raises(ValueError, match="cameras agentview and image would both be written as observation.images"):
            main([str(tmp_path / "b"), str(tmp_path / "c"), "--format", form])


def test_hdf5_without_states_is_converted_again(tmp_path):
    sources(tmp_path / "hdf5")
    main([str(tmp_path / "hdf5"), str(tmp_path / "a"), "--format", "lerobot", "--images", "png"])
    main([str(tmp_path / "a"), str(tmp_path / "b"), "--format", "hdf5"])
    main([str(tmp_path / "b"), str(tmp_path / "c"), "--format", "hdf5", "--turn"])
    one, other = (load_episodes(tmp_path / name, successes_only=False) for name in ("b", "c"))
    assert len(one) == len(other) == 6 and {e.states for e in other} == {None}


@pytest.mark.parametrize("options", [["--images", "png"], []])
def test_large_sets_go_to_several_files(tmp_path, monkeypatch, options):
    from vlarft.data import lerobot_writer

    for name, value in (("DATA_BYTES", 1000), ("VIDEO_BYTES", 0), ("CHUNK_FILES", 2)):
        monkeypatch.setattr(lerobot_writer, name, value)
    before = sources(tmp_path / "a")
    main([str(tmp_path / "a"), str(tmp_path / "b"), "--format", "lerobot", *options])
    for folder in ("data", "videos/observation.images.image") if not options else ("data",):
        assert {p.name for p in (tmp_path / "b" / folder).iterdir()} >= {"chunk-000", "chunk-001"}
    for one, two in zip(before, every_camera(tmp_path / "b"), strict=True):
        same(one, two, 0 if options else 2)


def test_benchmark_runs_at_smoke_size(tmp_path, load_benchmark):
    benchmark = load_benchmark("data")
    results = benchmark.main(replace(benchmark.PRESETS["smoke"], out=str(tmp_path / "data.json")))
    assert json.loads((tmp_path / "data.json").read_text()) == results
    for name in ("hdf5", "hdf5 original", "lerobot mp4", "lerobot png", "rlds"):
        assert results[name]["windows_per_s"] > 0
    assert "cached_times_faster" not in results["hdf5 original"] and results["lerobot mp4"]["ahead_waits"] > 0


@pytest.mark.parametrize("images", ["video", "png"])
def test_nothing_is_written_outside_the_folder(tmp_path, images):
    """A camera's name, any text in RLDS, is part of a path in a LeRobot set."""
    episode = sources(tmp_path / "hdf5")[0]
    hostile = replace(episode, cameras={"../../../../../outside": episode.images})
    with pytest.raises(ValueError, match=r"has a camera .*\.\./outside'.* out of .*deep/dst"):
        write_lerobot(tmp_path / "deep" / "dst", iter([hostile]), 10, images=images)
    assert {path.name for path in tmp_path.iterdir()} <= {"hdf5", "deep"} and not list(tmp_path.rglob("outside"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--gripper", "nan", "1"], "argument --gripper: expected a finite number, got nan"),
        (["--crf", "999"], "argument --crf: 999: give a number in [0, 51]"),
        (["--fps", "0"], "argument --fps: 0: give a number in (0, 1e+09]"),
    ],
)
def test_numbers_have_a_range(tmp_path, options, message, capsys):
    with pytest.raises(SystemExit):
        main([str(tmp_path), str(tmp_path / "b"), "--format", "hdf5", *options])
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--format", "hdf5", "--images", "png"], "--images needs --format lerobot"),
        (["--format", "hdf5", "--codec", "h264"], "--codec needs --format lerobot"),
        (["--format", "hdf5", "--crf", "18"], "--crf needs --format lerobot"),
        (["--format", "lerobot", "--images", "png", "--codec", "av1"], "--codec is of videos: leave out --images png"),
        (["--format", "lerobot", "--images", "png", "--crf", "18"], "--crf is of videos: leave out --images png"),
    ],
)
def test_options_that_do_nothing_are_refused(tmp_path, options, message, capsys):
    with pytest.raises(SystemExit):
        main([str(tmp_path), str(tmp_path / "b"), *options])
    assert f"ERROR: {message}" in capsys.readouterr().err


def test_a_folder_is_not_written_into_its_source(tmp_path):
    sources(tmp_path / "hdf5")
    with pytest.raises(ValueError, match="hdf5/new lies in .*hdf5, whose files would be mixed with it"):
        main([str(tmp_path / "hdf5"), str(tmp_path / "hdf5" / "new"), "--format", "lerobot"])


@pytest.mark.parametrize("kind", ["hdf5", "lerobot"])
@pytest.mark.parametrize("source", ["new.tmp", "new.tmp/part"])
def test_a_source_that_the_new_folder_would_remove_is_refused(tmp_path, kind, source):
    sources(tmp_path / source)
    before = files_of(tmp_path)
    with pytest.raises(ValueError, match="new is first written as .*/new.tmp, which holds .*: give another DST"):
        main([str(tmp_path / source), str(tmp_path / "new"), "--format", kind])
    assert files_of(tmp_path) == before


def convert_on_a_full_disk(command: list[str]) -> None:
    shutil.disk_usage = lambda place: SimpleNamespace(free=1000)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))
    with pytest.raises(OSError, match=re.escape(command[1])):
        main(command)


@pytest.mark.parametrize(
    "options", [("hdf5",), ("lerobot", "--images", "png"), ("lerobot",)], ids=["hdf5", "png", "mp4"]
)
def test_a_full_disk_is_named_and_keeps_no_part(tmp_path, options):
    """Where a write fails halfway; and, for HDF5, which crashes then, before it begins."""
    sources(tmp_path / "src")
    command = [str(tmp_path / "src"), str(tmp_path / "dst"), "--format", *options]
    ranks.run(1, convert_on_a_full_disk, command)
    assert [path.name for path in tmp_path.iterdir()] == ["src"]
