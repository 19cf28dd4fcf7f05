"""Do episodes belong together, and do their numbers mean what training takes them for?

Nothing is read here, see episodes.py, which asks on loading; `vlarft.data.check` asks more, before a training. What is
wrong comes back as messages, or is raised.
"""

import hashlib
import warnings
from collections.abc import Mapping, Sequence
from itertools import zip_longest
from pathlib import Path

import numpy as np

from vlarft.data.convention import check_same_images, image_convention
from vlarft.data.episode import Episode, episode_digests
from vlarft.data.frames import Frames


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


def warn_other_contents(facts: Mapping, name: str, episodes: Sequence[Episode]) -> None:
    """Warn if episodes have names that a model knows, of those it learned from or held out, and other contents.

    Args:
        facts: what the model's file says of its training; that of an older version tells no contents.
        name: what to call the model.
        episodes: those of today.
    """
    known = facts.get("episode_digests", {})
    today = episode_digests([e for e in episodes if e.name in known])
    if other := [n for n, digest in today.items() if known[n] != digest]:
        warnings.warn(
            f"{name} knows {len(other)} of {len(episodes)} episodes by name, first {other[0]}, with other actions, "
            "proprio, instructions, labels or image sizes: recorded anew? It is taken to have seen, or held out, these",
            stacklevel=2,
        )


def begins_at_zero(episode: Episode) -> bool:
    """Return whether the first action, unlike nine of ten later ones, is exactly zero in all dimensions."""
    zero = ~episode.actions.any(1)
    return bool(zero[0] and zero[1:].sum() < 0.1 * len(zero[1:]))


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
