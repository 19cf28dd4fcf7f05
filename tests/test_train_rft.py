"""train_rft: exact scores, frozen parts, resume, every option, every refusal."""

import dataclasses
import json

import numpy as np
import pytest
import torch

import train_rft
from vlarft.checkpoint import read_header
from vlarft.data import WindowSampler, load_episodes
from vlarft.flow import chain_log_prob
from vlarft.metrics import perceptual
from vlarft.policy import VLAPolicy
from vlarft.world_model import WorldModel

SMOKE = train_rft.PRESETS["smoke"]


@pytest.fixture()
def config(demos, policy_file, world_model_file, tmp_path):
    return dataclasses.replace(
        SMOKE,
        policy=str(policy_file),
        world_model=str(world_model_file),
        demos=str(demos),
        out_dir=str(tmp_path / "rft"),
    )


@pytest.fixture()
def parts(config):
    policy = VLAPolicy.load(config.policy)
    torch.manual_seed(0)
    policy.add_sigma_net()
    policy.eval()
    sampler = WindowSampler(load_episodes(config.demos), 9, 8)
    return policy, WorldModel.load(config.world_model), sampler.batch(config.starts, 0, 0)


def log_of(folder):
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def test_first_update_has_ratio_one(config, parts):
    policy, model, batch = parts
    rollouts = train_rft.collect(config, policy, model, batch, perceptual("ssim"), (0, 0, 0))
    cond = policy.condition(rollouts.context, batch.proprio).repeat(config.group)
    scored = chain_log_prob(policy.head, policy.sigma_net, rollouts.chain.x, cond)
    torch.testing.assert_close(scored.log_prob, rollouts.chain.log_prob, atol=1e-4, rtol=1e-5)
    optimizer = torch.optim.SGD([*policy.head.parameters(), *policy.sigma_net.parameters()], lr=0.0)
    metrics = train_rft.update(config, policy, optimizer, rollouts, (0, 0))
    assert metrics["ratio_max"] == pytest.approx(1, abs=1e-4)
    assert metrics["ratio_mean"] == pytest.approx(1, abs=1e-5)
    assert metrics["clip_frac"] == 0
    assert metrics["sigma"] == pytest.approx((0.08 * 0.2) ** 0.5, rel=1e-5)  # zero-initialised sigma net


def test_micro_batches_give_the_same_gradient(config, parts):
    policy, model, batch = parts
    config = dataclasses.replace(config, mse_weight=0.0)  # its noise is drawn per micro-batch
    rollouts = train_rft.collect(config, policy, model, batch, perceptual("ssim"), (0, 0, 0))
    parameters = [*policy.head.parameters(), *policy.sigma_net.parameters()]
    gradients = []
    for micro in (None, 1):
        optimizer = torch.optim.SGD(parameters, lr=0.0)
        train_rft.update(
            dataclasses.replace(config, micro_starts=micro, clip_norm=1e9), policy, optimizer, rollouts, (0,)
        )
        gradients.append(torch.cat([p.grad.flatten() for p in parameters if p.grad is not None]))
    assert gradients[0].abs().max() > 0
    torch.testing.assert_close(gradients[0], gradients[1], atol=1e-6, rtol=1e-4)


def test_head_and_sigma_net_move_and_nothing_else(config, policy_file):
    metrics = train_rft.main(config)
    before, after = VLAPolicy.load(policy_file), VLAPolicy.load(f"{config.out_dir}/model.safetensors")
    assert after.sigma_net is not None
    moved = {k for k, v in before.named_parameters() if not torch.equal(v, after.get_parameter(k))}
    assert moved and all(k.startswith("head.") for k in moved)
    assert torch.equal(before.normalizer.action_low, after.normalizer.action_low)
    assert after.sigma_net.net.dit.out.weight.abs().max() > 0  # started at zero
    expected = {"reward", "reward_std", "adv_std", "constant_groups", "sigma", "ratio_mean", "ratio_max", "approx_kl"}
    assert expected | {"clip_frac", "grad_norm", "mse", "entropy", "policy_s", "world_model_s", "update_s"} <= set(
        metrics
    )
    header = read_header(f"{config.out_dir}/model.safetensors")
    assert header.extra["rft"]["reward"] == "r3"
    assert header.extra["train_episodes"]


