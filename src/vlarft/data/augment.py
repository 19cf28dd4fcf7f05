"""Image augmentation of whole batches, on the images' device.

`augment` changes images for good. A `Symmetry` is undone on what a network makes of them, so that the loss sees the
images as they were: not in the paper.

Shapes: B batch, V images of one row (the cameras of an observation, or the frames of a segment), H W pixels.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from vlarft.run.config import opt


@dataclass(frozen=True)
class Augmentation:
    """Ranges of the random changes; the defaults are the public code's for policies."""

    crop: bool = opt(True, "crop at a random position if the crop area is below 1")
    brightness: float = opt(0.2, "scale by a factor in 1 +- this")
    contrast: float = opt(0.2, "scale about the image's mean by a factor in 1 +- this")
    saturation: float = opt(0.2, "scale about grey by a factor in 1 +- this")
    hue: float = opt(0.05, "rotate about the grey axis by up to +- this share of a turn")
    pixel_noise: float = opt(0.0, "standard deviation of Gaussian noise on each value in [0, 1]")


OFF = Augmentation(crop=False, brightness=0.0, contrast=0.0, saturation=0.0, hue=0.0)


class Symmetry(NamedTuple):
    """The colour channels of a row in another order, and left and right exchanged, or neither.

    order: (B, 3) int64, which channel comes first, second and third.
    mirrored: (B,) bool.
    """

    order: Tensor
    mirrored: Tensor

    @classmethod
    def sample(cls, batch: int, generator: torch.Generator, part: tuple[int, int] = (0, 1)) -> Symmetry:
        """Sample one of the twelve for each row of share `part` of a batch (see `augment`), on the same device."""
        rows, device = slice(part[0] * batch, (part[0] + 1) * batch), generator.device
        orders = torch.tensor(list(itertools.permutations(range(3))), device=device)
        number = torch.randint(2 * len(orders), (batch * part[1],), generator=generator, device=device)[rows]
        return cls(orders[number // 2], number % 2 == 1)

    def apply(self, images: Tensor) -> Tensor:
        """Change images (B, ..., C, H, W); of other than three channels, the order stays."""
        if images.shape[-3] == 3:
            images = images.gather(-3, _rows(self.order, images, 3).expand_as(images))
        return torch.where(_rows(self.mirrored[:, None], images, 1), images.flip(-1), images)

    def undo(self, images: Tensor) -> Tensor:
        """Change images (B, ..., C, H, W) back."""
        return self._replace(order=self.order.argsort(dim=1)).apply(images)


def _rows(values: Tensor, images: Tensor, channels: int) -> Tensor:
    """Shape values (B, channels) so that they broadcast over images (B, ..., C, H, W)."""
    return values.reshape(len(values), *[1] * (images.dim() - 4), channels, 1, 1)


def augment(
    images: Tensor,
    cfg: Augmentation,
    *,
    crop_area: float | tuple[float, float],
    generator: torch.Generator,
    part: tuple[int, int] = (0, 1),
) -> Tensor:
    """Crop, recolour and add noise; the V images of a row share crop and colours, their noise is independent.

    Args:
        images: (B, V, 3, H, W), floats in [0, 1].
        cfg: ranges of the changes.
        crop_area: share of the image area that a crop keeps before it is resized to (H, W), or the range (low, high) to
            sample it from; 1 keeps the whole image.
        generator: on the images' device.
        part: (index, count): `images` is this share of a larger batch. Random numbers are sampled for all of it, so the
            result does not depend on the number of processes or micro-batches.

    Returns:
        (B, V, 3, H, W) in [0, 1].
    """
    batch, views = images.shape[:2]
    rows = slice(part[0] * batch, (part[0] + 1) * batch)

    def uniform(half_width: float | Tensor, *shape: int) -> Tensor:
        u = torch.rand(batch * part[1], *shape, generator=generator, device=images.device)[rows]
        return half_width * (2 * u - 1)

    smallest, largest = crop_area if isinstance(crop_area, tuple) else (crop_area, crop_area)
    if cfg.crop and smallest < 1:
        area = torch.tensor((smallest + largest) / 2, device=images.device)
        if smallest != largest:
            area = area + uniform((largest - smallest) / 2, 1, 1)  # (B, 1, 1)
        size = area.sqrt()
        scale = (size * torch.eye(2, device=images.device)).expand(batch, 2, 2)
        # a crop of side `size` in [-1, 1] coordinates stays inside if its centre moves by at most 1 - size
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
        # rotate about the axis g = (1, 1, 1) / sqrt 3: grey stays, the rest turns in the plane orthogonal to g
        angle = uniform(2 * math.pi * cfg.hue, 1, 1, 1, 1)
        grey = images.mean(dim=-3, keepdim=True)
        r, g, b = images.split(1, dim=-3)
        cross = torch.cat([b - g, r - b, g - r], dim=-3) / 3**0.5  # g x colour
        images = grey + (images - grey) * angle.cos() + cross * angle.sin()
    if cfg.pixel_noise:
        whole = (batch * part[1], *images.shape[1:])
        images = images + cfg.pixel_noise * torch.randn(whole, generator=generator, device=images.device)[rows]
    return images.clamp(0, 1)
