"""Fine-tune with a variant of Algorithm 1: what the study tried beside the paper's, each a hook of `train_rft.main`.

    python studies/variants.py --variant rwr --preset tiny --policy runs/sft --world-model runs/wm --out-dir runs/rwr
    torchrun --nproc-per-node 8 studies/variants.py --variant symmetric ...

All other flags are those of train_rft.py; symmetric and simulator hand over a reward of their own, which has no
rollouts.png and, with simulator, no trust gate. A run folder knows its variant, and belongs to no other. "R1" and "R3"
are rewards; intervals are 95 %, over starts (docs/findings.md).

    release       the public code's objective (release_loss.py). Not run.
    flow_sde      noise that keeps the flow's marginals (flow_sde.py), for the sigma net's. With R1, one run: +3.3
                  [+1.0, +5.6] points over SFT, not told apart from the sigma net's noise (-0.3 [-2.1, +1.5]).
    rwr           reward-weighted regression (Table 10). Six runs: -13.8 [-15.8, -11.6] points on plain starts; it
                  imitates the chain's noise.
    kl            a KL term to the supervised policy, exact. With R1, one run: +1.8 [+0.3, +3.3] over R1 without.
    kl_sampled    the same, estimated from the sampled chains. Not run.
    whole_policy  trains the vision-language model as well. With R1 and averaged weights, three runs: +4.4 [+3.2, +5.6]
                  over SFT, where the action head alone gains +3.4 [+2.1, +4.7].
    symmetric     scores a chunk together with its mirror image about the demonstration. With R3, one run from the
                  policy that R3 harms most: +3.5 [+0.7, +6.3], where R3 has -8.2; for twice the rollouts.
    gripper_x0    x_0 = 0 but for the gripper, for policies that are played so. With R1, one run: 88.2 %, where SFT
                  played so has 89.2 %.
    simulator     the true error as the reward (simulator_reward.py), for Tabletop demonstrations with states. From a
                  policy at its plateau, one run: +3.3 [+1.9, +4.8].

Rollouts of several chunks, in which the policy goes on from its own last imagined frame, are not among them: their
windows are longer than a chunk, what the policy sees depends on what it did before, and sampling and scoring take
turns. That is another loop, not a hook of this one. No run of the study had them; commit 5747157 has the code.

Shapes: S starts, G rollouts of a group, B = S * G chains, K flow steps, T chunk steps, A action dim.
"""

import sys
from collections.abc import Callable
from dataclasses import dataclass, fields
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from flow_sde import sde_transition
from simulator_reward import SimulatorReward
from torch import Tensor

from vlarft.action_bins import ActionBins
from vlarft.data import Batch, load_episodes
from vlarft.flow import Chain, chain_log_prob, sample_chain
from vlarft.grpo import advantages
from vlarft.policy import PolicyConfig, VLAPolicy
from vlarft.reward import Scorer, make_scorer
from vlarft.run import distributed, preemption
from vlarft.run.checkpoint import load_model, read_header
from vlarft.run.config import opt
from vlarft.run.script import run_script
from vlarft.sim.replay import TabletopOutcomes

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # where the stage scripts are, which are no package
from release_loss import release_loss

import train_rft
from train_rft import Rollouts, demonstration_loss, grpo_loss

Hooks = dict[str, Any]  # keyword arguments of train_rft.main


@dataclass(frozen=True)
class Config(train_rft.Config):
    variant: (
        Literal[
            "release", "flow_sde", "rwr", "kl", "kl_sampled", "whole_policy", "symmetric", "gripper_x0", "simulator"
        ]
        | None
    ) = opt(None, "what is changed: see the head of studies/variants.py", group="variant")


PRESETS = {
    name: Config(**{field.name: getattr(preset, field.name) for field in fields(preset)})
    for name, preset in train_rft.PRESETS.items()
}


