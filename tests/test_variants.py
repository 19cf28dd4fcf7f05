"""studies/variants.py: losses by hand, their gradients, samples, mirror images, runs that store their variant."""

import dataclasses
import json
import math
import subprocess
import sys
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import get_args

import pytest
import release_loss as release_module
import torch
import variants
from flow_sde import sde_transition
from release_loss import mse_gate, ppo_loss, release_loss
from variants import (
    KLLoss,
    SymmetricScorer,
    gaussian_kl,
    mirror,
    regression_weights,
    rwr_loss,
    sample_gripper_x0,
    sampled_kl,
    whole_policy_loss,
)

import train_rft
from vlarft.action_bins import ActionBins
from vlarft.data import WindowSampler, load_episodes
from vlarft.flow import chain_log_prob, sample_chain, sample_ode
from vlarft.grpo import advantages
from vlarft.nets.action_head import Condition, FlowConfig, FlowHead, SigmaNet
from vlarft.nets.dit import DiTConfig
from vlarft.policy import VLAPolicy
from vlarft.reward import ImageScorer, action_reward
from vlarft.run.checkpoint import read_header
from vlarft.run.random import generator
from vlarft.run.script import only_writer
from vlarft.sim.replay import TabletopOutcomes
from vlarft.world_model import Rollout

FLOW = FlowConfig(
    context_dim=12,
    embed_dim=6,
    dit=DiTConfig(width=16, depth=2, num_heads=2, mlp_dim=24, cross_attention_blocks=(0, 1), gamma_init=1.0),
)
LOSSES = {
    "release": release_loss,
    "flow_sde": partial(train_rft.grpo_loss, step=sde_transition),
    "rwr": rwr_loss,
    "whole_policy": whole_policy_loss,
}


def play(cfg, policy, batch, sample=train_rft.sample_chains) -> train_rft.Rollouts:
    """Rollouts of a batch with reward R1, as `train_rft.main` makes them."""
    context = policy.encode_frames(batch.frames[:, 0], batch.instructions)
    chain = sample(policy, batch, context, cfg.group, generator("cpu", "chains", 0, 0))
    x, log_prob = (value.unflatten(0, (-1, cfg.group)) for value in chain)
    reward = action_reward(policy.normalizer.decode_actions(x[:, :, -1]), batch.intended)  # (S, G, T)
    advantage = advantages(reward.sum(-1), divide_by_std=cfg.divide_by_std)
    pairs = train_rft.shared_pairs(cfg, batch, generator("cpu", "flow matching", 0, 0, 0))
    return train_rft.Rollouts(batch, context, x, log_prob, reward, advantage, *pairs)


def sampled_by(name: str):
    """How a variant's chains are sampled."""
    return partial(train_rft.sample_chains, step=sde_transition) if name == "flow_sde" else train_rft.sample_chains


def loss_of(name: str, policy):
    """A variant's loss; of a KL term that to the policy as it is now."""
    if not name.startswith("kl"):
        return LOSSES[name]
    supervised = VLAPolicy(policy.cfg)
    supervised.load_state_dict(policy.state_dict())
    return KLLoss(supervised.eval(), 0.5, "sampled" if name == "kl_sampled" else "exact")


def gradients(loss, cfg, policy, rollouts, parameters):
    """Gradients of the loss, one vector, and its metrics."""
    for parameter in parameters:
        parameter.grad = None
    metrics = train_rft.backward(loss, cfg, policy, rollouts)
    return torch.cat([p.grad.flatten() for p in parameters if p.grad is not None]), metrics


def move(policy, std=1e-3):
    """Change the policy a little, so that ratios and divergences do real work."""
    torch.manual_seed(3)
    torch.nn.init.normal_(policy.head.output.bias, std=std)
    torch.nn.init.normal_(policy.sigma_net.output.bias, std=10 * std)


# The public code's objective


