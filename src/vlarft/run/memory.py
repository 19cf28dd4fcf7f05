"""Estimate the memory of a training step before the first one, and how many rows fit into free memory."""

from collections.abc import Callable, Iterable
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks


class Memory(NamedTuple):
    """Bytes that one process keeps. Not counted: temporary results (with recomputed blocks, one block's activations),
    the libraries' memory and the allocator's fragmentation.
    """

    weights: int  # parameters and buffers
    training: int  # gradients, Adam's two moments and, if kept, the moving average of the weights
    activations: int  # saved for the backward of one micro-batch, weights cast to bfloat16 included

    def __str__(self) -> str:
        """Format as one line, in GiB, or in MiB for a small model."""
        unit, name = (2**30, "GiB") if sum(self) >= 2**30 else (2**20, "MiB")
        parts = "  ".join(f"{part} {size / unit:.2f}" for part, size in self._asdict().items())
        return f"memory of a step, estimated: {sum(self) / unit:.2f} {name} ({parts})"


CPU_BYTES = 64 * 2**20  # for temporary results: larger ones do not fit the caches and gain nothing


def rows_at_once(bytes_per_row: int, device: torch.device) -> int:
    """Return how many rows to compute together: at least one, and as many as have temporary results that fit into half
    of a GPU's free memory, or into `CPU_BYTES`.
    """
    free = CPU_BYTES
    if device.type == "cuda":
        # memory that PyTorch's allocator caches is free to us, but mem_get_info counts it as used
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        free = (torch.cuda.mem_get_info(device)[0] + unused) // 2
    return max(1, free // bytes_per_row)


def local_bytes(tensors: Iterable[Tensor]) -> int:
    """Sum the bytes of tensors on this process; a sharded tensor counts with its shard."""
    return sum(t.numel() * t.element_size() for t in map(_local, tensors))


def saved_bytes(model: nn.Module, compute: Callable[[], Tensor]) -> int:
    """Measure the bytes that `compute()` saves for its backward, not counting the model's parameters and buffers.

    Args:
        model: the parameters and buffers not to count.
        compute: runs a forward; its result is dropped.
    """
    # storages are told apart by the address of the object: under FakeTensorMode they have no data, so no data pointer
    owned = {_local(t).untyped_storage()._cdata for t in (*model.parameters(), *model.buffers())}
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:  # autograd calls it for every tensor it saves; views share one storage
        storage = tensor.untyped_storage()
        if storage._cdata not in owned:
            kept[storage._cdata] = storage.nbytes()
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        result = compute()  # keep the graph alive: the address of a freed storage could be reused and counted once
    total = sum(kept.values())
    del result
    return total


def estimate(model: nn.Module, compute: Callable[[int], Tensor], rows: int, unit: int, ema: bool) -> Memory:
    """Estimate the memory of a training step from two small forwards: saved bytes are linear in the rows.

    Args:
        model: its frozen parameters have requires_grad=False.
        compute: runs a forward of the given number of rows.
        rows: rows of a micro-batch.
        unit: rows of the smaller forward; the other has twice as many.
        ema: whether a moving average of the weights is kept.
    """
    small, large = (saved_bytes(model, lambda n=n: compute(n)) for n in (unit, 2 * unit))
    trained = local_bytes(p for p in model.parameters() if p.requires_grad)
    return Memory(
        weights=local_bytes((*model.parameters(), *model.buffers())),
        training=trained * (4 if ema else 3),
        activations=round(small + (large - small) * (rows / unit - 1)),
    )


def _local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor
