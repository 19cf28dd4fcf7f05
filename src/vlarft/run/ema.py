"""Exponential moving average of the weights that train."""

import contextlib
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from vlarft.run.distributed import place


class EMA:
    """The average; without a decay there is none, and its methods do nothing.

    Args:
        parameters: those that train; the average starts as their copy.
        decay: of the average per step, in [0, 1).
        from_scratch: the initial weights are random, so that the decay ramps up as (step + 1) / (step + 10) until it is
            `decay`. Without it they count as all later ones do.
    """

    def __init__(self, parameters: Sequence[Tensor], decay: float | None, from_scratch: bool = True) -> None:
        self.parameters, self.decay, self.from_scratch = parameters, decay, from_scratch
        self.averages = [] if decay is None else [p.detach().clone() for p in parameters]

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Take in the weights after step `step` (0-based)."""
        young = (step + 1) / (step + 10) if self.from_scratch else 1.0
        for average, parameter in zip(self.averages, self.parameters):
            average.lerp_(parameter, 1 - min(self.decay, young))

    def state_dict(self) -> dict[int, Tensor]:
        """The averages, by the parameters' numbers."""
        return dict(enumerate(self.averages))

    def load_state_dict(self, state: dict[int, Tensor]) -> None:
        """Take over the averages of a `state_dict`, of whole tensors or of shards.

        Raises:
            ValueError: it holds others than this one's.
        """
        if state.keys() != self.state_dict().keys():
            raise ValueError(
                f"the saved averages are of {len(state)} weights ({', '.join(map(str, list(state)[:2]))}, ...), "
                f"expected {len(self.averages)}, by number: another version wrote them; remove train_state.pt to start "
                "anew"
            )
        self.averages = [place(state[i], p) for i, p in zip(state, self.parameters)]

    @contextlib.contextmanager
    def swapped(self) -> Iterator[None]:
        """Run a block with the averaged weights in place of the trained ones."""
        trained = [p.detach().clone() for p in self.parameters] if self.averages else []
        try:
            for parameter, average in zip(self.parameters, self.averages):
                parameter.data.copy_(average)
            yield
        finally:
            for parameter, value in zip(self.parameters, trained):
                parameter.data.copy_(value)
