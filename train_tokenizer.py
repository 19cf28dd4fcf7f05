"""Train the frame tokenizer on demonstrations (stage I of the paper, Sec. 3.2; recipe of the public release).

    python train_tokenizer.py --preset tiny --demos demos --out-dir runs/tokenizer          laptop, minutes
    python train_tokenizer.py --demos libero --out-dir runs/tokenizer                       paper's sizes, 1 GPU
    torchrun --nproc-per-node 8 train_tokenizer.py --demos libero --out-dir runs/tokenizer  8 GPUs

Reads: HDF5 demonstrations (a folder or a file). Writes: out_dir/model.safetensors (weights, config, the split by
episode), train_state.pt (to resume: give the same command again), log.jsonl, config.json, reconstructions.png.

The loss is L1 plus a perceptual distance on the context frame and on the future frames.

Deviations from the public recipe:
- no adversarial loss (hinge GAN of weight 0.1 from step 10k) and no image augmentation;
- the perceptual distance is a choice; lpips needs its VGG16 backbone on disk;
- preset tiny (and smoke): see `reconstruction_loss` for its weights of pixels; it conditions
  on the segment's first frame, which is what the world model of that preset does.
"""

import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from vlarft import distributed
from vlarft.checkpoint import load_train_state, open_run, save_model, save_train_state
from vlarft.config import opt, parse
from vlarft.data.episodes import load_episodes, split_episodes
from vlarft.data.windows import Batch, WindowSampler
from vlarft.metrics import PerceptualDistance, moving_mask, perceptual, pooled_psnr
from vlarft.pictures import grid, save_png
from vlarft.reconstruction import reconstruction_loss
from vlarft.runlog import RunLog, check_finite
from vlarft.schedule import Clock, generator, rate_factor, seed_of
from vlarft.tokenizer import PRESETS as MODELS
from vlarft.tokenizer import FrameTokenizer, TokenizerConfig


@dataclass(frozen=True)
class Config:
    out_dir: str = opt("runs/tokenizer", "folder that the run writes")
    demos: str = opt("demos", "demonstrations: a folder of HDF5 files, or one file")
    camera: str = opt("agentview", "reads obs/<camera>_rgb")
    model: TokenizerConfig = opt(MODELS["paper"], "sizes of the tokenizer")
    segment: int = opt(7, "frames of a segment that follows the context frame (7 in the public recipe)")
    future_frames: int = opt(7, "frames drawn from each segment for a batch")
    context_lookback: int = opt(15, "context frame drawn from this many frames before the segment; 0 = its first frame")
    batch_size: int = opt(16, "segments per step, over all processes (public recipe)")
    steps: int = opt(150_000, "optimizer steps (the paper gives none for the tokenizer; that of its world model)")
    max_minutes: float | None = opt(None, "stop after this many minutes, the schedule following the clock [min]")
    lr: float = opt(5e-4, "peak learning rate of AdamW (public recipe)")
    warmup: int = opt(5000, "steps of linear warmup (public recipe)")
    final_lr_share: float = opt(0.0, "learning rate at the end of the cosine, as a share of the peak")
    weight_decay: float = opt(0.0, "AdamW weight decay (public recipe)")
    beta2: float = opt(0.999, "AdamW second-moment decay (public recipe)")
    clip: float = opt(1.0, "gradient norm limit (public recipe)")
    perceptual: Literal["lpips", "ssim", "none"] = opt("lpips", "perceptual distance")
    perceptual_weights: str | None = opt(None, "file of the VGG16 backbone for lpips; none = torchvision's cache")
    perceptual_weight: float = opt(1.0, "weight of the perceptual distance beside L1 (public recipe)")
    square_weight: float = opt(0.0, "weight of the squared error beside L1")
    moving_weight: float = opt(1.0, "weight of pixels that differ from the context frame, in future frames")
    unusual_weight: float = opt(1.0, "weight of pixels that differ from the median frame of the data, in all frames")
    pyramid: int = opt(1, "scales of the L1, each half the one before")
    still_weight: float = opt(0.0, "weight that draws the codes of patches without moving pixels to the middle code")
    precision: Literal["bf16", "fp32"] = opt("bf16", "autocast of the network forwards; weights are float32")
    validation_fraction: float = opt(0.02, "share of episodes held out (49:1, Sec. 4.2)")
    validate_every: int = opt(2000, "steps between validations")
    validation_segments: int = opt(64, "segments of a validation")
    save_every: int = opt(2000, "steps between checkpoints")
    log_every: int = opt(20, "steps between log lines")
    seed: int = opt(0, "seed of the split, the weights and the batches")


