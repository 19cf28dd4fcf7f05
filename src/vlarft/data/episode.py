"""One demonstration, independent of its file format.

Shapes: T steps, H and W pixels, A action dim, P proprio dim, S simulator state dim.
"""

import hashlib
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
from torch import Tensor

from vlarft.data.frames import Frames
from vlarft.run.cameras import find_camera

Images = np.ndarray | Frames  # uint8 (T, H, W, 3)

KINDS = ("expert", "failed", "noisy", "policy")
OUTCOMES = {"true": True, "1": True, "false": False, "0": False}  # as text


@dataclass(frozen=True)
class Episode:
    """One demonstration.

    images: (T, H, W, 3) uint8, upright, frame t observed before action t; an array, or `Frames` decoded on access
    proprio: (T, P) float32; in LIBERO P = 8: position 3 [m], axis-angle 3 [rad], finger positions 2 [m]
    actions: (T, A) float32, raw environment actions as executed; the world model learns from them; in LIBERO A = 7, and
        the last is the gripper
    intended: (T, A) float32, the demonstrator's actions before noise was added; the policy imitates them
    outcome_known: False if `success` is a guess: the file does not say how the episode ended
    kind: who acted: "expert", "noisy" (an expert with strong noise) or "policy"
    states: (T, S) float64 simulator states, or None if the file has none
    name: suite/file/demo or data set/episode, unique in a data set; splits are stored by name
    cameras: images by name of the cameras that were read, one or all; `images` is one of them
    start: names where the episode began; attempts of one start, which `split_episodes` keeps together, share it; None
        if the file does not say: then no other episode began there
    fps: control steps per second, or None if the file does not state them
    absolute: actions are target positions, so that holding still repeats the last one; False: they are motions
    gripper_dims: action dimensions that are binary gripper commands, -1 open and +1 close; () if there are none; None
        if the file does not say: then the last is taken for one
    held_dims: further dimensions that are target positions, whatever the others are: continuous grippers, fingers
    action_names, proprio_names: names of the dimensions; () if the file has none
    """

    name: str
    instruction: str
    images: Images
    proprio: np.ndarray
    actions: np.ndarray
    intended: np.ndarray
    success: bool = True
    kind: str = "expert"
    states: np.ndarray | None = None
    env_args: dict | None = None
    outcome_known: bool = True
    cameras: Mapping[str, Images] = field(default_factory=dict)
    start: str | None = None
    fps: float | None = None
    absolute: bool = False
    gripper_dims: tuple[int, ...] | None = None
    held_dims: tuple[int, ...] = ()
    action_names: tuple[str, ...] = ()
    proprio_names: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.actions)

    @property
    def grippers(self) -> tuple[int, ...]:
        """Action dimensions that are, or are taken for, binary gripper commands."""
        return (self.actions.shape[1] - 1,) if self.gripper_dims is None else self.gripper_dims

    @property
    def repeated(self) -> np.ndarray:
        """(A,) bool: dimensions that stand still if their last value is repeated; the others do so at 0."""
        out = np.full(self.actions.shape[1], self.absolute)
        out[[*self.grippers, *self.held_dims]] = True
        return out


class RobotState(NamedTuple):
    """Where a robot is: its proprio (..., P), raw, and the last change of it, 0 where that is not known."""

    proprio: Tensor
    motion: Tensor


def pick_camera(cameras: Mapping[str, object], name: str | None, where: str) -> str:
    """Return the key of `cameras` that `name` refers to, see `find_camera`.

    Args:
        cameras: any values by camera name.
        name: camera; None picks the first.
        where: file, for errors.

    Raises:
        ValueError: no such camera; the message lists those there are.
    """
    found = next(iter(cameras), None) if name is None else find_camera(cameras, name)
    if found is None:
        raise ValueError(
            f"{where} has no camera {name!r}; it has {', '.join(cameras) or 'none'}: give --camera one of them"
        )
    return found


def read_outcome(value: Any, where: str) -> bool | None:
    """Return whether an episode succeeded, from a file's field: a bool, 0 or 1, or one of these as text.

    Args:
        value: of the field; None, or the NaN that pandas writes for it: not known.
        where: file and episode, for errors.

    Raises:
        ValueError: any other value.
    """
    if isinstance(value, np.ndarray) and value.size == 1:
        value = value.item()
    text = value.decode() if isinstance(value, bytes) else value
    if isinstance(text, str):
        value = OUTCOMES.get(text.strip().lower(), value)
    if value is None or (isinstance(value, float | np.floating) and value != value):
        return None
    if isinstance(value, bool | int | float | np.generic) and value in (0, 1):
        return bool(value)
    raise ValueError(f"{where}: success is {value!r}, expected true, false or null; rewrite or remove the field")


def warn_splits(where: str, splits: Sequence[str]) -> None:
    """Warn of the splits into which a file divides its episodes, if they are several: all episodes are read."""
    if len(splits) > 1:
        warnings.warn(
            f"{where} divides its episodes into {', '.join(splits)}: all are read, and --validation-fraction holds out "
            "others; remove those that must not be trained on",
            stacklevel=2,
        )


def check_numbers(values: np.ndarray, where: str, width: int | None = None) -> np.ndarray:
    """Return values (T, D) as float32.

    Args:
        values: one row per step.
        where: file and field, for errors.
        width: the D to expect; None accepts any.

    Raises:
        ValueError: another shape, NaN or infinite values.
    """
    values = np.asarray(values).astype(np.float32)
    if values.ndim != 2 or (width is not None and values.shape[1] != width):
        raise ValueError(f"{where} must have shape (T, {width or 'D'}), got {values.shape}")
    if not np.isfinite(values).all():
        row, column = np.argwhere(~np.isfinite(values))[0]
        raise ValueError(f"{where} has {values[row, column]} at row {row}, column {column}; remove or repair it")
    return values


def check_lengths(where: str, **columns: object) -> None:
    """Check that all columns have the same number of rows.

    Raises:
        ValueError: they differ; the message gives every length.
    """
    lengths = {name: len(column) for name, column in columns.items()}
    if len(set(lengths.values())) != 1:
        raise ValueError(f"{where}: lengths differ: {lengths}")


def episode_digests(episodes: Sequence[Episode]) -> dict[str, str]:
    """Return, for each episode's name, 12 hex digits that tell it from another of that name: by numbers, text, labels
    and image size. No image is decoded.
    """
    found = {}
    for e in episodes:
        labels = e.instruction, bool(e.success), e.kind, e.absolute, e.grippers, e.held_dims, tuple(e.images.shape)
        digest = hashlib.sha256(repr(labels).encode())
        for column in (e.actions, e.intended, e.proprio):
            digest.update(column.tobytes())
        found[e.name] = digest.hexdigest()[:12]
    return found


def no_ops(episode: Episode, threshold: float = 1e-4) -> np.ndarray:
    """Find steps whose intended action neither moves nor changes a gripper, by the rule of the public pipelines, and in
    which the robot rests: without the steps in which fingers close, a policy would learn to lift before they have.

    Args:
        episode: T steps.
        threshold: largest motion of a no-op, in action units; of target positions, the change since the step before.
            The robot rests where no number of its proprio changes by ten times as much.

    Returns:
        (T,) bool.
    """
    motion, repeated = episode.intended.copy(), episode.repeated
    motion[:, repeated] = np.diff(motion[:, repeated], axis=0, prepend=motion[:1, repeated])
    still = (np.abs(motion) < threshold).all(1)
    still[0] &= not episode.absolute  # the first target may be a motion
    still[:-1] &= (np.abs(np.diff(episode.proprio, axis=0)) < 10 * threshold).all(1)
    return still
