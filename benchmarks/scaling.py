"""Predict memory, communication and step times of the training scripts on 1 to 64 GPUs. Nothing is measured.

    python benchmarks/scaling.py                prints the tables of docs/scaling.md (committed: results/scaling.json)

Every model is built and run without data (FakeTensorMode). Parameters, FLOPs (FlopCounterMode) and the activations kept
for the backward pass (vlarft.run.memory) are therefore those of the code. The time of a step on n GPUs is modelled as:

compute   FLOPs per process / (`flops` x `share`): the chip's peak times the share of it that is reached
messages  FSDP2 with the scripts' units: a process receives (n - 1) / n of each unit's parameters before each call and
          again before the backward pass, blocks in bfloat16, the rest in float32; and (n - 1) / n of the gradients of
          trained parameters, in float32. At `node_bandwidth` within one node, else at `network_bandwidth` (per GPU).
          A collective is a ring of n - 1 messages with a `latency` each
update    28 bytes read or written per trained parameter of the shard, at `memory_bandwidth`
step      between max(compute, messages) + update (messages overlap with compute) and their sum (no overlap)

Not included: data loading, kernel launches (a lower bound for small models), validation, checkpoints, stragglers.
Memory is weights, gradients, moments, activations of one micro-batch, and one gathered copy of the largest unit.

RFT (preset paper, reward R3) is forward only, except for the head. Once per start: the vision-language model, the
context's tokens, the prefix. 17 rollouts per start (16 and the reference) of 8 frames: transformer, pixel decoder and
VGG-16. Per rollout: K steps of the head, forward to sample, forward and backward to update. Frozen weights are whole on
every process, without messages. A start is not divided, so there are at most as many processes as starts.
"""

import contextlib
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import NamedTuple
from unittest.mock import patch

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from vlarft.flow import matching_loss
from vlarft.nets import transformer
from vlarft.nets.action_head import SigmaNet
from vlarft.nets.frame_networks import ResBlock
from vlarft.nets.lora import LoRAConfig, add_lora
from vlarft.normalizer import Normalizer
from vlarft.policy import PRESETS as POLICIES
from vlarft.policy import VLAPolicy
from vlarft.run import memory
from vlarft.run.checkpoint import write_json
from vlarft.run.config import opt, parse, to_dict
from vlarft.tokenizer import PRESETS as TOKENIZERS
from vlarft.tokenizer import FrameTokenizer
from vlarft.world_model import PRESETS as WORLD_MODELS
from vlarft.world_model import WorldModel

GPUS = (1, 2, 4, 8, 16, 32, 64)
SHOWN = (("same batch", 1), ("same batch", 8), ("same batch", 16), ("batch grows", 64))  # lines in docs/scaling.md
VGG_FLOPS = 40.1e9  # VGG-16's convolutions on 256 x 256 pixels: 15.35 G multiply-adds at 224 x 224, x (256 / 224)^2 x 2
UPDATE_BYTES = 28  # AdamW reads weight, gradient and two moments, writes weight and moments


@dataclass(frozen=True)
class Config:
    out: str = opt("runs/benchmarks/scaling.json", "JSON file to write")
    presets: tuple[str, ...] = opt(("paper", "small"), "sizes of tokenizer, world model and policy")
    flops: float = opt(790e12, "bfloat16 peak of a GPU [FLOP/s]; measured on an H200")
    share: float = opt(0.4, "share of that peak that a step reaches; an assumption")
    memory_bandwidth: float = opt(4.3e12, "memory bandwidth of a GPU [B/s]; measured on an H200")
    node_bandwidth: float = opt(300e9, "between GPUs of a node, per direction [B/s]; two thirds of NVLink 4's 450")
    network_bandwidth: float = opt(40e9, "between nodes, per GPU [B/s]; four fifths of 400 Gbit/s")
    latency: float = opt(10e-6, "latency of one message [s]; an assumption")
    gpus_per_node: int = opt(8, "GPUs per node")


PRESETS = {"paper": Config(), "smoke": Config(presets=("smoke",))}


class Stage(NamedTuple):
    """Cost of a training step, forward and backward. A row is one element of the batch."""

    batch: int  # the preset's rows per step, over all processes
    units: dict[str, tuple[int, ...]]  # value of --frozen -> parameters of each FSDP unit: blocks, then the remainder
    trained: int
    frozen: int
    flops: float  # per row
    activations: tuple[float, float]  # bytes kept for the backward pass: constant, and per row
    calls: int = 1  # calls of the outermost unit, which is gathered for each and once for the backward pass


