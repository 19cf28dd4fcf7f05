"""Stage scripts one after the other: each a process of its own, none run twice, all to be resumed."""

import json
import os
import shlex
import subprocess
import sys
import threading
import time
from pathlib import Path

from vlarft.run.checkpoint import write_json


class MemoryPeak(threading.Thread):
    """Samples the memory of this process and all its descendants [bytes]: shared pages count once (Linux only)."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.peak, self.over = 0, threading.Event()

    def run(self) -> None:
        while not self.over.wait(2.0):
            self.peak = max(self.peak, sum(_memory(pid) for pid in _descendants(os.getpid())))


def _descendants(root: int) -> list[int]:
    parents = {}
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            parents[int(entry.name)] = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
        except (OSError, ValueError):  # the process ended meanwhile
            continue
    found = [root]
    for pid in found:
        found += [child for child, parent in parents.items() if parent == pid]
    return found


def _memory(pid: int) -> int:
    try:
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    except OSError:  # the process ended meanwhile
        return 0
    return sum(int(line.split()[1]) * 1024 for line in lines if line.startswith("Pss:"))


def run_stage(folder: Path, name: str, script: Path, /, **flags: object) -> dict:
    """Run one stage script, with the command that a user would type, unless it already ended well.

    Args:
        folder: its stages.json says what has run.
        name: of the stage.
        script: its file.
        flags: options and values; a list is several values, True and False are `--x` and `--no-x`.

    Returns:
        {"command", "seconds", "peak_bytes", "done"}: time over all tries, and the memory of all processes together.

    Raises:
        SystemExit: it failed; the message says so.
    """
    done = folder / "stages.json"
    stages = json.loads(done.read_text()) if done.is_file() else {}
    words = ["python", script.name]
    for flag, value in flags.items():
        values = [] if isinstance(value, bool) else value if isinstance(value, (list, tuple)) else [value]
        words += [f"--{'no-' if value is False else ''}{flag.replace('_', '-')}", *map(str, values)]
    command = shlex.join(words)
    stage = stages.get(name, {})
    if stage.get("command") == command and stage.get("done"):
        print(f"\n[{name}] done in {stage['seconds']:.0f} s: {command}", flush=True)
        return stage
    print(f"\n[{name}] {command}", flush=True)
    memory, started = MemoryPeak(), time.monotonic()
    memory.start()
    status = subprocess.run([sys.executable, str(script), *words[2:]]).returncode
    memory.over.set()
    before = stage if stage.get("command") == command else {}
    stages[name] = {
        "command": command,
        "seconds": before.get("seconds", 0.0) + time.monotonic() - started,
        "peak_bytes": max(before.get("peak_bytes", 0), memory.peak),
        "done": status == 0,
    }
    write_json(done, stages)
    if status:
        raise SystemExit(f"[{name}] ended with status {status}; the same command goes on from there")
    return stages[name]