TINY = Config(
    model=MODELS["tiny"],
    segment=9,
    future_frames=3,
    context_lookback=0,
    batch_size=8,
    steps=1100,
    lr=2e-3,
    warmup=50,
    beta2=0.99,
    perceptual="none",
    square_weight=2.0,
    moving_weight=6.0,
    unusual_weight=6.0,
    pyramid=3,
    still_weight=0.6,
    precision="fp32",
    validation_fraction=0.05,
    validate_every=550,
    validation_segments=64,
    save_every=300,
)
PRESETS = {
    "paper": Config(),
    "small": Config(model=MODELS["small"], batch_size=32, steps=50_000, warmup=1000, perceptual="ssim"),
    "tiny": TINY,
    "smoke": replace(
        TINY, model=MODELS["smoke"], batch_size=4, steps=20, warmup=2, validate_every=10, validation_segments=8
    ),
}


def pick_frames(batch: Batch, count: int, batch_size: int, part: tuple[int, int], *seed: int) -> Tensor:
    """`count` of each segment's frames, in order: (B, L, C, H, W) -> (B, count, C, H, W).

    Drawn for the whole batch of all processes, of which `part` (rank, world size) has its share.
    """
    segments, length = batch.frames.shape[:2]
    if count >= length:
        return batch.frames
    order = torch.rand(batch_size, length, generator=generator("cpu", *seed)).argsort(dim=1)
    picks = order[part[0] * segments : (part[0] + 1) * segments, :count].sort(dim=1).values  # (B, count)
    return batch.frames[torch.arange(segments)[:, None], picks]


def median_frame(sampler: WindowSampler, count: int = 256) -> Tensor:
    """(C, H, W), the median over frames spread evenly over the data: what is always there."""
    return sampler.spread(count).context_frame.median(dim=0).values


@torch.no_grad()
def validate(
    model: FrameTokenizer, batch: Batch, usual: Tensor, device: torch.device, autocast: torch.autocast
) -> dict[str, float]:
    """Held-out PSNR [dB] over all pixels, on moving pixels (and there when copying the context), on unusual pixels."""
    model.eval()
    decoded_context, decoded = [], []
    for i in range(0, len(batch.frames), 16):
        with autocast:
            out = model(batch.context_frame[i : i + 16].to(device), batch.frames[i : i + 16].to(device))
        decoded_context.append(out.context_frame.float().clamp(0, 1).cpu())
        decoded.append(out.frames.float().clamp(0, 1).cpu())
    model.train()
    decoded_context, decoded = torch.cat(decoded_context), torch.cat(decoded)
    frames, context = batch.frames, batch.context_frame
    moving, unusual = moving_mask(frames, context[:, None]), moving_mask(context, usual)
    return {
        "val_psnr_context": pooled_psnr(decoded_context, context),
        "val_psnr_context_unusual": pooled_psnr(decoded_context, context, unusual),
        "val_psnr_future": pooled_psnr(decoded, frames),
        "val_psnr_moving": pooled_psnr(decoded, frames, moving),
        "val_psnr_moving_copy": pooled_psnr(context[:, None].expand_as(frames), frames, moving),
    }


@torch.no_grad()
def draw(model: FrameTokenizer, batch: Batch, device: torch.device, path: Path) -> None:
    """Picture of up to four held-out segments: true frames above their reconstructions, the context first."""
    model.eval()
    context, frames = batch.context_frame.to(device), batch.frames.to(device)
    out = model(context, frames)
    model.train()
    rows, labels = [], []
    for i in torch.linspace(0, len(frames) - 1, min(4, len(frames))).round().int().tolist():
        rows += [[context[i], *frames[i]], [out.context_frame[i], *out.frames[i]]]
        labels += ["true", "decoded"]
    if distributed.is_main():
        save_png(path, grid(rows, labels))


