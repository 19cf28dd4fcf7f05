"""Action head, sigma net and chain: one transition, exact scores, Eq. (4)-(8) by hand."""

import math
from dataclasses import replace

import pytest
import torch

from vlarft.flow import (
    chain_log_prob,
    initial_noise,
    matching_loss,
    matching_pairs,
    regression_loss,
    sample_chain,
    sample_ode,
    sample_tau,
    transition,
)
from vlarft.nets.action_head import FlowConfig, FlowHead, SigmaNet
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


def test_ode_by_hand():
    # a constant velocity moves by itself, whatever the number of steps
    head = ConstantVelocity(torch.full((8, 7), 0.5))
    for num_steps in (1, 4, 10):
        torch.testing.assert_close(sample_ode(head, None, noise=noise(2), num_steps=num_steps), noise(2) + 0.5)


def test_x_0_by_hand():
    source = torch.Generator()
    sampled = initial_noise("sampled", (2, 8, 7), (6,), source.manual_seed(0))
    assert torch.equal(sampled, torch.randn(2, 8, 7, generator=source.manual_seed(0)))
    assert torch.equal(initial_noise("zero", (8, 7), (6,)), torch.zeros(8, 7))
    gripper = initial_noise("gripper", (2, 8, 7), (2, 6), source.manual_seed(0))
    assert torch.equal(gripper, sampled * torch.tensor([0, 0, 1, 0, 0, 0, 1]))


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
    bias = head.output.bias
    losses = []
    for step in (1e-3, -2e-3):
        with torch.no_grad():
            bias[2] += step
        generator = torch.Generator().manual_seed(7)
        losses.append(regression_loss(head, actions, head.prepare(*inputs()), generator=generator)[0].item())
    assert bias.grad[2].item() == pytest.approx((losses[0] - losses[1]) / 2e-3, rel=0.03)


def test_matching_pairs_by_hand():
    head, _ = make()
    actions = noise(4, 3)
    context, proprio = (v.repeat(2, *[1] * (v.ndim - 1)) for v in inputs())
    tau, eps = matching_pairs((4, 8, 7), 3, generator=torch.Generator().manual_seed(0))
    assert tau.shape == (4, 3) and eps.shape == (4, 3, 8, 7)
    whole, _ = matching_loss(head, actions, head.prepare(context, proprio), pairs=(tau, eps), draws=3)
    parts = []
    for i in range(4):
        row = slice(i, i + 1)
        cond = head.prepare(context[row], proprio[row])
        parts.append(matching_loss(head, actions[row], cond, pairs=(tau[row], eps[row]), draws=3)[0])
    torch.testing.assert_close(whole, torch.stack(parts).mean(), atol=1e-5, rtol=1e-5)


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
