"""Reconstruction loss: pixel, perceptual and static-patch terms; and the weight of an adversarial term beside it.

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
COLOUR_LEVELS = 5  # of each channel, by which colours are told apart
USUAL_SHARE = 0.02  # a colour that this share of the data's pixels has, or more, is not rare
MARGIN = 2  # pixels around moving ones that the generated frame, too, has to show


@dataclass(frozen=True)
class Weighting:
    """Weights of the loss terms and of a frame's pixels; the defaults are plain L1, as in the paper.

    Args:
        square: weight of the squared error, added to L1.
        moving: weight of future pixels that differ from the context frame; the others have 1.
        unusual: weight of pixels, of context and future frames, that differ from the median frame of the data.
        rare: largest factor on pixels whose colour is rare in the data, see `colour_weights`. A block in the hand is a
            few pixels beside the hand's hundreds.
        pyramid: number of scales of the error, each half the one before; 1 = full resolution only.
        still: weight of the squared codes of patches without a moving pixel. It makes the code 0 mean "as in the
            context frame": tokens do not flicker where nothing moves, which makes them easier to predict.
    """

    square: float = 0.0
    moving: float = 1.0
    unusual: float = 1.0
    rare: float = 1.0
    pyramid: int = 1
    still: float = 0.0


# L1 is minimised by the median. Where a small object may be anywhere, each pixel's median is background, and minutes of
# training learn the table and never the blocks. Squared errors, coarse scales and pixel weights make them count.
WEIGHTINGS = {
    "uniform": Weighting(),
    "small_objects": Weighting(square=2.0, moving=6.0, unusual=6.0, rare=4.0, pyramid=3, still=0.5),
}


def colour_weights(frames: Tensor, largest: float) -> Tensor:
    """Compute a weight for each colour, sqrt(`USUAL_SHARE` / its share of the pixels), from 1 to `largest`.

    Args:
        frames: (B, C, H, W) in [0, 1], of the data.
        largest: weight of colours that never occur.

    Returns:
        (`COLOUR_LEVELS` ** C,), by the index that `_colours` gives.
    """
    colours = _colours(frames)
    counts = torch.bincount(colours.flatten(), minlength=COLOUR_LEVELS ** frames.shape[1])
    return (USUAL_SHARE * colours.numel() / counts).sqrt().clamp(1, largest)  # no pixel: infinite, clamped


def _colours(frames: Tensor) -> Tensor:
    """Return an index of the colour of each pixel: (..., C, H, W) in [0, 1] -> (..., H, W) int64."""
    levels = (frames * COLOUR_LEVELS).long().clamp(0, COLOUR_LEVELS - 1)
    place = COLOUR_LEVELS ** torch.arange(frames.shape[-3], device=frames.device)
    return (levels * place[:, None, None]).sum(dim=-3)


def reconstruction_loss(
    reconstruction: Reconstruction,
    context_frame: Tensor,
    frames: Tensor,
    *,
    perceptual: Callable[[Tensor, Tensor], Tensor] | None = None,
    weighting: Weighting = WEIGHTINGS["uniform"],
    median_frame: Tensor | None = None,
    colour_weight: Tensor | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Compute L1 + perceptual distance on the context frame and on the future frames, each a mean over its pixels.

    Where the tokenizer composes frames with the context frame, `generated_error` is added. The mask multiplies the
    gradient of what it hides, and before the codes say anything, the context frame is the better guess everywhere:
    without a loss of its own for what is hidden, the mask closes, and generated frame and codes are hardly learnt.

    Pixel weights are not normalised to mean 1, so that splitting a batch over processes does not change the loss.

    Args:
        reconstruction: what the tokenizer's `forward` returned.
        context_frame: (S, C, H, W) in [0, 1].
        frames: (S, L, C, H, W) in [0, 1].
        perceptual: distance from `metrics.perceptual`, added with weight 1 (public recipe), or None.
        weighting: weights of terms and pixels.
        median_frame: (C, H, W), the median of the data; needed where `weighting.unusual` is not 1.
        colour_weight: `colour_weights` of the data; needed where `weighting.rare` is not 1. A pixel that moves has the
            larger weight of its own colour and that of the context frame, so that what is gone counts as well.

    Returns:
        The scalar loss, and its parts.
    """
    decoded_context, decoded = reconstruction.context_frame.float(), reconstruction.frames.float()
    context_weight, weight = torch.ones_like(context_frame[:, :1]), torch.ones_like(frames[:, :, :1])
    if weighting.unusual != 1:
        context_weight = 1 + (weighting.unusual - 1) * _differs(context_frame, median_frame)  # (S, 1, H, W)
        weight = 1 + (weighting.unusual - 1) * _differs(frames, median_frame)  # (S, L, 1, H, W)
    moving = _differs(frames, context_frame[:, None])  # (S, L, 1, H, W)
    weight = torch.maximum(weight, 1 + (weighting.moving - 1) * moving)  # the larger one, where a pixel is both
    if weighting.rare != 1:
        rare, rare_before = colour_weight[_colours(frames)][:, :, None], colour_weight[_colours(context_frame)][:, None]
        weight = weight * torch.where(moving > 0, torch.maximum(rare, rare_before[:, None]), rare)
        context_weight = context_weight * rare_before
    context_error = _weighted_error(decoded_context, context_frame, context_weight, weighting)
    flat = (x.flatten(0, 1) for x in (decoded, frames, weight))  # (S * L, ., H, W)
    future_error = _weighted_error(*flat, weighting)
    loss = context_error + future_error
    metrics = {"context_error": context_error.detach(), "future_error": future_error.detach()}
    if reconstruction.generated is not None:
        error = generated_error(reconstruction.generated, frames, weight, moving, weighting)
        loss = loss + error
        metrics["generated_error"] = error.detach()
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


