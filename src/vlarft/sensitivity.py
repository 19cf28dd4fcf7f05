"""Action sensitivity of a world model: do its rewards rank perturbed action chunks by their true error?

Not in the paper. R3 is only as good as the world model's response to small changes of the actions. This module perturbs
each start's recorded chunk, imagines all chunks, and compares the rewards R3 (imagined against imagined frames) and R2
(imagined against recorded frames) with the action error and, given a simulator, with the chunks' true outcomes.

Shapes: S starts, P perturbed chunks per start, T chunk steps, A action dim, (C, H, W) frame.
"""

from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from vlarft.data.episode import Episode, RobotState
from vlarft.data.windows import Batch
from vlarft.metrics import PerceptualDistance
from vlarft.normalizer import Normalizer, intended_and_proprio
from vlarft.reward import image_reward
from vlarft.run.config import NotNegative, Rows, Whole, opt
from vlarft.run.random import generator
from vlarft.statistics import rank_agreement
from vlarft.tokenizer import FrameTokenizer
from vlarft.world_model import WorldModel


class TrueOutcome(NamedTuple):
    """Outcome of P action chunks in the simulator.

    frames: (P, T, C, H, W) float32 in [0, 1]
    state_error: (P, T) float64, distances of hand, fingers and objects from those of the first chunk, summed [m]
    """

    frames: Tensor
    state_error: Tensor


class Outcomes(Protocol):
    """A simulator that plays chunks from recorded states, such as `vlarft.sim.replay.TabletopOutcomes`."""

    def play(self, episode: Episode, start: int, chunks: np.ndarray) -> TrueOutcome:
        """Play raw chunks (P, T, A), each from the state that the episode recorded at step `start`."""


@dataclass(frozen=True)
class Perturbations:
    """How recorded chunks are perturbed."""

    noise: tuple[NotNegative, ...] = opt(
        (0.05, 0.15, 0.4), "noise sizes, standard deviation in normalised action units"
    )
    draws: Rows = opt(6, "perturbed chunks per noise size and start")
    flips: Whole = opt(3, "perturbed chunks per start whose gripper command is flipped from a random step on")


def half_range(episodes: Sequence[Episode]) -> Tensor:
    """Compute the raw units per normalised one, (A,): half of each action's range in a policy's normaliser.

    It is fitted to the successful expert episodes, or to all if there are none; 1 for grippers, which are not scaled.
    """
    actions, proprio = intended_and_proprio([e for e in episodes if e.success and e.kind == "expert"] or episodes)
    normalizer = Normalizer(actions.shape[1], proprio.shape[1], gripper_dims=episodes[0].grippers)
    return normalizer.fit(actions, proprio).action_unit()


def perturb(
    actions: Tensor,
    how: Perturbations,
    low: Tensor,
    high: Tensor,
    unit: Tensor,
    draws: torch.Generator,
    grippers: Sequence[int],
) -> tuple[Tensor, list[str]]:
    """Perturb recorded chunks, by noise on the motion or by flips of the gripper commands.

    Noise has its size in normalised units, as a policy's exploration has: a dimension that the demonstrations hardly
    use gets hardly any. Gripper commands get none; all chunks stay inside the given ranges.

    Args:
        actions: (S, T, A) raw.
        how: sizes and numbers.
        low, high: (A,) raw ranges, such as the recorded ones or what a policy can do.
        unit: (A,) raw units per normalised one.
        draws: source of the random numbers.
        grippers: dimensions of the gripper commands; if there are none, none are flipped.

    Returns:
        (S, 1 + P, T, A), the recorded chunk first; and P labels.
    """
    starts, steps, dim = actions.shape
    chunks, labels, grippers = [actions], [], list(grippers)
    for size in how.noise:
        for _ in range(how.draws):
            noise = torch.randn(starts, steps, dim, generator=draws) * size * unit
            noise[..., grippers] = 0
            chunks.append((actions + noise).clamp(low, high))
            labels.append(f"noise {size:g}")
    for _ in range(how.flips if grippers else 0):
        since = torch.randint(steps, (starts, 1), generator=draws)
        flipped = torch.arange(steps) >= since  # (S, T)
        chunk = actions.clone()
        mirrored = (low + high)[grippers] - chunk[..., grippers]  # open for close, and close for open
        chunk[..., grippers] = torch.where(flipped[..., None], mirrored, chunk[..., grippers])
        chunks.append(chunk)
        labels.append("gripper flip")
    return torch.stack(chunks, dim=1), labels


def rewards(frames: Tensor, reference: Tensor, distance: PerceptualDistance) -> Tensor:
    """Compute Eq. (11), frames (S, P, T, C, H, W) against (S, T, C, H, W): (S, P) float64, summed over frames."""
    return image_reward(frames, reference, distance).sum(-1).double().cpu()


@torch.no_grad()
def reconstruct(tokenizer: FrameTokenizer, frames: Tensor, context_frame: Tensor) -> Tensor:
    """Encode and decode P futures of one start (P, T, C, H, W), given its context frame (C, H, W); same shape."""
    context = tokenizer.encode_context(context_frame[None])
    tokens = tokenizer.encode_future(frames.flatten(0, 1)[None], context)  # (1, P * T, Nf)
    return tokenizer.decode(tokens, context)[0].unflatten(0, frames.shape[:2])


