"""What `rft_step.py` compares: one GRPO step as we do it, straightforward, and as the public release does it."""

import tempfile
from copy import copy, deepcopy
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import rollout as rollout_benchmark
import torch
from torch import Tensor

from vlarft.data.windows import Batch
from vlarft.flow import Chain, chain_log_prob
from vlarft.grpo import advantages
from vlarft.metrics import PerceptualDistance, perceptual
from vlarft.objective import ObjectiveConfig, update
from vlarft.policy import PRESETS as POLICIES
from vlarft.policy import VLAPolicy
from vlarft.reward import Reward, image_reward, reduce_frames, verified_reward
from vlarft.rollout import PlayedChunk, RolloutConfig, Rollouts, collect, encode, reward_options, sample_group
from vlarft.run.config import opt
from vlarft.world_model import WorldModel


@dataclass(frozen=True)
class Config:
    sizes: Literal["paper", "reduced", "pixels", "smoke"] = opt("reduced", "sizes of the world model, see rollout.py")
    policy: Literal["paper", "small", "tiny", "smoke"] = opt("tiny", "sizes of the policy")
    out: str = opt("runs/benchmarks/rft_step.json", "JSON file to write")
    device: Literal["cpu", "cuda"] = opt("cpu", "where to run; cuda computes the frozen networks in bfloat16")
    perceptual: Literal["lpips", "ssim", "none"] = opt("ssim", "perceptual term; lpips with a random VGG-16")
    starts: int = opt(16, "starts S")
    group: int = opt(16, "rollouts G per start")
    compile: bool = opt(False, "compile the pixel decoder and the perceptual network, of both versions")
    micro_starts: int | None = opt(None, "starts per backward pass; none takes all")
    repeats: int = opt(3, "timed steps of each version")


PRESETS = {"paper": Config(), "smoke": Config(sizes="smoke", policy="smoke", starts=2, group=3, repeats=1)}


@dataclass(frozen=True)
class Step(RolloutConfig, ObjectiveConfig):
    """What a step is made of."""


