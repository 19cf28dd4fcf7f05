"""LeRobot data sets made with pyarrow and PyAV alone: read, and refused if they are broken."""

import importlib.util
import io
import json
import math
import os
import warnings
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import every_camera
from PIL import Image

from vlarft.data import WindowSampler, load_episodes, video
from vlarft.data.check import check, sample_picture
from vlarft.data.convert import main as convert
from vlarft.data.episodes import read_episodes

FPS, SIZE = 10, 32
TASKS = ["fold the towel", "open the drawer"]


def pictures(steps: int, seed: int) -> np.ndarray:
    """A bright square that wanders over a dark ground: sharp frames that a codec keeps apart."""
    rng = np.random.default_rng(seed)
    images = np.full((steps, SIZE, SIZE, 3), 30, np.uint8)
    for t in range(steps):
        images[t, :, :, 2] = 4 * t % 256  # the frame's number, in blue
        y, x = rng.integers(0, SIZE - 8, 2)
        images[t, y : y + 8, x : x + 8] = (220, 120, 40)
    return images


def columns(steps: int, seed: int, task: int) -> dict:
    rng = np.random.default_rng(seed)
    actions = rng.uniform(-1, 1, (steps, 7)).astype(np.float32)
    actions[:, 6] = np.where(np.arange(steps) < steps // 2, -1, 1)
    return {
        "action": actions,
        "observation.state": rng.normal(size=(steps, 8)).astype(np.float32),
        "timestamp": (np.arange(steps) / FPS).astype(np.float32),
        "frame_index": np.arange(steps),
        "episode_index": np.full(steps, seed),
        "task_index": np.full(steps, task),
    }


def png(image: np.ndarray) -> dict:
    file = io.BytesIO()
    Image.fromarray(image).save(file, "png")
    return {"bytes": file.getvalue(), "path": "frame.png"}


def table(parts: list[dict], images: list[np.ndarray] | None, key: str) -> pa.Table:
    merged = {name: np.concatenate([p[name] for p in parts]) for name in parts[0]}
    arrays = {}
    for name, values in merged.items():
        if values.ndim == 2:
            flat = pa.array(values.ravel())
            arrays[name] = pa.FixedSizeListArray.from_arrays(flat, values.shape[1])
        else:
            arrays[name] = pa.array(values)
    if images is not None:
        arrays[key] = pa.array([png(image) for video in images for image in video])
    return pa.table(arrays)


def mp4(path: Path, images: np.ndarray, fps: int = FPS, codec: str = "libx264", **options: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=fps, options={"crf": "8", **options})
        stream.height, stream.width, stream.pix_fmt = *images.shape[1:3], "yuv444p" if codec == "libx264" else "yuv420p"
        for image in images:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(image, format="rgb24")))
        container.mux(stream.encode())


def info(version: str, kind: str, key: str, **extra) -> dict:
    new = version == "v3.0"
    return {
        "codebase_version": version,
        "fps": FPS,
        "chunks_size": 1000,
        "features": {
            "action": {"dtype": "float32", "shape": [7]},
            "observation.state": {"dtype": "float32", "shape": [8]},
            key: {"dtype": kind, "shape": [SIZE, SIZE, 3], "names": ["height", "width", "channel"]},
        },
        "data_path": "data/chunk-{chunk_index:03d}/file-{file_index:03d}.parquet"
        if new
        else "data/chunk-{episode_chunk:03d}/episode_{episode_index:06d}.parquet",
        "video_path": "videos/{video_key}/chunk-{chunk_index:03d}/file-{file_index:03d}.mp4"
        if new
        else "videos/chunk-{episode_chunk:03d}/{video_key}/episode_{episode_index:06d}.mp4",
        **extra,
    }


