"""Networks of the frame tokenizer: convolutional encoders and decoders with cross-attention into a context frame.

Parameter names are those of the public checkpoints.

Shapes: B images, C channels, h, w grid; D channels of a feature map; N = h * w positions; S starts with L frames each;
Nc context tokens, E head width.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from vlarft.nets.attention import attend


@dataclass(frozen=True)
class TokenizerConfig:
    """Sizes of the tokenizer; the defaults are the paper's (128,792,656 parameters).

    Args:
        image_size: height and width in pixels, multiples of stem * 2 ** (stages - 1) * future_patch.
        channels: image channels.
        stem: side of the pixel blocks folded into channels before the first convolution (1 = none). A stem of 4 makes
            a small image 16 times cheaper to convolve.
        block_channels: channels of the stages; all but the last halve the resolution.
        res_blocks: residual blocks per encoder stage; decoder stages have one more.
        mid_res_blocks: residual blocks of the mid block, at the latent grid.
        latent_channels: channels of the latent grid before quantisation.
        future_patch: side of the latent patches that make one future token.
        context_levels: FSQ levels of context tokens, odd.
        future_levels: FSQ levels of future tokens, odd.
        norm_groups: groups of every GroupNorm; must divide all block channels.
        num_heads: heads of the cross-attention.
        dropout: dropout of the cross-attention's weights, in training.
        quant_gain: factor on the initial weights in front of the quantisers. At 1 (the paper) nearly all scalars round
            to zero at first and tell the decoders nothing; about 6 starts with all levels in use.
        local_init: let each position of the cross-attention attend to the same position of the context at first. Off in
            the paper (position embeddings start at zero); a short training need not learn the correspondence then.
        compose: show the context frame itself where nothing moved: the conditional decoder also decodes a mask m, and a
            future frame is m * generated + (1 - m) * context frame. Its last stage sees the context's pixels, and so
            does the conditional encoder's first convolution. Off in the paper, whose decoder repaints every pixel.
    """

    image_size: tuple[int, int] = (256, 256)
    channels: int = 3
    stem: int = 1
    block_channels: tuple[int, ...] = (128, 256, 256, 512)
    res_blocks: int = 2
    mid_res_blocks: int = 2
    latent_channels: int = 64
    future_patch: int = 4
    context_levels: tuple[int, ...] = (7, 5, 5, 5, 5)
    future_levels: tuple[int, ...] = (7, 5, 5, 5, 5)
    norm_groups: int = 32
    num_heads: int = 4
    dropout: float = 0.1
    quant_gain: float = 1.0
    local_init: bool = False
    compose: bool = False

    def __post_init__(self) -> None:
        multiple = self.downsampling * self.future_patch
        if any(side <= 0 or side % multiple for side in self.image_size):
            raise ValueError(
                f"image_size {self.image_size[0]}x{self.image_size[1]} cannot be tokenized: height and width must be "
                f"multiples of {multiple} (stem {self.stem} x downsampling {2 ** (len(self.block_channels) - 1)} x "
                f"future_patch {self.future_patch}); choose another image size or change one of these"
            )
        for name in ("context_levels", "future_levels"):
            if any(level < 3 or level % 2 == 0 for level in getattr(self, name)):
                raise ValueError(f"{name}={getattr(self, name)}: every FSQ level must be odd and at least 3")
        if any(c % self.norm_groups for c in self.block_channels):
            raise ValueError(f"norm_groups={self.norm_groups} must divide each of block_channels={self.block_channels}")

    @property
    def downsampling(self) -> int:
        """Pixels per latent cell, along one side."""
        return self.stem * 2 ** (len(self.block_channels) - 1)

    @property
    def grid(self) -> tuple[int, int]:
        """Latent grid (h, w)."""
        return self.image_size[0] // self.downsampling, self.image_size[1] // self.downsampling

    @property
    def num_context_tokens(self) -> int:
        """Tokens Nc of a context frame."""
        return self.grid[0] * self.grid[1]

    @property
    def future_grid(self) -> tuple[int, int]:
        """Grid of the tokens of a future frame."""
        return self.grid[0] // self.future_patch, self.grid[1] // self.future_patch

    @property
    def num_future_tokens(self) -> int:
        """Tokens Nf of a future frame."""
        return self.future_grid[0] * self.future_grid[1]


class GroupNorm(nn.GroupNorm):
    """`torch.nn.GroupNorm`, but in float32 where the bfloat16 kernel of CPUs is slow: small groups on small maps. And
    channels last stay last, which CUDA's kernel would undo before the next convolution.
    """

    def forward(self, x: Tensor) -> Tensor:
        """x: (B, D, h, w) -> the same shape, type and memory format."""
        if x.is_cuda and x.is_contiguous(memory_format=torch.channels_last):
            return super().forward(x).contiguous(memory_format=torch.channels_last)
        slow = x.shape[1] < 16 * self.num_groups and x.shape[2:].numel() < 1024
        if not (slow and x.dtype == torch.bfloat16 and x.device.type == "cpu"):
            return super().forward(x)
        return F.group_norm(x.float(), self.num_groups, self.weight.float(), self.bias.float(), self.eps).to(x.dtype)


class ResBlock(nn.Module):
    """GroupNorm, SiLU, conv, twice, around a residual."""

    def __init__(self, dim_in: int, dim_out: int, groups: int) -> None:
        super().__init__()
        self.norm1 = GroupNorm(groups, dim_in, eps=1e-6)
        self.conv1 = nn.Conv2d(dim_in, dim_out, 3, padding=1)
        self.norm2 = GroupNorm(groups, dim_out, eps=1e-6)
        self.conv2 = nn.Conv2d(dim_out, dim_out, 3, padding=1)
        if dim_in != dim_out:
            self.conv_shortcut = nn.Conv2d(dim_in, dim_out, 1)
        else:
            self.conv_shortcut = None

    def forward(self, x: Tensor) -> Tensor:
        """x: (B, D, h, w) -> (B, D', h, w)."""
        h = self.conv1(F.silu(self.norm1(x)))
        h = self.conv2(F.silu(self.norm2(h)))
        return h + (x if self.conv_shortcut is None else self.conv_shortcut(x))


class SpatialAttention(nn.Module):
    """Single-head self-attention over the latent grid, around a residual."""

    def __init__(self, dim: int, groups: int) -> None:
        super().__init__()
        self.group_norm = GroupNorm(groups, dim, eps=1e-6)
        self.to_q, self.to_k, self.to_v = (nn.Linear(dim, dim) for _ in range(3))
        self.to_out = nn.ModuleList([nn.Linear(dim, dim)])

    def forward(self, x: Tensor) -> Tensor:
        """x: (B, D, h, w) -> (B, D, h, w)."""
        tokens = self.group_norm(x).flatten(2).transpose(1, 2)[:, None]  # (B, 1, h * w, D)
        out = attend(self.to_q(tokens), self.to_k(tokens), self.to_v(tokens))
        return x + self.to_out[0](out[:, 0]).transpose(1, 2).unflatten(2, x.shape[2:])


class AttentionWeights(nn.Module):
    """Projections of a multi-head attention, in one matrix for query, key and value."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.in_proj_weight = nn.Parameter(torch.empty(3 * dim, dim))
        self.in_proj_bias = nn.Parameter(torch.zeros(3 * dim))
        self.out_proj = nn.Linear(dim, dim)
        nn.init.xavier_uniform_(self.in_proj_weight)
        nn.init.zeros_(self.out_proj.bias)


class CrossAttention(nn.Module):
    """SiLU(z + attention(z -> context features)), with learned positions on both sides."""

    def __init__(self, dim: int, num_tokens: int, cfg: TokenizerConfig) -> None:
        super().__init__()
        self.num_heads, self.dropout = cfg.num_heads, cfg.dropout
        self.att = AttentionWeights(dim)
        self.kv_norm = GroupNorm(cfg.norm_groups, dim)
        self.q_norm = GroupNorm(cfg.norm_groups, dim)
        self.kv_pos_emb = nn.Parameter(torch.zeros(num_tokens, dim))
        self.q_pos_emb = nn.Parameter(torch.zeros(num_tokens, dim))
        if cfg.local_init:
            with torch.no_grad():  # equal embeddings under equal projections: scores peak where q and k positions agree
                self.kv_pos_emb.normal_(std=1.5)
                self.q_pos_emb.copy_(self.kv_pos_emb)
                self.att.in_proj_weight[dim : 2 * dim] = self.att.in_proj_weight[:dim]

    def keys_values(self, features: Tensor) -> tuple[Tensor, Tensor]:
        """Project context features (S, D, h, w) to keys and values, (S, heads, Nc, E) each."""
        features = features.to(self.kv_pos_emb.dtype)
        tokens = self.kv_norm(features).flatten(2).transpose(1, 2) + self.kv_pos_emb  # (S, Nc, D)
        dim = tokens.shape[-1]
        both = F.linear(tokens, self.att.in_proj_weight[dim:], self.att.in_proj_bias[dim:])  # (S, Nc, 2 * D)
        key, value = rearrange(both, "s n (two f e) -> two s f n e", two=2, f=self.num_heads)
        return key, value

    def forward(self, z: Tensor, keys_values: tuple[Tensor, Tensor]) -> Tensor:
        """z: (S * L, D, h, w), the L frames of a start consecutive -> the same shape."""
        key, value = keys_values
        starts, dim = key.shape[0], z.shape[1]
        tokens = self.q_norm(z).flatten(2).transpose(1, 2) + self.q_pos_emb  # (S * L, N, D)
        query = F.linear(tokens, self.att.in_proj_weight[:dim], self.att.in_proj_bias[:dim])
        # the L frames of a start form one long query, so that its keys and values are read in place
        query = rearrange(query, "(s l) n (f e) -> s f (l n) e", s=starts, f=self.num_heads)
        dropout = self.dropout if self.training else 0.0
        out = attend(query, key.to(query.dtype), value.to(query.dtype), dropout=dropout)
        out = rearrange(out, "s f (l n) e -> (s l) n (f e)", n=tokens.shape[1])  # (S * L, N, D)
        return F.silu(z + self.att.out_proj(out).transpose(1, 2).unflatten(2, z.shape[2:]))


class MidBlock(nn.Module):
    """Residual blocks at the latent grid, with self-attention after the first in the conditional networks."""

    def __init__(self, dim: int, cfg: TokenizerConfig, attention: bool) -> None:
        super().__init__()
        self.resnets = nn.ModuleList(ResBlock(dim, dim, cfg.norm_groups) for _ in range(cfg.mid_res_blocks))
        self.attentions = nn.ModuleList([SpatialAttention(dim, cfg.norm_groups)] if attention else [])

    def forward(self, x: Tensor) -> Tensor:
        """x: (B, D, h, w) -> (B, D, h, w)."""
        x = self.resnets[0](x)
        for attention in self.attentions:
            x = attention(x)
        for block in self.resnets[1:]:
            x = block(x)
        return x


class Downsample(nn.Module):
    """Stride-2 convolution that pads the right and the bottom only."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(dim, dim, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        """x: (B, D, h, w) -> (B, D, h / 2, w / 2)."""
        return self.conv(F.pad(x, (0, 1, 0, 1)))


class Upsample(nn.Module):
    """Nearest-neighbour doubling and a convolution."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(dim, dim, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """x: (B, D, h, w) -> (B, D, 2 * h, 2 * w)."""
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))


class Stage(nn.Module):
    """Residual blocks, then a change of resolution unless it is the last stage."""

    def __init__(self, dims: tuple[int, int], num_blocks: int, groups: int, resample: str | None) -> None:
        super().__init__()
        dim_in, dim_out = dims
        self.resnets = nn.ModuleList(
            ResBlock(dim_in if i == 0 else dim_out, dim_out, groups) for i in range(num_blocks)
        )
        if resample == "down":
            self.downsamplers = nn.ModuleList([Downsample(dim_out)])
        elif resample == "up":
            self.upsamplers = nn.ModuleList([Upsample(dim_out)])
        self.resample = resample

    def forward(self, x: Tensor) -> Tensor:
        """x: (B, D, h, w) -> (B, D', h', w')."""
        for block in self.resnets:
            x = block(x)
        if self.resample is None:
            return x
        return (self.downsamplers if self.resample == "down" else self.upsamplers)[0](x)


class Encoder(nn.Module):
    """Image -> latent grid. The conditional encoder attends to the context after each stage at the latent grid."""

    def __init__(self, cfg: TokenizerConfig, conditional: bool) -> None:
        super().__init__()
        dims, last = cfg.block_channels, len(cfg.block_channels) - 1
        self.stem = cfg.stem
        channels = cfg.channels * (2 if conditional and cfg.compose else 1)  # composing: with the context frame's
        self.conv_in = nn.Conv2d(channels * cfg.stem**2, dims[0], 3, padding=1)
        self.down_blocks = nn.ModuleList(
            Stage((dims[max(i - 1, 0)], dims[i]), cfg.res_blocks, cfg.norm_groups, "down" if i < last else None)
            for i in range(len(dims))
        )
        self.cross_stages = [i for i in (last - 1, last) if i >= 0]  # the last stage keeps the grid of the one before
        self.cross_att_blocks = nn.ModuleList(
            CrossAttention(dims[i], cfg.num_context_tokens, cfg) for i in self.cross_stages if conditional
        )
        self.mid_block = MidBlock(dims[-1], cfg, attention=conditional)
        self.conv_norm_out = GroupNorm(cfg.norm_groups, dims[-1], eps=1e-6)
        self.conv_out = nn.Conv2d(dims[-1], cfg.latent_channels, 3, padding=1)

    def forward(self, x: Tensor, keys_values: list[tuple[Tensor, Tensor]] | None) -> tuple[Tensor, list[Tensor]]:
        """x: (B, C, H, W), (B, 2 C, H, W) if composing -> latent (B, D, h, w), features of the stages at that grid."""
        x = F.pixel_unshuffle(x, self.stem).contiguous(memory_format=torch.channels_last)  # (B, C stem^2, H/stem, ...)
        x = self.conv_in(x)
        features = []
        for i, stage in enumerate(self.down_blocks):
            x = stage(x)
            if i in self.cross_stages:
                if keys_values is not None:  # len(features) counts the stages at the latent grid so far
                    x = self.cross_att_blocks[len(features)](x, keys_values[len(features)])
                features.append(x)  # (B, D, h, w)
        return self.conv_out(F.silu(self.conv_norm_out(self.mid_block(x)))), features


class FrameDecoder(nn.Module):
    """Latent grid -> image, in two halves: `middle` at the latent grid, `image` up to the pixels."""

    def __init__(self, cfg: TokenizerConfig, conditional: bool) -> None:
        super().__init__()
        dims, last = cfg.block_channels[::-1], len(cfg.block_channels) - 1
        self.stem = cfg.stem
        self.conv_in = nn.Conv2d(cfg.latent_channels, dims[0], 3, padding=1)
        self.mid_block = MidBlock(dims[0], cfg, attention=conditional)
        self.cross_att_blocks = nn.ModuleList(
            [CrossAttention(dims[0], cfg.num_context_tokens, cfg)] if conditional else []
        )
        self.up_blocks = nn.ModuleList(
            Stage((dims[max(i - 1, 0)], dims[i]), cfg.res_blocks + 1, cfg.norm_groups, "up" if i < last else None)
            for i in range(len(dims))
        )
        self.conv_norm_out = GroupNorm(cfg.norm_groups, dims[-1], eps=1e-6)
        self.composes = conditional and cfg.compose
        channels = cfg.channels + self.composes  # one more for the mask
        self.conv_out = nn.Conv2d(dims[-1], channels * cfg.stem**2, 3, padding=1)
        if self.composes:
            self.conv_pixels = nn.Conv2d(cfg.channels * cfg.stem**2, dims[max(last - 1, 0)], 3, padding=1)

    def middle(self, latent: Tensor) -> Tensor:
        """Map the latent (B, D, h, w) to features (B, D', h, w)."""
        return self.mid_block(self.conv_in(latent.contiguous(memory_format=torch.channels_last)))

    def pixels(self, frame: Tensor) -> Tensor | None:
        """Project the context frame (S, C, H, W) to what `image` adds before its last stage; None if not composing."""
        if not self.composes:
            return None
        return self.conv_pixels(F.pixel_unshuffle(frame.to(self.conv_pixels.weight.dtype), self.stem))

    def image(self, x: Tensor, pixels: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Decode features (B, D', h, w), with the S starts' `pixels`, the B / S frames of a start consecutive.

        Returns:
            Image (B, C, H, W), not clipped, with one more channel, the mask's logits, if the decoder composes; and the
            input of the last convolution.
        """
        for i, stage in enumerate(self.up_blocks):
            if pixels is not None and i == len(self.up_blocks) - 1:
                x = x + pixels.to(x.dtype).repeat_interleave(len(x) // len(pixels), dim=0)
            x = stage(x)
        last = F.silu(self.conv_norm_out(x))
        return F.pixel_shuffle(self.conv_out(last), self.stem), last

    def forward(
        self, latent: Tensor, keys_values: list[tuple[Tensor, Tensor]], pixels: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Decode the latent (B, D, h, w), attending to the context between the halves; returns as `image`."""
        x = self.middle(latent)
        for block, pair in zip(self.cross_att_blocks, keys_values, strict=True):
            x = block(x, pair)
        return self.image(x, pixels)
