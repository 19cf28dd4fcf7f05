"""train_rft: exact scores, frozen parts, resume, every option, every refusal."""

import dataclasses
import json
import shutil

import numpy as np
import pytest
import torch
from conftest import write_moving_square

import train_rft
from vlarft.checkpoint import load_model, read_header, save_model
from vlarft.data import WindowSampler, load_episodes
from vlarft.data.convention import image_convention
from vlarft.flow import chain_log_prob
from vlarft.grpo import advantages
from vlarft.metrics import perceptual
from vlarft.objective import _of_chunk, supervised_copy, update
from vlarft.policy import PolicyConfig, VLAPolicy
from vlarft.rollout import fit_drift, propagate
from vlarft.sim import evaluate
from vlarft.world_model import WorldModel, WorldModelConfig

SMOKE = train_rft.PRESETS["smoke"]
RELEASE = {
    "divide_by_std": True, "over_frames": "mean", "over_k": "sum", "ratio_per": "element", "objective": "ppo",
    "dual_clip": 3.0, "mse_gate": 0.2, "entropy_over": "k+1", "sigma_uses_x": True,
}  # fmt: skip


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


def gradients_of(config, policy, rollouts, **changes):
    """Gradients of one update that changes nothing, and its metrics."""
    parameters = [*policy.head.parameters(), *(policy.sigma_net.parameters() if policy.sigma_net else ())]
    optimizer = torch.optim.SGD(parameters, lr=0.0)
    metrics = update(dataclasses.replace(config, clip_norm=1e9, **changes), policy, optimizer, rollouts, (0, 0))
    return torch.cat([p.grad.flatten() for p in parameters if p.grad is not None]), metrics


def test_first_update_has_ratio_one(config, parts):
    policy, model, batch = parts
    rollouts = train_rft.collect(config, policy, model, batch, perceptual("ssim"), (0, 0))
    (chunk,) = rollouts.chunks
    cond = policy.condition(chunk.context, batch.proprio).repeat(config.group)
    scored = chain_log_prob(policy.head, policy.sigma_net, chunk.chain.x, cond)
    torch.testing.assert_close(scored.log_prob, chunk.chain.log_prob, atol=1e-4, rtol=1e-5)
    optimizer = torch.optim.SGD([*policy.head.parameters(), *policy.sigma_net.parameters()], lr=0.0)
    metrics = train_rft.update(config, policy, optimizer, rollouts, (0, 0))
    assert metrics["ratio_max"] == pytest.approx(1, abs=1e-4)
    assert metrics["ratio_mean"] == pytest.approx(1, abs=1e-5)
    assert metrics["clip_frac"] == 0
    assert metrics["sigma"] == pytest.approx((0.08 * 0.2) ** 0.5, rel=1e-5)  # zero-initialised sigma net


def test_a_group_stays_on_one_process(config, parts, monkeypatch):
    policy, model, _ = parts
    sampler, distance = WindowSampler(load_episodes(config.demos), 9, 8), perceptual("ssim")
    whole = train_rft.collect(config, policy, model, sampler.batch(4, 0, 0), distance, (0, 0))
    monkeypatch.setattr("vlarft.distributed.world_size", lambda: 2)
    for rank in range(2):
        monkeypatch.setattr("vlarft.distributed.rank", lambda rank=rank: rank)
        own = train_rft.collect(config, policy, model, sampler.batch(4, 0, 0, part=(rank, 2)), distance, (0, 0))
        rows = slice(2 * rank, 2 * rank + 2)  # whole groups, the same as without the other process
        assert own.batch.index.tolist() == whole.batch.index[rows].tolist()
        assert own.advantage.shape == (2, config.group)
        torch.testing.assert_close(
            own.chunks[0].chain.x, whole.chunks[0].chain.x.unflatten(0, (4, -1))[rows].flatten(0, 1)
        )
        torch.testing.assert_close(own.advantage, whole.advantage[rows], atol=1e-3, rtol=1e-3)
        assert own.advantage.mean(1).abs().max() < 1e-5  # against the group's own mean


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"mse_gate": 1e-7, "objective": "ppo", "ratio_per": "element"},
        {"credit": "to_go", "ratio_per": "step"},
        {"algorithm": "rwr"},
    ],
)
def test_micro_batches_give_the_same_gradient(config, parts, changes):
    policy, model, batch = parts
    config = dataclasses.replace(config, mse_weight=0.5, **changes)
    rollouts = train_rft.collect(config, policy, model, batch, perceptual("ssim"), (0, 0))
    torch.nn.init.normal_(policy.head.net.dit.out.bias, std=1e-3)  # the policy has moved: ratios and gate do real work
    whole, metrics = gradients_of(config, policy, rollouts)
    micro, others = gradients_of(config, policy, rollouts, micro_starts=1)
    assert whole.abs().max() > 0
    torch.testing.assert_close(whole, micro, atol=1e-5, rtol=1e-3)
    assert metrics == pytest.approx(others, rel=1e-3, abs=1e-5)
    if "mse_gate" in changes:
        assert metrics["mse_gate"] > 0


