"""Train the world model: Eq. (3) on tokens of demonstrations, with a frozen tokenizer (stage I of the paper, Sec. 3.2).

    python train_wm.py --preset tiny --demos demos --tokenizer runs/tokenizer --out-dir runs/wm          laptop, minutes
    python train_wm.py --demos libero --tokenizer runs/tokenizer --out-dir runs/wm                        paper, 1 GPU
    torchrun --nproc-per-node 8 train_wm.py --demos libero --tokenizer runs/tokenizer --out-dir runs/wm   8 GPUs
    python train_wm.py --preset tiny --demos demos own_rollouts --init runs/wm --steps 500 --lr 5e-4 --out-dir runs/wm2

Reads demonstrations of any format (docs/data.md) and a tokenizer of train_tokenizer.py, or, with `--init`, a world
model. Writes out_dir/model.safetensors (tokenizer, action ranges, weights, config, the split by episode),
train_state.pt (the same command resumes), log.jsonl, config.json, inputs.json, rollouts.png.

The actions are the executed ones, in raw environment units; their ranges are those of the training split. A segment has
the policy's 8 actions and one frame more. A small network that predicts the robot's proprio after each action
(vlarft/proprio_model.py) is fitted first, and is a part of the model: a policy that acts in an imagination reads it,
and with `--pose-dims` it drives the frames.

`--init` starts from a world model of this script, for example to learn from episodes that the policy has played since
(docs/world_model.md), with a fresh optimizer and schedule: a new run. The world model keeps its sizes, its frozen
tokenizer and its action ranges, and `--size`, `--factored-tokens` and `--tokenizer` are not read. It keeps its split,
too: the episodes that it holds out must be among --demos and stay held out; of those that are new to it,
`--validation-fraction` is held out as well; all others train. The log begins with a validation before the first step,
on the same segments as those that follow.

Differences from the paper and its public code:
- the loss is on frame tokens only, as in Eq. (3); the public code's is also on action tokens;
- the vocabulary is 9008, as the token layout needs, which makes 127M parameters and not 138M;
- no weight decay (public code);
- the model of the robot's proprio; without `--pose-dims`, nothing of the frames depends on it;
- presets small, tiny, libero and smoke: the context frame is the segment's first or any earlier frame of the episode,
  so that an imagination can keep its first frame as context for a whole episode;
- presets tiny, libero and smoke: cosine schedule, stale input frames, factored tokens; sizes tiny and smoke learn a
  vector for a token's place in its frame or action and normalise the loss over future codes only. These make trainings
  of minutes work, see docs/world_model.md.
"""

import re
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Annotated, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from vlarft.data.consistency import warn_other_contents
from vlarft.data.convention import check_image_size, check_same_images, image_convention, warn_other_contexts
from vlarft.data.episodes import Episode, load_episodes, split_episodes, split_facts
from vlarft.data.windows import Batch, WindowSampler
from vlarft.metrics import moving_mask, pooled_psnr
from vlarft.proprio_model import fit_proprio_model
from vlarft.run import distributed, migration, preemption
from vlarft.run.checkpoint import checkpoint_file, open_run, read_header
from vlarft.run.clock import Clock, Decay, rate_factor
from vlarft.run.config import Count, Lookback, Positive, ProperShare, Range, Rate, Rows, ShareBelow1, Whole, opt
from vlarft.run.log import RunLog, check_finite
from vlarft.run.pictures import grid, import_pillow, save_png
from vlarft.run.precision import Precision, in_bf16
from vlarft.run.random import generator, seed_of
from vlarft.run.script import run_script
from vlarft.run.train_state import TrainState, check_same_episodes
from vlarft.tokenizer import FrameTokenizer
from vlarft.world_model import PRESETS as SIZES
from vlarft.world_model import WorldModel

FINGERS = re.compile(r"finger|grip|grasp|claw", re.IGNORECASE)
HalfAtMost = Annotated[float, Range(0, 0.5)]  # a mean of shares that are spread up to twice the mean


