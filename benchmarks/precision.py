"""Time the training steps of Stage I in float32 and in bfloat16 on this processor, by the scripts themselves.

    python benchmarks/precision.py --demos demos --tokenizer runs/tokenizer

Each of train_tokenizer.py, train_wm.py and train_sft.py trains for a few steps with `--precision fp32` and `bf16` in
turns, `repeats` times. Seconds per step are those between its first and its last but one line of the log: without what
comes before the first step, and without the validation at the end. Says what `--precision auto` would choose. Writes
one JSON file.
"""

import json
import statistics
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch
from timing import Timing, machine, ratio

from vlarft.run.checkpoint import write_json
from vlarft.run.config import Count, opt, parse, to_dict
from vlarft.run.precision import in_bf16

ROOT = Path(__file__).resolve().parents[1]
STAGES = {"tokenizer": "train_tokenizer.py", "world model": "train_wm.py", "SFT": "train_sft.py"}
LOG_INTERVAL, NEVER = 5, 10**6


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


def seconds_per_step(cfg: Config, stage: str, precision: str) -> float:
    """Train a stage for a few steps; return its seconds per step.

    Raises:
        RuntimeError: the script failed.
    """
    with tempfile.TemporaryDirectory() as folder:
        words = [sys.executable, str(ROOT / STAGES[stage]), "--preset", cfg.stage_preset, "--demos", cfg.demos]
        words += ["--precision", precision, "--steps", str(cfg.steps), "--log-interval", str(LOG_INTERVAL)]
        words += ["--validation-interval", str(NEVER), "--save-interval", str(NEVER), "--out-dir", folder]
        words += ["--tokenizer", cfg.tokenizer] if stage == "world model" else []
        run = subprocess.run(words, capture_output=True, text=True)
        if run.returncode:
            raise RuntimeError(f"{STAGES[stage]} failed: {run.stderr[-2000:]}")
        rows = [json.loads(line) for line in Path(folder, "log.jsonl").read_text().splitlines()]
    first, last = rows[0], rows[-2]
    return 60 * (last["minutes"] - first["minutes"]) / (last["step"] - first["step"])


def main(cfg: Config) -> dict:
    """Measure; return what the JSON file holds."""
    chosen = "bf16" if in_bf16("auto", torch.device("cpu")) else "fp32"
    report = {"command": "python benchmarks/precision.py", "config": to_dict(cfg), **machine("cpu"), "auto": chosen}
    for stage in STAGES:
        times: dict[str, list[float]] = {"fp32": [], "bf16": []}
        for _ in range(cfg.repeats):
            for precision, spent in times.items():
                spent.append(seconds_per_step(cfg, stage, precision))
        timings = {name: Timing(statistics.median(spent), min(spent), max(spent)) for name, spent in times.items()}
        faster, spread = ratio(timings["bf16"], timings["fp32"])
        report[stage] = {**{f"{name}_s": t.median for name, t in timings.items()}, "times_faster": faster}
        report[stage]["spread"] = spread
        print(f"{stage}: {faster:.2f} times as fast in bfloat16 [{spread[0]:.2f}, {spread[1]:.2f}]", flush=True)
    write_json(cfg.out, report)
    return report


if __name__ == "__main__":
    main(parse(Config, PRESETS, sys.argv[1:], __doc__))
