"""migration: run folders and model files of older versions load, or are refused with the option and the reason."""

import json
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import nn

import train_sft
import train_tokenizer
import train_wm
from vlarft.run import migration
from vlarft.run.checkpoint import open_run, read_header, save_model
from vlarft.run.config import to_dict
from vlarft.run.migration import Gone, migrate

# config.json as the scripts of commit 5747157 wrote them
TOKENIZER_SIZES = {
    "paper": {
        "image_size": [256, 256],
        "channels": 3,
        "stem": 1,
        "block_channels": [128, 256, 256, 512],
        "res_blocks": 2,
        "mid_res_blocks": 2,
        "latent_channels": 64,
        "future_patch": 4,
        "context_levels": [7, 5, 5, 5, 5],
        "future_levels": [7, 5, 5, 5, 5],
        "norm_groups": 32,
        "num_heads": 4,
        "dropout": 0.1,
        "quant_gain": 1.0,
        "local_init": False,
    },
    "smoke": {
        "image_size": [64, 64],
        "channels": 3,
        "stem": 8,
        "block_channels": [16],
        "res_blocks": 1,
        "mid_res_blocks": 1,
        "latent_channels": 8,
        "future_patch": 2,
        "context_levels": [3, 3, 3],
        "future_levels": [3, 3, 3],
        "norm_groups": 8,
        "num_heads": 4,
        "dropout": 0.0,
        "quant_gain": 6.0,
        "local_init": True,
    },
}
TOKENIZER_SIZES["small"] = {
    **TOKENIZER_SIZES["paper"],
    "image_size": [128, 128],
    "stem": 2,
    "block_channels": [96, 192, 256],
    "latent_channels": 32,
    "future_patch": 2,
    "norm_groups": 16,
}
TOKENIZER_SIZES["tiny"] = {
    **TOKENIZER_SIZES["smoke"],
    "stem": 4,
    "block_channels": [32, 64],
    "latent_channels": 16,
    "context_levels": [7, 5, 5, 5, 5],
    "future_levels": [5, 5, 5, 5],
}
NO_COLOURS = {"crop": False, "brightness": 0.0, "contrast": 0.0, "saturation": 0.0, "hue": 0.0, "pixel_noise": 0.0}
COLOURS = {"crop": True, "brightness": 0.1, "contrast": 0.1, "saturation": 0.1, "hue": 0.05, "pixel_noise": 0.0}
TOKENIZER = {
    "out_dir": "runs/tokenizer",
    "demos": "demos",
    "camera": "agentview",
    "model": TOKENIZER_SIZES["paper"],
    "segment": 7,
    "future_frames": 7,
    "context_lookback": 15,
    "augment": COLOURS,
    "crop_area": 0.8,
    "batch_size": 16,
    "accumulate": 1,
    "checkpoint_activations": False,
    "steps": 150000,
    "max_minutes": None,
    "lr": 0.0005,
    "warmup": 5000,
    "final_lr_share": 0.0,
    "weight_decay": 0.0,
    "beta2": 0.999,
    "clip": 1.0,
    "perceptual": "lpips",
    "perceptual_weights": None,
    "perceptual_weight": 1.0,
    "square_weight": 0.0,
    "moving_weight": 1.0,
    "unusual_weight": 1.0,
    "pyramid": 1,
    "still_weight": 0.0,
    "gan_start": 10000,
    "gan_weight": 0.1,
    "gan_balance": "adaptive",
    "gradient_penalty": 10.0,
    "gan_lr": 0.0005,
    "discriminator": {"channels": [64, 128, 256, 512, 512, 512], "slope": 0.2},
    "precision": "bf16",
    "validation_fraction": 0.02,
    "validate_every": 2000,
    "validation_segments": 64,
    "save_every": 2000,
    "async_save": False,
    "log_every": 20,
    "seed": 0,
}
TOKENIZER_TINY = {
    **TOKENIZER,
    "model": TOKENIZER_SIZES["tiny"],
    "segment": 9,
    "future_frames": 3,
    "context_lookback": 0,
    "augment": NO_COLOURS,
    "batch_size": 8,
    "steps": 1100,
    "lr": 0.002,
    "warmup": 50,
    "beta2": 0.99,
    "perceptual": "none",
    "square_weight": 2.0,
    "moving_weight": 6.0,
    "unusual_weight": 6.0,
    "pyramid": 3,
    "still_weight": 0.6,
    "gan_start": None,
    "discriminator": {"channels": [32, 64, 128], "slope": 0.2},
    "precision": "fp32",
    "validation_fraction": 0.05,
    "validate_every": 550,
    "save_every": 300,
}
TRANSFORMER = {
    "depth": 12,
    "width": 768,
    "num_heads": 12,
    "num_kv_heads": 12,
    "ffn_dim": 3072,
    "head_dim": None,
    "rope_theta": 10000.0,
    "norm_eps": 1e-06,
    "qkv_bias": False,
    "max_positions": 8192,
    "init_std": 0.02,
}
WM = {
    "out_dir": "runs/wm",
    "demos": "demos",
    "camera": "agentview",
    "experts_only": False,
    "tokenizer": "runs/tokenizer",
    "transformer": TRANSFORMER,
    "chunk": 8,
    "action_bins": 256,
    "loss_on_actions": False,
    "future_codes_only": False,
    "slot_embedding": False,
    "factored_tokens": False,
    "context_lookback": 15,
    "batch_size": 16,
    "accumulate": 1,
    "checkpoint_activations": False,
    "steps": 150000,
    "max_minutes": None,
    "lr": 5e-05,
    "warmup": 5000,
    "schedule": "constant",
    "weight_decay": 0.0,
    "beta2": 0.999,
    "stale": 0.0,
    "clip": 1.0,
    "cache_tokens": False,
    "precision": "bf16",
    "validation_fraction": 0.02,
    "validate_every": 2000,
    "validation_segments": 256,
    "rollout_segments": 64,
    "save_every": 2000,
    "async_save": False,
    "frozen": "shard",
    "log_every": 20,
    "seed": 0,
}
SMALL_HEADS = {"num_heads": 6, "num_kv_heads": 6, "ffn_dim": 512, "init_std": 0.06}
WM_TINY = {
    **WM,
    "transformer": {**TRANSFORMER, "depth": 4, "width": 192, **SMALL_HEADS},
    "future_codes_only": True,
    "slot_embedding": True,
    "factored_tokens": True,
    "context_lookback": 0,
    "batch_size": 4,
    "steps": 1500,
    "lr": 0.002,
    "warmup": 50,
    "schedule": "cosine",
    "beta2": 0.98,
    "stale": 0.4,
    "precision": "fp32",
    "validation_fraction": 0.05,
    "validate_every": 500,
    "validation_segments": 128,
    "save_every": 400,
}
SFT = {
    "success_interval": None,
    "success_suite": "tabletop_object",
    "success_tasks": [0, 1, 2, 3, 4, 5, 6, 7, 8, 9],
    "success_episodes": 10,
    "demos": "demos",
    "out_dir": "runs/sft",
    "policy": "paper",
    "init": None,
    "from_scratch": False,
    "refit_statistics": False,
    "train": "all",
    "camera": "agentview",
    "validation_fraction": 0.02,
    "steps": 150000,
    "max_minutes": None,
    "batch_size": 16,
    "accumulate": 1,
    "checkpoint_activations": False,
    "lr": 0.0001,
    "schedule": "constant",
    "warmup": 0,
    "weight_decay": 0.01,
    "clip_norm": 1.0,
    "alpha": 1.5,
    "beta": 1.0,
    "objective": "matching",
    "draws": 1,
    "key_weight": 0.0,
    "key_batch": 0,
    "ema": None,
    "lora_rank": 64,
    "lora_alpha": 128.0,
    "lora_dropout": 0.0,
    "bf16": True,
    "augment": {**COLOURS, "brightness": 0.2, "contrast": 0.2, "saturation": 0.2},
    "val_every": 1000,
    "val_batch": 256,
    "save_every": 1000,
    "async_save": False,
    "frozen": "shard",
    "log_every": 10,
    "seed": 0,
    "split_seed": 0,
}
SFT_TINY = {
    **SFT,
    "policy": "tiny",
    "validation_fraction": 0.05,
    "steps": 1300,
    "batch_size": 32,
    "lr": 0.003,
    "schedule": "cosine",
    "warmup": 50,
    "draws": 4,
    "key_weight": 1.0,
    "key_batch": 64,
    "ema": 0.99,
    "lora_rank": None,
    "bf16": False,
    "augment": {**NO_COLOURS, "brightness": 0.2, "pixel_noise": 0.02},
    "val_every": 200,
    "save_every": 200,
}
RUNS = {
    "train_tokenizer": {
        "paper": TOKENIZER,
        "small": {
            **TOKENIZER,
            "model": TOKENIZER_SIZES["small"],
            "batch_size": 32,
            "steps": 50000,
            "warmup": 1000,
            "perceptual": "ssim",
        },
        "tiny": TOKENIZER_TINY,
        "smoke": {
            **TOKENIZER_TINY,
            "model": TOKENIZER_SIZES["smoke"],
            "batch_size": 4,
            "steps": 20,
            "warmup": 2,
            "validate_every": 10,
            "validation_segments": 8,
        },
    },
    "train_wm": {
        "paper": WM,
        "robot": {**WM, "steps": 24000},
        "small": {
            **WM,
            "transformer": {
                **TRANSFORMER,
                "depth": 8,
                "width": 512,
                "num_heads": 8,
                "num_kv_heads": 8,
                "ffn_dim": 1536,
            },
            "batch_size": 32,
            "steps": 50000,
            "lr": 0.0003,
            "warmup": 1000,
        },
        "tiny": WM_TINY,
        "smoke": {
            **WM_TINY,
            "transformer": {
                **TRANSFORMER,
                "depth": 1,
                "width": 32,
                "num_heads": 2,
                "num_kv_heads": 2,
                "ffn_dim": 64,
            },
            "action_bins": 32,
            "steps": 20,
            "warmup": 2,
            "validate_every": 10,
            "validation_segments": 8,
            "rollout_segments": 4,
        },
    },
    "train_sft": {
        "paper": SFT,
        "robot": {**SFT, "steps": 20000},
        "small": {
            **SFT_TINY,
            "policy": "small",
            "steps": 30000,
            "batch_size": 128,
            "key_batch": 0,
            "lr": 0.0003,
            "warmup": 500,
            "ema": 0.999,
            "bf16": True,
            "val_every": 1000,
            "save_every": 1000,
        },
        "tiny": SFT_TINY,
        "smoke": {
            **SFT_TINY,
            "policy": "smoke",
            "steps": 4,
            "batch_size": 4,
            "key_batch": 4,
            "draws": 2,
            "val_every": 2,
            "val_batch": 8,
            "save_every": 2,
            "warmup": 1,
        },
    },
}
SCRIPTS = {"train_tokenizer": train_tokenizer, "train_wm": train_wm, "train_sft": train_sft}
OLDER = {
    "train_tokenizer": partial(
        migration.train_tokenizer,
        size=train_tokenizer.SIZES,
        augment=train_tokenizer.AUGMENTATIONS,
        weighting=train_tokenizer.WEIGHTINGS,
        discriminator=train_tokenizer.DISCRIMINATORS,
    ),
    "train_wm": partial(migration.train_wm, size=train_wm.SIZES),
    "train_sft": partial(migration.train_sft, augment=train_sft.AUGMENTATIONS),
}


