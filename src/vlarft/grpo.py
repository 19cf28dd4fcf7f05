"""Group relative policy optimization for flow policies: pure functions.

Shapes: S starts, G rollouts of a group, B = S * G chains, K scored flow steps, T chunk steps, A action dim.

    advantages      Eq. (12)   Adv_n = R_n - mean(R)
    credited        not in the paper: an advantage for each action step, from the frames that it can change
    chain_log_prob  Eq. (8)    mean over K of the chunk's Gaussian log-density
    policy_ratio    Eq. (9)    exp(log_prob - old_log_prob)
    policy_loss     Eq. (13)   -E[clip(r, 1 - eps, 1 + eps) Adv], the first term
    mean_entropy    Eq. (13)   H(pi), the last term
    mse_gate, gaussian_kl, sampled_kl, regression_weights   not in the paper: the release's gate, the distance to the
                               supervised policy, and the weights of reward-weighted regression

Everything is computed in float32.
"""

from typing import Literal

import torch
from torch import Tensor

OverK = Literal["mean", "sum"]
RatioPer = Literal["chunk", "step", "element"]
Credit = Literal["chunk", "to_go", "frame"]
Objective = Literal["clip", "ppo"]
EntropyOver = Literal["k", "k+1"]


def advantages(rewards: Tensor, *, divide_by_std: bool = False, eps: float = 1e-6) -> Tensor:
    """Group-relative advantage, Eq. (12).

    Args:
        rewards: (S, G), one row per start; or (S, G, T) of `credited`, where each action step has a row of its own.
        divide_by_std: also divide by the group's unbiased standard deviation plus `eps`, as the public release does.
        eps: see above.

    Returns:
        float32 of the same shape without gradient, mean 0 in every row; exactly 0 where all rewards of a group are
        equal.

    Raises:
        ValueError: `rewards` has no axes of starts and rollouts, or groups of one member, whose advantage would always
            be 0.
    """
    if rewards.ndim not in (2, 3) or rewards.shape[1] < 2:
        raise ValueError(
            f"rewards must be (starts, rollouts) with at least 2 rollouts a start, got {tuple(rewards.shape)}"
        )
    rewards = rewards.detach().float()
    constant = (rewards == rewards[:, :1]).all(1, keepdim=True)  # (S, 1)
    centred = torch.where(constant, 0.0, rewards - rewards.mean(1, keepdim=True))
    if divide_by_std:
        centred = centred / (rewards.std(1, keepdim=True) + eps)
    return centred


def credited(per_frame: Tensor, credit: Credit) -> Tensor:
    """The part of a rollout's reward that each of its action steps answers for.

    Eq. (12) gives every action of a chunk the whole reward ("chunk"). An action cannot change the frames before it, so
    "to_go" leaves those out; "frame" keeps the one frame that follows the action, for rewards whose frames depend on
    their own action alone (R1, divergence). Both leave out what is mostly the noise of other actions. They neglect that
    the flow's later steps mix the noise of one action step into the others.

    Args:
        per_frame: (S, G, T) terms whose sum over T is the reward.
        credit: see above.

    Returns:
        (S, G) for "chunk", else (S, G, T).
    """
    if credit == "chunk":
        return per_frame.sum(-1)
    return per_frame if credit == "frame" else per_frame.flip(-1).cumsum(-1).flip(-1)


