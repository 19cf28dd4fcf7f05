"""What makes a world model tell actions apart: training arms on the same demonstrations and tokenizer, one factor each.

    python studies/base.py                makes the demonstrations, the tokenizer and the policy
    python studies/wm_study.py            trains and measures every arm

Each arm is `train_wm.py --preset tiny` with the flags of `ARMS`, then `eval_wm.py --true-error` on the same held-out
starts; an arm about the tokenizer trains its own first. Finished arms are not run again. Figures: validation loss, also
with the actions of other segments; PSNR on moving pixels, of greedy rollouts and of copying the start frame; Spearman's
rank correlation, with its standard error over starts, of R3 and R2 with the true frames and the true state, over all
perturbations and for each alone. And the same for chunks that the policy samples, where fine-tuning works.
Ceilings: the simulator's own frames, and these through the tokenizer. docs/world_model.md says what came out.
"""

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from records import rounded, write
from simulator_reward import SimulatorReward
from stage_tables import wm_table
from stages import call, check_known, commit, machine, read_lines

from vlarft.data import WindowSampler, load_episodes
from vlarft.gate import held_out_names, trust_gate
from vlarft.metrics import perceptual
from vlarft.policy import PolicyConfig, VLAPolicy
from vlarft.reward import ImageScorer
from vlarft.run.checkpoint import load_model, read_header, write_json
from vlarft.run.config import opt, parse, to_dict
from vlarft.sensitivity import Perturbations
from vlarft.world_model import WorldModel


class Arm(NamedTuple):
    """Flags of train_wm.py, and of train_tokenizer.py for a tokenizer of its own."""

    world_model: list[str]
    tokenizer: list[str] | None = None


ARMS = {
    "default": Arm([]),
    "three times as long": Arm(["--steps", "6000"]),
    "demonstrations only": Arm(["--experts-only"]),
    "no stale frames": Arm(["--stale", "0"]),
    "paper's token rows": Arm(["--no-factored-tokens"]),
    "all pixels alike": Arm([], ["--weighting", "uniform"]),
}
SCORES = ("R3 greedy", "R3 common", "R3 independent", "R2 greedy", "decoded frames", "true frames", "action L1")


@dataclass(frozen=True)
class Config:
    base: str = opt("runs/base", "folder of base.py: demonstrations, tokenizer, policy")
    runs: str = opt("runs/world_model", "folder for the arms")
    out: str = opt("runs/world_model.json", "JSON file to write")
    arms: tuple[str, ...] = opt(tuple(ARMS), "arms to run")
    starts: int = opt(32, "starts of the action sensitivity")
    samples: int = opt(12, "chunks that the policy samples at each of them")
    stage_preset: str = opt("tiny", "preset of the stages")


PRESETS = {"paper": Config(), "smoke": Config(arms=("default",), starts=2, samples=3, stage_preset="smoke")}


def run_arm(cfg: Config, name: str) -> dict:
    """Train and measure one arm, unless that is done."""
    folder, base = Path(cfg.runs) / name.replace(" ", "_").replace("'", ""), Path(cfg.base)
    arm, of_tokenizer = ARMS[name], base / "tokenizer"
    demos, preset = ["--demos", base / "demos"], ["--preset", cfg.stage_preset]
    if arm.tokenizer is not None:
        of_tokenizer = folder / "tokenizer"
        call("train_tokenizer.py", *preset, *demos, "--out-dir", of_tokenizer, *arm.tokenizer)
    tokenizer = of_tokenizer / "model.safetensors"
    command = call("train_wm.py", *preset, *demos, "--tokenizer", tokenizer, "--out-dir", folder, *arm.world_model)
    measured = folder / "eval" / "results.json"
    if not measured.is_file():
        where = ["--world-model", folder / "model.safetensors", "--out-dir", folder / "eval"]
        call("eval_wm.py", *preset, *demos, *where, "--true-error", "--starts", cfg.starts)
    results = json.loads(measured.read_text())
    log = read_lines(folder / "log.jsonl")
    last = [line for line in log if "val_loss" in line][-1]
    frames = results["frames"]["all"]
    return {
        "commit": commit(),
        "command": command,
        "steps": log[-1]["step"] + 1,
        "minutes": round(log[-1]["minutes"], 2),
        "val_loss": last["val_loss"],
        "val_shuffled_loss": last["val_shuffled_loss"],
        "psnr_moving": frames["imagined"]["psnr_moving"][-1],
        "copy_psnr_moving": frames["copy"]["psnr_moving"][-1],
        "order": {
            truth: {score: found[score] for score in SCORES if score in found}
            for truth, found in results["sensitivity"].items()
        },
        "near_policy": near_policy(cfg, folder),
    }


def near_policy(cfg: Config, folder: Path) -> dict[str, dict[str, float]]:
    """Measure R3's rank agreement among chunks that the policy samples, by imagination, unless that is done."""
    measured = folder / "near_policy.json"
    if measured.is_file():
        return json.loads(measured.read_text())
    files = Path(cfg.base) / "sft" / "model.safetensors", folder / "model.safetensors"
    policy, extra = load_model(files[0], VLAPolicy, PolicyConfig)
    policy.add_sigma_net()
    model = WorldModel.load(files[1])
    names = held_out_names(str(files[0]), extra, str(files[1]), read_header(files[1]).extra)
    episodes = load_episodes(Path(cfg.base) / "demos", names=names, with_states=True)
    batch = WindowSampler(episodes, 9, 8).spread(cfg.starts)
    sizes = {"perturbed": Perturbations((0.15,), draws=3, flips=0), "samples": cfg.samples}
    true_reward, found = SimulatorReward(episodes), {}
    for imagination in ("greedy", "common", "sample"):
        score = ImageScorer(model, perceptual("ssim"), imagination)
        values = trust_gate(score, policy, batch, seed=0, true_reward=true_reward, **sizes)
        found[imagination] = {k: v for k, v in values.items() if k.startswith("gate_policy")}
    write_json(measured, found)
    return found


def main(cfg: Config) -> dict:
    """Run the arms; return what the JSON file holds."""
    check_known(cfg.arms, ARMS, "arm")
    report = {"command": "python studies/wm_study.py", "settings": to_dict(cfg), "seed": 0, "machine": machine()}
    report["arms"] = {}
    for name in cfg.arms:
        report["arms"][name] = rounded(run_arm(cfg, name))
        write(cfg.out, report)
    print("\n" + wm_table(report))
    return report


if __name__ == "__main__":
    main(parse(Config, PRESETS, sys.argv[1:], __doc__))
