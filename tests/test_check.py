"""data.check: a sound data set passes, and each defect that breaks training is named."""

import json
import sys

import av
import h5py
import numpy as np
import pytest
from PIL import Image

from vlarft.data import load_episodes
from vlarft.data.check import check, main
from vlarft.data.convert import main as convert

SIZE = 64


def robot(steps, rng):
    """A hand that follows its actions, seen by a camera in front of it: height is the row, sideways the column."""
    actions, proprio = np.zeros((steps, 7), np.float32), np.zeros((steps, 8), np.float32)
    proprio[0, 2] = 0.2
    for t in range(steps):
        actions[t, :6] = rng.uniform(-0.6, 0.6, 6) - 1.5 * (proprio[t, :6] - (0, 0, 0.2, 0, 0, 0))
        if t + 1 < steps:
            proprio[t + 1, :6] = proprio[t, :6] + 0.04 * actions[t, :6]
    actions[:, 6] = np.where(np.arange(steps) % 20 < 10, -1, 1)
    proprio[:, 6] = np.where(np.roll(actions[:, 6], 1) > 0, 0.01, 0.04)
    proprio[:, 7] = -proprio[:, 6]
    images = np.full((steps, SIZE, SIZE, 3), 90, np.uint8)
    for t, (y, z) in enumerate(proprio[:, 1:3]):
        row, column = round(SIZE * (0.9 - 2 * z)), round(SIZE * (0.5 + 2 * y))
        images[t, max(0, row - 4) : row + 4, max(0, column - 4) : column + 4] = (230, 40, 40)
    return {"actions": actions, "proprio": proprio, "images": images}


def make(root, change=lambda i, columns: None, episodes=12, steps=60, instructions=("lift it", "push it")):
    """LIBERO's layout by h5py alone; `change` edits the columns of episode i."""
    for n, text in enumerate(instructions):
        rng = np.random.default_rng(n)
        path = root / "suite" / f"task{n}_demo.hdf5"
        path.parent.mkdir(parents=True, exist_ok=True)
        with h5py.File(path, "w") as file:
            data = file.create_group("data")
            data.attrs["problem_info"] = json.dumps({"language_instruction": text})
            data.attrs["env_args"] = json.dumps({"env_kwargs": {"control_freq": 20}})
            for i in range(episodes // len(instructions)):
                columns = robot(steps, rng)
                change(i, columns)
                demo = data.create_group(f"demo_{i}")
                demo.attrs["num_samples"] = len(columns["actions"])
                demo["actions"] = columns["actions"]
                demo["obs/ee_states"], demo["obs/gripper_states"] = columns["proprio"][:, :6], columns["proprio"][:, 6:]
                demo["obs/agentview_rgb"] = columns["images"][:, ::-1, ::-1]  # as LIBERO stores them
    return root


def test_a_sound_set_passes(tmp_path, capsys):
    make(tmp_path / "demos")
    picture = tmp_path / "check.png"
    assert main([str(tmp_path / "demos"), "--picture", str(picture), "--json", str(tmp_path / "check.json")]) == 0
    text = capsys.readouterr().out
    for line in ("format: hdf5", "episodes: 12", "frames: 720", "fps: 20.0", "agentview: ['64 x 64']", "  lift it: 6"):
        assert line in text
    assert "action 0: moves proprio 0 by 0.04 per unit and step" in text and "agentview: upright (row of motion" in text
    assert "with the command:\n  open: 0.08\n  closed: 0.02" in text
    report = json.loads((tmp_path / "check.json").read_text())
    assert report["errors"] == [] and report["warnings"] == [], report["warnings"]
    assert report["facts"]["actions"]["max"][6] == 1 and len(report["facts"]["proprio"]["mean"]) == 8
    image = np.asarray(Image.open(picture))
    assert image.shape[0] >= 96 and image.shape[1] >= 3 * 96


def turn(i, c):
    c["images"] = c["images"][:, ::-1, ::-1].copy()


def idle(i, c):
    c["actions"][10:40, :6] = 0
    c["actions"][10:40, 6] = 1
    c["proprio"][10:41] = c["proprio"][10]  # the robot rests


def freeze(i, c):
    c["images"][:] = c["images"][:1]


def black(i, c):
    c["images"][:] = 0


def positions(i, c):
    c["actions"][:-1, :6] = c["proprio"][1:, :6]


def mirror(i, c):
    c["actions"][:, 0] *= -1


def late(i, c):
    c["actions"][:] = np.roll(c["actions"], 3, 0)


def constant(i, c):
    c["actions"][:, 4], c["proprio"][:, 5] = 0, 0.3


def inverted(i, c):
    c["actions"][:, 6] *= -1


def always_open(i, c):
    c["actions"][:, 6] = -1


def clip(i, c):
    c["actions"][:, 1] = np.sign(c["actions"][:, 1])


def glitch(i, c):
    c["actions"][:, 2] *= 0.02
    c["actions"][5, 2] = i == 0


def rare(i, c):
    c["actions"][:, 3] = 0
    c["actions"][7 * i : 7 * i + 1, 3] = 0.5 * (i == 0)


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (turn, "upside down? Look at the picture; convert with --turn"),
        (idle, "48% of the steps are no-ops; a policy learns to stop"),
        (freeze, "camera agentview: 100% of the frames stand still while the robot moves"),
        (black, "camera agentview: 100% of the sampled frames are black"),
        (positions, "are close to proprio [0, 1, 2, 3, 4, 5]: target positions rather than motions?"),
        (mirror, "proprio 0 moves against action 0"),
        (late, "proprio 0 moves 3 steps before action 0: are the two columns shifted?"),
        (constant, "actions [4] never change"),
        (constant, "proprio [5] never change"),
        (inverted, "the sign looks inverted; convert with --gripper 1 -1"),
        (always_open, "the gripper command is always -1"),
        (clip, "actions [1] are at their limits in over 20 % of the steps"),
        (glitch, "actions [2] have outliers"),
        (rare, "actions [3] change in less than 2 % of the steps"),
    ],
)
def test_what_usually_breaks_training_is_named(tmp_path, change, text):
    report, _ = check(make(tmp_path, change))
    assert any(text in warning for warning in report.warnings), report.warnings
    assert report.errors == []
    if change is positions:  # the one that changes what is learned
        with pytest.warns(UserWarning, match="are close to proprio .*target positions rather than motions"):
            load_episodes(tmp_path)


