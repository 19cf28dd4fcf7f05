"""Train the frame tokenizer on demonstrations (stage I of the paper, Sec. 3.2; recipe of the public code).

    python train_tokenizer.py --preset tiny --demos demos --out-dir runs/tokenizer          laptop, minutes
    python train_tokenizer.py --demos libero --out-dir runs/tokenizer                       paper's sizes, 1 GPU
    torchrun --nproc-per-node 8 train_tokenizer.py --demos libero --out-dir runs/tokenizer  8 GPUs

Reads demonstrations of any format (docs/data.md). Writes out_dir/model.safetensors (weights, config, the split by
episode), train_state.pt (with the discriminator; the same command resumes), log.jsonl, config.json, and
reconstructions.png of held-out segments at every validation.

The loss is L1 plus a perceptual distance on the context frame and on the future frames; from step `gan_start` on also a
hinge GAN with gradient penalty. Each batch then serves two steps, first the tokenizer's and then the discriminator's,
both at the learning rate `lr`.

`--augment full` is the public recipe: a segment, context frame included, shares one random crop that keeps 80 to 100 %
of the area, and one change of brightness, contrast and saturation by a factor of up to 1 +- 0.1 and of hue by up to
0.05 turns. `--weighting small_objects` makes small moving things count in trainings of minutes, see
`vlarft.tokenizer_loss.WEIGHTINGS`; it compares frames with the data's median frame and therefore excludes `full`.
`--augment symmetries` goes with it and is for few episodes, otherwise learned by heart: the tokenizer sees each
segment with its colour channels in one of six orders, mirrored or not, and what it decodes is changed back before the
loss. Held-out blocks in the hand then keep their colour more often (seen on one seed, not counted).

Differences from the paper and the public recipe:
- the adversarial term's adaptive weight is the one measured on the step before, so that it is the same for all
  micro-batches and processes, and compares with the whole reconstruction loss;
- crops keep the image's aspect ratio; colours change in one order;
- the perceptual distance is a choice; lpips needs its VGG16 backbone on disk;
- the paper gives no number of steps for the tokenizer; the default is its world model's;
- presets small, tiny, libero and smoke: the context frame is the segment's first or any earlier frame of the episode,
  as in an imagination that lasts an episode; and future frames are composed with it, see `TokenizerConfig.compose`;
- presets tiny, libero and smoke: no GAN, no augmentation, weighted pixels.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from vlarft.data.augment import OFF, Augmentation, Symmetry, augment
from vlarft.data.convention import image_convention
from vlarft.data.episodes import Episode, load_episodes, split_episodes, split_facts
from vlarft.data.windows import Batch, WindowSampler, pick_frames
from vlarft.metrics import perceptual
from vlarft.nets.discriminator import Discriminator, DiscriminatorConfig
from vlarft.nets.frame_networks import ResBlock
from vlarft.run import distributed, migration, preemption
from vlarft.run.checkpoint import open_run
from vlarft.run.clock import Clock, rate_factor
from vlarft.run.config import (
    Count,
    Lookback,
    NotNegative,
    Positive,
    ProperShare,
    Rate,
    Rows,
    ShareBelow1,
    Side,
    Whole,
    opt,
)
from vlarft.run.log import RunLog, check_finite
from vlarft.run.pictures import grid, import_pillow, save_png
from vlarft.run.precision import Precision, in_bf16
from vlarft.run.random import generator, seed_of
from vlarft.run.script import run_script
from vlarft.run.train_state import TrainState, check_same_episodes
from vlarft.tokenizer import PRESETS as SIZES
from vlarft.tokenizer import FrameTokenizer, Reconstruction, TokenizerConfig
from vlarft.tokenizer_loss import (
    WEIGHTINGS,
    adversarial_balance,
    colour_weights,
    last_layer_gradient,
    reconstruction_loss,
    reconstruction_psnr,
)

AUGMENTATIONS = {"full": Augmentation(brightness=0.1, contrast=0.1, saturation=0.1), "none": OFF}
CROP_AREA = (0.8, 1.0)
DISCRIMINATORS = {
    "paper": DiscriminatorConfig(),
    "small": DiscriminatorConfig(),
    "tiny": DiscriminatorConfig((32, 64, 128)),
    "smoke": DiscriminatorConfig((32, 64, 128)),
}
GRADIENT_PENALTY = 10.0  # public recipe


@dataclass(frozen=True)
class Config:
    """One training run; the defaults are the paper's sizes and the public recipe."""

    demos: tuple[str, ...] = opt(("demos",), "folders or files of episodes (HDF5, LeRobot, RLDS)", group="data")
    camera: str = opt("agentview", "camera of the demonstrations")
    validation_fraction: ProperShare = opt(0.02, "share of the episodes held out (49:1, Sec. 4.2)")
    split_seed: Whole = opt(0, "seed of the choice of held-out episodes; the same for every stage")
    segment: Rows = opt(7, "frames of a segment that follows the context frame (public recipe: 7)")
    future_frames: Rows = opt(7, "frames picked at random from each segment of a batch")
    context_lookback: Lookback | None = opt(
        15,
        "the context frame lies up to this many frames before the segment; 0: its first; none: any so far; -1: the "
        "episode's first, as in imagined episodes",
    )
    augment: Literal["full", "symmetries", "none"] = opt(
        "full",
        "full: random crop and colours, shared by a segment (public recipe); symmetries: colour channels in random "
        "order, left and right exchanged, both undone before the loss",
    )

    size: Literal["paper", "small", "tiny", "smoke"] = opt("paper", "named sizes of the networks", group="model")
    image_size: tuple[Side, Side] | None = opt(None, "height and width of the images [px]; none: those of --size")

    steps: Count = opt(150_000, "optimizer steps", group="optimisation")
    max_minutes: Positive | None = opt(None, "stop after this wall time; the schedule then follows the clock [min]")
    batch_size: Rows = opt(16, "segments per step, over all processes (public recipe)")
    accumulate: Rows = opt(1, "micro-batches per step and process")
    checkpoint_activations: bool = opt(False, "recompute activations in the backward pass, for less memory")
    lr: Rate = opt(5e-4, "peak learning rate of AdamW, with cosine decay to 0 (public recipe)")
    warmup: Whole = opt(5000, "steps of linear warmup (public recipe)")
    beta2: ShareBelow1 = opt(0.999, "decay of AdamW's second moment (public recipe)")
    clip_norm: Positive = opt(1.0, "largest gradient norm (public recipe)")
    precision: Precision = opt("bf16", "autocast of the networks; auto: bf16 where the processor or GPU has it")
    perceptual: Literal["lpips", "ssim", "none"] = opt("lpips", "perceptual distance beside L1")
    perceptual_weights: str | None = opt(None, "file of the VGG16 backbone for lpips; none: torchvision's cache")
    weighting: Literal["uniform", "small_objects"] = opt(
        "uniform", "pixel weights; small_objects: more on what moves or is rarely there"
    )
    gan_start: Whole | None = opt(10_000, "first step with the adversarial loss; none: never (public recipe)")
    gan_weight: NotNegative = opt(0.1, "weight of the adversarial loss (public recipe)")

    validation_interval: Count = opt(2000, "steps between validations", group="evaluation")
    validation_segments: Rows = opt(64, "held-out segments of a validation")

    out_dir: str = opt("runs/tokenizer", "folder that the run writes", group="run")
    seed: Whole = opt(0, "seed of the weights and the batches")
    log_interval: Count = opt(20, "steps between log lines")
    save_interval: Count = opt(2000, "steps between checkpoints")
    keep_interval: Count | None = opt(
        None, "steps between copies of the model that are kept (model_002000.safetensors)"
    )
    async_save: bool = opt(False, "write checkpoints in a thread while training goes on")

    def __post_init__(self) -> None:
        self.network()  # raises where the image size does not fit
        if self.future_frames > self.segment:
            raise ValueError(f"future_frames={self.future_frames} exceeds segment={self.segment}")
        if self.augment == "symmetries" and self.gan_start is not None:
            raise ValueError("--augment symmetries changes what the adversarial loss weighs: give --gan-start none")
        if self.weighting == "small_objects" and self.augment == "full":
            raise ValueError(
                "weighting small_objects compares frames with the data's median frame, from which augmented frames "
                "differ everywhere: give --weighting uniform, or --augment symmetries or none"
            )

    def network(self) -> TokenizerConfig:
        """Return the tokenizer's sizes."""
        sizes = SIZES[self.size]
        return sizes if self.image_size is None else replace(sizes, image_size=self.image_size)


