"""Training windows: a segment of frames, the actions between them, the instruction.

Shapes: B batch, L frames, T chunk steps, A action dim, P proprio dim, C H W pixels.
"""

import os
import warnings
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from vlarft.data.episode import Episode, RobotState
from vlarft.data.frames import Frames
from vlarft.run.pixels import to_floats
from vlarft.run.random import generator, numpy_generator


class Batch(NamedTuple):
    """A batch of windows that start at frame t of their episodes.

    frames: (B, L, C, H, W) float32 in [0, 1], frames t .. t+L-1
    actions: (B, T, A) raw actions t .. t+T-1 as executed
    intended: (B, T, A) raw actions before the demonstrator's noise was added
    proprio: (B, P) raw, at t
    instructions: B strings
    context_frame: (B, C, H, W), the tokenizer's context: frame t, or an earlier one (`context_lookback`)
    key_position: (B, min(3, P)) hand position [m] at the next change of the intended gripper command, or at the
        episode's end
    index: (B, 2) episode number and t
    motion: (B, P) raw, what proprio has changed by since t-1; 0 at an episode's start
    proprio_after: (B, T, P) raw, t+1 .. t+T; the last one recorded again beyond the episode's end
    """

    frames: Tensor
    actions: Tensor
    intended: Tensor
    proprio: Tensor
    instructions: list[str]
    context_frame: Tensor
    key_position: Tensor
    index: Tensor
    motion: Tensor
    proprio_after: Tensor

    @property
    def robot(self) -> RobotState:
        """Where the robots are at t."""
        return RobotState(self.proprio, self.motion)

    def to(self, device: str | torch.device) -> "Batch":
        """Move the tensors to a device."""
        return Batch(*(v.to(device) if isinstance(v, Tensor) else v for v in self))

    def rows(self, rows: slice) -> "Batch":
        """Select some of the windows."""
        return Batch(*(v[rows] for v in self))