@dataclass(frozen=True)
class Config:
    """One training run; the defaults are the paper's (Table 5) and its public code's."""

    demos: tuple[str, ...] = opt(("demos",), "folders or files of episodes (HDF5, LeRobot, RLDS)", group="data")
    camera: str = opt("agentview", "camera of the demonstrations")
    experts_only: bool = opt(False, "train on successful expert episodes only, as the paper; validation keeps all")
    validation_fraction: ProperShare = opt(0.02, "share of the episodes held out (49:1, Sec. 4.2)")
    split_seed: Whole = opt(0, "seed of the choice of held-out episodes; the same for every stage")
    context_lookback: Lookback | None = opt(
        15,
        "the context frame lies up to this many frames before the segment; 0: its first; none: any so far; -1: the "
        "episode's first, as in imagined episodes",
    )

    init: str | None = opt(None, "world model to start from: run folder or model.safetensors", group="model")
    tokenizer: str = opt("runs/tokenizer", "tokenizer of a world model from scratch: run folder or model.safetensors")
    size: Literal["paper", "small", "tiny", "smoke"] = opt("paper", "named sizes of a world model from scratch")
    pose_dims: Whole = opt(
        0,
        "drive frames by this many leading proprio dimensions after each action, the hand's pose, and its gripper "
        "commands; 0: by actions, the paper's; of a world model from scratch",
    )
    factored_tokens: bool = opt(False, "add to token embeddings a part that is linear in FSQ digits and action values")

    steps: Count = opt(150_000, "optimizer steps (Table 5)", group="optimisation")
    max_minutes: Positive | None = opt(None, "stop after this wall time; the schedule then follows the clock [min]")
    batch_size: Rows = opt(16, "segments per step, over all processes (Table 5)")
    accumulate: Rows = opt(1, "micro-batches per step and process")
    checkpoint_activations: bool = opt(False, "recompute activations in the backward pass, for less memory")
    lr: Rate = opt(5e-5, "peak learning rate of AdamW (Table 5)")
    warmup: Whole = opt(5000, "steps of linear warmup (public code)")
    schedule: Decay = opt("constant", "learning rate after the warmup (public code: constant)")
    beta2: ShareBelow1 = opt(0.999, "decay of AdamW's second moment")
    clip_norm: Positive = opt(1.0, "largest gradient norm (public code)")
    precision: Precision = opt("bf16", "autocast of the networks; auto: bf16 where the processor or GPU has it")
    robot_steps: Count = opt(1500, "steps of the small model of the robot's state, fitted before")
    stale: HalfAtMost = opt(
        0.0, "mean share of input frames that show the first frame instead, at most 0.5 (docs/world_model.md)"
    )

    validation_interval: Count = opt(2000, "steps between validations", group="evaluation")
    validation_segments: Rows = opt(256, "held-out segments of the validation loss")
    rollout_segments: Rows = opt(64, "held-out segments that each validation imagines, greedily")

    out_dir: str = opt("runs/wm", "folder that the run writes", group="run")
    seed: Whole = opt(0, "seed of the weights and the batches")

    log_interval: Count = opt(20, "steps between log lines")
    save_interval: Count = opt(2000, "steps between checkpoints")
    keep_interval: Count | None = opt(
        None, "steps between copies of the model that are kept (model_002000.safetensors)"
    )
    async_save: bool = opt(False, "write checkpoints in a thread while training goes on")
    frozen: distributed.Frozen = opt("shard", "frozen tokenizer with several processes: sharded, or whole on each")


TINY = Config(
    size="tiny",
    factored_tokens=True,
    pose_dims=6,
    context_lookback=None,
    batch_size=4,
    steps=2000,
    lr=2e-3,
    warmup=50,
    schedule="cosine",
    beta2=0.98,
    stale=0.4,
    precision="auto",
    validation_fraction=0.05,
    validation_interval=2000,
    validation_segments=128,
    rollout_segments=64,
    save_interval=1000,
)
PRESETS = {
    "paper": Config(),
    "robot": Config(steps=24_000),  # the real robot's (A.5), batches of 16
    "small": Config(
        size="small", pose_dims=6, context_lookback=None, batch_size=32, steps=50_000, lr=3e-4, warmup=1000
    ),
    "libero": replace(TINY, steps=4500),
    "tiny": TINY,
    "smoke": replace(
        TINY,
        size="smoke",
        precision="fp32",
        batch_size=4,
        steps=20,
        warmup=2,
        validation_interval=10,
        validation_segments=8,
        rollout_segments=4,
        robot_steps=2,
    ),
}
METHODS = ("tokenize", "token_loss", "rollout")  # of the sharded model, called from here


class Tokens(NamedTuple):
    """Segments as tokens: context (B, Nc), future (B, T + 1, Nf), and what drives them, actions or poses (B, T, C)."""

    context: Tensor
    future: Tensor
    actions: Tensor


