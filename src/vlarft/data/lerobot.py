"""Read episodes of LeRobotDataset v3.0, v2.1 and v2.0 (parquet with mp4 files or PNG images), without lerobot.

    meta/info.json      codebase_version, fps, features {key: dtype, shape}, data_path, video_path
    v3.0                meta/episodes/**.parquet, meta/tasks.parquet; several episodes in a data or video file
    v2.x                meta/episodes.jsonl, meta/tasks.jsonl; one data file and one video per camera and episode

Frames have `action` (or `actions`), `observation.state` (or `state`), and cameras of dtype video or image. The writer
(`lerobot_writer.py`) adds what other programs ignore: the frame feature `intended_action`, the episode columns
`success` and `kind`, and {"vlarft": {"absolute": bool, "gripper_dims": [6], "held_dims": []}} in info.json, see
`Episode`. Without gripper_dims, the names of the action feature say which dimensions are grippers. All versions mean
the same by `success` of an episode: true, false, or null for unknown. Where it is not given, the frame feature
`next.success` says it.
"""

import functools
import json
import math
import re
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from vlarft.data.damage import damage_named
from vlarft.data.episode import Episode, check_lengths, check_numbers, pick_camera, read_outcome, warn_splits
from vlarft.data.frames import Budget, EncodedImages, Frames
from vlarft.data.video import VideoFrames, stamp
from vlarft.run.lfs import refuse_pointer
from vlarft.run.optional import optional

VERSIONS = ("v2.0", "v2.1", "v3.0")
ACTION, STATE = ("action", "actions"), ("observation.state", "state")
OUTCOMES = ("next.success", "is_episode_successful", "success")  # of frames: the episode succeeded if any is true
REWARDS = ("next.reward", "reward")
TYPES = {int: "a whole number", float: "a number", str: "text", list: "a list", dict: "an object"}
GRIPPER = re.compile(r"grip|grasp|claw", re.IGNORECASE)  # in the name of an action dimension


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
    """Metadata of an episode; videos: key of each camera it has -> (file, the episode's start and end in it [s])."""

    index: int
    length: int
    tasks: list[str]
    data: Path
    videos: dict[str, tuple[Path, float, float]]
    success: bool | None  # None: the metadata do not say
    kind: str
    outcome_known: bool = True  # False: `success` is a guess


def read_info(root: Path) -> dict[str, Any]:
    """Read meta/info.json of the data set at `root`.

    Raises:
        ValueError: not JSON, a field that is missing or of another type, or an unsupported version.
    """
    path = root / "meta" / "info.json"
    refuse_pointer(path)
    try:
        info = json.loads(path.read_text())
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not JSON ({error})") from error
    info = _field({"info": info}, "info", str(path), dict)
    for key, kind in (("codebase_version", str), ("fps", float), ("features", dict), ("data_path", str)):
        _field(info, key, str(path), kind)
    for key, kind in (("chunks_size", int), ("video_path", str), ("splits", dict), ("vlarft", dict)):
        if info.get(key) is not None:
            _field(info, key, str(path), kind)
    if min(info["fps"], info.get("chunks_size") or 1) <= 0:
        raise ValueError(f"{path}: fps and chunks_size must be positive, got {info['fps']}, {info.get('chunks_size')}")
    for key in info["features"]:
        feature = _field(info["features"], key, f"{path}: features", dict)
        if _field(feature, "dtype", f"{path}: feature {key}", str) in ("video", "image"):
            shape = _field(feature, "shape", f"{path}: feature {key}", list)
            if len(shape) != 3 or not all(isinstance(n, int) for n in shape):
                raise ValueError(f"{path}: feature {key}: shape is {shape}, expected height, width and channels")
    if info["codebase_version"] not in VERSIONS:
        raise ValueError(
            f"{path}: codebase_version {info['codebase_version']!r}, expected one of {', '.join(VERSIONS)}; "
            "convert the data set with lerobot's own script first"
        )
    return info


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
    keys = _cameras(features)
    name_of = {**{key: name for name, key in keys.items()}, **{name: name for name in keys}}
    picked = name_of[pick_camera(name_of if camera in name_of else keys, camera, str(meta))]
    action, state = (_feature(features, names, meta) for names in (ACTION, STATE))
    used = {picked: keys[picked]} if camera else keys
    entries, tasks = _entries(root, info, [k for k in used.values() if features[k]["dtype"] == "video"])
    about = info.get("vlarft") or {}

    def read(entry: _Entry, name: str, has: dict[str, str]) -> Episode:
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
            fps=float(info["fps"]),
            absolute=bool(about.get("absolute", False)),
            gripper_dims=grippers,
            held_dims=held,
            action_names=tuple(_names(features[action], columns[action].shape[1])),
            proprio_names=tuple(_names(features[state], columns[state].shape[1])),
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


