"""Every training and measurement on a device that is not the CPU, in `pretend_gpu.py`."""

import importlib
import re
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import interrupted

from vlarft.run.config import parse

ROOT = Path(__file__).parents[1]


def on_the_device(*commands: tuple[object, ...]) -> subprocess.CompletedProcess:
    words = [str(word) for command in commands for word in ("+", *command)][1:]
    command = [sys.executable, str(ROOT / "tests" / "pretend_gpu.py"), *words]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)


@pytest.mark.slow
def test_stages_move_their_tensors_to_the_device(both_outcomes, tmp_path, monkeypatch):
    """And one that was interrupted goes on there, with its averaged weights."""
    demos, smoke = ("--demos", both_outcomes), ("--preset", "smoke", "--seed", 1)
    held_out = ("--validation-fraction", 0.34)
    names = ("tokenizer", "wm", "sft", "success", "rft", "divergence", "rl", "eval")
    tokenizer, wm, sft, success, rft, divergence, rl, evaluated = (tmp_path / name for name in names)
    policy, world = ("--policy", sft), ("--world-model", wm)

    train_sft = importlib.import_module("train_sft")
    begun = ["--preset", "smoke", "--seed", "1", *map(str, demos), "--save-interval", "2", "--out-dir", str(sft)]
    cfg = parse(train_sft.Config, train_sft.PRESETS, begun, "")
    assert cfg.ema is not None
    interrupted(monkeypatch, train_sft, 2, lambda: train_sft.main(cfg))

    rft_words = ("train_rft", *smoke, *demos, *policy, *world, "--steps", 1, "--starts", 1, "--group", 2)
    rl_words = ("--gate-threshold", 0, "--steps", 1, "--horizon", 8, "--group", 2)
    judged = ("--success-model", success)
    ran = on_the_device(
        ("train_tokenizer", *smoke, *demos, *held_out, "--out-dir", tokenizer, "--steps", 2),
        ("train_wm", *smoke, *demos, *held_out, "--tokenizer", tokenizer, "--out-dir", wm, "--steps", 2),
        ("train_sft", *begun),
        ("train_success", *smoke, *demos, *world, "--out-dir", success, "--margin", 4, "--steps", 1, "--episodes", 1),
        (*rft_words, "--out-dir", rft, "--gate-starts", 0, "--precision", "bf16"),
        (*rft_words, "--out-dir", divergence, "--reward", "divergence", "--gate-starts", 1),
        ("train_rl", *smoke, *demos, *policy, *world, *judged, *rl_words, "--out-dir", rl),
        (
            "eval_wm",
            *smoke,
            *world,
            *demos,
            *judged,
            "--segments",
            1,
            "--episodes",
            2,
            "--starts",
            1,
            "--out-dir",
            evaluated,
        ),
    )
    assert ran.returncode == 0, ran.stdout[-3000:] + ran.stderr[-3000:]
    shapes = re.findall(r"on the device: (\w+), .* (\d+) fixed shapes", ran.stdout)
    assert len(shapes) == 8
    # those that imagine with a frozen model; the first train_rft in bfloat16, the second decodes nothing
    assert [name for name, count in shapes if int(count)] == ["train_success", "train_rft", "train_rl", "eval_wm"]
    for folder in (tokenizer, wm, sft, success, rft, divergence, rl):
        assert (folder / "model.safetensors").is_file()
    assert (evaluated / "results.json").is_file() and '"policy_loss"' in (rl / "log.jsonl").read_text()


def test_a_tensor_left_on_the_cpu_is_an_error(tmp_path):
    script = tmp_path / "forgetful.py"
    script.write_text(
        "'''A script.'''\nimport torch, vlarft.run.distributed as d\nfrom dataclasses import dataclass\n"
        "@dataclass(frozen=True)\nclass Config:\n    pass\nPRESETS = {'paper': Config()}\n"
        "def main(cfg):\n"
        "    x = torch.ones(3, device=d.setup())\n"
        "    print((x + x).cpu(), x.sum().item(), (x * torch.tensor(2.0)).tolist())\n"
        "    where = torch.zeros(1, dtype=torch.long)\n"
        "    print(x[where].cpu(), end=' ')\n"  # CPU indices of a tensor on the device: as CUDA allows
        "    try:\n        torch.ones(3)[where.to(x.device)]\n"
        "    except RuntimeError as error:\n        print(error)\n"
        "    source = torch.Generator(x.device).manual_seed(0)\n"
        "    print(torch.randn(3, device=x.device, generator=source).cpu().shape, end=' ')\n"
        "    for way in (lambda: x.normal_(generator=torch.Generator()), lambda: torch.rand(3, generator=source)):\n"
        "        try:\n            way()\n"
        "        except RuntimeError as error:\n            print(error)\n"
        "    x + torch.ones(3)\n"
    )
    command = [sys.executable, str(ROOT / "tests" / "pretend_gpu.py"), "forgetful"]
    ran = subprocess.run(command, cwd=ROOT, env={"PYTHONPATH": str(tmp_path)}, capture_output=True, text=True)
    assert ran.returncode == 1
    assert "tensor([2., 2., 2.]) 3.0 [2.0, 2.0, 2.0]" in ran.stdout
    assert "tensor([1.]) aten.index.Tensor: indices should be either on cpu or on the same device" in ran.stdout
    assert "torch.Size([3]) normal_: a generator of cpu for a tensor of pretended\n" in ran.stdout
    assert "rand: a generator of pretended for a tensor of cpu\n" in ran.stdout
    assert "expected all tensors on one device, found (3,) on the CPU" in ran.stderr
