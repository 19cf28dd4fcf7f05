"""Break what a run reads and interrupt what it writes, and count what comes of it (docs/reliability.md).

    python tests/reliability.py --only files --files 50         damaged files, 50 a format
    python tests/reliability.py --only kills --kills 100        SIGKILLs, 100 a script
    python tests/reliability.py --out results/reliability.json  everything, gathered in a file

Almost every trial is a fork of this process, so that torch is imported once and a crash ends the trial alone.

files: one byte range of one file is damaged; the folder is loaded. "same": equal content. "named": refused with the
file's name. "unnamed": a ValueError or OSError without it. "other": loads other content, which only a checksum could
find. "raw": any other exception. "crash", "hang", "memory": of the process.

kills: a run of a script is killed at random times, by SIGKILL, and given again until it ends. full disks: the same on
small disks (as root), or with a limit on the size of files. "same": it ends as the run that was never interrupted, with
no row lost or doubled. "orphans": processes that outlive a killed one by half a minute.

torchrun: with two processes, one of them and then all are killed, in training; then the run goes on.

commands: command lines that are wrong in one place. "one line": an error of one line, and status 2.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import hashlib
import json
import os
import platform
import random
import re
import resource
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import fields, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

os.environ.setdefault("OMP_NUM_THREADS", "1")
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "studies"))

import h5py
import numpy as np
import records
import torch
from bad_commands import bad_lines, told
from conftest import every_other_succeeds, write_moving_square
from test_rlds import content as rlds_episode
from test_rlds import make as rlds_files

import collect_demos
import demo
import eval_libero
import eval_wm
import rl_rounds
import train_rft
import train_rl
import train_sft
import train_success
import train_tokenizer
import train_wm
from vlarft.data import convert, load_episodes
from vlarft.policy import PolicyConfig, VLAPolicy
from vlarft.proprio_model import fit_proprio_model
from vlarft.run.checkpoint import load_model, load_train_state, model_digest, open_run, save_model, write_json
from vlarft.run.log import RunLog
from vlarft.run.script import only_writer
from vlarft.run.stages import Stage, run_stages
from vlarft.success import SuccessModel
from vlarft.tokenizer import FrameTokenizer
from vlarft.world_model import WorldModel, WorldModelConfig

ROOT = Path(__file__).resolve().parents[1]
LIBC, PR_SET_PDEATHSIG, PR_SET_CHILD_SUBREAPER = ctypes.CDLL(None), 1, 36  # of Linux' prctl
OUTCOMES = ("same", "named", "unnamed", "other", "raw", "memory")  # exit statuses of a trial, from 10
MEMORY = 8 * 2**30  # what a trial may map, bytes
CLOCK = "minutes", "chunk_ms", "seconds"  # what a clock says in the rows of a log, beside all that ends in _s


def fork(trial: Callable[[], int], seconds: float, kill_after: float | None = None, group: bool = False) -> int | str:
    """Run a trial in a fork; return its exit status, or "crash" or "hang"; "killed", alone or with its group, after
    `kill_after` seconds.
    """
    sys.stdout.flush()
    if (pid := os.fork()) == 0:
        status = 1
        with contextlib.suppress(BaseException):
            os.setsid()
            LIBC.prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
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
            with contextlib.suppress(ProcessLookupError):  # of a group that is not made yet
                (os.killpg if group or kill_after is None else os.kill)(pid, signal.SIGKILL)
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


def fuzz(one: Format, count: int, scratch: Path, seed: int) -> Counter[str]:
    """Damage a file of the format `count` times; count the outcomes."""
    shutil.copytree(one.folder, scratch / "copy")  # some loaders write
    expected, counts = digest(one.load(scratch / "copy")), Counter()
    files = (path for path in one.folder.rglob(one.files) if path.is_file() and path.stat().st_size)
    names = sorted(path.relative_to(one.folder) for path in files)
    for number in range(count):
        rng, copy = random.Random(f"{seed} {number}"), scratch / "copy"
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
            except Exception:  # whatever else comes is a fault, and counted as one
                outcome = "raw"
            return 10 + OUTCOMES.index(outcome)

        status = fork(trial, 60)
        counts[status if isinstance(status, str) else OUTCOMES[status - 10] if status >= 10 else "crash"] += 1
    return counts


class Writer(NamedTuple):
    """A script that writes a folder, and what of the folder an interruption must not change."""

    run: Callable[[Path], Any]
    content: Callable[[Path], Any]
    longest: float = 1e9  # [s] before it is killed: a script with many stages makes little of each try
    disks: bool = True  # whether a full disk is tried: where the script itself writes


def rows(path: Path, *without: str) -> list[dict]:
    """The rows of a .jsonl file but for what a clock says."""
    found = [json.loads(line) for line in path.read_text().splitlines()]
    return [{key: row[key] for key in row if key not in without and not key.endswith("_s")} for row in found]


def trained(folder: Path) -> list:
    return [model_digest(folder), rows(folder / "log.jsonl", *CLOCK)]


def children() -> set[int]:
    return set(map(int, Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()))


def orphans(before: set[int], seconds: float = 30) -> int:
    """Wait until all that a trial started has ended; kill what has not after `seconds`, and count it."""
    end = time.monotonic() + seconds
    while left := children() - before:
        for pid in left:
            if time.monotonic() > end:
                os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0 if time.monotonic() > end else os.WNOHANG)
        if time.monotonic() > end:
            return len(left)
        time.sleep(0.02)
    return 0


@contextlib.contextmanager
def small_disk(folder: Path) -> Iterator[Callable[[int], None] | None]:
    """Mount a disk in memory at `folder` and yield what sets its size; None without the right to mount."""
    folder.mkdir(exist_ok=True)
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1g", "none", folder], capture_output=True).returncode
    try:
        yield (
            None
            if mounted
            else lambda size: subprocess.run(
                ["mount", "-o", f"remount,size={size}", folder], check=False, capture_output=True
            )
        )
    finally:
        if not mounted:
            subprocess.run(["umount", "--lazy", folder], check=True)  # readers may have a film open


def interrupt(one: Writer, times: int, full: bool, scratch: Path, seed: int) -> Counter[str]:
    """Interrupt a script, by SIGKILL or, with `full`, by disks that are full; count how its runs end.

    A kill is of the process alone or of its group, by turns. Where no disk can be mounted, a limit on the size of files
    takes its place.
    """
    started = time.monotonic()
    assert fork(lambda: bool(one.run(scratch / "whole" / "run")) and 0, 3600) == 0, "it fails where nothing stops it"
    seconds, expected = min(1.1 * (time.monotonic() - started), one.longest), digest(one.content(scratch / "whole/run"))
    sizes = [path.stat().st_size for path in (scratch / "whole").rglob("*") if path.is_file()]
    counts, rng, done, number = Counter(), random.Random(seed), 0, 0
    while done < times:
        number += 1
        (disk := scratch / str(number)).mkdir()
        with small_disk(disk) if full else contextlib.nullcontext() as resize:
            over: int | str = "killed"
            while over == "killed" and done < times:  # the same command again
                limit = rng.randrange(4096, sum(sizes) if resize else max(sizes))
                if resize:
                    used = sum(path.stat().st_size for path in disk.rglob("*") if path.is_file())
                    resize(limit := max(limit, used + 4096))
                done += 1

                def trial(limit: int = limit, mounted: bool = bool(resize), disk: Path = disk) -> int:
                    if full and not mounted:
                        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
                        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
                    try:
                        one.run(disk / "run")
                    except OSError as error:  # as the disk is full
                        return 2 if str(disk) in str(error) else 3
                    return 0

                before, group = children(), done % 2 == 0
                over = fork(trial, 3600, None if full else rng.uniform(0, seconds), group)
                counts["orphans"] += orphans(before)
                if full:
                    ends = {0: "enough", 2: "named", 3: "unnamed", 1: "raw"}
                    counts[over if isinstance(over, str) else ends[over]] += 1
                    over = 0 if over == 0 else "killed"
            if resize:
                resize(2**30)
            last = fork(lambda disk=disk: bool(one.run(disk / "run")) and 0, 3600)
            same = last == 0 and digest(one.content(disk / "run")) == expected
            counts["same" if same else "different" if last == 0 else "refused for good"] += 1
        shutil.rmtree(disk)
    counts["runs"], counts["full disks" if full else "kills"] = number, done
    return +counts


def torchrun(script: str, flags: Sequence[str], scratch: Path, seed: int) -> Counter[str]:
    """Kill one of two processes under torchrun, then all three, and go on; compare with a run of two that was not."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command += [str(ROOT / script), *flags, "--out-dir"]
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    subprocess.run([*command, scratch / "whole"], check=True, **quiet)
    counts, log, rng = Counter(runs=1), scratch / "parts" / "log.jsonl", random.Random(seed)
    for everyone in (False, True):
        before, others = (len(log.read_text().splitlines()) if log.is_file() else 0), children()
        with subprocess.Popen([*command, scratch / "parts"], start_new_session=True, **quiet) as process:
            while process.poll() is None and (not log.is_file() or len(log.read_text().splitlines()) <= before):
                time.sleep(0.01)
            time.sleep(rng.uniform(0, 0.3))
            ranks = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
            for pid in [process.pid, *map(int, ranks)] if everyone else [rng.choice(list(map(int, ranks)))]:
                os.kill(pid, signal.SIGKILL)
                counts["kills"] += 1
        counts["orphans"] += orphans(others)
    last = subprocess.run([*command, scratch / "parts"], **quiet).returncode
    same = last == 0 and digest(trained(scratch / "parts")) == digest(trained(scratch / "whole"))
    counts["same" if same else "different" if last == 0 else "refused for good"] += 1
    return +counts


