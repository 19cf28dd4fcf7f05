"""grpo: advantage, log-prob, ratio, clipped loss and entropy against hand-computed tables."""

import math

import pytest
import torch

from vlarft.grpo import advantages, chain_log_prob, mean_entropy, policy_loss, policy_ratio


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


def test_advantage_per_step_by_hand():
    per_frame = torch.tensor([[[1.0, 2.0, 4.0], [0.0, 3.0, 4.0], [2.0, 1.0, 4.0]]])  # (1, 3, 3)
    assert advantages(per_frame).tolist() == [[[0.0, 0.0, 0.0], [-1.0, 1.0, 0.0], [1.0, -1.0, 0.0]]]
    scaled = advantages(2 * per_frame, divide_by_std=True)  # each step by its own standard deviation over the group
    torch.testing.assert_close(scaled[0, :, 0], torch.tensor([0.0, -1.0, 1.0]), atol=1e-5, rtol=0)
    assert scaled[..., 2].abs().max() == 0


def test_chain_log_prob_by_hand():
    log_prob = torch.arange(12.0).view(1, 3, 2, 2)  # flow steps sum to 6, 22, 38
    assert chain_log_prob(log_prob).tolist() == [22.0]
    assert chain_log_prob(log_prob, per_step=True).tolist() == [[9.0, 13.0]]


def test_ratio_by_hand():
    ratio = policy_ratio(torch.tensor([0.0, math.log(2)]), torch.tensor([0.0, math.log(4)]))
    torch.testing.assert_close(ratio, torch.tensor([1.0, 0.5]))


@pytest.mark.parametrize(
    ("ratio", "advantage", "expected"),
    [
        (1.0, 2.0, -2.0),
        (1.5, 2.0, -2.4),  # clipped to 1.2
        (1.5, -2.0, 2.4),  # clipped as well, where PPO would keep 3.0
        (0.5, 2.0, -1.6),  # clipped to 0.8
        (0.5, -2.0, 1.6),
    ],
)
def test_policy_loss_table(ratio, advantage, expected):
    new, old, adv = torch.tensor([math.log(ratio)]), torch.zeros(1), torch.tensor([advantage])
    loss, metrics = policy_loss(new, old, adv, clip=0.2)
    torch.testing.assert_close(loss, torch.tensor(expected))
    assert metrics["clip_frac"] == float(ratio != 1.0)
    assert metrics["ratio_mean"] == metrics["ratio_max"] == pytest.approx(ratio)
    assert metrics["approx_kl"] == pytest.approx(ratio - 1 - math.log(ratio), abs=1e-6)


def test_policy_loss_per_step_by_hand():
    new = torch.tensor([[2.0, 0.5], [1.1, 1.0]]).log()  # (B, T)
    advantage = torch.tensor([[1.0, -1.0], [2.0, 3.0]])
    loss, metrics = policy_loss(new, torch.zeros(2, 2), advantage)
    assert loss.item() == pytest.approx(-(1.2 - 0.8 + 2.2 + 3.0) / 4)
    assert metrics["clip_frac"] == 0.5 and metrics["ratio_max"] == pytest.approx(2.0)
    with pytest.raises(ValueError, match=r"log_prob \(2,\), old_log_prob \(2,\) and advantage \(2, 2\) must have one"):
        policy_loss(new[:, 0], torch.zeros(2), advantage)


def test_gradient_is_advantage_times_score_on_policy():
    log_prob = torch.tensor([0.3, -0.2], dtype=torch.float32, requires_grad=True)
    loss, _ = policy_loss(log_prob, log_prob.detach(), torch.tensor([1.0, -3.0]))
    loss.backward()
    torch.testing.assert_close(log_prob.grad, torch.tensor([-0.5, 1.5]))


def test_gradient_against_finite_differences():
    old, adv = torch.zeros(6), torch.tensor([1.0, -2.0, 0.5, 3.0, -1.0, -1.0])
    log_prob = torch.tensor([0.1, -0.1, 0.05, -0.15, 0.6, 1.5], requires_grad=True)  # two outside the clip range
    policy_loss(log_prob, old, adv)[0].backward()
    for i in range(6):
        step = torch.zeros(6)
        step[i] = 1e-3
        above, below = (policy_loss(log_prob.detach() + s * step, old, adv)[0] for s in (1, -1))
        assert log_prob.grad[i].item() == pytest.approx((above - below).item() / 2e-3, rel=1e-2, abs=1e-6), i


def test_entropy_is_the_mean_over_all_scalars():
    assert mean_entropy(torch.tensor([[[[1.0, 3.0]]], [[[5.0, 7.0]]]])) == 4.0