def test_joints_are_not_taken_for_fingers_and_heights(tmp_path):
    """DROID's Franka: eight numbers as in LIBERO, but seven joints and a gripper that is 1 when it is closed."""

    def joints(i, c):
        turn(i, c)
        c["proprio"][:, 7] = c["proprio"][:, 6] < 0.02
        c["proprio"][:, 6] = 0.79

    report, _ = check(make(tmp_path, joints))
    assert report.facts["orientation"] == {"agentview": "not judged: proprio is not LIBERO's; see the picture"}
    assert not any("inverted" in w or "upside" in w for w in report.warnings), report.warnings
    assert "mean finger opening (proprio 6, 7) with the command" not in report.facts


def test_contents_that_are_warned_about(tmp_path):
    def cut(i, c):
        for name in c:
            c[name] = c[name][: 5 if i == 0 else 20]
        if i == 1:
            c.update(robot(200, np.random.default_rng(9)))
        c["images"] = c["images"][:, :48]

    report, _ = check(make(tmp_path, cut, episodes=8, instructions=("Lift it.", "lift it")))
    text = "\n".join(report.warnings)
    for part in (
        "8 episodes: training needs far more",
        "2 episodes are shorter than a window of 9 frames and are left out: suite/task0_demo/demo_0",
        "2 episodes are more than 4 times as long as the median, first suite/task0_demo/demo_1",
        "camera agentview is 48 x 64; the models take squares",
        "instructions 'Lift it.' and 'lift it' differ only in spelling",
    ):
        assert part in text


def test_first_actions_of_zeros_are_named(tmp_path):
    """As BridgeData V2 has them, whose gripper is 1 open and 0 close: a zero then means close."""

    def first(i, c):
        c["actions"][:, 6] = c["actions"][:, 6] < 0
        c["actions"][0] = 0

    def at_rest(i, c):
        c["actions"][:, 6] = 0
        c["actions"][: 30 if i else 60] = 0

    text = "the first action of 12 of 12 episodes is zero in all dimensions, unlike later ones"
    report, _ = check(make(tmp_path / "a", first))
    assert any(text in warning for warning in report.warnings)
    options = ["--format", "lerobot", "--images", "png", "--gripper", "1", "0"]
    with pytest.warns(UserWarning, match=text):
        convert([str(tmp_path / "a"), str(tmp_path / "b"), *options])
    for number, change in enumerate((at_rest, lambda i, c: first(i, c) if i < 5 else None)):
        report, _ = check(make(tmp_path / f"other {number}", change))
        assert not any("first action of" in warning for warning in report.warnings)