def refuse(script: str, lines: Sequence[list[str]]) -> Counter[str]:
    """Give a script wrong command lines; count how they end (see bad_commands.told)."""
    counts, ends = Counter(), ("one line", "more lines", "traceback", "accepted", "another status")
    for line in lines:
        before = children()
        status = fork(lambda line=line: 10 + ends.index(told(script, line)), 60)
        end = status if isinstance(status, str) else ends[status - 10] if status >= 10 else "crash"
        counts[end] += 1
        if end != "one line":
            print(f"  {end}: {script} {' '.join(line[-3:])}", file=sys.stderr)
        counts["orphans"] += orphans(before)
    return +counts


class Places(NamedTuple):
    """Inputs of the trials: formats and writers by name, what runs under torchrun, scripts and wrong command lines."""

    root: Path
    formats: dict[str, Format]
    writers: dict[str, Writer]
    torchrun: dict[str, list[str]]
    commands: dict[str, list[list[str]]]


@contextlib.contextmanager
def places() -> Iterator[Places]:
    """Make small inputs of every kind in a temporary folder."""
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        demos, attempts = root / "demos", root / "attempts"
        for k, colour in enumerate(("red", "blue")):
            write_moving_square(demos / "squares" / f"push_{colour}_demo.hdf5", 3, 14, k, f"push the {colour} square")
        write_moving_square(path := attempts / "policy" / "push_red_demo.hdf5", 4, 14, 2, "push the red square")
        with h5py.File(path, "r+") as file:
            for one in file["data"].values():
                one.attrs.update(kind="policy", success=False)
        convert.main([str(demos), str(root / "png"), "--format", "lerobot", "--images", "png", "--fps", "20"])
        convert.main([str(demos), str(root / "mp4"), "--format", "lerobot", "--fps", "20"])
        rlds_files(root / "rlds", [rlds_episode(0), rlds_episode(1)])

        common = {"demos": (str(demos),), "validation_fraction": 0.2, "steps": 3, "save_interval": 1}
        common |= {"log_interval": 1, "validation_interval": 2}
        models = {"policy": str(root / "sft"), "world_model": str(root / "wm")}
        tokenizer = replace(train_tokenizer.PRESETS["smoke"], **common)
        wm = replace(train_wm.PRESETS["smoke"], tokenizer=str(root / "tokenizer"), **common)
        sft = replace(train_sft.PRESETS["smoke"], **common)
        rft = replace(train_rft.PRESETS["smoke"], **models, demos=(str(demos),), steps=3)
        rl = replace(train_rl.PRESETS["smoke"], policy=str(root / "sft"), demos=(str(demos),), steps=3, horizon=8)
        rl = replace(rl, world="simulator", save_interval=1)
        both = (str(demos), str(attempts))
        success = replace(train_success.PRESETS["smoke"], demos=both, world_model=str(root / "judged"), steps=3)
        success = replace(success, save_interval=1, log_interval=1, validation_interval=3, margin=2, positive=2)
        play = {"policies": (str(root / "player"),), "batch_size": 1, "episodes": 3}
        evaluation = replace(eval_libero.PRESETS["smoke"], **play, workers=0)
        collection = replace(collect_demos.PRESETS["smoke"], tasks=("0",), demos_per_task=2, workers=1)
        rounds = replace(rl_rounds.PRESETS["smoke"], **models, demos=(str(demos),), episodes=4)

        train_tokenizer.main(replace(tokenizer, out_dir=str(root / "tokenizer")))
        train_sft.main(replace(sft, out_dir=str(root / "sft")))
        policy, known = load_model(root / "sft", VLAPolicy, PolicyConfig)
        known["instructions"] = None  # none of them is a task of the suite that it plays
        save_model(root / "player" / "model.safetensors", policy, policy.cfg, known)
        train_wm.main(replace(wm, out_dir=str(root / "wm")))
        model, extra = load_model(root / "wm", WorldModel, WorldModelConfig)
        held_out = [e.name for e in load_episodes(both, successes_only=False)][1::2]
        save_model(root / "judged" / "model.safetensors", model, model.cfg, {**extra, "held_out_episodes": held_out})
        train_success.fit_proprio_model = partial(fit_proprio_model, steps=20)  # nothing is written while it learns
        train_rl.play = every_other_succeeds
        train_success.main(replace(success, out_dir=str(root / "success")))
        played = replace(evaluation, out_dir=str(root / "played"))
        eval_libero.main(played)
        write_json(root / "stages" / "stages.json", {"one": {"command": "x", "seconds": 1.5, "done": True}})

        def again(folder: Path) -> list[dict]:
            """The episodes with which an evaluation goes on."""
            cfg = replace(played, out_dir=str(folder))
            return eval_libero.earlier_records(cfg, eval_libero.check(cfg))

        def log(folder: Path) -> list[dict]:
            """The rows with which a training's log goes on."""
            RunLog(folder, 4, "sft", 3).close()
            return rows(folder / "log.jsonl")

        tensors = "model.safetensors"
        formats = {
            "policy, model.safetensors": Format(root / "sft", tensors, lambda p: VLAPolicy.load(p).state_dict()),
            "tokenizer, model.safetensors": Format(
                root / "tokenizer", tensors, lambda p: FrameTokenizer.load(p).state_dict()
            ),
            "world model, model.safetensors": Format(root / "wm", tensors, lambda p: WorldModel.load(p).state_dict()),
            "success model, model.safetensors": Format(
                root / "success", tensors, lambda p: SuccessModel.load(p).state_dict()
            ),
            "train_state.pt": Format(root / "sft", "*.pt", lambda p: load_train_state(p / "train_state.pt")),
            "config.json": Format(
                root / "sft", "config.json", lambda p: open_run(p, replace(sft, out_dir=str(p))).name
            ),
            "log.jsonl": Format(root / "sft", "log.jsonl", log),
            "episodes.jsonl": Format(root / "played", "episodes.jsonl", again),
            "stages.json": Format(root / "stages", "stages.json", lambda p: run_stages(p, [])),
            "episodes, HDF5": Format(demos, "*.hdf5", episodes),
            "episodes, LeRobot with PNG": Format(root / "png", "*", episodes),
            "episodes, LeRobot with mp4": Format(root / "mp4", "*", episodes),
            "episodes, RLDS": Format(root / "rlds", "*", episodes),
        }

        def script(main: Callable, cfg: Any, content: Callable[[Path], Any] = trained, **how: Any) -> Writer:
            def run(folder: Path) -> None:
                own = replace(cfg, out_dir=str(folder))
                with only_writer(folder):
                    main(own)

            return Writer(run, content, **how)

        def conversion(*flags: str) -> Writer:
            def run(folder: Path) -> None:
                if not folder.exists():  # a complete one is refused, by name
                    convert.main([str(demos), str(folder), *flags])

            return Writer(run, episodes)

        def collected(folder: Path) -> list[bytes]:
            return [path.read_bytes() for path in sorted(folder.rglob("*.hdf5"))]

        def evaluated(folder: Path) -> list[dict]:
            return sorted(rows(folder / "episodes.jsonl", *CLOCK, "worker_deaths"), key=lambda row: row["init_state"])

        def learned(folder: Path) -> list:
            results = json.loads((folder / "eval_1" / "results.json").read_text())["policies"]
            return [trained(folder / f"{name}_1") for name in ("wm", "success", "rl")] + [p["all"] for p in results]

        writers = {
            "train_tokenizer.py": script(train_tokenizer.main, tokenizer),
            "train_wm.py": script(train_wm.main, wm),
            "train_sft.py": script(train_sft.main, sft),
            "train_rft.py": script(train_rft.main, rft),
            "train_rl.py": script(train_rl.main, rl),
            "train_success.py": script(train_success.main, success),
            "collect_demos.py": script(collect_demos.main, collection, collected),
            "eval_libero.py": script(eval_libero.main, evaluation, evaluated),
            "convert to HDF5": conversion("--format", "hdf5"),
            "convert to LeRobot, PNG": conversion("--format", "lerobot", "--images", "png"),
            "convert to LeRobot, mp4": conversion("--format", "lerobot"),
            "rl_rounds.py": script(rl_rounds.main, rounds, learned, longest=8, disks=False),
        }

        def flags(cfg: Any, **changes: Any) -> list[str]:
            """The options that make the smoke preset this configuration."""
            cfg, smoke = replace(cfg, **changes), sys.modules[type(cfg).__module__].PRESETS["smoke"]
            values = {f.name: getattr(cfg, f.name) for f in fields(cfg)}
            given = {k: "none" if v is None else v for k, v in values.items() if v != getattr(smoke, k)}
            return ["--preset", "smoke", *Stage("", ROOT, given).words()]

        multiple = {"train_tokenizer.py": tokenizer, "train_wm.py": wm, "train_sft.py": sft, "train_rft.py": rft}
        (root / "empty").mkdir()
        (root / "text").write_text("no such thing\n")
        (root / "link").symlink_to(root / "nothing")
        others = {"missing": root / "missing", "folder": root / "empty", "text": root / "text"}
        others |= {"link to nothing": root / "link", "device": Path("/dev/null"), "json": root / "sft" / "config.json"}
        out = {"out_dir": str(root / "out")}
        measured = replace(eval_wm.PRESETS["smoke"], world_model=str(root / "wm"), demos=(str(demos),))
        configs = {"train_rl.py": rl, "train_success.py": success, "collect_demos.py": collection}
        configs |= {**multiple, "eval_libero.py": evaluation, "eval_wm.py": measured, "rl_rounds.py": rounds}
        configs |= {"demo.py": demo.PRESETS["smoke"]}
        commands = {name: list(bad_lines(type(cfg), flags(cfg, **out), others)) for name, cfg in configs.items()}
        good = [str(demos), str(root / "converted"), "--format", "lerobot", "--images", "png"]
        wrong = [
            ["--crf", "52"],
            ["--crf", "x"],
            ["--fps", "0"],
            ["--fps", "nan"],
            ["--size", "0", "64"],
            ["--size", "64"],
        ]
        wrong += [["--gripper", "nan", "1"], ["--gripper", "1", "1"], ["--gripper-dims", "9"], ["--held-dims", "-1"]]
        wrong += [["--camera", "nonsense"], ["--kind", "nonsense"], ["--centre-crop"], ["--format", "x"], ["--x"]]
        commands["vlarft.data.convert"] = [
            *([*good, *flags] for flags in wrong),
            *([str(path), *good[1:]] for path in others.values()),
            *([good[0], place, *good[2:]] for place in (str(root), str(demos), str(demos / "in"), str(root / "text"))),
        ]
        commands["vlarft.data.check"] = [[], ["--x"], [str(demos), "--json"], [str(demos), "--json", str(root)]]
        yield Places(root, formats, writers, {name: flags(cfg, steps=10) for name, cfg in multiple.items()}, commands)


