"""The clock of a run: the share of it that is done, and the learning rate there."""

import contextlib
import math
import time
from collections.abc import Iterator
from typing import Literal

from vlarft.run import distributed

Decay = Literal["constant", "cosine"]


class Clock:
    """How much of a run is done: its steps, or its minutes where a limit is set and runs out first.

    Args:
        steps: of the run.
        max_minutes: wall time after which the run ends, resumed parts included [min]; None = no limit.
        minutes_before: wall time of the parts before a resume [min].
    """

    def __init__(self, steps: int, max_minutes: float | None = None, minutes_before: float = 0.0) -> None:
        self.steps, self.max_minutes, self.minutes_before = steps, max_minutes, minutes_before
        self.started = time.monotonic()

    @property
    def minutes(self) -> float:
        """Wall time of the run so far [min]."""
        return self.minutes_before + (time.monotonic() - self.started) / 60

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Run a block whose time does not count: measurements that are not part of the training."""
        paused = time.monotonic()
        yield
        self.started += time.monotonic() - paused

    def share(self, step: int) -> float:
        """Share of the run that is done after `step` steps, 1 or more at its end; the same on every process."""
        share = step / self.steps
        if self.max_minutes is not None:  # the processes' clocks differ, and all must stop at the same step
            minutes = distributed.mean_across_ranks({"minutes": self.minutes})["minutes"]
            share = max(share, minutes / self.max_minutes)
        return share


def rate_factor(step: int, share: float, warmup: int, decay: Decay) -> float:
    """Factor on the peak learning rate: linear over `warmup` steps, then constant or half a cosine over the run.

    Args:
        step: 0-based.
        share: how much of the run is done, from `Clock.share`.
        warmup: steps.
        decay: `cosine` ends at 0.
    """
    cosine = 0.5 * (1 + math.cos(math.pi * min(share, 1.0)))
    return min(1.0, (step + 1) / max(warmup, 1)) * (1.0 if decay == "constant" else cosine)
