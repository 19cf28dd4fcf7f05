"""A world model as the world of closed-loop reinforcement learning, judged by a success model. Not in the paper.

An imagination starts at the first frame of a recorded episode, which stays the context of all its frames, or later in
a recorded attempt of the policy, where a failure is nearer. After every chunk the policy sees the last imagined frame
and the proprio that the world model predicts. No simulator and no robot is asked for anything.

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
from vlarft.data.episode import Episode, RobotState
from vlarft.run.pixels import to_bytes, to_floats
from vlarft.run.random import generator, numpy_generator
from vlarft.success import Referee, SuccessModel
from vlarft.world_model import WorldModel


class ImaginedWorld:
    """Episodes that a world model imagines, from the first frames of recorded ones.

    Args:
        model: imagines frames and proprio on the device of its parameters.
        judge: decides when an episode has succeeded; on the same device.
        episodes: recorded, which give first frame, proprio and instruction.
        starts: S, of each batch: different episodes, where there are so many.
        horizon: actions after which an episode ends without success.
        camera: the policy's name of the frames.
        late_starts: share of the starts that, where they fall on a failed attempt of a policy, lie at a random frame of
            its first three quarters: one that a better action might still save. The horizon counts from the episode's
            first frame all the same.
        autocast: context for the world model's and the judge's forwards.
        sampling: `greedy`, `temperature`, `top_p`, ... of `WorldModel.rollout`.

    Raises:
        ValueError: no episodes.
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
        late_starts: float = 0.0,
        autocast: AbstractContextManager,
        **sampling: Any,
    ) -> None:
        self.model, self.judge, self.episodes = model, judge, list(episodes)
        self.num_starts, self.horizon, self.camera, self.late_starts = starts, horizon, camera, late_starts
        self.autocast, self.sampling = autocast, sampling
        self.device = next(model.parameters()).device
        self.names: list[str] = []
        if not self.episodes:
            raise ValueError(
                "no episode is left to imagine from: all are held out for the gate; give more with --demos"
            )

    def close(self) -> None:
        """Free nothing."""

    def begin(self, group: int, *numbers: int) -> list[dict[str, Any]]:
        """Put `group` imaginations at each start; the starts depend on `numbers` alone, see `World.begin`."""
        rng = numpy_generator("imagined starts", *numbers)
        count = len(self.episodes)
        rows = np.concatenate([rng.permutation(count) for _ in range(-(-self.num_starts // count))])
        chosen = [self.episodes[row] for row in rows[: self.num_starts]]
        late, where = rng.random((2, self.num_starts))
        frames = [
            int(0.75 * share * min(len(e), self.horizon))
            if e.kind == "policy" and not e.success and number < self.late_starts
            else 0
            for e, number, share in zip(chosen, late, where, strict=True)
        ]
        self.names, self.group, self.numbers, self.chunks = [e.name for e in chosen], group, numbers, 0
        starts = list(zip(chosen, frames, strict=True))
        context = self._stack([e.images[0] for e in chosen])  # (S, H, W, C)
        images = self._stack([e.images[t] for e, t in starts])
        first, now = to_floats(context), to_floats(images)  # (S, C, H, W)
        proprio = self._stack([e.proprio[t] for e, t in starts])  # (S, P)
        motion = proprio - self._stack([e.proprio[max(t - 1, 0)] for e, t in starts])
        with self.autocast:
            self.state = self.model.begin(first, now, RobotState(proprio, motion))
        self.proprio = proprio.repeat_interleave(group, dim=0)  # (E, P)
        self.instructions = [e.instruction for e in chosen for _ in range(group)]
        count = len(self.proprio)
        self.referee = Referee(self.judge, first.repeat_interleave(group, dim=0), self.instructions)
        self.steps = torch.tensor([t for t in frames for _ in range(group)])  # (E,), the recorded ones included
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
        together = self.actions.unflatten(0, (-1, self.group))
        with self.autocast:
            rollout = self.model.rollout(self.state, together, generator=random, **self.sampling)
            frames = rollout.frames.flatten(0, 1)[index].float()  # (B, T, C, H, W)
            first = self.referee.success_at(episodes, frames)  # (B,)
        self.state, self.chunks = rollout.state, self.chunks + 1
        self.proprio = self.state.robot.proprio.flatten(0, 1)  # (E, P)

        left = (self.horizon - self.steps[episodes]).clamp_max(actions.shape[1])  # (B,)
        success = first <= left
        steps = torch.where(success, first, left)
        self.steps[episodes] += steps
        images = to_bytes(frames[:, -1])
        observations = [self._observation(e, images[row]) for row, e in enumerate(episodes)]
        return Answer(observations, success, steps, success | (self.steps[episodes] >= self.horizon))

    def _stack(self, arrays: list[np.ndarray]) -> Tensor:
        return torch.from_numpy(np.stack(arrays)).to(self.device)

    def _observation(self, episode: int, image: Tensor) -> dict[str, Any]:
        return {
            self.camera: image,
            "proprio": self.proprio[episode],
            "instruction": self.instructions[episode],
        }
