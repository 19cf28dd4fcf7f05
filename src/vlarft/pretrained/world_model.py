"""Convert public frame tokenizers and world models.

Token layout, rounding and rotary positions are the same here as in the public code, so the weights are copied as is.

    tokenizer     names are the public ones; positions of another grid are resampled only on request
    world model   `LlamaForCausalLM` below maps the names; tensors that are left out on purpose are in `RECOMPUTED`

Shapes: A action dim, N positions, D width.
"""

import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from vlarft.nets.transformer import TransformerConfig
from vlarft.pretrained.files import check_config, load_public, read_config, read_json, read_pickled, read_weights
from vlarft.run.config import differences, to_dict
from vlarft.tokenizer import FrameTokenizer, TokenizerConfig
from vlarft.world_model import WorldModel, WorldModelConfig

# Tensors of public world models that are not loaded. Rotary frequencies follow from rope_theta and the head width, but
# old versions of transformers stored them in every layer.
RECOMPUTED = re.compile(r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq")

# Low and high of each action dimension in the public world models of LIBERO, raw environment units: position (3),
# rotation (3), gripper. The public code has them in a separate file.
LIBERO_ACTION_RANGES = (
    (-0.9375, 0.9375),
    (-0.9375, 0.9375),
    (-0.9375, 0.9375),
    (-0.2582143, 0.3557143),
    (-0.375, 0.375),
    (-0.3675, 0.375),
    (-1.0, 1.0),
)


class LlamaForCausalLM(nn.Module):
    """The trained parts of a world model under their public names; the parameters are shared, not copied."""

    def __init__(self, model: WorldModel) -> None:
        super().__init__()
        parts = {"embed_tokens": model.embed_tokens, "layers": model.decoder.layers, "norm": model.decoder.norm}
        self.model = nn.ModuleDict(parts)
        self.lm_head = model.lm_head


def tokenizer_from_public(
    state_dict: Mapping[str, Tensor],
    config: TokenizerConfig,
    interpolate_positions: tuple[int, int] | None = None,
    where: str = "the state dict",
) -> FrameTokenizer:
    """Build a tokenizer with public weights.

    Args:
        state_dict: the public tensors, of any floating type.
        config: sizes of the tokenizer.
        interpolate_positions: grid (h, w), in latent cells, of the stored position embeddings (N, D), which are then
            resampled bilinearly to the config's grid. None: they must be for the config's grid.
        where: source of the tensors, for messages.

    Returns:
        The tokenizer, in eval mode, float32.

    Raises:
        ValueError: tensors missing, left over or misshapen; positions of another grid.
    """
    model = FrameTokenizer(config)
    tensors = dict(state_dict)
    for name, value in model.state_dict().items():
        if name.endswith("pos_emb") and name in tensors and tensors[name].shape[1:] == value.shape[1:]:
            tensors[name] = _fit_positions(tensors[name], config, interpolate_positions, f"{where}: {name}")
    load_public(model, tensors, "tokenizer", where)
    return model.eval()


def _fit_positions(stored: Tensor, config: TokenizerConfig, grid: tuple[int, int] | None, name: str) -> Tensor:
    """Resample positions (N, D) of `grid` to the config's grid."""
    height, width = config.grid
    if grid is None and len(stored) != height * width:
        raise ValueError(
            f"{name} has {len(stored)} positions, image_size {config.image_size[0]}x{config.image_size[1]} has "
            f"{height}x{width} = {height * width}: the file is for another image size. Give that image size, or the "
            "file's grid as interpolate_positions=(h, w) (--interpolate-positions H W) to resample the positions"
        )
    if grid is not None and len(stored) != grid[0] * grid[1]:
        raise ValueError(f"{name} has {len(stored)} positions, not the {grid[0]}x{grid[1]} of interpolate_positions")
    if grid in (None, config.grid):
        return stored
    image = rearrange(stored.float(), "(h w) d -> 1 d h w", h=grid[0])
    return rearrange(F.interpolate(image, config.grid, mode="bilinear"), "1 d h w -> (h w) d")


def world_model_from_public(
    state_dict: Mapping[str, Tensor],
    config: WorldModelConfig,
    tokenizer: FrameTokenizer,
    action_ranges: Tensor,
    where: str = "the state dict",
) -> WorldModel:
    """Build a world model with public weights.

    Args:
        state_dict: the public tensors, of any floating type.
        config: sizes of the world model and its tokenizer.
        tokenizer: copied into the world model.
        action_ranges: (A, 2) low and high of each action dimension, raw environment units.
        where: source of the tensors, for messages.

    Returns:
        The world model, in eval mode, float32.

    Raises:
        ValueError: tensors missing, left over or misshapen; the config of another tokenizer, or with parts that public
            weights lack; ranges of another shape, or not finite with low <= high.
    """
    if lines := differences(to_dict(config.tokenizer), to_dict(tokenizer.cfg)):
        raise ValueError(f"config.tokenizer is not the given tokenizer's: {'; '.join(lines)}; use tokenizer.cfg")
    for name in ("slot_embedding", "factored_tokens"):
        if getattr(config, name):
            raise ValueError(f"{name}=True: public world models have no such part; set it to False")
    if action_ranges.shape != (config.action_dim, 2):
        raise ValueError(f"expected action ranges ({config.action_dim}, 2), got shape {tuple(action_ranges.shape)}")
    model = WorldModel(config)
    model.tokenizer.load_state_dict(tokenizer.state_dict())
    model.action_bins.set_range(action_ranges[:, 0], action_ranges[:, 1])
    tensors = {name: tensor for name, tensor in state_dict.items() if not RECOMPUTED.fullmatch(name)}
    load_public(LlamaForCausalLM(model), tensors, "world model", where)
    return model.eval()


def tokenizer_config(public: Mapping[str, Any]) -> TokenizerConfig:
    """Return the sizes that a public tokenizer's config.json states.

    Raises:
        ValueError: not a tokenizer's config, or it describes another computation.
    """
    needed = ("block_out_channels", "layers_per_block", "latent_channels", "norm_num_groups", "resolution")
    # 12 means about 2^12 codes: FSQ levels 7, 5, 5, 5, 5 (4375 codes)
    fixed = {"act_fn": "silu", "norm_type": "group", "mid_block_add_attention": False, "context_length": 1}
    fixed |= {"in_channels": 3, "out_channels": 3, "vq_fsq_levels": 12, "dyn_fsq_levels": 12}
    check_config(public, "tokenizer", needed, fixed)
    return TokenizerConfig(
        image_size=(public["resolution"], public["resolution"]),
        block_channels=tuple(public["block_out_channels"]),
        res_blocks=public["layers_per_block"],
        latent_channels=public["latent_channels"],
        future_patch=public.get("patch_size", TokenizerConfig.future_patch),
        norm_groups=public["norm_num_groups"],
    )


def transformer_config(public: Mapping[str, Any]) -> TransformerConfig:
    """Return the sizes that a public world model's config.json states of its transformer.

    Raises:
        ValueError: not a LLaMA's config, or it describes another computation.
    """
    needed = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "rms_norm_eps")
    fixed = {"model_type": "llama", "hidden_act": "silu", "attention_bias": False, "mlp_bias": False}
    fixed |= {"tie_word_embeddings": False, "rope_scaling": None}
    rope = public.get("rope_parameters") or {}  # transformers 5 moved rope_theta and rope_scaling here
    check_config({**public, **rope}, "world model", needed, {**fixed, "rope_type": "default"})
    return TransformerConfig(
        depth=public["num_hidden_layers"],
        width=public["hidden_size"],
        num_heads=public["num_attention_heads"],
        num_kv_heads=public.get("num_key_value_heads") or public["num_attention_heads"],
        ffn_dim=public["intermediate_size"],
        head_dim=public.get("head_dim"),
        rope_theta={**public, **rope}.get("rope_theta", TransformerConfig.rope_theta),
        norm_eps=public["rms_norm_eps"],
        max_positions=public.get("max_position_embeddings", TransformerConfig.max_positions),
    )


