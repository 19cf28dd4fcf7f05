"""Frame tokenizer: a context-conditioned autoencoder with finite scalar quantisation (FSQ); and the action bins.

One context frame becomes a fine grid of tokens. A future frame is encoded relative to the context, by cross-attention
into the context's features, and becomes a coarse grid of a few tokens: what stands still is in the context already.

    context  -> encoder ------> quant_conv ----> FSQ -> tokens -> post_quant_conv ----> decoder ------> context frame
                   | features                                                              | features
    future   -> cond_encoder -> quant_linear --> FSQ -> tokens -> post_quant_linear --> cond_decoder -> future frame

The decoder side needs the context's tokens only. Everything that depends on the context alone, the keys and values of
the cross-attention included, is computed once per start and serves any number of futures. Parameter names are those of
the public checkpoints.

Shapes: S starts, L frames, C image channels, H, W image size; h, w latent grid; D latent or feature channels;
Nc = h * w context tokens, Nf tokens of one future frame, d = len(levels) scalars per code; F feature heads.
"""

import math
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from vlarft.checkpoint import load_model


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
        mid_res_blocks: residual blocks in the middle, at the latent grid.
        latent_channels: channels of the latent grid before quantisation.
        future_patch: side of the latent patches that make one future token.
        context_levels: FSQ levels of context tokens, odd.
        future_levels: FSQ levels of future tokens, odd.
        norm_groups: groups of every GroupNorm; must divide all block channels.
        num_heads: heads of the cross-attention.
        dropout: dropout of the cross-attention's weights, in training.
        quant_gain: factor on the initial weights in front of the quantisers. At 1 (the paper) nearly all scalars round
            to zero at first and tell the decoders nothing; about 6 starts with all levels in use.
        local_init: start the cross-attention looking at its own place in the context. Off in the paper (positions start
            at zero); it saves a short training the steps in which it finds out where things are.
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
    def num_future_tokens(self) -> int:
        """Tokens Nf of a future frame."""
        return self.num_context_tokens // self.future_patch**2


