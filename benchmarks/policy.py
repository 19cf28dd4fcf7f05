"""Time the policy's action head, and a whole training step, with random weights.

    python benchmarks/policy.py --compile                                                  the head, on any machine
    python benchmarks/policy.py --whole --compile --device cuda --out results/policy_gpu.json       and a training step

chunk         latency of one action chunk, K Euler steps from noise: the context's keys, values and mean computed once
              per chunk, with weights stored by column (`column_major`) (ours), or at every step, with weights by row
              (straightforward); for one and for `batch_size` observations; with --compile also ours compiled, and on
              a GPU ours in a CUDA graph
head step     forward and backward of Eq. (4) for `draws` pairs (tau, eps) per image: the context computed once per
              image (ours), or repeated for every pair (straightforward)
training step (--whole) vision, language model with adapters, head and AdamW at the paper's batch size: steps per second
              and peak memory; with --compile also with compiled blocks

All versions of the head run in turns in one process and must give the same numbers. The median of the repeats counts,
without the first calls. The JSON file is written after the head, and after each training step; versions of the head
that differ are an error at the end.
"""

import sys
from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass
from typing import Literal

import torch
from timing import alternate, graphed, machine, peak_rate, ratio, work_and_share
from torch import Tensor

from vlarft.flow import euler_step, matching_loss, sample_ode
from vlarft.nets.action_head import FlowHead, column_major
from vlarft.nets.lora import LoRAConfig, add_lora
from vlarft.nets.vit import ViT
from vlarft.policy import PRESETS as POLICIES
from vlarft.policy import VLAPolicy
from vlarft.run.checkpoint import write_json
from vlarft.run.config import opt, parse, to_dict


@dataclass(frozen=True)
class Config:
    policy: Literal["paper", "small", "tiny", "smoke"] = opt("paper", "sizes of the policy")
    out: str = opt("runs/benchmarks/policy.json", "JSON file to write")
    device: Literal["cpu", "cuda"] = opt("cpu", "where to run; cuda computes in bfloat16")
    batch_size: int = opt(16, "observations per training step")
    draws: int = opt(4, "pairs (tau, eps) per observation in the head step")
    repeats: int = opt(20, "timed calls of each version")
    whole: bool = opt(False, "also time whole training steps")
    compile: bool = opt(False, "also time a compiled head and, with --whole, compiled blocks")


PRESETS = {
    "paper": Config(),
    "smoke": Config(policy="smoke", batch_size=2, draws=2, repeats=2, whole=True),
}


def autocast(cfg: Config) -> torch.autocast:
    return torch.autocast(cfg.device, torch.bfloat16, enabled=cfg.device == "cuda")


def straightforward_chunk(head: FlowHead, context: Tensor, proprio: Tensor, noise: Tensor) -> Tensor:
    """Do what `sample_ode` does, but project the context again at every step."""
    x, num_steps = noise, head.cfg.num_steps
    for k in range(num_steps):
        x = euler_step(head, x, torch.full((len(x),), k, device=x.device), num_steps, head.prepare(context, proprio))
    return x


def compare(
    cfg: Config, versions: dict[str, Callable[[], object]], difference: float, peak: float
) -> dict[str, object]:
    """Return the times of all versions, how many times faster than straightforward they are, and our FLOPs."""
    timings = alternate(versions, cfg.repeats, cfg.device, warmup=2)
    found: dict[str, object] = {f"{name}_s": timing.median for name, timing in timings.items()}
    found["times_faster"], found["spread"] = ratio(timings["ours"], timings["straightforward"])
    for name in (name for name in timings if name not in ("ours", "straightforward")):
        found[f"times_faster_{name}"], found[f"spread_{name}"] = ratio(timings[name], timings["straightforward"])
    return found | work_and_share(versions["ours"], timings["ours"], peak) | {"largest_difference": difference}


