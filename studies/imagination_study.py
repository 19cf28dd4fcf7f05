"""What makes imagination last an episode: tokenizers and world models of equal training time, one change at a time.

    python studies/base.py                          makes demonstrations and a policy of tabletop_object
    python studies/imagination_study.py             trains and measures every arm and seed

For each suite, arm and seed: `train_tokenizer.py` and `train_wm.py --preset tiny` on one core, each for `--minutes` of
its time (CPU time, so that what else the machine does counts little). The arm `before` is the preset of commit 95183a2,
and trains for that preset's steps; `minutes` in the JSON file says whether it had as much time. "actions drive the
frames" is the preset but for that, as the paper has it; "poses drive the frames" is the preset. The other arms change
the former in one respect each. All train in float32. Then `eval_wm.py --true-error` on the same held-out episodes and
starts for all seeds. Figures: single chunks (PSNR on moving pixels, SSIM); Spearman's rank correlation of R3 with the
true state over perturbed chunks, and over chunks that a policy samples (`wm_study.near_policy`); whole episodes from
their first frame (each episode's last chunk); PSNR on moving pixels of the tokenizer alone, and its error on what is
carried (`carried_error`); future codes in use. Runs that are finished are not run again; the JSON file gathers several
invocations.
"""

import json
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
from base import demos_and_policy
from records import rounded, write
from stage_tables import imagination_arms_table
from stages import check_known, commit, machine, read_lines, read_report
from wm_study import near_policy

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # where the stage scripts are, which are no package
import eval_wm
import train_tokenizer
import train_wm
from vlarft import tokenizer_loss
from vlarft.data.episodes import load_episodes
from vlarft.data.windows import WindowSampler
from vlarft.run import clock
from vlarft.run.checkpoint import read_header
from vlarft.run.config import opt, parse
from vlarft.run.pixels import to_floats
from vlarft.tokenizer import FrameTokenizer


class Arm(NamedTuple):
    """Changes of preset tiny: options of both training scripts, of each one, and sizes of the networks."""

    both: Mapping[str, Any] = {}
    tokenizer: Mapping[str, Any] = {}
    model: Mapping[str, Any] = {}
    network: Mapping[str, Any] = {}  # TokenizerConfig
    transformer: Mapping[str, Any] = {}
    weighting: Mapping[str, Any] = {}  # of the tokenizer's loss
    generated_loss: bool = True


WIDE = {"width": 192, "num_heads": 6, "num_kv_heads": 6, "ffn_dim": 512}
CHANNELS = {"block_channels": (32, 64)}
PLAIN = {"rare": 1.0}
BEFORE = Arm(
    both={"context_lookback": 0},
    tokenizer={"batch_size": 8, "steps": 1100},
    model={"steps": 1500},
    network={**CHANNELS, "compose": False},
    transformer=WIDE,
    weighting={"still": 0.6, **PLAIN},
)
ARMS = {
    "before": BEFORE,
    "actions drive the frames": Arm(),
    "poses drive the frames": Arm(model={"pose_dims": 6}),
    "context: the chunk's first frame": Arm(both={"context_lookback": 0}),
    "no composition": Arm(network={"compose": False}),
    "composition without a loss of its own for what it hides": Arm(generated_loss=False),
    "tokenizer: channels and batch as before": Arm(network=CHANNELS, tokenizer={"batch_size": 8}),
    "codes of still patches: pulled to 0 four times as strongly": Arm(weighting={"still": 2.0}),
    "pixels of rare colours: no heavier": Arm(weighting=PLAIN),
    "transformer: width as before": Arm(transformer=WIDE),
}


