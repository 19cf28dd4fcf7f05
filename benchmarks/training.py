"""Time training steps of world model and tokenizer against straightforward ones, with random weights.

    python benchmarks/training.py                                                            reduced sizes
    python benchmarks/training.py --sizes paper --segments 4 --device cuda --out results/training_gpu.json

tokenizer step     forward and backward of L1: a segment's context encoded and decoded once, its frames together (ours);
                   or each frame with a context of its own (straightforward)
tokens             tokenising a batch of segments, without gradient: in one pass (ours); or frame by frame
                   (straightforward)
world-model step   forward and backward of Eq. (3): logits only at the tokens of frames >= 1 (ours); or transformers'
                   `LlamaForCausalLM` with the other labels masked (straightforward)

Both versions run in turns in one process and must give the same loss, or the same tokens. Writes one JSON file; on a
GPU, which computes under bfloat16 autocast, with each version's peak memory.
"""

import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from rollout import SIZES, llama_of
from timing import alternate, machine, peak_rate, ratio, work_and_share
from torch import Tensor

from vlarft.run.checkpoint import write_json
from vlarft.run.config import opt, parse, to_dict
from vlarft.world_model import WorldModel


@dataclass(frozen=True)
class Config:
    sizes: Literal["paper", "reduced", "smoke"] = opt("reduced", "sizes of the world model, see rollout.py")
    out: str = opt("runs/benchmarks/training.json", "JSON file to write")
    device: Literal["cpu", "cuda"] = opt("cpu", "where to run; cuda computes in bfloat16")
    segments: int = opt(16, "segments per batch")
    repeats: int = opt(5, "timed calls of each version")


PRESETS = {"paper": Config(), "smoke": Config(sizes="smoke", segments=2, repeats=1)}


class Workload:
    """A world model, its copy in transformers, and a batch of random segments."""

    def __init__(self, cfg: Config) -> None:
        torch.manual_seed(0)
        self.cfg, sizes = cfg, SIZES[cfg.sizes]
        self.model = WorldModel(sizes).to(cfg.device)
        self.tokenizer, self.layout = self.model.tokenizer.requires_grad_(True).eval(), self.model.layout
        self.llama = llama_of(self.model).train()
        with torch.device(cfg.device):
            self.frames = torch.rand(cfg.segments, sizes.chunk + 1, 3, *sizes.tokenizer.image_size)
            self.actions = torch.rand(cfg.segments, sizes.chunk, sizes.action_dim) * 2 - 1
        self.context, self.future = self.tokens()

    def autocast(self) -> torch.autocast:
        return torch.autocast(self.cfg.device, torch.bfloat16, enabled=self.cfg.device == "cuda")

    def backward(self, loss: Tensor, module: torch.nn.Module) -> Tensor:
        module.zero_grad(set_to_none=True)
        loss.backward()
        return loss.detach()

    def tokenizer_step(self) -> Tensor:
        with self.autocast():
            made = self.tokenizer(self.frames[:, 0], self.frames)
            loss = _l1(made.context_frame, self.frames[:, 0]) + _l1(made.frames, self.frames)
        return self.backward(loss, self.tokenizer)

    def plain_tokenizer_step(self) -> Tensor:
        length = self.frames.shape[1]
        starts, frames = self.frames[:, 0].repeat_interleave(length, 0), self.frames.flatten(0, 1)
        with self.autocast():
            made = self.tokenizer(starts, frames[:, None])
            loss = _l1(made.context_frame, starts) + _l1(made.frames[:, 0], frames)
        return self.backward(loss, self.tokenizer)

    @torch.no_grad()
    def tokens(self) -> tuple[Tensor, Tensor]:
        with self.autocast():
            return self.model.tokenize(self.frames)

    @torch.no_grad()
    def plain_tokens(self) -> tuple[Tensor, Tensor]:
        found = []
        for frame in self.frames.unbind(1):
            with self.autocast():
                context = self.tokenizer.encode_context(self.frames[:, 0])
                found.append(self.tokenizer.encode_future(frame[:, None], context))
        return context.tokens, torch.cat(found, dim=1)

    def world_model_step(self) -> Tensor:
        with self.autocast():
            loss, _ = self.model.token_loss(self.context, self.future, self.actions)
        return self.backward(loss, self.model)

    def plain_world_model_step(self) -> Tensor:
        ids = self.layout.sequence(self.context, self.future, self.model.action_bins.encode(self.actions))
        labels, targets = torch.full_like(ids, -100), self.layout.frame_positions(self.actions.shape[1]).flatten()
        labels[:, targets] = ids[:, targets]
        with self.autocast():
            loss = self.llama(ids, labels=labels).loss
        return self.backward(loss, self.llama)


def _l1(made: Tensor, true: Tensor) -> Tensor:
    return (made.float() - true).abs().mean()


def compare(cfg: Config, ours: Callable[[], object], plain: Callable[[], object], peak: float) -> dict[str, object]:
    """Return the times of both versions, their ratio with its range, and our FLOPs."""
    timings = alternate({"ours": ours, "straightforward": plain}, cfg.repeats, cfg.device)
    row: dict[str, object] = {f"{name}_s": t.median for name, t in timings.items()}
    row["times_faster"], row["spread"] = ratio(timings["ours"], timings["straightforward"])
    row |= work_and_share(ours, timings["ours"], peak)
    if cfg.device == "cuda":
        for name, version in (("ours", ours), ("straightforward", plain)):
            torch.cuda.reset_peak_memory_stats()
            version()
            row[f"{name}_peak_gib"] = torch.cuda.max_memory_allocated() / 2**30
    return row


def main(cfg: Config) -> dict:
    """Time and compare the versions; write the JSON file and return its content.

    Raises:
        RuntimeError: two versions disagree.
    """
    work, tolerance = Workload(cfg), 0.02 if cfg.device == "cuda" else 1e-4
    pairs = {
        "tokenizer step": (work.tokenizer_step, work.plain_tokenizer_step),
        "tokens": (work.tokens, work.plain_tokens),
        "world-model step": (work.world_model_step, work.plain_world_model_step),
    }
    peak = peak_rate(cfg.device)
    report = {
        "command": "python benchmarks/training.py",
        "config": to_dict(cfg),
        **machine(cfg.device),
        "peak_flops_per_s": peak,
    }
    for name, (ours, plain) in pairs.items():
        a, b = ours(), plain()
        if name == "tokens":
            difference = max((x != y).float().mean().item() for x, y in zip(a, b, strict=True))
        else:
            difference = (a - b).abs().item()
        if not difference <= tolerance:
            raise RuntimeError(f"{name}: the versions differ by {difference:.3g} > {tolerance}")
        row = report[name] = {"difference": difference, **compare(cfg, ours, plain, peak)}
        low, high = row["spread"]
        print(
            f"{name:<18} {1e3 * row['ours_s']:8.1f} ms, {row['times_faster']:.2f} times faster [{low:.2f}, {high:.2f}]"
            f", {100 * row['share_of_peak']:.0f} % of the machine's peak"
        )
        write_json(cfg.out, report)
    return report


if __name__ == "__main__":
    main(parse(Config, PRESETS, sys.argv[1:], __doc__))
