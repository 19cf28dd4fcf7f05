"""Time rollouts of the world model against transformers' `generate` with the same weights, token for token.

    python benchmarks/rollout.py                                                     reduced sizes, on any machine
    python benchmarks/rollout.py --sizes paper --device cuda --out results/rollout_gpu.json

S starts, G action chunks each, T frames of Nf tokens, greedy. Versions:

ours             `WorldModel.rollout_tokens`: a start runs through the decoder once and its G chunks share that part of
                 the cache; logits of future-frame codes only; the last token of a frame and the action in one pass
generate         `LlamaForCausalLM.generate` for each frame, on the whole sequence of each row, with its growing cache
generate static  the same with its preallocated cache
generate shared  the same with a growing cache that is filled once per start and then repeated for its rows

On a CPU in float32, and ours and `generate static` also in bfloat16 ("ours, bfloat16" is `train_rft.py --precision
bf16`); on a GPU in bfloat16. Weights are random, in the paper's layout with rotary positions only, which is what
`LlamaForCausalLM` computes. The versions run in turns in one process; ours and `generate static` also with one chunk of
one start ("single"). In float32 they must give the same tokens, except for near ties that rounding decides; the share
of equal tokens is reported, also for bfloat16. `--sizes reduced` has a quarter of the paper's tokens per start and per
frame. Writes one JSON file and, with --figure, a picture of our time against the numbers of frames and chunks.
"""

import sys
from collections.abc import Callable
from copy import copy, deepcopy
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Literal

import torch
from timing import alternate, floating_point_work, machine, peak_rate, ratio, seconds
from torch import Tensor

from vlarft.nets.transformer import TransformerConfig
from vlarft.pretrained.world_model import LlamaForCausalLM
from vlarft.run.checkpoint import write_json
from vlarft.run.config import opt, parse, to_dict
from vlarft.token_layout import TokenLayout
from vlarft.token_sampling import Sampling
from vlarft.tokenizer import PRESETS as TOKENIZERS
from vlarft.tokenizer import TokenizerConfig
from vlarft.world_model import PRESETS as WORLD_MODELS
from vlarft.world_model import WorldModel, WorldModelConfig

NARROW = TransformerConfig(depth=4, width=192, num_heads=6, num_kv_heads=6, ffn_dim=512)
SIZES = {
    "paper": WORLD_MODELS["paper"],
    "reduced": WorldModelConfig(
        tokenizer=replace(TOKENIZERS["tiny"], stem=4, block_channels=(32,), future_patch=4), transformer=NARROW
    ),
    "pixels": WorldModelConfig(
        tokenizer=replace(
            TokenizerConfig(),
            image_size=(64, 64),
            stem=2,
            block_channels=(32, 64, 128),
            latent_channels=32,
            future_patch=2,
        ),
        transformer=replace(NARROW, depth=3, width=128, num_heads=4, num_kv_heads=4, ffn_dim=384),
    ),  # most of the work in the pixel decoder, as at the paper's sizes
    "smoke": WorldModelConfig(tokenizer=TOKENIZERS["smoke"], transformer=WORLD_MODELS["smoke"].transformer),
}


NEARLY_ALL = 0.99  # least share of equal tokens in float32: rounding may decide a near tie, and so the rest of its row


@dataclass(frozen=True)
class Config:
    sizes: Literal["paper", "reduced", "pixels", "smoke"] = opt("reduced", "sizes of the world model")
    out: str = opt("runs/benchmarks/rollout.json", "JSON file to write")
    figure: str | None = opt(None, "picture of time against frames and chunks")
    device: Literal["cpu", "cuda"] = opt("cpu", "where to run; cuda computes in bfloat16")
    starts: int = opt(16, "starts S")
    group: int = opt(16, "action chunks G per start")
    frames: int = opt(8, "frames T")
    repeats: int = opt(3, "timed calls of each version")


PRESETS = {"paper": Config(), "smoke": Config(sizes="smoke", starts=2, group=3, frames=2, repeats=1)}


def import_transformers() -> ModuleType:
    """Import transformers without torchvision where that was built for another torch and cannot be imported."""
    try:
        import torchvision  # noqa: F401
    except (ImportError, RuntimeError, OSError):
        sys.modules["torchvision"] = None
    import transformers

    return transformers


def llama_of(model: WorldModel) -> torch.nn.Module:
    """Copy transformer and head into transformers' `LlamaForCausalLM`."""
    transformers = import_transformers()

    t, layout = model.cfg.transformer, model.layout
    config = transformers.LlamaConfig(
        vocab_size=layout.vocab_size,
        hidden_size=t.width,
        intermediate_size=t.ffn_dim,
        num_hidden_layers=t.depth,
        num_attention_heads=t.num_heads,
        num_key_value_heads=t.num_kv_heads,
        rms_norm_eps=t.norm_eps,
        rope_theta=t.rope_theta,
        max_position_embeddings=t.max_positions,
        tie_word_embeddings=False,
        pad_token_id=layout.eos,
        bos_token_id=layout.bos,
        eos_token_id=layout.eos,
    )
    weights = LlamaForCausalLM(model).state_dict()
    llama = transformers.LlamaForCausalLM(config).to(model.lm_head.weight)
    llama.load_state_dict(weights)
    return llama


