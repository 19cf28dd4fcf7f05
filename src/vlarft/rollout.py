"""Rollouts of a policy inside the world model: Algorithm 1, lines 6 to 14, and their closed loop over several chunks.

All random numbers are drawn for the whole batch of all processes, and each takes its share: the rollouts of a run do
not depend on the number of processes.

Shapes: S starts on this process, G rollouts a start, T chunk steps, A action dim, P proprio dim, N context tokens.
"""

import time
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from einops import rearrange
from torch import Tensor

from vlarft.data.episodes import Episode
from vlarft.data.windows import Batch
from vlarft.flow import Chain, sample_chain
from vlarft.grpo import Credit, advantages, credited
from vlarft.metrics import PerceptualDistance
from vlarft.policy import VLAPolicy
from vlarft.reward import (
    Imagination,
    OverFrames,
    Reward,
    RewardKind,
    reduce_frames,
    verified_reward,
    weigh_frames,
)
from vlarft.run import distributed
from vlarft.run.config import opt
from vlarft.run.random import generator
from vlarft.sim.replay import SimulatorReward
from vlarft.world_model import History, WorldModel

GroupX0 = Literal["own", "shared", "gripper"]


@dataclass(frozen=True)
class RolloutConfig:
    """What is sampled, how it is imagined and how it is scored."""

    group: int = opt(16, "rollouts a start (Sec. 4.1)")
    group_x0: GroupX0 = opt(
        "own",
        "x_0 of a start's rollouts: own; shared, so that advantages are of the chain's noise alone (DanceGRPO); or "
        "gripper, own in the gripper's dimension and 0 elsewhere, for a policy that is played with --noise gripper",
    )
    mirrored: bool = opt(
        False,
        "rollouts in pairs of one x_0 and opposite noise: what noise does to the reward either way, such as making the "
        "chunk worse, cancels in the head's gradient",
    )
    chunks: int = opt(1, "action chunks that a rollout lasts; from the second on the policy sees imagined frames")
    reward: RewardKind = opt("r3", "verified reward (Table 4), or simulator: the true error, of Tabletop with states")
    reference: Literal["executed", "intended"] = opt(
        "executed", "dataset actions that R1 and R3 compare with: executed, or before the demonstrator's noise"
    )
    l1_weight: float = opt(1.0, "lambda_1 (Eq. 11)")
    perceptual: Literal["lpips", "ssim", "none"] = opt("lpips", "perceptual term (Eq. 11)")
    perceptual_weight: float = opt(1.0, "lambda_lp (Eq. 11)")
    perceptual_weights: str | None = opt(None, "VGG-16 weights for lpips; none looks in torchvision's cache")
    over_frames: OverFrames = opt("sum", "reduction of the reward over frames (Eq. 11); mean is the release's")
    gamma: float = opt(1.0, "discount per frame of over_frames=discounted")
    history: History = opt("frames", "what reward divergence sees before a frame: the demonstration or its start")
    symmetric: bool = opt(
        False, "score a chunk together with its mirror image about the dataset's actions: no side is favoured"
    )
    imagination: Imagination = opt("sample", "sampling inside the world model: sample, common random numbers, greedy")
    temperature: float = opt(1.0, "of the imagination (release)")
    top_p: float = opt(0.8, "of the imagination (release)")
    credit: Credit = opt(
        "chunk", "frames that an action step answers for: all (Eq. 12); to_go: from its own on; frame: its own"
    )
    divide_by_std: bool = opt(False, "divide the advantage by the group's std (release); Eq. 12 does not")
    bf16: bool = opt(False, "the frozen networks in bf16: vision-language model (autocast), transformer, pixel decoder")
    compile: bool = opt(False, "torch.compile the pixel decoder and the perceptual network")

    def __post_init__(self) -> None:
        if self.mirrored and self.group % 2:
            raise ValueError(f"mirrored rollouts come in pairs, which group {self.group} does not divide into")
        if self.symmetric and self.reward in ("r1", "simulator"):
            raise ValueError(f"symmetric is of rewards in a world model, which {self.reward} is not: leave it out")

    @property
    def rollouts_per_x0(self) -> int:
        """Successive rollouts of a start that begin at the same x_0."""
        return self.group if self.group_x0 == "shared" else 1 + self.mirrored


def dataset_actions(cfg: RolloutConfig, batch: Batch) -> Tensor:
    """The dataset's raw actions (S, chunks * T, A) that R1 and R3 compare with."""
    return batch.actions if cfg.reference == "executed" else batch.intended


def reward_options(cfg: RolloutConfig) -> dict:
    """Weights and imagination, as keyword arguments of `verified_reward`."""
    names = (
        "l1_weight", "perceptual_weight", "over_frames", "gamma", "history", "symmetric", "imagination", "temperature",
        "top_p",
    )  # fmt: skip
    return {name: getattr(cfg, name) for name in names}


