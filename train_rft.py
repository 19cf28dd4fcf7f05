"""Stage II: reinforcement fine-tuning of a VLA policy inside a frozen world model (Sec. 3.3, Algorithm 1).

Each step takes 16 start states from the demonstrations; samples 16 action chunks per start from the SDE policy (Eqs. 5
to 7); plays them in the world model (Eq. 10) and scores them by a verified reward (Eq. 11, Table 4); compares each
chunk with the others of its start (Eq. 12); and updates flow head and sigma net (Eq. 13). The vision-language model and
the world model stay frozen.

    python train_rft.py --policy runs/sft --world-model runs/wm --demos demos --out-dir runs/rft
    torchrun --nproc-per-node 8 train_rft.py ...        # starts are spread over processes, a group stays on one

Reads a policy of train_sft.py, a world model of train_wm.py (not with `--reward r1`) and the demonstrations that the
policy was trained on (its checkpoint names episodes and camera). Writes to out_dir: model.safetensors (the whole policy
with its sigma net), train_state.pt, log.jsonl, config.json, inputs.json, actions.png (action distributions before and
after, Fig. 4) and, with R2 and R3, of the last step's group whose rewards differ most (of several processes, of the
first one's), rollouts.png (best and worst imagination below the reference) and rollouts.npz (their frames, and all
rewards). The same command resumes an interrupted run.

Before the first step a trust gate (gate.py) asks on held-out starts whether the reward ranks action chunks by their
distance to the demonstration's actions; if it does not, by more than chance, the run stops, unless
`--gate-threshold none` is given. R1 is that distance and has no gate.

The control, more supervised training for the same time: `train_sft.py --init SFT --steps 1000000
--max-minutes M`, M being the last `minutes` in this run's log.jsonl.

Differences from the paper, and from the public code (github.com/OpenHelix-Team/VLA-RFT):
- Eq. (8) does not say how the 8 x 7 scalars of a chunk enter its log-probability: here as a sum. Neither does Eq. (13)
  for the entropy: here it is the mean over all scalars of the chain.
- With --epochs 1 the ratio is always 1: Eq. (13)'s clip acts from the second epoch on.
- --per-step (not in the paper): one advantage and one ratio per action step, from the reward of the frame after it.
- --reward divergence (not in the paper): as R3, on the distributions that frame tokens are sampled from.
- --divide-by-std: divides the advantage by the group's standard deviation, as the public code; all presets but paper
  and robot.
- --imagination greedy or common: no sampling noise in the world model, or the same for all chunks of a start; presets
  small, libero and tiny (greedy) and smoke (common).
- --perceptual ssim: in place of LPIPS, whose VGG weights must be downloaded; all presets but paper and robot.
- The reference of R1 and R3, and the target of the flow-matching term, are the demonstrator's intended actions, before
  noise was added; where a data set has one kind of actions only, the executed ones.
- The public code's other choices (ratios per element, PPO's minimum with dual clip, MSE gated by the KL, ...) are in
  studies/variants.py, with Flow-SDE, reward-weighted regression, a KL term, symmetric rewards and training of the whole
  policy: each hands `main` its own score, sample or loss.
- bfloat16 for the frozen networks only; what is trained and what is scored is float32.
"""

import math
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Annotated, Literal, NamedTuple

import numpy as np
import torch
from einops import rearrange
from torch import Tensor, nn

