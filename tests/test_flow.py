"""Action head, sigma net and chain: one transition, exact scores, Eq. (4)-(8) by hand."""

import math
from dataclasses import replace

import pytest
import torch

from vlarft.flow import (
    chain_log_prob,
    euler_step,
    matching_loss,
    matching_pairs,
    regression_loss,
    sample_chain,
    sample_ode,
    sample_tau,
    transition,
)
from vlarft.nets.action_head import Condition, FlowConfig, FlowHead, SigmaNet
from vlarft.nets.dit import DiTConfig

CFG = FlowConfig(
    context_dim=12,
    embed_dim=6,
    dit=DiTConfig(width=16, depth=2, num_heads=2, mlp_dim=24, cross_attention_blocks=(0, 1), gamma_init=1.0),
)


def make(cfg: FlowConfig = CFG, std: float | None = 0.15) -> tuple[FlowHead, SigmaNet]:
    """Head and sigma net with random weights everywhere (std=None: as initialised)."""
    torch.manual_seed(0)
    head, sigma_net = FlowHead(cfg), SigmaNet(cfg)
    if std is not None:
        for parameter in (*head.parameters(), *sigma_net.parameters()):
            torch.nn.init.normal_(parameter, std=std)
    return head, sigma_net


def inputs(num: int = 2) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(num, 5, 12, generator=generator), torch.randn(num, 8, generator=generator)


def noise(num: int, seed: int = 2) -> torch.Tensor:
    return torch.randn(num, 8, 7, generator=torch.Generator().manual_seed(seed))


class ConstantVelocity(torch.nn.Module):
    """v(x, tau) = a - x0 for one known target: the flow that ends at `a` from anywhere only if x0 is the start."""

    def __init__(self, value: torch.Tensor) -> None:
        super().__init__()
        self.cfg, self.value, self.taus = CFG, value, []

    def at_steps(self, cond, num_steps):
        return cond

    def velocity(self, x, tau, cond, k=None):
        self.taus.append(tau)
        return self.value.expand_as(x)


def test_transition_by_hand():
    # Eq. (5): mu = x + v / K; sigma of an untrained net: the geometric mean of its bounds
    _, sigma_net = make(std=None)
    value = torch.full((8, 7), 3.0)
    context, proprio = inputs()
    head = make(std=None)[0]
    cond = head.prepare(context, proprio, sigma_net)
    x = noise(2)
    step = transition(ConstantVelocity(value), sigma_net, x, 4, cond)
    torch.testing.assert_close(step.mean, x + 0.3)
    torch.testing.assert_close(step.stddev, torch.full_like(x, math.sqrt(0.08 * 0.2)))
    assert math.sqrt(0.08 * 0.2) == pytest.approx(0.1265, abs=1e-4)


def test_clock_is_k_over_num_steps_in_float32():
    head = ConstantVelocity(torch.zeros(8, 7))
    real, sigma_net = make()
    cond = real.prepare(*inputs(), sigma_net)
    chain = sample_chain(head, sigma_net, cond, generator=torch.Generator().manual_seed(0))
    sampled, head.taus = head.taus, []
    chain_log_prob(head, sigma_net, chain.x, cond)
    scored = head.taus[0].view(2, 10)[0]
    sample_ode(head, cond, noise=noise(2), num_steps=10)
    for clock in (torch.stack(sampled)[:, 0], scored, torch.stack(head.taus[1:])[:, 0]):
        assert clock.dtype == torch.float32
        assert torch.equal(clock, torch.arange(10, dtype=torch.float32) / 10)


