"""Read episodes from LIBERO's HDF5 layout (`hdf5.py`), original files and those written here.

Images stay in the file. Uncompressed ones (original files) are mapped into memory. Gzip chunks (files written here) are
located once and inflated on access, without HDF5's global lock. Anything else is read through h5py.
"""

import functools
import json
import os
import re
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from vlarft.data.damage import damage_named
from vlarft.data.episode import Episode, Images, check_lengths, check_numbers, pick_camera, read_outcome, warn_splits
from vlarft.data.frames import Budget, Frames, map_file
from vlarft.data.hdf5 import demo_names, import_h5py, open_demo_file
from vlarft.data.video import stamp

if TYPE_CHECKING:
    import h5py

ROBOMIMIC = "obs/robot0_eef_pos"
NAME = re.compile(r"([A-Z_]+SCENE\d+_)?(?P<task>.+)_demo\.(hdf5|h5)")  # KITCHEN_SCENE3_turn_on_the_stove_demo.hdf5
LIBEROS_OWN = "macros_image_convention"  # an attribute of files that LIBERO's create_dataset.py wrote, and of no others


def read_hdf5(
    path: Path, camera: str | None, budget: Budget, keep: Callable[[str, bool, str], bool], with_states: bool | None
) -> Iterator[Callable[[], Episode | None]]:
    """Yield functions that read a demonstration each, to be called while the file is open; None: it is not to be kept.

    Args:
        path: the file.
        camera: camera stored as `obs/<camera>_rgb`; None reads all, the first for `Episode.images`.
        budget: limit on the decoded frames that are kept.
        keep: (name, success, kind) -> whether to read a demonstration.
        with_states: also read the simulator states; None: where there are some.

    A file of LIBERO's create_dataset.py has beside each action what is seen after it. So that frame t is observed
    before action t, as everywhere else, its first action and its last observation are left out.

    Raises:
        FileNotFoundError: no such file.
        ValueError: truncated file, missing camera or dataset, NaN, wrong widths, images of robosuite's other image
            convention.
    """
    with open_demo_file(path) as file:
        with damage_named(str(path)):
            data, content, folder = file["data"], map_file(path), Path(os.path.abspath(path)).parent.name
            warn_splits(f"{path}: mask", sorted(file["mask"]) if "mask" in file else [])  # robomimic's filter keys
            turned = _text(data.attrs.get("image_convention", "")) != "upright"
            late = int(LIBEROS_OWN in data.attrs)
            if late and (convention := _text(data.attrs[LIBEROS_OWN])) != "opengl":
                raise ValueError(
                    f"{path}: {LIBEROS_OWN} is {convention!r}, expected 'opengl', images that are upside down: make "
                    "the file again with robosuite's usual macros"
                )
            names = demo_names(data)
            if names and ROBOMIMIC in data[names[0]]:
                raise ValueError(
                    f"{path} has {ROBOMIMIC}: a robomimic file, which is not read; copy its observations to the names "
                    "of LIBERO's layout (docs/data.md) with a few lines of h5py"
                )
            instruction = _instruction(data, path)
            env_args = _table(data, "env_args", path) or None
            fps = data.attrs.get("control_freq", ((env_args or {}).get("env_kwargs") or {}).get("control_freq"))

        def read(key: str) -> Episode | None:
            with damage_named(f"{path}: data/{key}"):
                return read_demo(key)

        def read_demo(key: str) -> Episode | None:
            name, demo, where = f"{folder}/{path.stem}/{key}", data[key], f"{path}: data/{key}"
            kind = _text(demo.attrs.get("kind", "expert"))
            if not keep(name, True, kind):
                return None
            success = read_outcome(demo.attrs.get("success"), where)
            if not keep(name, success is not False, kind):
                return None
            keys = [k for k in (sorted(demo["obs"]) if "obs" in demo else ()) if k.endswith("_rgb")]
            keys = {k.removesuffix("_rgb"): f"obs/{k}" for k in keys}
            picked = pick_camera(keys, camera, where)
            cameras = {
                name: _images(_item(demo, k, where), f"{where}/{k}", content, turned, late, budget, path)
                for name, k in keys.items()
                if camera is None or name == picked
            }
            images = cameras[picked]
            actions = _numbers(demo, "actions", 7, where)[late:]
            intended = _numbers(demo, "intended_actions", 7, where) if "intended_actions" in demo else actions
            proprio = np.concatenate(
                [_numbers(demo, "obs/ee_states", 6, where), _numbers(demo, "obs/gripper_states", 2, where)], 1
            )
            proprio = proprio[: len(proprio) - late]
            states = None
            if with_states or (with_states is None and "states" in demo):
                states = _dataset(demo, "states", where)[late:]
            check_lengths(where, actions=actions, images=images, proprio=proprio, intended_actions=intended)
            return Episode(
                name=name,
                instruction=instruction,
                images=images,
                proprio=proprio,
                actions=actions,
                intended=intended,
                success=success is not False,
                outcome_known=success is not None,
                kind=kind,
                states=states,
                env_args=env_args,
                cameras=cameras,
                start=_start(demo, name),
                fps=None if fps is None else float(fps),
                gripper_dims=(6,),
            )

        for key in names:
            yield functools.partial(read, key)


