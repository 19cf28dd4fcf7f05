"""Translate what older versions stored: configurations of run folders, and the facts in model files.

A renamed option gets its new name. A removed option is dropped if its value had no effect; otherwise a ValueError says
which option the run used and why it is gone. Options that were merged into one named set (`size`, `augment`,
`weighting`) are recognised by their values, so the scripts pass the sets that they have today.
"""

import warnings
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from vlarft.run.config import differences, to_dict

Migration = Callable[[Mapping[str, Any], str], dict[str, Any]]  # (stored options, file they are from) -> today's
Named = Mapping[str, Any]  # name -> dataclass


class Gone(NamedTuple):
    """A removed option: the value with which it had no effect, and why it was removed."""

    without_effect: Any
    why: str


def migrate(
    values: Mapping[str, Any], renamed: Mapping[str, str], gone: Mapping[str, Gone], where: str
) -> dict[str, Any]:
    """Rename stored options and drop removed ones.

    Args:
        values: option -> value, as read from JSON.
        renamed: old name -> new name.
        gone: name -> removed option.
        where: the file, for the message.

    Raises:
        ValueError: a removed option had an effect.
    """
    for name, (without_effect, why) in gone.items():
        if name in values and values[name] != without_effect:
            raise ValueError(_refusal(where, f"{name} {values[name]!r}", why))
    return {renamed.get(name, name): value for name, value in values.items() if name not in gone}


def _refusal(where: str, used: str, why: str) -> str:
    return f"{where}: this run used {used}, which is gone: {why}. Go on with the version that wrote it, or start anew"


def _name_of(values: Mapping[str, Any], named: Named, option: str, where: str) -> str:
    """Return the name of the set in `named` that agrees with all stored values."""
    sets = {name: {key: to_dict(known)[key] for key in values} for name, known in named.items()}
    lines = {name: differences(known, dict(values)) for name, known in sets.items()}
    name = min(lines, key=lambda name: len(lines[name]))  # the closest set, for the message if none agrees
    if lines[name]:
        used = f"values that no --{option} has ({name} with {'; '.join(lines[name])})"
        raise ValueError(_refusal(where, used, f"--{option} chooses among {', '.join(named)}"))
    return name


def _several(values: Mapping[str, Any], option: str) -> dict[str, Any]:
    """Return the values with those of an option that used to take one value, and now several, as a list."""
    return {name: [v] if name == option and isinstance(v, str) else v for name, v in values.items()}


def _pop(values: dict[str, Any], *names: str) -> dict[str, Any]:
    return {name: values.pop(name) for name in names if name in values}


INTERVALS = {"save_every": "save_interval", "log_every": "log_interval"}
ONE_DECAY = "the weight decay is a constant, the same for all runs"
FRAMES_ALONE = Gone(False, "the loss is on frame tokens, as in Eq. (3)")


def train_tokenizer(
    stored: Mapping[str, Any], where: str, *, size: Named, augment: Named, weighting: Named, discriminator: Named
) -> dict[str, Any]:
    """Translate the configuration of a train_tokenizer.py run; the named sets are the script's."""
    adversarial = stored.get("gan_start") is not None
    peak = stored.get("lr" if adversarial else "gan_lr")  # without a GAN its rate had no effect, whatever it was
    gone = {
        "final_lr_share": Gone(0.0, "the cosine ends at 0"),
        "gan_balance": Gone("adaptive", "the adversarial term is always scaled to the reconstruction's gradient"),
        "gan_lr": Gone(peak, "the discriminator learns at the tokenizer's rate"),
        "gradient_penalty": Gone(10.0, "the penalty has the public recipe's weight"),
        "perceptual_weight": Gone(1.0, "the perceptual distance has the public recipe's weight"),
        "crop_area": Gone(0.8, "crops have the public recipe's range"),
        "weight_decay": Gone(0.0, ONE_DECAY),
    }
    renamed = {**INTERVALS, "validate_every": "validation_interval", "clip": "clip_norm"}
    values = migrate(stored, renamed, gone, where)
    if "model" in values:
        network = {"compose": False, **values.pop("model")}  # older tokenizers repaint every pixel
        image_size = network.pop("image_size")
        values["size"] = _name_of(network, size, "size", where)
        usual = to_dict(size[values["size"]])["image_size"]
        values["image_size"] = None if image_size == usual else image_size
        if (network := values.pop("discriminator", None)) and adversarial:
            _name_of(network, {values["size"]: discriminator[values["size"]]}, "size", where)
    if isinstance(values.get("augment"), Mapping):
        values["augment"] = _name_of(values["augment"], augment, "augment", where)
    weights = _pop(values, "square_weight", "moving_weight", "unusual_weight", "pyramid", "still_weight")
    if weights:
        weights = {name.removesuffix("_weight"): value for name, value in weights.items()}
        values["weighting"] = _name_of(weights, weighting, "weighting", where)
    return {"split_seed": values.get("seed", 0), **_several(values, "demos")}


