"""LIBERO's HDF5 layout: write files, and open them for `hdf5_reader`.

One file per task, `<suite>/<task>_demo.hdf5`:

    data            attrs: bddl_file_name, env_args, problem_info (JSON with "language_instruction"), num_demos, total,
    image_convention, control_freq
    data/demo_<i>   attrs: num_samples, model_file, init_state, and what the writer adds (seed, start, success, kind)
      actions (T, 7)  intended_actions (T, 7)  states (T, S)  robot_states (T, 9)  rewards (T,)  dones (T,)
      obs/<camera>_rgb (T, H, W, 3) uint8   obs/ee_states (T, 6)  ee_pos (T, 3)  ee_ori (T, 3)  gripper_states (T, 2)
      joint_states (T, J)

rewards, dones and success are left out where the outcome is not known, joint_states where they are not.

Files of OpenVLA's regenerate_libero_dataset.py, and of those who copied it, are read too: they have no attributes at
all, and gaps in the demonstrations' numbers. Their instruction is the name of the file.

`actions` are those executed; `intended_actions`, an addition to the layout, are the demonstrator's before noise was
added. `image_convention` is "upright" in files written here. Without it, images are as LIBERO stores them, upside down,
and the reader turns them by 180 degrees, as the public pipelines do.
"""

import json
import re
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from vlarft.data.damage import damage_named
from vlarft.run.lfs import refuse_pointer
from vlarft.run.optional import optional

if TYPE_CHECKING:
    import h5py

DEMO = re.compile(r"demo_(\d+)$")


def import_h5py() -> Any:
    """Import h5py; an ImportError says what installs it."""
    with optional("reading and writing demonstrations needs h5py", "data"):
        import h5py
    return h5py


def write_task_attrs(
    data: "h5py.Group",
    instruction: str,
    env_args: Mapping[str, Any],
    control_freq: int = 20,
    *,
    upright: bool = True,
    bddl_file_name: str = "",
) -> None:
    """Write the attributes of a file's `data` group; `write_demo` keeps `num_demos` and `total` current.

    Args:
        data: the group "data" of an open file.
        instruction: the task's instruction, the same for all demonstrations of the file.
        env_args: JSON-safe description of the environment (suite, task, image size, ...).
        control_freq: control steps per second.
        upright: False if images are stored as LIBERO stores them, turned by 180 degrees.
        bddl_file_name: LIBERO's file of the task, <suite>/<task>.bddl.
    """
    data.attrs["bddl_file_name"] = bddl_file_name
    data.attrs["env_args"] = json.dumps(dict(env_args))
    data.attrs["problem_info"] = json.dumps({"language_instruction": instruction})
    if upright:
        data.attrs["image_convention"] = "upright"
    data.attrs["control_freq"] = control_freq
    for name in ("num_demos", "total"):
        if name not in data.attrs:
            data.attrs[name] = 0


