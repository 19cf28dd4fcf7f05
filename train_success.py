"""Beyond the paper: train a success model, the judge of imagined episodes, on real episodes with outcomes.

    python collect_demos.py --preset tiny --demos-per-task 0 --noisy-per-task 0 --policy runs/sft \\
        --policy-per-task 32 --out-dir own
    python train_wm.py --preset tiny --init runs/wm --demos demos own --validation-fraction 0.25 --steps 500 \\
        --out-dir runs/wm2
    python train_success.py --preset tiny --demos demos own --world-model runs/wm2 --out-dir runs/success

The model looks at a frame, the episode's first frame and the instruction, and gives a probability of success and a
progress (vlarft/success.py). It trains on frames of whole episodes, each in three versions: as recorded; as the world
model's tokenizer decodes it; and as the world model imagines it from the first frame and all actions, with the true
outcome as the label. The last frames of a success are positive, those shortly before are left out, all others are
negative; a failed episode has negatives only. So failures of the policy that is to be fine-tuned are needed, near
misses above all: on demonstrations alone, every block beside the bin would be a block in the bin.

Episodes that the world model holds out are held out here, so that judged imaginations are of episodes that neither
model has seen. On half of them, attempts of one start together, the threshold is chosen: the one with which judged and
true outcomes agree best, with at most `--false-successes` of the failures judged a success. The others measure how well
that does, and are what the gate of train_rl.py asks about.

Reads episodes with outcomes (HDF5, LeRobot) and a world model of train_wm.py; `--world-model none` leaves out the two
imagined versions, for a judge of real frames. Writes to out_dir: model.safetensors, train_state.pt, log.jsonl,
config.json, inputs.json; and, while the run goes on, imagined.pt. The same command resumes an interrupted run.

Runs in one process.
"""

import warnings
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from itertools import groupby
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import torch

from vlarft.data import load_episodes, split_episodes
from vlarft.data.consistency import check_outcomes, warn_other_contents
from vlarft.data.convention import check_image_size, check_same_images, image_convention
from vlarft.data.episode import Episode, episode_digests
from vlarft.data.episodes import split_facts
from vlarft.imagined_episodes import spread_episodes
from vlarft.run import distributed, preemption
from vlarft.run.checkpoint import (
    checkpoint_file,
    load_train_state,
    model_digest,
    open_run,
    read_header,
    write_atomic,
)
from vlarft.run.clock import Clock, Decay, rate_factor
from vlarft.run.config import Count, Positive, ProperShare, Rate, Rows, ShareBelow1, Whole, opt, to_dict
from vlarft.run.log import RunLog, check_finite
from vlarft.run.precision import Precision, in_bf16
from vlarft.run.random import seed_of
from vlarft.run.script import run_script
from vlarft.run.train_state import TrainState, check_same_episodes
from vlarft.success import PRESETS as SIZES
from vlarft.success import SuccessModel, best_threshold, compare_outcomes, own_attempts
from vlarft.success_frames import FrameTable, Version, frame_table, replayed, versions
from vlarft.world_model import WorldModel

WEIGHT_DECAY = 0.01


@dataclass(frozen=True)
class Config:
    """One training; no paper gives the numbers, the defaults are for images of 256 px."""

    demos: tuple[str, ...] = opt(("demos",), "folders or files of episodes with outcomes", group="data")
    camera: str = opt("agentview", "camera of the episodes")
    world_model: str | None = opt(
        "runs/wm", "world model that replays them: run folder or file; none: real frames only"
    )
    validation_fraction: ProperShare = opt(0.1, "share of the episodes held out, without a world model")
    split_seed: Whole = opt(0, "seed of the choice of held-out episodes, without a world model")
    episodes: Count | None = opt(200, "episodes of each kind and outcome to train on, at most; none: all")
    frames: Count = opt(8, "frames of each episode beside the positive ones")
    positive: Count = opt(4, "last frames of a successful episode that show the success")
    margin: Whole = opt(12, "frames before these that are left out, neither success nor failure")

    size: Literal["paper", "tiny", "smoke"] = opt("paper", "named sizes of the success model", group="model")

    steps: Count = opt(10_000, "optimizer steps", group="optimisation")
    max_minutes: Positive | None = opt(None, "stop after this wall time; the schedule then follows the clock [min]")
    batch_size: Rows = opt(64, "frames per step, half of them positive")
    lr: Rate = opt(1e-3, "peak learning rate of AdamW")
    warmup: Whole = opt(100, "steps of linear warmup")
    schedule: Decay = opt("cosine", "learning rate after the warmup")
    clip_norm: Positive = opt(1.0, "largest gradient norm")
    precision: Precision = opt("bf16", "autocast of the networks; auto: bf16 where the processor or GPU has it")

    false_successes: ShareBelow1 = opt(
        0.02, "largest share of held-out failures that the threshold may judge a success", group="evaluation"
    )
    validation_interval: Count = opt(1000, "steps between validations")

    out_dir: str = opt("runs/success", "folder that the run writes", group="run")
    seed: Whole = opt(0, "seed of the weights, the frames and the imaginations")
    log_interval: Count = opt(50, "steps between log lines")
    save_interval: Count = opt(1000, "steps between checkpoints")
    async_save: bool = opt(False, "write checkpoints in a thread while training goes on")

    def __post_init__(self) -> None:
        if self.batch_size % 2:
            raise ValueError(f"--batch-size {self.batch_size}: half of the frames are positive, give an even number")