def store(folder: Path, config: dict) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))


CHANGED = {  # presets whose networks or options are others now, and what a run of the older version is told
    ("train_tokenizer", "small"): "no --size has .small with compose: True against False.",
    ("train_tokenizer", "tiny"): "no --size has .tiny with ",
    ("train_tokenizer", "smoke"): "no --size has .smoke with compose: True against False.",
    ("train_wm", "small"): "another configuration: context_lookback: 15 against None",
    ("train_wm", "tiny"): "no --size has .tiny with transformer.width: 96 against 192",
    ("train_wm", "smoke"): "another configuration: context_lookback: 0 against None",
    ("train_sft", "tiny"): "another configuration: precision: 'fp32' against 'auto'",
}


NEW_PRESETS = ("libero",)  # of which there are no older runs


@pytest.mark.parametrize(
    ("script", "preset"), [(script, preset) for script, presets in RUNS.items() for preset in presets]
)
def test_every_preset_resumes_or_says_what_changed(tmp_path, script, preset):
    """And has the numbers that it had: whatever was renamed or collapsed means the same."""
    assert {*RUNS[script], *NEW_PRESETS} >= set(SCRIPTS[script].PRESETS) >= set(RUNS[script])
    if message := CHANGED.get((script, preset)):
        store(tmp_path, RUNS[script][preset])
        with pytest.raises(ValueError, match=message):
            open_run(tmp_path, replace(SCRIPTS[script].PRESETS[preset], out_dir=str(tmp_path)), older=OLDER[script])
        return
    store(tmp_path, RUNS[script][preset])
    cfg = replace(SCRIPTS[script].PRESETS[preset], out_dir=str(tmp_path))
    assert open_run(tmp_path, cfg, older=OLDER[script]) is None
    newer = {"keep_interval", "init", "pose_dims", "robot_steps"} - set(
        RUNS[script][preset]
    )  # options that older runs did without
    assert OLDER[script](RUNS[script][preset], "") | {"out_dir": str(tmp_path)} == {
        name: value for name, value in to_dict(cfg).items() if name not in newer
    }
    with pytest.raises(ValueError, match="another configuration: lr: "):
        open_run(tmp_path, replace(cfg, lr=1.0), older=OLDER[script])
    assert OLDER[script](to_dict(cfg), "") == to_dict(cfg)  # today's configuration stays as it is


