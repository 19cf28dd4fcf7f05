"""Success model: does a frame show the instruction carried out, and how far along is the episode? Not in the paper.

Closed-loop reinforcement learning in imagination has no simulator to ask for the outcome. This network looks at a frame
and at the episode's first frame, which says what "the left block" was, and gives a probability of success and a
progress. An episode has succeeded once the probability has stayed above a threshold for some frames: a single frame
with a high value among a hundred is a likely mistake.

Shapes: B frames or episodes, L frames of an episode, C colours, H, W pixels.
"""

import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vlarft.data.convention import check_same_images
from vlarft.data.episode import Episode
from vlarft.nets.vit import ConvEncoder, ConvEncoderConfig
from vlarft.nets.vlm import InstructionEncoder
from vlarft.run.checkpoint import file_digest, load_model, model_digest, read_header
from vlarft.run.hub_model import HubModel


@dataclass(frozen=True)
class SuccessConfig:
    """Sizes, and when an episode counts as a success."""

    encoder: ConvEncoderConfig = field(
        default_factory=lambda: ConvEncoderConfig(
            image_size=256,
            num_images=2,
            channels=(32, 64, 128, 128),
            kernels=(7, 5, 3, 3),
            strides=(4, 2, 2, 1),
            num_keypoints=64,
            width=64,
            film_dim=64,
        )
    )
    hidden: int = 256
    threshold: float = 0.5  # training chooses it on held-out episodes
    hold: int = 3  # frames in a row above the threshold that make a success


TINY = SuccessConfig(
    encoder=ConvEncoderConfig(
        image_size=64,
        num_images=2,
        channels=(32, 64, 64),
        kernels=(5, 3, 3),
        strides=(2, 2, 1),
        num_keypoints=32,
        width=32,
        film_dim=64,
    ),
    hidden=128,
)
SMOKE = SuccessConfig(
    encoder=ConvEncoderConfig(
        image_size=64, num_images=2, channels=(16,), kernels=(5,), strides=(4,), num_keypoints=8, width=8, film_dim=8
    ),
    hidden=16,
)
PRESETS = {"paper": SuccessConfig(), "tiny": TINY, "smoke": SMOKE}


class Judgement(NamedTuple):
    """Probability of success, and progress: 0 at an episode's start, 1 when it has succeeded; of any one shape."""

    success: Tensor
    progress: Tensor


