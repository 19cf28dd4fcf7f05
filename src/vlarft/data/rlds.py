"""Read episodes of RLDS data sets from TFRecord files, in the layout of the public `modified_libero_rlds`.

An episode is one tf.train.Example. Its features are flat lists over the steps: steps/action (7 floats per step),
steps/observation/state (8), steps/language_instruction, and steps/observation/<camera>: JPEG or PNG files, already
turned as public policies see them. The gripper is LIBERO's, -1 open and +1 close. An episode failed if
episode_metadata/success says so, or if its path there has a folder failure. Episodes that deny the camera
(episode_metadata/has_<camera>, as in Bridge) are left out, and so are PNGs of 16 bits, which are depth.
Checksums are verified on opening.
"""

import functools
import json
import os
import re
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from vlarft.data.episode import Episode, check_lengths, check_numbers, pick_camera, read_outcome, warn_splits
from vlarft.data.frames import Budget, EncodedImages, Frames, decode_image
from vlarft.data.tfrecord import Blobs, Feature, parse_example, read_records

SHARD = re.compile(r"(?P<split>.+\.tfrecord.*)-(?P<number>\d{5})-of-(?P<count>\d{5})$")
MAGIC = (b"\xff\xd8\xff", b"\x89PNG")
DEPTH_BITS = b"\x10"  # 16 bits a value, which no colour of a PNG has here: depth is left out


def check_shards(files: list[Path]) -> None:
    """Check that every data set has all the shards that its file names count (-00001-of-00016); warn of its splits.

    Raises:
        ValueError: a shard is missing; the message names the first.
    """
    splits: dict[Path, set[str]] = {}
    checked = set()
    for path in files:
        if match := SHARD.match(path.name):
            splits.setdefault(path.parent, set()).add(match["split"].partition(".")[0].rpartition("-")[2])
            if (one := (path.parent, match["split"], match["count"])) in checked:
                continue
            checked.add(one)
            for number in range(int(match["count"])):
                other = path.with_name(f"{match['split']}-{number:05d}-of-{match['count']}")
                if not other.is_file():
                    raise ValueError(f"{other} is missing beside {path.name}: the download is incomplete")
    for folder, names in splits.items():
        warn_splits(str(folder), sorted(names))


def read_rlds(
    path: Path, camera: str | None, budget: Budget, keep: Callable[[str, bool, str], bool]
) -> Iterator[Callable[[], Episode | None]]:
    """Yield functions that read an episode of a TFRecord file each; None: it is not to be kept.

    Args:
        path: the file.
        camera: image feature, without steps/observation/; None reads all, the first for `Episode.images`.
        budget: limit on the decoded frames that are kept.
        keep: (name, success, kind) -> whether to read an episode.

    Raises:
        ValueError: truncated or damaged file, missing camera or feature, NaN, lengths that differ.
    """
    # episodes are named after the data set, not its version: libero_spatial_no_noops/1.0.0/<file>
    folder = Path(os.path.abspath(path)).parent
    folder = folder.parent if re.fullmatch(r"\d+\.\d+\.\d+", folder.name) else folder

    lacking: list[str] = []  # episodes without the camera

    def read(content: np.ndarray, at: int, name: str, where: str) -> Episode | None:
        try:
            features = parse_example(content, at)
        except ValueError as error:
            raise ValueError(f"{where} is {error}") from error
        success = _outcome(content, features, where)
        if not keep(name, success is not False, "expert"):
            return None
        keys = {
            key.removeprefix("steps/observation/"): key
            for key, feature in sorted(features.items())
            if key.startswith("steps/observation/") and _is_image(content, feature)
        }
        picked = pick_camera(keys, camera, where)
        if camera is not None and _is_placeholder(features, picked):
            lacking.append(name)
            return None
        cameras = {
            name: _frames(content, features[key], budget, f"{where}/{key}")
            for name, key in keys.items()
            if camera is None or name == picked
        }
        images = cameras[picked]
        actions, proprio = (
            _numbers(features, key, len(images), where) for key in ("steps/action", "steps/observation/state")
        )
        check_lengths(where, actions=actions, **cameras)
        return Episode(
            name=name,
            instruction=_instruction(content, features, where),
            images=images,
            proprio=proprio,
            actions=actions,
            intended=actions,
            success=success is not False,
            outcome_known=success is not None,
            cameras=cameras,
        )

    count = 0
    for number, (content, at) in enumerate(read_records(path)):
        count, name = number + 1, f"{folder.name}/{path.name}/episode_{number}"
        if keep(name, True, "expert"):
            yield functools.partial(read, content, at, name, f"{path}: record {number}")
    if lacking:
        warnings.warn(
            f"{path}: {len(lacking)} episodes say that they have no camera {camera}, first {lacking[0]}: left out",
            stacklevel=2,
        )
    if count < (promised := _promised(path)):
        raise ValueError(f"{path} has {count} of {promised} records: the download is incomplete")