class PlayedChunk(NamedTuple):
    """One action chunk of every rollout, and what the policy saw before it.

    context: (S * R, N, D), R = 1 for the first chunk, which all rollouts of a start share, and G for the others.
    proprio: (S * R, P) raw.
    chain: of S * G rows.
    frames: (S * R, C, H, W), and S * R instructions: what the context was made of.
    """

    context: Tensor
    proprio: Tensor
    chain: Chain
    frames: Tensor
    instructions: list[str]


class Rollouts(NamedTuple):
    """What one batch of starts gave; all that the update needs. advantage: (S, G), or per step (S, G, chunks * T)."""

    batch: Batch
    chunks: tuple[PlayedChunk, ...]
    reward: Reward
    advantage: Tensor
    seconds: dict[str, float]


def share(draws: Tensor, part: tuple[int, int]) -> Tensor:
    """This process's rows of draws that were made for the whole batch."""
    rows = len(draws) // part[1]
    return draws[part[0] * rows : (part[0] + 1) * rows]


def encode(cfg: RolloutConfig, policy: VLAPolicy, frames: Tensor, instructions: list[str], at_once: int) -> Tensor:
    """Context (B, N, D) float32 of frames (B, C, H, W), `at_once` images a forward, without gradient; in bfloat16 where
    that is asked for and the vision-language model is frozen: what is trained is scored as it is sampled, in float32.
    """
    half = cfg.bf16 and not policy.vlm_trains
    autocast = torch.autocast(frames.device.type, torch.bfloat16) if half else nullcontext()
    with torch.no_grad(), autocast:
        parts = [
            policy.encode(policy.preprocess(frames[i : i + at_once]), instructions[i : i + at_once])
            for i in range(0, len(frames), at_once)
        ]
    return torch.cat(parts).float()


@torch.no_grad()
def sample_group(
    policy: VLAPolicy,
    context: Tensor,
    proprio: Tensor,
    repeats: int,
    part: tuple[int, int],
    *seed: int,
    per_x0: int = 1,
    gripper_x0: bool = False,
    mirrored: bool = False,
) -> Chain:
    """Chains of `repeats` rollouts for each of the rows of context and proprio, drawn for all processes.

    Args:
        policy, context, proprio, repeats: what is sampled, and how often.
        part: (rank, processes).
        seed: of the draws.
        per_x0: successive rollouts that share the x_0 of their first.
        gripper_x0: x_0 is 0 in all dimensions but the last.
        mirrored: every other rollout has the noise of the one before it, with the opposite sign. Each alone is a sample
            of the policy and scored as such; the two are not independent.
    """
    flow = policy.cfg.flow
    cond = policy.condition(context, proprio).repeat(repeats)
    shape = (cond.num_rows * part[1], 1 + len(flow.scored_steps), flow.chunk, flow.action_dim)
    draws = share(torch.randn(shape, generator=generator(context.device, "chains", *seed), device=context.device), part)
    noise = draws[::per_x0, 0].repeat_interleave(per_x0, 0)
    if gripper_x0:
        noise[..., :-1] = 0
    if mirrored:
        draws[1::2, 1:] = -draws[::2, 1:]
    return sample_chain(policy.head, policy.sigma_net, cond, noise=noise, step_noise=draws[:, 1:])


