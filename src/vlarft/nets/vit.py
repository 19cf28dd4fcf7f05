"""Vision encoders: images in, patch tokens out.

One `ViT` is DINOv2 with registers or SigLIP, by its configuration; `ConvEncoder` has the same interface (images ->
(B, N, D) tokens) and learns from scratch in minutes on a CPU, which a ViT does not.
State-dict names of the ViT are timm's, so a timm checkpoint of the same size loads as it is.

Shapes: B batch, C channels, H, W pixels, h, w feature map, N tokens, D width, K keypoints.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F
from einops import rearrange

from vlarft.nets.attention import attend


@dataclass(frozen=True)
class ViTConfig:
    """Sizes of one ViT; the defaults are DINOv2 ViT-L/14 with four registers at 224 px."""

    image_size: int = 224
    patch_size: int = 14
    width: int = 1024
    depth: int = 24
    num_heads: int = 16
    mlp_dim: int = 4096
    class_token: bool = True
    num_registers: int = 4
    layer_scale: bool = True
    attention_pool: bool = False  # present in SigLIP's checkpoints, not used by the features
    output_block: int = 22  # tokens are this block's output, before the final norm
    norm_eps: float = 1e-6
    mean: tuple[float, float, float] = (0.485, 0.456, 0.406)
    std: tuple[float, float, float] = (0.229, 0.224, 0.225)


DINOV2_LARGE = ViTConfig()
SIGLIP_SO400M = ViTConfig(
    width=1152,
    depth=27,
    mlp_dim=4304,
    class_token=False,
    num_registers=0,
    layer_scale=False,
    attention_pool=True,
    output_block=25,
    mean=(0.5, 0.5, 0.5),
    std=(0.5, 0.5, 0.5),
)


class Attention(nn.Module):
    """Multi-head self-attention with a fused, biased qkv projection."""

    def __init__(self, width: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x: (B, N, D) -> (B, N, D)."""
        q, k, v = rearrange(self.qkv(x), "b n (three heads d) -> three b heads n d", three=3, heads=self.num_heads)
        return self.proj(rearrange(attend(q, k, v), "b heads n d -> b n (heads d)"))


class MLP(nn.Module):
    """Two layers with a GELU between them; `approximate` is GELU's ("none" is the erf form)."""

    def __init__(self, width: int, hidden: int, approximate: str = "none") -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, hidden)
        self.fc2 = nn.Linear(hidden, width)
        self.approximate = approximate

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x: (..., D) -> (..., D)."""
        return self.fc2(F.gelu(self.fc1(x), approximate=self.approximate))


class LayerScale(nn.Module):
    """A learned gain per channel on a residual branch."""

    def __init__(self, width: int, init: float = 1e-5) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.full((width,), init))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x: (..., D) -> (..., D)."""
        return x * self.gamma