class WindowSampler:
    """Sampler of windows, uniform over all possible starts in all episodes; but failures make up half of them at most.

    A failed attempt often goes on for long, with frames like those before, and among them the few in which something is
    grasped or carried would hardly be seen.

    A batch is a pure function of its seed, so a resumed run sees the same batches as an uninterrupted one.

    Args:
        episodes: episodes of one split.
        num_frames: L. Windows lie within their episode; shorter episodes are left out, with a warning that names one.
        chunk: T. Actions beyond the episode's end are padded: no motion, the last gripper command or target.
        context_lookback: the context frame is sampled from up to this many frames before the segment (RLVR-World: 15);
            0: it is the segment's first frame; None: that or any earlier frame of the episode; -1: the episode's first.
        num_workers: threads that decode images from disk and prefetch the next batch; 0 decodes in the caller, None
            uses half of the machine's cores, at most four. The batches do not depend on it.

    Raises:
        ValueError: no episodes, no episode that is long enough, or episodes that differ in image size.
    """

    def __init__(
        self,
        episodes: Sequence[Episode],
        num_frames: int = 9,
        chunk: int = 8,
        context_lookback: int | None = 0,
        num_workers: int | None = None,
    ) -> None:
        if not episodes:
            raise ValueError("no episodes to draw windows from: this split is empty; collect more, or split otherwise")
        sizes = {e.images.shape[1:3] for e in episodes}
        if len(sizes) > 1:
            raise ValueError(f"episodes differ in image size: {sorted(sizes)}; collect them at one size")
        self.episodes, self.num_frames, self.chunk = list(episodes), num_frames, chunk
        self.context_lookback = context_lookback
        counts = [max(0, len(episode) - num_frames + 1) for episode in self.episodes]
        if not any(counts):
            longest = max(episodes, key=len)
            raise ValueError(
                f"no episode has the {num_frames} frames of a window; the longest has {len(longest)}, {longest.name}"
            )
        if short := [e.name for e in self.episodes if len(e) < num_frames]:
            warnings.warn(
                f"{len(short)} of {len(self.episodes)} episodes are shorter than a window of {num_frames} frames and "
                f"are left out, first {short[0]}",
                stacklevel=2,
            )
        times = np.concatenate([np.arange(count) for count in counts])
        self.starts = np.stack([np.repeat(np.arange(len(counts)), counts), times], axis=1)  # (N, 2)
        failed = np.repeat([not episode.success for episode in self.episodes], counts)
        mostly = len(failed) / 2 < failed.sum() < len(failed)
        self._halves = (np.flatnonzero(~failed), np.flatnonzero(failed)) if mostly else ()
        if num_workers is None:
            num_workers = min(4, max(1, (os.cpu_count() or 1) // 2))
        self.num_workers = num_workers if any(isinstance(e.images, Frames) for e in episodes) else 0
        self._pool: ThreadPoolExecutor | None = None
        self._ahead: dict[tuple, list[Future]] = {}  # prefetched batches, by the arguments of `batch`
        self.key_positions = [_key_positions(e) for e in self.episodes]

    def __len__(self) -> int:
        return len(self.starts)

    def batch(
        self, batch_size: int, *seed: int, part: tuple[int, int] = (0, 1), device: str | torch.device = "cpu"
    ) -> Batch:
        """Sample a batch that depends on `seed` alone, by convention (seed, step).

        Args:
            batch_size: windows over all processes.
            seed: integers. Worker threads prefetch the next batch, that of the last integer plus 1.
            part: (index, count): return this contiguous share of the batch, so that a run does not depend on the number
                of processes or micro-batches.
            device: of the tensors. Images travel there as bytes, and become floats there.
        """
        starts, lookback = self._sample(batch_size, seed, part)
        if not self.num_workers:
            return self._collate(starts, self._read(starts, lookback), device)
        key = (batch_size, seed, part)
        waiting = self._ahead.pop(key, None) or self._decode(starts, lookback)
        while len(self._ahead) >= max(2, part[1]):  # prefetched, but never requested
            for future in self._ahead.pop(next(iter(self._ahead))):
                future.cancel()
        following = (batch_size, (*seed[:-1], seed[-1] + 1), part) if seed else None
        if following and following not in self._ahead:
            self._ahead[following] = self._decode(*self._sample(*following))
        images = [images for future in waiting for images in future.result()]
        return self._collate(starts, images, device)

    def names(self, batch_size: int, *seed: int) -> list[str]:
        """Return the names of the episodes in `batch(batch_size, *seed)`, each once, in the order of its rows."""
        starts, _ = self._sample(batch_size, seed, (0, 1))
        return list(dict.fromkeys(self.episodes[i].name for i, _ in starts))

    def _sample(self, batch_size: int, seed: tuple[int, ...], part: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
        """Sample starts (B, 2) and lookbacks (B,) in [0, 1) of a share of a batch."""
        rng = numpy_generator("windows", *seed)
        picks, lookback = rng.integers(len(self.starts), size=batch_size), rng.random(batch_size)
        if self._halves:
            successes, failures = (half[rng.integers(len(half), size=batch_size)] for half in self._halves)
            picks = np.where(rng.random(batch_size) < 0.5, successes, failures)
        share = batch_size // part[1]
        rows = slice(part[0] * share, (part[0] + 1) * share)
        return self.starts[picks[rows]], lookback[rows]

    def _decode(self, starts: np.ndarray, lookback: np.ndarray) -> list[Future]:
        self._pool = self._pool or ThreadPoolExecutor(self.num_workers, "windows")
        shares = np.array_split(np.arange(len(starts)), self.num_workers)
        return [self._pool.submit(self._read, starts[rows], lookback[rows]) for rows in shares if len(rows)]

    def spread(self, count: int) -> Batch:
        """Return `count` evenly spaced windows, the same at every call, for validation."""
        picks = np.linspace(0, len(self.starts) - 1, min(count, len(self.starts))).round().astype(int)
        return self.windows(self.starts[picks], numpy_generator("context frames").random(len(picks)))

    def sample_frames(self, count: int = 256) -> Tensor:
        """Return `count` evenly spaced frames, the first of their windows, or all such frames: (N, C, H, W)."""
        picks = np.linspace(0, len(self.starts) - 1, min(count, len(self.starts))).round().astype(int)
        return to_floats(np.stack([self.episodes[i].images[t] for i, t in self.starts[picks]]))

    def windows(self, starts: np.ndarray, lookback: np.ndarray | None = None) -> Batch:
        """Return the windows at `starts`.

        Args:
            starts: (B, 2), rows of episode number and first frame t.
            lookback: (B,) in [0, 1), position of the context frame among the earlier frames; None = frame t.
        """
        return self._collate(starts, self._read(starts, lookback))

    def _read(self, starts: np.ndarray, lookback: np.ndarray | None) -> list[tuple[np.ndarray, np.ndarray]]:
        backs = [None] * len(starts) if lookback is None else lookback
        return [self._read_window(int(i), int(t), back) for (i, t), back in zip(starts, backs)]

    def _read_window(self, i: int, t: int, lookback: float | None) -> tuple[np.ndarray, np.ndarray]:
        """Read the frames (L, H, W, C) of a window, and its context frame (H, W, C)."""
        images = self.episodes[i].images
        frames = images[t : t + self.num_frames]
        if lookback is None:
            return frames, frames[0]
        if self.context_lookback == -1:
            return frames, images[0]
        if self.context_lookback is None:
            return frames, images[int(lookback * (t + 1))]  # 0..t
        back = min(t, self.context_lookback)
        return frames, images[t - 1 - int(lookback * back)] if back else frames[0]

    def _collate(
        self, starts: np.ndarray, images: Sequence[tuple[np.ndarray, np.ndarray]], device: str | torch.device = "cpu"
    ) -> Batch:
        actions, intended, proprio, motion, after, keys = [], [], [], [], [], []
        for i, t in starts:
            episode = self.episodes[i]
            actions.append(_padded(episode.actions, t, self.chunk, episode.repeated))
            intended.append(_padded(episode.intended, t, self.chunk, episode.repeated))
            proprio.append(episode.proprio[t])
            motion.append(episode.proprio[t] - episode.proprio[max(t - 1, 0)])
            after.append(episode.proprio[np.minimum(np.arange(t + 1, t + 1 + self.chunk), len(episode) - 1)])
            keys.append(self.key_positions[i][t])
        frames, contexts = zip(*images)
        return Batch(
            frames=to_floats(np.stack(frames), device),
            actions=torch.from_numpy(np.stack(actions)),
            intended=torch.from_numpy(np.stack(intended)),
            proprio=torch.from_numpy(np.stack(proprio)),
            instructions=[self.episodes[i].instruction for i, _ in starts],
            context_frame=to_floats(np.stack(contexts), device),
            key_position=torch.from_numpy(np.stack(keys)),
            index=torch.from_numpy(np.asarray(starts)),
            motion=torch.from_numpy(np.stack(motion)),
            proprio_after=torch.from_numpy(np.stack(after)),
        ).to(device)


def pick_frames(batch: Batch, count: int, batch_size: int, part: tuple[int, int], *seed: int) -> Tensor:
    """Pick `count` random frames of each segment, in order of time.

    Args:
        batch: segments of this share, L frames each.
        count: frames to keep.
        batch_size: segments of all shares; picks are sampled for all of them, so they do not depend on the shares.
        part: (index, count) of this share.
        seed: integers.

    Returns:
        (B, count, C, H, W).
    """
    segments, length = batch.frames.shape[:2]
    if count >= length:
        return batch.frames
    order = torch.rand(batch_size, length, generator=generator("cpu", "frames", *seed)).argsort(dim=1)
    picks = order[part[0] * segments : (part[0] + 1) * segments, :count].sort(dim=1).values  # (B, count)
    return batch.frames[torch.arange(segments)[:, None], picks]


def _padded(actions: np.ndarray, start: int, chunk: int, repeated: np.ndarray) -> np.ndarray:
    """Return (chunk, A) actions from `start`, padded with the last value where `repeated`, with no motion elsewhere."""
    rows = actions[start : start + chunk]
    if len(rows) == chunk:
        return rows
    padding = np.repeat(actions[-1:], chunk - len(rows), axis=0)
    padding[:, ~repeated] = 0
    return np.concatenate([rows, padding])


def _key_positions(episode: Episode) -> np.ndarray:
    """Return (T, min(3, P)): the hand position at the next change of the intended gripper command, or at the end.

    The first three proprio dimensions are taken as the hand position, for any robot.
    """
    closed = episode.intended[:, list(episode.grippers)] > 0  # (T, G)
    events = np.append(1 + np.flatnonzero((closed[1:] != closed[:-1]).any(1)), len(episode) - 1)
    following = np.searchsorted(events, np.arange(len(episode)), side="right").clip(max=len(events) - 1)  # after t
    return episode.proprio[events[following], :3].astype(np.float32)