@pytest.mark.parametrize(
    ("ratio", "advantage", "expected", "bounded"),
    [
        (1.0, 2.0, -2.0, 0),
        (1.5, 2.0, -2.4, 0),  # clipped to 1.2
        (1.5, -2.0, 3.0, 0),  # PPO keeps the worse one
        (0.5, 2.0, -1.0, 0),
        (0.5, -2.0, 1.6, 0),  # clipped to 0.8
        (2.5, -2.0, 5.0, 0),
        (5.0, -2.0, 6.0, 1),  # without the bound 10
        (5.0, 2.0, -2.4, 0),  # a positive advantage is bounded by the clip
    ],
)
def test_ppo_with_dual_clip_by_hand(ratio, advantage, expected, bounded):
    log_prob = torch.full((1, 1, 1), math.log(ratio), requires_grad=True)
    loss, metrics = ppo_loss(log_prob, torch.zeros(1, 1, 1), torch.tensor([advantage]))
    loss.backward()
    assert loss.item() == pytest.approx(expected) and metrics["dual_clip_frac"] == bounded
    assert metrics["clip_frac"] == float(ratio != 1) and metrics["ratio_mean"] == pytest.approx(ratio)
    assert metrics["approx_kl"] == pytest.approx(ratio - 1 - math.log(ratio), abs=1e-6)
    flat = bounded or (advantage > 0 and ratio > 1.2) or (advantage < 0 and ratio < 0.8)
    assert log_prob.grad.item() == pytest.approx(0 if flat else -advantage * ratio)


def test_ratio_per_scalar_by_hand():
    # two chunks of two scalars: the ratios of the chunks would be 1.0 and 0.5
    new = torch.tensor([[[2.0, 0.5]], [[0.5, 1.0]]]).log()  # (B, T, A)
    loss, metrics = ppo_loss(new, torch.zeros(2, 1, 2), torch.tensor([1.0, -1.0]))
    assert loss.item() == pytest.approx(-(1.2 + 0.5 - 0.8 - 1.0) / 4)
    assert metrics["ratio_max"] == pytest.approx(2.0) and metrics["clip_frac"] == 0.75
    with pytest.raises(ValueError, match=r"dual_clip 1.1 must exceed 1 \+ clip = 1.2"):
        ppo_loss(new, new, torch.ones(2), dual_clip=1.1)


def test_gradient_of_ppo_against_finite_differences():
    log_prob = torch.tensor([0.1, -0.1, 0.05, -0.15, 0.6, 1.5]).view(6, 1, 1).requires_grad_()
    advantage = torch.tensor([1.0, -2.0, 0.5, 3.0, -1.0, -1.0])
    ppo_loss(log_prob, torch.zeros(6, 1, 1), advantage)[0].backward()
    for i in range(6):
        step = torch.zeros(6, 1, 1)
        step[i] = 1e-3
        above, below = (
            ppo_loss(log_prob.detach() + s * step, torch.zeros(6, 1, 1), advantage)[0].item() for s in (1, -1)
        )
        assert log_prob.grad[i].item() == pytest.approx((above - below) / 2e-3, rel=1e-2), i


def test_mse_gate_table():
    assert [mse_gate(kl) for kl in (-0.1, 0.0, 0.05, 0.2, 3.0)] == [0.0, 0.0, 0.25, 1.0, 1.0]


def test_release_loss_is_made_of_its_terms(rft_config, rft_parts, monkeypatch):
    policy, _, batch = rft_parts
    cfg = dataclasses.replace(rft_config, entropy_weight=0.3, mse_weight=0.7, clip=0.1)
    rollouts = play(cfg, policy, batch)
    move(policy)
    # two processes, on the other of which the policy has moved further
    monkeypatch.setattr(release_module.distributed, "mean_across_ranks", lambda v: dict.fromkeys(v, 0.1))
    loss, metrics = release_loss(cfg, policy, rollouts)
    assert metrics["mse_gate"] == 0.5
    cond = policy.condition(rollouts.context, batch.proprio)
    scored = chain_log_prob(policy.head, policy.sigma_net, rollouts.x.flatten(0, 1), cond.repeat(cfg.group))
    ratio = (scored.log_prob - rollouts.log_prob.flatten(0, 1)).sum(1).exp()  # (B, T, A): summed over K
    adv = rollouts.advantage.flatten()[:, None, None].expand_as(ratio)
    surrogate = torch.minimum(ratio * adv, ratio.clamp(0.9, 1.1) * adv)
    entropy = scored.entropy.sum(1).mean() / 11
    mse = train_rft.demonstration_loss(policy, rollouts, cond)
    expected = -surrogate.mean() - 0.3 * entropy + 0.7 * 0.5 * mse
    assert loss.item() == pytest.approx(expected.item(), abs=1e-5)
    assert metrics["ratio_max"] > 1.001 and metrics["clip_frac"] > 0


