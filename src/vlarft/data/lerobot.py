"""Read episodes of LeRobotDataset v3.0, v2.1 and v2.0 (parquet with mp4 files or PNG images), without lerobot.

    meta/info.json      codebase_version, fps, features {key: dtype, shape}, data_path, video_path
    v3.0                meta/episodes/**.parquet, meta/tasks.parquet; several episodes in a data or video file
    v2.x                meta/episodes.jsonl, meta/tasks.jsonl; one data file and one video per camera and episode

Frames have `action` (or `actions`), `observation.state` (or `state`), and cameras of dtype video or image. The writer
(`lerobot_writer.py`) adds what other programs ignore: the frame feature `intended_action`, the episode columns
`success` and `kind`, and {"vlarft": {"absolute": bool}} in info.json.
"""

import functools
import json
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from vlarft.data.episode import Episode, check_lengths, check_numbers, pick_camera
from vlarft.data.frames import Budget, EncodedImages, Frames
from vlarft.data.video import VideoFrames, probe, stamp
from vlarft.run.lfs import refuse_pointer
from vlarft.run.optional import optional

VERSIONS = ("v2.0", "v2.1", "v3.0")
ACTION, STATE = ("action", "actions"), ("observation.state", "state")


def import_parquet() -> Any:
    """Import pyarrow.parquet; an ImportError says what installs it."""
    with optional("reading and writing LeRobot data sets needs pyarrow", "formats"):
        import pyarrow.parquet as parquet
    return parquet


