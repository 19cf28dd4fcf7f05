"""The networks of the flow-matching action head: velocity net, sigma net, and the condition of a chunk's context.

Another network for the head replaces `ChunkNet` here. Another head altogether is made in `policy.VLAPolicy` and used by
flow.py, diagnosis.py and `train_rft.shard`, which call what `FlowHead` and `SigmaNet` have in public: `cfg`,
`configure`, `prepare`, `at_steps`, `velocity`, `log_sigma`; and of its condition `num_rows`, `repeat`, `base`, `sigma`.

Shapes: S contexts, B = S * R rows, context-major (the R rows of a context are group members, samples of tau or flow
steps), T chunk steps, A action dim, K flow steps, N context tokens, E embed_dim, D width.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace

import torch
import torch.nn as nn
import torch.nn.functional as F
from einops import rearrange

from vlarft.nets.dit import DiT, DiTConfig, KeyValue, TimeEmbedding, sincos_positions


@dataclass(frozen=True)
class FlowConfig:
    """Sizes of the action head and the sigma net; the defaults are the paper's.

    Raises:
        ValueError: bounds out of order.
    """

    chunk: int = 8  # T
    action_dim: int = 7  # A
    proprio_dim: int = 8
    context_dim: int = 896
    embed_dim: int = 896  # width in which each noisy scalar and the proprio are embedded
    dit: DiTConfig = field(default_factory=DiTConfig)
    num_steps: int = 10  # K
    sigma_min: float = 0.08  # standard deviation of a step, in normalised action units
    sigma_max: float = 0.2
    sigma_uses_x: bool = False  # give the sigma net x_k besides (z, s, k); the public weights need it

    def __post_init__(self) -> None:
        if not 0 < self.sigma_min <= self.sigma_max:
            raise ValueError(
                f"FlowConfig: sigma_min {self.sigma_min} and sigma_max {self.sigma_max}; "
                "expected 0 < sigma_min <= sigma_max"
            )


@dataclass(frozen=True)
class Condition:
    """Everything that a net computes from S contexts and proprio alone, once for all flow steps.

    kv: keys and values per block; base: (S, D), proprio embedding + context mean; repeats: rows R per context;
    sigma: the sigma net's condition, if there is one; modulations: made by `at_steps`, (K, S, 6 D) per block and
    (K, S, 2 D) for the output.
    """

    kv: dict[int, KeyValue]
    base: torch.Tensor
    repeats: int = 1
    sigma: Condition | None = None
    modulations: list[torch.Tensor] | None = None

    @property
    def num_rows(self) -> int:
        """B = S * repeats."""
        return len(self.base) * self.repeats

    def repeat(self, times: int) -> Condition:
        """Give each context `times` as many rows (row = context * repeats + member); nothing is copied."""
        return replace(self, repeats=self.repeats * times, sigma=self.sigma and self.sigma.repeat(times))


class ChunkNet(nn.Module):
    """Noisy chunk, time, proprio and context -> one number per action scalar: a velocity, or the input to a log sigma.

    Args:
        cfg: sizes.
        takes_x: False leaves the noisy chunk out; the tokens are then the positions alone.
    """

    def __init__(self, cfg: FlowConfig, takes_x: bool = True) -> None:
        super().__init__()
        self.cfg, width, embed = cfg, cfg.dit.width, cfg.embed_dim
        if takes_x:
            self.action_fc1, self.action_fc2 = nn.Linear(1, embed), nn.Linear(embed, embed)
            self.action_out = nn.Linear(cfg.action_dim * embed, width)
        self.takes_x = takes_x
        self.proprio_fc1, self.proprio_fc2 = nn.Linear(cfg.proprio_dim, embed), nn.Linear(embed, embed)
        self.proprio_out = nn.Linear(embed, width)
        self.context_out = nn.Linear(cfg.context_dim, width)
        self.time = TimeEmbedding(width)
        self.register_buffer("positions", sincos_positions(cfg.chunk, width))
        self.dit = DiT(cfg.dit, cfg.action_dim)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Start with embeddings of order one: adaLN's layers start at zero and learn in proportion to them."""
        # cos^2 + sin^2 = 1: the squares of the time features sum to half their number
        gelu_input, tau_features = {"action_fc2", "proprio_fc2"}, self.time.num_features / 2
        for name, layer in self.named_children():
            if isinstance(layer, nn.Linear):
                # 1.6 makes up for the GELU (below: the SiLU) in front of the layer, which shrinks its input
                nn.init.normal_(layer.weight, std=(1.6 if name in gelu_input else 1.0) / layer.in_features**0.5)
        nn.init.normal_(self.time.fc1.weight, std=tau_features**-0.5)
        nn.init.normal_(self.time.fc2.weight, std=1.6 / self.time.fc2.in_features**0.5)

    def prepare(self, context: torch.Tensor, proprio: torch.Tensor) -> Condition:
        """Compute the condition of S contexts: context (S, N, context_dim), proprio (S, proprio_dim) normalised.

        Raises:
            ValueError: other widths, or unequal numbers of contexts and proprio rows.
        """
        cfg = self.cfg
        if context.ndim != 3 or context.shape[-1] != cfg.context_dim:
            raise ValueError(f"context: got shape {tuple(context.shape)}, expected (S, N, {cfg.context_dim})")
        if proprio.shape != (len(context), cfg.proprio_dim):
            raise ValueError(
                f"proprio: got shape {tuple(proprio.shape)}, expected {(len(context), cfg.proprio_dim)}: "
                "one row per context"
            )
        context = self.context_out(context)  # (S, N, D)
        state = self.proprio_out(self.proprio_fc2(F.gelu(self.proprio_fc1(proprio))))  # (S, D)
        return Condition(self.dit.prepare(context), state + context.mean(dim=1))

    def at_steps(self, cond: Condition, num_steps: int) -> Condition:
        """Add to the condition the modulations of tau = k / num_steps for all k, in one product for all S contexts."""
        tau = torch.arange(num_steps, device=cond.base.device) / num_steps  # (K,)
        return replace(cond, modulations=self.dit.modulations(self.time(tau)[:, None] + cond.base))  # of (K, S, D)

    def forward(
        self, x: torch.Tensor | None, tau: torch.Tensor, cond: Condition, k: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Compute one output per scalar of the chunk.

        Args:
            x: (B, T, A), or None where the net does not take it.
            tau: (B,).
            cond: condition of S contexts, B a multiple of S.
            k: (B,), the flow steps of tau; read only if `cond` has the modulations of `at_steps`.

        Returns:
            (B, T, A), float32 or the autocast type.

        Raises:
            ValueError: B is not a multiple of S.
        """
        rows, contexts = len(tau), len(cond.base)
        if rows % contexts:
            raise ValueError(f"{rows} rows do not divide among {contexts} contexts; pass a multiple, context-major")
        tokens = self.positions  # (1, T, D)
        if self.takes_x:
            features = self.action_fc2(F.gelu(self.action_fc1(x[..., None])))  # (B, T, A, E), scalar by scalar
            tokens = tokens + self.action_out(rearrange(features, "b t a e -> b t (a e)"))  # (B, T, D)
        else:
            tokens = tokens.expand(rows, -1, -1)
        context = torch.arange(rows, device=tau.device) // (rows // contexts)  # (B,), each row's context
        if cond.modulations is None or k is None:
            modulations = self.dit.modulations(self.time(tau) + cond.base[context])  # (B, 6 D) each
        else:
            modulations = [value[k, context] for value in cond.modulations]  # (K, S, 6 D) -> (B, 6 D)
        return self.dit(tokens, modulations, cond.kv)


class FlowHead(nn.Module):
    """The velocity net v(x, tau | z, s)."""

    def __init__(self, cfg: FlowConfig) -> None:
        super().__init__()
        self.cfg = cfg
        self.net = ChunkNet(cfg)

    @property
    def output(self) -> nn.Linear:
        """The last layer, which starts at zero."""
        return self.net.dit.out

    def configure(self, cfg: FlowConfig) -> None:
        """Take a configuration that differs in the sigma net's settings only; configurations are frozen."""
        self.cfg = self.net.cfg = cfg

    def compile_network(self) -> None:
        """Compile the trunk with `torch.compile`."""
        self.net.dit.compile()

    def prepare(self, context: torch.Tensor, proprio: torch.Tensor, sigma_net: SigmaNet | None = None) -> Condition:
        """Compute what all flow steps of a chunk share.

        Args:
            context: (S, N, context_dim), Eq. (1).
            proprio: (S, proprio_dim), normalised.
            sigma_net: needed to sample or score stochastic chains.
        """
        cond = self.net.prepare(context, proprio)
        return cond if sigma_net is None else replace(cond, sigma=sigma_net.prepare(context, proprio))

    def at_steps(self, cond: Condition, num_steps: int) -> Condition:
        """Precompute the modulations of the times k / num_steps; a step that is given k then costs a third less."""
        return self.net.at_steps(cond, num_steps)

    def velocity(
        self, x: torch.Tensor, tau: torch.Tensor, cond: Condition, k: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Compute the velocity (B, T, A), float32, of x (B, T, A) at tau (B,); arguments as in `ChunkNet.forward`."""
        return self.net(x, tau, cond, k).float()


class SigmaNet(nn.Module):
    """Standard deviations of the flow steps, in [sigma_min, sigma_max]; the same architecture as the velocity net.

    The output layer is zero-initialised: sigma starts at the geometric mean of its bounds, sqrt(0.08 * 0.2) = 0.1265.
    """

    def __init__(self, cfg: FlowConfig) -> None:
        super().__init__()
        self.cfg = cfg
        self.net = ChunkNet(cfg, takes_x=cfg.sigma_uses_x)

    @property
    def output(self) -> nn.Linear:
        """The last layer, which starts at zero."""
        return self.net.dit.out

    def prepare(self, context: torch.Tensor, proprio: torch.Tensor) -> Condition:
        """Compute this net's condition, as `FlowHead.prepare` does."""
        return self.net.prepare(context, proprio)

    def at_steps(self, cond: Condition) -> Condition:
        """Precompute this net's modulations of all K times, as `FlowHead.at_steps` does."""
        return self.net.at_steps(cond, self.cfg.num_steps)

    def log_sigma(self, cond: Condition, k: torch.Tensor, x: torch.Tensor | None = None) -> torch.Tensor:
        """Compute log sigma_k from (z, s, k) and, with `sigma_uses_x`, x_k.

        Args:
            cond: condition of S contexts, from `prepare`.
            k: (B,) flow steps, 0..K-1.
            x: (B, T, A), read only with `sigma_uses_x`.

        Returns:
            (B, T, A), float32, between log sigma_min and log sigma_max.
        """
        low, high = math.log(self.cfg.sigma_min), math.log(self.cfg.sigma_max)
        out = self.net(x, k.float() / self.cfg.num_steps, cond, k).float()
        return (low + high) / 2 + (high - low) / 2 * torch.tanh(out)  # out = 0: the geometric mean of the bounds


def column_major(module: nn.Module) -> None:
    """Store the weights of linear layers that are on a CPU in column-major order, in place; values and shapes stay.

    A CPU multiplies the few rows of a single chunk by such weights a quarter faster. Not for training under FSDP, which
    takes contiguous parameters only.
    """
    for layer in module.modules():
        if isinstance(layer, nn.Linear) and layer.weight.device.type == "cpu":
            layer.weight.data = layer.weight.data.t().contiguous().t()
