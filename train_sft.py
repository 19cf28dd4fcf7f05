"""Train the policy on demonstrations: supervised fine-tuning, Eq. (4), Sec. 3.2 of the paper.

    python train_sft.py --preset tiny --demos demos --out-dir runs/sft
    python train_sft.py --preset tiny --demos demos --out-dir runs/more --init runs/sft/model.safetensors --steps 400
    torchrun --nproc-per-node 8 train_sft.py --preset paper --demos libero --out-dir runs/paper --from-scratch

Reads demonstrations of any format (`--demos`, see docs/data.md). Writes to --out-dir: model.safetensors
(the EMA of the weights where EMA is on, adapters merged), train_state.pt, log.jsonl, config.json. The same command
resumes an interrupted run, and ends with the same bits on a CPU.

`--init` starts from a policy's checkpoint, its normaliser included, with a fresh optimizer and a fresh learning-rate
schedule; a continued run is a new run. `python -m vlarft.pretrained policy` makes such a checkpoint of public weights,
which preset paper starts from; --from-scratch says that random weights are meant. Text is read as the checkpoint reads
it (byte-level BPE with public weights), by bytes in a policy from scratch; the first lines of a run say which, and
estimate the memory of a step, which --accumulate and --checkpoint-activations lower. --success-interval measures the
exported weights in the simulator as they train; --train head leaves the vision-language model alone, as RFT does.

Differences from the paper, and from the public code:
- several (tau, eps) draws per image (presets small and tiny), since the vision encoder costs more than the head;
- a cosine schedule with a warm-up, and an average of the weights that is what is exported (presets small and tiny);
- adapters on parts that the features do not pass through (SigLIP's attention pool, the last block of each encoder) are
  made and stay frozen: they would never get a gradient;
- the random crop is cut out at the camera's resolution, before the resize;
- presets smoke, tiny and small train a convolutional encoder from scratch, with FiLM and an auxiliary loss that
  regresses the hand position at the demonstration's next gripper event (on `key_batch` further images, too) and hands
  its prediction to the head as one more context token; all of it is off in preset paper;
- not in the paper: --objective regression, the control of fine-tuning with reward R1 (`flow.regression_loss`);
- tau comes from a proper Beta(1.5, 1.0); targets are the demonstrator's intended actions where the files have them;
- float32 master weights under bfloat16 autocast; loss, noise and time in float32.
"""

from __future__ import annotations

import math
import sys
import time
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from vlarft.data import Batch, WindowSampler, load_episodes, split_episodes
from vlarft.data.augment import Augmentation, augment
from vlarft.data.convention import image_convention
from vlarft.nets.lora import LoRAConfig, add_lora, merge_state_dict
from vlarft.policy import PRESETS as POLICIES
from vlarft.policy import SupervisedObjective, VLAPolicy
from vlarft.run import distributed, memory, preemption
from vlarft.run.checkpoint import open_run
from vlarft.run.clock import Clock, Decay, rate_factor
from vlarft.run.config import opt, parse, to_dict
from vlarft.run.ema import EMA
from vlarft.run.log import RunLog, check_finite
from vlarft.run.random import generator as make_generator
from vlarft.run.random import seed_of
from vlarft.run.train_state import TrainState
from vlarft.sim.evaluate import SuccessConfig, success_rate


