"""migration: configurations and model files of train_rft.py's older versions."""

import dataclasses
import json
import re
import warnings

import pytest
import variants

import train_rft
from vlarft.policy import PRESETS, VLAPolicy
from vlarft.run import migration
from vlarft.run.checkpoint import open_run, save_model, write_json
from vlarft.run.config import to_dict

# train_rft.py --preset paper, as commit 5747157 stored it; what --preset tiny and release had otherwise
RFT = json.loads(
    """
{"success_interval": null, "success_suite": "tabletop_object", "success_tasks": [0, 1, 2, 3, 4, 5, 6, 7, 8, 9],
"success_episodes": 10, "group": 16, "group_x0": "own", "mirrored": false, "chunks": 1, "reward": "r3",
"reference": "executed", "l1_weight": 1.0, "perceptual": "lpips", "perceptual_weight": 1.0, "perceptual_weights":
null, "over_frames": "sum", "gamma": 1.0, "history": "frames", "symmetric": false, "imagination": "sample",
"temperature": 1.0, "top_p": 0.8, "credit": "chunk", "divide_by_std": false, "bf16": true, "compile": false,
"algorithm": "grpo", "epochs": 1, "minibatches": 1, "micro_starts": null, "over_k": "mean", "ratio_per": "chunk",
"objective": "clip", "clip_low": 0.2, "clip_high": 0.2, "dual_clip": null, "mse_weight": 0.01, "mse_gate": null,
"mse_draws": 16, "entropy_weight": 0.003, "entropy_over": "k", "kl_weight": 0.0, "kl": "exact", "rwr_temperature":
0.5, "clip_norm": 1.0, "gate_starts": 32, "gate_interval": 100, "gate_threshold": 0.25, "gate_stop": true,
"gate_noise": [0.05, 0.15, 0.4], "gate_draws": 3, "gate_samples": 8, "gate_true_error": false, "policy":
"runs/sft/model.safetensors", "world_model": "runs/wm/model.safetensors", "demos": "demos", "out_dir": "runs/rft",
"seed": 0, "steps": 400, "starts": 16, "lr": 1e-06, "sigma_lr": 1e-05, "vlm_lr": null, "weight_decay": 0.01,
"warmup": 10, "decay": "constant", "ema": null, "noise": "sigma_net", "sigma_min": 0.08, "sigma_max": 0.2,
"sigma_init": null, "sigma_uses_x": false, "sde_noise": 0.7, "noisy_dims": null, "noisy_steps": null,
"diagnose_interval": 20, "save_interval": 20, "async_save": false, "frozen": "replicate", "max_minutes": null}
"""
)
RFT_TINY = {
    "group": 12,
    "reference": "intended",
    "perceptual": "ssim",
    "imagination": "greedy",
    "divide_by_std": True,
    "bf16": False,
    "mse_weight": 0.1,
    "gate_starts": 12,
    "gate_interval": 10,
    "gate_draws": 2,
    "gate_samples": 6,
    "gate_true_error": True,
    "steps": 20,
    "starts": 8,
    "lr": 0.0001,
    "sigma_lr": 0.001,
    "warmup": 3,
    "diagnose_interval": 5,
    "save_interval": 8,
}
RFT_RELEASE = {
    "over_frames": "mean",
    "divide_by_std": True,
    "over_k": "sum",
    "ratio_per": "element",
    "objective": "ppo",
    "dual_clip": 3.0,
    "mse_gate": 0.2,
    "entropy_over": "k+1",
    "sigma_uses_x": True,
}


def test_a_fine_tuning_of_an_older_version_is_entered_again(tmp_path):
    for old, preset in (({}, "paper"), (RFT_TINY, "tiny")):
        cfg = dataclasses.replace(train_rft.PRESETS[preset], out_dir=str(tmp_path / preset))
        cfg = dataclasses.replace(cfg, precision={"paper": "bf16", "tiny": "fp32"}[preset])  # the preset's of that time
        write_json(tmp_path / preset / "config.json", {**RFT, **old})
        assert open_run(cfg.out_dir, cfg, ignore=("gate_threshold",), older=migration.train_rft) is None
        with pytest.raises(ValueError, match="another configuration: clip: 0.2 against 0.3"):
            other = dataclasses.replace(cfg, clip=0.3)
            open_run(cfg.out_dir, other, ignore=("gate_threshold",), older=migration.train_rft)
    per_step = migration.train_rft(
        {**RFT, "reference": "intended", "credit": "frame", "ratio_per": "step"}, "config.json"
    )
    assert (
        per_step["per_step"]
        and migration.train_rft({**RFT, "reference": "intended", "gate_stop": False}, "")["gate_threshold"] is None
    )