# Hand tables of the other variants


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


def test_kl_to_the_supervised_policy(rft_config, rft_parts):
    policy, _, batch = rft_parts
    rollouts = play(rft_config, policy, batch)
    losses = [loss_of(name, policy) for name in ("kl", "kl_sampled")]

    def found():
        return [loss(rft_config, policy, rollouts)[1]["kl_supervised"] for loss in losses]

    assert found() == pytest.approx([0, 0], abs=1e-9)
    plain = train_rft.grpo_loss(rft_config, policy, rollouts)[0].item()
    with torch.no_grad():
        policy.head.output.bias[0] += 0.2  # moves one mean in seven by 0.02 at every step
    exact, sampled = found()
    assert exact == pytest.approx(0.02**2 / (2 * 0.08 * 0.2) / 7, rel=1e-3) and sampled > 0
    moved = train_rft.grpo_loss(rft_config, policy, rollouts)[0].item()
    assert losses[0](rft_config, policy, rollouts)[0].item() == pytest.approx(moved + 0.5 * exact) != plain


def test_regression_weights_by_hand():
    rewards = torch.tensor([[0.0, 1.0, 2.0], [3.0, 3.0, 3.0]])  # standardised: -1, 0, 1
    weights = regression_weights(rewards, 0.5)
    total = math.exp(-2) + 1 + math.exp(2)
    expected = torch.tensor([3 * math.exp(-2) / total, 3 / total, 3 * math.exp(2) / total])
    torch.testing.assert_close(weights[0], expected, atol=1e-4, rtol=0)
    assert weights[1].tolist() == [1.0, 1.0, 1.0]
    with pytest.raises(ValueError, match="temperature must be positive, got 0"):
        regression_weights(rewards, 0.0)


def test_rwr_regresses_onto_the_best_rollout(rft_config, rft_parts):
    policy, _, batch = rft_parts
    cfg = dataclasses.replace(rft_config, mse_weight=0.0)
    reward = torch.tensor([[0.0, 1.0, 5.0], [9.0, 0.0, 1.0]])
    rollouts = play(cfg, policy, batch)._replace(reward=reward[..., None] * torch.full((8,), 1 / 8))
    loss, parameters = partial(rwr_loss, temperature=0.02), list(policy.head.parameters())
    gradient, metrics = gradients(loss, cfg, policy, rollouts, parameters)
    assert metrics["weight_max"] == pytest.approx(3) and gradient.abs().max() > 0
    # Eq. (4) on the best chunks alone, as they were played, with their pairs of noise and time
    best = rollouts.x[:, :, -1][[0, 1], [2, 0]]  # (S, T, A)
    target = policy.normalizer.encode_actions(policy.normalizer.decode_actions(best))
    assert target[..., -1].unique().numel() <= 2 and not torch.equal(target, best)
    tau, eps = rollouts.tau[[0, 1], [2, 0]], rollouts.eps[[0, 1], [2, 0]]
    x = tau[:, None, None] * target + (1 - tau[:, None, None]) * eps
    cond = policy.condition(rollouts.context, batch.proprio)
    expected = (policy.head.velocity(x, tau, cond) - (target - eps)).square().mean()
    assert metrics["loss"] == pytest.approx(expected.item(), rel=1e-4)
    assert all(p.grad is None for p in policy.sigma_net.parameters())
    poison = rollouts.x.clone()
    poison[0, :2], poison[1, 1:] = 0.5, 0.5  # all but the best: of no weight
    same, _ = gradients(loss, cfg, policy, rollouts._replace(x=poison), parameters)
    torch.testing.assert_close(gradient, same, atol=1e-6, rtol=1e-4)


