"""Choose at test time: several chunks of the same policy, imagined, and the one that ends best. Not in the paper.

The flow head makes a chunk from x_0, so that different x_0 give different chunks, all of them like the demonstrations.
Searching over x_0 keeps the choice among actions that the policy knows; searching over actions does not (LeWAM).

Shapes: B observations, N candidates for each, T chunk steps, A action dim, (C, H, W) frame.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from vlarft.data.episode import RobotState
from vlarft.flow import sample_ode
from vlarft.policy import VLAPolicy
from vlarft.reward import check_same_robot
from vlarft.run.pixels import to_floats
from vlarft.success import SuccessModel
from vlarft.world_model import WorldModel


class Plan(NamedTuple):
    """The chosen chunks (B, T, A), raw; which candidate each is, (B,) int64; and all scores (B, N)."""

    actions: Tensor
    choice: Tensor
    scores: Tensor


class Planner:
    """Imagines candidate chunks, each followed by chunks from x_0 = 0, and scores what they lead to.

    Args:
        policy: of one camera, in eval mode.
        model: imagines, from greedy tokens; all three on one device.
        judge: scores.
        chunks: chunks imagined ahead, the candidate included.

    Raises:
        ValueError: no chunk, a policy of several cameras, or models of another robot.
    """

    def __init__(self, policy: VLAPolicy, model: WorldModel, judge: SuccessModel, chunks: int = 2) -> None:
        if chunks < 1:
            raise ValueError(f"a plan of {chunks} chunks looks at nothing: give at least 1")
        if len(policy.cfg.cameras) > 1:
            raise ValueError(f"the policy sees {len(policy.cfg.cameras)} cameras, a world model imagines one")
        check_same_robot(policy, model, closed_loop=True)
        self.policy, self.model, self.judge, self.chunks = policy, model, judge, chunks

    @torch.no_grad()
    def choose(
        self,
        observations: Sequence[Mapping[str, Any]],
        first_frames: Tensor,
        noise: Tensor,
        num_steps: int = 10,
        motion: Tensor | None = None,
    ) -> Plan:
        """Make a chunk from each x_0, imagine them, and choose the best.

        Args:
            observations: B, see `VLAPolicy.observe`; images of the world model's size.
            first_frames: (B, C, H, W) in [0, 1], of their episodes: context of the imagination.
            noise: (B, N, T, A), x_0. Of equal scores the first candidate wins.
            num_steps: Euler steps of the flow.
            motion: (B, P), the last change of the proprio; None = at rest, as when an episode begins.

        Raises:
            ValueError: images of another size than the world model's.
        """
        candidates, camera = noise.shape[1], self.policy.cfg.cameras[0]
        inputs = self.policy.observe(observations)
        actions = self._act(inputs.images, inputs.instructions, inputs.proprio, noise, num_steps)  # (B, N, T, A)
        images = torch.stack([torch.as_tensor(obs[camera]) for obs in observations])
        robot = RobotState(inputs.proprio, torch.zeros_like(inputs.proprio) if motion is None else motion)
        state = self.model.begin(first_frames, to_floats(images, first_frames.device), robot)
        texts = [text for text in inputs.instructions for _ in range(candidates)]
        chunk, frames = actions, []
        for ahead in range(self.chunks):
            if ahead:  # the policy goes on in imagination
                seen = self.policy.preprocess(frames[-1][:, -1].clamp(0, 1))
                still = noise.new_zeros(len(texts), 1, *noise.shape[2:])
                proprio = state.robot.proprio.flatten(0, 1)  # (B * N, P)
                chunk = self._act(seen, texts, proprio, still, num_steps).view_as(actions)
            rollout = self.model.rollout(state, chunk, greedy=True)
            state = rollout.state
            frames.append(rollout.frames.flatten(0, 1).float())  # (B * N, T, C, H, W)
        judged = self.judge.judge(torch.cat(frames, 1), first_frames.repeat_interleave(candidates, dim=0), texts)
        held = judged.success.unfold(1, self.judge.cfg.hold, 1).amin(-1).amax(1)  # (B * N,)
        scores = (held + judged.progress[:, -1]).view(-1, candidates)
        choice = scores.argmax(1)
        return Plan(actions[torch.arange(len(actions)), choice], choice, scores)

    def _act(self, images: Tensor, texts: list[str], proprio: Tensor, noise: Tensor, num_steps: int) -> Tensor:
        """Make chunks (B, N, T, A), raw, from x_0 of the same shape."""
        context = self.policy.encode(images, texts)
        cond = self.policy.head.prepare(context, self.policy.normalizer.encode_proprio(proprio))
        x = sample_ode(self.policy.head, cond.repeat(noise.shape[1]), noise=noise.flatten(0, 1), num_steps=num_steps)
        return self.policy.normalizer.decode_actions(x).view_as(noise)
