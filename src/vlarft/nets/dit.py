"""Diffusion transformer over the tokens of one action chunk, conditioned by adaLN-Zero and by cross-attention.

The context enters in two ways: its mean is part of the vector that adaLN takes, and some blocks attend to its tokens.
Keys and values of these blocks depend on the context alone, so `prepare` computes them once for all flow steps. The
shifts, scales and gates of adaLN depend on context, proprio and time alone, so `modulations` may compute them once for
all rows and steps; a third of the trunk's weights belong to them.

Shapes: S contexts, R rows per context (B = S * R), T chunk steps, N context tokens, D width, d head width.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F
from einops import rearrange

from vlarft.nets.attention import attend
from vlarft.nets.vit import MLP, Attention

KeyValue = tuple[torch.Tensor, torch.Tensor]


@dataclass(frozen=True)
class DiTConfig:
    """Sizes of the trunk; the defaults are the paper's action head."""

    width: int = 512
    depth: int = 8
    num_heads: int = 8
    mlp_dim: int = 2048
    cross_attention_blocks: tuple[int, ...] = (0, 2, 4, 6, 7)
    gamma_init: float = 1e-4  # initial gain of the cross-attention's residual, per channel


class ContextKeyValue(nn.Module):
    """Keys and values of one cross-attention, a function of the context alone."""

    def __init__(self, cfg: DiTConfig) -> None:
        super().__init__()
        self.num_heads = cfg.num_heads
        self.norm = nn.LayerNorm(cfg.width)
        self.k, self.v = nn.Linear(cfg.width, cfg.width), nn.Linear(cfg.width, cfg.width)

    def forward(self, context: torch.Tensor) -> KeyValue:
        """Project the context (S, N, D) to keys and values, (S, heads, N, d) each."""
        context = self.norm(context)
        k, v = (rearrange(f(context), "s n (h d) -> s h n d", h=self.num_heads) for f in (self.k, self.v))
        return k, v


class CrossAttention(nn.Module):
    """x + gamma * attention(norm(x), context), with a learned gain gamma per channel."""

    def __init__(self, cfg: DiTConfig) -> None:
        super().__init__()
        self.num_heads = cfg.num_heads
        self.norm = nn.LayerNorm(cfg.width)
        self.q, self.out = nn.Linear(cfg.width, cfg.width), nn.Linear(cfg.width, cfg.width)
        self.gamma = nn.Parameter(torch.full((cfg.width,), cfg.gamma_init))

    def forward(self, x: torch.Tensor, kv: KeyValue) -> torch.Tensor:
        """x: (S * R, T, D), each run of R rows reads one context -> (S * R, T, D)."""
        k, v = kv  # (S, heads, N, d) each
        # the R rows of a context form one long query, so that its keys and values are read in place
        q = rearrange(self.q(self.norm(x)), "(s r) t (h d) -> s h (r t) d", s=len(k), h=self.num_heads)
        out = attend(q, k, v)
        out = rearrange(out, "s h (r t) d -> (s r) t (h d)", t=x.shape[1])
        return x + self.gamma * self.out(out)


class Block(nn.Module):
    """x += gate * attn(modulate(norm(x))); cross-attention; x += gate * mlp(modulate(norm(x)))."""

    def __init__(self, cfg: DiTConfig, cross: bool) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(cfg.width, eps=1e-6, elementwise_affine=False)
        self.attn = Attention(cfg.width, cfg.num_heads)
        self.cross_attn = CrossAttention(cfg) if cross else None
        self.norm2 = nn.LayerNorm(cfg.width, eps=1e-6, elementwise_affine=False)
        self.mlp = MLP(cfg.width, cfg.mlp_dim, approximate="tanh")
        self.modulation = nn.Linear(cfg.width, 6 * cfg.width)

    def forward(self, x: torch.Tensor, modulation: torch.Tensor, kv: KeyValue | None) -> torch.Tensor:
        """x: (B, T, D), modulation: (B, 6 D) -> (B, T, D)."""
        shift1, scale1, gate1, shift2, scale2, gate2 = modulation[:, None].chunk(6, dim=-1)  # (B, 1, D) each
        x = x + gate1 * self.attn(modulate(self.norm1(x), shift1, scale1))
        if self.cross_attn is not None:
            x = self.cross_attn(x, kv)
        return x + gate2 * self.mlp(modulate(self.norm2(x), shift2, scale2))


