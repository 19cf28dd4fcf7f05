"""The trust gate: before anything is trained, check that the reward ranks action chunks by their error.

Not in the paper. A verified reward approximates the true error of a chunk, which only a simulator knows; where the
world model cannot tell chunks apart, the update follows noise. On held-out starts the gate scores two families of
chunks with the run's reward: perturbed demonstrations, and samples of the stochastic policy. For each start it computes
Spearman's rank correlation with their action error, which is the mean L1 distance to the demonstration's chunk (in
studies with a simulator, also with their true error), then the mean over the starts. R1 is the negative action error:
without a simulator the gate asks whether the reward ranks chunks as R1 does.

Shapes: S starts, P chunks per start, T chunk steps, A action dim.
"""

import math
import warnings

import numpy as np
import torch
from torch import Tensor

from vlarft.data.windows import Batch
from vlarft.policy import VLAPolicy
from vlarft.reward import Scorer
from vlarft.run.random import generator
from vlarft.sensitivity import Perturbations, agreement, perturb

PERTURBED = Perturbations(noise=(0.05, 0.15, 0.4), draws=3, flips=0)  # of the demonstration's chunk
SAMPLES = 8  # chunks sampled from the policy, per start


def held_out_names(policy_path: str, policy_extra: dict, model_path: str, model_extra: dict) -> list[str]:
    """Return the names of the policy's held-out episodes that the world model was not trained on.

    Args:
        policy_path, model_path: the two checkpoints, for the messages.
        policy_extra, model_extra: `extra` of the two checkpoints' headers.

    Raises:
        ValueError: the policy names no held-out episodes, or the world model was trained on all of them.
    """
    named = policy_extra.get("held_out_episodes", [])
    if not named:
        raise ValueError(
            f"{policy_path} names no held-out episodes (train_sft.py writes them), so the trust gate has no starts; "
            "train it again, or leave the gate out with --gate-starts 0"
        )
    seen = set(model_extra.get("train_episodes", []))
    if unseen := [name for name in named if name not in seen]:
        return unseen
    raise ValueError(
        f"the world model saw the evaluation split: {model_path} was trained on {len(seen)} episodes, among them all "
        f"{len(named)} that {policy_path} holds out (first {named[0]}); train both with the same --validation-fraction "
        "and --split-seed, or leave the trust gate out with --gate-starts 0"
    )


def score_in_parts(score: Scorer, batch: Batch, actions: Tensor, source: torch.Generator, at_once: int) -> Tensor:
    """Score chunks (S, P, T, A), `at_once` starts at a time to bound memory: rewards (S, P), summed over frames."""
    parts = [slice(i, i + at_once) for i in range(0, len(actions), at_once)]
    return torch.cat([score(batch.rows(part), actions[part], source).sum(-1) for part in parts])


