"""Run functions on the processes of a gloo group, forked from one that has imported torch already, to start fast."""

import multiprocessing
import os
import runpy
import socket
import sys
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from pathlib import Path

from vlarft.run import distributed

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(
    ["torch.distributed.checkpoint", "torch.distributed.fsdp", "torch._dynamo", "vlarft.run.train_state"]
)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def start(processes: int, work: Callable, *arguments: object) -> list[BaseProcess]:
    """Run `work(*arguments)`, a function of a test module, as every rank of a group."""
    port = free_port()
    arguments = processes, port, work, arguments
    ranks = [CONTEXT.Process(target=_rank, args=(rank, *arguments), daemon=True) for rank in range(processes)]
    for process in ranks:
        process.start()
    return ranks


def run(processes: int, work: Callable, *arguments: object) -> None:
    """`start`, and wait for all to end well."""
    for rank, process in enumerate(started := start(processes, work, *arguments)):
        process.join(120)
        assert process.exitcode == 0, f"rank {rank} of {len(started)} ended with {process.exitcode}; its error is above"


def start_script(script: Path, arguments: list[str], outputs: list[Path]) -> list[BaseProcess]:
    """Run a script as torchrun would on this machine, on as many ranks as there are files for what they print."""
    port, started = free_port(), []
    for rank, output in enumerate(outputs):
        output.touch()
        words = _variables(rank, len(outputs), port), str(script), arguments, str(output)
        started.append(CONTEXT.Process(target=_script, args=words, daemon=True))
        started[-1].start()
    return started


def _variables(rank: int, processes: int, port: int) -> dict[str, str]:
    """What torchrun tells a process."""
    numbers = {"MASTER_PORT": port, "WORLD_SIZE": processes, "RANK": rank, "LOCAL_RANK": rank}
    return {"MASTER_ADDR": "127.0.0.1", **{name: str(value) for name, value in numbers.items()}}


def _script(variables: dict[str, str], script: str, arguments: list[str], output: str) -> None:
    os.environ.update(variables)
    with open(output, "wb", buffering=0) as file:
        for stream in (1, 2):
            os.dup2(file.fileno(), stream)
    sys.argv = [script, *arguments]
    runpy.run_path(script, run_name="__main__")


def _rank(rank: int, processes: int, port: int, work: Callable, arguments: tuple) -> None:
    os.environ.update(_variables(rank, processes, port))
    distributed.setup()
    work(*arguments)
    distributed.cleanup()
