"""Whole episodes in imagination: the world model replays recorded actions from an episode's first frame to its end.
Not in the paper, whose imaginations are one chunk long. The first frame is the context of all frames to come, and no
later one is shown to the model, so errors add up as they would in an imagined attempt; where poses drive the model, its
robot model predicts them, as there.

Shapes: L frames of an episode, L - 1 actions between them, A action dim, (C, H, W) frame.
"""

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from vlarft.data.episode import Episode, RobotState
from vlarft.run.pixels import to_floats
from vlarft.run.random import generator
from vlarft.world_model import WorldModel


class ImaginedEpisode(NamedTuple):
    """An episode as it was recorded and as it was imagined.

    true, imagined: (L, C, H, W) float32 in [0, 1]; frame 0 is the recorded one in both.
    """

    episode: Episode
    true: Tensor
    imagined: Tensor


def spread_episodes(episodes: Sequence[Episode], count: int) -> list[Episode]:
    """Return `count` episodes, or all if there are fewer, evenly spaced in an order by suite, kind and task.

    Each suite, and each kind of episode in it, gets its share of them. Episodes of a single frame are left out.
    """
    ordered = sorted(
        (e for e in episodes if len(e) > 1), key=lambda e: (e.name.split("/")[0], e.kind, e.instruction, e.name)
    )
    picks = np.linspace(0, len(ordered) - 1, min(count, len(ordered))).round().astype(int)
    return [ordered[i] for i in picks]


def imagined_episodes(
    model: WorldModel,
    episodes: Sequence[Episode],
    *,
    autocast: AbstractContextManager,
    batch_size: int = 16,
    greedy: bool = False,
    temperature: float = 1.0,
    top_p: float = 0.8,
    seed: int = 0,
    recorded_poses: bool = False,
    part: tuple[int, int] = (0, 1),
) -> Iterator[ImaginedEpisode]:
    """Replay episodes in imagination, the shortest first.

    Args:
        model: imagines on the device of its parameters, on which the frames stay.
        episodes: of two frames or more.
        autocast: context for the model's forwards.
        batch_size: episodes imagined at once, which should be of similar lengths: the short ones are padded.
        greedy, temperature, top_p: see `Sampling`.
        seed: seed of sampled imaginations.
        recorded_poses: where poses drive the model, take those that were recorded, to see what predicting them costs.
        part: (index, count): yield this share of the batches, so that an imagination does not depend on the number of
            processes.
    """
    device = next(model.parameters()).device
    by_length = sorted(episodes, key=len)
    batches = [by_length[i : i + batch_size] for i in range(0, len(by_length), batch_size)]
    for number in range(part[0], len(batches), part[1]):
        batch = batches[number]
        first_frames = torch.stack([to_floats(e.images[0], device) for e in batch])  # (S, C, H, W)
        longest = len(batch[-1]) - 1  # actions; the one after the last frame leads to none
        actions = _padded([e.actions[:-1] for e in batch], longest).to(device)  # (S, longest, A)
        robot = after = None
        if recorded_poses:
            after = _padded([e.proprio[1:] for e in batch], longest).to(device)[:, None]  # (S, 1, longest, P)
        else:
            robot = torch.from_numpy(np.stack([e.proprio[0] for e in batch])).to(device)  # (S, P)
            robot = RobotState(robot, torch.zeros_like(robot))  # at rest
        with autocast:
            rollout = model.rollout(
                first_frames,
                actions[:, None],
                robot=robot,
                proprio_after=after,
                greedy=greedy,
                temperature=temperature,
                top_p=top_p,
                generator=generator(device, "whole episodes", seed, number),
            )
        for episode, frames in zip(batch, rollout.frames[:, 0], strict=True):
            true = to_floats(episode.images[:], device)
            yield ImaginedEpisode(episode, true, torch.cat([true[:1], frames[: len(episode) - 1]]))


def _padded(rows: Sequence[np.ndarray], length: int) -> Tensor:
    """Stack rows (n, D) of different lengths: (S, length, D). The last values once more are inside the recorded ranges;
    the frames of these steps are dropped.
    """
    return torch.from_numpy(np.stack([np.pad(r, ((0, length - len(r)), (0, 0)), mode="edge") for r in rows]))
