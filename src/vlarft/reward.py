"""Verified rewards, computed from demonstrations and, but for R1, a world model of them (Eq. 11 and Table 4).

    R1  action deviation        the policy's actions        against  the demonstration's actions
    R2  image consistency       the policy's imagination    against  the demonstration's frames
    R3  model-based, default    the policy's imagination    against  the imagination of the demonstration's actions
    divergence  not in the paper: as R3, but compares the distributions that frame tokens are sampled from, see
                `WorldModel.divergence`

Each is a scorer, a callable `(batch, actions, generator) -> (S, G, T)` with one reward per frame (per action step, for
R1); the reward of a rollout is their sum, Eq. (11). A new reward is one such function, its name in `RewardKind` and a
line of `make_scorer`; `train_rft.load_world_model` knows which rewards do without world model or perceptual distance.
To try one without giving it a name, pass the function to `train_rft.main` as `score`.

The demonstration's actions are the intended ones, before the noise that a scripted demonstrator adds; in data sets that
record one kind only, the executed ones.

Shapes: S starts, G rollouts per start, T chunk steps, A action dim, (C, H, W) frame.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor

from vlarft.data.windows import Batch
from vlarft.metrics import PerceptualDistance
from vlarft.policy import VLAPolicy
from vlarft.run.memory import rows_at_once
from vlarft.world_model import WorldModel

RewardKind = Literal["r1", "r2", "r3", "divergence"]
Imagination = Literal["sample", "common", "greedy"]

# windows of S starts, raw actions (S, G, T, A), source of the imagination's random numbers -> reward (S, G, T), float32
Scorer = Callable[[Batch, Tensor, torch.Generator | None], Tensor]

L1_WEIGHT = 1.0  # lambda_1 of Eq. (11)
PERCEPTUAL_WEIGHT = 1.0  # lambda_lp of Eq. (11)


def action_reward(actions: Tensor, reference: Tensor) -> Tensor:
    """Compute R1, the negative L1 distance of raw actions.

    Args:
        actions: (S, G, T, A) of the policy.
        reference: (S, T, A) of the demonstration.

    Returns:
        (S, G, T), the mean over A.
    """
    return -(actions.float() - reference.float()[:, None]).abs().mean(-1)


def image_reward(frames: Tensor, reference: Tensor, perceptual: PerceptualDistance | None) -> Tensor:
    """Compute Eq. (11) before its sum over frames: -(lambda_1 L1 + lambda_lp LPIPS).

    The features of a reference frame are computed once per group. As many images are compared at a time as
    `memory.rows_at_once` allows.

    Args:
        frames: (S, G, T, C, H, W) in [0, 1].
        reference: (S, T, C, H, W) in [0, 1].
        perceptual: distance of images; None = leave the term out.

    Returns:
        (S, G, T) float32; the L1 term is the mean absolute error over C, H and W.
    """
    shape = frames.shape[:3]
    # a group's images of one frame lie together, so that each target is compared with G consecutive ones
    frames = frames.transpose(1, 2).flatten(0, 1)  # (S * T, G, C, H, W)
    reference = reference.flatten(0, 1)  # (S * T, C, H, W)
    images = rows_at_once((perceptual or PerceptualDistance("none")).bytes_per_image(reference), frames.device)
    parts = []
    for imagined, target in zip(*(x.split(max(1, images // shape[1])) for x in (frames, reference)), strict=True):
        imagined, target = imagined.float(), target.float()
        total = L1_WEIGHT * (imagined - target[:, None]).abs().mean((-1, -2, -3))  # (n, G)
        if perceptual is not None:
            distance = perceptual.distance_to(imagined, perceptual.features(target))
            total = total + PERCEPTUAL_WEIGHT * distance.float()
        parts.append(total)
    return -torch.cat(parts).unflatten(0, (shape[0], shape[2])).transpose(1, 2)  # (S, G, T)


class Imagined(NamedTuple):
    """Frames imagined for the chunks (S, G, T, C, H, W), and the reference to compare them with (S, T, C, H, W)."""

    frames: Tensor
    reference: Tensor


@dataclass(frozen=True)
class ImageScorer:
    """R2 and R3: play the chunks in the world model, Eq. (10), and compare the frames, Eq. (11).

    Args:
        world_model: frozen.
        perceptual: see `image_reward`.
        imagination: "sample" samples every rollout independently; "common" uses the same random numbers for all members
            of a group and for their reference, which removes most of the sampling noise from R3; "greedy" takes the
            most likely token.
        reference: "imagined" is R3, the demonstration's actions played in the same world model; "recorded" is R2, the
            demonstration's frames.
        part: (index, count): the starts are one of `count` equal shares of a larger batch, see
            `token_sampling.Sampling`.
    """

    world_model: WorldModel
    perceptual: PerceptualDistance | None = None
    imagination: Imagination = "sample"
    reference: Literal["imagined", "recorded"] = "imagined"
    part: tuple[int, int] = (0, 1)

    def imagine(self, batch: Batch, actions: Tensor, generator: torch.Generator | None = None) -> Imagined:
        """Imagine the frames of the chunks (S, G, T, A), and of their reference for R3; arguments as for scoring."""
        played = actions
        if self.reference == "imagined":
            # one more member of each group: it shares the prefill and, with "common", the random numbers
            played = torch.cat([actions, batch.intended[:, None]], 1)  # (S, G + 1, T, A)
        frames = self.world_model.rollout(
            batch.frames[:, 0],
            played,
            greedy=self.imagination == "greedy",
            common_random_numbers=self.imagination == "common",
            generator=generator,
            robot=batch.robot,
            part=self.part,
        ).frames
        if self.reference == "imagined":
            return Imagined(frames[:, :-1], frames[:, -1])
        return Imagined(frames, batch.frames[:, 1:])

    def __call__(self, batch: Batch, actions: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Score raw actions (S, G, T, A): (S, G, T)."""
        return image_reward(*self.imagine(batch, actions, generator), self.perceptual)