class Workload:
    """The world model, its copy in transformers, random starts and actions; on a CPU in float32."""

    def __init__(self, cfg: Config) -> None:
        torch.manual_seed(0)
        sizes = SIZES[cfg.sizes]
        self.model = WorldModel(sizes).to(cfg.device).eval().requires_grad_(False)
        if cfg.device == "cuda":
            self.model.to_bfloat16()
        self.layout = layout = self.model.layout
        self.llama = llama_of(self.model).eval()
        self.frames = torch.rand(cfg.starts, 3, *sizes.tokenizer.image_size, device=cfg.device)
        self.actions = torch.rand(cfg.starts, cfg.group, cfg.frames, sizes.action_dim, device=cfg.device) * 2 - 1
        with torch.no_grad():
            context = self.model.tokenizer.encode_context(self.frames)
            first = self.model.tokenizer.encode_future(self.frames[:, None], context)[:, 0]
            self.prefix = layout.prefix(context.tokens, first)  # (S, P)
            self.bins = layout.action_ids(self.model.action_bins.encode(self.actions)).flatten(0, 1)  # (B, T, A)

    def in_bfloat16(self) -> "Workload":
        """Return the same starts and actions with both models in bfloat16."""
        low = copy(self)
        low.model, low.llama = deepcopy(self.model).to_bfloat16(), deepcopy(self.llama).bfloat16()
        return low

    def single(self) -> "Workload":
        """Return the first chunk of the first start."""
        one = copy(self)
        one.frames, one.prefix, one.actions, one.bins = (
            self.frames[:1], self.prefix[:1], self.actions[:1, :1], self.bins[:1]
        )  # fmt: skip
        return one

    def ours(self, group: int | None = None, frames: int | None = None) -> Tensor:
        """Imagine tokens (S, G, T, Nf)."""
        state = self.model.begin(self.frames)
        return self.model.rollout_tokens(state, self.actions[:, :group, :frames], Sampling(greedy=True))

    @torch.no_grad()
    def generate(self, kind: Literal["growing", "static", "shared"]) -> Tensor:
        """Imagine the same tokens with `generate`."""
        transformers = import_transformers()

        group, num_frames = self.actions.shape[1:3]
        ids = self.prefix.repeat_interleave(group, 0)  # (B, P)
        if kind == "static":
            room = self.layout.length(num_frames)
            cache = transformers.StaticCache(config=self.llama.config, max_cache_len=room)
        else:
            cache = transformers.DynamicCache(config=self.llama.config)
        if kind == "shared":
            self.llama(self.prefix, past_key_values=cache, logits_to_keep=1)
            cache.batch_repeat_interleave(group)
        tokens = generate_frames(self.llama, self.layout, ids, self.bins, lambda: cache)
        return tokens.unflatten(0, (-1, group))


@torch.no_grad()
def generate_frames(
    llama: torch.nn.Module, layout: TokenLayout, ids: Tensor, actions: Tensor, cache: Callable[[], object]
) -> Tensor:
    """Imagine tokens (B, T, Nf) greedily with one call of `generate` per frame.

    Args:
        llama: `llama_of` the world model.
        layout: the world model's token layout.
        ids: (B, P) tokens of the starts.
        actions: (B, T, A) tokens of the actions.
        cache: called once per frame; returns an empty cache, or one filled with the tokens so far.
    """
    transformers = import_transformers()

    def future_codes_only(ids: Tensor, scores: Tensor) -> Tensor:
        scores[:, layout.num_future_codes :] = -torch.inf
        return scores

    length, frames = layout.frame_length, []
    for t in range(actions.shape[1]):
        ids = torch.cat([ids, actions[:, t]], dim=1)
        ids = llama.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            past_key_values=cache(),
            max_new_tokens=length,
            min_new_tokens=length,
            do_sample=False,
            disable_compile=True,  # which it would do by itself with a static cache on a GPU
            logits_processor=transformers.LogitsProcessorList([future_codes_only]),
        )
        frames.append(ids[:, -length:])
    return torch.stack(frames, dim=1)


def decoding_work(model: WorldModel, call: Callable[[], object]) -> int:
    """Count the FLOPs of a call that decodes with the model, without CUDA graphs, whose FLOPs cannot be counted."""
    model.lm_head.weight.requires_grad_(True)  # CUDA graphs are used for frozen models only
    try:
        return floating_point_work(call)
    finally:
        model.lm_head.weight.requires_grad_(False)


