"""train_rft: the loss by hand, exact ratios and gradients, frozen parts, resume, hooks, every option and refusal."""

import dataclasses
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import files_of

import train_rft
from vlarft.data import WindowSampler, load_episodes
from vlarft.data.convention import image_convention
from vlarft.flow import chain_log_prob, transition
from vlarft.grpo import advantages
from vlarft.metrics import perceptual
from vlarft.policy import PolicyConfig, VLAPolicy
from vlarft.reward import make_scorer
from vlarft.run.checkpoint import load_model, read_header, save_model
from vlarft.run.random import generator
from vlarft.world_model import WorldModel, WorldModelConfig

SMOKE = train_rft.PRESETS["smoke"]


def log_of(folder):
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def test_head_and_sigma_net_move_and_nothing_else(rft_config, policy_file):
    metrics = train_rft.main(rft_config)
    before, after = VLAPolicy.load(policy_file), VLAPolicy.load(f"{rft_config.out_dir}/model.safetensors")
    assert after.sigma_net is not None
    moved = {k for k, v in before.named_parameters() if not torch.equal(v, after.get_parameter(k))}
    assert moved and all(k.startswith("head.") for k in moved)
    assert torch.equal(before.normalizer.action_low, after.normalizer.action_low)
    assert after.sigma_net.output.weight.abs().max() > 0  # started at zero
    expected = {"reward", "reward_std", "adv_std", "constant_groups", "sigma", "ratio_mean", "ratio_max", "approx_kl"}
    assert expected | {"clip_frac", "grad_norm", "mse", "entropy", "policy_s", "world_model_s", "update_s"} <= set(
        metrics
    )
    header = read_header(f"{rft_config.out_dir}/model.safetensors")
    assert header.extra["rft"]["reward"] == "r3"
    assert header.extra["train_episodes"]


def test_a_phase_ends_when_the_gpu_has_done_it(monkeypatch):
    called, seconds, gpu = [], {}, torch.device("cuda", 0)
    monkeypatch.setattr(torch.cuda, "synchronize", called.append)
    with train_rft.timed(seconds, "phase", gpu):
        called.append("phase")
    with train_rft.timed(seconds, "other", torch.device("cpu")):
        called.append("other")
    assert called == [gpu, "phase", gpu, "other"] and set(seconds) == {"phase", "other"}


def test_evaluation_ignores_the_sigma_net(rft_config):
    train_rft.main(rft_config)
    policy = VLAPolicy.load(f"{rft_config.out_dir}/model.safetensors")
    images, proprio = np.zeros((1, 64, 64, 3), np.uint8), np.zeros((1, 8), np.float32)
    noise = torch.randn(1, 8, 7, generator=torch.Generator().manual_seed(0))
    actions = policy.act(images, ["push"], proprio, noise=noise)
    torch.nn.init.normal_(policy.sigma_net.output.weight)
    assert torch.equal(policy.act(images, ["push"], proprio, noise=noise), actions)


def test_resume_equals_no_interruption(rft_config, tmp_path, monkeypatch):
    rft_config = dataclasses.replace(rft_config, steps=3, epochs=2)
    train_rft.main(rft_config)
    whole = torch.load(f"{rft_config.out_dir}/train_state.pt", weights_only=True)

    interrupted = dataclasses.replace(rft_config, out_dir=str(tmp_path / "interrupted"))
    real, steps = train_rft.sample_chains, []

    def stop_at_the_third(*args):
        steps.append(1)
        if len(steps) == 3:
            raise KeyboardInterrupt
        return real(*args)

    with pytest.raises(KeyboardInterrupt):
        train_rft.main(interrupted, sample=stop_at_the_third)
    train_rft.main(interrupted)
    resumed = torch.load(f"{interrupted.out_dir}/train_state.pt", weights_only=True)
    assert whole["step"] == resumed["step"] == 3
    for key, value in whole["policy"].items():
        assert torch.equal(value, resumed["policy"][key]), key
    for slots, others in zip(whole["optimizer"]["state"].values(), resumed["optimizer"]["state"].values()):
        assert all(torch.equal(slots[k], others[k]) for k in slots)
    assert [row["step"] for row in log_of(tmp_path / "interrupted")] == [0, 1, 2]
    before = files_of(rft_config.out_dir)
    train_rft.main(dataclasses.replace(rft_config, micro_starts=1))  # a finished run is left as it is
    assert files_of(rft_config.out_dir) == before


