"""What data sets say of outcomes, splits and kinds, in every format; bad episodes; metadata with any field wrong."""

import copy
import gzip
import json
import re
import warnings

import h5py
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import test_data
import test_lerobot
import test_rlds
from conftest import every_camera

from vlarft.data import load_episodes
from vlarft.data.check import check
from vlarft.data.convert import main as convert
from vlarft.data.episode import read_outcome

NOT_SAID = "do not say whether they succeeded"


def rlds(root, episodes, split="train"):
    """A TFDS folder with one record per episode."""
    root.mkdir(parents=True, exist_ok=True)
    content = b"".join(test_rlds.record(test_rlds.example(e)) for e in episodes)
    (root / f"droid-{split}.tfrecord-00000-of-00001").write_bytes(content)
    return root


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        *[(v, True) for v in (True, 1, 1.0, np.bool_(True), np.uint8(1), np.array([True]), "True", b"true", "1")],
        *[(v, False) for v in (False, 0, 0.0, np.bool_(False), np.int64(0), np.array([0]), "False", b" false", "0")],
        *[(v, None) for v in (None, float("nan"), np.float32("nan"))],
    ],
)
def test_outcomes_by_value(value, expected):
    assert read_outcome(value, "here") is expected


@pytest.mark.parametrize("value", ["yes", 2, -1, [True], np.array([1, 0]), {}])
def test_other_outcomes_are_refused(value):
    with pytest.raises(
        ValueError, match=r"f.h5: demo_0: success is .*, expected true, false or null; rewrite or remove"
    ):
        read_outcome(value, "f.h5: demo_0")


def test_outcomes_of_rlds(tmp_path):
    where = "gs://droid/1.0.1/AUTOLab/{}/2023-07-07/Fri_Jul_7/trajectory.h5"
    about = (
        {"file_path": [where.format("success").encode()]},
        {"file_path": [where.format("failure").encode()]},
        {"file_path": [b"/data/failures_of_mine/x.hdf5"]},  # no folder of that name
        {"recording_folderpath": [where.format("failure").encode()]},
        {"success": [0], "file_path": [b"x"]},
        {"success": [b"true"], "file_path": [where.format("failure").encode()]},
    )
    episodes = [
        {**test_rlds.content(i), **{f"episode_metadata/{k}": v for k, v in fields.items()}}
        for i, fields in enumerate(about)
    ]
    root = rlds(tmp_path / "droid" / "1.0.0", episodes)
    found = load_episodes(root, successes_only=False)
    assert [e.success for e in found] == [True, False, True, False, False, True]
    assert [e.outcome_known for e in found] == [True, True, False, True, True, True]
    assert [e.name[-1] for e in load_episodes(root)] == ["0", "2", "5"]  # what policies learn from
    assert check(root)[0].facts["kinds"] == {"expert": 3, "failed": 3}
    rlds(root, [{**episodes[0], "episode_metadata/success": [7]}])
    with pytest.raises(ValueError, match=r"record 0/episode_metadata: success is 7, expected true, false or null"):
        load_episodes(root)


def test_attributes_of_hdf5_as_text(tmp_path):
    path = test_data.write(tmp_path / "s" / "a_demo.hdf5", demos=4)
    images = load_episodes(path)[0].images[:]
    with h5py.File(path, "a") as file:
        for i, value in enumerate(("False", np.bytes_(b"true"), 0)):
            file[f"data/demo_{i}"].attrs["success"] = value
        del file["data/demo_3"].attrs["success"]
        file["data/demo_1"].attrs["kind"] = np.bytes_(b"expert")
        file["data"].attrs["image_convention"] = np.bytes_(b"upright")
    every = load_episodes(path, successes_only=False)
    assert [(e.success, e.outcome_known) for e in every] == [(False, True), (True, True), (False, True), (True, False)]
    assert [e.name[-1] for e in load_episodes(path)] == ["1", "3"]
    np.testing.assert_array_equal(every[0].images[:], images)
    with h5py.File(path, "a") as file:
        file["data/demo_0"].attrs["success"] = "mostly"
        file["data/demo_1"].attrs["kind"] = "teleop"
    with pytest.raises(
        ValueError, match=r"a_demo.hdf5: data/demo_0: success is 'mostly', expected true, false or null"
    ):
        load_episodes(path)
    with pytest.warns(
        UserWarning, match=r"a_demo.hdf5: kind is \{'teleop': 1\}, expected expert, failed, noisy, policy"
    ):
        assert [e.name[-1] for e in load_episodes(path, names=["s/a_demo/demo_3"])] == ["3"]


def test_splits_that_files_state_are_named(tmp_path):
    one = rlds(tmp_path / "droid" / "1.0.0", [test_rlds.content(0)])
    two = test_lerobot.make(tmp_path / "set", kind="image") and tmp_path / "set"
    three = test_data.write(tmp_path / "s" / "a_demo.hdf5")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for place in (one, two, three):
            load_episodes(place)
    rlds(one, [test_rlds.content(1)], "val")
    info = two / "meta/info.json"
    info.write_text(json.dumps({**json.loads(info.read_text()), "splits": {"train": "0:2", "test": "2:3"}}))
    with h5py.File(three, "a") as file:
        file["mask/train"], file["mask/valid"] = [b"demo_0", b"demo_1"], [b"demo_2"]
    for place, text in (
        (one, r"droid/1.0.0 divides its episodes into train, val: all are read"),
        (two, r"meta/info.json divides its episodes into train 0:2, test 2:3: all"),
        (three, r"a_demo.hdf5: mask divides its episodes into train, valid: all"),
    ):
        with pytest.warns(UserWarning, match=text):
            load_episodes(place)
        assert any("divides its episodes" in w for w in check(place)[0].warnings)


def test_bad_episodes_are_all_reported_and_can_be_left_out(tmp_path):
    """Three faults in a set: each alone would stop a training, one of them hours after its start."""
    root, key = tmp_path / "set", "observation.images.image"
    images, _ = test_lerobot.make(root, "v2.1", lengths=(14, 11, 20, 15, 12))
    test_lerobot.mp4(root / f"videos/chunk-000/{key}/episode_000001.mp4", images[1][:-1])
    path = root / "data/chunk-000/episode_000003.parquet"
    table = pq.read_table(path)
    bad = [[float("nan")] * 7, *table["action"].to_pylist()[1:]]
    pq.write_table(table.set_column(table.column_names.index("action"), "action", pa.array(bad)), path)
    path = root / "data/chunk-000/episode_000004.parquet"
    path.write_bytes(path.read_bytes()[:100])
    report, episodes = check(root)
    assert [e.name[-1] for e in episodes] == ["0", "2"]
    for error, text in zip(report.errors, ("11 rows, but 10 frames", "action has nan", "is not a readable parquet")):
        assert text in error
    assert len(report.errors) == 3
    assert "only 2 episodes can be read: convert with --skip-bad copies these" in report.warnings
    with pytest.raises(ValueError, match="action has nan"):
        load_episodes(root)
    with pytest.warns(
        UserWarning, match=r"3 episodes or files cannot be read and are left out:\n.*rows, but 10 frames"
    ):
        assert [e.name[-1] for e in load_episodes(root, skip_bad=True)] == ["0", "2"]
    arguments = [str(root), str(tmp_path / "good"), "--format", "lerobot", "--images", "png"]
    with pytest.raises(ValueError):
        convert(arguments)
    with pytest.warns(UserWarning, match=r"3 episodes or files cannot be read"):
        convert([*arguments, "--skip-bad"])
    assert len(load_episodes(tmp_path / "good")) == 2 and check(tmp_path / "good")[0].errors == []


def test_bad_files_are_left_out_in_other_formats(tmp_path):
    root = tmp_path / "h5"
    for name in "abc":
        path = test_data.write(root / "s" / f"{name}_demo.hdf5", demos=2)
    path.write_bytes(path.read_bytes()[:3000])
    with h5py.File(root / "s" / "a_demo.hdf5", "a") as file:
        file["data/demo_1/actions"][3, 2] = float("nan")
    with pytest.warns(
        UserWarning, match=r"2 episodes or files .*\n.*demo_1/actions has nan at row 3.*\n.*c_demo.hdf5 is not"
    ):
        names = [e.name for e in load_episodes(root, skip_bad=True)]
    assert names == ["s/a_demo/demo_0", "s/b_demo/demo_0", "s/b_demo/demo_1"]
    empty = test_rlds.content(1)
    empty["steps/observation/image"][4] = b""
    root = rlds(tmp_path / "droid" / "1.0.0", [test_rlds.content(0), empty, test_rlds.content(2)])
    with pytest.warns(UserWarning, match=r"1 episodes or files .*\n.*record 1/.*image, frame 4 is empty"):
        assert [e.name[-1] for e in load_episodes(root, skip_bad=True)] == ["0", "2"]
    with pytest.raises(FileNotFoundError, match="has no successful demonstrations"), pytest.warns(UserWarning):
        load_episodes(rlds(tmp_path / "all" / "1.0.0", [empty]), skip_bad=True)


def test_links_of_hdf5_to_other_files(tmp_path):
    store, path = (test_data.write(tmp_path / name, demos=1) for name in ("s/store.h5", "t/a_demo.hdf5"))
    with h5py.File(store, "a") as file:  # stored as LIBERO does, not compressed
        images = 255 - file["data/demo_0/obs/agentview_rgb"][:]
        del file["data/demo_0/obs/agentview_rgb"]
        file["data/demo_0/obs/agentview_rgb"] = images
    with h5py.File(path, "a") as file:
        del file["data/demo_0/obs/agentview_rgb"]
        file["data/demo_0/obs/agentview_rgb"] = h5py.ExternalLink(str(store), "data/demo_0/obs/agentview_rgb")
    np.testing.assert_array_equal(load_episodes(path)[0].images[:], images)
    store.unlink()
    with pytest.raises(
        ValueError, match=r"a_demo.hdf5: data/demo_0/obs/agentview_rgb cannot be opened .*copy the file"
    ):
        load_episodes(path)


def test_robomimic_files_are_refused_by_name(tmp_path):
    path = test_data.write(tmp_path / "s" / "image.hdf5")
    with h5py.File(path, "a") as file:
        for demo in file["data"].values():
            demo.move("obs/ee_pos", "obs/robot0_eef_pos")
            del demo["obs/ee_states"]
        del file["data"].attrs["problem_info"]  # which they do not have
    with pytest.raises(
        ValueError, match="image.hdf5 has obs/robot0_eef_pos: a robomimic file, which is not read; copy"
    ):
        load_episodes(path)


def test_copies_are_named(tmp_path):
    root = tmp_path / "all"
    for folder in ("set", "set_old"):
        test_lerobot.make(root / folder, kind="image", lengths=(14, 11))
    text = "2 of 4 episodes have the actions and proprio of another, first set_old/episode_000000 those of set/epis"
    with pytest.warns(UserWarning, match=text):
        load_episodes(root)
    assert any("2 of 4 episodes have the actions and proprio of another" in w for w in check(root)[0].warnings)


def test_other_containers_of_tfds_are_named(tmp_path):
    root = tmp_path / "droid" / "1.0.0"
    root.mkdir(parents=True)
    path = root / "droid-train.array_record-00000-of-00001"
    path.write_bytes(b"x")
    with pytest.raises(
        ValueError, match=r"array_record-00000-of-00001 is a TFDS file of another container.*as TFRecord"
    ):
        load_episodes(root)
    path.unlink()
    rlds(root, [test_rlds.content(0)])
    path = next(root.iterdir())
    path.write_bytes(gzip.compress(path.read_bytes()))
    with pytest.raises(ValueError, match=r"tfrecord-00000-of-00001 is compressed with gzip: decompress it"):
        load_episodes(root)


WRONG = ("missing", None, "x", 7, 7.5, [1], {})


