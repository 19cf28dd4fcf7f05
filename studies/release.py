"""The checkpoints of this repository, from one seed of the closed-loop study, each with a model card.

    python studies/closed_loop_study.py --suites tabletop_object --seeds 0 --arms "RL, simulator"
    python studies/release.py

The policy of few demonstrations before and after reinforcement learning with the simulator's outcomes, and a world
model of the same demonstrations and of the first policy's attempts. Trained weights become bfloat16, normaliser and
other buffers stay float32; the sigma net, which a policy that only plays does not need, is left out. The policies are
then played as they lie there, `play.py` films them, and the notebooks use all three.
"""

import sys
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from closed_loop_study import Config as Study
from closed_loop_study import Runs
from records import rounded, write
from stages import Starts, commit, machine, read_lines
from table_text import percent, points, share

from vlarft import VLAPolicy, WorldModel
from vlarft.run.checkpoint import read_header, save_model, write_atomic
from vlarft.run.config import opt, parse
from vlarft.statistics import paired_difference

STARTED = {"zero": "x_0 = 0", "sampled": "sampled x_0"}
KEPT = (
    "train_episodes",
    "held_out_episodes",
    "instructions",
    "camera",
    "mean_frame",
    "context_lookback",
)  # what the next stage reads
WHAT = {
    "tabletop_before": "Policy of supervised fine-tuning on 10 demonstrations of each of four tasks.",
    "tabletop_after": "The same policy after 200 steps of reinforcement learning on whole episodes in the simulator "
    "itself, by true outcomes. Of the world model it has seen nothing.",
    "tabletop_world_model": "World model of the 40 demonstrations and of 128 attempts of the first policy, most of "
    "them failures, with a tokenizer of its own. It follows the hand; many blocks that are grasped stay behind or "
    "change colour.",
}


@dataclass(frozen=True)
class Config:
    runs: str = opt("runs/closed_loop", "folder of closed_loop_study.py")
    seed: int = opt(0, "seed of the study whose runs are taken")
    checkpoints: str = opt("checkpoints", "folder to write the checkpoints to")
    played: str = opt("runs/release", "folder of the evaluations")
    out: str = opt("results/checkpoints.json", "JSON file to write")
    episodes: int = opt(50, "initial states of each task to play")


PRESETS = {"paper": Config()}


def export(run: Path, model: VLAPolicy | WorldModel, place: Path) -> None:
    """Write a run's model with its trained weights in bfloat16."""
    if isinstance(model, VLAPolicy) and model.sigma_net is not None:
        model.sigma_net, model.cfg = None, replace(model.cfg, has_sigma_net=False)
    extra = read_header(run / "model.safetensors").extra
    kept = {k: extra[k] for k in KEPT if k in extra}
    save_model(place / "model.safetensors", model, model.cfg, kept, dtype=torch.bfloat16)


def card(name: str, report: dict) -> str:
    """Return the model card of a checkpoint."""
    own = report[name]
    facts = [
        f"Trained in {own['minutes']:.0f} minutes on one CPU core, exported by "
        f"`{report['command']}` (commit {report['commit']}) from runs of `{report['study']}`."
    ]
    if "success" in own:
        rates = [f"{percent(own['success'][x0])} from {text}" for x0, text in STARTED.items()]
        facts.append(f"Success on {own['starts']} evaluation starts, 95 % intervals: {' and '.join(rates)}.")
    if "against_before" in own:
        gains = " and ".join(points(own["against_before"][x0]) for x0 in STARTED)
        facts.append(f"Against tabletop_before on the same starts, in points: {gains}.")
    if "metrics" in own:
        facts.append(", ".join(f"{key} {value:.2f}" for key, value in own["metrics"].items()) + ", held-out episodes.")
    facts = "\n".join(f"- {fact}" for fact in facts)
    return f"""---
library_name: vlarft
license: mit
pipeline_tag: robotics
tags: [robotics, vision-language-action, tabletop]
---

# {name}

{WHAT[name]}

Suite tabletop_object of Tabletop: pick up one of four blocks and place it in the bin; 64 x 64 pixels, sizes of preset
`tiny`. Weights in bfloat16.

{facts}
"""


def main(cfg: Config) -> dict:
    """Export, play and describe; return what the JSON file holds."""
    suite = "tabletop_object"
    study = Study(out_dir=cfg.runs)
    runs, place = Runs(study, suite, cfg.seed), Path(cfg.checkpoints)
    sources = {
        "tabletop_before": (runs.policy, VLAPolicy),
        "tabletop_after": (runs.arm("RL, simulator")[0], VLAPolicy),
        "tabletop_world_model": (runs.first_round()[1].world_model, WorldModel),
    }
    report = {"command": "python studies/release.py", "commit": commit(), "machine": machine()}
    report["study"] = f"python studies/closed_loop_study.py --suites {suite} --seeds {cfg.seed}"
    starts, outcomes = Starts(suite, study.tasks, cfg.episodes, study.stage_preset), {}
    for name, (run, cls) in sources.items():
        export(run, cls.load(run), place / name)
        report[name] = own = {"minutes": read_lines(run / "log.jsonl")[-1]["minutes"]}
        if cls is WorldModel:
            metrics = read_header(run / "model.safetensors").extra["metrics"]
            own["metrics"] = {name: value for name, value in metrics.items() if "psnr" in name}
            continue
        for x0 in STARTED:
            played = starts.play(Path(cfg.played) / f"{name}_{x0}", place / name, "none", "--noise", x0)
            outcomes[name, x0] = [played[start] for start in sorted(played)]
        own["starts"] = len(outcomes[name, "zero"])
        own["success"] = {x0: share(sum(won), len(won)) for (whose, x0), won in outcomes.items() if whose == name}
    report["tabletop_after"]["against_before"] = {
        x0: paired_difference(outcomes["tabletop_before", x0], outcomes["tabletop_after", x0])._asdict()
        for x0 in STARTED
    }
    report = rounded(report)
    for name in sources:
        text = card(name, report)
        write_atomic(place / name / "README.md", lambda tmp, text=text: tmp.write_text(text))
    write(cfg.out, report)
    return report


if __name__ == "__main__":
    main(parse(Config, PRESETS, sys.argv[1:], __doc__))
