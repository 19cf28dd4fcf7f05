"""How the world model draws the tokens of imagined frames: sampling, and decoding at fixed shapes for a GPU.

Shapes: S starts, G group members per start, B rows (S * G), T actions, A action dim, Nf tokens of a frame, V future
codes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from vlarft.nets.kv_cache import KVCache, StaticKVCache

if TYPE_CHECKING:
    from vlarft.world_model import Tables, WorldModel


@dataclass(frozen=True)
class Sampling:
    """How frame tokens are drawn.

    Args:
        greedy: take the likeliest code; the other settings are then without effect.
        temperature: divides the logits.
        top_p: smallest set of codes whose probability reaches this share.
        top_k: at most this many codes; None = all.
        common_random_numbers: the same draws for all members of a start (they depend on start, step and position
            alone), so that members differ by their actions and not by luck.
        part: (number, count) of equal shares of a larger batch: the draws are made for all of it and these rows take
            theirs, so that a run does not depend on the number of processes.
    """

    greedy: bool = False
    temperature: float = 1.0
    top_p: float = 0.8
    top_k: int | None = None
    common_random_numbers: bool = False
    part: tuple[int, int] = (0, 1)

    def __post_init__(self) -> None:
        if not self.temperature > 0:
            raise ValueError(f"temperature must be positive, got {self.temperature}; use greedy=True for the limit 0")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p must lie in (0, 1], got {self.top_p}")
        if self.top_k is not None and self.top_k < 1:
            raise ValueError(f"top_k must be at least 1 or None, got {self.top_k}")

    def noise_rows(self, rows: int, group_size: int) -> int:
        """Rows of `noise` for so many rows of logits: one for all members where they share their draws."""
        return rows // group_size if self.common_random_numbers else rows

    def noise(self, rows: int, num_codes: int, generator: torch.Generator | None, device: torch.device) -> Tensor:
        """Gumbel noise (rows, V) of one token, drawn for all parts of the batch."""
        source = device if generator is None else generator.device
        exponential = torch.empty(rows * self.part[1], num_codes, device=source).exponential_(generator=generator)
        exponential = exponential[self.part[0] * rows : (self.part[0] + 1) * rows]
        return -exponential.clamp_min(1e-20).log().to(device)

    def pick(self, logits: Tensor, noise: Tensor | None) -> Tensor:
        """One code per row, argmax(log p + noise): logits (B, V) float32, noise (`noise_rows`, V) -> (B,) int64.

        With common random numbers the members share the noise, which keeps their codes equal wherever their
        distributions are close.
        """
        if self.greedy:
            return logits.argmax(dim=-1)
        log_prob = restrict(logits / self.temperature, self.top_p, self.top_k)
        noise = noise.repeat_interleave(len(logits) // len(noise), dim=0)
        return (log_prob + noise).argmax(dim=-1)

    def draw(self, logits: Tensor, group_size: int, generator: torch.Generator | None) -> Tensor:
        """`noise` and `pick`: logits (S * G, V) float32 -> (S * G,) int64."""
        rows = self.noise_rows(len(logits), group_size)
        noise = None if self.greedy else self.noise(rows, logits.shape[1], generator, logits.device)
        return self.pick(logits, noise)


def restrict(logits: Tensor, top_p: float, top_k: int | None) -> Tensor:
    """Log probabilities (B, V) with those outside the top-k and the nucleus at -inf; top-k is applied first."""
    if top_k is not None and top_k < logits.shape[-1]:
        smallest = logits.topk(top_k, dim=-1).values[:, -1:]
        logits = logits.masked_fill(logits < smallest, -torch.inf)
    log_prob = logits.log_softmax(dim=-1)
    if top_p < 1:
        ordered, order = log_prob.sort(dim=-1, descending=True)
        before = ordered.exp().cumsum(dim=-1) - ordered.exp()
        ordered = ordered.masked_fill(before >= top_p, -torch.inf)  # the first is always kept: nothing is before it
        log_prob = torch.empty_like(log_prob).scatter_(-1, order, ordered)
    return log_prob


class StaticDecoding:
    """Draws the frames of a rollout with fixed shapes and addresses; on a GPU every pass is one CUDA graph.

    A pass feeds the last token of a frame and an action, or one token, and draws the next. Its shapes are those of a
    full frame, so there is one graph for each frame and kind of pass; a later rollout of the same sizes replays them.
    Nothing waits for the GPU in between. On a CPU the same passes run one by one: that is slower than
    `WorldModel.rollout_tokens` is without this class, and shows that both compute the same.

    Args:
        model: frozen; its parameters must keep their addresses.
        prefilled: cache of the starts' prefix, for its shapes.
        group_size: members G per start.
        num_actions: T.
        sampling: how to draw.
        shared_by: see `WorldModel.rollout`.
    """

    def __init__(
        self,
        model: WorldModel,
        prefilled: KVCache,
        group_size: int,
        num_actions: int,
        sampling: Sampling,
        shared_by: int,
    ) -> None:
        self.model, self.layout, self.sampling = model, model.layout, sampling
        self.cache = StaticKVCache(prefilled, group_size, num_actions * self.layout.step_length)
        rows, device = self.cache.batch_size, self.cache.own.device
        self.tables: Tables | None = None
        self.ids = torch.zeros(rows, 1 + self.layout.action_length, dtype=torch.long, device=device)
        noise_rows = sampling.noise_rows(rows, group_size * shared_by)
        self.noise = torch.zeros(noise_rows, self.layout.num_future_codes, device=device)
        self.drawn = torch.zeros(rows, 1, dtype=torch.long, device=device)
        self.passes: dict[tuple[int, int], Callable[[], None]] = {}

    def run(self, prefilled: KVCache, tables: Tables, action_ids: Tensor, generator: torch.Generator | None) -> Tensor:
        """Tokens (B, T, Nf) of a rollout: `prefilled` of the starts, action_ids (B, T, A)."""
        self.cache.restart(prefilled)
        if self.tables is None:
            self.tables = type(tables)(*(rows.clone() for rows in tables))
        for mine, given in zip(self.tables, tables, strict=True):
            mine.copy_(given)
        frames = []
        for step in range(action_ids.shape[1]):
            pending = action_ids[:, step] if step == 0 else torch.cat([self.drawn, action_ids[:, step]], dim=1)
            tokens = []
            for _ in range(self.layout.frame_length):
                self.ids[:, : pending.shape[1]] = pending
                if not self.sampling.greedy:
                    self.noise.copy_(self.sampling.noise(*self.noise.shape, generator, self.noise.device))
                self._pass(step, pending.shape[1])()
                pending = self.drawn
                tokens.append(self.drawn.clone())
            frames.append(torch.cat(tokens, dim=1))
        return torch.stack(frames, dim=1)

    def _pass(self, step: int, num_tokens: int) -> Callable[[], None]:
        """The pass that feeds `num_tokens` ids during frame `step`: captured at its first use."""
        if (step, num_tokens) not in self.passes:
            limit = (step + 1) * self.layout.step_length  # what the cache can hold by the end of this frame

            def run() -> None:
                self.cache.limit = limit
                logits = self.model.next_logits(self.ids[:, :num_tokens], self.tables, self.cache)
                self.drawn.copy_(self.sampling.pick(logits, self.noise)[:, None])

            self.passes[step, num_tokens] = self._captured(run) if self.drawn.is_cuda else run
        return self.passes[step, num_tokens]

    def _captured(self, run: Callable[[], None]) -> Callable[[], None]:
        """A CUDA graph of `run`. Warming up and capturing leave the cache and the drawn tokens as they were."""
        held, drawn = self.cache.held.clone(), self.drawn.clone()
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(2):
                run()
                self.cache.held.copy_(held)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            run()
        self.cache.held.copy_(held)  # keys written above `held` are written again before they are seen
        self.drawn.copy_(drawn)
        return graph.replay