def _start(demo: "h5py.Group", name: str) -> str | None:
    """Return `Episode.start`: as the file names it, or by the seed of the start."""
    if "start" in demo.attrs:
        return _text(demo.attrs["start"])
    return f"{name.rpartition('/')[0]} {demo.attrs['seed']}" if "seed" in demo.attrs else None


def _text(value: object) -> str:
    """Return an attribute that holds text; h5py gives texts of fixed length as bytes."""
    return value.decode() if isinstance(value, bytes) else str(value)


def _images(
    dataset: "h5py.Dataset", where: str, content: np.ndarray, turned: bool, late: int, budget: Budget, path: Path
) -> Images:
    """Return the images of one camera but for the `late` last, upright: a view of the file, or frames decoded on
    access.
    """
    shape = dataset.shape
    if len(shape) != 4 or shape[-1] != 3 or dataset.dtype != np.uint8:
        raise ValueError(f"{where} must be uint8 (T, H, W, 3), got {dataset.dtype} {shape}")
    shape = (max(0, shape[0] - late), *shape[1:])
    start, size = dataset.id.get_offset(), int(np.prod(shape))
    if Path(dataset.file.filename) != path:  # a link to another file
        return Frames(_Slices(Path(dataset.file.filename), dataset.name, turned, 1), shape, budget, where)
    if start is not None and dataset.chunks is None:
        images = content[start : start + size].reshape(shape)
        return images[:, ::-1, ::-1] if turned else images
    if dataset.chunks and dataset.chunks[1:] == shape[1:] and _filters(dataset) in ([], ["deflate"]):
        source: _Chunks | _Slices = _Chunks(dataset, content, turned, where)
    else:
        source = _Slices(path, dataset.name, turned, dataset.chunks[0] if dataset.chunks else 1)
    return Frames(source, shape, budget, where)


def _filters(dataset: "h5py.Dataset") -> list[str]:
    plist = dataset.id.get_create_plist()
    return [plist.get_filter(i)[3].decode() for i in range(plist.get_nfilters())]