from vlarft.data import Batch, WindowSampler, load_episodes, split_episodes
from vlarft.data.consistency import warn_other_contents
from vlarft.data.convention import check_image_size, check_same_images, image_convention, warn_other_contexts
from vlarft.diagnosis import diagnose, picture_actions
from vlarft.flow import Chain, Transition, chain_log_prob, matching_loss, matching_pairs, transition
from vlarft.gate import check_gate, held_out_names, trust_gate
from vlarft.grpo import advantages, mean_entropy, policy_loss
from vlarft.grpo import chain_log_prob as reduce_log_prob
from vlarft.metrics import PerceptualDistance, perceptual
from vlarft.nets.action_head import Condition
from vlarft.normalizer import check_same_units
from vlarft.policy import PolicyConfig, VLAPolicy
from vlarft.reward import ImageScorer, Imagination, Imagined, RewardKind, Scorer, check_same_robot, make_scorer
from vlarft.run import distributed, migration, preemption
from vlarft.run.checkpoint import load_model, open_run, read_header, write_atomic
from vlarft.run.clock import Clock, rate_factor
from vlarft.run.config import Count, NotNegative, Positive, ProperShare, Range, Rate, Rows, Whole, opt, to_dict
from vlarft.run.log import RunLog, check_finite
from vlarft.run.pictures import grid, import_pillow, save_png
from vlarft.run.precision import Precision, in_bf16
from vlarft.run.random import generator, seed_of
from vlarft.run.script import run_script
from vlarft.run.train_state import TrainState
from vlarft.world_model import WorldModel

WEIGHT_DECAY = 0.01  # AdamW (public code)
MSE_DRAWS = 16  # pairs (tau, eps) per start in the flow-matching term
DIAGNOSIS_STARTS = 16  # where there is no gate
HELD_OUT = 0.02  # share of the episodes, for a policy that names none (49:1, Sec. 4.2)


Correlation = Annotated[float, Range(-1, 1)]


@dataclass(frozen=True)
class Config:
    """One fine-tuning; the defaults are the paper's (Table 7) and, where it gives none, the public code's."""

    policy: str = opt("runs/sft", "policy to fine-tune: run folder or file of train_sft.py", group="data")
    world_model: str = opt("runs/wm", "frozen world model: run folder or file of train_wm.py")
    demos: tuple[str, ...] = opt(("demos",), "folders or files of demonstrations (HDF5, LeRobot, RLDS)")
    starts: Rows = opt(
        16, "start states per step, all processes together (batch size in Table 7)", group="rollouts and reward"
    )
    group: Annotated[int, Range(2, 1024)] = opt(16, "rollouts per start (Table 7)")
    reward: RewardKind = opt("r3", "verified reward (Table 4; divergence is not in the paper)")
    perceptual: Literal["lpips", "ssim", "none"] = opt("lpips", "perceptual term of Eq. (11), of R2 and R3")
    perceptual_weights: str | None = opt(None, "file of the VGG16 backbone for lpips; none: torchvision's cache")
    imagination: Imagination = opt(
        "sample", "frame tokens of R2 and R3: sampled, sampled with common random numbers, or greedy"
    )
    sigma_min: Positive = opt(
        0.08, "lower bound of the standard deviation of a flow step, normalised units (public code)"
    )
    sigma_max: Positive = opt(0.2, "upper bound of the standard deviation of a flow step (public code)")
    steps: Count = opt(400, "GRPO steps (Sec. 4.3)", group="optimisation")
    max_minutes: Positive | None = opt(None, "stop after this wall time, even before `steps` [min]")
    lr: Rate = opt(1e-6, "AdamW learning rate of the flow head (Table 7)")
    sigma_lr: Rate = opt(1e-5, "AdamW learning rate of the sigma net (Table 7)")
    warmup: Whole = opt(10, "steps of linear warmup (public code)")
    clip_norm: Positive = opt(1.0, "largest gradient norm (public code)")
    epochs: Count = opt(1, "updates per batch of rollouts (public code); the clip of Eq. (13) acts from the second on")
    clip: ProperShare = opt(0.2, "epsilon of Eq. (13): the ratio is clipped to 1 +- this")
    per_step: bool = opt(False, "one advantage and ratio per action step; the paper has one per chunk")
    divide_by_std: bool = opt(False, "divide the advantage by the group's std (public code); Eq. (12) does not")
    mse_weight: NotNegative = opt(0.01, "lambda_mse, weight of the flow-matching term (Eq. 13, Table 7)")
    entropy_weight: NotNegative = opt(0.003, "alpha, weight of the entropy (Eq. 13, Table 7)")
    gate_starts: Whole = opt(
        32, "held-out starts of trust gate and diagnosis; 0: no gate, and 16 for the diagnosis", group="evaluation"
    )
    gate_threshold: Correlation | None = opt(
        0.25, "least rank correlation of reward and action error (upper end of its 95 % interval); none: any"
    )
    out_dir: str = opt("runs/rft", "folder that the run writes", group="run")
    save_interval: Count = opt(20, "steps between checkpoints, each with a diagnosis on held-out starts")
    keep_interval: Count | None = opt(None, "steps between copies of the model that are kept; none: no copies")
    async_save: bool = opt(False, "write checkpoints in a thread while training goes on")
    seed: Whole = opt(0, "seed of starts, chains and imagination")
    precision: Precision = opt("bf16", "frozen networks; auto: bf16 where the processor or GPU has it")
    micro_starts: Rows | None = opt(None, "starts per backward pass of a process, to bound memory; none: all")
    compile: bool = opt(False, "torch.compile pixel decoder and perceptual network, of R2 and R3")
    frozen: distributed.Frozen = opt(
        "replicate", "vision-language model with several processes: sharded, or whole on each"
    )

    def __post_init__(self) -> None:
        if self.sigma_min > self.sigma_max:
            raise ValueError(f"--sigma-min {self.sigma_min} exceeds --sigma-max {self.sigma_max}")
        if self.perceptual_weights is not None and self.reward in ("r1", "divergence"):
            raise ValueError(f"--perceptual-weights: reward {self.reward} has no perceptual term, R2 and R3 have")


