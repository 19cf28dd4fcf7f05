"""Read episodes of LeRobotDataset v3.0, v2.1 and v2.0 (parquet with mp4 files or PNG images), without lerobot.

    meta/info.json      codebase_version, fps, features {key: dtype, shape}, data_path, video_path
    v3.0                meta/episodes/**.parquet, meta/tasks.parquet; several episodes in a data or video file
    v2.x                meta/episodes.jsonl, meta/tasks.jsonl; one data file and one video per camera and episode

Frames have `action` (or `actions`), `observation.state` (or `state`), and cameras of dtype video or image. The writer
(`lerobot_writer.py`) adds what other programs ignore: the frame feature `intended_action`, the episode columns
`success`, `kind` and `start`, and {"vlarft": {"absolute": bool, "gripper_dims": [6], "held_dims": []}} in info.json,
see `Episode`. Without gripper_dims, the names of the action feature say which dimensions are grippers. All versions
mean the same by `success` of an episode: true, false, or null for unknown. Where it is not given, the frame feature
`next.success` says it.
"""

import functools
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from vlarft.data.damage import damage_named
from vlarft.data.episode import Episode, check_lengths, check_numbers, pick_camera, warn_splits
from vlarft.data.frames import Budget, EncodedImages, Frames
from vlarft.data.lerobot_meta import (
    Entry,
    dimension_names,
    open_parquet,
    read_cameras,
    read_entries,
    read_grippers,
    read_info,
)
from vlarft.data.video import VideoFrames, stamp
from vlarft.run.lfs import refuse_pointer

ACTION, STATE = ("action", "actions"), ("observation.state", "state")
SCALARS = ("episode_index", "frame_index", "timestamp", "task_index")


def read_lerobot(
    root: Path, camera: str | None, budget: Budget, keep: Callable[[str, bool, str], bool]
) -> Iterator[Callable[[], Episode]]:
    """Yield functions that read an episode each. Videos are not opened: see `Frames.check`.

    Args:
        root: folder that contains meta/, data/ and videos/.
        camera: its feature key, or the key's last part; episodes recorded without it are left out. None reads all, the
            first for `Episode.images`.
        budget: limit on the decoded frames that are kept.
        keep: (name, success, kind) -> whether to read an episode.

    Raises:
        FileNotFoundError: a file that meta/ names is missing.
        ValueError: truncated file, missing camera or feature, NaN, lengths or fps that differ.
    """
    info, meta = read_info(root), root / "meta" / "info.json"
    warn_splits(str(meta), [f"{k} {v}" for k, v in (info.get("splits") or {}).items()])
    features = info["features"]
    keys = read_cameras(features)
    name_of = {**{key: name for name, key in keys.items()}, **{name: name for name in keys}}
    picked = name_of[pick_camera(name_of if camera in name_of else keys, camera, str(meta))]
    action, state = (_feature(features, names, meta) for names in (ACTION, STATE))
    used = {picked: keys[picked]} if camera else keys
    entries, tasks = read_entries(root, info, [k for k in used.values() if features[k]["dtype"] == "video"])
    about = info.get("vlarft") or {}

    def read(entry: Entry, name: str, has: dict[str, str]) -> Episode:
        where = f"{entry.data}: episode {entry.index}"
        wanted = action, state, *(k for k in ("intended_action",) if k in features)
        table = _columns(entry.data, stamp(entry.data), wanted)
        first, rows = _rows(table, entry, float(info["fps"]), where)
        columns = {k: check_numbers(v[rows], f"{where}: {k}") for k, v in table.items() if k not in SCALARS}
        cameras = {
            short: _images(entry, key, features[key], first, info, root, budget, where) for short, key in has.items()
        }
        check_lengths(where, **columns, **cameras)
        grippers, held = read_grippers(about, features[action], columns[action].shape[1], meta)
        return Episode(
            name=name,
            instruction=_instruction(table, rows, tasks, entry, where),
            images=cameras[picked if picked in cameras else next(iter(cameras))],
            proprio=columns[state],
            actions=columns[action],
            intended=columns.get("intended_action", columns[action]),
            success=entry.success,
            outcome_known=entry.outcome_known,
            kind=entry.kind,
            cameras=cameras,
            start=entry.start,
            fps=float(info["fps"]),
            absolute=about.get("absolute", False),
            gripper_dims=grippers,
            held_dims=held,
            action_names=tuple(dimension_names(features[action], columns[action].shape[1])),
            proprio_names=tuple(dimension_names(features[state], columns[state].shape[1])),
        )

    count, without = 0, []
    for entry in entries:
        name = f"{root.resolve().name}/episode_{entry.index:06d}"
        if not keep(name, entry.success, entry.kind):
            continue
        has = {n: key for n, key in used.items() if features[key]["dtype"] == "image" or key in entry.videos}
        if not has:
            without.append(name)
            continue
        count += 1
        yield functools.partial(read, entry, name, has)
    if without:
        key = keys[picked]
        text = (
            f"{root}: {len(without)} of {count + len(without)} episodes have no camera {picked!r} (meta/episodes has "
            f"no videos/{key}/chunk_index for them), first {without[0]}"
        )
        if not count:
            raise ValueError(f"{text}; give --camera another of {', '.join(keys)}")
        warnings.warn(f"{text}: left out", stacklevel=2)