def test_gradient_of_the_whole_objective_against_finite_differences(config, parts):
    policy, model, batch = parts
    supervised = supervised_copy(policy)
    rollouts = train_rft.collect(config, policy, model, batch, perceptual("ssim"), (0, 0))
    config = dataclasses.replace(config, mse_weight=0.3, kl_weight=0.5, entropy_weight=0.1, clip_norm=1e9)
    torch.nn.init.normal_(policy.sigma_net.net.dit.out.bias, std=0.1)
    bias = policy.head.net.dit.out.bias
    optimizer = torch.optim.SGD([bias, policy.sigma_net.net.dit.out.bias], lr=0.0)
    for parameter in (bias, policy.sigma_net.net.dit.out.bias):
        update(config, policy, optimizer, rollouts, (0, 0), supervised)
        gradient = parameter.grad[2].item()
        losses = []
        for sign in (1, -1):
            with torch.no_grad():
                parameter[2] += sign * 2e-3
            losses.append(update(config, policy, optimizer, rollouts, (0, 0), supervised)["loss"])
            with torch.no_grad():
                parameter[2] -= sign * 2e-3
        assert gradient == pytest.approx((losses[0] - losses[1]) / 4e-3, rel=0.05, abs=2e-3)


def test_several_updates_on_one_batch(config, parts):
    policy, model, batch = parts
    rollouts = train_rft.collect(config, policy, model, batch, perceptual("ssim"), (0, 0))
    optimizer, steps = torch.optim.SGD(policy.head.parameters(), lr=1e-4), []
    real = optimizer.step
    optimizer.step = lambda: steps.append(1) or real()
    metrics = update(dataclasses.replace(config, epochs=3, minibatches=2), policy, optimizer, rollouts, (0, 0))
    assert len(steps) == 6 and metrics["ratio_max"] > 1.0001 and metrics["approx_kl"] > 0
    with pytest.raises(ValueError, match="2 starts on each process do not divide by 4 minibatches"):
        update(dataclasses.replace(config, minibatches=4), policy, optimizer, rollouts, (0, 0))
    with pytest.raises(ValueError, match="kl_weight 0.1 needs the supervised policy"):
        update(dataclasses.replace(config, kl_weight=0.1), policy, optimizer, rollouts, (0, 0))


def test_kl_to_the_supervised_policy(config, parts):
    policy, model, batch = parts
    supervised = supervised_copy(policy)
    optimizer = torch.optim.SGD(policy.head.parameters(), lr=0.0)
    rollouts = train_rft.collect(config, policy, model, batch, perceptual("ssim"), (0, 0))

    def kl(kind):
        changed = dataclasses.replace(config, kl_weight=1.0, kl=kind)
        return update(changed, policy, optimizer, rollouts, (0, 0), supervised)["kl_supervised"]

    assert kl("exact") == kl("sampled") == pytest.approx(0, abs=1e-9)
    with torch.no_grad():
        policy.head.net.dit.out.bias[0] += 0.2  # moves one mean in seven by 0.02 at every step
    sigma = (0.08 * 0.2) ** 0.5
    assert kl("exact") == pytest.approx(0.02**2 / (2 * sigma**2) / 7, rel=1e-3)
    assert kl("sampled") > 0


def test_rwr_regresses_onto_the_best_rollout(config, parts):
    policy, model, batch = parts
    config = dataclasses.replace(config, algorithm="rwr", rwr_temperature=0.02, mse_weight=0.0)
    rollouts = train_rft.collect(config, policy, model, batch, perceptual("ssim"), (0, 0))
    reward = torch.tensor([[0.0, 1.0, 5.0], [9.0, 0.0, 1.0]])
    rollouts = rollouts._replace(reward=rollouts.reward._replace(reward=reward))
    gradient, metrics = gradients_of(config, policy, rollouts)
    assert metrics["weight_max"] == pytest.approx(3) and gradient.abs().max() > 0
    (chunk,) = rollouts.chunks
    poison = chunk.chain.x.clone().unflatten(0, (2, 3))
    poison[0, :2], poison[1, 1:] = 0.5, 0.5  # all but the best: of no weight
    chain = chunk.chain._replace(x=poison.flatten(0, 1))
    same, _ = gradients_of(config, policy, rollouts._replace(chunks=(chunk._replace(chain=chain),)))
    torch.testing.assert_close(gradient, same, atol=1e-6, rtol=1e-4)


