"""Flow matching and the stochastic chain: what is done with the velocity net and the sigma net of nets/action_head.py.

One time convention: tau = 0 is noise, tau = 1 is the action, velocity = actions - noise, tau_k = k / K in float32 for
k in range(K). `transition` is the only definition of a step's distribution; sampling and scoring both call it.

Shapes: S contexts, B rows (B = S * R: R group members, tau draws or flow steps of each context, context-major),
T chunk steps, A action dim, K flow steps (M of them noisy).
"""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange, repeat
from torch.distributions import Normal

from vlarft.nets.action_head import Condition, FlowConfig, FlowHead, SigmaNet


class Chain(NamedTuple):
    """A sampled chain: x (B, K + 1, T, A), from noise to actions, and the log_prob (B, M, T, A) of its noisy steps."""

    x: torch.Tensor
    log_prob: torch.Tensor


class LogProb(NamedTuple):
    """Score of a chain under the current networks, all (B, M, T, A).

    log_prob and entropy are zero in dims that are not noisy; mean and sigma are those of the steps' Gaussians.
    """

    log_prob: torch.Tensor
    entropy: torch.Tensor
    mean: torch.Tensor
    sigma: torch.Tensor


def noisy_mask(cfg: FlowConfig, device: torch.device) -> torch.Tensor:
    """(A,) bool: the dims that the chain perturbs and the log-prob counts."""
    mask = torch.zeros(cfg.action_dim, dtype=torch.bool, device=device)
    mask[list(cfg.noisy_dims)] = True
    return mask


def sample_tau(
    num: int, alpha: float, beta: float, *, generator: torch.Generator | None = None, device: torch.device | str = "cpu"
) -> torch.Tensor:
    """(num,) draws of Beta(alpha, beta), float32: the ratio of two gamma variables."""
    shape = torch.tensor([alpha, beta], dtype=torch.float64, device=device).expand(num, 2)
    gamma = torch._standard_gamma(shape, generator=generator)  # what torch.distributions.Gamma calls, with a generator
    return (gamma[:, 0] / gamma.sum(-1)).float()


