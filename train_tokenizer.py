"""Train the frame tokenizer on demonstrations (stage I of the paper, Sec. 3.2; recipe of the public release).

    python train_tokenizer.py --preset tiny --demos demos --out-dir runs/tokenizer          laptop, minutes
    python train_tokenizer.py --demos libero --out-dir runs/tokenizer                       paper's sizes, 1 GPU
    torchrun --nproc-per-node 8 train_tokenizer.py --demos libero --out-dir runs/tokenizer  8 GPUs

Reads: demonstrations of any format (docs/data.md). Writes: out_dir/model.safetensors (weights, config, the split by
episode), train_state.pt (the discriminator, too; to resume: give the same command again), log.jsonl, config.json,
reconstructions.png (of held-out segments, at every validation).

The loss is L1 plus a perceptual distance on the context frame and on the future frames; from step `gan_start` on also a
hinge GAN with gradient penalty. Each batch then serves both steps, the tokenizer's and after it the discriminator's.
The frames of a segment, context included, share one random crop and one change of colour.

Deviations from the public recipe:
- the adversarial term's adaptive weight is the one measured on the step before, so that it is the same for all
  micro-batches and processes, and compares with the whole reconstruction loss (`--gan-balance fixed` turns it off);
- crops keep the image's shape; colours change in one order;
- the perceptual distance is a choice; lpips needs its VGG16 backbone on disk;
- preset tiny (and smoke): no GAN and no augmentation; see `reconstruction_loss` for its weights of pixels; it
  conditions on the segment's first frame, which is what the world model of that preset does.
"""

import sys
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from vlarft.data.augment import OFF, Augmentation, augment
from vlarft.data.convention import image_convention
from vlarft.data.episodes import load_episodes, split_episodes
from vlarft.data.windows import Batch, WindowSampler, pick_frames
from vlarft.metrics import PerceptualDistance, perceptual
from vlarft.nets.discriminator import Discriminator, DiscriminatorConfig
from vlarft.nets.frame_networks import ResBlock
from vlarft.run import distributed, preemption
from vlarft.run.checkpoint import open_run
from vlarft.run.clock import Clock, rate_factor
from vlarft.run.config import opt, parse
from vlarft.run.log import RunLog, check_finite
from vlarft.run.pictures import grid, save_png
from vlarft.run.random import generator, seed_of
from vlarft.run.train_state import TrainState
from vlarft.tokenizer import PRESETS as MODELS
from vlarft.tokenizer import FrameTokenizer, TokenizerConfig
from vlarft.tokenizer_loss import adversarial_balance, last_layer_gradient, reconstruction_loss, reconstruction_psnr


@dataclass(frozen=True)
class Config:
    out_dir: str = opt("runs/tokenizer", "folder that the run writes")
    demos: str = opt("demos", "folder or file of demonstrations (HDF5, LeRobot, RLDS)")
    camera: str = opt("agentview", "camera of the demonstrations")
    model: TokenizerConfig = opt(MODELS["paper"], "sizes of the tokenizer")
    segment: int = opt(7, "frames of a segment that follows the context frame (7 in the public recipe)")
    future_frames: int = opt(7, "frames drawn from each segment for a batch")
    context_lookback: int = opt(15, "context frame drawn from this many frames before the segment; 0 = its first frame")
    augment: Augmentation = opt(
        Augmentation(brightness=0.1, contrast=0.1, saturation=0.1), "changes shared by a segment (public recipe)"
    )
    crop_area: float = opt(0.8, "smallest share of the image that a crop keeps, the largest being 1 (public recipe)")
    batch_size: int = opt(16, "segments per step, over all processes (public recipe)")
    accumulate: int = opt(1, "micro-batches per step and process")
    checkpoint_activations: bool = opt(False, "compute activations twice instead of keeping them")
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
    gan_start: int | None = opt(10_000, "first step with the adversarial loss (public recipe); none = never")
    gan_weight: float = opt(0.1, "weight of the adversarial term (public recipe)")
    gan_balance: Literal["adaptive", "fixed"] = opt(
        "adaptive", "scale that term to the reconstruction's gradient first"
    )
    gradient_penalty: float = opt(10.0, "weight of the discriminator's gradient penalty (public recipe)")
    gan_lr: float = opt(5e-4, "peak learning rate of the discriminator (that of the tokenizer)")
    discriminator: DiscriminatorConfig = opt(DiscriminatorConfig(), "sizes of the discriminator")
    precision: Literal["bf16", "fp32"] = opt("bf16", "autocast of the network forwards; weights are float32")
    validation_fraction: float = opt(0.02, "share of episodes held out (49:1, Sec. 4.2)")
    validate_every: int = opt(2000, "steps between validations")
    validation_segments: int = opt(64, "segments of a validation")
    save_every: int = opt(2000, "steps between checkpoints")
    async_save: bool = opt(False, "write checkpoints in a thread while training goes on")
    log_every: int = opt(20, "steps between log lines")
    seed: int = opt(0, "seed of the split, the weights and the batches")


