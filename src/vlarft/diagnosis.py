"""What the deterministic policy does on fixed held-out starts, before, during and after fine-tuning.

Not in the paper but for the histograms, which are its Fig. 4.

Shapes: S starts, D samples of x_0 a start, T chunk steps, A action dim.
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

ACTION_NAMES = ("x", "y", "z", "rx", "ry", "rz", "gripper")


@torch.no_grad()
def diagnose(
    score: Scorer, policy: VLAPolicy, batch: Batch, seed: int, *, draws: int = 8, bf16: bool = False, at_once: int = 16
) -> tuple[dict[str, float], Tensor]:
    """Measure the deterministic policy, over several x_0 per start.

    Args:
        score: the reward of the run.
        policy: in eval mode; every process computes the same.
        batch: S starts.
        seed: of x_0 and of the imagination: the same x_0 at every call.
        draws: D, chunks per start, from an x_0 each.
        bf16: encode the observations in bfloat16.
        at_once: starts imagined together.

    Returns:
        Metrics: `reward_mean_action`, the reward of the mean chunk over x_0; `error_x`, ... `error_gripper`, its mean
        absolute error to the demonstration per dimension, in normalised units; `std_x`, ..., the standard deviation
        over x_0 in the same units. And the raw chunks (S, D, T, A).
    """
    normalizer, flow = policy.normalizer, policy.cfg.flow
    context = policy.encode_frames(batch.frames[:, 0], batch.instructions, bf16=bf16, at_once=at_once)
    cond = policy.head.prepare(context, normalizer.encode_proprio(batch.proprio)).repeat(draws)
    shape = (cond.num_rows, flow.chunk, flow.action_dim)
    noise = torch.randn(shape, generator=generator(context.device, "diagnosis", seed), device=context.device)
    x = sample_ode(policy.head, cond, noise=noise, num_steps=flow.num_steps)
    chunks = normalizer.decode_actions(x).unflatten(0, (-1, draws))  # (S, D, T, A)
    x = x.unflatten(0, (-1, draws))
    mean = normalizer.decode_actions(x.mean(1))  # (S, T, A)
    source = generator(context.device, "diagnosis imagination", seed)
    reward = score_in_parts(score, batch, mean[:, None], source, at_once)
    error = (normalizer.encode_actions(mean) - normalizer.encode_actions(batch.intended)).abs().mean((0, 1)).tolist()
    names = [*ACTION_NAMES[: len(error)], *map(str, range(len(ACTION_NAMES), len(error)))]
    metrics = {"reward_mean_action": reward.mean().item()}
    metrics |= {f"error_{name}": value for name, value in zip(names, error, strict=True)}
    metrics |= {f"std_{name}": value for name, value in zip(names, x.std(1).mean((0, 1)).tolist(), strict=True)}
    return metrics, chunks


def picture_actions(path: Path, before: Tensor, after: Tensor, dims: Sequence[int] = (0, 2)) -> None:
    """Write a PNG of action distributions before and after fine-tuning, over the same starts and x_0 (Fig. 4).

    Args:
        path: of the file.
        before, after: raw chunks (S, D, T, A) of `diagnose`.
        dims: action dims, one panel each; x and z in the paper.
    """
    panels = {
        f"action {ACTION_NAMES[d]}": {"before": before[..., d].flatten(), "after": after[..., d].flatten()}
        for d in dims
    }
    save_png(path, histograms(panels))