def test_a_policy_that_diverges_is_not_saved(rft_config):
    """A head whose actions are no numbers is found before a world model, a simulator or a robot gets them."""

    def diverges(cfg, policy, rollouts):
        value = 0 * sum(p.sum() for p in policy.head.parameters())
        with torch.no_grad():
            for parameter in policy.head.parameters():
                parameter.fill_(torch.nan)
        return value, {}

    with pytest.raises(FloatingPointError, match="NaN or infinite"):
        train_rft.main(rft_config, loss=diverges)
    assert not (Path(rft_config.out_dir) / "model.safetensors").exists()


@pytest.mark.parametrize(
    "changes",
    [
        {"reward": "r1", "clip": 0.1, "warmup": 0},
        {"reward": "r2", "imagination": "sample", "perceptual": "none"},
        {"imagination": "greedy", "epochs": 2, "divide_by_std": False},
        {"precision": "bf16", "micro_starts": 1, "keep_interval": 1, "async_save": True},
        {"reward": "divergence", "per_step": True, "precision": "bf16", "gate_starts": 0},
        {"sigma_min": 0.05, "sigma_max": 0.3, "entropy_weight": 0.0, "mse_weight": 0.0, "frozen": "shard"},
    ],
)
def test_options(rft_config, changes):
    metrics = train_rft.main(dataclasses.replace(rft_config, steps=1, **changes))
    assert all(np.isfinite(v) for v in metrics.values())
    if changes.get("epochs"):
        assert metrics["ratio_max"] != pytest.approx(1, abs=1e-6)  # the second epoch scores an updated policy
    saved = VLAPolicy.load(f"{rft_config.out_dir}/model.safetensors")
    for name in ("sigma_min", "sigma_max"):
        assert getattr(saved.cfg.flow, name) == getattr(dataclasses.replace(rft_config, **changes), name)
    assert (train_rft.Path(rft_config.out_dir) / "model_000001.safetensors").exists() == ("keep_interval" in changes)


def rollouts_of(cfg, parts, score=None):
    """The rollouts of the first step, with the parts of a policy."""
    policy, model, batch = parts
    context = policy.encode_frames(batch.frames[:, 0], batch.instructions)
    chain = train_rft.sample_chains(policy, batch, context, cfg.group, generator("cpu", "chains", 0, 0))
    actions = policy.normalizer.decode_actions(chain.x[:, -1]).unflatten(0, (-1, cfg.group))
    score = score or make_scorer("r3", model, perceptual("ssim"), "common")
    per_frame = score(batch, actions, generator("cpu", "imagination", 0, 0))
    advantage = advantages(per_frame if cfg.per_step else per_frame.sum(-1), divide_by_std=cfg.divide_by_std)
    chains = [value.unflatten(0, (-1, cfg.group)) for value in chain]
    pairs = train_rft.shared_pairs(cfg, batch, generator("cpu", "flow matching", 0, 0, 0))
    return train_rft.Rollouts(batch, context, *chains, per_frame, advantage, *pairs)


def test_first_update_has_ratio_one(rft_config, rft_parts):
    policy, _, _ = rft_parts
    rollouts = rollouts_of(rft_config, rft_parts)
    cond = policy.condition(rollouts.context, rollouts.batch.proprio).repeat(rft_config.group)
    scored = chain_log_prob(policy.head, policy.sigma_net, rollouts.x.flatten(0, 1), cond)
    torch.testing.assert_close(scored.log_prob, rollouts.log_prob.flatten(0, 1), atol=1e-4, rtol=1e-5)
    _, metrics = train_rft.grpo_loss(rft_config, policy, rollouts)
    assert metrics["ratio_max"] == pytest.approx(1, abs=1e-4)
    assert metrics["ratio_mean"] == pytest.approx(1, abs=1e-5)
    assert metrics["clip_frac"] == 0
    assert metrics["sigma"] == pytest.approx((0.08 * 0.2) ** 0.5, rel=1e-5)  # zero-initialised sigma net


