"""Shared by the speed benchmarks: timing versions in turns, counting FLOPs, and the machine's peak rate."""

import os
import platform
import statistics
import time
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode


class Timing(NamedTuple):
    """Times of one version's calls [s]: median, shortest and longest."""

    median: float
    least: float
    most: float


def synchronize(device: str) -> None:
    """Wait until a GPU has finished its queue."""
    if device == "cuda":
        torch.cuda.synchronize()


def seconds(call: Callable[[], object], device: str) -> float:
    """Return the wall time of one call [s]."""
    synchronize(device)
    started = time.perf_counter()
    call()
    synchronize(device)
    return time.perf_counter() - started


def alternate(
    versions: dict[str, Callable[[], object]], repeats: int, device: str, warmup: int = 1
) -> dict[str, Timing]:
    """Time every version `repeats` times, in turns, so that other load on the machine affects all of them."""
    times: dict[str, list[float]] = {name: [] for name in versions}
    for repeat in range(warmup + repeats):
        for name, version in versions.items():
            spent = seconds(version, device)
            if repeat >= warmup:
                times[name].append(spent)
    return {name: Timing(statistics.median(spent), min(spent), max(spent)) for name, spent in times.items()}


def graphed(call: Callable[[], Tensor]) -> Callable[[], Tensor]:
    """Capture a call, whose inputs keep their addresses, in a CUDA graph; return what replays it."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):  # libraries initialise themselves at first use, which a capture refuses
            call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = call()

    def replay() -> Tensor:
        graph.replay()
        return found

    return replay


def ratio(ours: Timing, other: Timing) -> tuple[float, list[float]]:
    """Return how many times as long as `ours` `other` takes, by medians, and the range of that: its shortest time over
    our longest, and its longest over our shortest.
    """
    return other.median / ours.median, [other.least / ours.most, other.most / ours.least]


def work_and_share(call: Callable[[], object], timing: Timing, peak: float) -> dict[str, float]:
    """Return the FLOPs of a call, and the share of the machine's peak rate that it reaches."""
    work = floating_point_work(call)
    return {"flops": work, "share_of_peak": work / timing.median / peak}


def floating_point_work(call: Callable[[], object]) -> int:
    """Count the FLOPs in the matrix products, convolutions and attentions of one call."""
    with FlopCounterMode(display=False) as counter:
        call()
    return counter.get_total_flops()


def peak_rate(device: str) -> float:
    """Measure the FLOP/s of the fastest of eight large matrix products: float32 on a CPU, bfloat16 on a GPU."""
    side, dtype = (8192, torch.bfloat16) if device == "cuda" else (2048, torch.float32)
    a, b = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))
    best = min(seconds(lambda: a @ b, device) for _ in range(8))
    return 2 * side**3 / best


def machine(device: str) -> dict[str, object]:
    """Describe processor, threads, torch version and GPU, for the reports."""
    found: dict[str, object] = {
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, {torch.get_num_threads()} threads",
        "torch": torch.__version__,
    }
    if device == "cuda":
        found["gpu"] = torch.cuda.get_device_name()
    return found
