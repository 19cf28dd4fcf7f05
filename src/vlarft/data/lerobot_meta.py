"""What the files below meta/ of a LeRobotDataset say: robot, cameras, episodes and their outcomes; see lerobot.py."""

import functools
import json
import math
import re
import warnings
from collections import defaultdict
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

from vlarft.data.damage import damage_named
from vlarft.data.episode import read_outcome
from vlarft.data.video import stamp
from vlarft.run.lfs import refuse_pointer
from vlarft.run.optional import optional

VERSIONS = ("v2.0", "v2.1", "v3.0")
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


class Entry(NamedTuple):
    """Metadata of an episode; videos: key of each camera it has -> (file, the episode's start and end in it [s])."""

    index: int
    length: int
    tasks: list[str]
    data: Path
    videos: dict[str, tuple[Path, float, float]]
    success: bool | None  # None: the metadata do not say
    kind: str
    start: str | None = None  # see `Episode`
    outcome_known: bool = True  # False: `success` is a guess


LABELS = "absolute", "gripper_dims", "held_dims", "source"  # of info.json's "vlarft", see lerobot.py


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
    for key, value in (info.get("vlarft") or {}).items():
        if key not in LABELS or (key == "absolute" and not isinstance(value, bool)):
            raise ValueError(
                f"{path}: vlarft has {key} {value!r}; known are {', '.join(LABELS)}, and absolute is a bool"
            )
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


def read_cameras(features: dict) -> dict[str, str]:
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
    names = dimension_names(feature, width)
    kinds = {re.sub(r"[\W\d_]+", "", n) for n in names}  # motor_0, motor_1, ... say nothing
    if not names or (len(kinds) == 1 and not GRIPPER.search(names[0])):
        return None, ()
    return tuple(i for i, n in enumerate(names) if GRIPPER.search(n)), ()


def dimension_names(feature: dict, width: int) -> list[str]:
    """Return the names of a feature's dimensions; [] if it does not have one for each of them."""
    names = feature.get("names")
    names = names if isinstance(names, list | dict) else ()
    if isinstance(names, dict):  # {"motors": ["x", "y"]} or {"x": 0, "y": 1}
        numbered = all(isinstance(i, int) for i in names.values())
        names = sorted(names, key=names.get) if numbered else names.values()
    names = [str(n) for group in names for n in (group if isinstance(group, list) else [group])]
    return names if len(names) == width else []


def read_entries(root: Path, info: dict, video_keys: list[str]) -> tuple[list[Entry], dict[int, str]]:
    """Return the episodes in the order of their numbers, and task_index -> instruction."""
    meta, new = root / "meta", info["codebase_version"] == "v3.0"
    if video_keys and not info.get("video_path"):
        raise ValueError(f"{meta / 'info.json'} has video features ({', '.join(video_keys)}) and no video_path")
    rows, tasks = _tables(meta) if new else _json_tables(meta)
    stated = any("success" in row for _, row in rows)
    entries = []
    for path, row in rows:
        row = {name: None if _is_null(value) else value for name, value in row.items()}
        index = _field(row, "episode_index", str(path), int)
        where = f"{path}: episode {index}"
        if new:
            place = {f"{n}_index": _field(row, f"data/{n}_index", where, int) for n in ("chunk", "file")}
            videos = {k: _video_place(root, info, row, k, where) for k in video_keys}
        else:
            place = {"episode_chunk": index // int(info.get("chunks_size") or 1000), "episode_index": index}
            videos = {k: (_place(root, info, "video_path", video_key=k, **place), 0.0) for k in video_keys}
        texts = row.get("tasks") or []
        entry = Entry(
            index,
            _field(row, "length", where, int),
            [texts] if isinstance(texts, str) else _field({"tasks": texts}, "tasks", where, list),
            _place(root, info, "data_path", **place),
            {k: (*place, math.inf) for k, place in videos.items() if place},
            read_outcome(row.get("success"), where),
            str(row.get("kind") or "expert"),
            None if row.get("start") in (None, "") else str(row["start"]),
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


def _is_null(value: object) -> bool:
    """Return whether a value is missing: null, or, as pandas writes that among numbers, not a number."""
    return value is None or (isinstance(value, float) and math.isnan(value))


def _field(row: dict, name: str, where: str, kind: type) -> Any:
    """Return row[name], which must be one of TYPES; numbers are converted."""
    if name not in row:
        raise ValueError(f"{where} has no field {name}; it has {', '.join(sorted(row))}")
    if _is_null(row[name]):
        raise ValueError(f"{where}: {name} is null; fill it in, or remove the episode")
    value, numeric = row[name], kind in (int, float)
    usable = isinstance(value, int | float if numeric else kind) and (not numeric or abs(value) < 2**63)
    if not usable or (numeric and value != kind(value)):
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


def _with_ends(entries: list[Entry]) -> list[Entry]:
    """Let an episode's part of a video end where the next episode starts, whose frames it must not show."""
    starts = defaultdict(set)
    for e in entries:
        for path, start, _ in e.videos.values():
            starts[path].add(start)
    ends = {(path, a): b for path, s in starts.items() for a, b in pairwise([*sorted(s), math.inf])}
    return [
        e._replace(videos={k: (p, start, ends[p, start]) for k, (p, start, _) in e.videos.items()}) for e in entries
    ]


def _with_outcomes(root: Path, entries: list[Entry], features: dict, stated: bool) -> list[Entry]:
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
