"""Time pixel decoding and image reward against straightforward versions, with random weights.

    python benchmarks/pixels.py                                                                       on any machine
    python benchmarks/pixels.py --sizes paper --device cuda --perceptual lpips --out results/pixels_gpu.json

decode   tokens of S starts x G chunks x T frames to pixels: `FrameTokenizer.decode` with one context per start (ours);
         one context per frame (straightforward); on a CPU also ours in bfloat16, with our or torch's group norm
reward   Eq. (11) of those frames: `image_reward`, which computes the reference's features once per start (ours); each
         pair of images separately (straightforward): SSIM by convolutions, LPIPS by its package

All versions run in turns in one process. In float32 they must agree; for bfloat16 the difference is recorded. Writes
one JSON file.
"""

import sys
from copy import deepcopy
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from distinct import decode_all
from rft_versions import random_perceptual
from rollout import SIZES
from timing import alternate, machine, peak_rate, ratio, work_and_share
from torch import Tensor, nn

from vlarft.metrics import PerceptualDistance
from vlarft.nets.frame_networks import GroupNorm
from vlarft.reward import image_reward
from vlarft.run.checkpoint import write_json
from vlarft.run.config import opt, parse, to_dict
from vlarft.tokenizer import Context, FrameTokenizer
from vlarft.world_model import WorldModel


@dataclass(frozen=True)
class Config:
    sizes: Literal["paper", "reduced", "pixels", "smoke"] = opt("pixels", "sizes of the tokenizer, see rollout.py")
    out: str = opt("runs/benchmarks/pixels.json", "JSON file to write")
    device: Literal["cpu", "cuda"] = opt("cpu", "where to run; on a GPU all decode in bfloat16")
    perceptual: Literal["lpips", "ssim"] = opt("ssim", "perceptual term; lpips has a random VGG-16")
    starts: int = opt(4, "starts S")
    group: int = opt(16, "chunks G per start")
    frames: int = opt(8, "frames T")
    repeats: int = opt(3, "timed calls of each version")


PRESETS = {"paper": Config(), "smoke": Config(sizes="smoke", starts=2, group=3, frames=2, repeats=1)}


class Workload:
    """A tokenizer, contexts of random starts, random tokens of frames, and frames of a reference."""

    def __init__(self, cfg: Config) -> None:
        torch.manual_seed(0)
        model = WorldModel(SIZES[cfg.sizes]).to(cfg.device).eval().requires_grad_(False)
        sizes = model.cfg.tokenizer
        with torch.device(cfg.device):
            starts, self.reference = torch.rand(cfg.starts, cfg.frames + 1, 3, *sizes.image_size).split(
                [1, cfg.frames], 1
            )
            shape = cfg.starts, cfg.group, cfg.frames, sizes.num_future_tokens
            self.tokens = torch.randint(0, model.layout.num_future_codes, shape)
        with torch.no_grad():
            self.context = model.tokenizer.encode_context(starts[:, 0])
        self.low = deepcopy(model).to_bfloat16().tokenizer
        self.tokenizer = self.low if cfg.device == "cuda" else model.tokenizer
        self.distance = random_perceptual(cfg.perceptual).to(cfg.device)
        self.frames = self.decode(self.tokenizer)

    @torch.no_grad()
    def decode(self, tokenizer: FrameTokenizer) -> Tensor:
        """Decode to (S, G, T, C, H, W)."""
        return tokenizer.decode(self.tokens, self.context)

    @torch.no_grad()
    def decode_alone(self) -> Tensor:
        """Decode every frame with a context of its own."""
        group, frames = self.tokens.shape[1:3]
        rows = torch.arange(len(self.tokens), device=self.tokens.device).repeat_interleave(group * frames)
        context: Context = self.context.starts(rows)
        images = decode_all(self.tokenizer, self.tokens.flatten(0, 2)[:, None], context)[:, 0]
        return images.unflatten(0, self.tokens.shape[:3])

    def decode_torch_norm(self) -> Tensor:
        """Decode in bfloat16 with torch's group normalisation."""
        own, GroupNorm.forward = GroupNorm.forward, nn.GroupNorm.forward
        try:
            return self.decode(self.low)
        finally:
            GroupNorm.forward = own

    @torch.no_grad()
    def reward(self) -> Tensor:
        """Compute rewards (S, G, T)."""
        return image_reward(self.frames, self.reference, perceptual=self.distance)

    @torch.no_grad()
    def reward_alone(self) -> Tensor:
        """Compute the same rewards pair by pair, with the T pairs of a chunk in one call."""
        found = [pair_reward(self.distance, chunk, own) for chunk, own in self._pairs()]
        return torch.stack(found).unflatten(0, self.tokens.shape[:2])

    def _pairs(self) -> list[tuple[Tensor, Tensor]]:
        return [(chunk, own) for group, own in zip(self.frames, self.reference) for chunk in group]


