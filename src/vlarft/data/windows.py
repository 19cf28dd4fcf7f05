"""Training windows: a segment of frames, the actions between them, the instruction.

Shapes: B batch, L frames, T chunk steps, C H W pixels.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from einops import rearrange
from torch import Tensor

from vlarft.data.episodes import Episode
from vlarft.schedule import generator


class Batch(NamedTuple):
    """A batch of windows that start at frame t of their episodes.

    frames: (B, L, C, H, W) float32 in [0, 1], frames t .. t+L-1
    actions: (B, T, 7) executed raw actions t .. t+T-1
    intended: (B, T, 7) intended raw actions
    proprio: (B, 8) raw, at t
    instructions: B strings
    context_frame: (B, C, H, W), the frame that the tokenizer conditions on: frame t, or an earlier one
        (`context_lookback`)
    key_position: (B, 3) hand position [m] at the next change of the intended gripper command, or at the end of the
        episode
    index: (B, 2) episode number and t
    """

    frames: Tensor
    actions: Tensor
    intended: Tensor
    proprio: Tensor
    instructions: list[str]
    context_frame: Tensor
    key_position: Tensor
    index: Tensor


class WindowSampler:
    """Draws windows uniformly over all starts of all episodes.

    A batch is a pure function of its seed, so a resumed run sees the batches that it would have seen.

    Args:
        episodes: one split.
        num_frames: L. Windows with L > 1 start where L frames follow; with L = 1 at every frame.
        chunk: T. Actions beyond an episode's end are padded: no motion, gripper held.
        context_lookback: the context frame is drawn from this many frames before the segment (15 in RLVR-World); 0
            takes the segment's first frame.

    Raises:
        ValueError: no episodes, none that is long enough, or episodes that differ in image size.
    """

    def __init__(
        self, episodes: Sequence[Episode], num_frames: int = 9, chunk: int = 8, context_lookback: int = 0
    ) -> None:
        if not episodes:
            raise ValueError("no episodes to draw windows from: this split is empty; collect more, or split otherwise")
        sizes = {e.images.shape[1:3] for e in episodes}
        if len(sizes) > 1:
            raise ValueError(f"episodes differ in image size: {sorted(sizes)}; collect them at one size")
        self.episodes, self.num_frames, self.chunk = list(episodes), num_frames, chunk
        self.context_lookback = context_lookback
        starts = [(i, t) for i, episode in enumerate(self.episodes) for t in range(len(episode) - num_frames + 1)]
        if not starts:
            longest = max(len(e) for e in episodes)
            raise ValueError(f"no episode has the {num_frames} frames of a window; the longest has {longest}")
        self.starts = np.array(starts)  # (N, 2)
        self.key_positions = [_key_positions(e) for e in self.episodes]

    def __len__(self) -> int:
        return len(self.starts)

    def batch(self, batch_size: int, *seed: int, part: tuple[int, int] = (0, 1)) -> Batch:
        """A random batch that depends on `seed` alone, by convention (seed, step).

        Args:
            batch_size: of all processes together.
            seed: integers.
            part: (number, count): a contiguous share of the same global batch, so that a run does not depend on the
                number of processes or micro-batches.
        """
        rng = np.random.default_rng(seed)
        picks, lookback = rng.integers(len(self.starts), size=batch_size), rng.random(batch_size)
        share = batch_size // part[1]
        rows = slice(part[0] * share, (part[0] + 1) * share)
        return self.windows(self.starts[picks[rows]], lookback[rows])

    def spread(self, count: int) -> Batch:
        """`count` windows spread evenly over all starts: the same for every call, for validation."""
        picks = np.linspace(0, len(self.starts) - 1, min(count, len(self.starts))).round().astype(int)
        return self.windows(self.starts[picks], np.random.default_rng(0).random(len(picks)))

    def median_frame(self, count: int = 256) -> Tensor:
        """(C, H, W), the median over `count` frames spread evenly over the data: what is always there."""
        return self.spread(count).context_frame.median(dim=0).values

    def windows(self, starts: np.ndarray, lookback: np.ndarray | None = None) -> Batch:
        """The windows at `starts`.

        Args:
            starts: (B, 2), rows of episode number and first frame.
            lookback: (B,) in [0, 1), which of the earlier frames is the context frame; None = frame t.
        """
        frames, contexts, actions, intended, proprio, keys = [], [], [], [], [], []
        for row, (i, t) in enumerate(starts):
            episode = self.episodes[i]
            frames.append(episode.images[t : t + self.num_frames])
            back = min(t, self.context_lookback)
            offset = 1 + int(lookback[row] * back) if back and lookback is not None else 0
            contexts.append(episode.images[t - offset])
            actions.append(_padded(episode.actions, t, self.chunk))
            intended.append(_padded(episode.intended, t, self.chunk))
            proprio.append(episode.proprio[t])
            keys.append(self.key_positions[i][t])
        return Batch(
            frames=_to_float(np.stack(frames)),
            actions=torch.from_numpy(np.stack(actions)),
            intended=torch.from_numpy(np.stack(intended)),
            proprio=torch.from_numpy(np.stack(proprio)),
            instructions=[self.episodes[i].instruction for i, _ in starts],
            context_frame=_to_float(np.stack(contexts)),
            key_position=torch.from_numpy(np.stack(keys)),
            index=torch.from_numpy(np.asarray(starts)),
        )


def pick_frames(batch: Batch, count: int, batch_size: int, part: tuple[int, int], *seed: int) -> Tensor:
    """`count` frames of each segment, in order.

    Args:
        batch: this share's segments, L frames each.
        count: frames to keep.
        batch_size: segments of all shares: drawn for them together, so that the picks do not depend on their number.
        part: (number, count) of the share.
        seed: integers.

    Returns:
        (B, count, C, H, W).
    """
    segments, length = batch.frames.shape[:2]
    if count >= length:
        return batch.frames
    order = torch.rand(batch_size, length, generator=generator("cpu", *seed)).argsort(dim=1)
    picks = order[part[0] * segments : (part[0] + 1) * segments, :count].sort(dim=1).values  # (B, count)
    return batch.frames[torch.arange(segments)[:, None], picks]


def _to_float(images: np.ndarray) -> Tensor:
    """uint8 (..., H, W, C) -> float32 (..., C, H, W) in [0, 1]."""
    return rearrange(torch.from_numpy(images), "... h w c -> ... c h w").float() / 255


def _padded(actions: np.ndarray, start: int, chunk: int) -> np.ndarray:
    """(chunk, 7) actions from `start`, padded beyond the end: no motion, gripper held."""
    rows = actions[start : start + chunk]
    if len(rows) == chunk:
        return rows
    padding = np.zeros((chunk - len(rows), actions.shape[1]), actions.dtype)
    padding[:, -1] = actions[-1, -1]
    return np.concatenate([rows, padding])


def _key_positions(episode: Episode) -> np.ndarray:
    """(T, 3) hand position at the next change of the intended gripper command after each step, else the last one."""
    closed = episode.intended[:, -1] > 0
    out = np.empty((len(episode), 3), np.float32)
    position = episode.proprio[-1, :3]
    for t in reversed(range(len(episode))):
        if t + 1 < len(episode) and closed[t + 1] != closed[t]:
            position = episode.proprio[t + 1, :3]
        out[t] = position
    return out