def gathered(path: Path, name: str, found: dict) -> None:
    """Add what a trial found to a JSON file, in place of what it has of the same one."""
    report = json.loads(path.read_text()) if path.is_file() else {}
    report["machine"] = f"{platform.machine()}, {os.cpu_count()} cores, torch {torch.__version__}"
    report["trials"] = dict(sorted((report.get("trials", {}) | {name: found}).items()))
    records.write(path, report)


def main(arguments: list[str]) -> dict[str, Counter[str]]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--files", type=int, default=300, help="damaged files of each format")
    parser.add_argument("--kills", type=int, default=10, help="SIGKILLs of each script")
    parser.add_argument("--disks", type=int, default=5, help="full disks of each script")
    parser.add_argument("--torchrun", type=int, default=1, help="0: nothing under torchrun")
    parser.add_argument("--commands", type=int, default=10**6, help="wrong command lines of each script, at most")
    parser.add_argument("--only", default="", help="trials whose names contain this, a regular expression")
    parser.add_argument("--seed", type=int, default=0, help="seed of damage, times and sizes")
    parser.add_argument("--out", type=Path, help="JSON file that gathers the counts")
    options, found = parser.parse_args(arguments), {}
    words = shlex.join(["tests/reliability.py", *arguments]).replace(f" --out {options.out}", "")
    torch.set_num_threads(1)
    LIBC.prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)  # what a killed process leaves becomes a child of this one
    with places() as (root, formats, writers, multiple, commands):
        trials: dict[str, Callable[[Path], Counter[str]]] = {}
        for name, one in formats.items():
            trials[f"files: {name}"] = lambda scratch, one=one: fuzz(one, options.files, scratch, options.seed)
        for name, one in writers.items():
            cut = partial(interrupt, one, options.kills, False, seed=options.seed)
            trials[f"kills: {name}"] = lambda scratch, cut=cut: cut(scratch=scratch)
            fill = partial(interrupt, one, options.disks * one.disks, True, seed=options.seed)
            trials[f"full disks: {name}"] = lambda scratch, fill=fill: fill(scratch=scratch)
        for name, flags in multiple.items() if options.torchrun else ():
            trials[f"torchrun: {name}"] = partial(torchrun, name, flags, seed=options.seed)
        for name, lines in commands.items():
            chosen = random.Random(options.seed).sample(lines, min(options.commands, len(lines)))
            trials[f"commands: {name}"] = lambda scratch, name=name, chosen=chosen: refuse(name, chosen)
        for name, trial in trials.items():
            if re.search(options.only, name):
                (scratch := root / "scratch").mkdir()
                counts = trial(scratch)
                shutil.rmtree(scratch)
                if counts:
                    found[name] = counts
                    if options.out:
                        gathered(options.out, name, {**counts, "command": words})
                    print(f"{name:42} " + "  ".join(f"{k} {v}" for k, v in sorted(counts.items())), flush=True)
    LIBC.prctl(PR_SET_CHILD_SUBREAPER, 0, 0, 0, 0)
    return found


if __name__ == "__main__":
    main(sys.argv[1:])
