"""Write a LeRobotDataset v3.0: parquet tables, and per camera mp4 files of ~200 MB, or PNG images in the tables.

Layout and keys: see `lerobot.py`. LIBERO's cameras get the keys of its LeRobot copies (agentview: image, eye_in_hand:
image2). Every second video frame is a keyframe, as in LeRobot's files, so that any window decodes quickly. The field
`success` of an episode says how it ended, and so does the frame feature `next.success`, true in a success's last frame.
"""

import io
import json
from collections.abc import Iterable
from fractions import Fraction
from pathlib import Path
from typing import Any, Literal

import numpy as np

from vlarft.data.episode import Episode
from vlarft.data.frames import import_pillow
from vlarft.data.lerobot_meta import import_parquet, read_info
from vlarft.data.video import import_av
from vlarft.run.cameras import CAMERAS
from vlarft.run.checkpoint import new_folder

CHUNK_FILES, DATA_BYTES, VIDEO_BYTES = 1000, 100 << 20, 200 << 20  # LeRobot's defaults
DATA_PATH = "data/chunk-{chunk_index:03d}/file-{file_index:03d}.parquet"
VIDEO_PATH = "videos/{video_key}/chunk-{chunk_index:03d}/file-{file_index:03d}.mp4"
SUCCESS = "next.success"
SCALARS = {"timestamp": "float32", **dict.fromkeys(("frame_index", "episode_index", "index", "task_index"), "int64")}
SCALARS[SUCCESS] = "bool"
QUANTILES = (0.01, 0.1, 0.5, 0.9, 0.99)
ENCODERS = {"h264": ("libx264", {"bf": "0"}), "av1": ("libsvtav1", {"preset": "8"})}
IMAGE_ROWS = 16  # rows of a row group with images, the smallest unit that is read

Codec = Literal["h264", "av1"]


def write_lerobot(
    root: str | Path,
    episodes: Iterable[Episode],
    fps: float,
    *,
    images: Literal["video", "png"] = "video",
    codec: Codec = "h264",
    crf: int = 18,
    robot_type: str | None = None,
    source: str | None = None,
) -> int:
    """Write a data set; it appears at `root` once it is complete.

    Args:
        root: folder to create.
        episodes: episodes of one robot, their cameras in `Episode.cameras`; consumed one at a time.
        fps: frames per second.
        images: mp4 files (slightly lossy) or PNG images (lossless).
        codec: video codec.
        crf: video quality; lower is better and larger.
        robot_type: name of the robot for info.json.
        source: what the episodes are of, for `is_recorded`.

    Returns:
        The number of episodes.

    Raises:
        FileExistsError: `root` exists.
        ValueError: no episodes, episodes of different robots, names of dimensions or cameras, or images of odd size for
            a video.
    """
    with new_folder(root) as tmp:
        writer = None
        for episode in episodes:
            if writer is None:
                writer = _Writer(tmp, episode, fps, images, codec, crf)
            writer.add(episode)
        if writer is None:
            raise ValueError(f"no episodes to write to {root}")
        writer.finish(robot_type, source)
    return len(writer.entries)


def is_recorded(root: Path, count: int, new: int, source: str, image_size: int | None = None) -> bool:
    """Return whether the data set of `count` episodes is at `root` already, and say so; False: nothing is.

    Args:
        root: folder of the data set.
        count: episodes that it shall have.
        new: how many of them are not made yet.
        source: as given to `write_lerobot`.
        image_size: side of its images, where it is known before they are made [px].

    Raises:
        FileExistsError: something else is there.
        ImportError: a package that writing needs is missing.
        ValueError: images that no video can have.
    """
    import_parquet(), import_av()  # before hours are spent on the episodes
    if image_size and image_size % 2:
        raise ValueError(f"images of {image_size} x {image_size}: videos, as in {root}, need an even --image-size")
    if not root.exists():
        return False
    info = read_info(root) if (root / "meta" / "info.json").is_file() else {}
    there, of = info.get("total_episodes"), (info.get("vlarft") or {}).get("source")
    if new or there != count:
        raise FileExistsError(
            f"{root} exists, with {there or 'no'} episodes; {count} are to be recorded, {new} of them not made yet. A "
            "LeRobot data set cannot be continued: remove it, or give another folder"
        )
    if of not in (None, source):  # None: of an older version
        raise FileExistsError(f"{root} exists, with {there} episodes of another run: remove it, or give another folder")
    print(f"{root}: recorded already")
    return True


def camera_key(name: str) -> str:
    """Return the LeRobot feature key of a camera."""
    key = {"agentview": "image", "eye_in_hand": "image2"}.get(name, name)
    return f"observation.images.{'image2' if key in CAMERAS['eye_in_hand'] else key}"


