"""Data parallelism under torchrun: FSDP2 (`fully_shard`) on many processes, plain modules on one.

Every function also works without torchrun: one process, rank 0, no process group.
"""

import os
from collections.abc import Iterable, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint


def setup() -> torch.device:
    """Join the process group that torchrun describes in the environment; return this process's device.

    Uses NCCL and one GPU a process where there are GPUs, gloo on the CPU otherwise. Without torchrun's variables
    nothing is started.
    """
    local_rank = int(os.environ.get("LOCAL_RANK", 0))
    device = torch.device("cuda", local_rank) if torch.cuda.is_available() else torch.device("cpu")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if "WORLD_SIZE" in os.environ and int(os.environ["WORLD_SIZE"]) > 1 and not dist.is_initialized():
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    return device


def cleanup() -> None:
    """Leave the process group, if there is one."""
    if dist.is_initialized():
        dist.destroy_process_group()


def rank() -> int:
    """Index of this process, 0 without a process group."""
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    """Number of processes, 1 without a process group."""
    return dist.get_world_size() if dist.is_initialized() else 1


def is_main() -> bool:
    """Whether this process writes logs and checkpoints."""
    return rank() == 0


def local_batch(global_batch: int, accumulate: int = 1) -> int:
    """Rows of one of this process's `accumulate` micro-batches.

    Raises:
        ValueError: the global batch does not divide by the number of processes times that of micro-batches.
    """
    if accumulate < 1 or global_batch % (world_size() * accumulate):
        parts = f"{world_size()} processes" + (f" x {accumulate} micro-batches" if accumulate != 1 else "")
        raise ValueError(f"batch size {global_batch} does not divide by {parts}; choose a multiple")
    return global_batch // (world_size() * accumulate)


def recompute(blocks: Iterable[nn.Module]) -> None:
    """Forget the activations inside each block after its forward and compute them again in its backward.

    Memory falls to one block's activations and the inputs of all, for a third more computation; the gradients are the
    same. Call it before `shard`: the parameters are then gathered once for both, recomputation and backward.

    Args:
        blocks: changed in place, none inside another; their names and state dicts stay.
    """

    def wrap(forward: Any) -> Any:
        def recomputed(*inputs: Any) -> Any:
            if not torch.is_grad_enabled():
                return forward(*inputs)
            return checkpoint(forward, *inputs, use_reentrant=False)

        return recomputed

    for block in blocks:
        block.forward = wrap(block.forward)


def shard(module: nn.Module, blocks: Iterable[nn.Module] = (), methods: Iterable[str] = ()) -> nn.Module:
    """Shard a module's parameters over all processes (FSDP2), each of `blocks` as a unit of its own; one process:
    unchanged.

    Gradients are averaged over processes. Only calls that pass through the wrapped module's `forward`, or through one
    of `methods`, gather the parameters, so name here every
    method that training calls.

    Args:
        module: wrapped in place.
        blocks: sub-modules that are gathered one at a time, innermost first.
        methods: methods of `module`, besides forward, that use its parameters.
    """
    if world_size() == 1:
        return module
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method

    device = next(module.parameters()).device
    mesh = init_device_mesh(device.type, (world_size(),))
    for block in blocks:
        fully_shard(block, mesh=mesh)
    # the default leaves the outermost module whole after a forward without backward (validation): its parameters would
    # then be plain tensors, and neither an average of weights nor a state dict could rely on finding shards
    fully_shard(module, mesh=mesh, reshard_after_forward=True)
    for name in methods:
        register_fsdp_forward_method(module, name)
    return module


def sync_gradients(module: nn.Module, sync: bool) -> None:
    """Whether the coming backwards average gradients over processes: off for all but the last micro-batch of a step."""
    if hasattr(module, "set_requires_gradient_sync"):  # of a sharded module
        module.set_requires_gradient_sync(sync)


def full_tensor(value: Any) -> Any:
    """A sharded tensor gathered to a plain CPU tensor (a collective call); anything else unchanged."""
    if hasattr(value, "full_tensor"):
        return value.full_tensor().cpu()
    return value


def full_state_dict(module: nn.Module) -> dict[str, Tensor]:
    """State dict with whole tensors on every process; a collective call under FSDP."""
    return {k: full_tensor(v) for k, v in module.state_dict().items()}


def mean_across_ranks(metrics: Mapping[str, float | Tensor]) -> dict[str, float]:
    """Average of each metric over processes, in float64; a collective call."""
    values = torch.tensor([float(v) for v in metrics.values()], dtype=torch.float64)
    if world_size() > 1:
        if torch.cuda.is_available():
            values = values.cuda()
        dist.all_reduce(values)
        values = values.cpu() / world_size()
    return dict(zip(metrics, values.tolist(), strict=True))


def max_across_ranks(metrics: Mapping[str, float]) -> dict[str, float]:
    """Largest value of each metric over processes, in float64; a collective call."""
    values = torch.tensor([float(v) for v in metrics.values()], dtype=torch.float64)
    if world_size() > 1:
        values = values.cuda() if torch.cuda.is_available() else values
        dist.all_reduce(values, dist.ReduceOp.MAX)
    return dict(zip(metrics, values.tolist(), strict=True))


def mean_tensor(value: Tensor) -> Tensor:
    """Average of a tensor over processes; a collective call."""
    if world_size() == 1:
        return value
    value = value.clone()
    dist.all_reduce(value)
    return value / world_size()


def clip_grad_norm(parameters: Iterable[nn.Parameter], max_norm: float) -> float:
    """Scale gradients to a global norm of at most `max_norm`; return the norm before."""
    norm = nn.utils.clip_grad_norm_(list(parameters), max_norm)
    return float(norm.full_tensor() if hasattr(norm, "full_tensor") else norm)


def optimizer_state(optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Optimizer state with whole CPU tensors (a collective call under FSDP), fit for `torch.save`."""
    state = optimizer.state_dict()
    gathered = {i: {k: full_tensor(v) for k, v in slots.items()} for i, slots in state["state"].items()}
    return {"state": gathered, "param_groups": state["param_groups"]}


def load_optimizer_state(optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    """Load what `optimizer_state` returned, cutting whole tensors into this process's shards where parameters are
    sharded.
    """
    parameters = [p for group in optimizer.param_groups for p in group["params"]]

    def place(index: int, value: Any) -> Any:
        parameter = parameters[index]
        if isinstance(value, Tensor) and value.ndim and hasattr(parameter, "device_mesh"):
            from torch.distributed.tensor import distribute_tensor

            return distribute_tensor(value.to(parameter.device), parameter.device_mesh, parameter.placements)
        return value

    slots = {i: {k: place(i, v) for k, v in entry.items()} for i, entry in state["state"].items()}
    optimizer.load_state_dict({"state": slots, "param_groups": state["param_groups"]})


def load_full_state_dict(module: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Load whole tensors into a module that may be sharded."""
    own = module.state_dict()
    placed = {}
    for key, value in tensors.items():
        target = own[key]
        if hasattr(target, "device_mesh"):
            from torch.distributed.tensor import distribute_tensor

            value = distribute_tensor(value.to(target.device), target.device_mesh, target.placements)
        placed[key] = value
    module.load_state_dict(placed)
