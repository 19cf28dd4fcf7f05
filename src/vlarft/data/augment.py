"""Image augmentation, batched, on the images' device: one draw per observation of a policy or segment of a tokenizer.

Shapes: B batch, V images that share a draw (cameras of an observation, frames of a segment), H W pixels.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from vlarft.run.config import opt


@dataclass(frozen=True)
class Augmentation:
    """Ranges; the defaults are those of the public release for policies."""

    crop: bool = opt(True, "crop at a random place, where the crop area is below 1")
    brightness: float = opt(0.2, "factor 1 +- this")
    contrast: float = opt(0.2, "factor 1 +- this, about the image's mean")
    saturation: float = opt(0.2, "factor 1 +- this, about grey")
    hue: float = opt(0.05, "+- this share of a turn about the grey axis")
    pixel_noise: float = opt(0.0, "standard deviation of noise on each value, in [0, 1] units")


OFF = Augmentation(crop=False, brightness=0.0, contrast=0.0, saturation=0.0, hue=0.0)


def augment(
    images: Tensor,
    cfg: Augmentation,
    *,
    crop_area: float | tuple[float, float],
    generator: torch.Generator,
    part: tuple[int, int] = (0, 1),
) -> Tensor:
    """Crop, colour and noise; the V images of a row share the draw (of noise, only its strength).

    Args:
        images: (B, V, 3, H, W), floats in [0, 1].
        cfg: ranges.
        crop_area: share of the image area that a crop keeps, resized back to (H, W), or the range from which that share
            is drawn; 1 keeps all.
        generator: on the images' device.
        part: (number, count): the images are this share of a batch, for all of which is drawn, so that the result does
            not depend on the number of processes or micro-batches.

    Returns:
        (B, V, 3, H, W) in [0, 1].
    """
    batch, views = images.shape[:2]
    rows = slice(part[0] * batch, (part[0] + 1) * batch)

    def uniform(spread: float | Tensor, *shape: int) -> Tensor:
        u = torch.rand(batch * part[1], *shape, generator=generator, device=images.device)[rows]
        return spread * (2 * u - 1)

    smallest, largest = crop_area if isinstance(crop_area, tuple) else (crop_area, crop_area)
    if cfg.crop and smallest < 1:
        area = torch.tensor((smallest + largest) / 2, device=images.device)
        if smallest != largest:
            area = area + uniform((largest - smallest) / 2, 1, 1)  # (B, 1, 1)
        size = area.sqrt()
        scale = (size * torch.eye(2, device=images.device)).expand(batch, 2, 2)
        theta = torch.cat([scale, uniform(1 - size, 2, 1)], dim=-1).repeat_interleave(views, dim=0)  # (B * V, 2, 3)
        flat = images.flatten(0, 1)
        grid = F.affine_grid(theta, list(flat.shape), align_corners=False)
        images = F.grid_sample(flat, grid, padding_mode="border", align_corners=False).view_as(images)
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
        whole = (batch * part[1], *images.shape[1:])
        images = images + cfg.pixel_noise * torch.randn(whole, generator=generator, device=images.device)[rows]
    return images.clamp(0, 1)