PAPER = Config()
TINY = Config(
    steps=20, starts=8, group=12, warmup=3, lr=1e-4, sigma_lr=1e-3, perceptual="ssim", imagination="greedy",
    divide_by_std=True, mse_weight=0.1, precision="auto", save_interval=5, gate_starts=12,
)  # fmt: skip
PRESETS = {
    "paper": PAPER,
    "robot": replace(PAPER, steps=200),  # the real robot's (A.5)
    "small": replace(
        PAPER, lr=3e-5, sigma_lr=3e-4, perceptual="ssim", imagination="greedy", divide_by_std=True, precision="fp32"
    ),
    "libero": TINY,
    "tiny": TINY,
    "smoke": Config(
        steps=2, starts=2, group=3, lr=1e-4, sigma_lr=1e-3, perceptual="ssim", imagination="common", divide_by_std=True,
        precision="fp32", save_interval=1, gate_starts=2, gate_threshold=None,
    ),
}  # fmt: skip


class Rollouts(NamedTuple):
    """What lines 6 to 14 of Algorithm 1 hand to line 15, the update: S starts with G rollouts each.

    batch: the S windows of the demonstrations
    context: (S, N, D), Eq. (1)
    x: (S, G, K + 1, T, A), the chains, from noise to normalised actions
    log_prob: (S, G, K, T, A), log-densities of the chains' steps under the policy that sampled them
    reward: (S, G, T), per frame; the loss of a study may read it, Eq. (13) takes the advantage
    advantage: (S, G); (S, G, T) with --per-step
    tau, eps: (S, draws) and (S, draws, T, A), noise of the flow-matching term, Eq. (4); new in each epoch
    """

    batch: Batch
    context: Tensor
    x: Tensor
    log_prob: Tensor
    reward: Tensor
    advantage: Tensor
    tau: Tensor
    eps: Tensor

    def rows(self, rows: slice) -> "Rollouts":
        """Take some of the starts."""
        return Rollouts(self.batch.rows(rows), *(value[rows] for value in self[1:]))


# parts of `main` that a study may replace: lines 6 to 10 of Algorithm 1, and Eq. (13)
Sample = Callable[[VLAPolicy, Batch, Tensor, int, torch.Generator], Chain]
Loss = Callable[[Config, VLAPolicy, Rollouts], tuple[Tensor, dict[str, float]]]


