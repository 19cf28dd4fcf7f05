"""Group relative policy optimization for flow policies: pure functions.

Shapes: S starts, G rollouts of a group, B = S * G chains, K flow steps, T chunk steps, A action dim.

    advantages      Eq. (12)   Adv_n = R_n - mean(R)
    chain_log_prob  Eq. (8)    mean over K of the chunk's Gaussian log-density
    policy_ratio    Eq. (9)    exp(log_prob - old_log_prob)
    policy_loss     Eq. (13)   -E[clip(r, 1 - eps, 1 + eps) Adv], the first term; the script adds the others

Everything is computed in float32.
"""

from typing import Literal

import torch
from torch import Tensor

OverK = Literal["mean", "sum"]
Objective = Literal["clip", "ppo"]


def advantages(rewards: Tensor, *, divide_by_std: bool = False, eps: float = 1e-6) -> Tensor:
    """Group-relative advantage, Eq. (12).

    Args:
        rewards: (S, G), one row per start.
        divide_by_std: also divide by the group's unbiased standard deviation plus `eps`, as the public release does.
        eps: see above.

    Returns:
        (S, G) float32 without gradient, mean 0 in every row; exactly 0 where all rewards of a group are equal.

    Raises:
        ValueError: `rewards` is not two-dimensional, or groups of one member, whose advantage would always be 0.
    """
    if rewards.ndim != 2 or rewards.shape[1] < 2:
        raise ValueError(
            f"rewards must be (starts, rollouts) with at least 2 rollouts a start, got {tuple(rewards.shape)}"
        )
    rewards = rewards.detach().float()
    constant = (rewards == rewards[:, :1]).all(1, keepdim=True)  # (S, 1)
    centred = torch.where(constant, 0.0, rewards - rewards.mean(1, keepdim=True))
    if divide_by_std:
        centred = centred / (rewards.std(1, keepdim=True) + eps)
    return centred


def chain_log_prob(log_prob: Tensor, over_k: OverK = "mean") -> Tensor:
    """Log-probability of whole chains from those of their scalars, Eq. (8).

    Args:
        log_prob: (B, K, T, A), log N(x_k+1; mu_k, sigma_k) of every scalar.
        over_k: "mean" is the paper's; "sum" is the log-density of the chain.

    Returns:
        (B,): the sum over T and A, which is the log-density of a chunk, then the mean or sum over the K steps.
    """
    per_step = log_prob.float().sum((-1, -2))  # (B, K)
    return per_step.mean(1) if over_k == "mean" else per_step.sum(1)


def policy_ratio(log_prob: Tensor, old_log_prob: Tensor) -> Tensor:
    """r = exp(log_prob - old_log_prob), Eq. (9), elementwise."""
    return torch.exp(log_prob.float() - old_log_prob.detach().float())


def policy_loss(
    log_prob: Tensor,
    old_log_prob: Tensor,
    advantage: Tensor,
    *,
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    objective: Objective = "clip",
) -> tuple[Tensor, dict[str, float]]:
    """First term of Eq. (13), with its diagnostics.

    Args:
        log_prob: (B,) of the current policy, differentiable.
        old_log_prob: (B,) of the policy that sampled.
        advantage: (B,).
        clip_low, clip_high: the ratio is clipped to [1 - clip_low, 1 + clip_high].
        objective: "clip" is the paper's -E[clip(r) Adv]; "ppo" the pessimistic -E[min(r Adv, clip(r) Adv)] of PPO.

    Returns:
        The loss, a mean over B; and metrics: ratio mean and max, approx_kl (the k3 estimator, mean of r - 1 - log r),
        clip_frac (share of ratios outside the range).
    """
    log_ratio = log_prob.float() - old_log_prob.detach().float()
    ratio = policy_ratio(log_prob, old_log_prob)
    clipped = ratio.clamp(1 - clip_low, 1 + clip_high)
    surrogate = clipped * advantage
    if objective == "ppo":
        surrogate = torch.minimum(ratio * advantage, surrogate)
    with torch.no_grad():
        metrics = {
            "ratio_mean": ratio.mean().item(),
            "ratio_max": ratio.max().item(),
            "approx_kl": (ratio - 1 - log_ratio).mean().item(),
            "clip_frac": (ratio != clipped).float().mean().item(),
        }
    return -surrogate.mean(), metrics


def mean_entropy(entropy: Tensor) -> Tensor:
    """H(pi) of Eq. (13) as the mean entropy of a scalar of the chain [nats].

    Args:
        entropy: (B, K, T, A) of the Gaussians along the chains.

    Returns:
        Scalar, the mean over B, K, T and A.
    """
    return entropy.float().mean()
