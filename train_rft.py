"""Stage II: reinforcement fine-tuning of a VLA policy inside a frozen world model (Sec. 3.3, Algorithm 1).

Per step: 16 start states of the demonstrations; 16 action chunks a start, sampled from the SDE policy (Eqs. 5-7); each
chunk played inside the world model (Eq. 10) and scored by a
verified reward (Eq. 11, Table 4); group-relative advantages (Eq. 12); one update of flow head and sigma net (Eq. 13).
The vision-language model and the world model stay frozen; the
vision-language model runs once per start.

    python train_rft.py --policy runs/sft/model.safetensors --world-model runs/wm/model.safetensors --demos demos
    torchrun --nproc-per-node 8 train_rft.py ...        # starts are spread over processes, a group stays on one

Reads a policy of train_sft.py, a world model of train_wm.py and the demonstrations that the policy was trained on (its
training split, named in its checkpoint). Writes
out_dir/model.safetensors (the whole policy with its sigma net), train_state.pt, log.jsonl, rollouts.png (best and worst
imagination of the last step beside the reference). The same
command resumes an interrupted run.

Deviations from the paper, each an option:
- the log-density of a chunk is the sum over its 8 x 7 scalars; Eq. (8) leaves this open. The mean over the K steps is
Eq. (8).
- the entropy is the mean over all scalars of the chain; the paper does not define its reduction.
- preset tiny divides the advantage by the group's standard deviation (as the public release), imagines greedily and
takes the intended actions of noisy demonstrations as reference
  (--divide-by-std, --imagination, --reference); its learning rates are those of a head with 1/100 of the paper's
  parameters.
"""

import math
import sys
import time
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import torch
from einops import rearrange
from torch import Tensor

from vlarft import distributed
from vlarft.checkpoint import load_model, load_train_state, open_run, save_train_state
from vlarft.config import opt, parse, to_dict
from vlarft.data import Batch, WindowSampler, load_episodes
from vlarft.flow import Chain, chain_log_prob, matching_loss, sample_chain
from vlarft.grpo import Objective, OverK, advantages, mean_entropy, policy_loss
from vlarft.grpo import chain_log_prob as reduce_log_prob
from vlarft.metrics import perceptual
from vlarft.pictures import grid, save_png
from vlarft.policy import PolicyConfig, VLAPolicy
from vlarft.reward import Imagination, OverFrames, Reward, RewardKind, check_same_robot, verified_reward
from vlarft.runlog import RunLog, check_finite
from vlarft.schedule import Clock, generator, rate_factor
from vlarft.world_model import WorldModel


