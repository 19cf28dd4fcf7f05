"""data.view: what a file for rerun holds of episodes of each format, read back by rerun itself; errors."""

import io
import json
import subprocess
import sys

import numpy as np
import pytest
import test_convert
import test_lerobot
import test_rlds
from conftest import every_camera
from PIL import Image

from vlarft.data import view
from vlarft.run.script import clear_errors

ACTIONS = ["x", "y", "z", "roll", "pitch", "yaw", "gripper"]


def lerobot(root):
    """Names of actions, and an outcome in the metadata of none."""
    test_lerobot.make(root / "robot")
    path = root / "robot/meta/info.json"
    info = json.loads(path.read_text())
    info["features"]["action"]["names"] = {"motors": ACTIONS}
    path.write_text(json.dumps(info))


def rlds(root):
    metadata = [{}, {"episode_metadata/success": [0]}, {"episode_metadata/success": [1]}]
    test_rlds.make(root, [{**test_rlds.content(i), **about} for i, about in enumerate(metadata)])


SOURCES = {"hdf5": test_convert.sources, "lerobot": lerobot, "rlds": rlds}
OUTCOMES = {
    "hdf5": ["success", "success", "failure"] * 2,
    "lerobot": ["not known"] * 3,
    "rlds": ["not known", "failure", "success"],
}


def read_back(path):
    """(entity, what) -> values, one a step or one in all, of the only recording; and the timelines of each."""
    chunk = pytest.importorskip("rerun.chunk", reason="a rerun-sdk that reads its files is not installed")
    reader = chunk.RrdReader(str(path))
    assert len(reader.recordings()) == len(reader.blueprints()) == 1
    values, times = {}, {}
    for part in reader.stream():
        batch = part.to_record_batch().to_pydict()
        for name in (n for n in batch if ":" in n):
            values.setdefault((part.entity_path, name), []).extend(batch[name])
            times.setdefault(part.entity_path, {}).update({n: batch[n] for n in part.timeline_names})  # static: none
    return values, times


@pytest.mark.parametrize("kind", SOURCES)
def test_rerun_reads_what_was_there(tmp_path, kind, capsys):
    rerun = pytest.importorskip("rerun", reason="rerun-sdk is not installed")
    SOURCES[kind](tmp_path / "set")
    episodes = every_camera(tmp_path / "set")
    view.main([str(tmp_path / "set"), "--out", str(tmp_path / "new/it.rrd"), "--episodes", "99"])
    assert f"{len(episodes)} episodes -> " in capsys.readouterr().out
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["it.rrd"]
    values, times = read_back(tmp_path / "new/it.rrd")
    outcomes = []
    for e in episodes:
        root = rerun.new_entity_path(e.name.split("/"))
        text = {n: values[f"{root}/{n}", "TextDocument:text"] for n in ("instruction", "outcome", "kind")}
        assert text["instruction"] == [[e.instruction]] and text["kind"] == [[e.kind]]
        outcomes += text["outcome"][0]
        tables = {"actions": e.actions, "proprio": e.proprio}
        tables |= {"intended_actions": e.intended} if kind == "hdf5" else {}
        for name, table in tables.items():
            np.testing.assert_array_equal(values[f"{root}/{name}", "Scalars:scalars"], table)
            expected = [str(i) for i in range(table.shape[1])]
            expected = ACTIONS if kind == "lerobot" and name == "actions" else expected
            assert values[f"{root}/{name}", "SeriesLines:names"] == [expected]
        assert ((f"{root}/intended_actions", "Scalars:scalars") in values) == (kind == "hdf5")
        clock = times[f"{root}/actions"]
        assert clock["step"] == list(range(len(e))) and set(clock) == {"step", *["time"] * (e.fps is not None)}
        if e.fps is not None:
            assert clock["time"][-1].total_seconds() == pytest.approx((len(e) - 1) / e.fps, abs=1e-5)
        for name, images in e.cameras.items():
            files = values[f"{root}/cameras/{name}", "EncodedImage:blob"]
            shown = np.stack([np.asarray(Image.open(io.BytesIO(bytes(file)))) for (file,) in files])
            assert shown.shape == images.shape
            assert np.abs(shown.astype(int) - np.asarray(images)).mean() < 4  # JPEG's loss
    assert outcomes == OUTCOMES[kind]
    assert len([1 for _, name in values if name == "EncodedImage:blob"]) == sum(len(e.cameras) for e in episodes)


