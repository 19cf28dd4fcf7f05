"""Beyond the paper: closed-loop reinforcement learning of a VLA policy from the outcome of whole episodes.

Stage II of the paper (train_rft.py) compares one chunk with a demonstration, at the demonstration's own states. Here
the policy plays until it succeeds or time is up, and the outcome is the reward. Each step takes 8 or 16 starts; plays 8
episodes from each with the SDE policy (Eqs. 5 to 7), observing anew after every chunk; compares the outcomes within a
group (Eq. 12); and updates flow head and sigma net by GRPO (Eqs. 8, 9 and 13). The vision-language model stays frozen.

    python train_rl.py --policy runs/sft --demos demos own --world-model runs/wm2 --success-model runs/success
    python train_rl.py --world simulator --policy runs/sft --demos demos --suites libero_spatial      # in LIBERO
    python train_rl.py --preset tiny --world simulator --policy runs/sft --demos demos                # in Tabletop

The world is a world model of train_wm.py, judged by a success model of train_success.py, from the first frames of the
recorded episodes; robot and simulator are not asked. A gate compares, before the first step, imagined and recorded
outcomes of episodes that both models hold out. Or it is a simulator with its true outcome: the baseline that peers
report, and the ceiling of what imagination can give. Its starts are random and disjoint from those of eval_libero.py,
its physics runs in worker processes. With `--success-model` in the simulator, that model, trained without a world
model, judges the true frames, which tells the judge's share of what imagination loses.

Reads a policy of train_sft.py, train_rft.py or this script, and recorded episodes: the demonstrations that it was
trained on (its checkpoint names episodes and camera), for the flow-matching term, and all others as further starts.
Writes to out_dir: model.safetensors (the whole policy with its sigma net), train_state.pt, log.jsonl, config.json,
inputs.json. The same command resumes an interrupted run.

The objective, where it differs from Eq. (13):
- The reward is 1 for success, else 0. A group of one outcome has no advantage and is left out of the mean; a step in
  which all groups are of one outcome changes nothing.
- One ratio per action step, clipped; the log-densities of its K flow steps are averaged, as in Eq. (8).
- Actions after the first success, which nobody plays, are left out. An episode's actions weigh 1 / its length, so that
  long episodes, often failures, do not outweigh short ones (WoVR).
- No entropy and no KL term. The flow-matching term on demonstrations is kept.
- With --noise zero, chunks start from x_0 = 0, where the policy does best: what is left to explore is the SDE's noise.
- The advantage is divided by the group's standard deviation.
- With --epochs 1 the ratio is always 1: the clip acts from the second epoch on.

Runs in one process. Results do not depend on the number of workers.
"""

import os
import sys
import warnings
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import Annotated, Literal

import torch
from torch import Tensor, nn

from vlarft.closed_loop import Attempts, World, action_weights, play
from vlarft.data import Episode, WindowSampler, load_episodes
from vlarft.data.consistency import check_outcomes, warn_other_contents
from vlarft.data.convention import check_image_size, check_same_images, image_convention, warn_other_contexts
from vlarft.data.episode import episode_digests
from vlarft.flow import chain_log_prob, matching_loss
from vlarft.grpo import advantages, policy_loss
from vlarft.grpo import chain_log_prob as reduce_log_prob
from vlarft.imagined_world import ImaginedWorld
from vlarft.normalizer import check_same_units
from vlarft.outcome_gate import check_outcome_gate, outcome_gate, rank_policies, read_evaluation
from vlarft.policy import PolicyConfig, VLAPolicy
from vlarft.reward import check_same_robot
from vlarft.run import distributed, preemption
from vlarft.run.checkpoint import load_model, open_run, read_header
from vlarft.run.clock import Clock, rate_factor
from vlarft.run.config import (
    Count,
    NotNegative,
    Positive,
    Processes,
    ProperShare,
    Range,
    Rate,
    Rows,
    Share,
    Side,
    Whole,
    opt,
    to_dict,
)
from vlarft.run.log import RunLog, check_finite
from vlarft.run.precision import Precision, in_bf16
from vlarft.run.random import generator, seed_of
from vlarft.run.script import run_script
from vlarft.run.train_state import TrainState, check_same_episodes
from vlarft.sim.policy_check import check_policy
from vlarft.sim.simulated_world import Place, SimulatedWorld
from vlarft.sim.suites import instructions_of, simulator_of, task_indices
from vlarft.success import SuccessModel, check_judge
from vlarft.world_model import WorldModel

