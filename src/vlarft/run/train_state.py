"""The state of a run: what it needs to go on, saved by any number of processes and resumed by any other.

    out_dir/model.safetensors          the model, whole, written by the first process
    out_dir/model_000400.safetensors   with `keep_interval`: a copy of it as it was after 400 steps
    out_dir/train_state.pt             networks, optimizers, step, ...
    out_dir/shards_a or shards_b       where several processes saved: the tensors of train_state.pt, each process's
                                       shards in a file of its own (torch.distributed.checkpoint)

Several processes fill the folder that train_state.pt does not name, and then train_state.pt, which names it, is moved
into place. So the file always stands for a whole state, whenever and wherever a kill or a full disk strikes. Processes
on several nodes need an out_dir that all of them share.
"""

import shutil
import sys
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from vlarft.run import distributed, preemption
from vlarft.run.checkpoint import load_train_state, save_model, save_train_state, write_atomic
from vlarft.run.ema import EMA
from vlarft.run.log import RunLog

Part = nn.Module | torch.optim.Optimizer | EMA | Mapping[str, Any]  # a mapping: of parts


class TrainState:
    """Saves and resumes a run.

    Args:
        out_dir: the run's folder.
        parts: what trains, by the names that it has in train_state.pt, sharded already where it is to be.
        asynchronous: `save` copies the state to the CPU and returns; a thread writes it while the run goes on. The copy
            takes as much memory as the state, in each process that of its shards.
        keep_interval: steps between copies of the model that later saves leave alone; None keeps the last model only.
    """

    def __init__(
        self,
        out_dir: str | Path,
        parts: Mapping[str, Part],
        asynchronous: bool = False,
        keep_interval: int | None = None,
    ) -> None:
        self.out_dir, self.parts, self.keep_interval = Path(out_dir), dict(parts), keep_interval
        self.writer = ThreadPoolExecutor(1, "checkpoint") if asynchronous else None
        self.pending: Future | None = None
        self.leaving = False  # told to stop
        self.shards: str | None = None  # the folder that train_state.pt names
        # messages of the thread that writes must not mix with those of the step that goes on: a group of its own
        self.group = dist.new_group(backend="gloo") if distributed.world_size() > 1 else None

    def load(self, **values: Any) -> tuple[Any, ...]:
        """Put the saved state, if there is one, into the parts, cut for this number of processes; a collective call.

        Args:
            values: plain values that were saved besides, in this order, with those of a run that starts anew; `step`
                is among them.

        Returns:
            The values.

        Raises:
            ValueError: the state is not readable, lacks a part or a value, or not all processes found the same one.
        """
        path = self.out_dir / "train_state.pt"
        state = load_train_state(path) if path.is_file() else values
        found = distributed.max_across_ranks({"last": state["step"], "first": -state["step"]})
        first, last = abs(int(found["first"])), int(found["last"])
        if first != last:
            raise ValueError(
                f"the processes found states of different steps, {first} to {last}: "
                f"{self.out_dir} must be a folder that all nodes share"
            )
        if state is values:
            return tuple(values.values())
        if missing := [name for name in (*self.parts, *values) if name not in state]:
            raise ValueError(
                f"{path} lacks {', '.join(missing)}: another version of this script wrote it; "
                "remove it to start the run anew, or choose another --out-dir"
            )
        self.shards = state.get("shards")
        if self.shards:
            self._read_shards(state)
        for name, part in self.parts.items():
            _load(part, state[name])
        return tuple(state[name] for name in values)

    def due(self, step: int, every: int) -> bool:
        """Whether to save after `step` steps: at multiples of `every` and of `keep_interval`, and when the run was told
        to stop; a collective call.
        """
        self.leaving = preemption.requested()
        if self.pending and self.pending.done():
            self.wait()  # a failed write is raised at the next step, not at the end of the run
        return self.leaving or step % every == 0 or self._keeps(step)

    def _keeps(self, step: int) -> bool:
        return self.keep_interval is not None and step % self.keep_interval == 0

    def save(
        self,
        values: Mapping[str, Any],
        model: nn.Module,
        config: Any,
        extra: dict[str, Any],
        weights: Mapping[str, Tensor] | None = None,
    ) -> None:
        """Write model.safetensors, its copy where `keep_interval` asks for one, and the state; a collective call.

        The model comes first: it is never older than the state that the run goes on from.

        Args:
            values: plain values, `step` among them.
            model, config, extra: see `checkpoint.save_model`.
            weights: whole tensors to write as the model, on the main process; None = the model's own.

        Raises:
            OSError: not writable, or no space left; what was saved before is whole.
            SystemExit: the run was told to stop (`due`), and now has been saved. The code is preemption.EXIT_CODE.
        """
        self.wait()
        if weights is None:
            weights = distributed.full_state_dict(model)
        state = {**values, **{name: _state(part) for name, part in self.parts.items()}}
        if self.writer is None:
            self._write(state, model, config, extra, weights)
        else:
            state, weights = (_map(tree, distributed.cpu_copy) for tree in (state, dict(weights)))
            self.pending = self.writer.submit(self._write, state, model, config, extra, weights)
        if self.leaving:
            self.wait()
            if self.group is not None:
                dist.barrier(self.group)  # torchrun ends all processes once one has left
            if distributed.is_main():
                print(
                    f"told to stop: saved step {values['step']} in {self.out_dir}; the same command goes on from there",
                    file=sys.stderr,
                )
            distributed.cleanup()
            raise SystemExit(preemption.EXIT_CODE)

    def wait(self) -> None:
        """Wait for a write that is under way, and raise what it raised."""
        pending, self.pending = self.pending, None
        if pending:
            pending.result()

    def finish(self, log: RunLog) -> None:
        """End a run: wait for its last write, close its log, leave the process group."""
        self.wait()
        log.close()
        distributed.cleanup()

    def _write(self, state: dict, model: nn.Module, config: Any, extra: dict, weights: Mapping[str, Tensor]) -> None:
        if distributed.is_main():
            path = self.out_dir / "model.safetensors"
            save_model(path, model, config, extra, weights)
            if self._keeps(state["step"]):
                kept = self.out_dir / f"model_{state['step']:06d}.safetensors"
                write_atomic(kept, lambda tmp: shutil.copyfile(path, tmp))
        folder = None
        if self.group is not None:
            folder = "shards_b" if self.shards == "shards_a" else "shards_a"
            self._write_shards(self.out_dir / folder, state)
            state = {**_map(state, lambda t: torch.empty(t.shape, dtype=t.dtype, device="meta")), "shards": folder}
        if distributed.is_main():
            save_train_state(self.out_dir, state)
            if self.shards and self.shards != folder:
                shutil.rmtree(self.out_dir / self.shards, ignore_errors=True)
        self.shards = folder

    def _write_shards(self, folder: Path, state: dict) -> None:
        import torch.distributed.checkpoint as dcp
        from torch.distributed.checkpoint.api import CheckpointException

        if distributed.is_main():  # the others write nothing before all have agreed on a plan
            shutil.rmtree(folder, ignore_errors=True)
        tensors = {_name(path): value for path, value in _leaves(state)}
        try:
            dcp.save(tensors, storage_writer=dcp.FileSystemWriter(folder), process_group=self.group)
        except CheckpointException as error:
            if distributed.is_main():
                shutil.rmtree(folder, ignore_errors=True)
            reasons = "; ".join(f"process {rank}: {e}" for rank, (e, _) in sorted(error.failures.items()))
            raise OSError(
                f"could not write the shards in {folder} ({reasons}). What was saved before is untouched: "
                "free some space and give the same command again"
            ) from error

    def _read_shards(self, state: dict) -> None:
        """Fill the tensors of `state`, which are mere sizes, each process with its shards."""
        import torch.distributed.checkpoint as dcp
        from torch.distributed.checkpoint.api import CheckpointException

        folder = self.out_dir / self.shards
        room, targets = {}, _targets(self.parts)
        for path, size in _leaves({name: state[name] for name in self.parts}):
            room[_name(path)] = distributed.empty_as(_target(targets, path), size.shape, size.dtype)
        try:
            alone = self.group is None
            dcp.load(room, storage_reader=dcp.FileSystemReader(folder), process_group=self.group, no_dist=alone)
        except CheckpointException as error:
            reason = next(str(e) for e, _ in error.failures.values())
            raise ValueError(
                f"{folder}, the tensors of {self.out_dir / 'train_state.pt'}, is not readable ({reason}); "
                "remove both to start the run anew"
            ) from error
        for path in [path for path, _ in _leaves({name: state[name] for name in self.parts})]:
            branch = state
            for key in path[:-1]:
                branch = branch[key]
            branch[path[-1]] = room[_name(path)]


