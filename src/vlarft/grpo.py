"""Group relative policy optimisation for flow policies: pure functions.

Shapes: S starts, G rollouts per start (a group), B = S * G chains, K flow steps, T chunk steps, A action dim.

    advantages      Eq. (12)   Adv_n = R_n - mean(R); Algorithm 1 cites Eq. (13) for it
    chain_log_prob  Eq. (8)    mean over K of the chunk's Gaussian log-density, from the terms of flow.chain_log_prob
    policy_ratio    Eq. (9)    r = exp(log_prob - old_log_prob)
    policy_loss     Eq. (13)   -E[clip(r, 1 - eps, 1 + eps) Adv], the first term
    mean_entropy    Eq. (13)   H(pi), the last term

Everything is computed in float32.
"""

import torch
from torch import Tensor


def advantages(rewards: Tensor, *, divide_by_std: bool = False, eps: float = 1e-6) -> Tensor:
    """Compute the group-relative advantage, Eq. (12).

    Args:
        rewards: (S, G), one reward per rollout; or (S, G, T), one per action step. Each step is then compared with the
            same step of the group, and credited with the one frame that follows it (not in the paper).
        divide_by_std: also divide by the group's unbiased standard deviation plus `eps`, as the public code does.
        eps: see `divide_by_std`.

    Returns:
        float32 of the same shape, without gradient, mean 0 over the group; exactly 0 where all rewards of a group are
        equal.

    Raises:
        ValueError: rewards of another shape, or groups of one rollout, whose advantage would always be 0.
    """
    if rewards.ndim not in (2, 3) or rewards.shape[1] < 2:
        raise ValueError(
            f"rewards must be (starts, rollouts) with at least 2 rollouts a start, got {tuple(rewards.shape)}"
        )
    rewards = rewards.detach().float()
    # the float32 mean of equal rewards may differ from them in the last digit, which the division would magnify
    constant = (rewards == rewards[:, :1]).all(1, keepdim=True)  # (S, 1) or (S, 1, T)
    centred = torch.where(constant, 0.0, rewards - rewards.mean(1, keepdim=True))
    if divide_by_std:
        centred = centred / (rewards.std(1, keepdim=True) + eps)
    return centred


def chain_log_prob(log_prob: Tensor, *, per_step: bool = False) -> Tensor:
    """Reduce the log-probabilities of a chain's scalars to one per chunk, Eq. (8): a mean over the K flow steps.

    Args:
        log_prob: (B, K, T, A), log N(x_k+1; mu_k, sigma_k) of every scalar.
        per_step: sum over A only, for one ratio per action step; otherwise over T and A, which gives the log-density of
            the whole chunk.

    Returns:
        (B,), or (B, T) per step.
    """
    density = log_prob.float().sum(-1)  # (B, K, T)
    return density.mean(1) if per_step else density.sum(-1).mean(1)


def policy_ratio(log_prob: Tensor, old_log_prob: Tensor) -> Tensor:
    """Compute r = exp(log_prob - old_log_prob), Eq. (9), elementwise, float32; `old_log_prob` gets no gradient."""
    return torch.exp(log_prob.float() - old_log_prob.detach().float())


def policy_loss(
    log_prob: Tensor, old_log_prob: Tensor, advantage: Tensor, *, clip: float = 0.2
) -> tuple[Tensor, dict[str, float]]:
    """Compute the first term of Eq. (13) and its diagnostics.

    The paper's surrogate is the clipped ratio times the advantage; PPO takes its minimum with the unclipped product.

    Args:
        log_prob: (B,) or (B, T) of the current policy, differentiable.
        old_log_prob: of the policy that sampled, same shape.
        advantage: same shape.
        clip: the ratio is clipped to [1 - clip, 1 + clip].

    Returns:
        The loss, a mean over all ratios; and metrics: ratio mean and max, approx_kl (the k3 estimator, mean of
        r - 1 - log r), clip_frac (share of ratios outside the range).

    Raises:
        ValueError: shapes that differ, such as an advantage per action step with a ratio per chunk.
    """
    if not log_prob.shape == old_log_prob.shape == advantage.shape:
        raise ValueError(
            f"policy_loss: log_prob {tuple(log_prob.shape)}, old_log_prob {tuple(old_log_prob.shape)} and advantage "
            f"{tuple(advantage.shape)} must have one shape: all per chunk, (B,), or all per action step, (B, T)"
        )
    ratio = policy_ratio(log_prob, old_log_prob)  # (B,) or (B, T)
    clipped = ratio.clamp(1 - clip, 1 + clip)  # a clipped ratio has no gradient, whatever the advantage's sign
    with torch.no_grad():
        log_ratio = log_prob.float() - old_log_prob.float()
        metrics = {
            "ratio_mean": ratio.mean().item(),
            "ratio_max": ratio.max().item(),
            "approx_kl": (ratio - 1 - log_ratio).mean().item(),
            "clip_frac": (ratio != clipped).float().mean().item(),
        }
    return -(clipped * advantage).mean(), metrics


def mean_entropy(entropy: Tensor) -> Tensor:
    """Compute H(pi) of Eq. (13) [nats]: the mean of the scalars' entropies (B, K, T, A) over all four axes."""
    return entropy.float().mean()