class _Place:
    """Chunk and file number of the file being written, and its bytes so far."""

    def __init__(self) -> None:
        self.chunk = self.file = self.bytes = 0

    def next(self) -> None:
        self.file, self.bytes = self.file + 1, 0
        if self.file == CHUNK_FILES:
            self.chunk, self.file = self.chunk + 1, 0

    def indices(self) -> dict[str, int]:
        return {"chunk_index": self.chunk, "file_index": self.file}


class _Video:
    """Writer of one camera's mp4 files, episode after episode."""

    def __init__(self, root: Path, key: str, fps: float, codec: Codec, crf: int) -> None:
        self.root, self.key, self.fps, self.codec, self.crf = root, key, fps, codec, crf
        self.place, self.frames, self.container, self.stream = _Place(), 0, None, None

    def add(self, images: np.ndarray) -> dict[str, Any]:
        """Append (T, H, W, 3) uint8; return the episode's metadata columns."""
        if self.container is not None and self.place.bytes > VIDEO_BYTES:
            self.close()
            self.place.next()
        if self.container is None:
            self._open(images.shape[1:3])
        av, start = import_av(), self.frames
        for image in images:
            self._mux(self.stream.encode(av.VideoFrame.from_ndarray(np.ascontiguousarray(image), format="rgb24")))
        self.frames += len(images)
        times = {"from_timestamp": start / self.fps, "to_timestamp": self.frames / self.fps}
        return {f"videos/{self.key}/{k}": v for k, v in {**self.place.indices(), **times}.items()}

    @property
    def path(self) -> Path:
        return self.root / VIDEO_PATH.format(video_key=self.key, **self.place.indices())

    def _open(self, size: tuple[int, int]) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        encoder, options = ENCODERS[self.codec]
        self.container, self.frames = import_av().open(str(self.path), "w"), 0
        rate = Fraction(self.fps).limit_denominator(1000)
        self.stream = self.container.add_stream(encoder, rate=rate, options={"g": "2", "crf": str(self.crf), **options})
        self.stream.height, self.stream.width, self.stream.pix_fmt = *size, "yuv420p"

    def _mux(self, packets: list[Any]) -> None:
        self.place.bytes += sum(packet.size for packet in packets)
        self.container.mux(packets)

    def close(self) -> None:
        if self.container is not None:
            self._mux(self.stream.encode())
            self.container.close()
            self.container = None