WEIGHT_DECAY = 0.01  # AdamW, as train_rft.py
WARMUP = 3  # steps of linear warmup
MSE_CHUNKS, MSE_DRAWS = 32, 4  # demonstrated chunks per update in the flow-matching term, pairs (tau, eps) for each


@dataclass(frozen=True)
class Config:
    """One fine-tuning; the defaults are for LIBERO and a policy of the paper's size."""

    policy: str = opt("runs/sft", "policy to fine-tune: run folder or file", group="data")
    demos: tuple[str, ...] = opt(
        ("demos",), "episodes: demonstrations of its training and, for imagined starts, others (HDF5, LeRobot, RLDS)"
    )
    world: Literal["imagination", "simulator"] = opt("imagination", "where the policy plays")
    world_model: str = opt("runs/wm", "world model of the imagination: run folder or file of train_wm.py")
    success_model: str | None = opt(
        None, "judge of the outcome: run folder or file of train_success.py; none: the simulator's true outcome"
    )
    imagination: Literal["sample", "greedy"] = opt("greedy", "frame tokens of the imagination: sampled or greedy")
    horizon: Count = opt(
        220, "actions after which an episode without success ends; the simulator's limit at the latest"
    )
    late_starts: Share = opt(0.0, "share of imagined starts later in an episode, where it is a policy's failure (WoVR)")
    suites: tuple[str, ...] = opt(("libero_spatial",), "suites that the simulator plays")
    tasks: tuple[str, ...] | None = opt(None, "task numbers or names of the simulator in each suite; none: all")
    image_size: Side | None = opt(256, "side of the simulator's images, which the policy resizes; none: its own [px]")
    fast_rendering: bool = opt(False, "LIBERO without antialiasing and reflections, with simpler meshes, see sim/gl.py")
    starts: Rows = opt(
        8, "starts per step: of the simulator's tasks in turn, or of random episodes", group="optimisation"
    )
    group: Annotated[int, Range(2, 1024)] = opt(8, "episodes from each start (WoVR)")
    noise: Literal["sampled", "zero"] = opt("sampled", "x_0 of every chunk; zero: the flow steps' noise alone explores")
    sigma_min: Positive = opt(0.08, "lower bound of the standard deviation of a flow step, normalised units")
    sigma_max: Positive = opt(0.2, "upper bound of the standard deviation of a flow step")
    steps: Count = opt(100, "GRPO steps")
    max_minutes: Positive | None = opt(None, "stop after this wall time, even before `steps` [min]")
    lr: Rate = opt(1e-6, "AdamW learning rate of the flow head (Table 7)")
    sigma_lr: Rate = opt(1e-5, "AdamW learning rate of the sigma net (Table 7)")
    clip_norm: Positive = opt(1.0, "largest gradient norm")
    epochs: Count = opt(1, "updates per batch of episodes; the clip acts from the second on")
    clip: ProperShare = opt(0.2, "the ratio is clipped to 1 +- this (Eq. 13)")
    mse_weight: NotNegative = opt(0.01, "weight of the flow-matching term on demonstrations (Eq. 13); 0 leaves it out")
    gate_threshold: Share | None = opt(
        0.9,
        "least mean of the shares of held-out successes and failures that imagination tells; none: not measured",
        group="evaluation",
    )
    gate_evaluation: str | None = opt(
        None,
        "evaluation of several policies, by eval_libero.py: the gate tells whether imagination ranks them as played",
    )
    out_dir: str = opt("runs/rl", "folder that the run writes", group="run")
    save_interval: Count = opt(5, "steps between checkpoints")
    keep_interval: Count | None = opt(None, "steps between copies of the model that are kept; none: no copies")
    seed: Whole = opt(0, "seed of starts and chains")
    workers: Processes = opt(os.cpu_count() or 1, "worker processes of the simulator; 0 plays in this process")
    precision: Precision = opt("bf16", "frozen networks; auto: bf16 where the processor or GPU has it")
    micro_chunks: Rows = opt(64, "chunks per backward pass, to bound memory")

    def __post_init__(self) -> None:
        if self.sigma_min > self.sigma_max:
            raise ValueError(f"--sigma-min {self.sigma_min} exceeds --sigma-max {self.sigma_max}")
        if self.late_starts and self.world == "simulator":
            raise ValueError(
                f"--late-starts {self.late_starts:g} is for imagination: the simulator's episodes begin at their start"
            )


