"""The policy: camera images, instruction and proprio -> an action chunk. Actions are normalised inside, raw outside.

    context z = vlm(images, instruction)             Eq. (1)
    actions   = flow head from noise, given z and s  Sec. 3.3; deterministic (`act`) or as a chain (`flow.sample_chain`)

The normaliser is part of the model and of its checkpoint. The sigma net exists once reinforcement fine-tuning has added
it; evaluation does not use it.

Shapes: B batch, V cameras, (S, S) image size, T chunk steps, A action dim, P proprio dim, N context tokens, D context
width; S starts where a group of G chains belongs to each.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from einops import rearrange

from vlarft.flow import (
    X0,
    Chain,
    Transition,
    initial_noise,
    matching_loss,
    regression_loss,
    sample_chain,
    sample_ode,
    transition,
)
from vlarft.nets.action_head import Condition, FlowConfig, FlowHead, SigmaNet, column_major
from vlarft.nets.dit import DiTConfig
from vlarft.nets.transformer import TransformerConfig
from vlarft.nets.vit import ConvEncoderConfig
from vlarft.nets.vlm import VLM, VLMConfig
from vlarft.normalizer import GripperEncoding, Normalizer
from vlarft.run.checkpoint import load_model, save_model
from vlarft.run.hub_model import HubModel
from vlarft.run.pixels import to_floats

SupervisedObjective = Literal["matching", "regression"]


@dataclass(frozen=True)
class PolicyConfig:
    """The whole policy; the defaults are the paper's."""

    vlm: VLMConfig = field(default_factory=VLMConfig)
    flow: FlowConfig = field(default_factory=FlowConfig)
    cameras: tuple[str, ...] = ("agentview",)  # names of an observation's images, in the order of their tokens
    gripper: GripperEncoding = "zero_one_open"  # how the normaliser encodes gripper commands
    gripper_dims: tuple[int, ...] | None = None  # action dims that are binary gripper commands; None: the last
    crop_area: float = 1.0  # share of the image area that the central crop keeps; 0.9 if trained with random crops
    # hidden width of the auxiliary head that predicts the hand position at the next gripper event; None: no such head
    key_head_dim: int | None = None
    key_token: bool = False  # append that position to the context; needs the head
    has_sigma_net: bool = False  # True in checkpoints of reinforcement fine-tuning


SMOKE = PolicyConfig(
    vlm=VLMConfig(
        vision=ConvEncoderConfig(channels=(8, 8), strides=(4, 2), num_keypoints=4, width=16, film_dim=8),
        fused_vision=None,
        projector_dim=16,
        language=TransformerConfig(depth=1, width=32, num_heads=2, num_kv_heads=1, ffn_dim=32, qkv_bias=True),
        vocabulary=259,
        num_queries=2,
        query_init_std=0.02,
    ),
    flow=FlowConfig(
        context_dim=32,
        embed_dim=8,
        dit=DiTConfig(width=32, depth=2, num_heads=2, mlp_dim=32, cross_attention_blocks=(0, 1), gamma_init=1.0),
    ),
    key_head_dim=16,
    key_token=True,
)

TINY = PolicyConfig(
    vlm=VLMConfig(
        vision=ConvEncoderConfig(film_dim=64),
        fused_vision=None,
        projector_dim=256,
        language=TransformerConfig(depth=2, width=128, num_heads=4, num_kv_heads=2, ffn_dim=256, qkv_bias=True),
        vocabulary=259,
        bytes_per_token=4,
        num_queries=8,
        query_init_std=0.02,
    ),
    flow=FlowConfig(
        context_dim=128,
        embed_dim=64,
        dit=DiTConfig(width=128, depth=3, num_heads=4, mlp_dim=384, cross_attention_blocks=(0, 1, 2), gamma_init=1.0),
    ),
    gripper="identity",
    key_head_dim=128,
    key_token=True,
)