def test_the_loss_is_eq_13_by_hand(rft_config, rft_parts):
    """-E[clip(r) Adv] - alpha H + lambda MSE, from the networks' outputs, after the policy has moved."""
    policy, _, batch = rft_parts
    cfg = dataclasses.replace(rft_config, mse_weight=0.7, entropy_weight=0.4, clip=0.05)
    rollouts = rollouts_of(cfg, rft_parts)
    torch.nn.init.normal_(policy.head.output.bias, std=0.05)
    loss, metrics = train_rft.grpo_loss(cfg, policy, rollouts)
    total = entropy = 0.0
    for s in range(2):
        cond = policy.condition(rollouts.context[s : s + 1], batch.proprio[s : s + 1])
        for g in range(3):
            x, old = rollouts.x[s, g], rollouts.log_prob[s, g]
            log_ratio = 0.0
            for k in range(10):
                normal = transition(policy.head, policy.sigma_net, x[k : k + 1], k, cond)
                log_ratio += (normal.log_prob(x[k + 1]) - old[k]).sum() / 10
                entropy += normal.entropy().mean() / (10 * 6)
            total += log_ratio.exp().clamp(0.95, 1.05) * rollouts.advantage[s, g] / 6
    a, eps = policy.normalizer.encode_actions(batch.intended)[:, None], rollouts.eps  # (S, 1, T, A), (S, D, T, A)
    tau = rollouts.tau[..., None, None]
    cond = policy.condition(rollouts.context, batch.proprio)
    noisy = (tau * a + (1 - tau) * eps).flatten(0, 1)
    velocity = policy.head.velocity(noisy, rollouts.tau.flatten(), cond).unflatten(0, (2, -1))
    mse = (velocity - (a - eps)).square().mean()
    assert metrics["clip_frac"] > 0 and abs(total.item()) > 1e-4
    assert loss.item() == pytest.approx((-total - 0.4 * entropy + 0.7 * mse).item(), rel=1e-4)
    assert loss.item() == pytest.approx(
        metrics["policy_loss"] - 0.4 * metrics["entropy"] + 0.7 * metrics["mse"], rel=1e-6
    )


@pytest.mark.parametrize("changes", [{}, {"per_step": True}])
def test_micro_batches_give_the_same_gradient(rft_config, rft_parts, changes):
    policy, _, _ = rft_parts
    cfg = dataclasses.replace(rft_config, mse_weight=0.5, **changes)
    rollouts = rollouts_of(cfg, rft_parts)
    torch.nn.init.normal_(policy.head.output.bias, std=1e-3)  # the policy has moved: ratios differ from 1
    found = []
    for micro in (None, 1):
        policy.zero_grad()
        split = dataclasses.replace(cfg, micro_starts=micro)
        metrics = train_rft.backward(train_rft.grpo_loss, split, policy, rollouts)
        parameters = [*policy.head.parameters(), *policy.sigma_net.parameters()]
        found.append((torch.cat([p.grad.flatten() for p in parameters if p.grad is not None]), metrics))
    (whole, metrics), (micro, others) = found
    assert whole.abs().max() > 0
    torch.testing.assert_close(whole, micro, atol=1e-5, rtol=1e-3)
    assert metrics == pytest.approx(others, rel=1e-3, abs=1e-5)


@pytest.mark.parametrize("per_step", [False, True])
def test_gradient_of_the_objective_against_finite_differences(rft_config, rft_parts, per_step):
    policy, _, _ = rft_parts
    cfg = dataclasses.replace(rft_config, mse_weight=0.3, entropy_weight=0.1, per_step=per_step)
    rollouts = rollouts_of(cfg, rft_parts)
    torch.nn.init.normal_(policy.sigma_net.output.bias, std=0.1)
    for parameter in (policy.head.output.bias, policy.sigma_net.output.bias):
        policy.zero_grad()
        train_rft.grpo_loss(cfg, policy, rollouts)[0].backward()
        losses = []
        for sign in (1, -2):
            with torch.no_grad():
                parameter[2] += sign * 2e-3
            losses.append(train_rft.grpo_loss(cfg, policy, rollouts)[0].item())
        with torch.no_grad():
            parameter[2] += 2e-3
        assert parameter.grad[2].item() == pytest.approx((losses[0] - losses[1]) / 4e-3, rel=0.05, abs=2e-4)


