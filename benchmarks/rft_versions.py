"""The versions of one GRPO step that `rft_step.py` compares: ours, straightforward, and the public code's."""

import sys
import tempfile
from copy import copy, deepcopy
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import rollout as rollout_benchmark
import torch
from torch import Tensor

from vlarft.data.windows import Batch
from vlarft.flow import Chain, chain_log_prob, matching_pairs
from vlarft.grpo import advantages
from vlarft.metrics import PerceptualDistance, perceptual
from vlarft.policy import PRESETS as POLICIES
from vlarft.policy import VLAPolicy
from vlarft.reward import ImageScorer, image_reward
from vlarft.run import distributed
from vlarft.run.config import opt
from vlarft.run.random import generator
from vlarft.world_model import WorldModel

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # where the stage scripts are, which are no package
import train_rft
from train_rft import Rollouts


@dataclass(frozen=True)
class Config:
    sizes: Literal["paper", "reduced", "pixels", "smoke"] = opt("reduced", "sizes of the world model, see rollout.py")
    policy: Literal["paper", "small", "tiny", "smoke"] = opt("tiny", "sizes of the policy")
    out: str = opt("runs/benchmarks/rft_step.json", "JSON file to write")
    device: Literal["cpu", "cuda"] = opt("cpu", "where to run; cuda computes the frozen networks in bfloat16")
    perceptual: Literal["lpips", "ssim", "none"] = opt("ssim", "perceptual term; lpips has a random VGG-16")
    starts: int = opt(16, "starts S")
    group: int = opt(16, "rollouts G per start")
    compile: bool = opt(False, "compile pixel decoder and perceptual network in all versions")
    micro_starts: int | None = opt(None, "starts per backward pass; none: all")
    repeats: int = opt(3, "timed steps of each version")
    versions: tuple[Literal["straightforward", "as released"], ...] | None = opt(
        ("straightforward", "as released"), "what ours is compared with; none: ours alone"
    )


PRESETS = {"paper": Config(), "smoke": Config(sizes="smoke", policy="smoke", starts=2, group=3, repeats=1)}

WINDOWS_AT_ONCE = 16  # tokenised together: all 256 of a step of the paper would take 365 GiB


def update(cfg: train_rft.Config, policy: VLAPolicy, optimizer: torch.optim.Optimizer, rollouts: Rollouts) -> None:
    """Run line 15 of Algorithm 1, as in `train_rft.main`."""
    optimizer.zero_grad(set_to_none=True)
    train_rft.backward(train_rft.grpo_loss, cfg, policy, rollouts)
    distributed.clip_grad_norm([p for group in optimizer.param_groups for p in group["params"]], cfg.clip_norm)
    optimizer.step()


