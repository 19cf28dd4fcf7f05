"""Jobs in worker processes that may die: each worker is a process of its own and is replaced when it dies.

A worker ends with the process that started it, however that one ends, and leaves Ctrl+C to it.
"""

import multiprocessing
import os
import signal
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any, NamedTuple

import torch

from vlarft.run.script import raised_here


def one_thread() -> None:
    """Start a worker that computes with torch: one thread, since the other cores have their own workers."""
    torch.set_num_threads(1)


def _call(function: Callable[..., Any], job: tuple) -> Any:
    """Call a function in a worker; an error of it says who raised it, which its traceback there no longer does."""
    try:
        return function(*job)
    except Exception as error:
        error.raised_here = raised_here(error)
        raise


def _begin(start: Callable[[], None] | None) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)

    def follow() -> None:
        multiprocessing.parent_process().join()
        os._exit(1)

    threading.Thread(target=follow, daemon=True).start()
    if start:
        start()


def _computed(pool: ProcessPoolExecutor) -> float:
    """Return the processor time of a worker so far [s]; Linux only, elsewhere every worker counts as busy."""
    try:
        (pid,) = pool._processes  # Python has no public way to a pool's processes before 3.14
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except (OSError, ValueError):  # it ended meanwhile, or there is no /proc
        return time.monotonic()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


class _Running(NamedTuple):
    pool: ProcessPoolExecutor
    job: tuple
    deaths: int  # of workers over this job


class Workers:
    """Worker processes that stay for several calls of `run`, with what they have cached; use it in a `with`.

    A worker that dies (out of memory, a crash in a driver) takes one job with it; another worker gets that job. An
    exception in a job kills no worker and is raised by `run`. One that computes nothing for `patience` seconds (it was
    stopped, or waits for a driver) is killed, which is a death.

    Args:
        count: number of processes; 0 runs the jobs in this one.
        start: called once in each worker.
        max_deaths: workers that may die over one job.
        patience: time for which a job may compute nothing [s].
    """

    def __init__(
        self, count: int, start: Callable[[], None] | None = None, max_deaths: int = 3, patience: float = 600.0
    ) -> None:
        self.count, self.start, self.max_deaths, self.patience = count, start, max_deaths, patience
        self.idle: list[ProcessPoolExecutor] = []
        self.running: dict[Future, _Running] = {}

    def __enter__(self) -> "Workers":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End the processes; a job that still runs is given up, for nobody would read its result."""
        for one in self.running.values():
            for process in one.pool._processes.values():
                process.kill()
        for pool in (*self.idle, *(one.pool for one in self.running.values())):
            pool.shutdown(wait=False, cancel_futures=True)
        self.idle, self.running = [], {}

    def run(self, function: Callable[..., Any], jobs: Sequence[tuple]) -> Iterator[tuple[tuple, Any, int]]:
        """Yield the results of `function(*job)` as they come; one call at a time.

        Args:
            function: defined at the top of a module, since workers are spawned.
            jobs: arguments of the calls, one tuple each.

        Yields:
            job, result, number of workers that died over it.

        Raises:
            RuntimeError: `max_deaths` workers died over a job; the results before that have been yielded.
        """
        if self.count == 0:
            yield from ((job, function(*job), 0) for job in jobs)
            return
        try:
            yield from self._run(function, deque((job, 0) for job in jobs))
        except BaseException:  # of a job, or the caller stops: nothing of this call is left for the next one
            self.close()
            raise

    def _run(self, function: Callable[..., Any], waiting: deque[tuple[tuple, int]]) -> Iterator[tuple[tuple, Any, int]]:
        context = multiprocessing.get_context("spawn")
        while waiting or self.running:
            while waiting and len(self.running) < self.count:
                pool = self.idle.pop() if self.idle else ProcessPoolExecutor(1, context, _begin, (self.start,))
                job, deaths = waiting[0]
                try:
                    future = pool.submit(_call, function, job)
                except BrokenProcessPool:  # it died while it was idle, over no job
                    pool.shutdown(wait=False)
                    continue
                self.running[future] = _Running(pool, *waiting.popleft())
            computed = {future: _computed(one.pool) for future, one in self.running.items()}
            done = wait(self.running, self.patience, return_when=FIRST_COMPLETED).done
            for future, one in self.running.items() if not done else ():
                if _computed(one.pool) - computed[future] < 0.01 * self.patience:
                    print(f"a worker computed nothing for {self.patience:.0f} s and is replaced", file=sys.stderr)
                    for process in one.pool._processes.values():
                        process.kill()
            for future in done:
                pool, job, deaths = self.running.pop(future)
                try:
                    result = future.result()
                except BrokenProcessPool as error:
                    pool.shutdown(wait=False)
                    if deaths + 1 == self.max_deaths:
                        raise RuntimeError(
                            f"{self.max_deaths} worker processes died over the same job (out of memory?); what was "
                            "finished is kept: run the same command again to go on, with fewer workers if memory is "
                            "short"
                        ) from error
                    waiting.appendleft((job, deaths + 1))
                    continue
                self.idle.append(pool)
                yield job, result, deaths


def run_jobs(
    function: Callable[..., Any],
    jobs: Sequence[tuple],
    workers: int,
    *,
    start: Callable[[], None] | None = None,
    max_deaths: int = 3,
) -> Iterator[tuple[tuple, Any, int]]:
    """Yield the results of `function(*job)` as they come, from worker processes that end with the last job.

    Arguments, results and errors are those of `Workers` and `Workers.run`.
    """
    with Workers(workers, start, max_deaths) as pool:  # also left when the caller is interrupted
        yield from pool.run(function, jobs)
