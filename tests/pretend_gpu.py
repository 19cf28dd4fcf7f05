"""Run scripts on a pretended GPU: a device of its own, whose tensors lie in main memory and are computed there.

    python tests/pretend_gpu.py train_sft --preset smoke --demos DEMOS --out-dir OUT + eval_wm --preset smoke ...

Numbers are those of the CPU. But a tensor of the device and one of the CPU do not go together in one operation, as with
a GPU: a script that forgets to move a tensor, or loads one into another place, ends with an error. Frames are decoded
at fixed shapes, as on a GPU. Graphs, memory and autocast are not pretended, as torch has them in C++ alone: autocast is
without effect.
"""

import importlib
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # where the scripts are

DEVICE = torch.device("privateuseone", 0)  # torch's place for a device from outside; `start` names it
# CUDA takes CPU tensors here: as source or target of a copy, and as indices
INDEXING = {"index", "index_put_", "_index_put_impl_", "index_put"}
MIXED = {"copy_", "_to_copy", "_copy_from", *INDEXING}
RANDOM = {
    torch: ("rand", "randn", "randint", "randperm", "normal", "bernoulli", "multinomial", "_standard_gamma"),
    torch.Tensor: ("normal_", "uniform_", "exponential_", "random_", "bernoulli_", "multinomial"),
}


class Backend:
    """What torch asks a device's module for."""

    @staticmethod
    def is_available() -> bool:
        return True

    @staticmethod
    def _is_in_bad_fork() -> bool:
        return False

    @staticmethod
    def manual_seed_all(seed: int) -> None:
        pass

    @staticmethod
    def device_count() -> int:
        return 1

    @staticmethod
    def current_device() -> int:
        return 0

    @staticmethod
    def get_amp_supported_dtype() -> list[torch.dtype]:
        return [torch.bfloat16]


class OnDevice(torch.Tensor):
    """A tensor of the device, around the CPU tensor that has its values."""

    is_cuda = True  # so that frames are decoded at fixed shapes

    @staticmethod
    def __new__(cls, values: torch.Tensor):
        facts = {"dtype": values.dtype, "device": DEVICE, "strides": values.stride()}
        facts["storage_offset"] = values.storage_offset()
        tensor = torch.Tensor._make_wrapper_subclass(cls, values.size(), **facts)
        tensor.values_ = values
        return tensor

    def tolist(self):
        return self.values_.tolist()

    def __format__(self, how: str) -> str:
        return format(self.values_, how)

    def __repr__(self) -> str:
        return f"OnDevice({self.values_!r})"

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        return run(func, args, kwargs or {})


def each(values, do):
    """Apply a function to the values of an operation's arguments, which lists and tuples may hold. (Torch's own trees
    take three times as long.)
    """
    return type(values)([each(v, do) for v in values]) if isinstance(values, (list, tuple)) else do(values)


def run(func, args, kwargs):
    """Compute an operation on the CPU; its results are on the device, or where it is told to put them."""
    ours, strangers = {}, []

    def plain(x):
        if isinstance(x, OnDevice):
            ours[id(x.values_)] = x  # what is changed in place stays what it is
            return x.values_
        if isinstance(x, torch.Tensor) and x.ndim:
            strangers.append(x)
        return x

    name, indexed = func._schema.name.split("::")[1], args[0] if args else None
    args, options = each(args, plain), {name: each(value, plain) for name, value in kwargs.items()}
    if name in INDEXING and not isinstance(indexed, OnDevice):
        raise RuntimeError(f"{func}: indices should be either on cpu or on the same device as the indexed tensor (cpu)")
    if strangers and name not in MIXED:
        raise RuntimeError(f"{func}: expected all tensors on one device, found {tuple(strangers[0].shape)} on the CPU")
    moved = {"device": torch.device("cpu"), "pin_memory": False}
    out = func(*args, **{key: moved[key] if key in moved and value else value for key, value in options.items()})
    if kwargs.get("device", DEVICE).type == "cpu":
        return out

    def placed(x):
        return ours[id(x)] if id(x) in ours else OnDevice(x) if isinstance(x, torch.Tensor) else x

    return each(out, placed)


def copy_from(source: torch.Tensor, target: torch.Tensor, non_blocking: bool = False) -> torch.Tensor:
    """Copy to the device, from it, or on it."""
    plain = [t.values_ if isinstance(t, OnDevice) else t for t in (target, source)]
    plain[0].copy_(plain[1])
    return target


class Generator(torch.Generator):
    """A CPU generator, which gives the device as its own if it was made for that."""

    def __new__(cls, device: torch.device | str = "cpu") -> "Generator":
        made = super().__new__(cls)
        made.place = torch.device(device)
        return made

    device = property(lambda self: self.place)


def checked(sample: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    """Refuse a generator of another device than the result's, as torch does: `run` is given torch's own, without
    `place`.
    """

    def call(*args, generator: Generator | None = None, **kwargs):
        out = sample(*args, generator=generator, **kwargs)
        if generator is not None and generator.device.type != out.device.type:
            places = generator.device.type, out.device.type
            raise RuntimeError(f"{sample.__name__}: a generator of {places[0]} for a tensor of {places[1]}")
        return out

    return call


def start() -> tuple[torch.library.Library, ...]:
    """Make the device known to torch, as the one that `vlarft` finds; return what must be kept for it to stay so."""
    global DEVICE
    _setup_privateuseone_for_python_backend("pretended", Backend())
    DEVICE = torch.device("pretended", 0)
    library = torch.library.Library("aten", "IMPL")
    for op in (torch.ops.aten.empty.memory_format, torch.ops.aten.empty_strided.default):
        library.impl(op, lambda *args, op=op, **kwargs: run(op, args, kwargs), "PrivateUse1")
    library.impl("_copy_from", copy_from, "PrivateUse1")
    autocast = torch.library.Library("_", "IMPL")
    autocast.fallback(torch.library.fallthrough_kernel, "AutocastPrivateUse1")  # allowed, and without effect
    torch.Generator = Generator
    torch.__future__.set_swap_module_params_on_conversion(True)  # `module.to(dtype)` converts the values too
    for owner, names in RANDOM.items():
        for name in names:
            setattr(owner, name, checked(getattr(owner, name)))
    return library, autocast


def main(words: list[str]) -> None:
    """Run the commands, which a + separates."""
    kept = start()
    from vlarft.nets.static_decoding import StaticDecoding
    from vlarft.run import config, distributed

    passes = []
    distributed.setup, StaticDecoding._captured = lambda: DEVICE, lambda self, run: passes.append(run) or run
    while words:
        end = words.index("+") if "+" in words else len(words)
        (name, *options), words = words[:end], words[end + 1 :]
        script = importlib.import_module(name)
        if name == "train_rl":
            script.play = importlib.import_module("conftest").every_other_succeeds
        script.main(config.parse(script.Config, script.PRESETS, options, script.__doc__))
        print(f"on the device: {name}, {time.process_time():.1f} s, {len(passes)} fixed shapes", flush=True)
        passes.clear()
    del kept


if __name__ == "__main__":
    main(sys.argv[1:])
    os._exit(0)  # torch does not end by itself while it has a backend from Python
