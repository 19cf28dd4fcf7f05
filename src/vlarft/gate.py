"""The trust gate: is the reward worth optimising here? And what the policy does on the same held-out starts.

Not in the paper. The reward of a chunk stands for how far it is from the demonstration's; where the world model cannot
tell, the update follows noise. On held-out starts the gate ranks two families of chunks by the run's own reward: noise
around the dataset's actions, and the chunks that the stochastic policy samples. Spearman's rank correlation with their
action error, and where a simulator is at hand with how far hand, fingers and objects really end up, is taken within
each start and averaged.

Shapes: S starts, P chunks a start, T chunk steps, A action dim.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from vlarft.data.episodes import Episode
from vlarft.data.windows import Batch
from vlarft.flow import sample_ode
from vlarft.metrics import PerceptualDistance
from vlarft.policy import VLAPolicy
from vlarft.reward import Reward, reduce_frames, verified_reward
from vlarft.rollout import RolloutConfig, dataset_actions, encode, reward_options, sample_group
from vlarft.run.config import opt
from vlarft.run.pictures import histograms, save_png
from vlarft.run.random import generator
from vlarft.sensitivity import Perturbations, agreement, perturb
from vlarft.sim.replay import SimulatorReward, TabletopOutcomes
from vlarft.world_model import WorldModel

ACTION_NAMES = ("x", "y", "z", "rx", "ry", "rz", "gripper")


@dataclass(frozen=True)
class GateConfig:
    """Sizes of the trust gate, and what follows from it."""

    gate_starts: int = opt(32, "held-out starts of the trust gate and of the diagnostics; 0 leaves the gate out")
    gate_interval: int = opt(100, "steps between trust gates; the first one is before the first step")
    gate_threshold: float = opt(
        0.25, "rank correlation of reward and error that the reward is worth optimising from (docs/study.md)"
    )
    gate_stop: bool = opt(True, "stop below the threshold")
    gate_noise: tuple[float, ...] = opt((0.05, 0.15, 0.4), "noise around dataset actions, std in normalised units")
    gate_draws: int = opt(3, "perturbed chunks per noise size and start")
    gate_samples: int = opt(8, "chunks that the policy samples per start")
    gate_true_error: bool = opt(False, "judge by the simulator's outcome (Tabletop demonstrations with states)")


def held_out_names(policy_path: str, policy_extra: dict, model_path: str, model_extra: dict) -> list[str]:
    """Episodes of the policy's validation split that the world model was not trained on.

    Args:
        policy_path, model_path: for the messages.
        policy_extra, model_extra: of the two checkpoints' headers.

    Raises:
        ValueError: the policy names no validation episodes, or the world model saw them all.
    """
    named = policy_extra.get("validation_episodes", [])
    if not named:
        raise ValueError(
            f"{policy_path} names no validation episodes (train_sft.py writes them), so the trust gate has no held-out "
            "starts; train it again, or leave the gate out with --gate-starts 0"
        )
    seen = set(model_extra.get("train_episodes", []))
    if unseen := [name for name in named if name not in seen]:
        return unseen
    raise ValueError(
        f"the world model saw the evaluation split: {model_path} was trained on {len(seen)} episodes, among them all "
        f"{len(named)} that {policy_path} holds out (first {named[0]}); train both with the same --validation-fraction "
        "and --seed, or leave the trust gate out with --gate-starts 0"
    )


def _reward(
    cfg: RolloutConfig,
    world_model: WorldModel | None,
    chunks: Tensor,
    batch: Batch,
    distance: PerceptualDistance | None,
    seed: tuple[int, ...],
    at_once: int,
) -> Tensor:
    """The run's reward (S, P) of chunks (S, P, T, A), `at_once` starts at a time."""
    dataset, out = dataset_actions(cfg, batch), []
    for i in range(0, len(chunks), at_once):
        part = slice(i, i + at_once)
        reward: Reward = verified_reward(
            cfg.reward,
            world_model,
            chunks[part],
            dataset[part],
            batch.frames[part],
            perceptual=distance,
            **reward_options(cfg),
            generator=generator(chunks.device, "gate imagination", *seed, i),
        )
        out.append(reward.reward)
    return torch.cat(out)