def sample_chains(
    policy: VLAPolicy, batch: Batch, context: Tensor, group: int, source: torch.Generator, step: Transition = transition
) -> Chain:
    """Sample a group of chains per start, S * G rows: lines 6 to 10 of Algorithm 1, Eqs. (5) to (8).

    `part` makes each process sample what it would sample in a run of one process.
    """
    return policy.sample_group(context, batch.proprio, group, source, part=distributed.part(), step=step)


def demonstration_loss(policy: VLAPolicy, rollouts: Rollouts, cond: Condition) -> Tensor:
    """Compute the flow-matching term of Eq. (13): Eq. (4) on the demonstrations' actions."""
    target = policy.normalizer.encode_actions(rollouts.batch.intended)  # (S, T, A)
    pairs = rollouts.tau, rollouts.eps
    loss, _ = matching_loss(policy.head, target, cond, draws=rollouts.tau.shape[1], pairs=pairs)
    return loss


def grpo_loss(
    cfg: Config, policy: VLAPolicy, rollouts: Rollouts, step: Transition = transition
) -> tuple[Tensor, dict[str, float]]:
    """Compute the objective of Eq. (13), to be minimised: a mean over the given rollouts; and its metrics."""
    group = rollouts.x.shape[1]
    # B = S * G rows: (B, K + 1, T, A), (B, K, T, A), (B,) or (B, T)
    x, old_terms, advantage = (v.flatten(0, 1) for v in (rollouts.x, rollouts.log_prob, rollouts.advantage))
    cond = policy.condition(rollouts.context, rollouts.batch.proprio)  # of S contexts
    scored = chain_log_prob(policy.head, policy.sigma_net, x, cond.repeat(group), step)  # (B, K, T, A) each
    # Eq. (8): (B,), or (B, T) with --per-step
    log_prob, old_log_prob = (reduce_log_prob(v, per_step=cfg.per_step) for v in (scored.log_prob, old_terms))
    surrogate, metrics = policy_loss(log_prob, old_log_prob, advantage, clip=cfg.clip)  # Eq. (9), Eq. (13)'s first term
    entropy, mse = mean_entropy(scored.entropy), demonstration_loss(policy, rollouts, cond)
    loss = surrogate - cfg.entropy_weight * entropy + cfg.mse_weight * mse  # Eq. (13)
    terms = {"policy_loss": surrogate, "entropy": entropy, "mse": mse, "sigma": scored.sigma.mean()}
    return loss, metrics | {name: value.item() for name, value in terms.items()}


def backward(loss: Loss, cfg: Config, policy: VLAPolicy, rollouts: Rollouts) -> dict[str, float]:
    """Accumulate the gradients of the loss over this process's starts, `micro_starts` at a time; return its metrics.

    Metrics are means over the starts, but those named `..._max` are maxima.
    """
    starts, totals = len(rollouts.x), {}
    at_once = cfg.micro_starts or starts
    for first in range(0, starts, at_once):
        micro_batch = rollouts.rows(slice(first, first + at_once))
        share = len(micro_batch.x) / starts  # so that the shares' means add up to the mean over all starts
        value, metrics = loss(cfg, policy, micro_batch)
        (share * value).backward()
        for name, metric in {"loss": value.item(), **metrics}.items():
            so_far = totals.get(name)
            if name.endswith("_max"):
                totals[name] = metric if so_far is None else max(metric, so_far)
            else:
                totals[name] = share * metric + (so_far or 0.0)
    return totals