def read_action_ranges(source: str) -> Tensor:
    """Read action ranges (A, 2): low and high of each dimension.

    Args:
        source: "libero", a JSON file [[low, high], ...], or a .pt / .pth file that holds the table as one tensor.

    Raises:
        FileNotFoundError: no such file.
        ValueError: the file does not hold two numbers per dimension.
    """
    if source == "libero":
        return torch.tensor(LIBERO_ACTION_RANGES)
    path = Path(source)
    if not path.is_file():
        raise FileNotFoundError(f'no action ranges at {path}: give "libero", a .json or a .pth file')
    table = read_json(path) if path.suffix == ".json" else read_pickled(path)
    try:
        ranges = torch.as_tensor(table, dtype=torch.float32)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"{path} holds no table [[low, high], ...] of numbers: {error}") from error
    if ranges.ndim != 2 or ranges.shape[1] != 2:
        raise ValueError(f"{path} has shape {tuple(ranges.shape)}, expected (A, 2): [low, high] of each dimension")
    return ranges


def convert_tokenizer(
    path: Path, image_size: tuple[int, int] | None, interpolate_positions: tuple[int, int] | None
) -> FrameTokenizer:
    """Convert the tokenizer of a downloaded repository; arguments and errors as in `tokenizer_from_public`."""
    public, where = read_config(path)
    config = TokenizerConfig() if public is None else tokenizer_config(public)
    config = replace(config, image_size=image_size or config.image_size)
    return tokenizer_from_public(read_weights(path), config, interpolate_positions, where)


def convert_world_model(path: Path, tokenizer: FrameTokenizer, action_ranges: Tensor) -> WorldModel:
    """Convert the world model of a downloaded repository; arguments and errors as in `world_model_from_public`."""
    public, where = read_config(path)
    transformer = TransformerConfig() if public is None else transformer_config(public)
    config = WorldModelConfig(tokenizer.cfg, transformer, action_dim=len(action_ranges))
    return world_model_from_public(read_weights(path), config, tokenizer, action_ranges, where)
