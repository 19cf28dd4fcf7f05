"""Discriminator of image patches for the tokenizer's adversarial loss: hinge loss and gradient penalty.

It tells true frames from decoded ones by a logit for each patch; the tokenizer is trained to raise the logits of the
frames that it decodes. Everything here runs in float32: the penalty differentiates a gradient.

Shapes: B frames, C image channels, H, W image size; h, w grid of logits.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True)
class DiscriminatorConfig:
    """Sizes of the discriminator; the defaults are those of the public recipe.

    Args:
        channels: output channels of the convolutions, each of which halves the resolution.
        slope: slope of the leaky ReLUs below zero.
    """

    channels: tuple[int, ...] = (64, 128, 256, 512, 512, 512)
    slope: float = 0.2


class Discriminator(nn.Module):
    """Spectrally normalised convolutions with instance normalisation (not after the first), and a 1x1 map to logits.

    Every loss is a method, so that sharded parameters can be gathered for it wherever gradients are taken.

    Args:
        cfg: sizes.
        image_channels: C.
        image_size: (H, W).

    Raises:
        ValueError: images too small to leave a grid of at least two positions a side, as instance norm needs.
    """

    def __init__(self, cfg: DiscriminatorConfig, image_channels: int, image_size: tuple[int, int]) -> None:
        super().__init__()
        factor = 2 ** len(cfg.channels)
        if min(image_size) < 2 * factor:
            raise ValueError(
                f"images of {image_size[0]}x{image_size[1]} are too small for a discriminator of {len(cfg.channels)} "
                f"convolutions, each of which halves them: give fewer channels, or images of {2 * factor} pixels"
            )
        self.slope = cfg.slope
        dims = (image_channels, *cfg.channels)
        self.convs = nn.ModuleList(
            # instance norm removes the bias of all but the first
            SpectralConv2d(dims[i], dims[i + 1], 3, stride=2, padding=1, bias=i == 0)
            for i in range(len(cfg.channels))
        )
        self.to_logit = nn.Conv2d(dims[-1], 1, 1)

    def forward(self, images: Tensor, frozen: bool = False) -> Tensor:
        """Compute the logits of patches, high where an image looks true.

        Args:
            images: (B, C, H, W) in [0, 1].
            frozen: give the weights no gradient.

        Returns:
            (B, 1, h, w) float32.
        """
        with torch.autocast(images.device.type, enabled=False):
            x = images.to(self.to_logit.weight.dtype)
            for i, conv in enumerate(self.convs):
                x = conv(x, frozen)
                x = F.leaky_relu(F.instance_norm(x) if i else x, self.slope)  # (B, D, H / 2^(i + 1), W / 2^(i + 1))
            weight, bias = self.to_logit.weight, self.to_logit.bias
            return F.conv2d(x, weight.detach(), bias.detach()) if frozen else F.conv2d(x, weight, bias)

    def generator_loss(self, decoded: Tensor) -> Tensor:
        """Compute the tokenizer's loss: minus the mean logit of decoded frames (B, C, H, W), which get the gradient."""
        return -self(decoded, frozen=True).mean()

    def loss(self, true: Tensor, decoded: Tensor, penalty: float) -> tuple[Tensor, dict[str, Tensor]]:
        """Compute the discriminator's loss: the hinge loss, and the gradient penalty on true frames.

        Args:
            true: (B, C, H, W) in [0, 1].
            decoded: (B, C, H, W); gets no gradient.
            penalty: weight of the gradient penalty.

        Returns:
            The scalar loss, and its parts with the mean logits of both.
        """
        true = true.detach().requires_grad_()  # the penalty needs the gradient with respect to the image
        true_logits, decoded_logits = self(true), self(decoded.detach())
        hinge, slope = hinge_loss(true_logits, decoded_logits), gradient_penalty(true_logits, true)
        metrics = {
            "hinge": hinge.detach(),
            "gradient_penalty": slope.detach(),
            "logit_true": true_logits.detach().mean(),
            "logit_decoded": decoded_logits.detach().mean(),
        }
        return hinge + penalty * slope, metrics

    @torch.no_grad()
    def refresh(self) -> None:
        """Update the spectral norms to the weights; to be called once after every optimizer step."""
        for conv in self.convs:
            conv.power_iteration()


class SpectralConv2d(nn.Conv2d):
    """Convolution whose weight, as a matrix (outputs, inputs * kernel), is divided by its largest singular value.

    Only `power_iteration` updates the singular vectors, never a forward: how often a step calls the network must not
    change what it computes.
    """

    def __init__(self, *sizes: int, **options: int) -> None:
        super().__init__(*sizes, **options)
        rows, columns = self.weight.flatten(1).shape
        self.register_buffer("left", F.normalize(torch.randn(rows), dim=0))
        self.register_buffer("right", F.normalize(torch.randn(columns), dim=0))
        for _ in range(15):
            self.power_iteration()

    @torch.no_grad()
    def power_iteration(self) -> None:
        """Move both singular vectors one step towards those of the largest singular value."""
        matrix = self.weight.flatten(1)
        self.right.copy_(F.normalize(self.left @ matrix, dim=0))
        self.left.copy_(F.normalize(matrix @ self.right, dim=0))

    def forward(self, x: Tensor, frozen: bool = False) -> Tensor:
        """x: (B, D, H, W) -> (B, D', H / 2, W / 2) at stride 2; `frozen`: no gradient to the weights."""
        weight, bias = self.weight, self.bias
        if frozen:
            weight, bias = weight.detach(), None if bias is None else bias.detach()
        norm = self.left @ weight.flatten(1) @ self.right  # scalar; differentiable in the weight, vectors constant
        return F.conv2d(x, weight / norm, bias, self.stride, self.padding)


def hinge_loss(true_logits: Tensor, decoded_logits: Tensor) -> Tensor:
    """Compute max(0, 1 - logit) of true patches + max(0, 1 + logit) of decoded ones, each a mean over all patches."""
    return F.relu(1 - true_logits).mean() + F.relu(1 + decoded_logits).mean()


def gradient_penalty(logits: Tensor, images: Tensor) -> Tensor:
    """Compute how far the slope of the discriminator is from 1: mean over images of (|d sum(logits) / d image| - 1)^2.

    Args:
        logits: (B, 1, h, w), computed from `images`.
        images: (B, C, H, W) that require a gradient.

    Returns:
        Scalar, differentiable in whatever the logits depend on.
    """
    # an image's logits depend on it alone, so one gradient of the batch's sum holds each image's
    (gradient,) = torch.autograd.grad(logits.sum(), images, create_graph=True)
    return (gradient.flatten(1).norm(dim=1) - 1).square().mean()
