"""Time the imagination of whole episodes, frame by frame decoded, against starting anew from the last imagined frame.

    python benchmarks/episodes.py
    python benchmarks/episodes.py --size small --batch 4

An anchored imagination keeps its context: a chunk begins with the tokens of the last one's last frame. Starting anew
makes that frame a context: it is encoded again, and its tokens run through the transformer. `before` starts anew, with
the networks that preset tiny had until commit 95183a2. Weights are random: times do not depend on them. Versions take
turns in one process, on one core. Also counts what a rollout keeps in memory: keys and values of the context, shared by
a start's members, and those of a chunk, for each member. Writes one JSON file.
"""

import sys
from dataclasses import dataclass, replace

import torch
from timing import alternate, machine, ratio
from torch import Tensor

from vlarft.run.checkpoint import write_json
from vlarft.run.config import opt, parse, to_dict
from vlarft.world_model import PRESETS as SIZES
from vlarft.world_model import WorldModel, WorldModelConfig


@dataclass(frozen=True)
class Config:
    size: str = opt("tiny", "size of tokenizer and world model")
    steps: int = opt(120, "actions of an episode")
    batch: int = opt(8, "episodes imagined at once")
    repeats: int = opt(5, "timed calls of each version")
    out: str = opt("runs/benchmarks/episodes.json", "JSON file to write")


PRESETS = {"paper": Config(), "smoke": Config(size="smoke", steps=17, batch=2, repeats=1)}


def before(sizes: WorldModelConfig) -> WorldModelConfig:
    """Return preset tiny as it was."""
    wide = replace(sizes.transformer, width=192, num_heads=6, num_kv_heads=6, ffn_dim=512)
    return replace(sizes, tokenizer=replace(sizes.tokenizer, block_channels=(32, 64), compose=False), transformer=wide)


def anew(model: WorldModel, frame: Tensor, actions: Tensor) -> Tensor:
    """Imagine episodes (S, 1, T, A) from frames (S, C, H, W), each chunk from the last imagined frame."""
    frames = []
    for chunk in actions.split(model.cfg.chunk, dim=2):
        frames.append(model.rollout(frame, chunk, greedy=True).frames)
        frame = frames[-1][:, 0, -1]
    return torch.cat(frames, dim=2)


def memory(model: WorldModel, frame: Tensor) -> dict[str, int]:
    """Count the bytes of keys and values: of one start's context, and of one member's chunk at its end."""
    cache, layout = model.begin(frame[:1]).cache, model.layout
    context = sum(part.numel() * part.element_size() for pair in cache.own for part in pair)
    tokens = layout.frame_length + model.cfg.chunk * layout.step_length
    return {"context": context, "chunk": context * tokens // layout.context_length}


@torch.no_grad()
def main(cfg: Config) -> dict:
    """Time and count; write the JSON file and return its content."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    sizes = SIZES[cfg.size]
    models = {"anchored": WorldModel(sizes).eval()}
    models["anew"] = models["anchored"]
    if cfg.size == "tiny":
        models["before"] = WorldModel(before(sizes)).eval()
    frame = torch.rand(cfg.batch, 3, *sizes.tokenizer.image_size)
    actions = torch.rand(cfg.batch, 1, cfg.steps, sizes.action_dim) * 2 - 1
    calls = {
        "anchored": lambda: models["anchored"].rollout(frame, actions, greedy=True).frames,
        **{name: lambda name=name: anew(models[name], frame, actions) for name in models if name != "anchored"},
    }
    timings = alternate(calls, cfg.repeats, "cpu")
    report = {"command": "python benchmarks/episodes.py", "config": to_dict(cfg), **machine("cpu"), "versions": {}}
    for name, timing in timings.items():
        times, spread = ratio(timings["anchored"], timing)
        report["versions"][name] = {
            "frames_per_second": cfg.batch * cfg.steps / timing.median,
            "times_as_long": times,
            "spread": spread,
            "bytes": memory(models[name], frame),
        }
        print(
            f"{name:<10} {cfg.batch * cfg.steps / timing.median:7.0f} frames/s  {times:.2f} times as long as anchored"
        )
    write_json(cfg.out, report)
    return report


if __name__ == "__main__":
    main(parse(Config, PRESETS, sys.argv[1:], __doc__))