def make(root: Path, version="v3.0", kind="video", lengths=(14, 11, 20), key="observation.images.image", **options):
    """A data set of one camera; v3.0 with all episodes in one data and one video file. Returns images and columns."""
    images = [pictures(n, i) for i, n in enumerate(lengths)]
    parts = [columns(n, i, i % 2) for i, n in enumerate(lengths)]
    stored = images if kind == "image" else None
    (root / "meta").mkdir(parents=True)
    (root / "meta" / "info.json").write_text(json.dumps(info(version, kind, key)))
    if version == "v3.0":
        starts = np.cumsum([0, *lengths])
        (root / "data/chunk-000").mkdir(parents=True)
        pq.write_table(table(parts, stored, key), root / "data/chunk-000/file-000.parquet", row_group_size=16)
        episodes = {
            "episode_index": list(range(len(lengths))),
            "tasks": [[TASKS[i % 2]] for i in range(len(lengths))],
            "length": list(lengths),
            "data/chunk_index": [0] * len(lengths),
            "data/file_index": [0] * len(lengths),
            "dataset_from_index": starts[:-1].tolist(),
            "dataset_to_index": starts[1:].tolist(),
            "stats/action/min": [[0.0]] * len(lengths),
        }
        if kind == "video":
            for n in ("chunk", "file"):
                episodes[f"videos/{key}/{n}_index"] = [0] * len(lengths)
            episodes[f"videos/{key}/from_timestamp"] = (starts[:-1] / FPS).tolist()
            episodes[f"videos/{key}/to_timestamp"] = (starts[1:] / FPS).tolist()
            mp4(root / f"videos/{key}/chunk-000/file-000.mp4", np.concatenate(images), **options)
        (root / "meta/episodes/chunk-000").mkdir(parents=True)
        pq.write_table(pa.table(episodes), root / "meta/episodes/chunk-000/file-000.parquet")
        tasks = pa.table({"task_index": [0, 1], "__index_level_0__": TASKS})  # as pandas writes an unnamed index
        pq.write_table(tasks, root / "meta/tasks.parquet")
    else:
        for i, part in enumerate(parts):
            path = root / f"data/chunk-000/episode_{i:06d}.parquet"
            path.parent.mkdir(parents=True, exist_ok=True)
            pq.write_table(table([part], None if stored is None else [stored[i]], key), path)
            if kind == "video":
                mp4(root / f"videos/chunk-000/{key}/episode_{i:06d}.mp4", images[i], **options)
        lines = [{"episode_index": i, "tasks": [TASKS[i % 2]], "length": n} for i, n in enumerate(lengths)]
        (root / "meta/episodes.jsonl").write_text("\n".join(map(json.dumps, lines)))
        lines = [{"task_index": i, "task": text} for i, text in enumerate(TASKS)]
        (root / "meta/tasks.jsonl").write_text("\n".join(map(json.dumps, lines)))
    return images, parts


@pytest.mark.parametrize("version", ["v3.0", "v2.1"])
@pytest.mark.parametrize("kind", ["video", "image"])
def test_episodes_are_what_was_written(tmp_path, version, kind):
    images, parts = make(tmp_path / "towels", version, kind)
    episodes = load_episodes(tmp_path)  # "agentview" is LIBERO's name of "image"
    assert [e.name for e in episodes] == [f"towels/episode_{i:06d}" for i in range(3)]
    assert [e.instruction for e in episodes] == [TASKS[0], TASKS[1], TASKS[0]]
    for episode, true, part in zip(episodes, images, parts):
        assert (episode.fps, list(episode.cameras), episode.images.shape) == (FPS, ["image"], true.shape)
        np.testing.assert_array_equal(episode.actions, part["action"])
        np.testing.assert_array_equal(episode.proprio, part["observation.state"])
        if kind == "image":
            np.testing.assert_array_equal(episode.images, true)
        else:
            off = np.abs(np.asarray(episode.images).astype(int) - true)
            assert off.mean() < 3 and off.max() < 40
    camera = load_episodes(tmp_path, "observation.images.image", names=["towels/episode_000002"])
    assert len(camera) == 1 and len(camera[0]) == 20


@pytest.mark.parametrize("options", [{"g": "2"}, {"g": "250", "bf": "3"}, {"codec": "libsvtav1", "g": "2"}])
def test_any_window_of_a_video_is_the_right_one(tmp_path, options):
    """Windows in random order, with and without room for decoded frames, show the frames that their number names."""
    images, _ = make(tmp_path / "set", lengths=(40, 30, 35), **options)
    rng = np.random.default_rng(0)
    for cache in (0, 40 * SIZE * SIZE * 3, 1 << 30):
        episodes = load_episodes(tmp_path, cache_bytes=cache)
        for _ in range(25):
            i = rng.integers(3)
            t = rng.integers(len(images[i]) - 9)
            window = episodes[i].images[t : t + 9]
            assert window.shape == (9, SIZE, SIZE, 3)
            blue = np.median(window[..., 2].reshape(9, -1), 1) / 4
            assert np.abs(blue - np.arange(t, t + 9)).max() < 0.9
        assert episodes[0].images.budget.used <= cache
        np.testing.assert_array_equal(episodes[1].images[-1], np.asarray(episodes[1].images)[-1])