def open_parquet(path: Path) -> Any:
    """Open a parquet file, memory-mapped.

    Raises:
        FileNotFoundError: no such file.
        ValueError: truncated, or not parquet.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing; the data set was copied without it")
    refuse_pointer(path)
    try:
        return import_parquet().ParquetFile(path, memory_map=True)
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} is not a readable parquet file ({error}); it is truncated: copy it again") from error


class _Entry(NamedTuple):
    """Metadata of an episode; videos: camera key -> (file, the episode's start in it [s])."""

    index: int
    length: int
    tasks: list[str]
    data: Path
    videos: dict[str, tuple[Path, float]]
    success: bool = True
    kind: str = "expert"


def read_info(root: Path) -> dict[str, Any]:
    """Read meta/info.json of the data set at `root`.

    Raises:
        ValueError: not JSON, a missing field, or an unsupported version.
    """
    path = root / "meta" / "info.json"
    refuse_pointer(path)
    try:
        info = json.loads(path.read_text())
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is not JSON ({error})") from error
    for key in ("codebase_version", "fps", "features", "data_path"):
        if key not in info:
            raise ValueError(f"{path} has no field {key!r}; it has {', '.join(sorted(info))}")
    if info["codebase_version"] not in VERSIONS:
        raise ValueError(
            f"{path}: codebase_version {info['codebase_version']!r}, expected one of {', '.join(VERSIONS)}; "
            "convert the data set with lerobot's own script first"
        )
    return info


def read_lerobot(
    root: Path, camera: str | None, budget: Budget, keep: Callable[[str, bool, str], bool]
) -> Iterator[Episode]:
    """Yield the episodes of one data set.

    Args:
        root: folder that contains meta/, data/ and videos/.
        camera: camera of `Episode.images`: its feature key, or the key's last part; None picks the first.
        budget: limit on the decoded frames that are kept.
        keep: (name, success, kind) -> whether to read an episode.

    Raises:
        FileNotFoundError: a file that meta/ names is missing.
        ValueError: truncated file, missing camera or feature, NaN, lengths or fps that differ.
    """
    info, meta = read_info(root), root / "meta" / "info.json"
    features = info["features"]
    keys = _cameras(features)
    name_of = {**{key: name for name, key in keys.items()}, **{name: name for name in keys}}
    camera = name_of[pick_camera(name_of if camera in name_of else keys, camera, str(meta))]
    action, state = (_feature(features, names, meta) for names in (ACTION, STATE))
    entries, tasks = _entries(root, info, [k for k in keys.values() if features[k]["dtype"] == "video"])
    absolute = bool(info.get("vlarft", {}).get("absolute", False))
    for entry in entries:
        name, where = f"{root.resolve().name}/episode_{entry.index:06d}", f"{entry.data}: episode {entry.index}"
        if not keep(name, entry.success, entry.kind):
            continue
        table = _columns(
            entry.data, stamp(entry.data), (action, state, *(k for k in ("intended_action",) if k in features))
        )
        first, rows = _rows(table, entry, float(info["fps"]), where)
        columns = {k: check_numbers(v[rows], f"{where}: {k}") for k, v in table.items() if k not in SCALARS}
        cameras = {
            short: _images(entry, key, features[key], first, info, root, budget, where) for short, key in keys.items()
        }
        check_lengths(where, **columns, **cameras)
        yield Episode(
            name=name,
            instruction=_instruction(table, rows, tasks, entry, where),
            images=cameras[camera],
            proprio=columns[state],
            actions=columns[action],
            intended=columns.get("intended_action", columns[action]),
            success=entry.success,
            kind=entry.kind,
            cameras=cameras,
            fps=float(info["fps"]),
            absolute=absolute,
        )


def _cameras(features: dict) -> dict[str, str]:
    """Return name -> feature key of the colour cameras; the name is the key's last part if that is unique."""
    keys = [k for k, f in features.items() if f["dtype"] in ("video", "image") and not _depth(f)]
    short = [k.rpartition(".")[2] for k in keys]
    return {name if short.count(name) == 1 else key: key for name, key in zip(short, keys)}


def _depth(feature: dict) -> bool:
    about = {**feature, **(feature.get("info") or {}), **(feature.get("video_info") or {})}
    return bool(about.get("video.is_depth_map") or about.get("is_depth_map"))


def _feature(features: dict, names: tuple[str, ...], where: Path) -> str:
    for name in names:
        if name in features:
            return name
    raise ValueError(f"{where} has no feature {' or '.join(names)}; it has {', '.join(sorted(features))}")


def _entries(root: Path, info: dict, video_keys: list[str]) -> tuple[list[_Entry], dict[int, str]]:
    """Return the episodes in the order of their numbers, and task_index -> instruction."""
    meta, new = root / "meta", info["codebase_version"] == "v3.0"
    if video_keys and not info.get("video_path"):
        raise ValueError(f"{meta / 'info.json'} has video features ({', '.join(video_keys)}) and no video_path")
    if not new:
        rows = _json_lines(meta / "episodes.jsonl")
        tasks = {int(row["task_index"]): row["task"] for row in _json_lines(meta / "tasks.jsonl")}
        entries = []
        for row in rows:
            index = int(row["episode_index"])
            place = {"episode_chunk": index // int(info.get("chunks_size", 1000)), "episode_index": index}
            videos = {k: (root / info["video_path"].format(video_key=k, **place), 0.0) for k in video_keys}
            data = root / info["data_path"].format(**place)
            entries.append(_Entry(index, int(row["length"]), list(row.get("tasks", ())), data, videos))
        return sorted(entries, key=lambda e: e.index), tasks
    files = sorted((meta / "episodes").rglob("*.parquet"))
    if not files:
        raise FileNotFoundError(f"{meta / 'episodes'} has no parquet files; the data set was copied without them")
    entries = []
    for path in files:
        file = open_parquet(path)
        names = [n for n in file.schema_arrow.names if not n.startswith("stats/")]
        for row in file.read(columns=names).to_pylist():
            try:
                place = {"chunk_index": row["data/chunk_index"], "file_index": row["data/file_index"]}
                videos = {k: _video_place(root, info, row, k) for k in video_keys}
                data = root / info["data_path"].format(**place)
                index, length, words = int(row["episode_index"]), int(row["length"]), list(row.get("tasks") or ())
            except KeyError as error:
                raise ValueError(f"{path} has no column {error}; it has {', '.join(names)}") from error
            entries.append(
                _Entry(index, length, words, data, videos, row.get("success", True), row.get("kind") or "expert")
            )
    table = open_parquet(meta / "tasks.parquet").read()
    text = [
        n for n in table.column_names if n != "task_index"
    ]  # the index of a pandas table, whose name may be missing
    if "task_index" not in table.column_names or len(text) != 1:
        raise ValueError(f"{meta / 'tasks.parquet'} must have task_index and one text, got {table.column_names}")
    tasks = dict(zip(table["task_index"].to_pylist(), table[text[0]].to_pylist()))
    return sorted(entries, key=lambda e: e.index), tasks


def _video_place(root: Path, info: dict, row: dict, key: str) -> tuple[Path, float]:
    place = {f"{n}_index": row[f"videos/{key}/{n}_index"] for n in ("chunk", "file")}
    return root / info["video_path"].format(video_key=key, **place), float(row[f"videos/{key}/from_timestamp"])


def _json_lines(path: Path) -> list[dict]:
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing; the data set was copied without it")
    refuse_pointer(path)
    try:
        return [json.loads(line) for line in path.read_text().splitlines() if line.strip()]
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} does not consist of JSON lines ({error})") from error


SCALARS = ("episode_index", "frame_index", "timestamp", "task_index")


@functools.lru_cache(maxsize=2)  # consecutive episodes share a file
def _columns(path: Path, written: int, wanted: tuple[str, ...]) -> dict[str, np.ndarray]:
    """Read numeric columns of a data file `written` at a time (the cache's key): (N,) SCALARS, (N, D) features."""
    file = open_parquet(path)
    names = file.schema_arrow.names
    if missing := [n for n in (*wanted, "episode_index") if n not in names]:
        raise ValueError(f"{path} has no column {', '.join(missing)}; it has {', '.join(names)}")
    table = file.read(columns=[n for n in (*wanted, *SCALARS) if n in names])
    matrices = {n: _matrix(table[n].combine_chunks(), f"{path}: {n}") for n in table.column_names}
    return {n: matrix[:, 0] if n in SCALARS else matrix for n, matrix in matrices.items()}


def _matrix(column: Any, where: str) -> np.ndarray:
    """Convert an arrow array of N lists of D numbers to (N, D), of N numbers to (N, 1)."""
    from pyarrow import compute, types

    if column.null_count:
        raise ValueError(f"{where} has {column.null_count} empty rows; remove or repair them")
    values, width = column, 1
    if types.is_list(column.type) or types.is_large_list(column.type) or types.is_fixed_size_list(column.type):
        widths = sorted(compute.list_value_length(column).unique().to_pylist())
        if len(widths) > 1:
            raise ValueError(f"{where} has rows of {widths} numbers; expected the same number in each")
        values, width = column.flatten(), widths[0] if widths else 1
    if not (types.is_integer(values.type) or types.is_floating(values.type)):
        raise ValueError(f"{where} holds {column.type}, expected numbers or lists of them")
    return values.to_numpy(zero_copy_only=False).reshape(len(column), width)


def _rows(table: dict[str, np.ndarray], entry: _Entry, fps: float, where: str) -> tuple[int, slice]:
    """Return an episode's first row in its data file, and the slice of its rows, after checking their times."""
    indices = np.flatnonzero(table["episode_index"] == entry.index)
    if len(indices) != entry.length or not len(indices) or indices[-1] - indices[0] + 1 != len(indices):
        raise ValueError(
            f"{where} has {len(indices)} rows, the metadata say {entry.length} in a row; truncated or mixed up"
        )
    rows = slice(int(indices[0]), int(indices[-1]) + 1)
    grid = np.arange(entry.length)
    for name, expected, tolerance in (("frame_index", grid, 0.5), ("timestamp", grid / fps, 0.25 / fps)):
        off = np.abs(table[name][rows] - expected) if name in table else np.zeros(1)
        if off.max() > tolerance:
            t = int((off > tolerance).argmax())
            raise ValueError(
                f"{where}: {name} of frame {t} is {table[name][rows][t]:g}, expected {expected[t]:g} at {fps:g} fps "
                "(meta/info.json); the data are of another fps, or frames are missing"
            )
    return rows.start, rows


def _instruction(table: dict, rows: slice, tasks: dict[int, str], entry: _Entry, where: str) -> str:
    numbers = set(table["task_index"][rows].tolist()) if "task_index" in table else set()
    if len(numbers) > 1:
        raise ValueError(f"{where} has {len(numbers)} task_index values; split it into episodes of one task each")
    text = tasks.get(numbers.pop(), "") if numbers else entry.tasks[0] if entry.tasks else ""
    if not str(text).strip():
        raise ValueError(f"{where} has no instruction: meta/tasks has no text for its task_index")
    return str(text).strip()


def _images(
    entry: _Entry, key: str, feature: dict, first: int, info: dict, root: Path, budget: Budget, where: str
) -> Frames:
    fps, where = float(info["fps"]), f"{where}: {key}"
    shape = [int(n) for n in feature["shape"]]
    size = tuple(shape[1:] if shape[0] == 3 and shape[-1] != 3 else shape[:2])
    if feature["dtype"] == "image":
        blobs = functools.partial(_pictures, root, entry.data, key, first)
        return Frames(EncodedImages(blobs, where), (entry.length, *size, 3), budget, where)
    path, start = entry.videos[key]
    stream = probe(path)
    if not math.isclose(stream.fps, fps, rel_tol=0.01):
        raise ValueError(f"{path}: {key} has {stream.fps:g} fps, meta/info.json says {fps:g}; re-encode one of them")
    if stream.size != size:
        raise ValueError(
            f"{path}: {key} is {stream.size[0]} x {stream.size[1]}, meta/info.json says {size[0]} x {size[1]}"
        )
    times = start + np.arange(entry.length) / fps
    if times[-1] > stream.end:
        raise ValueError(
            f"{path}: {key} ends at {stream.end:.3f} s, episode {entry.index} at {times[-1]:.3f} s; truncated"
        )
    return Frames(
        VideoFrames(path, times, 0.4 / fps, budget, f"{path}: {key}"), (entry.length, *size, 3), budget, where
    )


@functools.lru_cache(maxsize=64)
def _group_starts(path: Path, written: int) -> np.ndarray:
    """Return the first row of each row group of a parquet file, then the number of rows."""
    metadata = open_parquet(path).metadata
    return np.cumsum([0] + [metadata.row_group(i).num_rows for i in range(metadata.num_row_groups)])


@functools.lru_cache(maxsize=4)
def _group(path: Path, written: int, key: str, number: int) -> Any:
    """Read one row group's column of encoded images."""
    return open_parquet(path).read_row_group(number, columns=[key])[key].combine_chunks()


def _pictures(root: Path, path: Path, key: str, first: int, lo: int, hi: int) -> list[bytes]:
    """Return the image files of rows first + lo .. first + hi - 1: stored in the column, or named by it."""
    starts, out = _group_starts(path, stamp(path)), []
    lo, hi = first + lo, first + hi
    for number in range(np.searchsorted(starts, lo, "right") - 1, np.searchsorted(starts, hi, "left")):
        begin, end = max(lo, starts[number]), min(hi, starts[number + 1])
        for row in _group(path, stamp(path), key, number).slice(begin - starts[number], end - begin).to_pylist():
            if not row or not (row.get("bytes") or row.get("path")):
                raise ValueError(f"{path}: {key} has an empty image in rows {begin} .. {end - 1}")
            if not row["bytes"]:
                refuse_pointer(root / row["path"])
            out.append(row["bytes"] or (root / row["path"]).read_bytes())
    return out