def make_scorer(
    kind: RewardKind,
    world_model: WorldModel | None = None,
    perceptual: PerceptualDistance | None = None,
    imagination: Imagination = "sample",
    part: tuple[int, int] = (0, 1),
) -> Scorer:
    """Build a verified reward by its name.

    Args:
        kind: see the module's docstring.
        world_model: frozen; R1 needs none.
        perceptual, imagination, part: of R2 and R3, see `ImageScorer`; the other rewards ignore them.

    Raises:
        ValueError: an unknown reward, or no world model for one other than R1.
    """
    if kind not in get_args(RewardKind):
        raise ValueError(f"unknown reward {kind!r}; there are: {', '.join(get_args(RewardKind))}")
    if kind == "r1":
        return lambda batch, actions, generator=None: action_reward(actions, batch.intended)
    if world_model is None:
        raise ValueError(f"reward {kind} plays actions inside a world model; give one, or choose reward r1")
    if kind == "divergence":
        measure = world_model.divergence
        return lambda batch, actions, _=None: -measure(batch.frames, actions, batch.intended, batch.robot)
    reference = {"r2": "recorded", "r3": "imagined"}[kind]
    return ImageScorer(world_model, perceptual, imagination, reference, part)


def check_same_robot(policy: VLAPolicy, world_model: WorldModel, *, closed_loop: bool = False) -> None:
    """Check that a policy and a world model were trained for the same robot.

    Args:
        policy, world_model: the two.
        closed_loop: the policy acts in the world model, and reads the proprio that it predicts.

    Raises:
        ValueError: another chunk length, number of dimensions or action range (the message names both values), a policy
            whose normaliser was never fitted, or a world model for a closed loop that predicts no proprio.
    """
    advice = "train both on the same demonstrations with the same settings"
    ours, cfg = policy.normalizer, world_model.cfg
    if not ours.fitted:
        raise ValueError(
            "the policy's normaliser was never fitted: its actions have no units; train it with train_sft.py"
        )
    if closed_loop and not cfg.proprio_dim:
        raise ValueError(
            "the world model does not predict the robot's proprio, which the policy reads: it is of an older version "
            "or of the public code; train one from scratch with train_wm.py (a refresh, --init, does not add it)"
        )
    sizes = [
        ("chunk length", policy.cfg.flow.chunk, cfg.chunk),
        ("action dim", policy.cfg.flow.action_dim, cfg.action_dim),
    ]
    if cfg.proprio_dim:
        sizes.append(("proprio dim", policy.cfg.flow.proprio_dim, cfg.proprio_dim))
    if cfg.pose_dims:
        sizes.append(("gripper dimensions", ours.gripper_dims, cfg.gripper_dims))
    for name, in_policy, in_model in sizes:
        if in_policy != in_model:
            raise ValueError(f"{name}: the policy has {in_policy}, the world model has {in_model}; {advice}")
    low, high, motion = ours.action_low, ours.action_high, ours.motion
    if cfg.pose_dims:  # their bins say nothing about the range of actions, the robot model's statistics do
        ratios = (high - low) / world_model.robot.action_std[motion]  # of a Gaussian 4.7
        # less where noisy attempts turn the hand and the policy's demonstrations do not: then in some dimensions alone
        spread = ratios.median().item()
        if ratios.max() < 0.4 or not 0.1 < spread < 40:
            raise ValueError(
                f"actions: the policy's range is {spread:.2g} times the standard deviation of those that the world "
                f"model learned from (median; at most {ratios.max():.2g}), 2 to 10 in equal units; {advice}"
            )
        return
    wm_low, wm_high = world_model.action_bins.low[motion], world_model.action_bins.high[motion]  # (A - G,)
    # quantiles of intended actions lie inside the range of the executed ones, up to the demonstrator's noise
    slack = 0.1 * (wm_high - wm_low) + 1e-3
    outside = ((low < wm_low - slack) | (high > wm_high + slack)).nonzero().flatten().tolist()
    if outside:
        i = outside[0]
        raise ValueError(
            f"action ranges differ: in dimension {motion[i]} the policy emits [{low[i]:.3g}, {high[i]:.3g}], the world "
            f"model was trained on [{wm_low[i]:.3g}, {wm_high[i]:.3g}]; {advice}"
        )