@torch.no_grad()
def trust_gate(
    cfg: GateConfig,
    rollout: RolloutConfig,
    policy: VLAPolicy,
    world_model: WorldModel,
    batch: Batch,
    episodes: Sequence[Episode],
    distance: PerceptualDistance | None,
    seed: tuple[int, ...],
    outcomes: TabletopOutcomes | None = None,
    at_once: int = 16,
) -> dict[str, float]:
    """How well the run's reward ranks chunks near the dataset's and near the policy's own.

    Args:
        cfg: sizes.
        rollout: the run's reward and imagination.
        policy, world_model: as they are; every process computes the same.
        batch: S held-out starts of `episodes`.
        episodes: that `batch.index` numbers.
        distance: perceptual term.
        seed: of noise, samples and imagination: the same chunks' noise at every call with the same seed.
        outcomes: simulator for the true error, or None.
        at_once: starts imagined together.

    Returns:
        gate, the value to compare with the threshold: the lower of the two families' Spearman, with the true error
        where there is one, else with the action error. And for each family `gate_dataset`, `gate_policy`: Spearman
        with the action error (mean L1 to the dataset's chunk), `_se` its standard error over the starts, `_pairs` the
        share of pairs in the right order; `_true`, `_true_se` and `_true_pairs` the same for the true error.

    Raises:
        ValueError: fewer than three chunks of a family, too few for an order.
    """
    for name, count in (
        ("gate_noise x gate_draws", len(cfg.gate_noise) * cfg.gate_draws),
        ("gate_samples", cfg.gate_samples),
    ):
        if count < 3:
            raise ValueError(f"{name} is {count}: an order needs at least 3 chunks per start")
    dataset = dataset_actions(rollout, batch)  # (S, T, A)
    bins, motion = world_model.action_bins, policy.normalizer
    unit = torch.cat([(motion.action_high - motion.action_low) / 2, motion.action_high.new_ones(1)]).cpu()  # (A,)
    how = Perturbations(cfg.gate_noise, cfg.gate_draws, 0)
    around, _ = perturb(
        dataset.cpu(), how, bins.low.cpu(), bins.high.cpu(), unit, generator("cpu", "perturbations", *seed)
    )
    context = encode(rollout, policy, batch.frames[:, 0], batch.instructions, at_once)
    chain = sample_group(policy, context, batch.proprio, cfg.gate_samples, (0, 1), *seed)
    own = policy.normalizer.decode_actions(chain.x[:, -1]).unflatten(0, (-1, cfg.gate_samples))  # (S, P, T, A)
    chunks = torch.cat([around[:, 1:].to(own.device), own], 1)
    labels = ["dataset"] * (around.shape[1] - 1) + ["policy"] * cfg.gate_samples
    score = _reward(rollout, world_model, chunks, batch, distance, seed, at_once).double().cpu()
    errors = {"": (chunks - dataset[:, None]).abs().mean((2, 3)).cpu()}
    if outcomes is not None:
        played = torch.cat([dataset[:, None], chunks], 1).cpu().numpy()
        true = [
            outcomes.state_error(episodes[e], t, rows)[1:].mean(-1)
            for (e, t), rows in zip(batch.index.tolist(), played, strict=True)
        ]
        errors["_true"] = torch.stack(true)
    out: dict[str, float] = {}
    for name, error in errors.items():
        found = agreement(score, error, labels)
        for family in ("dataset", "policy"):
            out[f"gate_{family}{name}"] = found[family]["spearman"]
            out[f"gate_{family}{name}_se"] = found[family]["standard_error"]
            out[f"gate_{family}{name}_pairs"] = found[family]["pair_order"]
    decisive = "_true" if outcomes is not None else ""
    return {"gate": min(out[f"gate_dataset{decisive}"], out[f"gate_policy{decisive}"]), **out}


def check_gate(cfg: GateConfig, rollout: RolloutConfig, found: dict[str, float], step: int) -> None:
    """Refuse to go on with a reward that cannot tell actions apart.

    Raises:
        RuntimeError: below the threshold, and no leave to go on.
    """
    if cfg.gate_stop and not found["gate"] >= cfg.gate_threshold:
        error = "true" if "gate_dataset_true" in found else "action"
        end = "" if error == "action" else "_true"
        near = {f: f"{found[f'gate_{f}{end}']:.2f} ± {found[f'gate_{f}{end}_se']:.2f}" for f in ("dataset", "policy")}
        raise RuntimeError(
            f"trust gate at step {step}: on held-out starts reward {rollout.reward} ranks chunks by their {error} "
            f"error with Spearman {near['dataset']} (± standard error) around the dataset's actions and "
            f"{near['policy']} among the policy's own; the lower one is below --gate-threshold "
            f"{cfg.gate_threshold:g}. Train the world model longer, or on attempts of this policy, too "
            "(collect_demos.py --policy; eval_wm.py measures it), try --imagination greedy or common, another "
            "--perceptual or --reward, or go on with --no-gate-stop"
        )


