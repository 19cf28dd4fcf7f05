"""Stage II: reinforcement fine-tuning of a VLA policy inside a frozen world model (Sec. 3.3, Algorithm 1).

Per step: 16 start states of the demonstrations; 16 action chunks a start, sampled from the SDE policy (Eqs. 5-7); each
chunk played inside the world model (Eq. 10) and scored by a verified reward (Eq. 11, Table 4); group-relative
advantages (Eq. 12); updates of flow head and sigma net (Eq. 13). The vision-language model and the world model stay
frozen; the vision-language model runs once per start.

    python train_rft.py --policy runs/sft/model.safetensors --world-model runs/wm/model.safetensors --demos demos
    python train_rft.py --preset release ...            # what the public code chose where the paper chose otherwise
    python train_rft.py --algorithm rwr ...             # control: reward-weighted regression on the same rollouts
    torchrun --nproc-per-node 8 train_rft.py ...        # starts are spread over processes, a group stays on one

Reads a policy of train_sft.py, a world model of train_wm.py and the demonstrations that the policy was trained on (its
splits, named in its checkpoint). Writes out_dir/model.safetensors (the whole policy with its sigma net),
train_state.pt, log.jsonl, rollouts.png (best and worst imagination of the last step beside the reference), actions.png
(action distributions before and after, Fig. 4). The same command resumes an interrupted run.

Before the first step, and at intervals, a trust gate asks on held-out starts whether the reward tells actions apart
(gate.py); if not, the run stops.

The other control is more supervised training: `train_sft.py --init SFT --steps N`, N the steps that see as many samples
(steps x starts x group / batch_size), or `--max-minutes M`, M the minutes that this run's log adds up to.

Deviations from the paper, each an option:
- the log-density of a chunk is the sum over its 8 x 7 scalars; Eq. (8) leaves this open. The mean over the K steps is
  Eq. (8); over the noisy ones alone with --noisy-steps.
- the entropy is the mean over all scalars of the chain; the paper does not define its reduction.
- preset release: element ratios of log-probs summed over K, PPO's minimum with dual clip 3, advantage over the group's
  std, mean over frames, MSE gated by the KL (shut in the first update on each batch), x_k into the sigma net. Its
  defects (bf16 log-probs and clock, no float32 masters, dropout, unsynchronised gradients) are not repeated.
- preset tiny divides the advantage by the group's standard deviation (as the public release), imagines greedily and
  takes the intended actions of noisy demonstrations as reference (--divide-by-std, --imagination, --reference); its
  learning rates are those of a head with 1/100 of the paper's parameters.
- not in the paper, off by default: --reward divergence (as R3, on the distributions that frames are drawn from: nothing
  is sampled or decoded); --symmetric (a chunk is scored with its mirror image, see reward.py); --credit to_go and frame
  (an advantage per action step, see grpo.py); --noise flow_sde, --group-x0 shared and gripper, --mirrored (noise in
  pairs of opposite sign), --decay cosine, --ema, --kl-weight, --chunks > 1, --gamma; --vlm-lr, which trains the
  vision-language model, too (it then runs once more for a start's update); --reward simulator, the true error in the
  simulator of Tabletop demonstrations, to tell what is the world model's doing.
- --bf16 (presets paper, robot, release) runs the frozen networks in bfloat16; what is trained and scored is float32.
"""

import math
import sys
import time
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from torch import Tensor, manual_seed
from torch.optim import AdamW

from vlarft.data import Batch, WindowSampler, load_episodes
from vlarft.data.convention import check_same_images
from vlarft.gate import GateConfig, check_gate, diagnose, held_out_names, picture_actions, trust_gate
from vlarft.metrics import perceptual
from vlarft.nets.action_head import Noise
from vlarft.objective import ObjectiveConfig, supervised_copy, update
from vlarft.policy import PolicyConfig, VLAPolicy
from vlarft.reward import Reward, check_same_robot
from vlarft.rollout import RolloutConfig, collect, fit_drift
from vlarft.run import distributed, preemption
from vlarft.run.checkpoint import load_model, open_run, read_header
from vlarft.run.clock import Clock, Decay, rate_factor
from vlarft.run.config import opt, parse, to_dict
from vlarft.run.ema import EMA
from vlarft.run.log import RunLog, check_finite
from vlarft.run.pictures import grid, save_png
from vlarft.run.random import seed_of
from vlarft.run.train_state import TrainState
from vlarft.sim.evaluate import SuccessConfig, success_rate
from vlarft.sim.replay import SimulatorReward, TabletopOutcomes
from vlarft.world_model import WorldModel


