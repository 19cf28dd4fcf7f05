"""Flow matching and the stochastic chain: the maths on top of nets/action_head.py's velocity net and sigma net.

One time convention: tau = 0 is noise, tau = 1 is the action, velocity = actions - noise, tau_k = k / K in float32 for
k in range(K). `transition` is the only definition of a step's distribution; sampling and scoring both call it. Step k
leads from x_k to x_{k+1}, as Eq. (8) has it; Eq. (6) writes x_k for both.

Shapes: S contexts, B = S * R rows, context-major (the R rows of a context are group members, samples of tau or flow
steps), T chunk steps, A action dim, K flow steps.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange, repeat
from torch.distributions import Normal

from vlarft.nets.action_head import Condition, FlowHead, SigmaNet

BETA = 1.5, 1.0  # parameters of tau's distribution in Eq. (4)
X0 = Literal["sampled", "zero", "gripper"]  # what a chunk starts from, see `initial_noise`


class Chain(NamedTuple):
    """A sampled chain: x (B, K + 1, T, A), from noise to actions, and the log_prob (B, K, T, A) of its steps."""

    x: torch.Tensor
    log_prob: torch.Tensor


class LogProb(NamedTuple):
    """A chain scored under the current networks: each step's Gaussian per scalar, all fields (B, K, T, A)."""

    log_prob: torch.Tensor
    entropy: torch.Tensor
    mean: torch.Tensor
    sigma: torch.Tensor


def initial_noise(
    x0: X0, shape: Sequence[int], gripper_dims: Sequence[int], generator: torch.Generator | None = None
) -> torch.Tensor:
    """Return x_0 (..., A): "sampled" from the standard normal distribution, as in the paper; "zero"; or "gripper":
    sampled in these dimensions, 0 in all others. On the generator's device.
    """
    device = "cpu" if generator is None else generator.device
    if x0 == "zero":
        return torch.zeros(*shape, device=device)
    noise = torch.randn(*shape, generator=generator, device=device)
    if x0 == "gripper":
        noise[..., [d for d in range(shape[-1]) if d not in gripper_dims]] = 0
    return noise


def sample_tau(
    num: int, alpha: float, beta: float, *, generator: torch.Generator | None = None, device: torch.device | str = "cpu"
) -> torch.Tensor:
    """Sample tau ~ Beta(alpha, beta), (num,) float32, as g1 / (g1 + g2) of two gamma variables."""
    shape = torch.tensor([alpha, beta], dtype=torch.float64, device=device).expand(num, 2)
    # the sampler of torch.distributions.Gamma, called directly because that class takes no generator
    gamma = torch._standard_gamma(shape, generator=generator)  # (num, 2)
    return (gamma[:, 0] / gamma.sum(-1)).float()