@dataclass(frozen=True)
class Config:
    policy: str = opt("runs/sft/model.safetensors", "policy to fine-tune, of train_sft.py")
    world_model: str = opt("runs/wm/model.safetensors", "frozen world model, of train_wm.py")
    demos: str = opt("demos", "folder of demonstrations (HDF5)")
    out_dir: str = opt("runs/rft", "folder that the run writes")
    seed: int = opt(0, "of starts, chains and imagination")
    steps: int = opt(400, "GRPO steps (Sec. 4.3)")
    starts: int = opt(16, "start states a step, over all processes (release)")
    group: int = opt(16, "rollouts a start (Sec. 4.1)")
    epochs: int = opt(1, "updates on each batch of rollouts (release)")
    micro_starts: int | None = opt(None, "starts per backward pass, to bound memory; none takes all")
    lr: float = opt(1e-6, "AdamW learning rate of the flow head (release)")
    sigma_lr: float = opt(1e-5, "AdamW learning rate of the sigma net (release)")
    weight_decay: float = opt(0.01, "AdamW weight decay (release)")
    warmup: int = opt(10, "steps of linear warmup, constant after (release)")
    clip_norm: float = opt(1.0, "global gradient norm (release)")
    reward: RewardKind = opt("r3", "verified reward (Table 4)")
    reference: Literal["executed", "intended"] = opt(
        "executed", "dataset actions that R1 and R3 compare with: executed, or before the demonstrator's noise"
    )
    l1_weight: float = opt(1.0, "lambda_1 (Eq. 11)")
    perceptual: Literal["lpips", "ssim", "none"] = opt("lpips", "perceptual term (Eq. 11)")
    perceptual_weight: float = opt(1.0, "lambda_lp (Eq. 11)")
    perceptual_weights: str | None = opt(None, "VGG-16 weights for lpips; none looks in torchvision's cache")
    over_frames: OverFrames = opt("sum", "reduction of the reward over frames (Eq. 11); mean is the release's")
    imagination: Imagination = opt("sample", "sampling inside the world model: sample, common random numbers, greedy")
    temperature: float = opt(1.0, "of the imagination (release)")
    top_p: float = opt(0.8, "of the imagination (release)")
    divide_by_std: bool = opt(False, "divide the advantage by the group's std (release); Eq. 12 does not")
    over_k: OverK = opt("mean", "reduction of log-probs over flow steps (Eq. 8); sum is the release's")
    objective: Objective = opt("clip", "surrogate: Eq. 13, or PPO's pessimistic minimum (release)")
    clip_low: float = opt(0.2, "ratio >= 1 - clip_low")
    clip_high: float = opt(0.2, "ratio <= 1 + clip_high")
    mse_weight: float = opt(0.01, "lambda_mse of the flow-matching loss (Eq. 13, release)")
    mse_draws: int = opt(16, "(tau, eps) pairs per start in that loss")
    entropy_weight: float = opt(0.003, "alpha of the entropy bonus (Eq. 13, release)")
    bf16: bool = opt(False, "bf16 autocast around the frozen vision-language model")
    save_interval: int = opt(20, "steps between checkpoints")
    max_minutes: float | None = opt(None, "stop after this wall time, even before `steps`")


PRESETS = {
    "paper": Config(bf16=True),
    "small": Config(lr=3e-5, sigma_lr=3e-4, perceptual="ssim", imagination="greedy", divide_by_std=True),
    "tiny": Config(
        steps=20, starts=8, group=12, warmup=3, lr=1e-4, sigma_lr=1e-3, perceptual="ssim", imagination="greedy",
        divide_by_std=True, reference="intended", mse_weight=0.1, save_interval=8,
    ),
    "smoke": Config(
        steps=2, starts=2, group=3, lr=1e-4, sigma_lr=1e-3, perceptual="ssim", imagination="common",
        divide_by_std=True, reference="intended", save_interval=1,
    ),
}  # fmt: skip


class Rollouts(NamedTuple):
    """What one batch of starts gave; all that the update needs."""

    batch: Batch
    context: Tensor  # (S, N, D)
    chain: Chain
    reward: Reward
    advantage: Tensor  # (S, G)
    seconds: dict[str, float]


def collect(cfg: Config, policy: VLAPolicy, world_model: WorldModel | None, batch: Batch, distance, seed) -> Rollouts:
    """Algorithm 1, lines 6-14: sample chunks, play them in the world model, score them."""
    device = batch.frames.device
    clock = time.monotonic()
    autocast = torch.autocast(device.type, torch.bfloat16) if cfg.bf16 else nullcontext()
    with torch.no_grad(), autocast:
        context = policy.encode(policy.preprocess(batch.frames[:, 0]), batch.instructions).float()
    with torch.no_grad():
        cond = policy.condition(context, batch.proprio).repeat(cfg.group)
        chain = sample_chain(policy.head, policy.sigma_net, cond, generator=generator(device, *seed, 0))
        actions = policy.normalizer.decode_actions(chain.x[:, -1])
    t_policy, clock = time.monotonic() - clock, time.monotonic()
    reward = verified_reward(
        cfg.reward,
        world_model,
        rearrange(actions, "(s g) t a -> s g t a", g=cfg.group),
        batch.actions if cfg.reference == "executed" else batch.intended,
        batch.frames,
        perceptual=distance,
        l1_weight=cfg.l1_weight,
        perceptual_weight=cfg.perceptual_weight,
        over_frames=cfg.over_frames,
        imagination=cfg.imagination,
        temperature=cfg.temperature,
        top_p=cfg.top_p,
        generator=generator(device, *seed, 1),
    )
    seconds = {"policy_s": t_policy, "world_model_s": time.monotonic() - clock}
    advantage = advantages(reward.reward, divide_by_std=cfg.divide_by_std)
    return Rollouts(batch, context, chain, reward, advantage, seconds)