class DiT(nn.Module):
    """The trunk: blocks, final modulated norm and linear output.

    Args:
        cfg: sizes.
        out_dim: width of the output per token.

    Raises:
        ValueError: a cross-attention block outside the depth.
    """

    def __init__(self, cfg: DiTConfig, out_dim: int) -> None:
        super().__init__()
        if any(not 0 <= i < cfg.depth for i in cfg.cross_attention_blocks):
            raise ValueError(
                f"DiTConfig.cross_attention_blocks {cfg.cross_attention_blocks}: "
                f"indices must lie in 0..{cfg.depth - 1} (depth - 1)"
            )
        self.cfg = cfg
        self.blocks = nn.ModuleList(Block(cfg, i in cfg.cross_attention_blocks) for i in range(cfg.depth))
        # outside the blocks, because they run once per chunk and not once per flow step
        self.context_kv = nn.ModuleDict({str(i): ContextKeyValue(cfg) for i in cfg.cross_attention_blocks})
        self.norm = nn.LayerNorm(cfg.width, eps=1e-6, elementwise_affine=False)
        self.modulation = nn.Linear(cfg.width, 2 * cfg.width)
        self.out = nn.Linear(cfg.width, out_dim)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initialise: Xavier weights, zero biases; adaLN-Zero: modulations and the output layer start at zero."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        for module in (*(block.modulation for block in self.blocks), self.modulation, self.out):
            nn.init.zeros_(module.weight)

    def prepare(self, context: torch.Tensor) -> dict[int, KeyValue]:
        """Compute each cross-attention's keys and values, by block index, from the projected context (S, N, D)."""
        return {int(i): project(context) for i, project in self.context_kv.items()}

    def modulations(self, c: torch.Tensor) -> list[torch.Tensor]:
        """Map c (..., D) to shifts, scales and gates of each block (..., 6 D), then those of the output (..., 2 D)."""
        c = F.silu(c)
        return [layer(c) for layer in (*(block.modulation for block in self.blocks), self.modulation)]

    def forward(self, x: torch.Tensor, modulations: list[torch.Tensor], kv: dict[int, KeyValue]) -> torch.Tensor:
        """x: (S * R, T, D) tokens, modulations: of S * R rows, kv: of S contexts -> (S * R, T, out_dim)."""
        for i, (block, modulation) in enumerate(zip(self.blocks, modulations)):  # leaves the last one, the output's
            x = block(x, modulation, kv.get(i))
        shift, scale = modulations[-1][:, None].chunk(2, dim=-1)  # (B, 1, D) each
        return self.out(modulate(self.norm(x), shift, scale))


def modulate(x: torch.Tensor, shift: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """Return x * (1 + scale) + shift, so that a modulation of zero changes nothing."""
    return x * (1 + scale) + shift


class TimeEmbedding(nn.Module):
    """Flow time in [0, 1] to a vector: cosines and sines, then Linear, SiLU, Linear."""

    def __init__(self, width: int, num_features: int = 256) -> None:
        super().__init__()
        self.num_features = num_features
        self.fc1 = nn.Linear(num_features, width)
        self.fc2 = nn.Linear(width, width)
        for layer in (self.fc1, self.fc2):
            nn.init.normal_(layer.weight, std=0.02)
            nn.init.zeros_(layer.bias)

    def forward(self, tau: torch.Tensor) -> torch.Tensor:
        """tau: (B,) float32 -> (B, D)."""
        return self.fc2(F.silu(self.fc1(time_features(tau, self.num_features))))


def time_features(tau: torch.Tensor, num_features: int, max_period: float = 1e4) -> torch.Tensor:
    """Compute cosines, then sines, of tau * max_period ** (-i / half): (B,) -> (B, num_features)."""
    half = num_features // 2
    frequencies = torch.exp(-math.log(max_period) * torch.arange(half, device=tau.device, dtype=torch.float32) / half)
    angles = tau.float()[:, None] * frequencies
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


def sincos_positions(num_positions: int, width: int) -> torch.Tensor:
    """Compute fixed position embeddings (1, T, D): sines, then cosines, of t * 10000 ** (-i / half)."""
    half = width // 2
    frequencies = 1e4 ** -(torch.arange(half, dtype=torch.float64) / half)
    angles = torch.arange(num_positions, dtype=torch.float64)[:, None] * frequencies
    return torch.cat([angles.sin(), angles.cos()], dim=-1)[None].float()