TINY = Config(
    size="tiny",
    segment=9,
    future_frames=3,
    context_lookback=None,
    batch_size=4,
    steps=2000,
    lr=2e-3,
    warmup=50,
    beta2=0.99,
    perceptual="none",
    weighting="small_objects",
    augment="none",
    gan_start=None,
    precision="auto",
    validation_fraction=0.05,
    validation_interval=1000,
    validation_segments=64,
    save_interval=500,
)
PRESETS = {
    "paper": Config(),
    "small": Config(size="small", context_lookback=None, batch_size=32, steps=50_000, warmup=1000, perceptual="ssim"),
    "libero": replace(TINY, image_size=(128, 128), steps=4000, validation_interval=2000, save_interval=1000),
    "tiny": TINY,
    "smoke": replace(
        TINY, size="smoke", precision="fp32", batch_size=4, steps=20, warmup=2, validation_interval=10,
        validation_segments=8,
    ),
}  # fmt: skip


def load_split(cfg: Config) -> tuple[list[Episode], list[Episode]]:
    """Load training and held-out episodes.

    Raises:
        ValueError: their images are not of the tokenizer's size.
    """
    episodes = load_episodes(cfg.demos, cfg.camera, successes_only=False)
    train, held_out = split_episodes(episodes, cfg.validation_fraction, cfg.split_seed)
    found, expected = tuple(train[0].images.shape[1:3]), cfg.network().image_size
    if found != expected:
        raise ValueError(
            f"{' + '.join(cfg.demos)} has images of {found[0]}x{found[1]}, the tokenizer is for "
            f"{expected[0]}x{expected[1]}: give --image-size {found[0]} {found[1]}, or collect at the other size"
        )
    return train, held_out


