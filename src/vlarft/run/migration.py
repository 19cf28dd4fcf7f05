"""What older versions stored, in today's names: configurations of run folders, and the facts in model files.

A renamed option is renamed. An option that is gone is dropped where it had the value without effect; otherwise a
ValueError says which option the run used and why it is gone. Options that became one named set (`size`, `augment`,
`weighting`) are recognised by their values, so the scripts hand in the named sets that they have today.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from vlarft.run.config import differences, to_dict

Migration = Callable[[Mapping[str, Any], str], dict[str, Any]]  # (stored options, file they are from) -> today's
Named = Mapping[str, Any]  # name -> dataclass


class Gone(NamedTuple):
    """An option that no longer exists: the value with which it had no effect, and why it is gone."""

    without_effect: Any
    why: str


def migrate(
    values: Mapping[str, Any], renamed: Mapping[str, str], gone: Mapping[str, Gone], where: str
) -> dict[str, Any]:
    """Stored options in today's names.

    Args:
        values: option -> value, as JSON has it.
        renamed: old name -> today's name.
        gone: old name -> why there is no such option today.
        where: the file, for the message.

    Raises:
        ValueError: an option that is gone had an effect.
    """
    for name, (without_effect, why) in gone.items():
        if name in values and values[name] != without_effect:
            raise ValueError(_refusal(where, f"{name} {values[name]!r}", why))
    return {renamed.get(name, name): value for name, value in values.items() if name not in gone}


def _refusal(where: str, used: str, why: str) -> str:
    return f"{where}: this run used {used}, which is gone: {why}. Go on with the version that wrote it, or start anew"


def _name_of(values: Mapping[str, Any], named: Named, option: str, where: str) -> str:
    """The name of the set among `named` that agrees with all stored values."""
    sets = {name: {key: to_dict(known)[key] for key in values} for name, known in named.items()}
    lines = {name: differences(known, dict(values)) for name, known in sets.items()}
    name = min(lines, key=lambda name: len(lines[name]))
    if lines[name]:
        used = f"values that no --{option} has ({name} with {'; '.join(lines[name])})"
        raise ValueError(_refusal(where, used, f"--{option} chooses among {', '.join(named)}"))
    return name


def _pop(values: dict[str, Any], *names: str) -> dict[str, Any]:
    return {name: values.pop(name) for name in names if name in values}


INTERVALS = {"save_every": "save_interval", "log_every": "log_interval"}
ONE_DECAY = "the weight decay is a constant, the same for all runs"


def train_tokenizer(
    stored: Mapping[str, Any], where: str, *, size: Named, augment: Named, weighting: Named, discriminator: Named
) -> dict[str, Any]:
    """The configuration of a train_tokenizer.py run; the named sets are the script's."""
    adversarial = stored.get("gan_start") is not None
    peak = stored.get("lr" if adversarial else "gan_lr")
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
        network = dict(values.pop("model"))
        image_size = network.pop("image_size")
        values["size"] = _name_of(network, size, "size", where)
        own = to_dict(size[values["size"]])["image_size"]
        values["image_size"] = None if image_size == own else image_size
        if (network := values.pop("discriminator", None)) and adversarial:
            _name_of(network, {values["size"]: discriminator[values["size"]]}, "size", where)
    if isinstance(values.get("augment"), Mapping):
        values["augment"] = _name_of(values["augment"], augment, "augment", where)
    weights = _pop(values, "square_weight", "moving_weight", "unusual_weight", "pyramid", "still_weight")
    if weights:
        weights = {name.removesuffix("_weight"): value for name, value in weights.items()}
        values["weighting"] = _name_of(weights, weighting, "weighting", where)
    return {"split_seed": values.get("seed", 0), **values}


def train_wm(stored: Mapping[str, Any], where: str, *, size: Named) -> dict[str, Any]:
    """The configuration of a train_wm.py run; the named sizes are the script's."""
    gone = {
        "loss_on_actions": Gone(False, "the loss is on frame tokens, as in Eq. (3)"),
        "cache_tokens": Gone(stored.get("cache_tokens"), "segments are tokenized as they are read"),
        "chunk": Gone(8, "a segment has the policy's 8 actions"),
        "weight_decay": Gone(0.0, ONE_DECAY),
    }
    renamed = {**INTERVALS, "validate_every": "validation_interval", "clip": "clip_norm"}
    values = migrate(stored, renamed, gone, where)
    if network := _pop(values, "transformer", "action_bins", "future_codes_only", "slot_embedding"):
        values["size"] = _name_of(network, size, "size", where)
    return {"split_seed": values.get("seed", 0), **values}


def train_sft(stored: Mapping[str, Any], where: str, *, augment: Named) -> dict[str, Any]:
    """The configuration of a train_sft.py run; the named augmentations are the script's."""
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
    return values


# train_rft.py's configuration, and FlowConfig in the headers of policies: here


def extra(facts: Mapping[str, Any]) -> dict[str, Any]:
    """The facts in a model file: policies used to name their held-out episodes "validation_episodes"."""
    if "validation_episodes" in facts:
        return {"held_out_episodes": facts["validation_episodes"], **facts}
    return dict(facts)