class _Writer:
    def __init__(self, root: Path, first: Episode, fps: float, images: str, codec: Codec, crf: int) -> None:
        self.root, self.fps, self.images, self.codec = root, fps, images, codec
        self.shapes = _shapes(first)
        if not self._cameras:
            raise ValueError(f"{first.name} has no images in Episode.cameras; expected those of one camera at least")
        if outside := [key for key in self.shapes if ".." in Path(key).parts]:  # a name is a folder's here
            raise ValueError(
                f"{first.name} has a camera {outside[0]!r}, which leads out of {root}: leave it out (--camera)"
            )
        self.about, self.has_intended = _about(first), first.intended is not first.actions
        self.has_outcomes = first.outcome_known  # all frames of a set have the same columns
        self.names = {"action": first.action_names, "observation.state": first.proprio_names}
        self.names["intended_action"] = first.action_names
        if images == "video":
            for key, shape in self.shapes.items():
                if len(shape) == 3 and (shape[0] % 2 or shape[1] % 2):
                    raise ValueError(
                        f"{first.name}: {key} is {shape[0]} x {shape[1]}; videos need even sizes: give PNG"
                    )
        self.videos = {k: _Video(root, k, fps, codec, crf) for k in self._cameras} if images == "video" else {}
        self.tasks: dict[str, int] = {}
        self.entries: list[dict[str, Any]] = []
        self.columns: dict[str, list[np.ndarray]] = {"action": [], "observation.state": []}
        if self.has_intended:
            self.columns["intended_action"] = []
        self.histograms = {key: np.zeros((3, 256), np.int64) for key in self._cameras}
        self.place, self.table, self.total = _Place(), None, 0

    @property
    def _cameras(self) -> list[str]:
        return [key for key, shape in self.shapes.items() if len(shape) == 3]

    def add(self, episode: Episode) -> None:
        if (_shapes(episode), _about(episode)) != (self.shapes, self.about):
            raise ValueError(
                f"{episode.name} has {_shapes(episode)}, {_about(episode)}, the episodes before it {self.shapes}, "
                f"{self.about}; one robot a set"
            )
        for key, theirs in (("action", episode.action_names), ("observation.state", episode.proprio_names)):
            if theirs and self.names[key] and theirs != self.names[key]:
                raise ValueError(
                    f"{episode.name} has the {key} {', '.join(theirs)}, the episodes before it "
                    f"{', '.join(self.names[key])}; one robot a set: convert the two apart"
                )
        if not self.has_intended and episode.intended is not episode.actions:
            raise ValueError(
                f"{episode.name} has the demonstrator's intended actions, the episodes before it have none; a set has "
                "them or has not: convert the two apart"
            )
        number, steps, task = (
            len(self.entries),
            len(episode),
            self.tasks.setdefault(episode.instruction, len(self.tasks)),
        )
        values = {"action": episode.actions, "observation.state": episode.proprio}
        if self.has_intended:
            values["intended_action"] = episode.intended
        grid = np.arange(steps)
        indices = {
            "timestamp": (grid / self.fps).astype(np.float32),
            "frame_index": grid,
            "episode_index": np.full(steps, number),
            "index": self.total + grid,
            "task_index": np.full(steps, task),
        }
        if self.has_outcomes:
            ended = np.append(np.zeros(steps - 1, bool), episode.success)
            indices[SUCCESS] = ended if episode.outcome_known else [None] * steps
        entry = {
            "episode_index": number,
            "tasks": [episode.instruction],
            "length": steps,
            "dataset_from_index": self.total,
            "dataset_to_index": self.total + steps,
            "success": bool(episode.success) if episode.outcome_known else None,
            "kind": episode.kind,
            "start": episode.start,
        }
        pictures = {}
        for name, frames in episode.cameras.items():
            key, array = camera_key(name), np.asarray(frames)
            counts = _histogram(array)
            self.histograms[key] += counts
            entry |= {f"stats/{key}/{k}": v for k, v in _image_stats(counts).items()}
            if self.videos:
                entry |= self.videos[key].add(array)
            else:
                pictures[key] = [_png(image) for image in array]
        for key, array in values.items():
            self.columns[key].append(array)
            entry |= {f"stats/{key}/{k}": v for k, v in _stats(array).items()}
        entry |= {f"data/{k}": v for k, v in self._rows(values, indices, pictures).items()}
        self.entries.append(entry)
        self.total += steps

    def _rows(self, values: dict, indices: dict, pictures: dict) -> dict[str, int]:
        """Append an episode's rows to the data file; return its chunk and file number."""
        import pyarrow as pa

        arrays: dict[str, Any] = {
            k: pa.array([{"bytes": b, "path": None} for b in v], _image_type()) for k, v in pictures.items()
        }
        for key, array in values.items():
            flat = pa.array(np.ascontiguousarray(array, np.float32).ravel())
            arrays[key] = pa.FixedSizeListArray.from_arrays(flat, array.shape[1])
        table = pa.table({**arrays, **{k: pa.array(v, SCALARS[k]) for k, v in indices.items()}})
        if self.table is not None and self.place.bytes > DATA_BYTES:
            self.table.close()
            self.table = None
            self.place.next()
        if self.table is None:
            path = self.root / DATA_PATH.format(**self.place.indices())
            path.parent.mkdir(parents=True, exist_ok=True)
            self.table = import_parquet().ParquetWriter(path, table.schema, compression="snappy", use_dictionary=False)
        self.table.write_table(table, row_group_size=IMAGE_ROWS if pictures else None)
        self.place.bytes += table.nbytes
        return self.place.indices()

    def finish(self, robot_type: str | None, source: str | None) -> None:
        import pyarrow as pa

        for video in self.videos.values():
            video.close()
        self.table.close()
        parquet, meta = import_parquet(), self.root / "meta"
        place = {"meta/episodes/chunk_index": 0, "meta/episodes/file_index": 0}
        path = meta / "episodes" / "chunk-000" / "file-000.parquet"
        path.parent.mkdir(parents=True)
        for name in ("success", "start"):
            if all(entry[name] is None for entry in self.entries):  # as in data sets that have no such field
                for entry in self.entries:
                    del entry[name]
        parquet.write_table(pa.Table.from_pylist([{**entry, **place} for entry in self.entries]), path)
        tasks = pa.table({"task_index": list(self.tasks.values()), "task": list(self.tasks)})
        # pandas metadata: makes pandas read the instructions as the table's index, as lerobot expects
        index = {"index_columns": ["task"], "column_indexes": [], "pandas_version": "2.2.0"}
        index["columns"] = [
            {"name": n, "field_name": n, "pandas_type": p, "numpy_type": t, "metadata": None}
            for n, p, t in (("task_index", "int64", "int64"), ("task", "unicode", "object"))
        ]
        parquet.write_table(tasks.replace_schema_metadata({"pandas": json.dumps(index)}), meta / "tasks.parquet")
        stats = {k: _stats(np.concatenate(v)) for k, v in self.columns.items()}
        stats |= {k: _image_stats(v) for k, v in self.histograms.items()}
        (meta / "stats.json").write_text(json.dumps(stats, indent=2))
        info = {
            "codebase_version": "v3.0",
            "robot_type": robot_type,
            "total_episodes": len(self.entries),
            "total_frames": self.total,
            "total_tasks": len(self.tasks),
            "chunks_size": CHUNK_FILES,
            "data_files_size_in_mb": DATA_BYTES >> 20,
            "video_files_size_in_mb": VIDEO_BYTES >> 20,
            "fps": int(self.fps) if float(self.fps).is_integer() else self.fps,
            "splits": {"train": f"0:{len(self.entries)}"},
            "data_path": DATA_PATH,
            "video_path": VIDEO_PATH if self.videos else None,
            "features": {k: self._feature(k, shape) for k, shape in self.shapes.items()},
            "vlarft": {**self.about, **({} if source is None else {"source": source})},
        }
        if self.has_intended:
            info["features"]["intended_action"] = self._feature("intended_action", self.shapes["action"])
        scalars = {k: v for k, v in SCALARS.items() if k != SUCCESS or self.has_outcomes}
        info["features"] |= {k: {"dtype": dtype, "shape": [1], "names": None} for k, dtype in scalars.items()}
        (meta / "info.json").write_text(json.dumps(info, indent=2))

    def _feature(self, key: str, shape: tuple[int, ...]) -> dict[str, Any]:
        if len(shape) == 1:
            return {"dtype": "float32", "shape": list(shape), "names": list(self.names[key]) or None}
        feature = {"dtype": "image", "shape": list(shape), "names": ["height", "width", "channel"]}
        if self.videos:
            about = {"height": shape[0], "width": shape[1], "codec": self.codec, "pix_fmt": "yuv420p", "fps": self.fps}
            about |= {"channels": 3, "is_depth_map": False}
            feature |= {"dtype": "video", "info": {**{f"video.{k}": v for k, v in about.items()}, "has_audio": False}}
        return feature