class Block(nn.Module):
    """Pre-norm transformer block: x += ls1(attn(norm1(x))); x += ls2(mlp(norm2(x)))."""

    def __init__(self, cfg: ViTConfig) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(cfg.width, eps=cfg.norm_eps)
        self.attn = Attention(cfg.width, cfg.num_heads)
        self.ls1 = LayerScale(cfg.width) if cfg.layer_scale else nn.Identity()
        self.norm2 = nn.LayerNorm(cfg.width, eps=cfg.norm_eps)
        self.mlp = MLP(cfg.width, cfg.mlp_dim)
        self.ls2 = LayerScale(cfg.width) if cfg.layer_scale else nn.Identity()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x: (B, N, D) -> (B, N, D)."""
        x = x + self.ls1(self.attn(self.norm1(x)))
        return x + self.ls2(self.mlp(self.norm2(x)))


class PatchEmbed(nn.Module):
    """Non-overlapping patches to tokens."""

    def __init__(self, patch_size: int, width: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(3, width, patch_size, stride=patch_size)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """images: (B, 3, H, W) -> (B, N, D), row by row."""
        return self.proj(images).flatten(2).transpose(1, 2)


class AttentionPool(nn.Module):
    """SigLIP's pooling head. The policy does not read it; it is here so that checkpoints load without leftovers."""

    def __init__(self, cfg: ViTConfig) -> None:
        super().__init__()
        self.num_heads = cfg.num_heads
        self.latent = nn.Parameter(torch.randn(1, 1, cfg.width) * cfg.width**-0.5)
        self.q = nn.Linear(cfg.width, cfg.width)
        self.kv = nn.Linear(cfg.width, 2 * cfg.width)
        self.proj = nn.Linear(cfg.width, cfg.width)
        self.norm = nn.LayerNorm(cfg.width, eps=cfg.norm_eps)
        self.mlp = MLP(cfg.width, cfg.mlp_dim)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x: (B, N, D) -> (B, D)."""
        q = rearrange(self.q(self.latent), "1 m (heads d) -> 1 heads m d", heads=self.num_heads)
        k, v = rearrange(self.kv(x), "b n (two heads d) -> two b heads n d", two=2, heads=self.num_heads)
        out = attend(q.expand(len(x), -1, -1, -1), k, v)
        pooled = self.proj(rearrange(out, "b heads m d -> b m (heads d)"))  # (B, 1, D)
        return (pooled + self.mlp(self.norm(pooled)))[:, 0]


class ViT(nn.Module):
    """A vision transformer whose patch tokens of one block are the output.

    Args:
        cfg: sizes. Blocks after `output_block`, the final norm and the pooling head exist because the public
            checkpoints hold them; they take no part in the features.
    """

    def __init__(self, cfg: ViTConfig) -> None:
        super().__init__()
        if cfg.image_size % cfg.patch_size:
            raise ValueError(
                f"ViTConfig.image_size {cfg.image_size} is not a multiple of patch_size {cfg.patch_size}; "
                f"use {cfg.image_size // cfg.patch_size * cfg.patch_size}"
            )
        if not 0 <= cfg.output_block < cfg.depth:
            raise ValueError(f"ViTConfig.output_block {cfg.output_block} must lie in 0..{cfg.depth - 1} (depth - 1)")
        self.cfg = cfg
        self.num_tokens = (cfg.image_size // cfg.patch_size) ** 2
        self.cls_token = nn.Parameter(torch.zeros(1, 1, cfg.width)) if cfg.class_token else None
        self.reg_token = nn.Parameter(torch.zeros(1, cfg.num_registers, cfg.width)) if cfg.num_registers else None
        self.pos_embed = nn.Parameter(torch.randn(1, self.num_tokens, cfg.width) * 0.02)
        self.patch_embed = PatchEmbed(cfg.patch_size, cfg.width)
        self.blocks = nn.ModuleList(Block(cfg) for _ in range(cfg.depth))
        self.norm = nn.LayerNorm(cfg.width, eps=cfg.norm_eps)
        self.attn_pool = AttentionPool(cfg) if cfg.attention_pool else None

    def freeze_unread(self) -> None:
        """Freeze the parameters that do not enter the features and so would never get a gradient."""
        for part in (*self.blocks[self.cfg.output_block + 1 :], self.norm, self.attn_pool):
            if part is not None:
                part.requires_grad_(False)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Compute the patch tokens after block `output_block`.

        Args:
            images: (B, 3, image_size, image_size), floats in [0, 1].

        Returns:
            (B, N, D); class and register tokens are removed.

        Raises:
            ValueError: images of another size.
        """
        cfg = self.cfg
        check_image_size(images, cfg.image_size)
        mean, std = (images.new_tensor(values).view(3, 1, 1) for values in (cfg.mean, cfg.std))
        # only patches have positions: add them before class and register tokens are put in front
        x = self.patch_embed((images - mean) / std) + self.pos_embed  # (B, N, D)
        prefix = [p.expand(len(x), -1, -1) for p in (self.cls_token, self.reg_token) if p is not None]
        x = torch.cat([*prefix, x], dim=1)  # (B, 1 + registers + N, D)
        for block in self.blocks[: cfg.output_block + 1]:
            x = block(x)
        return x[:, x.shape[1] - self.num_tokens :]


def check_image_size(images: torch.Tensor, image_size: int, num_images: int = 1) -> None:
    """Raise ValueError unless images are (B, 3 * num_images, image_size, image_size)."""
    expected = 3 * num_images, image_size, image_size
    if images.ndim != 4 or images.shape[1:] != expected:
        raise ValueError(
            f"images: got shape {tuple(images.shape)}, this encoder takes (B, {', '.join(map(str, expected))}); "
            "resize them first"
        )