# passed on to reconstruction_loss
LOSS_FIELDS = ("perceptual_weight", "square_weight", "moving_weight", "unusual_weight", "pyramid", "still_weight")
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
    augment=OFF,
    gan_start=None,
    discriminator=DiscriminatorConfig((32, 64, 128)),
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


@torch.no_grad()
def validate(
    model: FrameTokenizer, batch: Batch, usual: Tensor, autocast: torch.autocast, picture: Path
) -> dict[str, float]:
    """Held-out PSNR [dB]; a picture of up to four segments, true frames above decoded ones, the context first."""
    model.eval()
    device, outs = next(model.parameters()).device, []
    for i in range(0, len(batch.frames), 16):
        with autocast:
            outs.append(model(batch.context_frame[i : i + 16].to(device), batch.frames[i : i + 16].to(device))[:2])
    model.train()
    context, frames = (torch.cat([x.float().clamp(0, 1).cpu() for x in column]) for column in zip(*outs, strict=True))
    if distributed.is_main():
        picks = torch.linspace(0, len(frames) - 1, min(4, len(frames))).round().int().tolist()
        pairs = [([batch.context_frame[i], *batch.frames[i]], [context[i], *frames[i]]) for i in picks]
        save_png(picture, grid([row for pair in pairs for row in pair], ["true", "decoded"] * len(picks)))
    return reconstruction_psnr(context, frames, batch.context_frame, batch.frames, usual)


def train_batch(
    cfg: Config, sampler: WindowSampler, step: int, part: tuple[int, int], device: torch.device
) -> tuple[Tensor, Tensor]:
    """Share `part` of a step's batch, augmented: context frames (S, C, H, W) and future frames (S, L, C, H, W)."""
    batch = sampler.batch(cfg.batch_size, cfg.seed, step, part=part)
    context = batch.context_frame.to(device)
    frames = pick_frames(batch, cfg.future_frames, cfg.batch_size, part, cfg.seed, step).to(device)
    if cfg.augment == OFF:
        return context, frames
    images, source = torch.cat([context[:, None], frames], dim=1), generator(device, "augmentation", cfg.seed, step)
    images = augment(images, cfg.augment, crop_area=(cfg.crop_area, 1.0), generator=source, part=part)
    return images[:, 0], images[:, 1:]


def update_discriminator(
    cfg: Config, discriminator: Discriminator, optimizer: torch.optim.Optimizer, pairs: list[tuple[Tensor, Tensor]]
) -> dict[str, Tensor]:
    """One step on a batch's true and decoded frames, a pair (B, C, H, W) for each micro-batch; the mean metrics."""
    optimizer.zero_grad(set_to_none=True)
    totals: dict[str, Tensor] = {}
    for i, (true, decoded) in enumerate(pairs):
        distributed.sync_gradients(discriminator, i + 1 == len(pairs))
        loss, parts = discriminator.loss(true, decoded, cfg.gradient_penalty)
        (loss / len(pairs)).backward()
        totals = {k: totals.get(k, 0.0) + v / len(pairs) for k, v in parts.items()}
    totals["gan_grad_norm"] = torch.tensor(distributed.clip_grad_norm(discriminator.parameters(), cfg.clip))
    optimizer.step()
    discriminator.refresh()
    return totals