def test_videos_from_elsewhere_survive_our_writer_frame_by_frame(tmp_path):
    """mp4 made by PyAV, through our reader and writer, decoded by PyAV: the frames, their number, order and times.

    Tolerance, two encodings: 6 of 255 in the mean over a frame; each is nearest to the true one of its number.
    """
    images, parts = make(tmp_path / "set", lengths=(40, 30, 35), g="250", bf="3")
    convert([str(tmp_path / "set"), str(tmp_path / "again"), "--format", "lerobot"])
    (path,) = (tmp_path / "again").rglob("*.mp4")
    with av.open(str(path)) as container:
        frames = list(container.decode(video=0))
    decoded = np.stack([frame.to_ndarray(format="rgb24") for frame in frames])
    assert decoded.shape == (105, SIZE, SIZE, 3)
    np.testing.assert_allclose([frame.time for frame in frames], np.arange(105) / FPS, atol=1e-6)
    for true, found in zip(images, np.split(decoded, (40, 70)), strict=True):
        off = np.abs(found.astype(int)[:, None] - true).mean((2, 3, 4))  # decoded x true
        assert off.diagonal().max() < 6
        np.testing.assert_array_equal(off.argmin(1), np.arange(len(true)))
    again = load_episodes(tmp_path / "again")
    assert [len(e) for e in again] == [40, 30, 35]
    np.testing.assert_array_equal(np.concatenate([np.asarray(e.images) for e in again]), decoded)
    for episode, part in zip(again, parts, strict=True):
        np.testing.assert_array_equal(episode.actions, part["action"])
        np.testing.assert_array_equal(episode.proprio, part["observation.state"])


def test_windows_decode_ahead_and_are_the_same(tmp_path):
    make(tmp_path / "set", lengths=(40, 30))
    ahead, plain = (WindowSampler(load_episodes(tmp_path), 9, 8, 15, num_workers=n) for n in (2, 0))
    for step in range(4):
        for part in ((0, 2), (1, 2)):
            one, two = ahead.batch(4, 7, step, part=part), plain.batch(4, 7, step, part=part)
            assert (one.index == two.index).all() and (one.frames == two.frames).all()
            assert (one.context_frame == two.context_frame).all()
    assert set(ahead._ahead) == {(4, (7, 4), (part, 2)) for part in (0, 1)}  # what comes next is under way


def test_an_open_video_does_not_cross_a_fork(tmp_path, monkeypatch):
    """Parent and child would move one another's place in the file."""
    make(tmp_path / "set")
    (path,) = tmp_path.rglob("*.mp4")
    own = video._decoders.get(path)
    assert video._decoders.get(path) is own
    monkeypatch.setattr(os, "getpid", lambda: -1)
    assert video._decoders.get(path) is not own


def test_other_widths_and_names_are_read(tmp_path):
    """The keys of openpi's copies of LIBERO; a robot of other widths."""
    make(tmp_path / "set", "v2.1", "image")
    path = tmp_path / "set/meta/info.json"
    text = path.read_text().replace('"action"', '"actions"').replace('"observation.state"', '"state"')
    path.write_text(text)
    for file in (tmp_path / "set/data").rglob("*.parquet"):
        old = pq.read_table(file)
        wide = pa.array([[*row, 0.5] for row in old["observation.state"].to_pylist()])
        new = old.drop_columns(["action", "observation.state"]).append_column("actions", old["action"])
        pq.write_table(new.append_column("state", wide), file)
    assert load_episodes(tmp_path)[0].proprio.shape == (14, 9)


def edit(root: Path, **fields) -> None:
    path = root / "meta/info.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))


def rewrite(root: Path, column: str, values) -> None:
    path = root / "data/chunk-000/file-000.parquet"
    old = pq.read_table(path)
    pq.write_table(old.set_column(old.column_names.index(column), column, values(old[column])), path)


