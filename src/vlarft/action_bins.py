"""Actions as tokens: uniform bins over a stored range, one per dimension.

Shapes: A action dim.
"""

import warnings

import torch
from torch import Tensor, nn


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
