"""Verified rewards: rewards that need demonstrations only (Eq. 11 and Table 4).

    R1  action deviation        policy's actions        against  the dataset's actions
    R2  image consistency       policy's imagination    against  the dataset's frames
    R3  model-based, default    policy's imagination    against  the imagination of the dataset's actions
    divergence  not in the paper: as R3, but compares the distributions that frames are drawn from, see
                `WorldModel.divergence`

Shapes: S starts, G rollouts a start, T chunk steps, A action dim, (C, H, W) frame.
"""

from typing import Literal, NamedTuple

import torch
from torch import Tensor

from vlarft.metrics import PerceptualDistance
from vlarft.policy import VLAPolicy
from vlarft.run.memory import rows_at_once
from vlarft.world_model import History, WorldModel

# simulator is `sim.replay.SimulatorReward`, not a verified reward
RewardKind = Literal["r1", "r2", "r3", "divergence", "simulator"]
OverFrames = Literal["sum", "mean", "last", "discounted"]
Imagination = Literal["sample", "common", "greedy"]


class Reward(NamedTuple):
    """Rewards of S starts x G rollouts.

    reward: (S, G) float32
    per_frame: (S, G, T) its terms before the reduction over frames (over chunk steps, for R1)
    frames: (S, G, T, C, H, W) what the world model imagined from the policy's actions, None for R1
    reference: (S, T, C, H, W) what they were compared with, None for R1
    """

    reward: Tensor
    per_frame: Tensor
    frames: Tensor | None
    reference: Tensor | None


def action_reward(actions: Tensor, reference: Tensor) -> Tensor:
    """R1: negative L1 distance of raw actions.

    Args:
        actions: (S, G, T, A) the policy's.
        reference: (S, T, A) the dataset's.

    Returns:
        (S, G, T), the mean over A.
    """
    return -(actions.float() - reference.float()[:, None]).abs().mean(-1)


