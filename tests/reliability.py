"""Break what a run reads and interrupt what it writes, and count what comes of it (docs/reliability.md).

    python tests/reliability.py                             300 files a format, 10 kills and 5 full disks a script
    python tests/reliability.py --files 2000 --kills 100    half an hour and more
    python tests/reliability.py --only files --files 50

Every trial is a fork of this process, so that torch is imported once and a crash ends the trial alone.

files: one byte range of one file is damaged; the folder is loaded. "same": equal content. "named": refused with the
file's name. "unnamed": a ValueError or OSError without it. "other": loads other content, which only a checksum could
find. "raw": any other exception. "crash", "hang", "memory": of the process.

kills: a run of a script is killed at random times, by SIGKILL, and given again until it ends. full disks: the same with
a limit on the size of what it may write. "same": it ends as the run that was never interrupted, with no row lost or
doubled.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import os
import random
import resource
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

os.environ.setdefault("OMP_NUM_THREADS", "1")
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import torch
from conftest import write_moving_square

import collect_demos
import eval_libero
import train_sft
import train_tokenizer
import train_wm
from vlarft.data import convert, load_episodes
from vlarft.policy import VLAPolicy
from vlarft.run.checkpoint import load_train_state, model_digest, open_run
from vlarft.tokenizer import FrameTokenizer

OUTCOMES = ("same", "named", "unnamed", "other", "raw", "memory")  # exit statuses of a trial, from 10
MEMORY = 8 * 2**30  # what a trial may map, bytes
CLOCK = ("minutes", "step_s", "seconds", "chunk_ms")  # what a clock says in the rows of a log


def fork(trial: Callable[[], int], seconds: float, kill_after: float | None = None) -> int | str:
    """Run a trial in a fork; return its exit status, or "crash" or "hang"; "killed" after `kill_after` seconds."""
    sys.stdout.flush()
    if (pid := os.fork()) == 0:
        status = 1
        with contextlib.suppress(BaseException):
            quiet = os.open(os.devnull, os.O_WRONLY)
            os.dup2(quiet, 1)
            os.dup2(quiet, 2)
            status = trial()
        os._exit(status)
    started = time.monotonic()
    while True:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            return "crash" if os.WIFSIGNALED(status) else os.WEXITSTATUS(status)
        passed = time.monotonic() - started
        if passed > (seconds if kill_after is None else kill_after):
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
            return "hang" if kill_after is None else "killed"
        time.sleep(0.002)


class Format(NamedTuple):
    """What is damaged: a folder, which of its files, and how a user's command reads it."""

    folder: Path
    files: str  # pattern
    load: Callable[[Path], Any]


def digest(value: Any) -> str:
    """A digest of nested tensors, arrays and plain values."""
    if isinstance(value, dict):
        value = [(str(key), digest(item)) for key, item in value.items()]
    elif isinstance(value, torch.Tensor | np.ndarray):
        array = np.ascontiguousarray(value)
        value = (str(array.dtype), array.shape, hashlib.sha256(array.tobytes()).hexdigest())
    elif isinstance(value, list | tuple):
        value = [digest(item) for item in value]
    return hashlib.sha256(repr(value).encode()).hexdigest()


def episodes(path: Path) -> list:
    """All that training reads of the demonstrations at a path."""
    found = load_episodes(path, successes_only=False)
    return [[e.instruction, e.success, e.actions, e.proprio, np.asarray(e.images[:])] for e in found]


def damaged(data: bytes, rng: random.Random) -> bytes:
    """Cut, zero, change, repeat or insert a range of bytes."""
    start = rng.randrange(len(data)) if rng.random() < 0.5 else rng.randrange(min(len(data), 1024))
    size = rng.choice((1, 4, 64, 4096))
    middle = data[start : start + size]
    return rng.choice(
        (
            data[:start],
            data[:start] + bytes(len(middle)) + data[start + size :],
            data[:start] + rng.randbytes(len(middle)) + data[start + size :],
            data[:start] + middle + data[start:],
            data[:start] + rng.randbytes(size) + data[start:],
        )
    )


def fuzz(one: Format, count: int, scratch: Path) -> Counter[str]:
    """Damage a file of the format `count` times; count the outcomes."""
    expected, counts = digest(one.load(one.folder)), Counter()
    files = (path for path in one.folder.rglob(one.files) if path.is_file() and path.stat().st_size)
    names = sorted(path.relative_to(one.folder) for path in files)
    for number in range(count):
        rng, copy = random.Random(number), scratch / "copy"
        shutil.rmtree(copy, ignore_errors=True)
        shutil.copytree(one.folder, copy)
        path = copy / rng.choice(names)
        path.write_bytes(damaged(path.read_bytes(), rng))

        def trial(copy: Path = copy) -> int:
            resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
            try:
                outcome = "same" if digest(one.load(copy)) == expected else "other"
            except (ValueError, OSError) as error:
                outcome = "named" if str(copy) in str(error) else "unnamed"
            except MemoryError:
                outcome = "memory"
            except Exception:
                outcome = "raw"
            return 10 + OUTCOMES.index(outcome)

        status = fork(trial, 60)
        counts[status if isinstance(status, str) else OUTCOMES[status - 10] if status >= 10 else "crash"] += 1
    return counts


class Writer(NamedTuple):
    """A script that writes a folder, and what of the folder an interruption must not change."""

    run: Callable[[Path], Any]
    content: Callable[[Path], Any]


def rows(path: Path, *without: str) -> list[dict]:
    """The rows of a .jsonl file but for what a clock says."""
    found = [json.loads(line) for line in path.read_text().splitlines()]
    return [{key: value for key, value in row.items() if key not in without} for row in found]


def trained(folder: Path) -> list:
    return [model_digest(folder), rows(folder / "log.jsonl", *CLOCK)]


