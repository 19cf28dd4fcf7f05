"""Keys and values of past tokens, for incremental decoding: one cache that grows, and one of fixed shapes.

In both, the members of a group can continue the tokens of their start and share the start's part of the cache.

Shapes: B batch rows, S starts, G group members per start (B = S * G), N new tokens, P tokens of a shared prefix,
K key-value heads, E head width.
"""

import torch
from torch import Tensor


class KVCache:
    """Keys and values of past tokens, for incremental decoding.

    A cache has up to two parts: an optional `prefix` shared by the G members of each start (made by `expand`, never
    copied per member), and each row's own tokens, `max_length` at most. The keys and values of a layer are one dense
    tensor with room for some more tokens, since a matrix product with a slice of a larger one would copy the slice at
    every token (bfloat16 on a CPU). When the room is full, it is extended by `block` tokens.

    Args:
        batch_size: rows B.
        max_length: room in tokens, prefix excluded.
        block: tokens by which the room is extended; None = all of it at once.
    """

    def __init__(self, batch_size: int, max_length: int, block: int | None = None) -> None:
        self.batch_size, self.max_length = batch_size, max_length
        self.block = block or max_length
        self.own_length = 0
        self.group_size = 1
        self.prefix_length = 0
        self.prefix: list[tuple[Tensor, Tensor]] | None = None  # per layer (S, K, P, E)
        self.own: list[tuple[Tensor, Tensor]] = []  # per layer (B, K, room, E), zeros where nothing was written
        self.memory: list[tuple[Tensor, Tensor]] = []  # per layer (B * K * max_length * E,), where `own` is stored
        self.aside: Tensor | None = None  # buffer for a copy of one of them while its room is extended

    @property
    def length(self) -> int:
        """Number of tokens in the cache, prefix included, which is the position of the next token."""
        return self.prefix_length + self.own_length

    def positions(self, num_tokens: int, device: torch.device) -> Tensor:
        """Return the positions (N,) of the next `num_tokens` tokens."""
        return torch.arange(self.length, self.length + num_tokens, device=device)

    def num_columns(self, num_tokens: int) -> int:
        """Count the keys that attention reads, prefix included, once `num_tokens` more tokens are appended."""
        return self.length + num_tokens

    def own_columns(self, num_tokens: int) -> int:
        """Count those of `num_columns` that are not in the prefix: the first ones of what `append` returns."""
        return self.own_length + num_tokens

    def append(self, layer: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Write the new tokens of one layer and return that layer's keys and values without the prefix.

        Args:
            layer: index of the block.
            key: (B, K, N, E), already rotated.
            value: (B, K, N, E).

        Returns:
            Keys and values (B, K, room, E), of which `own_columns(N)` are written and the others 0. The length does
            not change here but once per forward, in `advance`.

        Raises:
            ValueError: more than `max_length` tokens.
        """
        new_length = self.own_length + key.shape[2]
        if new_length > self.max_length:
            raise ValueError(f"KV cache has room for {self.max_length} tokens, {new_length} needed: allocate more")
        if layer == len(self.own):
            numbers = key.shape[0] * key.shape[1] * self.max_length * key.shape[3]
            self.memory.append((key.new_empty(numbers), value.new_empty(numbers)))
            self.own.append((key[:, :, :0], value[:, :, :0]))
        if new_length > self.own[layer][0].shape[2]:
            room = min(self.max_length, -(-new_length // self.block) * self.block)  # rounded up to whole blocks
            self.own[layer] = tuple(self._extended(*both, room) for both in zip(self.own[layer], self.memory[layer]))
        for part, new in zip(self.own[layer], (key, value)):
            part[:, :, self.own_length : new_length] = new
        return self.own[layer]

    def _extended(self, part: Tensor, memory: Tensor, room: int) -> Tensor:
        """Lay keys or values (B, K, old room, E) out anew in `memory`, dense, with room for `room` tokens per head."""
        rows, heads, held, dim = part.shape
        if held:  # old and new layout overlap in the same memory: copy the old one out first
            self.aside = torch.empty_like(memory) if self.aside is None else self.aside
            part = self.aside[: part.numel()].view(part.shape).copy_(part)
        extended = memory[: rows * heads * room * dim].view(rows, heads, room, dim)
        extended[:, :, :held] = part
        extended[:, :, held:] = 0  # weights of unwritten tokens are 0, but 0 * nan would be nan
        return extended

    def advance(self, num_tokens: int) -> None:
        """Count `num_tokens` more tokens, after every layer has appended them."""
        self.own_length += num_tokens

    def expand(self, group_size: int, max_length: int, block: int | None = None) -> "KVCache":
        """Make a cache of B * group_size rows in which each run of `group_size` rows continues one row of this cache.

        Args:
            group_size: members G per start.
            max_length: room for new tokens per row.
            block: tokens by which that room is extended; None = all of it at once.

        Returns:
            A cache that reads this one's memory as its prefix; do not append to this one while that is in use.

        Raises:
            ValueError: this cache is empty or has a prefix itself.
        """
        if not self.own or self.prefix is not None:
            raise ValueError("only a cache that was filled directly can be expanded: run the prefix through it first")
        expanded = KVCache(self.batch_size * group_size, max_length, block)
        expanded.prefix = [(key[:, :, : self.own_length], value[:, :, : self.own_length]) for key, value in self.own]
        expanded.prefix_length, expanded.group_size = self.own_length, group_size
        return expanded


class StaticKVCache:
    """An expanded cache with fixed shapes and addresses, as CUDA graphs need: the number of tokens held is a tensor.

    Args:
        prefilled: a cache that was filled directly, one row per start; sets the prefix's length and type.
        group_size: members G per start.
        max_length: room for new tokens per row.
    """

    def __init__(self, prefilled: KVCache, group_size: int, max_length: int) -> None:
        depth, like = len(prefilled.own), prefilled.own[0][0]
        starts, heads, _, dim = like.shape
        self.group_size, self.batch_size = group_size, starts * group_size
        self.prefix_length, self.limit = prefilled.own_length, max_length
        self.prefix = like.new_zeros(depth, 2, starts, heads, self.prefix_length, dim)
        self.own = like.new_zeros(depth, 2, self.batch_size, heads, max_length, dim)
        self.held = torch.zeros((), dtype=torch.long, device=like.device)

    def restart(self, prefilled: KVCache) -> None:
        """Drop all new tokens and copy in another prefix of the same shape."""
        for layer, given in zip(self.prefix, prefilled.own, strict=True):
            for part, new in zip(layer, given, strict=True):
                part.copy_(new[:, :, : self.prefix_length])
        self.held.zero_()

    def positions(self, num_tokens: int, device: torch.device) -> Tensor:
        """As in `KVCache`."""
        return self.prefix_length + self.held + torch.arange(num_tokens, device=device)

    def num_columns(self, num_tokens: int) -> int:
        """Count the prefix and the first `limit` places, filled or not: those not filled must be masked."""
        return self.prefix_length + self.limit

    def own_columns(self, num_tokens: int) -> int:
        """As in `KVCache`."""
        return self.limit

    def append(self, layer: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """As in `KVCache`, but returns the first `limit` places."""
        places = self.held + torch.arange(key.shape[2], device=key.device)  # on the GPU: a graph replays no Python
        for part, new in enumerate((key, value)):
            self.own[layer, part].index_copy_(2, places, new.to(self.own.dtype))
        return self.own[layer, 0, :, :, : self.limit], self.own[layer, 1, :, :, : self.limit]

    def advance(self, num_tokens: int) -> None:
        """As in `KVCache`."""
        self.held += num_tokens


Cache = KVCache | StaticKVCache
