"""Checkpoints and run folders: atomic writes; files of other programs are refused.

A model is one safetensors file whose header holds its class and its config as JSON, so the file alone is enough to load
it; equal models make equal files. Training state (optimizer, step, ...) lies beside it, see train_state.py. Every file
is written to `NAME.tmp` and moved into place.

    out_dir/config.json        the script's configuration; a second run with another one is refused
    out_dir/inputs.json        digests of the models that the run started from; with others it does not go on
    out_dir/model.safetensors  weights + {"class", "config", "extra"}
    out_dir/train_state.pt     optimizer, step, ...; loaded with weights_only

A run folder may be given wherever a checkpoint is expected, or a name on the Hub, see hub.py. Files of older versions
still load, see migration.py.
"""

import contextlib
import errno
import hashlib
import json
import math
import os
import pickle
import shutil
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import MISSING, Field, fields, is_dataclass
from io import FileIO
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import nn
from torch.overrides import TorchFunctionMode

from vlarft.run import migration
from vlarft.run.config import differences, from_dict, to_dict
from vlarft.run.distributed import is_main
from vlarft.run.hub import is_hub_name, model_file
from vlarft.run.lfs import refuse_pointer

# options that may differ when a run is resumed: they change nothing, but for `accumulate` the random numbers
FREE = (
    "out_dir",
    "accumulate",
    "async_save",
    "checkpoint_activations",
    "frozen",
    "keep_interval",
    "log_interval",
    "save_interval",
)

FULL = errno.ENOSPC, errno.EDQUOT, errno.EFBIG  # what a write raises where there is no room

SPARE = 10**7  # numbers that a model may have beside its weights: masks, positions

ModelT = TypeVar("ModelT", bound=nn.Module)

# what torch.load raises on truncated files and on files of another format
UNREADABLE = (
    RuntimeError,
    EOFError,
    OSError,
    ValueError,
    LookupError,
    TypeError,
    AttributeError,
    pickle.UnpicklingError,
)


class Header(NamedTuple):
    """Header of a model file."""

    cls: str
    config: dict[str, Any]
    extra: dict[str, Any]


def write_atomic(path: str | Path, write: Callable[[Path], None]) -> None:
    """Call `write(tmp)` and move the result to `path`: readers see the old file or the new one, never a part.

    Raises:
        OSError: not writable, or no space left; the old file is untouched and the new one is removed.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    tmp = path.with_name(path.name + ".tmp")
    try:
        write(tmp)
        with open(tmp, "rb") as file:
            os.fsync(file.fileno())  # else a power failure after the move could leave an empty file under its name
    except (OSError, RuntimeError, SafetensorError) as error:  # torch and safetensors raise the last two
        failed = not_written(path, error)  # before the room is free again
        tmp.unlink(missing_ok=True)
        raise failed from error
    os.umask(mask := os.umask(0))  # the umask can only be read by setting it
    os.chmod(tmp, 0o666 & ~mask)  # safetensors creates files that only their owner can read
    os.replace(tmp, path)


@contextlib.contextmanager
def new_folder(root: str | Path) -> Iterator[Path]:
    """Yield the folder ROOT.tmp, empty, which becomes `root` at the end of the block; an error removes it.

    Raises:
        FileExistsError: `root` exists.
        OSError: no space left; names `root`.
        ValueError: another process is writing it.
    """
    root = Path(root)
    with _locked(root):
        if root.exists():
            raise FileExistsError(f"{root} exists; remove it, or give another folder")
        tmp = root.with_name(root.name + ".tmp")
        shutil.rmtree(tmp, ignore_errors=True)
        tmp.mkdir()
        try:
            yield tmp
        except BaseException as error:
            full = isinstance(error, OSError) and _is_full(error)
            failed = not_written(root, error) if full else None  # before the room is free again
            shutil.rmtree(tmp, ignore_errors=True)
            if failed:
                raise failed from error
            raise
        os.replace(tmp, root)


@contextlib.contextmanager
def _locked(root: Path) -> Iterator[None]:
    """Keep other processes from writing `root`, which is not there yet, by the system's lock on a file beside it."""
    import fcntl

    lock = root.with_name(f".{root.name}.lock")
    lock.parent.mkdir(parents=True, exist_ok=True)
    with lock.open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(
                f"{root} is being written by another process: wait until it ends, or give another folder"
            ) from None
        except OSError as error:
            warnings.warn(f"{root} cannot be locked ({error}): start no second process that writes it", stacklevel=4)
        try:
            yield
        finally:
            lock.unlink(missing_ok=True)


