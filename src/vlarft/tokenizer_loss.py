"""Reconstruction loss: pixel, perceptual and static-patch terms; and how much an adversarial term may weigh beside it.

Shapes: S starts, L frames, C image channels, H, W image size; Nf tokens of one future frame, d scalars per code.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from vlarft.metrics import moving_mask, pooled_psnr
from vlarft.tokenizer import Reconstruction

THRESHOLD = 0.04  # pixels differ when a channel differs by more than this


@dataclass(frozen=True)
class Weighting:
    """How much the pixels of a frame count; the defaults are plain L1, as in the paper.

    Args:
        square: weight of the squared error beside L1.
        moving: weight of future pixels that differ from the context frame; the others have 1.
        unusual: weight of pixels, of context and future frames, that differ from the median frame of the data.
        pyramid: scales of the error, each half the one before; 1 = full resolution only.
        still: weight of the squared codes of patches without a moving pixel. It makes the code 0 mean "as in the
            context frame": tokens do not flicker where nothing moves, which makes them easier to predict.
    """

    square: float = 0.0
    moving: float = 1.0
    unusual: float = 1.0
    pyramid: int = 1
    still: float = 0.0


# Plain L1 seeks the median, and the median of a small object that may be anywhere is the background: a training of
# minutes would learn the table and never the blocks. Squares, coarse scales and weights make the object count.
WEIGHTINGS = {
    "uniform": Weighting(),
    "small_objects": Weighting(square=2.0, moving=6.0, unusual=6.0, pyramid=3, still=0.6),
}


def reconstruction_loss(
    reconstruction: Reconstruction,
    context_frame: Tensor,
    frames: Tensor,
    *,
    perceptual: Callable[[Tensor, Tensor], Tensor] | None = None,
    weighting: Weighting = WEIGHTINGS["uniform"],
    median_frame: Tensor | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """L1 + perceptual distance on the context frame and on the future frames, each a mean over its pixels.

    Weights multiply a pixel's term and are not divided out again, so that a batch may be split over processes.

    Args:
        reconstruction: what the tokenizer's `forward` returned.
        context_frame: (S, C, H, W) in [0, 1].
        frames: (S, L, C, H, W) in [0, 1].
        perceptual: distance from `metrics.perceptual`, added with weight 1 (public recipe), or None.
        weighting: of the pixels.
        median_frame: (C, H, W), the median of the data; needed where `weighting.unusual` is not 1.

    Returns:
        The scalar loss, and its parts.
    """
    decoded_context, decoded = reconstruction.context_frame.float(), reconstruction.frames.float()
    context_weight, weight = torch.ones_like(context_frame[:, :1]), torch.ones_like(frames[:, :, :1])
    if weighting.unusual != 1:
        context_weight = 1 + (weighting.unusual - 1) * _differs(context_frame, median_frame)  # (S, 1, H, W)
        weight = 1 + (weighting.unusual - 1) * _differs(frames, median_frame)  # (S, L, 1, H, W)
    moving = _differs(frames, context_frame[:, None])  # (S, L, 1, H, W)
    weight = torch.maximum(weight, 1 + (weighting.moving - 1) * moving)
    context_error = _weighted_error(decoded_context, context_frame, context_weight, weighting)
    flat = (x.flatten(0, 1) for x in (decoded, frames, weight))  # (S * L, ., H, W)
    future_error = _weighted_error(*flat, weighting)
    loss = context_error + future_error
    metrics = {"context_error": context_error.detach(), "future_error": future_error.detach()}
    if weighting.still > 0:
        codes = reconstruction.future_codes  # (S, L, Nf, d)
        side = round(math.sqrt(moving[0, 0].numel() / codes.shape[2]))  # pixels of a token's patch
        still = 1 - F.max_pool2d(moving.flatten(0, 1), side).flatten(1)  # (S * L, Nf)
        still_code = (codes.flatten(0, 1).square().mean(dim=-1) * still).mean()
        loss = loss + weighting.still * still_code
        metrics["still_code"] = still_code.detach()
    if perceptual is not None:
        distance = perceptual(decoded_context, context_frame).mean() + perceptual(decoded, frames).mean()
        loss = loss + distance
        metrics["perceptual"] = distance.detach()
    return loss, metrics


def reconstruction_psnr(
    decoded_context: Tensor, decoded: Tensor, context_frame: Tensor, frames: Tensor, median_frame: Tensor
) -> dict[str, float]:
    """PSNR [dB] over all pixels, on unusual pixels, on moving pixels, and there when the context frame is copied.

    Args:
        decoded_context, context_frame: (S, C, H, W) in [0, 1].
        decoded, frames: (S, L, C, H, W) in [0, 1].
        median_frame: (C, H, W), the median of the data.
    """
    moving, unusual = moving_mask(frames, context_frame[:, None]), moving_mask(context_frame, median_frame)
    return {
        "val_psnr_context": pooled_psnr(decoded_context, context_frame),
        "val_psnr_context_unusual": pooled_psnr(decoded_context, context_frame, unusual),
        "val_psnr_future": pooled_psnr(decoded, frames),
        "val_psnr_moving": pooled_psnr(decoded, frames, moving),
        "val_psnr_moving_copy": pooled_psnr(context_frame[:, None].expand_as(frames), frames, moving),
    }


def last_layer_gradient(loss: Tensor, reconstruction: Reconstruction) -> Tensor:
    """Gradient of a loss on the decoded future frames with respect to the weights of the convolution that makes them.

    It is computed from that layer's input and output: the weights themselves may be sharded. The graph is kept.

    Args:
        loss: scalar, computed from `reconstruction.frames`.
        reconstruction: what the tokenizer's `forward` returned.

    Returns:
        (outputs, inputs, 3, 3) float32, not averaged over processes.
    """
    (gradient,) = torch.autograd.grad(loss, reconstruction.frames, retain_graph=True)  # (S, L, C, H, W)
    inputs = reconstruction.last_features.detach()  # (S * L, D, H / stem, W / stem)
    outputs = F.pixel_unshuffle(gradient.flatten(0, 1), gradient.shape[-1] // inputs.shape[-1]).to(inputs.dtype)
    return torch.nn.grad.conv2d_weight(inputs, (outputs.shape[1], inputs.shape[1], 3, 3), outputs, padding=1).float()


def adversarial_balance(reconstruction_gradient: Tensor, adversarial_gradient: Tensor) -> float:
    """Factor that makes the adversarial term pull the last layer as hard as the reconstruction does, at most 1e4.

    This is the adaptive weight of VQGAN (Esser et al., 2021): the ratio of the norms of both gradients.
    """
    return float((reconstruction_gradient.norm() / adversarial_gradient.norm().clamp_min(1e-8)).clamp_max(1e4))


def _differs(frames: Tensor, reference: Tensor) -> Tensor:
    """1 where frames (..., C, H, W) differ from the reference, 0 elsewhere: (..., 1, H, W)."""
    return ((frames - reference).abs().amax(dim=-3, keepdim=True) > THRESHOLD).float()


def _weighted_error(decoded: Tensor, target: Tensor, weight: Tensor, weighting: Weighting) -> Tensor:
    """Mean of weight * (|e| + square * e^2) of (B, C, H, W), averaged over scales of average-pooled images."""
    total = decoded.new_zeros(())
    for scale in range(weighting.pyramid):
        if scale:
            decoded, target, weight = (F.avg_pool2d(x, 2) for x in (decoded, target, weight))
        error = decoded - target
        error = error.abs() if weighting.square == 0 else error.abs() + weighting.square * error.square()
        total = total + (error * weight).mean()
    return total / weighting.pyramid
