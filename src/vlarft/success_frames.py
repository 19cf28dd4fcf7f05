"""The frames that a success model learns from: of whole episodes as recorded, decoded and imagined, with labels.

Not in the paper. The last frames of a success are positive, those shortly before are left out, all others are negative;
a failed episode has negatives only. An imagined version has the true outcome's labels.

Shapes: L frames of an episode, N frames of all, B of a batch, (C, H, W) frame.
"""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from vlarft.data.augment import OFF, augment
from vlarft.data.episode import Episode
from vlarft.imagined_episodes import imagined_episodes
from vlarft.run.random import generator, numpy_generator
from vlarft.world_model import WorldModel

LIGHT = replace(OFF, brightness=0.1, pixel_noise=0.01)
SHIFT = 0.1  # of the image's side: random shifts, without which some dozens of successes are learnt by heart


class Version(NamedTuple):
    """An episode's frames (L, C, H, W), uint8, in one of the versions: real, decoded or imagined."""

    episode: Episode
    kind: str
    frames: Tensor


class FrameTable(NamedTuple):
    """Frames to train on: N of them.

    frames, first_frames: (N, C, H, W) and (episodes, C, H, W) uint8
    episode: (N,) int64, row of `first_frames`
    instructions: of the episodes
    success, progress: (N,) float32, see `SuccessModel.loss`
    """

    frames: Tensor
    first_frames: Tensor
    episode: Tensor
    instructions: list[str]
    success: Tensor
    progress: Tensor

    def batch(self, size: int, seed: int, step: int, device: torch.device) -> tuple:
        """Sample arguments of `SuccessModel.loss`: as many positive frames as others."""
        rng = numpy_generator("success batch", seed, step)
        classes = (np.flatnonzero(self.success == value) for value in (1, 0))
        picks = torch.from_numpy(np.concatenate([rng.choice(rows, size // 2) for rows in classes]))
        episode = self.episode[picks]
        images = torch.stack([self.frames[picks], self.first_frames[episode]], dim=1).to(device).float() / 255
        images = shifted(images, generator(device, "success shifts", seed, step))
        images = augment(images, LIGHT, crop_area=1.0, generator=generator(device, "success colours", seed, step))
        texts = [self.instructions[i] for i in episode.tolist()]
        return images[:, 0], images[:, 1], texts, self.success[picks].to(device), self.progress[picks].to(device)


def shifted(images: Tensor, source: torch.Generator) -> Tensor:
    """Shift the images of each row by the same whole pixels, up to `SHIFT` of their sides; borders are repeated.

    Args:
        images: (B, V, C, H, W).
        source: of the random numbers, on the images' device.
    """
    most = torch.tensor([round(SHIFT * side) for side in images.shape[-2:]], device=images.device)
    moved = torch.rand(len(images), 2, generator=source, device=images.device) * (2 * most + 1)
    rows, columns = (
        (torch.arange(side, device=images.device) + by[:, None] - limit).clamp(0, side - 1)  # (B, H) or (B, W)
        for side, by, limit in zip(images.shape[-2:], moved.long().T, most, strict=True)
    )
    batch = torch.arange(len(images), device=images.device)[:, None, None]
    # indexed dimensions come first: (B, H, W, V, C)
    return images.permute(0, 3, 4, 1, 2)[batch, rows[:, :, None], columns[:, None]].permute(0, 3, 4, 1, 2)


def labels(episode: Episode, positive: int, margin: int) -> tuple[np.ndarray, np.ndarray]:
    """Label an episode's frames.

    Args:
        episode: whose outcome is known.
        positive: last frames of a success that show it.
        margin: frames before these that are left out.

    Returns:
        Success (L,): 1, 0, or NaN for the frames that are left out; and progress (L,) in [0, 1], NaN in a failure.
    """
    steps = np.arange(len(episode))
    if not episode.success:
        return np.zeros(len(steps), np.float32), np.full(len(steps), np.nan, np.float32)
    first = max(len(steps) - positive, 1)  # the first frame is no success
    success = np.where(steps >= first, 1.0, np.where(steps >= first - margin, np.nan, 0.0))
    success[0] = 0
    return success.astype(np.float32), np.minimum(steps / first, 1).astype(np.float32)


def versions(
    episodes: Sequence[Episode], model: WorldModel | None, autocast: AbstractContextManager, seed: int = 0
) -> Iterator[Version]:
    """Yield every episode as it was recorded and, with a world model, decoded and imagined."""
    for episode in episodes:
        frames = torch.from_numpy(np.ascontiguousarray(episode.images[:])).permute(0, 3, 1, 2)
        yield Version(episode, "real", frames)
        if model is not None:
            yield Version(episode, "decoded", to_uint8(decoded(model, frames)))
    if model is not None:
        yield from imagined(episodes, model, autocast, seed)


def imagined(
    episodes: Sequence[Episode], model: WorldModel, autocast: AbstractContextManager, seed: int = 0
) -> Iterator[Version]:
    """Yield every episode as reinforcement learning imagines it by default: greedily, with predicted poses."""
    options = {"autocast": autocast, "greedy": True, "seed": seed}
    for found in imagined_episodes(model, episodes, **options):
        yield Version(found.episode, "imagined", to_uint8(found.imagined))


@torch.no_grad()
def decoded(model: WorldModel, frames: Tensor, at_once: int = 64) -> Tensor:
    """Encode and decode an episode's frames (L, C, H, W), uint8, with its first frame as context."""
    images = frames.to(next(model.parameters()).device).float() / 255
    context = model.tokenizer.encode_context(images[:1])
    parts = []
    for part in images.split(at_once):
        tokens = model.tokenizer.encode_future(part[None], context)  # (1, L, Nf)
        parts.append(model.tokenizer.decode(tokens[:, None], context)[0, 0])
    return torch.cat(parts)


def to_uint8(frames: Tensor) -> Tensor:
    """Convert floats in [0, 1] to uint8 on the CPU."""
    return (frames.float().clamp(0, 1) * 255).round().to(torch.uint8).cpu()


def frame_table(found: Iterable[Version], *, positive: int, margin: int, others: int, seed: int) -> FrameTable:
    """Choose each episode's frames, the same in all its versions.

    Args:
        found: versions of episodes, the real one of each first.
        positive, margin: see `labels`.
        others: frames of each episode beside the positive ones.
        seed: of their choice.
    """
    rows: dict[str, int] = {}
    columns: list[tuple] = []
    first_frames, instructions = [], []
    for episode, _, frames in found:
        if episode.name not in rows:  # the real version comes first
            rows[episode.name] = len(rows)
            first_frames.append(frames[0].clone())  # a view would keep the whole episode
            instructions.append(episode.instruction)
        success, progress = labels(episode, positive, margin)
        rng = numpy_generator("success frames", seed, rows[episode.name])
        negative = np.flatnonzero(success == 0)
        picks = np.concatenate(
            [np.flatnonzero(success == 1), rng.choice(negative, min(others, len(negative)), replace=False)]
        )
        row = torch.full((len(picks),), rows[episode.name])
        columns.append((frames[picks], row, torch.from_numpy(success[picks]), torch.from_numpy(progress[picks])))
    frames, row, success, progress = (torch.cat(column) for column in zip(*columns, strict=True))
    return FrameTable(frames, torch.stack(first_frames), row, instructions, success, progress)


def replayed(
    episodes: Sequence[Episode], model: WorldModel | None, autocast: AbstractContextManager, seed: int = 0
) -> list[Version]:
    """Return whole episodes as recorded and, with a world model, as imagined."""
    found = versions(episodes, None, autocast)
    return [*found, *(() if model is None else imagined(episodes, model, autocast, seed))]
