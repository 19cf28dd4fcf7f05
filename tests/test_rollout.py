"""Rollouts: groups over processes, shared x_0, proprio between chunks."""

import dataclasses

import numpy as np
import pytest
import torch

from vlarft.data import WindowSampler, load_episodes
from vlarft.flow import chain_log_prob, transition
from vlarft.metrics import perceptual
from vlarft.rollout import collect, fit_drift, propagate


def test_a_group_stays_on_one_process(rft_config, rft_parts, monkeypatch):
    policy, model, _ = rft_parts
    sampler, distance = WindowSampler(load_episodes(rft_config.demos), 9, 8), perceptual("ssim")
    whole = collect(rft_config, policy, model, sampler.batch(4, 0, 0), distance, (0, 0))
    monkeypatch.setattr("vlarft.run.distributed.world_size", lambda: 2)
    for rank in range(2):
        monkeypatch.setattr("vlarft.run.distributed.rank", lambda rank=rank: rank)
        own = collect(rft_config, policy, model, sampler.batch(4, 0, 0, part=(rank, 2)), distance, (0, 0))
        rows = slice(2 * rank, 2 * rank + 2)  # whole groups, the same as without the other process
        assert own.batch.index.tolist() == whole.batch.index[rows].tolist()
        assert own.advantage.shape == (2, rft_config.group)
        torch.testing.assert_close(
            own.chunks[0].chain.x, whole.chunks[0].chain.x.unflatten(0, (4, -1))[rows].flatten(0, 1)
        )
        torch.testing.assert_close(own.advantage, whole.advantage[rows], atol=1e-3, rtol=1e-3)
        assert own.advantage.mean(1).abs().max() < 1e-5  # against the group's own mean


def test_a_group_may_share_its_x0_or_draw_the_gripper_alone(rft_config, rft_parts):
    policy, _, batch = rft_parts
    cfg = dataclasses.replace(rft_config, reward="r1", group=4)
    own, shared, gripper = (
        collect(dataclasses.replace(cfg, group_x0=x0), policy, None, batch, None, (0, 0)).chunks[0].chain.x
        for x0 in ("own", "shared", "gripper")
    )  # (S * G, K + 1, T, A)
    assert (gripper[:, 0, :, :6] == 0).all() and torch.equal(gripper[:, 0, :, 6], own[:, 0, :, 6])
    first = shared.unflatten(0, (-1, 4))[:, :1, 0]  # (S, 1, T, A)
    assert (shared.unflatten(0, (-1, 4))[:, :, 0] == first).all() and not torch.equal(first[0], first[1])
    assert (shared[0::4] == own[0::4]).all()  # the first of a group is as it was
    assert (own[1] != own[0])[0].all() and (shared[1] != shared[0])[1:].all()  # noise on the way is each rollout's own


def test_symmetric_is_of_rewards_in_a_world_model(rft_config):
    for reward in ("r1", "simulator"):
        with pytest.raises(ValueError, match=f"symmetric is of rewards in a world model, which {reward} is not"):
            dataclasses.replace(rft_config, reward=reward, symmetric=True)


def test_mirrored_rollouts_are_pairs_of_opposite_noise(rft_config, rft_parts):
    policy, _, batch = rft_parts
    cfg = dataclasses.replace(rft_config, reward="r1", group=4)
    own, mirrored = (
        collect(dataclasses.replace(cfg, mirrored=on), policy, None, batch, None, (0, 0)).chunks[0]
        for on in (False, True)
    )
    x = mirrored.chain.x  # (S * G, K + 1, T, A)
    assert torch.equal(x[::2], own.chain.x[::2]) and torch.equal(x[1::2, 0], x[::2, 0])
    assert not torch.equal(x[0, 0], x[2, 0])
    cond = policy.condition(mirrored.context, mirrored.proprio).repeat(4)
    with torch.no_grad():
        first = transition(policy.head, policy.sigma_net, x[:, 0], 0, cond)
    noise = (x[:, 1] - first.mean) / first.scale
    torch.testing.assert_close(noise[1::2], -noise[::2], atol=1e-4, rtol=1e-4)
    assert noise.std().item() == pytest.approx(1, abs=0.1)
    scored = chain_log_prob(policy.head, policy.sigma_net, x, cond).log_prob
    torch.testing.assert_close(scored, mirrored.chain.log_prob, atol=1e-4, rtol=1e-4)
    with pytest.raises(ValueError, match="mirrored rollouts come in pairs, which group 3 does not divide into"):
        dataclasses.replace(cfg, mirrored=True, group=3)


def test_proprio_is_propagated_by_what_the_demonstrations_show(demos):
    rng = np.random.default_rng(0)
    episode = load_episodes(demos)[0]
    actions = rng.normal(size=(60, 7)).astype(np.float32)
    proprio = np.zeros((60, 8), np.float32)
    proprio[1:, :3] = np.cumsum(0.05 * actions[:-1, :3], 0)
    proprio[1:, 6] = 0.02 * actions[:-1, 6]  # fingers follow the last command
    drift = fit_drift([dataclasses.replace(episode, actions=actions, proprio=proprio)], 8)
    chunk = torch.randn(1, 8, 7)
    after = propagate(drift, torch.zeros(1, 8), chunk)[0]
    torch.testing.assert_close(after[:3], 0.05 * chunk[0].sum(0)[:3], atol=1e-3, rtol=0)
    assert after[6].item() == pytest.approx(0.02 * chunk[0, -1, 6].item(), abs=1e-3)
    with pytest.raises(ValueError, match="no episode has more than the 99 steps"):
        fit_drift([episode], 99)
