"""Action sensitivity: perturbations, agreement, the simulator's outcome."""

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from simulator_reward import SimulatorReward

from vlarft import sensitivity
from vlarft.data import Batch, WindowSampler
from vlarft.data.episodes import load_episodes
from vlarft.metrics import perceptual
from vlarft.run.random import generator
from vlarft.sensitivity import Perturbations, TrueOutcome, agreement, half_range, perturb, rewards
from vlarft.sim.replay import TabletopOutcomes
from vlarft.statistics import rank_agreement


def test_half_range_is_that_of_the_experts(demos):
    episodes = load_episodes(demos)
    wild = replace(episodes[0], kind="noisy", intended=np.full_like(episodes[0].actions, 0.9))
    actions = np.concatenate([e.intended for e in episodes])[:, :-1]  # what a policy's normaliser is fitted to
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


def paint(actions):
    """Frames (..., 3, 8, 7) whose columns show the action's dimensions (..., 7) in [-1, 1] as grey levels."""
    return ((actions + 1) / 2)[..., None, None, :].expand(*actions.shape[:-1], 3, 8, 7).contiguous()


def test_each_score_is_ranked_against_each_error(demos, monkeypatch):
    """A model and a simulator that show the actions: R3 is the action error, R2 the distance to what was recorded."""
    episodes = load_episodes(demos)
    batch = WindowSampler(episodes, 9, 8).spread(6)
    recorded = torch.ones(len(batch.frames), 9, 3, 8, 7)  # as after actions of 1
    batch = batch._replace(frames=recorded, context_frame=recorded[:, 0])
    played, asked = [], []

    class Shows:
        tokenizer = None

        def parameters(self):
            yield torch.zeros(1)

        def rollout(self, context_frame, actions, **how):
            return SimpleNamespace(frames=paint(actions))

    class Outcomes:
        def play(self, episode, start, chunks):
            played.append((episode.name, start))
            order = torch.arange(len(chunks)).float()  # the state errs the more, the later the chunk
            frames = 1 - paint(torch.from_numpy(chunks) / 2)
            return TrueOutcome(frames, order[:, None].expand(-1, chunks.shape[1]))

    monkeypatch.setattr(sensitivity, "reconstruct", lambda tokenizer, frames, context: frames)
    monkeypatch.setattr(sensitivity, "agreement", lambda *words: asked.append(words) or agreement(*words))
    how, cast = Perturbations((0.2,), 6, 0), torch.autocast("cpu", enabled=False)
    found = sensitivity.evaluate_sensitivity(
        Shows(), batch, episodes, how, perceptual("none"), autocast=cast, outcomes=Outcomes(), batch_size=4
    )
    scores = {f"{kind} {mode}" for kind in ("R2", "R3") for mode in ("greedy", "common", "independent")}
    assert set(found) == {"action", "true frames", "true state"}
    assert set(found["true state"]) == scores | {"true frames", "decoded frames", "action L1"}
    assert set(found["action"]) == scores | {"true frames", "decoded frames"}  # not against itself
    assert set(found["true frames"]) == scores | {"decoded frames", "action L1"}
    for error in ("action", "true frames"):
        for score in found[error].keys() - {f"R2 {mode}" for mode in ("greedy", "common", "independent")}:
            assert found[error][score]["all"]["spearman"] == pytest.approx(1)
    chunks, _ = perturb(
        batch.actions, how, *ends(episodes), half_range(episodes), generator("cpu", "perturbations", 0), (6,)
    )
    error, order = (chunks[:, 1:] - chunks[:, :1]).abs().mean((2, 3)), torch.arange(6.0).expand(len(chunks), 6)
    of = batch.index[:, 0]
    far = rank_agreement(chunks[:, 1:].mean((2, 3)), error, of)  # R2: the nearer to 1, the better
    assert found["action"]["R2 greedy"]["all"] == pytest.approx(far._asdict(), abs=1e-4) and far.spearman < 0.9
    state = rank_agreement(-error, order, of)
    assert found["true state"]["R3 common"]["all"] == pytest.approx(state._asdict(), abs=1e-4)
    assert played == [(episodes[e].name, t) for e, t in batch.index.tolist()]
    assert all(words[3].tolist() == of.tolist() for words in asked)  # starts of an episode are alike


def ends(episodes):
    actions = torch.cat([torch.from_numpy(e.actions) for e in episodes])
    return actions.amin(0), actions.amax(0)


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
