"""Options of a vlarft policy in lerobot: `--policy.type=vlarft --policy.checkpoint=runs/rft`."""

from dataclasses import dataclass, field
from typing import get_args

from lerobot.configs import FeatureType, NormalizationMode, PreTrainedConfig
from lerobot.optim import AdamWConfig

from vlarft.flow import X0

CHUNK = 8  # steps of a chunk in every vlarft policy of the paper; `VlarftPolicy` compares
IDENTITY = dict.fromkeys(("VISUAL", "STATE", "ACTION"), NormalizationMode.IDENTITY)


@PreTrainedConfig.register_subclass("vlarft")
@dataclass
class VlarftConfig(PreTrainedConfig):
    """Options beside lerobot's own; sizes, cameras and statistics are in the checkpoint.

    checkpoint: policy of vlarft, a run folder or its model.safetensors; None: that of `--policy.path`
    size: size of a new policy for lerobot-train, "small", "tiny" or "smoke"; None: train from the checkpoint
    noise: x_0 of the ODE: "sampled"; "zero", which is often better; or "gripper", sampled for the gripper alone
    num_flow_steps: Euler steps of the ODE (K in Sec. 3.3)
    n_action_steps: actions of a chunk that are played before the next chunk is made
    chunk_size: steps of the demonstrated chunks that lerobot loads; the policy's
    train: "all" weights or the flow "head" alone
    optimizer_lr, optimizer_weight_decay, optimizer_grad_clip_norm: of AdamW, as in train_sft.py; decay on matrices only
    normalization_mapping: the policy normalises inside, with the statistics of its checkpoint; lerobot must not

    Raises:
        ValueError: another value.
    """

    checkpoint: str | None = None
    size: str | None = None
    noise: str = "sampled"
    num_flow_steps: int = 10
    n_action_steps: int = CHUNK
    chunk_size: int = CHUNK
    train: str = "all"
    optimizer_lr: float = 1e-4
    optimizer_weight_decay: float = 0.01
    optimizer_grad_clip_norm: float = 1.0
    normalization_mapping: dict[str, NormalizationMode] = field(default_factory=lambda: dict(IDENTITY))

    def __post_init__(self) -> None:
        super().__post_init__()
        choices = {"size": (None, "small", "tiny", "smoke"), "noise": get_args(X0), "train": ("all", "head")}
        for name, values in choices.items():
            if getattr(self, name) not in values:
                raise ValueError(f"policy.{name} is {getattr(self, name)!r}, expected one of {values}")
        if self.checkpoint is not None and self.size is not None:
            raise ValueError(f"policy.checkpoint {self.checkpoint} and policy.size {self.size}: give one of them")
        if self.num_flow_steps < 1:
            raise ValueError(f"policy.num_flow_steps is {self.num_flow_steps}, expected 1 or more")
        if not 1 <= self.n_action_steps <= self.chunk_size:
            raise ValueError(
                f"policy.n_action_steps is {self.n_action_steps}, expected 1 to {self.chunk_size}, the chunk's steps"
            )
        if self.n_obs_steps != 1:
            raise ValueError(f"policy.n_obs_steps is {self.n_obs_steps}: the policy sees one frame")
        if other := {k: str(v) for k, v in self.normalization_mapping.items() if v is not NormalizationMode.IDENTITY}:
            raise ValueError(
                f"policy.normalization_mapping has {other}: the policy takes raw states and gives raw actions, as its "
                "normaliser is inside; expected IDENTITY for all, else they would be normalised twice"
            )

    def validate_features(self) -> None:
        """Check that the features, if they are known, have an image, a state and an action.

        Raises:
            ValueError: one is missing.
        """
        if self.input_features and not self.image_features:
            raise ValueError(
                f"input_features {', '.join(self.input_features)}: none is an image, which the policy needs"
            )
        if self.input_features and self.robot_state_feature is None:
            raise ValueError(f"input_features {', '.join(self.input_features)}: no observation.state, which is needed")
        if self.output_features and self.action_feature is None:
            kinds = {k: f.type.value for k, f in self.output_features.items()}
            raise ValueError(f"output_features {kinds}: no action of type {FeatureType.ACTION.value}")

    def get_optimizer_preset(self) -> AdamWConfig:
        """Return AdamW as in train_sft.py."""
        return AdamWConfig(
            lr=self.optimizer_lr,
            weight_decay=self.optimizer_weight_decay,
            grad_clip_norm=self.optimizer_grad_clip_norm,
        )

    def get_scheduler_preset(self) -> None:
        """Return None: the paper's learning rate is constant."""
        return None

    @property
    def observation_delta_indices(self) -> None:
        """One frame."""
        return None

    @property
    def action_delta_indices(self) -> list[int]:
        """The steps of a chunk."""
        return list(range(self.chunk_size))

    @property
    def reward_delta_indices(self) -> None:
        """None: supervised training uses no rewards."""
        return None
