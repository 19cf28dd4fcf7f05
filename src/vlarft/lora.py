"""Low-rank adapters: y = W x + b + (alpha / rank) B A x with W frozen, B zero-initialised.

`add_lora` turns linear layers into `LoRALinear` in place (same parameter names, plus `lora_a` and `lora_b`);
`merge_lora` folds the product into W and turns them back, so an exported model has no trace of the adapters.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F


@dataclass(frozen=True)
class LoRAConfig:
    """Adapter size; the defaults are the paper's (Table 6 and the public release)."""

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
            device="meta",  # weight and bias are taken over from `linear` below
        )
        self.weight, self.bias = linear.weight, linear.bias
        self.weight.requires_grad_(False)
        if self.bias is not None:
            self.bias.requires_grad_(False)
        like = {"device": linear.weight.device, "dtype": linear.weight.dtype}
        self.lora_a = nn.Parameter(torch.empty(cfg.rank, linear.in_features, **like))
        self.lora_b = nn.Parameter(torch.zeros(linear.out_features, cfg.rank, **like))
        nn.init.kaiming_uniform_(self.lora_a, a=math.sqrt(5))
        self.cfg = cfg
        self.dropout = nn.Dropout(cfg.dropout)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x: (..., in_features) -> (..., out_features)."""
        update = F.linear(F.linear(self.dropout(x), self.lora_a), self.lora_b)
        return F.linear(x, self.weight, self.bias) + self.cfg.alpha / self.cfg.rank * update

    def merged(self) -> nn.Linear:
        """A plain layer with weight W + (alpha / rank) B A, computed in float32."""
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
    found = [
        (name, child)
        for name, child in module.named_modules()
        if isinstance(child, nn.Linear) and any(target in name for target in cfg.targets)
    ]
    if not found:
        raise ValueError(f"LoRAConfig.targets {cfg.targets}: no linear layer has such a name; '' selects all")
    for name, child in found:
        _replace(module, name, LoRALinear(child, cfg))
    return sum(p.numel() for p in module.parameters() if p.requires_grad)


def merge_lora(module: nn.Module) -> int:
    """Fold all adapters of `module` into their layers, in place; returns how many there were."""
    adapters = [(name, child) for name, child in module.named_modules() if isinstance(child, LoRALinear)]
    for name, child in adapters:
        _replace(module, name, child.merged())
    return len(adapters)


def has_lora(module: nn.Module) -> bool:
    """True when `module` holds at least one adapter."""
    return any(isinstance(child, LoRALinear) for child in module.modules())


def lora_state_dict(module: nn.Module) -> dict[str, torch.Tensor]:
    """The adapters alone, by their names in `module.state_dict()`; load with `strict=False`."""
    return {k: v for k, v in module.state_dict().items() if k.endswith((".lora_a", ".lora_b"))}


def merge_state_dict(state: dict[str, torch.Tensor], cfg: LoRAConfig) -> dict[str, torch.Tensor]:
    """A state dict as it would be after `merge_lora`; the module itself, which may go on training, is not touched.

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
    """(alpha / rank) B A in float32; a: (rank, in), b: (out, rank) -> (out, in)."""
    return cfg.alpha / cfg.rank * (b.detach().float() @ a.detach().float())


def _replace(module: nn.Module, name: str, child: nn.Module) -> None:
    parent, _, leaf = name.rpartition(".")
    setattr(module.get_submodule(parent), leaf, child)
