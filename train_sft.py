"""Train the policy on demonstrations: supervised fine-tuning, Eq. (4), Sec. 3.2 of the paper.

    python train_sft.py --preset tiny --demos demos --out-dir runs/sft
    python train_sft.py --preset tiny --demos demos --out-dir runs/more --init runs/sft/model.safetensors --steps 400
    torchrun --nproc-per-node 8 train_sft.py --preset paper --demos libero --out-dir runs/paper --from-scratch

Reads demonstrations in LIBERO's HDF5 layout (`--demos`, a folder or a file). Writes to --out-dir: model.safetensors
(the EMA of the weights where EMA is on, adapters merged), train_state.pt, log.jsonl, config.json. The same command
resumes an interrupted run and ends with the same bits on a CPU.

`--init` starts from a policy's checkpoint, its normaliser included, with a fresh optimizer and a fresh learning-rate
schedule; a continued run is a new run. Loading the public Prismatic and Qwen weights is not part of this script yet:
preset paper therefore needs --init, or --from-scratch to say that random weights are meant.

Differences from the paper:
- several (tau, eps) draws per image (preset tiny), since the vision encoder costs more than the head;
- presets smoke, tiny and small train a convolutional encoder from scratch, with FiLM and an auxiliary loss that
  regresses the hand position at the demonstration's next gripper event; both are off in preset paper;
- tau comes from a proper Beta(1.5, 1.0); targets are the demonstrator's intended actions where the files have them.
"""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import torch

from vlarft import distributed
from vlarft.checkpoint import load_train_state, open_run, save_train_state
from vlarft.config import opt, parse, to_dict
from vlarft.data import Batch, WindowSampler, load_episodes, split_episodes
from vlarft.lora import LoRAConfig, add_lora, merge_state_dict
from vlarft.policy import PRESETS as POLICIES
from vlarft.policy import VLAPolicy
from vlarft.runlog import RunLog, check_finite


@dataclass(frozen=True)
class Config:
    """One supervised run; the defaults are the paper's (Table 6)."""

    demos: str = opt("demos", "folder or file of demonstrations")
    out_dir: str = opt("runs/sft", "folder of the run")
    policy: Literal["paper", "small", "tiny", "smoke"] = opt("paper", "sizes of the policy, when not given by --init")
    init: str | None = opt(None, "checkpoint of a policy to continue from, with a fresh optimizer")
    from_scratch: bool = opt(False, "accept random weights for policy paper")
    camera: str = opt("agentview", "camera of the demonstrations")
    validation_fraction: float = opt(0.02, "share of the episodes held out")
    steps: int = opt(150_000, "optimizer steps")
    max_minutes: float | None = opt(None, "stop after this time; the learning rate then follows the share of time")
    batch_size: int = opt(16, "chunks per step, all processes together")
    accumulate: int = opt(1, "micro-batches per step")
    learning_rate: float = opt(1e-4, "peak, AdamW")
    schedule: Literal["constant", "cosine"] = opt("constant", "after the warm-up")
    warmup: int = opt(0, "steps of linear warm-up")
    weight_decay: float = opt(0.01, "AdamW, matrices only")
    clip_norm: float = opt(1.0, "global gradient norm")
    alpha: float = opt(1.5, "tau ~ Beta(alpha, beta)")
    beta: float = opt(1.0, "tau ~ Beta(alpha, beta)")
    draws: int = opt(1, "(tau, eps) pairs per image")
    key_weight: float = opt(0.0, "weight of the auxiliary key-position loss")
    ema: float | None = opt(None, "decay of the averaged weights that are exported; none: no average")
    lora_rank: int | None = opt(64, "adapters on every linear layer of the VLM, the rest of it frozen; none: train all")
    lora_alpha: float = opt(128.0, "adapter scale times rank")
    lora_dropout: float = opt(0.0, "on the adapters' input")
    bf16: bool = opt(True, "autocast to bfloat16; master weights stay float32")
    crop: bool = opt(True, "random crops of the policy's crop_area, where that is below 1")
    brightness: float = opt(0.2, "factor 1 +- this")
    contrast: float = opt(0.2, "factor 1 +- this")
    saturation: float = opt(0.2, "factor 1 +- this")
    hue: float = opt(0.05, "+- this share of a turn")
    pixel_noise: float = opt(0.0, "standard deviation of noise on each pixel, in [0, 1] units")
    val_every: int = opt(1000, "steps between validations")
    val_batch: int = opt(256, "held-out chunks of a validation")
    save_every: int = opt(1000, "steps between training states")
    log_every: int = opt(10, "steps between log lines")
    seed: int = opt(0, "of everything")