PAPER = Config()
TABLETOP = replace(
    PAPER, suites=("tabletop_object",), image_size=None, horizon=56, starts=16, noise="zero", lr=2e-4, sigma_lr=1e-4,
    steps=200, precision="auto",
)  # fmt: skip
PRESETS = {
    "paper": PAPER,
    "small": TABLETOP,
    "libero": replace(TABLETOP, suites=("libero_object",), fast_rendering=True, horizon=220, steps=20),
    "tiny": replace(TABLETOP, tasks=("0", "1", "2", "3")),
    "smoke": replace(TABLETOP, precision="fp32", tasks=("0",), starts=1, group=2, steps=2, save_interval=1, workers=0),
}  # fmt: skip


def simulated_world(cfg: Config, policy: VLAPolicy, extra: dict) -> SimulatedWorld:
    """Make the simulator's tasks, rendered as the policy sees them.

    Raises:
        ValueError: an unknown suite or task, or one that policy (`check_policy`) or success model (`check_judge`) do
            not know.
    """
    size, how, places = cfg.image_size or policy.vlm.image_size, (cfg.horizon, cfg.fast_rendering), []
    for suite in cfg.suites:
        tasks = task_indices(suite, cfg.tasks)
        check_policy(cfg.policy, read_header(cfg.policy), suite, tasks, size, cfg.fast_rendering)
        places += [Place(suite, task, size, policy.cfg.cameras, *how) for task in tasks]
    judge = None
    if cfg.success_model is not None:
        judge = load_judge(cfg, policy)
        texts = [text for suite in cfg.suites for text in instructions_of(suite, cfg.tasks)]
        check_judge(cfg.success_model, texts, extra, f"policy {cfg.policy}", size)
    return SimulatedWorld(places, cfg.starts, cfg.workers, judge)


def imagined_world(cfg: Config, policy: VLAPolicy, extra: dict, episodes: list[Episode]) -> ImaginedWorld:
    """Load world model and success model, and check that they belong to this policy."""
    if cfg.success_model is None:
        raise ValueError("nobody tells an imagination's outcome: give --success-model, from train_success.py")
    if len(policy.cfg.cameras) > 1:
        raise ValueError(f"{cfg.policy} sees {len(policy.cfg.cameras)} cameras, a world model imagines one")
    device = policy.device
    model = WorldModel.load(cfg.world_model, device).requires_grad_(False)
    judge = load_judge(cfg, policy)
    check_imagined(cfg, cfg.policy, policy, extra, model)
    warn_other_contexts(read_header(cfg.world_model).extra, f"world model {cfg.world_model}", -1)
    for path in (cfg.world_model, cfg.success_model):  # what the gate takes to be held out
        warn_other_contents(read_header(path).extra, path, episodes)
    check_image_size(model.cfg.tokenizer.image_size, f"world model {cfg.world_model}", episodes[0])
    texts, size = [e.instruction for e in episodes], model.cfg.tokenizer.image_size[0]
    known = {text.strip().lower() for text in extra.get("instructions") or texts}
    if unknown := sorted({text for text in texts if text.strip().lower() not in known}):
        warnings.warn(
            f"policy {cfg.policy} was not trained on {len(unknown)} of the instructions of the episodes, for example "
            f"{unknown[0]!r}: their imagined episodes teach it little",
            stacklevel=2,
        )
    check_judge(cfg.success_model, texts, extra, f"policy {cfg.policy}", size, cfg.world_model)
    if cfg.horizon < judge.cfg.hold:
        raise ValueError(f"--horizon {cfg.horizon}: a success is held for {judge.cfg.hold} frames; give more")
    held_out = read_header(cfg.success_model).extra.get("held_out_episodes", [])
    episodes = [e for e in episodes if e.name not in held_out]  # those are for the gate
    autocast = torch.autocast(device.type, torch.bfloat16, enabled=in_bf16(cfg.precision, device))
    options = {"starts": cfg.starts, "horizon": cfg.horizon, "camera": policy.cfg.cameras[0], "autocast": autocast}
    return ImaginedWorld(
        model, judge, episodes, **options, late_starts=cfg.late_starts, greedy=cfg.imagination == "greedy"
    )