@dataclass(frozen=True)
class Config:
    runs: str = opt("runs/imagination", "folder for the arms, and for demonstrations and policies that are missing")
    base: str = opt("runs/base", "folder of base.py: demonstrations and SFT policy of tabletop_object")
    out: str = opt("runs/imagination.json", "JSON file to write")
    suites: tuple[str, ...] = opt(("tabletop_object", "tabletop_spatial"), "suites, four tasks of each")
    arms: tuple[str, ...] = opt(tuple(ARMS), "arms to run")
    seeds: tuple[int, ...] = opt((0, 1, 2), "seeds of the training")
    starts: int = opt(32, "starts of the rank correlations")
    samples: int = opt(12, "chunks that the policy samples at each of them")
    episodes: int = opt(32, "held-out episodes that are imagined whole")
    minutes: tuple[float, float] = opt((3.3, 6.6), "minutes of tokenizer and world model, of all arms but `before`")
    stage_preset: str = opt("tiny", "preset of the stages")


PRESETS = {
    "paper": Config(),
    "smoke": Config(
        suites=("tabletop_object",), arms=("actions drive the frames",), seeds=(0,), starts=2, samples=3, episodes=2,
        stage_preset="smoke",
    ),
}  # fmt: skip


def material(cfg: Config, suite: str) -> Path:
    """Return a folder with `demos` and `sft` of a suite: base.py's, or one that is made."""
    if suite == "tabletop_object":
        return Path(cfg.base)
    folder = Path(cfg.runs) / suite
    demos_and_policy(folder, suite, cfg.stage_preset)
    return folder


def train(cfg: Config, arm: Arm, timed: bool, demos: Path, folder: Path, seed: int) -> None:
    """Train an arm's tokenizer and world model, unless that is done."""
    preset = cfg.stage_preset
    own_loss, sizes = tokenizer_loss.generated_error, (train_tokenizer.SIZES[preset], train_wm.SIZES[preset])
    weights = train_tokenizer.WEIGHTINGS["small_objects"]
    try:
        train_tokenizer.SIZES[preset] = replace(sizes[0], **arm.network)
        train_wm.SIZES[preset] = replace(sizes[1], transformer=replace(sizes[1].transformer, **arm.transformer))
        train_tokenizer.WEIGHTINGS["small_objects"] = replace(weights, **arm.weighting)
        clock.time = SimpleNamespace(monotonic=time.process_time)
        if not arm.generated_loss:
            tokenizer_loss.generated_error = lambda *_: torch.zeros(())
        common = {"demos": (str(demos),), "seed": seed, "split_seed": 0, "precision": "fp32", **arm.both}
        for number, (script, name, changes) in enumerate(
            ((train_tokenizer, "tokenizer", arm.tokenizer), (train_wm, "wm", {"tokenizer": str(folder / "tokenizer")}))
        ):
            if (folder / name / "done").is_file():
                continue
            if name == "wm":
                changes = {**changes, "pose_dims": 0, **arm.model}
            if timed:
                changes = {"steps": 100_000, "max_minutes": cfg.minutes[number], **changes}
            script.main(replace(script.PRESETS[preset], **common, **changes, out_dir=str(folder / name)))
            (folder / name / "done").touch()
    finally:
        train_tokenizer.SIZES[preset], train_wm.SIZES[preset] = sizes
        train_tokenizer.WEIGHTINGS["small_objects"] = weights
        tokenizer_loss.generated_error, clock.time = own_loss, time


