"""What the world model saw, and whether its rewards then order the policy's own chunks: the trust gate at many starts.

    python benchmarks/rft_study.py --suites tabletop_spatial --arms "RFT R3" "RFT R3, on-policy"
    python benchmarks/gates.py --suites tabletop_spatial

The gate of a fine-tuning has few starts, since it is measured again and again. Here, for every suite and seed of
rft_study.py, the long-trained policy samples chunks at `starts` held-out starts, and each reward in each world model
orders them: rank correlation with the true error, in the simulator, and with the action error, means over the starts
with their standard errors. World models are found by their folder, beside the demonstrations ("wm", of all seeds) or
beside the policy ("attempts", its own); those that are not there are left out. Fine-tuning asks this of chunks that are
much alike, hence the low numbers; around the dataset's actions (motion noise of 0.15) they are higher.

Writes one JSON; a figure that is in it is not measured again.
"""

import json
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
from stages import machine
from tables import table_row

from vlarft.checkpoint import load_model, read_header, write_json
from vlarft.config import opt, parse, to_dict
from vlarft.data import WindowSampler, load_episodes
from vlarft.gate import GateConfig, held_out_names, trust_gate
from vlarft.metrics import perceptual
from vlarft.policy import PolicyConfig, VLAPolicy
from vlarft.rollout import RolloutConfig
from vlarft.sim.replay import TabletopOutcomes
from vlarft.world_model import WorldModel


@dataclass(frozen=True)
class Config:
    runs: str = opt("runs/study", "folder of rft_study.py")
    out: str = opt("results/gates.json", "JSON file to write")
    suites: tuple[str, ...] = opt(("tabletop_spatial",), "suites")
    seeds: tuple[int, ...] = opt((0, 1, 2), "seeds of the policies")
    world_models: tuple[str, ...] = opt(("wm", "short", "long", "demonstrations_only", "attempts"), "their folders")
    rewards: tuple[str, ...] = opt(("r3", "divergence"), "rewards")
    starts: int = opt(64, "held-out starts")
    samples: int = opt(8, "chunks of the policy at each of them")


PRESETS = {"paper": Config(), "smoke": Config(suites=("tabletop_object",), seeds=(0,), starts=4, samples=3)}


def gate(cfg: Config, demos: Path, policy_path: Path, model_path: Path, reward: str) -> dict[str, float]:
    """`trust_gate` of a policy in a world model; the same chunks and noise for all world models and rewards."""
    policy, extra = load_model(policy_path, VLAPolicy, PolicyConfig)
    torch.manual_seed(0)
    policy.make_stochastic("sigma_net")
    model = WorldModel.load(model_path)
    names = held_out_names(str(policy_path), extra, str(model_path), read_header(model_path).extra)
    episodes = load_episodes(demos, names=names, with_states=True)
    batch = WindowSampler(episodes, policy.cfg.flow.chunk + 1, policy.cfg.flow.chunk).spread(cfg.starts)
    sizes = GateConfig(gate_noise=(0.15,), gate_draws=3, gate_samples=cfg.samples)
    rollout = RolloutConfig(reward=reward, imagination="greedy", perceptual="ssim", reference="intended")
    parts = sizes, rollout, policy.eval(), model, batch, episodes
    return trust_gate(*parts, perceptual("ssim"), (0,), TabletopOutcomes())


def table(runs: dict[str, dict]) -> str:
    """Markdown, one row per reward, suite, seed and world model."""
    lines = [table_row(["reward", "suite", "seed", "world model", "own chunks", "around the dataset's actions"])]
    lines += ["|---" * 6 + "|"]
    for name, found in runs.items():
        suite, seed, model, reward = name.split("/")
        shown = [f"{found[f'gate_{f}_true']:.2f} ± {found[f'gate_{f}_true_se']:.2f}" for f in ("policy", "dataset")]
        lines.append(table_row([reward, suite, seed.removeprefix("seed"), model, *shown]))
    return "\n".join(lines)


def main(cfg: Config) -> dict:
    """Measure what is missing; returns what the JSON file holds.

    Raises:
        FileNotFoundError: no policy of a suite and seed.
        ValueError: the JSON file has figures of other sizes.
    """
    sizes = {"starts": cfg.starts, "samples": cfg.samples}
    report = {"command": "python benchmarks/gates.py", "config": to_dict(cfg), **sizes, "runs": {}}
    if Path(cfg.out).is_file():
        before = json.loads(Path(cfg.out).read_text())
        if any(before.get(name) != value for name, value in sizes.items()):
            raise ValueError(f"{cfg.out} has figures of other sizes than {sizes}: give another file as --out")
        report["runs"] = before["runs"]
    report["machine"] = machine()
    for suite in cfg.suites:
        for seed in cfg.seeds:
            folder = Path(cfg.runs) / suite
            policy = folder / f"seed{seed}" / "sft" / "model.safetensors"
            if not policy.is_file():
                raise FileNotFoundError(f"no policy at {policy}: run rft_study.py for this suite and seed first")
            for model in cfg.world_models:
                places = [home / model / "model.safetensors" for home in (folder / f"seed{seed}", folder)]
                path = next((path for path in places if path.is_file()), None)
                for reward in cfg.rewards if path else ():
                    name = f"{suite}/seed{seed}/{model}/{reward}"
                    if name not in report["runs"]:
                        report["runs"][name] = gate(cfg, folder / "demos", policy, path, reward)
                        write_json(cfg.out, report)
                        print(f"{name}: {report['runs'][name]['gate_policy_true']:.2f}", flush=True)
    print("\n" + table(report["runs"]))
    return report


if __name__ == "__main__":
    main(parse(Config, PRESETS, sys.argv[1:], __doc__.splitlines()[0]))
