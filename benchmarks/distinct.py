"""Measure how many imagined frames of trained networks differ, and the gain of decoding each of them only once.

    python demo.py                                                                trains the networks to measure
    python benchmarks/distinct.py
    python benchmarks/distinct.py --policy runs/study/tabletop_spatial/seed2/sft/model.safetensors \
        --world-model runs/study/tabletop_spatial/wm/model.safetensors --demos runs/study/tabletop_spatial/demos

The chunks of one start are similar, and so are their frames. Frames with the same tokens are decoded to pixels only
once by `FrameTokenizer.decode`. How often that happens must be measured with trained weights. A policy's chunks are
imagined in the world model, from starts of the training episodes, greedily and by sampling. The share of distinct
frames is counted, and decoding each once is timed against decoding all, in turns in one process. Both must give the
same pixels. Writes one JSON file.
"""

import sys
from dataclasses import dataclass
from functools import partial

import torch
from timing import alternate, machine, ratio
from torch import Tensor

from vlarft import tokenizer
from vlarft.data import WindowSampler, load_episodes
from vlarft.policy import PolicyConfig, VLAPolicy
from vlarft.run.checkpoint import load_model, write_json
from vlarft.run.config import opt, parse, to_dict
from vlarft.token_sampling import Sampling
from vlarft.tokenizer import Context, FrameTokenizer
from vlarft.world_model import WorldModel


@dataclass(frozen=True)
class Config:
    policy: str = opt("runs/demo/sft/model.safetensors", "checkpoint of the policy")
    world_model: str = opt("runs/demo/wm/model.safetensors", "checkpoint of the world model")
    demos: str = opt("runs/demo/demos", "demonstrations of both")
    out: str = opt("runs/benchmarks/distinct.json", "JSON file to write")
    starts: int = opt(16, "starts S")
    groups: tuple[int, ...] = opt((4, 16), "rollouts G per start")
    repeats: int = opt(3, "timed calls of each version")


PRESETS = {"paper": Config(), "smoke": Config(starts=2, groups=(3,), repeats=1)}
IMAGINATION = {
    "greedy": Sampling(greedy=True),
    "common": Sampling(common_random_numbers=True),
    "sample": Sampling(),
}


@torch.no_grad()
def imagine(cfg: Config) -> dict[str, tuple[WorldModel, Tensor, Context]]:
    """Return name -> world model, tokens (S, G + 1, T, Nf) of the policy's chunks and the recorded one, context."""
    policy, extra = load_model(cfg.policy, VLAPolicy, PolicyConfig)
    policy.add_sigma_net()
    policy.eval()
    model = WorldModel.load(cfg.world_model)
    episodes = load_episodes(cfg.demos, extra.get("camera", "agentview"), names=extra["train_episodes"])
    steps = policy.cfg.flow.chunk
    batch = WindowSampler(episodes, steps + 1, steps).spread(cfg.starts)
    context = policy.encode_frames(batch.frames[:, 0], batch.instructions)
    found = {}
    for group in cfg.groups:
        chain = policy.sample_group(context, batch.proprio, group, torch.Generator().manual_seed(0))
        actions = policy.normalizer.decode_actions(chain.x[:, -1]).unflatten(0, (-1, group))
        actions = torch.cat([actions, batch.intended[:, None]], 1)
        for name, sampling in IMAGINATION.items():
            draws = torch.Generator().manual_seed(0)
            state = model.begin(batch.frames[:, 0])
            tokens = model.rollout_tokens(state, actions, sampling, draws)
            found[f"{name}, {group} rollouts"] = model, tokens, state.context
    return found


def decode_all(network: FrameTokenizer, tokens: Tensor, context: Context) -> Tensor:
    """Decode every frame, including repeated ones."""
    own, tokenizer.distinct_frames = tokenizer.distinct_frames, lambda rows: (rows, None)
    try:
        return network.decode(tokens, context)
    finally:
        tokenizer.distinct_frames = own


@torch.no_grad()
def main(cfg: Config) -> dict:
    """Count, time and compare; write the JSON file and return its content.

    Raises:
        RuntimeError: the two versions give different pixels.
    """
    report = {"command": "python benchmarks/distinct.py", "config": to_dict(cfg), **machine("cpu"), "decode": {}}
    for name, (model, tokens, context) in imagine(cfg).items():
        versions = {
            "ours": partial(model.tokenizer.decode, tokens, context),
            "all": partial(decode_all, model.tokenizer, tokens, context),
        }
        apart = (versions["ours"]() - versions["all"]()).abs().max().item()
        if not apart <= 1e-4:
            raise RuntimeError(f"{name}: decoding each frame once changes pixels by {apart:.3g} > 1e-4")
        timings = alternate(versions, cfg.repeats, "cpu")
        faster, (low, high) = ratio(timings["ours"], timings["all"])
        distinct = sum(len(rows.flatten(0, -2).unique(dim=0)) for rows in tokens)
        row = {
            "distinct": distinct / tokens[..., 0].numel(),
            "times_faster": faster,
            "spread": [low, high],
            "largest_difference": apart,
        }
        report["decode"][name] = row
        print(
            f"{name:<22} {row['distinct']:.0%} differ, {row['times_faster']:.2f} times faster [{low:.2f}, {high:.2f}]"
        )
    write_json(cfg.out, report)
    return report


if __name__ == "__main__":
    main(parse(Config, PRESETS, sys.argv[1:], __doc__))