def stale_frames(cfg: Config, step: int, part: tuple[int, int]) -> Tensor:
    """Sample which input frames of the segments of share `part` (number, count) are stale: (B, T + 1) bool.

    The share of stale frames varies from segment to segment, from none to twice the mean. Random numbers are those of
    the whole batch, whatever the number of processes.
    """
    source = generator("cpu", "stale frames", cfg.seed, step)
    rate = 2 * cfg.stale * torch.rand(cfg.batch_size, 1, generator=source)  # (batch, 1)
    stale = torch.rand(cfg.batch_size, SIZES[cfg.size].chunk + 1, generator=source) < rate  # (batch, T + 1)
    return stale.chunk(part[1])[part[0]]


def load_split(cfg: Config) -> tuple[list[Episode], list[Episode]]:
    """Load training and held-out episodes; with `init`, those that its world model holds out stay held out, and a share
    of those that are new to it is added to them.

    Raises:
        ValueError: that world model names no held-out episodes, or one that is not among the demonstrations.
    """
    episodes = load_episodes(cfg.demos, cfg.camera, successes_only=False)
    if cfg.init is None:
        train, held_out = split_episodes(episodes, cfg.validation_fraction, cfg.split_seed)
    else:
        path, by_name = checkpoint_file(cfg.init), {e.name: e for e in episodes}
        extra = read_header(path).extra
        names = extra.get("held_out_episodes", [])
        if not names:
            raise ValueError(f"--init {path} names no held-out episodes: give a world model that train_wm.py wrote")
        if missing := [name for name in names if name not in by_name]:
            seen = extra.get("demos", ())
            raise ValueError(
                f"--init {path} holds out {len(names)} episodes, of which --demos {' '.join(cfg.demos)} lacks "
                f"{len(missing)}, first {missing[0]}: give the demonstrations of its training too "
                f"(--demos {' '.join([seen] if isinstance(seen, str) else seen)} ...)"
            )
        held_out = [by_name[name] for name in names]  # in the stored order: the same segments are validated
        known = {*names, *extra.get("train_episodes", by_name)}  # older files do not name them: then none is new
        train, new = ([e for e in episodes if (e.name in known) == part] for part in (True, False))
        train = [e for e in train if e.name not in set(names)]
        # attempts from a start go where those before them went
        of = {e.start: part for part in (train, held_out) for e in part if e.start is not None}
        begun = [e for e in new if e.start in of]
        for e in begun:
            of[e.start].append(e)
        new = [e for e in new if e.start not in of]
        if len(new) > 1:
            new, unseen = split_episodes(new, cfg.validation_fraction, cfg.split_seed)
            held_out += unseen
        train += new
    if cfg.experts_only:
        train = [e for e in train if e.success and e.kind == "expert"]
    return train, held_out


def load_tokenizer(cfg: Config, held_out: list[Episode], images: dict, device: torch.device) -> FrameTokenizer:
    """Load the tokenizer to freeze.

    Raises:
        ValueError: it was trained on episodes that this run holds out, or on images of another size or convention.
    """
    path = checkpoint_file(cfg.tokenizer)
    extra = read_header(path).extra
    check_same_images(extra, f"tokenizer {path}", images, f"the demonstrations {' '.join(cfg.demos)}")
    warn_other_contexts(extra, f"tokenizer {path}", cfg.context_lookback)
    seen = set(extra.get("train_episodes", []))
    if overlap := [e.name for e in held_out if e.name in seen]:
        raise ValueError(
            f"{path} was trained on {len(overlap)} of the {len(held_out)} held-out episodes (first {overlap[0]}): "
            "use the --split-seed, --validation-fraction and --demos of its training"
        )
    tokenizer = FrameTokenizer.load(path, device)
    check_image_size(tokenizer.cfg.image_size, f"tokenizer {path}", held_out[0])
    return tokenizer


def controls(model: WorldModel, episodes: Sequence[Episode]) -> Tensor:
    """Return what drives the frames of all episodes: (all steps, C). What the last action led to is not recorded."""
    after = [np.concatenate([e.proprio[1:], e.proprio[-1:]]) for e in episodes]
    columns = [e.actions for e in episodes], after
    return model.controls(*(torch.from_numpy(np.concatenate(column)) for column in columns))


