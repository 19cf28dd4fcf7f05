"""Train the policy on demonstrations: supervised fine-tuning, Eq. (4), Sec. 3.2 of the paper.

    python train_sft.py --preset tiny --demos demos --out-dir runs/sft                              laptop, minutes
    python train_sft.py --demos libero --init runs/public/policy.safetensors --out-dir runs/sft     paper, 1 GPU
    torchrun --nproc-per-node 8 train_sft.py --demos libero --init runs/public/policy.safetensors --out-dir runs/sft
    python train_sft.py --preset tiny --demos demos --init runs/sft --steps 400 --out-dir runs/more      goes on

Reads demonstrations of any format (docs/data.md) and, with `--init`, a policy. Writes out_dir/model.safetensors (the
average of the weights where there is one, adapters merged), train_state.pt (the same command resumes, with the same
bits on a CPU), log.jsonl, config.json, inputs.json. `--keep-interval` keeps copies of the policy, for eval_libero.py to
play.

`--init` starts from a policy, its normaliser included, with a fresh optimizer and schedule: a new run. Preset paper
wants one, which `python -m vlarft.pretrained policy` makes of public weights; `--init random` says that random weights
are meant. Text is read as the checkpoint reads it (byte-level BPE with public weights), by bytes in a policy from
scratch; the first lines of a run say which, and estimate the memory of a step, which `--accumulate` and
`--checkpoint-activations` lower. `--train head` leaves the vision-language model alone, as RFT does.

`--augment full` is the public code's: a random crop of the policy's crop area, brightness, contrast and saturation
by a factor of up to 1 +- 0.2, hue by up to 0.05 turns. `--augment light`: brightness by up to 1 +- 0.2, and noise of
standard deviation 0.02 on every value.

Differences from the paper and the public code:
- tau comes from a proper Beta(1.5, 1.0); targets are the demonstrator's intended actions where the files have them;
- adapters on parts that the features do not pass through (SigLIP's attention pool, the last block of each encoder) are
  made and stay frozen: they would never get a gradient;
- the random crop is cut out at the camera's resolution, before the resize;
- presets small, tiny and libero: several samples of (tau, x_0) per image, since the vision encoder costs more than the
  head; a cosine schedule with a warmup; the exported weights are an average over the training;
- presets smoke, tiny, libero and small train a convolutional encoder from scratch, with FiLM and an auxiliary loss that
  regresses the hand position at the demonstration's next gripper event (also on `key_batch` further images) and hands
  its prediction to the head as one more context token; all of it is off in preset paper;
- not in the paper: `--objective regression`, the control of fine-tuning with reward R1 (`flow.regression_loss`);
- float32 master weights under bfloat16 autocast; loss, noise and time in float32.
"""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Literal

import torch
from torch import Tensor

from vlarft.data import Batch, WindowSampler, load_episodes, split_episodes
from vlarft.data.augment import OFF, Augmentation, augment
from vlarft.data.consistency import warn_other_contents
from vlarft.data.convention import check_same_images, image_convention
from vlarft.data.episode import Episode
from vlarft.data.episodes import split_facts
from vlarft.nets.lora import LoRAConfig, add_lora, merge_state_dict
from vlarft.normalizer import check_same_units, intended_and_proprio
from vlarft.policy import PRESETS as SIZES
from vlarft.policy import SupervisedObjective, VLAPolicy
from vlarft.run import distributed, memory, migration, preemption
from vlarft.run.checkpoint import open_run, read_header
from vlarft.run.clock import Clock, Decay, rate_factor
from vlarft.run.config import Count, NotNegative, Positive, ProperShare, Rate, Rows, ShareBelow1, Whole, opt, to_dict
from vlarft.run.ema import EMA
from vlarft.run.log import RunLog, check_finite
from vlarft.run.precision import Precision, in_bf16
from vlarft.run.random import generator as make_generator
from vlarft.run.random import seed_of
from vlarft.run.script import run_script
from vlarft.run.train_state import TrainState, check_same_episodes

AUGMENTATIONS = {
    "full": Augmentation(),
    "light": replace(OFF, brightness=0.2, pixel_noise=0.02),
    "none": OFF,
}
WEIGHT_DECAY = 0.01  # on matrices only