def matching_loss(
    head: FlowHead,
    actions: torch.Tensor,
    cond: Condition,
    *,
    generator: torch.Generator | None = None,
    draws: int = 1,
    pairs: tuple[torch.Tensor, torch.Tensor] | None = None,
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Compute the flow-matching loss, Eq. (4), Sec. 3.2: || v(a_tau, tau) - (a - eps) ||^2, a mean over S, draws, T, A.

    Args:
        head: velocity net.
        actions: (S, T, A), normalised.
        cond: condition of the same S contexts, computed once for all draws.
        generator: source of tau and eps, on the actions' device.
        draws: pairs (tau, eps) per chunk.
        pairs: tau (S, draws) and eps (S, draws, T, A), these rows of the `matching_pairs` of a larger batch; None =
            sample them here.

    Returns:
        The scalar loss, and metrics {"flow_mse"}.
    """
    if pairs is None:
        pairs = matching_pairs(actions.shape, draws, generator=generator, device=actions.device)
    tau, noise = pairs[0].flatten(), pairs[1].flatten(0, 1)  # (B,), (B, T, A) with B = S * draws
    actions = repeat(actions.float(), "s t a -> (s r) t a", r=draws)  # context-major, as the head expects
    x = torch.lerp(noise, actions, tau[:, None, None])  # a_tau = tau a + (1 - tau) eps
    velocity, target = head.velocity(x, tau, cond), actions - noise  # (B, T, A) each
    loss = F.mse_loss(velocity, target)
    return loss, {"flow_mse": loss.detach()}


def regression_loss(
    head: FlowHead,
    actions: torch.Tensor,
    cond: Condition,
    *,
    generator: torch.Generator | None = None,
    draws: int = 1,
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Compute the L1 distance of the ODE's chunks, from random x_0, to the demonstrated ones: mean over S, draws, T, A.

    Not in the paper. It optimises R1 (Table 4) of the deterministic policy by a gradient through the K Euler steps,
    where GRPO estimates that gradient from rollouts. R1 is in raw units with a rounded gripper; this loss is smooth, in
    normalised units. Its optimum is the median of the demonstrations, not a sample from them.

    Args:
        head: velocity net.
        actions: (S, T, A), normalised.
        cond: condition of the same S contexts.
        generator: source of x_0, on the actions' device.
        draws: samples of x_0 per chunk.

    Returns:
        The scalar loss, and metrics {"chunk_l1"}.
    """
    num_steps, cond = head.cfg.num_steps, head.at_steps(cond.repeat(draws), head.cfg.num_steps)
    actions = repeat(actions.float(), "s t a -> (s r) t a", r=draws)  # (B, T, A)
    x = torch.randn(actions.shape, generator=generator, device=actions.device)  # x_0
    for k in range(num_steps):  # not `sample_ode`, which keeps no graph
        x = euler_step(head, x, torch.full((len(x),), k, device=x.device), num_steps, cond)
    loss = F.l1_loss(x, actions)
    return loss, {"chunk_l1": loss.detach()}


def matching_pairs(
    shape: tuple[int, int, int],
    draws: int,
    *,
    generator: torch.Generator | None = None,
    device: torch.device | str = "cpu",
) -> tuple[torch.Tensor, torch.Tensor]:
    """Sample the noise of Eq. (4) for S chunks: tau (S, draws) ~ Beta(1.5, 1), eps (S, draws, T, A) ~ N(0, 1).

    Args:
        shape: (S, T, A).
        draws: pairs per chunk.
        generator, device: see `sample_tau`.
    """
    tau = sample_tau(shape[0] * draws, *BETA, generator=generator, device=device).view(shape[0], draws)
    return tau, torch.randn((shape[0], draws, *shape[1:]), generator=generator, device=device)


def euler_step(head: FlowHead, x: torch.Tensor, k: torch.Tensor, num_steps: int, cond: Condition) -> torch.Tensor:
    """Take the Euler step of Eq. (5): x + v(x, k / K) / K, for x (B, T, A) and k (B,); float32."""
    # k goes with tau: where the condition holds modulations of `at_steps`, the net reads those of step k
    return x + head.velocity(x, k.float() / num_steps, cond, k) / num_steps


def transition(head: FlowHead, sigma_net: SigmaNet, x: torch.Tensor, k: int | torch.Tensor, cond: Condition) -> Normal:
    """Return the distribution of x_{k+1} given x_k, Eqs. (5) to (7): Euler step as mean, sigma net's output as std.

    Args:
        head, sigma_net: the two networks.
        x: (B, T, A), x_k in normalised action units.
        k: flow step, 0..K-1: one for all rows, or (B,).
        cond: condition made by `head.prepare(..., sigma_net=sigma_net)`.

    Returns:
        Normal over (B, T, A), float32.

    Raises:
        ValueError: the condition was made without the sigma net.
    """
    if cond.sigma is None:
        raise ValueError(
            "the condition has no part for the sigma net; make it with head.prepare(..., sigma_net=sigma_net)"
        )
    k = torch.as_tensor(k, device=x.device).expand(len(x))  # (B,)
    mean = euler_step(head, x, k, head.cfg.num_steps, cond)  # Eq. (5)
    # no validation: it reads values back to the CPU, so that each step would wait for the GPU
    return Normal(mean, sigma_net.log_sigma(cond.sigma, k, x).exp(), validate_args=False)  # Eqs. (6), (7)


# the signature of `transition`, so that a study can sample and score with another distribution
Transition = Callable[[FlowHead, SigmaNet | None, torch.Tensor, int | torch.Tensor, Condition], Normal]


def _at_steps(head: FlowHead, sigma_net: SigmaNet | None, cond: Condition) -> Condition:
    """Precompute the modulations of the chain's K times, for both networks."""
    sigma = sigma_net.at_steps(cond.sigma) if sigma_net and cond.sigma else cond.sigma
    return replace(head.at_steps(cond, head.cfg.num_steps), sigma=sigma)


@torch.no_grad()
def sample_chain(
    head: FlowHead,
    sigma_net: SigmaNet | None,
    cond: Condition,
    *,
    generator: torch.Generator | None = None,
    noise: torch.Tensor | None = None,
    step_noise: torch.Tensor | None = None,
    step: Transition = transition,
) -> Chain:
    """Sample action chunks step by step, Eq. (6).

    Args:
        head, sigma_net: the two networks.
        cond: condition made by `head.prepare(..., sigma_net=sigma_net)`; `.repeat(G)` for G chains per context.
        generator: source of all noise that is not given, on the networks' device.
        noise: (B, T, A), x_0; None = sample it.
        step_noise: (B, K, T, A), standard normal noise of the K steps; None = sample it.
        step: distribution of a step; if not the default, give the same to `chain_log_prob`.

    Returns:
        The chain x (B, K + 1, T, A) and the log_prob (B, K, T, A) of each scalar of each step, float32.
    """
    cfg, device, cond = head.cfg, cond.base.device, _at_steps(head, sigma_net, cond)
    shape = (cond.num_rows, cfg.chunk, cfg.action_dim)
    x = torch.randn(shape, generator=generator, device=device) if noise is None else noise.float()
    chain, log_probs = [x], []
    for k in range(cfg.num_steps):
        normal = step(head, sigma_net, x, k, cond)
        eps = torch.randn(shape, generator=generator, device=device) if step_noise is None else step_noise[:, k]
        x = normal.mean + normal.stddev * eps  # (B, T, A); Normal.sample takes no generator
        chain.append(x)
        log_probs.append(normal.log_prob(x))
    return Chain(torch.stack(chain, dim=1), torch.stack(log_probs, dim=1))


def chain_log_prob(
    head: FlowHead, sigma_net: SigmaNet | None, x: torch.Tensor, cond: Condition, step: Transition = transition
) -> LogProb:
    """Score a sampled chain, differentiably, all K steps in one batch: the terms of Eq. (8), before any reduction.

    Args:
        head, sigma_net: the two networks.
        x: (B, K + 1, T, A), chain of `sample_chain`.
        cond: as for sampling; its tensors may carry gradients.
        step: as for sampling.

    Returns:
        log_prob, entropy, mean and sigma, (B, K, T, A) each, float32.
    """
    cond, num_steps = _at_steps(head, sigma_net, cond), head.cfg.num_steps
    # one row per transition; (b k) keeps rows context-major, which is how the networks know each row's context
    before, after = (rearrange(part, "b k t a -> (b k) t a") for part in (x[:, :-1], x[:, 1:]))
    k = torch.arange(num_steps, device=x.device).repeat(len(x))  # (B * K,): 0..K-1 for each chain
    normal = step(head, sigma_net, before, k, cond)
    parts = normal.log_prob(after), normal.entropy(), normal.mean, normal.stddev
    return LogProb(*(rearrange(part, "(b k) t a -> b k t a", k=num_steps) for part in parts))


@torch.no_grad()
def sample_ode(head: FlowHead, cond: Condition, *, noise: torch.Tensor, num_steps: int = 10) -> torch.Tensor:
    """Integrate the flow by forward Euler: `noise` (B, T, A) at tau = 0 to normalised actions at tau = 1, float32."""
    x, cond = noise.float(), head.at_steps(cond, num_steps)
    for k in range(num_steps):
        x = euler_step(head, x, torch.full((len(x),), k, device=x.device), num_steps, cond)
    return x
