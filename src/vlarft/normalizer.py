"""Conversion of actions and proprioception between the environment's units and the policy's.

Only this module converts: the policy computes in normalised actions, the environment and the world model take raw ones.

Shapes: A action dim (7), G gripper dims (1), P proprio dim (8).
"""

from collections.abc import Sequence
from typing import Literal

import numpy as np
import torch
from torch import Tensor, nn

from vlarft.data.episode import Episode

GripperEncoding = Literal["zero_one_open", "identity"]


class Normalizer(nn.Module):
    """Quantile normalisation. The quantiles are buffers, so that they are saved and loaded with the policy.

    Motion, all action dimensions but the grippers', maps the 1 % and 99 % quantiles of the training actions to [-1, 1]
    and clips; proprio likewise. Grippers are not scaled: "zero_one_open" (OpenVLA's convention) maps the environment's
    -1 open / +1 close to 1 open / 0 close; "identity" keeps -1 / +1. A constant dimension (quantiles closer than 1e-6)
    maps to 0 and decodes to its constant.

    Args:
        action_dim: A.
        proprio_dim: P.
        gripper: encoding of the gripper dimensions.
        gripper_dims: action dimensions that are binary gripper commands; None: the last.

    Raises:
        ValueError: gripper dimensions outside 0 .. A - 1.
    """

    def __init__(
        self,
        action_dim: int = 7,
        proprio_dim: int = 8,
        gripper: GripperEncoding = "zero_one_open",
        gripper_dims: Sequence[int] | None = None,
    ) -> None:
        super().__init__()
        self.gripper = gripper
        self.gripper_dims = (action_dim - 1,) if gripper_dims is None else tuple(sorted(gripper_dims))
        if outside := set(self.gripper_dims) - set(range(action_dim)):
            raise ValueError(f"gripper dimensions {sorted(outside)} do not lie in 0 .. {action_dim - 1}")
        motion = [i for i in range(action_dim) if i not in self.gripper_dims]
        order = torch.tensor([*motion, *self.gripper_dims])  # of the columns while motion and grippers are apart
        self.register_buffer("motion", order[: len(motion)], persistent=False)
        self.register_buffer("grippers", order[len(motion) :], persistent=False)
        self.register_buffer("back", order.argsort(), persistent=False)
        self.register_buffer("action_low", -torch.ones(len(motion)))
        self.register_buffer("action_high", torch.ones(len(motion)))
        self.register_buffer("proprio_low", -torch.ones(proprio_dim))
        self.register_buffer("proprio_high", torch.ones(proprio_dim))
        self.register_buffer("fitted", torch.zeros((), dtype=torch.bool))

    def fit(self, actions: Tensor, proprio: Tensor) -> "Normalizer":
        """Fit the 1 % and 99 % quantiles to a training split; return the normaliser itself.

        Args:
            actions: (N, A) raw environment actions, grippers -1 open / +1 close.
            proprio: (N, P) position in metres, axis-angle in radians, finger positions in metres.

        Raises:
            ValueError: wrong widths, NaN or infinite values, or a gripper outside [-1, 1].
        """
        for name, values, width in (
            ("actions", actions, len(self.back)),
            ("proprio", proprio, len(self.proprio_low)),
        ):
            if values.ndim != 2 or values.shape[1] != width:
                raise ValueError(f"{name} must have shape (N, {width}), got {tuple(values.shape)}")
            if not torch.isfinite(values).all():
                bad = int((~torch.isfinite(values)).any(1).nonzero()[0])
                raise ValueError(f"{name} has NaN or infinite values, first in row {bad}; repair the demonstrations")
        actions, proprio, motion = actions.cpu(), proprio.cpu(), self.motion.cpu()  # wherever the policy is
        gripper = actions[:, self.grippers.cpu()]
        if (gripper.abs() > 1 + 1e-4).any():
            raise ValueError(
                "gripper actions must lie in [-1, 1] (-1 open, +1 close), "
                f"got [{gripper.min():.3g}, {gripper.max():.3g}]"
            )
        for name, values in (("action", actions[:, motion]), ("proprio", proprio)):
            low, high = _quantiles(values)  # (D,), (D,)
            getattr(self, f"{name}_low").copy_(low)
            getattr(self, f"{name}_high").copy_(high)
        self.fitted.fill_(True)
        return self

    def set_quantiles(self, action_low: Tensor, action_high: Tensor, proprio_low: Tensor, proprio_high: Tensor) -> None:
        """Set the 1 % and 99 % quantiles from stored statistics of a data set, in raw units.

        Args:
            action_low, action_high: (A - G,), without the grippers.
            proprio_low, proprio_high: (P,).

        Raises:
            ValueError: other widths (the statistics of another robot), numbers that are not finite, or low above high.
        """
        for name, low, high in (("action", action_low, action_high), ("proprio", proprio_low, proprio_high)):
            expected = getattr(self, f"{name}_low").shape
            if low.shape != expected or high.shape != expected:
                raise ValueError(
                    f"{name} statistics of shape {tuple(low.shape)} and {tuple(high.shape)}, expected "
                    f"{tuple(expected)}: they belong to another robot"
                )
            if not (torch.isfinite(low).all() and torch.isfinite(high).all() and (low <= high).all()):
                raise ValueError(f"{name} statistics must be finite, low <= high; got {low.tolist()}, {high.tolist()}")
        self.action_low.copy_(action_low)
        self.action_high.copy_(action_high)
        self.proprio_low.copy_(proprio_low)
        self.proprio_high.copy_(proprio_high)
        self.fitted.fill_(True)

    def check(self, actions: Tensor, proprio: Tensor) -> None:
        """Check that the quantiles fit these demonstrations.

        Args:
            actions: (N, A), raw.
            proprio: (N, P), raw.

        Raises:
            ValueError: other widths, a dimension with more than half of its values outside the quantiles' range, or one
                that moves and is constant by the quantiles: the policy would never move or see it.
        """
        width = len(self.back), len(self.proprio_low)
        if (actions.shape[1], proprio.shape[1]) != width:
            raise ValueError(
                f"the demonstrations have {actions.shape[1]} action and {proprio.shape[1]} proprio dimensions, the "
                f"policy {width[0]} and {width[1]}: they belong to another robot"
            )
        for name, values in (("action", actions[:, self.motion]), ("proprio", proprio)):
            low, high = getattr(self, f"{name}_low"), getattr(self, f"{name}_high")
            if not len(low):
                continue
            still = (high - low < 1e-6).nonzero()[:, 0]
            ours = _quantiles(values[:, still])  # (2, constant ones)
            if len(moved := still[ours[1] - ours[0] >= 1e-6]):
                dim = int(self.motion[moved[0]]) if name == "action" else int(moved[0])
                raise ValueError(
                    f"the policy's statistics come from another robot or other units: {name} {dim} moves in the "
                    f"demonstrations and is always {low[moved[0]]:.3g} in them, so that the policy leaves it out; fit "
                    "them anew (train_sft.py --refit-statistics) if the change is intended"
                )
            # (D,), share of values outside; a constant dimension, outside by any rounding, is not counted
            out = ((values < low) | (values > high)).float().mean(0) * (high - low >= 1e-6)
            worst = int(out.argmax())
            if out[worst] > 0.5:
                dim = int(self.motion[worst]) if name == "action" else worst
                raise ValueError(
                    f"the policy's statistics come from another robot or other units: {out[worst]:.0%} of {name} "
                    f"{dim} lie outside [{low[worst]:.3g}, {high[worst]:.3g}], its 1 % and 99 % quantiles; fit them "
                    "anew (train_sft.py --refit-statistics) if the change is intended"
                )

    def encode_actions(self, actions: Tensor) -> Tensor:
        """Normalise raw environment actions (..., A), float32."""
        motion = _to_unit(actions[..., self.motion].float(), self.action_low, self.action_high)  # (..., A - G)
        gripper = actions[..., self.grippers].float()  # (..., G)
        if self.gripper == "zero_one_open":
            gripper = (1 - gripper) / 2
        return torch.cat([motion, gripper], -1)[..., self.back]

    def decode_actions(self, actions: Tensor) -> Tensor:
        """Convert normalised actions (..., A) to raw ones, float32: motion clipped to its range, grippers -1 or +1.

        Raises:
            FloatingPointError: NaN or infinite ones, which the clip would hide; no robot may get them.
        """
        if not torch.isfinite(actions).all():
            raise FloatingPointError("the policy's actions are NaN or infinite: its weights have diverged")
        motion = _from_unit(actions[..., self.motion].float().clamp(-1, 1), self.action_low, self.action_high)
        gripper = actions[..., self.grippers].float()
        closed = gripper < 0.5 if self.gripper == "zero_one_open" else gripper > 0  # 0 is closed in the former
        return torch.cat([motion, torch.where(closed, 1.0, -1.0)], -1)[..., self.back]

    def action_unit(self) -> Tensor:
        """Return the raw units per normalised one, (A,): half of a motion's range; 1 for a gripper."""
        half = (self.action_high - self.action_low) / 2
        return torch.cat([half, half.new_ones(len(self.gripper_dims))])[self.back]

    def encode_proprio(self, proprio: Tensor) -> Tensor:
        """Normalise raw proprio (..., P) to [-1, 1], clipped, float32.

        Raises:
            ValueError: another width than P, or NaN.
        """
        if proprio.shape[-1] != len(self.proprio_low):
            raise ValueError(f"proprio must have {len(self.proprio_low)} values, got {proprio.shape[-1]}")
        if not torch.isfinite(proprio).all():
            raise ValueError("proprio has NaN or infinite values")
        return _to_unit(proprio.float(), self.proprio_low, self.proprio_high)