def release(cfg: train_rft.Config) -> Hooks:
    """Use the public code's objective, see release_loss.py.

    Raises:
        ValueError: flags that the public code's objective has no room for.
    """
    if not cfg.divide_by_std or cfg.per_step:
        raise ValueError(
            "variant release has one advantage per chunk, over the group's std: give --divide-by-std without --per-step"
        )
    if cfg.micro_starts is not None:
        raise ValueError(
            f"variant release: the gate of the flow-matching term needs the whole batch at once, so leave out "
            f"--micro-starts {cfg.micro_starts}; more processes bound the memory as well"
        )
    return {"loss": release_loss, "sigma_uses_x": True}


def flow_sde(cfg: train_rft.Config, strength: float = 0.7) -> Hooks:
    """Sample and score chains by `sde_transition`; the sigma net is there and does not train."""
    step = partial(sde_transition, strength=strength)
    return {"sample": partial(train_rft.sample_chains, step=step), "loss": partial(grpo_loss, step=step)}


def regression_weights(rewards: Tensor, temperature: float) -> Tensor:
    """Compute the softmax of the group's standardised rewards over a temperature.

    Args:
        rewards: (S, G).
        temperature: in units of the group's standard deviation; small = the best rollout alone, large = all alike.

    Returns:
        (S, G) float32 without gradient, mean 1 in every row; exactly 1 where all rewards of a group are equal.

    Raises:
        ValueError: a temperature that is not positive.
    """
    if not temperature > 0:
        raise ValueError(f"temperature must be positive, got {temperature}")
    return rewards.shape[1] * (advantages(rewards, divide_by_std=True) / temperature).softmax(1)


def rwr_loss(
    cfg: train_rft.Config, policy: VLAPolicy, rollouts: Rollouts, temperature: float = 0.5
) -> tuple[Tensor, dict[str, float]]:
    """Compute the loss of reward-weighted regression: Eq. (4) on the rollouts' chunks as they were played, weighted by
    their reward.

    The demonstrations' flow-matching term is added as in Eq. (13), and lends its pairs (tau, eps): rollout g takes the
    pair g modulo their number.
    """
    group = rollouts.x.shape[1]
    weights = regression_weights(rollouts.reward.sum(-1), temperature)  # (S, G)
    played = policy.normalizer.decode_actions(rollouts.x[:, :, -1].flatten(0, 1))  # in range, gripper open or closed
    target = policy.normalizer.encode_actions(played)  # (B, T, A)
    pairs = torch.arange(group, device=target.device) % rollouts.tau.shape[1]
    tau, eps = rollouts.tau[:, pairs].flatten(), rollouts.eps[:, pairs].flatten(0, 1)  # (B,), (B, T, A)
    cond = policy.condition(rollouts.context, rollouts.batch.proprio)
    velocity = policy.head.velocity(torch.lerp(eps, target, tau[:, None, None]), tau, cond.repeat(group))
    error = (velocity - (target - eps)).square().mean((1, 2))  # (B,)
    regression = (weights.flatten() * error).mean()
    mse = demonstration_loss(policy, rollouts, cond)
    metrics = {"policy_loss": regression.item(), "mse": mse.item(), "weight_max": weights.max().item()}
    return regression + cfg.mse_weight * mse, metrics


def rwr(cfg: train_rft.Config, temperature: float = 0.5) -> Hooks:
    """Use reward-weighted regression (Table 10). The sigma net does not train.

    Raises:
        ValueError: advantages per action step, of which there are none.
    """
    if cfg.per_step:
        raise ValueError("variant rwr weighs whole chunks: leave out --per-step")
    return {"loss": partial(rwr_loss, temperature=temperature)}


def gaussian_kl(mean: Tensor, sigma: Tensor, other_mean: Tensor, other_sigma: Tensor) -> Tensor:
    """Compute KL(N(mean, sigma) || N(other_mean, other_sigma)) of every scalar [nats], same shape as the arguments.

    On the steps of a chain this is the KL of the policy to another one, given the x_k that were visited.
    """
    mean, sigma, other_mean, other_sigma = (v.float() for v in (mean, sigma, other_mean, other_sigma))
    scaled = (sigma.square() + (mean - other_mean).square()) / other_sigma.square()
    return other_sigma.log() - sigma.log() + (scaled - 1) / 2