SMALL = PolicyConfig(
    vlm=VLMConfig(
        vision=ConvEncoderConfig(
            image_size=128,
            channels=(96, 128, 128, 192),
            kernels=(7, 3, 3, 3),
            strides=(4, 1, 2, 1),
            num_keypoints=64,
            width=256,
            film_dim=128,
        ),
        fused_vision=None,
        projector_dim=512,
        language=TransformerConfig(depth=6, width=384, num_heads=6, num_kv_heads=2, ffn_dim=1024, qkv_bias=True),
        vocabulary=259,
        num_queries=16,
        query_init_std=0.02,
    ),
    flow=FlowConfig(
        context_dim=384,
        embed_dim=64,
        dit=DiTConfig(
            width=384, depth=6, num_heads=6, mlp_dim=1536, cross_attention_blocks=(0, 2, 4, 5), gamma_init=1.0
        ),
    ),
    gripper="identity",
    key_head_dim=256,
    key_token=True,
)

# Tabletop's sizes behind an encoder of LIBERO's frames, 128 px, whose objects are small: its maps are of 32 x 32
LIBERO = replace(
    TINY,
    vlm=replace(
        TINY.vlm,
        vision=ConvEncoderConfig(
            image_size=128, channels=(64, 64, 64), kernels=(7, 3, 3), strides=(4, 1, 1), num_keypoints=32, film_dim=64,
        ),
    ),
)  # fmt: skip

PRESETS = {"paper": PolicyConfig(crop_area=0.9), "small": SMALL, "libero": LIBERO, "tiny": TINY, "smoke": SMOKE}


class Inputs(NamedTuple):
    """A batch of observations: images (B, V, 3, S, S) from `preprocess`, B instructions, raw proprio (B, P)."""

    images: torch.Tensor
    instructions: list[str]
    proprio: torch.Tensor


