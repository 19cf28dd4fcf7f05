"""How a command ends: errors that the user can mend take one line, signals let it clean up, and one process at a time
writes into a folder.
"""

import contextlib
import os
import signal
import socket
import sys
import threading
import time
import traceback
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, TypeVar

from vlarft.run.checkpoint import append_line
from vlarft.run.config import parse

ConfigT = TypeVar("ConfigT")
PARENT = "VLARFT_PARENT"  # environment variable: the process whose end is to end a stage


def run_script(
    main: Callable[[ConfigT], Any],
    config_class: type[ConfigT],
    presets: Mapping[str, ConfigT],
    doc: str | None,
    signals: Callable[[], AbstractContextManager] | None = None,
) -> None:
    """Run a stage script's `main` with the configuration of the command line.

    Args:
        main: of the script; its configuration names the `out_dir` that it writes.
        config_class, presets, doc: see `config.parse`.
        signals: what SIGINT, SIGTERM, ... do while it runs; None: they end it, see `signals_end_this_process`.
    """
    with clear_errors():
        cfg = parse(config_class, presets, sys.argv[1:], doc or "")
        if PARENT in os.environ:
            follow(int(os.environ[PARENT]))
        with (signals or signals_end_this_process)(), only_writer(cfg.out_dir):
            main(cfg)


def raised_here(error: BaseException) -> bool:
    """Return whether this package raised an error, or a script of it, and not a library that it called."""
    *_, (last, _) = traceback.walk_tb(error.__traceback__)
    return last.f_globals.get("__name__", "").partition(".")[0] in ("vlarft", "__main__")


@contextlib.contextmanager
def clear_errors() -> Iterator[None]:
    """End the process in one line where the user can mend what failed; with `--debug` in a traceback.

    Errors of the input, the disk or a missing package end with status 2, as a wrong option does; Ctrl+C with 130.
    """
    try:
        yield
    except (ValueError, OSError, ImportError, FloatingPointError, RuntimeError) as error:
        if "--debug" in sys.argv:
            raise
        here = getattr(error, "raised_here", raised_here(error))  # of a worker process, see sim/workers.py
        if isinstance(error, RuntimeError) and not here:
            raise  # of torch: where it was raised says more than its message
        text = "; ".join(line.strip() for line in str(error).splitlines() if line.strip())
        hint = "" if here else " (--debug shows where)"
        print(f"ERROR: {text or type(error).__name__}{hint}", file=sys.stderr)
        raise SystemExit(2) from None
    except KeyboardInterrupt:
        print("stopped; the same command goes on from there", file=sys.stderr)
        raise SystemExit(128 + signal.SIGINT) from None


@contextlib.contextmanager
def signals_end_this_process() -> Iterator[None]:
    """Turn SIGTERM and SIGHUP into SystemExit, as Ctrl+C is a KeyboardInterrupt, so that `finally` clauses run."""
    if threading.current_thread() is not threading.main_thread():  # which alone may set handlers
        yield
        return

    def stop(number: int, frame: object) -> None:
        print("told to stop; the same command goes on from there", file=sys.stderr)
        raise SystemExit(128 + number)

    before = {number: signal.signal(number, stop) for number in (signal.SIGTERM, signal.SIGHUP)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def signals_noted() -> Iterator[Callable[[], None]]:
    """Only note SIGINT, SIGTERM and SIGHUP. The function that it yields, called where nothing is half done, ends the
    process by the first one that came: KeyboardInterrupt or SystemExit.
    """
    numbers: list[int] = []

    def stop_if_told() -> None:
        if numbers and numbers[0] == signal.SIGINT:
            raise KeyboardInterrupt
        if numbers:
            print("told to stop; the same command goes on from there", file=sys.stderr)
            raise SystemExit(128 + numbers[0])

    before = {}
    if threading.current_thread() is threading.main_thread():  # which alone may set handlers
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            if signal.getsignal(number) is not signal.SIG_IGN:
                before[number] = signal.signal(number, lambda number, _: numbers.append(number))
    try:
        yield stop_if_told
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def follow(parent: int) -> None:
    """Send this process SIGTERM once the process that started it is gone, however that one died."""

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(0.5)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=watch, daemon=True).start()


@contextlib.contextmanager
def only_writer(folder: str | Path) -> Iterator[None]:
    """Create a folder and keep other processes from writing it meanwhile; remove what a killed one left half written.

    The lock is the operating system's, so that it is gone with its process. Of a run's processes the first one has it.

    Raises:
        ValueError: another process has the lock, or a file has the folder's name.
    """
    import fcntl

    folder = Path(folder)
    if int(os.environ.get("RANK", 0)) > 0:
        yield
        return
    if (folder.exists() and not folder.is_dir()) or (folder.is_symlink() and not folder.exists()):
        raise ValueError(
            f"--out-dir {folder} is a {'link to nothing' if folder.is_symlink() else 'file'}, not a folder"
        )
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / ".lock").open("ab+", buffering=0) as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            holder = file.read().decode().strip()
            raise ValueError(
                f"{folder} is being written by {holder}: wait until it ends, or choose another --out-dir"
            ) from None
        except OSError as error:
            warnings.warn(f"{folder} cannot be locked ({error}): start no second process that writes it", stacklevel=3)
        file.truncate(0)
        append_line(file, f"process {os.getpid()} on {socket.gethostname()}: {' '.join(sys.argv)}")
        for left in folder.glob("*.*.tmp"):  # of `checkpoint.write_atomic`, by a process that was killed
            if left.is_file():
                left.unlink()
        yield