def scaling(cfg: Config, work: Workload) -> dict[str, list[tuple[int, float]]]:
    """Return our shortest time [s] for several numbers of frames (all chunks) and of chunks (all frames)."""
    found: dict[str, list[tuple[int, float]]] = {"frames": [], "group": []}
    for name, most in (("frames", cfg.frames), ("group", cfg.group)):
        for number in sorted({max(1, most * i // 4) for i in range(1, 5)}):
            call = partial(work.ours, **{name: number})
            call()  # on a GPU, CUDA graphs of this size are captured
            found[name].append((number, min(seconds(call, cfg.device) for _ in range(cfg.repeats))))
    return found


def draw(report: dict, path: Path) -> None:
    """Write a picture of the scaling."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(9.6, 3.2), dpi=100, layout="constrained", sharey=True)
    for axis, (name, label) in zip(axes, (("frames", "frames"), ("group", "chunks per start")), strict=True):
        axis.plot(*zip(*report["scaling"][name], strict=True), "o-")
        axis.set(xlabel=label, xlim=(0, None), ylim=(0, None))
    axes[0].set_ylabel("seconds of a rollout")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)
    plt.close(figure)


def main(cfg: Config) -> dict:
    """Time and compare the versions; write the JSON file and return its content.

    Raises:
        RuntimeError: two versions disagree in float32.
    """
    work = Workload(cfg)
    versions = {
        "ours": work.ours,
        "generate": lambda: work.generate("growing"),
        "generate static": lambda: work.generate("static"),
        "generate shared": lambda: work.generate("shared"),
    }
    if cfg.device == "cpu":
        low = work.in_bfloat16()
        versions |= {"ours, bfloat16": low.ours, "generate static, bfloat16": lambda: low.generate("static")}
    tokens: dict[str, Tensor] = {}

    def kept(name: str, version: Callable[[], Tensor]) -> Callable[[], None]:
        return lambda: tokens.update({name: version()})

    calls = {name: kept(name, version) for name, version in versions.items()}
    timings = alternate(calls, cfg.repeats, cfg.device, warmup=cfg.device == "cuda")
    equal = {name: (found == tokens["ours"]).float().mean().item() for name, found in tokens.items()}
    if cfg.device == "cpu" and (
        wrong := [name for name, share in equal.items() if share < NEARLY_ALL and "bfloat16" not in name]
    ):
        raise RuntimeError(
            f"{wrong[0]} and ours agree on {100 * equal[wrong[0]]:.2f} % of the tokens, expected {100 * NEARLY_ALL} %"
        )
    peak, ours, work_done = peak_rate(cfg.device), timings["ours"], decoding_work(work.model, work.ours)
    fastest = timings.get("ours, bfloat16", ours)
    report = {
        "command": "python benchmarks/rollout.py",
        "config": to_dict(cfg),
        **machine(cfg.device),
        "prefix_tokens": work.layout.prefix_length,
        "frame_tokens": work.layout.frame_length,
        "parameters": sum(p.numel() for p in work.llama.parameters()),
        "flops": work_done,
        "share_of_peak": work_done / ours.median / peak,
        "peak_flops_per_s": peak,
        "versions": {
            name: {
                **t._asdict(),
                "equal_tokens": equal[name],
                **dict(zip(("times_as_long", "spread"), ratio(ours, t))),
                **dict(zip(("times_as_long_as_bfloat16", "spread_as_bfloat16"), ratio(fastest, t))),
            }
            for name, t in timings.items()
        },
    }
    write_json(cfg.out, report)  # what follows may run out of time
    one = work.single()
    calls = {"ours": kept("ours", one.ours), "generate static": kept("alone", lambda: one.generate("static"))}
    alone = alternate(calls, cfg.repeats, cfg.device, warmup=cfg.device == "cuda")
    longer, spread = ratio(alone["ours"], alone["generate static"])
    same = (tokens["ours"] == tokens["alone"]).float().mean().item()
    report["single"] = {"seconds": {name: t.median for name, t in alone.items()}, "equal_tokens": same}
    report["single"] |= {"times_as_long": longer, "spread": spread}
    report["scaling"] = scaling(cfg, work)
    for name, row in report["versions"].items():
        shown = f"{name:<26} {row['median']:8.3f} s, {100 * row['equal_tokens']:6.2f} % equal tokens; times ours:"
        for key, of in (("times_as_long", "spread"), ("times_as_long_as_bfloat16", "spread_as_bfloat16")):
            shown += f"  {row[key]:.2f} [{row[of][0]:.2f}, {row[of][1]:.2f}]"
        print(shown)
    low, high = spread
    print(f"single: generate static takes {longer:.2f} times as long as ours [{low:.2f}, {high:.2f}]")
    print(f"{work_done / 1e9:.1f} GFLOP in ours, {100 * report['share_of_peak']:.0f} % of the machine's peak")
    write_json(cfg.out, report)
    if cfg.figure:
        draw(report, Path(cfg.figure))
    return report


if __name__ == "__main__":
    main(parse(Config, PRESETS, sys.argv[1:], __doc__))
