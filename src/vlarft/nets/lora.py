"""Low-rank adapters: y = W x + b + (alpha / rank) B A x with W frozen, B zero-initialised.

`add_lora` turns linear layers into `LoRALinear` in place (same parameter names, plus `lora_a` and `lora_b`);
`merge_state_dict` folds the product into W, so an exported model has no trace of the adapters.

Adapters on every linear layer of the paper's vision-language model have 93,798,400 trainable parameters, 92,583,936
without SigLIP's attention pool. 90,394,624 get a gradient: the pool and the encoders' last blocks are not in the
features.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F


@dataclass(frozen=True)
class LoRAConfig:
    """Adapter size; the defaults are the paper's (Table 6 and the public code)."""

    rank: int = 64
    alpha: float = 128.0


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

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x: (..., in_features) -> (..., out_features)."""
        update = F.linear(F.linear(x, self.lora_a), self.lora_b)  # (..., rank) in between
        return F.linear(x, self.weight, self.bias) + self.cfg.alpha / self.cfg.rank * update


def add_lora(module: nn.Module, cfg: LoRAConfig) -> int:
    """Freeze every parameter of `module` and give its linear layers adapters, in place.

    Args:
        module: e.g. the vision-language model.
        cfg: rank and alpha.

    Returns:
        The number of trainable parameters added.

    Raises:
        ValueError: bad rank, adapters already present, or no linear layer.
    """
    if cfg.rank < 1:
        raise ValueError(
            f"LoRAConfig.rank: got {cfg.rank}, expected at least 1; leave LoRA off to train without adapters"
        )
    layers = [(name, child) for name, child in module.named_modules() if isinstance(child, nn.Linear)]
    if any(isinstance(child, LoRALinear) for _, child in layers):
        raise ValueError("add_lora: the module already has adapters")
    if not layers:
        raise ValueError("add_lora: the module has no linear layer")
    module.requires_grad_(False)
    for name, child in layers:
        parent, _, leaf = name.rpartition(".")
        setattr(module.get_submodule(parent), leaf, LoRALinear(child, cfg))
    return sum(p.numel() for p in module.parameters() if p.requires_grad)


def merge_state_dict(state: dict[str, torch.Tensor], cfg: LoRAConfig) -> dict[str, torch.Tensor]:
    """Return a state dict with W + (alpha / rank) B A in place of each adapted W, computed in float32, and without the
    adapters; the module, which may go on training, does not change.

    Args:
        state: whole tensors, adapters included.
        cfg: the configuration that the adapters were made with.
    """
    merged = {k: v for k, v in state.items() if not k.endswith((".lora_a", ".lora_b"))}
    for key in (k for k in state if k.endswith(".lora_a")):
        name = key.removesuffix(".lora_a")
        a, b, weight = state[key], state[f"{name}.lora_b"], state[f"{name}.weight"]
        update = cfg.alpha / cfg.rank * (b.detach().float() @ a.detach().float())  # (out, rank) @ (rank, in)
        merged[f"{name}.weight"] = (weight.float() + update).to(weight.dtype)
    return merged