@dataclass(frozen=True)
class Config:
    """One supervised run; the defaults are the paper's (Table 6)."""

    demos: tuple[str, ...] = opt(("demos",), "folders or files of demonstrations (HDF5, LeRobot, RLDS)", group="data")
    camera: str = opt("agentview", "camera of the demonstrations")
    validation_fraction: ProperShare = opt(0.02, "share of the episodes held out (49:1, Sec. 4.2)")
    split_seed: Whole = opt(0, "seed of the choice of held-out episodes; the same for every stage")
    augment: Literal["full", "light", "none"] = opt(
        "full", "full: crop and colours (public code); light: brightness and noise"
    )

    size: Literal["paper", "small", "libero", "tiny", "smoke"] = opt(
        "paper", "named sizes of a policy from scratch", "model"
    )
    init: str | None = opt(
        None, "policy to start from: run folder or model.safetensors, or random; preset paper needs one"
    )
    refit_statistics: bool = opt(False, "fit the normaliser of --init to these demonstrations")
    train: Literal["all", "head"] = opt("all", "train the whole policy, or its flow head alone")
    lora_rank: Rows | None = opt(64, "rank of adapters on the VLM, which is frozen otherwise; none: train its weights")

    steps: Count = opt(150_000, "optimizer steps", group="optimisation")
    max_minutes: Positive | None = opt(None, "stop after this wall time; the schedule then follows the clock [min]")
    batch_size: Rows = opt(16, "chunks per step, over all processes")
    accumulate: Rows = opt(1, "micro-batches per step and process")
    checkpoint_activations: bool = opt(False, "recompute activations in the backward pass, for less memory")
    lr: Rate = opt(1e-4, "peak learning rate of AdamW")
    warmup: Whole = opt(0, "steps of linear warmup")
    schedule: Decay = opt("constant", "learning rate after the warmup")
    clip_norm: Positive = opt(1.0, "largest gradient norm")
    precision: Precision = opt("bf16", "autocast of the networks; auto: bf16 where the processor or GPU has it")
    ema: ShareBelow1 | None = opt(None, "decay of the averaged weights that are exported; none: no average")
    objective: SupervisedObjective = opt(
        "matching", "Eq. (4), or L1 error of the chunk made from x_0 (not in the paper)"
    )
    noise_samples: Rows = opt(1, "samples of (tau, x_0) per image; of x_0 for objective regression")
    key_weight: NotNegative = opt(0.0, "weight of the auxiliary loss on the hand position at the next gripper event")
    key_batch: Whole = opt(0, "further images per step for the loss of --key-weight alone, over all processes")

    validation_interval: Count = opt(1000, "steps between validations", group="evaluation")
    validation_segments: Rows = opt(256, "held-out chunks of a validation")

    out_dir: str = opt("runs/sft", "folder that the run writes", group="run")
    seed: Whole = opt(0, "seed of the weights, the batches and the noise")
    log_interval: Count = opt(10, "steps between log lines")
    save_interval: Count = opt(1000, "steps between checkpoints")
    keep_interval: Count | None = opt(
        None, "steps between copies of the policy that are kept (model_001000.safetensors)"
    )
    async_save: bool = opt(False, "write checkpoints in a thread while training goes on")
    frozen: distributed.Frozen = opt("shard", "frozen weights with several processes: sharded, or whole on each")

    def __post_init__(self) -> None:
        if self.train == "head" and self.key_batch:
            raise ValueError(
                f"train head leaves the vision encoder alone, and the {self.key_batch} further images of --key-batch "
                "train nothing else; give --key-batch 0"
            )


PAPER = Config()
TINY = Config(
    size="tiny",
    validation_fraction=0.05,
    steps=1300,
    batch_size=32,
    key_batch=64,
    lr=3e-3,
    schedule="cosine",
    warmup=50,
    noise_samples=4,
    key_weight=1.0,
    ema=0.99,
    lora_rank=None,
    precision="auto",
    augment="light",
    validation_interval=200,
    save_interval=200,
)
PRESETS = {
    "paper": PAPER,
    "robot": replace(PAPER, steps=20_000),  # the real robot's (A.5), batches of 16
    "small": replace(
        TINY,
        size="small",
        steps=30_000,
        batch_size=128,
        key_batch=0,
        lr=3e-4,
        warmup=500,
        ema=0.999,
        precision="bf16",
        validation_interval=1000,
        save_interval=1000,
    ),
    "libero": replace(TINY, size="libero", steps=6000, validation_interval=1000, save_interval=500),
    "tiny": TINY,
    "smoke": replace(
        TINY,
        size="smoke",
        precision="fp32",
        steps=4,
        batch_size=4,
        key_batch=4,
        noise_samples=2,
        validation_interval=2,
        validation_segments=8,
        save_interval=2,
        warmup=1,
    ),
}