def main(cfg: Config) -> dict[str, float]:
    """Train; returns the last validation's metrics."""
    device = distributed.setup()
    if cfg.future_frames > cfg.segment:
        raise ValueError(f"future_frames={cfg.future_frames} exceeds segment={cfg.segment}")
    if cfg.unusual_weight != 1 and cfg.augment != OFF:
        raise ValueError(
            f"unusual_weight={cfg.unusual_weight} compares frames with the data's median frame, which augmented frames "
            "differ from everywhere: give --unusual-weight 1, or turn every --augment flag off"
        )
    distributed.local_batch(cfg.batch_size, cfg.accumulate)
    parts = distributed.world_size() * cfg.accumulate  # micro-batches of a step, over all processes
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
    usual = sampler.median_frame()

    torch.manual_seed(seed_of("weights", cfg.seed))
    model, discriminator = FrameTokenizer(cfg.model).to(device).train(), None
    if cfg.gan_start is not None:
        discriminator = Discriminator(cfg.discriminator, cfg.model.channels, size).to(device)
    distance: PerceptualDistance | None = None
    if cfg.perceptual != "none":
        distance = perceptual(cfg.perceptual, cfg.perceptual_weights).to(device)
    settings = {"perceptual": distance, "usual_frame": usual.to(device) if cfg.unusual_weight != 1 else None}
    settings |= {name: getattr(cfg, name) for name in LOSS_FIELDS}
    blocks = [m for m in model.modules() if isinstance(m, ResBlock)]
    if cfg.checkpoint_activations:
        distributed.recompute(blocks)
    networks = {"tokenizer": distributed.shard(model, blocks, bf16=cfg.precision == "bf16")}
    peaks = {"tokenizer": cfg.lr, "discriminator": cfg.gan_lr}
    if discriminator is not None:
        networks["discriminator"] = distributed.shard(discriminator, methods=("generator_loss", "loss", "refresh"))
    options = {"betas": (0.9, cfg.beta2), "weight_decay": cfg.weight_decay, "fused": True}
    optimizers = {k: torch.optim.AdamW(net.parameters(), lr=peaks[k], **options) for k, net in networks.items()}

    state_path = open_run(cfg.out_dir, cfg, ignore=("accumulate", "async_save"))
    state = TrainState(cfg.out_dir, {"networks": networks, "optimizers": optimizers}, cfg.async_save)
    balance = 0.0 if cfg.gan_balance == "adaptive" else 1.0
    step, minutes, metrics, balance = state.load(step=0, minutes=0.0, metrics={}, balance=balance)
    resumed_at = step

    def evaluate() -> dict[str, float]:
        return validate(model, validation, usual, autocast, Path(cfg.out_dir) / "reconstructions.png")

    def save() -> None:
        names = {"train_episodes": [e.name for e in train], "held_out_episodes": [e.name for e in held_out]}
        extra = {**names, **image_convention(train, cfg.camera), "metrics": metrics, "steps": step}
        values = {"step": step, "metrics": metrics, "balance": balance, "minutes": clock.minutes}
        state.save(values, model, cfg.model, extra)

    log, clock = RunLog(cfg.out_dir, cfg.steps, "tokenizer", step), Clock(cfg.steps, cfg.max_minutes, minutes)
    while (share := clock.share(step)) < 1:
        adversarial = discriminator is not None and step >= cfg.gan_start
        totals, pairs, slopes, codes = {}, [], 0.0, []
        optimizers["tokenizer"].zero_grad(set_to_none=True)
        for micro in range(cfg.accumulate):
            part = distributed.rank() * cfg.accumulate + micro, parts
            torch.manual_seed(seed_of("dropout", cfg.seed, step, part[0]))  # dropout
            context, frames = train_batch(cfg, sampler, step, part, device)
            distributed.sync_gradients(model, micro + 1 == cfg.accumulate)
            with autocast:
                out = model(context, frames)
            # a view: gradients with respect to it end there and do not set off the sharded model's backward
            out = out._replace(frames=out.frames.view_as(out.frames))
            loss, terms = reconstruction_loss(out, context, frames, **settings)
            if adversarial:
                # (B, C, H, W) each, all frames of all segments
                true, decoded = (torch.cat([c, f.flatten(0, 1)]) for c, f in ((context, frames), out[:2]))
                terms["adversarial"] = discriminator.generator_loss(decoded)
                if cfg.gan_balance == "adaptive":
                    slopes = slopes + torch.stack([last_layer_gradient(x, out) for x in (loss, terms["adversarial"])])
                loss = loss + cfg.gan_weight * balance * terms["adversarial"]
                pairs.append((true, decoded.detach()))
            (loss / cfg.accumulate).backward()
            for name, value in {"loss": loss, **terms}.items():
                totals[name] = totals.get(name, 0.0) + value.detach() / cfg.accumulate
            codes.append(out.future_tokens)
        totals = distributed.mean_across_ranks(totals)

        factor = rate_factor(step, share, cfg.warmup, "cosine", cfg.final_lr_share)
        for name, optimizer in optimizers.items():
            optimizer.param_groups[0]["lr"] = peaks[name] * factor
        totals["grad_norm"] = distributed.clip_grad_norm(model.parameters(), cfg.clip)
        optimizers["tokenizer"].step()
        if adversarial:
            fooled = update_discriminator(cfg, discriminator, optimizers["discriminator"], pairs)
            totals |= {**distributed.mean_across_ranks(fooled), "balance": balance}
            if cfg.gan_balance == "adaptive":
                balance = adversarial_balance(*distributed.mean_tensor(slopes))
        check_finite(totals["loss"], step, totals, partial(sampler.names, cfg.batch_size, cfg.seed, step))

        step += 1
        if step % cfg.validate_every == 0:
            metrics = evaluate()
        if step % cfg.log_every == 0 or step % cfg.validate_every == 0:
            used = {"codes_used": torch.cat(codes).unique().numel(), "lr": cfg.lr * factor}
            fresh = metrics if step % cfg.validate_every == 0 else {}
            log.log(step - 1, {**totals, **used, "minutes": clock.minutes, **fresh})
        if state.due(step, cfg.save_every):
            save()

    if state_path is None or step > resumed_at:
        metrics = metrics if step % cfg.validate_every == 0 else evaluate()
        save()
    if distributed.is_main():
        print("tokenizer: " + "  ".join(f"{k} {v:.2f}" for k, v in metrics.items()) + f"  -> {cfg.out_dir}")
    state.wait()
    log.close()
    distributed.cleanup()
    return metrics


if __name__ == "__main__":
    with preemption.deferred():
        main(parse(Config, PRESETS, sys.argv[1:], __doc__))