@pytest.mark.parametrize("uses_x", [False, True])
@pytest.mark.parametrize("group", [1, 3])
def test_log_prob_of_a_sampled_chain_is_the_recorded_one(uses_x, group):
    cfg = replace(CFG, sigma_uses_x=uses_x)
    head, sigma_net = make(cfg)
    cond = head.prepare(*inputs(), sigma_net).repeat(group)
    chain = sample_chain(head, sigma_net, cond, generator=torch.Generator().manual_seed(3))
    assert chain.x.shape == (2 * group, 11, 8, 7) and chain.log_prob.shape == (2 * group, 10, 8, 7)
    score = chain_log_prob(head, sigma_net, chain.x, cond)
    torch.testing.assert_close(score.log_prob, chain.log_prob, atol=1e-5, rtol=1e-5)
    # the Gaussian density and entropy by hand, for one element of one step
    cond_one = head.prepare(*inputs(), sigma_net)
    x = chain.x[:: group if group > 1 else 1, 6]
    step = transition(head, sigma_net, x, 6, cond_one)
    mu, sigma = step.mean[1, 2, 3].item(), step.stddev[1, 2, 3].item()
    after = chain.x[group, 7, 2, 3].item()
    by_hand = -(((after - mu) / sigma) ** 2) / 2 - math.log(sigma) - math.log(2 * math.pi) / 2
    assert score.log_prob[group, 6, 2, 3].item() == pytest.approx(by_hand, abs=1e-3)
    assert score.entropy[group, 6, 2, 3].item() == pytest.approx(
        0.5 * math.log(2 * math.pi * math.e * sigma**2), abs=1e-4
    )
    assert 0.08 <= sigma <= 0.2