def _feature(features: dict, names: tuple[str, ...], where: Path) -> str:
    for name in names:
        if name in features:
            return name
    raise ValueError(f"{where} has no feature {' or '.join(names)}; it has {', '.join(sorted(features))}")


@functools.lru_cache(maxsize=2)  # consecutive episodes share a file
def _columns(path: Path, written: int, wanted: tuple[str, ...]) -> dict[str, np.ndarray]:
    """Read numeric columns of a data file `written` at a time (the cache's key): (N,) SCALARS, (N, D) features."""
    file = open_parquet(path)
    names = file.schema_arrow.names
    if missing := [n for n in (*wanted, "episode_index") if n not in names]:
        raise ValueError(f"{path} has no column {', '.join(missing)}; it has {', '.join(names)}")
    with damage_named(str(path)):
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


def _rows(table: dict[str, np.ndarray], entry: Entry, fps: float, where: str) -> tuple[int, slice]:
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


def _instruction(table: dict, rows: slice, tasks: dict[int, str], entry: Entry, where: str) -> str:
    numbers = set(table["task_index"][rows].tolist()) if "task_index" in table else set()
    if len(numbers) > 1:
        raise ValueError(f"{where} has {len(numbers)} task_index values; split it into episodes of one task each")
    text = tasks.get(numbers.pop(), "") if numbers else entry.tasks[0] if entry.tasks else ""
    if not isinstance(text, str) or not text.strip():
        raise ValueError(f"{where} has no instruction: meta/tasks has {text!r} for its task_index, expected a text")
    if entry.tasks and text not in entry.tasks:
        raise ValueError(
            f"{where} has the task {entry.tasks[0]!r} in meta/, but its frames' task_index is that of {text!r}: one of "
            "the two has been renumbered, mend it"
        )
    return text.strip()


def _images(
    entry: Entry, key: str, feature: dict, first: int, info: dict, root: Path, budget: Budget, where: str
) -> Frames:
    """Return an episode's images of a camera; no file is opened, see `Frames.check`."""
    fps, where, shape = float(info["fps"]), f"{where}: {key}", feature["shape"]
    size = tuple(shape[1:] if shape[0] == 3 and shape[-1] != 3 else shape[:2])
    if feature["dtype"] == "image":
        blobs = functools.partial(_pictures, root, entry.data, key, first)
        return Frames(EncodedImages(blobs, where), (entry.length, *size, 3), budget, where)
    path, start, end = entry.videos[key]
    times = start + np.arange(entry.length) / fps
    source = VideoFrames(path, times, end, fps, budget, f"{path}: episode {entry.index}: {key}")
    return Frames(source, (entry.length, *size, 3), budget, where)


@functools.lru_cache(maxsize=64)
def _group_starts(path: Path, written: int) -> np.ndarray:
    """Return the first row of each row group of a parquet file, then the number of rows."""
    metadata = open_parquet(path).metadata
    return np.cumsum([0] + [metadata.row_group(i).num_rows for i in range(metadata.num_row_groups)])


@functools.lru_cache(maxsize=4)
def _group(path: Path, written: int, key: str, number: int) -> Any:
    """Read one row group's column of encoded images."""
    file = open_parquet(path)
    if key not in file.schema_arrow.names:
        raise ValueError(f"{path} has no column {key}; it has {', '.join(file.schema_arrow.names)}")
    with damage_named(f"{path}: {key}"):
        return file.read_row_group(number, columns=[key])[key].combine_chunks()


def _pictures(root: Path, path: Path, key: str, first: int, lo: int, hi: int) -> list[bytes]:
    """Return the image files of rows first + lo .. first + hi - 1: stored in the column, or named by it."""
    starts, out = _group_starts(path, stamp(path)), []
    lo, hi = first + lo, first + hi
    for number in range(np.searchsorted(starts, lo, "right") - 1, np.searchsorted(starts, hi, "left")):
        begin, end = max(lo, starts[number]), min(hi, starts[number + 1])
        group = _group(path, stamp(path), key, number)
        with damage_named(f"{path}: {key}"):
            rows = group.slice(begin - starts[number], end - begin).to_pylist()
        for row in rows:
            row = {"bytes": row} if isinstance(row, bytes) else row or {}
            if not isinstance(row, dict):
                raise ValueError(
                    f"{path}: {key} holds {type(row).__name__}, expected image files as bytes, or their paths"
                )
            if not (row.get("bytes") or row.get("path")):
                raise ValueError(f"{path}: {key} has an empty image in rows {begin} .. {end - 1}")
            out.append(row.get("bytes") or _picture(root, row["path"], f"{path}: {key}"))
    return out


def _picture(root: Path, name: str, where: str) -> bytes:
    """Read an image file that a row names, which must lie below `root`."""
    path = Path(name)
    if path.is_absolute() or ".." in path.parts or not (root / path).is_file():
        raise ValueError(f"{where} names the image {name!r}: there is no such file in {root}")
    refuse_pointer(root / path)
    return (root / path).read_bytes()