def write_demo(
    data: "h5py.Group",
    index: int,
    *,
    images: Mapping[str, np.ndarray],
    actions: np.ndarray,
    intended_actions: np.ndarray,
    proprio: np.ndarray,
    states: np.ndarray | None = None,
    joint_states: np.ndarray | None = None,
    success: bool | None = True,
    attrs: Mapping[str, Any] | None = None,
) -> None:
    """Write one demonstration as `data/demo_<index>`.

    Args:
        data: the group "data" of an open file.
        index: number of the demonstration in the file.
        images: camera name (agentview, eye_in_hand) -> (T, H, W, 3) uint8, oriented as `write_task_attrs` says.
        actions: (T, 7) raw environment actions as executed.
        intended_actions: (T, 7) the demonstrator's actions before noise was added.
        proprio: (T, 8) position 3 [m], axis-angle 3 [rad], finger positions 2 [m], before each action.
        states: (T, S) simulator state before each action; the first row becomes `init_state`. None writes none.
        joint_states: (T, J) joint positions; None writes none.
        success: whether the last step fulfils the task; sets the last reward and done; None: not known.
        attrs: further attributes (seed, kind, ...).

    Raises:
        ValueError: lengths that differ, or an image array that is not uint8 (T, H, W, 3).
    """
    steps = len(actions)
    arrays = {"intended_actions": intended_actions, "proprio": proprio, **images}
    arrays |= {} if states is None else {"states": states}
    for name, array in arrays.items():
        if len(array) != steps:
            raise ValueError(f"{name} has {len(array)} rows, expected {steps}, one per action")
    for name, array in images.items():
        if array.dtype != np.uint8 or array.ndim != 4 or array.shape[-1] != 3:
            raise ValueError(f"images of {name} must be uint8 (T, H, W, 3), got {array.dtype} {array.shape}")
    name = f"demo_{index}"
    replaced = data[name].attrs.get("num_samples") if name in data else None  # None: incomplete, and not counted
    if name in data:
        del data[name]
    demo = data.create_group(name)
    position, orientation, fingers = proprio[:, :3], proprio[:, 3:6], proprio[:, 6:]
    datasets = {
        "actions": actions,
        "intended_actions": intended_actions,
        "robot_states": np.concatenate([fingers, position, _quaternion(orientation)], 1),
        "obs/ee_states": proprio[:, :6],
        "obs/ee_pos": position,
        "obs/ee_ori": orientation,
        "obs/gripper_states": fingers,
    }
    if joint_states is not None:
        datasets["obs/joint_states"] = joint_states
    if success is not None:
        datasets["rewards"] = datasets["dones"] = np.append(np.zeros(steps - 1, np.uint8), np.uint8(success))
        demo.attrs["success"] = bool(success)
    if states is not None:
        datasets["states"] = states
        demo.attrs["init_state"] = states[0]
    for key, array in datasets.items():
        demo.create_dataset(key, data=array)
    for camera, array in images.items():
        # windows of 9 frames are read at random starts: chunks of 8 frames keep both the overhead and the waste small
        chunks = (min(8, steps), *array.shape[1:])
        demo.create_dataset(f"obs/{camera}_rgb", data=array, chunks=chunks, compression="gzip", compression_opts=4)
    demo.attrs["model_file"] = ""
    for key, value in (attrs or {}).items():
        demo.attrs[key] = value
    demo.attrs["num_samples"] = steps  # last: with it, the demonstration is complete
    for total, more in (("num_demos", int(replaced is None)), ("total", steps - int(replaced or 0))):
        data.attrs[total] = int(data.attrs.get(total, 0)) + more


def demo_names(data: "h5py.Group") -> list[str]:
    """Return the names of a file's complete demonstrations in numeric order (demo_2 before demo_10).

    A complete one has `num_samples`, which is written last; in regenerated files, none has it and all are complete.
    """
    names = sorted((k for k in data if DEMO.match(k)), key=lambda k: int(DEMO.match(k).group(1)))
    complete = [k for k in names if "num_samples" in data[k].attrs]
    if not complete and "num_demos" not in data.attrs:
        return names
    if (promised := int(data.attrs.get("num_demos", 0))) > len(complete):
        warnings.warn(
            f"{data.file.filename}: num_demos is {promised}, and {len(complete)} demonstrations are complete: some are "
            "lost, or were taken out",
            stacklevel=2,
        )
    return complete


def open_demo_file(path: str | Path) -> "h5py.File":
    """Open a demonstration file for reading.

    Raises:
        FileNotFoundError: no such file.
        ValueError: not HDF5, truncated, or without LIBERO's `data` group.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no demonstration file at {path}; collect_demos.py makes some")
    refuse_pointer(path)
    try:
        file = import_h5py().File(path, "r")
    except OSError as error:
        raise ValueError(
            f"{path} is not a readable HDF5 file ({error}); it is truncated or has another format: "
            "remove it and collect or copy it again"
        ) from error
    with damage_named(str(path)):
        there, keys = isinstance(file.get("data"), import_h5py().Group), list(file)
    if not there:
        file.close()
        raise ValueError(
            f"{path} has no group 'data' (found {keys}); expected LIBERO's layout, see vlarft/data/hdf5.py"
        )
    return file


def _quaternion(axis_angle: np.ndarray) -> np.ndarray:
    """Convert axis-angle (T, 3) [rad] to quaternions (T, 4), x, y, z, w."""
    angle = np.linalg.norm(axis_angle, axis=1, keepdims=True)
    scale = np.where(angle < 1e-8, 0.5, np.sin(angle / 2) / np.maximum(angle, 1e-8))
    return np.concatenate([axis_angle * scale, np.cos(angle / 2)], 1)
