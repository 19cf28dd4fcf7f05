"""Read files of downloaded repositories: weights, configurations and tables.

Nothing in a file is executed: pickled files are read with `weights_only`.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from vlarft.run.checkpoint import UNREADABLE, load_weights
from vlarft.run.lfs import refuse_pointer


def read_weights(path: str | Path) -> dict[str, Tensor]:
    """Read all tensors of a downloaded repository, by name.

    Args:
        path: its folder, or one file of weights.

    Raises:
        FileNotFoundError: no such path, no weights in the folder, or a shard of the index is missing.
        ValueError: an ambiguous choice of files, or a file that is truncated or contains more than tensors.
    """
    path = Path(path)
    tensors: dict[str, Tensor] = {}
    for file in [path] if path.is_file() else weight_files(path):
        part = _read_safetensors(file) if file.suffix == ".safetensors" else read_pickled(file)
        if not isinstance(part, dict) or not all(isinstance(value, Tensor) for value in part.values()):
            content = ", ".join(map(str, list(part)[:8])) if isinstance(part, dict) else type(part).__name__
            raise ValueError(f"{file} holds {content}, expected tensors by name: save the state dict alone")
        tensors |= part
    return tensors


def weight_files(folder: Path) -> list[Path]:
    """Return a folder's one file of weights, or the shards that its index lists; errors as in `read_weights`."""
    if not folder.is_dir():
        raise FileNotFoundError(f"no folder {folder}: give the folder of a downloaded repository, or its weight file")
    for suffix in (".safetensors", ".bin", ".pt", ".pth"):
        files = sorted(folder.glob(f"*{suffix}.index.json")) or sorted(folder.glob(f"*{suffix}"))
        if len(files) > 1:
            names = ", ".join(file.name for file in files)
            raise ValueError(
                f"{folder} holds several files of weights ({names}): give the one that is meant in place of the "
                "folder; if they are shards, their .index.json is missing: download it too"
            )
        if files and files[0].suffix == ".json":
            shards = sorted({folder / name for name in read_json(files[0]).get("weight_map", {}).values()})
            if missing := [shard.name for shard in shards if not shard.is_file()]:
                raise FileNotFoundError(f"{files[0]} names {', '.join(missing)}, not in {folder}: download them too")
            return shards
        if files:
            return files
    names = ", ".join(sorted(file.name for file in folder.iterdir())) or "nothing"
    raise FileNotFoundError(
        f"{folder} holds no weights (*.safetensors, *.bin, *.pt, *.pth) but {names}: download the repository with its "
        "large files"
    )


def _read_safetensors(file: Path) -> dict[str, Tensor]:
    refuse_pointer(file)
    try:
        return load_file(file)
    except SafetensorError as error:
        raise ValueError(_unreadable(file, error)) from error


def read_pickled(file: Path) -> Any:
    """Read a file of `torch.save`; a ValueError refuses any that has more than tensors in plain containers."""
    refuse_pointer(file)
    try:
        return torch.load(file, map_location="cpu", weights_only=True)
    except UNREADABLE as error:
        raise ValueError(_unreadable(file, (str(error) or type(error).__name__).splitlines()[0])) from error


def _unreadable(file: Path, error: Any) -> str:
    size = file.stat().st_size
    return (
        f"{file} ({size:,} bytes) is not a readable file of tensors ({error}): it is truncated or "
        "has another format; download it again"
    )


def read_json(path: Path) -> Any:
    """Read a JSON file.

    Raises:
        ValueError: not JSON.
    """
    refuse_pointer(path)
    try:
        return json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"{path} is not readable JSON ({error}); download it again") from error


def read_config(path: Path) -> tuple[dict[str, Any] | None, str]:
    """Return the repository's config.json, or None without one, and the repository's name for messages."""
    file = (path if path.is_dir() else path.parent) / "config.json"
    if file.is_file():
        return read_json(file), str(path)
    return None, f"{path} (no config.json beside it, so read at the paper's sizes)"


def check_config(public: Mapping[str, Any], what: str, needed: Sequence[str], fixed: Mapping[str, Any]) -> None:
    """Raise ValueError unless a config.json has the `needed` fields and, where it has them, the `fixed` values."""
    if missing := [name for name in needed if name not in public]:
        raise ValueError(
            f"config.json is not that of a public {what}: it lacks {', '.join(missing)} and has "
            f"{', '.join(list(public)[:8])}"
        )
    if other := [f"{k}={public[k]!r}, expected {v!r}" for k, v in fixed.items() if public.get(k, v) != v]:
        raise ValueError(f"config.json describes an unsupported {what}: {'; '.join(other)}")


def load_public(model: nn.Module, tensors: dict[str, Tensor], what: str, where: str) -> None:
    """Load weights as `load_weights` does; if no name matches, the error says that the file is another model's."""
    expected = model.state_dict()
    if not expected.keys() & tensors.keys():
        raise ValueError(
            f"{where} holds no {what}: of its {len(tensors)} tensors ({', '.join(list(tensors)[:3])}, ...) none has a "
            f"name of the layout ({', '.join(list(expected)[:3])}, ...)"
        )
    load_weights(model, tensors, where)