def generated_error(generated: Tensor, frames: Tensor, weight: Tensor, moving: Tensor, weighting: Weighting) -> Tensor:
    """Compute the error of the generated frames alone, on moving pixels and a margin around them.

    Args:
        generated, frames: (S, L, C, H, W).
        weight, moving: (S, L, 1, H, W), weights of the pixels, and 1 where one moves.
        weighting: weights of the terms.
    """
    near = F.max_pool2d(moving.flatten(0, 1), 2 * MARGIN + 1, stride=1, padding=MARGIN)  # (S * L, 1, H, W)
    return _weighted_error(generated.flatten(0, 1), frames.flatten(0, 1), weight.flatten(0, 1) * near, weighting)


def reconstruction_psnr(
    decoded_context: Tensor, decoded: Tensor, context_frame: Tensor, frames: Tensor, median_frame: Tensor
) -> dict[str, float]:
    """Compute PSNRs [dB]: over all, unusual and moving pixels, and the last if the context frame is copied (baseline).

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
    """Compute the gradient of a loss on the decoded future frames for the weights of the decoder's last convolution.

    It is computed from that layer's input and output, since the weights may be sharded. The graph is kept. Of a loss on
    the generated frames alone it sees nothing.

    Args:
        loss: scalar, computed from `reconstruction.frames`.
        reconstruction: what the tokenizer's `forward` returned.

    Returns:
        (outputs, inputs, 3, 3) float32, not averaged over processes.
    """
    (gradient,) = torch.autograd.grad(loss, reconstruction.frames, retain_graph=True)  # (S, L, C, H, W)
    if reconstruction.generated is not None:  # frames = m * generated + (1 - m) * context: by the image and by the mask
        mask, generated = reconstruction.mask.detach(), reconstruction.generated.detach()
        ahead = generated - reconstruction.frames.detach()  # (1 - m) * (generated - context)
        of_mask = (gradient * ahead).sum(dim=2, keepdim=True) * mask  # the sigmoid's slope is m * (1 - m)
        gradient = torch.cat([gradient * mask, of_mask], dim=2)  # (S, L, C + 1, H, W)
    inputs = reconstruction.last_features.detach()  # (S * L, D, H / stem, W / stem)
    # the gradient of the convolution's output: undo the pixel shuffle that follows it
    outputs = F.pixel_unshuffle(gradient.flatten(0, 1), gradient.shape[-1] // inputs.shape[-1]).to(inputs.dtype)
    return torch.nn.grad.conv2d_weight(inputs, (outputs.shape[1], inputs.shape[1], 3, 3), outputs, padding=1).float()


def adversarial_balance(reconstruction_gradient: Tensor, adversarial_gradient: Tensor) -> float:
    """Compute the factor that gives the adversarial term as large a gradient as the reconstruction, at most 1e4.

    This is the adaptive weight of VQGAN (Esser et al., 2021): the ratio of the gradients' norms at the last layer.
    """
    return float((reconstruction_gradient.norm() / adversarial_gradient.norm().clamp_min(1e-8)).clamp_max(1e4))


def _differs(frames: Tensor, reference: Tensor) -> Tensor:
    """Return 1 where frames (..., C, H, W) differ from the reference, 0 elsewhere: (..., 1, H, W)."""
    return ((frames - reference).abs().amax(dim=-3, keepdim=True) > THRESHOLD).float()


def _weighted_error(decoded: Tensor, target: Tensor, weight: Tensor, weighting: Weighting) -> Tensor:
    """Compute the mean of weight * (|e| + square * e^2) of images (B, C, H, W), averaged over the pyramid's scales."""
    total = decoded.new_zeros(())
    for scale in range(weighting.pyramid):
        if scale:
            decoded, target, weight = (F.avg_pool2d(x, 2) for x in (decoded, target, weight))
        error = decoded - target
        error = error.abs() if weighting.square == 0 else error.abs() + weighting.square * error.square()
        total = total + (error * weight).mean()
    return total / weighting.pyramid