TINY = Config(
    size="tiny", steps=1000, validation_interval=500, save_interval=500, precision="auto", frames=24,
    positive=8, margin=4,  # Tabletop's recordings go on for eight steps after the success
)  # fmt: skip
PRESETS = {
    "paper": Config(),
    "small": Config(steps=5000),
    "libero": TINY,
    "tiny": TINY,
    "smoke": replace(
        TINY, size="smoke", precision="fp32", steps=20, validation_interval=10, save_interval=10, batch_size=8,
        frames=4, warmup=2,
    ),
}  # fmt: skip


class Split(NamedTuple):
    """Episodes to train on, to choose the threshold on, and to measure on."""

    train: list[Episode]
    threshold: list[Episode]
    held_out: list[Episode]


def load_split(cfg: Config) -> Split:
    """Load and split the episodes; those that the world model holds out, where there is one, are not trained on.

    Raises:
        ValueError: an attempt of unknown outcome; a part that lacks one of the outcomes; or a world model that names no
            held-out episodes among them.
    """
    episodes, where = load_episodes(cfg.demos, cfg.camera, successes_only=False), " ".join(cfg.demos)
    check_outcomes(episodes, where)
    episodes = [e for e in episodes if len(e) > 1]  # a first frame is compared with, not judged
    if cfg.world_model is None:
        train, held_out = split_episodes(episodes, cfg.validation_fraction, cfg.split_seed)
        more = "give a larger --validation-fraction"
    else:
        more = "train or refresh the world model on them with a larger --validation-fraction"
        facts = read_header(cfg.world_model).extra
        warn_other_contents(facts, f"world model {cfg.world_model}", episodes)
        names = set(facts.get("held_out_episodes", []))
        train, held_out = ([e for e in episodes if (e.name in names) == part] for part in (False, True))
        if not held_out:
            raise ValueError(
                f"{cfg.world_model} holds out none of the {len(episodes)} episodes of {where}: give the episodes that "
                "it was trained on"
            )
    held_out.sort(key=lambda e: (e.kind, e.success, e.name))
    for part, chosen in (("training", train), ("held-out", held_out)):
        successes = sum(e.success for e in chosen)
        if not 0 < successes < len(chosen):
            raise ValueError(
                f"{successes} of the {len(chosen)} {part} episodes of {where} succeeded: a success model needs both "
                "outcomes. Record the policy's own attempts (collect_demos.py --policy, docs/closed_loop.md), give "
                f"their folder with --demos, and {more}"
            )
    starts = list(dict.fromkeys(e.start or e.name for e in held_out))  # attempts of one start stay together
    parts = tuple([e for e in held_out if starts.index(e.start or e.name) % 2 == part] for part in (0, 1))
    if not all(0 < sum(e.success for e in part) < len(part) for part in parts):
        warnings.warn(
            f"{successes} of the {len(held_out)} held-out episodes of {where} succeeded: too few of one outcome to "
            "choose the threshold on some and to measure on others. All serve both, so the figures, and the gate of "
            "train_rl.py, flatter the success model; hold out more (train_wm.py --validation-fraction)",
            stacklevel=2,
        )
        parts = held_out, held_out
    return Split(train, *parts)


