"""The update: exact ratios, gradients by micro-batches and finite differences, several passes, KL, regression."""

import dataclasses

import pytest
import torch

from vlarft.flow import chain_log_prob
from vlarft.metrics import perceptual
from vlarft.objective import supervised_copy, update
from vlarft.rollout import collect


def gradients_of(config, policy, rollouts, **changes):
    """Gradients of one update that changes nothing, and its metrics."""
    parameters = [*policy.head.parameters(), *(policy.sigma_net.parameters() if policy.sigma_net else ())]
    optimizer = torch.optim.SGD(parameters, lr=0.0)
    metrics = update(dataclasses.replace(config, clip_norm=1e9, **changes), policy, optimizer, rollouts, (0, 0))
    return torch.cat([p.grad.flatten() for p in parameters if p.grad is not None]), metrics


def check_gradients(config, policy, rollouts, parameters, supervised=None, element=2):
    """One element of each parameter, against central differences of the loss."""
    optimizer = torch.optim.SGD(parameters, lr=0.0)
    for parameter in parameters:
        update(config, policy, optimizer, rollouts, (0, 0), supervised)
        gradient, losses = parameter.grad.flatten()[element].item(), []
        for sign in (1, -1):
            with torch.no_grad():
                parameter.view(-1)[element] += sign * 2e-3
            losses.append(update(config, policy, optimizer, rollouts, (0, 0), supervised)["loss"])
            with torch.no_grad():
                parameter.view(-1)[element] -= sign * 2e-3
        assert gradient == pytest.approx((losses[0] - losses[1]) / 4e-3, rel=0.05, abs=2e-4)


def test_first_update_has_ratio_one(rft_config, rft_parts):
    policy, model, batch = rft_parts
    rollouts = collect(rft_config, policy, model, batch, perceptual("ssim"), (0, 0))
    (chunk,) = rollouts.chunks
    cond = policy.condition(chunk.context, batch.proprio).repeat(rft_config.group)
    scored = chain_log_prob(policy.head, policy.sigma_net, chunk.chain.x, cond)
    torch.testing.assert_close(scored.log_prob, chunk.chain.log_prob, atol=1e-4, rtol=1e-5)
    optimizer = torch.optim.SGD([*policy.head.parameters(), *policy.sigma_net.parameters()], lr=0.0)
    metrics = update(rft_config, policy, optimizer, rollouts, (0, 0))
    assert metrics["ratio_max"] == pytest.approx(1, abs=1e-4)
    assert metrics["ratio_mean"] == pytest.approx(1, abs=1e-5)
    assert metrics["clip_frac"] == 0
    assert metrics["sigma"] == pytest.approx((0.08 * 0.2) ** 0.5, rel=1e-5)  # zero-initialised sigma net


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"mse_gate": 1e-7, "objective": "ppo", "ratio_per": "element"},
        {"credit": "to_go", "ratio_per": "step"},
        {"algorithm": "rwr"},
    ],
)
def test_micro_batches_give_the_same_gradient(rft_config, rft_parts, changes):
    policy, model, batch = rft_parts
    rft_config = dataclasses.replace(rft_config, mse_weight=0.5, **changes)
    rollouts = collect(rft_config, policy, model, batch, perceptual("ssim"), (0, 0))
    torch.nn.init.normal_(policy.head.net.dit.out.bias, std=1e-3)  # the policy has moved: ratios and gate do real work
    whole, metrics = gradients_of(rft_config, policy, rollouts)
    micro, others = gradients_of(rft_config, policy, rollouts, micro_starts=1)
    assert whole.abs().max() > 0
    torch.testing.assert_close(whole, micro, atol=1e-5, rtol=1e-3)
    assert metrics == pytest.approx(others, rel=1e-3, abs=1e-5)
    if "mse_gate" in changes:
        assert metrics["mse_gate"] > 0