@dataclass(frozen=True)
class ConvEncoderConfig:
    """A convolutional encoder that ends in spatial-softmax keypoints; every keypoint is a token."""

    image_size: int = 64
    num_images: int = 1  # images of one size whose channels are stacked
    channels: tuple[int, ...] = (64, 64)  # one convolution each
    kernels: tuple[int, ...] = (7, 3)  # odd
    strides: tuple[int, ...] = (4, 1)
    num_keypoints: int = 16
    attention_gain: float = 12.0  # factor on the initial weights of the keypoints' maps: flat softmaxes learn slowly
    coordinate_gain: float = 8.0  # factor on a keypoint's (x, y) beside its features: else positions are learned late
    width: int = 128  # of the tokens
    film_dim: int | None = None  # width of an instruction embedding that scales and shifts each layer; None: no FiLM


class ConvEncoder(nn.Module):
    """Convolutions over the image and its xy coordinates, optionally modulated by the instruction.

    Each of the final maps is a softmax over positions; its token holds the expected (x, y) and the features
    averaged under the same weights, so that "where" stays exact although the maps are coarse.
    """

    def __init__(self, cfg: ConvEncoderConfig) -> None:
        super().__init__()
        if not len(cfg.channels) == len(cfg.kernels) == len(cfg.strides):
            raise ValueError(
                f"ConvEncoderConfig: {len(cfg.channels)} channels, {len(cfg.kernels)} kernels, {len(cfg.strides)} "
                "strides; give one of each per layer"
            )
        self.cfg = cfg
        self.num_tokens = cfg.num_keypoints
        widths = (3 * cfg.num_images + 2, *cfg.channels)  # colours, x and y
        self.convs = nn.ModuleList(
            nn.Conv2d(a, b, k, stride=s, padding=k // 2)
            for a, b, k, s in zip(widths[:-1], widths[1:], cfg.kernels, cfg.strides, strict=True)
        )
        self.norms = nn.ModuleList(nn.GroupNorm(max(1, c // 16), c) for c in cfg.channels)
        self.films = nn.ModuleList(nn.Linear(cfg.film_dim, 2 * c) for c in cfg.channels) if cfg.film_dim else None
        self.attend = nn.Conv2d(cfg.channels[-1], cfg.num_keypoints, 1, bias=False)  # a softmax ignores a bias
        with torch.no_grad():
            self.attend.weight.mul_(cfg.attention_gain)
        self.embed = nn.Linear(2 + cfg.channels[-1], cfg.width)
        self.slot = nn.Parameter(torch.randn(cfg.num_keypoints, cfg.width) * 0.02)

    def forward(self, images: torch.Tensor, language: torch.Tensor | None = None) -> torch.Tensor:
        """Compute one token per keypoint.

        Args:
            images: (B, 3 * num_images, image_size, image_size), floats in [0, 1].
            language: (B, film_dim) instruction embedding; needed exactly when the configuration has a film_dim.

        Returns:
            (B, num_keypoints, D).

        Raises:
            ValueError: another image size; instruction embedding missing, or given without `film_dim`.
        """
        check_image_size(images, self.cfg.image_size, self.cfg.num_images)
        if (language is None) != (self.films is None):
            raise ValueError(
                f"ConvEncoder: film_dim is {self.cfg.film_dim} but an instruction embedding was "
                f"{'not ' if language is None else ''}given"
            )
        x = torch.cat([images * 2 - 1, coordinates(images).expand(len(images), -1, -1, -1)], dim=1)  # (B, 3 + 2, H, W)
        x = x.contiguous(memory_format=torch.channels_last)  # a quarter less time of a step on a CPU
        for i, (conv, norm) in enumerate(zip(self.convs, self.norms, strict=True)):
            x = norm(conv(x))
            if self.films is not None:
                scale, shift = self.films[i](language)[:, :, None, None].chunk(2, dim=1)  # (B, c, 1, 1) each
                x = x * (1 + scale) + shift
            x = F.relu(x)
        weights = self.attend(x).flatten(2).float().softmax(dim=-1).to(x.dtype)  # (B, K, h*w), over positions
        places = self.cfg.coordinate_gain * coordinates(x).expand(len(x), -1, -1, -1)
        values = torch.cat([places, x], dim=1).flatten(2)  # (B, 2 + c, h*w)
        return self.embed(weights @ values.transpose(1, 2)) + self.slot  # (B, K, D)


def coordinates(images: torch.Tensor) -> torch.Tensor:
    """Return x and y of every pixel's centre in [-1, 1], (1, 2, H, W), for images (..., H, W)."""
    height, width = images.shape[-2:]
    y, x = ((torch.arange(n, device=images.device, dtype=images.dtype) + 0.5) * 2 / n - 1 for n in (height, width))
    return torch.stack(torch.meshgrid(x, y, indexing="xy"))[None]