def test_evaluation_ignores_the_sigma_net(config):
    train_rft.main(config)
    policy = VLAPolicy.load(f"{config.out_dir}/model.safetensors")
    images, proprio = np.zeros((1, 64, 64, 3), np.uint8), np.zeros((1, 8), np.float32)
    noise = torch.randn(1, 8, 7, generator=torch.Generator().manual_seed(0))
    actions = policy.act(images, ["push"], proprio, noise=noise)
    torch.nn.init.normal_(policy.sigma_net.net.dit.out.weight)
    assert torch.equal(policy.act(images, ["push"], proprio, noise=noise), actions)


def test_resume_equals_no_interruption(config, tmp_path, monkeypatch):
    config = dataclasses.replace(config, steps=3)
    train_rft.main(config)
    whole = torch.load(f"{config.out_dir}/train_state.pt", weights_only=True)

    interrupted = dataclasses.replace(config, out_dir=str(tmp_path / "interrupted"))
    real = train_rft.collect
    calls = []

    def stop_at_the_third(*args):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return real(*args)

    monkeypatch.setattr(train_rft, "collect", stop_at_the_third)
    with pytest.raises(KeyboardInterrupt):
        train_rft.main(interrupted)
    monkeypatch.setattr(train_rft, "collect", real)
    train_rft.main(interrupted)
    resumed = torch.load(f"{interrupted.out_dir}/train_state.pt", weights_only=True)
    assert whole["step"] == resumed["step"] == 3
    for key, value in whole["policy"].items():
        assert torch.equal(value, resumed["policy"][key]), key
    for slots, others in zip(whole["optimizer"]["state"].values(), resumed["optimizer"]["state"].values()):
        assert all(torch.equal(slots[k], others[k]) for k in slots)
    assert [row["step"] for row in log_of(tmp_path / "interrupted")] == [0, 1, 2]


@pytest.mark.parametrize(
    "changes",
    [
        {"reward": "r1"},
        {"reward": "r2", "imagination": "sample", "top_p": 0.9, "temperature": 0.8},
        {"imagination": "common", "over_frames": "mean", "perceptual": "none"},
        {"objective": "ppo", "over_k": "sum", "epochs": 2, "divide_by_std": False, "reference": "executed"},
        {"bf16": True, "over_frames": "last", "micro_starts": 1},
    ],
)
def test_options(config, changes):
    metrics = train_rft.main(dataclasses.replace(config, steps=1, **changes))
    assert all(np.isfinite(v) for v in metrics.values())
    if changes.get("epochs"):
        assert metrics["ratio_max"] != pytest.approx(1, abs=1e-6)  # the second epoch scores an updated policy


def test_time_limit_stops_early(config):
    train_rft.main(dataclasses.replace(config, steps=50, max_minutes=1e-4))
    assert len(log_of(train_rft.Path(config.out_dir))) < 50


def test_refusals(config, tmp_path):
    def run(**changes):
        train_rft.main(dataclasses.replace(config, out_dir=str(tmp_path / "x"), **changes))

    with pytest.raises(FileNotFoundError, match="no checkpoint at .*missing"):
        run(policy=str(tmp_path / "missing"))
    with pytest.raises(ValueError, match="holds a WorldModel, expected a VLAPolicy"):
        run(policy=config.world_model)
    with pytest.raises(ValueError, match="holds a VLAPolicy, expected a WorldModel"):
        run(world_model=config.policy)
    with pytest.raises(FileNotFoundError, match="does not exist"):
        run(demos=str(tmp_path / "no_demos"))
    train_rft.main(dataclasses.replace(config, steps=1))
    with pytest.raises(ValueError, match="another configuration: lr"):
        train_rft.main(dataclasses.replace(config, steps=1, lr=0.5))


def test_float32_masters_move_at_the_papers_learning_rate(config, policy_file):
    train_rft.main(dataclasses.replace(config, lr=1e-6, warmup=1))
    before, after = VLAPolicy.load(policy_file), VLAPolicy.load(f"{config.out_dir}/model.safetensors")
    moved = [(p != after.get_parameter(k)).float().mean() for k, p in before.head.named_parameters(prefix="head")]
    assert np.mean(moved) > 0.3