def at_most(episodes: list[Episode], count: int | None) -> list[Episode]:
    """Take up to `count` episodes of each kind and outcome, evenly spaced."""
    if count is None:
        return episodes
    ordered = sorted(episodes, key=lambda e: (e.kind, e.success))
    groups = [list(group) for _, group in groupby(ordered, lambda e: (e.kind, e.success))]
    return [e for group in groups for e in spread_episodes(group, count)]


def prepared(
    cfg: Config, split: Split, model: WorldModel | None, digest: str | None, autocast: AbstractContextManager
) -> tuple[FrameTable, list[list[Version]]]:
    """Make the frames to train on and the whole episodes of the two other parts; what an interrupted run imagined for
    them is read from out_dir/imagined.pt.

    Args:
        digest: of the world model's file; another one, or other episodes, are imagined anew.
    """
    path, parts = Path(cfg.out_dir) / "imagined.pt", (split.threshold, split.held_out)
    about = {"world_model": digest, "episodes": [list(episode_digests(part).items()) for part in split]}
    if path.is_file() and (kept := load_train_state(path)).get("about") == about:
        real = [list(versions(part, None, autocast)) for part in parts]
        again = [
            [Version(next(e for e in part if e.name == name), "imagined", frames) for name, frames in found]
            for part, found in zip(parts, kept["imagined"], strict=True)
        ]
        return FrameTable(*kept["table"]), [a + b for a, b in zip(real, again, strict=True)]
    shown = versions(at_most(split.train, cfg.episodes), model, autocast, cfg.seed)
    options = {"positive": cfg.positive, "margin": cfg.margin, "others": cfg.frames, "seed": cfg.seed}
    table = frame_table(shown, **options)
    whole = [replayed(part, model, autocast, cfg.seed) for part in parts]
    if model is not None:
        shown = [[(v.episode.name, v.frames) for v in part if v.kind == "imagined"] for part in whole]
        kept = {"about": about, "table": list(table), "imagined": shown}
        write_atomic(path, lambda tmp: torch.save(kept, tmp))
    return table, whole


@torch.no_grad()
def judged(model: SuccessModel, found: Sequence[Version], autocast: AbstractContextManager) -> dict[str, tuple]:
    """Judge whole episodes: kind of frames -> the highest probability that each held, and the true outcomes."""
    device, values = next(model.parameters()).device, {}
    for episode, kind, frames in found:
        with autocast:
            highest = model.highest(frames.to(device).float() / 255, episode.instruction)
        values.setdefault(kind, []).append((highest, episode.success))
    return {kind: tuple(zip(*pairs, strict=True)) for kind, pairs in values.items()}


def validate(
    model: SuccessModel,
    to_choose: Sequence[Version],
    to_measure: Sequence[Version],
    cfg: Config,
    autocast: AbstractContextManager,
) -> tuple[dict[str, float], float]:
    """Choose the threshold on some whole episodes and measure on others, neither of them trained on.

    Where attempts of a policy with both outcomes are among them, only these count, as in the gate of train_rl.py, see
    `own_attempts`.

    Returns:
        Metrics of each kind of frames: `agreement` of judged and true outcomes, `false_successes` and `false_failures`
        as shares of the failures and successes, and the Brier score of an episode's highest probability; and the
        threshold, chosen on the imagined episodes where there are any.
    """
    to_choose, to_measure = (
        [v for v in part if any(v.episode is e for e in own_attempts([v.episode for v in part]))]
        for part in (to_choose, to_measure)
    )
    failures = sum(not v.episode.success for v in to_choose) // len({v.kind for v in to_choose})
    if failures * cfg.false_successes < 1:
        warnings.warn(
            f"the threshold is chosen on {failures} failures, of which --false-successes {cfg.false_successes:g} "
            "allows none to look like a success: one odd failure decides it. Hold out more attempts, or allow more",
            stacklevel=2,
        )
    values = judged(model, to_choose, autocast)
    threshold = best_threshold(*values.get("imagined", values["real"]), cfg.false_successes)
    if threshold > 1:
        warnings.warn(
            "among the held-out episodes, failures look as much like a success as successes do: nothing is judged a "
            "success. Record more attempts, train longer, or allow more false successes than "
            f"--false-successes {cfg.false_successes:g}",
            stacklevel=2,
        )
    metrics = {}
    for kind, (highest, true) in judged(model, to_measure, autocast).items():
        agreed = compare_outcomes([value >= threshold for value in highest], true)
        metrics |= {
            f"{kind}_agreement": agreed.agreement,
            f"{kind}_false_successes": agreed.false_successes / agreed.true_failures,
            f"{kind}_false_failures": agreed.false_failures / agreed.true_successes,
            f"{kind}_brier": float(np.mean([(value - success) ** 2 for value, success in zip(highest, true)])),
        }
    return metrics | {"threshold": threshold}, threshold