def test_groups_equal_copies_of_the_context():
    head, sigma_net = make()
    context, proprio = inputs()
    grouped = head.prepare(context, proprio, sigma_net).repeat(3)
    copied = head.prepare(context.repeat_interleave(3, 0), proprio.repeat_interleave(3, 0), sigma_net)
    chains = [sample_chain(head, sigma_net, c, generator=torch.Generator().manual_seed(4)) for c in (grouped, copied)]
    torch.testing.assert_close(chains[0].x, chains[1].x, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(chains[0].log_prob, chains[1].log_prob, atol=1e-3, rtol=1e-3)
    again = head.prepare(context, proprio, sigma_net).repeat(3).repeat(2)
    assert again.num_rows == again.sigma.num_rows == 2 * 3 * 2


def test_modulations_ahead_of_the_steps_change_nothing():
    head, sigma_net = make()
    (context, proprio), num_steps = inputs(), head.cfg.num_steps
    cond = head.prepare(context, proprio, sigma_net).repeat(3)
    x, k = noise(6), torch.tensor([0, 3, 9, 5, 5, 1])
    ahead = head.at_steps(cond, num_steps)
    assert [m.shape for m in ahead.modulations] == [(num_steps, 2, 6 * 16)] * 2 + [(num_steps, 2, 2 * 16)]
    each, at_once = (head.velocity(x, k / num_steps, c, k) for c in (cond, ahead))
    torch.testing.assert_close(at_once, each, atol=1e-6, rtol=1e-5)
    each, at_once = (sigma_net.log_sigma(c, k) for c in (cond.sigma, sigma_net.at_steps(cond.sigma)))
    torch.testing.assert_close(at_once, each, atol=1e-6, rtol=1e-5)
    moved = head.velocity(x, k / num_steps, ahead, (k + 1) % num_steps)  # and k chooses them, not tau
    assert (moved - head.velocity(x, k / num_steps, cond)).abs().max() > 1e-3


def test_vanishing_sigma_is_the_ode():
    head, sigma_net = make(replace(CFG, sigma_min=1e-9, sigma_max=1e-9))
    cond = head.prepare(*inputs(), sigma_net)
    chain = sample_chain(head, sigma_net, cond, noise=noise(2), generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(chain.x[:, -1], sample_ode(head, cond, noise=noise(2)), atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("noise_kind", ["sigma_net", "flow_sde"])
def test_steps_without_noise_follow_the_ode_and_are_not_scored(noise_kind):
    head, sigma_net = make(replace(CFG, noisy_steps=(5, 2), noise=noise_kind))
    cond = head.prepare(*inputs(), sigma_net)
    chain = sample_chain(head, sigma_net, cond, noise=noise(2), generator=torch.Generator().manual_seed(0))
    assert chain.x.shape == (2, 11, 8, 7) and chain.log_prob.shape == (2, 2, 8, 7)
    step_of = [torch.full((2,), k) for k in range(10)]
    with torch.no_grad():
        moved = [
            (chain.x[:, k + 1] - euler_step(head, chain.x[:, k], step_of[k], 10, cond)).abs().max() for k in range(10)
        ]
    assert [k for k in range(10) if moved[k] > 0.05] == [2, 5] and max(moved[k] for k in (0, 1, 3, 9)) < 1e-5
    score = chain_log_prob(head, sigma_net, chain.x, cond)
    torch.testing.assert_close(score.log_prob, chain.log_prob, atol=1e-5, rtol=1e-5)
    assert score.mean.shape == score.sigma.shape == (2, 2, 8, 7)
    other = sample_chain(head, sigma_net, cond, noise=noise(2), step_noise=torch.stack([noise(2, 8), noise(2, 9)], 1))
    step = transition(head, sigma_net, other.x[:, 5], 5, cond)
    torch.testing.assert_close(other.x[:, 6], step.mean + step.stddev * noise(2, 9), atol=1e-6, rtol=1e-6)


def test_initial_sigma():
    for wanted in (0.1, 0.19):
        cfg = replace(CFG, sigma_init=wanted)
        head, sigma_net = make(cfg, std=None)
        cond = head.prepare(*inputs(), sigma_net)
        assert sigma_net.log_sigma(cond.sigma, torch.zeros(2)).exp().max().item() == pytest.approx(wanted, rel=1e-5)


class GaussianFlow(torch.nn.Module):
    """The exact velocity where actions are N(mean, std^2) in every dim: a Gaussian at all times."""

    def __init__(self, cfg, mean, std):
        super().__init__()
        self.cfg, self.mean, self.std = cfg, mean, std

    def at_steps(self, cond, num_steps):
        return cond

    def velocity(self, x, tau, cond, k=None):
        tau = tau[:, None, None]
        variance = (1 - tau) ** 2 + (tau * self.std) ** 2
        return self.mean + (tau * self.std**2 - (1 - tau)) / variance * (x - tau * self.mean)


@pytest.mark.parametrize("strength", [0.3, 0.7, 1.0])
def test_flow_sde_keeps_the_marginals_of_the_ode(strength):
    num_steps, rows = 200, 1000  # 56k chains of one scalar each: standard error of the variance 0.6 %
    cfg = replace(CFG, noise="flow_sde", sde_noise=strength, num_steps=num_steps, noisy_dims=(0, 1, 2, 3, 4, 5))
    head, generator = GaussianFlow(cfg, 0.7, 0.3), torch.Generator().manual_seed(0)
    cond = Condition({}, torch.zeros(rows, 1))
    x = torch.randn(rows, 8, 7, generator=generator)
    ode = sample_ode(head, cond, noise=x, num_steps=num_steps)
    chain = sample_chain(head, None, cond, noise=x, generator=generator)
    for k in (num_steps // 4, num_steps // 2, num_steps):
        tau = k / num_steps
        noisy = chain.x[:, k, :, :6]
        assert noisy.mean().item() == pytest.approx(0.7 * tau, abs=0.015)
        assert noisy.var().item() == pytest.approx((1 - tau) ** 2 + (0.3 * tau) ** 2, rel=0.05)
    torch.testing.assert_close(chain.x[:, -1, :, 6], ode[..., 6], atol=1e-5, rtol=1e-5)  # no noise: the ODE itself
    assert (chain.x[:, -1, :, :6] - ode[..., :6]).abs().mean() > 0.05  # and with noise other chunks than the ODE's


def test_noise_without_the_correction_widens_the_marginals():
    # what the sigma net's plain added noise does to the same flow
    cfg = replace(CFG, sigma_min=0.1265, sigma_max=0.1265)
    head, sigma_net = GaussianFlow(cfg, 0.7, 0.3), make(cfg)[1]
    cond = Condition({}, torch.zeros(1000, 1), sigma=sigma_net.prepare(*(v[:1] for v in inputs())))
    plain = sample_chain(head, sigma_net, cond, generator=torch.Generator().manual_seed(0)).x[:, -1].var().item()
    sde = GaussianFlow(replace(CFG, noise="flow_sde", sde_noise=0.3), 0.7, 0.3)
    kept = sample_chain(sde, None, cond, generator=torch.Generator().manual_seed(0)).x[:, -1].var().item()
    ode = sample_ode(head, cond, noise=torch.randn(1000, 8, 7)).var().item()
    assert plain > 1.3 * ode and kept == pytest.approx(ode, rel=0.15)  # at the K = 10 of training


def test_flow_sde_step_by_hand():
    cfg = replace(CFG, noise="flow_sde", sde_noise=0.5)
    head = ConstantVelocity(torch.full((8, 7), 3.0))
    head.cfg = cfg
    x = noise(1)
    for k, c in ((0, 0.25 / 2 / 0.1), (4, 0.25 / 2 / 0.4), (9, 0.25 / 2 / 0.9)):  # at 0 the clock is held at 1 / K
        tau = k / 10
        step = transition(head, None, x, k, None)
        torch.testing.assert_close(step.mean, x + (3 + c * (tau * 3 - x)) / 10)
        assert step.stddev.unique().item() == pytest.approx(math.sqrt(2 * c * (1 - tau) / 10), rel=1e-5)


def test_flow_sde_scores_what_it_samples_and_vanishes_into_the_ode():
    head, _ = make(replace(CFG, noise="flow_sde"))
    cond = head.prepare(*inputs()).repeat(3)
    chain = sample_chain(head, None, cond, generator=torch.Generator().manual_seed(0))
    score = chain_log_prob(head, None, chain.x, cond)
    torch.testing.assert_close(score.log_prob, chain.log_prob, atol=2e-4, rtol=1e-5)
    score.log_prob.sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in head.parameters())
    head.cfg = replace(CFG, noise="flow_sde", sde_noise=1e-6)
    chain = sample_chain(head, None, cond, noise=noise(6), generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(chain.x[:, -1], sample_ode(head, cond, noise=noise(6)), atol=1e-4, rtol=1e-4)


def test_ode_by_hand():
    # a constant velocity moves by itself, whatever the number of steps
    head = ConstantVelocity(torch.full((8, 7), 0.5))
    for num_steps in (1, 4, 10):
        torch.testing.assert_close(sample_ode(head, None, noise=noise(2), num_steps=num_steps), noise(2) + 0.5)


def test_dims_without_noise_follow_the_mean_and_do_not_count():
    head, sigma_net = make(replace(CFG, noisy_dims=(0, 1, 2)))
    cond = head.prepare(*inputs(), sigma_net)
    chain = sample_chain(head, sigma_net, cond, noise=noise(2), generator=torch.Generator().manual_seed(0))
    step = transition(head, sigma_net, chain.x[:, 3], 3, cond)
    torch.testing.assert_close(chain.x[:, 4, :, 3:], step.mean[..., 3:].detach(), atol=1e-5, rtol=1e-5)
    assert (chain.x[:, 4, :, :3] - step.mean[..., :3]).abs().mean() > 0.05
    score = chain_log_prob(head, sigma_net, chain.x, cond)
    assert not chain.log_prob[..., 3:].any() and not score.log_prob[..., 3:].any() and not score.entropy[..., 3:].any()
    torch.testing.assert_close(score.log_prob, chain.log_prob, atol=1e-5, rtol=1e-5)


def test_matching_loss_by_hand():
    # v = 0: the loss is E (a - eps)^2 = a^2 + 1 for a constant action
    head, _ = make(std=None)
    cond = head.prepare(*inputs())
    actions = torch.full((2, 8, 7), 2.0)
    loss, metrics = matching_loss(head, actions, cond, generator=torch.Generator().manual_seed(0), draws=200)
    assert loss.item() == pytest.approx(5.0, abs=0.05) and metrics["flow_mse"].item() == loss.item()
    # one draw, everything by hand
    generator = torch.Generator().manual_seed(7)
    tau = sample_tau(2, 1.5, 1.0, generator=generator)
    eps = torch.randn(2, 8, 7, generator=generator)
    head, _ = make()
    cond = head.prepare(*inputs())
    t = tau[:, None, None]
    expected = (head.velocity(t * actions + (1 - t) * eps, tau, cond) - (actions - eps)).square().mean()
    loss, _ = matching_loss(head, actions, cond, generator=torch.Generator().manual_seed(7))
    torch.testing.assert_close(loss, expected, atol=1e-5, rtol=1e-5)


def test_regression_loss_by_hand():
    # v = 0: the chunk stays x_0, and E |x_0 - a| = sqrt(2 / pi) for a = 0
    head, _ = make(std=None)
    cond = head.prepare(*inputs())
    loss, metrics = regression_loss(
        head, torch.zeros(2, 8, 7), cond, generator=torch.Generator().manual_seed(0), draws=300
    )
    assert loss.item() == pytest.approx((2 / torch.pi) ** 0.5, abs=0.01) and metrics["chunk_l1"].item() == loss.item()
    # the chunks of the ODE from the same x_0, and a gradient that goes back through every step
    head, _ = make()
    actions = noise(2, 3)
    loss, _ = regression_loss(head, actions, head.prepare(*inputs()), generator=torch.Generator().manual_seed(7))
    x0 = torch.randn(2, 8, 7, generator=torch.Generator().manual_seed(7))
    chunks = sample_ode(head, head.prepare(*inputs()), noise=x0)
    torch.testing.assert_close(loss, (chunks - actions).abs().mean(), atol=1e-5, rtol=1e-5)
    loss.backward()
    bias = head.net.dit.out.bias
    losses = []
    for step in (1e-3, -2e-3):
        with torch.no_grad():
            bias[2] += step
        generator = torch.Generator().manual_seed(7)
        losses.append(regression_loss(head, actions, head.prepare(*inputs()), generator=generator)[0].item())
    assert bias.grad[2].item() == pytest.approx((losses[0] - losses[1]) / 2e-3, rel=0.03)


def test_matching_pairs_and_weights_by_hand():
    head, _ = make()
    actions = noise(4, 3)
    context, proprio = (v.repeat(2, *[1] * (v.ndim - 1)) for v in inputs())
    tau, eps = matching_pairs((4, 8, 7), 3, generator=torch.Generator().manual_seed(0))
    assert tau.shape == (4, 3) and eps.shape == (4, 3, 8, 7)
    whole, _ = matching_loss(head, actions, head.prepare(context, proprio), pairs=(tau, eps), draws=3)
    parts, weighted = [], []
    for i in range(4):
        row = slice(i, i + 1)
        cond = head.prepare(context[row], proprio[row])
        parts.append(matching_loss(head, actions[row], cond, pairs=(tau[row], eps[row]), draws=3)[0])
        weighted.append(parts[-1] * (0.5 * i + 0.25))
    torch.testing.assert_close(whole, torch.stack(parts).mean(), atol=1e-5, rtol=1e-5)
    weights = torch.tensor([0.25, 0.75, 1.25, 1.75])
    cond = head.prepare(context, proprio)
    actual, _ = matching_loss(head, actions, cond, pairs=(tau, eps), draws=3, weights=weights)
    torch.testing.assert_close(actual, torch.stack(weighted).mean(), atol=1e-5, rtol=1e-5)


def test_tau_is_beta_distributed():
    tau = sample_tau(20_000, 1.5, 1.0, generator=torch.Generator().manual_seed(0))
    assert tau.dtype == torch.float32 and tau.min() >= 0 and tau.max() <= 1
    # Beta(a, 1) has the distribution function x ** a
    ordered = tau.sort().values
    gap = (ordered**1.5 - torch.arange(len(tau)) / len(tau)).abs().max()
    assert gap < 1.63 / len(tau) ** 0.5  # Kolmogorov-Smirnov, 1 %
    other = sample_tau(20_000, 2.0, 5.0, generator=torch.Generator().manual_seed(0))
    assert other.mean().item() == pytest.approx(2 / 7, abs=0.01)
    assert torch.equal(tau, sample_tau(20_000, 1.5, 1.0, generator=torch.Generator().manual_seed(0)))


def test_gradients_reach_both_networks_and_the_context():
    for uses_x in (False, True):
        head, sigma_net = make(replace(CFG, sigma_uses_x=uses_x))
        context, proprio = inputs()
        context.requires_grad_()
        cond = head.prepare(context, proprio, sigma_net)
        chain = sample_chain(head, sigma_net, cond, generator=torch.Generator().manual_seed(5))
        assert not chain.x.requires_grad
        chain_log_prob(head, sigma_net, chain.x, cond).log_prob.sum().backward()
        for name, parameter in (*head.named_parameters(), *sigma_net.named_parameters()):
            assert parameter.grad is not None and parameter.grad.abs().sum() > 0, name
        assert context.grad.abs().sum() > 0


def test_sampling_is_a_function_of_its_generator():
    head, sigma_net = make()
    cond = head.prepare(*inputs(), sigma_net)
    chains = [sample_chain(head, sigma_net, cond, generator=torch.Generator().manual_seed(s)).x for s in (0, 0, 1)]
    assert torch.equal(chains[0], chains[1]) and not torch.equal(chains[0], chains[2])


def test_bf16_autocast_leaves_the_chain_in_float32():
    head, sigma_net = make(std=0.1)
    with torch.autocast("cpu", torch.bfloat16):
        cond = head.prepare(*inputs(), sigma_net)
        chain = sample_chain(head, sigma_net, cond, generator=torch.Generator().manual_seed(0))
        score = chain_log_prob(head, sigma_net, chain.x, cond)
    assert {chain.x.dtype, chain.log_prob.dtype, score.log_prob.dtype, score.entropy.dtype} == {torch.float32}


def test_errors():
    head, sigma_net = make()
    context, proprio = inputs()
    with pytest.raises(ValueError, match=r"context: got shape \(2, 5, 11\), expected \(S, N, 12\)"):
        head.prepare(context[..., :11], proprio)
    with pytest.raises(ValueError, match=r"proprio: got shape \(1, 8\), expected \(2, 8\)"):
        head.prepare(context, proprio[:1])
    with pytest.raises(ValueError, match="no part for the sigma net"):
        transition(head, sigma_net, noise(2), 0, head.prepare(context, proprio))
    with pytest.raises(ValueError, match="3 rows do not divide among 2 contexts"):
        head.velocity(noise(3), torch.zeros(3), head.prepare(context, proprio))
    with pytest.raises(ValueError, match=r"sigma_min 0.3 and sigma_max 0.2; expected 0 < sigma_min <= sigma_max"):
        SigmaNet(replace(CFG, sigma_min=0.3))
    with pytest.raises(ValueError, match=r"noisy_dims \(7,\): expected one or more dims in 0\.\.6"):
        SigmaNet(replace(CFG, noisy_dims=(7,)))
    with pytest.raises(ValueError, match=r"noisy_steps \(10,\): expected one or more steps in 0\.\.9"):
        replace(CFG, noisy_steps=(10,))
    with pytest.raises(ValueError, match=r"sigma_init 0.5: expected between sigma_min 0.08 and sigma_max 0.2"):
        replace(CFG, sigma_init=0.5)
    with pytest.raises(ValueError, match="sde_noise must be positive, got 0"):
        replace(CFG, sde_noise=0.0)