def _state(part: Part) -> dict:
    if isinstance(part, Mapping):
        return {name: _state(inner) for name, inner in part.items()}
    return part.state_dict()


def _load(part: Part, state: dict) -> None:
    if isinstance(part, Mapping):
        for name, inner in part.items():
            _load(inner, state[name])
    elif isinstance(part, nn.Module):
        distributed.load_full_state_dict(part, state)
    elif isinstance(part, torch.optim.Optimizer):
        distributed.load_optimizer_state(part, state)
    else:
        part.load_state_dict(state)


def _targets(part: Part) -> dict:
    """The tensors as which those of a part's state are sharded: of an optimizer's, the parameters."""
    if isinstance(part, Mapping):
        return {name: _targets(inner) for name, inner in part.items()}
    if isinstance(part, nn.Module):
        return part.state_dict()
    if isinstance(part, torch.optim.Optimizer):
        return {"state": dict(enumerate(p for group in part.param_groups for p in group["params"]))}
    return dict(enumerate(part.parameters))


def _target(targets: dict, path: tuple) -> Tensor:
    for key in path:
        targets = targets[key]
        if isinstance(targets, Tensor):  # the path goes on with "exp_avg"
            return targets
    raise KeyError(path)


def _name(path: tuple) -> str:
    return "/".join(map(str, path))


def _leaves(tree: Mapping, path: tuple = ()) -> Iterator[tuple[tuple, Tensor]]:
    """The tensors of a tree of dicts and their paths."""
    for key, value in tree.items():
        if isinstance(value, Mapping):
            yield from _leaves(value, (*path, key))
        elif isinstance(value, Tensor):
            yield (*path, key), value


def _map(tree: Mapping, change: Callable[[Tensor], Tensor]) -> dict:
    """The tree with its tensors changed."""

    def changed(value: Any) -> Any:
        if isinstance(value, Mapping):
            return _map(value, change)
        return change(value) if isinstance(value, Tensor) else value

    return {key: changed(value) for key, value in tree.items()}
