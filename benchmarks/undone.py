"""Measure what each optimisation of the world model's rollout gains, by undoing one at a time.

    python benchmarks/undone.py                                                                       on any machine
    python benchmarks/undone.py --sizes paper --device cuda --out results/undone_gpu.json

ours                     `WorldModel.rollout_tokens`
every row its prefix     a start's tokens are decoded and cached once per chunk, not once per start
logits of all tokens     the head computes logits of the whole vocabulary, not only of future-frame codes
two passes               the last token of a frame and the action's tokens go through the decoder one after the other
growing cache            keys and values are concatenated with the new ones at every token, as in DynamicCache

On a CPU in float32 and in bfloat16; on a GPU in bfloat16, without CUDA graphs, which do not fit these versions.
Decoding is greedy. In float32 all must give the same tokens, except for near ties that rounding decides. Writes one
JSON file.
"""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from rollout import NEARLY_ALL, Workload
from timing import alternate, machine, ratio
from torch import Tensor

from vlarft.nets.kv_cache import KVCache
from vlarft.run.checkpoint import write_json
from vlarft.run.config import opt, parse, to_dict
from vlarft.token_sampling import Sampling
from vlarft.world_model import Tables, WorldModel


@dataclass(frozen=True)
class Config:
    sizes: Literal["paper", "reduced", "pixels", "smoke"] = opt("reduced", "sizes of the world model, see rollout.py")
    out: str = opt("runs/benchmarks/undone.json", "JSON file to write")
    device: Literal["cpu", "cuda"] = opt("cpu", "where to run; cuda computes in bfloat16")
    starts: int = opt(16, "starts S")
    group: int = opt(16, "action chunks G per start")
    frames: int = opt(8, "frames T")
    repeats: int = opt(3, "timed calls of each version")


PRESETS = {"paper": Config(), "smoke": Config(sizes="smoke", starts=2, group=3, frames=2, repeats=1)}


@contextmanager
def replaced(owner: type, name: str, value: Callable) -> Iterator[None]:
    """Replace a method within a context."""
    before = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, before)


def all_logits(model: WorldModel, ids: Tensor, tables: Tables, cache: KVCache) -> Tensor:
    """Compute `WorldModel.next_logits` through the whole head."""
    positions = cache.positions(ids.shape[1], ids.device)
    hidden = model.decoder(model.embed(ids, tables, positions), cache)[:, -1]
    return F.linear(hidden, tables.head).float()[:, : model.layout.num_future_codes]


one_pass = WorldModel.next_logits


def two_passes(model: WorldModel, ids: Tensor, tables: Tables, cache: KVCache) -> Tensor:
    """Compute `WorldModel.next_logits` with a separate pass for the first token, the last of a frame."""
    if ids.shape[1] > model.cfg.action_dim:
        one_pass(model, ids[:, :1], tables, cache)
        ids = ids[:, 1:]
    return one_pass(model, ids, tables, cache)


def growing_append(cache: KVCache, layer: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    """Do what `KVCache.append` does by concatenation."""
    if layer == len(cache.own):
        cache.own.append((key, value))
    else:
        cache.own[layer] = tuple(torch.cat([old, new], dim=2) for old, new in zip(cache.own[layer], (key, value)))
    return cache.own[layer]


class Undone:
    """The versions, as methods that return tokens (S, G, T, Nf).

    Args:
        work: models, starts and actions.
    """

    def __init__(self, work: Workload) -> None:
        self.work = work

    def ours(self) -> Tensor:
        return self._tokens(self.work.frames, self.work.actions)

    def every_row_its_prefix(self) -> Tensor:
        group = self.work.actions.shape[1]
        rows = self.work.frames.repeat_interleave(group, 0), self.work.actions.flatten(0, 1)[:, None]
        return self._tokens(*rows).unflatten(0, (-1, group))[:, :, 0]

    def logits_of_all_tokens(self) -> Tensor:
        with replaced(WorldModel, "next_logits", all_logits):
            return self.ours()

    def two_passes(self) -> Tensor:
        with replaced(WorldModel, "next_logits", two_passes):
            return self.ours()

    def growing_cache(self) -> Tensor:
        with replaced(KVCache, "append", growing_append):
            return self.ours()

    def _tokens(self, frames: Tensor, actions: Tensor) -> Tensor:
        model = self.work.model
        return model.rollout_tokens(model.begin(frames), actions, Sampling(greedy=True), static=False)

    def versions(self) -> dict[str, Callable[[], Tensor]]:
        """Return name -> method."""
        return {
            "ours": self.ours,
            "every row its prefix": self.every_row_its_prefix,
            "logits of all tokens": self.logits_of_all_tokens,
            "two passes": self.two_passes,
            "growing cache": self.growing_cache,
        }


def measure(cfg: Config, work: Workload) -> dict[str, dict]:
    """Time the versions in one precision, relative to ours, and count the tokens that equal ours."""
    versions = Undone(work).versions()
    tokens: dict[str, Tensor] = {}

    def kept(name: str, version: Callable[[], Tensor]) -> Callable[[], None]:
        return lambda: tokens.update({name: version()})

    timings = alternate({name: kept(name, version) for name, version in versions.items()}, cfg.repeats, cfg.device)
    ours = timings["ours"]
    return {
        name: {
            **t._asdict(),
            **dict(zip(("times_as_long", "spread"), ratio(ours, t))),
            "equal_tokens": (tokens[name] == tokens["ours"]).float().mean().item(),
        }
        for name, t in timings.items()
    }


def main(cfg: Config) -> dict:
    """Time and compare the versions; write the JSON file and return its content.

    Raises:
        RuntimeError: two versions disagree in float32.
    """
    work = Workload(cfg)
    report = {"command": "python benchmarks/undone.py", "config": to_dict(cfg), **machine(cfg.device)}
    works = {"bfloat16": work} if cfg.device == "cuda" else {"float32": work, "bfloat16": work.in_bfloat16()}
    for precision, of in works.items():
        report[precision] = rows = measure(cfg, of)
        for name, row in rows.items():
            low, high = row["spread"]
            print(f"{precision:<10}{name:<24}{row['median']:8.3f} s, times ours: {row['times_as_long']:.2f}", end="")
            print(f" [{low:.2f}, {high:.2f}], {100 * row['equal_tokens']:.2f} % equal tokens")
            if precision == "float32" and row["equal_tokens"] < NEARLY_ALL:
                raise RuntimeError(f"{name} and ours agree on {100 * row['equal_tokens']:.2f} % of the tokens")
    write_json(cfg.out, report)
    return report


if __name__ == "__main__":
    main(parse(Config, PRESETS, sys.argv[1:], __doc__))
