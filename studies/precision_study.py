"""Does Stage I in bfloat16 end where it ends in float32? Both formats, from the same demonstrations and seeds.

    python studies/base.py                   makes the demonstrations
    python studies/precision_study.py        tokenizer, world model and SFT of three seeds, in both formats

The stages are those of preset tiny with `--precision fp32` and `bf16`; what is measured is measured in float32: the SFT
policy's success on the same starts, from x_0 = 0 and from a sampled x_0, and what `eval_wm.py --true-error` says of the
world model. Finished stages are not run again; the JSON file gathers runs, with outcomes start by start (1 = success).
"""

import json
import sys
from dataclasses import dataclass
from pathlib import Path

from records import rounded, write
from stage_tables import formats_table
from stages import Starts, commit, machine, read_lines, read_report, run_once

from vlarft.run.config import opt, parse

FORMATS = {"float32": "fp32", "bfloat16": "bf16"}


@dataclass(frozen=True)
class Config:
    demos: str = opt("runs/base/demos", "demonstrations")
    out_dir: str = opt("runs/precision", "folder for all runs")
    out: str = opt("runs/precision.json", "JSON file that gathers the runs")
    seeds: tuple[int, ...] = opt((0, 1, 2), "seeds of the trainings")
    suite: str = opt("tabletop_object", "suite of the demonstrations")
    tasks: tuple[str, ...] = opt(("0", "1", "2", "3"), "tasks of the demonstrations")
    episodes: int = opt(50, "initial states per task")
    starts: int = opt(32, "starts of the rank correlations")
    stage_preset: str = opt("tiny", "preset of the stages")


PRESETS = {"paper": Config(), "smoke": Config(seeds=(0,), tasks=("0",), episodes=2, starts=2, stage_preset="smoke")}


def measure(cfg: Config, seed: int, name: str) -> dict:
    """Train the stages in a format, unless that is done, and measure them."""
    own, preset = Path(cfg.out_dir) / f"seed{seed}" / name, ["--preset", cfg.stage_preset]
    training = [*preset, "--demos", cfg.demos, "--seed", seed, "--precision", FORMATS[name]]
    tokenizer = run_once(own / "tokenizer", "train_tokenizer.py", *training)
    model = run_once(own / "wm", "train_wm.py", *training, "--tokenizer", tokenizer)
    policy = run_once(own / "sft", "train_sft.py", *training)
    asked = ["--demos", cfg.demos, "--world-model", model, "--true-error", "--starts", cfg.starts]
    run_once(own / "eval_wm", "eval_wm.py", *preset, *asked)
    found = json.loads((own / "eval_wm" / "results.json").read_text())
    starts, outcomes = Starts(cfg.suite, cfg.tasks, cfg.episodes, cfg.stage_preset), {}
    for x0 in ("zero", "sampled"):
        played = starts.play(own / f"eval_{x0}", policy, "none", "--noise", x0)
        outcomes[x0] = "".join(str(int(played[start])) for start in sorted(played))
    imagined = found["frames"]["all"]["imagined"]
    return {
        "commit": commit(),
        "minutes": {stage.name: read_lines(stage / "log.jsonl")[-1]["minutes"] for stage in (tokenizer, model, policy)},
        "outcomes": outcomes,
        "psnr_moving": imagined["psnr_moving"][-1],
        "ssim": imagined["ssim"][-1],
        "r3": found["sensitivity"]["true state"]["R3 greedy"]["all"]["spearman"],
    }


def main(cfg: Config) -> dict:
    """Run what is missing; return what the JSON file holds."""
    report = read_report(cfg, "runs", free=("demos", "out_dir", "out", "seeds"))
    report = {"command": "python studies/precision_study.py", "machine": machine(), **report}
    for seed in cfg.seeds:
        for name in FORMATS:
            report["runs"].setdefault(str(seed), {})[name] = rounded(measure(cfg, seed, name))
            write(cfg.out, report)
    print("\n" + formats_table(report))
    return report


if __name__ == "__main__":
    main(parse(Config, PRESETS, sys.argv[1:], __doc__))
