"""How much memory a training step will take, known before the first one; how many rows fit into what is free."""

from collections.abc import Callable, Iterable
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks


class Memory(NamedTuple):
    """Bytes of one process. Not in it: temporary results (with recomputed blocks, one block's activations), what the
    libraries take, and fragments of the allocator.
    """

    weights: int  # and buffers
    training: int  # gradients, two moments of Adam and, where there is one, the average of the weights
    activations: int  # kept for the backward of one micro-batch, weights cast to bfloat16 included

    def __str__(self) -> str:
        """One line, in GiB, of a small model in MiB."""
        unit, name = (2**30, "GiB") if sum(self) >= 2**30 else (2**20, "MiB")
        parts = "  ".join(f"{part} {size / unit:.2f}" for part, size in self._asdict().items())
        return f"memory of a step, estimated: {sum(self) / unit:.2f} {name} ({parts})"


CPU_BYTES = 64 * 2**20  # of temporary results: more leaves the caches and gains nothing


def rows_at_once(bytes_per_row: int, device: torch.device) -> int:
    """Rows to compute together, at least one: those whose temporary results fit into half of a GPU's free memory, or
    into `CPU_BYTES`.
    """
    free = CPU_BYTES
    if device.type == "cuda":
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)  # held by the allocator
        free = (torch.cuda.mem_get_info(device)[0] + unused) // 2
    return max(1, free // bytes_per_row)


def local_bytes(tensors: Iterable[Tensor]) -> int:
    """Bytes that tensors take on this process: of sharded ones, their shard."""
    return sum(t.numel() * t.element_size() for t in map(_local, tensors))


def saved_bytes(model: nn.Module, compute: Callable[[], Tensor]) -> int:
    """Bytes that the graph of `compute()` keeps for its backward, without the model's own weights and buffers.

    Args:
        model: owner of the weights.
        compute: a forward; its result is dropped.
    """
    # told apart by their own address, not that of their data, which sizes without data (FakeTensorMode) lack
    owned = {_local(t).untyped_storage()._cdata for t in (*model.parameters(), *model.buffers())}
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in owned:
            kept[storage._cdata] = storage.nbytes()
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        result = compute()  # alive until the sum is taken: a storage that is freed could lend its address
    total = sum(kept.values())
    del result
    return total


def estimate(model: nn.Module, compute: Callable[[int], Tensor], rows: int, unit: int, ema: bool) -> Memory:
    """Memory of a training step, from two small forwards: what is kept is a constant and a share per row.

    Args:
        model: with its frozen parameters marked.
        compute: forward of so many rows.
        rows: of a micro-batch.
        unit: rows of the smaller of the two forwards; the other has twice as many.
        ema: whether an average of the weights is kept.
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