@dataclass(frozen=True)
class Config(SuccessConfig):
    """One supervised run; the defaults are the paper's (Table 6)."""

    demos: str = opt("demos", "folder or file of demonstrations (HDF5, LeRobot, RLDS)")
    out_dir: str = opt("runs/sft", "folder of the run")
    policy: Literal["paper", "small", "tiny", "smoke"] = opt("paper", "sizes of the policy, when not given by --init")
    init: str | None = opt(None, "checkpoint of a policy to continue from, with a fresh optimizer")
    from_scratch: bool = opt(False, "accept random weights for policy paper")
    refit_statistics: bool = opt(False, "fit the normaliser of --init to these demonstrations")
    train: Literal["all", "head"] = opt("all", "the whole policy, or its flow head alone")
    camera: str = opt("agentview", "camera of the demonstrations")
    validation_fraction: float = opt(0.02, "share of the episodes held out")
    steps: int = opt(150_000, "optimizer steps")
    max_minutes: float | None = opt(None, "stop after this time; the learning rate then follows the share of time")
    batch_size: int = opt(16, "chunks per step, all processes together")
    accumulate: int = opt(1, "micro-batches per step")
    checkpoint_activations: bool = opt(False, "recompute transformer blocks in the backward, for less memory")
    lr: float = opt(1e-4, "peak learning rate, AdamW")
    schedule: Decay = opt("constant", "after the warm-up")
    warmup: int = opt(0, "steps of linear warm-up")
    weight_decay: float = opt(0.01, "AdamW, on matrices only")
    clip_norm: float = opt(1.0, "global gradient norm")
    alpha: float = opt(1.5, "tau ~ Beta(alpha, beta)")
    beta: float = opt(1.0, "tau ~ Beta(alpha, beta)")
    objective: SupervisedObjective = opt("matching", "Eq. (4), or L1 regression of the ODE's chunk from random x_0")
    draws: int = opt(1, "(tau, eps) pairs per image; x_0 of a regression")
    key_weight: float = opt(0.0, "weight of the auxiliary key-position loss")
    key_batch: int = opt(0, "further images per step for that loss alone, all processes together")
    ema: float | None = opt(None, "decay of the averaged weights that are exported; none: no average")
    lora_rank: int | None = opt(64, "adapters on every linear layer of the VLM, the rest of it frozen; none: train all")
    lora_alpha: float = opt(128.0, "adapter scale times rank")
    lora_dropout: float = opt(0.0, "on the adapters' input")
    bf16: bool = opt(True, "autocast to bfloat16; master weights stay float32")
    augment: Augmentation = field(default_factory=Augmentation)
    val_every: int = opt(1000, "steps between validations")
    val_batch: int = opt(256, "held-out chunks of a validation")
    save_every: int = opt(1000, "steps between training states")
    async_save: bool = opt(False, "write checkpoints in a thread while training goes on")
    frozen: distributed.Frozen = opt("shard", "frozen weights over several processes: sharded, or whole on each")
    log_every: int = opt(10, "steps between log lines")
    seed: int = opt(0, "of everything but the split")
    split_seed: int = opt(0, "of the validation split; the world model's --seed makes both hold out the same episodes")

    def __post_init__(self) -> None:
        if self.train == "head" and self.key_batch:
            raise ValueError(
                f"train head leaves the vision encoder alone, and the {self.key_batch} further images of --key-batch "
                "train nothing else; give --key-batch 0"
            )
        if self.objective == "regression" and (self.alpha, self.beta) != (Config.alpha, Config.beta):
            raise ValueError(
                f"--alpha {self.alpha} --beta {self.beta} are of the times that flow matching draws; objective "
                "regression runs the whole flow and draws none: leave them out"
            )


PAPER = Config()
TINY = replace(
    PAPER, policy="tiny", validation_fraction=0.05, steps=1300, batch_size=32, key_batch=64, lr=3e-3, schedule="cosine",
    warmup=50, draws=4, key_weight=1.0, ema=0.99, lora_rank=None, bf16=False,
    augment=Augmentation(crop=False, contrast=0.0, saturation=0.0, hue=0.0, pixel_noise=0.02), val_every=200,
    save_every=200,
)  # fmt: skip
PRESETS = {
    "paper": PAPER,
    "robot": replace(PAPER, steps=20_000),  # the real robot's (A.5), batches of 16
    "small": replace(
        TINY, policy="small", steps=30_000, batch_size=128, key_batch=0, lr=3e-4, warmup=500, ema=0.999,
        bf16=True, val_every=1000, save_every=1000,
    ),
    "tiny": TINY,
    "smoke": replace(
        TINY, policy="smoke", steps=4, batch_size=4, key_batch=4, draws=2, val_every=2, val_batch=8, save_every=2,
        warmup=1,
    ),
}  # fmt: skip


def build_policy(cfg: Config, action_dim: int = 7, proprio_dim: int = 8) -> VLAPolicy:
    """The policy to train: of `init`, or random weights of the preset's sizes and the robot's dimensions.

    Raises:
        ValueError: paper's sizes with random weights and without --from-scratch.
    """
    if cfg.init:
        return VLAPolicy.load(cfg.init).train()
    if cfg.policy == "paper" and not cfg.from_scratch:
        raise ValueError(
            "policy 'paper' without --init would start from random weights, which the paper's does not; give --init "
            "CHECKPOINT (of public weights: python -m vlarft.pretrained policy), or --from-scratch if you mean it"
        )
    torch.manual_seed(seed_of("weights", cfg.seed))
    sizes = POLICIES[cfg.policy]
    dims = {"action_dim": action_dim, "proprio_dim": proprio_dim}
    return VLAPolicy(replace(sizes, cameras=(cfg.camera,), flow=replace(sizes.flow, **dims)))


def compute_loss(
    policy: VLAPolicy, batch: Batch, cfg: Config, generator: torch.Generator, train: bool
) -> tuple[Tensor, dict[str, Tensor]]:
    """Loss of one batch on the policy's device; in training augmented, and the last key_batch's share without flow."""
    device = generator.device
    images = batch.frames[:, :1].to(device)  # (B, 1, 3, H, W): one camera
    if train:
        images = augment(images, cfg.augment, crop_area=policy.cfg.crop_area, generator=generator)
    images = policy.preprocess(images, crop=not (train and cfg.augment.crop))
    flow_rows = len(images) * cfg.batch_size // (cfg.batch_size + cfg.key_batch) if train else len(images)
    with torch.autocast(device.type, torch.bfloat16, enabled=cfg.bf16):
        return policy(
            images,
            batch.instructions,
            batch.proprio.to(device),
            batch.intended[:flow_rows].to(device),
            batch.key_position.to(device),
            generator=generator,
            alpha=cfg.alpha,
            beta=cfg.beta,
            draws=cfg.draws,
            objective=cfg.objective,
            key_weight=cfg.key_weight,
        )