def interrupt(one: Writer, kills: int, full: bool, scratch: Path) -> Counter[str]:
    """Interrupt a script `kills` times, by SIGKILL or, with `full`, by a limit on its files; count how its runs end."""
    started = time.monotonic()
    assert fork(lambda: bool(one.run(scratch / "whole")) and 0, 3600) == 0, "the script fails where nothing stops it"
    seconds, expected = time.monotonic() - started, digest(one.content(scratch / "whole"))
    largest = max(path.stat().st_size for path in (scratch / "whole").rglob("*") if path.is_file())
    counts, rng, done, folder = Counter(), random.Random(0), 0, scratch / "parts"
    while done < kills:
        shutil.rmtree(folder, ignore_errors=True)
        over: int | str = "killed"
        while over == "killed" and done < kills:  # the same command again
            limit, after = rng.randrange(largest), rng.uniform(0, 1.1 * seconds)
            done += 1

            def trial(limit: int = limit) -> int:
                if full:
                    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
                    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
                try:
                    one.run(folder)
                except OSError:  # as the disk is full
                    return 2
                return 0

            over = fork(trial, 3600, None if full else after)
            if full and over in (1, "crash", "hang"):
                counts["crash" if over != 1 else "raw"] += 1
                over = "killed"
            over = "killed" if over == 2 else over
        last = fork(lambda: bool(one.run(folder)) and 0, 3600)
        same = last == 0 and digest(one.content(folder)) == expected
        counts["same" if same else "other" if last == 0 else "refused for good"] += 1
    counts["interruptions"] = done
    return counts


@contextlib.contextmanager
def places() -> Iterator[tuple[Path, dict[str, Format], dict[str, Writer]]]:
    """Make small inputs of every kind in a temporary folder."""
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        demos = root / "demos"
        for k, colour in enumerate(("red", "blue")):
            write_moving_square(demos / "squares" / f"push_{colour}_demo.hdf5", 3, 14, k, f"push the {colour} square")
        convert.main([str(demos), str(root / "lerobot"), "--format", "lerobot", "--images", "png", "--fps", "20"])
        common = {"demos": (str(demos),), "validation_fraction": 0.2, "steps": 4, "save_interval": 1}
        common |= {"log_interval": 1, "validation_interval": 3}
        tokenizer = replace(train_tokenizer.PRESETS["smoke"], **common)
        wm = replace(train_wm.PRESETS["smoke"], tokenizer=str(root / "tokenizer"), **common)
        sft = replace(train_sft.PRESETS["smoke"], **common)
        play = {"policies": (str(root / "sft"),), "workers": 0, "batch_size": 1, "episodes": 3}
        evaluation = replace(eval_libero.PRESETS["smoke"], **play)
        collection = replace(collect_demos.PRESETS["smoke"], tasks=("0",), demos_per_task=2, workers=1)
        train_tokenizer.main(replace(tokenizer, out_dir=str(root / "tokenizer")))
        train_sft.main(replace(sft, out_dir=str(root / "sft")))
        formats = {
            "model.safetensors": Format(root / "sft", "model.safetensors", lambda p: VLAPolicy.load(p).state_dict()),
            "tokenizer": Format(root / "tokenizer", "model.safetensors", lambda p: FrameTokenizer.load(p).state_dict()),
            "train_state.pt": Format(root / "sft", "*.pt", lambda p: load_train_state(p / "train_state.pt")),
            "config.json": Format(
                root / "sft", "config.json", lambda p: open_run(p, replace(sft, out_dir=str(p))).name
            ),
            "HDF5": Format(demos, "*.hdf5", episodes),
            "LeRobot": Format(root / "lerobot", "*", episodes),
        }

        def script(main: Callable, cfg: Any, content: Callable[[Path], Any] = trained) -> Writer:
            return Writer(lambda folder: main(replace(cfg, out_dir=str(folder))), content)

        writers = {
            "train_tokenizer.py": script(train_tokenizer.main, tokenizer),
            "train_wm.py": script(train_wm.main, wm),
            "train_sft.py": script(train_sft.main, sft),
            "collect_demos.py": script(
                collect_demos.main, collection, lambda p: [f.read_bytes() for f in sorted(p.rglob("*.hdf5"))]
            ),
            "eval_libero.py": script(eval_libero.main, evaluation, lambda p: rows(p / "episodes.jsonl", *CLOCK)),
        }
        yield root, formats, writers


def main(arguments: list[str]) -> dict[str, Counter[str]]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--files", type=int, default=300, help="damaged files of each format")
    parser.add_argument("--kills", type=int, default=10, help="SIGKILLs of each script")
    parser.add_argument("--disks", type=int, default=5, help="full disks of each script")
    parser.add_argument("--only", default="", help="formats and scripts whose names contain this")
    options, found = parser.parse_args(arguments), {}
    torch.set_num_threads(1)
    with places() as (root, formats, writers):
        trials: dict[str, Callable[[Path], Counter[str]]] = {}
        for name, one in formats.items():
            trials[f"files: {name}"] = lambda scratch, one=one: fuzz(one, options.files, scratch)
        for name, one in writers.items():
            trials[f"kills: {name}"] = lambda scratch, one=one: interrupt(one, options.kills, False, scratch)
            trials[f"full disks: {name}"] = lambda scratch, one=one: interrupt(one, options.disks, True, scratch)
        for name, trial in trials.items():
            if options.only in name:
                (scratch := root / "scratch").mkdir()
                found[name] = trial(scratch)
                shutil.rmtree(scratch)
                print(f"{name:32} " + "  ".join(f"{k} {v}" for k, v in sorted(found[name].items())), flush=True)
    return found


if __name__ == "__main__":
    main(sys.argv[1:])
