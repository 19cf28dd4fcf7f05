"""Run the measurements that need a GPU, the most telling first, within the minutes for which one is lent.

    python benchmarks/gpu_queue.py --minutes 9                  on a GPU: all that fits
    python benchmarks/gpu_queue.py --only "world model"         eight minutes of training, alone
    python benchmarks/gpu_queue.py --device cpu                 at smoke size, without the stages, on any machine
    python benchmarks/gpu_queue.py --write-list                 rewrites benchmarks/gpu_queue.md, and runs nothing

The package need not be installed, only torch, numpy, safetensors, einops and tqdm. Every item is a process of its own
with a time limit of its own; what is left of it is killed, and the next one starts. Nothing is downloaded. A part that
this machine lacks is replaced or left out, and the item's entry says so; carry wheels there (`pip download -d wheels
mujoco h5py pillow`) and install them by `pip install --no-index --find-links wheels mujoco h5py pillow`. `out_dir` gets
a file for each item, most of them as soon as a part of it is measured, and queue.json: for each item its command,
state, seconds, and the end of what it printed. A later call adds to both; an item's file of an earlier call is removed
before it runs again. Copy the files of items that passed to results/. Status 1 where an item failed or ran out of time.
"""

import contextlib
import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "src"))  # where nobody has installed the package

from vlarft.run.checkpoint import write_json
from vlarft.run.config import opt, parse
from vlarft.run.script import clear_errors, signals_end_this_process
from vlarft.run.stages import descendants

ROOT = Path(__file__).resolve().parents[1]
MEASURED = "benchmarks/timing.py", ":(glob)train_*.py", ":(glob)src/vlarft/*.py", "src/vlarft/nets"  # beside the script
TAIL = 2000  # characters of an item's output that are kept


class Item(NamedTuple):
    """One measurement.

    what: it tells, for gpu_queue.md.
    seconds: after which it is killed.
    script: of benchmarks/.
    flags: on a GPU; a part in braces is that of `parts`.
    smoke: flags at smoke size on any machine, beside `--preset smoke`.
    alone: runs only if it is asked for by name.
    needs: modules without which it is left out.
    """

    what: str
    seconds: int
    script: str
    flags: str
    smoke: str = ""
    alone: bool = False
    needs: tuple[str, ...] = ()

    def words(self, device: str, out: Path) -> list[str]:
        """Return the command line."""
        used = {name: flags for name, (flags, _) in parts().items()}
        flags = self.flags.format(**used) if device == "cuda" else f"--preset smoke {self.smoke}"
        words = [sys.executable, str(ROOT / "benchmarks" / self.script), *flags.split()]
        return [*words, "--device", device, "--out", str(out)]


QUEUE = {
    "check": Item(
        "public outputs, CUDA graphs, bfloat16, compilation, every stage at smoke size",
        120, "gpu_check.py", "{stages}", "--no-stages",
    ),
    "rft step": Item(
        "one GRPO step of preset `paper`, 16 x 16 x 8 frames: seconds per phase, share of peak FLOP/s, peak memory",
        90, "rft_step.py", "--sizes paper --policy paper --perceptual {lpips} --repeats 2 --versions none",
    ),
    "rollout": Item(
        "rollouts of preset `paper`, batched and a single chunk, against transformers' `generate`",
        115, "rollout.py", "--sizes paper --starts 4 --repeats 1", needs=("transformers",),
    ),
    "policy": Item(
        "policy, preset `paper`: chunk latency, training steps a second at batch 16, peak memory, with and without "
        "compilation; chunk latency in a CUDA graph",
        110, "policy.py", "--whole --compile",
    ),
    "pixels": Item(
        "pixel decode and image reward at the paper's sizes",
        45, "pixels.py", "--sizes paper --perceptual {lpips} --repeats 2",
    ),
    "training": Item(
        "training steps of tokenizer and world model, preset `paper`",
        60, "training.py", "--sizes paper --segments 4 --repeats 3", needs=("transformers",),
    ),
    "world model": Item(
        "the strongest Tabletop world model of eight minutes: four suites, preset `tiny`, bfloat16",
        560, "gpu_world_model.py", "", alone=True, needs=("mujoco", "h5py", "PIL"),
    ),
}  # fmt: skip
BY_HAND = {
    "one GRPO step against the straightforward pipeline and the public release's computation, 4 starts": (
        "python benchmarks/rft_step.py --sizes paper --policy paper --device cuda --starts 4 "
        "--out results/rft_step_gpu_versions.json",
        "results/rft_step_gpu_versions.json",
    ),
    "speedup of each optimisation of the rollout": (
        "python benchmarks/undone.py --sizes paper --device cuda --out results/undone_gpu.json",
        "results/undone_gpu.json",
    ),
    "world-model study, after `studies/base.py`: which factors raise action sensitivity": (
        "python studies/wm_study.py --out results/wm_study_gpu.json",
        "results/wm_study_gpu.json",
    ),
    "step times of SFT of preset `paper` on 8 GPUs, to compare with the predictions of `docs/scaling.md`": (
        "torchrun --nproc-per-node 8 train_sft.py --preset paper --init random --demos DEMOS --steps 100 "
        "--out-dir runs/scaling && cp runs/scaling/log.jsonl results/scaling_8gpu.jsonl",
        "results/scaling_8gpu.jsonl",
    ),
}