@dataclass(frozen=True)
class Config(
    GateConfig, ObjectiveConfig, RolloutConfig, SuccessConfig
):  # each module owns its options; bases keep the flags flat
    policy: str = opt("runs/sft/model.safetensors", "policy to fine-tune, of train_sft.py")
    world_model: str = opt("runs/wm/model.safetensors", "frozen world model, of train_wm.py")
    demos: str = opt("demos", "folder or file of demonstrations (HDF5, LeRobot, RLDS)")
    out_dir: str = opt("runs/rft", "folder that the run writes")
    seed: int = opt(0, "of starts, chains and imagination")
    steps: int = opt(400, "GRPO steps (Sec. 4.3)")
    starts: int = opt(16, "start states a step, over all processes (release)")
    lr: float = opt(1e-6, "AdamW learning rate of the flow head (release)")
    sigma_lr: float = opt(1e-5, "AdamW learning rate of the sigma net (release)")
    vlm_lr: float | None = opt(None, "AdamW learning rate of vision-language model and key position; none: frozen")
    weight_decay: float = opt(0.01, "AdamW weight decay (release)")
    warmup: int = opt(10, "steps of linear warmup (release)")
    decay: Decay = opt("constant", "learning rates after it (release: constant)")
    ema: float | None = opt(None, "decay of an average of the trained weights, which is exported; none: no average")
    noise: Noise = opt("sigma_net", "of the chain: learnt (Eq. 6, 7), or flow_sde, which keeps the ODE's marginals")
    sigma_min: float = opt(0.08, "least standard deviation of a flow step, normalised units (release)")
    sigma_max: float = opt(0.2, "largest one (release)")
    sigma_init: float | None = opt(None, "that of the untrained sigma net; none: the geometric mean of both")
    sigma_uses_x: bool = opt(False, "give the sigma net x_k besides (z, s, k) (release)")
    sde_noise: float = opt(0.7, "strength of flow_sde's schedule")
    noisy_dims: tuple[int, ...] | None = opt(
        None, "dims with noise and likelihood, 0 to 5 leaves LIBERO's gripper out; none: the policy's, which are all"
    )
    noisy_steps: tuple[int, ...] | None = opt(None, "flow steps with noise and likelihood, 0..9; none: all")
    diagnose_interval: int = opt(20, "steps between looks at the deterministic policy on fixed starts")
    save_interval: int = opt(20, "steps between checkpoints")
    async_save: bool = opt(False, "write checkpoints in a thread while training goes on")
    frozen: distributed.Frozen = opt(
        "replicate", "the frozen vision-language model over several processes: sharded, or whole on each"
    )
    max_minutes: float | None = opt(None, "stop after this wall time, even before `steps`")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.credit != "chunk" and (self.algorithm == "rwr" or self.ratio_per == "chunk"):
            raise ValueError(
                f"credit {self.credit} gives each action step an advantage of its own, which algorithm "
                f"{self.algorithm} with ratio_per {self.ratio_per} has no use for; choose grpo with --ratio-per step"
            )
        if self.kl_weight and self.vlm_lr is not None:
            raise ValueError(
                f"kl_weight {self.kl_weight} with vlm_lr {self.vlm_lr}: the KL is to the supervised head on the same "
                "context, which then is no longer the supervised policy's; leave one of them out"
            )
        if self.credit == "frame" and self.over_frames == "last":
            raise ValueError("credit frame with over_frames last: all action steps but the last would learn nothing")


PAPER = Config(bf16=True)
SMOKE = Config(
    steps=2, starts=2, group=3, lr=1e-4, sigma_lr=1e-3, perceptual="ssim", imagination="common", divide_by_std=True,
    reference="intended", mse_draws=4, save_interval=1, gate_starts=2, gate_draws=1, gate_samples=3, gate_stop=False,
    diagnose_interval=1,
)  # fmt: skip
PRESETS = {
    "paper": PAPER,
    "robot": replace(PAPER, steps=200),  # the real robot's (A.5)
    "release": replace(
        PAPER, divide_by_std=True, over_frames="mean", over_k="sum", ratio_per="element", objective="ppo",
        dual_clip=3.0, mse_gate=0.2, entropy_over="k+1", sigma_uses_x=True,
    ),
    "small": Config(lr=3e-5, sigma_lr=3e-4, perceptual="ssim", imagination="greedy", divide_by_std=True),
    "tiny": Config(
        steps=20, starts=8, group=12, warmup=3, lr=1e-4, sigma_lr=1e-3, perceptual="ssim", imagination="greedy",
        divide_by_std=True, reference="intended", mse_weight=0.1, save_interval=8, gate_starts=12, gate_draws=2,
        gate_samples=6, gate_interval=10, gate_true_error=True, diagnose_interval=5,
    ),
    "smoke": SMOKE,
}  # fmt: skip
NOISE = ("sigma_min", "sigma_max", "sigma_init", "sigma_uses_x", "sde_noise", "noisy_dims", "noisy_steps")


