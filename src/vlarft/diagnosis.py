"""What the deterministic policy does on fixed held-out starts, before, during and after fine-tuning.

The paper shows the histograms (Fig. 4); the other measurements are not in it.

Shapes: S starts, D samples of x_0 per start, T chunk steps, A action dim.
"""

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from vlarft.data.windows import Batch
from vlarft.flow import sample_ode
from vlarft.gate import score_in_parts
from vlarft.policy import VLAPolicy
from vlarft.reward import Scorer
from vlarft.run.pictures import histograms, save_png
from vlarft.run.random import generator


def action_names(dim: int, grippers: Sequence[int]) -> list[str]:
    """Name the action dims: LIBERO's, six and a binary gripper; those of another robot are numbered."""
    if (dim, *grippers) == (7, 6):
        return ["x", "y", "z", "rx", "ry", "rz", "gripper"]
    return [str(d) for d in range(dim)]


@torch.no_grad()
def diagnose(
    score: Scorer, policy: VLAPolicy, batch: Batch, seed: int, *, draws: int = 8, bf16: bool = False, at_once: int = 16
) -> tuple[dict[str, float], Tensor]:
    """Measure the deterministic policy from several samples of x_0 per start.

    Args:
        score: the run's reward.
        policy: in eval mode; all processes of a distributed run compute the same numbers.
        batch: S starts.
        seed: seed of x_0 and of the imagination; calls with the same seed use the same x_0.
        draws: D, samples of x_0, and so chunks, per start.
        bf16: encode the observations in bfloat16.
        at_once: starts encoded or imagined at a time, to bound memory.

    Returns:
        Metrics, and the raw chunks (S, D, T, A). `reward_mean_action` is the reward of the mean chunk over x_0;
        `error_x`, ..., `error_gripper` are the mean absolute error of that chunk to the demonstration per dimension, in
        normalised units; `std_x`, ... are the standard deviation over x_0 in the same units.
    """
    normalizer, flow = policy.normalizer, policy.cfg.flow
    context = policy.encode_frames(batch.frames[:, 0], batch.instructions, bf16=bf16, at_once=at_once)
    cond = policy.head.prepare(context, normalizer.encode_proprio(batch.proprio)).repeat(draws)  # S * D rows
    shape = (cond.num_rows, flow.chunk, flow.action_dim)
    noise = torch.randn(shape, generator=generator(context.device, "diagnosis", seed), device=context.device)
    x = sample_ode(policy.head, cond, noise=noise, num_steps=flow.num_steps)
    chunks = normalizer.decode_actions(x).unflatten(0, (-1, draws))  # (S, D, T, A)
    x = x.unflatten(0, (-1, draws))
    # the mean comes before decoding, which rounds the gripper to -1 or +1
    mean = normalizer.decode_actions(x.mean(1))  # (S, T, A)
    source = generator(context.device, "diagnosis imagination", seed)
    reward = score_in_parts(score, batch, mean[:, None], source, at_once)  # (S, 1): a group of one chunk
    error = (normalizer.encode_actions(mean) - normalizer.encode_actions(batch.intended)).abs().mean((0, 1)).tolist()
    names = action_names(len(error), normalizer.gripper_dims)
    metrics = {"reward_mean_action": reward.mean().item()}
    metrics |= {f"error_{name}": value for name, value in zip(names, error, strict=True)}
    metrics |= {f"std_{name}": value for name, value in zip(names, x.std(1).mean((0, 1)).tolist(), strict=True)}
    return metrics, chunks


def picture_actions(
    path: Path, before: Tensor, after: Tensor, grippers: Sequence[int], dims: Sequence[int] = (0, 2)
) -> None:
    """Write histograms of actions before and after fine-tuning, from the same starts and x_0, as a PNG (Fig. 4).

    Args:
        path: file to write.
        before, after: raw chunks (S, D, T, A) that `diagnose` returned.
        grippers: action dimensions that are binary gripper commands.
        dims: action dimensions, one panel each; x and z in the paper.
    """
    panels = {
        f"action {name}": {"before": before[..., d].flatten(), "after": after[..., d].flatten()}
        for d, name in enumerate(action_names(before.shape[-1], grippers))
        if d in dims
    }
    save_png(path, histograms(panels))