def test_rwr_takes_more_rollouts_than_there_are_pairs(rft_config, rft_parts):
    policy, _, batch = rft_parts
    cfg = dataclasses.replace(rft_config, group=18)
    rollouts = play(cfg, policy, batch)
    assert rollouts.tau.shape[1] == 16
    more = rollouts._replace(**{k: torch.cat([v, v[:, :2]], 1) for k in ("tau", "eps") for v in [getattr(rollouts, k)]})
    found = [rwr_loss(cfg, policy, pairs)[1]["policy_loss"] for pairs in (rollouts, more)]
    assert found[0] == pytest.approx(found[1], rel=1e-6)  # from the first pair on again


# Gradients


@pytest.mark.parametrize("name", ["release", "flow_sde", "rwr", "kl", "kl_sampled", "whole_policy"])
def test_gradient_against_finite_differences(rft_config, rft_parts, monkeypatch, name):
    policy, _, batch = rft_parts
    monkeypatch.setattr(release_module, "mse_gate", lambda kl: 0.7)  # is no part of what is differentiated
    cfg = dataclasses.replace(rft_config, mse_weight=0.3, entropy_weight=0.1)
    loss = loss_of(name, policy)
    rollouts = play(cfg, policy, batch, sampled_by(name))
    move(policy, 1e-4)
    parameters = [policy.head.output.bias]
    if name not in ("rwr", "flow_sde"):
        parameters.append(policy.sigma_net.output.bias)
    if name == "whole_policy":
        policy.vlm.requires_grad_(True)
        cfg = dataclasses.replace(cfg, micro_starts=1)
        parameters += [policy.vlm.action_queries.weight, policy.key_embed.bias]
    for parameter in parameters:
        element, losses = 2 % parameter.numel(), []
        gradient = gradients(loss, cfg, policy, rollouts, [parameter])[0][element].item()
        for sign in (1, -2):
            with torch.no_grad():
                parameter.view(-1)[element] += sign * 1e-3
            losses.append(train_rft.backward(loss, cfg, policy, rollouts)["loss"])
        with torch.no_grad():
            parameter.view(-1)[element] += 1e-3
        assert gradient == pytest.approx((losses[0] - losses[1]) / 2e-3, rel=0.05, abs=3e-4)


@pytest.mark.parametrize("name", ["flow_sde", "rwr", "kl", "kl_sampled", "whole_policy"])
def test_micro_batches_give_the_same_gradient(rft_config, rft_parts, name):
    policy, _, batch = rft_parts
    if name == "whole_policy":
        policy.vlm.requires_grad_(True)
    cfg = dataclasses.replace(rft_config, mse_weight=0.5)
    loss = loss_of(name, policy)
    rollouts = play(cfg, policy, batch, sampled_by(name))
    move(policy)
    parameters = [p for p in policy.parameters() if p.requires_grad]
    whole, metrics = gradients(loss, cfg, policy, rollouts, parameters)
    micro, others = gradients(loss, dataclasses.replace(cfg, micro_starts=1), policy, rollouts, parameters)
    assert whole.abs().max() > 0
    torch.testing.assert_close(whole, micro, atol=1e-5, rtol=1e-3)
    assert metrics == pytest.approx(others, rel=1e-3, abs=1e-5)


def test_whole_policy_reaches_all_that_the_head_sees_by(rft_config, rft_parts):
    policy, _, batch = rft_parts
    policy.vlm.requires_grad_(True)
    rollouts = play(rft_config, policy, batch)
    _, metrics = gradients(whole_policy_loss, rft_config, policy, rollouts, list(policy.parameters()))
    reached = {name.split(".")[0] for name, p in policy.named_parameters() if p.grad is not None and p.grad.any()}
    assert reached == {"head", "sigma_net", "vlm", "key_head", "key_embed"}
    assert metrics["ratio_max"] == pytest.approx(1, abs=1e-5)  # scored as it is sampled


@pytest.mark.parametrize("name", ["release", "flow_sde", "kl", "gripper_x0"])
def test_first_update_has_ratio_one(rft_config, rft_parts, name):
    policy, _, batch = rft_parts
    sample = sample_gripper_x0 if name == "gripper_x0" else sampled_by(name)
    loss = train_rft.grpo_loss if name == "gripper_x0" else loss_of(name, policy)
    _, metrics = loss(rft_config, policy, play(rft_config, policy, batch, sample))
    assert metrics["ratio_mean"] == pytest.approx(1, abs=1e-5) and metrics["ratio_max"] == pytest.approx(1, abs=1e-4)
    assert metrics["clip_frac"] == 0 and metrics.get("mse_gate", 0) == pytest.approx(0, abs=1e-6)