@dataclass(frozen=True)
class Config:
    minutes: float = opt(9.5, "no item starts that could end after this [min]")
    only: tuple[str, ...] = opt((), "names of the items to run; none: all but those that run alone")
    device: Literal["cuda", "cpu"] = opt("cuda", "where to run; cpu: at smoke size")
    out_dir: str = opt("runs/gpu_queue", "folder to write")
    write_list: bool = opt(False, "rewrite benchmarks/gpu_queue.md, and run nothing")

    def __post_init__(self) -> None:
        if unknown := set(self.only) - set(QUEUE):
            raise ValueError(f"unknown item {sorted(unknown)[0]!r}: there are {', '.join(QUEUE)}")


PRESETS = {"paper": Config()}


def parts() -> dict[str, tuple[str, str]]:
    """List what depends on installed packages, by its name in `Item.flags`: flags here, and what is said of them."""
    lacking = missing("mujoco", "h5py", "matplotlib")
    random = "its VGG weights are random, on which times do not depend"
    return {
        "lpips": ("ssim", "no lpips here: ssim in its place") if missing("lpips") else ("lpips", random),
        "stages": ("--no-stages", f"no {lacking} here: no stage runs") if lacking else ("", ""),
    }


def missing(*modules: str) -> str:
    """Name the first of some modules that is not installed; "" if all are."""
    return next((name for name in modules if importlib.util.find_spec(name) is None), "")


def file_name(item: str) -> str:
    return item.replace(" ", "_") + "_gpu.json"


def state_of(result: str, script: str) -> str:
    """Return the state of a committed result of a script: missing, or the commit at which it was measured, stale if
    the measured code has changed since. A "+" follows the commit of a tree that had other changes.
    """
    path = ROOT / result
    found = json.loads(path.read_text()) if path.suffix == ".json" and path.is_file() else {}
    if "commit" not in found:
        return "measured" if path.is_file() else "missing"
    command = ["git", "diff", "--quiet", found["commit"].rstrip("+"), "--", script, *MEASURED]
    changed = subprocess.run(command, cwd=ROOT, capture_output=True).returncode == 1  # 128: the commit is not here
    return f"{'stale: ' * changed}measured at {found['commit']}"


def listing() -> str:
    """Return the text of gpu_queue.md."""
    lines = [
        "# Measurements that need a GPU",
        "",
        "Written by `python benchmarks/gpu_queue.py --write-list`. `python benchmarks/gpu_queue.py` runs those of the",
        "first table in this order, each within its time; copy the files that it writes to `results/`.",
        "",
        "| item | measures | limit [s] | result | state |",
        "|---|---|---|---|---|",
    ]
    for name, item in QUEUE.items():
        alone = "; only with `--only`" if item.alone else ""
        result = f"results/{file_name(name)}"
        state = state_of(result, f"benchmarks/{item.script}")
        lines.append(f"| {name}{alone} | {item.what} | {item.seconds} | `{result}` | {state} |")
    lines += ["", "By hand, since they take longer or need more GPUs:", ""]
    lines += ["| measurement | command | result | state |", "|---|---|---|---|"]
    for what, (command, result) in BY_HAND.items():
        script = next(word for word in command.split() if word.endswith(".py"))
        lines.append(f"| {what} | `{command}` | `{result}` | {state_of(result, script)} |")
    return "\n".join(lines) + "\n"