def agreement(
    score: Tensor, error: Tensor, labels: list[str], unit: Tensor | None = None
) -> dict[str, dict[str, float]]:
    """Measure how a score ranks the error, both (S, P), over all chunks and within each label of three or more; `unit`
    as in `statistics.rank_agreement`.
    """
    groups = {name: [i for i, label in enumerate(labels) if name in ("all", label)] for name in ("all", *labels)}
    return {g: rank_agreement(score[:, c], error[:, c], unit)._asdict() for g, c in groups.items() if len(c) >= 3}


def evaluate_sensitivity(
    model: WorldModel,
    batch: Batch,
    episodes: Sequence[Episode],
    how: Perturbations,
    distance: PerceptualDistance,
    *,
    autocast: AbstractContextManager,
    outcomes: Outcomes | None = None,
    batch_size: int = 16,
    temperature: float = 1.0,
    top_p: float = 0.8,
    seed: int = 0,
) -> dict[str, dict[str, dict[str, dict[str, float]]]]:
    """Measure how well rewards rank chunks by their action error and, if `outcomes` is given, by their true outcome.

    Args:
        model: R2 and R3 are computed in it, with greedy, common-random-number and independently sampled imagination.
        batch: S starts of `episodes`, with the recorded frames and actions.
        episodes: the episodes that `batch.index` numbers.
        how: the perturbations.
        distance: perceptual term of the rewards.
        autocast: context for the model's forwards.
        outcomes: simulator, or None.
        batch_size: starts imagined at a time.
        temperature, top_p: settings of the sampled imaginations.
        seed: seed of perturbations and imaginations.

    Returns:
        `[error][score][label]` -> spearman, standard_error and pair_order, within starts and averaged over them.
        Errors: "action" (L1), "true frames" (the negative reward on the simulator's frames), "true state" [m]. Scores:
        R2 and R3 of each imagination; "true frames" and "action L1", errors as scores; "decoded frames", the
        simulator's frames after the tokenizer, which is R3 with a perfect transformer.
    """
    device = next(model.parameters()).device
    recorded = torch.from_numpy(np.concatenate([e.actions for e in episodes]))
    low, high = recorded.amin(0), recorded.amax(0)
    noise, grippers = generator("cpu", "perturbations", seed), episodes[0].grippers
    chunks, labels = perturb(batch.actions, how, low, high, half_range(episodes), noise, grippers)
    scores: dict[str, list[Tensor]] = {}
    errors: dict[str, list[Tensor]] = {"action": [(chunks[:, 1:] - chunks[:, :1]).abs().mean(dim=(2, 3))]}
    modes = {"greedy": {"greedy": True}, "common": {"common_random_numbers": True}, "independent": {}}
    for i in range(0, len(chunks), batch_size):
        part = slice(i, i + batch_size)
        frames = batch.frames[part].to(device)
        for name, options in modes.items():
            with autocast:
                rollout = model.rollout(
                    batch.context_frame[part].to(device),
                    chunks[part].to(device),
                    first_frame=frames[:, 0],
                    robot=RobotState(*(v[part].to(device) for v in batch.robot)),
                    temperature=temperature,
                    top_p=top_p,
                    generator=generator(device, "imagination", seed, i),
                    **options,
                )
            members, reference = rollout.frames[:, 1:], rollout.frames[:, 0]  # the recorded chunk is the first
            scores.setdefault(f"R3 {name}", []).append(rewards(members, reference, distance))
            scores.setdefault(f"R2 {name}", []).append(rewards(members, frames[:, 1:], distance))
        if outcomes is not None:
            for k in range(i, min(i + batch_size, len(chunks))):
                episode, start = batch.index[k].tolist()
                outcome = outcomes.play(episodes[episode], start, chunks[k].numpy())
                true_frames = outcome.frames.to(device)
                truth = rewards(true_frames[None, 1:], true_frames[None, 0], distance)
                scores.setdefault("true frames", []).append(truth)
                with autocast:
                    decoded = reconstruct(model.tokenizer, true_frames, batch.context_frame[k].to(device))
                scores.setdefault("decoded frames", []).append(rewards(decoded[None, 1:], decoded[None, 0], distance))
                errors.setdefault("true frames", []).append(-truth)
                errors.setdefault("true state", []).append(outcome.state_error[None, 1:].mean(-1))
    joined_scores = {name: torch.cat(parts) for name, parts in scores.items()}
    joined_errors = {name: torch.cat(parts) for name, parts in errors.items()}
    if outcomes is not None:
        joined_scores["action L1"] = -joined_errors["action"]
    of_episode = batch.index[:, 0].cpu()  # starts of an episode are alike
    itself = {("action", "action L1"), ("true frames", "true frames")}
    return {
        against: {
            name: agreement(value, error, labels, of_episode)
            for name, value in joined_scores.items()
            if (against, name) not in itself
        }
        for against, error in joined_errors.items()
    }