def build_policy(
    cfg: Config, action_dim: int = 7, proprio_dim: int = 8, grippers: tuple[int, ...] | None = None
) -> VLAPolicy:
    """Return the policy to train: that of `init`, or random weights of the named size and the robot's dimensions.

    Raises:
        ValueError: the paper's size with random weights that were not asked for, or a policy of several cameras.
    """
    if cfg.init not in (None, "random"):
        policy = VLAPolicy.load(cfg.init).train()
        if len(policy.cfg.cameras) > 1:
            raise ValueError(
                f"{cfg.init} sees {len(policy.cfg.cameras)} cameras ({', '.join(policy.cfg.cameras)}), this script "
                "trains with one: train it with lerobot-train (integrations/lerobot_policy_vlarft)"
            )
        policy.cfg = replace(policy.cfg, cameras=(cfg.camera,))  # what it is trained to see from now on
        return policy
    if cfg.size == "paper" and cfg.init is None:
        raise ValueError(
            "size 'paper' without --init would start from random weights, which the paper's does not; give --init "
            "CHECKPOINT (of public weights: python -m vlarft.pretrained policy), or --init random if you mean it"
        )
    torch.manual_seed(seed_of("weights", cfg.seed))
    sizes = SIZES[cfg.size]
    dims = {"action_dim": action_dim, "proprio_dim": proprio_dim}
    flow = replace(sizes.flow, **dims)
    return VLAPolicy(replace(sizes, cameras=(cfg.camera,), flow=flow, gripper_dims=grippers))


def seen_episodes(init: str) -> list[str]:
    """Return the names of all episodes that a policy, and those it was made from, were trained on."""
    extra = read_header(init).extra
    return extra.get("seen_episodes", extra.get("train_episodes", []))


def without_seen(
    train: list[Episode], held_out: list[Episode], seen: Sequence[str], init: str
) -> tuple[list[Episode], list[Episode]]:
    """Move held-out episodes that the policy `init` has seen to the training episodes, with all of their starts.

    Raises:
        ValueError: it was trained on all of them.
    """
    known = set(seen)
    starts = {e.start or e.name for e in (*train, *held_out) if e.name in known}
    unseen = [e for e in held_out if (e.start or e.name) not in starts]
    if not unseen:
        raise ValueError(
            f"--init {init} was trained on all {len(held_out)} episodes that this run would hold out: give the "
            "--split-seed and --validation-fraction of its training, or more demonstrations"
        )
    return train + [e for e in held_out if (e.start or e.name) in starts], unseen


def instructions(cfg: Config, episodes: Sequence[Episode]) -> dict[str, list[str]]:
    """Collect the instructions of all trainings, for the checkpoint; nothing where those of `init` are not known."""
    own = {e.instruction for e in episodes}
    if cfg.init not in (None, "random"):
        before = read_header(cfg.init).extra.get("instructions")
        return {} if before is None else {"instructions": sorted(own | set(before))}
    return {"instructions": sorted(own)}


def fit_normalizer(policy: VLAPolicy, episodes: Sequence[Episode], refit: bool) -> None:
    """Fit a new policy's normaliser, or with `refit` any; check that the episodes are in its units."""
    if refit or not policy.normalizer.fitted:
        policy.normalizer.fit(*intended_and_proprio(episodes))
    check_same_units(policy.normalizer, episodes)


