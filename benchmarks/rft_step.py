"""One whole GRPO step against the straightforward pipeline, phase by phase, with random weights.

    python benchmarks/rft_step.py --out results/rft_step.json                                    on any machine
    python benchmarks/rft_step.py --sizes paper --device cuda --perceptual lpips --out results/rft_step_gpu.json

ours             `rollout.collect` and `objective.update`, as `train_rft.py` calls them: the policy's context, the world
                 model's prefix and the reference's rollout, frames and features once per start
straightforward  every rollout a start of its own: its own vision-language forward, tokens, prefix, reference rollout,
                 reference features, and its own context in the update; caches and batches as in ours
ours, bfloat16   ours with `--bf16`: the frozen networks in bfloat16. On a CPU only, where the other two are in float32;
                 on a GPU all are in bfloat16

The first two draw the same chains and imagine greedily, and must give the same actions and rewards; what bfloat16
changes is written down. Phases are timed inside the steps; work is counted in the matrix products, convolutions and
attentions; the share of the peak is against the best rate of one large matrix product in float32 (on a GPU in
bfloat16) in the same process. Writes one JSON.
"""

import sys
import tempfile
import time
from collections.abc import Callable
from copy import copy, deepcopy
from dataclasses import dataclass, replace
from functools import wraps
from pathlib import Path
from typing import Literal

import rollout as rollout_benchmark
import torch
from timing import alternate, floating_point_work, machine, peak_rate, seconds, synchronize
from torch import Tensor

from vlarft.checkpoint import write_json
from vlarft.config import opt, parse, to_dict
from vlarft.data.windows import Batch
from vlarft.grpo import advantages
from vlarft.metrics import PerceptualDistance, perceptual
from vlarft.objective import ObjectiveConfig, update
from vlarft.policy import PRESETS as POLICIES
from vlarft.policy import VLAPolicy
from vlarft.reward import verified_reward
from vlarft.rollout import PlayedChunk, RolloutConfig, Rollouts, collect, encode, reward_options, sample_group
from vlarft.world_model import WorldModel


@dataclass(frozen=True)
class Config:
    sizes: Literal["paper", "reduced", "smoke"] = opt("reduced", "sizes of the world model, see rollout.py")
    policy: Literal["paper", "small", "tiny", "smoke"] = opt("tiny", "sizes of the policy")
    out: str = opt("results/rft_step.json", "JSON file to write")
    device: Literal["cpu", "cuda"] = opt("cpu", "where to run; cuda computes the frozen networks in bfloat16")
    perceptual: Literal["lpips", "ssim", "none"] = opt("ssim", "perceptual term; lpips with a random VGG-16")
    starts: int = opt(16, "starts S")
    group: int = opt(16, "rollouts G per start")
    compile: bool = opt(False, "compile the pixel decoder and the perceptual network, of both versions")
    micro_starts: int | None = opt(None, "starts per backward pass; none takes all")
    repeats: int = opt(3, "timed steps of each version")


PRESETS = {"paper": Config(), "smoke": Config(sizes="smoke", policy="smoke", starts=2, group=3, repeats=1)}


@dataclass(frozen=True)
class Step(RolloutConfig, ObjectiveConfig):
    """What a step is made of."""


class Phases:
    """Seconds of named parts of a step, without those of parts inside: methods and functions are wrapped where the step
    finds them, as long as the context lasts.

    Args:
        device: whose queue is waited for.
        places: (owner, attribute, phase).
    """

    def __init__(self, device: str, places: list[tuple[object, str, str]]) -> None:
        self.device, self.places = device, places
        self.seconds = dict.fromkeys((phase for _, _, phase in places), 0.0)
        self.inside = [0.0]  # seconds of parts within each part that runs now

    def __enter__(self) -> "Phases":
        self.before = [(owner, name, vars(owner).get(name)) for owner, name, _ in self.places]
        for owner, name, phase in self.places:
            setattr(owner, name, self._timed(getattr(owner, name), phase))
        return self

    def __exit__(self, *error: object) -> None:
        for owner, name, before in self.before:
            delattr(owner, name) if before is None else setattr(owner, name, before)

    def _timed(self, call: Callable, phase: str) -> Callable:
        @wraps(call)
        def timed(*args: object, **kwargs: object) -> object:
            synchronize(self.device)
            started = time.perf_counter()
            self.inside.append(0.0)
            result = call(*args, **kwargs)
            synchronize(self.device)
            spent = time.perf_counter() - started
            self.seconds[phase] += spent - self.inside.pop()
            self.inside[-1] += spent
            return result

        return timed