def test_gradient_of_the_whole_objective_against_finite_differences(rft_config, rft_parts):
    policy, model, batch = rft_parts
    supervised = supervised_copy(policy)
    rollouts = collect(rft_config, policy, model, batch, perceptual("ssim"), (0, 0))
    rft_config = dataclasses.replace(rft_config, mse_weight=0.3, kl_weight=0.5, entropy_weight=0.1, clip_norm=1e9)
    torch.nn.init.normal_(policy.sigma_net.net.dit.out.bias, std=0.1)
    bias = policy.head.net.dit.out.bias
    check_gradients(rft_config, policy, rollouts, [bias, policy.sigma_net.net.dit.out.bias], supervised)


def test_gradient_of_the_vision_language_model_against_finite_differences(rft_config, rft_parts):
    policy, model, batch = rft_parts
    policy.vlm.requires_grad_(True)
    rft_config = dataclasses.replace(rft_config, mse_weight=0.3, clip_norm=1e9, micro_starts=1)
    rollouts = collect(rft_config, policy, model, batch, perceptual("ssim"), (0, 0))
    check_gradients(rft_config, policy, rollouts, [policy.vlm.action_queries.weight, policy.key_embed.bias], element=0)


def test_several_updates_on_one_batch(rft_config, rft_parts):
    policy, model, batch = rft_parts
    rollouts = collect(rft_config, policy, model, batch, perceptual("ssim"), (0, 0))
    optimizer, steps = torch.optim.SGD(policy.head.parameters(), lr=1e-4), []
    real = optimizer.step
    optimizer.step = lambda: steps.append(1) or real()
    metrics = update(dataclasses.replace(rft_config, epochs=3, minibatches=2), policy, optimizer, rollouts, (0, 0))
    assert len(steps) == 6 and metrics["ratio_max"] > 1.0001 and metrics["approx_kl"] > 0
    with pytest.raises(ValueError, match="2 starts on each process do not divide by 4 minibatches"):
        update(dataclasses.replace(rft_config, minibatches=4), policy, optimizer, rollouts, (0, 0))
    with pytest.raises(ValueError, match="kl_weight 0.1 needs the supervised policy"):
        update(dataclasses.replace(rft_config, kl_weight=0.1), policy, optimizer, rollouts, (0, 0))


def test_kl_to_the_supervised_policy(rft_config, rft_parts):
    policy, model, batch = rft_parts
    supervised = supervised_copy(policy)
    optimizer = torch.optim.SGD(policy.head.parameters(), lr=0.0)
    rollouts = collect(rft_config, policy, model, batch, perceptual("ssim"), (0, 0))

    def kl(kind):
        changed = dataclasses.replace(rft_config, kl_weight=1.0, kl=kind)
        return update(changed, policy, optimizer, rollouts, (0, 0), supervised)["kl_supervised"]

    assert kl("exact") == kl("sampled") == pytest.approx(0, abs=1e-9)
    with torch.no_grad():
        policy.head.net.dit.out.bias[0] += 0.2  # moves one mean in seven by 0.02 at every step
    sigma = (0.08 * 0.2) ** 0.5
    assert kl("exact") == pytest.approx(0.02**2 / (2 * sigma**2) / 7, rel=1e-3)
    assert kl("sampled") > 0


def test_rwr_regresses_onto_the_best_rollout(rft_config, rft_parts):
    policy, model, batch = rft_parts
    rft_config = dataclasses.replace(rft_config, algorithm="rwr", rwr_temperature=0.02, mse_weight=0.0)
    rollouts = collect(rft_config, policy, model, batch, perceptual("ssim"), (0, 0))
    reward = torch.tensor([[0.0, 1.0, 5.0], [9.0, 0.0, 1.0]])
    rollouts = rollouts._replace(reward=rollouts.reward._replace(reward=reward))
    gradient, metrics = gradients_of(rft_config, policy, rollouts)
    assert metrics["weight_max"] == pytest.approx(3) and gradient.abs().max() > 0
    (chunk,) = rollouts.chunks
    poison = chunk.chain.x.clone().unflatten(0, (2, 3))
    poison[0, :2], poison[1, 1:] = 0.5, 0.5  # all but the best: of no weight
    chain = chunk.chain._replace(x=poison.flatten(0, 1))
    same, _ = gradients_of(rft_config, policy, rollouts._replace(chunks=(chunk._replace(chain=chain),)))
    torch.testing.assert_close(gradient, same, atol=1e-6, rtol=1e-4)
