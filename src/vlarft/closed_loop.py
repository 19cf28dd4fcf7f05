"""Whole episodes of the stochastic policy in groups from the same start, for reinforcement learning by outcome.

Not in the paper, whose rollouts are one chunk long. What the policy acts in is a `World`: a simulator
(sim/simulated_world.py), or whatever else answers a chunk of actions by the observations after it.

Shapes: S starts, G episodes of each (a group), E = S * G episodes, start-major; M chunks of all episodes, B of them
played at once, N context tokens, D width, P proprio dim, K flow steps, T chunk steps, A action dim.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from vlarft.flow import sample_chain
from vlarft.policy import VLAPolicy


class Answer(NamedTuple):
    """What a world shows after a chunk of actions of B episodes.

    observations: B, see `VLAPolicy.observe`.
    success: (B,) bool, solved at one of the steps.
    steps: (B,) int64, the actions that were played: an episode ends with the first success, or at its horizon.
    done: (B,) bool, whether the episode has ended.
    """

    observations: Sequence[Mapping[str, Any]]
    success: Tensor
    steps: Tensor
    done: Tensor


class World(Protocol):
    """Plays the episodes of one batch of starts at a time; `names` are the starts', for error messages."""

    names: Sequence[str]

    def begin(self, group: int, *numbers: int) -> Sequence[Mapping[str, Any]]:
        """Put `group` episodes at each of S starts, which depend on `numbers` alone; return E first observations."""
        ...

    def step(self, episodes: Sequence[int], actions: Tensor) -> Answer:
        """Play a chunk (B, T, A) of raw actions of the episodes of these numbers, 0..E - 1, none of which has ended."""
        ...

    def close(self) -> None:
        """Free what it holds."""
        ...


class Attempts(NamedTuple):
    """Episodes of one batch as their chunks, and their outcomes; tensors on the policy's device.

    episode: (M,) int64, 0..E - 1
    context: (M, N, D), Eq. (1)
    proprio: (M, P), raw
    x: (M, K + 1, T, A), the chains, from noise to normalised actions
    log_prob: (M, K, T, A), log-densities of the chains' steps under the policy that sampled them
    played: (M, T) bool, False for the actions after the episode's end
    success: (S, G) bool
    steps: (S, G) int64, actions of the episodes
    """

    episode: Tensor
    context: Tensor
    proprio: Tensor
    x: Tensor
    log_prob: Tensor
    played: Tensor
    success: Tensor
    steps: Tensor

    def rows(self, rows: Tensor) -> "Attempts":
        """Take some of the chunks."""
        return Attempts(*(value[rows] for value in self[:6]), self.success, self.steps)


@torch.no_grad()
def play(
    policy: VLAPolicy,
    world: World,
    group: int,
    numbers: Sequence[int],
    stream: Callable[[int], torch.Generator],
    *,
    from_zero: bool = False,
    bf16: bool = False,
) -> Attempts:
    """Play a group of episodes from each start with the stochastic policy, all of them side by side.

    Args:
        policy: with its sigma net, in eval mode.
        world: what it acts in.
        group: G.
        numbers: what the starts depend on, for `World.begin`.
        stream: chunk number -> generator of all episodes' noise, so that an episode's noise does not depend on which
            others have ended.
        from_zero: begin every chunk at x_0 = 0; the noise of the flow's steps is sampled all the same.
        bf16: encode the observations in bfloat16.
    """
    flow, device = policy.cfg.flow, policy.device
    observations = world.begin(group, *numbers)
    count = len(observations)  # E
    active, rows = list(range(count)), []
    success, steps = torch.zeros(count, dtype=torch.bool), torch.zeros(count, dtype=torch.int64)
    while active:
        inputs = policy.observe(observations)
        with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
            context = policy.encode(inputs.images, inputs.instructions).float()  # Eq. (1): (B, N, D)
        # 1 + K: x_0 and the noise of the K steps
        shape = count, 1 + flow.num_steps, flow.chunk, flow.action_dim
        noise = torch.randn(shape, generator=stream(len(rows)), device=device)[active]
        start = torch.zeros_like(noise[:, 0]) if from_zero else noise[:, 0]
        cond = policy.condition(context, inputs.proprio)
        chain = sample_chain(policy.head, policy.sigma_net, cond, noise=start, step_noise=noise[:, 1:])
        answer = world.step(active, policy.normalizer.decode_actions(chain.x[:, -1]))  # x_K in raw units
        played = torch.arange(flow.chunk) < answer.steps[:, None]  # (B, T)
        episode = torch.tensor(active)
        rows.append((episode.to(device), context, inputs.proprio, *chain, played.to(device)))
        success[episode], steps[episode] = answer.success, steps[episode] + answer.steps
        going = [i for i, done in enumerate(answer.done.tolist()) if not done]
        active, observations = [active[i] for i in going], [answer.observations[i] for i in going]
    columns = [torch.cat(column) for column in zip(*rows, strict=True)]
    return Attempts(*columns, *(value.view(-1, group).to(device) for value in (success, steps)))


def action_weights(attempts: Attempts, advantage: Tensor) -> Tensor:
    """Weigh every played action by its episode's advantage over the episode's length; 0 after its end.

    So each episode counts the same, however long it is. The weights are a mean over the episodes of groups that have
    both outcomes: the others have no advantage, and do not make the update smaller.

    Args:
        attempts: of E episodes.
        advantage: (S, G), 0 in groups of one outcome.

    Returns:
        (M, T) float32, weights of the actions' ratios in the objective, which is their sum.
    """
    mixed = (attempts.success != attempts.success[:, :1]).any(1)  # (S,)
    episodes = int(mixed.sum()) * attempts.success.shape[1]
    weight = (advantage / attempts.steps / max(episodes, 1)).flatten()[attempts.episode]  # (M,)
    return weight[:, None] * attempts.played
