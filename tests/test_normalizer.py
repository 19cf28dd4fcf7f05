"""normalizer: quantiles, clipping, gripper conventions."""

import numpy as np
import pytest
import torch

from vlarft.data.episode import Episode
from vlarft.normalizer import Normalizer, check_same_units, intended_and_proprio


def fitted(gripper="zero_one_open", n=1001):
    ramp = torch.linspace(-1, 1, n)
    actions = torch.stack([ramp * s for s in (1, 2, 3, 4, 5)] + [torch.full((n,), 0.3), torch.sign(ramp + 1e-3)], 1)
    proprio = torch.stack([ramp * (i + 1) for i in range(8)], 1)
    return Normalizer(gripper=gripper).fit(actions, proprio), actions, proprio


def test_quantiles_match_torch():
    normalizer, actions, proprio = fitted()
    levels = torch.tensor([0.01, 0.99])
    low, high = torch.quantile(actions[:, :-1], levels, dim=0)
    torch.testing.assert_close(normalizer.action_low, low)
    torch.testing.assert_close(normalizer.action_high, high)
    low, high = torch.quantile(proprio, levels, dim=0)
    torch.testing.assert_close(normalizer.proprio_low, low)


@pytest.mark.parametrize("gripper", ["zero_one_open", "identity"])
def test_round_trip_and_clip(gripper):
    normalizer, actions, _ = fitted(gripper)
    inside = actions[100:-100]
    torch.testing.assert_close(normalizer.decode_actions(normalizer.encode_actions(inside)), inside)
    extreme = normalizer.encode_actions(actions[-1:] * torch.tensor([9.0] * 5 + [1, 1]))
    assert extreme[0, :5].tolist() == [1.0] * 5
    assert extreme[0, 5] == 0  # constant dimension
    assert normalizer.decode_actions(torch.full((1, 7), 50.0))[0, 0] == normalizer.action_high[0]


def test_proprio_by_hand():
    normalizer, quantiles = Normalizer(), (torch.zeros(6), torch.ones(6))
    low, high = torch.tensor([0.0, 1, 2, 3, 4, 5, 6, 7]), torch.tensor([2.0, 2, 6, 4, 4, 6, 16, 8])
    normalizer.set_quantiles(*quantiles, low, high)
    raw = torch.tensor([0.5, 2.0, 5.0, -9.0, 123.0, 5.5, 6.0, 99.0])
    assert normalizer.encode_proprio(raw).tolist() == [-0.5, 1.0, 0.5, -1.0, 0.0, 0.0, -1.0, 1.0]  # 4 never moves


def test_gripper_conventions():
    opening, closing = torch.tensor([[0.0] * 6 + [-1]]), torch.tensor([[0.0] * 6 + [1]])
    zero_one, same = Normalizer(), Normalizer(gripper="identity")
    assert (zero_one.encode_actions(opening)[0, -1], zero_one.encode_actions(closing)[0, -1]) == (1, 0)
    assert (same.encode_actions(opening)[0, -1], same.encode_actions(closing)[0, -1]) == (-1, 1)
    assert zero_one.decode_actions(torch.tensor([[0.0] * 6 + [0.6]]))[0, -1] == -1
    assert same.decode_actions(torch.tensor([[0.0] * 6 + [0.1]]))[0, -1] == 1


def test_numbers_are_saved_with_the_policy():
    normalizer, actions, _ = fitted()
    other = Normalizer()
    other.load_state_dict(normalizer.state_dict())
    torch.testing.assert_close(other.encode_actions(actions), normalizer.encode_actions(actions))
    assert bool(other.fitted)


def test_errors():
    good_actions, good_proprio = torch.zeros(5, 7), torch.zeros(5, 8)
    with pytest.raises(ValueError, match=r"actions must have shape \(N, 7\), got \(5, 6\)"):
        Normalizer().fit(good_actions[:, :6], good_proprio)
    bad = good_actions.clone()
    bad[3, 2] = float("nan")
    with pytest.raises(ValueError, match="actions has NaN or infinite values, first in row 3"):
        Normalizer().fit(bad, good_proprio)
    with pytest.raises(ValueError, match=r"gripper actions must lie in \[-1, 1\]"):
        Normalizer().fit(good_actions + 2, good_proprio)
    with pytest.raises(ValueError, match="proprio must have 8 values, got 7"):
        Normalizer().encode_proprio(torch.zeros(1, 7))
    with pytest.raises(ValueError, match="proprio has NaN"):
        Normalizer().encode_proprio(torch.full((1, 8), float("nan")))