def edits(row: dict):
    """Copies of a JSON object in which one field is missing or of another type."""
    for key in row:
        for value in WRONG:
            changed = copy.deepcopy(row)
            changed.pop(key) if value == "missing" else changed.update({key: value})
            yield changed


def test_any_field_of_the_metadata_may_be_wrong(tmp_path):
    """It is read all the same, or refused in one line that names the file."""
    root = tmp_path / "set"
    test_lerobot.make(root, "v2.1", kind="image", lengths=(12, 12))
    refused = 0

    def attempt() -> int:
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                for episode in load_episodes(root, "image", successes_only=False):
                    episode.images[0]
        except (ValueError, FileNotFoundError) as error:
            assert str(root) in str(error) and "\n" not in str(error), error
            return 1
        return 0

    path = root / "meta/info.json"
    info = json.loads(path.read_text()) | {"splits": {"train": "0:2"}, "vlarft": {}}
    changed = [*edits(info), [], None, 3]
    changed += [{**info, "features": features} for features in edits(info["features"])]
    for name, feature in info["features"].items():
        changed += [{**info, "features": {**info["features"], name: f}} for f in edits(feature)]
    for version in changed:
        path.write_text(json.dumps(version))
        refused += attempt()
    path.write_text(json.dumps(info))
    for name in ("episodes", "tasks"):
        path = root / f"meta/{name}.jsonl"
        text = path.read_text()
        first, *others = map(json.loads, text.splitlines())
        for row in (*edits(first), None, 3, []):
            path.write_text("\n".join(map(json.dumps, [row, *others])))
            refused += attempt()
        path.write_text(text)
    path = next((root / "data").rglob("*.parquet"))
    table = pq.read_table(path)
    for i, name in enumerate(table.column_names):
        for value in (None, "x", 7.5, b"x", ["x"], {"path": "x"}):
            pq.write_table(table.set_column(i, name, pa.array([value] * len(table))), path)
            refused += attempt()
        pq.write_table(table.drop([name]), path)
        refused += attempt()
    pq.write_table(table, path)
    assert attempt() == 0 and refused > 100


def test_png_columns_as_plain_bytes(tmp_path):
    root, key = tmp_path / "set", "observation.images.image"
    images, _ = test_lerobot.make(root, kind="image")
    test_lerobot.rewrite(root, key, lambda column: pa.array([row["bytes"] for row in column.to_pylist()]))
    for episode, true in zip(every_camera(root), images, strict=True):
        np.testing.assert_array_equal(episode.images[:], true)
    assert check(root)[0].errors == []


def test_linked_folders_are_read_once(tmp_path):
    test_data.write(tmp_path / "elsewhere" / "suite" / "a_demo.hdf5")
    root = tmp_path / "demos"
    root.mkdir()
    (root / "linked").symlink_to(tmp_path / "elsewhere" / "suite")
    (root / "again").symlink_to(tmp_path / "elsewhere" / "suite")
    (root / "loop").symlink_to(root)
    assert len(load_episodes(root)) == 3


def test_lost_demonstrations_are_counted(tmp_path):
    path = tmp_path / "s" / "a_demo.hdf5"
    test_data.write(path)
    with h5py.File(path, "a") as file:
        del file["data/demo_1"]
    with pytest.warns(UserWarning, match=r"a_demo.hdf5: num_demos is 3, and 2 demonstrations are complete"):
        assert len(load_episodes(tmp_path)) == 2


def test_lost_episodes_of_lerobot_are_counted(tmp_path):
    test_lerobot.make(tmp_path / "set", kind="image")
    test_lerobot.edit(tmp_path / "set", total_episodes=12)
    with pytest.warns(UserWarning, match=r"info.json: total_episodes is 12, the metadata list 3: the others are lost"):
        assert len(load_episodes(tmp_path / "set")) == 3


