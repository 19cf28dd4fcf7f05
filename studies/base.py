"""Make what studies of one stage begin from: demonstrations of tabletop_object, a tokenizer and an SFT policy of them.

    python studies/base.py                          preset tiny, into runs/base: a quarter of an hour on one core

600 demonstrations of four tasks and 80 noisy attempts, seed 0. Finished stages are not run again.
"""

import sys
from dataclasses import dataclass
from pathlib import Path

from stages import run_once

from vlarft.run.config import opt, parse


@dataclass(frozen=True)
class Config:
    out_dir: str = opt("runs/base", "folder for demos, tokenizer and sft")
    suite: str = opt("tabletop_object", "suite of the demonstrations")
    stage_preset: str = opt("tiny", "preset of the stages")


PRESETS = {"paper": Config(), "smoke": Config(stage_preset="smoke")}


def demos_and_policy(folder: Path, suite: str, preset: str) -> Path:
    """Make `demos` and `sft` of a suite in a folder, unless that is done; return the demonstrations."""
    demos = run_once(folder / "demos", "collect_demos.py", "--preset", preset, "--suites", suite)
    run_once(folder / "sft", "train_sft.py", "--preset", preset, "--demos", demos)
    return demos


def main(cfg: Config) -> None:
    """Make what is missing."""
    folder = Path(cfg.out_dir)
    demos = demos_and_policy(folder, cfg.suite, cfg.stage_preset)
    run_once(folder / "tokenizer", "train_tokenizer.py", "--preset", cfg.stage_preset, "--demos", demos)


if __name__ == "__main__":
    main(parse(Config, PRESETS, sys.argv[1:], __doc__))