# Sampling


def test_x0_is_zero_but_for_the_gripper(rft_config, rft_parts, monkeypatch):
    policy, _, _ = rft_parts
    sampler = WindowSampler(load_episodes(rft_config.demos), 9, 8)

    def sampled(sample, part=(0, 1)):
        monkeypatch.setattr("vlarft.run.distributed.rank", lambda: part[0])
        monkeypatch.setattr("vlarft.run.distributed.world_size", lambda: part[1])
        batch = sampler.batch(4, 0, 0, part=part)
        context = policy.encode_frames(batch.frames[:, 0], batch.instructions)
        return sample(policy, batch, context, 3, generator("cpu", "chains", 0)).x  # (S * G, K + 1, T, A)

    plain, gripper = sampled(train_rft.sample_chains), sampled(sample_gripper_x0)
    assert (gripper[:, 0, :, :6] == 0).all() and torch.equal(gripper[:, 0, :, 6], plain[:, 0, :, 6])
    # the steps' noise is each rollout's, the same as without
    noise = torch.randn(12, 11, 8, 7, generator=generator("cpu", "chains", 0))
    moved = (gripper[1, 1] - gripper[0, 1])[:, :6] / math.sqrt(0.08 * 0.2)
    torch.testing.assert_close(moved.std(), (noise[1, 1] - noise[0, 1])[:, :6].std(), rtol=0.2, atol=0)
    shares = torch.cat([sampled(sample_gripper_x0, (rank, 2)) for rank in range(2)])
    torch.testing.assert_close(shares, gripper, atol=1e-4, rtol=1e-4)


class KnownFlow(torch.nn.Module):
    """A velocity that is known in closed form."""

    def __init__(self, velocity, cfg=FLOW):
        super().__init__()
        self.cfg, self.formula = cfg, velocity

    def at_steps(self, cond, num_steps):
        return cond

    def velocity(self, x, tau, cond, k=None):
        return self.formula(x, tau[:, None, None])


def gaussian_flow(cfg=FLOW, mean=0.7, std=0.3):
    """The exact velocity where actions are N(mean, std^2) in every dim: a Gaussian at all times."""

    def velocity(x, tau):
        variance = (1 - tau) ** 2 + (tau * std) ** 2
        return mean + (tau * std**2 - (1 - tau)) / variance * (x - tau * mean)

    return KnownFlow(velocity, cfg)


def random_head() -> tuple[FlowHead, SigmaNet, Condition]:
    torch.manual_seed(0)
    head, sigma_net = FlowHead(FLOW), SigmaNet(FLOW)
    for parameter in (*head.parameters(), *sigma_net.parameters()):
        torch.nn.init.normal_(parameter, std=0.15)
    return head, sigma_net, head.prepare(torch.randn(2, 5, 12), torch.randn(2, 8), sigma_net).repeat(3)


