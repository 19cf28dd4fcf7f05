"""Processors of a vlarft policy in lerobot: rename, batch, move. They do not normalise: the policy does so itself."""

from typing import Any

from lerobot.processor import PolicyAction, PolicyProcessorPipeline, make_default_pre_post_processors
from torch import Tensor

from .configuration_vlarft import VlarftConfig


def make_vlarft_pre_post_processors(
    config: VlarftConfig, dataset_stats: dict[str, dict[str, Tensor]] | None = None
) -> tuple[
    PolicyProcessorPipeline[dict[str, Any], dict[str, Any]], PolicyProcessorPipeline[PolicyAction, PolicyAction]
]:
    """Make lerobot's default pipelines; their steps of normalisation have the mode IDENTITY.

    Args:
        config: of the policy.
        dataset_stats: of lerobot's data set; not used: the statistics are in the policy's checkpoint.

    Returns:
        Preprocessor (batch -> batch on the policy's device) and postprocessor (action -> action on the CPU).
    """
    return make_default_pre_post_processors(config)
