"""vlarft: reinforcement fine-tuning of vision-language-action policies inside a learned world model.

The package exports its main classes: `from vlarft import VLAPolicy, WorldModel`. They are imported on first use, so
that `import vlarft` costs neither torch's start-up time nor any optional dependency.
"""

from importlib import import_module
from typing import Any

__version__ = "0.1.0"

_EXPORTS = {
    "FrameTokenizer": "tokenizer",
    "TokenizerConfig": "tokenizer",
    "WorldModel": "world_model",
    "WorldModelConfig": "world_model",
    "VLAPolicy": "policy",
    "PolicyConfig": "policy",
    "Normalizer": "normalizer",
}
__all__ = ["__version__", *_EXPORTS]


def __getattr__(name: str) -> Any:
    if name in _EXPORTS:
        return getattr(import_module(f"vlarft.{_EXPORTS[name]}"), name)
    raise AttributeError(f"module 'vlarft' has no attribute {name!r}; it exports {', '.join(_EXPORTS)}")
