"""Train the strongest world model that eight minutes of a GPU give, and write it in pieces that are easy to carry.

    python benchmarks/gpu_world_model.py --device cuda --out runs/gpu/world_model.json
    python benchmarks/gpu_world_model.py --join runs/gpu --out runs/wm          pieces -> a run folder

Demonstrations, noisy attempts included, of all Tabletop suites, made here or given; tokenizer and world model in
bfloat16 with large batches, for as long as they are given; then `eval_wm.py`. The sizes are those that a CPU can
imagine with. Writes the evaluation's metrics as a JSON file and, beside it, world_model_0.safetensors, ...: the weights
in bfloat16, none larger than `PIECE`, each with the model's metadata. The stages' folders stay in `runs_dir`.
"""

import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from timing import machine

from vlarft.run.checkpoint import write_atomic, write_json
from vlarft.run.config import opt, parse, to_dict
from vlarft.run.script import clear_errors
from vlarft.world_model import WorldModel

ROOT = Path(__file__).resolve().parents[1]
PIECE = 15 * 2**20  # bytes
NO_END = 10**6  # steps


@dataclass(frozen=True)
class Config:
    stage_preset: Literal["tiny", "small", "smoke"] = opt("tiny", "preset of the stages")
    device: Literal["cpu", "cuda"] = opt("cuda", "where to run; the stages take a GPU wherever there is one")
    out: str = opt("runs/benchmarks/world_model.json", "JSON file to write; with --join, the run folder")
    join: str | None = opt(None, "folder of pieces to put together; nothing else is done then")
    suites: tuple[str, ...] = opt(
        ("tabletop_spatial", "tabletop_object", "tabletop_goal", "tabletop_long"), "suites to learn"
    )
    demos: str | None = opt(None, "folder of demonstrations to learn from; none: make them, which needs mujoco")
    runs_dir: str | None = opt(None, "folder for the stages' runs; none: below runs/, by preset and device")
    demos_per_task: int = opt(60, "demonstrations per task; a fifth as many noisy attempts")
    batch_size: int = opt(64, "segments per step")
    tokenizer_minutes: float = opt(3.0, "wall time of the tokenizer [min]")
    model_minutes: float = opt(3.5, "wall time of the world model [min]")


PRESETS = {
    "paper": Config(),
    "smoke": Config(
        stage_preset="smoke", suites=("tabletop_spatial",), demos_per_task=1, batch_size=4, tokenizer_minutes=0.02,
        model_minutes=0.02,
    ),
}  # fmt: skip


def stage(script: str, cfg: Config, *words: object) -> None:
    """Run a stage script; its errors are ours."""
    subprocess.run([sys.executable, str(ROOT / script), "--preset", cfg.stage_preset, *map(str, words)], check=True)


def split(model: Path, folder: Path) -> list[Path]:
    """Write a model's weights in bfloat16, in pieces of at most `PIECE` bytes, each with the metadata of the whole."""
    with safe_open(model, "pt") as file:
        metadata = file.metadata()
    pieces, size, weights = [{}], 0, {name for name, _ in WorldModel.load(model).named_parameters()}
    for name, value in load_file(model).items():
        value = value.to(torch.bfloat16) if name in weights else value  # not ranges and statistics
        if pieces[-1] and size + value.nbytes > PIECE:
            pieces, size = [*pieces, {}], 0
        pieces[-1][name], size = value.contiguous(), size + value.nbytes
    paths = [folder / f"world_model_{i}.safetensors" for i in range(len(pieces))]
    for path, piece in zip(paths, pieces, strict=True):
        save_file(piece, path, metadata)
    return paths


def join(folder: Path, out: Path) -> None:
    """Write the model.safetensors of which `split` made the pieces, in float32.

    Raises:
        FileExistsError: there is one.
        FileNotFoundError: no pieces.
    """
    if (path := out / "model.safetensors").exists():
        raise FileExistsError(f"{path} exists; give another folder as --out")
    paths = sorted(folder.glob("world_model_*.safetensors"))
    if not paths:
        raise FileNotFoundError(f"no world_model_0.safetensors in {folder}")
    with safe_open(paths[0], "pt") as file:
        metadata = file.metadata()
    values = {name: value for path in paths for name, value in load_file(path).items()}
    floats = {k: v.float() if v.dtype == torch.bfloat16 else v for k, v in values.items()}
    write_atomic(path, lambda tmp: save_file(floats, tmp, metadata))


def main(cfg: Config) -> dict:
    """Train and write; return what the JSON file holds.

    Raises:
        RuntimeError: torch finds no GPU, and one is asked for.
    """
    if cfg.join is not None:
        join(Path(cfg.join), Path(cfg.out))
        return {}
    if cfg.device == "cuda" and not torch.cuda.is_available():
        raise RuntimeError("--device cuda: torch finds no GPU here")
    out = Path(cfg.out)
    out.parent.mkdir(parents=True, exist_ok=True)
    runs = Path(cfg.runs_dir or ROOT / "runs" / f"gpu_world_model_{cfg.stage_preset}_{cfg.device}")
    demos, tokenizer, model = (str(runs / name) for name in ("demos", "tokenizer", "wm"))
    if cfg.demos is None:
        counts = ["--demos-per-task", cfg.demos_per_task, "--noisy-per-task", cfg.demos_per_task // 5]
        stage("collect_demos.py", cfg, "--suites", *cfg.suites, *counts, "--out-dir", demos)
    else:
        demos = cfg.demos
    how = ["--demos", demos, "--precision", "bf16", "--batch-size", cfg.batch_size]
    how += ["--steps", NO_END, "--save-interval", NO_END]  # the minutes end a stage, which then saves
    stage("train_tokenizer.py", cfg, *how, "--max-minutes", cfg.tokenizer_minutes, "--out-dir", tokenizer)
    how += ["--tokenizer", tokenizer, "--max-minutes", cfg.model_minutes]
    stage("train_wm.py", cfg, *how, "--out-dir", model)
    pieces = split(Path(model) / "model.safetensors", out.parent)  # first: nothing below may cost them
    report = {"command": "python benchmarks/gpu_world_model.py", "config": to_dict(cfg), **machine(cfg.device)}
    report["pieces"] = [path.name for path in pieces]
    write_json(out, report)
    stage("eval_wm.py", cfg, "--world-model", model, "--out-dir", f"{model}/eval")
    report["metrics"] = json.loads(Path(f"{model}/eval/results.json").read_text())
    write_json(out, report)
    return report


if __name__ == "__main__":
    with clear_errors():
        main(parse(Config, PRESETS, sys.argv[1:], __doc__))