def train_wm(stored: Mapping[str, Any], where: str, *, size: Named) -> dict[str, Any]:
    """Translate the configuration of a train_wm.py run; the named sizes are the script's."""
    gone = {
        "loss_on_actions": FRAMES_ALONE,
        # its stored value, so that any value passes: it changed the speed only
        "cache_tokens": Gone(stored.get("cache_tokens"), "segments are tokenized as they are read"),
        "chunk": Gone(8, "a segment has the policy's 8 actions"),
        "weight_decay": Gone(0.0, ONE_DECAY),
    }
    renamed = {**INTERVALS, "validate_every": "validation_interval", "clip": "clip_norm"}
    values = migrate(stored, renamed, gone, where)
    if network := _pop(values, "transformer", "action_bins", "future_codes_only", "slot_embedding"):
        values["size"] = _name_of(network, size, "size", where)
    return {"split_seed": values.get("seed", 0), **_several(values, "demos")}


def train_sft(stored: Mapping[str, Any], where: str, *, augment: Named) -> dict[str, Any]:
    """Translate the configuration of a train_sft.py run; the named augmentations are the script's."""
    play = "keep copies of the policy with --keep-interval and play them with eval_libero.py"
    gone = {
        "success_interval": Gone(None, play),
        **{f"success_{name}": Gone(stored.get(f"success_{name}"), play) for name in ("suite", "tasks", "episodes")},
        "alpha": Gone(1.5, "tau comes from Beta(1.5, 1)"),
        "beta": Gone(1.0, "tau comes from Beta(1.5, 1)"),
        "lora_alpha": Gone(128.0, "adapters have the paper's alpha"),
        "lora_dropout": Gone(0.0, "adapters have no dropout"),
        "weight_decay": Gone(0.01, ONE_DECAY),
    }
    renamed = {
        **INTERVALS,
        "policy": "size",
        "draws": "noise_samples",
        "val_every": "validation_interval",
        "val_batch": "validation_segments",
    }
    values = migrate(stored, renamed, gone, where)
    if values.pop("from_scratch", False):
        values["init"] = values.get("init") or "random"
    if "bf16" in values:
        values["precision"] = "bf16" if values.pop("bf16") else "fp32"
    if isinstance(values.get("augment"), Mapping):
        values["augment"] = _name_of(values["augment"], augment, "augment", where)
    return _several(values, "demos")


