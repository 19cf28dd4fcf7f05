"""Episodes: demonstrations in memory, and their split into training and validation.

Shapes: T steps, H and W pixels.
"""

import json
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from vlarft.data.hdf5 import demo_names, open_demo_file


@dataclass(frozen=True)
class Episode:
    """One demonstration.

    images: (T, H, W, 3) uint8, upright, frame t seen before action t
    proprio: (T, 8) float32, position 3 [m], axis-angle 3 [rad], finger positions 2 [m]
    actions: (T, 7) float32, executed raw environment actions; what the world model learns from
    intended: (T, 7) float32, what the demonstrator wanted before noise; what the policy imitates
    states: (T, S) float64 simulator states, or None where the file has none
    name: suite/file/demo, unique in a data set: the split is stored by it
    """

    name: str
    instruction: str
    images: np.ndarray
    proprio: np.ndarray
    actions: np.ndarray
    intended: np.ndarray
    success: bool = True
    kind: str = "expert"
    states: np.ndarray | None = None
    env_args: dict | None = None

    def __len__(self) -> int:
        return len(self.actions)


def demo_files(path: str | Path) -> list[Path]:
    """The `*.hdf5` files of a folder (at any depth, sorted), or the one file that `path` is.

    Raises:
        FileNotFoundError: nothing there.
    """
    path = Path(path)
    if path.is_file():
        return [path]
    files = sorted(path.rglob("*.hdf5")) if path.is_dir() else []
    if not files:
        what = "has no *.hdf5 files" if path.is_dir() else "does not exist"
        raise FileNotFoundError(
            f"demonstrations: {path} {what}; make some with: python collect_demos.py --out-dir {path}"
        )
    return files


def load_episodes(
    path: str | Path,
    camera: str = "agentview",
    *,
    successes_only: bool = True,
    with_states: bool = False,
    names: Sequence[str] | None = None,
) -> list[Episode]:
    """Read demonstrations of LIBERO's HDF5 layout into memory.

    Args:
        path: a folder (searched at any depth) or one file.
        camera: reads `obs/<camera>_rgb`.
        successes_only: leave out attempts marked as failed or noisy; they serve a world model, never a policy.
        with_states: also read the simulator states (evaluation of world models against true outcomes).
        names: only the episodes of these names, in this order.

    Returns:
        Episodes in order of file and demonstration number.

    Raises:
        FileNotFoundError: no such file or folder, or no demonstrations in it.
        ValueError: truncated file, missing camera or dataset, NaN actions or proprio, wrong widths, unknown name.
    """
    episodes = []
    for file_path in demo_files(path):
        with open_demo_file(file_path) as file:
            data = file["data"]
            upright = data.attrs.get("image_convention", "") == "upright"
            instruction = _instruction(data, file_path)
            env_args = json.loads(data.attrs["env_args"]) if data.attrs.get("env_args") else None
            for key in demo_names(data):
                name = f"{file_path.parent.name}/{file_path.stem}/{key}"
                if names is not None and name not in names:
                    continue
                demo, where = data[key], f"{file_path}: data/{key}"
                success = bool(demo.attrs.get("success", True))
                kind = str(demo.attrs.get("kind", "expert"))
                if successes_only and not (success and kind == "expert"):
                    continue
                images = _dataset(demo, f"obs/{camera}_rgb", where)
                if images.ndim != 4 or images.shape[-1] != 3 or images.dtype != np.uint8:
                    raise ValueError(
                        f"{where}/obs/{camera}_rgb must be uint8 (T, H, W, 3), got {images.dtype} {images.shape}"
                    )
                if not upright:
                    images = np.ascontiguousarray(images[:, ::-1, ::-1])
                actions = _numbers(demo, "actions", 7, where)
                intended = _numbers(demo, "intended_actions", 7, where) if "intended_actions" in demo else actions
                proprio = np.concatenate(
                    [_numbers(demo, "obs/ee_states", 6, where), _numbers(demo, "obs/gripper_states", 2, where)], 1
                )
                lengths = {"actions": len(actions), "images": len(images), "proprio": len(proprio)}
                if len(set(lengths.values())) != 1:
                    raise ValueError(f"{where}: lengths differ: {lengths}")
                states = _dataset(demo, "states", where) if with_states else None
                episodes.append(
                    Episode(name, instruction, images, proprio, actions, intended, success, kind, states, env_args)
                )
    if names is not None:
        by_name = {e.name: e for e in episodes}
        if missing := [n for n in names if n not in by_name]:
            raise ValueError(f"{path} lacks {len(missing)} of {len(names)} named episodes, first {missing[0]!r}")
        return [by_name[n] for n in names]
    if not episodes:
        raise FileNotFoundError(f"{path} has no {'successful ' if successes_only else ''}demonstrations")
    return episodes


def _instruction(data, path: Path) -> str:
    info = json.loads(data.attrs["problem_info"]) if "problem_info" in data.attrs else {}
    text = info.get("language_instruction", "")
    text = " ".join(text) if isinstance(text, list) else text
    if not text.strip():
        raise ValueError(f"{path}: attribute problem_info of 'data' has no language_instruction")
    return text.strip()


def _dataset(demo, key: str, where: str) -> np.ndarray:
    if key not in demo:
        group = key.rpartition("/")[0]
        there = sorted(demo[group]) if group and group in demo else sorted(demo)
        raise ValueError(f"{where} has no {key}; it has {', '.join(there)}. Collect it again, or name another camera")
    try:
        return demo[key][()]
    except OSError as error:
        raise ValueError(f"{where}/{key} cannot be read ({error}); the file is damaged") from error


def _numbers(demo, key: str, width: int, where: str) -> np.ndarray:
    values = _dataset(demo, key, where).astype(np.float32)
    if values.ndim != 2 or values.shape[1] != width:
        raise ValueError(f"{where}/{key} must have shape (T, {width}), got {values.shape}")
    if not np.isfinite(values).all():
        row, column = np.argwhere(~np.isfinite(values))[0]
        raise ValueError(f"{where}/{key} has {values[row, column]} at row {row}, column {column}; remove or repair it")
    return values


def split_episodes(
    episodes: Sequence[Episode], validation_fraction: float, seed: int
) -> tuple[list[Episode], list[Episode]]:
    """Split by episode, with at least one in each part; the same for the same names and seed, whatever their order.

    Successful demonstrations and other attempts are split apart: a policy, which sees the former alone, and a world
    model that sees all of the same files hold out the same demonstrations, if fraction and seed are the same.

    Args:
        episodes: all of a data set.
        validation_fraction: share of the validation part; 1/50 in the paper (Sec. 4.2).
        seed: of the shuffle.

    Raises:
        ValueError: fewer than two episodes, or a fraction outside (0, 1).
    """
    if not 0 < validation_fraction < 1:
        raise ValueError(f"validation_fraction must lie in (0, 1), got {validation_fraction}")
    if len(episodes) < 2:
        raise ValueError(f"a split needs at least 2 episodes, got {len(episodes)}; collect more demonstrations")
    train, validation = [], []
    for demonstration in (True, False):
        ordered = [e for e in episodes if (e.success and e.kind == "expert") == demonstration]
        ordered.sort(key=lambda e: e.name)
        random.Random(seed).shuffle(ordered)
        count = round(validation_fraction * len(ordered))
        if not validation and len(ordered) > 1:
            count = min(max(1, count), len(ordered) - 1)
        train, validation = train + ordered[count:], validation + ordered[:count]
    if not (train and validation):  # one demonstration, one other attempt
        train, validation = (train + validation)[1:], (train + validation)[:1]
    return train, validation
