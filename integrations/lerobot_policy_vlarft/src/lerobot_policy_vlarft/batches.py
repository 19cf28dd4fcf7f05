"""LeRobot's batches in vlarft's terms. Plain functions, which need no lerobot.

    observation.images.<camera>  float (B, 3, H, W) in [0, 1]  -> image of the policy's camera, uint8 (H, W, 3)
    observation.state            float (B, P), raw             -> proprio, raw
    task                         B strings                     -> instruction
    action, action_is_pad        (B, T, A) raw, (B, T) bool    -> actions, padded as vlarft pads them

Shapes: B batch, H and W pixels, P proprio dim, T chunk steps, A action dim.
"""

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from vlarft.data.episode import pick_camera

IMAGES, STATE, TASK, ACTION, IS_PAD = "observation.image", "observation.state", "task", "action", "action_is_pad"


def camera_keys(cameras: Iterable[str], keys: Iterable[str]) -> dict[str, str]:
    """Find the entry of each camera of a policy: `observation.images.<camera>`, or another format's name of the camera.

    Args:
        cameras: of the policy.
        keys: of a batch, or of a configuration's features.

    Returns:
        camera -> key.

    Raises:
        ValueError: no entry for a camera.
    """
    images = {key.rpartition(".")[2]: key for key in keys if key.startswith(IMAGES) and not key.endswith("_is_pad")}
    found = {}
    for camera in cameras:
        try:
            found[camera] = images[pick_camera(images, camera, "batch")]
        except ValueError as error:
            raise ValueError(
                f"batch: no {IMAGES}s.{camera}, the image of the policy's camera; its images are "
                f"{', '.join(images.values()) or 'none'}: rename the one that shows the same, as with lerobot's "
                f"--rename_map, or have it rendered (--env.type=vlarft --env.cameras='[{camera}]')"
            ) from error
    return found


def images_of(batch: Mapping[str, Any], cameras: Iterable[str]) -> dict[str, Tensor]:
    """Return the images of each camera, float (B, 3, H, W) in [0, 1].

    Raises:
        ValueError: a camera is missing, or its images have another dtype, layout or range.
    """
    found = {camera: batch[key] for camera, key in camera_keys(cameras, batch).items()}
    for camera, images in found.items():
        kind = f"{getattr(images, 'dtype', type(images).__name__)} {tuple(getattr(images, 'shape', ()))}"
        if not isinstance(images, Tensor) or not images.is_floating_point() or images.shape[1:-2] != (3,):
            raise ValueError(f"batch: image of {camera} is {kind}, expected floats (B, 3, H, W), one frame each")
        if not (images.min() >= 0 and images.max() <= 1):
            raise ValueError(
                f"batch: image of {camera} has values from {images.min():.3g} to {images.max():.3g}, expected 0 to 1"
            )
    return found


def state_and_tasks(batch: Mapping[str, Any]) -> tuple[Tensor, list[str]]:
    """Return proprio (B, P) and B instructions.

    Raises:
        ValueError: one is missing or has another type or shape.
    """
    state, tasks = batch.get(STATE), batch.get(TASK)
    if not isinstance(state, Tensor) or state.ndim != 2:
        shape = tuple(state.shape) if isinstance(state, Tensor) else type(state).__name__
        raise ValueError(f"batch: {STATE} is {shape}, expected a tensor (B, P): one raw state each")
    tasks = [tasks] * len(state) if isinstance(tasks, str) else tasks
    if not isinstance(tasks, list | tuple) or len(tasks) != len(state) or not all(isinstance(t, str) for t in tasks):
        raise ValueError(f"batch: {TASK} is {tasks!r}, expected {len(state)} instructions, one for each row")
    return state, list(tasks)


def observations(batch: Mapping[str, Any], cameras: Iterable[str]) -> list[dict[str, Any]]:
    """Turn a batch into B observations of `VLAPolicy.act`.

    Args:
        batch: of lerobot, as its processors or its data loader make it.
        cameras: of the policy.

    Returns:
        B mappings: an image per camera, uint8 (H, W, 3), "proprio" (P,), "instruction". lerobot divides the camera's
        8-bit images by 255, which is undone exactly.

    Raises:
        ValueError: an entry is missing or has another type, shape or range; the message names it.
    """
    state, tasks = state_and_tasks(batch)
    images = {c: (x * 255).round().to(torch.uint8).movedim(1, -1) for c, x in images_of(batch, cameras).items()}
    if other := [f"{camera} {len(x)}" for camera, x in images.items() if len(x) != len(state)]:
        raise ValueError(f"batch: {len(state)} states, and images: {', '.join(other)}; expected equal numbers")
    return [
        {**{camera: x[i] for camera, x in images.items()}, "proprio": state[i], "instruction": tasks[i]}
        for i in range(len(state))
    ]


def padded_actions(batch: Mapping[str, Any], repeated: Tensor, chunk: int) -> Tensor:
    """Return the demonstrated actions, beyond the end of an episode as vlarft pads them.

    lerobot repeats the last action. A motion that is repeated goes on, so that vlarft pads it with zero; grippers and
    target positions are repeated here too.

    Args:
        batch: with action (B, T, A) and, from a data loader, action_is_pad (B, T).
        repeated: (A,) bool, dimensions that stand still if their last value is repeated (`Episode.repeated`).
        chunk: T of the policy.

    Returns:
        (B, T, A) float32.

    Raises:
        ValueError: no actions, or others than (B, T, A).
    """
    actions, expected = batch.get(ACTION), (chunk, len(repeated))
    if not isinstance(actions, Tensor) or actions.ndim != 3 or tuple(actions.shape[1:]) != expected:
        shape = tuple(actions.shape) if isinstance(actions, Tensor) else type(actions).__name__
        raise ValueError(f"batch: {ACTION} is {shape}, expected (B, {chunk}, {len(repeated)}): another robot's?")
    if batch.get(IS_PAD) is None:
        return actions.float()
    beyond = batch[IS_PAD].to(actions.device)[..., None] & ~repeated.to(actions.device)  # (B, T, A)
    return actions.float().masked_fill(beyond, 0.0)