class FSQ(nn.Module):
    """Finite scalar quantisation: each of d scalars is rounded to one of its (odd) number of levels.

    index = sum_i (q_i + L_i // 2) * basis_i with q_i the rounded scalar and basis = (1, L_0, L_0 L_1, ...).

    Args:
        levels: levels L_i of each scalar.
    """

    def __init__(self, levels: tuple[int, ...]) -> None:
        super().__init__()
        self.dim, self.num_codes = len(levels), math.prod(levels)
        basis = [math.prod(levels[:i]) for i in range(len(levels))]
        self.register_buffer("levels", torch.tensor(levels, dtype=torch.float32), persistent=False)
        self.register_buffer("basis", torch.tensor(basis, dtype=torch.float32), persistent=False)

    def bound(self, z: Tensor) -> Tensor:
        """Squash z (..., d) to +-(L - 1) / 2, a little beyond so that the outermost level is reached. Float32."""
        return torch.tanh(z.float()) * ((self.levels - 1) * (1 + 1e-3) / 2)

    def forward(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """Quantise z (..., d): codes (..., d) in [-1, 1] with a straight-through gradient, and indices (...) int64."""
        bounded = self.bound(z)
        rounded = bounded + (bounded.round() - bounded).detach()
        half = torch.div(self.levels, 2, rounding_mode="floor")
        indices = ((rounded.detach() + half) * self.basis).sum(dim=-1).round().long()
        return rounded / half, indices

    def decode(self, indices: Tensor) -> Tensor:
        """Indices (...) -> codes (..., d) in [-1, 1], float32."""
        half = torch.div(self.levels, 2, rounding_mode="floor")
        return (self.digits(indices) - half) / half

    def digits(self, indices: Tensor) -> Tensor:
        """Indices (...) -> level of each scalar (..., d) int64, from 0."""
        return torch.div(indices[..., None], self.basis.long(), rounding_mode="floor") % self.levels.long()


class Context(NamedTuple):
    """What a start's context frame contributes, computed once.

    tokens: (S, Nc) int64.
    features: (S, D, h, w), the decoder's features after its middle block: the context frame is decoded from them.
    decoder_kv: keys and values of cond_decoder's cross-attention, one pair per block, each (S, heads, Nc, E).
    encoder_kv: the same for cond_encoder; None when the context was rebuilt from tokens.
    """

    tokens: Tensor
    features: Tensor
    decoder_kv: list[tuple[Tensor, Tensor]]
    encoder_kv: list[tuple[Tensor, Tensor]] | None


class Reconstruction(NamedTuple):
    """A training pass: context_frame (S, C, H, W) and frames (S, L, C, H, W), not clipped; the tokens of both.

    future_codes: (S, L, Nf, d), what the future's quantiser rounds, in [-1, 1].
    last_features: (S * L, D, H / stem, W / stem), what the last convolution of cond_decoder sees.
    """

    context_frame: Tensor
    frames: Tensor
    context_tokens: Tensor
    future_tokens: Tensor
    future_codes: Tensor
    last_features: Tensor


class FrameTokenizer(nn.Module):
    """The four networks and the two quantisers."""

    def __init__(self, cfg: TokenizerConfig) -> None:
        super().__init__()
        self.cfg = cfg
        self.encoder = Encoder(cfg, conditional=False)
        self.cond_encoder = Encoder(cfg, conditional=True)
        self.decoder = FrameDecoder(cfg, conditional=False)
        self.cond_decoder = FrameDecoder(cfg, conditional=True)
        patch_dim = cfg.latent_channels * cfg.future_patch**2
        self.quant_conv = nn.Conv2d(cfg.latent_channels, len(cfg.context_levels), 1)
        self.post_quant_conv = nn.Conv2d(len(cfg.context_levels), cfg.latent_channels, 1)
        self.quant_linear = nn.Linear(patch_dim, len(cfg.future_levels))
        self.post_quant_linear = nn.Linear(len(cfg.future_levels), patch_dim)
        with torch.no_grad():
            self.quant_conv.weight.mul_(cfg.quant_gain)
            self.quant_linear.weight.mul_(cfg.quant_gain)
        self.context_fsq = FSQ(cfg.context_levels)
        self.future_fsq = FSQ(cfg.future_levels)

    @classmethod
    def load(cls, path: str | Path, device: str | torch.device = "cpu") -> "FrameTokenizer":
        """The tokenizer of a `model.safetensors`, in eval mode."""
        return load_model(path, cls, TokenizerConfig, device)[0]

    def encode_context(self, frame: Tensor) -> Context:
        """Tokenize context frames.

        Args:
            frame: (S, C, H, W) in [0, 1].

        Returns:
            The context, from which any number of future frames can be encoded and decoded.
        """
        self._check(frame, 4)
        latent, features = self.encoder(frame, None)  # (S, D, h, w), features for the cross-attention
        codes, tokens = self.context_fsq(self.quant_conv(latent).permute(0, 2, 3, 1))  # (S, h, w, d), (S, h, w)
        pairs = zip(self.cond_encoder.cross_att_blocks, features, strict=True)
        encoder_kv = [block.keys_values(feature) for block, feature in pairs]
        return self._context(tokens.flatten(1), codes, encoder_kv)

    def context_from_tokens(self, tokens: Tensor) -> Context:
        """Rebuild a context from its tokens (S, Nc): enough to decode future frames, not to encode them."""
        codes = rearrange(self.context_fsq.decode(tokens), "s (h w) d -> s h w d", h=self.cfg.grid[0])
        return self._context(tokens, codes, None)

    def _context(self, tokens: Tensor, codes: Tensor, encoder_kv: list | None) -> Context:
        features = self.decoder.middle(self.post_quant_conv(codes.permute(0, 3, 1, 2)))  # (S, D, h, w)
        decoder_kv = [block.keys_values(features) for block in self.cond_decoder.cross_att_blocks]
        return Context(tokens, features, decoder_kv, encoder_kv)

    def encode_future(self, frames: Tensor, context: Context) -> Tensor:
        """Tokenize frames relative to their start's context: (S, L, C, H, W) in [0, 1] -> (S, L, Nf) int64."""
        return self.future_fsq(self._future_scalars(frames, context))[1].unflatten(0, frames.shape[:2])

    def _future_scalars(self, frames: Tensor, context: Context) -> Tensor:
        """What the quantiser rounds: (S * L, Nf, d)."""
        self._check(frames, 5)
        if context.encoder_kv is None:
            raise ValueError("this context was rebuilt from tokens: encoding needs one from encode_context(frame)")
        latent, _ = self.cond_encoder(frames.flatten(0, 1), context.encoder_kv)  # (S * L, D, h, w)
        p = self.cfg.future_patch
        patches = rearrange(latent, "b d (h p) (w q) -> b (h w) (p q d)", p=p, q=p)  # (S * L, Nf, p * p * D)
        return self.quant_linear(patches)

    def decode(self, tokens: Tensor, context: Context, frames_at_once: int = 256) -> Tensor:
        """Future frames from tokens.

        Args:
            tokens: (S, L, Nf), or (S, G, L, Nf) for G rollouts of each start.
            context: of the S starts.
            frames_at_once: starts are decoded in parts of at most this many frames, but at least one start, which
                bounds the memory.

        Returns:
            (S, L, C, H, W) or (S, G, L, C, H, W), clipped to [0, 1], float32.
        """
        starts = max(1, frames_at_once // tokens[0, ..., 0].numel())
        parts = []
        for i in range(0, len(tokens), starts):
            part = slice(i, i + starts)
            pairs = [(key[part], value[part]) for key, value in context.decoder_kv]
            codes = self.future_fsq.decode(tokens[part]).flatten(0, -3)  # (S * [G *] L, Nf, d)
            parts.append(self._decode_future(codes, pairs)[0].float().clamp(0, 1))
        return torch.cat(parts).unflatten(0, tokens.shape[:-1])

    def _decode_future(self, codes: Tensor, keys_values: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
        p, h = self.cfg.future_patch, self.cfg.grid[0] // self.cfg.future_patch
        patches = self.post_quant_linear(codes)  # (S * L, Nf, p * p * D)
        latent = rearrange(patches, "b (h w) (p q d) -> b d (h p) (w q)", h=h, p=p, q=p)
        return self.cond_decoder(latent, keys_values)

    def decode_context(self, context: Context) -> Tensor:
        """The context frame itself, from its quantised features: (S, C, H, W), clipped to [0, 1], float32."""
        return self.decoder.image(context.features)[0].float().clamp(0, 1)

    def forward(self, context_frame: Tensor, frames: Tensor) -> Reconstruction:
        """Encode, quantise and decode, for training.

        Args:
            context_frame: (S, C, H, W) in [0, 1].
            frames: (S, L, C, H, W) in [0, 1].
        """
        context = self.encode_context(context_frame)
        scalars = self._future_scalars(frames, context)
        codes, tokens = self.future_fsq(scalars)  # (S * L, Nf, d), (S * L, Nf)
        decoded, last_features = self._decode_future(codes, context.decoder_kv)
        soft = torch.tanh(scalars.float())
        decoded, tokens, soft = (x.unflatten(0, frames.shape[:2]) for x in (decoded, tokens, soft))
        decoded_context = self.decoder.image(context.features)[0]
        return Reconstruction(decoded_context, decoded, context.tokens, tokens, soft, last_features)

    def _check(self, frames: Tensor, ndim: int) -> None:
        want = (self.cfg.channels, *self.cfg.image_size)
        if frames.ndim != ndim or tuple(frames.shape[-3:]) != want:
            lead = "(S, C, H, W)" if ndim == 4 else "(S, L, C, H, W)"
            raise ValueError(
                f"expected frames {lead} with (C, H, W) = {want}, got shape {tuple(frames.shape)}; "
                "the image size is the tokenizer's: resize the frames or train a tokenizer for this size"
            )
        if not torch.is_tensor(frames) or not frames.is_floating_point():
            got = f"{type(frames).__name__} of {frames.dtype}"
            raise ValueError(f"expected a float tensor in [0, 1], got {got}; divide uint8 images by 255")
        low, high = torch.stack(frames.detach().aminmax()).tolist()  # one pass, one copy from the GPU
        if not (low >= -1e-3 and high <= 1 + 1e-3):  # nan too; a resize may overshoot by rounding
            raise ValueError(
                f"expected frames in [0, 1], got values from {low:.3g} to {high:.3g}; divide images of 0..255 by 255, "
                "map images of -1..1 by (x + 1) / 2"
            )


class ResBlock(nn.Module):
    """GroupNorm, SiLU, conv, twice, around a residual."""

    def __init__(self, dim_in: int, dim_out: int, groups: int) -> None:
        super().__init__()
        self.norm1 = nn.GroupNorm(groups, dim_in, eps=1e-6)
        self.conv1 = nn.Conv2d(dim_in, dim_out, 3, padding=1)
        self.norm2 = nn.GroupNorm(groups, dim_out, eps=1e-6)
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
        self.group_norm = nn.GroupNorm(groups, dim, eps=1e-6)
        self.to_q, self.to_k, self.to_v = (nn.Linear(dim, dim) for _ in range(3))
        self.to_out = nn.ModuleList([nn.Linear(dim, dim)])

    def forward(self, x: Tensor) -> Tensor:
        """x: (B, D, h, w) -> (B, D, h, w)."""
        tokens = self.group_norm(x).flatten(2).transpose(1, 2)[:, None]  # (B, 1, h * w, D)
        out = F.scaled_dot_product_attention(self.to_q(tokens), self.to_k(tokens), self.to_v(tokens))
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
        self.kv_norm = nn.GroupNorm(cfg.norm_groups, dim)
        self.q_norm = nn.GroupNorm(cfg.norm_groups, dim)
        self.kv_pos_emb = nn.Parameter(torch.zeros(num_tokens, dim))
        self.q_pos_emb = nn.Parameter(torch.zeros(num_tokens, dim))
        if cfg.local_init:
            with torch.no_grad():  # equal positions under equal projections: the score peaks at the query's own place
                self.kv_pos_emb.normal_(std=1.5)
                self.q_pos_emb.copy_(self.kv_pos_emb)
                self.att.in_proj_weight[dim : 2 * dim] = self.att.in_proj_weight[:dim]

    def keys_values(self, features: Tensor) -> tuple[Tensor, Tensor]:
        """Context features (S, D, h, w) -> keys and values, each (S, heads, Nc, E)."""
        tokens = self.kv_norm(features).flatten(2).transpose(1, 2) + self.kv_pos_emb  # (S, Nc, D)
        dim = tokens.shape[-1]
        both = F.linear(tokens, self.att.in_proj_weight[dim:], self.att.in_proj_bias[dim:])  # (S, Nc, 2 * D)
        key, value = rearrange(both, "s n (two f e) -> two s f n e", two=2, f=self.num_heads)
        return key, value

    def forward(self, z: Tensor, keys_values: tuple[Tensor, Tensor]) -> Tensor:
        """z: (S * L, D, h, w), the L frames of a start together -> the same shape."""
        key, value = keys_values
        starts, dim = key.shape[0], z.shape[1]
        tokens = self.q_norm(z).flatten(2).transpose(1, 2) + self.q_pos_emb  # (S * L, N, D)
        query = F.linear(tokens, self.att.in_proj_weight[:dim], self.att.in_proj_bias[:dim])
        # The L frames of a start are one long query, so that its keys and values are used in place.
        query = rearrange(query, "(s l) n (f e) -> s f (l n) e", s=starts, f=self.num_heads)
        dropout = self.dropout if self.training else 0.0
        out = F.scaled_dot_product_attention(query, key.to(query.dtype), value.to(query.dtype), dropout_p=dropout)
        out = rearrange(out, "s f (l n) e -> (s l) n (f e)", n=tokens.shape[1])
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
    """Image -> latent grid. The conditional one looks at the context after each of the stages at the latent grid."""

    def __init__(self, cfg: TokenizerConfig, conditional: bool) -> None:
        super().__init__()
        dims, last = cfg.block_channels, len(cfg.block_channels) - 1
        self.stem = cfg.stem
        self.conv_in = nn.Conv2d(cfg.channels * cfg.stem**2, dims[0], 3, padding=1)
        self.down_blocks = nn.ModuleList(
            Stage((dims[max(i - 1, 0)], dims[i]), cfg.res_blocks, cfg.norm_groups, "down" if i < last else None)
            for i in range(len(dims))
        )
        self.cross_stages = [i for i in (last - 1, last) if i >= 0]
        self.cross_att_blocks = nn.ModuleList(
            CrossAttention(dims[i], cfg.num_context_tokens, cfg) for i in self.cross_stages if conditional
        )
        self.mid_block = MidBlock(dims[-1], cfg, attention=conditional)
        self.conv_norm_out = nn.GroupNorm(cfg.norm_groups, dims[-1], eps=1e-6)
        self.conv_out = nn.Conv2d(dims[-1], cfg.latent_channels, 3, padding=1)

    def forward(self, x: Tensor, keys_values: list[tuple[Tensor, Tensor]] | None) -> tuple[Tensor, list[Tensor]]:
        """x: (B, C, H, W) -> latent (B, D, h, w) and the features of the stages at the latent grid."""
        x = F.pixel_unshuffle(x, self.stem).contiguous(memory_format=torch.channels_last)
        x = self.conv_in(x)
        features = []
        for i, stage in enumerate(self.down_blocks):
            x = stage(x)
            if i in self.cross_stages:
                if keys_values is not None:
                    x = self.cross_att_blocks[len(features)](x, keys_values[len(features)])
                features.append(x)
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
        self.conv_norm_out = nn.GroupNorm(cfg.norm_groups, dims[-1], eps=1e-6)
        self.conv_out = nn.Conv2d(dims[-1], cfg.channels * cfg.stem**2, 3, padding=1)

    def middle(self, latent: Tensor) -> Tensor:
        """Latent (B, D, h, w) -> features (B, D', h, w)."""
        return self.mid_block(self.conv_in(latent.contiguous(memory_format=torch.channels_last)))

    def image(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Features (B, D', h, w) -> image (B, C, H, W), not clipped, and what the last convolution made it from."""
        for stage in self.up_blocks:
            x = stage(x)
        last = F.silu(self.conv_norm_out(x))
        return F.pixel_shuffle(self.conv_out(last), self.stem), last

    def forward(self, latent: Tensor, keys_values: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
        """Latent (B, D, h, w) -> `image`, looking at the context after the middle."""
        x = self.middle(latent)
        for block, pair in zip(self.cross_att_blocks, keys_values, strict=True):
            x = block(x, pair)
        return self.image(x)


class ActionBins(nn.Module):
    """Uniform bins per action dimension over stored ranges, in raw environment units.

    bin = clip(floor(num_bins * clip((a - low) / (high - low + 1e-8), 0, 1)), 0, num_bins - 1)

    Args:
        action_dim: action dimensions A.
        num_bins: bins per dimension.
    """

    def __init__(self, action_dim: int, num_bins: int) -> None:
        super().__init__()
        self.num_bins, self.warned = num_bins, False
        self.register_buffer("low", torch.full((action_dim,), -1.0))
        self.register_buffer("high", torch.ones(action_dim))

    def set_range(self, low: Tensor, high: Tensor) -> None:
        """Store the range (A,) of each dimension; a dimension that never moves gets one of width 2 around its value."""
        low, high = torch.as_tensor(low).float(), torch.as_tensor(high).float()
        if low.shape != self.low.shape or high.shape != self.high.shape:
            raise ValueError(f"expected {len(self.low)} action ranges, got {tuple(low.shape)} and {tuple(high.shape)}")
        if not (torch.isfinite(low).all() and torch.isfinite(high).all() and (low <= high).all()):
            raise ValueError(f"action ranges must be finite with low <= high, got {low.tolist()} and {high.tolist()}")
        still = high - low < 1e-6
        self.low.copy_(torch.where(still, low - 1, low))
        self.high.copy_(torch.where(still, high + 1, high))

    def encode(self, actions: Tensor) -> Tensor:
        """Raw actions (..., A) -> bins (..., A) int64; values outside the ranges fall into the outermost bins."""
        if actions.shape[-1] != len(self.low):
            raise ValueError(f"expected actions of dimension {len(self.low)}, got shape {tuple(actions.shape)}")
        share = ((actions.float() - self.low) / (self.high - self.low + 1e-8)).clamp(0, 1)
        return (share * self.num_bins).floor().clamp(0, self.num_bins - 1).long()

    def decode(self, bins: Tensor) -> Tensor:
        """Bins (..., A) -> raw actions at the bins' centres, float32."""
        return self.low + (bins + 0.5) / self.num_bins * (self.high - self.low)

    def outside(self, actions: Tensor) -> Tensor:
        """Share of action values outside the ranges by more than rounding, a scalar."""
        return self._beyond(actions).float().mean()

    def warn_outside(self, actions: Tensor) -> None:
        """Say once that actions to be imagined lie outside the ranges, with their number and dimensions."""
        if self.warned:
            return
        beyond = self._beyond(actions)
        if count := int(beyond.sum()):
            self.warned = True
            dims = beyond.flatten(0, -2).any(dim=0).nonzero().flatten().tolist()
            warnings.warn(
                f"{count} of {beyond.numel()} action values ({count / beyond.numel():.1%}, in dimensions {dims}) lie "
                "outside the ranges that the world model was trained on and are clipped to them: it takes raw "
                "environment actions, not normalised ones. This is said once",
                stacklevel=3,
            )

    def _beyond(self, actions: Tensor) -> Tensor:
        """(..., A) bool; nan counts as outside."""
        slack = 1e-4 * (self.high - self.low)
        return ~((actions >= self.low - slack) & (actions <= self.high + slack))


PRESETS = {
    "paper": TokenizerConfig(),
    "small": TokenizerConfig(
        image_size=(128, 128), stem=2, block_channels=(96, 192, 256), latent_channels=32, future_patch=2, norm_groups=16
    ),
    "tiny": TokenizerConfig(
        image_size=(64, 64),
        res_blocks=1,
        mid_res_blocks=1,
        future_patch=2,
        norm_groups=8,
        dropout=0.0,
        stem=4,
        block_channels=(32, 64),
        latent_channels=16,
        context_levels=(7, 5, 5, 5, 5),
        future_levels=(5, 5, 5, 5),
        quant_gain=6.0,
        local_init=True,
    ),
    "smoke": TokenizerConfig(
        image_size=(64, 64),
        res_blocks=1,
        mid_res_blocks=1,
        future_patch=2,
        norm_groups=8,
        dropout=0.0,
        stem=8,
        block_channels=(16,),
        latent_channels=8,
        context_levels=(3, 3, 3),
        future_levels=(3, 3, 3),
        quant_gain=6.0,
        local_init=True,
    ),
}
