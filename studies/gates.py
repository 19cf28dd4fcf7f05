"""How well rewards rank the chunks that a policy samples, by what the world model saw: the trust gate at many starts.

    python studies/rft_study.py --suites tabletop_spatial --arms "RFT R3" "RFT R3, on-policy"
    python studies/gates.py --suites tabletop_spatial --rewards r3 divergence

The gate of a fine-tuning ranks by the action error, at few starts. Here, for every suite and seed of rft_study.py, the
long-trained policy samples chunks at `starts` held-out starts, and each reward in each world model ranks them: rank
correlation with the true error, in the simulator, and with the action error, means over the starts with their standard
errors. World models are found by their folder, beside the demonstrations ("wm", of all seeds) or beside the policy
("attempts", its own); those that are not there are left out. The policy's chunks are much alike, hence the low numbers.
The same is measured around the demonstration's actions, with one noise (0.15) where the gate of a fine-tuning has
several, which are easier to tell apart.

A reward that is best at the demonstration's actions need not fall alike on both sides of them. `one_sided` scores pairs
of opposite noise around them: "odd_share" is the part of the reward's variance that changes sign with the noise, 0
where both sides count the same; "pull" its correlation with the chunk's mean noise in each motion dimension, which has
the same sign at all starts where the reward pulls a policy to one side.

Writes one JSON; a figure that is in it is not measured again.
"""

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from records import rounded, write
from simulator_reward import SimulatorReward
from stage_tables import gates_table
from stages import commit, machine

from vlarft.data import Batch, WindowSampler, load_episodes
from vlarft.gate import held_out_names, score_in_parts, trust_gate
from vlarft.metrics import perceptual
from vlarft.policy import PolicyConfig, VLAPolicy
from vlarft.reward import RewardKind, Scorer, make_scorer
from vlarft.run.checkpoint import load_model, read_header
from vlarft.run.config import opt, parse
from vlarft.run.random import generator
from vlarft.sensitivity import Perturbations
from vlarft.world_model import WorldModel


@dataclass(frozen=True)
class Config:
    runs: str = opt("runs/study", "folder of rft_study.py")
    out: str = opt("runs/gates.json", "JSON file to write")
    suites: tuple[str, ...] = opt(("tabletop_spatial",), "suites")
    seeds: tuple[int, ...] = opt((0, 1, 2), "seeds of the policies")
    world_models: tuple[str, ...] = opt(("wm", "short", "long", "demonstrations_only", "attempts"), "their folders")
    rewards: tuple[RewardKind, ...] = opt(
        ("r1", "r3", "divergence"), "rewards; r1 needs no world model and is here to compare"
    )
    starts: int = opt(32, "held-out starts")
    samples: int = opt(8, "chunks of the policy at each of them")


PRESETS = {"paper": Config(), "smoke": Config(suites=("tabletop_object",), seeds=(0,), starts=4, samples=3)}
NOISE = 0.15  # around the demonstrations' actions, standard deviation in normalised units


class Parts(NamedTuple):
    """A policy, a world model and held-out starts."""

    policy: VLAPolicy
    model: WorldModel
    batch: Batch
    true_reward: SimulatorReward

    def scorer(self, reward: RewardKind) -> Scorer:
        """Make the scorer of a reward, imagined greedily."""
        return make_scorer(reward, self.model, perceptual("ssim"), "greedy")


def load(cfg: Config, demos: Path, policy_path: Path, model_path: Path) -> Parts:
    """Load policy, world model and starts: the same starts for all world models that hold the same episodes out."""
    policy, extra = load_model(policy_path, VLAPolicy, PolicyConfig)
    policy.add_sigma_net()
    model = WorldModel.load(model_path)
    names = held_out_names(str(policy_path), extra, str(model_path), read_header(model_path).extra)
    episodes = load_episodes(demos, names=names, with_states=True)
    batch = WindowSampler(episodes, policy.cfg.flow.chunk + 1, policy.cfg.flow.chunk).spread(cfg.starts)
    return Parts(policy.eval(), model, batch, SimulatorReward(episodes))


