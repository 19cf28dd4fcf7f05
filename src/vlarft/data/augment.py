"""Image augmentation for policies: batched, on the images' device, one draw per observation.

Shapes: B batch, V cameras, H W pixels.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from vlarft.config import opt


@dataclass(frozen=True)
class Augmentation:
    """Ranges; the defaults are those of the public release."""

    crop: bool = opt(True, "crop the policy's crop_area at a random place, where that is below 1")
    brightness: float = opt(0.2, "factor 1 +- this")
    contrast: float = opt(0.2, "factor 1 +- this, about the image's mean")
    saturation: float = opt(0.2, "factor 1 +- this, about grey")
    hue: float = opt(0.05, "+- this share of a turn about the grey axis")
    pixel_noise: float = opt(0.0, "standard deviation of noise on each value, in [0, 1] units")


def augment(images: Tensor, cfg: Augmentation, *, crop_area: float, generator: torch.Generator) -> Tensor:
    """Crop, colour and noise; all cameras of an observation share the draw.

    Args:
        images: (B, V, 3, H, W), floats in [0, 1].
        cfg: ranges.
        crop_area: share of the image area that a crop keeps, resized back to (H, W); 1 keeps all.
        generator: on the images' device.

    Returns:
        (B, V, 3, H, W) in [0, 1].
    """
    batch, views = images.shape[:2]

    def uniform(spread: float, *shape: int) -> Tensor:
        u = torch.rand(batch, *shape, generator=generator, device=images.device)
        return spread * (2 * u - 1)

    if cfg.crop and crop_area < 1:
        size = crop_area**0.5
        scale = size * torch.eye(2, device=images.device).expand(batch, 2, 2)
        theta = torch.cat([scale, uniform(1 - size, 2, 1)], dim=-1).repeat_interleave(views, dim=0)  # (B * V, 2, 3)
        flat = images.flatten(0, 1)
        grid = F.affine_grid(theta, list(flat.shape), align_corners=False)
        images = F.grid_sample(flat, grid, align_corners=False).view_as(images)
    if cfg.brightness:
        images = images * (1 + uniform(cfg.brightness, 1, 1, 1, 1))
    if cfg.contrast:
        mean = images.mean(dim=(-3, -2, -1), keepdim=True)
        images = mean + (images - mean) * (1 + uniform(cfg.contrast, 1, 1, 1, 1))
    if cfg.saturation:
        grey = images.mean(dim=-3, keepdim=True)
        images = grey + (images - grey) * (1 + uniform(cfg.saturation, 1, 1, 1, 1))
    if cfg.hue:
        # a rotation about the axis g = (1, 1, 1) / sqrt 3: the grey part stays, the rest turns in the plane across it
        angle = uniform(2 * math.pi * cfg.hue, 1, 1, 1, 1)
        grey = images.mean(dim=-3, keepdim=True)
        r, g, b = images.split(1, dim=-3)
        across = torch.cat([b - g, r - b, g - r], dim=-3) / 3**0.5  # g x colour
        images = grey + (images - grey) * angle.cos() + across * angle.sin()
    if cfg.pixel_noise:
        noise = torch.randn(images.shape, generator=generator, device=images.device)
        images = images + cfg.pixel_noise * noise
    return images.clamp(0, 1)
