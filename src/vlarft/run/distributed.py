"""Data parallelism under torchrun: FSDP2 (`fully_shard`) on many processes, plain modules on one.

Every function also works without torchrun: one process, rank 0, no process group.
"""

import os
from collections.abc import Iterable, Mapping
from datetime import timedelta
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

Frozen = Literal["shard", "replicate"]


def setup() -> torch.device:
    """Join the process group that torchrun describes in the environment; return this process's device.

    With GPUs, process LOCAL_RANK of a node takes the GPU of that number. GPU tensors are sent by NCCL, CPU tensors by
    gloo. Without torchrun's environment variables no group is started. With `torchrun --max-restarts` the processes
    meet at the port after torchrun's.

    Raises:
        ValueError: more processes on this node than GPUs.
    """
    local_rank = int(os.environ.get("LOCAL_RANK", 0))
    device = torch.device("cpu")
    if torch.cuda.is_available():
        gpus = torch.cuda.device_count()
        if local_rank >= gpus:
            raise ValueError(
                f"this node has more processes than GPUs, of which it has {gpus}: give torchrun --nproc-per-node {gpus}"
            )
        device = torch.device("cuda", local_rank)
        torch.cuda.set_device(device)
    if int(os.environ.get("WORLD_SIZE", 1)) > 1 and not dist.is_initialized():
        if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True" and os.environ["TORCHELASTIC_MAX_RESTARTS"] != "0":
            # torchrun keeps its key-value store over a restart, with the addresses of the processes that died; new ones
            # would try to connect to them for half an hour. So rank 0 opens a fresh store at the next port
            os.environ["TORCHELASTIC_USE_AGENT_STORE"] = "False"
            os.environ["MASTER_PORT"] = str(int(os.environ["MASTER_PORT"]) + 1)
        # long: the others wait while the main process plays episodes; if one dies, torchrun ends the rest anyway
        timeout = timedelta(hours=1)
        if device.type == "cuda":  # with device_id NCCL connects now, and does not guess the device from the rank
            dist.init_process_group("cpu:gloo,cuda:nccl", timeout=timeout, device_id=device)
        else:
            dist.init_process_group("gloo", timeout=timeout)
    return device


def cleanup() -> None:
    """Leave the process group, if there is one."""
    if dist.is_initialized():
        dist.destroy_process_group()


def rank() -> int:
    """Return the index of this process, 0 without a process group."""
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    """Return the number of processes, 1 without a process group."""
    return dist.get_world_size() if dist.is_initialized() else 1


def part() -> tuple[int, int]:
    """Return (number, count): this process takes part `number` of `count` equal parts of a batch."""
    return rank(), world_size()


def own_rows(values: Tensor) -> Tensor:
    """Return this process's rows of a tensor made for the whole batch (same seed, same tensor on every process)."""
    return values.chunk(world_size())[rank()]


def is_main() -> bool:
    """Return whether this process writes logs and checkpoints."""
    return rank() == 0


def check_batch(global_batch: int, accumulate: int = 1) -> None:
    """Check that a batch divides into the micro-batches of all processes, `accumulate` each.

    Raises:
        ValueError: the global batch is not a multiple of processes x micro-batches.
    """
    if accumulate < 1 or global_batch % (world_size() * accumulate):
        parts = f"{world_size()} processes" + (f" x {accumulate} micro-batches" if accumulate != 1 else "")
        raise ValueError(f"batch size {global_batch} does not divide by {parts}; choose a multiple")


def recompute(blocks: Iterable[nn.Module]) -> None:
    """Checkpoint activations: drop those inside each block after its forward, recompute them in its backward.

    Memory falls to the inputs of all blocks and one block's activations, for a third more computation; the gradients
    are the same. Call it before `shard`: a block's parameters are then gathered once for recomputation and backward.

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
        block.forward = wrap(block.forward)  # on the instance: a wrapper module would rename the parameters


def shard(
    module: nn.Module,
    blocks: Iterable[nn.Module] = (),
    methods: Iterable[str] = (),
    *,
    frozen: Frozen = "shard",
    bf16: bool = False,
) -> nn.Module:
    """Shard a module's parameters over all processes (FSDP2), block by block; with one process, change nothing.

    Gradients are averaged over processes in float32. Parameters are gathered only by calls of the module's `forward`
    and of `methods`, so list every other method that training calls.

    Args:
        module: wrapped in place.
        blocks: sub-modules that are gathered one at a time, innermost first.
        methods: methods of `module`, besides forward, that use its parameters.
        frozen: shard parameters without gradients like the others, or replicate them on every process, which takes
            memory but saves gathering them.
        bf16: gather the blocks' parameters in bfloat16, which halves the messages. For blocks that run under bfloat16
            autocast, which casts the weights of matrix products anyway. Shards, parameters outside blocks and sums of
            gradients stay float32.
    """
    if world_size() == 1:
        return module
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method

    device = next(module.parameters()).device
    mesh = init_device_mesh(device.type, (world_size(),))
    replicated = {p for p in module.parameters() if not p.requires_grad} if frozen == "replicate" else set()
    # inputs keep their dtype: autocast casts them operation by operation, as on one process
    half = MixedPrecisionPolicy(torch.bfloat16, reduce_dtype=torch.float32, cast_forward_inputs=False)
    for block in blocks:  # innermost first: a unit owns the parameters that no earlier unit took
        if replicated.issuperset(block.parameters()):
            continue  # nothing to shard
        # torch's norms on the CPU refuse bfloat16 weights beside float32 inputs; on a GPU autocast casts both
        refuses = device.type == "cpu" and any(isinstance(m, nn.LayerNorm | nn.GroupNorm) for m in block.modules())
        policy = half if bf16 and not refuses else MixedPrecisionPolicy()
        fully_shard(block, mesh=mesh, mp_policy=policy, ignored_params=replicated)
    # by default the outermost module stays gathered after a forward without backward (validation); its parameters would
    # then be plain tensors, while the moving average and the state dict expect shards
    fully_shard(module, mesh=mesh, reshard_after_forward=True, ignored_params=replicated)
    for name in methods:
        register_fsdp_forward_method(module, name)
    return module


def sync_gradients(module: nn.Module, sync: bool) -> None:
    """Average gradients over processes in the next backward passes, or not: only a step's last micro-batch needs it."""
    if hasattr(module, "set_requires_gradient_sync"):  # only sharded modules have it
        module.set_requires_gradient_sync(sync)