def check_pose(dims: int, episode: Episode) -> None:
    """Check that the first `dims` of the proprio may be the pose, and the rest fingers.

    Raises:
        ValueError: there are fewer.

    Warns if the rest has other names, or none and is not LIBERO's: position 3, axis-angle 3, fingers 2.
    """
    width, names = episode.proprio.shape[1], episode.proprio_names
    if dims > width:
        raise ValueError(
            f"--pose-dims {dims}: the proprio of {episode.name} has {width} dimensions; give as many as its pose has, "
            "or 0 to drive frames by actions"
        )
    rest = [name for name in names[dims:] if not FINGERS.search(name)]
    if not names and dims < width and (dims, width) != (6, 8):
        rest = [f"{i} of {width}" for i in range(dims, width)]
    if rest:
        warnings.warn(
            f"--pose-dims {dims}: proprio dimensions {', '.join(rest)} are no part of the pose that drives the frames; "
            "only fingers should be left out, which tell what is grasped before it shows: reorder them, give another "
            "number, or 0 to drive frames by actions",
            stacklevel=2,
        )


def warn_wrapping_angles(dims: int, episodes: Sequence[Episode]) -> None:
    """Warn of an angle among the first `dims` of the proprio that jumps by a full turn: no motion, and two far bins."""
    steps = np.concatenate([np.abs(np.diff(e.proprio[:, :dims], axis=0)) for e in episodes])  # (steps, dims)
    turns = (steps > 2 * np.pi - 1) & (steps < 2 * np.pi + 1e-3)
    rare = turns.any(0) & (turns.mean(0) < 0.5)  # (dims,)
    if wrapped := [i for i in range(dims) if rare[i] and (steps[~turns[:, i], i] < 1).all()]:
        warnings.warn(
            f"--pose-dims {dims}: proprio dimensions {', '.join(map(str, wrapped))} jump by a full turn, as angles "
            "that wrap: unwrap them, write the orientation otherwise, or give 0 to drive frames by actions",
            stacklevel=2,
        )


def new_model(cfg: Config, tokenizer: FrameTokenizer, episodes: Sequence[Episode]) -> WorldModel:
    """Make a world model with random weights around the tokenizer, fitted to ranges and robot of the episodes."""
    torch.manual_seed(seed_of("weights", cfg.seed))
    first = episodes[0]
    own = {"action_dim": first.actions.shape[1], "proprio_dim": first.proprio.shape[1]}
    own |= {"factored_tokens": cfg.factored_tokens}
    if cfg.pose_dims:
        check_pose(cfg.pose_dims, first)
        warn_wrapping_angles(cfg.pose_dims, episodes)
        own |= {"pose_dims": cfg.pose_dims, "gripper_dims": first.grippers}
    model = WorldModel(replace(SIZES[cfg.size], tokenizer=tokenizer.cfg, **own))
    model.tokenizer.load_state_dict(tokenizer.state_dict())
    fit_robot(cfg, model, episodes)
    driving = controls(model, episodes)
    model.action_bins.set_range(driving.amin(0), driving.amax(0))
    return model


def fit_robot(cfg: Config, model: WorldModel, episodes: Sequence[Episode]) -> None:
    """Fit the model's robot to the episodes, if it has one and the run does not go on with a fitted one."""
    if model.robot is not None and not (Path(cfg.out_dir) / "train_state.pt").is_file():
        model.robot.load_state_dict(fit_proprio_model(episodes, cfg.seed, steps=cfg.robot_steps).state_dict())


def load_init(cfg: Config, images: dict, episodes: Sequence[Episode]) -> WorldModel:
    """Load the world model of `init` and fit its robot anew; warn of actions outside its ranges.

    Raises:
        ValueError: it is for another robot, for chunks of another length or for images of another size or convention.
    """
    path = checkpoint_file(cfg.init)
    extra = read_header(path).extra
    check_same_images(extra, f"world model {path}", images, f"the demonstrations {' '.join(cfg.demos)}")
    warn_other_contexts(extra, f"world model {path}", cfg.context_lookback)
    model = WorldModel.load(path)
    check_image_size(model.cfg.tokenizer.image_size, f"world model {path}", episodes[0])
    for what, found, expected in (
        ("action dimensions", model.cfg.action_dim, episodes[0].actions.shape[1]),
        ("actions per segment", model.cfg.chunk, SIZES[cfg.size].chunk),
    ):
        if found != expected:
            raise ValueError(f"--init {path} has {found} {what}, this run {expected}: train a new one, without --init")
    if cfg.pose_dims != model.cfg.pose_dims:
        warnings.warn(
            f"--pose-dims {cfg.pose_dims} is for a world model from scratch: {path} keeps its {model.cfg.pose_dims}",
            stacklevel=2,
        )
    fit_robot(cfg, model, episodes)
    model.action_bins.warn_outside(controls(model, episodes))
    return model


