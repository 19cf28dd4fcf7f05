"""What the speed benchmarks share: versions timed in turns, floating-point work, and the peak of the machine."""

import os
import platform
import statistics
import time
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch.utils.flop_counter import FlopCounterMode


class Timing(NamedTuple):
    """Seconds of the timed calls of one version: median, least and most."""

    median: float
    least: float
    most: float


def synchronize(device: str) -> None:
    """Wait for the device's queue, where it has one."""
    if device == "cuda":
        torch.cuda.synchronize()


def seconds(call: Callable[[], object], device: str) -> float:
    """Wall time of one call [s]."""
    synchronize(device)
    started = time.perf_counter()
    call()
    synchronize(device)
    return time.perf_counter() - started


def alternate(
    versions: dict[str, Callable[[], object]], repeats: int, device: str, warmup: int = 1
) -> dict[str, Timing]:
    """Time every version `repeats` times, in turns, so that what else the machine does falls on all of them."""
    times: dict[str, list[float]] = {name: [] for name in versions}
    for repeat in range(warmup + repeats):
        for name, version in versions.items():
            spent = seconds(version, device)
            if repeat >= warmup:
                times[name].append(spent)
    return {name: Timing(statistics.median(spent), min(spent), max(spent)) for name, spent in times.items()}


def ratio(ours: Timing, other: Timing) -> tuple[float, list[float]]:
    """How many times as long another version takes as ours, and the spread of that: its least time over our most, and
    the reverse.
    """
    return other.median / ours.median, [other.least / ours.most, other.most / ours.least]


def work_and_share(call: Callable[[], object], timing: Timing, peak: float) -> dict[str, float]:
    """`floating_point_work` of a call, and the share of the machine's peak rate that it reaches."""
    work = floating_point_work(call)
    return {"flops": work, "share_of_peak": work / timing.median / peak}


def floating_point_work(call: Callable[[], object]) -> int:
    """Operations in the matrix products, convolutions and attentions of one call."""
    with FlopCounterMode(display=False) as counter:
        call()
    return counter.get_total_flops()


def peak_rate(device: str) -> float:
    """Operations a second of the best of several large matrix products: float32 on the CPU, bfloat16 on a GPU."""
    side, dtype = (8192, torch.bfloat16) if device == "cuda" else (2048, torch.float32)
    a, b = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))
    best = min(seconds(lambda: a @ b, device) for _ in range(8))
    return 2 * side**3 / best


def machine(device: str) -> dict[str, object]:
    """Processor, threads, versions and device, for the reports."""
    found: dict[str, object] = {
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, {torch.get_num_threads()} threads",
        "torch": torch.__version__,
    }
    if device == "cuda":
        found["gpu"] = torch.cuda.get_device_name()
    return found