@pytest.mark.parametrize("text", [None, "  "])
def test_an_instruction_is_a_text(tmp_path, text):
    test_lerobot.make(tmp_path / "set", kind="image")
    path = tmp_path / "set" / "meta" / "tasks.parquet"
    tasks = pq.read_table(path)
    name = next(n for n in tasks.column_names if n != "task_index")
    column = pa.array([text] * len(tasks), pa.string())
    pq.write_table(tasks.set_column(tasks.column_names.index(name), name, column), path)
    with pytest.raises(ValueError, match=f"has no instruction: meta/tasks has {text!r} for its task_index"):
        load_episodes(tmp_path / "set")


def test_a_renumbered_task_is_refused(tmp_path):
    test_lerobot.make(tmp_path / "set", kind="image")
    path = tmp_path / "set" / "meta" / "tasks.parquet"
    tasks = pq.read_table(path)
    name = next(n for n in tasks.column_names if n != "task_index")
    column = pa.array(["open the drawer"] * len(tasks), pa.string())
    pq.write_table(tasks.set_column(tasks.column_names.index(name), name, column), path)
    with pytest.raises(ValueError, match="episode 0 has the task 'fold the towel' in .* is that of 'open the drawer'"):
        load_episodes(tmp_path / "set")


@pytest.mark.parametrize("label", [{"gripper_dim": []}, {"absolute": "false"}])
def test_a_label_that_says_nothing_is_refused(tmp_path, label):
    test_lerobot.make(tmp_path / "set", kind="image")
    test_lerobot.edit(tmp_path / "set", vlarft=label)
    key, value = next(iter(label.items()))
    with pytest.raises(ValueError, match=re.escape(f"info.json: vlarft has {key} {value!r}; known are absolute, gr")):
        load_episodes(tmp_path / "set")


@pytest.mark.parametrize("records", [0, 1])
def test_cut_shards_are_refused(tmp_path, records):
    root = tmp_path / "droid" / "1.0.0"
    episodes = [test_rlds.content(i) for i in range(2)]
    rlds(root, episodes[:records])
    about = {"splits": [{"name": "train", "shardLengths": ["2"]}]}
    (root / "dataset_info.json").write_text(json.dumps(about))
    with pytest.raises(ValueError, match=rf"train.tfrecord-00000-of-00001 has {records} of 2 records: the download"):
        load_episodes(tmp_path)
    rlds(root, episodes)
    assert len(load_episodes(tmp_path)) == 2
    (root / "dataset_info.json").unlink()
    rlds(root, [])
    with pytest.raises(ValueError, match="has 0 of 1 records"):
        load_episodes(tmp_path)


def test_damage_inside_a_file_is_named(tmp_path):
    path = tmp_path / "s" / "a_demo.hdf5"
    test_data.write(path)
    content, messages = path.read_bytes(), set()
    for start in range(600, len(content), 997):  # behind the header
        path.write_bytes(content[:start] + bytes(64) + content[start + 64 :])
        try:
            load_episodes(tmp_path)
        except ValueError as error:
            assert str(path) in str(error)
            messages.add(str(error).partition(" cannot be read (")[2][:8])
    assert messages & {"KeyError", "RuntimeE", "OSError:"}


def test_images_that_rows_name_stay_inside_the_set(tmp_path):
    test_lerobot.make(tmp_path / "set", kind="image")
    (tmp_path / "secret.png").write_bytes(test_lerobot.png(np.zeros((64, 64, 3), np.uint8))["bytes"])
    key = "observation.images.image"
    for name in ("../secret.png", str(tmp_path / "secret.png"), "/dev/zero", "nowhere.png"):
        rows = [{"bytes": None, "path": name}]
        test_lerobot.rewrite(tmp_path / "set", key, lambda c, rows=rows: pa.array(rows * len(c)))
        with pytest.raises(ValueError, match=f"{key} names the image '{name}': there is no such file in"):
            load_episodes(tmp_path / "set")[0].images[0]


def test_images_of_too_many_pixels_are_refused(tmp_path, monkeypatch):
    from PIL import Image

    test_lerobot.make(tmp_path / "set", kind="image")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    with pytest.raises(ValueError, match=r"episode 0: observation.images.image, frame 0 is not a readable image"):
        load_episodes(tmp_path / "set")[0].images[0]
