"""Stop on a signal: a run saves at its next step boundary and exits with a special code.

SLURM sends SIGTERM before it takes a node away (preemption, time limit); torchrun passes it on to its processes.
SIGUSR1 is what users have SLURM send earlier (`--signal=USR1@300`). Ctrl+C is SIGINT; a second one does not wait.
"""

import contextlib
import signal
import sys
from collections.abc import Iterator

from vlarft.run import distributed

SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
EXIT_CODE = 75  # EX_TEMPFAIL of sysexits.h: nothing is wrong, the same command resumes the run

_received = False


@contextlib.contextmanager
def deferred() -> Iterator[None]:
    """Run a block (a whole run) in which the signals are only recorded, for `requested` to report."""
    global _received

    def note(number: int, frame: object) -> None:
        global _received
        if number == signal.SIGINT:
            if _received:
                raise KeyboardInterrupt
            print("stopping after this step; Ctrl+C again stops at once, without saving", file=sys.stderr)
        _received = True

    # what runs in the background, or under nohup, goes on ignoring Ctrl+C
    numbers = [number for number in SIGNALS if signal.getsignal(number) is not signal.SIG_IGN]
    before = {number: signal.signal(number, note) for number in numbers}
    try:
        yield
    finally:
        _received = False
        for number, handler in before.items():
            signal.signal(number, handler)


def requested() -> bool:
    """Return whether any process of the run was told to stop; a collective call."""
    # a signal may reach one process alone, between any two steps of the others: all must leave at the same step
    return distributed.max_across_ranks({"stop": float(_received)})["stop"] > 0
