"""The trust gate: does the reward rank action chunks as their error does? Asked before anything is trained.

Not in the paper. A verified reward stands in for the true error of a chunk; where the world model cannot tell chunks
apart, the update follows noise. On held-out starts the gate ranks two families of chunks by the reward of the run:
noise around the demonstration's actions, and chunks that the stochastic policy samples. For each start it takes
Spearman's rank correlation with their action error (and, in studies that have a simulator at hand, with their true
error), then the mean over the starts.

Shapes: S starts, P chunks a start, T chunk steps, A action dim.
"""

import torch
from torch import Tensor

from vlarft.action_bins import ActionBins
from vlarft.data.windows import Batch
from vlarft.policy import VLAPolicy
from vlarft.reward import Scorer
from vlarft.run.random import generator
from vlarft.sensitivity import Perturbations, agreement, perturb

PERTURBED = Perturbations(noise=(0.05, 0.15, 0.4), draws=3, flips=0)  # chunks around the demonstration's
SAMPLES = 8  # chunks that the policy samples at each start


def held_out_names(policy_path: str, policy_extra: dict, model_path: str, model_extra: dict) -> list[str]:
    """Episodes of the policy's held-out split that the world model was not trained on.

    Args:
        policy_path, model_path: for the messages.
        policy_extra, model_extra: of the two checkpoints' headers.

    Raises:
        ValueError: the policy names no held-out episodes, or the world model saw them all.
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
    """Rewards (S, P), summed over frames, of chunks (S, P, T, A), `at_once` starts at a time to bound memory."""
    parts = [slice(i, i + at_once) for i in range(0, len(actions), at_once)]
    return torch.cat([score(batch.rows(part), actions[part], source).sum(-1) for part in parts])


@torch.no_grad()
def trust_gate(
    score: Scorer,
    policy: VLAPolicy,
    batch: Batch,
    bins: ActionBins,
    seed: int,
    *,
    true_reward: Scorer | None = None,
    perturbed: Perturbations = PERTURBED,
    samples: int = SAMPLES,
    bf16: bool = False,
    at_once: int = 16,
) -> dict[str, float]:
    """Measure how well the reward ranks chunks near the demonstration's and near the policy's own.

    Args:
        score: the reward of the run.
        policy: with its sigma net, as it is; every process computes the same.
        batch: S held-out starts.
        bins: of the world model, whose ranges the perturbed chunks stay in.
        seed: of noise, samples and imagination: the same chunks at every call.
        true_reward: negative true error, (S, P, T), where a simulator is at hand.
        perturbed, samples: the two families of chunks.
        bf16: encode the observations in bfloat16.
        at_once: starts imagined together.

    Returns:
        gate, the value to compare with the threshold: the lower of the two families' Spearman, with the true error
        where there is one, else with the action error. And for each family `gate_dataset`, `gate_policy`: Spearman
        with the action error (mean L1 to the demonstration's chunk), `_se` its standard error over the starts, `_pairs`
        the share of pairs in the right order; `_true`, `_true_se` and `_true_pairs` the same for the true error.

    Raises:
        ValueError: fewer than three chunks of a family, too few for a ranking.
    """
    around = len(perturbed.noise) * perturbed.draws
    for name, count in (("perturbed chunks", around), ("samples of the policy", samples)):
        if count < 3:
            raise ValueError(f"trust gate: {count} {name} per start; a ranking needs at least 3")
    dataset, motion = batch.intended, policy.normalizer  # (S, T, A)
    unit = torch.cat([(motion.action_high - motion.action_low) / 2, motion.action_high.new_ones(1)]).cpu()  # (A,)
    noise = generator("cpu", "perturbations", seed)
    near, _ = perturb(dataset.cpu(), perturbed, bins.low.cpu(), bins.high.cpu(), unit, noise)  # (S, 1 + P, T, A)
    context = policy.encode_frames(batch.frames[:, 0], batch.instructions, bf16=bf16, at_once=at_once)
    chain = policy.sample_group(context, batch.proprio, samples, generator(context.device, "gate chains", seed))
    sampled = motion.decode_actions(chain.x[:, -1]).unflatten(0, (-1, samples))  # (S, P, T, A)
    chunks = torch.cat([near[:, 1:].to(sampled.device), sampled], 1)
    labels = ["dataset"] * around + ["policy"] * samples
    source = generator(chunks.device, "gate imagination", seed)
    reward = score_in_parts(score, batch, chunks, source, at_once).double().cpu()  # (S, P)
    errors = {"": (chunks - dataset[:, None]).abs().mean((2, 3)).cpu()}
    if true_reward is not None:
        errors["_true"] = -true_reward(batch, chunks, None).mean(-1).double().cpu()
    out: dict[str, float] = {}
    for kind, error in errors.items():
        ranked = agreement(reward, error, labels)
        for family in ("dataset", "policy"):
            out[f"gate_{family}{kind}"] = ranked[family]["spearman"]
            out[f"gate_{family}{kind}_se"] = ranked[family]["standard_error"]
            out[f"gate_{family}{kind}_pairs"] = ranked[family]["pair_order"]
    decisive = "_true" if true_reward is not None else ""
    return {"gate": min(out[f"gate_dataset{decisive}"], out[f"gate_policy{decisive}"]), **out}


def check_gate(found: dict[str, float], threshold: float | None, reward: str) -> None:
    """Refuse to go on with a reward that cannot tell actions apart.

    Args:
        found: of `trust_gate`.
        threshold: least rank correlation; None = go on whatever it is.
        reward: its name, for the message.

    Raises:
        RuntimeError: below the threshold.
    """
    if threshold is None or found["gate"] >= threshold:
        return
    kind, error = ("_true", "true") if "gate_dataset_true" in found else ("", "action")
    near = {f: f"{found[f'gate_{f}{kind}']:.2f} ± {found[f'gate_{f}{kind}_se']:.2f}" for f in ("dataset", "policy")}
    raise RuntimeError(
        f"trust gate: on held-out starts reward {reward} ranks chunks by their {error} error with Spearman "
        f"{near['dataset']} (± standard error) around the demonstrations' actions and {near['policy']} among chunks "
        f"sampled from the policy; the lower one is below --gate-threshold {threshold:g}. Train the world model "
        "longer, or on attempts of this policy as well (collect_demos.py --policy; eval_wm.py measures it), try "
        "--imagination greedy or common, another --perceptual or --reward, or go on with --gate-threshold none"
    )
