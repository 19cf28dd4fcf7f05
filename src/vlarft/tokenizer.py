"""Frame tokenizer: a context-conditioned autoencoder with finite scalar quantisation (FSQ).

One context frame becomes a fine grid of tokens. A future frame is encoded relative to the context, by cross-attention
to the context's features, and becomes a coarse grid of a few tokens: what does not move is in the context already.

    context  -> encoder ------> quant_conv ----> FSQ -> tokens -> post_quant_conv ----> decoder ------> context frame
                   | features                                                              | features
    future   -> cond_encoder -> quant_linear --> FSQ -> tokens -> post_quant_linear --> cond_decoder -> future frame

The decoder side needs the context's tokens only, and the context frame itself where the tokenizer composes frames with
it (`TokenizerConfig.compose`; not in the paper). Everything that depends on the context alone, the keys and values of
the cross-attention included, is computed once per start and serves any number of futures. Parameter names are those of
the public checkpoints.

Shapes: S starts, L frames, C image channels, H, W image size; h, w latent grid; D latent or feature channels;
Nc = h * w context tokens, Nf tokens of one future frame, d = len(levels) scalars per code; F feature heads.
"""

import math
from pathlib import Path
from typing import NamedTuple

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from vlarft.nets.frame_networks import Encoder, FrameDecoder, TokenizerConfig
from vlarft.run.checkpoint import load_model
from vlarft.run.hub_model import HubModel
from vlarft.run.memory import rows_at_once