@pytest.mark.parametrize("strength", [0.3, 0.7, 1.0])
def test_flow_sde_keeps_the_marginals_of_the_ode(strength):
    num_steps, rows = 200, 1000  # 56k chains of one scalar each: standard error of the variance 0.6 %
    head, source = gaussian_flow(dataclasses.replace(FLOW, num_steps=num_steps)), torch.Generator().manual_seed(0)
    cond, step = Condition({}, torch.zeros(rows, 1)), partial(sde_transition, strength=strength)
    x = torch.randn(rows, 8, 7, generator=source)
    chain = sample_chain(head, None, cond, noise=x, generator=source, step=step)
    for k in (num_steps // 4, num_steps // 2, num_steps):
        tau = k / num_steps
        assert chain.x[:, k].mean().item() == pytest.approx(0.7 * tau, abs=0.015)
        assert chain.x[:, k].var().item() == pytest.approx((1 - tau) ** 2 + (0.3 * tau) ** 2, rel=0.05)
    ode = sample_ode(head, cond, noise=x, num_steps=num_steps)
    assert (chain.x[:, -1] - ode).abs().mean() > 0.05  # other chunks than the ODE's, from the same x_0


def test_noise_without_the_correction_widens_the_marginals():
    # what the sigma net's plain added noise does to the same flow, at the K = 10 of training
    cfg = dataclasses.replace(FLOW, sigma_min=0.1265, sigma_max=0.1265)
    head, sigma_net = gaussian_flow(cfg), SigmaNet(cfg)
    cond = Condition({}, torch.zeros(1000, 1), sigma=sigma_net.prepare(torch.randn(1, 5, 12), torch.randn(1, 8)))
    step = partial(sde_transition, strength=0.3)
    plain = sample_chain(head, sigma_net, cond, generator=torch.Generator().manual_seed(0)).x[:, -1].var()
    kept = sample_chain(head, None, cond, generator=torch.Generator().manual_seed(0), step=step).x[:, -1].var()
    ode = sample_ode(head, cond, noise=torch.randn(1000, 8, 7, generator=torch.Generator().manual_seed(0))).var()
    assert plain > 1.3 * ode and kept.item() == pytest.approx(ode.item(), rel=0.15)


def test_flow_sde_step_by_hand():
    head, x = KnownFlow(lambda x, tau: torch.full_like(x, 3.0)), torch.randn(1, 8, 7)
    for k, c in ((0, 0.25 / 2 / 0.1), (4, 0.25 / 2 / 0.4), (9, 0.25 / 2 / 0.9)):  # at 0, tau is held at 1 / K
        tau = k / 10
        normal = sde_transition(head, None, x, k, None, strength=0.5)
        torch.testing.assert_close(normal.mean, x + (3 + c * (tau * 3 - x)) / 10)
        assert normal.stddev.unique().item() == pytest.approx(math.sqrt(2 * c * (1 - tau) / 10), rel=1e-5)


def test_flow_sde_scores_what_it_samples_and_vanishes_into_the_ode():
    head, sigma_net, cond = random_head()
    chain = sample_chain(head, sigma_net, cond, generator=torch.Generator().manual_seed(0), step=sde_transition)
    score = chain_log_prob(head, sigma_net, chain.x, cond, sde_transition)
    torch.testing.assert_close(score.log_prob, chain.log_prob, atol=2e-4, rtol=1e-5)
    score.log_prob.sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in head.parameters())
    assert all(p.grad is None for p in sigma_net.parameters())
    x, faint = torch.randn(6, 8, 7), partial(sde_transition, strength=1e-6)
    chain = sample_chain(head, None, cond, noise=x, generator=torch.Generator().manual_seed(0), step=faint)
    torch.testing.assert_close(chain.x[:, -1], sample_ode(head, cond, noise=x), atol=1e-4, rtol=1e-4)


# Rewards


class OneSided:
    """A world model whose frames show the running sum of action 0 beyond 0.1: it does not see the other side."""

    def rollout(self, frames, actions, **how):
        shade = (actions[..., 0] - 0.1).clamp(min=0).cumsum(-1)  # (S, G, T)
        frames = shade[..., None, None, None].expand(*shade.shape, 3, 16, 16)
        return Rollout(torch.zeros(*shade.shape, 1), frames, None)


def chunk(*values):
    actions = torch.zeros(len(values), 7)
    actions[:, 0] = torch.tensor(values)
    return actions


def test_a_symmetric_reward_favours_no_side(rft_parts):
    batch = rft_parts[2].rows(slice(0, 1))._replace(intended=chunk(0.1, 0.1)[None], frames=torch.zeros(1, 3, 3, 16, 16))
    actions = torch.stack([chunk(0.3, 0.1), chunk(-0.1, 0.1), chunk(0.1, 0.1)])[None]
    score = ImageScorer(OneSided())
    torch.testing.assert_close(score(batch, actions).sum(-1), -torch.tensor([[0.4, 0.0, 0.0]]))  # biased
    symmetric = SymmetricScorer(score, ActionBins(7, 256))(batch, actions)
    torch.testing.assert_close(symmetric, -torch.tensor([[[0.1, 0.1], [0.1, 0.1], [0.0, 0.0]]]))


def test_a_symmetric_fine_tuning_has_a_trust_gate(rft_config):
    values = {f.name: getattr(rft_config, f.name) for f in dataclasses.fields(rft_config)}
    assert "gate" in variants.main(variants.Config(**values | {"steps": 1, "variant": "symmetric"}))