@torch.no_grad()
def diagnose(
    rollout: RolloutConfig,
    policy: VLAPolicy,
    world_model: WorldModel | None,
    batch: Batch,
    distance: PerceptualDistance | None,
    seed: tuple[int, ...],
    simulator: SimulatorReward | None = None,
    draws: int = 8,
    at_once: int = 16,
) -> tuple[dict[str, float], Tensor]:
    """What the deterministic policy does on fixed starts.

    Args:
        rollout: the run's reward.
        policy, world_model, batch, distance: as `trust_gate`; None where nothing is imagined.
        seed: of x_0 and of the imagination: the same x_0 at every call.
        simulator: of the batch's episodes, for the true error, or None.
        draws: chunks per start, from x_0s of their own.
        at_once: starts imagined together.

    Returns:
        Metrics: `reward_mean_action`, the reward of the mean action (over the draws of the deterministic flow);
        `error_x`, ... `error_gripper`, its mean absolute error to the dataset per dimension, in normalised units;
        `spread_x`, ..., the standard deviation over the draws, which x_0 alone makes; and with a simulator `true_error`
        and `true_error_mean_action`, the mean state error of all draws and that of their mean [m]. And the raw chunks
        (S, draws, T, A).
    """
    dataset = dataset_actions(rollout, batch)
    context = encode(rollout, policy, batch.frames[:, 0], batch.instructions, at_once)
    cond = policy.head.prepare(context, policy.normalizer.encode_proprio(batch.proprio)).repeat(draws)
    shape = (cond.num_rows, policy.cfg.flow.chunk, policy.cfg.flow.action_dim)
    noise = torch.randn(shape, generator=generator(context.device, "diagnosis", *seed), device=context.device)
    x = sample_ode(policy.head, cond, noise=noise, num_steps=policy.cfg.flow.num_steps)
    chunks = policy.normalizer.decode_actions(x).unflatten(0, (-1, draws))  # (S, draws, T, A)
    mean = policy.normalizer.decode_actions(x.unflatten(0, (-1, draws)).mean(1))  # (S, T, A)
    found = {}
    if simulator is not None:
        of_mean = simulator(batch.index, mean[:, None], dataset)
        found["true_error"] = -simulator(batch.index, chunks, dataset).mean().item()
        found["true_error_mean_action"] = -of_mean.mean().item()
    if rollout.reward == "simulator":
        reward = reduce_frames(of_mean, rollout.over_frames, rollout.gamma)
    else:
        reward = _reward(rollout, world_model, mean[:, None], batch, distance, seed, at_once)
    encoded = policy.normalizer.encode_actions(mean), policy.normalizer.encode_actions(dataset)
    error = (encoded[0] - encoded[1]).abs().mean((0, 1)).tolist()
    spread = x.unflatten(0, (-1, draws)).std(1).mean((0, 1)).tolist()
    names = [*ACTION_NAMES[: len(error)], *map(str, range(len(ACTION_NAMES), len(error)))]
    for what, values in (("error", error), ("spread", spread)):
        found |= {f"{what}_{name}": value for name, value in zip(names, values, strict=True)}
    return {"reward_mean_action": reward.mean().item(), **found}, chunks


def picture_actions(path: Path, before: Tensor, after: Tensor, dims: Sequence[int] = (0, 2)) -> None:
    """PNG of action distributions before and after fine-tuning, over the same starts and x_0 (Fig. 4).

    Args:
        path: of the file.
        before, after: raw chunks (S, draws, T, A) of `diagnose`.
        dims: action dims, one panel each; x and z in the paper.
    """
    panels = {
        f"action {ACTION_NAMES[d]}": {"before": before[..., d].flatten(), "after": after[..., d].flatten()}
        for d in dims
    }
    save_png(path, histograms(panels))
