"""Train the world model: Eq. (3) on tokens of demonstrations, with a frozen tokenizer (stage I of the paper, Sec. 3.2).

    python train_wm.py --preset tiny --demos demos --tokenizer runs/tokenizer --out-dir runs/wm          laptop, minutes
    python train_wm.py --demos libero --tokenizer runs/tokenizer --out-dir runs/wm                        paper, 1 GPU
    torchrun --nproc-per-node 8 train_wm.py --demos libero --tokenizer runs/tokenizer --out-dir runs/wm   8 GPUs

Reads: demonstrations of any format (docs/data.md); the tokenizer's model.safetensors. Writes: out_dir/model.safetensors
(tokenizer, action ranges, weights, config, the split by episode), train_state.pt (to resume: give the same command
again), log.jsonl, config.json, rollouts.png.

The actions are the executed ones, in raw environment units; their ranges are those of the training split.

Deviations from the paper and its release:
- the loss is on frame tokens only, as in Eq. (3); `--loss-on-actions` adds the release's action tokens;
- the vocabulary is 9008, as the token layout needs, which makes 127M parameters and not 138M;
- preset tiny (and smoke): cosine schedule, slot embeddings, factored tokens, stale input frames, a loss normalised over
  future codes only, the segment's first frame as context frame.
"""

import sys
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Literal, NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm

from vlarft.data.convention import check_same_images, image_convention
from vlarft.data.episodes import Episode, load_episodes, split_episodes
from vlarft.data.windows import Batch, WindowSampler
from vlarft.metrics import moving_mask, pooled_psnr
from vlarft.nets.transformer import TransformerConfig
from vlarft.run import distributed, preemption
from vlarft.run.checkpoint import open_run, read_header
from vlarft.run.clock import Clock, Decay, rate_factor
from vlarft.run.config import opt, parse
from vlarft.run.log import RunLog, check_finite
from vlarft.run.pictures import grid, save_png
from vlarft.run.random import generator, seed_of
from vlarft.run.train_state import TrainState
from vlarft.tokenizer import FrameTokenizer
from vlarft.world_model import PRESETS as MODELS
from vlarft.world_model import WorldModel, WorldModelConfig


@dataclass(frozen=True)
class Config:
    out_dir: str = opt("runs/wm", "folder that the run writes")
    demos: str = opt("demos", "folder or file of demonstrations (HDF5, LeRobot, RLDS)")
    camera: str = opt("agentview", "camera of the demonstrations")
    experts_only: bool = opt(
        False, "train without failed and noisy attempts and those of a policy, as the paper; validation keeps them"
    )
    tokenizer: str = opt("runs/tokenizer", "tokenizer: its run folder or its model.safetensors")
    transformer: TransformerConfig = opt(MODELS["paper"].transformer, "sizes of the transformer")
    chunk: int = opt(8, "actions of a segment, one frame more (Sec. 4)")
    action_bins: int = opt(256, "bins per action dimension")
    loss_on_actions: bool = opt(False, "also predict action tokens, as the release does")
    future_codes_only: bool = opt(False, "normalise the loss over future codes only, as rollouts do")
    slot_embedding: bool = opt(False, "learned vectors for a token's place in its frame or action")
    factored_tokens: bool = opt(
        False, "token embeddings and head also as linear functions of FSQ digits and action values"
    )
    context_lookback: int = opt(15, "context frame drawn from this many frames before the segment; 0 = its first frame")
    batch_size: int = opt(16, "segments per step, over all processes (paper)")
    accumulate: int = opt(1, "micro-batches per step and process")
    checkpoint_activations: bool = opt(False, "compute activations twice instead of keeping them")
    steps: int = opt(150_000, "optimizer steps (Sec. 4.2: 1.5e5)")
    max_minutes: float | None = opt(None, "stop after this many minutes, the schedule following the clock [min]")
    lr: float = opt(5e-5, "peak learning rate of AdamW (release)")
    warmup: int = opt(5000, "steps of linear warmup (release)")
    schedule: Decay = opt("constant", "learning rate after the warmup (release: constant)")
    weight_decay: float = opt(0.0, "AdamW weight decay (release)")
    beta2: float = opt(0.999, "AdamW second-moment decay")
    stale: float = opt(0.0, "share of input frames shown as if nothing had moved since the start, up to 0.5")
    clip: float = opt(1.0, "gradient norm limit (release)")
    cache_tokens: bool = opt(False, "tokenize all segments once, before training; needs context_lookback 0")
    precision: Literal["bf16", "fp32"] = opt("bf16", "autocast of the network forwards; weights are float32")
    validation_fraction: float = opt(0.02, "share of episodes held out (49:1, Sec. 4.2)")
    validate_every: int = opt(2000, "steps between validations")
    validation_segments: int = opt(256, "segments of the validation loss")
    rollout_segments: int = opt(64, "segments of the free-running greedy rollouts, with every validation")
    save_every: int = opt(2000, "steps between checkpoints")
    async_save: bool = opt(False, "write checkpoints in a thread while training goes on")
    frozen: distributed.Frozen = opt("shard", "the tokenizer over several processes: sharded, or whole on each")
    log_every: int = opt(20, "steps between log lines")
    seed: int = opt(0, "seed of the split, the weights and the batches")