def time_head(cfg: Config, peak: float) -> dict[str, dict[str, object]]:
    """Time single chunks, batches of chunks, and the head's training step."""
    sizes = POLICIES[cfg.policy]
    with torch.device(cfg.device):
        torch.manual_seed(0)
        head = FlowHead(sizes.flow)
        torch.nn.init.normal_(head.output.weight, std=0.1)  # initially zero: actions would equal the noise
        playing = deepcopy(head)
        column_major(playing)
        tokens = sizes.vlm.num_cameras * _vision_tokens(sizes.vlm.vision) + sizes.vlm.num_queries + sizes.key_token
        context = torch.randn(cfg.batch_size, tokens, sizes.flow.context_dim)
        proprio = torch.randn(cfg.batch_size, sizes.flow.proprio_dim)
        actions = torch.randn(cfg.batch_size, sizes.flow.chunk, sizes.flow.action_dim)

    def chunk(rows: int, playing: FlowHead = playing) -> Tensor:
        with torch.no_grad(), autocast(cfg):
            return sample_ode(playing, playing.prepare(context[:rows], proprio[:rows]), noise=actions[:rows])

    def slow_chunk(rows: int) -> Tensor:
        with torch.no_grad(), autocast(cfg):
            return straightforward_chunk(head, context[:rows], proprio[:rows], actions[:rows])

    def time_chunks(rows: int) -> dict[str, object]:
        error = (chunk(rows) - slow_chunk(rows)).abs().max().item()
        versions = {"ours": lambda: chunk(rows), "straightforward": lambda: slow_chunk(rows)}
        if cfg.compile:
            compiled = deepcopy(playing)
            compiled.compile_network()
            error = max(error, (chunk(rows, compiled) - slow_chunk(rows)).abs().max().item())
            versions["compiled"] = lambda: chunk(rows, compiled)
        if cfg.device == "cuda":
            versions["graph"] = graphed(lambda: chunk(rows))
            error = max(error, (versions["graph"]() - slow_chunk(rows)).abs().max().item())
        return compare(cfg, versions, error, peak)

    def step(repeated: int, draws: int) -> tuple[Tensor, Tensor]:
        generator = torch.Generator(cfg.device).manual_seed(0)
        rows = [x.repeat_interleave(repeated, dim=0) for x in (actions, context, proprio)]
        with autocast(cfg):
            loss, _ = matching_loss(head, rows[0], head.prepare(*rows[1:]), generator=generator, draws=draws)
        head.zero_grad()
        loss.backward()
        return loss.detach(), torch.cat([p.grad.flatten() for p in head.parameters()])

    (loss, grad), (slow_loss, slow_grad) = step(1, cfg.draws), step(cfg.draws, 1)
    error = max((loss - slow_loss).abs().item(), (grad - slow_grad).abs().max().item())
    steps = {"ours": lambda: step(1, cfg.draws), "straightforward": lambda: step(cfg.draws, 1)}
    return {
        "chunk": time_chunks(1),
        "batch of chunks": time_chunks(cfg.batch_size),
        "head step": compare(cfg, steps, error, peak),
    }


def _vision_tokens(vision: object) -> int:
    patches = getattr(vision, "patch_size", None)
    return (vision.image_size // patches) ** 2 if patches else vision.num_keypoints


def time_training(cfg: Config, compiled: bool) -> dict[str, float]:
    """Time whole training steps of the policy: adapters on the vision-language model, and the full head."""
    torch.manual_seed(0)
    policy = VLAPolicy(POLICIES[cfg.policy])
    add_lora(policy.vlm, LoRAConfig())
    policy.vlm.action_queries.requires_grad_(True)
    policy.to(cfg.device).train()
    vits = [e for e in (policy.vlm.vision, policy.vlm.fused_vision) if isinstance(e, ViT)]
    for vit in vits:
        vit.freeze_unread()
    if compiled:
        for block in (*(b for vit in vits for b in vit.blocks), *policy.vlm.language_model.layers):
            block.compile()
    trained = [p for p in policy.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4, fused=True)
    size, flow = policy.vlm.image_size, policy.cfg.flow
    with torch.device(cfg.device):
        images = torch.rand(cfg.batch_size, policy.vlm.cfg.num_cameras, 3, size, size)
        proprio = torch.randn(cfg.batch_size, flow.proprio_dim)
        actions = torch.randn(cfg.batch_size, flow.chunk, flow.action_dim).clamp(-1, 1)
    generator = torch.Generator(cfg.device).manual_seed(0)

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        with autocast(cfg):
            loss, _ = policy(images, ["turn on the stove"] * cfg.batch_size, proprio, actions, generator=generator)
        loss.backward()
        optimizer.step()

    if cfg.device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    spent = alternate({"step": step}, cfg.repeats, cfg.device, warmup=2)["step"].median
    result = {"steps_per_s": 1 / spent, "trainable": sum(p.numel() for p in trained)}
    if cfg.device == "cuda":
        result["peak_gib"] = torch.cuda.max_memory_allocated() / 2**30
    return result


def main(cfg: Config) -> dict:
    """Time and compare the versions; write the JSON file and return its content.

    Raises:
        RuntimeError: versions of the head disagree.
    """
    peak = peak_rate(cfg.device)
    report = {
        "command": "python benchmarks/policy.py",
        "config": to_dict(cfg),
        **machine(cfg.device),
        "peak_flops_per_s": peak,
        **time_head(cfg, peak),
    }
    write_json(cfg.out, report)
    tolerance, wrong = 0.05 if cfg.device == "cuda" else 1e-4, []
    for name in ("chunk", "batch of chunks", "head step"):
        row = report[name]
        if (difference := row["largest_difference"]) > tolerance:
            wrong.append(f"{name}: the versions differ by {difference:.3g} > {tolerance}")
        names = ("ours", "straightforward", "compiled", "graph")
        shown = [f"{version} {1e3 * row[f'{version}_s']:.2f} ms" for version in names if f"{version}_s" in row]
        low, high = row["spread"]
        print(f"{name:<16} {', '.join(shown)}; {row['times_faster']:.2f} times faster [{low:.2f}, {high:.2f}]", end="")
        print(f", {row['flops'] / 1e9:.1f} GFLOP, {100 * row['share_of_peak']:.0f} % of the machine's peak")
    if cfg.whole:
        for compiled in (False, True) if cfg.compile else (False,):
            name = "training step, compiled" if compiled else "training step"
            report[name] = time_training(cfg, compiled)
            write_json(cfg.out, report)
            print(f"{name:<24} {report[name]['steps_per_s']:.2f} a second")
    if wrong:
        raise RuntimeError("; ".join(wrong))
    return report


if __name__ == "__main__":
    main(parse(Config, PRESETS, sys.argv[1:], __doc__))