class Workload:
    """Policy, world model, a batch of made-up starts, and both versions of the step."""

    def __init__(self, cfg: Config) -> None:
        torch.manual_seed(0)
        device, sizes = cfg.device, rollout_benchmark.SIZES[cfg.sizes]
        self.policy = VLAPolicy(POLICIES[cfg.policy]).to(device)
        flow = self.policy.cfg.flow
        torch.nn.init.normal_(self.policy.head.net.dit.out.weight, std=0.02)  # its initial zero has no gradient behind
        samples = torch.rand(256, flow.action_dim) * 2 - 1, torch.randn(256, flow.proprio_dim)
        self.policy.normalizer.fit(*samples)
        self.policy.make_stochastic("sigma_net")
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
        self.llama = rollout_benchmark.llama_of(self.world_model).eval()
        if cfg.compile:
            self.world_model.tokenizer.cond_decoder.compile()
            self.distance.compile_network()
        self.optimizer = torch.optim.AdamW(trained, lr=0.0)  # the same weights for every timed step
        names = {"perceptual": cfg.perceptual, "imagination": "greedy", "divide_by_std": True}
        self.step = Step(group=cfg.group, bf16=device == "cuda", micro_starts=cfg.micro_starts, mse_draws=16, **names)
        rows, steps, size = cfg.starts, flow.chunk, sizes.tokenizer.image_size
        with torch.device(device):
            frames = torch.rand(rows, steps + 1, 3, *size)
            actions = torch.rand(rows, steps, flow.action_dim) * 2 - 1
            proprio = torch.randn(rows, flow.proprio_dim)
            index, key = torch.zeros(rows, 2, dtype=torch.long), torch.zeros(rows, 3)
        instructions = [f"pick up block {i}" for i in range(rows)]
        self.batch = Batch(frames, actions, actions, proprio, instructions, frames[:, 0], key, index)

    def in_bfloat16(self) -> "Workload":
        """The same step with its frozen networks in bfloat16."""
        low = copy(self)
        low.world_model, low.distance = deepcopy(self.world_model).to_bfloat16(), deepcopy(self.distance)
        low.llama = deepcopy(self.llama).bfloat16()
        low.distance.to_bfloat16()
        low.step = replace(self.step, bf16=True)
        return low

    def ours(self) -> Rollouts:
        """The step as `train_rft.py` does it."""
        rollouts = collect(self.step, self.policy, self.world_model, self.batch, self.distance, (0, 0))
        update(self.step, self.policy, self.optimizer, rollouts, (0, 0))
        return rollouts

    def straightforward(self) -> Rollouts:
        """The same step, every rollout on its own."""
        rows = self._alone()
        context, chain, actions = self._sampled(rows)
        reward = verified_reward(
            "r3",
            self.world_model,
            actions,
            rows.actions,
            rows.frames,
            perceptual=self.distance,
            **reward_options(self.step),
        )
        return self._updated(rows, context, chain, reward)

    @torch.no_grad()
    def as_released(self) -> Rollouts:
        """The same step with the work of the public release."""
        rows = self._alone()
        _, chain, actions = self._sampled(rows)
        frames, reference = (self._imagined(rows, played) for played in (actions, rows.actions[:, None]))
        per_frame = image_reward(frames, reference[:, 0], perceptual=self.distance)
        reward = Reward(reduce_frames(per_frame, self.step.over_frames), per_frame, None, None)
        cond = self.policy.condition(self._encoded(rows), rows.proprio)
        chain_log_prob(self.policy.head, self.policy.sigma_net, chain.x, cond)
        context = self._encoded(rows)
        with torch.enable_grad():
            return self._updated(rows, context, chain, reward)

    def _alone(self) -> Batch:
        return Batch(*(_repeated(value, self.step.group) for value in self.batch))

    def _encoded(self, rows: Batch) -> Tensor:
        return encode(self.step, self.policy, rows.frames[:, 0], rows.instructions, len(self.batch.frames))

    def _sampled(self, rows: Batch) -> tuple[Tensor, Chain, Tensor]:
        """Context, chain and actions (S * G, 1, T, A) of rollouts that are starts of their own."""
        context = self._encoded(rows)
        chain = sample_group(self.policy, context, rows.proprio, 1, (0, 1), 0, 0, 0, 0)
        return context, chain, self.policy.normalizer.decode_actions(chain.x[:, -1])[:, None]

    def _imagined(self, rows: Batch, actions: Tensor) -> Tensor:
        """Frames (S * G, 1, T, C, H, W) of actions (S * G, 1, T, A), each from a window tokenised whole."""
        import transformers

        tokenizer, layout = self.world_model.tokenizer, self.world_model.layout
        context = tokenizer.encode_context(rows.frames[:, 0])
        first = tokenizer.encode_future(rows.frames, context)[:, 0]
        ids = layout.action_ids(self.world_model.action_bins.encode(actions[:, 0]))
        tokens = rollout_benchmark.generate_frames(
            self.llama,
            layout,
            layout.prefix(context.tokens, first),
            ids,
            lambda: transformers.StaticCache(config=self.llama.config, max_cache_len=layout.length(ids.shape[1])),
        )
        return tokenizer.decode(tokens, context)[:, None]

    def _updated(self, rows: Batch, context: Tensor, chain: Chain, reward: Reward) -> Rollouts:
        """The update from rollouts that are starts of their own."""
        step, starts = self.step, len(self.batch.frames)
        advantage = advantages(reward.reward.view(starts, step.group), divide_by_std=step.divide_by_std).view(-1, 1)
        rollouts = Rollouts(
            rows,
            (PlayedChunk(context, rows.proprio, chain, rows.frames[:, 0], rows.instructions),),
            reward,
            advantage,
            {},
        )
        micro = None if step.micro_starts is None else step.micro_starts * step.group
        alone = Step(group=1, micro_starts=micro, mse_draws=max(1, step.mse_draws // step.group))
        update(alone, self.policy, self.optimizer, rollouts, (0, 0))
        return rollouts


def _repeated(value: Tensor | list[str], group: int) -> Tensor | list[str]:
    if isinstance(value, list):
        return [text for text in value for _ in range(group)]
    return value.repeat_interleave(group, 0)


def random_perceptual(name: str) -> PerceptualDistance:
    """The perceptual distance; lpips with random VGG-16 weights, which cost what trained ones cost."""
    if name != "lpips":
        return perceptual(name)
    import lpips

    backbone = lpips.LPIPS(net="vgg", pnet_rand=True, verbose=False).net.state_dict()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "random_vgg16.pth"
        torch.save({f"features.{key.split('.', 1)[1]}": value for key, value in backbone.items()}, path)
        return perceptual(name, path)