def matching_loss(
    head: FlowHead,
    actions: torch.Tensor,
    cond: Condition,
    *,
    generator: torch.Generator | None = None,
    alpha: float = 1.5,
    beta: float = 1.0,
    draws: int = 1,
    pairs: tuple[torch.Tensor, torch.Tensor] | None = None,
    weights: torch.Tensor | None = None,
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Eq. (4), Sec. 3.2: || v(a_tau, tau) - (a - eps) ||^2, averaged over B, draws, T and A.

    Args:
        head: velocity net.
        actions: (S, T, A), normalised.
        cond: of the same S contexts; its keys, values and means serve all draws.
        generator: source of tau and eps, on the actions' device.
        alpha, beta: tau ~ Beta(alpha, beta).
        draws: pairs (tau, eps) per chunk.
        pairs: tau (S, draws) and eps (S, draws, T, A) of `matching_pairs`, drawn for more rows than these; None = drawn
            here.
        weights: (S,) of the chunks, of mean 1 over the whole batch; None = all alike.
    Returns:
        The scalar loss, and metrics {"flow_mse"}.
    """
    if pairs is None:
        pairs = matching_pairs(actions.shape, draws, alpha=alpha, beta=beta, generator=generator, device=actions.device)
    tau, noise = pairs[0].flatten(), pairs[1].flatten(0, 1)
    actions = repeat(actions.float(), "s t a -> (s r) t a", r=draws)
    x = torch.lerp(noise, actions, tau[:, None, None])  # tau a + (1 - tau) eps
    velocity, target = head.velocity(x, tau, cond), actions - noise
    if weights is None:
        loss = F.mse_loss(velocity, target)
    else:
        loss = ((velocity - target).square().mean((1, 2)) * weights.repeat_interleave(draws)).mean()
    return loss, {"flow_mse": loss.detach()}


def regression_loss(
    head: FlowHead,
    actions: torch.Tensor,
    cond: Condition,
    *,
    generator: torch.Generator | None = None,
    draws: int = 1,
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """L1 distance of the chunks that the ODE makes of random x_0 to the dataset's, averaged over B, draws, T and A.

    Not in the paper: what reward R1 (Table 4) asks of the deterministic policy, by a gradient back through the K Euler
    steps, where GRPO estimates one from rollouts. R1 is in raw units with a rounded gripper, this in normalised ones
    and smooth. Its optimum is the median of the demonstrations, not a sample of them.

    Args:
        head: velocity net.
        actions: (S, T, A), normalised.
        cond: of the same S contexts.
        generator: source of x_0, on the actions' device.
        draws: x_0 per chunk.
    Returns:
        The scalar loss, and metrics {"chunk_l1"}.
    """
    num_steps, cond = head.cfg.num_steps, head.at_steps(cond.repeat(draws), head.cfg.num_steps)
    actions = repeat(actions.float(), "s t a -> (s r) t a", r=draws)
    x = torch.randn(actions.shape, generator=generator, device=actions.device)
    for k in range(num_steps):
        x = euler_step(head, x, torch.full((len(x),), k, device=x.device), num_steps, cond)
    loss = F.l1_loss(x, actions)
    return loss, {"chunk_l1": loss.detach()}


def matching_pairs(
    shape: tuple[int, int, int],
    draws: int,
    *,
    alpha: float = 1.5,
    beta: float = 1.0,
    generator: torch.Generator | None = None,
    device: torch.device | str = "cpu",
) -> tuple[torch.Tensor, torch.Tensor]:
    """The random part of Eq. (4) for S chunks: tau (S, draws) ~ Beta(alpha, beta) and eps (S, draws, T, A) ~ N(0, 1).

    Args:
        shape: (S, T, A).
        draws: pairs per chunk.
        alpha, beta, generator, device: see `sample_tau`.
    """
    tau = sample_tau(shape[0] * draws, alpha, beta, generator=generator, device=device).view(shape[0], draws)
    return tau, torch.randn((shape[0], draws, *shape[1:]), generator=generator, device=device)


def euler_step(head: FlowHead, x: torch.Tensor, k: torch.Tensor, num_steps: int, cond: Condition) -> torch.Tensor:
    """Eq. (5): x + v(x, k / K) / K, for x (B, T, A) and k (B,); float32."""
    return x + head.velocity(x, k.float() / num_steps, cond, k) / num_steps


def sde_step(
    head: FlowHead, x: torch.Tensor, k: torch.Tensor, num_steps: int, cond: Condition
) -> tuple[torch.Tensor, torch.Tensor]:
    """One Euler-Maruyama step of Flow-SDE: noise whose drift correction keeps the marginals of the ODE.

    Not in the paper (Flow-GRPO's idea, derived for this file's convention). With x_tau = (1 - tau) eps + tau a, the
    exact velocity is v(x, tau) = E[a - eps | x]. Since x = eps + tau (a - eps), E[eps | x] = x - tau v. Given a, x_tau
    is N(tau a, (1 - tau)^2), so the score of its marginal is

        score(x, tau) = -E[x - tau a | x] / (1 - tau)^2 = -E[eps | x] / (1 - tau) = (tau v - x) / (1 - tau).

    By the Fokker-Planck equation dx = f dtau + g dW has the ODE's marginals if f = v + g^2 / 2 score, for any g(tau).
    The schedule is g^2 = s^2 (1 - tau) / max(tau, 1 / K), s = `sde_noise`. With c = g^2 / (2 (1 - tau)), which is
    s^2 / (2 max(tau, 1 / K)):

        mean = x + (v + c (tau v - x)) / K,    variance = g^2 / K = 2 c (1 - tau) / K.

    Both ends are safe. Near tau = 0, where s^2 (1 - tau) / tau diverges, tau is held at the first step's length. At
    tau -> 1 the score's 1 / (1 - tau) cancels against g^2; noise and correction of the last step, tau = 1 - 1 / K, are
    finite, and tau = 1 is never the start of a step. The marginals are kept exactly as K grows, and for a dim without
    noise whatever the others do, since g may differ by dim. As s -> 0 this is Eq. (5).

    Args:
        head, x, k, num_steps, cond: as `euler_step`.

    Returns:
        Mean (B, T, A), corrected in the noisy dims only, and standard deviation (B, 1, 1); float32.
    """
    tau = k.float() / num_steps  # (B,)
    velocity = head.velocity(x, tau, cond, k)
    tau = tau[:, None, None]
    c = head.cfg.sde_noise**2 / (2 * tau.clamp_min(1 / num_steps))
    correction = c * (tau * velocity - x) * noisy_mask(head.cfg, x.device)
    return x + (velocity + correction) / num_steps, (2 * c * (1 - tau) / num_steps).sqrt()


def transition(
    head: FlowHead, sigma_net: SigmaNet | None, x: torch.Tensor, k: int | torch.Tensor, cond: Condition
) -> Normal:
    """Distribution of x_{k+1} given x_k.

    With the sigma net Eq. (5)-(7): mean of the Euler step, standard deviation of the net. With flow_sde `sde_step`.

    Args:
        head, sigma_net: the two networks; flow_sde needs no sigma net.
        x: (B, T, A), normalised actions on their way from noise.
        k: flow step, 0..K-1: one for all rows, or (B,). Steps that are not noisy take `euler_step` instead.
        cond: of `head.prepare(..., sigma_net)`.
    Returns:
        Normal over (B, T, A), float32. Dims outside `noisy_dims` take its mean, see `sample_chain`.
    Raises:
        ValueError: the condition lacks the sigma net's part.
    """
    k = torch.as_tensor(k, device=x.device).expand(len(x))
    if head.cfg.noise == "flow_sde":
        mean, sigma = sde_step(head, x, k, head.cfg.num_steps, cond)
        return Normal(mean, sigma.expand_as(mean), validate_args=False)
    if cond.sigma is None:
        raise ValueError(
            "the condition has no part for the sigma net; make it with head.prepare(..., sigma_net=sigma_net)"
        )
    mean = euler_step(head, x, k, head.cfg.num_steps, cond)
    return Normal(mean, sigma_net.log_sigma(cond.sigma, k, x).exp(), validate_args=False)


def _at_steps(head: FlowHead, sigma_net: SigmaNet | None, cond: Condition) -> Condition:
    """The condition made ready for the chain's steps, in both networks."""
    own = sigma_net.at_steps(cond.sigma) if sigma_net and cond.sigma else cond.sigma
    return replace(head.at_steps(cond, head.cfg.num_steps), sigma=own)


@torch.no_grad()
def sample_chain(
    head: FlowHead,
    sigma_net: SigmaNet | None,
    cond: Condition,
    *,
    generator: torch.Generator | None = None,
    noise: torch.Tensor | None = None,
    step_noise: torch.Tensor | None = None,
) -> Chain:
    """Sample action chunks step by step, Eq. (6).

    Args:
        head, sigma_net: the two networks.
        cond: of `head.prepare(..., sigma_net)`, `.repeat(G)` for groups.
        generator: source of all noise that is not given, on the networks' device.
        noise: (B, T, A) start x_0; drawn when absent.
        step_noise: (B, M, T, A) of the noisy steps; drawn when absent.
    Returns:
        The chain x (B, K + 1, T, A) and the log_prob (B, M, T, A) of each element of each noisy step, float32.
    """
    cfg, device, cond = head.cfg, cond.base.device, _at_steps(head, sigma_net, cond)
    shape = (cond.num_rows, cfg.chunk, cfg.action_dim)
    x = torch.randn(shape, generator=generator, device=device) if noise is None else noise.float()
    mask, chain, log_probs = noisy_mask(cfg, device), [x], []
    for k in range(cfg.num_steps):
        if k not in cfg.scored_steps:
            x = euler_step(head, x, torch.full((len(x),), k, device=device), cfg.num_steps, cond)
            chain.append(x)
            continue
        step = transition(head, sigma_net, x, k, cond)
        if step_noise is None:
            eps = torch.randn(shape, generator=generator, device=device)
        else:
            eps = step_noise[:, len(log_probs)]
        x = torch.where(mask, step.mean + step.stddev * eps, step.mean)
        chain.append(x)
        log_probs.append(step.log_prob(x) * mask)
    return Chain(torch.stack(chain, dim=1), torch.stack(log_probs, dim=1))


def chain_log_prob(head: FlowHead, sigma_net: SigmaNet | None, x: torch.Tensor, cond: Condition) -> LogProb:
    """Score a sampled chain, differentiably, all noisy steps in one batch: the terms of Eq. (8), before any reduction.

    Args:
        head, sigma_net: the two networks.
        x: (B, K + 1, T, A) of `sample_chain`.
        cond: as for sampling; its tensors may carry gradients.
    Returns:
        log_prob, entropy, mean and sigma, (B, M, T, A) each, float32; the first two 0 in dims that are not noisy, so
        that sums skip them.
    """
    cond = _at_steps(head, sigma_net, cond)
    mask, steps = noisy_mask(head.cfg, x.device), torch.tensor(head.cfg.scored_steps, device=x.device)  # (A,), (M,)
    before, after = (rearrange(x[:, index], "b m t a -> (b m) t a") for index in (steps, steps + 1))
    step = transition(head, sigma_net, before, steps.repeat(len(x)), cond)
    parts = step.log_prob(after) * mask, step.entropy() * mask, step.mean, step.stddev
    return LogProb(*(rearrange(part, "(b m) t a -> b m t a", m=len(steps)) for part in parts))


@torch.no_grad()
def sample_ode(head: FlowHead, cond: Condition, *, noise: torch.Tensor, num_steps: int = 10) -> torch.Tensor:
    """Deterministic actions: forward Euler from `noise` (B, T, A) at tau = 0 to tau = 1; normalised, float32."""
    x, cond = noise.float(), head.at_steps(cond, num_steps)
    for k in range(num_steps):
        x = euler_step(head, x, torch.full((len(x),), k, device=x.device), num_steps, cond)
    return x
