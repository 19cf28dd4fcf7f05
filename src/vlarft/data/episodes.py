"""Read demonstrations of any format, and split them into training and validation episodes.

A new format is a file like rlds.py, whose reader yields `Episode`s, and a line for it in `demo_files`, which detects
formats, and in `read_episodes`. All scripts, `data.check` and `data.convert` read it then.
"""

import os
import random
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from vlarft.data.consistency import check_episodes, check_places, copies, other_names, target_positions
from vlarft.data.episode import KINDS, Episode, episode_digests
from vlarft.data.frames import Budget, Frames
from vlarft.data.hdf5_reader import read_hdf5
from vlarft.data.lerobot import read_lerobot
from vlarft.data.rlds import check_shards, read_rlds

OTHER_TFDS = ".array_record", ".riegeli"
CACHE_BYTES = 1 << 30  # decoded frames kept in memory; a smaller data set is decoded only once


def demo_files(path: str | Path) -> tuple[str, list[Path]]:
    """Return the format of the demonstrations at `path`, and their files.

    Args:
        path: a folder, searched at any depth, or one HDF5 or TFRecord file.

    Returns:
        "hdf5" and files, "rlds" and TFRecord files, or "lerobot" and folders that contain meta/info.json; sorted.

    Raises:
        FileNotFoundError: no such path, or no demonstrations.
        ValueError: several formats in one folder.
    """
    path = Path(path)
    if path.is_file():
        return ("rlds" if ".tfrecord" in path.name else "hdf5"), [path]
    if not path.is_dir():
        raise FileNotFoundError(
            f"demonstrations: {path} does not exist; make some with: python collect_demos.py --out-dir {path}"
        )
    files = _files(path)
    formats = {
        "lerobot": [p.parent.parent for p in files if p.parts[-2:] == ("meta", "info.json")],
        "hdf5": [p for p in files if p.suffix in (".hdf5", ".h5")],
        "rlds": [p for p in files if ".tfrecord" in p.name],
    }
    if other := next((p for n in OTHER_TFDS for p in files if n in p.name and not any(formats.values())), None):
        raise ValueError(
            f"{other} is a TFDS file of another container than TFRecord; rewrite the data set as TFRecord with TFDS "
            "(tfds convert_format)"
        )
    formats = {kind: sorted(places) for kind, places in formats.items() if places}
    if not formats:
        raise FileNotFoundError(
            f"demonstrations: {path} has no *.hdf5 files, no meta/info.json (LeRobot) and no *.tfrecord* files (RLDS); "
            f"make some with: python collect_demos.py --out-dir {path}"
        )
    if len(formats) > 1:
        examples = "; ".join(f"{kind}: {places[0]}" for kind, places in formats.items())
        raise ValueError(f"{path} has demonstrations of several formats ({examples}): give the folder of one of them")
    return next(iter(formats.items()))


def _files(folder: Path) -> list[Path]:
    """Return all files below a folder, those of linked folders as well, each folder's once.

    Warns of folders that an unfinished collection or conversion left, which are passed over.
    """
    found, seen = [], set()
    for place, folders, names in os.walk(folder, followlinks=True):
        for unfinished in [name for name in folders if name.endswith((".parts", ".tmp"))]:
            folders.remove(unfinished)
            warnings.warn(
                f"{Path(place, unfinished)} is of a collection or conversion that was not finished, and is left out: "
                "give its command again",
                stacklevel=2,
            )
        folders[:] = [name for name in folders if not name.startswith(".")]  # .cache of a download
        if (real := os.path.realpath(place)) in seen:
            folders.clear()
            continue
        seen.add(real)
        found += [Path(place, name) for name in names]
    return found