def load_judge(cfg: Config, policy: VLAPolicy) -> SuccessModel:
    """Load the success model, frozen; warn if by its threshold nothing is a success, so that nothing is learned."""
    judge = SuccessModel.load(cfg.success_model, policy.device).requires_grad_(False)
    if judge.cfg.threshold > 1:
        warnings.warn(
            f"success model {cfg.success_model} judges nothing a success: among the episodes that its threshold was "
            "chosen on, failures looked as much like one. No group will have two outcomes, and the policy learns "
            "nothing: record more attempts, or train the success model longer",
            stacklevel=2,
        )
    return judge


def check_imagined(cfg: Config, path: str, policy: VLAPolicy, extra: dict, model: WorldModel) -> None:
    """Check that the world model imagines what the policy at `path` sees and does.

    Raises:
        ValueError: another robot, or images of another convention.
    """
    check_same_robot(policy, model, closed_loop=True)
    imagined = read_header(cfg.world_model).extra
    check_same_images(extra, f"policy {path}", imagined, f"world model {cfg.world_model}")


def check_horizon(cfg: Config, episodes: list[Episode]) -> None:
    """Warn of a horizon that recorded successes exceed."""
    lengths = sorted(len(e) for e in episodes if e.success)
    if lengths and (longer := sum(length > cfg.horizon for length in lengths)):
        warnings.warn(
            f"--horizon {cfg.horizon}: {longer} of {len(lengths)} recorded successes are longer, up to {lengths[-1]} "
            "steps with what was recorded after the success; an episode may end before it could succeed",
            stacklevel=2,
        )


def gate(cfg: Config, world: ImaginedWorld, episodes: list[Episode]) -> dict[str, float]:
    """Compare imagined and recorded outcomes of the episodes that both models hold out; stop if they differ too often.
    With --gate-evaluation, also compare imagined and true success rates of policies.

    Raises:
        ValueError: there are no such episodes, of unknown outcome or of one outcome only; see also `read_evaluation`.
        RuntimeError: see `check_outcome_gate`.
    """
    evaluation = None if cfg.gate_evaluation is None else read_evaluation(cfg.gate_evaluation)
    for suite in () if evaluation is None else evaluation.suites:
        limit = simulator_of(suite).suites[suite].horizon
        if cfg.horizon > limit:
            raise ValueError(f"--horizon {cfg.horizon}: {suite} ends episodes after {limit} actions: give {limit}")
        if (played := min(limit, evaluation.horizon or limit)) != cfg.horizon:
            raise ValueError(
                f"{cfg.gate_evaluation}: its episodes of {suite} ended after {played} actions, imagined ones end after "
                f"{cfg.horizon}: evaluate the policies again with --horizon {cfg.horizon}"
            )
    without = "--gate-threshold none, and leave out --gate-evaluation"
    judge, model = (read_header(path).extra for path in (cfg.success_model, cfg.world_model))
    unseen = set(judge.get("held_out_episodes", [])) - set(model.get("train_episodes", []))
    held_out = [e for e in episodes if e.name in unseen]
    if not unseen:
        raise ValueError(
            f"the gate needs episodes that both models hold out: {cfg.world_model} was trained on all that "
            f"{cfg.success_model} holds out. Train the success model again, with --world-model {cfg.world_model}, or "
            f"give {without}"
        )
    if not held_out:
        raise ValueError(
            f"the gate needs episodes that both models hold out: none of the {len(unseen)} that {cfg.success_model} "
            f"names is among the {len(episodes)} of {' '.join(cfg.demos)}. Give the folders that both were trained "
            f"with, or {without}"
        )
    if chosen := {e.name for e in held_out} & set(judge.get("threshold_episodes", [])):
        warnings.warn(
            f"{cfg.success_model} chose its threshold on {len(chosen)} of the {len(held_out)} episodes of the gate, "
            "which is flattered: record more attempts of this policy",
            stacklevel=2,
        )
    check_outcomes(held_out, " ".join(cfg.demos))
    failures = [e for e in held_out if not e.success]
    if longer := sum(len(e) > cfg.horizon for e in failures):
        warnings.warn(
            f"{longer} of {len(failures)} held-out failures are longer than --horizon {cfg.horizon}: the gate replays "
            f"them to their end, which no imagined episode reaches. Record attempts with --horizon {cfg.horizon}",
            stacklevel=2,
        )
    if evaluation is not None:
        played = {text.lower() for s in evaluation.suites for text in instructions_of(s, evaluation.tasks)}
        if other := played ^ {e.instruction.strip().lower() for e in held_out}:
            raise ValueError(
                f"{cfg.gate_evaluation} and the {len(held_out)} held-out episodes of {' '.join(cfg.demos)} are of "
                f"different tasks: only one has {min(other)!r}. Evaluate the policies with the --suites and --tasks of "
                "the episodes, or record more attempts"
            )
        for path in evaluation.rates:
            load_ranked(cfg, path, world)  # raises before the work
    found = outcome_gate(world.model, world.judge, held_out, world.autocast, seed=cfg.seed, **world.sampling)
    measured = {f"gate_{name}": float(value) for name, value in found._asdict().items()} | {"gate": found.balanced}
    if evaluation is not None:
        options = {"horizon": cfg.horizon, "camera": world.camera, "autocast": world.autocast, **world.sampling}
        unseen_world = ImaginedWorld(
            world.model, world.judge, held_out, starts=min(len(held_out), cfg.starts * cfg.group), **options
        )
        load = partial(load_ranked, cfg, world=world)
        measured["gate_rank"] = rank_policies(evaluation, load, unseen_world, cfg.seed)
    check_outcome_gate(found, cfg.gate_threshold)
    return measured