def test_release_differs_where_the_spec_says():
    release, paper = train_rft.PRESETS["release"], train_rft.PRESETS["paper"]
    differing = {f.name: getattr(release, f.name) for f in dataclasses.fields(release)
                 if getattr(release, f.name) != getattr(paper, f.name)}  # fmt: skip
    assert differing == RELEASE


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
        {"reward": "r1", "clip_low": 0.1},
        {"reward": "r2", "imagination": "sample", "top_p": 0.9, "temperature": 0.8},
        {"imagination": "common", "over_frames": "discounted", "gamma": 0.9, "perceptual": "none"},
        {"objective": "ppo", "over_k": "sum", "epochs": 2, "divide_by_std": False, "reference": "executed"},
        {"bf16": True, "over_frames": "last", "micro_starts": 1},
        {"algorithm": "rwr", "rwr_temperature": 1.0},
        {"reward": "divergence", "history": "start", "credit": "to_go", "ratio_per": "step"},
        {"reward": "divergence", "bf16": True, "credit": "frame", "ratio_per": "element", "over_frames": "mean"},
        {"noise": "flow_sde", "sde_noise": 0.5, "kl_weight": 0.1, "noisy_steps": (2, 5)},
        {"noisy_dims": (0, 1, 2, 3, 4, 5), "sigma_min": 0.05, "sigma_init": 0.1, "kl_weight": 0.1, "kl": "sampled"},
        {**RELEASE, "epochs": 2, "minibatches": 2},
    ],
)
def test_options(config, changes):
    metrics = train_rft.main(dataclasses.replace(config, steps=1, **changes))
    assert all(np.isfinite(v) for v in metrics.values())
    if changes.get("epochs"):
        assert metrics["ratio_max"] != pytest.approx(1, abs=1e-6)  # the second epoch scores an updated policy
    saved = VLAPolicy.load(f"{config.out_dir}/model.safetensors")
    assert (saved.sigma_net is None) == (changes.get("noise") == "flow_sde") == (saved.cfg.flow.noise == "flow_sde")
    assert saved.cfg.flow.noisy_dims == changes.get("noisy_dims", tuple(range(7)))
    for name in ("noisy_steps", "sigma_min", "sigma_init", "sigma_uses_x"):
        assert getattr(saved.cfg.flow, name) == getattr(dataclasses.replace(config, **changes), name)


@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler on the CPU")
def test_compiled_networks_give_the_same_rewards(config, tmp_path):
    plain = train_rft.main(dataclasses.replace(config, steps=1))
    compiled = train_rft.main(dataclasses.replace(config, steps=1, compile=True, out_dir=str(tmp_path / "compiled")))
    assert compiled["reward"] == pytest.approx(plain["reward"], abs=1e-5)


def test_noise_of_an_earlier_fine_tuning_is_kept_or_refused(config, tmp_path):
    train_rft.main(dataclasses.replace(config, steps=1))
    again = dataclasses.replace(config, policy=f"{config.out_dir}/model.safetensors", out_dir=str(tmp_path / "again"))
    with pytest.raises(ValueError, match=r"fine-tuned with other noise: it has sigma_max 0.2, asked 0.3"):
        train_rft.main(dataclasses.replace(again, sigma_max=0.3, out_dir=str(tmp_path / "other")))
    train_rft.main(dataclasses.replace(again, steps=1, lr=0.0, sigma_lr=0.0, weight_decay=0.0))
    first, second = (VLAPolicy.load(f"{c.out_dir}/model.safetensors") for c in (config, again))
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))