def sampled_kl(log_prob: Tensor, other_log_prob: Tensor) -> Tensor:
    """Compute the k3 estimate of KL(policy || other) from samples of the policy: r - 1 - log r with r = other / policy.

    Never negative; its mean over samples is the KL. Elementwise, same shape as the arguments.
    """
    log_ratio = other_log_prob.float() - log_prob.float()
    return log_ratio.exp() - 1 - log_ratio


class KLLoss:
    """Eq. (13) plus `weight` times the KL to the supervised policy, per scalar of the chain.

    Args:
        supervised: the policy before fine-tuning, with its sigma net, frozen.
        weight: see above.
        kind: "exact" between the Gaussians of the steps, or "sampled", `sampled_kl` of the chains.
    """

    def __init__(self, supervised: VLAPolicy, weight: float, kind: Literal["exact", "sampled"]) -> None:
        self.supervised, self.weight, self.kind = supervised, weight, kind

    def __call__(self, cfg: train_rft.Config, policy: VLAPolicy, rollouts: Rollouts) -> tuple[Tensor, dict[str, float]]:
        loss, metrics = grpo_loss(cfg, policy, rollouts)
        kl = self.divergence(policy, rollouts)
        return loss + self.weight * kl, metrics | {"kl_supervised": kl.item()}

    def divergence(self, policy: VLAPolicy, rollouts: Rollouts) -> Tensor:
        """Compute the KL of a scalar of the chain [nats], a mean over S, G, K, T and A."""
        x = rollouts.x.flatten(0, 1)  # (B, K + 1, T, A)
        scored = []
        for model in (policy, self.supervised):
            cond = model.condition(rollouts.context, rollouts.batch.proprio).repeat(rollouts.x.shape[1])
            scored.append(chain_log_prob(model.head, model.sigma_net, x, cond))
        here, there = scored
        if self.kind == "sampled":
            return sampled_kl(here.log_prob, there.log_prob).mean()
        return gaussian_kl(here.mean, here.sigma, there.mean, there.sigma).mean()


def kl(cfg: train_rft.Config, weight: float = 0.1, kind: Literal["exact", "sampled"] = "exact") -> Hooks:
    """Add a KL term to the policy that the run started from, with the sigma net that it started with."""
    supervised, _ = load_model(cfg.policy, VLAPolicy, PolicyConfig, distributed.setup())
    train_rft.make_trainable(cfg, supervised, {})  # the run's first sigma net, by the same seed; trains nothing
    return {"loss": KLLoss(supervised, weight, kind)}


def whole_policy_loss(cfg: train_rft.Config, policy: VLAPolicy, rollouts: Rollouts) -> tuple[Tensor, dict[str, float]]:
    """Compute Eq. (13) with the context made anew, so that its gradient reaches the vision-language model."""
    images = policy.preprocess(rollouts.batch.frames[:, 0])
    context = policy.encode(images, rollouts.batch.instructions)  # (S, N, D)
    return grpo_loss(cfg, policy, rollouts._replace(context=context))


def whole_policy(cfg: train_rft.Config) -> Hooks:
    """Train the vision-language model and the key-position head at the rate of the flow head."""
    return {"loss": whole_policy_loss, "rates": dict.fromkeys(("vlm", "key_head", "key_embed"), cfg.lr)}


def mirror(actions: Tensor, reference: Tensor, low: Tensor, high: Tensor) -> Tensor:
    """Mirror chunks to the other side of the demonstration's: as far from it, the opposite way. The gripper, last,
    stays.

    Args:
        actions: (S, G, T, A) raw.
        reference: (S, T, A) raw.
        low, high: (A,) that the result is clipped to.

    Returns:
        (S, G, T, A).
    """
    opposite = torch.minimum(torch.maximum(2 * reference[:, None] - actions, low), high)
    return torch.cat([opposite[..., :-1], actions[..., -1:]], -1)