def test_the_update_raises_the_probability_of_the_better_rollouts(rft_config, rft_parts):
    policy, _, _ = rft_parts
    cfg = dataclasses.replace(rft_config, mse_weight=0.0, entropy_weight=0.0)
    rollouts = rollouts_of(cfg, rft_parts)
    optimizer = torch.optim.SGD(policy.head.parameters(), lr=1e-3)
    train_rft.backward(train_rft.grpo_loss, cfg, policy, rollouts)
    optimizer.step()
    cond = policy.condition(rollouts.context, rollouts.batch.proprio).repeat(cfg.group)
    scored = chain_log_prob(policy.head, policy.sigma_net, rollouts.x.flatten(0, 1), cond)
    log_ratio = (scored.log_prob - rollouts.log_prob.flatten(0, 1)).sum((1, 2, 3)).unflatten(0, (2, 3))
    assert (log_ratio * rollouts.advantage).sum() > 0


def test_a_group_stays_on_one_process(rft_config, rft_parts, monkeypatch):
    sampler = WindowSampler(load_episodes(rft_config.demos), 9, 8)
    cfg = dataclasses.replace(rft_config, starts=4)
    whole = rollouts_of(cfg, (*rft_parts[:2], sampler.batch(4, 0, 0)))
    monkeypatch.setattr("vlarft.run.distributed.world_size", lambda: 2)
    for rank in range(2):
        monkeypatch.setattr("vlarft.run.distributed.rank", lambda rank=rank: rank)
        score = make_scorer("r3", rft_parts[1], perceptual("ssim"), "common", part=(rank, 2))
        batch = sampler.batch(4, 0, 0, part=(rank, 2))
        here = rollouts_of(cfg, (*rft_parts[:2], batch), score)
        rows = slice(2 * rank, 2 * rank + 2)  # whole groups, the same as without the other process
        assert here.batch.index.tolist() == whole.batch.index[rows].tolist()
        assert here.advantage.shape == (2, cfg.group)
        torch.testing.assert_close(here.x, whole.x[rows])
        torch.testing.assert_close(here.eps, whole.eps[rows])
        torch.testing.assert_close(here.advantage, whole.advantage[rows], atol=1e-3, rtol=1e-3)
        assert here.advantage.mean(1).abs().max() < 1e-5  # against the mean of its group


def test_a_study_hands_in_its_own_score_sample_and_loss(rft_config):
    calls = []

    def score(batch, actions, source):
        calls.append(("score", actions.shape))
        return -(actions - batch.intended[:, None]).square().mean(-1)

    def sample(policy, batch, context, group, source):
        calls.append(("sample", context.shape[0]))
        return train_rft.sample_chains(policy, batch, context, group, source)

    def loss(cfg, policy, rollouts):
        calls.append(("loss", len(rollouts.x)))
        value, metrics = train_rft.grpo_loss(cfg, policy, rollouts)
        return 2 * value, metrics | {"twice": 2.0}

    cfg = dataclasses.replace(rft_config, steps=1, micro_starts=1, world_model="none")  # no world model is loaded
    metrics = train_rft.main(cfg, score=score, sample=sample, loss=loss)
    assert metrics["twice"] == 2 and calls.count(("loss", 1)) == 2 and ("sample", 2) in calls
    assert ("score", (2, 3, 8, 7)) in calls


def test_further_parts_train_where_their_rates_are_given(rft_config):
    def loss(cfg, policy, rollouts):
        value, metrics = train_rft.grpo_loss(cfg, policy, rollouts)
        return value + policy.key_embed.weight.square().sum(), metrics

    cfg = dataclasses.replace(rft_config, steps=1, warmup=0, reward="r1")
    train_rft.main(cfg, loss=loss, rates={"key_embed": 1e-2})
    before, after = (
        VLAPolicy.load(path).state_dict() for path in (rft_config.policy, f"{rft_config.out_dir}/model.safetensors")
    )
    moved = {name.split(".")[0] for name in before if not torch.equal(before[name], after[name])}
    assert moved == {"head", "key_embed"}


@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler on the CPU")
def test_compiled_networks_give_the_same_rewards(rft_config, tmp_path):
    plain = train_rft.main(dataclasses.replace(rft_config, steps=1))
    compiled = train_rft.main(
        dataclasses.replace(rft_config, steps=1, compile=True, out_dir=str(tmp_path / "compiled"))
    )
    assert compiled["reward"] == pytest.approx(plain["reward"], abs=1e-5)