def image_reward(
    frames: Tensor,
    reference: Tensor,
    *,
    perceptual: PerceptualDistance | None,
    l1_weight: float = 1.0,
    perceptual_weight: float = 1.0,
) -> Tensor:
    """Eq. (11) before its sum over frames: -(lambda_1 L1 + lambda_lp LPIPS).

    Args:
        frames: (S, G, T, C, H, W) in [0, 1].
        reference: (S, T, C, H, W) in [0, 1].
        perceptual: distance of images, or None to leave the term out; the reference's features are computed once. As
            many images are compared together as `memory.rows_at_once` finds room for.
        l1_weight: lambda_1 of the mean absolute error over C, H and W.
        perceptual_weight: lambda_lp.

    Returns:
        (S, G, T) float32.
    """
    shape = frames.shape[:3]
    frames = frames.transpose(1, 2).flatten(0, 1)  # (S * T, G, C, H, W)
    reference = reference.flatten(0, 1)  # (S * T, C, H, W)
    images = rows_at_once((perceptual or PerceptualDistance("none")).bytes_per_image(reference), frames.device)
    parts = []
    for ours, theirs in zip(*(x.split(max(1, images // shape[1])) for x in (frames, reference)), strict=True):
        ours, theirs = ours.float(), theirs.float()
        total = l1_weight * (ours - theirs[:, None]).abs().mean((-1, -2, -3))  # (n, G)
        if perceptual is not None:
            total = total + perceptual_weight * perceptual.distance_to(ours, perceptual.features(theirs)).float()
        parts.append(total)
    return -torch.cat(parts).unflatten(0, (shape[0], shape[2])).transpose(1, 2)


def weigh_frames(per_frame: Tensor, over: OverFrames, gamma: float = 1.0) -> Tensor:
    """(S, G, T) -> (S, G, T), the terms whose sum over T is `reduce_frames`.

    Raises:
        ValueError: gamma outside (0, 1], or one that the reduction would ignore.
    """
    if not 0 < gamma <= 1:
        raise ValueError(f"gamma must lie in (0, 1], got {gamma}")
    if over != "discounted" and gamma != 1:
        raise ValueError(f"gamma {gamma} is of no use with over_frames={over!r}; choose discounted")
    steps = torch.arange(per_frame.shape[-1], device=per_frame.device)
    if over == "last":
        return torch.where(steps == steps[-1], per_frame, 0.0)
    return per_frame * {"sum": 1.0, "mean": 1 / len(steps), "discounted": gamma**steps}[over]


def reduce_frames(per_frame: Tensor, over: OverFrames, gamma: float = 1.0) -> Tensor:
    """(S, G, T) -> (S, G): the sum over frames of Eq. (11), their mean (the release's), the last frame alone, or
    "discounted", the sum of gamma^t times frame t, t from 0.

    Raises:
        ValueError: as `weigh_frames`.
    """
    return weigh_frames(per_frame, over, gamma).sum(-1)


def check_same_robot(policy: VLAPolicy, world_model: WorldModel) -> None:
    """Refuse a policy and a world model that do not speak of the same robot.

    Raises:
        ValueError: another chunk length, action dim or action range (the message names both values), or a policy whose
            normaliser was never fitted.
    """
    advice = "train both on the same demonstrations with the same settings"
    if not policy.normalizer.fitted:
        raise ValueError(
            "the policy's normaliser was never fitted: its actions have no units; train it with train_sft.py"
        )
    for name, ours, theirs in (
        ("chunk length", policy.cfg.flow.chunk, world_model.cfg.chunk),
        ("action dim", policy.cfg.flow.action_dim, world_model.cfg.action_dim),
    ):
        if ours != theirs:
            raise ValueError(f"{name}: the policy has {ours}, the world model has {theirs}; {advice}")
    low, high = policy.normalizer.action_low, policy.normalizer.action_high  # (A - 1,)
    wm_low, wm_high = world_model.action_bins.low[:-1], world_model.action_bins.high[:-1]  # (A - 1,)
    # the policy's range are quantiles of what the world model saw, so it lies inside but for the demonstrator's noise
    slack = 0.1 * (wm_high - wm_low) + 1e-3
    outside = ((low < wm_low - slack) | (high > wm_high + slack)).nonzero().flatten().tolist()
    if outside:
        i = outside[0]
        raise ValueError(
            f"action ranges differ: in dimension {i} the policy emits [{low[i]:.3g}, {high[i]:.3g}], the world model "
            f"was trained on [{wm_low[i]:.3g}, {wm_high[i]:.3g}]; {advice}"
        )


def mirror(actions: Tensor, reference: Tensor, low: Tensor, high: Tensor) -> Tensor:
    """Chunks on the other side of the dataset's: as far from it, the opposite way. The gripper, last, stays.

    Args:
        actions: (S, G, T, A) raw.
        reference: (S, T, A) raw.
        low, high: (A,) that the result is clipped to.

    Returns:
        (S, G, T, A).
    """
    opposite = torch.minimum(torch.maximum(2 * reference[:, None] - actions, low), high)
    return torch.cat([opposite[..., :-1], actions[..., -1:]], -1)


@torch.no_grad()
def verified_reward(
    kind: RewardKind,
    world_model: WorldModel | None,
    actions: Tensor,
    dataset_actions: Tensor,
    dataset_frames: Tensor,
    *,
    perceptual: PerceptualDistance | None = None,
    l1_weight: float = 1.0,
    perceptual_weight: float = 1.0,
    over_frames: OverFrames = "sum",
    gamma: float = 1.0,
    history: History = "frames",
    imagination: Imagination = "sample",
    temperature: float = 1.0,
    top_p: float = 0.8,
    generator: torch.Generator | None = None,
    part: tuple[int, int] = (0, 1),
    start_frames: Tensor | None = None,
    symmetric: bool = False,
) -> Reward:
    """Play S x G action chunks inside the frozen world model and score them.

    Args:
        kind: "r1", "r2" or "r3" (Table 4), or "divergence".
        world_model: not needed by "r1".
        actions: (S, G, T, A) raw environment actions of the policy.
        dataset_actions: (S, T, A) raw actions of the demonstrations.
        dataset_frames: (S, T + 1, C, H, W) frames of the demonstrations; the first is the start of all rollouts.
        perceptual, l1_weight, perceptual_weight: see `image_reward`.
        over_frames, gamma: see `reduce_frames`.
        history: of "divergence", see `WorldModel.divergence`.
        imagination: "sample" draws every rollout on its own; "common" draws the same random numbers for all members of
            a group and for its reference, which removes most of the sampling noise from R3; "greedy" takes the most
            likely token.
        temperature, top_p: of the sampling.
        generator: of the sampling.
        part: this process's (number, count) of the batch's equal shares; the draws are those of the whole batch.
        start_frames: (S, G, C, H, W), for R3 (S, G + 1, C, H, W) with the reference's last, where the rollouts go on
            from frames of their own (closed-loop imagination); None = dataset_frames[:, 0] for all.
        symmetric: score every chunk by the mean of its own reward and that of its `mirror` image, which is played
            beside it. Not in the paper. A world model answers to a deviation in one direction more than to the opposite
            one, and a policy that is scored so drifts to the side that is seen less; what is left here is how much a
            deviation shows, whichever way it goes.

    Raises:
        ValueError: R2 or R3 without a world model, or no verified reward.
    """
    if symmetric:
        if world_model is None:
            raise ValueError(f"reward {kind} of no world model is as symmetric as it gets: leave symmetric out")
        members, bins = actions.shape[1], world_model.action_bins
        both = torch.cat([actions, mirror(actions, dataset_actions, bins.low, bins.high)], 1)
        if start_frames is not None:
            start_frames = torch.cat([start_frames[:, :members], start_frames], 1)  # R3's reference stays last
        found = verified_reward(
            kind, world_model, both, dataset_actions, dataset_frames, perceptual=perceptual, l1_weight=l1_weight,
            perceptual_weight=perceptual_weight, over_frames=over_frames, gamma=gamma, history=history,
            imagination=imagination, temperature=temperature, top_p=top_p, generator=generator, part=part,
            start_frames=start_frames,
        )  # fmt: skip
        per_frame = (found.per_frame[:, :members] + found.per_frame[:, members:]) / 2
        frames = None if found.frames is None else found.frames[:, :members]
        return Reward(reduce_frames(per_frame, over_frames, gamma), per_frame, frames, found.reference)
    if kind == "simulator":
        raise ValueError("the simulator's reward is not a verified one: see vlarft.sim.replay.SimulatorReward")
    if kind == "r1":
        per_step = action_reward(actions, dataset_actions)
        return Reward(reduce_frames(per_step, over_frames, gamma), per_step, None, None)
    if world_model is None:
        raise ValueError(f"reward {kind} plays actions inside a world model; give one, or choose reward r1")
    if kind == "divergence":
        per_frame = -world_model.divergence(dataset_frames, actions, dataset_actions, history)
        return Reward(reduce_frames(per_frame, over_frames, gamma), per_frame, None, None)
    # R3's reference is one more member of each group: it shares the prefill and, with "common", the random numbers.
    played = torch.cat([actions, dataset_actions[:, None]], 1) if kind == "r3" else actions
    members = played.shape[1]
    if start_frames is None:
        starts, shared_by = dataset_frames[:, 0], 1
    else:  # every member is a start of its own now
        starts, shared_by, played = start_frames.flatten(0, 1), members, played.flatten(0, 1)[:, None]
    rollout = world_model.rollout(
        starts,
        played,
        greedy=imagination == "greedy",
        common_random_numbers=imagination == "common",
        temperature=temperature,
        top_p=top_p,
        generator=generator,
        part=part,
        shared_by=shared_by,
    )
    imagined = rollout.frames if start_frames is None else rollout.frames[:, 0].unflatten(0, (-1, members))
    if kind == "r3":
        frames, reference = imagined[:, :-1], imagined[:, -1]
    else:
        frames, reference = imagined, dataset_frames[:, 1:]
    per_frame = image_reward(
        frames, reference, perceptual=perceptual, l1_weight=l1_weight, perceptual_weight=perceptual_weight
    )
    return Reward(reduce_frames(per_frame, over_frames, gamma), per_frame, frames, reference)
