"""Decoder-only transformer in the LLaMA style: RMSNorm, rotary positions, grouped-query attention, SwiGLU.

One implementation for the world model and for the policy's language model (which adds biases on q, k, v and has fewer
key-value heads). Embedding and output head are not part of it: the models that use it have them.

The names of the parameters follow `transformers` (`layers.0.self_attn.q_proj.weight`, ...), so public checkpoints need
no renaming below the decoder.

Shapes: B batch rows, S starts, G group members per start (B = S * G), N new tokens, P tokens in the cache, D width,
H query heads, K key-value heads, E head width.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from vlarft.nets.attention import attend
from vlarft.nets.kv_cache import Cache, StaticKVCache


@dataclass(frozen=True)
class TransformerConfig:
    """Sizes of a decoder; the defaults are the world model of the paper (113,265,408 parameters without head).

    Args:
        depth: number of blocks.
        width: model width D.
        num_heads: query heads H.
        num_kv_heads: key-value heads K, a divisor of `num_heads` (fewer = grouped-query attention).
        ffn_dim: inner width of the SwiGLU feed-forward network.
        head_dim: width E of one head; None = width // num_heads.
        rope_theta: base of the rotary frequencies.
        norm_eps: epsilon of RMSNorm.
        qkv_bias: biases on the query, key and value projections (Qwen2 has them, LLaMA has none).
        max_positions: longest sequence, cache included.
        init_std: standard deviation of the initial weights.
    """

    depth: int = 12
    width: int = 768
    num_heads: int = 12
    num_kv_heads: int = 12
    ffn_dim: int = 3072
    head_dim: int | None = None
    rope_theta: float = 10000.0
    norm_eps: float = 1e-6
    qkv_bias: bool = False
    max_positions: int = 8192
    init_std: float = 0.02

    def __post_init__(self) -> None:
        if self.num_heads % self.num_kv_heads:
            raise ValueError(f"num_heads={self.num_heads} must be a multiple of num_kv_heads={self.num_kv_heads}")
        if self.head_dim is None and self.width % self.num_heads:
            raise ValueError(f"width={self.width} must be a multiple of num_heads={self.num_heads}, or give head_dim")
        if self.dim_per_head % 2:
            raise ValueError(f"head width {self.dim_per_head} must be even: rotary positions turn pairs of channels")

    @property
    def dim_per_head(self) -> int:
        """Width E of one attention head."""
        return self.width // self.num_heads if self.head_dim is None else self.head_dim


def rotary_tables(positions: Tensor, head_dim: int, theta: float) -> tuple[Tensor, Tensor]:
    """Compute cosine and signed sine of the rotary angles, half-split convention, float32.

    Args:
        positions: (N,) token positions.
        head_dim: head width E.
        theta: frequency base.

    Returns:
        Two tensors (N, 1, E), the E/2 angles repeated for both halves, the sine negative in the first.
    """
    exponents = torch.arange(0, head_dim, 2, device=positions.device, dtype=torch.float32) / head_dim
    angles = positions.float()[:, None] * theta**-exponents  # (N, E/2)
    cos, sin = angles.cos(), angles.sin()
    return torch.cat([cos, cos], dim=-1)[:, None], torch.cat([-sin, sin], dim=-1)[:, None]  # (N, 1, E)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn the channel pairs (i, i + E/2) of x (B, N, H, E) by the tables' angles."""
    first, second = x.chunk(2, dim=-1)
    # the sine carries the sign: (first cos - second sin, second cos + first sin)
    return x * cos.to(x.dtype) + torch.cat([second, first], dim=-1) * sin.to(x.dtype)


class RMSNorm(nn.Module):
    """Root-mean-square normalisation over the last axis, in float32 under any autocast."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        """x: (..., D) -> (..., D), in x's dtype."""
        # rounded before the weight is applied, as `transformers` does it
        return self.weight.to(x.dtype) * F.rms_norm(x.float(), x.shape[-1:], eps=self.eps).to(x.dtype)