def build_model(
    cfg: Config,
    episodes: Sequence[Episode],
    held_out: list[Episode],
    images: dict,
    device: torch.device,
) -> WorldModel:
    """Build the world model to train, new or that of `init`, sharded over the processes."""
    if cfg.init is None:
        model = new_model(cfg, load_tokenizer(cfg, held_out, images, device), episodes)
    else:
        model = load_init(cfg, images, episodes)
    model.to(device)
    if cfg.checkpoint_activations:
        distributed.recompute(model.decoder.layers)
    half = in_bf16(cfg.precision, device)
    return distributed.shard(model.train(), model.decoder.layers, METHODS, frozen=cfg.frozen, bf16=half)


def tokenize(model: WorldModel, batch: Batch, device: torch.device, autocast: torch.autocast) -> Tokens:
    """Turn a batch into tokens, in one pass of the frozen tokenizer."""
    with autocast:
        context, future = model.tokenize(batch.frames.to(device), batch.context_frame.to(device))
    return Tokens(context, future, model.controls(batch.actions, batch.proprio_after).to(device))


@torch.no_grad()
def validate(
    model: WorldModel, batch: Batch, rollouts: Batch, device: torch.device, autocast: torch.autocast
) -> tuple[dict[str, float], Tensor]:
    """Compute held-out metrics: the loss, also with the actions of other segments; rollouts against copies of the start
    frame.

    Returns:
        The metrics, and the imagined frames (S, T, C, H, W) of `rollouts`.
    """
    model.eval()
    sums: dict[str, float] = {}
    # the actions of a segment half of all segments away: those beside it are of the same episode, and nearly the same
    others = model.controls(batch.actions, batch.proprio_after).roll(len(batch.actions) // 2, dims=0).to(device)
    for i in range(0, len(batch.actions), 32):
        context, future, actions = tokenize(model, Batch(*(x[i : i + 32] for x in batch)), device, autocast)
        for name, given in (("val_", actions), ("val_shuffled_", others[i : i + 32])):
            with autocast:
                loss, parts = model.token_loss(context, future, given)
            found = {"loss": loss} if name == "val_shuffled_" else {"loss": loss, **parts}
            for key, value in found.items():
                sums[name + key] = sums.get(name + key, 0.0) + float(value) * len(actions) / len(batch.actions)
    rollouts = rollouts.to(device)
    frames, start, actions = rollouts.frames, rollouts.context_frame, rollouts.actions[:, None]
    with autocast:
        imagined = model.rollout(start, actions, greedy=True, first_frame=frames[:, 0], robot=rollouts.robot)
    imagined, true, copied = imagined.frames[:, 0], frames[:, 1:], frames[:, :1].expand_as(frames[:, 1:])
    moving = moving_mask(true, copied)
    sums["rollout_psnr"] = pooled_psnr(imagined, true)
    sums["rollout_psnr_moving"] = pooled_psnr(imagined, true, moving)
    sums["copy_psnr_moving"] = pooled_psnr(copied, true, moving)
    model.train()
    return sums, imagined


def draw_rollouts(true: Tensor, imagined: Tensor, path: Path) -> None:
    """Write a PNG of up to four segments: true frames (S, T + 1, C, H, W) above imagined ones (S, T, C, H, W)."""
    rows, labels = [], []
    for i in torch.linspace(0, len(imagined) - 1, min(4, len(imagined))).round().int().tolist():
        rows += [true[i], [true[i, 0], *imagined[i]]]
        labels += ["true", "imagined"]
    save_png(path, grid(rows, labels))


def main(cfg: Config) -> dict[str, float]:
    """Train, or resume; return the metrics of the last validation."""
    import_pillow()  # the first picture comes after the work
    device = distributed.setup()
    distributed.check_batch(cfg.batch_size, cfg.accumulate)
    parts = distributed.world_size() * cfg.accumulate  # micro-batches of a step, over all processes
    autocast = torch.autocast(device.type, torch.bfloat16, enabled=in_bf16(cfg.precision, device))

    train, held_out = load_split(cfg)
    chunk = SIZES[cfg.size].chunk
    sampler = WindowSampler(train, chunk + 1, chunk, cfg.context_lookback)
    held_out_windows = WindowSampler(held_out, chunk + 1, chunk, cfg.context_lookback)
    validation = held_out_windows.spread(cfg.validation_segments)
    rollouts = held_out_windows.spread(cfg.rollout_segments)
    images = image_convention(train, cfg.camera)
    before = read_header(cfg.init or cfg.tokenizer).extra
    warn_other_contents(before, str(cfg.init or cfg.tokenizer), [*train, *held_out])
    names = [*(e.name for e in train), *before.get("train_episodes", [])]
    seen = list(dict.fromkeys(names))  # all that these weights were trained on
    facts = {**split_facts(train, held_out), "train_episodes": seen, **images}
    facts["episode_digests"] = {**before.get("episode_digests", {}), **facts["episode_digests"]}
    facts |= {"demos": cfg.demos, "context_lookback": cfg.context_lookback}

    model = build_model(cfg, train, held_out, images, device)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=cfg.lr, betas=(0.9, cfg.beta2), weight_decay=0.0, fused=True)

    # the robot is fitted before the first step: a run that goes on has it
    models = ("init",) if cfg.init else ("tokenizer",)
    open_run(cfg.out_dir, cfg, ("robot_steps",), partial(migration.train_wm, size=SIZES), models)
    check_same_episodes(cfg.out_dir, facts)
    state = TrainState(cfg.out_dir, {"model": model, "optimizer": optimizer}, cfg.async_save, cfg.keep_interval)
    step, minutes, metrics = state.load(step=0, minutes=0.0, metrics={})
    log, clock = RunLog(cfg.out_dir, cfg.steps, "wm", step), Clock(cfg.steps, cfg.max_minutes, minutes)

    def save() -> None:
        values = {"step": step, "metrics": metrics, "minutes": clock.minutes}
        state.save(values, model, model.cfg, {**facts, "metrics": metrics, "steps": step})

    if cfg.init and step == 0:
        log.log(-1, validate(model, validation, rollouts, device, autocast)[0])
    began, share = step, clock.share(step)
    while share < 1:
        optimizer.zero_grad(set_to_none=True)
        totals: dict[str, Tensor] = {}
        for micro in range(cfg.accumulate):
            part = distributed.rank() * cfg.accumulate + micro, parts
            batch = sampler.batch(cfg.batch_size, cfg.seed, step, part=part, device=device)
            tokens = tokenize(model, batch, device, autocast)
            distributed.sync_gradients(model, micro + 1 == cfg.accumulate)
            with autocast:
                loss, terms = model.token_loss(*tokens, stale_frames(cfg, step, part).to(device))
            (loss / cfg.accumulate).backward()
            for name, value in {"loss": loss, **terms}.items():
                totals[name] = totals.get(name, 0.0) + value.detach() / cfg.accumulate
        totals = distributed.mean_across_ranks(totals)

        lr = cfg.lr * rate_factor(step, share, cfg.warmup, cfg.schedule)
        for group in optimizer.param_groups:
            group["lr"] = lr
        totals["grad_norm"] = distributed.clip_grad_norm(trained, cfg.clip_norm)
        check_finite(totals["loss"], step, totals, partial(sampler.names, cfg.batch_size, cfg.seed, step))
        optimizer.step()

        step += 1
        share = clock.share(step)
        if validates := step % cfg.validation_interval == 0 or share >= 1:
            metrics, imagined = validate(model, validation, rollouts, device, autocast)
        if validates or step % cfg.log_interval == 0:
            fresh = metrics if validates else {}
            log.log(step - 1, {**totals, "lr": lr, "minutes": clock.minutes, **fresh})
        if share < 1 and state.due(step, cfg.save_interval):
            save()

    if step > began:
        if distributed.is_main():  # before the state, which says that the run is complete
            draw_rollouts(rollouts.frames, imagined, Path(cfg.out_dir) / "rollouts.png")
        save()
    if distributed.is_main():
        print("world model: " + "  ".join(f"{k} {v:.3f}" for k, v in metrics.items()) + f"  -> {cfg.out_dir}")
    state.finish(log)
    return metrics


if __name__ == "__main__":
    run_script(main, Config, PRESETS, __doc__, preemption.deferred)