def _promised(path: Path) -> int:
    """Return how many records dataset_info.json says that a shard has; 1 where it does not say."""
    about, match = path.with_name("dataset_info.json"), SHARD.match(path.name)
    if match and about.is_file():
        try:
            splits = {split["name"]: split["shardLengths"] for split in json.loads(about.read_text())["splits"]}
            name, _, number = path.name.partition(".tfrecord-")
            return int(splits[name.rpartition("-")[2]][int(number.partition("-")[0])])
        except (ValueError, LookupError, TypeError):
            pass  # of another program than TFDS
    return 1


def _outcome(content: np.ndarray, features: dict[str, Feature], where: str) -> bool | None:
    """Return whether an episode succeeded, by its metadata or a folder of its path; None: not known."""
    about = {}
    for key, value in features.items():
        if key == "episode_metadata/success" or (key.startswith("episode_metadata/") and key.endswith("path")):
            items = _texts(content, value, f"{where}/{key}") if isinstance(value, Blobs) else value.tolist()
            about[key.removeprefix("episode_metadata/")] = items[0] if len(items) else None
    if (success := read_outcome(about.get("success"), f"{where}/episode_metadata")) is not None:
        return success
    folders = {part for key, value in about.items() if key.endswith("path") for part in str(value).split("/")}
    return False if "failure" in folders else True if "success" in folders else None


def _texts(content: np.ndarray, places: Blobs, where: str) -> list[str]:
    blobs = (content[o : o + n].tobytes() for o, n in zip(places.offsets.tolist(), places.sizes.tolist()))
    try:
        return [blob.decode() for blob in blobs]
    except UnicodeDecodeError as error:
        raise ValueError(f"{where} is not text in UTF-8 ({error}); write it anew") from error


def _is_placeholder(features: dict[str, Feature], camera: str) -> bool:
    """Return whether an episode says that it lacks a camera, as Bridge does, whose images are then black."""
    there = features.get(f"episode_metadata/has_{camera}")
    return isinstance(there, np.ndarray) and len(there) == 1 and not there[0]


def _is_image(content: np.ndarray, feature: Feature) -> bool:
    if not isinstance(feature, Blobs) or not len(feature.offsets):
        return False
    start = int(feature.offsets[0])
    head = content[start : start + 25].tobytes()
    return head.startswith(MAGIC) and not (head.startswith(b"\x89PNG") and head[24:] == DEPTH_BITS)  # may be cut short


def _frames(content: np.ndarray, places: Blobs, budget: Budget, where: str) -> Frames:
    def blobs(lo: int, hi: int) -> list[np.ndarray]:
        return [content[o : o + n] for o, n in zip(places.offsets[lo:hi].tolist(), places.sizes[lo:hi].tolist())]

    if len(empty := np.flatnonzero(np.asarray(places.sizes) == 0)):
        raise ValueError(
            f"{where}, frame {empty[0]} is empty ({len(empty)} of {len(places.sizes)} frames); remove the record"
        )
    size = decode_image(blobs(0, 1)[0], f"{where}, frame 0").shape
    return Frames(EncodedImages(blobs, where), (len(places.offsets), *size), budget, where)


def _numbers(features: dict[str, Feature], key: str, steps: int, where: str) -> np.ndarray:
    values = features.get(key)
    if not isinstance(values, np.ndarray) or not values.size:
        raise ValueError(f"{where} has no numbers in {key}; it has {', '.join(sorted(features))}")
    if len(values) % steps:
        raise ValueError(f"{where}/{key} has {len(values)} numbers, not a multiple of the {steps} images")
    return check_numbers(values.reshape(steps, -1), f"{where}/{key}")


def _instruction(content: np.ndarray, features: dict[str, Feature], where: str) -> str:
    texts = features.get("steps/language_instruction")
    if not isinstance(texts, Blobs) or not len(texts.offsets):
        raise ValueError(f"{where} has no steps/language_instruction; it has {', '.join(sorted(features))}")
    unique = set(_texts(content, texts, f"{where}/steps/language_instruction"))
    if len(unique) != 1 or not next(iter(unique)).strip():
        raise ValueError(f"{where}/steps/language_instruction must be one text, got {sorted(unique)[:3]}")
    return unique.pop().strip()
