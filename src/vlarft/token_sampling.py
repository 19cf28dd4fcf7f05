"""How the world model samples the tokens of imagined frames.

Shapes: S starts, G group members per start, B rows (S * G), V future codes.
"""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Sampling:
    """How frame tokens are sampled.

    Args:
        greedy: take the likeliest code; the other settings then have no effect.
        temperature: divides the logits.
        top_p: sample from the smallest set of codes whose probability reaches this share.
        common_random_numbers: use the same random numbers for all members of a start, so that they differ by their
            actions and not by chance: the numbers depend on the start, the step and the position alone.
        part: (index, count) of this process's equal share of a larger batch. Random numbers are generated for the
            whole batch and only the share's rows are used, so that a run does not depend on the number of processes.
    """

    greedy: bool = False
    temperature: float = 1.0
    top_p: float = 0.8
    common_random_numbers: bool = False
    part: tuple[int, int] = (0, 1)

    def __post_init__(self) -> None:
        if not self.temperature > 0:
            raise ValueError(f"temperature must be positive, got {self.temperature}; use greedy=True for the limit 0")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p must lie in (0, 1], got {self.top_p}")

    def noise_rows(self, rows: int, group_size: int) -> int:
        """Return how many rows of `noise` serve `rows` rows of logits: one per start where its members share it."""
        return rows // group_size if self.common_random_numbers else rows

    def noise(self, rows: int, num_codes: int, generator: torch.Generator | None, device: torch.device) -> Tensor:
        """Return Gumbel noise (rows, V) for one token: this part's rows of the noise of the whole batch."""
        source = device if generator is None else generator.device  # a CPU generator: the same numbers on any device
        exponential = torch.empty(rows * self.part[1], num_codes, device=source).exponential_(generator=generator)
        exponential = exponential[self.part[0] * rows : (self.part[0] + 1) * rows]
        return -exponential.clamp_min(1e-20).log().to(device)  # -log Exp(1) is Gumbel; the clamp avoids log 0

    def pick(self, logits: Tensor, noise: Tensor | None) -> Tensor:
        """Choose one code per row, argmax(log p + noise): logits (B, V) float32, noise (`noise_rows`, V) -> (B,) int64.

        With Gumbel noise this samples from p. With common random numbers the members of a start share the noise, so
        that they mostly get the same code where their distributions are close.
        """
        if self.greedy:
            return logits.argmax(dim=-1)
        log_prob = restrict(logits / self.temperature, self.top_p)
        noise = noise.repeat_interleave(len(logits) // len(noise), dim=0)
        return (log_prob + noise).argmax(dim=-1)

    def sample(self, logits: Tensor, group_size: int, generator: torch.Generator | None) -> Tensor:
        """Sample one code per row, with `noise` and `pick`: logits (S * G, V) float32 -> (S * G,) int64."""
        rows = self.noise_rows(len(logits), group_size)
        noise = None if self.greedy else self.noise(rows, logits.shape[1], generator, logits.device)
        return self.pick(logits, noise)


def restrict(logits: Tensor, top_p: float) -> Tensor:
    """Return log-probabilities (B, V), -inf outside the nucleus."""
    log_prob = logits.log_softmax(dim=-1)
    if top_p < 1:
        ordered, order = log_prob.sort(dim=-1, descending=True)
        before = ordered.exp().cumsum(dim=-1) - ordered.exp()  # (B, V), probability of all likelier codes
        ordered = ordered.masked_fill(before >= top_p, -torch.inf)  # the first is always kept: nothing is before it
        log_prob = torch.empty_like(log_prob).scatter_(-1, order, ordered)  # back to the order of the codes
    return log_prob