def test_broken_sets_are_refused(tmp_path):
    root = tmp_path / "set"
    make(root)
    meta, video = root / "meta/info.json", root / "videos/observation.images.image/chunk-000/file-000.mp4"
    with pytest.raises(ValueError, match=r"info.json has no camera 'front'; it has image: give --camera one of them"):
        load_episodes(root, "front")
    good = json.loads(meta.read_text())
    edit(root, fps=30)
    with pytest.raises(ValueError, match=r"file-000.parquet: episode 0: timestamp of frame 1 .* expected 0.0333333"):
        load_episodes(root)
    edit(root, **{**good, "codebase_version": "v1.6"})
    with pytest.raises(ValueError, match=r"info.json: codebase_version 'v1.6', expected one of v2.0, v2.1, v3.0"):
        load_episodes(root)
    edit(root, **{**good, "features": {k: v for k, v in good["features"].items() if k != "action"}})
    with pytest.raises(ValueError, match=r"info.json has no feature action or actions; it has observation.images"):
        load_episodes(root)
    edit(root, **good)
    content = video.read_bytes()
    video.write_bytes(content[: len(content) // 2])
    with pytest.raises(ValueError, match=r"file-000.mp4 is not a readable video .* truncated"):
        load_episodes(root)
    mp4(video, np.concatenate([pictures(n, 0) for n in (14, 11, 20)]), fps=2 * FPS)
    with pytest.raises(
        ValueError, match=r"file-000.mp4: episode 0: observation.images.image has 20 fps, meta/info.json .* 10"
    ):
        load_episodes(root)
    mp4(video, pictures(30, 0))
    with pytest.raises(
        ValueError, match=r"file-000.mp4: episode 2: .* 20 rows, but 5 frames in the video: it is truncated"
    ):
        load_episodes(root)
    video.unlink()
    with pytest.raises(FileNotFoundError, match=r"file-000.mp4 is missing; the data set was copied without it"):
        load_episodes(root)


def test_broken_tables_are_refused(tmp_path):
    root = tmp_path / "set"
    make(root, kind="image")
    path = root / "data/chunk-000/file-000.parquet"
    content = path.read_bytes()

    def bad(column):
        rows = column.to_pylist()
        rows[17][2] = float("nan")
        return pa.array(rows)

    rewrite(root, "action", bad)
    with pytest.raises(ValueError, match=r"file-000.parquet: episode 1: action has nan at row 3, column 2"):
        load_episodes(root)
    path.write_bytes(content)
    rewrite(root, "action", lambda c: pa.array([[*row[:6], 50 * row[6]] for row in c.to_pylist()]))
    with pytest.raises(
        ValueError,
        match=r"set/episode_000000: the gripper action \(dimension 6\) lies in \[-50, 50\]; .*--gripper OPEN",
    ):
        load_episodes(root)
    rewrite(root, "action", lambda c: pa.array([[*row[:6], float(row[6] > 0)] for row in c.to_pylist()]))
    with pytest.raises(
        ValueError, match=r"gripper action \(dimension 6\) lies in \[0, 1\], never below 0; expected -1 open"
    ):
        load_episodes(root)
    path.write_bytes(content)
    for values, text in (
        (lambda c: pa.array([row[: 6 + (t > 20)] for t, row in enumerate(c.to_pylist())]), r"rows of \[6, 7\] numbers"),
        (lambda c: pa.array([None, *c.to_pylist()[1:]]), r"action has 1 empty rows"),
        (lambda c: pa.array(["up"] * len(c)), r"action holds string, expected numbers"),
    ):
        rewrite(root, "action", values)
        with pytest.raises(ValueError, match=rf"file-000.parquet: action .*{text}|file-000.parquet.*{text}"):
            load_episodes(root)
    path.write_bytes(content)
    rewrite(root, "episode_index", lambda c: pa.array([min(v, 1) for v in c.to_pylist()]))
    with pytest.raises(ValueError, match=r"episode 1 has 31 rows, the metadata say 11 in a row"):
        load_episodes(root)
    path.write_bytes(content)
    table, good = pq.read_table(tasks := root / "meta" / "tasks.parquet"), tasks.read_bytes()
    names = [name for name in table.column_names if name != "task_index"]
    texts = pa.array([b"\x84"] * len(table)).view(pa.string())  # no UTF-8
    pq.write_table(table.set_column(table.column_names.index(*names), *names, texts), tasks)
    with pytest.raises(ValueError, match=r"tasks.parquet cannot be read \(UnicodeDecodeError: .* is damaged"):
        load_episodes(root)
    tasks.write_bytes(good)
    path.write_bytes(content[:-100])
    with pytest.raises(ValueError, match=r"file-000.parquet is not a readable parquet file"):
        load_episodes(root)
    path.write_bytes(content)
    rewrite(root, "observation.images.image", lambda c: pa.array([{"bytes": b"no picture", "path": ""}] * len(c)))
    with pytest.raises(
        ValueError, match=r"file-000.parquet: episode 0: observation.images.image, frame 0 is not a read"
    ):
        load_episodes(root)[0].images[0]


def test_states_are_not_there(tmp_path):
    make(tmp_path / "set", kind="image")
    with pytest.raises(ValueError, match=r"\(lerobot\) holds no simulator states; they are in HDF5 demonstrations"):
        load_episodes(tmp_path, with_states=True)


def test_folders_of_several_formats_or_rates_are_refused(tmp_path):
    make(tmp_path / "a", kind="image")
    make(tmp_path / "more" / "a", kind="image")
    with pytest.raises(ValueError, match=r"two episodes of the name 'a/episode_000000', in folders of one name"):
        load_episodes(tmp_path)
    (tmp_path / "more" / "a").rename(tmp_path / "more" / "b")
    edit(tmp_path / "more" / "b", fps=FPS * 2)
    path = tmp_path / "more/b/data/chunk-000/file-000.parquet"
    old = pq.read_table(path)
    times = pa.array(np.asarray(old["timestamp"]) / 2)
    pq.write_table(old.set_column(old.column_names.index("timestamp"), "timestamp", times), path)
    with pytest.raises(ValueError, match=r"episodes differ in fps: 10.0 in a/episode_000000, 20.0 in b/episode_000000"):
        load_episodes(tmp_path)
    (tmp_path / "x.hdf5").touch()
    with pytest.raises(ValueError, match=r"has demonstrations of several formats \(lerobot: .*; hdf5: .*x.hdf5\)"):
        load_episodes(tmp_path)


def test_a_video_that_lost_a_frame_is_refused(tmp_path):
    """One frame in 150 is late: the fps in the header are right within a percent, the frames are not."""
    images, _ = make(tmp_path / "set", lengths=(150,))
    path = tmp_path / "set/videos/observation.images.image/chunk-000/file-000.mp4"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=FPS)
        stream.height, stream.width, stream.pix_fmt = SIZE, SIZE, "yuv444p"
        for t, image in enumerate(images[0]):
            frame = av.VideoFrame.from_ndarray(image, format="rgb24")
            frame.pts, frame.time_base = t + (t > 70), Fraction(1, FPS)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    with pytest.raises(
        ValueError, match=r"frame 71 should be at 7.1000 s, the video has one at 7.2000 s; .* differ in fps"
    ):
        load_episodes(tmp_path)
    with pytest.raises(ValueError, match="frame 71 should be at"):  # without the check, as another camera is read
        next(read_episodes(tmp_path, None, lambda *_: True)).images[3:12]


def amend(root: Path, version: str, **fields: list) -> None:
    """Give the episodes further metadata fields."""
    if version == "v3.0":
        path = root / "meta/episodes/chunk-000/file-000.parquet"
        rows = pq.read_table(path).to_pylist()
    else:
        path = root / "meta/episodes.jsonl"
        rows = [json.loads(line) for line in path.read_text().splitlines()]
    rows = [{**row, **{k: v[i] for k, v in fields.items()}} for i, row in enumerate(rows)]
    if version == "v3.0":
        pq.write_table(pa.Table.from_pylist(rows), path)
    else:
        path.write_text("\n".join(map(json.dumps, rows)))


def numbers(episodes) -> list[int]:
    return [int(e.name[-1]) for e in episodes]


VERSIONS = pytest.mark.parametrize("version", ["v2.0", "v2.1", "v3.0"])


@VERSIONS
def test_outcomes_mean_the_same_in_all_versions(tmp_path, version):
    root = tmp_path / "set"
    make(root, version, kind="image", lengths=(14, 11, 20))
    amend(root, version, success=[True, False, True], kind=[None, "expert", "noisy"])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert numbers(load_episodes(root)) == [0]
        every = load_episodes(root, successes_only=False)
    assert [(e.success, e.kind) for e in every] == [(True, "expert"), (False, "expert"), (True, "noisy")]
    assert check(root)[0].facts["kinds"] == {"expert": 1, "failed": 1, "noisy": 1}
    amend(root, version, success=[None, 0.0, float("nan")], kind=["expert", "expert", "teleop"])
    with pytest.warns(UserWarning) as caught:
        assert numbers(load_episodes(root)) == [0]
    second, first = sorted(str(w.message) for w in caught if str(root) in str(w.message))
    assert "kind is {'teleop': 1}, expected expert, failed, noisy, policy: policies do not learn from these" in first
    assert "2 of 3 episodes do not say whether they succeeded (success is null), first episode 0: taken as" in second
    report = check(root)[0]
    assert first in report.warnings and second in report.warnings and not report.errors
    amend(root, version, success=["yes", "no", "yes"])
    with pytest.raises(ValueError, match=r"meta/episodes.*: episode 0: success is 'yes', expected true, false or null"):
        load_episodes(root)


@VERSIONS
@pytest.mark.parametrize("listed", [False, True])
def test_outcomes_of_frames(tmp_path, version, listed):
    """`next.success` says what the metadata do not; rewards are named, and decide nothing."""
    root = tmp_path / "set"
    make(root, version, kind="image", lengths=(14, 11, 20))

    def frames(name, last):
        """The feature is 0 but in the last frame of each episode."""
        features = json.loads((root / "meta/info.json").read_text())["features"]
        edit(root, features={**features, name: {"dtype": "bool", "shape": [1]}})
        for path in (root / "data").rglob("*.parquet"):
            table = pq.read_table(path)
            index = np.asarray(table["episode_index"])
            ends = np.append(np.flatnonzero(np.diff(index)), len(index) - 1)
            values = [last[e] if t in ends else (None if last[e] is None else 0 * last[e]) for t, e in enumerate(index)]
            values = [bool(v) if isinstance(last[0], bool) and v is not None else v for v in values]
            pq.write_table(table.append_column(name, pa.array([[v] for v in values] if listed else values)), path)

    frames("next.reward", [0.0, 0.5, 1.0])
    with pytest.warns(UserWarning, match=r"1 of 3 episodes never earn a reward \(next.reward\), first episode 0; outc"):
        assert numbers(load_episodes(root)) == [0, 1, 2]
    frames("next.success", [True, False, None])
    with pytest.warns(UserWarning, match=r"1 of 3 episodes .* succeeded \(next.success is null\), first episode 2"):
        assert numbers(load_episodes(root)) == [0, 2]
    amend(root, version, success=[None, True, False])  # the metadata come first
    assert numbers(load_episodes(root)) == [0, 1]


def second_camera(root: Path, version: str, lengths=(14, 11, 20), without=()) -> str:
    """Add the camera wrist, but not to the episodes `without`; its videos are not there."""
    features, key = json.loads((root / "meta/info.json").read_text())["features"], "observation.images.wrist"
    edit(root, features={**features, key: features["observation.images.image"]})
    if version == "v3.0":
        starts = (np.cumsum([0, *lengths]) / FPS).tolist()
        fields = {"chunk_index": [0] * 3, "file_index": [0] * 3, "from_timestamp": starts[:-1]}
        for name, values in fields.items():
            values = [None if i in without else v for i, v in enumerate(values)]
            amend(root, version, **{f"videos/{key}/{name}": values})
    return key


@pytest.mark.parametrize("version", ["v2.1", "v3.0"])
def test_files_of_other_cameras_are_not_read(tmp_path, version):
    root = tmp_path / "set"
    images, _ = make(root, version)
    key = second_camera(root, version)
    episodes = load_episodes(root, "image")
    assert [list(e.cameras) for e in episodes] == [["image"]] * 3
    assert [list(e.cameras) for e in every_camera(root)] == [["image", "wrist"]] * 3
    assert episodes[1].images[4:6].shape == (2, SIZE, SIZE, 3)
    assert check(root, "image")[0].errors == [] and list(check(root, "image")[0].facts["cameras"]) == ["image"]
    with pytest.raises(FileNotFoundError, match=rf"video .*{key}.*mp4 is missing; the data set was copied without it"):
        load_episodes(root, "wrist")
    with pytest.raises(FileNotFoundError, match=rf"{key}.*mp4 is missing"):
        every_camera(root)[0].cameras["wrist"][0]
    report, left = check(root)
    assert len(report.errors) == (3 if version == "v2.1" else 1) and key in report.errors[0] and not left
    for path in (root / "videos").rglob("*.mp4"):  # another clock
        other = Path(str(path).replace("observation.images.image", key))
        mp4(other, np.concatenate(images) if version == "v3.0" else images[int(path.stem[-1])], fps=2 * FPS)
    load_episodes(root, "image")
    assert check(root, "image")[0].errors == []
    with pytest.raises(ValueError, match=rf"episode 0: {key} has 20 fps, meta/info.json says 10"):
        load_episodes(root, "wrist")


def test_episodes_without_a_camera(tmp_path):
    root = tmp_path / "set"
    make(root)
    key = second_camera(root, "v3.0", without=(0, 2))
    path = root / f"videos/{key}/chunk-000/file-000.mp4"
    mp4(path, np.concatenate([pictures(n, 9) for n in (14, 11, 20)]))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert numbers(load_episodes(root, "image")) == [0, 1, 2]
    assert [list(e.cameras) for e in every_camera(root)] == [["image"], ["image", "wrist"], ["image"]]
    with pytest.warns(
        UserWarning, match=r"2 of 3 episodes have no camera 'wrist' .*, first set/episode_000000: left out"
    ):
        assert numbers(load_episodes(root, "wrist")) == [1]
    report, _ = check(root)
    assert "not every episode has the camera wrist" in report.warnings and not report.errors
    assert any("2 of 3 episodes have no camera 'wrist'" in w for w in check(root, "wrist")[0].warnings)
    names, first = ("chunk_index", "file_index", "from_timestamp"), "videos/observation.images.image"
    old = pq.read_table(root / "meta/episodes/chunk-000/file-000.parquet").to_pylist()
    places = {f"{first}/{n}": [row[f"{first}/{n}"] for row in old] for n in names}
    amend(root, "v3.0", **{n: [v[0], None, v[2]] for n, v in places.items()})
    report, episodes = check(root)  # without --camera: every episode with the cameras it has
    assert [list(e.cameras) for e in episodes] == [["image"], ["wrist"], ["image"]] and not report.errors
    assert sorted(report.facts["orientation"]) == ["image", "wrist"] and sample_picture(episodes).shape[0] > 2 * SIZE
    amend(root, "v3.0", **places)
    amend(root, "v3.0", **{f"videos/{key}/{n}": [None] * 3 for n in names})
    with pytest.raises(ValueError, match=r"3 of 3 episodes have no camera 'wrist' .*; give --camera another of image"):
        load_episodes(root, "wrist")
    amend(root, "v3.0", **{f"videos/{key}/{n}": [math.nan] * 3 for n in names})  # as pandas writes what is missing
    with pytest.raises(ValueError, match=r"3 of 3 episodes have no camera 'wrist'"):
        load_episodes(root, "wrist")
    amend(root, "v3.0", **{f"videos/{key}/{n}": [None] * 3 for n in names})
    amend(root, "v3.0", **{f"videos/{key}/chunk_index": [None, 0, None]})
    with pytest.raises(ValueError, match=rf"episode 1: videos/{key}/file_index is null; fill it in, or remove"):
        load_episodes(root, "wrist")


def test_fields_that_are_missing_or_null(tmp_path):
    root = tmp_path / "set"
    make(root, "v2.1", kind="image")
    for value, problem in (
        (None, "null; fill it in, or remove"),
        (math.nan, "null; fill"),
        (math.inf, "inf, expected"),
        (10**400, r"1000+, expected a whole number"),
    ):
        amend(root, "v2.1", length=[14, value, 20])
        with pytest.raises(ValueError, match=rf"episodes.jsonl: episode 1: length is {problem}"):
            load_episodes(root)
    amend(root, "v2.1", length=[14, 11, 20], **{name: [math.nan] * 3 for name in ("kind", "tasks", "success")})
    with pytest.warns(UserWarning, match=r"3 of 3 episodes do not say whether they succeeded \(success is null\)"):
        assert [e.kind for e in load_episodes(root)] == ["expert"] * 3
    (root / "meta/episodes.jsonl").write_text('{"index": 0, "length": 14}')
    with pytest.raises(ValueError, match=r"episodes.jsonl has no field episode_index; it has index, length"):
        load_episodes(root)


def test_starts_may_be_numbers(tmp_path):
    make(tmp_path / "set", "v2.1", kind="image", lengths=(14, 11, 20))
    amend(tmp_path / "set", "v2.1", start=[3, 3, float("nan")])
    assert [e.start for e in load_episodes(tmp_path / "set")] == ["3", "3", None]


@pytest.mark.parametrize("version", ["v2.1", "v3.0"])
def test_a_video_one_frame_short_is_refused(tmp_path, version):
    root = tmp_path / "set"
    images, _ = make(root, version)
    key, where = "observation.images.image", 1 if version == "v2.1" else 2
    if version == "v2.1":
        mp4(root / f"videos/chunk-000/{key}/episode_000001.mp4", images[1][:-1])
    else:
        mp4(root / f"videos/{key}/chunk-000/file-000.mp4", np.concatenate(images)[:-1])
    rows = (14, 11, 20)[where]
    text = rf"mp4: episode {where}: {key}: {rows} rows, but {rows - 1} frames in the video"
    with pytest.raises(ValueError, match=text):
        load_episodes(root)
    report, episodes = check(root)
    assert len(report.errors) == 1 and f"{rows} rows, but {rows - 1} frames" in report.errors[0]
    assert len(episodes) == 2  # the others are reported


def test_an_episode_does_not_end_with_a_frame_of_the_next(tmp_path):
    """v3.0: the middle episode's part of the video is one frame short, and the times of the parts say so."""
    root, key = tmp_path / "set", "observation.images.image"
    images, _ = make(root)
    mp4(root / f"videos/{key}/chunk-000/file-000.mp4", np.concatenate([images[0], images[1][:-1], images[2]]))
    amend(root, "v3.0", **{f"videos/{key}/from_timestamp": [0, 1.4, 2.4]})
    with pytest.raises(ValueError, match=r"episode 1: .* 11 rows, but 10 frames in the video"):
        load_episodes(root)


def test_images_that_are_empty_or_damaged_are_found(tmp_path):
    root, key = tmp_path / "set", "observation.images.image"
    make(root, kind="image")

    def damage(column):
        rows = column.to_pylist()
        rows[16]["bytes"] = rows[16]["bytes"][:-30]  # episode 1, frame 2
        return pa.array(rows)

    assert check(root)[0].errors == []
    rewrite(root, key, damage)
    report, episodes = check(root)
    assert len(report.errors) == 1 and f"episode 1: {key}, frame 2 is not a readable image" in report.errors[0]
    assert numbers(episodes) == [0, 2]


def test_the_plugin_names_the_episodes_to_imitate(tmp_path, monkeypatch):
    place = "integrations/lerobot_policy_vlarft/src/lerobot_policy_vlarft/attempts.py"
    spec = importlib.util.spec_from_file_location("attempts", Path(__file__).parents[1] / place)
    attempts = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(attempts)
    root = tmp_path / "set"
    make(root, kind="image", lengths=(14, 11, 20))
    assert attempts.attempts_text(root) is None
    amend(root, "v3.0", success=[True, True, True], kind=["expert", "noisy", "expert"])
    assert "1 of 3 episodes are failed, noisy or" in (text := attempts.attempts_text(root))
    assert text.endswith(": choose the others, --dataset.episodes='[0,2]'")
    monkeypatch.setattr(attempts, "LISTED", 1)
    assert attempts.attempts_text(root).endswith("='[0,... (2 in all)]'")
    amend(root, "v3.0", success=[False, True, True], kind=["expert", "noisy", "policy"])
    assert attempts.attempts_text(root).endswith("it is given: give it successful demonstrations")
