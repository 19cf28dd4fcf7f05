"""Time one whole GRPO step against the straightforward pipeline, phase by phase, with random weights.

    python benchmarks/rft_step.py                                                                on any machine
    python benchmarks/rft_step.py --sizes pixels --out runs/benchmarks/rft_step_pixels.json
    python benchmarks/rft_step.py --sizes paper --device cuda --perceptual lpips --out results/rft_step_gpu.json

ours             the step of `train_rft.py`: the policy's context, the world model's prefix, and the reference's
                 rollout, frames and features are computed once per start
straightforward  all of these are computed once per rollout, and so is the context in the update; caches and batches as
                 in ours
as released      the operations of the public code, by count: as straightforward; in addition the reference is rolled
                 out separately for every rollout; all frames of each window are tokenised; transformers' `generate`
                 runs once per frame on the whole sequence, with its preallocated cache; the vision-language model runs
                 three times, to sample, to score and to update
ours, bfloat16   ours with `--precision bf16` (frozen networks in bfloat16); likewise `as released, bfloat16`. On a CPU
                 only, where the others are in float32; on a GPU all are in bfloat16

All versions sample the same chains, imagine greedily, and in float32 must give the same actions and rewards (`as
released` except for near ties of tokens, which rounding decides). The difference of bfloat16 is recorded. Phases are
timed inside the steps. FLOPs are counted in matrix products, convolutions and attentions; the share of the peak refers
to one large matrix product in float32 (on a GPU in bfloat16) in the same process. `--sizes reduced` has a quarter of
the paper's tokens per start and per frame, and most of its work in the transformer; `--sizes pixels` has most of it in
the pixel decoder, as the paper's sizes have. Writes one JSON file.
"""

import sys
import time
from collections.abc import Callable
from functools import wraps

import rft_versions
import rollout as rollout_benchmark
import torch
from rft_versions import PRESETS, Config, Rollouts, Workload
from timing import Timing, alternate, machine, peak_rate, ratio, seconds, synchronize

from vlarft.run.checkpoint import write_json
from vlarft.run.config import parse, to_dict


class Phases:
    """Context manager that times named phases of a step, each without the phases nested in it.

    Args:
        device: its queue is synchronised before and after each phase.
        places: (owner, attribute, phase): functions to wrap with a timer, and the phase that their time counts for.
    """

    def __init__(self, device: str, places: list[tuple[object, str, str]]) -> None:
        self.device, self.places = device, places
        self.seconds = dict.fromkeys((phase for _, _, phase in places), 0.0)
        self.inside = [0.0]  # seconds of the phases nested in each running phase

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


def time_phases(cfg: Config, work: Workload, version: Callable[[], object]) -> dict[str, float]:
    """Return the seconds of the phases of one step."""
    tokenizer = work.world_model.tokenizer
    places = [
        (work.policy, "encode", "vision-language model"),
        (tokenizer, "encode_context", "tokens of the starts"),
        (tokenizer, "encode_future", "tokens of the starts"),
        (work.world_model, "begin", "prefill"),
        (work.world_model, "rollout_tokens", "transformer"),
        (rollout_benchmark, "generate_frames", "transformer"),
        (tokenizer, "decode", "pixels"),
        (work.distance, "features", "perceptual"),
        (work.distance, "distance_to", "perceptual"),
        (rft_versions, "update", "update"),
    ]
    with Phases(cfg.device, places) as phases:
        total = seconds(version, cfg.device)
    found = phases.seconds
    return {**found, "chains and the rest": total - sum(found.values()), "total": total}


def differences(one: Rollouts, other: Rollouts) -> dict[str, float]:
    """Return the largest differences of sampled actions and rewards, and the share of rewards that differ by little."""
    rewards = (one.reward.sum(-1).flatten() - other.reward.sum(-1).flatten()).abs()
    return {
        "actions": (one.x.flatten(0, 1) - other.x.flatten(0, 1)).abs().max().item(),
        "rewards": rewards.max().item(),
        "equal_rewards": (rewards <= 1e-3).float().mean().item(),
    }