def build_networks(cfg: Config, device: torch.device) -> dict[str, torch.nn.Module]:
    """Build the tokenizer and, where a GAN is to be, the discriminator: initialised, and sharded over the processes."""
    torch.manual_seed(seed_of("weights", cfg.seed))
    sizes = cfg.network()
    tokenizer = FrameTokenizer(sizes).to(device).train()
    blocks = [m for m in tokenizer.modules() if isinstance(m, ResBlock)]
    if cfg.checkpoint_activations:
        distributed.recompute(blocks)
    networks = {"tokenizer": distributed.shard(tokenizer, blocks, bf16=in_bf16(cfg.precision, device))}
    if cfg.gan_start is not None:
        discriminator = Discriminator(DISCRIMINATORS[cfg.size], sizes.channels, sizes.image_size).to(device)
        networks["discriminator"] = distributed.shard(discriminator, methods=("generator_loss", "loss", "refresh"))
    return networks


@torch.no_grad()
def validate(
    model: FrameTokenizer, batch: Batch, median_frame: Tensor, autocast: torch.autocast, picture: Path
) -> dict[str, float]:
    """Compute held-out PSNR [dB]; write a picture of up to four segments, true frames above decoded ones, the context
    first.
    """
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
    return reconstruction_psnr(context, frames, batch.context_frame, batch.frames, median_frame)


def train_batch(
    cfg: Config, sampler: WindowSampler, step: int, part: tuple[int, int], device: torch.device
) -> tuple[Tensor, Tensor]:
    """Load and augment share `part` of a step's batch: context frames (S, C, H, W), future frames (S, L, C, H, W)."""
    batch = sampler.batch(cfg.batch_size, cfg.seed, step, part=part, device=device)
    context, frames = batch.context_frame, pick_frames(batch, cfg.future_frames, cfg.batch_size, part, cfg.seed, step)
    if cfg.augment != "full":
        return context, frames
    images, source = torch.cat([context[:, None], frames], dim=1), generator(device, "augmentation", cfg.seed, step)
    images = augment(images, AUGMENTATIONS[cfg.augment], crop_area=CROP_AREA, generator=source, part=part)
    return images[:, 0], images[:, 1:]


def undone(change: Symmetry, out: Reconstruction, grid: tuple[int, int]) -> Reconstruction:
    """Change the output of a tokenizer that saw changed images back, pixels and codes; `grid`: of a frame's tokens."""
    codes = out.future_codes.unflatten(2, grid)  # (S, L, h, w, d)
    codes = torch.where(change.mirrored[:, None, None, None, None], codes.flip(3), codes).flatten(2, 3)
    pictures = {"context_frame": out.context_frame, "frames": out.frames, "generated": out.generated, "mask": out.mask}
    changed = {name: value if value is None else change.undo(value) for name, value in pictures.items()}
    return out._replace(**changed, future_codes=codes)