def test_mirror():
    actions, reference = torch.zeros(1, 2, 1, 7), torch.full((1, 1, 7), 0.4)
    actions[0, 1, 0, 0], actions[..., 6] = -0.5, -1.0
    low, high = torch.full((7,), -1.0), torch.full((7,), 1.0)
    found = mirror(actions, reference, low, high)
    torch.testing.assert_close(found[0, 0, 0], torch.tensor([0.8] * 6 + [-1.0]))  # the gripper stays
    assert found[0, 1, 0, 0] == 1.0  # 1.3, clipped
    torch.testing.assert_close(mirror(found, reference, low, high)[0, 0], actions[0, 0])


# Runs


def config(rft_config, variant, **changes) -> variants.Config:
    """Config of variants.py at smoke size, with R1 and no gate."""
    return variants.Config(**{"variant": variant, "reward": "r1", "gate_starts": 0, "perceptual": "none"} | (
        {k: v for k, v in dataclasses.asdict(rft_config).items() if k not in ("reward", "gate_starts", "perceptual")}
    ) | changes)  # fmt: skip


def log_of(cfg):
    return [json.loads(line) for line in (Path(cfg.out_dir) / "log.jsonl").read_text().splitlines()]


def test_the_simulator_plays_the_episode_that_a_window_is_of(rft_config, monkeypatch):
    seen = []

    def state_error(self, episode, start, chunks):
        torch.testing.assert_close(torch.from_numpy(chunks[0]), torch.from_numpy(episode.intended[start : start + 8]))
        assert episode.states is not None
        seen.append(episode.name)
        return torch.from_numpy(abs(chunks - chunks[:1])).mean(-1).double()

    monkeypatch.setattr(TabletopOutcomes, "state_error", state_error)
    cfg = config(rft_config, "simulator", steps=1)
    metrics = variants.main(cfg)
    extra = read_header(cfg.policy).extra
    assert set(seen) <= {*extra["train_episodes"], *extra["held_out_episodes"]}
    assert set(seen) & set(extra["train_episodes"]) and set(seen) & set(extra["held_out_episodes"])
    assert metrics["reward"] < 0 and metrics["reward_mean_action"] < 0


@pytest.mark.parametrize("variant", [*variants.VARIANTS])
def test_every_variant_fine_tunes(rft_config, variant, monkeypatch):
    monkeypatch.setattr(TabletopOutcomes, "state_error", lambda self, episode, start, x: abs(torch.tensor(x)).mean(-1))
    changes = {"reward": "divergence"} if variant == "symmetric" else {}
    cfg = config(rft_config, variant, steps=1, warmup=0, lr=1e-3, epochs=2, **changes)
    metrics = variants.main(cfg)
    assert all(math.isfinite(value) for value in metrics.values())
    before, after = (VLAPolicy.load(path) for path in (cfg.policy, f"{cfg.out_dir}/model.safetensors"))
    moved = {k.split(".")[0] for k, p in before.named_parameters() if not torch.equal(p, after.get_parameter(k))}
    assert moved == {"head"} | ({"vlm", "key_head", "key_embed"} if variant == "whole_policy" else set())
    assert (after.sigma_net.output.weight.abs().max() > 0) == (variant not in ("rwr", "flow_sde"))  # at first 0
    assert after.cfg.flow.sigma_uses_x == (variant == "release")
    assert read_header(f"{cfg.out_dir}/model.safetensors").extra["rft"]["variant"] == variant
    if variant != "rwr":
        assert abs(metrics["ratio_mean"] - 1) > 1e-6  # the second epoch scores a policy that has moved
    own = {"release": "mse_gate", "rwr": "weight_max", "kl": "kl_supervised", "kl_sampled": "kl_supervised"}
    if variant in own:
        assert metrics[own[variant]] > 0


def test_a_run_folder_belongs_to_one_variant(rft_config):
    cfg = config(rft_config, "rwr", steps=1)
    variants.main(cfg)
    with pytest.raises(ValueError, match="another configuration: variant: 'rwr' against 'kl'"):
        variants.main(dataclasses.replace(cfg, variant="kl"))
    plain = train_rft.Config(**{f.name: getattr(cfg, f.name) for f in dataclasses.fields(train_rft.Config)})
    with pytest.raises(ValueError, match="another configuration: variant: 'rwr' against None"):
        train_rft.main(plain)
    other = f"{cfg.out_dir}_plain"
    train_rft.main(dataclasses.replace(plain, out_dir=other))
    with pytest.raises(ValueError, match="another configuration: variant: None against 'rwr'"):
        variants.main(dataclasses.replace(cfg, out_dir=other))


