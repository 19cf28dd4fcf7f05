"""The state of a run, saved by any number of processes and resumed by any other number.

    out_dir/model.safetensors          the model, whole, written by the first process
    out_dir/model_000400.safetensors   with `keep_interval`: a copy of the model after 400 steps
    out_dir/train_state.pt             networks, optimizers, step, ...
    out_dir/shards_a or shards_b       if several processes saved: the tensors of train_state.pt, one file of shards per
                                       process (torch.distributed.checkpoint)

Several processes fill the shards folder that train_state.pt does not name; then a new train_state.pt, which names it,
is moved into place. So train_state.pt names a complete state at all times, even if a save is killed or the disk fills
up. Processes on several nodes need a shared out_dir.

train_state.pt is read with `weights_only`, which executes nothing. The index of the shards is a pickle: go on from
states of several processes only where you trust who wrote them.
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
from vlarft.run.checkpoint import load_train_state, read_header, save_model, save_train_state, write_atomic
from vlarft.run.ema import EMA
from vlarft.run.log import RunLog

EPISODES = "train_episodes", "held_out_episodes"  # lists of names in a model's file

Part = nn.Module | torch.optim.Optimizer | EMA | Mapping[str, Any]  # a mapping: of parts


class TrainState:
    """Saves and resumes a run.

    Args:
        out_dir: the run's folder.
        parts: networks, optimizers and averages by their names in train_state.pt; networks sharded already.
        asynchronous: `save` copies the state to the CPU and returns; a thread writes it while training goes on. The
            copy takes as much memory as the state (each process copies its shards).
        keep_interval: steps between copies of the model that later saves do not overwrite; None keeps the last only.
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
        # the writing thread needs a separate group: collectives match by order, and training goes on with others
        self.group = dist.new_group(backend="gloo") if distributed.world_size() > 1 else None

    def load(self, **values: Any) -> tuple[Any, ...]:
        """Load the saved state, if any, into the parts, sharded for today's number of processes; a collective call.

        Args:
            values: plain values saved beside the parts, each with its value for a new run; `step` is one of them.

        Returns:
            The values, in the order of the arguments.

        Raises:
            ValueError: the state is not readable, lacks a part or a value, holds other networks, or differs between
                processes.
        """
        path = self.out_dir / "train_state.pt"
        state = load_train_state(path) if path.is_file() else values
        if missing := [name for name in (*self.parts, *values) if name not in state and state is not values]:
            raise ValueError(
                f"{path} lacks {', '.join(missing)}: another version of this script wrote it; "
                "remove it to start the run anew, or choose another --out-dir"
            )
        # nodes with local disks would resume from different steps; the minimum is the maximum of the negative
        steps = distributed.max_across_ranks({"last": state["step"], "first": -state["step"]})
        first, last = abs(int(steps["first"])), int(steps["last"])
        if first != last:
            raise ValueError(
                f"the processes found states of different steps, {first} to {last}: "
                f"{self.out_dir} must be a folder that all nodes share"
            )
        if state is values:
            return tuple(values.values())
        self.shards = state.get("shards")
        if self.shards not in (None, "shards_a", "shards_b"):  # a later save removes the folder
            raise ValueError(f"{path} names the folder {self.shards!r}, expected shards_a or shards_b")
        if self.shards:
            self._read_shards(state)
        for name, part in self.parts.items():
            try:
                _load(part, state[name])
            except (RuntimeError, ValueError, LookupError, TypeError) as error:  # missing weights, other shapes
                raise ValueError(
                    f"{path}: {name} has other weights than today's networks of this size ({error}); finish the run "
                    "with the version that began it, or choose another --out-dir"
                ) from error
        return tuple(state[name] for name in values)

    def due(self, step: int, every: int) -> bool:
        """Return whether to save after `step` steps: at multiples of `every` and of `keep_interval`, and if the run was
        told to stop; a collective call.
        """
        self.leaving = preemption.requested()
        if self.pending and self.pending.done():
            self.wait()  # raise a failed write at the next step, not at the end of the run
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
        """Write model.safetensors, its copy if `keep_interval` asks for one, and the state; a collective call.

        The model is written first, so it is never older than the state that a resume starts from.

        Args:
            values: plain values; `step` is one of them.
            model, config, extra: see `checkpoint.save_model`.
            weights: whole tensors to write as the model, on the main process; None = the model's weights.

        Raises:
            OSError: not writable, or no space left; the previous save is untouched.
            FloatingPointError: a weight is not finite; nothing is written.
            SystemExit: the run was told to stop (`due`) and is saved; the code is preemption.EXIT_CODE.
        """
        self.wait()
        if weights is None:
            weights = distributed.full_state_dict(model)
        wrong = [name for name, value in weights.items() if not value.isfinite().all()]
        if distributed.max_across_ranks({"wrong": len(wrong)})["wrong"]:  # the main process alone has the weights
            raise FloatingPointError(
                f"NaN or infinite weights after {values['step']} steps ({', '.join(wrong[:3])}): not saved; begin in "
                "another --out-dir with a lower learning rate"
            )
        state = {**values, **{name: _state(part) for name, part in self.parts.items()}}
        if self.writer is None:
            self._write(state, model, config, extra, weights)
        else:
            # the next step changes weights and moments in place: the thread gets a copy
            state, weights = (_map(tree, distributed.cpu_copy) for tree in (state, dict(weights)))
            self.pending = self.writer.submit(self._write, state, model, config, extra, weights)
        if self.leaving:
            self.wait()
            if self.group is not None:
                dist.barrier(self.group)  # torchrun ends all processes once one has left, so leave when all have saved
            if distributed.is_main():
                print(
                    f"told to stop: saved step {values['step']} in {self.out_dir}; the same command goes on from there",
                    file=sys.stderr,
                )
            distributed.cleanup()
            raise SystemExit(preemption.EXIT_CODE)

    def wait(self) -> None:
        """Wait for the write in progress, if any, and raise its error."""
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
        folder = None  # one process: the tensors are in train_state.pt
        if self.group is not None:
            # never the folder that train_state.pt names: after a kill the run resumes from it
            folder = "shards_b" if self.shards == "shards_a" else "shards_a"
            self._write_shards(self.out_dir / folder, state)
            # train_state.pt keeps shapes and dtypes: `load` allocates by them before it reads the shards
            state = {**_map(state, lambda t: torch.empty(t.shape, dtype=t.dtype, device="meta")), "shards": folder}
        if distributed.is_main():
            save_train_state(self.out_dir, state)
            if self.shards and self.shards != folder:
                shutil.rmtree(self.out_dir / self.shards, ignore_errors=True)
        self.shards = folder

    def _write_shards(self, folder: Path, state: dict) -> None:
        import torch.distributed.checkpoint as dcp
        from torch.distributed.checkpoint.api import CheckpointException

        # no race: dcp.save starts with a plan that the main process makes, so the others write after this removal
        if distributed.is_main():
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
        """Replace the meta tensors of `state` by real ones, on each process its shards."""
        import torch.distributed.checkpoint as dcp
        from torch.distributed.checkpoint.api import CheckpointException

        folder = self.out_dir / self.shards
        room, targets = {}, _targets(self.parts)
        for path, meta in _leaves({name: state[name] for name in self.parts}):
            try:
                target = _target(targets, path)
            except LookupError:
                target = None
            if target is None or meta.shape not in (target.shape, torch.Size()):  # () is AdamW's step
                raise ValueError(
                    f"{self.out_dir / 'train_state.pt'}: {_name(path)} of shape {tuple(meta.shape)} does not fit "
                    "today's networks of this size; choose another --out-dir"
                )
            # sharded for today's processes: dcp.load cuts the saved shards to fit, however many processes saved them
            room[_name(path)] = distributed.empty_as(target, meta.shape, meta.dtype)
        try:
            alone = self.group is None
            dcp.load(room, storage_reader=dcp.FileSystemReader(folder), process_group=self.group, no_dist=alone)
        except CheckpointException as error:
            reason = next(str(e) for e, _ in error.failures.values())
            raise ValueError(
                f"{folder}, the tensors of {self.out_dir / 'train_state.pt'}, is not readable ({reason}); "
                "remove both to start the run anew"
            ) from error
        for path in [path for path, _ in _leaves({name: state[name] for name in self.parts})]:  # a list: state changes
            branch = state
            for key in path[:-1]:
                branch = branch[key]
            branch[path[-1]] = room[_name(path)]


