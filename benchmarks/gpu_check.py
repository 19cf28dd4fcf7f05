"""Check on a GPU what the tests check on a CPU: public outputs, decoding with CUDA graphs, bfloat16, compilation.

    python benchmarks/gpu_check.py --device cuda            paper's sizes, about a minute
    python benchmarks/gpu_check.py --preset smoke           everything but the public outputs, small, on any machine

public tokenizer     tokens, and what is rounded to them, as in tests/golden
public world model   logits and log-probabilities of one sequence, as in tests/golden
static decoding      `StaticDecoding` imagines the tokens that decoding with a growing cache does, in float32
bfloat16             log-probabilities of `to_bfloat16` against float32
compiled decoder     pixels of the compiled decoder against the same decoder's
stages               every stage of `demo.py --preset smoke`

Weights are the made-up ones of tests/golden/weights.py. A check that fails does not stop the next. Writes one JSON file
and ends with status 1 where a check failed.
"""

import json
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from rollout import SIZES
from safetensors.torch import load_file
from timing import machine, seconds

from vlarft.pretrained import (
    LIBERO_ACTION_RANGES,
    tokenizer_config,
    tokenizer_from_public,
    transformer_config,
    world_model_from_public,
)
from vlarft.run.checkpoint import write_json
from vlarft.run.config import opt, parse, to_dict
from vlarft.token_sampling import Sampling
from vlarft.tokenizer import FrameTokenizer
from vlarft.world_model import WorldModel, WorldModelConfig

ROOT = Path(__file__).resolve().parents[1]
GOLDEN = ROOT / "tests" / "golden"
sys.path.insert(0, str(GOLDEN))
from weights import uniform, weight  # noqa: E402


@dataclass(frozen=True)
class Config:
    sizes: Literal["paper", "smoke"] = opt("paper", "sizes of the world model, see rollout.py")
    device: Literal["cpu", "cuda"] = opt("cpu", "where to run")
    out: str = opt("runs/benchmarks/gpu_check.json", "JSON file to write")
    stages: bool = opt(True, "also run every stage at smoke size")


PRESETS = {"paper": Config(), "smoke": Config(sizes="smoke")}


def golden_weights(name: str, gain: dict[str, float]) -> tuple[dict, dict[str, torch.Tensor]]:
    """Return configuration and made-up weights of a public key listing."""
    listing = json.loads((GOLDEN / f"{name}_public.json").read_text())
    made = {k: torch.from_numpy(weight(k, shape, gain.get(k, 0.7))) for k, shape in listing["tensors"].items()}
    return listing["config"], made


def largest(a: torch.Tensor, b: torch.Tensor) -> float:
    """Return the largest difference of two tensors."""
    return (a.float().cpu() - b.float().cpu()).abs().max().item()