def main(cfg: Config) -> dict[str, float]:
    """Train; returns the last validation's metrics."""
    device = distributed.setup()
    if cfg.future_frames > cfg.segment:
        raise ValueError(f"future_frames={cfg.future_frames} exceeds segment={cfg.segment}")
    distributed.local_batch(cfg.batch_size)
    part = distributed.rank(), distributed.world_size()
    autocast = torch.autocast(device.type, torch.bfloat16, enabled=cfg.precision == "bf16")

    episodes = load_episodes(cfg.demos, cfg.camera, successes_only=False)
    train, held_out = split_episodes(episodes, cfg.validation_fraction, cfg.seed)
    size = tuple(train[0].images.shape[1:3])
    if size != cfg.model.image_size:
        raise ValueError(
            f"{cfg.demos} has images of {size[0]}x{size[1]}, the tokenizer is for {cfg.model.image_size[0]}x"
            f"{cfg.model.image_size[1]}: give --model.image-size {size[0]} {size[1]}, or collect at the other size"
        )
    sampler = WindowSampler(train, cfg.segment, cfg.segment, cfg.context_lookback)
    validation = WindowSampler(held_out, cfg.segment, cfg.segment, cfg.context_lookback).spread(cfg.validation_segments)

    usual = median_frame(sampler)

    state_path = open_run(cfg.out_dir, cfg)
    torch.manual_seed(cfg.seed)
    model = FrameTokenizer(cfg.model).to(device)
    distance: PerceptualDistance | None = None
    if cfg.perceptual != "none":
        distance = perceptual(cfg.perceptual, cfg.perceptual_weights).to(device)
    model.train()
    distributed.shard(model)
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=cfg.lr, betas=(0.9, cfg.beta2), weight_decay=cfg.weight_decay, fused=True
    )
    step, minutes, metrics = 0, 0.0, {}
    if state_path is not None:
        state = load_train_state(state_path)
        distributed.load_full_state_dict(model, state["model"])
        distributed.load_optimizer_state(optimizer, state["optimizer"])
        step, minutes, metrics = state["step"], state["minutes"], state["metrics"]
    resumed_at = step

    def save() -> None:
        weights, optimizer_state = distributed.full_state_dict(model), distributed.optimizer_state(optimizer)
        if distributed.is_main():
            names = {"train_episodes": [e.name for e in train], "held_out_episodes": [e.name for e in held_out]}
            extra = {**names, "metrics": metrics, "steps": step}
            save_model(Path(cfg.out_dir) / "model.safetensors", model, cfg.model, extra, weights)
            state = {"model": weights, "optimizer": optimizer_state, "step": step, "metrics": metrics}
            save_train_state(cfg.out_dir, {**state, "minutes": clock.minutes})

    log, clock = RunLog(cfg.out_dir, cfg.steps, "tokenizer", step), Clock(cfg.steps, cfg.max_minutes, minutes)
    while (share := clock.share(step)) < 1:
        torch.manual_seed(seed_of(cfg.seed, part[0], step))  # dropout
        batch = sampler.batch(cfg.batch_size, cfg.seed, step, part=part)
        context = batch.context_frame.to(device)
        frames = pick_frames(batch, cfg.future_frames, cfg.batch_size, part, cfg.seed, step).to(device)

        with autocast:
            out = model(context, frames)
        loss, parts = reconstruction_loss(
            out,
            context,
            frames,
            perceptual=distance,
            perceptual_weight=cfg.perceptual_weight,
            square_weight=cfg.square_weight,
            moving_weight=cfg.moving_weight,
            usual_frame=usual.to(device) if cfg.unusual_weight != 1 else None,
            unusual_weight=cfg.unusual_weight,
            pyramid=cfg.pyramid,
            still_weight=cfg.still_weight,
        )
        parts = distributed.mean_across_ranks({"loss": loss.detach(), **parts})
        check_finite(parts["loss"], step, parts)

        for group in optimizer.param_groups:
            group["lr"] = cfg.lr * rate_factor(step, share, cfg.warmup, "cosine", cfg.final_lr_share)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        parts["grad_norm"] = distributed.clip_grad_norm(model.parameters(), cfg.clip)
        optimizer.step()

        step += 1
        if step % cfg.validate_every == 0:
            metrics = validate(model, validation, usual, device, autocast)
        if step % cfg.log_every == 0 or step % cfg.validate_every == 0:
            used = {"codes_used": out.future_tokens.unique().numel(), "lr": optimizer.param_groups[0]["lr"]}
            fresh = metrics if step % cfg.validate_every == 0 else {}
            log.log(step - 1, {**parts, **used, "minutes": clock.minutes, **fresh})
        if step % cfg.save_every == 0:
            save()

    if state_path is None or step > resumed_at:
        metrics = validate(model, validation, usual, device, autocast)
        save()
    draw(
        model, validation, device, Path(cfg.out_dir) / "reconstructions.png"
    )  # on all ranks: its forward is collective
    if distributed.is_main():
        print("tokenizer: " + "  ".join(f"{k} {v:.2f}" for k, v in metrics.items()) + f"  -> {cfg.out_dir}")
    log.close()
    distributed.cleanup()
    return metrics


if __name__ == "__main__":
    main(parse(Config, PRESETS, sys.argv[1:], __doc__))
