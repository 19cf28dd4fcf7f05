"""What the studies share: stage scripts run as a user would run them, and what describes a run."""

import json
import os
import platform
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from vlarft.run.checkpoint import checkpoint_file, model_digest, read_json, write_json
from vlarft.run.config import to_dict

ROOT = Path(__file__).resolve().parents[1]
PLANNERS = "--world-model", "--success-model"  # flags of eval_libero.py that name what --plan chooses with


def call(*words: object) -> str:
    """Run a script of the repository with the command that a user would type, printed; return that command line.

    Raises:
        subprocess.CalledProcessError: it failed.
    """
    command = [str(word) for word in words]
    line = shlex.join(["python", *command])
    print(f"\n{line}", flush=True)
    run_python(command)
    return line


def run_python(command: Sequence[str]) -> None:
    """Run a script of the repository in a process of its own.

    Raises:
        subprocess.CalledProcessError: it failed.
    """
    subprocess.run([sys.executable, str(ROOT / command[0]), *command[1:]], check=True)


def run_once(out_dir: Path, *words: object) -> Path:
    """Run a stage with `--out-dir` unless it finished there before; return that folder, whose `stage.json` holds the
    minutes of all starts and the commit of the last one.

    Raises:
        ValueError: what finished there was another command, or began with a model that has been replaced since.
    """
    done, command = out_dir / "done", shlex.join(map(str, words))
    before = done.read_text() if done.is_file() else None
    if before is None:
        started, facts = time.monotonic(), out_dir / "stage.json"
        earlier = read_json(facts)["minutes"] if facts.is_file() else 0.0
        try:
            call(*words, "--out-dir", out_dir)
        finally:
            if out_dir.is_dir():
                minutes = earlier + (time.monotonic() - started) / 60
                write_json(facts, {"minutes": round(minutes, 3), "commit": commit()})
        done.write_text(command)
    elif before not in ("", command):  # empty: of an older version
        raise ValueError(f"{out_dir} is of another command, {before}; now it would be {command}: give another folder")
    else:
        check_models(out_dir)
    return out_dir


def check_models(out_dir: Path) -> None:
    """Check that the models that a finished stage began with, where it names them, are still those of its command."""
    digests, words = (
        read_json(file) if (file := out_dir / name).is_file() else {} for name in ("inputs.json", "config.json")
    )
    for name, digest in digests.items():
        if (place := words.get(name)) and checkpoint_file(place).is_file() and model_digest(place) != digest:
            raise ValueError(
                f"{out_dir} began with another {name} than {place} is today: remove the folder, to train it again"
            )


def fine_tuning(flags: Sequence[object]) -> str:
    """Return the script that a fine-tuning with these flags runs: that of the variants, where they name one."""
    return "studies/variants.py" if "--variant" in flags else "train_rft.py"


def with_attempts(demos: Path, seen: Path, *flags: object) -> Path:
    """Copy demonstrations to `seen`, which `collect_demos.py` then adds attempts to, as its `flags` say."""
    if not seen.is_dir():
        unfinished = seen.with_name(f"{seen.name}.tmp")
        shutil.copytree(demos, unfinished, ignore=shutil.ignore_patterns("done"), dirs_exist_ok=True)
        unfinished.rename(seen)
    return run_once(seen, "collect_demos.py", *flags)


@dataclass(frozen=True)
class Starts:
    """What policies of a study play: `episodes` initial states of each of `tasks` of a suite."""

    suite: str
    tasks: Sequence[str]
    episodes: int
    preset: str

    def play(self, out_dir: Path, policy: Path, perturb: str = "none", *more: str) -> dict[tuple, bool]:
        """Play a policy by `eval_libero.py`, unless that is done; return its outcomes: (task, initial state) ->
        success. `more`: further flags of the script.
        """
        flags = ["--suites", self.suite, "--tasks", *self.tasks, "--episodes", self.episodes]
        flags += [] if perturb == "none" else ["--perturb", perturb]
        log, done = out_dir / "episodes.jsonl", out_dir / "done"
        models = [policy, *(more[more.index(name) + 1] for name in PLANNERS if name in more)]
        digest = "+".join(map(model_digest, models))
        if done.is_file() and {record.get("digest", digest) for record in read_lines(log)} != {digest}:
            done.unlink()  # a model has been trained again: eval_libero.py then plays all again
        run_once(out_dir, "eval_libero.py", "--preset", self.preset, "--policies", policy, *flags, *more)
        records = read_lines(log)
        return {(record["task"], record["init_state"]): record["success"] for record in records}


def read_lines(path: Path) -> list[dict]:
    """Read the rows of a JSON-lines file."""
    return [json.loads(line) for line in path.read_text().splitlines()]


def check_known(names: Sequence[str], known: Iterable[str], what: str) -> None:
    """Refuse what a study does not have.

    Raises:
        ValueError: an unknown name.
    """
    known = tuple(known)
    if unknown := [name for name in names if name not in known]:
        raise ValueError(f"unknown {what} {unknown[0]!r}; there are: {', '.join(known)}")


def read_report(cfg: object, what: str, free: Sequence[str]) -> dict:
    """Read the JSON file `cfg.out`, which gathers `what` (its key) of several invocations, or begin a new one. Its
    "settings" are all options but the `free` ones; one that came after the file has its default there.

    Raises:
        ValueError: it has another setting, or is another script's.
    """
    path = Path(cfg.out)
    before = json.loads(path.read_text()) if path.is_file() else {what: {}}
    if what not in before:
        raise ValueError(f"{path} has no {what}, it is not of this script: give another file as --out")
    both = (json.loads(json.dumps(to_dict(of))) for of in (cfg, type(cfg)()))
    settings, default = ({name: value for name, value in of.items() if name not in free} for of in both)
    for name, value in settings.items() if "settings" in before else ():
        if (there := before["settings"].get(name, default[name])) != value:
            raise ValueError(f"{path} holds {what} with {name} {there}, not {value}: give another file as --out")
    return {**before, "settings": settings}


def commit() -> str | None:
    """Return the commit of the repository, with "+" behind it where files have changed since; None outside of one."""
    git = ["git", "-C", str(ROOT), "describe", "--always", "--dirty=+", "--exclude=*"]
    found = subprocess.run(git, capture_output=True, text=True, check=False)
    return found.stdout.strip() or None


def machine() -> str:
    """Describe architecture, cores and torch version, for the reports."""
    return f"{platform.machine()}, {os.cpu_count()} cores, torch {torch.__version__}"