def without_data() -> contextlib.ExitStack:
    """Return a context without data, in which checks of values are disabled."""
    stack = contextlib.ExitStack()
    stack.enter_context(FakeTensorMode())
    # without a mask, whole sequences from position 0 use the attention kernel's causal mode
    stack.enter_context(patch.object(transformer, "causal_mask", lambda *_: None))
    stack.enter_context(patch.object(FrameTokenizer, "_check", lambda *_: None))
    for name in ("encode_actions", "encode_proprio"):
        stack.enter_context(patch.object(Normalizer, name, lambda self, values: values))
    for name in ("group_norm", "layer_norm"):  # autocast computes them in float32 on a GPU, and not on a CPU
        norm = getattr(F, name)
        stack.enter_context(patch.object(F, name, lambda x, *rest, norm=norm: norm(x.float(), *rest)))
    return stack


def count_flops(compute: Callable[[], Tensor], backward: bool = True) -> float:
    with FlopCounterMode(display=False) as counter, torch.autocast("cpu", torch.bfloat16):
        result = compute()
    total = counter.get_total_flops()
    if backward:
        with FlopCounterMode(display=False) as counter:
            result.backward()
        total += counter.get_total_flops()
    return float(total)


def stage(
    model: nn.Module, blocks: list[nn.Module], batch: int, compute: Callable[[int], Tensor], frozen_flops: float = 0.0
) -> Stage:
    """Count the cost of one script's step; `compute` runs the forward pass of a given number of rows."""

    def cast(rows: int) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return compute(rows)

    small, large = (memory.saved_bytes(model, lambda n=n: cast(n)) for n in (1, 2))
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    total = sum(p.numel() for p in model.parameters())
    inside = [sum(p.numel() for p in block.parameters()) for block in blocks]
    units = {"shard": (*inside, total - sum(inside))}
    if trained < total:
        inside = [sum(p.numel() for p in block.parameters() if p.requires_grad) for block in blocks]
        units["replicate"] = (*inside, trained - sum(inside))
    return Stage(
        batch=batch,
        units=units,
        trained=trained,
        frozen=total - trained,
        flops=count_flops(lambda: compute(1)) + frozen_flops,
        activations=(max(0.0, 2 * small - large), large - small),
    )


def tokenizer_stage(preset: str, batch: int, future: int) -> Stage:
    """Count the tokenizer's step, without discriminator and perceptual distance."""
    model = FrameTokenizer(cfg := TOKENIZERS[preset])
    size = cfg.channels, *cfg.image_size
    blocks = [m for m in model.modules() if isinstance(m, ResBlock)]
    return stage(model, blocks, batch, lambda n: model(torch.rand(n, *size), torch.rand(n, future, *size)).frames.sum())


def tokenize_flops(model: WorldModel, frames: int) -> float:
    """Count the FLOPs of tokenising one segment: the context frame and `frames` after it."""
    size = model.cfg.tokenizer.channels, *model.cfg.tokenizer.image_size

    def compute() -> Tensor:
        return model.tokenize(torch.rand(1, frames, *size), torch.rand(1, *size))[1]

    return count_flops(compute, backward=False)


def world_model_stage(preset: str, batch: int) -> Stage:
    """Count the world model's step: the loss on future codes; the frozen tokenizer belongs to the FSDP units."""
    model = WorldModel(cfg := WORLD_MODELS[preset])
    layout = model.layout
    future = cfg.chunk * layout.frame_length

    def compute(rows: int) -> Tensor:
        ids = torch.zeros(rows, layout.length(cfg.chunk)).long()
        hidden = model.decoder(model.embed_tokens(ids))[:, -future:]
        logits = F.linear(hidden, model.lm_head.weight).float()
        return F.cross_entropy(logits.flatten(0, 1), torch.zeros(rows * future).long())

    found = stage(model, list(model.decoder.layers), batch, compute, tokenize_flops(model, cfg.chunk + 1))
    return found._replace(calls=2)  # tokenize, token_loss


