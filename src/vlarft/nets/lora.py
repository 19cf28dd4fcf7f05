"""Low-rank adapters: y = W x + b + (alpha / rank) B A x with W frozen, B zero-initialised.

`add_lora` turns linear layers into `LoRALinear` in place (same parameter names, plus `lora_a` and `lora_b`);
`merge_lora` folds the product into W and turns them back, so an exported model has no trace of the adapters.
`save_lora` and `load_lora` store the adapters alone, a fraction of the model, in one file with their configuration.

Adapters on every linear layer of the paper's vision-language model have 93,798,400 trainable parameters, 92,583,936
without SigLIP's attention pool. 90,394,624 get a gradient: the pool and the encoders' last blocks are not in the
features.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F
from safetensors.torch import load_file

from vlarft.run.checkpoint import read_header, save_model
from vlarft.run.config import differences, from_dict, to_dict


@dataclass(frozen=True)
class LoRAConfig:
    """Adapter size; the defaults are the paper's (Table 6 and the public code)."""

    rank: int = 64
    alpha: float = 128.0
    dropout: float = 0.0
    targets: tuple[str, ...] = ("",)  # a linear layer is adapted when its name contains one of these; "" is all


class LoRALinear(nn.Linear):
    """A frozen linear layer with a trainable low-rank addition."""

    def __init__(self, linear: nn.Linear, cfg: LoRAConfig) -> None:
        super().__init__(
            linear.in_features,
            linear.out_features,
            bias=linear.bias is not None,
            device="meta",  # no memory: weight and bias are those of `linear`, set below
        )
        self.weight, self.bias = linear.weight, linear.bias
        self.weight.requires_grad_(False)
        if self.bias is not None:
            self.bias.requires_grad_(False)
        like = {"device": linear.weight.device, "dtype": linear.weight.dtype}
        self.lora_a = nn.Parameter(torch.empty(cfg.rank, linear.in_features, **like))
        self.lora_b = nn.Parameter(torch.zeros(linear.out_features, cfg.rank, **like))
        nn.init.kaiming_uniform_(self.lora_a, a=math.sqrt(5))  # as nn.Linear initialises its weight
        self.cfg = cfg
        self.dropout = nn.Dropout(cfg.dropout)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x: (..., in_features) -> (..., out_features)."""
        update = F.linear(F.linear(self.dropout(x), self.lora_a), self.lora_b)  # (..., rank) in between
        return F.linear(x, self.weight, self.bias) + self.cfg.alpha / self.cfg.rank * update

    def merged(self) -> nn.Linear:
        """Return a plain layer with weight W + (alpha / rank) B A, computed in float32."""
        linear = nn.Linear(self.in_features, self.out_features, bias=self.bias is not None, device="meta")
        update = low_rank_product(self.lora_a, self.lora_b, self.cfg)
        linear.weight = nn.Parameter((self.weight.detach().float() + update).to(self.weight.dtype))
        if self.bias is not None:
            linear.bias = nn.Parameter(self.bias.detach())
        return linear


def add_lora(module: nn.Module, cfg: LoRAConfig) -> int:
    """Freeze every parameter of `module` and give its linear layers adapters, in place.

    Args:
        module: e.g. the vision-language model.
        cfg: rank, alpha, dropout and which layers.

    Returns:
        The number of trainable parameters added.

    Raises:
        ValueError: bad rank, adapters already present, or no layer with a matching name.
    """
    if cfg.rank < 1:
        raise ValueError(
            f"LoRAConfig.rank: got {cfg.rank}, expected at least 1; leave LoRA off to train without adapters"
        )
    if has_lora(module):
        raise ValueError("add_lora: the module already has adapters; merge_lora it first")
    module.requires_grad_(False)
    layers = _targets(module, cfg)
    if not layers:
        raise ValueError(f"LoRAConfig.targets {cfg.targets}: no linear layer has such a name; '' selects all")
    for name, child in layers:
        _replace(module, name, LoRALinear(child, cfg))
    return sum(p.numel() for p in module.parameters() if p.requires_grad)


def merge_lora(module: nn.Module) -> int:
    """Fold all adapters of `module` into their layers, in place; return how many there were."""
    adapters = [(name, child) for name, child in module.named_modules() if isinstance(child, LoRALinear)]
    for name, child in adapters:
        _replace(module, name, child.merged())
    return len(adapters)


def has_lora(module: nn.Module) -> bool:
    """Return whether `module` holds at least one adapter."""
    return any(isinstance(child, LoRALinear) for child in module.modules())


def lora_state_dict(module: nn.Module) -> dict[str, torch.Tensor]:
    """Return the tensors of the adapters alone, by their names in `module.state_dict()`."""
    return {k: v for k, v in module.state_dict().items() if k.endswith((".lora_a", ".lora_b"))}


def save_lora(path: str | Path, module: nn.Module) -> None:
    """Write the adapters of `module`, and their configuration, to one safetensors file.

    Raises:
        ValueError: the module has no adapters.
    """
    save_model(path, module, _config_of(module), state_dict=lora_state_dict(module))


def load_lora(path: str | Path, module: nn.Module) -> None:
    """Load adapters from a file: add them to `module`, or replace the values of those it has.

    Args:
        path: file that `save_lora` wrote.
        module: a module of the class and sizes that the adapters were trained on; its other weights stay.

    Raises:
        FileNotFoundError: no such file.
        ValueError: adapters of another rank, scale or target than those present, of other layers, or of another model.
    """
    header = read_header(path)
    if header.cls != type(module).__name__:
        raise ValueError(f"{path} holds adapters of a {header.cls}, the module is a {type(module).__name__}")
    cfg = from_dict(LoRAConfig, header.config, f"{path}: LoRAConfig")
    if has_lora(module) and (lines := differences(to_dict(cfg), to_dict(_config_of(module)))):
        raise ValueError(f"{path} holds other adapters than the module's: {'; '.join(lines)}; merge_lora it first")
    tensors = load_file(path)
    expected = {}
    for name, child in _targets(module, cfg):
        expected[f"{name}.lora_a"] = (cfg.rank, child.in_features)
        expected[f"{name}.lora_b"] = (child.out_features, cfg.rank)
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    if lines := differences(shapes, expected):
        shown = "; ".join(lines[:6]) + (f"; and {len(lines) - 6} more" if len(lines) > 6 else "")
        raise ValueError(f"{path} does not fit the module's linear layers: {shown}")
    if not has_lora(module):
        add_lora(module, cfg)
    module.load_state_dict(tensors, strict=False)  # the names were compared above; all other weights are missing


def _targets(module: nn.Module, cfg: LoRAConfig) -> list[tuple[str, nn.Linear]]:
    """List the linear layers that a configuration selects, adapted or not."""
    return [
        (name, child)
        for name, child in module.named_modules()
        if isinstance(child, nn.Linear) and any(target in name for target in cfg.targets)
    ]


def _config_of(module: nn.Module) -> LoRAConfig:
    """Return the configuration of the adapters of `module`, which are all made by one `add_lora`."""
    for child in module.modules():
        if isinstance(child, LoRALinear):
            return child.cfg
    raise ValueError("the module has no adapters; add_lora first")


def merge_state_dict(state: dict[str, torch.Tensor], cfg: LoRAConfig) -> dict[str, torch.Tensor]:
    """Return a state dict as it would be after `merge_lora`; the module, which may go on training, does not change.

    Args:
        state: whole tensors, adapters included.
        cfg: the configuration that the adapters were made with.
    """
    merged = {k: v for k, v in state.items() if not k.endswith((".lora_a", ".lora_b"))}
    for key in (k for k in state if k.endswith(".lora_a")):
        name = key.removesuffix(".lora_a")
        weight, update = state[f"{name}.weight"], low_rank_product(state[key], state[f"{name}.lora_b"], cfg)
        merged[f"{name}.weight"] = (weight.float() + update).to(weight.dtype)
    return merged


def low_rank_product(a: torch.Tensor, b: torch.Tensor, cfg: LoRAConfig) -> torch.Tensor:
    """Compute (alpha / rank) B A in float32; a: (rank, in), b: (out, rank) -> (out, in)."""
    return cfg.alpha / cfg.rank * (b.detach().float() @ a.detach().float())


def _replace(module: nn.Module, name: str, child: nn.Module) -> None:
    parent, _, leaf = name.rpartition(".")
    setattr(module.get_submodule(parent), leaf, child)
