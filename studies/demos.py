"""The demo from nothing with several seeds: what repeats, and what one seed makes of it.

    python studies/demos.py --seeds 8 9 10 11 12

Each seed has its own demonstrations, splits, weights and noise; all play the same starts. The JSON file gathers the
runs: outcomes start by start (1 = success), minutes, what each stage took, the world model's figures (means over
frames), the trust gate, and the commit at which the run was gathered: gather where it ran. results/demo.json is such a
file: the README's table comes from it, and `demo.py` says from it how long it will take.
"""

import sys
from dataclasses import dataclass
from pathlib import Path

from records import rounded, write
from stage_tables import demo_table
from stages import call, commit, machine, read_report

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # where the stage scripts are, which are no package

import demo
from vlarft.run.checkpoint import read_json
from vlarft.run.config import opt, parse


@dataclass(frozen=True)
class Config:
    out_dir: str = opt("runs/demos", "folder for all runs")
    out: str = opt("runs/demos.json", "JSON file that gathers the runs")
    seeds: tuple[int, ...] = opt((8, 9, 10, 11, 12), "seeds of the demo")
    demo_preset: str = opt("tiny", "preset of the demo")


PRESETS = {"paper": Config(), "smoke": Config(seeds=(0,), demo_preset="smoke")}


def summed_up(folder: Path) -> dict:
    """Return what the JSON file keeps of a demo."""
    summary = read_json(folder / "summary.json")
    frames = summary["world_model"]["frames"]["all"]
    return {
        "commit": commit(),
        "versions": summary["versions"],
        "minutes": summary["minutes"],
        "peak_gib": summary["peak_gib"],
        "probe_seconds": summary["probe_seconds"],
        "seconds": {name: stage["seconds"] for name, stage in summary["stages"].items()},
        "outcomes": {name: row["outcomes"] for name, row in summary["evaluation"].items()},
        "frames": {
            which: {name: values[name][-1] for name in ("psnr_moving", "psnr", "ssim")}
            for which, values in frames.items()
        },
        "trust_gate": summary["trust_gate"],
    }


def main(cfg: Config) -> dict:
    """Run what is missing; return what the JSON file holds.

    Raises:
        ValueError: the file holds demos of other sizes.
    """
    report = read_report(cfg, "runs", free=("out_dir", "out", "seeds"))
    now, there = demo.SIZES[cfg.demo_preset], report.get("sizes")
    if report["runs"] and there != now:
        raise ValueError(f"{cfg.out} holds demos with {there}, not {now}: give another file as --out")
    report = {"command": "python studies/demos.py", "machine": machine(), "sizes": now, **report}
    for seed in cfg.seeds:
        if str(seed) not in report["runs"]:
            folder = Path(cfg.out_dir) / f"seed{seed}"
            call("demo.py", "--preset", cfg.demo_preset, "--seed", seed, "--out-dir", folder)
            report["runs"][str(seed)] = rounded(summed_up(folder))
            write(cfg.out, report)
    print("\n" + demo_table(report))
    return report


if __name__ == "__main__":
    main(parse(Config, PRESETS, sys.argv[1:], __doc__))