def picture(path: Path, reward: Reward) -> None:
    """PNG of the group whose rewards differ most: reference, best and worst imagination; columns: time."""
    start = reward.reward.std(1).argmax()
    best, worst = reward.reward[start].argmax(), reward.reward[start].argmin()
    rows = [reward.reference[start], reward.frames[start, best], reward.frames[start, worst]]
    labels = ["reference", *(f"{n} {reward.reward[start, i]:.2f}" for n, i in (("best", best), ("worst", worst)))]
    save_png(path, grid(rows, labels))


def on(device, batch: Batch) -> Batch:
    """The batch with its tensors on a device."""
    return Batch(*(v.to(device) if isinstance(v, Tensor) else v for v in batch))


IMAGINED = ("r2", "r3", "divergence")  # rewards that need a world model; the last one needs no pixels


def held_out(cfg: Config, extra: dict) -> tuple[list, bool]:
    """Episodes of the fixed starts, which the policy holds out, and whether there is a gate: the world model then holds
    them out, too.
    """
    gated = cfg.gate_starts > 0 and cfg.reward in IMAGINED
    names = extra.get("validation_episodes") or extra["train_episodes"]
    if gated:
        names = held_out_names(cfg.policy, extra, cfg.world_model, read_header(cfg.world_model).extra)
    states = cfg.gate_true_error or cfg.reward == "simulator"
    return load_episodes(cfg.demos, extra.get("camera", "agentview"), names=names, with_states=states), gated


