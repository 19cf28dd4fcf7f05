"""Whole episodes in imagination: recorded actions are played from the first frame on, and compared with what happened.

Not in the paper, whose rollouts end after one chunk. The first frame of an episode is the context of its whole
imagination (`WorldModel.rollout`). The baseline is the first frame, copied.

Shapes: T actions, C, H, W image size, K chunks of an episode.
"""

import math
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from vlarft.data.episode import Episode
from vlarft.metrics import PerceptualDistance, moving_mask, mse, ssim
from vlarft.statistics import Interval, mean_interval
from vlarft.world_model import WorldModel

MEANS = ("mse", "psnr", "ssim", "perceptual")  # of frames


class ImaginedEpisode(NamedTuple):
    """An episode as it happened and as it was imagined: frames 0..T of both, (T + 1, C, H, W) in [0, 1], on the CPU.

    number: its place in the sequence of episodes that were given. Frame 0 is the same in both.
    """

    number: int
    true: Tensor
    imagined: Tensor


@torch.no_grad()
def imagine_episodes(
    model: WorldModel,
    episodes: Sequence[Episode],
    *,
    autocast: AbstractContextManager,
    batch_size: int = 16,
    generator: torch.Generator | None = None,
    greedy: bool = True,
    temperature: float = 1.0,
    top_p: float = 0.8,
) -> Iterator[ImaginedEpisode]:
    """Play the recorded actions of whole episodes in imagination, from the first frame on.

    Args:
        model: frozen.
        episodes: of two frames or more.
        autocast: context for the model's forwards.
        batch_size: episodes imagined at once, those of similar length together.
        generator, greedy, temperature, top_p: as in `WorldModel.rollout`.

    Yields:
        The imagined episodes, in the order of their length.
    """
    device = next(model.parameters()).device
    order = sorted(range(len(episodes)), key=lambda i: len(episodes[i]))
    for first in range(0, len(order), batch_size):
        numbers = order[first : first + batch_size]
        actions = [torch.from_numpy(episodes[i].actions[:-1]) for i in numbers]  # the last one leads out of the episode
        steps = max(len(rows) for rows in actions)
        # what is imagined after the end of a shorter episode is thrown away
        padded = torch.stack([F.pad(rows, (0, 0, 0, steps - len(rows))) for rows in actions])[:, None]  # (S, 1, T, A)
        true = [_frames(episodes[i]) for i in numbers]
        start = torch.stack([frames[0] for frames in true]).to(device)
        parts = [start[:, None].cpu()]
        for chunk in padded.to(device).split(model.cfg.chunk, dim=2):  # one at a time, to bound memory
            with autocast:
                rollout = model.rollout(
                    start, chunk, greedy=greedy, temperature=temperature, top_p=top_p, generator=generator
                )
            start = rollout.state
            parts.append(rollout.frames[:, 0].cpu())
        for number, frames, imagined in zip(numbers, true, torch.cat(parts, dim=1), strict=True):
            yield ImaginedEpisode(number, frames, imagined[: len(frames)])


def _frames(episode: Episode) -> Tensor:
    """Return all frames of an episode, (T + 1, C, H, W) in [0, 1]."""
    return torch.from_numpy(episode.images[:]).permute(0, 3, 1, 2).float() / 255


def chunk_sums(episode: ImaginedEpisode, chunk: int, distance: PerceptualDistance) -> Tensor:
    """Sum metrics over the frames of each chunk, of the imagined frames and of copies of the first: (2, 9, K) float64.

    Rows: the four of `MEANS`; squared error on the pixels that move, and their number; absolute error on those that
    stand still for the whole episode, and their number; frames. A pixel moves where it differs from the first frame.
    """
    true = episode.true[1:]  # (T, C, H, W)
    moving = moving_mask(true, episode.true[0])  # (T, 1, H, W)
    still = ~moving.any(dim=0, keepdim=True).expand_as(moving)
    out = []
    for frames in (episode.imagined[1:], episode.true[:1].expand_as(true)):
        difference, channels = frames - true, true.shape[1]
        error = mse(frames, true)  # (T,)
        device = next(iter(distance.buffers()), true).device
        rows = [error, -10 * error.clamp_min(1e-10).log10(), ssim(frames, true)]
        rows.append(distance(frames.to(device), true.to(device)).cpu())
        rows += [(difference.square() * moving).sum((1, 2, 3)), moving.sum((1, 2, 3)) * channels]
        rows += [(difference.abs() * still).sum((1, 2, 3)), still.sum((1, 2, 3)) * channels, torch.ones(len(true))]
        sums = torch.stack([row.double() for row in rows])  # (9, T)
        out.append(F.pad(sums, (0, -len(true) % chunk)).unflatten(1, (-1, chunk)).sum(-1))
    return torch.stack(out)


def means(sums: Tensor) -> dict[str, Tensor]:
    """Convert sums of `chunk_sums` (9, ...) to metrics (...): PSNRs in dB; nan where there is nothing to measure."""
    out = {name: row / sums[8] for name, row in zip(MEANS, sums, strict=False)}
    out["psnr_moving"] = -10 * (sums[4] / sums[5]).clamp_min(1e-10).log10()
    out["still_error"] = sums[6] / sums[7]
    return out


def summarise_episodes(sums: Tensor) -> dict:
    """Summarise whole episodes.

    Args:
        sums: (E, 2, 9, K), `chunk_sums` of E episodes, zero after the end of an episode.

    Returns:
        "chunks": the number of episodes that reach each chunk, and for "imagined" and "copy" each metric per chunk,
        over all these episodes' frames. "last_chunk": for "imagined", "copy" and their "difference" each metric of an
        episode's own last chunk, a mean over episodes with a 95 % interval.
    """
    reached = sums[:, 0, 8] > 0  # (E, K)
    rows = torch.arange(len(sums))
    last = sums[rows, :, :, reached.sum(1) - 1]  # (E, 2, 9)
    methods = ("imagined", "copy")
    found = {name: means(last[:, i].T) for i, name in enumerate(methods)}  # metric -> (E,)
    found["difference"] = {key: value - found["copy"][key] for key, value in found["imagined"].items()}
    pooled = {name: means(sums[:, i].sum(0)) for i, name in enumerate(methods)}
    return {
        "chunks": {
            "episodes": reached.sum(0).tolist(),
            **{name: {key: _numbers(value) for key, value in values.items()} for name, values in pooled.items()},
        },
        "last_chunk": {
            name: {key: _interval(value)._asdict() for key, value in values.items()} for name, values in found.items()
        },
    }


def _numbers(values: Tensor) -> list[float | None]:
    return [None if math.isnan(v) else v for v in values.tolist()]


def _interval(values: Tensor) -> Interval:
    return mean_interval(values[~values.isnan()].tolist())
