"""The clock of a run: the share of it that is done, and the learning rate at that point."""

import contextlib
import math
import time
from collections.abc import Iterator
from typing import Literal

from vlarft.run import distributed

Decay = Literal["constant", "cosine"]


class Clock:
    """Measure how much of a run is done: by steps, or by minutes if there is a time limit that is reached first.

    Args:
        steps: number of steps of the run.
        max_minutes: wall time after which the run ends, time before a resume included [min]; None = no limit.
        minutes_before: wall time spent before the resume [min].
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
        """Run a block whose time does not count, such as an evaluation that is not part of training."""
        paused = time.monotonic()
        yield
        self.started += time.monotonic() - paused

    def share(self, step: int) -> float:
        """Return the share of the run that is done after `step` steps, 1 or more at its end; a collective call.

        A run makes one step at least, however short its time: one without a step would leave no model.
        """
        share = step / self.steps
        if self.max_minutes is not None:  # clocks differ between processes, but all must stop at the same step
            minutes = distributed.mean_across_ranks({"minutes": self.minutes})["minutes"]
            share = max(share, minutes / self.max_minutes)
        return share if step else min(share, 1 - 1e-9)


def rate_factor(step: int, share: float, warmup: int, decay: Decay) -> float:
    """Return the factor on the peak learning rate: linear warm-up times a constant or half a cosine over the run.

    Args:
        step: 0-based.
        share: share of the run that is done, from `Clock.share`.
        warmup: number of warm-up steps.
        decay: `cosine` ends at 0.
    """
    cosine = 0.5 * (1 + math.cos(math.pi * min(share, 1.0)))
    return min(1.0, (step + 1) / max(warmup, 1)) * (1.0 if decay == "constant" else cosine)
