"""LIBERO's cameras, which its data formats call otherwise."""

from collections.abc import Collection

# their names in its HDF5 files, and here -> their names in LeRobot and RLDS copies of LIBERO
CAMERAS = {"agentview": ("image",), "eye_in_hand": ("image2", "wrist_image")}


def find_camera(cameras: Collection[str], name: str) -> str | None:
    """Return the one of `cameras` that `name` refers to: itself, or another format's name of the camera; None if it is
    not there.
    """
    same = next((group for group in ((k, *v) for k, v in CAMERAS.items()) if name in group), ())
    return next((candidate for candidate in (name, *same) if candidate in cameras), None)