def load_world_model(
    cfg: Config, policy: VLAPolicy, extra: dict, device: torch.device
) -> tuple[WorldModel | None, PerceptualDistance | None]:
    """Load the frozen world model and the perceptual distance that the reward needs; check them against the policy.

    Each is None where the reward does without it: R1 needs neither, divergence no distance. `extra` is what the
    policy's checkpoint says about its training.
    """
    if cfg.reward == "r1":
        return None, None
    world_model = WorldModel.load(cfg.world_model, device).requires_grad_(False)
    check_same_robot(policy, world_model)
    names, imagined = (f"policy {cfg.policy}", f"world model {cfg.world_model}"), read_header(cfg.world_model).extra
    check_same_images(extra, names[0], imagined, names[1])
    warn_other_contexts(imagined, names[1], 0)  # the start itself, wherever in an episode
    tasks = [{name.rpartition("/")[0] for name in of.get("train_episodes", ())} for of in (extra, imagined)]
    if all(tasks) and tasks[0].isdisjoint(tasks[1]):
        warnings.warn(
            f"{names[1]} was trained on none of the files of {names[0]}, on {min(tasks[1])}, ... and not on "
            f"{min(tasks[0])}, ...: if their tasks differ, it has never seen those of the policy",
            stacklevel=2,
        )
    distance = None if cfg.reward == "divergence" else perceptual(cfg.perceptual, cfg.perceptual_weights).to(device)
    if in_bf16(cfg.precision, device):
        world_model.to_bfloat16()
        if distance is not None:
            distance.to_bfloat16()
    if cfg.compile and distance is not None:
        world_model.tokenizer.cond_decoder.compile()
        distance.compile_network()
    return world_model, distance


def windows(
    cfg: Config, policy: VLAPolicy, extra: dict, gated: bool, world_model: WorldModel | None
) -> tuple[WindowSampler, Batch, dict]:
    """Load start states to train on, from the policy's training episodes; fixed held-out starts, for the gate and the
    diagnosis; and `extra`, which names both.

    Held-out starts are of episodes that the policy was not trained on and, where there is a gate, nor was the world
    model. Without a gate, a policy that names no held-out episodes is diagnosed on its training episodes. A policy that
    names no episodes at all, as converted public weights, takes the default split of train_sft.py.

    Raises:
        ValueError: the policy sees several cameras; the gate has no held-out episodes, see `held_out_names`; or the
            demonstrations have images or units unlike those that the policy was trained on, or images of another size
            than the world model's.
    """
    if len(policy.cfg.cameras) > 1:
        raise ValueError(f"{cfg.policy} sees {len(policy.cfg.cameras)} cameras, a world model imagines one")
    camera, demos = extra.get("camera", policy.cfg.cameras[0]), " ".join(cfg.demos)
    if not extra.get("train_episodes"):
        split = split_episodes(load_episodes(cfg.demos, camera), HELD_OUT, 0)
        training, held_out = ([episode.name for episode in part] for part in split)
        extra = {**extra, "train_episodes": training, "held_out_episodes": held_out, "camera": camera}
        if distributed.is_main():
            print(
                f"{cfg.policy} names no episodes of its training: fine-tunes on {len(training)} of {demos} and "
                f"holds out {len(held_out)}, which the policy may have seen",
                file=sys.stderr,
            )
    held_out = extra.get("held_out_episodes") or extra["train_episodes"]
    if gated:
        held_out = held_out_names(cfg.policy, extra, cfg.world_model, read_header(cfg.world_model).extra)
    episodes, others = (load_episodes(cfg.demos, camera, names=names) for names in (extra["train_episodes"], held_out))
    fix = "give the demonstrations that it was trained on"
    warn_other_contents(extra, f"policy {cfg.policy}", [*episodes, *others])
    images = image_convention(episodes, camera)
    check_same_images(extra, f"policy {cfg.policy}", images, f"the demonstrations {demos}", fix)
    check_same_units(policy.normalizer, episodes)
    if world_model is not None:
        check_image_size(world_model.cfg.tokenizer.image_size, f"world model {cfg.world_model}", episodes[0])
    chunk = policy.cfg.flow.chunk
    training, others = (WindowSampler(part, chunk + 1, chunk) for part in (episodes, others))
    return training, others.spread(cfg.gate_starts or DIAGNOSIS_STARTS), extra


