"""train_rft: exact scores, frozen parts, resume, every option, every refusal."""

import dataclasses
import json
import shutil

import numpy as np
import pytest
import torch
from conftest import write_moving_square

import train_rft
from vlarft.data import load_episodes
from vlarft.data.convention import image_convention
from vlarft.grpo import advantages

from vlarft.policy import PolicyConfig, VLAPolicy
from vlarft.run.checkpoint import load_model, read_header, save_model

from vlarft.world_model import WorldModel, WorldModelConfig

SMOKE = train_rft.PRESETS["smoke"]
RELEASE = {
    "divide_by_std": True, "over_frames": "mean", "over_k": "sum", "ratio_per": "element", "objective": "ppo",
    "dual_clip": 3.0, "mse_gate": 0.2, "entropy_over": "k+1", "sigma_uses_x": True,
}  # fmt: skip


def log_of(folder):
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def test_release_differs_where_the_spec_says():
    release, paper = train_rft.PRESETS["release"], train_rft.PRESETS["paper"]
    differing = {f.name: getattr(release, f.name) for f in dataclasses.fields(release)
                 if getattr(release, f.name) != getattr(paper, f.name)}  # fmt: skip
    assert differing == RELEASE


def test_head_and_sigma_net_move_and_nothing_else(rft_config, policy_file):
    metrics = train_rft.main(rft_config)
    before, after = VLAPolicy.load(policy_file), VLAPolicy.load(f"{rft_config.out_dir}/model.safetensors")
    assert after.sigma_net is not None
    moved = {k for k, v in before.named_parameters() if not torch.equal(v, after.get_parameter(k))}
    assert moved and all(k.startswith("head.") for k in moved)
    assert torch.equal(before.normalizer.action_low, after.normalizer.action_low)
    assert after.sigma_net.net.dit.out.weight.abs().max() > 0  # started at zero
    expected = {"reward", "reward_std", "adv_std", "constant_groups", "sigma", "ratio_mean", "ratio_max", "approx_kl"}
    assert expected | {"clip_frac", "grad_norm", "mse", "entropy", "policy_s", "world_model_s", "update_s"} <= set(
        metrics
    )
    header = read_header(f"{rft_config.out_dir}/model.safetensors")
    assert header.extra["rft"]["reward"] == "r3"
    assert header.extra["train_episodes"]


def test_evaluation_ignores_the_sigma_net(rft_config):
    train_rft.main(rft_config)
    policy = VLAPolicy.load(f"{rft_config.out_dir}/model.safetensors")
    images, proprio = np.zeros((1, 64, 64, 3), np.uint8), np.zeros((1, 8), np.float32)
    noise = torch.randn(1, 8, 7, generator=torch.Generator().manual_seed(0))
    actions = policy.act(images, ["push"], proprio, noise=noise)
    torch.nn.init.normal_(policy.sigma_net.net.dit.out.weight)
    assert torch.equal(policy.act(images, ["push"], proprio, noise=noise), actions)