def test_closed_loop(config, tmp_path, monkeypatch):
    """Two chunks a rollout: the policy sees what it led to, and the reward covers both."""
    for k in range(2):
        write_moving_square(tmp_path / "demos" / "squares" / f"push_{('red', 'blue')[k]}_demo.hdf5", 3, 24, k, "push")
    seen = []
    real = VLAPolicy.encode
    monkeypatch.setattr(
        VLAPolicy, "encode", lambda self, images, texts: seen.append(images) or real(self, images, texts)
    )
    played = []
    collect = train_rft.collect
    monkeypatch.setattr(train_rft, "collect", lambda *args: played.append(collect(*args)) or played[-1])
    for reward in ("r3", "r2"):
        seen.clear()
        changes = {"demos": str(tmp_path / "demos"), "chunks": 2, "reward": reward, "steps": 1, "gate_starts": 0}
        metrics = train_rft.main(dataclasses.replace(config, **changes, out_dir=str(tmp_path / reward)))
        assert all(np.isfinite(v) for v in metrics.values())
        rollouts = played[-1]
        assert rollouts.reward.per_frame.shape == (2, 3, 16) and rollouts.reward.frames.shape[2] == 16
        first, second = rollouts.chunks
        assert len(first.context) == 2 and len(second.context) == len(second.proprio) == len(second.chain.x) == 6
        torch.testing.assert_close(  # the policy saw its own last imagined frames
            torch.cat(seen[3:6])[:, 0], rollouts.reward.frames[:, :, 7].flatten(0, 1), atol=1e-6, rtol=0
        )
    for reward in ("r1", "divergence"):
        with pytest.raises(ValueError, match=f"chunks 2 needs imagined frames, .*; reward {reward} makes none"):
            train_rft.main(dataclasses.replace(config, **changes | {"reward": reward}, out_dir=str(tmp_path / reward)))
    # advantages of action steps: each chunk's own, with what follows in the other
    changes |= {"reward": "r3", "credit": "to_go", "ratio_per": "step"}
    train_rft.main(dataclasses.replace(config, **changes, out_dir=str(tmp_path / "credit")))
    to_go = played[-1].reward.per_frame.flip(-1).cumsum(-1).flip(-1)
    torch.testing.assert_close(played[-1].advantage, advantages(to_go, divide_by_std=config.divide_by_std))
    parts = [_of_chunk(played[-1], c) for c in range(2)]
    torch.testing.assert_close(torch.cat(parts, -1), played[-1].advantage)
    assert [part.shape for part in parts] == [(2, 3, 8)] * 2


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


def test_time_limit_stops_early(config):
    train_rft.main(dataclasses.replace(config, steps=50, max_minutes=1e-4))
    assert len(log_of(train_rft.Path(config.out_dir))) < 50


def test_success_rate_at_intervals(config, monkeypatch):
    played = []

    def play(actor, suite, task, states, *, image_size):
        played.append((suite, task, list(states)))
        return [{"success": state == 49} for state in states]

    monkeypatch.setattr(evaluate, "play_episodes", play)
    changes = {"success_interval": 2, "success_episodes": 4, "success_tasks": (0, 3), "steps": 3, "gate_starts": 0}
    metrics = train_rft.main(dataclasses.replace(config, **changes))
    assert metrics["success_rate"] == 0.25 and played[:2] == [("tabletop_object", t, [46, 47, 48, 49]) for t in (0, 3)]
    rows = log_of(train_rft.Path(config.out_dir))
    assert ["success_rate" in row for row in rows] == [True, False, True]
    assert len(played) == 6


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
    files = [tmp_path / "policy.safetensors", tmp_path / "model.safetensors"]
    record = image_convention(load_episodes(config.demos), "agentview")
    turned = {**record, "mean_frame": np.array(record["mean_frame"])[::-1, ::-1].tolist()}
    for convention, message in (
        (
            {"camera": "eye_in_hand"},
            "image conventions differ: policy .* has camera 'agentview', world .* has 'eye",
        ),
        (turned, "image conventions differ: .*world model .* look like those of policy .* turned by 180 degrees"),
    ):
        for source, kind, kind_config, file, facts in (
            (config.policy, VLAPolicy, PolicyConfig, files[0], record),
            (config.world_model, WorldModel, WorldModelConfig, files[1], convention),
        ):
            model, extra = load_model(source, kind, kind_config)
            save_model(file, model, model.cfg, {**extra, **facts})
        with pytest.raises(ValueError, match=message):
            run(policy=str(files[0]), world_model=str(files[1]))
    with pytest.raises(ValueError, match="credit frame gives each action step .* grpo with ratio_per chunk has no use"):
        run(credit="frame")
    with pytest.raises(ValueError, match="algorithm rwr with ratio_per step has no use"):
        run(credit="to_go", ratio_per="step", algorithm="rwr")
    with pytest.raises(ValueError, match="credit frame with over_frames last: all action steps but the last"):
        run(credit="frame", ratio_per="step", over_frames="last")
    train_rft.main(dataclasses.replace(config, steps=1))
    with pytest.raises(ValueError, match="another configuration: lr"):
        train_rft.main(dataclasses.replace(config, steps=1, lr=0.5))


def test_float32_masters_move_at_the_papers_learning_rate(config, policy_file):
    train_rft.main(dataclasses.replace(config, lr=1e-6, warmup=1))
    before, after = VLAPolicy.load(policy_file), VLAPolicy.load(f"{config.out_dir}/model.safetensors")
    moved = [(p != after.get_parameter(k)).float().mean() for k, p in before.head.named_parameters(prefix="head")]
    assert np.mean(moved) > 0.3
