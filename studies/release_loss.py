"""The objective of the public code, where it differs from the paper's.

    paper (vlarft.grpo)                                       public code
    Eq. (8)   log-prob of a chunk, the mean over K            log-probs of the chunk's T x A scalars, each summed over K
    Eq. (9)   one ratio per chunk                             one ratio per scalar
    Eq. (11)  reward: sum over frames                         mean over frames
    Eq. (12)  reward minus the group's mean                   and divided by the group's standard deviation
    Eq. (13)  clipped ratio times advantage                   PPO's minimum with the ratio as it is, and a dual clip
    Eq. (13)  lambda_mse                                      times a gate: the KL to the sampling policy over 0.2
    Eq. (13)  mean entropy over the K steps                   their sum divided by K + 1
    Eq. (7)   sigma of (z, s, k)                              and of x_k

The gate is shut in the first update on each batch of rollouts, where nothing has moved yet: the flow-matching term then
has no weight, and with --epochs 1 it never has. The mean over frames is the sum over a constant, which the division by
the standard deviation takes out. Defects of the public code (log-probs and time in bfloat16, no float32 master weights,
dropout, gradients that are not synchronised) are not repeated.

Shapes: S starts, G rollouts of a group, B = S * G chains, K flow steps, T chunk steps, A action dim.
"""

import torch
from torch import Tensor

from train_rft import Config, Rollouts, demonstration_loss
from vlarft.flow import chain_log_prob
from vlarft.grpo import mean_entropy, policy_ratio
from vlarft.policy import VLAPolicy
from vlarft.run import distributed

DUAL_CLIP = 3.0
GATE_OPEN_AT = 0.2  # nats


def ppo_loss(
    log_prob: Tensor, old_log_prob: Tensor, advantage: Tensor, *, clip: float = 0.2, dual_clip: float = DUAL_CLIP
) -> tuple[Tensor, dict[str, float]]:
    """Compute PPO's surrogate with a ratio per scalar, -E[min(r Adv, clip(r) Adv)], bounded where the advantage is
    negative.

    Args:
        log_prob: (B, T, A) of the current policy, differentiable.
        old_log_prob: of the policy that sampled, same shape.
        advantage: (B,), the same for all scalars of a chunk.
        clip: the ratio is clipped to [1 - clip, 1 + clip].
        dual_clip: c of max(min(r Adv, clip(r) Adv), c Adv) where the advantage is negative: a ratio beyond c has no
            gradient.

    Returns:
        The loss, a mean over all ratios; and metrics as those of `vlarft.grpo.policy_loss`, with dual_clip_frac, the
        share of ratios that the bound holds.

    Raises:
        ValueError: a bound inside the range of the clip.
    """
    if dual_clip <= 1 + clip:
        raise ValueError(f"dual_clip {dual_clip:g} must exceed 1 + clip = {1 + clip:g}")
    ratio, advantage = policy_ratio(log_prob, old_log_prob), advantage[:, None, None]  # (B, T, A), (B, 1, 1)
    clipped = ratio.clamp(1 - clip, 1 + clip)
    surrogate = torch.minimum(ratio * advantage, clipped * advantage)
    bounded = (advantage < 0) & (ratio > dual_clip)
    surrogate = torch.where(bounded, dual_clip * advantage, surrogate)
    with torch.no_grad():
        log_ratio = log_prob.float() - old_log_prob.float()
        metrics = {
            "ratio_mean": ratio.mean().item(),
            "ratio_max": ratio.max().item(),
            "approx_kl": (ratio - 1 - log_ratio).mean().item(),
            "clip_frac": (ratio != clipped).float().mean().item(),
            "dual_clip_frac": bounded.float().mean().item(),
        }
    return -surrogate.mean(), metrics


def mse_gate(kl: float, open_at: float = GATE_OPEN_AT) -> float:
    """Compute the factor on the flow-matching term, clamp(kl / open_at, 0, 1).

    It holds the policy to the demonstrations only as far as it has moved from the policy that sampled.

    Args:
        kl: to the policy that sampled [nats].
        open_at: KL from which on the term has its full weight.
    """
    return min(max(kl / open_at, 0.0), 1.0)


def release_loss(cfg: Config, policy: VLAPolicy, rollouts: Rollouts) -> tuple[Tensor, dict[str, float]]:
    """Compute the public code's objective on a whole batch; a `train_rft.Loss`, for advantages that are divided by the
    std.

    The gate's KL is that of all processes' rollouts: a collective call, which sees all starts of this process at once.
    """
    group = rollouts.x.shape[1]
    x, log_prob, advantage = (v.flatten(0, 1) for v in (rollouts.x, rollouts.log_prob, rollouts.advantage))  # B = S * G
    cond = policy.condition(rollouts.context, rollouts.batch.proprio)
    scored = chain_log_prob(policy.head, policy.sigma_net, x, cond.repeat(group))
    surrogate, metrics = ppo_loss(scored.log_prob.sum(1), log_prob.sum(1), advantage, clip=cfg.clip)
    num_steps = scored.entropy.shape[1]  # K
    entropy = mean_entropy(scored.entropy) * num_steps / (num_steps + 1)
    mse = demonstration_loss(policy, rollouts, cond)
    gate = mse_gate(distributed.mean_across_ranks({"kl": metrics["approx_kl"]})["kl"])
    loss = surrogate - cfg.entropy_weight * entropy + cfg.mse_weight * gate * mse
    terms = {"policy_loss": surrogate, "entropy": entropy, "mse": mse, "sigma": scored.sigma.mean()}
    return loss, metrics | {name: value.item() for name, value in terms.items()} | {"mse_gate": gate}
