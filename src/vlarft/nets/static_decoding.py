"""Decoding frames of tokens at fixed shapes: on a GPU every pass through the transformer is one CUDA graph.

Shapes: B rows, T actions, A action dim, N new tokens, Nf tokens of a frame, V future codes.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from vlarft.nets.kv_cache import KVCache, StaticKVCache

# (ids (B, N), tables, cache, noise) -> (B,): feed ids to the transformer and choose the token that follows them
NextToken = Callable[[Tensor, Any, StaticKVCache, Tensor], Tensor]


class StaticDecoding:
    """Decodes the frames of a rollout with fixed shapes and addresses.

    A pass feeds one token, or a frame's last token (at first a whole frame) and an action, and chooses the next token.
    All passes of a frame attend to as many keys as there will be at its end, the missing ones masked, so that one graph
    per frame and kind of pass is enough; a later rollout of the same sizes replays them. Nothing waits for the GPU in
    between. On a CPU the same passes run without graphs: slower than decoding with a growing cache, but tests can
    compare the two.

    Args:
        next_token: the model; its parameters must keep their addresses.
        cache: cache with room for the tokens of the first frame and of T actions and frames; `run` fills its prefix.
        frame_length: tokens Nf of a frame.
        action_length: tokens A of an action.
        noise_shape: shape of the random numbers that `next_token` needs for one token.
    """

    def __init__(
        self,
        next_token: NextToken,
        cache: StaticKVCache,
        frame_length: int,
        action_length: int,
        noise_shape: tuple[int, int],
    ) -> None:
        self.next_token, self.cache = next_token, cache
        self.frame_length, self.step_length = frame_length, frame_length + action_length
        rows, device = cache.batch_size, cache.own.device
        self.tables: Any = None
        self.ids = torch.zeros(rows, frame_length + action_length, dtype=torch.long, device=device)
        self.noise = torch.zeros(noise_shape, device=device)
        self.sampled = torch.zeros(rows, 1, dtype=torch.long, device=device)
        self.passes: dict[tuple[int, int], Callable[[], None]] = {}

    def run(
        self,
        prefilled: KVCache,
        tables: Any,
        first_frame: Tensor,
        action_ids: Tensor,
        noise: Callable[[], Tensor] | None,
    ) -> Tensor:
        """Decode the frames of a rollout.

        Args:
            prefilled: keys and values of the starts' prefix, one row per start.
            tables: a NamedTuple of tensors for `next_token`, copied to addresses that the graphs keep.
            first_frame: (B, Nf), tokens of the frame before the first action.
            action_ids: (B, T, A), at most as many actions as the cache has room for.
            noise: returns the random numbers of one token, called once per token; None = no noise (greedy).

        Returns:
            (B, T, Nf) tokens.
        """
        self.cache.restart(prefilled)
        if self.tables is None:
            self.tables = type(tables)(*(rows.clone() for rows in tables))
        for kept, given in zip(self.tables, tables, strict=True):
            kept.copy_(given)
        frames = []
        for step in range(action_ids.shape[1]):
            pending = torch.cat([self.sampled if step else first_frame, action_ids[:, step]], dim=1)
            tokens = []
            for _ in range(self.frame_length):
                self.ids[:, : pending.shape[1]] = pending  # inputs are copied in: a graph reads fixed addresses
                if noise is not None:
                    self.noise.copy_(noise())
                self._pass(step, pending.shape[1])()
                pending = self.sampled  # (B, 1)
                tokens.append(self.sampled.clone())  # the next pass overwrites it
            frames.append(torch.cat(tokens, dim=1))  # (B, Nf)
        return torch.stack(frames, dim=1)

    def _pass(self, step: int, num_tokens: int) -> Callable[[], None]:
        """Return the pass that feeds `num_tokens` ids during frame `step`, captured at its first use."""
        if (step, num_tokens) not in self.passes:
            limit = self.frame_length + (step + 1) * self.step_length  # tokens by the end of this frame

            def run() -> None:
                self.cache.limit = limit
                token = self.next_token(self.ids[:, :num_tokens], self.tables, self.cache, self.noise)
                self.sampled.copy_(token[:, None])

            self.passes[step, num_tokens] = self._captured(run) if self.sampled.is_cuda else run
        return self.passes[step, num_tokens]

    def _captured(self, run: Callable[[], None]) -> Callable[[], None]:
        """Capture `run` in a CUDA graph. Warming up and capturing leave the cache and the sampled tokens unchanged."""
        held, sampled = self.cache.held.clone(), self.sampled.clone()
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(2):  # warm-up: libraries initialise themselves at first use, which a capture refuses
                run()
                self.cache.held.copy_(held)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            run()
        self.cache.held.copy_(held)  # keys written above `held` are written again before they are seen
        self.sampled.copy_(sampled)
        return graph.replay