def check_room(path: str | Path, needed: float) -> None:
    """Raise an OSError if a disk has less than `needed` bytes and a tenth: HDF5 crashes where it fills up."""
    free = shutil.disk_usage(Path(path).parent).free
    if free < 1.1 * needed:
        raise OSError(
            errno.ENOSPC, f"{path} needs up to {needed / 2**30:.2f} GiB, {free / 2**30:.2f} are free: free some space"
        )


def not_written(path: str | Path, error: Exception) -> OSError:
    """Make the error of a file that could not be written; those of the system do not name it where a disk is full."""
    saved = "What was saved before is untouched"
    if not _is_full(error):
        return OSError(f"could not write {path} ({error}). {saved}")
    free = shutil.disk_usage(Path(path).parent).free / 2**30
    return OSError(
        f"could not write {path} ({error}), {free:.2f} GiB were free. {saved}: "
        "free some space and give the same command again"
    )


def _is_full(error: Exception) -> bool:
    """Return whether a write failed for want of room, which HDF5, safetensors and torch say in their text alone."""
    texts = "unexpected pos", "failed writing", *(f"{name} {n}" for name in ("errno =", "os error") for n in FULL)
    return getattr(error, "errno", None) in FULL or any(text in str(error) for text in texts)


def write_json(path: str | Path, value: Any) -> None:
    """Write JSON atomically, two spaces of indent, newline at the end."""
    text = json.dumps(value, indent=2) + "\n"
    write_atomic(path, lambda tmp: tmp.write_text(text))


def read_json(path: str | Path) -> Any:
    """Read a JSON file.

    Raises:
        ValueError: not JSON; names the file.
    """
    try:
        return json.loads(Path(path).read_text())
    except (ValueError, RecursionError) as error:  # of JSON and of UTF-8
        raise ValueError(f"{path} is not readable JSON ({error}); the file is damaged") from error


def append_line(file: FileIO, text: str) -> None:
    """Append a line to a file opened with `open("ab", buffering=0)`: a kill cuts the last line at most.

    Raises:
        OSError: not writable, or no space left; names the file.
    """
    data = f"{text}\n".encode()
    try:
        while data:  # a disk that fills up takes a part, and none the next time
            data = data[file.write(data) :]
    except OSError as error:
        raise not_written(file.name, error) from error


def save_model(
    path: str | Path,
    model: nn.Module,
    config: Any,
    extra: dict[str, Any] | None = None,
    state_dict: dict | None = None,
    *,
    dtype: torch.dtype | None = None,
) -> None:
    """Write weights, class name and config to one safetensors file.

    Args:
        path: the file, by convention `out_dir/model.safetensors`.
        model: its class name and, unless `state_dict` is given, its weights are stored.
        config: the model's (nested) dataclass.
        extra: JSON-safe facts that belong to the model: action ranges, the split it was trained on, ...
        state_dict: whole tensors to write instead of the model's parameters, which are shards under FSDP.
        dtype: of the parameters in the file, bfloat16 halves it; buffers keep theirs. A model's own dtype is what it
            loads with, float32.
    """
    weights = model.state_dict() if state_dict is None else state_dict
    if dtype is not None:
        weights = {**weights, **{k: weights[k].to(dtype) for k, _ in model.named_parameters()}}
    # clone: safetensors refuses tensors that share memory
    tensors = {k: v.detach().cpu().contiguous().clone() for k, v in weights.items()}
    header = {
        # fully_shard replaces a module's class by a subclass, FSDP<name>: store the original's name
        "class": next(c.__name__ for c in type(model).__mro__ if not c.__name__.startswith("FSDP")),
        "config": to_dict(config),
        "extra": extra or {},
    }
    # one entry: safetensors writes several in random order
    write_atomic(path, lambda tmp: save_file(tensors, tmp, metadata={"vlarft": json.dumps(header)}))


