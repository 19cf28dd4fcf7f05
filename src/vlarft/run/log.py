"""The log of a run: one line per step on the terminal, the same numbers in out_dir/log.jsonl."""

import functools
import json
import math
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from vlarft.run.checkpoint import append_line, write_atomic
from vlarft.run.distributed import is_main


class RunLog:
    """Log a run: `log(step, metrics)` prints one aligned line and appends one JSON line, on rank 0 only.

    On resume, lines of steps that will run again are dropped, so the file reads as if the run had never stopped.
    TensorBoard files are written if it is installed.

    Args:
        out_dir: the run's folder.
        total_steps: number of steps, shown in each line.
        name: first word of each line.
        start_step: step at which the run starts or resumes.
    """

    def __init__(self, out_dir: str | Path, total_steps: int, name: str, start_step: int = 0) -> None:
        self.path = Path(out_dir) / "log.jsonl"
        self.total_steps, self.name, self.start_step = total_steps, name, start_step
        self.file = None
        if not is_main():
            return
        before = self.path.read_bytes() if self.path.is_file() else None
        lines = (before or b"").splitlines() if start_step else []
        kept = b"".join(line + b"\n" for line in lines if _step(line) < start_step)
        if damaged := sum(_step(line) == math.inf for line in lines):
            print(f"{self.path}: {damaged} lines are no rows, as one that a kill cut short: left out", file=sys.stderr)
        if kept != before:
            write_atomic(self.path, lambda tmp: tmp.write_bytes(kept))
        self.file = self.path.open("ab", buffering=0)

    @functools.cached_property
    def tensorboard(self) -> Any:
        """Its writer, made with the first line; None if it is not installed."""
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            return None
        return SummaryWriter(str(self.path.parent / "tensorboard"), purge_step=self.start_step)

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Write the metrics of step `step` (0-based; -1: before the first)."""
        if self.file is None:
            return
        values = {k: float(v) for k, v in metrics.items()}
        append_line(self.file, json.dumps({"step": step, **values}))
        if self.tensorboard is not None:
            for k, v in values.items():
                self.tensorboard.add_scalar(k, v, step)
        width = len(str(self.total_steps))
        shown = "  ".join(f"{k} {_short(v)}" for k, v in values.items())
        print(f"{self.name} {step + 1:>{width}}/{self.total_steps}  {shown}", file=sys.stderr, flush=True)

    def close(self) -> None:
        """Close the files at the end of the run."""
        if self.file is not None:
            self.file.close()
        if vars(self).get("tensorboard") is not None:
            self.tensorboard.close()


def _step(line: bytes) -> float:
    """Read the step of a row; infinity for a line that is none, such as the one that a kill cut short."""
    try:
        step = json.loads(line)["step"]
        return step if isinstance(step, int) else math.inf
    except (ValueError, LookupError, TypeError, RecursionError):
        return math.inf


def _short(value: float) -> str:
    if value == int(value) and abs(value) < 1e6 if math.isfinite(value) else False:
        return str(int(value))
    return f"{value:.4g}"


def check_finite(loss: float, step: int, metrics: Mapping[str, float], episodes: Callable[[], list[str]]) -> None:
    """Stop the run at the first loss or gradient norm that is not finite. Call it before the step is saved.

    Args:
        loss: mean over all processes, so that all of them stop.
        step: 0-based.
        metrics: metrics of the step; those whose names end with `grad_norm` are checked as well.
        episodes: returns the names of the episodes in the batch of all processes; called for the message only.

    Raises:
        FloatingPointError: names the step, the metrics and the episodes; the last checkpoint is untouched.
    """
    norms = {name: float(value) for name, value in metrics.items() if name.endswith("grad_norm")}
    if wrong := [f"{k} is {v}" for k, v in {"loss": loss, **norms}.items() if not math.isfinite(v)]:
        shown = ", ".join(f"{k}={_short(float(v))}" for k, v in metrics.items())
        raise FloatingPointError(
            f"{' and '.join(wrong)} at step {step} ({shown}); the last checkpoint is untouched, and the same command "
            "goes on from it. If it stops here again, check the data, or begin in another --out-dir with a lower "
            f"learning rate; this batch is from episodes {', '.join(episodes())}"
        )
