"""The log of a run: one line per step on the terminal, the same numbers in out_dir/log.jsonl."""

import json
import math
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path

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
        self.total_steps, self.name = total_steps, name
        self.started = time.monotonic()
        self.file = self.writer = None
        if not is_main():
            return
        kept = []
        if start_step and self.path.is_file():
            for line in self.path.read_text().splitlines():
                try:
                    entry = json.loads(line)
                except json.JSONDecodeError:  # cut short when the process was killed
                    continue
                if entry["step"] < start_step:
                    kept.append(line)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.file = self.path.open("w", buffering=1)  # line by line: a kill loses one line at most
        self.file.writelines(line + "\n" for line in kept)
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            return
        self.writer = SummaryWriter(str(Path(out_dir) / "tensorboard"), purge_step=start_step)

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Write the metrics of step `step` (0-based; -1: before the first)."""
        if self.file is None:
            return
        values = {k: float(v) for k, v in metrics.items()}
        self.file.write(json.dumps({"step": step, **values}) + "\n")
        if self.writer is not None:
            for k, v in values.items():
                self.writer.add_scalar(k, v, step)
        width = len(str(self.total_steps))
        shown = "  ".join(f"{k} {_short(v)}" for k, v in values.items())
        print(f"{self.name} {step + 1:>{width}}/{self.total_steps}  {shown}", file=sys.stderr, flush=True)

    def close(self) -> None:
        """Close the files at the end of the run."""
        if self.file is not None:
            self.file.close()
        if self.writer is not None:
            self.writer.close()


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
            f"{' and '.join(wrong)} at step {step} ({shown}); the last checkpoint is untouched: "
            f"lower the learning rate or check the data; this batch is from episodes {', '.join(episodes())}"
        )