def test_statistics_of_another_robot():
    normalizer = Normalizer()
    low, high = torch.full((6,), -0.5), torch.full((6,), 0.5)
    with pytest.raises(ValueError, match=r"proprio statistics of shape \(9,\) and \(9,\), expected \(8,\): .*another"):
        normalizer.set_quantiles(low, high, torch.zeros(9), torch.ones(9))
    with pytest.raises(ValueError, match="action statistics must be finite, low <= high"):
        normalizer.set_quantiles(high, low, torch.zeros(8), torch.ones(8))
    with pytest.raises(ValueError, match="proprio statistics must be finite"):
        normalizer.set_quantiles(low, high, torch.zeros(8), torch.full((8,), torch.nan))
    assert not normalizer.fitted
    normalizer.set_quantiles(low, high, torch.zeros(8), torch.tensor([1.0] * 7 + [0.0]))
    assert normalizer.fitted and normalizer.action_high.tolist() == [0.5] * 6

    actions, proprio = torch.full((10, 7), 0.1), torch.full((10, 8), 0.5)  # a constant dimension may lie elsewhere
    actions[:5, 3] = 2.0
    normalizer.check(actions, proprio)
    proprio[::2, 7] = 0.6
    with pytest.raises(
        ValueError, match=r"units: proprio 7 moves in the demonstrations and is always 0 in them, .*refit"
    ):
        normalizer.check(actions, proprio)
    normalizer.check(actions.repeat(30, 1), torch.cat([proprio[:1], proprio[1:2].repeat(299, 1)]))  # a glitch
    proprio[:, 7] = 0.5
    still, flat = Normalizer(gripper_dims=(0,)), torch.cat([low[:5], torch.zeros(1)])  # action 6, after the gripper
    still.set_quantiles(flat, flat.abs(), torch.zeros(8), torch.ones(8))
    with pytest.raises(ValueError, match=r"units: action 6 moves in the demonstrations and is always 0 in them"):
        still.check(torch.linspace(-0.4, 0.4, 10)[:, None].repeat(1, 7), proprio * 0)
    actions[5, 3] = -2.0
    with pytest.raises(ValueError, match=r"units: 60% of action 3 lie outside \[-0.5, 0.5\]"):
        normalizer.check(actions, proprio)
    with pytest.raises(ValueError, match="demonstrations have 7 action and 9 proprio dimensions, the policy 7 and 8"):
        normalizer.check(actions, torch.zeros(10, 9))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_actions_that_are_no_numbers_are_refused(value):
    """Infinity too, which the clip to the training range would hide."""
    actions = torch.zeros(2, 7)
    actions[1, 3] = value
    with pytest.raises(FloatingPointError, match="the policy's actions are NaN or infinite"):
        Normalizer().decode_actions(actions)


def test_episodes_of_another_robot_or_in_other_units():
    normalizer, actions, proprio = fitted()

    def episode(scale: float = 1.0, gripper_dims: tuple[int, ...] | None = None) -> Episode:
        images, noisy = np.zeros((len(actions), 1, 1, 3), np.uint8), actions.numpy() + 100
        columns = proprio.numpy(), noisy, scale * actions.numpy()
        return Episode("squares/0", "push", images, *columns, gripper_dims=gripper_dims)

    found = intended_and_proprio([episode(), episode()])
    assert torch.equal(found[0], torch.cat([actions, actions])) and torch.equal(found[1], torch.cat([proprio, proprio]))
    check_same_units(normalizer, [episode()])
    with pytest.raises(ValueError, match="other units: 99% of action"):
        check_same_units(normalizer, [episode(scale=100.0)])
    with pytest.raises(ValueError, match=r"the gripper dimensions of squares/0 are \[0\], of the policy \[6\]: they"):
        check_same_units(normalizer, [episode(gripper_dims=(0,))])