def make_trainable(
    cfg: Config, policy: VLAPolicy, rates: Mapping[str, float], sigma_uses_x: bool = False
) -> dict[str, nn.Module]:
    """Add the sigma net, freeze the policy but for the parts that `rates` names, and return these by name.

    A part that this policy does not have (a key head, say) is passed over.
    """
    torch.manual_seed(seed_of("weights", cfg.seed))
    policy.add_sigma_net(cfg.sigma_min, cfg.sigma_max, uses_x=sigma_uses_x or policy.cfg.flow.sigma_uses_x)
    policy.requires_grad_(False).eval()
    return {name: net.requires_grad_(True) for name in rates if (net := getattr(policy, name)) is not None}


def shared_pairs(cfg: Config, batch: Batch, source: torch.Generator) -> tuple[Tensor, Tensor]:
    """Sample (tau, eps) of the flow-matching term for the whole batch; return those of this process's starts."""
    shape = (cfg.starts, *batch.intended.shape[1:])
    pairs = matching_pairs(shape, MSE_DRAWS, generator=source, device=batch.frames.device)
    return distributed.own_rows(pairs[0]), distributed.own_rows(pairs[1])


def shard(policy: VLAPolicy, trained: Mapping[str, nn.Module], cfg: Config) -> None:
    """Spread the networks' parameters over the processes with FSDP, where there are several."""
    for name, net in trained.items():
        if name != "vlm":  # whole, not block by block: the modulations of all blocks are computed before the first one
            used = ("prepare", "at_steps", "velocity", "log_sigma")  # called in place of forward
            distributed.shard(net, methods=[method for method in used if hasattr(net, method)])
    if "vlm" in trained or cfg.frozen == "shard":
        half = in_bf16(cfg.precision, policy.device) and "vlm" not in trained
        distributed.shard(policy.vlm, policy.vlm.blocks, bf16=half)


def save_group(out_dir: Path, instructions: list[str], per_frame: Tensor, imagined: Imagined) -> None:
    """Write the group of this process whose rewards (S, G, T) differ most: its reference, best and worst imagination.

    rollouts.png is for the eye. rollouts.npz has the frames (T, H, W, C), uint8, as `reference`, `best` and `worst`;
    `reward` (G, T), from the best rollout to the worst; and the `instruction`.
    """
    start = int(per_frame.sum(-1).std(1).argmax())
    order = per_frame[start].sum(-1).argsort(descending=True)
    best, worst = order[0], order[-1]
    frames = {"reference": imagined.reference[start], "best": imagined.frames[start, best]}
    frames["worst"] = imagined.frames[start, worst]
    totals = {name: f"{name} {per_frame[start, i].sum():.2f}" for name, i in (("best", best), ("worst", worst))}
    save_png(out_dir / "rollouts.png", grid(list(frames.values()), [totals.get(name, name) for name in frames]))
    arrays = {
        name: (255 * rearrange(value, "t c h w -> t h w c").float().clamp(0, 1)).round().byte().cpu().numpy()
        for name, value in frames.items()
    }
    arrays |= {"reward": per_frame[start, order].cpu().numpy(), "instruction": np.array(instructions[start])}

    def write(tmp: Path) -> None:
        with tmp.open("wb") as file:  # given a name, numpy would append .npz to it
            np.savez_compressed(file, **arrays)

    write_atomic(out_dir / "rollouts.npz", write)


@contextmanager
def timed(seconds: dict[str, float], name: str, device: torch.device) -> Iterator[None]:
    """Note the seconds that the block takes as `seconds[name]`, those of what it leaves a GPU to do among them."""

    def now() -> float:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.monotonic()

    started = now()
    yield
    seconds[name] = now() - started


def across_processes(reward: Tensor, advantage: Tensor, updates: list[dict[str, float]], seconds: dict) -> dict:
    """Reduce a step's metrics over all processes and updates: means, and of `..._max` the largest.

    Args:
        reward: (S, G).
        advantage: (S, G) or (S, G, T); its mean over the whole batch is 0, so that its std is a root mean square.
        updates: metrics of the update of each epoch.
        seconds: by phase.
    """
    metrics = distributed.mean_across_ranks(
        {
            "reward": reward.mean(),
            "reward_std": reward.std(1).mean(),
            "adv_std": advantage.square().mean(),
            "constant_groups": (reward == reward[:, :1]).all(1).float().mean(),
            **{name: sum(row[name] for row in updates) / len(updates) for name in updates[0]},
            **seconds,
        }
    )
    metrics["adv_std"] = math.sqrt(metrics["adv_std"])
    largest = {name: max(row[name] for row in updates) for name in updates[0] if name.endswith("_max")}
    return metrics | distributed.max_across_ranks(largest)


