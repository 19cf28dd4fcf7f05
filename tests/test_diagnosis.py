"""Diagnosis of the deterministic policy: one that knows the actions, one that does not."""

import pytest
import torch
from test_gate import Oracle, held_out, policy  # noqa: F401

from vlarft.diagnosis import action_names, diagnose, picture_actions
from vlarft.reward import make_scorer
from vlarft.run.pictures import histograms
from vlarft.world_model import WorldModel


def test_a_policy_that_knows(policy, held_out, world_model_file):  # noqa: F811
    held_out = held_out._replace(intended=held_out.actions)  # whose gripper is -1 or 1, as what the policy plays
    target = policy.normalizer.encode_actions(held_out.intended)  # (S, T, A)

    def velocity(x, tau, cond, k):  # straight to the demonstration's actions, 0.1 beside them in y
        goal = target.repeat_interleave(len(x) // len(target), 0).clone()
        goal[..., 1] += 0.1 * (goal[..., 1] < 0) - 0.1 * (goal[..., 1] >= 0)
        return (goal - x) / (1 - tau[:, None, None])

    policy.head.velocity = velocity
    score = make_scorer("r3", Oracle(WorldModel.load(world_model_file)))
    found, chunks = diagnose(score, policy, held_out, 0, draws=3)
    assert chunks.shape == (4, 3, 8, 7) and found["error_y"] == pytest.approx(0.1, abs=1e-3)
    assert found["error_x"] < 1e-3 and found["error_gripper"] < 1e-3
    assert max(found[f"std_{name}"] for name in ("x", "y", "rz", "gripper")) < 1e-3  # one end, from every x_0
    # the oracle's frames show (a + 1) / 2 of 7 dims, of which y alone is off, by 0.1 of half its range
    half_range = ((policy.normalizer.action_high - policy.normalizer.action_low) / 2)[1].item()
    clipped = policy.normalizer.decode_actions(target)
    beyond = ((clipped - held_out.intended).abs().mean() / 2).item()  # dataset actions outside the quantiles
    assert found["reward_mean_action"] == pytest.approx(-8 * 0.1 * half_range / 7 / 2, abs=8 * beyond + 1e-3)


def test_a_policy_that_does_not(policy, held_out, world_model_file):  # noqa: F811
    policy.head.velocity = lambda x, tau, cond, k: torch.zeros_like(x)  # the chunk is x_0
    found, _ = diagnose(make_scorer("r1"), policy, held_out, 0, draws=200)
    assert found["std_x"] == pytest.approx(1.0, abs=0.05) and found["std_gripper"] == pytest.approx(1.0, abs=0.05)
    same, _ = diagnose(make_scorer("r1"), policy, held_out, 0, draws=200)
    assert found == same  # the same x_0 at every call


def test_dims_of_another_robot_are_numbered(tmp_path):
    assert action_names(7, (6,))[-1] == "gripper" and action_names(6, (5,)) == ["0", "1", "2", "3", "4", "5"]
    assert action_names(7, ()) == action_names(7, (0, 6)) == ["0", "1", "2", "3", "4", "5", "6"]
    picture_actions(tmp_path / "actions.png", torch.zeros(2, 3, 8, 2), torch.ones(2, 3, 8, 2), (1,))  # no dim 2
    assert (tmp_path / "actions.png").exists()


def test_histograms():
    picture = histograms(
        {"x": {"a": torch.zeros(10), "b": torch.randn(100)}, "z": {"a": torch.ones(3)}}, size=(200, 120)
    )
    assert picture.shape == (120, 400, 3) and (picture[:, :200] != 255).any() and (picture[:, 200:] != 255).any()
