"""Time the training steps of Stage I on this processor, by the scripts themselves: float32 and bfloat16 on one core,
and what keeps both cores busy, threads in one training or two trainings side by side.

    python benchmarks/precision.py --demos demos --tokenizer runs/tokenizer

Each of train_tokenizer.py, train_wm.py and train_sft.py trains for a few steps in every version of `VERSIONS` in turns,
`repeats` times. Seconds per step are those between its first and its last but one line of the log: without what comes
before the first step, and without the validation at the end; of trainings side by side, their mean by the number of
trainings. Says what `--precision auto` would choose. Writes one JSON file.
"""

import json
import os
import statistics
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from timing import Timing, machine, ratio

from vlarft.run.checkpoint import write_json
from vlarft.run.config import Count, opt, parse, to_dict
from vlarft.run.precision import in_bf16

ROOT = Path(__file__).resolve().parents[1]
STAGES = {"tokenizer": "train_tokenizer.py", "world model": "train_wm.py", "SFT": "train_sft.py"}
LOG_INTERVAL, NEVER = 5, 10**6
CORES = os.cpu_count() or 1


class Version(NamedTuple):
    """Number format, threads of each training, trainings side by side."""

    precision: str
    threads: int = 1
    at_once: int = 1


VERSIONS = {
    "fp32": Version("fp32"),
    "bf16": Version("bf16"),
    "fp32_threads": Version("fp32", threads=CORES),
    "bf16_side_by_side": Version("bf16", at_once=CORES),
}
GAINS = {"bf16": "fp32", "bf16_side_by_side": "fp32_threads"}  # and what each is compared with


@dataclass(frozen=True)
class Config:
    demos: str = opt("demos", "demonstrations to train on")
    tokenizer: str = opt("runs/tokenizer", "tokenizer of the world model, trained on them: run folder or file")
    stage_preset: str = opt("tiny", "preset of the stages")
    steps: Count = opt(60, "steps of each training, three log lines at least")
    repeats: Count = opt(3, "trainings of each stage in each format")
    out: str = opt("runs/benchmarks/precision.json", "JSON file to write")

    def __post_init__(self) -> None:
        if self.steps < 3 * LOG_INTERVAL:
            raise ValueError(f"--steps {self.steps}: give {3 * LOG_INTERVAL} at least, three log lines")


PRESETS = {"paper": Config(), "smoke": Config(stage_preset="smoke", steps=15, repeats=1)}


def seconds_per_step(cfg: Config, stage: str, version: Version) -> float:
    """Train a stage for a few steps; return its seconds per step.

    Raises:
        RuntimeError: the script failed.
    """
    words = [sys.executable, str(ROOT / STAGES[stage]), "--preset", cfg.stage_preset, "--demos", cfg.demos]
    words += ["--precision", version.precision, "--steps", str(cfg.steps), "--log-interval", str(LOG_INTERVAL)]
    words += ["--validation-interval", str(NEVER), "--save-interval", str(NEVER)]
    words += ["--tokenizer", cfg.tokenizer] if stage == "world model" else []
    threads = {**os.environ, "OMP_NUM_THREADS": str(version.threads)}
    with tempfile.TemporaryDirectory() as scratch:
        folders = [Path(scratch, str(number)) for number in range(version.at_once)]
        pipes = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE, "text": True, "env": threads}
        runs = [subprocess.Popen([*words, "--out-dir", str(folder)], **pipes) for folder in folders]
        for error, run in [(run.communicate()[1], run) for run in runs]:
            if run.returncode:
                raise RuntimeError(f"{STAGES[stage]} failed: {error[-2000:]}")
        logs = [(folder / "log.jsonl").read_text().splitlines() for folder in folders]
    ends = [[json.loads(lines[number]) for number in (0, -2)] for lines in logs]
    spent = [60 * (last["minutes"] - first["minutes"]) / (last["step"] - first["step"]) for first, last in ends]
    return statistics.mean(spent) / version.at_once


def main(cfg: Config) -> dict:
    """Measure; return what the JSON file holds."""
    chosen = "bf16" if in_bf16("auto", torch.device("cpu")) else "fp32"
    report = {"command": "python benchmarks/precision.py", "config": to_dict(cfg), **machine("cpu"), "auto": chosen}
    for stage in STAGES:
        times: dict[str, list[float]] = {name: [] for name in VERSIONS}
        for _ in range(cfg.repeats):
            for name, version in VERSIONS.items():
                times[name].append(seconds_per_step(cfg, stage, version))
        timings = {name: Timing(statistics.median(spent), min(spent), max(spent)) for name, spent in times.items()}
        gains = {name: ratio(timings[name], timings[other]) for name, other in GAINS.items()}
        report[stage] = {
            "seconds": {name: timing.median for name, timing in timings.items()},
            "times_faster": {name: {"median": median, "spread": spread} for name, (median, spread) in gains.items()},
        }
        for name, (median, spread) in gains.items():
            found = f"{median:.2f} times as fast as {GAINS[name]} [{spread[0]:.2f}, {spread[1]:.2f}]"
            print(f"{stage}: {name} {found}", flush=True)
    write_json(cfg.out, report)
    return report


if __name__ == "__main__":
    main(parse(Config, PRESETS, sys.argv[1:], __doc__))