def main(
    cfg: Config,
    *,
    score: Scorer | None = None,
    score_held_out: Scorer | None = None,
    sample: Sample | None = None,
    loss: Loss | None = None,
    rates: Mapping[str, float] | None = None,
    sigma_uses_x: bool = False,
) -> dict[str, float]:
    """Fine-tune, or resume.

    Args:
        cfg: the configuration.
        score: reward in place of --reward, `(batch, actions (S, G, T, A) raw, generator) -> (S, G, T)`; with a trust
            gate if it has `bins`, the action bins of the world model that it imagines in.
        score_held_out: the same reward for the diagnosis on held-out starts; none: `score`. A reward that looks up
            episodes by `batch.index` needs it, since there the index counts the held-out episodes.
        sample: sampling in place of `sample_chains`, `(policy, batch, context, group, generator) -> Chain`.
        loss: objective in place of `grpo_loss`, `(cfg, policy, rollouts) -> (loss, metrics)`, a mean over the starts.
        rates: learning rates of further parts of the policy that are to train: "vlm", "key_head", "key_embed".
        sigma_uses_x: a new sigma net reads x_k besides (z, s, k), as in the public code.

    Returns:
        Metrics of the last step, and the diagnosis after it.
    """
    import_pillow()  # the first picture comes after the work
    device, out_dir, part = distributed.setup(), Path(cfg.out_dir), distributed.part()  # part: (rank, processes)
    distributed.check_batch(cfg.starts)
    policy, extra = load_model(cfg.policy, VLAPolicy, PolicyConfig, device)
    world_model, distance = (None, None) if score else load_world_model(cfg, policy, extra, device)
    # a process scores its part of the training starts, with that part's random numbers, but all held-out starts
    make = partial(make_scorer, cfg.reward, world_model, distance, cfg.imagination)
    score, score_held_out = score or make(part), score_held_out or score or make((0, 1))
    sample, loss = sample or sample_chains, loss or grpo_loss
    gated = cfg.gate_starts > 0 and (world_model is not None or hasattr(score_held_out, "bins"))
    starts, held_out, extra = windows(cfg, policy, extra, gated, world_model)
    held_out = held_out.to(device)
    rates = {"head": cfg.lr, "sigma_net": cfg.sigma_lr, **(rates or {})}
    trained = make_trainable(cfg, policy, rates, sigma_uses_x)
    # raises if the folder holds a run of another configuration, but for what does not change the results
    models = ("policy",) if world_model is None else ("policy", "world_model")
    open_run(
        out_dir, cfg, ignore=("gate_threshold", "micro_starts", "compile"), older=migration.train_rft, models=models
    )
    bf16 = in_bf16(cfg.precision, device) and "vlm" not in trained  # of the context; what trains computes in float32
    diagnosis = partial(diagnose, score_held_out, policy, held_out, cfg.seed, bf16=bf16)
    _, before = diagnosis()  # chunks of the policy as it came: a resumed run loads its weights below
    shard(policy, trained, cfg)
    groups = [{"params": list(net.parameters()), "lr": rates[name]} for name, net in trained.items()]
    optimizer = torch.optim.AdamW(groups, weight_decay=WEIGHT_DECAY)
    parameters = [p for group in groups for p in group["params"]]
    state = TrainState(out_dir, {"policy": policy, "optimizer": optimizer}, cfg.async_save, cfg.keep_interval)
    step, minutes = state.load(step=0, minutes=0.0)
    log, clock, metrics = RunLog(out_dir, cfg.steps, "rft", step), Clock(cfg.steps, cfg.max_minutes, minutes), {}

    def save() -> None:
        values = {"step": step, "minutes": clock.minutes}
        state.save(values, policy, policy.cfg, {**extra, "rft": to_dict(cfg)})

    began = step
    while (share := clock.share(step)) < 1:  # Algorithm 1, Stage II; share: how much of the run is done
        # stream(name, seed, step): random numbers that depend on its arguments alone, so that a resume repeats them
        stream, seconds, measured = partial(generator, device), {}, {}
        with clock.paused():  # measurements do not count as training time
            if gated and step == 0:
                measured |= trust_gate(score_held_out, policy, held_out, cfg.seed, bf16=bf16)
                check_gate(measured, cfg.gate_threshold, cfg.reward)
            if step % cfg.save_interval == 0:
                measured |= diagnosis()[0]

        # line 5: start states of the demonstrations
        batch = starts.batch(cfg.starts, cfg.seed, step, part=part, device=device)

        # lines 6 to 10: a group of action chunks for each start, from the SDE policy
        with timed(seconds, "policy_s", device):
            context = policy.encode_frames(batch.frames[:, 0], batch.instructions, bf16=bf16)  # Eq. (1)
            chain = sample(policy, batch, context, cfg.group, stream("chains", cfg.seed, step))  # Eqs. (5) to (8)
            actions = policy.normalizer.decode_actions(chain.x[:, -1])  # x_K in raw units, which the world model takes
            actions = rearrange(actions, "(s g) t a -> s g t a", g=cfg.group)

        # lines 11 to 14: imagine each chunk, score its frames, compare it with the others of its group
        with timed(seconds, "world_model_s", device), torch.no_grad():
            per_frame = score(batch, actions, stream("imagination", cfg.seed, step))  # Eqs. (10), (11): (S, G, T)
            reward = per_frame.sum(-1)  # Eq. (11)'s sum over frames; of R1, over action steps: (S, G)
            advantage = advantages(per_frame if cfg.per_step else reward, divide_by_std=cfg.divide_by_std)  # Eq. (12)

        # line 15: update flow head and sigma net
        chains = [value.unflatten(0, (-1, cfg.group)) for value in chain]  # (S, G, ...)
        for group, name in zip(optimizer.param_groups, trained, strict=True):
            group["lr"] = rates[name] * rate_factor(step, share, cfg.warmup, "constant")
        updates: list[dict[str, float]] = []  # metrics of each epoch's update
        with timed(seconds, "update_s", device):
            for epoch in range(cfg.epochs):
                pairs = shared_pairs(cfg, batch, stream("flow matching", cfg.seed, step, epoch))
                optimizer.zero_grad(set_to_none=True)
                update = backward(loss, cfg, policy, Rollouts(batch, context, *chains, per_frame, advantage, *pairs))
                update["grad_norm"] = distributed.clip_grad_norm(parameters, cfg.clip_norm)
                total = distributed.mean_across_ranks({"loss": update["loss"]})["loss"]
                check_finite(total, step, update, partial(starts.names, cfg.starts, cfg.seed, step))
                optimizer.step()
                updates.append(update)

        metrics = across_processes(reward, advantage, updates, seconds) | {"minutes": clock.minutes, **measured}
        log.log(step, metrics)
        step += 1
        if step < cfg.steps and state.due(step, cfg.save_interval):
            save()

    after, chunks = diagnosis()
    if step > began:  # else the run was complete already
        if distributed.is_main():  # before the state, which says that it is
            picture_actions(out_dir / "actions.png", before, chunks, policy.normalizer.gripper_dims)
            if isinstance(score, ImageScorer):  # the last step is imagined again, from the same random numbers
                imagined = score.imagine(batch, actions, generator(device, "imagination", cfg.seed, step - 1))
                save_group(out_dir, batch.instructions, per_frame, imagined)
        save()
    state.finish(log)
    return metrics | after


if __name__ == "__main__":
    run_script(main, Config, PRESETS, __doc__, preemption.deferred)
