"""Ids and positions of the world model's sequence, in one place for the loss, the rollout and the tests.

    ctx(c) | dyn(f0) a0 | dyn(f1) a1 | ... | dyn(fT)

Here ctx(c) are the tokens of the context frame c, which is f0 or an earlier frame of the episode; dyn(f) the tokens of
frame f relative to c; a an action's tokens or, where poses drive the model, those of the pose that it leads to. An
imagined episode is a row of such sequences with the same ctx(c), each of which begins with the dyn that the one before
ended with.

Shapes: S starts, B rows, T actions, A action dim, Nc context tokens, Nf tokens of a frame, N tokens.
"""

import math

import torch
from torch import Tensor

from vlarft.nets.frame_networks import TokenizerConfig


class TokenLayout:
    """Ids and positions of the sequence.

    Ids: future codes from 0, then context codes, then action bins (the same for every dimension), BOS, EOS. The last
    two never occur in a sequence; they keep the vocabulary of the public checkpoints.

    Args:
        tokenizer: sizes of the frame tokenizer.
        action_dim: tokens A of what drives a frame, one per dimension of an action, or of a pose and its grippers.
        action_bins: bins per dimension.
    """

    def __init__(self, tokenizer: TokenizerConfig, action_dim: int, action_bins: int) -> None:
        self.num_future_codes = math.prod(tokenizer.future_levels)
        self.num_context_codes = math.prod(tokenizer.context_levels)
        self.context_offset = self.num_future_codes
        self.action_offset = self.context_offset + self.num_context_codes
        self.bos = self.action_offset + action_bins
        self.eos = self.bos + 1
        self.vocab_size = self.eos + 1
        self.context_length = tokenizer.num_context_tokens
        self.frame_length = tokenizer.num_future_tokens
        self.action_length = action_dim
        self.step_length = self.frame_length + self.action_length
        self.prefix_length = self.context_length + self.frame_length  # what is given before the first action

    def length(self, num_actions: int) -> int:
        """Count the tokens N of a sequence of `num_actions` actions and one frame more."""
        return self.prefix_length + num_actions * self.step_length

    def prefix(self, context_tokens: Tensor, first_tokens: Tensor) -> Tensor:
        """Build the ids of ctx | dyn(f0): (S, Nc) and (S, Nf) -> (S, Nc + Nf)."""
        return torch.cat([self.context_ids(context_tokens), first_tokens], dim=1)

    def context_ids(self, context_tokens: Tensor) -> Tensor:
        """Convert context tokens of any shape to ids."""
        return context_tokens + self.context_offset

    def action_ids(self, bins: Tensor) -> Tensor:
        """Convert action bins of any shape to ids."""
        return bins + self.action_offset

    def sequence(self, context_tokens: Tensor, future_tokens: Tensor, bins: Tensor) -> Tensor:
        """Build the ids of the whole sequence.

        Args:
            context_tokens: (B, Nc).
            future_tokens: (B, T + 1, Nf).
            bins: (B, T, A).

        Returns:
            (B, N) ids.
        """
        # action t and then frame t + 1: this pair is the sequence's repeating unit
        steps = torch.cat([self.action_ids(bins), future_tokens[:, 1:]], dim=2).flatten(1)  # (B, T * (A + Nf))
        return torch.cat([self.prefix(context_tokens, future_tokens[:, 0]), steps], dim=1)

    @property
    def num_slots(self) -> int:
        """Number of slots: Nc places in the context frame, Nf in a frame and A in an action."""
        return self.context_length + self.step_length

    def slots(self, positions: Tensor) -> Tensor:
        """Map positions of any shape to slots: 0..Nc-1 in the context frame, then Nf of a frame and A of an action."""
        # after the context, frame and action alternate with period Nf + A
        inside = (positions - self.context_length) % self.step_length + self.context_length
        return torch.where(positions < self.context_length, positions, inside)

    def frame_positions(self, num_actions: int) -> Tensor:
        """Return the positions (T, Nf) of the tokens of frames 1..T, which the loss of Eq. (3) predicts."""
        start = self.prefix_length + self.action_length  # of frame 1, after the first action
        frames = start + self.step_length * torch.arange(num_actions)[:, None]
        return frames + torch.arange(self.frame_length)