def test_changed_options_keep_their_meaning():
    other = {"model": {**TOKENIZER_SIZES["paper"], "image_size": [128, 256]}, "seed": 3}
    values = OLDER["train_tokenizer"]({**TOKENIZER, **other}, "")
    assert (values["size"], values["image_size"], values["split_seed"]) == ("paper", [128, 256], 3)
    assert OLDER["train_wm"]({**WM, "seed": 5, "cache_tokens": True}, "")["split_seed"] == 5
    values = OLDER["train_wm"]({**RUNS["train_wm"]["smoke"], "factored_tokens": False}, "")
    assert (values["size"], values["factored_tokens"]) == ("smoke", False)
    assert OLDER["train_sft"]({**SFT, "from_scratch": True}, "")["init"] == "random"
    assert OLDER["train_sft"]({**SFT, "augment": NO_COLOURS}, "")["augment"] == "none"


@pytest.mark.parametrize(
    ("script", "changes", "message"),
    [
        (
            "train_tokenizer",
            {"gan_balance": "fixed"},
            "gan_balance 'fixed', which is gone: the adversarial term is",
        ),
        ("train_tokenizer", {"final_lr_share": 0.1}, "final_lr_share 0.1, which is gone: the cosine ends at 0"),
        ("train_tokenizer", {"gan_lr": 1e-3}, "gan_lr 0.001, which is gone: the discriminator learns at"),
        (
            "train_tokenizer",
            {"moving_weight": 6.0},
            r"that no --weighting has \(uniform with moving: 1.0 against 6.0\), which is gone: --weighting chooses",
        ),
        (
            "train_tokenizer",
            {"augment": {**COLOURS, "hue": 0.5}},
            r"that no --augment has \(full with hue: 0.05 against 0.5\), .* chooses among full, none",
        ),
        (
            "train_tokenizer",
            {"model": {**TOKENIZER_SIZES["paper"], "stem": 7}},
            r"that no --size has \(paper with stem: 1 against 7\), .* chooses among paper, small, tiny, smoke",
        ),
        (
            "train_tokenizer",
            {"discriminator": {"channels": [64], "slope": 0.2}},
            r"that no --size has \(paper with channels: \[64, 128, .* against \[64\]\)",
        ),
        ("train_wm", {"loss_on_actions": True}, r"loss_on_actions True.*as in Eq. \(3\)"),
        ("train_wm", {"chunk": 4}, "chunk 4, which is gone: a segment has the policy's 8 actions"),
        ("train_wm", {"action_bins": 64}, r"that no --size has \(paper with action_bins: 256 against 64\), which"),
        (
            "train_sft",
            {"success_interval": 100},
            "success_interval 100.*--keep-interval and play them with eval_lib",
        ),
        ("train_sft", {"lora_dropout": 0.1}, "lora_dropout 0.1, which is gone: adapters have no dropout"),
        ("train_sft", {"weight_decay": 0.1}, "weight_decay 0.1, which is gone: the weight decay is a constant"),
    ],
)
def test_options_that_are_gone_are_named_with_the_reason(tmp_path, script, changes, message):
    store(tmp_path, {**RUNS[script]["paper"], **changes})
    cfg = replace(SCRIPTS[script].PRESETS["paper"], out_dir=str(tmp_path))
    with pytest.raises(ValueError, match=f"config.json: this run used .*{message}"):
        open_run(tmp_path, cfg, older=OLDER[script])