def update(cfg: Config, policy: VLAPolicy, optimizer: torch.optim.Optimizer, rollouts: Rollouts, seed) -> dict:
    """One optimizer step on Eq. (13); gradients are exact whatever `micro_starts` is."""
    num_starts, group = rollouts.advantage.shape
    old_log_prob = reduce_log_prob(rollouts.chain.log_prob, cfg.over_k).view(num_starts, group)
    target = policy.normalizer.encode_actions(rollouts.batch.intended)  # (S, T, A)
    size = cfg.micro_starts or num_starts
    totals: dict[str, float] = {}
    optimizer.zero_grad(set_to_none=True)
    for first in range(0, num_starts, size):
        part = slice(first, min(first + size, num_starts))
        share = (part.stop - part.start) / num_starts
        cond = policy.condition(rollouts.context[part], rollouts.batch.proprio[part])
        chains = rollouts.chain.x[part.start * group : part.stop * group]  # (B, K + 1, T, A)
        scored = chain_log_prob(policy.head, policy.sigma_net, chains, cond.repeat(group))
        surrogate, metrics = policy_loss(
            reduce_log_prob(scored.log_prob, cfg.over_k),
            old_log_prob[part].flatten(),
            rollouts.advantage[part].flatten(),
            clip_low=cfg.clip_low,
            clip_high=cfg.clip_high,
            objective=cfg.objective,
        )
        noise = generator(target.device, *seed, part.start)
        mse, _ = matching_loss(policy.head, target[part], cond, generator=noise, draws=cfg.mse_draws)
        entropy = mean_entropy(scored.entropy)
        loss = surrogate + cfg.mse_weight * mse - cfg.entropy_weight * entropy  # Eq. (13)
        (share * loss).backward()
        noisy = len(policy.sigma_net.cfg.noisy_dims) / scored.entropy.shape[-1]
        # a Gaussian's entropy is log sigma + log(2 pi e) / 2: sigma here is the geometric mean over the chain
        metrics["sigma"] = math.exp(entropy.item() / noisy - 0.5 * math.log(2 * math.pi * math.e))
        metrics |= {"loss": loss.item(), "policy_loss": surrogate.item(), "mse": mse.item(), "entropy": entropy.item()}
        for name, value in metrics.items():
            if name == "ratio_max":
                totals[name] = max(value, totals.get(name, value))
            else:
                totals[name] = totals.get(name, 0.0) + share * value
    totals["grad_norm"] = distributed.clip_grad_norm(
        [p for g in optimizer.param_groups for p in g["params"]], cfg.clip_norm
    )
    if np.isfinite(totals["loss"]):
        optimizer.step()
    return totals


def picture(path: Path, reward: Reward) -> None:
    """PNG of the group whose rewards differ most: reference, best and worst imagination; columns: time."""
    start = reward.reward.std(1).argmax()
    best, worst = reward.reward[start].argmax(), reward.reward[start].argmin()
    rows = [reward.reference[start], reward.frames[start, best], reward.frames[start, worst]]
    labels = ["reference", *(f"{n} {reward.reward[start, i]:.2f}" for n, i in (("best", best), ("worst", worst)))]
    save_png(path, grid(rows, labels))