def _quantiles(values: Tensor) -> Tensor:
    """Return the 1 % and 99 % quantiles of (N, D) as (2, D), float32."""
    # sort and interpolate here: torch.quantile refuses more than 16M values
    ordered = values.double().sort(0).values  # (N, D)
    levels = torch.tensor([0.01, 0.99], dtype=torch.float64, device=values.device)
    position = levels * (len(ordered) - 1)  # (2,), fractional rows of the two quantiles
    lower, weight = position.floor().long(), (position % 1)[:, None]
    upper = (lower + 1).clamp(max=len(ordered) - 1)
    return (ordered[lower] * (1 - weight) + ordered[upper] * weight).float()


def _to_unit(values: Tensor, low: Tensor, high: Tensor) -> Tensor:
    span = high - low
    # the clamp of the span keeps values and gradients finite in the branch that `where` discards
    unit = (2 * (values - low) / span.clamp(min=1e-6) - 1).clamp(-1, 1)
    return torch.where(span < 1e-6, torch.zeros_like(unit), unit)


def _from_unit(values: Tensor, low: Tensor, high: Tensor) -> Tensor:
    return low + (values + 1) / 2 * (high - low)


def intended_and_proprio(episodes: Sequence[Episode]) -> tuple[Tensor, Tensor]:
    """Return the demonstrators' intended actions (N, A) and proprio (N, P) of all steps of episodes, raw."""
    columns = ([getattr(e, name) for e in episodes] for name in ("intended", "proprio"))
    actions, proprio = (torch.from_numpy(np.concatenate(column)) for column in columns)
    return actions, proprio


def check_same_units(normalizer: Normalizer, episodes: Sequence[Episode]) -> None:
    """Check that episodes have a policy's grippers and units, before they train it.

    Raises:
        ValueError: they are another robot's or in other units.
    """
    theirs, ours = list(episodes[0].grippers), list(normalizer.gripper_dims)
    if episodes[0].actions.shape[1] == len(normalizer.back) and theirs != ours:
        raise ValueError(
            f"the gripper dimensions of {episodes[0].name} are {theirs}, of the policy {ours}: they belong to another "
            "robot, or the data set says so by mistake (python -m vlarft.data.convert --gripper-dims)"
        )
    normalizer.check(*(values.to(normalizer.action_low.device) for values in intended_and_proprio(episodes)))