@pytest.mark.parametrize("variant", ["kl", "rwr"])
def test_resume_equals_no_interruption(rft_config, tmp_path, monkeypatch, variant):
    cfg = config(rft_config, variant, steps=3, save_interval=1, lr=1e-3, warmup=0)
    variants.main(cfg)
    whole = torch.load(f"{cfg.out_dir}/train_state.pt", weights_only=True)
    if variant == "kl":  # to the policy of the first step, which a resume does not start from
        found = [row["kl_supervised"] for row in log_of(cfg)]
        assert found[0] == pytest.approx(0, abs=1e-9) and found[2] > 0

    interrupted, real, calls = dataclasses.replace(cfg, out_dir=str(tmp_path / "interrupted")), train_rft.backward, []

    def stop_at_the_third(*args):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return real(*args)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(train_rft, "backward", stop_at_the_third)
        variants.main(interrupted)
    variants.main(interrupted)
    resumed = torch.load(f"{interrupted.out_dir}/train_state.pt", weights_only=True)
    assert whole["step"] == resumed["step"] == 3
    for key, value in whole["policy"].items():
        assert torch.equal(value, resumed["policy"][key]), key
    for slots, others in zip(whole["optimizer"]["state"].values(), resumed["optimizer"]["state"].values(), strict=True):
        assert all(torch.equal(slots[k], others[k]) for k in slots)


def test_refusals(rft_config, monkeypatch):
    with pytest.raises(ValueError, match="--variant names what to change, one of release, flow_sde"):
        variants.main(config(rft_config, None))
    with pytest.raises(ValueError, match="variant rwr weighs whole chunks: leave out --per-step"):
        variants.main(config(rft_config, "rwr", per_step=True))
    with pytest.raises(ValueError, match="variant release has one advantage per chunk, over the group's std"):
        variants.main(config(rft_config, "release", divide_by_std=False))
    with pytest.raises(ValueError, match="variant release: the gate .* leave out --micro-starts 1"):
        variants.main(config(rft_config, "release", micro_starts=1))
    with pytest.raises(ValueError, match="variant symmetric is for rewards in a world model; r1 counts both sides"):
        variants.main(config(rft_config, "symmetric"))
    monkeypatch.setattr(
        train_rft, "load_world_model", lambda *_: (SimpleNamespace(cfg=SimpleNamespace(pose_dims=6)), None)
    )
    with pytest.raises(ValueError, match="poses drive .*train it with --pose-dims 0"):
        variants.main(dataclasses.replace(config(rft_config, "symmetric"), reward="r3"))


def test_another_process_that_writes_the_folder_is_named(tmp_path):
    script = Path(__file__).parents[1] / "studies" / "variants.py"
    with only_writer(tmp_path / "out"):
        words = [sys.executable, str(script), "--preset", "smoke", "--out-dir", str(tmp_path / "out")]
        done = subprocess.run(words, capture_output=True, text=True)
    assert done.returncode == 2 and "out is being written by process" in done.stderr


def test_command_line(rft_config):
    """As a user types it: the flags of train_rft.py, and the variant."""
    script = Path(__file__).parents[1] / "studies" / "variants.py"
    files = ["--policy", rft_config.policy, "--demos", *rft_config.demos, "--out-dir", rft_config.out_dir]
    flags = ["--preset", "smoke", "--variant", "gripper_x0", "--reward", "r1", "--gate-starts", "0", "--steps", "1"]
    subprocess.run([sys.executable, str(script), *flags, *files], check=True, capture_output=True)
    stored = json.loads((Path(rft_config.out_dir) / "config.json").read_text())
    assert stored["variant"] == "gripper_x0" and stored["group"] == 3
    choices = variants.Config.__dataclass_fields__["variant"].type
    assert set(get_args(get_args(choices)[0])) == set(variants.VARIANTS)