class FSQ(nn.Module):
    """Finite scalar quantisation: each of d scalars is rounded to one of its (odd) number of levels.

    index = sum_i (q_i + L_i // 2) * basis_i with q_i the rounded scalar and basis = (1, L_0, L_0 L_1, ...).

    Args:
        levels: levels L_i of each scalar.
    """

    def __init__(self, levels: tuple[int, ...]) -> None:
        super().__init__()
        self.sizes, self.dim, self.num_codes = levels, len(levels), math.prod(levels)
        basis = [math.prod(levels[:i]) for i in range(len(levels))]
        self.register_buffer("levels", torch.tensor(levels, dtype=torch.float32), persistent=False)
        self.register_buffer("basis", torch.tensor(basis), persistent=False)  # int64

    def bound(self, z: Tensor) -> Tensor:
        """Squash z (..., d) to +-(L - 1) / 2, widened by 0.1 % as in the public code; float32."""
        return torch.tanh(z.float()) * ((self.levels - 1) * (1 + 1e-3) / 2)

    def forward(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """Quantise z (..., d): codes (..., d) in [-1, 1] with a straight-through gradient, and indices (...) int64."""
        bounded = self.bound(z)
        rounded = bounded + (bounded.round() - bounded).detach()  # value of round, gradient of the identity
        half = torch.div(self.levels, 2, rounding_mode="floor")
        digits = (rounded.detach() + half).round().long()  # `long` alone would truncate
        indices = (digits * self.basis).sum(dim=-1)  # int64: float32 is not exact above 2^24
        return rounded / half, indices

    def decode(self, indices: Tensor) -> Tensor:
        """Convert indices (...) to codes (..., d) in [-1, 1], float32."""
        half = torch.div(self.levels, 2, rounding_mode="floor")
        return (self.digits(indices) - half) / half

    def digits(self, indices: Tensor) -> Tensor:
        """Split indices (...) into the level of each scalar (..., d) int64, from 0."""
        return torch.div(indices[..., None], self.basis, rounding_mode="floor") % self.levels.long()


class Context(NamedTuple):
    """Everything computed from a start's context frame, once for any number of futures.

    tokens: (S, Nc) int64.
    features: (S, D, h, w), the decoder's features after its mid block: the context frame is decoded from them.
    decoder_kv: keys and values of cond_decoder's cross-attention, one pair per block, each (S, heads, Nc, E).
    encoder_kv: the same for cond_encoder; None when the context was rebuilt from tokens.
    frame: (S, C, H, W), and its projection `pixels` for cond_decoder's last stage; None where it is not composed with.
    """

    tokens: Tensor
    features: Tensor
    decoder_kv: list[tuple[Tensor, Tensor]]
    encoder_kv: list[tuple[Tensor, Tensor]] | None
    frame: Tensor | None = None
    pixels: Tensor | None = None

    def starts(self, rows: slice | Tensor) -> "Context":
        """Select some of the starts, for decoding."""
        pairs = [(key[rows], value[rows]) for key, value in self.decoder_kv]
        frame, pixels = (None if x is None else x[rows] for x in (self.frame, self.pixels))
        return Context(self.tokens[rows], self.features[rows], pairs, None, frame, pixels)


class Decoded(NamedTuple):
    """What the conditional decoder makes of B codes: frames (B, C, H, W), not clipped.

    last_features: (B, D, H / stem, W / stem), input of its last convolution.
    generated, mask: (B, C, H, W) and (B, 1, H, W) in [0, 1], of which frames are composed with the context; or None.
    """

    frames: Tensor
    last_features: Tensor
    generated: Tensor | None = None
    mask: Tensor | None = None


class Reconstruction(NamedTuple):
    """Output of a training pass: context_frame (S, C, H, W) and frames (S, L, C, H, W), not clipped; tokens of both.

    future_codes: (S, L, Nf, d), the future's scalars before rounding, squashed to [-1, 1].
    last_features: (S * L, D, H / stem, W / stem), input of cond_decoder's last convolution.
    generated, mask: (S, L, C, H, W) and (S, L, 1, H, W), see `Decoded`.
    """

    context_frame: Tensor
    frames: Tensor
    context_tokens: Tensor
    future_tokens: Tensor
    future_codes: Tensor
    last_features: Tensor
    generated: Tensor | None = None
    mask: Tensor | None = None


def distinct_frames(tokens: Tensor) -> tuple[Tensor, Tensor | None]:
    """Find the distinct frames of each start among its tokens (S, L, Nf), so that each is decoded once.

    Returns:
        The distinct frames (S, M, Nf), zero-padded to the largest number M of any start, and the index of each frame
        among them (S, L); or the tokens and None if some start has no repeated frame, since nothing is saved then.
    """
    per_start = [torch.unique(rows, dim=0, return_inverse=True) for rows in tokens]
    distinct = pad_sequence([rows for rows, _ in per_start], batch_first=True)  # (S, M, Nf)
    if distinct.shape[1] == tokens.shape[1]:
        return tokens, None
    return distinct, torch.stack([index for _, index in per_start])


class FrameTokenizer(HubModel, nn.Module):
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
        """Load a tokenizer from its `model.safetensors`, in eval mode; errors as in `checkpoint.load_model`."""
        return load_model(path, cls, TokenizerConfig, device)[0]

    def encode_context(self, frame: Tensor) -> Context:
        """Tokenize context frames.

        Args:
            frame: (S, C, H, W) in [0, 1].

        Returns:
            The context, relative to which any number of future frames can be encoded and decoded.

        Raises:
            ValueError: frames of another shape or type, or values outside [0, 1].
        """
        self._check(frame, 4)
        latent, features = self.encoder(frame, None)  # (S, D, h, w), features for the cross-attention
        codes, tokens = self.context_fsq(self.quant_conv(latent).permute(0, 2, 3, 1))  # (S, h, w, d), (S, h, w)
        pairs = zip(self.cond_encoder.cross_att_blocks, features, strict=True)
        encoder_kv = [block.keys_values(feature) for block, feature in pairs]
        return self._context(tokens.flatten(1), codes, encoder_kv, frame)

    def context_from_tokens(self, tokens: Tensor) -> Context:
        """Rebuild a context from its tokens (S, Nc): enough to decode future frames, not to encode them.

        Raises:
            ValueError: the tokenizer composes frames with the context frame, which the tokens do not hold.
        """
        if self.cfg.compose:
            raise ValueError("this tokenizer shows the context frame itself: decoding needs encode_context(frame)")
        codes = rearrange(self.context_fsq.decode(tokens), "s (h w) d -> s h w d", h=self.cfg.grid[0])
        return self._context(tokens, codes, None, None)

    def _context(self, tokens: Tensor, codes: Tensor, encoder_kv: list | None, frame: Tensor | None) -> Context:
        # from the codes, not from the encoder's features: a context rebuilt from tokens decodes the same frames
        features = self.decoder.middle(self.post_quant_conv(codes.permute(0, 3, 1, 2)))  # (S, D, h, w)
        decoder_kv = [block.keys_values(features) for block in self.cond_decoder.cross_att_blocks]
        if not self.cfg.compose:
            return Context(tokens, features, decoder_kv, encoder_kv)
        return Context(tokens, features, decoder_kv, encoder_kv, frame, self.cond_decoder.pixels(frame))

    def encode_future(self, frames: Tensor, context: Context) -> Tensor:
        """Tokenize frames relative to their start's context: (S, L, C, H, W) in [0, 1] -> (S, L, Nf) int64.

        Raises:
            ValueError: a context rebuilt from tokens, or as in `encode_context`.
        """
        return self.future_fsq(self._future_scalars(frames, context))[1].unflatten(0, frames.shape[:2])

    def _future_scalars(self, frames: Tensor, context: Context) -> Tensor:
        """Compute the scalars that the future's quantiser rounds: (S * L, Nf, d)."""
        self._check(frames, 5)
        if context.encoder_kv is None:
            raise ValueError("this context was rebuilt from tokens: encoding needs one from encode_context(frame)")
        images = frames
        if self.cfg.compose:
            images = torch.cat([frames, context.frame[:, None].expand_as(frames)], dim=2)  # (S, L, 2 * C, H, W)
        latent, _ = self.cond_encoder(images.flatten(0, 1), context.encoder_kv)  # (S * L, D, h, w)
        p = self.cfg.future_patch
        patches = rearrange(latent, "b d (h p) (w q) -> b (h w) (p q d)", p=p, q=p)  # (S * L, Nf, p * p * D)
        return self.quant_linear(patches)

    def decode(self, tokens: Tensor, context: Context, frames_at_once: int | None = None) -> Tensor:
        """Decode future frames from tokens. Equal frames of a start, frequent among similar chunks, are decoded once.

        Args:
            tokens: (S, L, Nf), or (S, G, L, Nf) for G rollouts of each start.
            context: context of the S starts.
            frames_at_once: frames decoded at a time, to bound memory; None = by `memory.rows_at_once`.

        Returns:
            (S, L, C, H, W) or (S, G, L, C, H, W), clipped to [0, 1], float32.
        """
        weight = self.post_quant_linear.weight
        if frames_at_once is None:
            # about eight maps of the widest resolution live at a time
            pixels = self.cfg.image_size[0] * self.cfg.image_size[1] // self.cfg.stem**2
            frames_at_once = rows_at_once(
                8 * self.cfg.block_channels[0] * pixels * weight.element_size(), weight.device
            )
        flat = tokens.flatten(1, -2)  # (S, [G *] L, Nf)
        starts = max(1, frames_at_once // flat.shape[1])  # starts at a time; a single start may be split below
        parts = []
        for i in range(0, len(flat), starts):
            of_starts = slice(i, i + starts)
            shared = context.starts(of_starts)
            distinct, where = distinct_frames(flat[of_starts])  # (n, M, Nf), (n, [G *] L)
            split = distinct.split(min(distinct.shape[1], frames_at_once), dim=1)
            images = [self._decode_future(self.future_fsq.decode(part).flatten(0, 1), shared).frames for part in split]
            images = [image.float().clamp(0, 1).unflatten(0, part.shape[:2]) for image, part in zip(images, split)]
            images = torch.cat(images, dim=1)  # (n, M, C, H, W)
            parts.append(images if where is None else torch.stack([frames[i] for frames, i in zip(images, where)]))
        return torch.cat(parts).unflatten(1, tokens.shape[1:-1])

    def _decode_future(self, codes: Tensor, context: Context) -> Decoded:
        """Decode codes (S * L, Nf, d) with the S starts' context."""
        p, h = self.cfg.future_patch, self.cfg.grid[0] // self.cfg.future_patch
        patches = self.post_quant_linear(codes.to(self.post_quant_linear.weight.dtype))  # (S * L, Nf, p * p * D)
        latent = rearrange(patches, "b (h w) (p q d) -> b d (h p) (w q)", h=h, p=p, q=p)  # (S * L, D, h, w)
        image, last_features = self.cond_decoder(latent, context.decoder_kv, context.pixels)
        if not self.cfg.compose:
            return Decoded(image, last_features)
        generated, mask = image[:, :-1].float(), image[:, -1:].float().sigmoid()
        frame = context.frame.float().repeat_interleave(len(image) // len(context.frame), dim=0)  # (S * L, C, H, W)
        return Decoded(torch.lerp(frame, generated, mask), last_features, generated, mask)

    def decode_context(self, context: Context) -> Tensor:
        """Decode the context frame itself, from its quantised features: (S, C, H, W), clipped to [0, 1], float32."""
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
        decoded = self._decode_future(codes, context)
        soft = torch.tanh(scalars.float())
        per_start = (decoded.frames, tokens, soft, decoded.generated, decoded.mask)
        shown, tokens, soft, generated, mask = (
            None if x is None else x.unflatten(0, frames.shape[:2]) for x in per_start
        )
        decoded_context = self.decoder.image(context.features)[0]
        return Reconstruction(
            decoded_context, shown, context.tokens, tokens, soft, decoded.last_features, generated, mask
        )

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
        if not (low >= -1e-3 and high <= 1 + 1e-3):  # also true for nan; a resize may overshoot by rounding
            raise ValueError(
                f"expected frames in [0, 1], got values from {low:.3g} to {high:.3g}; divide images of 0..255 by 255, "
                "map images of -1..1 by (x + 1) / 2"
            )


PRESETS = {
    "paper": TokenizerConfig(),
    "small": TokenizerConfig(
        image_size=(128, 128),
        stem=2,
        block_channels=(96, 192, 256),
        latent_channels=32,
        future_patch=2,
        norm_groups=16,
        compose=True,
    ),
    "tiny": TokenizerConfig(
        image_size=(64, 64),
        res_blocks=1,
        mid_res_blocks=1,
        future_patch=2,
        norm_groups=8,
        dropout=0.0,
        stem=4,
        block_channels=(24, 48),
        latent_channels=16,
        context_levels=(7, 5, 5, 5, 5),
        future_levels=(5, 5, 5, 5),
        quant_gain=6.0,
        local_init=True,
        compose=True,
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
        compose=True,
    ),
}