def _image_type() -> Any:
    import pyarrow as pa

    return pa.struct([("bytes", pa.binary()), ("path", pa.string())])


def _shapes(episode: Episode) -> dict[str, tuple[int, ...]]:
    """Return feature key -> shape of one frame's value."""
    shapes = {"observation.state": episode.proprio.shape[1:], "action": episode.actions.shape[1:]}
    return {**shapes, **{camera_key(name): tuple(images.shape[1:]) for name, images in episode.cameras.items()}}


def _about(episode: Episode) -> dict[str, Any]:
    """Return what info.json says of the actions; a gripper that is only assumed to be the last dimension stays so."""
    stated = {"gripper_dims": list(episode.gripper_dims or ()), "held_dims": list(episode.held_dims)}
    return {"absolute": episode.absolute, **({} if episode.gripper_dims is None else stated)}


def _png(image: np.ndarray) -> bytes:
    file = io.BytesIO()
    import_pillow().fromarray(image).save(file, "png", compress_level=3)
    return file.getvalue()


def _stats(values: np.ndarray) -> dict[str, list]:
    """Compute LeRobot's statistics of values (N, D)."""
    quantiles = np.quantile(values, QUANTILES, axis=0)
    out = {"min": values.min(0), "max": values.max(0), "mean": values.mean(0, dtype=np.float64)}
    out |= {"std": values.std(0, dtype=np.float64), "count": np.array([len(values)])}
    out |= {f"q{round(100 * q):02d}": row for q, row in zip(QUANTILES, quantiles)}
    return {k: v.tolist() for k, v in out.items()}


def _histogram(images: np.ndarray) -> np.ndarray:
    """Count the values of a sample of the pixels of (T, H, W, 3): (3, 256)."""
    step = max(1, len(images) // 50)
    pixels = images[::step, ::4, ::4].reshape(-1, 3)
    return np.stack([np.bincount(pixels[:, c], minlength=256) for c in range(3)])


def _image_stats(counts: np.ndarray) -> dict[str, list]:
    """Compute LeRobot's statistics of images in [0, 1], (3, 1, 1) each, from counts (3, 256)."""
    levels, total = np.arange(256) / 255, counts.sum(1, keepdims=True)
    mean = (counts * levels).sum(1, keepdims=True) / total
    share = counts.cumsum(1) / total
    out = {"min": levels[(counts > 0).argmax(1)], "max": levels[255 - (counts[:, ::-1] > 0).argmax(1)], "mean": mean}
    out |= {"std": np.sqrt((counts * (levels - mean) ** 2).sum(1) / total[:, 0])}
    out |= {f"q{round(100 * q):02d}": levels[(share >= q).argmax(1)] for q in QUANTILES}
    return {**{k: v.reshape(3, 1, 1).tolist() for k, v in out.items()}, "count": [int(total[0, 0])]}