def rl_rounds(stored: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Translate the configuration of a rl_rounds.py run."""
    return _several(stored, "demos")


def train_rft(stored: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Translate the configuration of a train_rft.py run."""
    variant = "studies/variants.py has it as --variant "
    release = "it belongs to the public code's objective, --variant release of studies/variants.py"
    no_help = "it did not help (docs/findings.md)"
    constant = "it is a constant, the same for all runs"
    gripper = stored.get("group_x0") == "gripper"
    gone = {
        "group_x0": Gone("own", variant + "gripper_x0" if gripper else "each rollout samples an x_0"),
        "algorithm": Gone("grpo", variant + "rwr"),
        "kl_weight": Gone(0.0, variant + "kl and kl_sampled"),
        "vlm_lr": Gone(None, variant + "whole_policy"),
        "noise": Gone("sigma_net", variant + "flow_sde"),
        "symmetric": Gone(False, variant + "symmetric"),
        "chunks": Gone(1, "a rollout has one action chunk"),
        "over_frames": Gone("sum", "the reward is a sum over frames, Eq. (11)"),
        "over_k": Gone("mean", release),
        "objective": Gone("clip", release),
        "mse_gate": Gone(None, release),
        "entropy_over": Gone("k", release),
        "sigma_uses_x": Gone(False, release),
        "mirrored": Gone(False, no_help),
        "history": Gone("frames", no_help),
        "minibatches": Gone(1, no_help),
        "sigma_init": Gone(None, no_help),
        "noisy_steps": Gone(None, no_help),
        "noisy_dims": Gone(None, no_help),
        "decay": Gone("constant", no_help),
        "ema": Gone(None, no_help),
        "l1_weight": Gone(1.0, constant),
        "perceptual_weight": Gone(1.0, constant),
        "temperature": Gone(1.0, constant),
        "top_p": Gone(0.8, constant),
        "weight_decay": Gone(0.01, constant),
        "mse_draws": Gone(16, constant),
        "gate_noise": Gone([0.05, 0.15, 0.4], constant),
        "success_interval": Gone(None, "keep copies with --keep-interval and play them with eval_libero.py"),
    }
    without_effect = (
        "dual_clip", "gamma", "kl", "rwr_temperature", "sde_noise", "reference", "gate_interval", "gate_draws",
        "gate_samples", "gate_true_error", "diagnose_interval", "success_suite", "success_tasks", "success_episodes",
    )  # fmt: skip  # they matter only with an option above, or change what is measured and not what is trained
    gone |= {name: Gone(stored.get(name), "") for name in without_effect}
    values = dict(stored)
    if values.get("reward") == "simulator":
        raise ValueError(_refusal(where, "reward 'simulator'", variant + "simulator"))
    if "credit" in values:
        choice = values.pop("credit"), values.pop("ratio_per")
        per_step = {("chunk", "chunk"): False, ("frame", "step"): True}
        if choice not in per_step:
            why = release if "element" in choice else "--per-step credits an action step with the frame after it"
            raise ValueError(_refusal(where, "credit {!r} with ratio_per {!r}".format(*choice), why))
        values["per_step"] = per_step[choice]
    if "clip_low" in values:
        low, high = values.pop("clip_low"), values.pop("clip_high")
        if low != high:
            raise ValueError(_refusal(where, f"clip_low {low} and clip_high {high}", "the clip range is symmetric"))
        values["clip"] = low
    if not values.pop("gate_stop", True):
        values["gate_threshold"] = None
    if "bf16" in values:
        values["precision"] = "bf16" if values.pop("bf16") else "fp32"
    values = migrate(values, {}, gone, where)
    if stored.get("reference") == "executed":
        warnings.warn(
            f"{where}: this run's reward compared with the executed actions of the demonstrations; from here on it "
            "compares with the intended ones, which differ where a data set records both",
            stacklevel=2,
        )
    return _several(values, "demos")


def model_config(cls: str, stored: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Translate the configuration in a model file: policies used to store settings of their sampling noise, and world
    models whether their loss predicted actions.

    A removed setting that had an effect only causes a warning: evaluation plays the deterministic policy, which is the
    same without it.

    Args:
        cls: name of the model's class.
        stored: its configuration.
        where: the file, for the message.

    Raises:
        ValueError: a success model of an older version.
    """
    if cls == "SuccessModel" and "proprio_dim" in stored:
        raise ValueError(
            f"{where} is of an older version, which kept the model of the robot's state; it is now a part of the world "
            "model: train both again (train_wm.py, train_success.py)"
        )
    if cls == "WorldModel":
        if stored.get("loss_on_actions"):
            warnings.warn(
                f"{where}: the world model was trained to predict actions too; it imagines the same, but a training "
                f"that goes on does not: {FRAMES_ALONE.why}",
                stacklevel=2,
            )
        return {name: value for name, value in stored.items() if name != "loss_on_actions"}
    if cls != "VLAPolicy":
        return dict(stored)
    flow = dict(stored["flow"])
    usual = {"noisy_dims": list(range(flow["action_dim"])), "noisy_steps": None, "noise": "sigma_net"}
    used = {name: flow.pop(name, value) for name, value in usual.items()}
    for name in ("sigma_init", "sde_noise"):  # sigma at the start of training; a parameter of the noise "flow_sde"
        flow.pop(name, None)
    if other := [f"{name} {value!r}" for name, value in used.items() if value != usual[name]]:
        warnings.warn(
            f"{where}: the policy was fine-tuned with {', '.join(other)}, which is gone: its deterministic chunks are "
            "the same, but sampling now has the sigma net's noise in all dimensions and flow steps",
            stacklevel=2,
        )
    return {**stored, "flow": flow}


def extra(facts: Mapping[str, Any]) -> dict[str, Any]:
    """Translate the facts in a model file: policies used to name their held-out episodes "validation_episodes", and
    models had one digest of all their episodes, which tells nothing of another selection.
    """
    kept = {name: value for name, value in facts.items() if name != "episode_contents"}
    if "validation_episodes" in facts:
        return {"held_out_episodes": facts["validation_episodes"], **kept}
    return kept