class Attention(nn.Module):
    """Causal self-attention with rotary positions and grouped key-value heads."""

    def __init__(self, cfg: TransformerConfig, layer: int) -> None:
        super().__init__()
        self.layer, self.num_heads, self.num_kv_heads = layer, cfg.num_heads, cfg.num_kv_heads
        dim = cfg.dim_per_head
        self.q_proj = nn.Linear(cfg.width, cfg.num_heads * dim, bias=cfg.qkv_bias)
        self.k_proj = nn.Linear(cfg.width, cfg.num_kv_heads * dim, bias=cfg.qkv_bias)
        self.v_proj = nn.Linear(cfg.width, cfg.num_kv_heads * dim, bias=cfg.qkv_bias)
        self.o_proj = nn.Linear(cfg.num_heads * dim, cfg.width, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, cache: Cache | None, mask: Tensor | None) -> Tensor:
        """x: (B, N, D) -> (B, N, D); `mask` is None for plain causal attention, else (B or 1, 1, N, P + N)."""
        query = rearrange(self.q_proj(x), "b n (h e) -> b n h e", h=self.num_heads)
        key = rearrange(self.k_proj(x), "b n (k e) -> b n k e", k=self.num_kv_heads)
        value = rearrange(self.v_proj(x), "b n (k e) -> b k n e", k=self.num_kv_heads)  # (B, K, N, E)
        query = rotate(query, cos, sin).transpose(1, 2)  # (B, H, N, E)
        key = rotate(key, cos, sin).transpose(1, 2)  # (B, K, N, E)
        if cache is not None:
            num_own = cache.own_columns(x.shape[1])
            key, value = cache.append(self.layer, key, value)  # (B, K, room, E)
            key, value = key.to(query.dtype), value.to(query.dtype)  # the cache keeps the type of its first tokens
        if cache is not None and cache.prefix is not None:
            prefix_key, prefix_value = cache.prefix[self.layer]  # (S, K, P, E) each
            out = grouped_attention(query, key, value, prefix_key, prefix_value, cache.group_size, mask, num_own)
        else:
            if cache is not None:
                key, value = key[:, :, :num_own], value[:, :, :num_own]
            grouped = self.num_heads != self.num_kv_heads
            causal = mask is None and query.shape[2] > 1  # a single new token sees every key
            out = attend(query, key, value, mask, causal=causal, grouped=grouped)
        return self.o_proj(rearrange(out, "b h n e -> b n (h e)"))


def grouped_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    prefix_key: Tensor,
    prefix_value: Tensor,
    group_size: int,
    mask: Tensor | None,
    num_own: int,
) -> Tensor:
    """Attend to a prefix shared by the G rows of a start, followed by each row's own tokens.

    One softmax runs over both parts. The scores of the shared part are one matrix product per start, with the G * N
    queries side by side, so that the prefix is read once per start and never copied.

    Args:
        query: (S * G, H, N, E).
        key, value: (S * G, K, room, E), each row's tokens after the prefix, the new ones included.
        prefix_key, prefix_value: (S, K, P, E).
        group_size: G.
        mask: (S * G or 1, 1, N, P + M) True = attend, or None = attend to everything.
        num_own: M, the number of tokens in `key` and `value`; the room after them holds zeros.

    Returns:
        (S * G, H, N, E).
    """
    heads_per_kv, num_kv = query.shape[1] // key.shape[1], key.shape[1]
    sizes = {"g": group_size, "k": num_kv, "r": heads_per_kv}
    num_new, prefix_length = query.shape[2], prefix_key.shape[2]
    query = query * query.shape[-1] ** -0.5
    # r query heads share a key-value head: they stand beside the group's rows and the new tokens as further queries
    by_start = rearrange(query, "(s g) (k r) n e -> s k (g r n) e", **sizes)
    shared = by_start @ prefix_key.to(query.dtype).transpose(-1, -2)  # (S, K, G * R * N, P)
    shared = rearrange(shared, "s k (g r n) p -> (s g) k (r n) p", n=num_new, **sizes)
    own = rearrange(query, "b (k r) n e -> b k (r n) e", k=num_kv, r=heads_per_kv) @ key.transpose(-1, -2)
    scores = torch.cat([shared, own[..., :num_own]], dim=-1)  # (S * G, K, R * N, P + M)
    if mask is not None:
        scores = scores.masked_fill(~mask.repeat(1, 1, heads_per_kv, 1), -torch.inf)
    weights = scores.softmax(dim=-1)  # computed in float32 and rounded to the type of the scores
    shared, own = weights[..., :prefix_length], weights[..., prefix_length:]
    own = F.pad(own, (0, value.shape[2] - num_own))  # weight 0 for unused room: slicing `value` would copy it
    by_start = rearrange(shared, "(s g) k (r n) p -> s k (g r n) p", n=num_new, **sizes)
    from_prefix = by_start @ prefix_value.to(query.dtype)  # (S, K, G * R * N, E)
    from_prefix = rearrange(from_prefix, "s k (g r n) e -> (s g) (k r) n e", n=num_new, **sizes)
    return from_prefix + rearrange(own @ value, "b k (r n) e -> b (k r) n e", n=num_new)  # (S * G, H, N, E)