def load_ranked(cfg: Config, path: str, world: ImaginedWorld) -> VLAPolicy:
    """Load a policy of --gate-evaluation.

    Raises:
        ValueError: the world does not show what it sees, or is of another robot.
    """
    policy, extra = load_model(path, VLAPolicy, PolicyConfig, world.device)
    check_imagined(cfg, path, policy, extra, world.model)
    if policy.cfg.cameras != (world.camera,):
        raise ValueError(f"{path} sees {' and '.join(policy.cfg.cameras)}, the world model imagines {world.camera}")
    return policy


def demonstrated(cfg: Config, policy: VLAPolicy, extra: dict, episodes: list[Episode]) -> WindowSampler | None:
    """Choose the demonstrations that the policy was trained on, all if it names none; None without a flow-matching
    term.

    Raises:
        ValueError: they are not among the episodes, or in other units; or a policy of several cameras.
    """
    if not cfg.mse_weight:
        return None
    if len(policy.cfg.cameras) > 1:
        raise ValueError(
            f"{cfg.policy} sees {len(policy.cfg.cameras)} cameras, the flow-matching term reads one: give "
            "--mse-weight 0"
        )
    warn_other_contents(extra, f"policy {cfg.policy}", episodes)
    names = set(extra.get("train_episodes", []))
    chosen = [e for e in episodes if e.success and e.kind == "expert" and (not names or e.name in names)]
    if not chosen:
        raise ValueError(
            f"none of the {len(episodes)} episodes of {' '.join(cfg.demos)} is a demonstration that {cfg.policy} was "
            "trained on: give its demonstrations with --demos, or --mse-weight 0"
        )
    if missing := names - {e.name for e in episodes}:
        warnings.warn(
            f"--demos {' '.join(cfg.demos)} lacks {len(missing)} of the {len(names)} demonstrations that {cfg.policy} "
            f"was trained on, first {min(missing)}: the flow-matching term imitates the other {len(chosen)} alone",
            stacklevel=2,
        )
    check_same_units(policy.normalizer, chosen)  # attempts, noisy ones above all, move otherwise
    return WindowSampler(chosen, 1, policy.cfg.flow.chunk)


def make_trainable(cfg: Config, policy: VLAPolicy) -> dict[str, nn.Module]:
    """Add the sigma net, freeze the policy but for it and the flow head, and return the two by name."""
    torch.manual_seed(seed_of("weights", cfg.seed))
    policy.add_sigma_net(cfg.sigma_min, cfg.sigma_max, uses_x=policy.cfg.flow.sigma_uses_x)
    policy.requires_grad_(False).eval()
    return {name: getattr(policy, name).requires_grad_(True) for name in ("head", "sigma_net")}