def checkpoint_file(path: str | Path) -> Path:
    """Return the model file that a path names: the file itself, or `model.safetensors` in a run folder.

    A name `hf:user/name[/path][@revision]` is a file on the Hub, see hub.py, which is downloaded first.
    """
    if is_hub_name(path):
        return model_file(path)
    path = Path(path)
    return path / "model.safetensors" if path.is_dir() else path


def file_digest(path: str | Path) -> str:
    """Return 16 hex digits that tell a file (a run folder's model) from any other."""
    return hashlib.sha256(checkpoint_file(path).read_bytes()).hexdigest()[:16]


def json_digest(value: object) -> str:
    """Return 16 hex digits that tell a JSON value from any other."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]


def model_digest(path: str | Path) -> str:
    """Return 16 hex digits that tell a model from any other by its class, config and tensors: those of a run that was
    repeated elsewhere are equal, although its file names another folder.
    """
    path, header = checkpoint_file(path), read_header(path)
    with path.open("rb") as file:
        table = json.loads(file.read(int.from_bytes(file.read(8), "little")))  # safetensors: length, JSON, tensors
        table.pop("__metadata__")
        digest = hashlib.sha256(json.dumps([header.cls, header.config, table], sort_keys=True).encode())
        while block := file.read(2**20):
            digest.update(block)
    return digest.hexdigest()[:16]


def read_header(path: str | Path) -> Header:
    """Read class, config and extra of a model file, without its weights.

    Args:
        path: the file or its run folder.

    Raises:
        FileNotFoundError: no such file.
        ValueError: the file is truncated, is no safetensors file, or was not written by `save_model`.
    """
    path = checkpoint_file(path)
    if not path.is_file():
        raise FileNotFoundError(f"no checkpoint at {path}; give a run folder or its model.safetensors")
    refuse_pointer(path)
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
    except SafetensorError as error:
        raise ValueError(
            f"{path} is not a readable safetensors file ({error}); it is truncated or of another format: "
            "copy or train it again"
        ) from error
    try:
        if "vlarft" in metadata:
            header = json.loads(metadata["vlarft"])
        else:  # of an older version
            header = {**metadata, **{name: json.loads(metadata[name]) for name in ("config", "extra")}}
        found = Header(*(header[name] for name in ("class", "config", "extra")))
        if not (isinstance(found.config, dict) and isinstance(found.extra, dict)):
            raise TypeError(f"{type(found.config).__name__} and {type(found.extra).__name__}")
    except (ValueError, LookupError, TypeError, RecursionError) as error:
        raise ValueError(
            f"{path} was not written by vlarft: its header has {sorted(metadata) or 'no metadata'}, "
            f"expected class, config and extra ({type(error).__name__}: {error})"
        ) from error
    return found._replace(extra=migration.extra(found.extra))


def load_model(
    path: str | Path, model_class: type[ModelT], config_class: type, device: str | torch.device = "cpu"
) -> tuple[ModelT, dict[str, Any]]:
    """Build `model_class(config)` from a file of `save_model`, or from its run folder, and load all weights.

    Returns:
        The model, in eval mode, on `device`; and the file's `extra`.

    Raises:
        FileNotFoundError: no such file.
        ValueError: a truncated file, one of another program or class, or tensors that are missing, unexpected, of
        another shape (each is named) or not finite.
    """
    path = checkpoint_file(path)
    header = read_header(path)
    if header.cls != model_class.__name__:
        raise ValueError(f"{path} holds a {header.cls}, expected a {model_class.__name__}")
    config = migration.model_config(header.cls, header.config, str(path))
    config = from_dict(config_class, config, f"{path}: {config_class.__name__}")
    with safe_open(path, framework="pt") as file:
        shapes = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118, no dict
    try:
        model = _build(model_class, config, SPARE + 4 * sum(map(math.prod, shapes.values())))
    except (RuntimeError, ArithmeticError, LookupError, TypeError) as error:  # negative sizes, a division by zero, ...
        raise ValueError(f"{path}: no {model_class.__name__} has the sizes of its config ({error})") from error
    expected = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    compare_shapes(expected, shapes, f"{path} does not fit {model_class.__name__}")
    if any(parameter.is_meta for parameter in model.parameters()):
        model = model_class(config)
    load_weights(model, load_file(path), str(path))
    model.checkpoint = path
    return model.to(device).eval(), header.extra


def _build(model_class: type[ModelT], config: Any, most: int) -> ModelT:
    """Build a model; if it has more than `most` numbers or cannot be built, on the meta device, which allocates nothing
    but imports torch's compiler, and that takes seconds.
    """
    try:
        with _AtMost(most):
            return model_class(config)
    except RuntimeError:
        with torch.device("meta"):
            return model_class(config)


class _AtMost(TorchFunctionMode):
    """Stops where more than so many numbers are made."""

    def __init__(self, numbers: int) -> None:
        super().__init__()
        self.left = numbers

    def __torch_function__(self, func: Callable, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        made = func(*args, **(kwargs or {}))
        if func in (torch.empty, torch.randn, torch.zeros, torch.ones, torch.full):
            self.left -= made.numel()
            if self.left < 0:
                raise RuntimeError("too many numbers")
        return made


def load_weights(model: nn.Module, tensors: dict[str, torch.Tensor], where: str) -> None:
    """Load a state dict strictly; errors name tensors that are missing, unexpected, of another shape or not finite."""
    expected, found = ({k: tuple(v.shape) for k, v in some.items()} for some in (model.state_dict(), tensors))
    compare_shapes(expected, found, f"{where} does not fit {type(model).__name__}")
    values = {name: value for name, value in tensors.items() if not value.is_meta}
    if wrong := [name for name, value in values.items() if not value.isfinite().all()]:
        raise ValueError(f"{where} has NaN or infinite weights, first in {wrong[0]}: the run that wrote it diverged")
    model.load_state_dict(tensors)


def compare_shapes(expected: dict[str, tuple], found: dict[str, tuple], problem: str) -> None:
    """Raise a ValueError that lists names that are missing, unexpected or of another shape, if there are any."""
    problems = [f"missing {k}" for k in expected if k not in found]
    problems += [f"unexpected {k}" for k in found if k not in expected]
    problems += [
        f"{k} has shape {found[k]}, expected {expected[k]}" for k in expected if k in found and found[k] != expected[k]
    ]
    if problems:
        shown = "; ".join(problems[:12]) + (f"; and {len(problems) - 12} more" if len(problems) > 12 else "")
        raise ValueError(f"{problem}: {shown}")


def open_run(
    out_dir: str | Path,
    config: Any,
    ignore: Sequence[str] = (),
    older: migration.Migration | None = None,
    models: Sequence[str] = (),
) -> Path | None:
    """Create a run folder, or open the one that an interrupted run of the same configuration left.

    Two configurations are the same if all fields outside `FREE` and `ignore` are equal; two spellings of one path are
    equal.

    Args:
        out_dir: the folder.
        config: the script's dataclass.
        ignore: further fields that do not change the results and may differ (worker processes, ...).
        older: translates a configuration that an older version stored into today's fields, from migration.py.
        models: fields that name the models that the run starts from, run folders or files; inputs.json holds their
            digests.

    Returns:
        Path of the `train_state.pt` to resume from, or None if the run starts anew.

    Raises:
        ValueError: the folder belongs to another configuration (the message lists the fields that differ), its run used
            an option that was removed since, one of its files is missing, or a model has been replaced since it began.
    """
    out_dir, given = Path(out_dir), to_dict(config)
    path = out_dir / "config.json"
    if path.is_file():
        if not isinstance(stored := read_json(path), dict):
            raise ValueError(f"{path} holds a {type(stored).__name__}, expected an object; the file is damaged")
        stored = stored if older is None else older(stored, str(path))
        stored = {**_defaults(config), **stored}  # options newer than the run have their defaults
        # take the given spelling of an equal path, so that `differences` lists real differences only
        stored = {k: given[k] if k in given and same_setting(v, given[k]) else v for k, v in stored.items()}
        free = {*FREE, *ignore}
        if lines := differences(*({k: v for k, v in d.items() if k not in free} for d in (stored, given))):
            raise ValueError(
                f"{out_dir} holds a run of another configuration: {'; '.join(lines)} (stored against given). "
                "Choose another --out-dir, remove the folder, or give the stored values to resume."
            )
    elif left := [name for name in ("model.safetensors", "train_state.pt") if (out_dir / name).exists()]:
        raise ValueError(
            f"{out_dir} has {left[0]} but no config.json, which says what run it is of: choose another --out-dir"
        )
    elif is_main():
        out_dir.mkdir(parents=True, exist_ok=True)
        write_json(path, given)
    state = out_dir / "train_state.pt"
    if is_main():
        began = state.is_file() or (out_dir / "stages.json").is_file()
        _check_same_models(out_dir, {name: given[name] for name in models}, began)
    model, kept = out_dir / "model.safetensors", out_dir / "model_before.safetensors"
    if is_main() and model.exists() and not state.exists():  # removed, or the first save was cut short
        os.replace(model, kept)
        print(f"{state} is missing: the run starts anew; its model is kept as {kept}", file=sys.stderr)
    return state if state.is_file() else None


def same_setting(stored: Any, given: Any) -> bool:
    """Return whether two values of a field are equal or name one path, where a run folder equals its model file."""
    if isinstance(stored, list) and isinstance(given, list):
        return len(stored) == len(given) and all(map(same_setting, stored, given))
    if isinstance(stored, str) and isinstance(given, str):
        places = (Path(value.removesuffix("/model.safetensors")).resolve() for value in (stored, given))
        return stored == given or len(set(places)) == 1
    return stored == given


def _defaults(config: Any) -> dict[str, Any]:
    """Return the defaults of a dataclass's fields, as they read back from JSON (tuples are lists)."""
    values = {f.name: f.default_factory() if f.default is MISSING else f.default for f in fields(config) if _has(f)}
    return json.loads(json.dumps({name: to_dict(v) if is_dataclass(v) else v for name, v in values.items()}))


