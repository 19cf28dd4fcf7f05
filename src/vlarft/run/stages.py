"""Stage scripts one after the other or side by side: each a process of its own, none run twice, all to be resumed."""

import os
import shlex
import subprocess
import sys
import threading
import time
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from vlarft.run.checkpoint import read_json, same_setting, write_json
from vlarft.run.script import PARENT, signals_noted

INSTALLED = Path(__file__).resolve().parents[1] / "stages"  # where a wheel has the stage scripts; setup.cfg maps them


class MemoryPeak(threading.Thread):
    """Samples the memory of a process and all its descendants [bytes]: shared pages count once (Linux only)."""

    def __init__(self, root: int) -> None:
        super().__init__(daemon=True)
        self.root, self.peak, self.over = root, 0, threading.Event()

    def run(self) -> None:
        while not self.over.wait(0.5):  # a stage may last two seconds
            self.peak = max(self.peak, sum(_memory(pid) for pid in descendants(self.root)))


def descendants(root: int) -> list[int]:
    """Return a process and all that it started, directly or not, as far as their parents still run (Linux only)."""
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


class Stage(NamedTuple):
    """One stage of a pipeline.

    name: of the stage, in stages.json and in what is printed.
    script: its file.
    flags: options and values; a list is several values, True and False are `--x` and `--no-x`.
    after: names of the stages that it waits for.
    """

    name: str
    script: Path
    flags: Mapping[str, object]
    after: tuple[str, ...] = ()

    def words(self) -> list[str]:
        """Return the options as words of a command line."""
        words = []
        for flag, value in self.flags.items():
            values = [] if isinstance(value, bool) else value if isinstance(value, (list, tuple)) else [value]
            words += [f"--{'no-' if value is False else ''}{flag.replace('_', '-')}", *map(str, values)]
        return words

    def command(self, words: Sequence[str]) -> str:
        """Make the command line that a user would type: a file of the repository, or a module of an installed wheel."""
        installed = self.script.parent == INSTALLED
        place = ["-m", f"vlarft.stages.{self.script.stem}"] if installed else [self.script.name]
        return shlex.join(["python", *place, *words])


class Running:
    """A stage's process, in a session of its own: the terminal's Ctrl+C reaches its parent alone. It ends with it.

    Args:
        stage: what runs.
        words: its options.
        at_once: stages side by side; with more than one, each has its share of the threads, and its name before what
            it prints.
    """

    def __init__(self, stage: Stage, words: list[str], at_once: int) -> None:
        self.stage, self.started = stage, time.time()
        environment, options = {**os.environ, PARENT: str(os.getpid())}, {}
        if at_once > 1:
            environment.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // at_once)))
            environment.setdefault("TQDM_MININTERVAL", "30")  # a bar in a pipe is a line at every change
            options = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True, "errors": "replace"}
        command = [sys.executable, "-u", str(stage.script), *words]
        self.process = subprocess.Popen(command, env=environment, start_new_session=True, **options)
        self.memory, self.relay = MemoryPeak(self.process.pid), threading.Thread(target=self._print, daemon=True)
        self.memory.start()
        self.relay.start()

    def _print(self) -> None:
        for line in self.process.stdout or ():
            if line.strip():
                print(f"[{self.stage.name}] {line.rstrip()}", flush=True)

    def end(self, before: dict) -> dict:
        """Wait for the process; return its entry of stages.json, `before` being that of earlier tries."""
        status = self.process.wait()
        self.memory.over.set()
        self.relay.join()
        span = [self.started, time.time()]
        return {
            "seconds": before.get("seconds", 0.0) + span[1] - span[0],
            "spans": [*before.get("spans", []), span],
            "peak_bytes": max(before.get("peak_bytes", 0), self.memory.peak),
            "done": status == 0,
        }


def seconds_left(
    stages: Sequence[Stage],
    ended: Collection[str],
    running: Mapping[str, float],
    expected: Mapping[str, float],
    at_once: int,
) -> float:
    """Estimate how long the stages still take, from the time that each is expected to take.

    Args:
        stages: all, in their order.
        ended: names of those that have ended.
        running: how long those that run have run [s].
        expected: time of each stage [s]; none for one that is not named.
        at_once: stages side by side.
    """
    ended, passed = set(ended), 0.0
    waiting = [stage for stage in stages if stage.name not in ended and stage.name not in running]
    ends = {name: max(0.0, expected.get(name, 0.0) - already) for name, already in running.items()}
    while waiting or ends:
        for stage in [stage for stage in waiting if ended.issuperset(stage.after)][: at_once - len(ends)]:
            waiting.remove(stage)
            ends[stage.name] = passed + expected.get(stage.name, 0.0)
        first = min(ends, key=ends.__getitem__)
        passed = ends.pop(first)
        ended.add(first)
    return passed