def test_rerun_that_is_turned_off_is_named(tmp_path, monkeypatch):
    pytest.importorskip("rerun", reason="rerun-sdk is not installed")
    test_convert.sources(tmp_path / "set")
    monkeypatch.setenv("RERUN", "off")
    with pytest.raises(ValueError, match="the environment variable RERUN"):
        view.write_rrd(tmp_path / "it.rrd", view.pick(tmp_path / "set", 1), "set")
    assert not (tmp_path / "it.rrd").exists()


def test_a_full_disk_leaves_no_part_of_a_file(tmp_path, monkeypatch):
    pytest.importorskip("rerun", reason="rerun-sdk is not installed")
    test_convert.sources(tmp_path / "set")

    def full(path, content):
        path.open("wb").write(content[:100])
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch, pytest.raises(OSError, match="could not write .*it.rrd"):
        patch.setattr("pathlib.Path.write_bytes", full)
        view.write_rrd(tmp_path / "it.rrd", view.pick(tmp_path / "set", 1), "set")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["set"]


def test_episodes_are_from_all_over_the_data_set(tmp_path):
    names = [e.name for e in test_convert.sources(tmp_path)]
    assert [e.name for e in view.pick(tmp_path, 4)] == [names[i] for i in (0, 2, 3, 5)]
    assert [e.name for e in view.pick(tmp_path, 1)] == names[:1]
    assert [e.name for e in view.pick(tmp_path, 99)] == names
    assert list(view.pick(tmp_path, 1)[0].cameras) == ["agentview", "eye_in_hand"]


def test_names_of_curves(tmp_path):
    lerobot(tmp_path)
    curves = view.curves(view.pick(tmp_path, 1)[0])
    assert list(curves) == ["actions", "proprio"]
    assert curves["actions"][1] == ACTIONS and curves["proprio"][1] == list("01234567")
    test_convert.main([str(tmp_path), str(tmp_path.with_name("copy")), "--format", "lerobot"])
    assert view.curves(view.pick(tmp_path.with_name("copy"), 1)[0])["actions"][1] == ACTIONS


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nothing"], "nothing does not exist"),
        (["empty"], "empty has no "),
        (["none"], "none has no complete demonstrations"),
        (["nothing", "--out", "it.mp4"], "it.mp4 must end in .rrd"),
    ],
)
def test_errors_take_one_line(tmp_path, monkeypatch, capsys, arguments, message):
    (tmp_path / "empty").mkdir()
    test_convert.sources(tmp_path / "none")
    for path in (tmp_path / "none").rglob("*.hdf5"):
        with test_convert.h5py.File(path, "a") as file:
            for name in list(file["data"]):
                del file["data"][name]
            file["data"].attrs["num_demos"] = 0
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(view, "import_rerun", lambda: None)  # these do not reach it
    with pytest.raises(SystemExit) as ended, clear_errors():
        view.main(arguments)
    text = capsys.readouterr().err
    assert ended.value.code == 2 and len(text.splitlines()) == 1 and text.startswith("ERROR: ") and message in text
    assert not list(tmp_path.glob("*.rrd*"))


def test_the_command_ends_in_its_error(tmp_path):
    command = [sys.executable, "-m", "vlarft.data.view", "nothing", "--out", "it.mp4"]
    ended = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert (
        ended.returncode == 2
        and ended.stderr == "ERROR: --out it.mp4 must end in .rrd, by which the viewer knows its files\n"
    )


def test_without_rerun_the_error_says_what_installs_it(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "rerun", None)
    with pytest.raises(ImportError, match=r'rerun-sdk: pip install -e "\.\[view\]"'):
        view.main([str(tmp_path / "nothing")])