PAPER = Config()
TINY = replace(
    PAPER,
    policy="tiny",
    validation_fraction=0.05,
    steps=1200,
    batch_size=64,
    learning_rate=1e-3,
    schedule="cosine",
    warmup=50,
    draws=4,
    key_weight=3.0,
    ema=0.99,
    lora_rank=None,
    bf16=False,
    contrast=0.0,
    saturation=0.0,
    hue=0.0,
    pixel_noise=0.02,
    val_every=200,
    save_every=200,
)
PRESETS = {
    "paper": PAPER,
    "small": replace(
        TINY,
        policy="small",
        steps=30_000,
        batch_size=128,
        learning_rate=3e-4,
        warmup=500,
        ema=0.999,
        bf16=True,
        val_every=1000,
        save_every=1000,
    ),
    "tiny": TINY,
    "smoke": replace(
        TINY, policy="smoke", steps=4, batch_size=4, draws=2, val_every=2, val_batch=8, save_every=2, warmup=1
    ),
}


def build_policy(cfg: Config) -> VLAPolicy:
    """The policy to train: of `init`, or random weights of the preset's sizes.

    Raises:
        ValueError: paper's sizes with random weights and without --from-scratch.
    """
    if cfg.init:
        return VLAPolicy.load(cfg.init).train()
    if cfg.policy == "paper" and not cfg.from_scratch:
        raise ValueError(
            "policy 'paper' without --init would start from random weights, which is not what the paper does; give --init "
            "CHECKPOINT (a policy written by this library; public weights cannot be read yet), or --from-scratch if you mean it"
        )
    torch.manual_seed(cfg.seed)
    return VLAPolicy(POLICIES[cfg.policy])


def augment(images: torch.Tensor, cfg: Config, crop_area: float, generator: torch.Generator) -> torch.Tensor:
    """Random crop, colour and noise, one draw per row; all cameras of a row share it.

    Args:
        images: (B, V, 3, H, W), floats in [0, 1].
        cfg: the ranges.
        crop_area: area of the crop, at a random place, resized back to (H, W); 1 keeps all.
        generator: on the images' device.
    """
    device, rows = images.device, len(images)

    def factor(spread: float) -> torch.Tensor:
        u = torch.rand(rows, 1, 1, 1, 1, generator=generator, device=device)
        return 1 + spread * (2 * u - 1)

    if cfg.crop and crop_area < 1:
        size = crop_area**0.5
        shift = (2 * torch.rand(rows, 2, generator=generator, device=device) - 1) * (1 - size)
        theta = torch.cat([size * torch.eye(2, device=device).expand(rows, 2, 2), shift[..., None]], dim=-1)
        flat, views = images.flatten(0, 1), images.shape[1]
        grid = torch.nn.functional.affine_grid(theta.repeat_interleave(views, 0), flat.shape, align_corners=False)
        images = torch.nn.functional.grid_sample(flat, grid, align_corners=False).view_as(images)
    if cfg.brightness:
        images = images * factor(cfg.brightness)
    if cfg.contrast:
        mean = images.mean(dim=(-3, -2, -1), keepdim=True)
        images = mean + (images - mean) * factor(cfg.contrast)
    if cfg.saturation:
        grey = images.mean(dim=-3, keepdim=True)
        images = grey + (images - grey) * factor(cfg.saturation)
    if cfg.hue:
        # a turn about the grey axis: c x + (1 - c) grey + s (grey direction cross x)
        angle = 2 * torch.pi * (factor(cfg.hue) - 1)
        grey, r, g, b = images.mean(dim=-3, keepdim=True), *images.split(1, dim=-3)
        cross = torch.cat([b - g, r - b, g - r], dim=-3) / 3**0.5
        images = grey + (images - grey) * angle.cos() + cross * angle.sin()
    if cfg.pixel_noise:
        images = images + cfg.pixel_noise * torch.randn(images.shape, generator=generator, device=device)
    return images.clamp(0, 1)