def main(cfg: Config) -> dict[str, float]:
    """Train, or resume; return the metrics of the last validation."""
    device = distributed.setup()
    if distributed.world_size() > 1:
        raise ValueError("train_success.py runs in one process: leave torchrun out")
    autocast = torch.autocast(device.type, torch.bfloat16, enabled=in_bf16(cfg.precision, device))
    split = load_split(cfg)
    train, images, world_model = split.train, image_convention(split.train, cfg.camera), None
    if cfg.world_model is not None:
        world_model = WorldModel.load(cfg.world_model, device).requires_grad_(False)
        path = checkpoint_file(cfg.world_model)
        where = f"the episodes {' '.join(cfg.demos)}"
        check_same_images(read_header(path).extra, f"world model {path}", images, where)
        check_image_size(world_model.cfg.tokenizer.image_size, f"world model {path}", train[0])
    size = SIZES[cfg.size]
    height, width = train[0].images.shape[1:3]
    if height != width:
        raise ValueError(f"{cfg.demos[0]} has images of {height}x{width}: a success model takes square ones")
    size = replace(size, encoder=replace(size.encoder, image_size=height))
    torch.manual_seed(seed_of("weights", cfg.seed))
    model = SuccessModel(size).to(device)
    everything = [*train, *split.threshold, *split.held_out]
    facts = {
        **split_facts(train, split.held_out),
        "threshold_episodes": [e.name for e in split.threshold],
        "episode_digests": episode_digests(everything),
        **images,
    }
    open_run(cfg.out_dir, cfg, models=("world_model",))
    check_same_episodes(cfg.out_dir, facts)
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=cfg.lr, weight_decay=WEIGHT_DECAY)
    state = TrainState(cfg.out_dir, {"model": model, "optimizer": optimizer}, cfg.async_save)
    new = {"step": 0, "minutes": 0.0, "threshold": size.threshold, "metrics": {}}
    step, minutes, threshold, metrics = state.load(**new)
    log, clock = RunLog(cfg.out_dir, cfg.steps, "success", step), Clock(cfg.steps, cfg.max_minutes, minutes)
    if clock.share(step) >= 1:  # complete: nothing is imagined for it
        state.finish(log)
        return metrics

    digest = None if cfg.world_model is None else model_digest(cfg.world_model)
    with clock.paused():  # --max-minutes are of training
        table, whole = prepared(cfg, split, world_model, digest, autocast)
    facts |= {"instructions": sorted(set(table.instructions)), "world_model": digest}

    def save() -> None:
        values = {"step": step, "minutes": clock.minutes, "threshold": threshold, "metrics": metrics}
        config = replace(size, threshold=threshold)
        state.save(values, model, config, {**facts, "metrics": metrics, "success": to_dict(cfg)})

    share = clock.share(step)
    while share < 1:
        model.train()
        rate = cfg.lr * rate_factor(step, share, cfg.warmup, cfg.schedule)
        for group in optimizer.param_groups:
            group["lr"] = rate
        optimizer.zero_grad(set_to_none=True)
        with autocast:
            loss, terms = model.loss(*table.batch(cfg.batch_size, cfg.seed, step, device))
        loss.backward()
        line = {"loss": loss.item(), **{name: value.item() for name, value in terms.items()}}
        line["grad_norm"] = distributed.clip_grad_norm(parameters, cfg.clip_norm)
        check_finite(line["loss"], step, line, lambda: [f"of {' '.join(cfg.demos)}"])
        optimizer.step()
        step += 1
        share = clock.share(step)
        if validates := step % cfg.validation_interval == 0 or share >= 1:
            model.eval()
            with clock.paused():
                metrics, threshold = validate(model, *whole, cfg, autocast)
        if validates or step % cfg.log_interval == 0:
            log.log(step - 1, {**line, "lr": rate, "minutes": clock.minutes, **(metrics if validates else {})})
        if share < 1 and state.due(step, cfg.save_interval):
            save()

    (Path(cfg.out_dir) / "imagined.pt").unlink(missing_ok=True)  # a kill after it leaves none behind
    save()
    state.finish(log)
    return metrics


if __name__ == "__main__":
    run_script(main, Config, PRESETS, __doc__, preemption.deferred)