def episode_loss(cfg: Config, policy: VLAPolicy, chunks: Attempts, weight: Tensor) -> tuple[Tensor, dict[str, float]]:
    """Compute the clipped objective of some chunks, to be minimised; and its metrics.

    Args:
        chunks: M of them.
        weight: (M, T), of the ratios, from `action_weights`.

    Returns:
        -(sum of clipped ratios times weights), and means over the chunks.
    """
    cond = policy.condition(chunks.context, chunks.proprio)
    scored = chain_log_prob(policy.head, policy.sigma_net, chunks.x, cond)  # (M, K, T, A) each
    # Eq. (8) per action step, (M, T), of which only those count that were played
    log_prob, old_log_prob = (reduce_log_prob(v, per_step=True) for v in (scored.log_prob, chunks.log_prob))
    ratios = log_prob[chunks.played], old_log_prob[chunks.played], weight[chunks.played]
    surrogate, metrics = policy_loss(*ratios, clip=cfg.clip)  # Eqs. (9), (13): a mean
    return surrogate * len(ratios[0]), metrics | {"sigma": scored.sigma.mean().item()}


def backward(cfg: Config, policy: VLAPolicy, attempts: Attempts, weight: Tensor) -> dict[str, float]:
    """Accumulate the gradients of the objective over all chunks that have a weight, `micro_chunks` at a time; return
    its metrics. They are means over the actions played, but those named `..._max` are maxima.
    """
    used, totals = weight.ne(0).any(1).nonzero()[:, 0], {}
    played = attempts.played.sum(1)
    for first in range(0, len(used), cfg.micro_chunks):
        rows = used[first : first + cfg.micro_chunks]
        loss, metrics = episode_loss(cfg, policy, attempts.rows(rows), weight[rows])
        loss.backward()
        totals["policy_loss"] = totals.get("policy_loss", 0.0) + loss.item()
        for name, value in metrics.items():
            if name.endswith("_max"):
                totals[name] = max(value, totals.get(name, value))
            else:
                totals[name] = totals.get(name, 0.0) + value * (played[rows].sum() / played[used].sum()).item()
    return totals


def demonstration_loss(cfg: Config, policy: VLAPolicy, demonstrations: WindowSampler, *numbers: int) -> Tensor:
    """Compute Eq. (4) on a batch of demonstrations, which depends on the seed and `numbers` alone."""
    batch = demonstrations.batch(MSE_CHUNKS, cfg.seed, *numbers, device=policy.device)
    bf16 = in_bf16(cfg.precision, policy.device)
    context = policy.encode_frames(batch.frames[:, 0], batch.instructions, bf16=bf16)
    target, cond = policy.normalizer.encode_actions(batch.intended), policy.condition(context, batch.proprio)
    noise = generator(policy.device, "flow matching", cfg.seed, *numbers)
    return matching_loss(policy.head, target, cond, generator=noise, draws=MSE_DRAWS)[0]


def over_epochs(updates: list[dict[str, float]]) -> dict[str, float]:
    """Reduce the metrics of a step's updates: means, and of `..._max` the largest; nothing without an update."""
    reduce = {True: max, False: fmean}
    return {name: reduce[name.endswith("_max")](row[name] for row in updates) for name in (updates or [{}])[0]}


def names_of(world: World, demonstrations: WindowSampler | None, *seed: int) -> list[str]:
    """Name the episodes of an update: the starts, and the demonstrations of the batch of `seed`."""
    return [*world.names, *([] if demonstrations is None else demonstrations.names(MSE_CHUNKS, *seed))]