def full_state_dict(module: nn.Module) -> dict[str, Tensor]:
    """Return the state dict with whole tensors on the main process, {} on the others; a collective call under FSDP."""
    whole = {}
    for key, value in module.state_dict().items():  # one tensor at a time, so that GPUs hold one whole tensor at most
        # an all-gather: every process must call it, also those that drop the result
        value = value.full_tensor() if hasattr(value, "full_tensor") else value
        if is_main():
            whole[key] = value.cpu() if world_size() > 1 else value
    return whole


def mean_across_ranks(metrics: Mapping[str, float | Tensor]) -> dict[str, float]:
    """Average each metric over processes, in float64. A collective call: all must pass the same names in one order."""
    values = torch.tensor([float(v) for v in metrics.values()], dtype=torch.float64)
    if world_size() > 1:
        if torch.cuda.is_available():
            values = values.cuda()
        dist.all_reduce(values)
        values = values.cpu() / world_size()
    return dict(zip(metrics, values.tolist(), strict=True))


def max_across_ranks(metrics: Mapping[str, float]) -> dict[str, float]:
    """Return the largest value of each metric over processes, in float64; a collective call."""
    values = torch.tensor([float(v) for v in metrics.values()], dtype=torch.float64)
    if world_size() > 1:
        values = values.cuda() if torch.cuda.is_available() else values
        dist.all_reduce(values, dist.ReduceOp.MAX)
    return dict(zip(metrics, values.tolist(), strict=True))


def mean_tensor(value: Tensor) -> Tensor:
    """Average a tensor over processes; a collective call."""
    if world_size() == 1:
        return value
    value = value.clone()  # all_reduce works in place
    dist.all_reduce(value)
    return value / world_size()


def clip_grad_norm(parameters: Iterable[nn.Parameter], max_norm: float) -> float:
    """Scale gradients to a global norm of at most `max_norm`; return the norm before."""
    norm = nn.utils.clip_grad_norm_(list(parameters), max_norm)  # under FSDP a DTensor: the norm over all shards
    return float(norm.full_tensor() if hasattr(norm, "full_tensor") else norm)


def place(value: Any, like: Any) -> Any:
    """Shard a whole tensor the way `like` is sharded; return anything else unchanged. A collective call."""
    # scalars, such as Adam's step, have nothing to shard
    if hasattr(like, "device_mesh") and isinstance(value, Tensor) and not hasattr(value, "device_mesh") and value.ndim:
        from torch.distributed.tensor import distribute_tensor

        return distribute_tensor(value.to(like.device), like.device_mesh, like.placements)
    return value


def empty_as(like: Tensor, shape: torch.Size, dtype: torch.dtype) -> Tensor:
    """Allocate a tensor, sharded the way `like` is if both have one shape, else whole and on the CPU."""
    if not hasattr(like, "device_mesh") or like.shape != shape:
        return torch.empty(shape, dtype=dtype)
    from torch.distributed.tensor import empty

    return empty(shape, dtype=dtype, device_mesh=like.device_mesh, placements=like.placements)


def cpu_copy(value: Tensor) -> Tensor:
    """Copy a tensor to the CPU, safe from later in-place changes; of a sharded tensor, copy this process's shard."""
    if not hasattr(value, "device_mesh"):
        return value.detach().to("cpu", copy=True)
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import DTensor

    mesh = value.device_mesh if value.device_mesh.device_type == "cpu" else init_device_mesh("cpu", (world_size(),))
    local = value.to_local().detach().to("cpu", copy=True)
    # shape and stride are given because shards may be uneven; run_check would send messages
    return DTensor.from_local(local, mesh, value.placements, run_check=False, shape=value.shape, stride=value.stride())


def load_optimizer_state(optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    """Load a state dict, whole tensors or shards, into an optimizer whose parameters may be sharded.

    Raises:
        ValueError: it is of other parameters; fused optimizers would write beyond smaller moments.
    """
    # state dicts number the parameters over all groups, in this order
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    for i, entry in state["state"].items():
        for name, value in entry.items():
            if value.ndim and value.shape != parameters[i].shape:
                expected = tuple(parameters[i].shape)
                raise ValueError(f"{name} of parameter {i} has shape {tuple(value.shape)}, expected {expected}")
    slots = {i: {k: place(v, parameters[i]) for k, v in entry.items()} for i, entry in state["state"].items()}
    optimizer.load_state_dict({"state": slots, "param_groups": state["param_groups"]})


def load_full_state_dict(module: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Load whole tensors, or shards, into a module that may be sharded."""
    current = module.state_dict()
    module.load_state_dict({key: place(value, current[key]) for key, value in tensors.items()})
