"""Time the training steps of all stages on this processor, by the scripts themselves: float32 and bfloat16 on one
core, and what keeps both cores busy, threads in one training or two trainings side by side.

    python benchmarks/precision.py --demos demos --tokenizer runs/tokenizer --world-model runs/wm --policy runs/sft

Each script of `STAGES` trains for a few steps in every version of `VERSIONS` in turns, `repeats` times; RL plays in the
simulator, without worker processes. Seconds per step are those between its first and its last but one line of the log:
without what comes before the first step, and without the validation at the end; of trainings side by side, their mean
by the number of trainings. Says what `--precision auto` would choose. Writes one JSON file.
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
STAGES = {
    "tokenizer": "train_tokenizer.py",
    "world model": "train_wm.py",
    "SFT": "train_sft.py",
    "RFT": "train_rft.py",
    "RL": "train_rl.py",
}
FINE_TUNING = ("RFT", "RL")  # whose steps are longer, and all in the log
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
    world_model: str = opt("runs/wm", "world model that RFT asks: run folder or file")
    policy: str = opt("runs/sft", "policy that RFT and RL start from: run folder or file")
    stages: tuple[str, ...] = opt(tuple(STAGES), "stages to time")
    stage_preset: str = opt("tiny", "preset of the stages")
    steps: Count = opt(60, "steps of each training, three log lines at least")
    fine_tuning_steps: Count = opt(5, "steps of RFT and RL, three at least")
    repeats: Count = opt(3, "trainings of each stage in each format")
    out: str = opt("runs/benchmarks/precision.json", "JSON file to write")

    def __post_init__(self) -> None:
        if unknown := [name for name in self.stages if name not in STAGES]:
            raise ValueError(f"--stages {unknown[0]}: give some of {', '.join(STAGES)}")
        if self.steps < 3 * LOG_INTERVAL:
            raise ValueError(f"--steps {self.steps}: give {3 * LOG_INTERVAL} at least, three log lines")
        if self.fine_tuning_steps < 3:
            raise ValueError(f"--fine-tuning-steps {self.fine_tuning_steps}: give 3 at least")


PRESETS = {"paper": Config(), "smoke": Config(stage_preset="smoke", steps=15, fine_tuning_steps=3, repeats=1)}


def seconds_per_step(cfg: Config, stage: str, version: Version) -> float:
    """Train a stage for a few steps; return its seconds per step.

    Raises:
        RuntimeError: the script failed.
    """
    steps = cfg.fine_tuning_steps if stage in FINE_TUNING else cfg.steps
    words = [sys.executable, str(ROOT / STAGES[stage]), "--preset", cfg.stage_preset, "--demos", cfg.demos]
    words += ["--precision", version.precision, "--steps", str(steps), "--save-interval", str(NEVER)]
    if stage in FINE_TUNING:
        words += ["--policy", cfg.policy]
    else:
        words += ["--log-interval", str(LOG_INTERVAL), "--validation-interval", str(NEVER)]
    words += {
        "world model": ["--tokenizer", cfg.tokenizer],
        "RFT": ["--world-model", cfg.world_model, "--gate-starts", "0"],
        "RL": ["--world", "simulator", "--workers", "0"],
    }.get(stage, [])
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
    for stage in cfg.stages:
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
        write_json(cfg.out, report)  # after each stage, since they take long
    return report


if __name__ == "__main__":
    main(parse(Config, PRESETS, sys.argv[1:], __doc__))