def collect(
    cfg: RolloutConfig,
    policy: VLAPolicy,
    world_model: WorldModel | None,
    batch: Batch,
    distance: PerceptualDistance | None,
    seed: tuple[int, ...],
    drift: Tensor | None = None,
    simulator: SimulatorReward | None = None,
) -> Rollouts:
    """Algorithm 1, lines 6-14: sample chunks, play them in the world model, score them.

    With `chunks` > 1 (Sec. 3: "rolls out n action chunks") every rollout goes on from its own last imagined frame: the
    policy sees it, with the proprio of `propagate`. The reference of R3 goes on from its own, too.

    Args:
        cfg: sizes and reward.
        policy: in eval mode.
        world_model: frozen; None where nothing is imagined.
        batch: windows of chunks * T + 1 frames and chunks * T actions, this process's share.
        distance: perceptual term.
        seed: (seed, step), the same on all processes.
        drift: of `fit_drift`; needed for chunks > 1.
        simulator: of the batch's episodes; needed for reward simulator.

    Raises:
        ValueError: several chunks without a world model, which would have nothing to show the policy.
    """
    if cfg.chunks > 1 and (world_model is None or drift is None or cfg.reward == "divergence"):
        raise ValueError(
            f"chunks {cfg.chunks} needs imagined frames, which the policy then sees; reward {cfg.reward} makes none"
        )
    device, part = batch.frames.device, (distributed.rank(), distributed.world_size())
    starts, steps = len(batch.frames), policy.cfg.flow.chunk
    dataset = dataset_actions(cfg, batch)
    frames, proprio, instructions = batch.frames[:, 0], batch.proprio, batch.instructions
    start_frames, repeats = None, cfg.group
    chunks, rewards, seconds = [], [], {"policy_s": 0.0, "world_model_s": 0.0}
    for c in range(cfg.chunks):
        clock = time.monotonic()
        context = encode(cfg, policy, frames, instructions, starts)
        pairing = {"per_x0": cfg.rollouts_per_x0, "mirrored": cfg.mirrored, "gripper_x0": cfg.group_x0 == "gripper"}
        chain = sample_group(policy, context, proprio, repeats, part, *seed, c, **pairing)
        chunks.append(PlayedChunk(context, proprio, chain, frames, instructions))
        actions = policy.normalizer.decode_actions(chain.x[:, -1])  # (S * G, T, A)
        seconds["policy_s"] += time.monotonic() - clock
        clock = time.monotonic()
        of_chunk = slice(c * steps, (c + 1) * steps)
        played = rearrange(actions, "(s g) t a -> s g t a", g=cfg.group)
        if cfg.reward == "simulator":
            per_frame = simulator(batch.index, played, dataset[:, of_chunk])
            reward = Reward(reduce_frames(per_frame, cfg.over_frames, cfg.gamma), per_frame, None, None)
        else:
            reward = verified_reward(
                cfg.reward,
                world_model,
                played,
                dataset[:, of_chunk],
                batch.frames[:, c * steps : (c + 1) * steps + 1],
                perceptual=distance,
                **reward_options(cfg),
                generator=generator(device, "imagination", *seed, c),
                part=part,
                start_frames=start_frames,
            )
        rewards.append(reward)
        seconds["world_model_s"] += time.monotonic() - clock
        if c + 1 < cfg.chunks:
            last = reward.frames[:, :, -1]  # (S, G, C, H, W)
            start_frames = torch.cat([last, reward.reference[:, None, -1]], 1) if cfg.reward == "r3" else last
            proprio = propagate(drift, proprio.repeat_interleave(cfg.group // (len(proprio) // starts), 0), actions)
            frames, repeats = last.flatten(0, 1), 1
            instructions = [text for text in batch.instructions for _ in range(cfg.group)]
    per_frame = torch.cat([r.per_frame for r in rewards], -1)  # (S, G, chunks * T)
    total = reduce_frames(per_frame, cfg.over_frames, cfg.gamma)
    shown = (None, None)
    if rewards[0].frames is not None:
        shown = torch.cat([r.frames for r in rewards], 2), torch.cat([r.reference for r in rewards], 1)
    answered = credited(weigh_frames(per_frame, cfg.over_frames, cfg.gamma), cfg.credit)  # (S, G) or with chunks * T
    advantage = advantages(answered, divide_by_std=cfg.divide_by_std)
    return Rollouts(batch, tuple(chunks), Reward(total, per_frame, *shown), advantage, seconds)


def _drift_inputs(proprio: Tensor, actions: Tensor) -> Tensor:
    """(B, P) and (B, T, A) -> (B, P + 2 A + 1): the proprio, the sum of the actions, the last one, and 1."""
    return torch.cat([proprio, actions.sum(1), actions[:, -1], torch.ones_like(proprio[:, :1])], 1)


def fit_drift(episodes: list[Episode], steps: int) -> Tensor:
    """How proprio moves over a chunk of raw actions, by least squares over the demonstrations.

    No controller is assumed: the proprio after T steps is linear in the proprio before, the sum of the actions and the
    last one, which gives a hand's travel from the sum and the fingers' opening from the last command. Ridge 1e-4.

    Args:
        episodes: demonstrations.
        steps: T.

    Returns:
        (P + 2 A + 1, P) float32.

    Raises:
        ValueError: no episode is longer than a chunk.
    """
    rows = [(e, t) for e in episodes for t in range(len(e) - steps)]
    if not rows:
        raise ValueError(f"no episode has more than the {steps} steps of a chunk: proprio cannot be propagated")
    before, after = (torch.stack([torch.from_numpy(e.proprio[t + d]) for e, t in rows]) for d in (0, steps))
    actions = torch.stack([torch.from_numpy(e.actions[t : t + steps]) for e, t in rows])  # (N, T, A)
    x = _drift_inputs(before.double(), actions.double())
    gram = x.T @ x + 1e-4 * torch.eye(x.shape[1], dtype=x.dtype)
    return torch.linalg.solve(gram, x.T @ after.double()).float()


def propagate(drift: Tensor, proprio: Tensor, actions: Tensor) -> Tensor:
    """Proprio (B, P) raw after playing raw actions (B, T, A), by `fit_drift`; (B, P)."""
    return _drift_inputs(proprio, actions) @ drift