@torch.no_grad()
def trust_gate(
    score: Scorer,
    policy: VLAPolicy,
    batch: Batch,
    seed: int,
    *,
    true_reward: Scorer | None = None,
    perturbed: Perturbations = PERTURBED,
    samples: int = SAMPLES,
    bf16: bool = False,
    at_once: int = 16,
) -> dict[str, float]:
    """Measure how well the reward ranks perturbed demonstrations, and samples of the policy.

    Args:
        score: the run's reward.
        policy: with its sigma net; all processes of a distributed run compute the same numbers.
        batch: S held-out starts.
        seed: seed of perturbations, samples and imagination; the same seed gives the same chunks.
        true_reward: scorer of the negative true error (S, P, T), by a simulator; None = no simulator.
        perturbed, samples: how the demonstration is perturbed, within what the policy can do, and the number of samples
            per start.
        bf16: encode the observations in bfloat16.
        at_once: starts encoded or imagined at a time, to bound memory.

    Returns:
        `gate`, the value to compare with the threshold: the lower of the two families' Spearman correlations, with the
        true error if `true_reward` is given, else with the action error. For each family, `gate_dataset` (perturbed
        demonstrations) and `gate_policy`: Spearman with the action error; with `_se`, its standard error over the
        episodes of the starts (of one alone, over its starts); with `_pairs`, the share of pairs in the right order.
        `_true`, `_true_se` and `_true_pairs` are the same for the true error.

    Raises:
        ValueError: fewer than three chunks in a family, too few for a ranking.
    """
    num_perturbed = len(perturbed.noise) * perturbed.draws
    for name, count in (("perturbed chunks", num_perturbed), ("samples of the policy", samples)):
        if count < 3:
            raise ValueError(f"trust gate: {count} {name} per start; a ranking needs at least 3")
    reference, normalizer = batch.intended, policy.normalizer  # (S, T, A)
    noise, ends = generator("cpu", "perturbations", seed), torch.ones(reference.shape[-1], device=reference.device)
    ranges = normalizer.decode_actions(torch.stack([-ends, ends])).cpu().sort(0).values  # of what the policy can do
    unit, grippers = normalizer.action_unit().cpu(), normalizer.gripper_dims
    around, _ = perturb(reference.cpu(), perturbed, *ranges, unit, noise, grippers)  # (S, 1 + P, T, A)
    context = policy.encode_frames(batch.frames[:, 0], batch.instructions, bf16=bf16, at_once=at_once)
    chain = policy.sample_group(context, batch.proprio, samples, generator(context.device, "gate chains", seed))
    sampled = normalizer.decode_actions(chain.x[:, -1]).unflatten(0, (-1, samples))  # (S, P, T, A)
    chunks = torch.cat([around[:, 1:].to(sampled.device), sampled], 1)  # without the unperturbed chunk
    labels = ["dataset"] * num_perturbed + ["policy"] * samples
    source = generator(chunks.device, "gate imagination", seed)
    reward = score_in_parts(score, batch, chunks, source, at_once).double().cpu()  # (S, P)
    errors = {"": (chunks - reference[:, None]).abs().mean((2, 3)).cpu()}  # (S, P)
    if true_reward is not None:
        errors["_true"] = -true_reward(batch, chunks, None).mean(-1).double().cpu()
    out: dict[str, float] = {}
    for suffix, error in errors.items():
        ranked = agreement(reward, error, labels, batch.index[:, 0].cpu())  # starts of an episode are alike
        for family in ("dataset", "policy"):
            out[f"gate_{family}{suffix}"] = ranked[family]["spearman"]
            out[f"gate_{family}{suffix}_se"] = ranked[family]["standard_error"]
            out[f"gate_{family}{suffix}_pairs"] = ranked[family]["pair_order"]
    decisive = "_true" if true_reward is not None else ""
    lower = np.minimum(*(out[f"gate_{family}{decisive}"] for family in ("dataset", "policy")))
    return {"gate": float(lower), **out}  # NaN where one of them is, which `check_gate` does not let pass


def check_gate(found: dict[str, float], threshold: float | None, reward: str) -> None:
    """Stop a run whose reward cannot tell actions apart; warn where the starts are too few to say.

    Args:
        found: what `trust_gate` returned.
        threshold: lowest rank correlation to accept; None = accept any. A run stops where a family's 95 % interval over
            the held-out episodes lies below it, or a family has no value.
        reward: the reward's name, for the message.

    Raises:
        RuntimeError: the interval of one of the families lies below the threshold.
    """
    if threshold is None or found["gate"] >= threshold:
        return
    suffix, error = ("_true", "true") if "gate_dataset_true" in found else ("", "action")
    pairs = {f: (found[f"gate_{f}{suffix}"], found[f"gate_{f}{suffix}_se"]) for f in ("dataset", "policy")}
    ranks = {f: f"{value:.2f} ± {deviation:.2f}" for f, (value, deviation) in pairs.items()}
    ranked = (
        f"trust gate: on held-out starts reward {reward} ranks chunks by their {error} error with Spearman "
        f"{ranks['dataset']} (± standard error) around the demonstrations' actions and {ranks['policy']} among chunks "
        f"sampled from the policy; the lower one is below --gate-threshold {threshold:g}"
    )
    # a single start has a value, but no interval: its deviation is nan
    if not any(math.isnan(value) or value + 1.96 * deviation < threshold for value, deviation in pairs.values()):
        warnings.warn(
            f"{ranked}, by less than chance may do: hold out more episodes, or give more --gate-starts",
            stacklevel=2,
        )
        return
    raise RuntimeError(
        f"{ranked}. Train the world model "
        "longer, or on attempts of this policy as well (collect_demos.py --policy; eval_wm.py measures it), try "
        "--imagination greedy or common, another --perceptual or --reward, or go on with --gate-threshold none"
    )
