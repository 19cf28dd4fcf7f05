"""Between images as they are stored and shown, bytes with channels last, and frames as the networks have them."""

import numpy as np
import torch
from torch import Tensor


def to_floats(images: np.ndarray | Tensor, device: str | torch.device | None = None) -> Tensor:
    """Convert uint8 images (..., H, W, C) to float32 frames (..., C, H, W) in [0, 1].

    `device`: where to; the bytes travel, a quarter of the floats. None = where the images are.
    """
    if isinstance(images, np.ndarray):
        images = torch.from_numpy(np.ascontiguousarray(images))  # torch takes no negative strides, of turned images
    return images.to(device).movedim(-1, -3).float() / 255


def to_bytes(frames: Tensor) -> Tensor:
    """Convert frames (..., C, H, W) to uint8 images (..., H, W, C), clipped to [0, 1] and rounded."""
    return (frames.float().clamp(0, 1) * 255).round().to(torch.uint8).movedim(-3, -1)
