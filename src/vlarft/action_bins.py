"""Action tokens: uniform bins over a stored range for each action dimension.

Shapes: A action dim.
"""

import warnings

import torch
from torch import Tensor, nn


class ActionBins(nn.Module):
    """Discretise raw environment actions into uniform bins over one stored range per dimension.

    bin = clip(floor(num_bins * clip((a - low) / (high - low + 1e-8), 0, 1)), 0, num_bins - 1)

    Args:
        action_dim: A.
        num_bins: bins per dimension.
    """

    def __init__(self, action_dim: int, num_bins: int) -> None:
        super().__init__()
        self.num_bins, self.warned = num_bins, False
        self.register_buffer("low", torch.full((action_dim,), -1.0))
        self.register_buffer("high", torch.ones(action_dim))

    def set_range(self, low: Tensor, high: Tensor) -> None:
        """Store the raw range of each dimension, low and high (A,); a constant one gets width 2 around its value.

        Raises:
            ValueError: other shapes, numbers that are not finite, or low above high.
        """
        low, high = torch.as_tensor(low).float(), torch.as_tensor(high).float()
        if low.shape != self.low.shape or high.shape != self.high.shape:
            raise ValueError(f"expected {len(self.low)} action ranges, got {tuple(low.shape)} and {tuple(high.shape)}")
        if not (torch.isfinite(low).all() and torch.isfinite(high).all() and (low <= high).all()):
            raise ValueError(f"action ranges must be finite with low <= high, got {low.tolist()} and {high.tolist()}")
        still = high - low < 1e-6
        self.low.copy_(torch.where(still, low - 1, low))
        self.high.copy_(torch.where(still, high + 1, high))

    def encode(self, actions: Tensor) -> Tensor:
        """Encode raw actions (..., A) as bins (..., A) int64; values outside the ranges fall into the outermost bins.

        Raises:
            ValueError: another action dim.
        """
        if actions.shape[-1] != len(self.low):
            raise ValueError(f"expected actions of dimension {len(self.low)}, got shape {tuple(actions.shape)}")
        share = ((actions.float() - self.low) / (self.high - self.low + 1e-8)).clamp(0, 1)
        return (share * self.num_bins).floor().clamp(0, self.num_bins - 1).long()  # share 1 floors to num_bins

    def decode(self, bins: Tensor) -> Tensor:
        """Decode bins (..., A) to raw actions (..., A) at the bins' centres, float32."""
        return self.low + (bins + 0.5) / self.num_bins * (self.high - self.low)

    def outside(self, actions: Tensor) -> Tensor:
        """Return the share of the values of raw actions (..., A) outside the ranges by more than rounding, a scalar."""
        return self._beyond(actions).float().mean()

    def warn_outside(self, actions: Tensor) -> None:
        """Warn, once per object, if values of raw actions (..., A) lie outside the ranges."""
        if self.warned:
            return
        beyond = self._beyond(actions)
        if count := int(beyond.sum()):
            self.warned = True
            dims = beyond.flatten(0, -2).any(dim=0).nonzero().flatten().tolist()
            warnings.warn(
                f"{count} of {beyond.numel()} action values ({count / beyond.numel():.1%}, in dimensions {dims}) lie "
                "outside the ranges that the world model was trained on and are clipped to them: it takes raw "
                "environment actions, or poses if they drive it, not normalised ones. This is said once",
                stacklevel=3,
            )

    def _beyond(self, actions: Tensor) -> Tensor:
        """Mark the values of raw actions (..., A) outside the ranges: (..., A) bool."""
        slack = 1e-4 * (self.high - self.low)
        # negated, so that nan, for which every comparison is false, counts as outside
        return ~((actions >= self.low - slack) & (actions <= self.high + slack))
