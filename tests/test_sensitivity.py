"""Action sensitivity: perturbations, agreement, the simulator's outcome."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from simulator_reward import SimulatorReward

from vlarft.data import Batch
from vlarft.data.episodes import load_episodes
from vlarft.metrics import perceptual
from vlarft.sensitivity import Perturbations, agreement, half_range, perturb, rewards
from vlarft.sim.replay import TabletopOutcomes


def test_half_range_is_that_of_the_experts(demos):
    episodes = load_episodes(demos)
    wild = replace(episodes[0], kind="noisy", actions=np.full_like(episodes[0].actions, 0.9))
    actions = np.concatenate([e.actions for e in episodes])[:, :-1]
    low, high = np.quantile(actions, [0.01, 0.99], axis=0)
    assert half_range([*episodes, wild]).tolist() == pytest.approx([*(high - low) / 2, 1.0], abs=1e-5)
    assert (half_range([wild]) == torch.tensor([0.0] * 6 + [1.0])).all()  # nothing but noisy attempts


def test_perturbations():
    low, high = torch.tensor([-1.0, -0.5, -1.0]), torch.tensor([1.0, 0.5, 1.0])
    actions = torch.zeros(2, 4, 3)
    actions[..., 2] = -1
    how, unit = Perturbations((0.1, 5.0), 2, 3), torch.tensor([1.0, 0.5, 1.0])
    chunks, labels = perturb(actions, how, low, high, unit, torch.Generator().manual_seed(0), (2,))
    assert chunks.shape == (2, 1 + 2 * 2 + 3, 4, 3)
    assert labels == ["noise 0.1"] * 2 + ["noise 5"] * 2 + ["gripper flip"] * 3
    assert torch.equal(chunks[:, 0], actions)
    assert (chunks[:, 1:5, :, 2] == -1).all() and (chunks[:, 5:, :, :2] == 0).all()
    assert 0.05 < chunks[:, 1:3, :, 0].std() < 0.2 and 0.02 < chunks[:, 1:3, :, 1].std() < 0.1  # in units of each
    assert (chunks[:, 3:5, :, 1].abs() == 0.5).float().mean() > 0.6
    flipped = chunks[:, 5:, :, 2] == 1
    assert flipped[..., -1].all() and (flipped.int().diff(dim=-1) >= 0).all()


def test_agreement_by_label():
    error = torch.tensor([[0.1, 0.2, 0.3, 1.0, 2.0, 3.0]])
    labels = ["small"] * 3 + ["large"] * 3
    found = agreement(torch.tensor([[-1.0, -2.0, -3.0, -6.0, -5.0, -4.0]]), error, labels)
    assert found["small"]["spearman"] == pytest.approx(1) and found["large"]["spearman"] == pytest.approx(-1)
    assert found["all"]["pair_order"] == pytest.approx(12 / 15)
    assert "small" not in agreement(error[:, 2:], error[:, 2:], labels[2:])


def test_reward_is_the_negative_l1_summed_over_frames():
    frames, reference = torch.full((1, 2, 8, 3, 16, 16), 0.25), torch.full((1, 8, 3, 16, 16), 0.5)
    frames[:, 1] = 0.5
    assert rewards(frames, reference, perceptual("none")).tolist() == [[-2.0, 0.0]]


def test_true_outcome_of_the_simulator(demos):
    pytest.importorskip("mujoco")
    from vlarft.sim import make_env

    env = make_env("tabletop_object", 0, image_size=32)
    env.reset(seed=0)
    episode = replace(
        load_episodes(demos)[0],
        images=np.zeros((3, 32, 32, 3), np.uint8),
        states=np.stack([env.get_state()] * 3),
        env_args={"suite": "tabletop_object", "task": 0},
    )
    chunks = np.zeros((3, 2, 7), np.float32)
    chunks[1, :, 0], chunks[2, :, 0] = 0.2, 0.8
    outcomes = TabletopOutcomes()
    outcome = outcomes.play(episode, 1, chunks)
    assert torch.equal(outcomes.state_error(episode, 1, chunks), outcome.state_error)
    rows = torch.from_numpy(chunks)[None].expand(2, -1, -1, -1)
    none = torch.empty(2, 0)
    index = torch.tensor([[0, 1], [0, 2]])
    batch = Batch(none, none, rows[:, 0], none, ["push"] * 2, none, none, index, none, none)
    reward = SimulatorReward([episode], outcomes)(batch, rows[:, 1:])
    assert torch.allclose(reward, -outcome.state_error[1:].float().expand(2, -1, -1))
    assert outcome.frames.shape == (3, 2, 3, 32, 32) and len(outcomes.environments) == 1
    assert outcome.state_error[0].abs().max() == 0
    assert 0.0001 < outcome.state_error[1, 0] < outcome.state_error[1, 1] < outcome.state_error[2, 1] < 0.2
    env.step(chunks[2, 0])
    assert torch.equal(outcome.frames[2, 0], torch.from_numpy(env.observe()["agentview"]).permute(2, 0, 1) / 255)