def test_noise_of_an_earlier_fine_tuning_is_kept_or_refused(rft_config, tmp_path):
    train_rft.main(dataclasses.replace(rft_config, steps=1))
    again = dataclasses.replace(
        rft_config, policy=f"{rft_config.out_dir}/model.safetensors", out_dir=str(tmp_path / "again")
    )
    with pytest.raises(ValueError, match=r"fine-tuned with other noise: it has sigma_max 0.2, asked 0.3"):
        train_rft.main(dataclasses.replace(again, sigma_max=0.3, out_dir=str(tmp_path / "other")))
    train_rft.main(dataclasses.replace(again, steps=1, lr=0.0, sigma_lr=0.0))
    first, second = (VLAPolicy.load(f"{c.out_dir}/model.safetensors") for c in (rft_config, again))
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))


def test_time_limit_stops_early(rft_config):
    train_rft.main(dataclasses.replace(rft_config, steps=50, max_minutes=1e-4))
    assert len(log_of(train_rft.Path(rft_config.out_dir))) < 50


def test_a_policy_that_names_no_episodes_takes_a_split_of_its_own(rft_config, tmp_path, capfd):
    """As converted public weights are; a gate cannot know what the policy has seen, and says so."""
    policy, _ = load_model(rft_config.policy, VLAPolicy, PolicyConfig)
    save_model(tmp_path / "public.safetensors", policy, policy.cfg)
    both = (*rft_config.demos, str(tmp_path / "none_yet"))
    with pytest.raises(FileNotFoundError, match="none_yet"):
        train_rft.main(dataclasses.replace(rft_config, demos=both))
    train_rft.main(dataclasses.replace(rft_config, policy=str(tmp_path / "public.safetensors"), steps=1))
    extra = read_header(f"{rft_config.out_dir}/model.safetensors").extra
    assert len(extra["train_episodes"]) == 5 and len(extra["held_out_episodes"]) == 1 and extra["camera"] == "agentview"
    assert "names no episodes of its training: fine-tunes on 5 of" in capfd.readouterr().err
    policy.cfg = dataclasses.replace(policy.cfg, cameras=("front",))
    save_model(tmp_path / "front.safetensors", policy, policy.cfg)
    with pytest.raises(ValueError, match="no camera 'front'"):  # its own, not the usual one
        train_rft.main(dataclasses.replace(rft_config, policy=str(tmp_path / "front.safetensors"), reward="r1"))