def pair_reward(distance: PerceptualDistance, frames: Tensor, reference: Tensor) -> Tensor:
    """Compute rewards (T,) of frames and reference (T, C, H, W)."""
    if distance.name == "ssim":
        apart = (1 - ssim_by_convolutions(frames, reference)) / 2
    else:
        apart = distance.lpips(frames, reference, normalize=True)[:, 0, 0, 0]
    return -((frames - reference).abs().mean((1, 2, 3)) + apart)


def ssim_by_convolutions(x: Tensor, y: Tensor) -> Tensor:
    """Compute SSIM (T,) of images (T, C, H, W) the usual way: a separable blur with one convolution per channel."""
    line = torch.exp(-(torch.arange(-5.0, 6.0, device=x.device) ** 2) / (2 * 1.5**2))
    line = (line / line.sum()).repeat(x.shape[1], 1)

    def blur(images: Tensor) -> Tensor:
        images = F.conv2d(images, line[:, None, :, None], groups=x.shape[1])
        return F.conv2d(images, line[:, None, None, :], groups=x.shape[1])

    mean_x, mean_y = blur(x), blur(y)
    var_x, var_y, both = blur(x * x) - mean_x**2, blur(y * y) - mean_y**2, blur(x * y) - mean_x * mean_y
    c1, c2 = 0.01**2, 0.03**2
    value = (2 * mean_x * mean_y + c1) * (2 * both + c2) / ((mean_x**2 + mean_y**2 + c1) * (var_x + var_y + c2))
    return value.mean((1, 2, 3))


def main(cfg: Config) -> dict:
    """Time and compare the versions; write the JSON file and return its content.

    Raises:
        RuntimeError: versions of the same precision disagree.
    """
    work = Workload(cfg)
    subjects = {
        "decode": {"ours": lambda: work.decode(work.tokenizer), "straightforward": work.decode_alone},
        "reward": {"ours": work.reward, "straightforward": work.reward_alone},
    }
    if cfg.device == "cpu":
        low = {"ours, bfloat16": lambda: work.decode(work.low)}
        subjects["decode"] |= low | {"ours, bfloat16, torch's norm": work.decode_torch_norm}
    peak = peak_rate(cfg.device)
    report = {"command": "python benchmarks/pixels.py", "config": to_dict(cfg), **machine(cfg.device)}
    report["peak_flops_per_s"] = peak
    tolerance = 0.05 if cfg.device == "cuda" else 1e-4
    for subject, versions in subjects.items():
        found = {name: version() for name, version in versions.items()}
        apart = {name: (value - found["ours"]).abs().max().item() for name, value in found.items()}
        if not apart["straightforward"] <= tolerance:
            raise RuntimeError(f"{subject}: the versions differ by {apart['straightforward']:.3g} > {tolerance}")
        timings = alternate(versions, cfg.repeats, cfg.device)
        report[subject] = {}
        for name, timing in timings.items():
            longer, (low, high) = ratio(timings["ours"], timing)
            row = {**timing._asdict(), "times_as_long": longer, "spread": [low, high]}
            row |= work_and_share(versions[name], timing, peak) | {"largest_difference": apart[name]}
            report[subject][name] = row
            print(f"{subject:<8}{name:<30}{timing.median:8.3f} s, times ours: {longer:.2f}", end="")
            print(f" [{low:.2f}, {high:.2f}]", end="")
            print(f", {row['flops'] / 1e9:.1f} GFLOP, {100 * row['share_of_peak']:.0f} % of peak", end="")
            print(f", largest difference {apart[name]:.2g}")
        write_json(cfg.out, report)
    return report


if __name__ == "__main__":
    main(parse(Config, PRESETS, sys.argv[1:], __doc__))
