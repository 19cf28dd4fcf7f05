"""Jobs in worker processes that may die: each worker is a process of its own and is replaced when it dies."""

import multiprocessing
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from typing import Any

import torch


def one_thread() -> None:
    """Start a worker that computes with torch: one thread, since the other cores have their own workers."""
    torch.set_num_threads(1)


def run_jobs(
    function: Callable[..., Any],
    jobs: Sequence[tuple],
    workers: int,
    *,
    start: Callable[[], None] | None = None,
    max_deaths: int = 3,
) -> Iterator[tuple[tuple, Any, int]]:
    """Yield the results of `function(*job)` as they come.

    A worker that dies (out of memory, a crash in a driver) takes one job with it; another worker gets that job. An
    exception in `function` kills no worker and is raised here.

    Args:
        function: defined at the top of a module, since workers are spawned.
        jobs: arguments of the calls, one tuple each.
        workers: number of processes; 0 calls `function` in this one.
        start: called once in each worker.
        max_deaths: workers that may die over one job.

    Yields:
        job, result, number of workers that died over it.

    Raises:
        RuntimeError: `max_deaths` workers died over a job; the results before that have been yielded.
    """
    if workers == 0:
        yield from ((job, function(*job), 0) for job in jobs)
        return
    context = multiprocessing.get_context("spawn")
    waiting = deque((job, 0) for job in jobs)
    idle: list[ProcessPoolExecutor] = []
    running: dict[Future, tuple[ProcessPoolExecutor, tuple, int]] = {}
    try:
        while waiting or running:
            while waiting and len(running) < workers:
                pool = idle.pop() if idle else ProcessPoolExecutor(1, context, start)
                job, deaths = waiting.popleft()
                running[pool.submit(function, *job)] = (pool, job, deaths)
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                pool, job, deaths = running.pop(future)
                try:
                    result = future.result()
                except BrokenProcessPool as error:
                    pool.shutdown(wait=False)
                    if deaths + 1 == max_deaths:
                        raise RuntimeError(
                            f"{max_deaths} worker processes died over the same job (out of memory?); what was finished "
                            "is kept: run the same command again to go on, with fewer workers if memory is short"
                        ) from error
                    waiting.appendleft((job, deaths + 1))
                    continue
                idle.append(pool)
                yield job, result, deaths
    finally:  # also when the caller is interrupted
        for pool in (*idle, *(pool for pool, _, _ in running.values())):
            pool.shutdown(wait=False, cancel_futures=True)
