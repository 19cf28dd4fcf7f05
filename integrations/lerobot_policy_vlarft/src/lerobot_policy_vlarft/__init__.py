"""Policies of vlarft as a LeRobot plugin: lerobot's commands import this package, which registers type `vlarft`."""

try:
    import lerobot  # noqa: F401
except ImportError as error:
    raise ImportError(
        "lerobot_policy_vlarft is a plugin of lerobot, which is missing: pip install 'lerobot>=0.6.1' (Python 3.12)"
    ) from error

from .configuration_vlarft import VlarftConfig
from .env_vlarft import VlarftEnv
from .modeling_vlarft import VlarftPolicy
from .processor_vlarft import make_vlarft_pre_post_processors

__all__ = ["VlarftConfig", "VlarftEnv", "VlarftPolicy", "make_vlarft_pre_post_processors"]