def test_migrate_by_hand():
    gone = {"x": Gone(1, "nobody used it")}
    assert migrate({"a": 3, "x": 1, "c": 4}, {"a": "b"}, gone, "f") == {"b": 3, "c": 4}
    with pytest.raises(
        ValueError, match="^f: this run used x 2, which is gone: nobody used it. Go on with the version"
    ):
        migrate({"x": 2}, {}, gone, "f")


def test_a_policy_that_names_validation_episodes(tmp_path):
    path = tmp_path / "model.safetensors"
    save_model(path, nn.Linear(1, 1), train_sft.AUGMENTATIONS["none"], {"validation_episodes": ["a"]})
    assert read_header(path).extra["held_out_episodes"] == ["a"]


def test_a_run_of_an_older_version_goes_on(demos, tmp_path):
    """Its config.json in old names, its training state as it is: the scripts hand over their named sets."""
    common = {"demos": str(demos), "steps": 2, "validation_fraction": 0.2}
    inputs = {"train_tokenizer": {}, "train_wm": {"tokenizer": str(tmp_path / "train_tokenizer")}, "train_sft": {}}
    smoke = {script: dict(runs["smoke"]) for script, runs in RUNS.items()}
    network = {**smoke["train_tokenizer"]["model"], "compose": True}
    smoke["train_tokenizer"] |= {"model": network, "still_weight": 0.5}  # as today's
    for script in ("train_tokenizer", "train_wm"):
        inputs[script]["context_lookback"] = 0
    for script, given in inputs.items():
        cfg = replace(SCRIPTS[script].PRESETS["smoke"], out_dir=str(tmp_path / script), **common, **given)
        cfg = replace(cfg, demos=(cfg.demos,))  # several places today, one in the stored configuration
        if script == "train_wm":
            cfg = replace(cfg, pose_dims=0)  # which older versions did not have
        metrics = SCRIPTS[script].main(cfg)
        store(tmp_path / script, smoke[script] | common | given)
        assert SCRIPTS[script].main(cfg) == metrics
        state = torch.load(tmp_path / script / "train_state.pt", weights_only=True)
        assert state["step"] == 2
        store(tmp_path / script, smoke[script] | common | given | {"weight_decay": 0.5})
        with pytest.raises(ValueError, match=f"{script}/config.json: this run used weight_decay 0.5, which is gone"):
            SCRIPTS[script].main(cfg)


def test_an_older_success_model_is_refused():
    assert migration.model_config("SuccessModel", {"hold": 3}, "judge.safetensors") == {"hold": 3}
    with pytest.raises(
        ValueError, match="judge.safetensors is of an older version, which kept the model of the robot's"
    ):
        migration.model_config("SuccessModel", {"hold": 3, "proprio_dim": 8}, "judge.safetensors")