def generator_of(device: torch.device, *seed: int) -> torch.Generator:
    """A generator whose state is a function of a few integers."""
    mixed = 0
    for value in seed:
        mixed = (mixed * 1_000_003 + value + 1) % 2**63
    return torch.Generator(device).manual_seed(mixed)


def compute_loss(
    policy: VLAPolicy, batch: Batch, cfg: Config, generator: torch.Generator, train: bool
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Loss of one batch on the policy's device; augmented and with all draws in training."""
    device = generator.device
    images = batch.frames[:, :1].to(device)  # (B, 1, 3, H, W): one camera
    area = policy.cfg.crop_area
    if train:
        images = augment(images, cfg, area, generator)
    images = policy.preprocess(images, crop=not (train and cfg.crop))
    autocast = torch.autocast(device.type, torch.bfloat16) if cfg.bf16 else contextlib.nullcontext()
    with autocast:
        return policy(
            images,
            batch.instructions,
            batch.proprio.to(device),
            batch.intended.to(device),
            batch.key_position.to(device),
            generator=generator,
            alpha=cfg.alpha,
            beta=cfg.beta,
            draws=cfg.draws,
            key_weight=cfg.key_weight,
        )


@torch.no_grad()
def validate(policy: VLAPolicy, sampler: WindowSampler, cfg: Config, device: torch.device) -> dict[str, float]:
    """Losses on the same held-out chunks, taus and noise at every call, without augmentation."""
    policy.eval()
    _, metrics = compute_loss(policy, sampler.spread(cfg.val_batch), cfg, generator_of(device, cfg.seed), train=False)
    policy.train()
    return {f"val_{k}": float(v) for k, v in metrics.items()}


@contextlib.contextmanager
def swapped(policy: VLAPolicy, ema: dict[str, torch.Tensor]) -> Iterator[None]:
    """Run a block with the averaged weights in place of the trained ones."""
    trained = {k: p.detach().clone() for k, p in policy.named_parameters() if k in ema}
    load_parameters(policy, ema)
    yield
    load_parameters(policy, trained)


@torch.no_grad()
def load_parameters(policy: VLAPolicy, values: dict[str, torch.Tensor]) -> None:
    """Copy values into the parameters of these names."""
    for name, parameter in policy.named_parameters():
        if name in values:
            parameter.copy_(values[name])


def learning_rate(cfg: Config, step: int, share: float) -> float:
    """Learning rate of a step: linear warm-up, then constant or half a cosine over the share of the run done."""
    warm = min(1.0, (step + 1) / cfg.warmup) if cfg.warmup else 1.0
    decay = 0.5 * (1 + torch.cos(torch.tensor(share * torch.pi)).item()) if cfg.schedule == "cosine" else 1.0
    return cfg.learning_rate * warm * decay


def main(cfg: Config) -> dict[str, float]:
    """Train, or resume training; returns the last validation metrics."""
    device = distributed.setup()
    resume = open_run(cfg.out_dir, cfg)

    episodes = load_episodes(cfg.demos, cfg.camera)
    train_episodes, val_episodes = split_episodes(episodes, cfg.validation_fraction, cfg.seed)

    policy = build_policy(cfg)
    chunk = policy.cfg.flow.chunk
    train_data = WindowSampler(train_episodes, num_frames=1, chunk=chunk)
    val_data = WindowSampler(val_episodes, num_frames=1, chunk=chunk)
    if not policy.normalizer.fitted:
        intended, proprio = (
            torch.cat([torch.from_numpy(getattr(e, name)) for e in train_episodes]) for name in ("intended", "proprio")
        )
        policy.normalizer.fit(intended, proprio)
    lora = LoRAConfig(cfg.lora_rank, cfg.lora_alpha, cfg.lora_dropout) if cfg.lora_rank else None
    if lora:
        torch.manual_seed(cfg.seed + 1)
        add_lora(policy.vlm, lora)
        policy.vlm.action_queries.requires_grad_(True)
    policy.to(device).train()
    encoders = (policy.vlm.vision, policy.vlm.fused_vision)
    distributed.shard(
        policy, [*policy.vlm.language_model.layers, *(b for e in encoders for b in getattr(e, "blocks", ()))]
    )

    trained = {k: p for k, p in policy.named_parameters() if p.requires_grad}
    groups = [
        {"params": [p for p in trained.values() if p.ndim > 1], "weight_decay": cfg.weight_decay},
        {"params": [p for p in trained.values() if p.ndim <= 1], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=cfg.learning_rate)

    step, minutes_before = 0, 0.0
    if resume is not None:
        state = load_train_state(resume)
        step, minutes_before = state["step"], state["minutes"]
        distributed.load_full_state_dict(policy, state["ema"])
    ema = {k: p.detach().clone() for k, p in trained.items()} if cfg.ema else {}
    if resume is not None:
        distributed.load_full_state_dict(policy, state["policy"])
        distributed.load_optimizer_state(optimizer, state["optimizer"])
    log, started, metrics = RunLog(cfg.out_dir, cfg.steps, "sft", step), time.monotonic(), {}
    extra = {
        "train_episodes": [e.name for e in train_episodes],
        "validation_episodes": [e.name for e in val_episodes],
        "camera": cfg.camera,
        "sft": to_dict(cfg),
    }

    def share_done() -> float:
        """Share of the run: of the steps, or of the time, in which the ranks agree."""
        if cfg.max_minutes is None:
            return step / cfg.steps
        minutes = minutes_before + (time.monotonic() - started) / 60
        return max(step / cfg.steps, distributed.mean_across_ranks({"m": minutes})["m"] / cfg.max_minutes)

    def save() -> None:
        with swapped(policy, ema):
            averaged = distributed.full_state_dict(policy)
        state = {
            "step": step,
            "minutes": minutes_before + (time.monotonic() - started) / 60,
            "policy": distributed.full_state_dict(policy),
            "ema": averaged,
            "optimizer": distributed.optimizer_state(optimizer),
        }
        if distributed.is_main():
            save_train_state(cfg.out_dir, state)
            weights = merge_state_dict(averaged, lora) if lora else averaged
            policy.save(Path(cfg.out_dir) / "model.safetensors", {**extra, "step": step}, weights)

    def evaluate() -> dict[str, float]:
        with swapped(policy, ema):
            return validate(policy, val_data, cfg, device)

    # micro-batches are numbered over all processes, so that n processes do what n accumulated batches do
    parts = cfg.accumulate * distributed.world_size()
    if cfg.batch_size % parts:
        raise ValueError(
            f"batch_size {cfg.batch_size} does not divide by accumulate x processes = {parts}; choose a multiple"
        )
    while (share := share_done()) < 1:
        clock = time.monotonic()
        rate = learning_rate(cfg, step, share)
        for group in optimizer.param_groups:
            group["lr"] = rate
        optimizer.zero_grad(set_to_none=True)
        totals: dict[str, float] = {"loss": 0.0}
        for micro in range(cfg.accumulate):
            part = distributed.rank() * cfg.accumulate + micro
            batch = train_data.batch(cfg.batch_size, cfg.seed, step, part=(part, parts))
            loss, parts_of_loss = compute_loss(
                policy, batch, cfg, generator_of(device, cfg.seed, step, part), train=True
            )
            (loss / cfg.accumulate).backward()
            for name, value in {"loss": loss.detach(), **parts_of_loss}.items():
                totals[name] = totals.get(name, 0.0) + float(value) / cfg.accumulate
        check_finite(totals["loss"], step, totals)
        norm = distributed.clip_grad_norm(trained.values(), cfg.clip_norm)
        optimizer.step()
        if cfg.ema:
            decay = min(cfg.ema, (step + 1) / (step + 10))
            with torch.no_grad():
                for name, average in ema.items():
                    average.lerp_(trained[name], 1 - decay)
        step += 1
        if step % cfg.val_every == 0 or step == cfg.steps:
            metrics = evaluate()
        if step % cfg.log_every == 0 or step % cfg.val_every == 0 or step == cfg.steps:
            means = distributed.mean_across_ranks(totals)
            new = metrics if step % cfg.val_every == 0 or step == cfg.steps else {}
            log.log(step - 1, {**means, **new, "lr": rate, "grad_norm": norm, "step_s": time.monotonic() - clock})
        if step % cfg.save_every == 0 and step < cfg.steps:
            save()
    if step < cfg.steps:
        metrics = evaluate()
    save()
    log.close()
    distributed.cleanup()
    return metrics


if __name__ == "__main__":
    main(parse(Config, PRESETS, sys.argv[1:], __doc__.splitlines()[0]))