def main(cfg: Config) -> dict[str, float]:
    device = distributed.setup()
    out_dir = Path(cfg.out_dir)
    policy, extra = load_model(cfg.policy, VLAPolicy, PolicyConfig, device)
    world_model = None
    if cfg.reward != "r1":
        world_model = WorldModel.load(cfg.world_model, device).requires_grad_(False)
        check_same_robot(policy, world_model)
    distance = perceptual(cfg.perceptual, cfg.perceptual_weights) if cfg.reward != "r1" else None
    distributed.local_batch(cfg.starts)
    resume = open_run(out_dir, cfg)
    episodes = load_episodes(cfg.demos, names=extra["train_episodes"])
    sampler = WindowSampler(episodes, policy.cfg.flow.chunk + 1, policy.cfg.flow.chunk)

    torch.manual_seed(cfg.seed)  # of the fresh sigma net
    if policy.sigma_net is None:
        policy.add_sigma_net()
    policy.requires_grad_(False).eval()
    policy.head.requires_grad_(True)
    policy.sigma_net.requires_grad_(True)
    distributed.shard(policy.head, policy.head.net.dit.blocks, ("prepare", "velocity"))
    distributed.shard(policy.sigma_net, policy.sigma_net.net.dit.blocks, ("prepare", "log_sigma"))
    optimizer = torch.optim.AdamW(
        [
            {"params": list(policy.head.parameters()), "lr": cfg.lr},
            {"params": list(policy.sigma_net.parameters()), "lr": cfg.sigma_lr},
        ],
        weight_decay=cfg.weight_decay,
    )
    base_rates = [cfg.lr, cfg.sigma_lr]

    step, minutes = 0, 0.0
    if resume is not None:
        state = load_train_state(resume)
        step, minutes = state["step"], state["minutes"]
        distributed.load_full_state_dict(policy, state["policy"])
        distributed.load_optimizer_state(optimizer, state["optimizer"])
    log, run = RunLog(out_dir, cfg.steps, "rft", step), Clock(cfg.steps, cfg.max_minutes, minutes)
    metrics: dict[str, float] = {}

    def save() -> None:
        weights = distributed.full_state_dict(policy)
        state = {
            "step": step,
            "minutes": run.minutes,
            "policy": weights,
            "optimizer": distributed.optimizer_state(optimizer),
        }
        if distributed.is_main():
            save_train_state(out_dir, state)
            policy.save(out_dir / "model.safetensors", {**extra, "rft": to_dict(cfg)}, weights)

    while (share := run.share(step)) < 1:
        batch = sampler.batch(cfg.starts, cfg.seed, step, part=(distributed.rank(), distributed.world_size()))
        batch = Batch(*(v.to(device) if isinstance(v, Tensor) else v for v in batch))
        for group, rate in zip(optimizer.param_groups, base_rates):
            group["lr"] = rate * rate_factor(step, share, cfg.warmup, "constant")
        rollouts = collect(cfg, policy, world_model, batch, distance, (cfg.seed, step, distributed.rank()))
        clock = time.monotonic()
        for epoch in range(cfg.epochs):
            totals = update(cfg, policy, optimizer, rollouts, (cfg.seed, step, distributed.rank(), 2, epoch))
        rewards = rollouts.reward.reward
        metrics = distributed.mean_across_ranks(
            {
                "reward": rewards.mean(),
                "reward_std": rewards.std(1).mean(),
                "adv_std": rollouts.advantage.std(),
                "constant_groups": (rewards == rewards[:, :1]).all(1).float().mean(),
                **totals,
                **rollouts.seconds,
                "update_s": time.monotonic() - clock,
            }
        )
        check_finite(metrics["loss"], step, metrics)
        log.log(step, metrics)
        step += 1
        if step % cfg.save_interval == 0 and step < cfg.steps:
            save()
    save()
    if distributed.is_main() and metrics and cfg.reward != "r1":
        picture(out_dir / "rollouts.png", rollouts.reward)
    log.close()
    distributed.cleanup()
    return metrics


if __name__ == "__main__":
    main(parse(Config, PRESETS, sys.argv[1:], __doc__.splitlines()[0]))