@pytest.mark.parametrize(("ema", "vlm_lr"), [(None, None), (0.9, 1e-3)])
def test_resume_equals_no_interruption(rft_config, tmp_path, monkeypatch, ema, vlm_lr):
    rft_config = dataclasses.replace(rft_config, steps=3, ema=ema, vlm_lr=vlm_lr)
    train_rft.main(rft_config)
    whole = torch.load(f"{rft_config.out_dir}/train_state.pt", weights_only=True)

    interrupted = dataclasses.replace(rft_config, out_dir=str(tmp_path / "interrupted"))
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
    assert ("ema" in whole) == (ema is not None)
    for i, average in whole.get("ema", {}).items():
        assert torch.equal(average, resumed["ema"][i])
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
        {"group_x0": "shared", "decay": "cosine"},
        {"vlm_lr": 1e-3, "bf16": True, "mse_gate": 0.2, "epochs": 2},
        {"reward": "divergence", "history": "start", "credit": "to_go", "ratio_per": "step"},
        {"reward": "divergence", "bf16": True, "credit": "frame", "ratio_per": "element", "over_frames": "mean"},
        {"symmetric": True, "imagination": "sample", "micro_starts": 1},
        {"symmetric": True, "reward": "divergence", "credit": "frame", "ratio_per": "step"},
        {"noise": "flow_sde", "sde_noise": 0.5, "kl_weight": 0.1, "noisy_steps": (2, 5)},
        {"noisy_dims": (0, 1, 2, 3, 4, 5), "sigma_min": 0.05, "sigma_init": 0.1, "kl_weight": 0.1, "kl": "sampled"},
        {**RELEASE, "epochs": 2, "minibatches": 2},
    ],
)
def test_options(rft_config, changes):
    metrics = train_rft.main(dataclasses.replace(rft_config, steps=1, **changes))
    assert all(np.isfinite(v) for v in metrics.values())
    if changes.get("epochs"):
        assert metrics["ratio_max"] != pytest.approx(1, abs=1e-6)  # the second epoch scores an updated policy
    saved = VLAPolicy.load(f"{rft_config.out_dir}/model.safetensors")
    assert (saved.sigma_net is None) == (changes.get("noise") == "flow_sde") == (saved.cfg.flow.noise == "flow_sde")
    assert saved.cfg.flow.noisy_dims == changes.get("noisy_dims", tuple(range(7)))
    for name in ("noisy_steps", "sigma_min", "sigma_init", "sigma_uses_x"):
        assert getattr(saved.cfg.flow, name) == getattr(dataclasses.replace(rft_config, **changes), name)


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
    train_rft.main(dataclasses.replace(again, steps=1, lr=0.0, sigma_lr=0.0, weight_decay=0.0))
    first, second = (VLAPolicy.load(f"{c.out_dir}/model.safetensors") for c in (rft_config, again))
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))


def test_the_average_is_what_is_exported(rft_config):
    cfg = dataclasses.replace(rft_config, steps=1, warmup=0, ema=0.75, lr=1e-2)
    train_rft.main(cfg)
    state = torch.load(f"{cfg.out_dir}/train_state.pt", weights_only=True)
    name = "head.net.dit.out.weight"
    before, after = (
        VLAPolicy.load(path).state_dict()[name] for path in (cfg.policy, f"{cfg.out_dir}/model.safetensors")
    )
    trained = state["policy"][name]
    assert (trained - before).abs().max() > 1e-3
    torch.testing.assert_close(after, 0.75 * before + 0.25 * trained)  # from the policy before on


@pytest.mark.parametrize("changes", [{}, {"vlm_lr": 1e-2}, {"vlm_lr": 1e-2, "bf16": True, "micro_starts": 1}])
def test_the_vision_language_model_trains_where_asked(rft_config, changes):
    """It is scored as it was sampled, in float32, and all that the head sees by moves."""
    metrics = train_rft.main(dataclasses.replace(rft_config, steps=1, warmup=0, reward="r1", **changes))
    assert metrics["ratio_max"] == pytest.approx(1, abs=1e-5)
    before, after = (
        VLAPolicy.load(path).state_dict() for path in (rft_config.policy, f"{rft_config.out_dir}/model.safetensors")
    )
    moved = {name.split(".")[0] for name in before if not torch.equal(before[name], after[name])}
    assert moved == ({"head", "vlm", "key_head", "key_embed"} if changes else {"head"})


