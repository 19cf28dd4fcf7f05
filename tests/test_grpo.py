"""grpo: hand-computed advantage, log-prob, ratio and clip tables."""

import math

import pytest
import torch

from vlarft.grpo import (
    advantages,
    chain_log_prob,
    credited,
    gaussian_kl,
    mean_entropy,
    mse_gate,
    policy_loss,
    policy_ratio,
    regression_weights,
    sampled_kl,
)


def test_advantage_by_hand():
    rewards = torch.tensor([[1.0, 2.0, 6.0], [4.0, 4.0, 4.0]])
    assert advantages(rewards).tolist() == [[-2.0, -1.0, 3.0], [0.0, 0.0, 0.0]]
    std = math.sqrt((4 + 1 + 9) / 2)  # unbiased
    scaled = advantages(rewards, divide_by_std=True)
    torch.testing.assert_close(scaled[0], torch.tensor([-2.0, -1.0, 3.0]) / std, atol=1e-5, rtol=0)
    assert scaled[1].tolist() == [0.0, 0.0, 0.0]


def test_constant_group_is_exactly_zero():
    rewards = torch.full((1, 7), 0.1)  # the float32 mean of seven 0.1 is not 0.1
    assert advantages(rewards, divide_by_std=True).abs().max() == 0


def test_advantage_needs_a_group():
    with pytest.raises(ValueError, match=r"at least 2 rollouts a start, got \(3, 1\)"):
        advantages(torch.zeros(3, 1))


def test_credit_by_hand():
    per_frame = torch.tensor([[[1.0, 2.0, 4.0], [0.0, 3.0, 4.0], [2.0, 1.0, 4.0]]])  # (1, 3, 3)
    assert credited(per_frame, "chunk").tolist() == [[7.0, 7.0, 7.0]]
    assert credited(per_frame, "to_go").tolist() == [[[7.0, 6.0, 4.0], [7.0, 7.0, 4.0], [7.0, 5.0, 4.0]]]
    assert credited(per_frame, "frame") is per_frame
    assert advantages(credited(per_frame, "frame")).tolist() == [[[0.0, 0.0, 0.0], [-1.0, 1.0, 0.0], [1.0, -1.0, 0.0]]]
    scaled = advantages(credited(per_frame, "to_go"), divide_by_std=True)  # each step by its own group's deviation
    torch.testing.assert_close(scaled[0, :, 1], torch.tensor([0.0, 1.0, -1.0]), atol=1e-5, rtol=0)
    assert scaled[..., [0, 2]].abs().max() == 0


def test_ratio_per_step_by_hand():
    new = torch.tensor([[2.0, 0.5], [1.1, 1.0]]).log()  # (B, T)
    advantage = torch.tensor([[1.0, -1.0], [2.0, 3.0]])
    loss, metrics = policy_loss(new, torch.zeros(2, 2), advantage)
    assert loss.item() == pytest.approx(-(1.2 - 0.8 + 2.2 + 3.0) / 4)
    elements = policy_loss(torch.stack([new, new], -1), torch.zeros(2, 2, 2), advantage)
    assert elements[0].item() == pytest.approx(loss.item()) and elements[1] == pytest.approx(metrics)
    with pytest.raises(ValueError, match="advantages of action steps .* need a ratio per step or element"):
        policy_loss(new[:, 0], torch.zeros(2), advantage)


def test_chain_log_prob_by_hand():
    log_prob = torch.arange(12.0).view(1, 3, 2, 2)  # steps sum to 6, 22, 38
    assert chain_log_prob(log_prob).tolist() == [22.0]
    assert chain_log_prob(log_prob, "sum").tolist() == [66.0]
    assert chain_log_prob(log_prob, "mean", "step").tolist() == [[9.0, 13.0]]
    assert chain_log_prob(log_prob, "mean", "element").tolist() == [[[4.0, 5.0], [6.0, 7.0]]]
    assert chain_log_prob(log_prob, "sum", "element").tolist() == [[[12.0, 15.0], [18.0, 21.0]]]


def test_ratio_by_hand():
    ratio = policy_ratio(torch.tensor([0.0, math.log(2)]), torch.tensor([0.0, math.log(4)]))
    torch.testing.assert_close(ratio, torch.tensor([1.0, 0.5]))


@pytest.mark.parametrize(
    ("ratio", "advantage", "clip", "ppo"),
    [
        (1.0, 2.0, -2.0, -2.0),
        (1.5, 2.0, -2.4, -2.4),  # clipped to 1.2
        (1.5, -2.0, 2.4, 3.0),  # PPO keeps the worse one
        (0.5, 2.0, -1.4, -1.0),  # clipped to 0.7
        (0.5, -2.0, 1.4, 1.4),
    ],
)
def test_policy_loss_table(ratio, advantage, clip, ppo):
    new, old, adv = torch.tensor([math.log(ratio)]), torch.zeros(1), torch.tensor([advantage])
    bounds = {"clip_low": 0.3, "clip_high": 0.2}
    torch.testing.assert_close(policy_loss(new, old, adv, **bounds)[0], torch.tensor(clip))
    loss, metrics = policy_loss(new, old, adv, objective="ppo", **bounds)
    torch.testing.assert_close(loss, torch.tensor(ppo))
    assert metrics["clip_frac"] == float(ratio != 1.0)
    assert metrics["ratio_mean"] == pytest.approx(ratio)
    assert metrics["approx_kl"] == pytest.approx(ratio - 1 - math.log(ratio), abs=1e-6)


