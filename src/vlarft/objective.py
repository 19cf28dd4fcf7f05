"""The update on one batch of rollouts: Eq. (13), or reward-weighted regression as its control.

    L = policy_loss + lambda_mse gate MSE - alpha H + lambda_kl KL(policy || supervised policy)

All random numbers are drawn for the whole batch of all processes, whatever the micro-batches.

Shapes: S starts on this process, G rollouts a start, M noisy flow steps, T chunk steps, A action dim.
"""

import math
from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from vlarft.flow import LogProb, chain_log_prob, matching_loss, matching_pairs
from vlarft.grpo import (
    EntropyOver,
    Objective,
    OverK,
    RatioPer,
    gaussian_kl,
    mean_entropy,
    mse_gate,
    policy_loss,
    regression_weights,
    sampled_kl,
)
from vlarft.grpo import chain_log_prob as reduce_log_prob
from vlarft.nets.action_head import Condition, FlowHead, SigmaNet
from vlarft.policy import VLAPolicy
from vlarft.rollout import PlayedChunk, Rollouts, share
from vlarft.run import distributed
from vlarft.run.config import opt
from vlarft.run.random import generator, numpy_generator


@dataclass(frozen=True)
class ObjectiveConfig:
    """Terms of the loss, and how many updates a batch of rollouts serves."""

    algorithm: Literal["grpo", "rwr"] = opt("grpo", "update: Eq. 13, or reward-weighted regression (Table 10)")
    epochs: int = opt(1, "passes over each batch of rollouts (release)")
    minibatches: int = opt(1, "updates a pass, each on its share of the starts (release)")
    micro_starts: int | None = opt(None, "starts per backward pass, to bound memory; none takes all")
    over_k: OverK = opt("mean", "reduction of log-probs over flow steps (Eq. 8); sum is the release's")
    ratio_per: RatioPer = opt("chunk", "one ratio per chunk (Eq. 9), per action step, or per element (release)")
    objective: Objective = opt("clip", "surrogate: Eq. 13, or PPO's pessimistic minimum (release)")
    clip_low: float = opt(0.2, "ratio >= 1 - clip_low")
    clip_high: float = opt(0.2, "ratio <= 1 + clip_high")
    dual_clip: float | None = opt(None, "bound on the ratio where the advantage is negative, ppo only (release: 3)")
    mse_weight: float = opt(0.01, "lambda_mse of the flow-matching loss (Eq. 13, release)")
    mse_gate: float | None = opt(
        None, "KL to the sampling policy that opens that loss fully (release: 0.2); none: open"
    )
    mse_draws: int = opt(16, "(tau, eps) pairs per start in that loss")
    entropy_weight: float = opt(0.003, "alpha of the entropy bonus (Eq. 13, release)")
    entropy_over: EntropyOver = opt("k", "mean entropy over the K steps, or their sum over K + 1 (release)")
    kl_weight: float = opt(0.0, "weight of the KL to the supervised policy, per scalar of the chain; not in the paper")
    kl: Literal["exact", "sampled"] = opt(
        "exact", "that KL: exact between the steps' Gaussians, or k3 from the samples"
    )
    rwr_temperature: float = opt(0.5, "of rwr's weights, in standard deviations of a group's rewards")
    clip_norm: float = opt(1.0, "global gradient norm (release)")


class Supervised(NamedTuple):
    """Frozen copies of the networks that the run started from, for the KL to them."""

    head: FlowHead
    sigma_net: SigmaNet | None


def supervised_copy(policy: VLAPolicy) -> Supervised:
    """Copy the stochastic policy as it is; before `distributed.shard`."""
    copies = (None if net is None else deepcopy(net).requires_grad_(False) for net in (policy.head, policy.sigma_net))
    return Supervised(*copies)


class Part(NamedTuple):
    """A micro-batch: starts (n,), and its share of the update's."""

    starts: Tensor
    share: float