def _has(field: Field) -> bool:
    return field.default is not MISSING or field.default_factory is not MISSING


def save_train_state(out_dir: str | Path, state: dict[str, Any]) -> None:
    """Write `out_dir/train_state.pt` atomically; it may hold tensors and plain Python values only."""
    write_atomic(Path(out_dir) / "train_state.pt", lambda tmp: torch.save(state, tmp))


def load_train_state(path: str | Path) -> dict[str, Any]:
    """Read a training state onto the CPU, with `weights_only`.

    Raises:
        ValueError: the file is truncated or of another format.
    """
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except UNREADABLE as error:
        raise ValueError(
            f"{path} is not a readable training state ({error}); remove it to start the run anew"
        ) from error


def _check_same_models(out_dir: Path, models: Mapping[str, str | None], began: bool) -> None:
    """Compare models, by field, with those that a run began with; a file that is gone cannot be compared."""
    path = out_dir / "inputs.json"
    before = read_json(path) if began and path.is_file() else {}
    now = {}
    for name, place in models.items():
        try:
            now[name] = model_digest(place) if place else None
        except FileNotFoundError:
            continue
        if before.get(name, now[name]) != now[name]:
            raise ValueError(
                f"--{name.replace('_', '-')} {place} is another model today than when the run in {out_dir} began: "
                "choose another --out-dir, or remove the folder"
            )
    if now != before:
        write_json(path, {**before, **now})
