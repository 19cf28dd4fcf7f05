"""Convert public checkpoints of tokenizer, world model and policy to this package: `python -m vlarft.pretrained`."""

from vlarft.pretrained.files import read_weights
from vlarft.pretrained.policy import (
    convert_policy,
    policy_from_public,
    public_policy_config,
    read_policy_weights,
    read_statistics,
)
from vlarft.pretrained.text import read_text_tokenizer
from vlarft.pretrained.world_model import (
    LIBERO_ACTION_RANGES,
    convert_tokenizer,
    convert_world_model,
    read_action_ranges,
    tokenizer_config,
    tokenizer_from_public,
    transformer_config,
    world_model_from_public,
)

__all__ = [
    "LIBERO_ACTION_RANGES",
    "convert_policy",
    "convert_tokenizer",
    "convert_world_model",
    "policy_from_public",
    "public_policy_config",
    "read_action_ranges",
    "read_policy_weights",
    "read_statistics",
    "read_text_tokenizer",
    "read_weights",
    "tokenizer_config",
    "tokenizer_from_public",
    "transformer_config",
    "world_model_from_public",
]
