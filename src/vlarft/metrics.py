"""Image metrics: MSE, PSNR, SSIM and perceptual distances.

Images are float in [0, 1], (..., C, H, W), compared in float32; the leading axes are kept in the result.
"""

import math
from pathlib import Path
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vlarft.run.optional import optional

LPIPS_BACKBONE = "vgg16-397923af.pth"


def mse(pred: Tensor, target: Tensor, mask: Tensor | None = None) -> Tensor:
    """Compute the mean squared error per image.

    Args:
        pred, target: (..., C, H, W) in [0, 1].
        mask: (..., 1, H, W) bool, the pixels that count; None = all. An image without any gives nan.

    Returns:
        (...) float32.
    """
    error = (pred.float() - target.float()).square()
    if mask is None:
        return error.mean(dim=(-3, -2, -1))
    mask = mask.expand(error.shape).float()  # over the channels too, so that the sum counts each of them
    return (error * mask).sum(dim=(-3, -2, -1)) / mask.sum(dim=(-3, -2, -1))


def psnr(pred: Tensor, target: Tensor, mask: Tensor | None = None) -> Tensor:
    """Compute the peak signal-to-noise ratio per image [dB], range 1; inf for equal images. Arguments as in `mse`."""
    return -10 * mse(pred, target, mask).log10()


def pooled_psnr(pred: Tensor, target: Tensor, mask: Tensor | None = None) -> float:
    """Compute the PSNR [dB] of the mean squared error over all pixels (of `mask`) of all images together.

    Unlike the mean of per-image values, it is finite when single images are perfect or have no pixel in the mask.
    Arguments as in `mse`; nan when no pixel counts.
    """
    error = (pred.float() - target.float()).square()
    mask = torch.ones_like(error) if mask is None else mask.expand(error.shape).float()
    mean = float((error * mask).double().sum() / mask.double().sum())  # nan for an empty mask
    return -10 * math.log10(mean) if mean > 0 else math.inf if mean == 0 else math.nan


def moving_mask(frames: Tensor, context_frame: Tensor, threshold: float = 0.04) -> Tensor:
    """Mark the pixels that differ from the context frame.

    Args:
        frames: (..., C, H, W), true frames.
        context_frame: broadcastable to `frames`.
        threshold: a pixel moves when a channel differs by more than this (0.04 = 10 of 255).

    Returns:
        (..., 1, H, W) bool.
    """
    return (frames - context_frame).abs().amax(dim=-3, keepdim=True) > threshold


class Windows(NamedTuple):
    """The part of SSIM that depends on one image alone: images (N, C, H, W), and mean and variance of their windows."""

    image: Tensor
    mean: Tensor  # (N, C, H - window + 1, W - window + 1)
    variance: Tensor


def _blur(x: Tensor, window: int, sigma: float) -> Tensor:
    """Average the windows inside the image, Gaussian weights: (..., H, W) -> (..., H - window + 1, W - window + 1)."""
    height, width = (_gaussian_means(length, window, sigma, x.device) for length in x.shape[-2:])
    return height @ (x @ width.T)  # a Gaussian is separable: along W, then along H


def _gaussian_means(length: int, window: int, sigma: float, device: torch.device) -> Tensor:
    """Build the matrix (length - window + 1, length) that averages along an axis: faster than a convolution."""
    starts = torch.arange(length - window + 1, device=device)[:, None]
    offsets = torch.arange(length, device=device) - starts - (window - 1) / 2  # pixels from each window's centre
    weights = torch.exp(-offsets.square() / (2 * sigma**2)) * (offsets.abs() <= (window - 1) / 2)
    return weights / weights.sum(1, keepdim=True)


def ssim_windows(images: Tensor, window: int = 11, sigma: float = 1.5) -> Windows:
    """Compute the part of `ssim` that depends on one image alone, for images (..., C, H, W) in [0, 1], N in all.

    Raises:
        ValueError: images smaller than the window.
    """
    height, width = images.shape[-2:]
    if min(height, width) < window:
        raise ValueError(f"SSIM with window {window} needs images of at least {window} pixels, got {height}x{width}")
    images = images.float().reshape(-1, *images.shape[-3:])
    mean = _blur(images, window, sigma)
    return Windows(images, mean, _blur(images * images, window, sigma) - mean**2)  # variance: E[x^2] - E[x]^2


def ssim_to(pred: Tensor, target: Windows, window: int = 11, sigma: float = 1.5) -> Tensor:
    """Compute `ssim` of pred (..., C, H, W), N runs of R consecutive images, to N targets, one per run."""
    x = Windows(*(part.unflatten(0, (len(target.image), -1)) for part in ssim_windows(pred, window, sigma)))
    y = Windows(*(part[:, None] for part in target))  # x: (N, R, C, ...), y: (N, 1, C, ...)
    covariance = _blur(x.image * y.image, window, sigma) - x.mean * y.mean
    c1, c2 = 0.01**2, 0.03**2  # the usual constants, for range 1
    value = (2 * x.mean * y.mean + c1) * (2 * covariance + c2)
    value = value / ((x.mean**2 + y.mean**2 + c1) * (x.variance + y.variance + c2))  # (N, R, C, H', W')
    return value.mean(dim=(-3, -2, -1)).reshape(pred.shape[:-3])


def ssim(pred: Tensor, target: Tensor, window: int = 11, sigma: float = 1.5) -> Tensor:
    """Compute the structural similarity per image: range 1, Gaussian window, mean over channels and inner windows.

    Args:
        pred, target: (..., C, H, W) in [0, 1].
        window: side of the window in pixels, odd.
        sigma: its standard deviation in pixels.

    Returns:
        (...) float32.

    Raises:
        ValueError: images smaller than the window.
    """
    pred, target = torch.broadcast_tensors(pred, target)
    return ssim_to(pred, ssim_windows(target, window, sigma), window, sigma)