def chain_log_prob(log_prob: Tensor, over_k: OverK = "mean", ratio_per: RatioPer = "chunk") -> Tensor:
    """Log-probability of whole chains from those of their scalars, Eq. (8).

    Args:
        log_prob: (B, K, T, A), log N(x_k+1; mu_k, sigma_k) of every scalar.
        over_k: "mean" is the paper's; "sum" is the log-density of the chain.
        ratio_per: "chunk" sums over T and A, which is the log-density of a chunk; "step" over A; "element" keeps the
            T x A scalars apart, each with a ratio of its own (the public release).

    Returns:
        (B,), (B, T) per step, or (B, T, A) per element.
    """
    log_prob, axes = log_prob.float(), {"chunk": (-1, -2), "step": (-1,), "element": ()}[ratio_per]
    per_step = log_prob.sum(axes) if axes else log_prob  # (B, K), (B, K, T) or (B, K, T, A)
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
    dual_clip: float | None = None,
) -> tuple[Tensor, dict[str, float]]:
    """First term of Eq. (13), with its diagnostics.

    Args:
        log_prob: (B,), (B, T) or (B, T, A) of the current policy, differentiable.
        old_log_prob: of the policy that sampled, same shape.
        advantage: (B,), the same for all scalars of a chunk; or (B, T), for ratios per step or element.
        clip_low, clip_high: the ratio is clipped to [1 - clip_low, 1 + clip_high].
        objective: "clip" is the paper's -E[clip(r) Adv]; "ppo" the pessimistic -E[min(r Adv, clip(r) Adv)] of PPO.
        dual_clip: bound c of PPO's minimum where the advantage is negative: max(min(r Adv, clip(r) Adv), c Adv), so
            that a ratio beyond c has no gradient (3 in the release); None = no bound.

    Returns:
        The loss, a mean over all ratios; and metrics: ratio mean and max, approx_kl (the k3 estimator, mean of
        r - 1 - log r), clip_frac (share of ratios outside the range), dual_clip_frac (share held by the bound).

    Raises:
        ValueError: a dual clip without PPO's minimum, or one not above 1 + clip_high; an advantage per step with a
            ratio per chunk.
    """
    if dual_clip is not None and objective != "ppo":
        raise ValueError(f"dual_clip {dual_clip} bounds PPO's minimum, objective {objective!r} has none; choose 'ppo'")
    if dual_clip is not None and dual_clip <= 1 + clip_high:
        raise ValueError(f"dual_clip {dual_clip} must exceed 1 + clip_high = {1 + clip_high:g}")
    if advantage.ndim > log_prob.ndim:
        raise ValueError("advantages of action steps (credit) need a ratio per step or element (ratio_per), not chunk")
    log_ratio = log_prob.float() - old_log_prob.detach().float()
    ratio = policy_ratio(log_prob, old_log_prob)
    advantage = advantage.view(*advantage.shape, *[1] * (ratio.ndim - advantage.ndim))
    clipped = ratio.clamp(1 - clip_low, 1 + clip_high)
    surrogate = clipped * advantage
    held = torch.zeros_like(ratio, dtype=torch.bool)
    if objective == "ppo":
        surrogate = torch.minimum(ratio * advantage, surrogate)
        if dual_clip is not None:
            held = (advantage < 0) & (ratio > dual_clip)
            surrogate = torch.where(held, dual_clip * advantage, surrogate)
    with torch.no_grad():
        metrics = {
            "ratio_mean": ratio.mean().item(),
            "ratio_max": ratio.max().item(),
            "approx_kl": (ratio - 1 - log_ratio).mean().item(),
            "clip_frac": (ratio != clipped).float().mean().item(),
            "dual_clip_frac": held.float().mean().item(),
        }
    return -surrogate.mean(), metrics


def mean_entropy(entropy: Tensor, over: EntropyOver = "k") -> Tensor:
    """H(pi) of Eq. (13) as the mean entropy of a scalar of the chain [nats].

    Args:
        entropy: (B, K, T, A) of the Gaussians along the chains.
        over: "k" is the mean over B, K, T and A; "k+1" divides the sum over K by K + 1, as the public release does.

    Returns:
        Scalar.
    """
    mean = entropy.float().mean()
    return mean if over == "k" else mean * (entropy.shape[1] / (entropy.shape[1] + 1))


def mse_gate(approx_kl: float, full_at: float | None) -> float:
    """Factor on the weight of the flow-matching loss in Eq. (13).

    The release's gate clamp(kl / full_at, 0, 1) holds the policy to the demonstrations only as far as it has moved. It
    is shut (0) in the first update on each batch of rollouts, where nothing has moved yet.

    Args:
        approx_kl: of the policy to the one that sampled, over the whole batch.
        full_at: KL that opens the gate fully (0.2 in the release); None = the fixed weight of the paper, 1.
    """
    return 1.0 if full_at is None else min(max(approx_kl / full_at, 0.0), 1.0)


def gaussian_kl(mean: Tensor, sigma: Tensor, other_mean: Tensor, other_sigma: Tensor) -> Tensor:
    """KL(N(mean, sigma) || N(other_mean, other_sigma)) of every scalar [nats], exact, same shape as the arguments.

    On the steps of a chain this is the KL of the policy to another one, given the x_k that were visited.
    """
    mean, sigma, other_mean, other_sigma = (v.float() for v in (mean, sigma, other_mean, other_sigma))
    scaled = (sigma.square() + (mean - other_mean).square()) / other_sigma.square()
    return other_sigma.log() - sigma.log() + (scaled - 1) / 2


def sampled_kl(log_prob: Tensor, other_log_prob: Tensor) -> Tensor:
    """The k3 estimate of KL(policy || other) from samples of the policy: r - 1 - log r with r = other / policy.

    Never negative; its mean over samples is the KL. Elementwise, same shape as the arguments.
    """
    log_ratio = other_log_prob.float() - log_prob.float()
    return log_ratio.exp() - 1 - log_ratio


def regression_weights(rewards: Tensor, temperature: float) -> Tensor:
    """Weights of reward-weighted regression (Table 10): softmax of the group's standardised rewards over temperature.

    Args:
        rewards: (S, G).
        temperature: in units of the group's standard deviation; small = the best rollout alone, large = all alike.

    Returns:
        (S, G) float32 without gradient, mean 1 in every row; exactly 1 where all rewards of a group are equal.

    Raises:
        ValueError: a temperature that is not positive; and as `advantages`.
    """
    if not temperature > 0:
        raise ValueError(f"rwr_temperature must be positive, got {temperature}")
    return rewards.shape[1] * (advantages(rewards, divide_by_std=True) / temperature).softmax(1)