def gate(cfg: Config, parts: Parts, reward: RewardKind) -> dict[str, float]:
    """Run `trust_gate` on a policy in a world model; the same chunks and noise for all world models and rewards."""
    return trust_gate(
        parts.scorer(reward),
        parts.policy,
        parts.batch,
        seed=0,
        true_reward=parts.true_reward,
        perturbed=Perturbations((NOISE,), draws=3, flips=0),
        samples=cfg.samples,
    )


@torch.no_grad()
def one_sided(cfg: Config, parts: Parts, reward: RewardKind, seed: int = 0) -> dict[str, float | list[float]]:
    """Measure how much of a reward's variance around the demonstrations' actions is odd in the noise, and where it
    pulls to.
    """
    dataset, policy = parts.batch.intended, parts.policy  # (S, T, A)
    unit = policy.normalizer.action_unit()
    unit[policy.normalizer.grippers] = 0  # grippers stay
    shape = (len(dataset), cfg.samples, *dataset.shape[1:])
    noise = NOISE * torch.randn(shape, generator=torch.Generator().manual_seed(seed))  # (S, P, T, A)
    bins = parts.model.action_bins
    pairs = (dataset[:, None] + torch.cat([noise, -noise], 1) * unit).clamp(bins.low, bins.high)
    source = generator("cpu", "imagination", seed)
    score = score_in_parts(parts.scorer(reward), parts.batch, pairs, source, at_once=8)  # (S, 2 P)
    first, second = score.chunk(2, 1)
    odd, even = (first - second) / 2, (first + second) / 2
    of_odd, of_even, steps = odd.pow(2).mean(), even.var(1).mean(), dataset.shape[1]
    direction = noise.mean(2)[..., :-1] / (NOISE / steps**0.5)  # (S, P, A - 1), unit variance
    pull = ((odd / (score.std(1, keepdim=True) + 1e-8))[..., None] * direction).mean(1)  # (S, A - 1)
    return {
        "odd_share": (of_odd / (of_odd + of_even).clamp(min=1e-12)).item(),  # a constant reward: 0
        "pull": pull.mean(0).tolist(),
        "pull_se": (pull.std(0) / len(pull) ** 0.5).tolist(),
    }


def main(cfg: Config) -> dict:
    """Measure what is missing; return what the JSON file holds.

    Raises:
        FileNotFoundError: no policy of a suite and seed.
        ValueError: the JSON file has figures of other sizes.
    """
    sizes = {"starts": cfg.starts, "samples": cfg.samples}
    report = {"command": "python studies/gates.py", "machine": machine(), **sizes, "runs": {}}
    if Path(cfg.out).is_file():
        before = json.loads(Path(cfg.out).read_text())
        if any(before.get(name) != value for name, value in sizes.items()):
            raise ValueError(f"{cfg.out} has figures of other sizes than {sizes}: give another file as --out")
        report["runs"] = before["runs"]
    for suite in cfg.suites:
        for seed in cfg.seeds:
            folder = Path(cfg.runs) / suite
            policy = folder / f"seed{seed}" / "sft" / "model.safetensors"
            if not policy.is_file():
                raise FileNotFoundError(f"no policy at {policy}: run rft_study.py for this suite and seed first")
            for model in cfg.world_models:
                places = [home / model / "model.safetensors" for home in (folder / f"seed{seed}", folder)]
                path = next((path for path in places if path.is_file()), None)
                names = {reward: f"{suite}/seed{seed}/{model}/{reward}" for reward in cfg.rewards}
                missing = {reward: name for reward, name in names.items() if name not in report["runs"]}
                if path and missing:
                    parts = load(cfg, folder / "demos", policy, path)
                    for reward, name in missing.items():
                        found = gate(cfg, parts, reward) | one_sided(cfg, parts, reward)
                        report["runs"][name] = {"commit": commit(), **rounded(found)}
                        write(cfg.out, report)
                        print(f"{name}: {report['runs'][name]['gate_policy_true']:.2f}", flush=True)
    print("\n" + gates_table(report))
    return report


if __name__ == "__main__":
    main(parse(Config, PRESETS, sys.argv[1:], __doc__))
