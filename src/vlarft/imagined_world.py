"""A world model as the world of closed-loop reinforcement learning, judged by a success model. Not in the paper.

An imagination starts at the first frame of a recorded episode, which stays the context of all its frames. After every
chunk the policy sees the last imagined frame, and a proprio that adds up the robot's motion. No simulator and no robot
is asked for anything.

Shapes: S starts, G episodes of each, E = S * G episodes, start-major, B of them still going, T chunk steps, A action
dim, P proprio dim, (C, H, W) frame.
"""

from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vlarft.closed_loop import Answer
from vlarft.data.episode import Episode
from vlarft.run.random import generator, numpy_generator
from vlarft.success import Referee, SuccessModel
from vlarft.world_model import WorldModel


class ImaginedWorld:
    """Episodes that a world model imagines, from the first frames of recorded ones.

    Args:
        model: imagines on the device of its parameters.
        judge: decides when an episode has succeeded, and predicts the proprio; on the same device.
        episodes: recorded, which give first frame, proprio and instruction.
        starts: S, of each batch.
        horizon: actions after which an episode ends without success.
        camera: the policy's name of the frames.
        autocast: context for the world model's and the judge's forwards.
        sampling: `greedy`, `temperature`, `top_p`, ... of `WorldModel.rollout`.
    """

    def __init__(
        self,
        model: WorldModel,
        judge: SuccessModel,
        episodes: Sequence[Episode],
        *,
        starts: int,
        horizon: int,
        camera: str,
        autocast: AbstractContextManager,
        **sampling: Any,
    ) -> None:
        self.model, self.judge, self.episodes = model, judge, list(episodes)
        self.num_starts, self.horizon, self.camera = starts, horizon, camera
        self.autocast, self.sampling = autocast, sampling
        self.device = next(model.parameters()).device
        self.names: list[str] = []

    def close(self) -> None:
        """Free nothing."""

    def begin(self, group: int, *numbers: int) -> list[dict[str, Any]]:
        """Put `group` imaginations at each start; the starts depend on `numbers` alone, see `World.begin`."""
        rows = numpy_generator("imagined starts", *numbers).integers(len(self.episodes), size=self.num_starts)
        chosen = [self.episodes[row] for row in rows]
        self.names, self.group, self.numbers, self.chunks = [e.name for e in chosen], group, numbers, 0
        images = torch.from_numpy(np.stack([e.images[0] for e in chosen])).to(self.device)  # (S, H, W, C)
        first = images.movedim(-1, 1).float() / 255
        with self.autocast:
            self.state = self.model.begin(first)
        proprio = torch.from_numpy(np.stack([e.proprio[0] for e in chosen])).to(self.device)
        self.proprio = proprio.repeat_interleave(group, dim=0)  # (E, P)
        self.motion = torch.zeros_like(self.proprio)
        self.instructions = [e.instruction for e in chosen for _ in range(group)]
        count = len(self.proprio)
        self.referee = Referee(self.judge, first.repeat_interleave(group, dim=0), self.instructions)
        self.steps = torch.zeros(count, dtype=torch.int64)
        self.actions = None
        return [self._observation(e, images[e // group]) for e in range(count)]

    def step(self, episodes: Sequence[int], actions: Tensor) -> Answer:
        """Imagine a chunk (B, T, A) of each episode, see `World.step`.

        Episodes that have ended are imagined on with their last actions and ignored: groups share their context.
        """
        index = torch.tensor(episodes, device=self.device)
        if self.actions is None:
            self.actions = actions.new_zeros((len(self.proprio), *actions.shape[1:]))
        self.actions[index] = actions
        random = generator(self.device, "imagined frames", *self.numbers, self.chunks)
        with self.autocast:
            rollout = self.model.rollout(
                self.state, self.actions.unflatten(0, (-1, self.group)), generator=random, **self.sampling
            )
            frames = rollout.frames.flatten(0, 1)[index].float()  # (B, T, C, H, W)
            first = self.referee.success_at(episodes, frames)  # (B,)
        self.state, self.chunks = rollout.state, self.chunks + 1
        states, motion = self.judge.robot.rollout(self.proprio[index], self.motion[index], actions)
        self.proprio[index], self.motion[index] = states[:, -1], motion

        left = (self.horizon - self.steps[episodes]).clamp_max(actions.shape[1])  # (B,)
        success = first <= left
        steps = torch.where(success, first, left)
        self.steps[episodes] += steps
        images = (frames[:, -1].clamp(0, 1) * 255).round().to(torch.uint8).movedim(1, -1)
        observations = [self._observation(e, images[row]) for row, e in enumerate(episodes)]
        return Answer(observations, success, steps, success | (self.steps[episodes] >= self.horizon))

    def _observation(self, episode: int, image: Tensor) -> dict[str, Any]:
        return {
            self.camera: image,
            "proprio": self.proprio[episode],
            "instruction": self.instructions[episode],
        }