def commit() -> str:
    """Return the checkout's commit, with "+" behind it where files have changed since, or "unknown" outside git."""
    try:
        command = ["git", "describe", "--always", "--dirty=+", "--exclude=*"]
        run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    except OSError:  # no git at all
        return "unknown"
    return run.stdout.strip() or "unknown"


def run_item(words: list[str], limit: float) -> dict[str, object]:
    """Run a command for at most `limit` seconds: its state, seconds, and the end of its output."""
    started = time.monotonic()
    paths = os.pathsep.join(filter(None, (str(ROOT / "src"), os.environ.get("PYTHONPATH"))))
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True, "errors": "replace"}
    environment = {**os.environ, "PYTHONPATH": paths}
    process = subprocess.Popen(words, cwd=ROOT, env=environment, start_new_session=True, **pipes)
    try:
        output, _ = process.communicate(timeout=limit)
        state = "passed" if process.returncode == 0 else "failed"
    except subprocess.TimeoutExpired:
        state = "out of time"
    finally:  # also on Ctrl+C, and for what the process itself started, stages in sessions of their own among it
        for kill, pid in [(os.killpg, process.pid), *((os.kill, pid) for pid in descendants(process.pid)[1:])]:
            with contextlib.suppress(ProcessLookupError):
                kill(pid, signal.SIGKILL)
    if state == "out of time":
        output, _ = process.communicate()
    return {"state": state, "seconds": round(time.monotonic() - started, 1), "output": output[-TAIL:]}


def main(cfg: Config) -> dict:
    """Run the queue; return what queue.json holds of the items of this call.

    Raises:
        RuntimeError: torch finds no GPU, and one is asked for.
    """
    if cfg.write_list:
        (ROOT / "benchmarks" / "gpu_queue.md").write_text(listing())
        return {}
    if cfg.device == "cuda" and not torch.cuda.is_available():
        raise RuntimeError("torch finds no GPU here: --device cpu runs the queue at smoke size")
    started, out = time.monotonic(), Path(cfg.out_dir)
    out.mkdir(parents=True, exist_ok=True)
    path, made = out / "queue.json", {}
    report: dict[str, dict] = json.loads(path.read_text()) if path.is_file() else {}
    for name in cfg.only or [name for name, item in QUEUE.items() if not item.alone]:
        item, result = QUEUE[name], out / file_name(name)
        words = item.words(cfg.device, result)
        entry = report[name] = made[name] = {"command": " ".join(words[1:])}
        used = [said for part, (_, said) in parts().items() if f"{{{part}}}" in item.flags and said]
        if cfg.device == "cuda" and used:  # at smoke size all items run with what every machine has
            entry["replaced"] = "; ".join(used)
        if lacking := missing(*item.needs):
            entry["state"] = f"left out: no {lacking} here"
        elif time.monotonic() - started + item.seconds > 60 * cfg.minutes:
            entry["state"] = "not started: too little time left"
        else:
            print(f"{name}: at most {item.seconds} s", flush=True)
            entry["state"] = "was interrupted"
            write_json(path, report)
            result.unlink(missing_ok=True)  # of an earlier call
            entry |= run_item(words, item.seconds)
            if result.is_file():
                write_json(result, {**json.loads(result.read_text()), "commit": commit()})
        print(f"{name}: {entry['state']}, {entry.get('seconds', 0)} s", flush=True)
        if entry["state"] in ("failed", "out of time"):
            print(entry["output"], flush=True)
        write_json(path, report)
    print("\n" + "\n".join(f"{name:<12} {e['state']:<36} {e.get('seconds', 0):>6} s" for name, e in made.items()))
    return made


if __name__ == "__main__":
    with clear_errors(), signals_end_this_process():
        made = main(parse(Config, PRESETS, sys.argv[1:], __doc__))
    sys.exit(any(entry["state"] in ("failed", "out of time") for entry in made.values()))
