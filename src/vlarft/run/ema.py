"""Exponential moving average of the trained weights."""

import contextlib
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from vlarft.run.distributed import place


class EMA:
    """Keep a moving average of weights; with decay None there is none, and the methods do nothing.

    Args:
        parameters: trained weights; the average starts as their copy.
        decay: of the average per step, in [0, 1), which rises to it as (step + 1) / (step + 10); None = no average.
    """

    def __init__(self, parameters: Sequence[Tensor], decay: float | None) -> None:
        self.parameters, self.decay = parameters, decay
        self.averages = [] if decay is None else [p.detach().clone() for p in parameters]

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Add the weights after step `step` (0-based) to the average."""
        ramp = (step + 1) / (step + 10)
        for average, parameter in zip(self.averages, self.parameters):
            average.lerp_(parameter, 1 - min(self.decay, ramp))

    def state_dict(self) -> dict[int, Tensor]:
        """Return the averages by parameter number."""
        return dict(enumerate(self.averages))

    def load_state_dict(self, state: dict[int, Tensor]) -> None:
        """Restore the averages of a `state_dict`, whole tensors or shards.

        Raises:
            ValueError: its keys or shapes are not those of this average.
        """
        if state.keys() != self.state_dict().keys():
            raise ValueError(
                f"the saved averages are of {len(state)} weights ({', '.join(map(str, list(state)[:2]))}, ...), "
                f"expected {len(self.averages)}, numbered from 0: another version wrote them; remove train_state.pt to "
                "start anew"
            )
        if wrong := [i for i, p in zip(state, self.parameters) if state[i].shape != p.shape]:
            raise ValueError(f"the saved average of weight {wrong[0]} has shape {tuple(state[wrong[0]].shape)}")
        self.averages = [place(state[i], p).to(p.device) for i, p in zip(state, self.parameters)]  # read to the CPU

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