def read_episodes(
    path: str | Path,
    camera: str | None,
    keep: Callable[[str, bool, str], bool],
    *,
    with_states: bool | None = False,
    budget: Budget | None = None,
    bad: Callable[[Exception], None] | None = None,
) -> Iterator[Episode]:
    """Yield the episodes at `path`, each checked on its own but for its images (`Frames.check`).

    Arguments and errors are those of `load_episodes`, but:

    Args:
        camera: None reads all cameras, the first for `Episode.images`.
        keep: (name, success, kind) -> whether to read an episode.
        with_states: None: where there are some.
        budget: limit on the decoded frames that are kept; None: `CACHE_BYTES` of them.
        bad: takes the errors of episodes and files that cannot be read, which are left out; images are then checked
            thoroughly. None raises the first error.
    """
    kind, places = demo_files(path)
    if with_states and kind != "hdf5":
        raise ValueError(f"{path} ({kind}) holds no simulator states; they are in HDF5 demonstrations only")
    budget = budget or Budget(CACHE_BYTES)
    unknown: dict[str, str] = {}  # name -> kind
    if kind == "rlds":
        check_shards(places)

    def keep_and_note(name: str, success: bool, kind: str) -> bool:
        if kind not in KINDS:
            unknown[name] = kind
        return keep(name, success, kind)

    for place in places:
        if kind == "hdf5":
            reads = read_hdf5(place, camera, budget, keep_and_note, with_states)
        elif kind == "rlds":
            reads = read_rlds(place, camera, budget, keep_and_note)
        else:
            reads = read_lerobot(place, camera, budget, keep_and_note)
        while True:
            try:
                episode = next(reads)()
            except StopIteration:  # after an error of the file, too
                break
            except (ValueError, OSError) as error:
                if bad is None:
                    raise
                bad(error)
                continue
            faults = [] if bad is None or episode is None else _image_faults(episode)
            for fault in faults:
                bad(fault)
            if episode is not None and not faults:
                yield episode
    if unknown:
        warnings.warn(
            f"{path}: kind is {dict(Counter(unknown.values()))}, expected {', '.join(KINDS)}: policies do not learn "
            "from these episodes; relabel them with python -m vlarft.data.convert --kind",
            stacklevel=2,
        )


def _image_faults(episode: Episode) -> list[Exception]:
    """Return the errors that a walk through the files of an episode's images finds."""
    faults = []
    for images in episode.cameras.values():
        try:
            if isinstance(images, Frames):
                images.check(thorough=True)
        except (ValueError, OSError) as error:
            faults.append(error)
    return faults


def warn_left_out(errors: Sequence[Exception]) -> None:
    """Warn of episodes that were left out, each with its error; episodes of one file may share it."""
    if errors:
        lines = dict.fromkeys(map(str, errors))
        warnings.warn(
            "\n  ".join([f"{len(errors)} episodes or files cannot be read and are left out:", *lines]), stacklevel=3
        )


def load_episodes(
    path: str | Path | Sequence[str | Path],
    camera: str = "agentview",
    *,
    successes_only: bool = True,
    with_states: bool = False,
    names: Sequence[str] | None = None,
    cache_bytes: int = CACHE_BYTES,
    skip_bad: bool = False,
) -> list[Episode]:
    """Read demonstrations; their images stay on disk until they are accessed.

    The format is detected: LIBERO's HDF5, original or written here; LeRobotDataset v3.0, v2.1 and v2.0; RLDS TFRecords.
    Images are returned upright: LIBERO's are turned by 180 degrees, as public policies see them. Actions are raw,
    gripper commands -1 open and +1 close.

    Args:
        path: a folder (searched at any depth) or one file; or several places, each of any format.
        camera: the only one that is read; "agentview" and "eye_in_hand" also match the names that other formats give to
            LIBERO's two cameras.
        successes_only: read successful experts only; other attempts train world models, never policies.
        with_states: also read simulator states, to evaluate world models against true outcomes; HDF5 only.
        names: read only the episodes of these names, in this order.
        cache_bytes: decoded frames kept in memory, over all episodes; while there is room, none is decoded twice.
        skip_bad: leave out episodes that cannot be read, and list them in a warning. Goes through all packets and
            image headers of `camera`, as `data.check` does, which reads the files once.

    Returns:
        Episodes in order of place, file and demonstration number.

    Raises:
        FileNotFoundError: no such file or folder, or no demonstrations in it.
        ValueError: truncated file, missing camera or feature, NaN actions or proprio, wrong widths, unknown name,
            episodes that differ in fps or in the width of actions or proprio, a gripper in other units, a video of
            `camera` that lacks frames; places whose episodes do not fit together, see `check_places`.

    Warns of LeRobot episodes whose outcome is not known, which are taken as successes, of those without `camera`, which
    are left out, of copies, of dimensions with other names in some episodes, and of splits that the files state.
    """
    wanted = None if names is None else set(names)

    def keep(name: str, success: bool, kind: str) -> bool:
        return (wanted is None or name in wanted) and (not successes_only or (success and kind == "expert"))

    places, budget = [path] if isinstance(path, str | Path) else list(path), Budget(cache_bytes)
    errors: list[Exception] = []
    options = {"with_states": with_states, "budget": budget, "bad": errors.append if skip_bad else None}
    found = {p: list(read_episodes(p, camera, keep, **options)) for p in places}
    warn_left_out(errors)
    if empty := [p for p, episodes in found.items() if not episodes and not names]:
        raise FileNotFoundError(f"{empty[0]} has no {'successful ' if successes_only else ''}demonstrations")
    found = {p: episodes for p, episodes in found.items() if episodes}
    by_name = {e.name: e for episodes in found.values() for e in episodes}
    if names is not None and (missing := [n for n in names if n not in by_name]):
        where = " + ".join(map(str, places))
        raise ValueError(f"{where} lacks {len(missing)} of {len(names)} named episodes, first {missing[0]!r}")
    for place, episodes in found.items():
        check_episodes(place, episodes)
    check_places(found, camera)
    everything = [e for episodes in found.values() for e in episodes]
    for text in copies(everything) + other_names(everything):
        warnings.warn(text, stacklevel=2)
    for place, episodes in found.items():
        if positions := [] if episodes[0].absolute else target_positions(episodes):
            warnings.warn(
                f"{place}: actions {positions} are close to proprio {positions}: target positions rather than motions? "
                "If so, convert with --absolute, so that holding still repeats them",
                stacklevel=2,
            )
    return list(by_name.values()) if names is None else [by_name[n] for n in names]