def test_closed_loop(rft_config, tmp_path, monkeypatch):
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
    for reward, symmetric in (("r3", True), ("r3", False), ("r2", False)):
        seen.clear()
        changes = {"demos": str(tmp_path / "demos"), "chunks": 2, "reward": reward, "steps": 1, "gate_starts": 0}
        out_dir = str(tmp_path / f"{reward}_{symmetric}")
        metrics = train_rft.main(dataclasses.replace(rft_config, **changes, symmetric=symmetric, out_dir=out_dir))
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
            train_rft.main(
                dataclasses.replace(rft_config, **changes | {"reward": reward}, out_dir=str(tmp_path / reward))
            )
    # the vision-language model sees each chunk's frames once more, as its rollouts did
    metrics = train_rft.main(
        dataclasses.replace(rft_config, **changes, vlm_lr=1e-3, micro_starts=1, out_dir=str(tmp_path / "vlm"))
    )
    assert metrics["ratio_max"] == pytest.approx(1, abs=1e-5)
    # advantages of action steps: each chunk's own, with what follows in the other
    changes |= {"reward": "r3", "credit": "to_go", "ratio_per": "step"}
    train_rft.main(dataclasses.replace(rft_config, **changes, out_dir=str(tmp_path / "credit")))
    to_go = played[-1].reward.per_frame.flip(-1).cumsum(-1).flip(-1)
    torch.testing.assert_close(played[-1].advantage, advantages(to_go, divide_by_std=rft_config.divide_by_std))
    parts = [_of_chunk(played[-1], c) for c in range(2)]
    torch.testing.assert_close(torch.cat(parts, -1), played[-1].advantage)
    assert [part.shape for part in parts] == [(2, 3, 8)] * 2


@pytest.mark.parametrize(("decay", "factors"), [("constant", [1.0, 1.0]), ("cosine", [1.0, 0.5])])
def test_learning_rates_decay_when_asked(rft_config, monkeypatch, decay, factors):
    rates, real = [], train_rft.update

    def update(cfg, policy, optimizer, *args):
        rates.append([group["lr"] for group in optimizer.param_groups])
        return real(cfg, policy, optimizer, *args)

    monkeypatch.setattr(train_rft, "update", update)
    train_rft.main(dataclasses.replace(rft_config, reward="r1", warmup=0, decay=decay))
    assert rates == [pytest.approx([rft_config.lr * f, rft_config.sigma_lr * f]) for f in factors]


def test_time_limit_stops_early(rft_config):
    train_rft.main(dataclasses.replace(rft_config, steps=50, max_minutes=1e-4))
    assert len(log_of(train_rft.Path(rft_config.out_dir))) < 50


def test_success_rate_at_intervals(rft_config, monkeypatch):
    played = []

    def play(actor, suite, task, states, *, image_size):
        played.append((suite, task, list(states)))
        return [{"success": state == 49} for state in states]

    monkeypatch.setattr(evaluate, "play_episodes", play)
    changes = {"success_interval": 2, "success_episodes": 4, "success_tasks": (0, 3), "steps": 3, "gate_starts": 0}
    metrics = train_rft.main(dataclasses.replace(rft_config, **changes))
    assert metrics["success_rate"] == 0.25 and played[:2] == [("tabletop_object", t, [46, 47, 48, 49]) for t in (0, 3)]
    rows = log_of(train_rft.Path(rft_config.out_dir))
    assert ["success_rate" in row for row in rows] == [True, False, True]
    assert len(played) == 6


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
        run(demos=str(tmp_path / "no_demos"))
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
    with pytest.raises(ValueError, match="credit frame gives each action step .* grpo with ratio_per chunk has no use"):
        run(credit="frame")
    with pytest.raises(ValueError, match="algorithm rwr with ratio_per step has no use"):
        run(credit="to_go", ratio_per="step", algorithm="rwr")
    with pytest.raises(ValueError, match="credit frame with over_frames last: all action steps but the last"):
        run(credit="frame", ratio_per="step", over_frames="last")
    with pytest.raises(ValueError, match="kl_weight 0.1 with vlm_lr 0.001: .* leave one of them out"):
        run(kl_weight=0.1, vlm_lr=1e-3)
    train_rft.main(dataclasses.replace(rft_config, steps=1))
    with pytest.raises(ValueError, match="another configuration: lr"):
        train_rft.main(dataclasses.replace(rft_config, steps=1, lr=0.5))


def test_float32_masters_move_at_the_papers_learning_rate(rft_config, policy_file):
    train_rft.main(dataclasses.replace(rft_config, lr=1e-6, warmup=1))
    before, after = VLAPolicy.load(policy_file), VLAPolicy.load(f"{rft_config.out_dir}/model.safetensors")
    moved = [(p != after.get_parameter(k)).float().mean() for k, p in before.head.named_parameters(prefix="head")]
    assert np.mean(moved) > 0.3