def update(
    cfg: ObjectiveConfig,
    policy: VLAPolicy,
    optimizer: torch.optim.Optimizer,
    rollouts: Rollouts,
    seed: tuple[int, ...],
    supervised: Supervised | None = None,
) -> dict[str, float]:
    """All updates on one batch of rollouts: `epochs` passes of `minibatches` optimizer steps each.

    The log-probs of the sampling policy stay fixed, so from the second update on the ratio does real work. Starts are
    dealt to minibatches by their number, the order of minibatches is drawn; a group is never cut. Gradients are exact
    whatever `micro_starts` is.

    Args:
        cfg: terms and sizes.
        policy: head and sigma net are trained, and what else has gradients; in eval mode.
        optimizer: of all these.
        rollouts: of `rollout.collect`.
        seed: (seed, step), the same on all processes.
        supervised: for the KL term.

    Returns:
        This process's metrics, means over the updates (`ratio_max`: the largest).

    Raises:
        ValueError: the starts do not divide by the minibatches, or a KL term without the policy that it refers to.
    """
    starts = len(rollouts.advantage)
    if starts % cfg.minibatches:
        raise ValueError(f"{starts} starts on each process do not divide by {cfg.minibatches} minibatches")
    if cfg.kl_weight and supervised is None:
        raise ValueError(f"kl_weight {cfg.kl_weight} needs the supervised policy's networks")
    rows: list[dict[str, float]] = []
    for epoch in range(cfg.epochs):
        order = numpy_generator("minibatches", *seed, epoch).permutation(cfg.minibatches)
        pairs = _draw_pairs(cfg, policy, rollouts, (*seed, epoch))
        for first in order:
            chosen = torch.arange(int(first), starts, cfg.minibatches)
            micro = chosen.split(cfg.micro_starts or starts)
            parts = [Part(part, len(part) / len(chosen)) for part in micro]
            optimizer.zero_grad(set_to_none=True)
            backward = _backward_grpo if cfg.algorithm == "grpo" else _backward_rwr
            metrics = backward(cfg, policy, rollouts, parts, pairs, supervised)
            parameters = [p for group in optimizer.param_groups for p in group["params"]]
            metrics["grad_norm"] = distributed.clip_grad_norm(parameters, cfg.clip_norm)
            rows.append(metrics)
            # all processes leave together: one alone would leave the others waiting for its gradients
            loss = distributed.mean_across_ranks({"loss": metrics["loss"]})["loss"]
            if not math.isfinite(loss + metrics["grad_norm"]):
                return metrics
            optimizer.step()
    reduce: dict[str, Callable] = {"ratio_max": max}
    return {name: reduce.get(name, lambda v: sum(v) / len(v))([row[name] for row in rows]) for name in rows[0]}


def _draw_pairs(cfg: ObjectiveConfig, policy: VLAPolicy, rollouts: Rollouts, seed: tuple[int, ...]) -> list[tuple]:
    """(tau, eps) of the demonstrations' matching loss, then of each sampled chunk's (rwr): this process's share."""
    flow, device = policy.cfg.flow, rollouts.advantage.device
    part = distributed.rank(), distributed.world_size()
    starts, group = rollouts.advantage.shape[:2]
    wanted = [(starts, cfg.mse_draws)] + [(starts * group, 1)] * (len(rollouts.chunks) * (cfg.algorithm == "rwr"))
    draws, out = generator(device, "flow matching", *seed), []
    for rows, count in wanted:
        pair = matching_pairs((rows * part[1], flow.chunk, flow.action_dim), count, generator=draws, device=device)
        out.append(tuple(share(value, part) for value in pair))
    return out


def _rows(values: Tensor, starts: Tensor, num_starts: int) -> Tensor:
    """The rows of some starts, where `values` (S * R, ...) holds R rows for each of the S, start-major."""
    return values.unflatten(0, (num_starts, -1))[starts].flatten(0, 1)


class Chosen(NamedTuple):
    """A micro-batch of one chunk: context (n * R, N, D), made anew with its gradient where the vision-language model
    trains; proprio (n * R, P) raw, x (n * G, K + 1, T, A), its recorded log_prob (n * G, M, T, A), and rows a context.
    """

    context: Tensor
    proprio: Tensor
    x: Tensor
    log_prob: Tensor
    repeats: int


