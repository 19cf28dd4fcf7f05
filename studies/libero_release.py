"""The checkpoints of LIBERO in this repository, from runs of libero_study.py, each with a model card.

    python studies/libero_study.py --suites libero_object
    python studies/libero_release.py --suites libero_object

For each suite the SFT policy, the world model and the policies of `--arms`, trained weights rounded to bfloat16. Each
policy is then played as it lies there, `episodes` initial states a task from x_0 = 0 and from a sampled x_0; its card
states the rates.
"""

import sys
from dataclasses import dataclass
from pathlib import Path

import torch
from libero_study import ARMS, Runs, folder_name
from libero_study import Config as Study
from stages import Starts, check_known

from vlarft import VLAPolicy, WorldModel
from vlarft.run.checkpoint import read_header
from vlarft.run.config import opt, parse

SEEN = "Demonstrations of scripted experts in LIBERO with stand-ins for some of its meshes and textures, fast rendering"
WHAT = {
    VLAPolicy: f"Policy of {{suite}}, trained from nothing on a processor. {SEEN}: on other visuals it has not been "
    "played. Play it from x_0 = 0: `eval_libero.py --preset libero --suites {suite} --noise zero --policies FOLDER`.",
    WorldModel: f"World model of {{suite}}, with its tokenizer. {SEEN}, and attempts of an early policy.",
}


@dataclass(frozen=True)
class Config:
    runs: str = opt("runs/libero", "folder of libero_study.py")
    suites: tuple[str, ...] = opt(("libero_object", "libero_spatial"), "suites")
    arms: tuple[str, ...] = opt((), "arms of the study whose policies are released as well")
    checkpoints: str = opt("checkpoints", "folder to write the checkpoints to")
    episodes: int = opt(5, "initial states of each task to play")
    stage_preset: str = opt("libero", "preset of the evaluation")


PRESETS = {
    "paper": Config(),
    "smoke": Config(suites=("tabletop_object",), arms=("RFT R3",), episodes=1, stage_preset="smoke"),
}


def main(cfg: Config) -> None:
    """Export, play, and write the cards.

    Raises:
        ValueError: an unknown arm.
        FileNotFoundError: a run is missing, before anything is written.
    """
    check_known(cfg.arms, ARMS, "arm")
    names = [folder_name(arm) for arm in cfg.arms]
    wanted = [("sft", "sft", VLAPolicy), ("world_model", "wm", WorldModel)]
    wanted += [(name.lower(), name, VLAPolicy) for name in names]
    for suite in cfg.suites:
        for _, run, _ in wanted:
            read_header(Path(cfg.runs) / suite / run)
    for suite in cfg.suites:
        runs = Runs(Study(out_dir=cfg.runs), suite)
        for name, run, cls in wanted:
            place = Path(cfg.checkpoints) / f"{suite}_{name}"
            cls.load(runs.folder / run).save_pretrained(place, dtype=torch.bfloat16)
            results = []
            if cls is VLAPolicy:
                for x0 in ("zero", "sampled"):
                    results.append(runs.folder / "eval" / f"released_{name}_{x0}_{cfg.episodes}")
                    starts = Starts(suite, runs.tasks, cfg.episodes, cfg.stage_preset)
                    starts.play(results[-1], place, "none", "--noise", x0)
            cls.load(place).save_pretrained(
                place, results=results, license="mit", text=WHAT[cls].format(suite=suite), name=f"user/{place.name}"
            )
            print(f"{place}: {sum(file.stat().st_size for file in place.iterdir()) / 2**20:.1f} MiB")


if __name__ == "__main__":
    main(parse(Config, PRESETS, sys.argv[1:], __doc__))
