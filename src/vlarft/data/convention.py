"""Image conventions: which camera, which way up, which order of channels. Recorded by training, compared by RFT.

A world model that was trained on images turned upside down imagines such frames for upright ones without complaint, and
its rewards mean nothing. Not in the paper.

Shapes: T steps, H, W pixels.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np

from vlarft.data.episode import Episode

SIZE, FRAMES = 8, 64  # side of the mean frame, frames that are averaged
VIEWS = {
    "turned by 180 degrees": lambda x: x[::-1, ::-1],
    "upside down": lambda x: x[::-1],
    "mirrored": lambda x: x[:, ::-1],
    "with red and blue exchanged": lambda x: x[..., ::-1],
    "turned by 180 degrees, with red and blue exchanged": lambda x: x[::-1, ::-1, ::-1],
}


def image_convention(episodes: Sequence[Episode], camera: str) -> dict[str, Any]:
    """What a checkpoint remembers of its images.

    Args:
        episodes: that it trains on.
        camera: that they were read from.

    Returns:
        `camera`, and `mean_frame`: the mean of some frames, 8 x 8 x 3, in [0, 1], as nested lists.
    """
    frames = []
    for i in np.linspace(0, len(episodes) - 1, FRAMES).round().astype(int):
        images = episodes[i].images
        frame = images[(7 * i) % len(images)].astype(np.float64) / 255  # (H, W, 3)
        rows = np.array_split(frame, SIZE, axis=0)
        frames.append([[cell.mean((0, 1)) for cell in np.array_split(row, SIZE, axis=1)] for row in rows])
    return {"camera": camera, "mean_frame": np.mean(frames, axis=0).round(4).tolist()}


def check_same_images(ours: dict[str, Any], our_name: str, theirs: dict[str, Any], their_name: str) -> None:
    """Refuse two sets of images of different conventions.

    Another view of theirs is taken to be meant where it is at least twice as near to ours as theirs is as it stands. A
    record without these entries (public weights) is not compared.

    Args:
        ours, theirs: records of `image_convention`.
        our_name, their_name: for the message.

    Raises:
        ValueError: another camera, another way up or another order of channels.
    """
    names = ours.get("camera"), theirs.get("camera")
    if None not in names and names[0] != names[1]:
        raise ValueError(
            f"image conventions differ: {our_name} has camera {names[0]!r}, {their_name} has {names[1]!r}; train both "
            "with the same --camera"
        )
    if not (ours.get("mean_frame") and theirs.get("mean_frame")):
        return
    a, b = np.array(ours["mean_frame"]), np.array(theirs["mean_frame"])
    as_it_stands = np.abs(a - b).mean()
    distances = {name: np.abs(a - view(b)).mean() for name, view in VIEWS.items()}
    nearest = min(distances, key=distances.get)
    if as_it_stands > 0.02 and distances[nearest] < as_it_stands / 2:
        raise ValueError(
            f"image conventions differ: the images of {their_name} look like those of {our_name} {nearest} (mean "
            f"difference {distances[nearest]:.3f}, as they stand {as_it_stands:.3f}); train both on the same files"
        )
