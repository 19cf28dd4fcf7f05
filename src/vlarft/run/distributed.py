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

    Where there are GPUs, process LOCAL_RANK of each node takes that one of the node's, and tensors on GPUs go by NCCL;
    those on the CPU always go by gloo. Without torchrun's variables nothing is started. With `torchrun --max-restarts`
    the processes meet at the port after torchrun's.

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
            # torchrun keeps its store when it starts the processes again, and in it the addresses of those that are
            # gone, to which the new ones would try to connect for half an hour; rank 0 opens one beside it instead
            os.environ["TORCHELASTIC_USE_AGENT_STORE"] = "False"
            os.environ["MASTER_PORT"] = str(int(os.environ["MASTER_PORT"]) + 1)
        # the others wait while the main process plays episodes; torchrun does not need a timeout to end them
        timeout = timedelta(hours=1)
        if device.type == "cuda":  # the device: communicators are made now, and not guessed from the rank
            dist.init_process_group("cpu:gloo,cuda:nccl", timeout=timeout, device_id=device)
        else:
            dist.init_process_group("gloo", timeout=timeout)
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


def part() -> tuple[int, int]:
    """This process's (number, count) of the equal shares of a batch."""
    return rank(), world_size()


def own_rows(values: Tensor) -> Tensor:
    """This process's rows of a tensor that was made for the whole batch."""
    return values.chunk(world_size())[rank()]


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


def shard(
    module: nn.Module,
    blocks: Iterable[nn.Module] = (),
    methods: Iterable[str] = (),
    *,
    frozen: Frozen = "shard",
    bf16: bool = False,
) -> nn.Module:
    """Shard a module's parameters over all processes (FSDP2), each of `blocks` as a unit of its own; one process:
    unchanged.

    Gradients are averaged over processes, in float32. Only calls that pass through the wrapped module's `forward`, or
    through one of `methods`, gather the parameters, so name here every method that training calls.

    Args:
        module: wrapped in place.
        blocks: sub-modules that are gathered one at a time, innermost first.
        methods: methods of `module`, besides forward, that use its parameters.
        frozen: whether parameters without gradients are sharded as the others are, or stay whole on every process,
            which takes memory and saves gathering them.
        bf16: gather the blocks' parameters in bfloat16: half the messages. For blocks that run under bfloat16 autocast,
            which would cast the weights of their matrices anyway. The shards, the parameters outside of blocks and the
            sums of gradients stay float32.
    """
    if world_size() == 1:
        return module
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method

    device = next(module.parameters()).device
    mesh = init_device_mesh(device.type, (world_size(),))
    left = {p for p in module.parameters() if not p.requires_grad} if frozen == "replicate" else set()
    half = MixedPrecisionPolicy(torch.bfloat16, reduce_dtype=torch.float32, cast_forward_inputs=False)
    for block in blocks:
        if left.issuperset(block.parameters()):
            continue
        # torch's norms on the CPU refuse bfloat16 weights beside float32 inputs; on a GPU autocast casts both
        refuses = device.type == "cpu" and any(isinstance(m, nn.LayerNorm | nn.GroupNorm) for m in block.modules())
        policy = half if bf16 and not refuses else MixedPrecisionPolicy()
        fully_shard(block, mesh=mesh, mp_policy=policy, ignored_params=left)
    # the default leaves the outermost module whole after a forward without backward (validation): its parameters would
    # then be plain tensors, and neither an average of weights nor a state dict could rely on finding shards
    fully_shard(module, mesh=mesh, reshard_after_forward=True, ignored_params=left)
    for name in methods:
        register_fsdp_forward_method(module, name)
    return module


def sync_gradients(module: nn.Module, sync: bool) -> None:
    """Whether the coming backwards average gradients over processes: off for all but the last micro-batch of a step."""
    if hasattr(module, "set_requires_gradient_sync"):  # of a sharded module
        module.set_requires_gradient_sync(sync)


def full_state_dict(module: nn.Module) -> dict[str, Tensor]:
    """State dict with whole tensors, on the main process; empty on the others. A collective call under FSDP."""
    whole = {}
    for key, value in module.state_dict().items():  # one tensor at a time is whole on every process
        value = value.full_tensor() if hasattr(value, "full_tensor") else value
        if is_main():
            whole[key] = value.cpu() if world_size() > 1 else value
    return whole


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


def place(value: Any, like: Any) -> Any:
    """This process's share of a whole tensor where `like` is sharded; anything else unchanged. A collective call."""
    if hasattr(like, "device_mesh") and isinstance(value, Tensor) and not hasattr(value, "device_mesh") and value.ndim:
        from torch.distributed.tensor import distribute_tensor

        return distribute_tensor(value.to(like.device), like.device_mesh, like.placements)
    return value


def empty_as(like: Tensor, shape: torch.Size, dtype: torch.dtype) -> Tensor:
    """Room for a tensor, sharded as `like` if that is sharded and of the same shape, else whole and on the CPU."""
    if not hasattr(like, "device_mesh") or like.shape != shape:
        return torch.empty(shape, dtype=dtype)
    from torch.distributed.tensor import empty

    return empty(shape, dtype=dtype, device_mesh=like.device_mesh, placements=like.placements)


def cpu_copy(value: Tensor) -> Tensor:
    """A copy on the CPU that later changes leave alone; of a sharded tensor, of this process's shard."""
    if not hasattr(value, "device_mesh"):
        return value.detach().to("cpu", copy=True)
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import DTensor

    mesh = value.device_mesh if value.device_mesh.device_type == "cpu" else init_device_mesh("cpu", (world_size(),))
    local = value.to_local().detach().to("cpu", copy=True)
    return DTensor.from_local(local, mesh, value.placements, run_check=False, shape=value.shape, stride=value.stride())


def load_optimizer_state(optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    """Load an optimizer's state dict, of whole tensors or of shards, into one whose parameters may be sharded."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    slots = {i: {k: place(v, parameters[i]) for k, v in entry.items()} for i, entry in state["state"].items()}
    optimizer.load_state_dict({"state": slots, "param_groups": state["param_groups"]})


def load_full_state_dict(module: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Load whole tensors, or shards, into a module that may be sharded."""
    own = module.state_dict()
    module.load_state_dict({key: place(value, own[key]) for key, value in tensors.items()})