def check(device: str, difference: dict[str, dict[str, float]]) -> None:
    """Check that the versions compute the same.

    Raises:
        RuntimeError: they disagree.
    """
    tolerance = 0.05 if device == "cuda" else 1e-3
    # on a GPU in bfloat16, rounding decides near ties of tokens, and the rest of a row then differs
    for name in ("actions", "rewards") if device == "cpu" else ("actions",):
        if "straightforward" in difference and not (value := difference["straightforward"][name]) <= tolerance:
            raise RuntimeError(f"{name} of ours and of straightforward differ by {value:.3g} > {tolerance}")
    if device == "cpu" and "as released" in difference:
        share = difference["as released"]["equal_rewards"]
        if share < rollout_benchmark.NEARLY_ALL:
            raise RuntimeError(
                f"ours and as released agree on {share:.3f} of the rewards, expected {rollout_benchmark.NEARLY_ALL}"
            )


def times_faster(timings: dict[str, Timing], name: str) -> dict[str, dict[str, float]]:
    """Return baseline -> how many times as long as `name` it takes: median, least, most."""
    ratios = {other: ratio(timings[name], t) for other, t in timings.items() if not other.startswith("ours")}
    return {other: {"times": times, "least": low, "most": high} for other, (times, (low, high)) in ratios.items()}


def main(cfg: Config) -> dict:
    """Time and compare the versions; write the JSON file and return its content.

    Raises:
        RuntimeError: two versions disagree.
    """
    work = Workload(cfg)
    known = {"straightforward": work.straightforward, "as released": work.as_released}
    versions = {"ours": work.ours, **{name: known[name] for name in cfg.versions or ()}}
    works = dict.fromkeys(versions, work)
    if cfg.device == "cpu":
        low = work.in_bfloat16()
        versions["ours, bfloat16"] = low.ours
        if "as released" in (cfg.versions or ()):
            versions["as released, bfloat16"] = low.as_released
        works |= dict.fromkeys(versions.keys() - works.keys(), low)
    found: dict[str, Rollouts] = {}
    work_done = {}
    for name, version in versions.items():
        step = works[name].world_model, lambda name=name, version=version: found.update({name: version()})
        work_done[name] = rollout_benchmark.decoding_work(*step)
    difference = {name: differences(rollouts, found["ours"]) for name, rollouts in found.items()}
    check(cfg.device, difference)
    timings = alternate(versions, cfg.repeats, cfg.device, warmup=cfg.device == "cuda")
    peak = peak_rate(cfg.device)
    rows = {}
    for name, version in versions.items():
        done, t = work_done[name], timings[name]
        rows[name] = {**t._asdict(), "flops": done, "share_of_peak": done / t.median / peak}
        if cfg.device == "cuda":
            torch.cuda.reset_peak_memory_stats()
        rows[name]["phases"] = time_phases(cfg, works[name], version)
        if cfg.device == "cuda":
            rows[name]["peak_gib"] = torch.cuda.max_memory_allocated() / 2**30
        rows[name]["difference"] = difference[name]
    report = {
        "command": "python benchmarks/rft_step.py",
        "config": to_dict(cfg),
        **machine(cfg.device),
        "peak_flops_per_s": peak,
        "versions": rows,
        "times_faster": {name: times_faster(timings, name) for name in timings if name.startswith("ours")},
    }
    print(f"{'':<24}" + "".join(f"{name:>24}" for name in rows) + "  [s]")
    for phase in rows["ours"]["phases"]:
        print(f"{phase:<24}" + "".join(f"{row['phases'][phase]:>24.3f}" for row in rows.values()))
    for name, of in report["times_faster"].items():
        for other, row in of.items():
            print(f"{name}: {row['times']:.2f} times faster [{row['least']:.2f}, {row['most']:.2f}] than {other}")
    write_json(cfg.out, report)
    return report


if __name__ == "__main__":
    main(parse(Config, PRESETS, sys.argv[1:], __doc__))