def choose_trained(policy: VLAPolicy, cfg: Config) -> LoRAConfig | None:
    """Freeze what does not train; return the adapters that were added to the vision-language model, if any."""
    lora = LoRAConfig(cfg.lora_rank) if cfg.lora_rank and cfg.train == "all" else None
    if cfg.train == "head":
        policy.requires_grad_(False).head.requires_grad_(True)
    if lora:
        torch.manual_seed(seed_of("lora", cfg.seed))
        add_lora(policy.vlm, lora)
        policy.vlm.action_queries.requires_grad_(True)
    for vit in policy.vlm.vits:
        vit.freeze_unread()
    return lora


def compute_loss(
    policy: VLAPolicy, batch: Batch, cfg: Config, generator: torch.Generator, train: bool
) -> tuple[Tensor, dict[str, Tensor]]:
    """Compute the loss of one batch on the policy's device.

    In training the images are augmented, and the share of them that `key_batch` adds has the auxiliary loss alone.
    """
    device = generator.device
    images = batch.frames[:, :1].to(device)  # (B, 1, 3, H, W): one camera
    changes = AUGMENTATIONS[cfg.augment]
    if train:
        images = augment(images, changes, crop_area=policy.cfg.crop_area, generator=generator)
    images = policy.preprocess(images, crop=not (train and changes.crop))  # (B, 1, 3, S, S)
    flow_rows = len(images) * cfg.batch_size // (cfg.batch_size + cfg.key_batch) if train else len(images)
    with torch.autocast(device.type, torch.bfloat16, enabled=in_bf16(cfg.precision, device)):
        return policy(
            images,
            batch.instructions,
            batch.proprio.to(device),
            batch.intended[:flow_rows].to(device),
            batch.key_position.to(device),
            generator=generator,
            draws=cfg.noise_samples,
            objective=cfg.objective,
            key_weight=cfg.key_weight,
        )


@torch.no_grad()
def validate(policy: VLAPolicy, batch: Batch, cfg: Config, device: torch.device) -> dict[str, float]:
    """Compute held-out losses without augmentation, with the same times and noise at every call."""
    _, metrics = compute_loss(policy.eval(), batch, cfg, make_generator(device, "validation", cfg.seed), train=False)
    policy.train()
    return {f"val_{k}": float(v) for k, v in metrics.items()}