def main(cfg: Config, *, world: World | None = None) -> dict[str, float]:
    """Fine-tune, or resume; return the metrics of the last step, none of a run that was complete.

    Args:
        cfg: options.
        world: in place of the one that --world names.
    """
    device, out_dir = distributed.setup(), Path(cfg.out_dir)
    if distributed.world_size() > 1:
        raise ValueError("train_rl.py runs in one process; its simulators have --workers processes: leave torchrun out")
    policy, extra = load_model(cfg.policy, VLAPolicy, PolicyConfig, device)
    episodes = []
    if cfg.mse_weight or cfg.world == "imagination":
        camera = extra.get("camera", policy.cfg.cameras[0])
        episodes, where = load_episodes(cfg.demos, camera, successes_only=False), f"the episodes {' '.join(cfg.demos)}"
        check_same_images(extra, f"policy {cfg.policy}", image_convention(episodes, camera), where)
        check_horizon(cfg, episodes)
    demonstrations = demonstrated(cfg, policy, extra, episodes)
    if world is None:
        simulated = cfg.world == "simulator"
        world = simulated_world(cfg, policy, extra) if simulated else imagined_world(cfg, policy, extra, episodes)
    measured, started = {}, (out_dir / "train_state.pt").is_file()
    if cfg.gate_evaluation is not None and (started or not isinstance(world, ImaginedWorld)):
        why = "that is before the first step" if started else "that is of imagination"
        print(f"--gate-evaluation: no policy is ranked, {why}", file=sys.stderr)
    trained, rates = make_trainable(cfg, policy), {"head": cfg.lr, "sigma_net": cfg.sigma_lr}
    gated = cfg.gate_threshold is not None or cfg.gate_evaluation is not None
    if isinstance(world, ImaginedWorld) and gated and not started:
        measured = gate(cfg, world, episodes)  # before anything is written: the folder serves for the next attempt
    used = {
        "imagined_episodes": [e.name for e in getattr(world, "episodes", [])],
        "imitated_episodes": [e.name for e in getattr(demonstrations, "episodes", [])],
    }
    learned_from = [e for source in (world, demonstrations) for e in getattr(source, "episodes", [])]
    used["episode_digests"] = {**extra.get("episode_digests", {}), **episode_digests(learned_from)}
    check_same_episodes(out_dir, used)
    models = ["policy", *(["world_model"] if isinstance(world, ImaginedWorld) else []), "success_model"]
    open_run(out_dir, cfg, ("workers", "micro_chunks", "gate_threshold", "gate_evaluation"), models=models)
    groups = [{"params": list(net.parameters()), "lr": rates[name]} for name, net in trained.items()]
    optimizer = torch.optim.AdamW(groups, weight_decay=WEIGHT_DECAY)
    parameters = [p for group in groups for p in group["params"]]
    state = TrainState(out_dir, {"policy": policy, "optimizer": optimizer}, keep_interval=cfg.keep_interval)
    step, minutes = state.load(step=0, minutes=0.0)
    log, clock, metrics = RunLog(out_dir, cfg.steps, "rl", step), Clock(cfg.steps, cfg.max_minutes, minutes), {}

    def save() -> None:
        values = {"step": step, "minutes": clock.minutes}
        state.save(values, policy, policy.cfg, {**extra, **used, "rl": to_dict(cfg)})

    began = step
    while (share := clock.share(step)) < 1:
        started = clock.minutes

        # whole episodes, G from each of S starts; their random numbers depend on (seed, step) alone
        noise = partial(generator, device, "episode chains", cfg.seed, step)
        options = {"from_zero": cfg.noise == "zero", "bf16": in_bf16(cfg.precision, device)}
        attempts = play(policy, world, cfg.group, (cfg.seed, step), noise, **options)

        # the outcome is the reward; compare it with the others of its group, Eq. (12)
        reward = attempts.success.float()  # (S, G)
        weight = action_weights(attempts, advantages(reward, divide_by_std=True))  # (M, T)
        played = clock.minutes

        # update flow head and sigma net, Eq. (13)
        for group, name in zip(optimizer.param_groups, trained, strict=True):
            group["lr"] = rates[name] * rate_factor(step, share, WARMUP, "constant")
        # Adam's step does not depend on the scale of the gradient: alone, the flow-matching term would take a full one
        mixed, updates = bool(weight.any()), []
        for epoch in range(cfg.epochs if mixed else 0):
            optimizer.zero_grad(set_to_none=True)
            number = step * cfg.epochs + epoch
            update = backward(cfg, policy, attempts, weight)
            if demonstrations is not None:
                mse = demonstration_loss(cfg, policy, demonstrations, number)
                (cfg.mse_weight * mse).backward()
                update["mse"] = mse.item()
            update["grad_norm"] = distributed.clip_grad_norm(parameters, cfg.clip_norm)
            loss = update["policy_loss"] + cfg.mse_weight * update.get("mse", 0.0)
            check_finite(loss, step, update, partial(names_of, world, demonstrations, cfg.seed, number))
            optimizer.step()
            updates.append(update)

        metrics = {
            "success": reward.mean().item(),
            "constant_groups": (reward == reward[:, :1]).all(1).float().mean().item(),
            "episode_steps": attempts.steps.float().mean().item(),
            **over_epochs(updates),
            "play_s": 60 * (played - started),
            "update_s": 60 * (clock.minutes - played),
            "minutes": clock.minutes,
            **measured,
        }
        measured = {}
        log.log(step, metrics)
        step += 1
        if step < cfg.steps and state.due(step, cfg.save_interval):
            save()

    if step > began:
        save()
    world.close()
    state.finish(log)
    return metrics


if __name__ == "__main__":
    run_script(main, Config, PRESETS, __doc__, preemption.deferred)