TINY = Config(
    transformer=MODELS["tiny"].transformer,
    action_bins=MODELS["tiny"].action_bins,
    future_codes_only=True,
    slot_embedding=True,
    factored_tokens=True,
    context_lookback=0,
    batch_size=4,
    steps=1500,
    lr=2e-3,
    warmup=50,
    schedule="cosine",
    beta2=0.98,
    stale=0.4,
    precision="fp32",
    validation_fraction=0.05,
    validate_every=500,
    validation_segments=128,
    rollout_segments=64,
    save_every=400,
)
PRESETS = {
    "paper": Config(),
    "robot": Config(steps=24_000),  # the real robot's (A.5), batches of 16
    "small": Config(transformer=MODELS["small"].transformer, batch_size=32, steps=50_000, lr=3e-4, warmup=1000),
    "tiny": TINY,
    "smoke": replace(
        TINY,
        transformer=MODELS["smoke"].transformer,
        action_bins=MODELS["smoke"].action_bins,
        batch_size=4,
        steps=20,
        warmup=2,
        validate_every=10,
        validation_segments=8,
        rollout_segments=4,
    ),
}


class Tokens(NamedTuple):
    """Segments as tokens: context (B, Nc), future (B, T + 1, Nf), and their raw actions (B, T, A)."""

    context: Tensor
    future: Tensor
    actions: Tensor


def stale_frames(cfg: Config, step: int, part: tuple[int, int]) -> Tensor:
    """(B, T + 1) bool: which input frames of the segments of share `part` (number, count) are stale.

    The share of stale frames varies from segment to segment, from none to twice the mean. Drawn for the whole batch.
    """
    source = generator("cpu", "stale frames", cfg.seed, step)
    rate = 2 * cfg.stale * torch.rand(cfg.batch_size, 1, generator=source)
    stale = torch.rand(cfg.batch_size, cfg.chunk + 1, generator=source) < rate
    return stale.chunk(part[1])[part[0]]


def load_tokenizer(cfg: Config, held_out: list[Episode], images: dict, device: torch.device) -> FrameTokenizer:
    """The tokenizer to freeze.

    Raises:
        ValueError: it was trained on episodes that this run holds out, or on images of another convention.
    """
    path = Path(cfg.tokenizer)
    path = path / "model.safetensors" if path.is_dir() else path
    extra = read_header(path).extra
    check_same_images(extra, f"tokenizer {path}", images, f"the demonstrations {cfg.demos}")
    seen = set(extra.get("train_episodes", []))
    if overlap := [e.name for e in held_out if e.name in seen]:
        raise ValueError(
            f"{path} was trained on {len(overlap)} of the {len(held_out)} held-out episodes (first {overlap[0]}): "
            "use the --seed, --validation-fraction and --demos of its training"
        )
    return FrameTokenizer.load(path, device)


def tokenize(model: WorldModel, batch: Batch, device: torch.device, autocast: torch.autocast) -> Tokens:
    """A batch as tokens, in one pass of the frozen tokenizer."""
    with autocast:
        context, future = model.tokenize(batch.frames.to(device), batch.context_frame.to(device))
    return Tokens(context, future, batch.actions.to(device))