def main(cfg: Config) -> dict[str, float]:
    """Train, or resume; returns the last validation's metrics."""
    device = distributed.setup()
    parts = cfg.accumulate * distributed.world_size()  # n processes do what n accumulated batches do
    for name in ("batch_size", "key_batch"):
        if getattr(cfg, name) % parts:
            raise ValueError(f"{name} {getattr(cfg, name)} must be a multiple of accumulate x processes = {parts}")

    episodes = load_episodes(cfg.demos, cfg.camera)
    train_episodes, val_episodes = split_episodes(episodes, cfg.validation_fraction, cfg.split_seed)

    policy = build_policy(cfg, *(getattr(train_episodes[0], name).shape[1] for name in ("actions", "proprio")))
    open_run(cfg.out_dir, cfg, ignore=("accumulate", "async_save", "frozen"))
    train_data, val_data = (
        WindowSampler(part, num_frames=1, chunk=policy.cfg.flow.chunk) for part in (train_episodes, val_episodes)
    )
    columns = ([getattr(e, name) for e in train_episodes] for name in ("intended", "proprio"))
    columns = [torch.from_numpy(np.concatenate(column)) for column in columns]
    if not policy.normalizer.fitted or cfg.refit_statistics:
        policy.normalizer.fit(*columns)
    policy.normalizer.check(*columns)
    whole = cfg.train == "all"
    lora = LoRAConfig(cfg.lora_rank, cfg.lora_alpha, cfg.lora_dropout) if cfg.lora_rank and whole else None
    if not whole:
        policy.requires_grad_(False).head.requires_grad_(True)
    if lora:
        torch.manual_seed(seed_of("lora", cfg.seed))
        add_lora(policy.vlm, lora)
        policy.vlm.action_queries.requires_grad_(True)
    policy.to(device).train()
    for vit in policy.vlm.vits:
        vit.freeze_unread()
    if cfg.checkpoint_activations:
        distributed.recompute(policy.vlm.blocks)
    distributed.shard(policy, policy.vlm.blocks, frozen=cfg.frozen, bf16=cfg.bf16)

    parameters = [p for p in policy.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in parameters if (p.ndim > 1) == matrix], "weight_decay": cfg.weight_decay * matrix}
        for matrix in (False, True)
    ]
    optimizer = torch.optim.AdamW(groups, lr=cfg.lr, fused=True)

    ema = EMA(parameters, cfg.ema)
    state = TrainState(cfg.out_dir, {"policy": policy, "ema": ema, "optimizer": optimizer}, cfg.async_save)
    step, minutes = state.load(step=0, minutes=0.0)
    log, clock, metrics = RunLog(cfg.out_dir, cfg.steps, "sft", step), Clock(cfg.steps, cfg.max_minutes, minutes), {}
    extra = {
        "train_episodes": [e.name for e in train_episodes],
        "validation_episodes": [e.name for e in val_episodes],
        **image_convention(train_episodes, cfg.camera),
        "sft": to_dict(cfg),
    }

    def averaged() -> dict[str, Tensor]:
        with ema.swapped():
            return {k: v.clone() for k, v in distributed.full_state_dict(policy).items()}

    def exported(weights: dict[str, Tensor]) -> dict[str, Tensor]:
        return merge_state_dict(weights, lora) if lora else weights

    def save() -> None:
        values = {"step": step, "minutes": clock.minutes}
        state.save(values, policy, policy.cfg, {**extra, "step": step}, exported(averaged()))

    def forward(rows: int) -> Tensor:
        return compute_loss(policy, train_data.batch(rows, 0), cfg, make_generator(device, "memory"), train=True)[0]

    rows = cfg.batch_size + cfg.key_batch
    estimate = memory.estimate(
        policy, forward, rows // parts, rows // math.gcd(cfg.batch_size, cfg.key_batch), bool(cfg.ema)
    )
    if distributed.is_main():
        print(f"text: {policy.vlm.tokenizer.description}\n{estimate}", file=sys.stderr)

    @torch.no_grad()
    def evaluate() -> dict[str, float]:
        """Losses on the same held-out chunks, taus and noise at every call, without augmentation."""
        batch, draws = val_data.spread(cfg.val_batch), make_generator(device, "validation", cfg.seed)
        with ema.swapped():
            _, metrics = compute_loss(policy.eval(), batch, cfg, draws, train=False)
        policy.train()
        return {f"val_{k}": float(v) for k, v in metrics.items()}

    while (share := clock.share(step)) < 1:
        started = time.monotonic()
        factor = rate_factor(step, share, cfg.warmup, cfg.schedule)
        for group in optimizer.param_groups:
            group["lr"] = cfg.lr * factor
        optimizer.zero_grad(set_to_none=True)
        totals: dict[str, Tensor] = {}
        for micro in range(cfg.accumulate):
            part = distributed.rank() * cfg.accumulate + micro
            batch = train_data.batch(cfg.batch_size + cfg.key_batch, cfg.seed, step, part=(part, parts))
            noise = make_generator(device, "flow", cfg.seed, step, part)
            torch.manual_seed(seed_of("dropout", cfg.seed, step, part))  # of dropout
            distributed.sync_gradients(policy, micro + 1 == cfg.accumulate)
            loss, terms = compute_loss(policy, batch, cfg, noise, train=True)
            (loss / cfg.accumulate).backward()
            for name, value in {"loss": loss, **terms}.items():
                totals[name] = totals.get(name, 0.0) + value.detach() / cfg.accumulate
        totals = distributed.mean_across_ranks(totals)
        totals["grad_norm"] = distributed.clip_grad_norm(parameters, cfg.clip_norm)
        names = partial(train_data.names, cfg.batch_size + cfg.key_batch, cfg.seed, step)
        check_finite(totals["loss"], step, totals, names)
        optimizer.step()
        ema.update(step)
        step += 1
        line = {**totals, "lr": cfg.lr * factor, "step_s": time.monotonic() - started}
        line["minutes"] = clock.minutes
        if step % cfg.val_every == 0:
            line |= (metrics := evaluate())
        if measured := cfg.success_interval and step % cfg.success_interval == 0:
            with clock.paused():
                line |= success_rate(cfg, policy.cfg, exported(averaged()), cfg.seed)
        if measured or step % cfg.log_every == 0 or step % cfg.val_every == 0:
            log.log(step - 1, line)
        if state.due(step, cfg.save_every):
            save()
    if not metrics or step % cfg.val_every:
        log.log(step - 1, metrics := evaluate())
    save()
    state.wait()
    log.close()
    distributed.cleanup()
    return metrics


if __name__ == "__main__":
    with preemption.deferred():
        main(parse(Config, PRESETS, sys.argv[1:], __doc__.splitlines()[0]))