def measure(cfg: Config, demos: Path, policy: Path, folder: Path) -> dict:
    """Measure a trained arm; return its figures."""
    model = folder / "wm" / "model.safetensors"
    measured = folder / "eval" / "results.json"
    if not measured.is_file():
        options = {"true_error": True, "starts": cfg.starts, "episodes": cfg.episodes, "out_dir": str(folder / "eval")}
        eval_wm.main(replace(eval_wm.PRESETS[cfg.stage_preset], world_model=str(model), demos=(str(demos),), **options))
    results = json.loads(measured.read_text())
    near = near_policy(SimpleNamespace(base=policy.parent, starts=cfg.starts, samples=cfg.samples), folder / "wm")
    logs = {name: read_lines(folder / name / "log.jsonl")[-1] for name in ("tokenizer", "wm")}
    chunk, last = results["frames"]["all"], results["episodes"]["last_chunk"]
    return {
        "steps": [log["step"] + 1 for log in logs.values()],
        "minutes": [log["minutes"] for log in logs.values()],
        "codes": codes_in_use(folder / "tokenizer" / "model.safetensors", demos),
        "carried_error": carried_error(folder / "tokenizer" / "model.safetensors", demos),
        "tokenizer_psnr_moving": read_header(folder / "tokenizer").extra["metrics"]["val_psnr_moving"],
        "psnr_moving": [chunk[how]["psnr_moving"][-1] for how in ("imagined", "copy")],
        "ssim": [chunk[how]["ssim"][-1] for how in ("imagined", "copy")],
        "decoded_frames": results["sensitivity"]["true state"]["decoded frames"]["all"]["spearman"],
        "r3": results["sensitivity"]["true state"]["R3 greedy"]["all"],
        "r3_policy": {name: value for name, value in near["greedy"].items() if name.startswith("gate_policy_true")},
        "last_chunk": {
            how: {name: last[how][name]["value"] for name in ("psnr_moving", "ssim", "still_error")}
            for how in ("imagined", "copy")
        },
        "last_chunk_difference": last["difference"]["ssim"],
        "chunks": results["episodes"]["chunks"],
    }


@torch.no_grad()
def codes_in_use(tokenizer: Path, demos: Path) -> int:
    """Count the different future codes in 64 held-out segments."""
    model, extra = FrameTokenizer.load(tokenizer), read_header(tokenizer).extra
    held_out = load_episodes(demos, successes_only=False, names=extra["held_out_episodes"])
    batch = WindowSampler(held_out, 9, 8, None).spread(64)
    return model.encode_future(batch.frames, model.encode_context(batch.context_frame)).unique().numel()


@torch.no_grad()
def carried_error(tokenizer: Path, demos: Path) -> list[float]:
    """Measure how well a tokenizer shows what is carried: mean absolute error of vivid pixels that differ from the
    episode's first frame, over held-out successes, decoded with that frame as context; and of the first frame itself.
    """
    model, extra = FrameTokenizer.load(tokenizer), read_header(tokenizer).extra
    totals, count = torch.zeros(2, dtype=torch.float64), 0
    held_out = load_episodes(demos, successes_only=False, names=extra["held_out_episodes"])
    for episode in (e for e in held_out if e.success):
        frames = to_floats(episode.images[:])  # (L, C, H, W)
        context = model.encode_context(frames[:1])
        decoded = model.decode(model.encode_future(frames[None], context)[:, None], context)[0, 0]
        largest, smallest = frames.amax(1), frames.amin(1)
        vivid = (largest > 0.6) & (largest - smallest > 0.3)  # a block is, the hand, the table and the bin are not
        moved = vivid & ((frames - frames[:1]).abs().amax(1) > 0.04)
        errors = [(shown - frames).abs().mean(1)[moved] for shown in (decoded, frames[:1])]
        totals += torch.tensor([error.sum() for error in errors])
        count += len(errors[0])
    return (totals / count).tolist()


def main(cfg: Config) -> dict:
    """Run what is missing; return what the JSON file holds."""
    check_known(cfg.arms, ARMS, "arm")
    torch.set_num_threads(1)
    report = read_report(cfg, "runs", free=("runs", "base", "out", "suites", "arms", "seeds"))
    report = {"command": "python studies/imagination_study.py", "machine": machine(), **report}
    for seed in cfg.seeds:
        for suite in cfg.suites:
            found = material(cfg, suite)
            for name in cfg.arms:
                slug = "".join(c if c.isalnum() else "_" for c in name)
                folder = Path(cfg.runs) / suite / f"{slug}_{seed}"
                train(cfg, ARMS[name], name != "before", found / "demos", folder, seed)
                figures = {"commit": commit(), **measure(cfg, found / "demos", found / "sft", folder)}
                report["runs"][f"{suite}/{name}/{seed}"] = rounded(figures)
                write(cfg.out, report)
    print("\n" + imagination_arms_table(report, tuple(ARMS)))
    return report


if __name__ == "__main__":
    main(parse(Config, PRESETS, sys.argv[1:], __doc__))