@pytest.mark.parametrize(
    ("ratio", "advantage", "expected", "held"),
    [
        (5.0, -2.0, 6.0, 1.0),  # without the bound 10
        (2.5, -2.0, 5.0, 0.0),
        (5.0, 2.0, -2.4, 0.0),  # a positive advantage is bounded by the clip
        (0.5, -2.0, 1.6, 0.0),
    ],
)
def test_dual_clip_table(ratio, advantage, expected, held):
    log_prob = torch.tensor([math.log(ratio)], requires_grad=True)
    loss, metrics = policy_loss(
        log_prob, torch.zeros(1), torch.tensor([advantage]), objective="ppo", dual_clip=3.0, clip_low=0.2
    )
    loss.backward()
    assert loss.item() == pytest.approx(expected) and metrics["dual_clip_frac"] == held
    assert (log_prob.grad.item() == 0) == (ratio != 2.5)


def test_dual_clip_errors():
    one = torch.ones(1)
    with pytest.raises(ValueError, match=r"dual_clip 3.0 bounds PPO's minimum, objective 'clip' has none"):
        policy_loss(one, one, one, dual_clip=3.0)
    with pytest.raises(ValueError, match=r"dual_clip 1.1 must exceed 1 \+ clip_high = 1.2"):
        policy_loss(one, one, one, objective="ppo", dual_clip=1.1)


def test_ratio_per_element_by_hand():
    # two chunks of two scalars; the same chunk ratios 1.0 and 0.5, but not the same elements
    new = torch.tensor([[[2.0, 0.5]], [[0.5, 1.0]]]).log()  # (B, T, A)
    loss, metrics = policy_loss(new, torch.zeros(2, 1, 2), torch.tensor([1.0, -1.0]))
    assert loss.item() == pytest.approx(-(1.2 + 0.8 - 0.8 - 1.0) / 4)
    assert metrics["ratio_max"] == pytest.approx(2.0) and metrics["clip_frac"] == 0.75


def test_gradient_is_advantage_times_score_on_policy():
    log_prob = torch.tensor([0.3, -0.2], dtype=torch.float32, requires_grad=True)
    loss, _ = policy_loss(log_prob, log_prob.detach(), torch.tensor([1.0, -3.0]))
    loss.backward()
    torch.testing.assert_close(log_prob.grad, torch.tensor([-0.5, 1.5]))


def test_gradient_against_finite_differences():
    old, adv = torch.zeros(6), torch.tensor([1.0, -2.0, 0.5, 3.0, -1.0, -1.0])
    log_prob = torch.tensor([0.1, -0.1, 0.05, -0.15, 0.6, 1.5], requires_grad=True)  # two outside the clip range
    for options in ({}, {"objective": "ppo"}, {"objective": "ppo", "dual_clip": 3.0}):
        log_prob.grad = None
        policy_loss(log_prob, old, adv, **options)[0].backward()
        for i in range(6):
            step = torch.zeros(6)
            step[i] = 1e-3
            above, below = (policy_loss(log_prob.detach() + s * step, old, adv, **options)[0] for s in (1, -1))
            assert log_prob.grad[i].item() == pytest.approx((above - below).item() / 2e-3, rel=1e-2), (options, i)


def test_entropy_is_the_mean_over_all_scalars():
    assert mean_entropy(torch.tensor([[[[1.0, 3.0]]], [[[5.0, 7.0]]]])) == 4.0
    assert mean_entropy(torch.tensor([[[[1.0, 3.0]], [[5.0, 7.0]]]]), "k+1").item() == pytest.approx((2 + 6) / 3)


def test_mse_gate_table():
    assert [mse_gate(kl, 0.2) for kl in (-0.1, 0.0, 0.05, 0.2, 3.0)] == [0.0, 0.0, 0.25, 1.0, 1.0]
    assert mse_gate(0.0, None) == 1.0


def test_kl_by_hand():
    # N(0, 1) to N(1, 2): log 2 + (1 + 1) / 8 - 1 / 2
    pair = torch.tensor(0.0), torch.tensor(1.0), torch.tensor(1.0), torch.tensor(2.0)
    exact = math.log(2) + 0.25 - 0.5
    assert gaussian_kl(*pair).item() == pytest.approx(exact)
    assert gaussian_kl(*pair[:2], *pair[:2]).item() == 0
    here, there = torch.distributions.Normal(*pair[:2]), torch.distributions.Normal(*pair[2:])
    torch.testing.assert_close(gaussian_kl(*pair), torch.distributions.kl_divergence(here, there))
    x = torch.randn(200_000, generator=torch.Generator().manual_seed(0))
    estimate = sampled_kl(here.log_prob(x), there.log_prob(x))
    assert estimate.min() >= 0 and estimate.mean().item() == pytest.approx(exact, rel=0.02)


def test_regression_weights_by_hand():
    rewards = torch.tensor([[0.0, 1.0, 2.0], [3.0, 3.0, 3.0]])  # standardised: -1, 0, 1
    weights = regression_weights(rewards, 0.5)
    total = math.exp(-2) + 1 + math.exp(2)
    expected = torch.tensor([3 * math.exp(-2) / total, 3 / total, 3 * math.exp(2) / total])
    torch.testing.assert_close(weights[0], expected, atol=1e-4, rtol=0)
    assert weights[1].tolist() == [1.0, 1.0, 1.0]
    with pytest.raises(ValueError, match="rwr_temperature must be positive, got 0"):
        regression_weights(rewards, 0.0)