def split_episodes(
    episodes: Sequence[Episode], validation_fraction: float, seed: int
) -> tuple[list[Episode], list[Episode]]:
    """Split by episode, at least one in each part. The split depends on names and seed, not on the episodes' order.

    Successful experts, other attempts, and attempts of a policy are split separately. A policy, which sees only the
    first, and a world model that sees all files thus hold out the same demonstrations, given equal fraction and seed;
    and attempts of a policy that are added later do not change the split of the others. Attempts from one start go to
    one part together, whatever their kind.

    Args:
        episodes: all episodes of a data set.
        validation_fraction: share of validation episodes; 1/50 in the paper (Sec. 4.2).
        seed: seed of the shuffle.

    Returns:
        Training and validation episodes.

    Raises:
        ValueError: fewer than two episodes, or a fraction outside (0, 1).
    """
    if not 0 < validation_fraction < 1:
        raise ValueError(f"validation_fraction must lie in (0, 1), got {validation_fraction}")
    if len(episodes) < 2:
        raise ValueError(f"a split needs at least 2 episodes, got {len(episodes)}; collect more demonstrations")
    train, validation = [], []
    placed: dict[str, list[Episode]] = {}  # start -> the part of its attempts
    parts: dict[str, list[Episode]] = {"demonstration": [], "other": [], "policy": []}
    for e in episodes:
        part = "demonstration" if e.success and e.kind == "expert" else "policy" if e.kind == "policy" else "other"
        parts[part].append(e)
    for part in parts.values():
        groups: dict[str, list[Episode]] = {}  # by start
        for e in sorted(part, key=lambda e: e.name):
            if e.start in placed:
                placed[e.start].append(e)
            else:
                groups.setdefault(e.start or e.name, []).append(e)
        ordered = list(groups.values())
        random.Random(seed).shuffle(ordered)
        count = round(validation_fraction * len(ordered))
        if not validation and len(ordered) > 1:
            count = min(max(1, count), len(ordered) - 1)
        for side, chosen in ((train, ordered[count:]), (validation, ordered[:count])):
            side += [e for group in chosen for e in group]
            placed |= {group[0].start: side for group in chosen if group[0].start}
    if not (train and validation):  # for example one demonstration and one other attempt
        train, validation = (train + validation)[1:], (train + validation)[:1]
    return train, validation


def split_facts(train: Sequence[Episode], held_out: Sequence[Episode]) -> dict[str, Any]:
    """Return what a model's file says of the episodes: the names of both parts, and digests of their contents."""
    names = {"train_episodes": [e.name for e in train], "held_out_episodes": [e.name for e in held_out]}
    return {**names, "episode_digests": episode_digests([*train, *held_out])}