class FeedForward(nn.Module):
    """SwiGLU: down(silu(gate(x)) * up(x))."""

    def __init__(self, cfg: TransformerConfig) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(cfg.width, cfg.ffn_dim, bias=False)
        self.up_proj = nn.Linear(cfg.width, cfg.ffn_dim, bias=False)
        self.down_proj = nn.Linear(cfg.ffn_dim, cfg.width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """x: (B, N, D) -> (B, N, D)."""
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class DecoderBlock(nn.Module):
    """x + attention(norm(x)), then x + feed_forward(norm(x))."""

    def __init__(self, cfg: TransformerConfig, layer: int) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(cfg.width, cfg.norm_eps)
        self.self_attn = Attention(cfg, layer)
        self.post_attention_layernorm = RMSNorm(cfg.width, cfg.norm_eps)
        self.mlp = FeedForward(cfg)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, cache: Cache | None, mask: Tensor | None) -> Tensor:
        """x: (B, N, D) -> (B, N, D)."""
        x = x + self.self_attn(self.input_layernorm(x), cos, sin, cache, mask)
        return x + self.mlp(self.post_attention_layernorm(x))


class Decoder(nn.Module):
    """The stack of blocks and the final norm."""

    def __init__(self, cfg: TransformerConfig) -> None:
        super().__init__()
        self.cfg = cfg
        self.layers = nn.ModuleList(DecoderBlock(cfg, layer) for layer in range(cfg.depth))
        self.norm = RMSNorm(cfg.width, cfg.norm_eps)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initialise: normal weights of standard deviation `init_std`, zero biases, unit norms."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=self.cfg.init_std)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
            elif isinstance(module, RMSNorm):
                nn.init.ones_(module.weight)

    def forward(self, x: Tensor, cache: Cache | None = None) -> Tensor:
        """Run the decoder on embedded tokens.

        Args:
            x: (B, N, D) embeddings of the new tokens.
            cache: past keys and values; the new tokens follow it and are added to it.

        Returns:
            (B, N, D) after the final norm.

        Raises:
            ValueError: the sequence is longer than `max_positions`, or the cache has other sizes.
        """
        batch, num_new, _ = x.shape
        total = num_new if cache is None else cache.num_columns(num_new)
        if total > self.cfg.max_positions:
            raise ValueError(f"{total} tokens exceed max_positions={self.cfg.max_positions}")
        if cache is not None and cache.batch_size != batch:
            raise ValueError(f"KV cache has {cache.batch_size} rows, the input {batch}: expand the cache")
        positions = torch.arange(num_new, device=x.device) if cache is None else cache.positions(num_new, x.device)
        cos, sin = rotary_tables(positions, self.cfg.dim_per_head, self.cfg.rope_theta)  # (N, 1, E)
        mask = None
        # several new tokens after cached ones need a mask: SDPA's causal one counts queries from the first key
        if isinstance(cache, StaticKVCache) or 1 < num_new < total:
            mask = causal_mask(positions, total)
        for layer in self.layers:
            x = layer(x, cos, sin, cache, mask)
        if cache is not None:
            cache.advance(num_new)
        return self.norm(x)


def causal_mask(positions: Tensor, total: int) -> Tensor:
    """Build the causal mask (1, 1, N, total) for new tokens at `positions` (N,) among `total` keys.

    It is not needed for a single token that sees every key, nor for a sequence from position 0, for which the kernel
    has a built-in causal mask.
    """
    return (torch.arange(total, device=positions.device) <= positions[:, None])[None, None]