def tokenize_all(model: WorldModel, sampler: WindowSampler, device: torch.device, autocast: torch.autocast) -> Tokens:
    """All segments of a split as tokens, in memory."""
    parts = []
    for i in tqdm(range(0, len(sampler), 64), desc="tokenize", disable=None):
        parts.append(tokenize(model, sampler.windows(sampler.starts[i : i + 64]), device, autocast))
    return Tokens(*(torch.cat(column) for column in zip(*parts, strict=True)))


@torch.no_grad()
def validate(
    model: WorldModel, batch: Batch, rollouts: Batch, device: torch.device, autocast: torch.autocast
) -> tuple[dict[str, float], Tensor]:
    """Held-out loss, also with the actions of other segments; greedy rollouts against copying the start frame."""
    model.eval()
    sums: dict[str, float] = {}
    for i in range(0, len(batch.actions), 32):
        context, future, actions = tokenize(model, Batch(*(x[i : i + 32] for x in batch)), device, autocast)
        for name, given in (("val_", actions), ("val_shuffled_", actions.roll(1, dims=0))):
            with autocast:
                loss, parts = model.token_loss(context, future, given)
            found = {"loss": loss} if name == "val_shuffled_" else {"loss": loss, **parts}
            for key, value in found.items():
                sums[name + key] = sums.get(name + key, 0.0) + float(value) * len(actions) / len(batch.actions)
    frames, start = rollouts.frames.to(device), rollouts.context_frame.to(device)
    with autocast:
        imagined = model.rollout(start, rollouts.actions[:, None].to(device), greedy=True, first_frame=frames[:, 0])
    imagined, true, copied = imagined.frames[:, 0], frames[:, 1:], frames[:, :1].expand_as(frames[:, 1:])
    moving = moving_mask(true, copied)
    sums["rollout_psnr"] = pooled_psnr(imagined, true)
    sums["rollout_psnr_moving"] = pooled_psnr(imagined, true, moving)
    sums["copy_psnr_moving"] = pooled_psnr(copied, true, moving)
    model.train()
    return sums, imagined