class VLAPolicy(HubModel, nn.Module):
    """Vision-language model, flow head, normaliser and, after reinforcement fine-tuning, the sigma net.

    Args:
        cfg: sizes.

    Raises:
        ValueError: `flow.context_dim` is not the language model's width, `cameras` does not name `vlm.num_cameras`
            cameras, or a key token without its head.
    """

    def __init__(self, cfg: PolicyConfig) -> None:
        super().__init__()
        if cfg.flow.context_dim != cfg.vlm.language.width:
            raise ValueError(
                f"PolicyConfig: flow.context_dim {cfg.flow.context_dim} must equal vlm.language.width "
                f"{cfg.vlm.language.width}"
            )
        if len(cfg.cameras) != cfg.vlm.num_cameras:
            raise ValueError(
                f"PolicyConfig: cameras {cfg.cameras} must name as many as vlm.num_cameras, {cfg.vlm.num_cameras}"
            )
        self.cfg = cfg
        self.vlm = VLM(cfg.vlm)
        self.head = FlowHead(cfg.flow)
        self.sigma_net = SigmaNet(cfg.flow) if cfg.has_sigma_net else None
        self.normalizer = Normalizer(cfg.flow.action_dim, cfg.flow.proprio_dim, cfg.gripper, cfg.gripper_dims)
        self.key_head = self.key_embed = None
        if cfg.key_token and not cfg.key_head_dim:
            raise ValueError("PolicyConfig: key_token needs a key head; set key_head_dim")
        if cfg.key_head_dim:
            size = self.vlm.num_vision_tokens * self.vlm.vision_dim
            self.key_head = nn.Sequential(nn.Linear(size, cfg.key_head_dim), nn.GELU(), nn.Linear(cfg.key_head_dim, 3))
        if cfg.key_token:
            self.key_embed = nn.Linear(3, cfg.flow.context_dim)

    @classmethod
    def load(cls, path: str | Path, device: str | torch.device = "cpu") -> VLAPolicy:
        """Load a policy from its checkpoint, in eval mode; errors as in `checkpoint.load_model`."""
        return load_model(path, cls, PolicyConfig, device)[0]

    def save(self, path: str | Path, extra: dict | None = None, state_dict: dict | None = None) -> None:
        """Write the policy to a checkpoint; arguments as in `checkpoint.save_model`."""
        save_model(path, self, self.cfg, extra, state_dict)

    def for_playing(self, compile: bool = False) -> VLAPolicy:
        """Prepare the policy for `act`, not for training, in place: eval mode, no gradients, `column_major` weights.

        Args:
            compile: `torch.compile` the head's trunk; the first chunk of each batch size then takes a minute.

        Returns:
            The policy itself.
        """
        column_major(self.head)
        if compile:
            self.head.compile_network()
        return self.eval().requires_grad_(False)

    def add_sigma_net(self, sigma_min: float = 0.08, sigma_max: float = 0.2, uses_x: bool = False) -> SigmaNet:
        """Create the sigma net of reinforcement fine-tuning, or keep one that has the same settings; return it.

        Args:
            sigma_min, sigma_max: bounds of a flow step's standard deviation, normalised action units.
            uses_x: give the net x_k besides (z, s, k), as the public code does.

        Raises:
            ValueError: an earlier fine-tuning left a sigma net with other settings; the message has both.
        """
        flow, asked = self.cfg.flow, {"sigma_min": sigma_min, "sigma_max": sigma_max, "sigma_uses_x": uses_x}
        if self.sigma_net is not None:
            other = [f"{k} {getattr(flow, k)!r}, asked {v!r}" for k, v in asked.items() if getattr(flow, k) != v]
            if other:
                raise ValueError(
                    f"the policy was fine-tuned with other noise: it has {'; '.join(other)}. Give its values, or start "
                    "from the policy of train_sft.py"
                )
            return self.sigma_net
        flow = replace(flow, **asked)
        self.cfg = replace(self.cfg, flow=flow, has_sigma_net=True)
        self.head.configure(flow)
        self.sigma_net = SigmaNet(flow).to(self.device)
        return self.sigma_net

    @property
    def device(self) -> torch.device:
        """Where the policy's parameters are."""
        return next(self.head.parameters()).device

    def preprocess(self, images: np.ndarray | torch.Tensor, *, crop: bool = True) -> torch.Tensor:
        """Convert images of cameras or of a training batch to the vision encoder's input.

        Args:
            images: uint8 (B, H, W, 3) or (B, V, H, W, 3); or floats in [0, 1], (B, 3, H, W) or (B, V, 3, H, W).
            crop: False for images that training has cropped at random already.

        Returns:
            (B, V, 3, S, S) float32 in [0, 1], cropped to the central `crop_area`, then resized as in `resize`.

        Raises:
            ValueError: another dtype or layout, or floats outside [0, 1].
        """
        images = torch.as_tensor(images)
        shape, dtype = tuple(images.shape), images.dtype
        if dtype == torch.uint8 and images.ndim in (4, 5) and shape[-1] == 3:
            images = to_floats(images, self.device)
        elif dtype.is_floating_point and images.ndim in (4, 5) and shape[-3] == 3:
            images = images.to(self.device).float()
            if not (images.min() >= 0 and images.max() <= 1):  # nan too
                raise ValueError(
                    f"images: floats from {images.min():.3g} to {images.max():.3g}, expected [0, 1]; "
                    "divide by 255, or pass uint8"
                )
        else:
            raise ValueError(
                f"images: got {dtype} {shape}; expected uint8 (B, [V,] H, W, 3) or floats in [0, 1] (B, [V,] 3, H, W)"
            )
        if images.ndim == 4:
            images = images[:, None]
        size = self.vlm.image_size
        flat = center_crop(rearrange(images, "b v c h w -> (b v) c h w"), self.cfg.crop_area if crop else 1.0)
        if flat.shape[-2:] != (size, size):
            flat = resize(flat, size)
        return rearrange(flat, "(b v) c h w -> b v c h w", b=len(images))

    def encode(self, images: torch.Tensor, instructions: list[str]) -> torch.Tensor:
        """Compute the context of Eq. (1): images (B, V, 3, S, S) from `preprocess`, B instructions -> (B, N, D)."""
        out = self.vlm(images, instructions)
        return self.append_key(out.context, self.predict_key(out.vision))

    def predict_key(self, vision: torch.Tensor) -> torch.Tensor | None:
        """Predict the key position (B, 3), normalised, float32, from the vision tokens; None without a key head."""
        return None if self.key_head is None else self.key_head(vision.flatten(1)).float()

    def append_key(self, context: torch.Tensor, key: torch.Tensor | None) -> torch.Tensor:
        """Append the predicted key position (B, 3) to the context (B, N, D) as one more token, if so configured."""
        if self.key_embed is None:
            return context
        # the head also reads the mean over these N + 1 tokens: the factor keeps the key's part of it of order one
        token = self.key_embed(key)[:, None] * (context.shape[1] + 1)  # (B, 1, D)
        return torch.cat([context, token.to(context.dtype)], dim=1)

    def condition(self, context: torch.Tensor, proprio: torch.Tensor) -> Condition:
        """Compute what all flow steps of a chunk share, for sampling and for scoring.

        Args:
            context: (S, N, D) from `encode`; of a frozen encoder, it can be computed once per start.
            proprio: (S, P), raw.
        """
        proprio = self.normalizer.encode_proprio(proprio)
        return self.head.prepare(context, proprio, sigma_net=self.sigma_net)

    @torch.no_grad()
    def encode_frames(
        self, frames: torch.Tensor, instructions: list[str], *, bf16: bool = False, at_once: int | None = None
    ) -> torch.Tensor:
        """Compute the context of Eq. (1) from camera frames without gradient, for a frozen vision-language model.

        Args:
            frames: (B, C, H, W) in [0, 1].
            instructions: B strings.
            bf16: autocast to bfloat16.
            at_once: frames per forward pass, to bound memory; None = all.

        Returns:
            (B, N, D) float32.
        """
        step, parts = at_once or len(frames), []
        for i in range(0, len(frames), step):
            with torch.autocast(frames.device.type, torch.bfloat16, enabled=bf16):
                parts.append(self.encode(self.preprocess(frames[i : i + step]), instructions[i : i + step]))
        return torch.cat(parts).float()

    @torch.no_grad()
    def sample_group(
        self,
        context: torch.Tensor,
        proprio: torch.Tensor,
        group: int,
        generator: torch.Generator,
        *,
        part: tuple[int, int] = (0, 1),
        step: Transition = transition,
    ) -> Chain:
        """Sample `group` chains for each of S starts, Eqs. (5) to (8): lines 6 to 10 of Algorithm 1.

        Args:
            context: (S, N, D) from `encode`.
            proprio: (S, P), raw.
            group: G.
            generator: source of x_0 and of the steps' noise.
            part: (index, count): these starts are one of `count` equal shares of a larger batch. The noise of the whole
                batch is sampled and this share of it used, so that a run does not depend on the number of processes.
            step: see `flow.sample_chain`.

        Returns:
            The chain, S * G rows, start-major.
        """
        flow, cond = self.cfg.flow, self.condition(context, proprio).repeat(group)
        # 1 + K: x_0 and the noise of the K steps, row by row, so that a share is a slice of rows
        shape = (cond.num_rows * part[1], 1 + flow.num_steps, flow.chunk, flow.action_dim)
        noise = torch.randn(shape, generator=generator, device=context.device).chunk(part[1])[part[0]]
        return sample_chain(self.head, self.sigma_net, cond, noise=noise[:, 0], step_noise=noise[:, 1:], step=step)

    def forward(
        self,
        images: torch.Tensor,
        instructions: list[str],
        proprio: torch.Tensor,
        actions: torch.Tensor,
        key_position: torch.Tensor | None = None,
        *,
        generator: torch.Generator | None = None,
        draws: int = 1,
        objective: SupervisedObjective = "matching",
        key_weight: float = 0.0,
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """Compute the loss of supervised fine-tuning: Eq. (4) or a regression, plus key_weight * the auxiliary loss.

        The auxiliary loss regresses the hand position at the demonstration's next gripper event from the vision
        tokens (smooth L1 in normalised units, quadratic below 0.1, averaged over B and the axes).

        Args:
            images: (B, V, 3, S, S) from `preprocess`.
            instructions: B strings.
            proprio: (B, P), raw.
            actions: (F, T, A), raw, of the first F <= B rows. The other rows only enter the auxiliary loss, which does
                not run the language model.
            key_position: (B, min(3, P)) [m]; needed when key_weight > 0.
            generator, draws: see `flow.matching_loss`.
            objective: "matching" is `flow.matching_loss`, "regression" `flow.regression_loss`.
            key_weight: weight of the auxiliary loss.

        Returns:
            The scalar loss and metrics: flow_mse (chunk_l1 for a regression) and, with the auxiliary loss, key_loss.

        Raises:
            ValueError: key_weight without a key head.
        """
        rows = len(actions)  # F
        vision = self.vlm.encode_images(images, instructions)  # (B, V * tokens, Dv)
        key = self.predict_key(vision)  # (B, 3)
        context = self.vlm.contextualize(vision[:rows], instructions[:rows])  # (F, N, D)
        context = self.append_key(context, None if key is None else key[:rows])
        state = self.normalizer.encode_proprio(proprio)
        flow = self.head, self.normalizer.encode_actions(actions), self.head.prepare(context, state[:rows])
        if objective == "matching":
            loss, metrics = matching_loss(*flow, generator=generator, draws=draws)
        else:
            loss, metrics = regression_loss(*flow, generator=generator, draws=draws)
        if key_weight:
            if key is None:
                raise ValueError("key_weight is set but the policy has no key head; set PolicyConfig.key_head_dim")
            # a hand position is the first three numbers of the proprio: pad it to P to normalise it like them
            width = key_position.shape[-1]  # fewer than three of a robot whose proprio has fewer
            target = self.normalizer.encode_proprio(F.pad(key_position, (0, proprio.shape[-1] - width)))[:, :width]
            key_loss = F.smooth_l1_loss(key[:, :width], target, beta=0.1)
            loss = loss + key_weight * key_loss
            metrics["key_loss"] = key_loss.detach()
        return loss, metrics

    def observe(self, observations: Sequence[Mapping[str, Any]]) -> Inputs:
        """Batch the observations of a simulator or a robot.

        Args:
            observations: B mappings with an image per camera of the configuration, (H, W, 3) uint8, upright, of any
                resolution; "proprio" (P,), raw; "instruction". Other entries are ignored.

        Raises:
            ValueError: no observation; one that lacks an entry, or has one of another type or shape.
        """
        if not observations:
            raise ValueError("act: no observation")
        for obs in observations:
            if missing := [name for name in (*self.cfg.cameras, "proprio", "instruction") if name not in obs]:
                raise ValueError(
                    f"observation: no {', '.join(missing)} among {', '.join(map(str, obs))}; the policy takes an image "
                    f"of each of its cameras ({', '.join(self.cfg.cameras)}), proprio and instruction"
                )
            for camera in self.cfg.cameras:
                dtype, shape = getattr(obs[camera], "dtype", type(obs[camera])), np.shape(obs[camera])
                if dtype not in (np.uint8, torch.uint8) or len(shape) != 3 or shape[-1] != 3 or 0 in shape:
                    raise ValueError(
                        f"observation: {camera} is {dtype} {tuple(shape)}, expected uint8 (H, W, 3), RGB, an array or "
                        "a tensor"
                    )
            if not isinstance(obs["instruction"], str):
                raise ValueError(f"observation: instruction is {obs['instruction']!r}, expected a string")
            if np.shape(obs["proprio"]) != (self.cfg.flow.proprio_dim,):
                raise ValueError(
                    f"observation: proprio has shape {np.shape(obs['proprio'])}, expected "
                    f"({self.cfg.flow.proprio_dim},), raw: another robot's?"
                )
        columns = []
        for camera in self.cfg.cameras:
            images = [obs[camera] for obs in observations]
            # copy: a flipped image has negative strides, which torch refuses
            images = [torch.from_numpy(x.copy()) if isinstance(x, np.ndarray) else x for x in images]
            alike = len({image.shape for image in images}) == 1  # then they are preprocessed together
            batches = [torch.stack(images)] if alike else [image[None] for image in images]
            columns.append(torch.cat([self.preprocess(batch) for batch in batches]))
        images = torch.cat(columns, dim=1)  # (B, V, 3, S, S)
        proprio = [torch.as_tensor(obs["proprio"], dtype=torch.float32, device=images.device) for obs in observations]
        return Inputs(images, [obs["instruction"] for obs in observations], torch.stack(proprio))

    def initial_noise(self, x0: X0, *rows: int, generator: torch.Generator | None = None) -> torch.Tensor:
        """Return x_0 (*rows, T, A) for `act`, see `flow.initial_noise`; "gripper" samples the grippers' alone."""
        shape = *rows, self.cfg.flow.chunk, self.cfg.flow.action_dim
        return initial_noise(x0, shape, self.normalizer.gripper_dims, generator)

    @torch.no_grad()
    def act(
        self,
        obs: Mapping[str, Any] | Sequence[Mapping[str, Any]] | np.ndarray | torch.Tensor,
        instructions: list[str] | None = None,
        proprio: np.ndarray | torch.Tensor | None = None,
        *,
        noise: torch.Tensor | None = None,
        generator: torch.Generator | None = None,
        num_steps: int = 10,
        step_noise: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Compute action chunks for the environment: the deterministic flow from noise; the sigma net is not used.

        With `step_noise`, sample the stochastic policy of reinforcement fine-tuning instead, for inspection.

        Args:
            obs: an observation or a list of B of them, see `observe`; or images, see `preprocess`, with the next two.
            instructions: B strings, given with images.
            proprio: (B, P), raw: position 3 [m], axis-angle 3 [rad], finger positions 2 [m]; given with images.
            noise: (B, T, A), x_0; None = sample it.
            generator: source of x_0, on the policy's device.
            num_steps: Euler steps of the deterministic flow.
            step_noise: (B, K, T, A), standard normal noise of the K steps, see `flow.sample_chain`; None = use the ODE.

        Returns:
            (B, T, A) raw actions, float32: motion inside the training range, grippers -1 open or +1 close. For a single
            observation outside a list: (T, A), from noise (T, A).

        Raises:
            ValueError: unfitted normaliser, unequal batch sizes, NaN proprio, noise of another shape, bad images,
                images without instructions and proprio, step noise for a policy without sigma net.
        """
        if not self.normalizer.fitted:
            raise ValueError("the policy's normaliser was never fitted; train the policy, or load a trained checkpoint")
        if isinstance(obs, Mapping):
            noise, step_noise = (None if x is None else x[None] for x in (noise, step_noise))
            return self.act([obs], noise=noise, generator=generator, num_steps=num_steps, step_noise=step_noise)[0]
        if isinstance(obs, np.ndarray | torch.Tensor):
            if instructions is None or proprio is None:
                raise ValueError("act: images come with instructions and proprio; or pass observations, see `observe`")
            images = self.preprocess(obs)
            proprio = torch.as_tensor(proprio, dtype=torch.float32, device=images.device)
        else:
            images, instructions, proprio = self.observe(obs)
        shape = (len(images), self.cfg.flow.chunk, self.cfg.flow.action_dim)
        if len(instructions) != len(images) or len(proprio) != len(images):
            raise ValueError(
                f"act: {len(images)} images, {len(instructions)} instructions, {len(proprio)} proprio rows; "
                "expected equal numbers"
            )
        if noise is None:
            noise = torch.randn(shape, generator=generator, device=images.device)
        elif noise.shape != shape:
            raise ValueError(f"noise: got shape {tuple(noise.shape)}, expected {shape}")
        context = self.encode(images, instructions)
        if step_noise is not None:
            if self.sigma_net is None:
                raise ValueError(
                    "the policy has no sigma net, so it has no noise; fine-tune it with train_rft.py first"
                )
            cond, noise = self.condition(context, proprio), noise.to(images.device)
            chain = sample_chain(self.head, self.sigma_net, cond, noise=noise, step_noise=step_noise.to(images.device))
            return self.normalizer.decode_actions(chain.x[:, -1])
        cond = self.head.prepare(context, self.normalizer.encode_proprio(proprio))
        return self.normalizer.decode_actions(
            sample_ode(self.head, cond, noise=noise.to(images.device), num_steps=num_steps)
        )


def resize(images: torch.Tensor, size: int) -> torch.Tensor:
    """Resize images (B, 3, H, W) in [0, 1] to (B, 3, S, S), S = size, as Pillow resizes 8-bit images (the public code):
    antialiased bicubic, first along rows, then along columns, each result rounded to 8 bits.
    """
    for shape in ((images.shape[-2], size), (size, size)):  # W, then H
        if shape != tuple(images.shape[-2:]):
            images = F.interpolate(images, shape, mode="bicubic", antialias=True)
            images = images.mul(255).round().clamp(0, 255) / 255
    return images


def center_crop(images: torch.Tensor, area: float) -> torch.Tensor:
    """Crop images (..., H, W) to the central share `area` of their area, at the same aspect ratio; 1.0 keeps all."""
    if area >= 1:
        return images
    height, width = (round(n * area**0.5) for n in images.shape[-2:])
    top, left = (images.shape[-2] - height) // 2, (images.shape[-1] - width) // 2
    return images[..., top : top + height, left : left + width]