def policy_of(preset: str) -> tuple[VLAPolicy, Callable[[int, int], tuple]]:
    """Return a policy and a function that makes its inputs for a number of rows."""
    policy = VLAPolicy(cfg := POLICIES[preset])
    side, flow = policy.vlm.image_size, cfg.flow

    def inputs(rows: int) -> tuple:
        images = torch.rand(rows, policy.vlm.cfg.num_cameras, 3, side, side)
        state, actions = torch.randn(rows, flow.proprio_dim), torch.randn(rows, flow.chunk, flow.action_dim)
        return images, ["turn on the stove"] * rows, state, actions

    return policy, inputs


def sft_stage(preset: str, batch: int, draws: int, rank: int | None) -> Stage:
    policy, inputs = policy_of(preset)
    if rank:
        add_lora(policy.vlm, LoRAConfig(rank))
        policy.vlm.action_queries.requires_grad_(True)
    for vit in policy.vlm.vits:
        vit.freeze_unread()
    return stage(policy, policy.vlm.blocks, batch, lambda n: policy(*inputs(n), draws=draws)[0])


def rft_stage(preset: str, starts: int = 16, group: int = 16) -> Stage:
    """Count a step of RFT per start. Head and sigma net are FSDP units in float32; the rest is on every process."""
    policy, inputs = policy_of(preset)
    model = WorldModel(cfg := WORLD_MODELS[preset])
    layout, sizes, frames, members = model.layout, cfg.transformer, cfg.chunk, group + 1
    images, text, state, actions = inputs(1)
    encode = count_flops(lambda: policy.encode(images, text), backward=False)
    context = torch.randn(1, *policy.encode(images, text).shape[1:])
    nets, steps = [policy.head, SigmaNet(policy.cfg.flow)], policy.cfg.flow.num_steps

    def score(rows: int) -> Tensor:  # a rollout takes K steps; the sigma net counts as a second head
        condition = policy.head.prepare(context.expand(rows, -1, -1), state.expand(rows, -1))
        return matching_loss(policy.head, actions.expand(rows, -1, -1), condition, draws=steps)[0]

    sampled, updated = (2 * group * count_flops(lambda: score(1), backward) for backward in (False, True))
    prefix, new = layout.context_length, layout.frame_length + frames * layout.step_length
    body = 2 * sum(p.numel() for p in model.decoder.parameters())
    attention = 4 * sizes.depth * sizes.width * (prefix + new / 2)
    decode = members * new * (body + attention) + prefix * (body + 2 * sizes.depth * sizes.width * prefix)
    pixels = members * frames * (_pixel_flops(model) + VGG_FLOPS * (cfg.tokenizer.image_size[0] / 256) ** 2)
    trained = sum(p.numel() for net in nets for p in net.parameters())
    frozen = sum(p.numel() for net in (policy.vlm, model) for p in net.parameters())
    kept = memory.saved_bytes(policy, lambda: score(group))
    total = encode + tokenize_flops(model, 1) + decode + pixels + sampled + updated
    return Stage(starts, {"replicate": (trained,)}, trained, frozen, total, (0.0, float(2 * kept)))


def _pixel_flops(model: WorldModel) -> float:
    """Count the FLOPs of decoding one future frame: two frames minus one, without encoding."""
    tokenizer, size = model.tokenizer, (model.cfg.tokenizer.channels, *model.cfg.tokenizer.image_size)

    def whole(frames: int) -> float:
        return count_flops(lambda: tokenizer(torch.rand(1, *size), torch.rand(1, frames, *size)).frames, backward=False)

    return whole(2) - whole(1) - (tokenize_flops(model, 2) - tokenize_flops(model, 1))


# batch sizes of the scripts' presets; noise samples per image and adapter ranks of train_sft.py's
STAGES: dict[str, dict[str, Callable[[], Stage]]] = {
    "paper": {
        "tokenizer": lambda: tokenizer_stage("paper", 16, future=7),
        "world model": lambda: world_model_stage("paper", 16),
        "sft": lambda: sft_stage("paper", 16, draws=1, rank=64),
        "rft": lambda: rft_stage("paper"),
    },
    "small": {
        "tokenizer": lambda: tokenizer_stage("small", 32, future=7),
        "world model": lambda: world_model_stage("small", 32),
        "sft": lambda: sft_stage("small", 128, draws=4, rank=None),
        "rft": lambda: rft_stage("small"),
    },
    "smoke": {
        "tokenizer": lambda: tokenizer_stage("smoke", 4, future=3),
        "sft": lambda: sft_stage("smoke", 4, draws=2, rank=2),
    },
}