class Forward(NamedTuple):
    """What a micro-batch gives: the loss of the tokenizer, and what its discriminator learns from."""

    loss: Tensor  # scalar
    metrics: dict[str, Tensor]
    tokens: Tensor  # (S, L, Nf)
    true: Tensor | None = None  # (B, C, H, W), all frames of all segments, as the discriminator sees them
    decoded: Tensor | None = None
    slopes: Tensor | None = None  # (2, ...), last layer's gradients of the reconstruction and of the adversarial loss


def tokenizer_forward(
    model: FrameTokenizer,
    discriminator: Discriminator | None,
    context: Tensor,
    frames: Tensor,
    *,
    reconstruction: Callable[[Reconstruction, Tensor, Tensor], tuple[Tensor, dict[str, Tensor]]],
    gan_weight: float,
    autocast: torch.autocast,
    change: Symmetry | None = None,
) -> Forward:
    """Reconstruct segments and take their loss.

    Args:
        model: the tokenizer.
        discriminator: adds its adversarial loss; None before `gan_start`.
        context: (S, C, H, W).
        frames: (S, L, C, H, W).
        reconstruction: loss of the tokenizer's output, the context and the frames.
        gan_weight: weight of the adversarial loss, its adaptive part included.
        autocast: for the tokenizer's forward; losses are float32.
        change: of what the tokenizer sees; None = it sees the frames as they are.
    """
    with autocast:
        out = model(*((context, frames) if change is None else map(change.apply, (context, frames))))
    if change is not None:
        out = undone(change, out, model.cfg.future_grid)
    # a view: gradients with respect to it end there and do not set off the sharded model's backward
    out = out._replace(frames=out.frames.view_as(out.frames))
    loss, metrics = reconstruction(out, context, frames)
    if discriminator is None:
        return Forward(loss, metrics, out.future_tokens)
    true, decoded = (torch.cat([c, f.flatten(0, 1)]) for c, f in ((context, frames), out[:2]))  # (S + S * L, C, H, W)
    adversarial = discriminator.generator_loss(decoded)
    slopes = torch.stack([last_layer_gradient(x, out) for x in (loss, adversarial)])
    loss, metrics["adversarial"] = loss + gan_weight * adversarial, adversarial.detach()
    return Forward(loss, metrics, out.future_tokens, true, decoded.detach(), slopes)


def update_discriminator(
    cfg: Config, discriminator: Discriminator, optimizer: torch.optim.Optimizer, batches: list[Forward]
) -> dict[str, Tensor]:
    """Take one step on the true and decoded frames of a step's micro-batches; return the mean metrics."""
    optimizer.zero_grad(set_to_none=True)
    totals: dict[str, Tensor] = {}
    for i, batch in enumerate(batches):
        distributed.sync_gradients(discriminator, i + 1 == len(batches))
        loss, parts = discriminator.loss(batch.true, batch.decoded, GRADIENT_PENALTY)
        (loss / len(batches)).backward()
        totals = {k: totals.get(k, 0.0) + v / len(batches) for k, v in parts.items()}
    totals["gan_grad_norm"] = torch.tensor(distributed.clip_grad_norm(discriminator.parameters(), cfg.clip_norm))
    optimizer.step()
    discriminator.refresh()
    return totals