def main(cfg: Config) -> dict[str, float]:
    device = distributed.setup()
    out_dir = Path(cfg.out_dir)
    policy, extra = load_model(cfg.policy, VLAPolicy, PolicyConfig, device)
    world_model = distance = None
    if cfg.reward in IMAGINED:
        world_model = WorldModel.load(cfg.world_model, device).requires_grad_(False)
        check_same_robot(policy, world_model)
        check_same_images(
            extra, f"policy {cfg.policy}", read_header(cfg.world_model).extra, f"world model {cfg.world_model}"
        )
        if cfg.reward != "divergence":
            distance = perceptual(cfg.perceptual, cfg.perceptual_weights).to(device)
        if cfg.bf16:
            world_model.to_bfloat16()
        if cfg.bf16 and distance is not None:
            distance.to_bfloat16()
        if cfg.compile and distance is not None:
            world_model.tokenizer.cond_decoder.compile()
            distance.compile_network()
    distributed.local_batch(cfg.starts)
    open_run(out_dir, cfg, ignore=("gate_stop", "gate_threshold", "async_save", "frozen"))
    chunk = policy.cfg.flow.chunk
    where, names = (cfg.demos, extra.get("camera", "agentview")), extra["train_episodes"]
    episodes = load_episodes(*where, names=names, with_states=cfg.reward == "simulator")
    sampler = WindowSampler(episodes, cfg.chunks * chunk + 1, cfg.chunks * chunk)
    drift = fit_drift(episodes, chunk).to(device) if cfg.chunks > 1 else None
    probe_episodes, gated = held_out(cfg, extra)
    outcomes = TabletopOutcomes()
    simulator = SimulatorReward(episodes, outcomes) if cfg.reward == "simulator" else None
    true = SimulatorReward(probe_episodes, outcomes) if cfg.gate_true_error or simulator else None
    probe = on(device, WindowSampler(probe_episodes, chunk + 1, chunk).spread(cfg.gate_starts or 16))

    manual_seed(seed_of("weights", cfg.seed))  # of the fresh sigma net
    options = {name: getattr(cfg, name) for name in NOISE} | {
        "noisy_dims": cfg.noisy_dims or policy.cfg.flow.noisy_dims
    }
    policy.make_stochastic(cfg.noise, **options)
    policy.requires_grad_(False).eval()
    supervised = supervised_copy(policy) if cfg.kl_weight else None
    rates = {"head": cfg.lr, "sigma_net": cfg.sigma_lr}
    if cfg.vlm_lr is not None:
        rates |= dict.fromkeys(("vlm", "key_head", "key_embed"), cfg.vlm_lr)
    trained = {name: net for name in rates if (net := getattr(policy, name)) is not None}
    for net in trained.values():
        net.requires_grad_(True)
    look = (cfg, policy, world_model, probe)  # at the policy before any change of it
    _, before = diagnose(*look, distance, (cfg.seed, 4), true)
    for net in trained.values():
        if net is not policy.vlm:  # whole: the modulations of the networks' blocks run before them
            used = ("prepare", "at_steps", "velocity", "log_sigma")
            distributed.shard(net, methods=[name for name in used if hasattr(net, name)])
    if policy.vlm_trains or cfg.frozen == "shard":
        distributed.shard(policy.vlm, policy.vlm.blocks, bf16=cfg.bf16 and not policy.vlm_trains)
    groups = [{"params": list(net.parameters()), "lr": rates[name]} for name, net in trained.items()]
    optimizer = AdamW(groups, weight_decay=cfg.weight_decay)
    base_rates = [group["lr"] for group in groups]

    averages = EMA([p for group in groups for p in group["params"]], cfg.ema, from_scratch=False)
    parts = {"policy": policy, "optimizer": optimizer} | ({"ema": averages} if cfg.ema is not None else {})
    state = TrainState(out_dir, parts, cfg.async_save)
    step, minutes = state.load(step=0, minutes=0.0)
    log, run = RunLog(out_dir, cfg.steps, "rft", step), Clock(cfg.steps, cfg.max_minutes, minutes)
    metrics: dict[str, float] = {}

    def exported() -> dict[str, Tensor]:
        if cfg.ema is None:  # no copy of the frozen weights
            return distributed.full_state_dict(policy)
        with averages.swapped():
            return {k: v.clone() for k, v in distributed.full_state_dict(policy).items()}

    def save() -> None:
        values, about = {"step": step, "minutes": run.minutes}, {**extra, "rft": to_dict(cfg)}
        state.save(values, policy, policy.cfg, about, exported())

    def success() -> dict[str, float]:
        return success_rate(cfg, policy.cfg, exported(), cfg.seed)

    def looked_at() -> tuple[dict[str, float], Tensor]:
        with averages.swapped():
            return diagnose(*look, distance, (cfg.seed, 4), true)

    def gate() -> dict[str, float]:
        found = trust_gate(
            cfg, cfg, policy, world_model, probe, probe_episodes, distance, (cfg.seed, 5), true and outcomes
        )
        check_gate(cfg, cfg, found, step)
        return found

    while (share := run.share(step)) < 1:
        looked = {"minutes": run.minutes}
        with run.paused():
            if gated and step % cfg.gate_interval == 0:
                looked |= gate()
            if step % cfg.diagnose_interval == 0:
                looked |= looked_at()[0]
            if cfg.success_interval and step % cfg.success_interval == 0:
                looked |= success()
        part = distributed.rank(), distributed.world_size()
        batch = on(device, sampler.batch(cfg.starts, cfg.seed, step, part=part))
        for group, rate in zip(optimizer.param_groups, base_rates):
            group["lr"] = rate * rate_factor(step, share, cfg.warmup, cfg.decay)
        rollouts = collect(cfg, policy, world_model, batch, distance, (cfg.seed, step), drift, simulator)
        clock = time.monotonic()
        totals = update(cfg, policy, optimizer, rollouts, (cfg.seed, step), supervised)
        averages.update(step)
        rewards = rollouts.reward.reward
        metrics = distributed.mean_across_ranks(
            {
                "reward": rewards.mean(),
                "reward_std": rewards.std(1).mean(),
                "adv_std": rollouts.advantage.square().mean(),  # of the whole batch, whose mean is 0: see below
                "constant_groups": (rewards == rewards[:, :1]).all(1).float().mean(),
                **totals,
                **rollouts.seconds,
                "update_s": time.monotonic() - clock,
            }
        )
        metrics["adv_std"] = math.sqrt(metrics["adv_std"])
        metrics |= distributed.max_across_ranks({k: v for k, v in totals.items() if k.endswith("_max")}) | looked
        check_finite(metrics["loss"], step, metrics, partial(sampler.names, cfg.starts, cfg.seed, step))
        log.log(step, metrics)
        step += 1
        if step < cfg.steps and state.due(step, cfg.save_interval):
            save()
    save()
    found, after = looked_at()
    metrics |= found | (success() if cfg.success_interval else {})
    if distributed.is_main():
        picture_actions(out_dir / "actions.png", before, after)
        if "loss" in metrics and rollouts.reward.frames is not None:
            picture(out_dir / "rollouts.png", rollouts.reward)
    state.wait()
    log.close()
    distributed.cleanup()
    return metrics


if __name__ == "__main__":
    with preemption.deferred():
        main(parse(Config, PRESETS, sys.argv[1:], __doc__.splitlines()[0]))