class _Chunks:
    """Source for chunks of whole frames, deflated or not."""

    def __init__(self, dataset: "h5py.Dataset", content: np.ndarray, turned: bool, where: str) -> None:
        self.content, self.turned, self.where = content, turned, where
        self.shape, self.rows = dataset.shape[1:], dataset.chunks[0]
        self.places: dict[int, tuple[int, int, bool]] = {}  # chunk -> offset, bytes, uncompressed
        deflated = bool(_filters(dataset))

        def note(chunk) -> None:
            plain = not deflated or bool(chunk.filter_mask)  # the mask says that the filter was skipped
            self.places[chunk.chunk_offset[0] // self.rows] = (chunk.byte_offset, chunk.size, plain)

        dataset.id.chunk_iter(note)

    def read(self, lo: int, hi: int) -> tuple[int, np.ndarray]:
        first, last = lo // self.rows, (hi - 1) // self.rows
        out = np.empty(((last + 1 - first) * self.rows, *self.shape), np.uint8)
        for number, rows in zip(range(first, last + 1), out.reshape(-1, self.rows, *self.shape)):
            if number not in self.places:
                raise ValueError(f"{self.where}: frames {number * self.rows} .. were never written; collect it again")
            offset, size, plain = self.places[number]
            stored = self.content[offset : offset + size]
            try:
                raw = stored if plain else np.frombuffer(zlib.decompress(stored), np.uint8)
                rows[...] = raw.reshape(rows.shape)
            except (zlib.error, ValueError) as error:
                raise ValueError(f"{self.where}, frames from {number * self.rows} on: {error}; damaged file") from error
        return first * self.rows, out[:, ::-1, ::-1] if self.turned else out

    def check(self, shape: tuple[int, ...], thorough: bool) -> None:
        for lo in range(0, shape[0], self.rows):
            if thorough or lo // self.rows not in self.places:
                self.read(lo, lo + 1)


@functools.lru_cache(maxsize=32)
def _open(path: Path, process: int, written: int) -> "h5py.File":
    return import_h5py().File(path, "r")  # a handle must not cross a fork, hence `process`; nor outlive its file


class _Slices:
    """Source for any other storage, through h5py."""

    def __init__(self, path: Path, key: str, turned: bool, rows: int) -> None:
        self.path, self.key, self.turned, self.rows = path, key, turned, rows

    def read(self, lo: int, hi: int) -> tuple[int, np.ndarray]:
        first, last = lo - lo % self.rows, hi + -hi % self.rows
        with damage_named(f"{self.path}: {self.key}"):
            images = _open(self.path, os.getpid(), stamp(self.path))[self.key][first:last]
        return first, images[:, ::-1, ::-1] if self.turned else images

    def check(self, shape: tuple[int, ...], thorough: bool) -> None:
        for lo in range(0, shape[0], self.rows) if thorough else ():
            self.read(lo, min(lo + self.rows, shape[0]))


def _table(data: "h5py.Group", name: str, path: Path) -> dict:
    """Return the JSON object in an attribute of `data`, {} without one."""
    text = data.attrs.get(name) or "{}"
    try:
        table = json.loads(text)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path}: attribute {name} of 'data' is not JSON ({error}), got {text!r:.80}") from error
    if not isinstance(table, dict):
        raise ValueError(f"{path}: attribute {name} of 'data' must be a JSON object, got {text!r:.80}")
    return table


def _instruction(data: "h5py.Group", path: Path) -> str:
    """Return the instruction that `problem_info` holds; without it, and of LIBERO's own files, whose evaluation and
    public copies have this one, the file's name without LIBERO's scene.
    """
    text = _table(data, "problem_info", path).get("language_instruction") or ""
    text = " ".join(text) if isinstance(text, list) else str(text)
    named = LIBEROS_OWN in data.attrs or "problem_info" not in data.attrs
    if named and (name := NAME.fullmatch(path.name)):
        text = name["task"].replace("_", " ")
    if not text.strip():
        raise ValueError(
            f"{path}: attribute problem_info of 'data' has no language_instruction; write it there, or without the "
            "attribute name the file <instruction>_demo.hdf5, with _ for spaces"
        )
    return text.strip()


def _dataset(demo: "h5py.Group", key: str, where: str) -> np.ndarray:
    if key not in demo:
        group = key.rpartition("/")[0]
        there = sorted(demo[group]) if group and group in demo else sorted(demo)
        raise ValueError(f"{where} has no {key}; it has {', '.join(there)}. Collect it again")
    with damage_named(f"{where}/{key}"):
        return _item(demo, key, where)[()]


def _item(demo: "h5py.Group", key: str, where: str) -> "h5py.Dataset":
    try:
        return demo[key]
    except KeyError as error:  # a link to a file or an object that is not there
        raise ValueError(f"{where}/{key} cannot be opened ({error}); copy the file that it links to") from error


def _numbers(demo: "h5py.Group", key: str, width: int, where: str) -> np.ndarray:
    return check_numbers(_dataset(demo, key, where), f"{where}/{key}", width)