def predict(cfg: Config, stage: Stage, gpus: int, rows: int, frozen: str) -> dict[str, float | str]:
    """Predict a step with `rows` on each of `gpus`, in one micro-batch, frozen parameters sharded or replicated."""
    blocks, rest = stage.units[frozen][:-1], stage.units[frozen][-1]
    gathered = 2 * 2 * sum(blocks) + (stage.calls + 1) * 4 * rest  # bytes: bfloat16 blocks, the rest float32
    volume = (gpus - 1) / gpus * (gathered + 4 * stage.trained)
    bandwidth = cfg.node_bandwidth if gpus <= cfg.gpus_per_node else cfg.network_bandwidth
    collectives = 3 * sum(size > 0 for size in stage.units[frozen]) + stage.calls - 1
    messages = volume / bandwidth + cfg.latency * collectives * (gpus - 1)
    compute = rows * stage.flops / (cfg.flops * cfg.share)
    update = UPDATE_BYTES * stage.trained / gpus / cfg.memory_bandwidth
    whole = 0 if frozen == "shard" else stage.frozen
    copy = max(2 * max(blocks, default=0), 4 * rest) if gpus > 1 else 0
    return {
        "gpus": gpus,
        "batch": rows * gpus,
        "frozen": frozen,
        "weights_gib": 4 * ((stage.trained + stage.frozen - whole) / gpus + whole) / 2**30,
        "training_gib": 12 * stage.trained / gpus / 2**30,
        "activations_gib": (stage.activations[0] + rows * stage.activations[1] + copy) / 2**30,
        "received_gib": volume / 2**30,
        "compute_s": compute,
        "messages_s": messages,
        "update_s": update,
        "step_s_hidden": max(compute, messages) + update,
        "step_s_exposed": compute + messages + update,
    }


def batches(stage: Stage, gpus: int) -> Iterator[tuple[str, int]]:
    """Yield (name, rows per GPU): the preset's batch if it divides evenly, and the preset's batch on each GPU."""
    if stage.batch % gpus == 0:
        yield "same batch", stage.batch // gpus
    if gpus > 1:
        yield "batch grows", stage.batch


def main(cfg: Config) -> dict:
    """Count and predict; write the JSON file and return its content."""
    report: dict = {"config": to_dict(cfg), "torch": torch.__version__, "measured": False, "stages": {}}
    for preset in cfg.presets:
        for name, build in STAGES[preset].items():
            with without_data():
                found = build()
            lines = [
                {"kind": kind, **predict(cfg, found, n, rows, frozen)}
                for n in GPUS
                for kind, rows in batches(found, n)
                for frozen in found.units
                if n > 1 or frozen == list(found.units)[-1]
            ]
            report["stages"][f"{preset}, {name}"] = {**found._asdict(), "predicted": lines}
            print(show(f"{preset}, {name}", report["stages"][f"{preset}, {name}"]))
    write_json(cfg.out, report)
    return report


def show(name: str, stage: dict) -> str:
    """Format a stage of the JSON file as a table of docs/scaling.md, which has some of its lines."""
    out = [
        f"**{name}**: {(stage['trained'] + stage['frozen']) / 1e6:.1f} M parameters, {stage['trained'] / 1e6:.1f} M "
        f"trained; a row takes {stage['flops'] / 1e12:.3g} TFLOP, {stage['activations'][1] / 2**30:.2g} GiB are kept",
        "",
        "| GPUs | batch | frozen | weights | gradients, moments | activations | received | compute | messages | step |",
        "|" + "---|" * 10,
    ]
    for line in stage["predicted"]:
        if (line["kind"], line["gpus"]) not in SHOWN:
            continue
        sizes = [line[k] for k in ("weights_gib", "training_gib", "activations_gib", "received_gib")]
        times = [line[k] for k in ("compute_s", "messages_s")]
        row = [str(line["gpus"]), str(line["batch"]), line["frozen"] if stage["frozen"] else ""]
        row += [*(f"{v:.2f} GiB" for v in sizes), *(f"{1e3 * v:.0f} ms" for v in times)]
        row += [f"{1e3 * line['step_s_hidden']:.0f} to {1e3 * line['step_s_exposed']:.0f} ms"]
        out.append("| " + " | ".join(row) + " |")
    return "\n".join(out) + "\n"


if __name__ == "__main__":
    main(parse(Config, PRESETS, sys.argv[1:], __doc__))