def run_stages(
    folder: Path, stages: Sequence[Stage], at_once: int = 1, expected: Mapping[str, float] | None = None
) -> dict[str, dict]:
    """Run stage scripts, each with the command that a user would type, unless it already ended well.

    A signal that ends this process (Ctrl+C, SIGTERM, SIGHUP) goes on to the stages, which save and end.

    Args:
        folder: its stages.json says what has run.
        stages: in the order in which they start; those that wait for others come after them.
        at_once: stages that run side by side.
        expected: time of each stage [s], to say how long all still take; stages that have ended correct it.

    Returns:
        stages.json: name -> {"command", "seconds", "spans", "peak_bytes", "done"}; time over all tries, Unix times of
        the tries, and the memory of the stage's processes together.

    Raises:
        SystemExit: one failed, the message says which; or one is to run otherwise than before, and others that follow
            it have ended, whose results would be of the old one.
    """
    path, took, before = folder / "stages.json", {}, {}  # seconds of stages that ended, and of earlier tries
    found = read_json(path) if path.is_file() else {}
    waiting, running, ended = list(stages), [], set()

    def end(one: Running) -> int:
        running.remove(one)
        name = one.stage.name
        found[name] |= one.end(found[name])
        write_json(path, found)
        took[name] = found[name]["seconds"]
        return one.process.returncode

    def say_left() -> None:
        timed = [name for name in took if name in expected]
        pace = sum(took[name] for name in timed) / sum(expected[name] for name in timed) if timed else 1.0
        here = {name: pace * seconds for name, seconds in expected.items()}
        now = {one.stage.name: before[one.stage.name] + time.time() - one.started for one in running}
        print(f"about {seconds_left(stages, ended, now, here, at_once) / 60:.0f} minutes left", flush=True)

    with signals_noted() as stop_if_told:  # a stage that has just started is known before a signal counts
        try:
            while waiting or running:
                stop_if_told()
                for stage in [s for s in waiting if ended.issuperset(s.after)][: at_once - len(running)]:
                    waiting.remove(stage)
                    words = stage.words()
                    command = stage.command(words)
                    known = found.get(stage.name, {})
                    same = same_setting(_content(known.get("command", "")), _content(command))
                    known = known if same else {}
                    place = stage.flags.get("out_dir")  # that somebody may have removed
                    if known.get("done") and (place is None or Path(str(place)).exists()):
                        print(f"\n[{stage.name}] done in {known['seconds']:.0f} s: {command}", flush=True)
                        ended.add(stage.name)
                        break  # there may be more room, and more that can start
                    if stale := [s.name for s in _following(stages, stage) if found.get(s.name, {}).get("done")]:
                        raise SystemExit(
                            f"[{stage.name}] has not run as {command}, and {', '.join(stale)} followed what it was: "
                            f"remove their folders and {path}, or choose another folder"
                        )
                    print(f"\n[{stage.name}] {command}", flush=True)
                    found[stage.name] = {**known, "command": command}
                    before[stage.name] = known.get("seconds", 0.0)
                    running.append(Running(stage, words, at_once))
                    if expected and len(before) == 1:  # the first that starts
                        say_left()
                else:
                    time.sleep(0.1)
                for one in [one for one in running if one.process.poll() is not None]:
                    if status := end(one):
                        raise SystemExit(
                            f"[{one.stage.name}] ended with status {status}; the same command goes on from there"
                        )
                    ended.add(one.stage.name)
                    if expected and (waiting or running):
                        say_left()
        finally:  # of an error or a signal
            for one in running:
                one.process.terminate()
            for one in list(running):
                end(one)
    return found


def _content(command: str) -> list[str]:
    """Split a command line, without the number of workers, on which no result depends."""
    words = shlex.split(command)
    return [word for i, word in enumerate(words) if "--workers" not in words[max(0, i - 1) : i + 1]]


def _following(stages: Sequence[Stage], first: Stage) -> list[Stage]:
    """Return the stages that wait for `first`, directly or not."""
    names, found = {first.name}, []
    for stage in stages:
        if names.intersection(stage.after):
            names.add(stage.name)
            found.append(stage)
    return found


def run_stage(folder: Path, name: str, script: Path, /, **flags: object) -> dict:
    """Run one stage, see `run_stages`; return what stages.json says of it."""
    return run_stages(folder, [Stage(name, script, flags)])[name]


def peak_bytes(stages: Mapping[str, dict]) -> int:
    """Return the most memory that stages of a stages.json took: the peaks of those that ran side by side, added up."""
    tries = [(*span, stage["peak_bytes"]) for stage in stages.values() for span in stage.get("spans", [])]
    return max((sum(peak for first, last, peak in tries if first <= start < last) for start, *_ in tries), default=0)


def wall_seconds(stages: Mapping[str, dict]) -> float:
    """Return the time during which at least one of the stages of a stages.json ran."""
    total, until = 0.0, float("-inf")
    for first, last in sorted(span for stage in stages.values() for span in stage.get("spans", [])):
        total += max(0.0, last - max(first, until))
        until = max(until, last)
    return total