def _cameras(features: dict) -> dict[str, str]:
    """Return name -> feature key of the colour cameras; the name is the key's last part if that is unique."""
    keys = [k for k, f in features.items() if f["dtype"] in ("video", "image") and not _depth(f)]
    short = [k.rpartition(".")[2] for k in keys]
    return {name if short.count(name) == 1 else key: key for name, key in zip(short, keys)}


def _depth(feature: dict) -> bool:
    about = {**feature, **(feature.get("info") or {}), **(feature.get("video_info") or {})}
    return bool(about.get("video.is_depth_map") or about.get("is_depth_map"))


def read_grippers(about: dict, feature: dict, width: int, meta: Path) -> tuple[tuple[int, ...] | None, tuple[int, ...]]:
    """Return `Episode.gripper_dims` and `held_dims`, as info.json states them, else by the names of the dimensions."""
    stated = {key: about[key] for key in ("gripper_dims", "held_dims") if about.get(key) is not None}
    for key, dims in stated.items():
        if not isinstance(dims, list) or any(type(i) is not int or not 0 <= i < width for i in dims):
            raise ValueError(
                f"{meta}: vlarft.{key} is {dims!r}, expected action dimensions, a list from 0 .. {width - 1}"
            )
    if stated:
        return tuple(stated.get("gripper_dims", ())), tuple(stated.get("held_dims", ()))
    names = _names(feature, width)
    kinds = {re.sub(r"[\W\d_]+", "", n) for n in names}  # motor_0, motor_1, ... say nothing
    if not names or (len(kinds) == 1 and not GRIPPER.search(names[0])):
        return None, ()
    return tuple(i for i, n in enumerate(names) if GRIPPER.search(n)), ()