class SuccessModel(HubModel, nn.Module):
    """Convolutional encoder of a frame and the episode's first frame, modulated by the instruction, and two outputs.

    Args:
        cfg: sizes.
    """

    def __init__(self, cfg: SuccessConfig) -> None:
        super().__init__()
        self.cfg = cfg
        self.instruction_encoder = InstructionEncoder(cfg.encoder.film_dim)
        self.encoder = ConvEncoder(cfg.encoder)
        size = cfg.encoder.num_keypoints * cfg.encoder.width
        self.outputs = nn.Sequential(nn.Linear(size, cfg.hidden), nn.GELU(), nn.Linear(cfg.hidden, 2))

    @classmethod
    def load(cls, path: str | Path, device: str | torch.device = "cpu") -> "SuccessModel":
        """Load a success model from its file or run folder, in eval mode."""
        return load_model(path, cls, SuccessConfig, device)[0]

    def forward(self, frames: Tensor, first_frames: Tensor, instructions: Sequence[str]) -> Tensor:
        """Compute the logits of success and progress.

        Args:
            frames: (B, C, H, W) in [0, 1].
            first_frames: (B, C, H, W), of their episodes.
            instructions: B strings.

        Returns:
            (B, 2).

        Raises:
            ValueError: another image size than the configuration's.
        """
        distinct = list(dict.fromkeys(instructions))
        index = torch.tensor([distinct.index(text) for text in instructions], device=frames.device)
        language = self.instruction_encoder(distinct)[index]
        tokens = self.encoder(torch.cat([frames, first_frames], dim=1), language)  # (B, keypoints, D)
        return self.outputs(tokens.flatten(1))

    def loss(
        self, frames: Tensor, first_frames: Tensor, instructions: Sequence[str], success: Tensor, progress: Tensor
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Compute the binary cross-entropy of success and, where progress is known, that of progress.

        Args:
            frames, first_frames, instructions: see `forward`.
            success: (B,) 0 or 1.
            progress: (B,) in [0, 1]; NaN where it is not known, in episodes that failed.

        Returns:
            The scalar loss, and metrics: the two terms and the share of frames that are judged right at 1/2.
        """
        logits = self(frames, first_frames, instructions).float()
        success_loss = F.binary_cross_entropy_with_logits(logits[:, 0], success)
        known = ~progress.isnan()
        terms = F.binary_cross_entropy_with_logits(logits[:, 1], progress.nan_to_num(), reduction="none")
        progress_loss = (terms * known).sum() / known.sum().clamp_min(1)
        right = ((logits[:, 0] > 0) == (success > 0.5)).float().mean()
        return success_loss + progress_loss, {
            "success_loss": success_loss,
            "progress_loss": progress_loss,
            "right": right,
        }

    @torch.no_grad()
    def highest(self, frames: Tensor, instruction: str) -> float:
        """Judge one whole episode: the largest probability that it holds, a success from the threshold on.

        Args:
            frames: (L, C, H, W) in [0, 1]; the first one is compared with, not judged.
            instruction: its text.
        """
        if len(frames) < 2:
            return 0.0
        values = self.judge(frames[None, 1:], frames[:1], [instruction]).success[0]
        return longest_held(values.float(), self.cfg.hold).item()

    @torch.no_grad()
    def judge(self, frames: Tensor, first_frames: Tensor, instructions: Sequence[str], at_once: int = 256) -> Judgement:
        """Judge the frames of episodes.

        Args:
            frames: (B, L, C, H, W) in [0, 1].
            first_frames: (B, C, H, W).
            instructions: B strings.
            at_once: frames in one forward pass, to bound memory.

        Returns:
            Success and progress, (B, L) each.
        """
        count, length = frames.shape[:2]
        parts = []
        for first in range(0, count * length, at_once):
            rows = torch.arange(first, min(first + at_once, count * length), device=frames.device)
            texts = [instructions[row // length] for row in rows.tolist()]
            parts.append(self(frames.flatten(0, 1)[rows], first_frames[rows // length], texts))
        values = torch.cat(parts).float().sigmoid().unflatten(0, (count, length))  # (B, L, 2)
        return Judgement(*values.unbind(-1))

    def solved(self, success: Tensor) -> Tensor:
        """Say at which frames an episode has succeeded: `hold` frames in a row, up to this one, above the threshold.

        Args:
            success: (B, L), probabilities.

        Returns:
            (B, L) bool.
        """
        above = F.pad((success >= self.cfg.threshold).float(), (self.cfg.hold - 1, 0))  # no success before the start
        return above.unfold(1, self.cfg.hold, 1).all(-1)


class Referee:
    """Finds the success of episodes that are shown chunk by chunk.

    Args:
        judge: decides.
        first_frames: (E, C, H, W) in [0, 1], on the judge's device.
        instructions: E strings.
    """

    def __init__(self, judge: SuccessModel, first_frames: Tensor, instructions: Sequence[str]) -> None:
        self.judge, self.first_frames, self.instructions = judge, first_frames, list(instructions)
        # of the frames before the next chunk: a success may be held across the border of two chunks
        self.before = first_frames.new_zeros(len(first_frames), judge.cfg.hold - 1)

    def success_at(self, episodes: Sequence[int], frames: Tensor) -> Tensor:
        """Judge a chunk of frames.

        Args:
            episodes: B numbers, 0..E - 1.
            frames: (B, T, C, H, W) in [0, 1], after each action.

        Returns:
            (B,) int64 on the CPU: number of the action, 1..T, after which the episode has succeeded; T + 1 if it has
            not.
        """
        length = frames.shape[1]
        first, texts = self.first_frames[list(episodes)], [self.instructions[e] for e in episodes]
        values = self.judge.judge(frames, first, texts).success.to(self.before)  # (B, T)
        values = torch.cat([self.before[list(episodes)], values], dim=1)  # (B, hold - 1 + T)
        self.before[list(episodes)] = values[:, length:]
        solved = self.judge.solved(values)[:, -length:].cpu()
        return torch.where(solved.any(1), solved.float().argmax(1) + 1, length + 1)


class Agreement(NamedTuple):
    """How judged outcomes agree with true ones: counts of episodes."""

    true_successes: int
    true_failures: int
    false_successes: int  # failures that were judged a success
    false_failures: int

    @property
    def agreement(self) -> float:
        """Share of episodes that were judged right."""
        episodes = self.true_successes + self.true_failures
        return 1 - (self.false_successes + self.false_failures) / episodes

    @property
    def balanced(self) -> float:
        """Mean of the shares of successes and of failures that were judged right; 1/2 if all get one verdict."""
        return 1 - (self.false_successes / self.true_failures + self.false_failures / self.true_successes) / 2


def own_attempts(episodes: Sequence[Episode]) -> list[Episode]:
    """Take the attempts of a policy alone, if both outcomes are among them: how well a demonstration is told from a
    demonstrator's failure says nothing about them.
    """
    own = [e for e in episodes if e.kind == "policy"]
    return own if len({e.success for e in own}) == 2 else list(episodes)


def compare_outcomes(judged: Sequence[bool], true: Sequence[bool]) -> Agreement:
    """Count how judged outcomes agree with true ones.

    Raises:
        ValueError: no episodes, or true outcomes of one kind, which say nothing about the other.
    """
    successes = sum(map(bool, true))
    if not 0 < successes < len(true):
        raise ValueError(
            f"{successes} of {len(true)} episodes succeeded: both outcomes are needed to compare judged with true ones"
        )
    pairs = list(zip(judged, true, strict=True))
    return Agreement(
        successes,
        len(true) - successes,
        sum(bool(j) and not t for j, t in pairs),
        sum(not j and bool(t) for j, t in pairs),
    )


def best_threshold(highest: Sequence[float], true: Sequence[bool], false_successes: float) -> float:
    """Choose the threshold with which judged outcomes agree best with true ones, without too many false successes.

    A false success is worse than a false failure: a policy that is rewarded for it learns to produce it.

    Args:
        highest: the largest probability that each episode held, see `SuccessModel.highest`.
        true: outcomes.
        false_successes: the largest share of failures that may be judged a success.

    Returns:
        A threshold halfway between two episodes' values, of equally good ones where these are furthest apart. It is
        above 1 if no other has few enough false successes: then nothing is judged a success.
    """
    values = torch.tensor(highest, dtype=torch.float64)
    borders = torch.cat([values.new_zeros(1), values.sort().values, values.new_full((1,), 1.2)])
    candidates = ((borders[1:] + borders[:-1]) / 2).clamp_min(1e-6)  # an episode of 0 is never a success
    candidates[-1] = 1.1  # nothing is
    truth = torch.tensor(true)
    judged = values >= candidates[:, None]  # (candidates, episodes)
    wrong = (judged != truth).sum(1).double() - (borders[1:] - borders[:-1]) / 2  # of equal ones the widest gap
    share = (judged & ~truth).sum(1) / (~truth).sum().clamp_min(1)
    wrong[share > false_successes] = len(truth) + 1
    return float(candidates[wrong.argmin()])


def longest_held(success: Tensor, hold: int) -> Tensor:
    """Return the largest value that the probabilities (L,) reach for `hold` frames in a row."""
    if len(success) < hold:
        return success.new_zeros(())
    return success.unfold(0, hold, 1).min(-1).values.max()


def check_judge(
    path: str | Path,
    instructions: Sequence[str],
    images: dict[str, Any],
    name: str,
    image_size: int | None = None,
    world_model: str | Path | None = None,
) -> None:
    """Check that a success model can judge what it is shown.

    Args:
        path: the success model, a file or a run folder.
        instructions: what the episodes are told.
        images: facts of `image_convention` about their images, as checkpoints store them.
        name: whose images they are, for the message.
        image_size: their side [px]; None = not known.
        world_model: that imagines them; None = they are real.

    Raises:
        ValueError: it has never seen an instruction (the message lists those that it knows), or was trained on another
            camera, orientation or size.

    Warns if it was trained on the imaginations of another world model, or has chosen its threshold on imaginations and
    is to judge real frames.
    """
    header = read_header(path)
    check_same_images(images, name, header.extra, f"success model {path}")
    known = header.extra.get("instructions", [])
    words = [text.lower().split() for text in known]  # all that its network reads of a text
    if unknown := [text for text in dict.fromkeys(instructions) if text.lower().split() not in words]:
        raise ValueError(
            f"success model {path} does not know the instruction {unknown[0]!r} ({len(unknown)} of "
            f"{len(set(instructions))} are new); it was trained on: {'; '.join(known)}. Train it on episodes of all "
            "tasks"
        )
    size = header.config["encoder"]["image_size"]
    if image_size not in (None, size):
        raise ValueError(
            f"success model {path} judges images of {size}x{size}, {name} has {image_size}x{image_size}: bring them to "
            "one size (--image-size, or vlarft.data.convert --size)"
        )
    theirs = header.extra.get("world_model")
    if world_model is None and theirs is not None:
        warnings.warn(
            f"success model {path} chose its threshold on imaginations and judges real frames here, which may need "
            "another one: train a success model with --world-model none",
            stacklevel=2,
        )
    # older success models name their world model's file
    if world_model is not None and theirs not in (ours := model_digest(world_model), file_digest(world_model)):
        warnings.warn(
            f"success model {path} was trained on the imaginations of another world model than {world_model} "
            f"({theirs or 'none'}, not {ours}): its judgement of these may be off; train it again with --world-model "
            f"{world_model}",
            stacklevel=2,
        )