def test_what_training_would_refuse_is_an_error(tmp_path):
    def short(i, c):
        for name in c:
            c[name] = c[name][:5]

    report, _ = check(make(tmp_path / "short", short))
    assert report.errors == ["no episode has the 9 frames of a window; the longest has 5"]
    report, _ = check(make(tmp_path / "one", episodes=1, instructions=("lift it",)))
    assert report.errors == ["1 episode: one is held out and one trained on, so 2 at least are needed"]
    for folder in "ab":
        make(tmp_path / "two" / folder, episodes=2)
    report, _ = check(tmp_path / "two")
    assert report.errors == [
        "two episodes have the name 'suite/task0_demo/demo_0', in folders of one name; rename one of them"
    ]


def test_failures_alone_are_named(tmp_path):
    root = make(tmp_path)
    for path in root.rglob("*.hdf5"):
        with h5py.File(path, "a") as file:
            for demo in file["data"].values():
                demo.attrs["success"] = False
    report, _ = check(root)
    assert any("0 of 12 episodes are demonstrations that succeeded: train_sft.py" in w for w in report.warnings)
    assert not any("that succeeded: train_sft.py" in w for w in check(make(tmp_path / "good"))[0].warnings)


def test_outcomes_are_counted(tmp_path):
    root = make(tmp_path, episodes=6, instructions=("lift it",))
    with h5py.File(next(root.rglob("*.hdf5")), "r+") as file:
        for i in range(4):
            file[f"data/demo_{i}"].attrs["success"] = i > 0
    assert check(root)[0].facts["outcomes"] == {"failure": 1, "success": 3, "not known, taken as success": 2}


def test_a_camera_on_the_hand_has_no_upright(tmp_path):
    root = make(tmp_path, turn)
    for path in root.rglob("*.hdf5"):
        with h5py.File(path, "r+") as file:
            for demo in file["data"].values():
                demo.move("obs/agentview_rgb", "obs/eye_in_hand_rgb")
    report, _ = check(root)
    assert "it moves with the hand" in report.facts["orientation"]["eye_in_hand"] and not report.warnings


def test_errors_set_the_exit_status(tmp_path, capsys):
    def percent(i, c):
        c["actions"][:, 6] = 50 + 50 * c["actions"][:, 6]

    root = make(tmp_path / "a", percent)
    assert main([str(root), "--picture", str(tmp_path / "a.png")]) == 1
    text = capsys.readouterr().out
    assert "ERROR: suite/task0_demo/demo_0: the gripper action (dimension 6) lies in [0, 100]" in text
    assert main([str(root), "--camera", "front", "--picture", str(tmp_path / "b.png")]) == 1
    assert "ERROR: " in (text := capsys.readouterr().out) and "has no camera 'front'; it has agentview" in text
    assert not (tmp_path / "b.png").exists()
    assert main([str(tmp_path / "nothing"), "--picture", str(tmp_path / "b.png")]) == 1
    path = root / "suite" / "task1_demo.hdf5"
    path.write_bytes(path.read_bytes()[:4000])
    assert main([str(root), "--picture", str(tmp_path / "b.png")]) == 1
    text = capsys.readouterr().out
    assert "episodes: 6" in text and "task1_demo.hdf5 is not a readable HDF5 file" in text  # the rest is reported


def test_a_picture_that_cannot_be_written_is_a_warning(tmp_path, capsys, monkeypatch):
    root, taken = make(tmp_path / "a"), tmp_path / "file"
    taken.touch()
    assert main([str(root), "--picture", str(taken / "check.png")]) == 0
    assert "warning: no picture: " in (text := capsys.readouterr().out) and str(taken) in text
    monkeypatch.setitem(sys.modules, "PIL", None)
    assert main([str(root), "--picture", str(tmp_path / "check.png")]) == 0
    text = capsys.readouterr().out
    assert 'warning: no picture: pictures need pillow: pip install -e ".[plots]"' in text and "episodes: 12" in text


def test_videos_with_few_keyframes(tmp_path):
    make(tmp_path / "a")
    convert([str(tmp_path / "a"), str(tmp_path / "b"), "--format", "lerobot"])
    assert check(tmp_path / "b")[0].warnings == []
    path = tmp_path / "b/videos/observation.images.image/chunk-000/file-000.mp4"
    with av.open(str(path)) as source:
        frames = [f.to_ndarray(format="rgb24") for f in source.decode(video=0)]
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=20, options={"g": "200"})
        stream.height, stream.width, stream.pix_fmt = SIZE, SIZE, "yuv420p"
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())
    report, _ = check(tmp_path / "b")
    assert any("frames makes random windows slow" in w for w in report.warnings), report.warnings