class SymmetricScorer:
    """Score each chunk by the mean of its reward and that of its mirror image about the demonstration's actions.

    The model may be more sensitive to one direction, which biases the policy; averaging a chunk with its mirror image
    removes the bias.

    Args:
        score: a reward in a world model.
        bins: of that world model, whose ranges the mirror images stay in.
    """

    def __init__(self, score: Scorer, bins: ActionBins) -> None:
        self.score, self.bins = score, bins

    def __call__(self, batch: Batch, actions: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Score raw actions (S, G, T, A): (S, G, T)."""
        opposite = mirror(actions, batch.intended, self.bins.low, self.bins.high)
        both = self.score(batch, torch.cat([actions, opposite], 1), generator)  # (S, 2 G, T)
        return sum(both.chunk(2, 1)) / 2


def symmetric(cfg: train_rft.Config) -> Hooks:
    """Use --reward with mirror images, see `SymmetricScorer`.

    Raises:
        ValueError: R1, which is symmetric as it is, or a world model that poses drive, whose bins are no actions.
    """
    if cfg.reward == "r1":
        raise ValueError("variant symmetric is for rewards in a world model; r1 counts both sides alike as it is")
    device = distributed.setup()
    policy, extra = load_model(cfg.policy, VLAPolicy, PolicyConfig, device)
    world_model, distance = train_rft.load_world_model(cfg, policy, extra, device)
    if world_model.cfg.pose_dims:
        raise ValueError(
            f"variant symmetric is for actions; poses drive {cfg.world_model}: train it with --pose-dims 0"
        )
    make = partial(make_scorer, cfg.reward, world_model, distance, cfg.imagination)
    scorers = (SymmetricScorer(make(part), world_model.action_bins) for part in (distributed.part(), (0, 1)))
    return dict(zip(("score", "score_held_out"), scorers))


def sample_gripper_x0(policy: VLAPolicy, batch: Batch, context: Tensor, group: int, source: torch.Generator) -> Chain:
    """Sample chains as `train_rft.sample_chains` does, with the same random numbers, but x_0 = 0 in all dimensions but
    the gripper's, last.
    """
    flow, cond = policy.cfg.flow, policy.condition(context, batch.proprio).repeat(group)
    shape = (cond.num_rows * distributed.world_size(), 1 + flow.num_steps, flow.chunk, flow.action_dim)
    noise = distributed.own_rows(torch.randn(shape, generator=source, device=context.device))
    noise[:, 0, :, :-1] = 0
    return sample_chain(policy.head, policy.sigma_net, cond, noise=noise[:, 0], step_noise=noise[:, 1:])


def gripper_x0(cfg: train_rft.Config) -> Hooks:
    """Sample as a policy is played by `eval_libero.py --noise gripper`."""
    return {"sample": sample_gripper_x0}


def simulator(cfg: train_rft.Config) -> Hooks:
    """Use the simulator's true error in place of --reward, see simulator_reward.py."""
    extra, outcomes = read_header(cfg.policy).extra, TabletopOutcomes()
    held_out = extra.get("held_out_episodes") or extra["train_episodes"]  # as `train_rft.windows`

    def score(names: list[str]) -> SimulatorReward:
        episodes = load_episodes(cfg.demos, extra.get("camera", "agentview"), names=names, with_states=True)
        return SimulatorReward(episodes, outcomes)

    return {"score": score(extra["train_episodes"]), "score_held_out": score(held_out)}


VARIANTS: dict[str, Callable[[train_rft.Config], Hooks]] = {
    "release": release,
    "flow_sde": flow_sde,
    "rwr": rwr,
    "kl": kl,
    "kl_sampled": partial(kl, kind="sampled"),
    "whole_policy": whole_policy,
    "symmetric": symmetric,
    "gripper_x0": gripper_x0,
    "simulator": simulator,
}


def main(cfg: Config) -> dict[str, float]:
    """Fine-tune with the variant, or resume; return what `train_rft.main` does.

    Raises:
        ValueError: no variant is named, or the variant has no use for a flag.
    """
    if cfg.variant is None:
        raise ValueError(f"--variant names what to change, one of {', '.join(VARIANTS)}; train_rft.py changes nothing")
    return train_rft.main(cfg, **VARIANTS[cfg.variant](cfg))


if __name__ == "__main__":
    run_script(main, Config, PRESETS, __doc__, preemption.deferred)