class Workload:
    """Policy, world model, a batch of made-up starts, and the versions of the step."""

    def __init__(self, cfg: Config) -> None:
        torch.manual_seed(0)
        device, sizes = cfg.device, rollout_benchmark.SIZES[cfg.sizes]
        self.policy = VLAPolicy(POLICIES[cfg.policy]).to(device)
        flow = self.policy.cfg.flow
        torch.nn.init.normal_(self.policy.head.output.weight, std=0.02)  # initially zero: no gradient below it
        samples = torch.rand(256, flow.action_dim) * 2 - 1, torch.randn(256, flow.proprio_dim)
        self.policy.normalizer.fit(*samples)
        self.policy.add_sigma_net()
        self.policy.requires_grad_(False).eval()
        trained = [*self.policy.head.parameters(), *self.policy.sigma_net.parameters()]
        for parameter in trained:
            parameter.requires_grad_(True)
        self.policy.to(device)
        self.world_model = WorldModel(sizes).to(device).eval().requires_grad_(False)
        self.distance = random_perceptual(cfg.perceptual).to(device)
        if device == "cuda":
            self.world_model.to_bfloat16()
            self.distance.to_bfloat16()
        released = "as released" in (cfg.versions or ())
        self.llama = rollout_benchmark.llama_of(self.world_model).eval() if released else None
        if cfg.compile:
            self.world_model.tokenizer.cond_decoder.compile()
            self.distance.compile_network()
        self.optimizer = torch.optim.AdamW(trained, lr=0.0)  # the same weights for every timed step
        self.cfg = train_rft.Config(
            starts=cfg.starts,
            group=cfg.group,
            divide_by_std=True,
            micro_starts=cfg.micro_starts,
            precision="bf16" if device == "cuda" else "fp32",
        )
        rows, steps, size = cfg.starts, flow.chunk, sizes.tokenizer.image_size
        with torch.device(device):
            frames = torch.rand(rows, steps + 1, 3, *size)
            actions = torch.rand(rows, steps, flow.action_dim) * 2 - 1
            proprio = torch.randn(rows, flow.proprio_dim)
            index, key = torch.zeros(rows, 2, dtype=torch.long), torch.zeros(rows, 3)
        instructions = [f"pick up block {i}" for i in range(rows)]
        motion, after = torch.zeros_like(proprio), proprio[:, None].expand(-1, actions.shape[1], -1)
        self.batch = Batch(frames, actions, actions, proprio, instructions, frames[:, 0], key, index, motion, after)

    def in_bfloat16(self) -> "Workload":
        """Return the same step with its frozen networks in bfloat16."""
        low = copy(self)
        low.world_model, low.distance = deepcopy(self.world_model).to_bfloat16(), deepcopy(self.distance)
        low.llama = self.llama and deepcopy(self.llama).bfloat16()
        low.distance.to_bfloat16()
        low.cfg = replace(self.cfg, precision="bf16")
        return low

    def ours(self) -> Rollouts:
        """Run the step as `train_rft.py` does it."""
        context, chain, actions = self._sampled(self.batch, self.cfg.group)
        pairs = train_rft.shared_pairs(self.cfg, self.batch, self._source("flow matching"))
        return self._updated(self.cfg, self.batch, context, chain, self._score(self.batch, actions), pairs)

    def straightforward(self) -> Rollouts:
        """Run the step with every rollout computed separately."""
        rows = self._alone()
        context, chain, actions = self._sampled(rows, 1)
        return self._updated_alone(rows, context, chain, self._score(rows, actions))

    @torch.no_grad()
    def as_released(self) -> Rollouts:
        """Run the step with the operations of the public code."""
        rows = self._alone()
        _, chain, actions = self._sampled(rows, 1)
        frames, reference = (self._imagined(rows, played) for played in (actions, rows.intended[:, None]))
        reward = image_reward(frames, reference[:, 0], self.distance)
        cond = self.policy.condition(self._encoded(rows), rows.proprio)
        chain_log_prob(self.policy.head, self.policy.sigma_net, chain.x, cond)
        context = self._encoded(rows)
        with torch.enable_grad():
            return self._updated_alone(rows, context, chain, reward)

    def _source(self, name: str) -> torch.Generator:
        return generator(self.batch.frames.device, name, 0, 0)

    def _alone(self) -> Batch:
        return Batch(*(_repeated(value, self.cfg.group) for value in self.batch))

    def _encoded(self, rows: Batch) -> Tensor:
        """Encode the context (S, N, D), as many images a forward in all versions."""
        bf16, at_once = self.cfg.precision == "bf16", len(self.batch.frames)
        return self.policy.encode_frames(rows.frames[:, 0], rows.instructions, bf16=bf16, at_once=at_once)

    def _sampled(self, rows: Batch, group: int) -> tuple[Tensor, Chain, Tensor]:
        """Encode the context, sample a chain and its raw actions (S, G, T, A), with the same random numbers however
        rows are grouped.
        """
        context = self._encoded(rows)
        chain = train_rft.sample_chains(self.policy, rows, context, group, self._source("chains"))
        return context, chain, self.policy.normalizer.decode_actions(chain.x[:, -1]).unflatten(0, (-1, group))

    @torch.no_grad()
    def _score(self, rows: Batch, actions: Tensor) -> Tensor:
        """Compute reward R3 (S, G, T)."""
        return ImageScorer(self.world_model, self.distance, "greedy")(rows, actions)

    def _imagined(self, rows: Batch, actions: Tensor) -> Tensor:
        """Imagine frames (S * G, 1, T, C, H, W) of actions (S * G, 1, T, A); all frames of a window are tokenised."""
        transformers = rollout_benchmark.import_transformers()

        tokenizer, layout = self.world_model.tokenizer, self.world_model.layout
        windows = rows.frames.split(WINDOWS_AT_ONCE)
        contexts = [tokenizer.encode_context(part[:, 0]) for part in windows]
        first = [tokenizer.encode_future(part, own)[:, 0] for part, own in zip(windows, contexts, strict=True)]
        ids = layout.action_ids(self.world_model.action_bins.encode(actions[:, 0]))
        tokens = rollout_benchmark.generate_frames(
            self.llama,
            layout,
            layout.prefix(torch.cat([own.tokens for own in contexts]), torch.cat(first)),
            ids,
            lambda: transformers.StaticCache(config=self.llama.config, max_cache_len=layout.length(ids.shape[1])),
        )
        parts = zip(tokens.split(WINDOWS_AT_ONCE), contexts, strict=True)
        return torch.cat([tokenizer.decode(part, own) for part, own in parts])[:, None]

    def _updated(
        self,
        cfg: train_rft.Config,
        rows: Batch,
        context: Tensor,
        chain: Chain,
        reward: Tensor,
        pairs: tuple[Tensor, Tensor],
    ) -> Rollouts:
        """Run the update on rollouts of `rows`, whose rewards are (rows, rollouts of each, T)."""
        of_group = reward.sum(-1).view(len(self.batch.frames), self.cfg.group)
        advantage = advantages(of_group, divide_by_std=cfg.divide_by_std).view(reward.shape[:2])
        chains = (value.unflatten(0, reward.shape[:2]) for value in chain)
        rollouts = Rollouts(rows, context, *chains, reward, advantage, *pairs)
        update(cfg, self.policy, self.optimizer, rollouts)
        return rollouts

    def _updated_alone(self, rows: Batch, context: Tensor, chain: Chain, reward: Tensor) -> Rollouts:
        """Run the update from rollouts that are starts of their own and share out the pairs (tau, eps) of a start."""
        micro = None if self.cfg.micro_starts is None else self.cfg.micro_starts * self.cfg.group
        draws = max(1, train_rft.MSE_DRAWS // self.cfg.group)
        source = self._source("flow matching")
        pairs = matching_pairs(tuple(rows.intended.shape), draws, generator=source, device=context.device)
        return self._updated(replace(self.cfg, micro_starts=micro), rows, context, chain, reward, pairs)


def _repeated(value: Tensor | list[str], group: int) -> Tensor | list[str]:
    if isinstance(value, list):
        return [text for text in value for _ in range(group)]
    return value.repeat_interleave(group, 0)


def random_perceptual(name: str) -> PerceptualDistance:
    """Build the perceptual distance; lpips gets random VGG-16 weights, which take as long as trained ones."""
    if name != "lpips":
        return perceptual(name)
    import lpips

    backbone = lpips.LPIPS(net="vgg", pnet_rand=True, verbose=False).net.state_dict()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "random_vgg16.pth"
        torch.save({f"features.{key.split('.', 1)[1]}": value for key, value in backbone.items()}, path)
        return perceptual(name, path)