def test_todays_configuration_stays_as_it_is():
    for preset in train_rft.PRESETS.values():
        assert migration.train_rft(to_dict(preset), "config.json") == to_dict(preset)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            RFT_RELEASE,
            "used credit 'chunk' with ratio_per 'element', which is gone: .*--variant release of studies/variants",
        ),
        ({"vlm_lr": 1e-4}, "config.json: this run used vlm_lr 0.0001, which is gone: .*--variant whole_policy"),
        ({"credit": "to_go", "ratio_per": "step"}, "'to_go' with ratio_per 'step', which is gone: --per-step credits"),
        ({"group_x0": "shared"}, "used group_x0 'shared', which is gone: each rollout samples an x_0"),
        ({"group_x0": "gripper"}, "used group_x0 'gripper', which is gone: .*--variant gripper_x0"),
        ({"chunks": 2}, "used chunks 2, which is gone: a rollout has one action chunk"),
        ({"reward": "simulator"}, "used reward 'simulator', which is gone: .*--variant simulator"),
        ({"noisy_dims": [0, 1]}, r"used noisy_dims \[0, 1\], which is gone: it did not help"),
        ({"clip_high": 0.3}, "used clip_low 0.2 and clip_high 0.3, which is gone: the clip range is symmetric"),
        ({"success_interval": 10}, "success_interval 10, .*--keep-interval and play them with eval_libero.py"),
    ],
)
def test_options_that_are_gone_are_named(changes, message):
    with pytest.raises(ValueError, match=message):
        migration.train_rft({**RFT, **changes}, "config.json")


def test_a_reward_that_compared_with_executed_actions_is_warned_of():
    with pytest.warns(UserWarning, match="config.json: this run's reward compared with the executed actions"):
        migration.train_rft(RFT, "config.json")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        migration.train_rft({**RFT, "reference": "intended"}, "config.json")


def test_refusals_name_variants_that_there_are():
    used = {"algorithm": "rwr", "kl_weight": 0.1, "vlm_lr": 1e-4, "noise": "flow_sde", "symmetric": True}
    used |= {"group_x0": "gripper", "reward": "simulator", "over_k": "sum", "objective": "ppo", "sigma_uses_x": True}
    for name, value in used.items():
        with pytest.raises(ValueError, match=r"--variant") as caught:
            migration.train_rft({**RFT, name: value}, "config.json")
        assert re.search(r"--variant (\w+)", str(caught.value))[1] in variants.VARIANTS


def test_policies_of_older_versions_load(tmp_path):
    policy = VLAPolicy(PRESETS["smoke"])
    policy.add_sigma_net()
    old = to_dict(policy.cfg)
    old["flow"] |= {"noisy_dims": list(range(7)), "noisy_steps": None, "sigma_init": None, "noise": "sigma_net"}
    old["flow"]["sde_noise"] = 0.7
    save_model(tmp_path / "old.safetensors", policy, old)
    assert VLAPolicy.load(tmp_path / "old.safetensors").cfg == policy.cfg
    old["flow"]["noisy_dims"] = [0, 1, 2]
    save_model(tmp_path / "old.safetensors", policy, old)
    with pytest.warns(UserWarning, match=r"old.safetensors: .* fine-tuned with noisy_dims \[0, 1, 2\], which is gone"):
        assert VLAPolicy.load(tmp_path / "old.safetensors").cfg == policy.cfg


def test_one_place_of_demonstrations_becomes_several():
    for translate in (migration.train_rft, migration.rl_rounds):
        assert translate({"demos": "demos", "seed": 1}, "config.json") == {"demos": ["demos"], "seed": 1}
        assert translate({"demos": ["a", "b"]}, "config.json") == {"demos": ["a", "b"]}