def main(cfg: Config) -> dict[str, float]:
    """Train, or resume; return the metrics of the last validation."""
    import_pillow()  # the first picture comes after the work
    device = distributed.setup()
    distributed.check_batch(cfg.batch_size, cfg.accumulate)
    parts = distributed.world_size() * cfg.accumulate  # micro-batches of a step, over all processes
    autocast = torch.autocast(device.type, torch.bfloat16, enabled=in_bf16(cfg.precision, device))

    train, held_out = load_split(cfg)
    sampler = WindowSampler(train, cfg.segment, cfg.segment, cfg.context_lookback)
    validation = WindowSampler(held_out, cfg.segment, cfg.segment, cfg.context_lookback).spread(cfg.validation_segments)
    usual, weighting = sampler.sample_frames(), WEIGHTINGS[cfg.weighting]
    median_frame, colour_weight = usual.median(dim=0).values, colour_weights(usual, weighting.rare)
    facts = {**split_facts(train, held_out), **image_convention(train, cfg.camera)}
    facts["context_lookback"] = cfg.context_lookback

    networks = build_networks(cfg, device)
    model = networks["tokenizer"]
    distance = None
    if cfg.perceptual != "none":
        distance = perceptual(cfg.perceptual, cfg.perceptual_weights).to(device)
    reconstruction = partial(
        reconstruction_loss,
        perceptual=distance,
        weighting=weighting,
        median_frame=median_frame.to(device),
        colour_weight=colour_weight.to(device),
    )

    options = {"lr": cfg.lr, "betas": (0.9, cfg.beta2), "weight_decay": 0.0, "fused": True}  # decay: public recipe
    optimizers = {name: torch.optim.AdamW(network.parameters(), **options) for name, network in networks.items()}

    named = {"size": SIZES, "augment": AUGMENTATIONS, "weighting": WEIGHTINGS, "discriminator": DISCRIMINATORS}
    open_run(cfg.out_dir, cfg, older=partial(migration.train_tokenizer, **named))
    learned = {"networks": networks, "optimizers": optimizers}
    check_same_episodes(cfg.out_dir, facts)
    state = TrainState(cfg.out_dir, learned, cfg.async_save, cfg.keep_interval)
    step, minutes, metrics, balance = state.load(step=0, minutes=0.0, metrics={}, balance=0.0)
    log, clock = RunLog(cfg.out_dir, cfg.steps, "tokenizer", step), Clock(cfg.steps, cfg.max_minutes, minutes)

    def evaluate() -> dict[str, float]:
        return validate(model, validation, median_frame, autocast, Path(cfg.out_dir) / "reconstructions.png")

    def save() -> None:
        values = {"step": step, "metrics": metrics, "balance": balance, "minutes": clock.minutes}
        state.save(values, model, cfg.network(), {**facts, "metrics": metrics, "steps": step})

    began, share = step, clock.share(step)
    while share < 1:
        adversarial = cfg.gan_start is not None and step >= cfg.gan_start
        discriminator = networks["discriminator"] if adversarial else None
        totals, batches = {}, []
        optimizers["tokenizer"].zero_grad(set_to_none=True)
        for micro in range(cfg.accumulate):
            part = distributed.rank() * cfg.accumulate + micro, parts
            torch.manual_seed(seed_of("dropout", cfg.seed, step, part[0]))
            images = train_batch(cfg, sampler, step, part, device)
            distributed.sync_gradients(model, micro + 1 == cfg.accumulate)
            weight = cfg.gan_weight * balance
            change, given = None, {"reconstruction": reconstruction, "gan_weight": weight, "autocast": autocast}
            if cfg.augment == "symmetries":
                change = Symmetry.sample(len(images[0]), generator(device, "augmentation", cfg.seed, step), part)
            out = tokenizer_forward(model, discriminator, *images, **given, change=change)
            (out.loss / cfg.accumulate).backward()
            for name, value in {"loss": out.loss, **out.metrics}.items():
                totals[name] = totals.get(name, 0.0) + value.detach() / cfg.accumulate
            batches.append(out._replace(loss=out.loss.detach()))
        totals = distributed.mean_across_ranks(totals)

        lr = cfg.lr * rate_factor(step, share, cfg.warmup, "cosine")
        for optimizer in optimizers.values():
            optimizer.param_groups[0]["lr"] = lr
        totals["grad_norm"] = distributed.clip_grad_norm(model.parameters(), cfg.clip_norm)
        optimizers["tokenizer"].step()
        if adversarial:
            fooled = update_discriminator(cfg, discriminator, optimizers["discriminator"], batches)
            totals |= {**distributed.mean_across_ranks(fooled), "balance": balance}
            balance = adversarial_balance(*distributed.mean_tensor(sum(b.slopes for b in batches)))
        check_finite(totals["loss"], step, totals, partial(sampler.names, cfg.batch_size, cfg.seed, step))

        step += 1
        share = clock.share(step)
        if validates := step % cfg.validation_interval == 0 or share >= 1:
            metrics = evaluate()
        if validates or step % cfg.log_interval == 0:
            used = torch.cat([b.tokens for b in batches]).unique().numel()
            fresh = metrics if validates else {}
            log.log(step - 1, {**totals, "codes_used": used, "lr": lr, "minutes": clock.minutes, **fresh})
        if share < 1 and state.due(step, cfg.save_interval):
            save()

    if step > began:
        save()
    if distributed.is_main():
        print("tokenizer: " + "  ".join(f"{k} {v:.2f}" for k, v in metrics.items()) + f"  -> {cfg.out_dir}")
    state.finish(log)
    return metrics


if __name__ == "__main__":
    run_script(main, Config, PRESETS, __doc__, preemption.deferred)
