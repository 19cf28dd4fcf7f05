"""Image conventions (camera, orientation, channel order, rendering): recorded by training, compared before RFT.

Not in the paper.

A world model trained on upside-down images accepts upright ones without an error, and its rewards then mean nothing.

Shapes: T steps, H, W pixels.
"""

import warnings
from collections.abc import Sequence
from typing import Any

import numpy as np

from vlarft.data.episode import Episode

SIZE, FRAMES = 8, 64  # side of the mean frame [px], number of frames averaged
VIEWS = {
    "turned by 180 degrees": lambda x: x[::-1, ::-1],
    "upside down": lambda x: x[::-1],
    "mirrored": lambda x: x[:, ::-1],
    "with red and blue exchanged": lambda x: x[..., ::-1],
    "turned by 180 degrees, with red and blue exchanged": lambda x: x[::-1, ::-1, ::-1],
}


def image_convention(episodes: Sequence[Episode], camera: str) -> dict[str, Any]:
    """Describe the training images, for the checkpoint.

    Args:
        episodes: training episodes.
        camera: camera that their images come from.

    Returns:
        `camera`; `image_size`: their height and width; `mean_frame`: the mean of 64 frames shrunk to 8 x 8 x 3, in
        [0, 1], as nested lists. Of images that collect_demos.py rendered in LIBERO also `fast_rendering`, whether it
        rendered them fast (sim/gl.py), and `visuals`, with which meshes and textures; each is None if not known or not
        the same for all.
    """
    frames, rendered = [], {}
    for name in ("fast_rendering", "visuals"):
        found = {(e.env_args or {}).get("collection", {}).get(name) for e in episodes}
        rendered[name] = found.pop() if len(found) == 1 else None
    for k in range(FRAMES):  # spread over episodes, and over the frames of each
        images = episodes[k * len(episodes) // FRAMES].images
        frame = images[(7 * k) % len(images)].astype(np.float64) / 255  # (H, W, 3)
        rows = np.array_split(frame, SIZE, axis=0)
        frames.append([[cell.mean((0, 1)) for cell in np.array_split(row, SIZE, axis=1)] for row in rows])
    mean = np.mean(frames, axis=0).round(4).tolist()
    return {"camera": camera, "image_size": list(episodes[0].images.shape[1:3]), "mean_frame": mean, **rendered}


def check_image_size(wanted: Sequence[int], name: str, episode: Episode) -> None:
    """Check that a model takes the images of a data set, which it does not resize.

    Args:
        wanted: height and width that it takes.
        name: of the model, for the message.
        episode: one of the data set.

    Raises:
        ValueError: another size; the message names both.
    """
    height, width = episode.images.shape[1:3]
    if (height, width) != tuple(wanted):
        raise ValueError(
            f"{name} takes images of {wanted[0]}x{wanted[1]}, {episode.name} has {height}x{width}: resize them with "
            f"python -m vlarft.data.convert SRC DST --size {wanted[0]} {wanted[1]}, or train on images of their size"
        )


def warn_other_contexts(extra: dict[str, Any], name: str, lookback: int | None) -> None:
    """Warn if a model was trained with context frames of a range that does not contain `lookback`, see `WindowSampler`.

    Args:
        extra: of the model's file; one that does not state the range (older files, public weights) is not compared.
        name: of the model, for the message.
        lookback: range of this run: None, all frames before, contains every other; -1, the first frame, none.
    """
    trained = extra.get("context_lookback", lookback)
    if trained not in (None, lookback) and (lookback is None or not 0 <= lookback <= trained):
        ours = str(lookback).lower()
        warnings.warn(
            f"{name} was trained with --context-lookback {trained}, this run has {ours}: it sees context frames unlike "
            "those of its training",
            stacklevel=2,
        )


def check_same_images(
    ours: dict[str, Any],
    our_name: str,
    theirs: dict[str, Any],
    their_name: str,
    fix: str = "train both on the same files",
    *,
    adapts: bool = False,
) -> None:
    """Check that two models were trained on images of one convention, or that two data sets have one.

    They were not if flipping, turning or swapping the channels of the second mean frame brings it at least twice as
    close to the first. A record without these entries (public weights) is not compared.

    Args:
        ours, theirs: records of `image_convention`.
        our_name, their_name: names of the two, for the message.
        fix: what to do about another orientation, for the message.
        adapts: the first model goes on with the second one's images, which may come from another camera or look
            otherwise: only warn of that.

    Raises:
        ValueError: camera, orientation, channel order, rendering, or meshes and textures differ.
    """
    problems = []
    sizes = [of.get("image_size") for of in (ours, theirs)]
    if None not in sizes and list(sizes[0]) != list(sizes[1]):
        first, second = (f"{height}x{width}" for height, width in sizes)
        warnings.warn(
            f"{our_name} was trained on images of {first}, {their_name} has {second}: resized, they look otherwise",
            stacklevel=2,
        )
    names = ours.get("camera"), theirs.get("camera")
    if None not in names and names[0] != names[1]:
        advice = "train both with the same --camera"
        problems.append(f"{our_name} has camera {names[0]!r}, {their_name} has {names[1]!r}; {advice}")
    fast = ours.get("fast_rendering"), theirs.get("fast_rendering")
    if None not in fast and fast[0] != fast[1]:
        names = (our_name, their_name)[:: 1 if fast[0] else -1]
        problems.append(f"{names[0]} has images of fast rendering, {names[1]} not; render both alike")
    visuals = ours.get("visuals"), theirs.get("visuals")
    if None not in visuals and visuals[0] != visuals[1]:
        both = f"{our_name} has images of LIBERO's {visuals[0]}, {their_name} of {visuals[1]}"
        problems.append(f"{both}; render both with one set of assets")
    for problem in problems:
        if not adapts:
            raise ValueError(f"image conventions differ: {problem}")
        warnings.warn(f"it goes on with other images: {problem.partition(';')[0]}", stacklevel=2)
    if not (ours.get("mean_frame") and theirs.get("mean_frame")):
        return
    a, b = np.array(ours["mean_frame"]), np.array(theirs["mean_frame"])
    unchanged = np.abs(a - b).mean()
    distances = {name: np.abs(a - view(b)).mean() for name, view in VIEWS.items()}
    nearest = min(distances, key=distances.get)
    if unchanged > 0.02 and distances[nearest] < unchanged / 2:
        raise ValueError(
            f"image conventions differ: the images of {their_name} look like those of {our_name} {nearest} (mean "
            f"difference {distances[nearest]:.3f}, as they stand {unchanged:.3f}); {fix}"
        )