def main(cfg: Config) -> dict[str, float]:
    """Train; returns the last validation's metrics."""
    device = distributed.setup()
    distributed.local_batch(cfg.batch_size, cfg.accumulate)
    parts = distributed.world_size() * cfg.accumulate  # micro-batches of a step, over all processes
    autocast = torch.autocast(device.type, torch.bfloat16, enabled=cfg.precision == "bf16")
    if cfg.cache_tokens and cfg.context_lookback:
        raise ValueError(
            f"cache_tokens needs context_lookback 0, got {cfg.context_lookback}: a drawn context frame changes tokens"
        )

    episodes = load_episodes(cfg.demos, cfg.camera, successes_only=False)
    train, held_out = split_episodes(episodes, cfg.validation_fraction, cfg.seed)
    if cfg.experts_only:
        train = [e for e in train if e.success and e.kind == "expert"]
    sampler = WindowSampler(train, cfg.chunk + 1, cfg.chunk, cfg.context_lookback)
    spread = WindowSampler(held_out, cfg.chunk + 1, cfg.chunk, cfg.context_lookback).spread
    validation, rollouts = spread(cfg.validation_segments), spread(cfg.rollout_segments)

    state_path = open_run(cfg.out_dir, cfg, ignore=("accumulate", "async_save", "frozen"))
    images = image_convention(train, cfg.camera)
    tokenizer = load_tokenizer(cfg, held_out, images, device)
    torch.manual_seed(seed_of("weights", cfg.seed))
    sizes = {"chunk": cfg.chunk, "action_dim": train[0].actions.shape[1], "action_bins": cfg.action_bins}
    names = "loss_on_actions", "future_codes_only", "slot_embedding", "factored_tokens"
    options = {name: getattr(cfg, name) for name in names}
    model_config = WorldModelConfig(tokenizer.cfg, cfg.transformer, **sizes, **options)
    model = WorldModel(model_config).to(device)
    model.tokenizer.load_state_dict(tokenizer.state_dict())
    actions = torch.cat([torch.from_numpy(e.actions) for e in train])
    model.action_bins.set_range(actions.amin(0), actions.amax(0))
    model.train()
    if cfg.checkpoint_activations:
        distributed.recompute(model.decoder.layers)
    names, bf16 = ("tokenize", "token_loss", "rollout"), cfg.precision == "bf16"
    distributed.shard(model, model.decoder.layers, names, frozen=cfg.frozen, bf16=bf16)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=cfg.lr, betas=(0.9, cfg.beta2), weight_decay=cfg.weight_decay, fused=True)
    state = TrainState(cfg.out_dir, {"model": model, "optimizer": optimizer}, cfg.async_save)
    step, minutes, metrics = state.load(step=0, minutes=0.0, metrics={})
    resumed_at = step
    cached = tokenize_all(model, sampler, device, autocast) if cfg.cache_tokens else None
    row_of = {tuple(start): row for row, start in enumerate(sampler.starts.tolist())}

    def save() -> None:
        names = {"train_episodes": [e.name for e in train], "held_out_episodes": [e.name for e in held_out]}
        facts = {"demos": cfg.demos, "context_lookback": cfg.context_lookback, "metrics": metrics, "steps": step}
        values = {"step": step, "metrics": metrics, "minutes": clock.minutes}
        state.save(values, model, model_config, {**names, **images, **facts})

    log, clock = RunLog(cfg.out_dir, cfg.steps, "wm", step), Clock(cfg.steps, cfg.max_minutes, minutes)
    while (share := clock.share(step)) < 1:
        optimizer.zero_grad(set_to_none=True)
        totals: dict[str, Tensor] = {}
        for micro in range(cfg.accumulate):
            part = distributed.rank() * cfg.accumulate + micro, parts
            batch = sampler.batch(cfg.batch_size, cfg.seed, step, part=part)
            if cached is None:
                tokens = tokenize(model, batch, device, autocast)
            else:
                rows = [row_of[tuple(start)] for start in batch.index.tolist()]
                tokens = Tokens(*(x[rows] for x in cached))
            distributed.sync_gradients(model, micro + 1 == cfg.accumulate)
            with autocast:
                loss, terms = model.token_loss(*tokens, stale_frames(cfg, step, part).to(device))
            (loss / cfg.accumulate).backward()
            for name, value in {"loss": loss, **terms}.items():
                totals[name] = totals.get(name, 0.0) + value.detach() / cfg.accumulate
        totals = distributed.mean_across_ranks(totals)

        for group in optimizer.param_groups:
            group["lr"] = cfg.lr * rate_factor(step, share, cfg.warmup, cfg.schedule)
        totals["grad_norm"] = distributed.clip_grad_norm(trained, cfg.clip)
        check_finite(totals["loss"], step, totals, partial(sampler.names, cfg.batch_size, cfg.seed, step))
        optimizer.step()

        step += 1
        validates = step % cfg.validate_every == 0
        if validates:
            metrics, _ = validate(model, validation, rollouts, device, autocast)
        if step % cfg.log_every == 0 or validates:
            fresh = metrics if validates else {}
            log.log(step - 1, {**totals, "lr": optimizer.param_groups[0]["lr"], "minutes": clock.minutes, **fresh})
        if state.due(step, cfg.save_every):
            save()

    metrics, imagined = validate(model, validation, rollouts, device, autocast)
    if state_path is None or step > resumed_at:
        save()
    if distributed.is_main():
        rows, labels = [], []
        for i in torch.linspace(0, len(imagined) - 1, min(4, len(imagined))).round().int().tolist():
            rows += [rollouts.frames[i], [rollouts.frames[i, 0], *imagined[i]]]
            labels += ["true", "imagined"]
        save_png(Path(cfg.out_dir) / "rollouts.png", grid(rows, labels))
        print("world model: " + "  ".join(f"{k} {v:.3f}" for k, v in metrics.items()) + f"  -> {cfg.out_dir}")
    state.wait()
    log.close()
    distributed.cleanup()
    return metrics


if __name__ == "__main__":
    with preemption.deferred():
        main(parse(Config, PRESETS, sys.argv[1:], __doc__))