class Checks:
    """The checks, each returns what it measured; a failed one raises AssertionError."""

    def __init__(self, cfg: Config) -> None:
        self.cfg = cfg
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False

    def public_tokenizer(self) -> dict[str, float]:
        golden, model = load_file(GOLDEN / "tokenizer.safetensors"), self._public_tokenizer()
        coarse = torch.from_numpy(uniform("input/frames_coarse/1", (1, 3, 3, 32, 32), 0, 1))
        fine = torch.from_numpy(uniform("input/frames_fine/1", (1, 3, 3, 256, 256), 0, 1))
        frames = 0.75 * coarse.repeat_interleave(8, -2).repeat_interleave(8, -1) + 0.25 * fine
        seen: dict[str, torch.Tensor] = {}
        for name in ("quant_conv", "quant_linear"):
            model.get_submodule(name).register_forward_hook(lambda _m, _i, out, name=name: seen.update({name: out}))
        frames = frames.to(self.cfg.device)
        context = model.encode_context(frames[:, 0])
        tokens = model.encode_future(frames[:, 1:], context)
        found = {
            "before_rounding": max(
                largest(seen["quant_conv"], golden["ctx_prequant"]),
                largest(seen["quant_linear"], golden["dyn_prequant"]),
            ),
            "other_context_tokens": (context.tokens.int().cpu() != golden["ctx_indices"][:, 0]).sum().item(),
            "other_tokens": (tokens.int().cpu() != golden["dyn_indices"]).sum().item(),
        }
        assert found["before_rounding"] < 1e-3, found
        assert not found["other_context_tokens"] and not found["other_tokens"], found
        return found

    def public_world_model(self) -> dict[str, float]:
        golden, sequence = (load_file(GOLDEN / f"world_model{n}.safetensors") for n in ("", "_sequence"))
        layout, made = golden_weights("world_model", {})
        tokenizer = self._public_tokenizer().cpu()
        config = WorldModelConfig(tokenizer.cfg, transformer_config(layout))
        model = world_model_from_public(made, config, tokenizer, torch.tensor(LIBERO_ACTION_RANGES))
        model = model.to(self.cfg.device).eval()
        ids = sequence["input_ids"].long().to(self.cfg.device)
        logits = model.lm_head(model.decoder(model.embed(ids[:1], model.tables())))[0].cpu()  # (N, vocabulary)
        log_prob = logits.log_softmax(-1)[:-1].gather(1, ids[0, 1:, None].cpu())[:, 0]
        clear = golden["argmax_gap"] > 1e-3
        found = {
            "logits": largest(logits[golden["positions"].long(), :256], golden["logits_head"]),
            "log_prob": largest(log_prob, golden["logprob_next"]),
            "other_best_tokens": (logits.argmax(-1).int()[clear] != golden["argmax"][clear]).sum().item(),
        }
        assert found["logits"] < 1e-3 and found["log_prob"] < 1e-3 and not found["other_best_tokens"], found
        return found

    def static_decoding(self) -> dict[str, float]:
        model, frames, actions = self._random()
        state, greedy = model.begin(frames), Sampling(greedy=True)
        static, growing = (model.rollout_tokens(state, actions, greedy, static=kind) for kind in (True, False))
        found = {"equal_tokens": (static == growing).float().mean().item()}
        assert found["equal_tokens"] > 0.99, found  # rounding may decide a near tie, and so the rest of its row
        return found

    def bfloat16(self) -> dict[str, float]:
        model, frames, actions = self._random()
        context, tokens = model.tokenize(torch.cat([frames[:, None]] * (actions.shape[2] + 1), dim=1))
        exact, _ = model.token_loss(context, tokens, actions[:, 0])
        rounded, _ = model.to_bfloat16().token_loss(context, tokens, actions[:, 0])
        found = {"loss": exact.item(), "difference": abs(exact.item() - rounded.item())}
        assert found["difference"] < 0.05, found
        return found

    def compiled_decoder(self) -> dict[str, float]:
        model, frames, actions = self._random()
        state = model.begin(frames)
        tokens = model.rollout_tokens(state, actions, Sampling(greedy=True))
        before = model.tokenizer.decode(tokens, state.context)
        model.tokenizer.cond_decoder.compile()
        found = {"pixels": largest(model.tokenizer.decode(tokens, state.context), before)}
        assert found["pixels"] < 2e-3, found
        return found

    def stages(self) -> dict[str, float]:
        with tempfile.TemporaryDirectory() as folder:
            words = [sys.executable, str(ROOT / "demo.py"), "--preset", "smoke", "--out-dir", folder]
            run = subprocess.run(words, capture_output=True, text=True, cwd=ROOT)
        assert run.returncode == 0, (run.stdout + run.stderr)[-2000:]
        return {}

    def _public_tokenizer(self) -> FrameTokenizer:
        config, made = golden_weights("tokenizer", {"quant_conv.weight": 2.1, "quant_linear.weight": 2.1})
        return tokenizer_from_public(made, tokenizer_config(config)).to(self.cfg.device).eval()

    def _random(self) -> tuple[WorldModel, torch.Tensor, torch.Tensor]:
        """Make a world model with random weights, first frames (S, C, H, W) and actions (S, G, T, A)."""
        torch.manual_seed(0)
        sizes = SIZES[self.cfg.sizes]
        model = WorldModel(sizes).eval().requires_grad_(False).to(self.cfg.device)
        frames, actions = torch.rand(2, 3, *sizes.tokenizer.image_size), torch.rand(2, 4, 8, sizes.action_dim) * 2 - 1
        return model, frames.to(self.cfg.device), actions.to(self.cfg.device)


@torch.no_grad()
def main(cfg: Config) -> dict:
    """Run all checks; write the JSON file and return its content."""
    checks = Checks(cfg)
    public = [checks.public_tokenizer, checks.public_world_model] if cfg.sizes == "paper" else []
    wanted: list[Callable[[], dict]] = [*public, checks.static_decoding, checks.bfloat16, checks.compiled_decoder]
    report = {"command": "python benchmarks/gpu_check.py", "config": to_dict(cfg), **machine(cfg.device), "checks": {}}
    for check in wanted + [checks.stages] * cfg.stages:
        found: dict[str, object] = {}

        def run(check: Callable[[], dict] = check, found: dict = found) -> None:
            try:
                found |= {**check(), "passed": True}
            except Exception as error:  # the next check runs all the same
                found |= {"passed": False, "error": f"{type(error).__name__}: {error}"}

        found["seconds"] = seconds(run, cfg.device)
        name = check.__name__.replace("_", " ")
        report["checks"][name] = found
        print(f"{name:<20}", "passed" if found["passed"] else f"FAILED: {found['error']}", f"{found['seconds']:.1f} s")
        write_json(cfg.out, report)
    return report


if __name__ == "__main__":
    made = main(parse(Config, PRESETS, sys.argv[1:], __doc__))
    sys.exit(not all(check["passed"] for check in made["checks"].values()))