class Workload:
    """Policy, world model, a batch of made-up starts, and both versions of the step."""

    def __init__(self, cfg: Config) -> None:
        torch.manual_seed(0)
        device, sizes = cfg.device, rollout_benchmark.SIZES[cfg.sizes]
        self.policy = VLAPolicy(POLICIES[cfg.policy]).to(device)
        flow = self.policy.cfg.flow
        torch.nn.init.normal_(self.policy.head.net.dit.out.weight, std=0.02)  # its initial zero has no gradient behind
        samples = torch.rand(256, flow.action_dim) * 2 - 1, torch.randn(256, flow.proprio_dim)
        self.policy.normalizer.fit(*samples)
        self.policy.make_stochastic("sigma_net")
        self.policy.requires_grad_(False).eval()
        trained = [*self.policy.head.parameters(), *self.policy.sigma_net.parameters()]
        for parameter in trained:
            parameter.requires_grad_(True)
        self.policy.to(device)
        self.world_model = WorldModel(sizes).to(device).eval().requires_grad_(False)
        self.distance = random_perceptual(cfg.perceptual).to(device)
        if device == "cuda":
            self.world_model.to_bfloat16()
            self.distance.to_bfloat16()
        if cfg.compile:
            self.world_model.tokenizer.cond_decoder.compile()
            self.distance.compile_network()
        self.optimizer = torch.optim.AdamW(trained, lr=0.0)  # the same weights for every timed step
        names = {"perceptual": cfg.perceptual, "imagination": "greedy", "divide_by_std": True}
        self.step = Step(group=cfg.group, bf16=device == "cuda", micro_starts=cfg.micro_starts, mse_draws=16, **names)
        rows, steps, size = cfg.starts, flow.chunk, sizes.tokenizer.image_size
        with torch.device(device):
            frames = torch.rand(rows, steps + 1, 3, *size)
            actions = torch.rand(rows, steps, flow.action_dim) * 2 - 1
            proprio = torch.randn(rows, flow.proprio_dim)
            index, key = torch.zeros(rows, 2, dtype=torch.long), torch.zeros(rows, 3)
        instructions = [f"pick up block {i}" for i in range(rows)]
        self.batch = Batch(frames, actions, actions, proprio, instructions, frames[:, 0], key, index)

    def in_bfloat16(self) -> "Workload":
        """The same step with its frozen networks in bfloat16."""
        low = copy(self)
        low.world_model, low.distance = deepcopy(self.world_model).to_bfloat16(), deepcopy(self.distance)
        low.distance.to_bfloat16()
        low.step = replace(self.step, bf16=True)
        return low

    def ours(self) -> Rollouts:
        """The step as `train_rft.py` does it."""
        rollouts = collect(self.step, self.policy, self.world_model, self.batch, self.distance, (0, 0))
        update(self.step, self.policy, self.optimizer, rollouts, (0, 0))
        return rollouts

    def straightforward(self) -> Rollouts:
        """The same step, every rollout on its own."""
        step, group, starts = self.step, self.step.group, len(self.batch.frames)
        rows = Batch(*(_repeated(value, group) for value in self.batch))
        context = encode(step, self.policy, rows.frames[:, 0], rows.instructions, starts)
        chain = sample_group(self.policy, context, rows.proprio, 1, (0, 1), 0, 0, 0, 0)
        actions = self.policy.normalizer.decode_actions(chain.x[:, -1])[:, None]  # (S * G, 1, T, A)
        reward = verified_reward(
            "r3", self.world_model, actions, rows.actions, rows.frames, perceptual=self.distance, **reward_options(step)
        )
        advantage = advantages(reward.reward.view(starts, group), divide_by_std=step.divide_by_std).view(-1, 1)
        played = (PlayedChunk(context, rows.proprio, chain),)
        rollouts = Rollouts(rows, played, reward, advantage, {})
        micro = None if step.micro_starts is None else step.micro_starts * group
        alone = Step(group=1, micro_starts=micro, mse_draws=max(1, step.mse_draws // group))
        update(alone, self.policy, self.optimizer, rollouts, (0, 0))
        return rollouts


def _repeated(value: Tensor | list[str], group: int) -> Tensor | list[str]:
    if isinstance(value, list):
        return [text for text in value for _ in range(group)]
    return value.repeat_interleave(group, 0)


def random_perceptual(name: str) -> PerceptualDistance:
    """The perceptual distance; lpips with random VGG-16 weights, which cost what trained ones cost."""
    if name != "lpips":
        return perceptual(name)
    import lpips

    backbone = lpips.LPIPS(net="vgg", pnet_rand=True, verbose=False).net.state_dict()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "random_vgg16.pth"
        torch.save({f"features.{key.split('.', 1)[1]}": value for key, value in backbone.items()}, path)
        return perceptual(name, path)


def time_phases(cfg: Config, work: Workload, version: Callable[[], object]) -> dict[str, float]:
    """Seconds of the parts of one step."""
    tokenizer = work.world_model.tokenizer
    places = [
        (work.policy, "encode", "vision-language model"),
        (tokenizer, "encode_context", "tokens of the starts"),
        (tokenizer, "encode_future", "tokens of the starts"),
        (work.world_model, "_prefill", "prefill"),
        (work.world_model, "rollout_tokens", "transformer"),
        (tokenizer, "decode", "pixels"),
        (work.distance, "features", "perceptual"),
        (work.distance, "distance_to", "perceptual"),
        (sys.modules[__name__], "update", "update"),
    ]
    with Phases(cfg.device, places) as phases:
        total = seconds(version, cfg.device)
    found = phases.seconds
    return {**found, "chains and the rest": total - sum(found.values()), "total": total}


def differences(one: Rollouts, other: Rollouts) -> dict[str, float]:
    """Largest differences of the sampled actions and of the rewards."""
    return {
        "actions": (one.chunks[0].chain.x - other.chunks[0].chain.x).abs().max().item(),
        "rewards": (one.reward.reward.flatten() - other.reward.reward.flatten()).abs().max().item(),
    }


def main(cfg: Config) -> dict:
    """Time, compare, write; returns what the JSON file holds.

    Raises:
        RuntimeError: the two versions disagree.
    """
    work = Workload(cfg)
    versions = {"ours": work.ours, "straightforward": work.straightforward}
    works = {"ours": work, "straightforward": work}
    if cfg.device == "cpu":
        works["ours, bfloat16"] = low = work.in_bfloat16()
        versions["ours, bfloat16"] = low.ours
    found = {name: version() for name, version in versions.items()}
    ours, plain = found["ours"], found["straightforward"]
    difference = differences(plain, ours)
    tolerance = 0.05 if cfg.device == "cuda" else 1e-3
    for name, value in difference.items():
        if not value <= tolerance:
            raise RuntimeError(f"{name} of the two versions differ by {value:.3g} > {tolerance}")
    if cfg.device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    timings = alternate(versions, cfg.repeats, cfg.device, warmup=0)
    peak = peak_rate(cfg.device)
    rows = {}
    for name, version in versions.items():
        work_done, t = floating_point_work(version), timings[name]
        rows[name] = {**t._asdict(), "flops": work_done, "share_of_peak": work_done / t.median / peak}
        rows[name]["phases"] = time_phases(cfg, works[name], version)
        rows[name]["largest_difference"] = differences(found[name], ours)
    second = timings["straightforward"]
    report = {
        "command": "python benchmarks/rft_step.py",
        "config": to_dict(cfg),
        **machine(cfg.device),
        "peak_flops_per_s": peak,
        "versions": rows,
    }
    for name in rows.keys() - {"straightforward"}:
        t = timings[name]
        rows[name] |= {
            "times_faster": second.median / t.median,
            "spread": [second.least / t.most, second.most / t.least],
        }
    if cfg.device == "cuda":
        report["peak_gib"] = torch.cuda.max_memory_allocated() / 2**30
    print(f"{'':<24}" + "".join(f"{name:>18}" for name in rows) + "  [s]")
    for phase in rows["ours"]["phases"]:
        print(f"{phase:<24}" + "".join(f"{row['phases'][phase]:>18.3f}" for row in rows.values()))
    for name, row in rows.items():
        if "spread" in row:
            print(f"{name}: {row['times_faster']:.2f} times faster [{row['spread'][0]:.2f}, {row['spread'][1]:.2f}]")
    write_json(cfg.out, report)
    return report


if __name__ == "__main__":
    main(parse(Config, PRESETS, sys.argv[1:], __doc__.splitlines()[0]))