def estimate_memory(policy: VLAPolicy, data: WindowSampler, cfg: Config, device: torch.device) -> memory.Memory:
    """Estimate the memory of a step, from two small forwards."""
    rows, parts = cfg.batch_size + cfg.key_batch, cfg.accumulate * distributed.world_size()

    def forward(count: int) -> Tensor:
        return compute_loss(policy, data.batch(count, 0), cfg, make_generator(device, "memory"), train=True)[0]

    unit = rows // math.gcd(cfg.batch_size, cfg.key_batch)  # the fewest rows with the batch's share of each kind
    return memory.estimate(policy, forward, rows // parts, unit, bool(cfg.ema))


def main(cfg: Config) -> dict[str, float]:
    """Train, or resume; return the metrics of the last validation."""
    device = distributed.setup()
    parts = cfg.accumulate * distributed.world_size()  # n processes do what n accumulated batches do
    for name in ("batch_size", "key_batch"):
        if getattr(cfg, name) % parts:
            raise ValueError(f"{name} {getattr(cfg, name)} must be a multiple of accumulate x processes = {parts}")

    episodes = load_episodes(cfg.demos, cfg.camera)
    train, held_out = split_episodes(episodes, cfg.validation_fraction, cfg.split_seed)
    seen = []
    if cfg.init not in (None, "random"):
        seen = seen_episodes(cfg.init)
        train, held_out = without_seen(train, held_out, seen, cfg.init)
    images = image_convention(train, cfg.camera)
    facts = {**split_facts(train, held_out), **instructions(cfg, train), **images, "sft": to_dict(cfg)}
    facts["seen_episodes"] = list(dict.fromkeys([*facts["train_episodes"], *seen]))
    if cfg.init not in (None, "random"):
        before, where = read_header(cfg.init).extra, f"the demonstrations {' '.join(cfg.demos)}"
        warn_other_contents(before, f"policy {cfg.init}", episodes)
        facts["episode_digests"] = {**before.get("episode_digests", {}), **facts["episode_digests"]}
        turn = "turn them with python -m vlarft.data.convert SRC DST --turn"
        check_same_images(before, f"policy {cfg.init}", images, where, turn, adapts=True)

    policy = build_policy(cfg, train[0].actions.shape[1], train[0].proprio.shape[1], train[0].grippers)
    fit_normalizer(policy, train, cfg.refit_statistics)
    lora = choose_trained(policy, cfg)
    policy.to(device).train()
    if cfg.checkpoint_activations:
        distributed.recompute(policy.vlm.blocks)
    distributed.shard(policy, policy.vlm.blocks, frozen=cfg.frozen, bf16=in_bf16(cfg.precision, device))
    chunk, rows = policy.cfg.flow.chunk, cfg.batch_size + cfg.key_batch
    data = WindowSampler(train, num_frames=1, chunk=chunk)
    validation = WindowSampler(held_out, num_frames=1, chunk=chunk).spread(cfg.validation_segments)

    parameters = [p for p in policy.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in parameters if (p.ndim > 1) == matrix], "weight_decay": WEIGHT_DECAY * matrix}
        for matrix in (False, True)
    ]
    optimizer = torch.optim.AdamW(groups, lr=cfg.lr, fused=True)
    ema = EMA(parameters, cfg.ema)

    models = () if cfg.init in (None, "random") else ("init",)
    open_run(cfg.out_dir, cfg, older=partial(migration.train_sft, augment=AUGMENTATIONS), models=models)
    learned = {"policy": policy, "ema": ema, "optimizer": optimizer}
    check_same_episodes(cfg.out_dir, facts)
    state = TrainState(cfg.out_dir, learned, cfg.async_save, cfg.keep_interval)
    step, minutes = state.load(step=0, minutes=0.0)
    log, clock, metrics = RunLog(cfg.out_dir, cfg.steps, "sft", step), Clock(cfg.steps, cfg.max_minutes, minutes), {}
    needed = estimate_memory(policy, data, cfg, device)
    if distributed.is_main():
        print(f"text: {policy.vlm.tokenizer.description}\n{needed}", file=sys.stderr)

    def evaluate() -> dict[str, float]:
        with ema.swapped():
            return validate(policy, validation, cfg, device)

    def save() -> None:
        with ema.swapped():
            weights = {k: v.clone() for k, v in distributed.full_state_dict(policy).items()}
        weights = merge_state_dict(weights, lora) if lora else weights
        state.save({"step": step, "minutes": clock.minutes}, policy, policy.cfg, {**facts, "step": step}, weights)

    began, share = step, clock.share(step)
    while share < 1:
        started = time.monotonic()
        optimizer.zero_grad(set_to_none=True)
        totals: dict[str, Tensor] = {}
        for micro in range(cfg.accumulate):
            part = distributed.rank() * cfg.accumulate + micro
            batch = data.batch(rows, cfg.seed, step, part=(part, parts), device=device)
            noise = make_generator(device, "flow", cfg.seed, step, part)
            distributed.sync_gradients(policy, micro + 1 == cfg.accumulate)
            loss, terms = compute_loss(policy, batch, cfg, noise, train=True)
            (loss / cfg.accumulate).backward()
            for name, value in {"loss": loss, **terms}.items():
                totals[name] = totals.get(name, 0.0) + value.detach() / cfg.accumulate
        totals = distributed.mean_across_ranks(totals)

        lr = cfg.lr * rate_factor(step, share, cfg.warmup, cfg.schedule)
        for group in optimizer.param_groups:
            group["lr"] = lr
        totals["grad_norm"] = distributed.clip_grad_norm(parameters, cfg.clip_norm)
        check_finite(totals["loss"], step, totals, partial(data.names, rows, cfg.seed, step))
        optimizer.step()
        ema.update(step)

        step += 1
        share = clock.share(step)
        line = {**totals, "lr": lr, "step_s": time.monotonic() - started, "minutes": clock.minutes}
        if validates := step % cfg.validation_interval == 0 or share >= 1:
            line |= (metrics := evaluate())
        if validates or step % cfg.log_interval == 0:
            log.log(step - 1, line)
        if share < 1 and state.due(step, cfg.save_interval):
            save()

    if step > began:
        save()
    metrics = metrics or evaluate()  # the run was complete already
    state.finish(log)
    return metrics


if __name__ == "__main__":
    run_script(main, Config, PRESETS, __doc__, preemption.deferred)