def check_same_episodes(out_dir: str | Path, facts: Mapping[str, Any]) -> None:
    """Check that a run goes on with the episodes that it began with: others would move what it holds out.

    Args:
        out_dir: the run's folder; a new run has no state there.
        facts: of the episodes, as they go into the model's file: lists of names, EPISODES or others ending like them;
            `episode_digests`, and `mean_frame`, see `image_convention`, which are compared where both have them.

    Raises:
        ValueError: episodes were added, removed, renamed or converted since.
    """
    folder = Path(out_dir)
    if not (folder / "train_state.pt").is_file() or not (folder / "model.safetensors").is_file():
        return
    before = read_header(folder / "model.safetensors").extra
    advice = "Give those that it was begun with, or choose another --out-dir"
    for part in (name for name in facts if name.endswith("_episodes")):
        other = set(before.get(part, facts[part])) ^ set(facts[part])
        if other:
            raise ValueError(
                f"{folder} was begun with {len(before[part])} {part.replace('_', ' ')}, today there are "
                f"{len(facts[part])} (first that differs: {min(other)}): the files in --demos have changed, and with "
                f"them what is learned from and held out. {advice}"
            )
    known, today = (of.get("episode_digests", {}) for of in (before, facts))
    frames = [of.get("mean_frame") for of in (before, facts)]
    changed = any(known.get(name, digest) != digest for name, digest in today.items())
    if None not in frames:  # equal but for what another decoder rounds otherwise
        changed |= bool((torch.tensor(frames[0]) - torch.tensor(frames[1])).abs().mean() > 0.02)
    if changed:
        raise ValueError(
            f"{folder} was begun with other contents of these episodes (actions, proprio, instructions, labels or "
            f"images): the files in --demos have changed. {advice}"
        )


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
    """Return the tensors that show how a part's state is sharded: for an optimizer's moments, the parameters."""
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
        if isinstance(targets, Tensor):  # a parameter, although the path goes on, with "exp_avg" for example
            return targets
    raise KeyError(path)


def _name(path: tuple) -> str:
    return "/".join(map(str, path))


def _leaves(tree: Mapping, path: tuple = ()) -> Iterator[tuple[tuple, Tensor]]:
    """Yield the paths and tensors of a tree of dicts."""
    for key, value in tree.items():
        if isinstance(value, Mapping):
            yield from _leaves(value, (*path, key))
        elif isinstance(value, Tensor):
            yield (*path, key), value


def _map(tree: Mapping, change: Callable[[Tensor], Tensor]) -> dict:
    """Copy a tree of dicts with its tensors changed."""

    def changed(value: Any) -> Any:
        if isinstance(value, Mapping):
            return _map(value, change)
        return change(value) if isinstance(value, Tensor) else value

    return {key: changed(value) for key, value in tree.items()}