def _choose(policy: VLAPolicy, chunk: PlayedChunk, starts: Tensor, num_starts: int) -> Chosen:
    values = (chunk.context, chunk.proprio, *chunk.chain)
    context, *parts = [_rows(value, starts, num_starts) for value in values]
    if policy.vlm_trains:
        numbers = _rows(torch.arange(len(chunk.frames)), starts, num_starts)
        images = policy.preprocess(chunk.frames[numbers.to(chunk.frames.device)])
        context = policy.encode(images, [chunk.instructions[i] for i in numbers.tolist()])
    return Chosen(context, *parts, repeats=len(chunk.chain.x) // len(chunk.context))


def _reduced(cfg: ObjectiveConfig, policy: VLAPolicy, log_prob: Tensor) -> Tensor:
    """Eq. (8), over noisy dims only: an element without noise has no ratio."""
    return reduce_log_prob(log_prob[..., list(policy.cfg.flow.noisy_dims)], cfg.over_k, cfg.ratio_per)


def _whole_kl(cfg: ObjectiveConfig, policy: VLAPolicy, rollouts: Rollouts, parts: list[Part]) -> float:
    """approx_kl of a minibatch over all processes, before its update."""
    total, num_starts = 0.0, len(rollouts.advantage)
    for part in parts:
        for chunk in rollouts.chunks:
            with torch.no_grad():
                chosen = _choose(policy, chunk, part.starts, num_starts)
                cond = policy.condition(chosen.context, chosen.proprio).repeat(chosen.repeats)
                scored = chain_log_prob(policy.head, policy.sigma_net, chosen.x, cond)
            kl = sampled_kl(_reduced(cfg, policy, chosen.log_prob), _reduced(cfg, policy, scored.log_prob))
            total += part.share * kl.mean().item() / len(rollouts.chunks)
    return distributed.mean_across_ranks({"kl": total})["kl"]


def _supervised_kl(
    cfg: ObjectiveConfig, policy: VLAPolicy, supervised: Supervised, scored: LogProb, chosen: Chosen
) -> Tensor:
    """KL of a scalar of the chain to the supervised policy [nats], a mean over B, M, T and A."""
    with torch.no_grad():
        proprio = policy.normalizer.encode_proprio(chosen.proprio)
        cond = supervised.head.prepare(chosen.context, proprio, sigma_net=supervised.sigma_net)
        theirs = chain_log_prob(supervised.head, supervised.sigma_net, chosen.x, cond.repeat(chosen.repeats))
    if cfg.kl == "sampled":
        return sampled_kl(scored.log_prob, theirs.log_prob).mean()
    noisy = list(policy.cfg.flow.noisy_dims)
    exact = gaussian_kl(scored.mean, scored.sigma, theirs.mean, theirs.sigma)[..., noisy]
    return exact.sum() / scored.log_prob.numel()


def _of_chunk(rollouts: Rollouts, c: int) -> Tensor:
    """The advantages of chunk c, (S, G) or (S, G, T)."""
    advantage = rollouts.advantage
    return advantage if advantage.ndim == 2 else advantage.tensor_split(len(rollouts.chunks), -1)[c]


def _add(totals: dict[str, float], weight: float, metrics: dict[str, float]) -> None:
    for name, value in metrics.items():
        if name == "ratio_max":
            totals[name] = max(value, totals.get(name, value))
        else:
            totals[name] = totals.get(name, 0.0) + weight * value


def _demonstration_loss(
    cfg: ObjectiveConfig, policy: VLAPolicy, rollouts: Rollouts, starts: Tensor, cond: Condition, pairs: tuple
) -> Tensor:
    """Matching loss (Eq. 4) on the intended actions of the demonstrations' first chunk, at some of the starts."""
    target = policy.normalizer.encode_actions(rollouts.batch.intended[starts, : policy.cfg.flow.chunk])
    pairs = tuple(value[starts] for value in pairs)
    return matching_loss(policy.head, target, cond, draws=cfg.mse_draws, pairs=pairs)[0]


def _backward_grpo(
    cfg: ObjectiveConfig,
    policy: VLAPolicy,
    rollouts: Rollouts,
    parts: list[Part],
    pairs: list[tuple],
    supervised: Supervised | None,
) -> dict[str, float]:
    """Gradients of Eq. (13) on one minibatch; its metrics."""
    num_starts, count = len(rollouts.advantage), len(rollouts.chunks)
    gate = mse_gate(_whole_kl(cfg, policy, rollouts, parts) if cfg.mse_gate else 0.0, cfg.mse_gate)
    totals: dict[str, float] = {}
    for part in parts:
        for c, chunk in enumerate(rollouts.chunks):
            chosen = _choose(policy, chunk, part.starts, num_starts)
            cond = policy.condition(chosen.context, chosen.proprio)
            scored = chain_log_prob(policy.head, policy.sigma_net, chosen.x, cond.repeat(chosen.repeats))
            surrogate, metrics = policy_loss(
                _reduced(cfg, policy, scored.log_prob),
                _reduced(cfg, policy, chosen.log_prob),
                _of_chunk(rollouts, c)[part.starts].flatten(0, 1),
                clip_low=cfg.clip_low,
                clip_high=cfg.clip_high,
                objective=cfg.objective,
                dual_clip=cfg.dual_clip,
            )
            entropy = mean_entropy(scored.entropy, cfg.entropy_over)
            loss = surrogate - cfg.entropy_weight * entropy  # Eq. (13), the mean over the chunks of a rollout
            metrics |= {"policy_loss": surrogate.item(), "entropy": entropy.item()}
            metrics["sigma"] = scored.sigma[..., list(policy.cfg.flow.noisy_dims)].mean().item()
            if cfg.kl_weight:
                kl = _supervised_kl(cfg, policy, supervised, scored, chosen)
                loss, metrics["kl_supervised"] = loss + cfg.kl_weight * kl, kl.item()
            loss = loss / count
            if c == 0:
                mse = _demonstration_loss(cfg, policy, rollouts, part.starts, cond, pairs[0])
                loss = loss + cfg.mse_weight * gate * mse
                _add(totals, part.share, {"mse": mse.item(), "mse_gate": gate})
            (part.share * loss).backward()
            _add(totals, part.share / count, metrics)
            _add(totals, part.share, {"loss": loss.item()})
    return totals


def _backward_rwr(
    cfg: ObjectiveConfig,
    policy: VLAPolicy,
    rollouts: Rollouts,
    parts: list[Part],
    pairs: list[tuple],
    supervised: Supervised | None,
) -> dict[str, float]:
    """Gradients of reward-weighted regression: flow matching (Eq. 4) on the rollouts' own chunks, as they were played,
    weighted by `regression_weights`, plus the matching loss on the demonstrations. The sigma net is left alone.
    """
    num_starts, count = len(rollouts.advantage), len(rollouts.chunks)
    weights = regression_weights(rollouts.reward.reward, cfg.rwr_temperature)  # (S, G)
    totals: dict[str, float] = {"weight_max": weights.max().item()}
    for part in parts:
        for c, chunk in enumerate(rollouts.chunks):
            chosen = _choose(policy, chunk, part.starts, num_starts)
            cond = policy.condition(chosen.context, chosen.proprio)
            played = policy.normalizer.encode_actions(policy.normalizer.decode_actions(chosen.x[:, -1]))
            pair = tuple(_rows(value, part.starts, num_starts) for value in pairs[1 + c])
            weight = weights[part.starts].flatten()
            regression, _ = matching_loss(policy.head, played, cond, pairs=pair, weights=weight)
            loss = regression / count
            if c == 0:
                mse = _demonstration_loss(cfg, policy, rollouts, part.starts, cond, pairs[0])
                loss = loss + cfg.mse_weight * mse
                _add(totals, part.share, {"mse": mse.item()})
            (part.share * loss).backward()
            _add(totals, part.share / count, {"policy_loss": regression.item()})
            _add(totals, part.share, {"loss": loss.item()})
    return totals