class PerceptualDistance(nn.Module):
    """Perceptual distance of images, per image, float32; differentiable in the first argument.

    `distance(pred, target)` compares two stacks of images. Where one target serves many predictions, compute
    `features(target)` once and use `distance_to(pred, features)`.

    Args:
        name: "lpips" (LPIPS with VGG16), "ssim" ((1 - SSIM) / 2) or "none" (zero).
        weights: for lpips, the file of the VGG16 backbone; None = torchvision's cache.
    """

    def __init__(self, name: Literal["lpips", "ssim", "none"], weights: str | Path | None = None) -> None:
        super().__init__()
        if name not in ("lpips", "ssim", "none"):
            raise ValueError(f"perceptual must be lpips, ssim or none, got {name!r}")
        if weights is not None and name != "lpips":
            raise ValueError(f"weights {weights} are of no use for perceptual={name!r}; only lpips has weights")
        self.name = name
        if name == "lpips":
            self.lpips = _load_lpips(weights)

    def bytes_per_image(self, image: Tensor) -> int:
        """Estimate the bytes that comparing one image (..., C, H, W) takes, by its maps at full resolution."""
        maps = 6 * 64 if self.name == "lpips" else 16 * image.shape[-3]  # VGG16 has 64 channels there
        return maps * image.shape[-2] * image.shape[-1] * 4

    def features(self, target: Tensor) -> Windows | list[Tensor] | None:
        """Compute once what comparisons with `target` (..., C, H, W) need; its leading axes are flattened.

        Returns:
            The windows of "ssim", the unit-length features of each VGG16 stage of "lpips", or None.
        """
        if self.name == "none":
            return None
        if self.name == "ssim":
            return ssim_windows(target)
        images = self.lpips.scaling_layer(target.float().reshape(-1, *target.shape[-3:]) * 2 - 1)  # LPIPS takes [-1, 1]
        layers = self.lpips.net(images.to(next(self.lpips.net.parameters()).dtype))
        return [F.normalize(x.float(), dim=1, eps=1e-10) for x in layers]  # (N, channels, h, w) each

    def distance_to(self, pred: Tensor, features: Windows | list[Tensor] | None) -> Tensor:
        """Compute the distance of pred (..., C, H, W) to the images that `features` were computed from: (...) float32.

        These may be fewer: `pred` is then cut into as many runs of consecutive images, each compared with one of them.
        """
        if self.name == "none":
            return pred.new_zeros(pred.shape[:-3], dtype=torch.float32)
        if self.name == "ssim":
            return (1 - ssim_to(pred, features)) / 2
        total = pred.new_zeros(pred.shape[:-3].numel(), dtype=torch.float32)
        for head, x, y in zip(self.lpips.lins, self.features(pred), features, strict=True):
            y = y.repeat_interleave(x.shape[0] // y.shape[0], 0)  # the run of images that share a target
            total = total + head((x - y).square()).mean(dim=(1, 2, 3))  # head: weighted sum over channels
        return total.reshape(pred.shape[:-3])

    def to_bfloat16(self) -> "PerceptualDistance":
        """Cast the backbone, if there is one, to bfloat16 in place; distances are still computed in float32."""
        if self.name == "lpips":
            self.lpips.net.to(torch.bfloat16, memory_format=torch.channels_last)
        return self

    def compile_network(self) -> None:
        """`torch.compile` the backbone, if there is one."""
        if self.name == "lpips":
            self.lpips.net.compile()

    def forward(self, pred: Tensor, target: Tensor) -> Tensor:
        """Compute the distance per image, pred and target (..., C, H, W) in [0, 1] -> (...) float32."""
        return self.distance_to(pred, self.features(target))


def perceptual(name: Literal["lpips", "ssim", "none"], weights: str | Path | None = None) -> PerceptualDistance:
    """Build the named perceptual distance, frozen and in eval mode.

    Args:
        name: "lpips", "ssim" or "none".
        weights: file of the VGG16 backbone for lpips; None = torchvision's cache.

    Raises:
        FileNotFoundError: no file with the backbone's weights. Random ones are never used.
        ImportError: lpips is not installed.
        ValueError: another name, or weights for a distance that has none.
    """
    return PerceptualDistance(name, weights).eval().requires_grad_(False)


def _load_lpips(weights: str | Path | None) -> nn.Module:
    path = Path(torch.hub.get_dir()) / "checkpoints" / LPIPS_BACKBONE if weights is None else Path(weights)
    if not path.is_file():
        raise FileNotFoundError(
            f"LPIPS needs the VGG16 backbone, and {path} does not exist: download "
            f"https://download.pytorch.org/models/{LPIPS_BACKBONE} to that place, give its path as "
            "--perceptual-weights, or choose --perceptual ssim or --perceptual none, which need no weights"
        )
    with optional("the perceptual distance lpips needs lpips", "lpips"):
        import lpips
    # pnet_rand only keeps the package from downloading the backbone: every weight of it is loaded below, strictly
    model = lpips.LPIPS(net="vgg", pnet_rand=True, verbose=False)
    stored = torch.load(path, map_location="cpu", weights_only=True)
    wanted = model.net.state_dict()
    renamed = {key: f"features.{key.split('.', 1)[1]}" for key in wanted}  # slice3.10.weight -> features.10.weight
    if missing := [name for name in renamed.values() if name not in stored]:
        raise ValueError(f"{path} is not torchvision's VGG16: it lacks {', '.join(missing[:5])}")
    model.net.load_state_dict({key: stored[name] for key, name in renamed.items()})
    return model
