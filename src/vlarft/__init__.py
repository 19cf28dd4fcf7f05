"""vlarft: reinforcement fine-tuning of vision-language-action policies inside a learned world model.

`from vlarft import VLAPolicy, WorldModel`: names are resolved on first use. Importing the package itself does nothing,
not even import torch; the networks need torch and einops, and whatever else a name needs says so when it is missing.
"""

from importlib import import_module
from typing import Any

__version__ = "0.1.0"

_EXPORTS = {
    "Batch": "data",
    "Episode": "data",
    "FrameTokenizer": "tokenizer",
    "Normalizer": "normalizer",
    "PolicyConfig": "policy",
    "RobotState": "data",
    "Sampling": "token_sampling",
    "TokenizerConfig": "tokenizer",
    "VLAPolicy": "policy",
    "WindowSampler": "data",
    "WorldModel": "world_model",
    "WorldModelConfig": "world_model",
    "load_episodes": "data",
    "make_env": "sim",
    "perceptual": "metrics",
    "read_header": "run.checkpoint",
    "split_episodes": "data",
}
__all__ = ["__version__", *_EXPORTS]


def __getattr__(name: str) -> Any:
    if name in _EXPORTS:
        return getattr(import_module(f"vlarft.{_EXPORTS[name]}"), name)
    raise AttributeError(f"module 'vlarft' has no attribute {name!r}; it exports {', '.join(_EXPORTS)}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
