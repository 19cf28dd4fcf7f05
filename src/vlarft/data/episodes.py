"""Read demonstrations of any format, and split them into training and validation episodes.

A new format is a file like rlds.py, whose reader yields `Episode`s, and a line for it in `demo_files`, which detects
formats, and in `read_episodes`. All scripts, `data.check` and `data.convert` read it then.
"""

import hashlib
import os
import random
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import zip_longest
from pathlib import Path

import numpy as np

from vlarft.data.convention import check_same_images, image_convention
from vlarft.data.episode import KINDS, Episode
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


def target_positions(episodes: Sequence[Episode]) -> list[int]:
    """Return the dimensions, grippers apart, in which proprio soon is where the action was: target positions."""
    some = [e for e in episodes if len(e) > 12]
    some = some[:: -(-len(some) // 200) or 1]
    dims = range(min(episodes[0].actions.shape[1], episodes[0].proprio.shape[1]))
    apart = {*episodes[0].grippers, *(episodes[0].held_dims or ())}
    return [i for i in dims if some and i not in apart and any(_follows(some, i, lag) for lag in range(4))]


def _follows(episodes: Sequence[Episode], dim: int, lag: int) -> bool:
    """Return whether proprio, `lag` steps later, is close to the action."""
    action = np.concatenate([e.actions[: len(e) - lag, dim] for e in episodes])
    place = np.concatenate([e.proprio[lag:, dim] for e in episodes])
    if action.std() < 1e-6 or place.std() < 1e-6:
        return False
    return np.corrcoef(action, place)[0, 1] > 0.95 and np.abs(action - place).mean() < 0.5 * place.std()


def copies(episodes: Sequence[Episode]) -> list[str]:
    """Return a message if episodes have the same numbers as others: such copies may be held out and trained on."""
    first: dict[bytes, str] = {}
    digests = (hashlib.sha256(e.actions.tobytes() + e.proprio.tobytes()).digest() for e in episodes)
    names = [(first.setdefault(digest, e.name), e.name) for digest, e in zip(digests, episodes)]
    if twice := [(one, other) for one, other in names if one != other]:
        return [
            f"{len(twice)} of {len(episodes)} episodes have the actions and proprio of another, first {twice[0][1]} "
            f"those of {twice[0][0]}: copies, which may be held out while the original is trained on; remove them"
        ]
    return []


def zero_starts(zero: Sequence[bool]) -> list[str]:
    """Return a message if nearly all episodes, of which `begins_at_zero` is given, begin with an action of zeros."""
    if not zero or sum(zero) < 0.9 * len(zero):
        return []
    return [
        f"the first action of {sum(zero)} of {len(zero)} episodes is zero in all dimensions, unlike later ones, as in "
        "BridgeData V2: it is no command, and --gripper would make one of it. Remove these steps; convert "
        "--drop-no-ops leaves out those in which the robot rests"
    ]


def check_episodes(place: str | Path, episodes: Sequence[Episode]) -> None:
    """Check that the episodes of one place are a data set: names, frames, robot, gripper.

    Raises:
        FileNotFoundError, ValueError: see `load_episodes`.
    """
    by_name = {e.name: e for e in episodes}
    if twice := [e.name for e in episodes if by_name[e.name] is not e]:
        raise ValueError(
            f"{place} has two episodes of the name {twice[0]!r}, in folders of one name; rename one of them"
        )
    for e in episodes:
        if isinstance(e.images, Frames):
            e.images.check()
    if problems := same_robot(episodes) or gripper_problems(episodes):
        raise ValueError(f"{place}: {problems[0]}")
    sizes: dict[tuple[int, int], str] = {}
    for e in episodes:
        sizes.setdefault(tuple(e.images.shape[1:3]), e.name)
    if len(sizes) > 1:
        examples = ", ".join(f"{h}x{w} in {name}" for (h, w), name in sizes.items())
        raise ValueError(
            f"{place}: episodes differ in image size: {examples}; bring them to one with python -m vlarft.data.convert "
            "SRC DST --size H W"
        )


def check_places(found: Mapping[str | Path, Sequence[Episode]], camera: str) -> None:
    """Check that episodes of several places, each checked on its own, are one data set.

    Args:
        found: place -> its episodes.
        camera: camera of their images.

    Raises:
        ValueError: episodes of one name in two places, another image size, robot or image convention; the message names
            both places.
    """
    origin: dict[str, str | Path] = {}
    for place, episodes in found.items():
        if twice := [e.name for e in episodes if e.name in origin]:
            raise ValueError(
                f"{origin[twice[0]]} and {place} both have an episode {twice[0]!r} ({len(twice)} such names). If they "
                "are the same episodes, leave out one place; collect_demos.py --demos-per-task 0 --noisy-per-task 0 "
                "collects attempts of a policy alone. If they are not, rename the folder "
                f"{twice[0].split('/')[0]!r} in one of them"
            )
        origin |= {e.name: place for e in episodes}
    if len(found) < 2:
        return
    (first, reference), *others = found.items()
    images = image_convention(reference, camera)
    for place, episodes in others:
        if problems := same_robot([*reference, *episodes]):
            raise ValueError(f"{first} and {place}: {problems[0]}")
        (h, w), (height, width) = (part[0].images.shape[1:3] for part in (reference, episodes))
        if (h, w) != (height, width):
            raise ValueError(
                f"{first} has images of {h}x{w}, {place} of {height}x{width}: bring them to one size with python -m "
                "vlarft.data.convert SRC DST --size H W, or collect them at one size"
            )
        fix = "bring them into one (python -m vlarft.data.convert SRC DST --turn turns by 180 degrees)"
        check_same_images(images, str(first), image_convention(episodes, camera), str(place), fix)


def same_robot(episodes: Sequence[Episode]) -> list[str]:
    """Return a message for each of fps, dimensions and kind of actions in which the episodes differ."""
    problems = []
    for what, fix, value in (
        ("fps", "resample them, or train on one kind", lambda e: e.fps),
        ("number of action dimensions", "train on one robot", lambda e: e.actions.shape[1]),
        ("number of proprio dimensions", "train on one robot", lambda e: e.proprio.shape[1]),
        ("kind of actions (absolute)", "convert them to one kind", lambda e: e.absolute),
        ("gripper dimensions", "convert them with --gripper-dims", lambda e: e.grippers),
        ("held dimensions", "convert them with --held-dims", lambda e: e.held_dims),
    ):
        first = {}
        for e in episodes:
            if value(e) is not None:
                first.setdefault(value(e), e.name)
        if len(first) > 1:
            examples = ", ".join(f"{v} in {name}" for v, name in list(first.items())[:2])
            problems.append(f"episodes differ in {what}: {examples}; {fix}")
    return problems


def other_names(episodes: Sequence[Episode]) -> list[str]:
    """Return a message for each of actions and proprio whose dimensions have other names in some episodes."""
    texts = []
    for what in ("action", "proprio"):
        first: dict[tuple[str, ...], str] = {}
        for e in episodes:
            first.setdefault(getattr(e, f"{what}_names"), e.name)
        first.pop((), None)
        if len(first) > 1:
            (ours, one), (theirs, other) = list(first.items())[:2]
            i, (a, b) = next(p for p in enumerate(zip_longest(ours, theirs)) if len({*p[1]}) > 1)
            texts.append(
                f"{what} {i} is {a!r} in {one}, {b!r} in {other}: if they are other joints or in other "
                "units, train on one kind"
            )
    return texts


def gripper_problems(episodes: Sequence[Episode]) -> list[str]:
    """Return a message for each gripper dimension without commands of -1 (open) and +1 (closed); the first robot's."""
    problems = []
    for dim in episodes[0].grippers:
        columns = [e.actions[:, dim] for e in episodes]
        low, high = (np.array([getattr(c, f)() for c in columns]) for f in ("min", "max"))
        assumed, what = episodes[0].gripper_dims is None, f"the gripper action (dimension {dim})"
        fix = (
            "expected -1 open, +1 close: convert the data set with python -m vlarft.data.convert SRC DST "
            "--gripper OPEN CLOSED, your robot's values for the two"
        )
        if assumed:
            fix += (
                ". The files do not name a gripper, and the last dimension is taken for one: if it is none, give "
                f"--gripper-dims without a number, and if it is continuous, --held-dims {dim}"
            )
        worst = int(np.argmax(np.maximum(-low, high)))
        between = np.mean(np.abs(np.concatenate(columns)) < 0.9)
        if max(-low.min(), high.max()) > 1 + 1e-4:
            problem = f"{episodes[worst].name}: {what} lies in [{low[worst]:g}, {high[worst]:g}]; {fix}"
        elif (never := (low >= 0) & (low < 0.9) & (low < high)).any():  # an episode that stays closed has 1 alone
            i = int(never.argmax())
            some = f"{episodes[i].name}, one of {never.sum()} such episodes"
            problem = f"{some}: {what} lies in [{low[i]:g}, {high[i]:g}], never below 0; {fix}"
        elif between > 0.1:
            problem = (
                f"{what}{', the last, as the files do not name one,' * assumed} lies between -0.9 and 0.9 in "
                f"{between:.0%} of the steps, so it is not binary. Say what it is: "
                f"--held-dims {dim} of python -m vlarft.data.convert marks a continuous gripper, --gripper-dims the "
                'binary ones, or none; or write "vlarft": {"gripper_dims": [], "held_dims": []} into meta/info.json '
                "(LeRobot), with the numbers of the dimensions"
            )
        else:
            continue
        problems.append(problem)
    return problems


def check_outcomes(episodes: Sequence[Episode], where: str) -> None:
    """Check that episodes say how they ended; warn of demonstrations that do not, which count as successes.

    Args:
        episodes: of which outcomes are needed.
        where: their places, for the message.

    Raises:
        ValueError: an attempt, which may have failed, does not say it.
    """
    unknown = [e.name for e in episodes if not e.outcome_known]
    if attempts := [e.name for e in episodes if not e.outcome_known and e.kind != "expert"]:
        raise ValueError(
            f"{where}: {len(attempts)} of {len(episodes)} episodes are attempts that do not say whether they "
            f"succeeded, first {attempts[0]}: label them (the attribute success in HDF5, the field success of "
            "meta/episodes in LeRobot or of episode_metadata in RLDS), or leave them out"
        )
    if unknown:
        warnings.warn(
            f"{where}: {len(unknown)} of {len(episodes)} episodes do not say whether they succeeded, first "
            f"{unknown[0]}: they are taken as successes, which is right for demonstrations only. The attribute success "
            "(HDF5), the field success of meta/episodes (LeRobot) or of episode_metadata (RLDS) says it",
            stacklevel=2,
        )


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