def test_refusals(rft_config, tmp_path):
    def run(**changes):
        train_rft.main(dataclasses.replace(rft_config, out_dir=str(tmp_path / "x"), **changes))

    with pytest.raises(FileNotFoundError, match="no checkpoint at .*missing"):
        run(policy=str(tmp_path / "missing"))
    with pytest.raises(ValueError, match="holds a WorldModel, expected a VLAPolicy"):
        run(policy=rft_config.world_model)
    with pytest.raises(ValueError, match="holds a VLAPolicy, expected a WorldModel"):
        run(world_model=rft_config.policy)
    with pytest.raises(FileNotFoundError, match="does not exist"):
        run(demos=(str(tmp_path / "no_demos"),))
    files = [tmp_path / "policy.safetensors", tmp_path / "model.safetensors"]
    record = image_convention(load_episodes(rft_config.demos), "agentview")
    turned = {**record, "mean_frame": np.array(record["mean_frame"])[::-1, ::-1].tolist()}
    for convention, message in (
        (
            {"camera": "eye_in_hand"},
            "image conventions differ: policy .* has camera 'agentview', world .* has 'eye",
        ),
        (turned, "image conventions differ: .*world model .* look like those of policy .* turned by 180 degrees"),
    ):
        for source, kind, kind_config, file, facts in (
            (rft_config.policy, VLAPolicy, PolicyConfig, files[0], record),
            (rft_config.world_model, WorldModel, WorldModelConfig, files[1], convention),
        ):
            model, extra = load_model(source, kind, kind_config)
            save_model(file, model, model.cfg, {**extra, **facts})
        with pytest.raises(ValueError, match=message):
            run(policy=str(files[0]), world_model=str(files[1]))
    policy, extra = load_model(rft_config.policy, VLAPolicy, PolicyConfig)
    save_model(files[0], policy, policy.cfg, {**extra, **turned})
    with pytest.raises(ValueError, match="images of the demonstrations .* those of policy .* turned by 180 degrees"):
        run(policy=str(files[0]), reward="r1")
    model, _ = load_model(rft_config.world_model, WorldModel, WorldModelConfig)
    small = dataclasses.replace(model.cfg, tokenizer=dataclasses.replace(model.cfg.tokenizer, image_size=(32, 32)))
    small_model = WorldModel(small)
    small_model.action_bins.load_state_dict(model.action_bins.state_dict())
    save_model(files[1], small_model, small, {"held_out_episodes": []})
    with pytest.raises(ValueError, match="world model .* takes images of 32x32, .* has 64x64"):
        run(world_model=str(files[1]))
    policy.normalizer.proprio_low[0], policy.normalizer.proprio_high[0] = 50.0, 51.0  # centimetres, say
    save_model(files[0], policy, policy.cfg, extra)
    with pytest.raises(ValueError, match="another robot or other units: 100% of proprio 0 lie outside"):
        run(policy=str(files[0]), reward="r1")
    policy, extra = load_model(rft_config.policy, VLAPolicy, PolicyConfig)
    for names, changes, message in (
        ({"train_episodes": extra["train_episodes"]}, {}, "names no held-out episodes.*leave the gate out with --gate"),
    ):
        save_model(files[0], policy, policy.cfg, names)
        with pytest.raises(ValueError, match=message):
            run(policy=str(files[0]), **changes)
    assert not (tmp_path / "x").exists()  # so that the same folder serves for the next attempt
    save_model(files[1], model, model.cfg, {"held_out_episodes": [], "train_episodes": ["robot/pour_demo/demo_0"]})
    with pytest.warns(
        UserWarning, match="on none of the files of policy .*, on robot/pour_demo, ... and not on squares"
    ):
        run(world_model=str(files[1]), steps=1)
    first, *_ = extra["train_episodes"]
    save_model(files[0], policy, policy.cfg, {**extra, "episode_digests": {first: "of before"}})
    with pytest.warns(UserWarning, match=f"knows 1 of .* episodes by name, first {first}"):
        train_rft.main(dataclasses.replace(rft_config, policy=str(files[0]), steps=1, out_dir=str(tmp_path / "anew")))
    header = read_header(rft_config.world_model).extra
    save_model(files[1], model, model.cfg, {**header, "context_lookback": -1})
    with pytest.warns(UserWarning, match="model.safetensors was trained with --context-lookback -1, this run has 0"):
        train_rft.main(dataclasses.replace(rft_config, world_model=str(files[1]), out_dir=str(tmp_path / "first")))
    train_rft.main(dataclasses.replace(rft_config, steps=1))
    with pytest.raises(ValueError, match="another configuration: lr"):
        train_rft.main(dataclasses.replace(rft_config, steps=1, lr=0.5))


def test_a_policy_of_several_cameras_is_refused(rft_config, tmp_path):
    policy, extra = load_model(rft_config.policy, VLAPolicy, PolicyConfig)
    policy.cfg = dataclasses.replace(policy.cfg, cameras=("agentview", "eye_in_hand"))
    with pytest.raises(ValueError, match="sees 2 cameras, a world model imagines one"):
        train_rft.windows(rft_config, policy, extra, False, None)


@pytest.mark.parametrize("reward", ["r1", "divergence"])
def test_weights_that_no_reward_reads_are_refused(rft_config, reward):
    with pytest.raises(ValueError, match=f"--perceptual-weights: reward {reward} has no perceptual term"):
        dataclasses.replace(rft_config, reward=reward, perceptual_weights="vgg.pth")


def test_a_lower_bound_above_the_upper_one_is_named(rft_config):
    with pytest.raises(ValueError, match="--sigma-min 0.3 exceeds --sigma-max 0.2"):
        dataclasses.replace(rft_config, sigma_min=0.3, sigma_max=0.2)


def test_float32_masters_move_at_the_papers_learning_rate(rft_config, policy_file):
    train_rft.main(dataclasses.replace(rft_config, lr=1e-6, warmup=1))
    before, after = VLAPolicy.load(policy_file), VLAPolicy.load(f"{rft_config.out_dir}/model.safetensors")
    moved = [(p != after.get_parameter(k)).float().mean() for k, p in before.head.named_parameters(prefix="head")]
    assert np.mean(moved) > 0.3