def _names(feature: dict, width: int) -> list[str]:
    """Return the names of a feature's dimensions; [] if it does not have one for each of them."""
    names = feature.get("names")
    names = names if isinstance(names, list | dict) else ()
    if isinstance(names, dict):  # {"motors": ["x", "y"]} or {"x": 0, "y": 1}
        numbered = all(isinstance(i, int) for i in names.values())
        names = sorted(names, key=names.get) if numbered else names.values()
    names = [str(n) for group in names for n in (group if isinstance(group, list) else [group])]
    return names if len(names) == width else []


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
    rows, tasks = _tables(meta) if new else _json_tables(meta)
    stated = any("success" in row for _, row in rows)
    entries = []
    for path, row in rows:
        index = _field(row, "episode_index", str(path), int)
        where = f"{path}: episode {index}"
        if new:
            place = {f"{n}_index": _field(row, f"data/{n}_index", where, int) for n in ("chunk", "file")}
            videos = {k: _video_place(root, info, row, k, where) for k in video_keys}
        else:
            place = {"episode_chunk": index // int(info.get("chunks_size") or 1000), "episode_index": index}
            videos = {k: (_place(root, info, "video_path", video_key=k, **place), 0.0) for k in video_keys}
        texts = row.get("tasks") or []
        entry = _Entry(
            index,
            _field(row, "length", where, int),
            [texts] if isinstance(texts, str) else _field({"tasks": texts}, "tasks", where, list),
            _place(root, info, "data_path", **place),
            {k: (*place, math.inf) for k, place in videos.items() if place},
            read_outcome(row.get("success"), where),
            str(row.get("kind") or "expert"),
        )
        entries.append(entry)
    if isinstance(promised := info.get("total_episodes"), int) and promised > len(entries):
        warnings.warn(
            f"{meta / 'info.json'}: total_episodes is {promised}, the metadata list {len(entries)}: the others are "
            "lost, or were taken out",
            stacklevel=2,
        )
    entries.sort(key=lambda e: e.index)
    entries = _with_ends(_with_outcomes(root, entries, info["features"], stated))
    return entries, tasks


def _tables(meta: Path) -> tuple[list[tuple[Path, dict]], dict[int, str]]:
    """Read the metadata of v3.0: (file, row) of each episode, and task_index -> instruction."""
    files = sorted((meta / "episodes").rglob("*.parquet"))
    if not files:
        raise FileNotFoundError(f"{meta / 'episodes'} has no parquet files; the data set was copied without them")
    rows = []
    for path in files:
        file = open_parquet(path)
        names = [n for n in file.schema_arrow.names if not n.startswith("stats/")]
        with damage_named(str(path)):
            rows += [(path, row) for row in file.read(columns=names).to_pylist()]
    with damage_named(str(meta / "tasks.parquet")):
        table = open_parquet(meta / "tasks.parquet").read()
    text = [
        n for n in table.column_names if n != "task_index"
    ]  # the index of a pandas table, whose name may be missing
    if "task_index" not in table.column_names or len(text) != 1:
        raise ValueError(f"{meta / 'tasks.parquet'} must have task_index and one text, got {table.column_names}")
    with damage_named(str(meta / "tasks.parquet")):  # texts are decoded here
        return rows, dict(zip(table["task_index"].to_pylist(), table[text[0]].to_pylist()))


def _json_tables(meta: Path) -> tuple[list[tuple[Path, dict]], dict[int, str]]:
    """Read the metadata of v2.x: (file, row) of each episode, and task_index -> instruction."""
    path, tasks = meta / "tasks.jsonl", _json_lines(meta / "tasks.jsonl")
    texts = {_field(row, "task_index", str(path), int): _field(row, "task", str(path), str) for row in tasks}
    return [(meta / "episodes.jsonl", row) for row in _json_lines(meta / "episodes.jsonl")], texts


def _field(row: dict, name: str, where: str, kind: type) -> Any:
    """Return row[name], which must be one of TYPES; numbers are converted."""
    if name not in row:
        raise ValueError(f"{where} has no field {name}; it has {', '.join(sorted(row))}")
    if row[name] is None:
        raise ValueError(f"{where}: {name} is null; fill it in, or remove the episode")
    value, numeric = row[name], kind in (int, float)
    if not isinstance(value, int | float if numeric else kind) or (numeric and value != kind(value)):
        raise ValueError(f"{where}: {name} is {value!r:.80}, expected {TYPES[kind]}")
    return kind(value) if numeric else value


def _place(root: Path, info: dict, name: str, **fields: Any) -> Path:
    """Return the file that a pattern of info.json names."""
    try:
        return root / info[name].format(**fields)
    except (KeyError, IndexError, ValueError) as error:
        raise ValueError(
            f"{root / 'meta' / 'info.json'}: {name} is {info[name]!r} ({type(error).__name__}: {error}), expected a "
            f"pattern with the fields {', '.join(fields)}"
        ) from error


def _video_place(root: Path, info: dict, row: dict, key: str, where: str) -> tuple[Path, float] | None:
    """Return file and start [s] of an episode's video; None: the episode was recorded without that camera."""
    names = [f"videos/{key}/{n}" for n in ("chunk_index", "file_index", "from_timestamp")]
    if all(row.get(n) is None for n in names):
        return None
    chunk, file, start = (_field(row, n, where, kind) for n, kind in zip(names, (int, int, float)))
    return _place(root, info, "video_path", video_key=key, chunk_index=chunk, file_index=file), start


def _with_ends(entries: list[_Entry]) -> list[_Entry]:
    """Let an episode's part of a video end where the next episode starts, whose frames it must not show."""
    starts = defaultdict(set)
    for e in entries:
        for path, start, _ in e.videos.values():
            starts[path].add(start)
    ends = {(path, a): b for path, s in starts.items() for a, b in pairwise([*sorted(s), math.inf])}
    return [
        e._replace(videos={k: (p, start, ends[p, start]) for k, (p, start, _) in e.videos.items()}) for e in entries
    ]


def _with_outcomes(root: Path, entries: list[_Entry], features: dict, stated: bool) -> list[_Entry]:
    """Take outcomes that the metadata leave open from the frames; warn of those that stay unknown: they are successes.

    Args:
        root: the data set, for warnings.
        entries: success None where the metadata do not say.
        features: features of the frames.
        stated: the metadata have the field `success`; without it, and without OUTCOMES, all episodes are successes.
    """
    column = next((name for name in OUTCOMES if name in features), None)
    reward = next((name for name in REWARDS if name in features), None)
    out, unknown, unrewarded = [], [], []
    for e in entries:
        success = e.success
        if success is None and column:
            highest = _highest(e.data, stamp(e.data), column).get(e.index)
            success = None if highest is None else highest > 0
        elif success is None and reward and not stated:
            highest = _highest(e.data, stamp(e.data), reward).get(e.index)
            unrewarded += [e] * (highest is not None and highest <= 0)
        unknown += [e] * (success is None and (stated or column is not None))
        out.append(e._replace(success=success is not False, outcome_known=success is not None))
    advice = "taken as successes; write true or false to the field success of meta/episodes, or remove them"
    if unknown:
        warnings.warn(
            f"{root}: {len(unknown)} of {len(entries)} episodes do not say whether they succeeded "
            f"({'success' if stated else column} is null), first episode {unknown[0].index}: {advice}",
            stacklevel=2,
        )
    if 0 < len(unrewarded) < len(entries):
        warnings.warn(
            f"{root}: {len(unrewarded)} of {len(entries)} episodes never earn a reward ({reward}), first episode "
            f"{unrewarded[0].index}; outcomes are not read from rewards: {advice}",
            stacklevel=2,
        )
    return out


@functools.lru_cache(maxsize=2)
def _highest(path: Path, written: int, column: str) -> dict[int, float | None]:
    """Return episode_index -> highest value of a frame column (true is 1) in a data file; None: all are null."""
    from pyarrow import compute, types

    try:
        file = open_parquet(path)
    except (ValueError, OSError):
        return {}  # said when the episode is read
    if not {column, "episode_index"} <= set(file.schema_arrow.names):
        return {}
    with damage_named(str(path)):
        table = file.read(columns=["episode_index", column])
    values = table[column]
    if types.is_nested(values.type):  # features of shape [1] may be lists
        values = compute.list_element(values, 0)
    try:
        values = values.cast("float64")
    except (ValueError, NotImplementedError) as error:  # arrow's errors are of these kinds
        raise ValueError(f"{path}: {column} holds {values.type}, expected true and false, or numbers") from error
    table = table.set_column(1, column, values).group_by("episode_index").aggregate([(column, "max")])
    return dict(zip(table["episode_index"].to_pylist(), table[f"{column}_max"].to_pylist()))


def _json_lines(path: Path) -> list[dict]:
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing; the data set was copied without it")
    refuse_pointer(path)
    try:
        rows = [json.loads(line) for line in path.read_text().splitlines() if line.strip()]
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} does not consist of JSON lines ({error})") from error
    return [_field({"a line": row}, "a line", str(path), dict) for row in rows]


SCALARS = ("episode_index", "frame_index", "timestamp", "task_index")


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
    if not isinstance(text, str) or not text.strip():
        raise ValueError(f"{where} has no instruction: meta/tasks has {text!r} for its task_index, expected a text")
    return text.strip()


def _images(
    entry: _Entry, key: str, feature: dict, first: int, info: dict, root: Path, budget: Budget, where: str
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
