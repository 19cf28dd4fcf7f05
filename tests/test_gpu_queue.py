"""The GPU queue: limits, failures, what it leaves behind; the checks; a world model in pieces and joined again."""

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import ended
from safetensors.torch import load_file

from vlarft.run.config import parse
from vlarft.world_model import WorldModel


@pytest.fixture
def queue(load_benchmark):
    return load_benchmark("gpu_queue")


def item(queue, tmp_path: Path, name: str, text: str, seconds: int = 20, flags: str = ""):
    """An item whose script is `text`."""
    script = tmp_path / f"{name}.py"
    script.write_text(f"import json, subprocess, sys, time\nout = sys.argv[-1]\n{text}\n")
    return queue.Item("", seconds, str(script), flags)


def test_an_item_that_fails_or_hangs_does_not_stop_the_next(queue, tmp_path, monkeypatch, capsys):
    child = "import time; time.sleep(60)"
    text = "import sys; sys.stdout.buffer.write(bytes([255]))"
    items = {
        "bad": item(queue, tmp_path, "bad", f"print('so it was', flush=True); {text}; raise ValueError('broken')"),
        "slow": item(
            queue, tmp_path, "slow",
            f"command = [sys.executable, '-c', {child!r}]\n"
            "children = [subprocess.Popen(command, start_new_session=own) for own in (0, 1)]\n"
            "open(out + '.pid', 'w').write(' '.join(str(child.pid) for child in children))\ntime.sleep(60)",
            seconds=3,
        ),
        "good": item(
            queue, tmp_path, "good",
            "import os\njson.dump({'ratio': 2, 'path': os.environ['PYTHONPATH']}, open(out, 'w'))", flags="{lpips}",
        ),
        "lacking": item(queue, tmp_path, "lacking", "")._replace(needs=("torch", "mujoco")),
        "late": item(queue, tmp_path, "late", "", seconds=3600),
        "alone": item(queue, tmp_path, "alone", "")._replace(alone=True),
    }  # fmt: skip
    monkeypatch.setattr(queue, "QUEUE", items)
    monkeypatch.setattr(queue.importlib.util, "find_spec", lambda name: name == "torch" or None)
    report = queue.main(queue.Config(device="cpu", out_dir=str(tmp_path / "out")))
    states = {name: entry["state"] for name, entry in report.items()}
    assert states == {
        "bad": "failed", "slow": "out of time", "good": "passed", "late": "not started: too little time left",
        "lacking": "left out: no mujoco here",
    }  # fmt: skip
    assert "so it was" in report["bad"]["output"] and "ValueError: broken" in report["bad"]["output"]
    assert 3 <= report["slow"]["seconds"] < 15
    for pid in (tmp_path / "out" / "slow_gpu.json.pid").read_text().split():
        assert ended(int(pid))
    assert "replaced" not in report["good"]  # at smoke size nothing asks for it
    made = json.loads((tmp_path / "out" / "good_gpu.json").read_text())
    assert made["path"].split(os.pathsep)[0] == str(queue.ROOT / "src")  # nobody has installed the package
    assert made["ratio"] == 2 and made["commit"] == queue.commit()
    assert json.loads((tmp_path / "out" / "queue.json").read_text()) == report
    assert "slow         out of time" in capsys.readouterr().out
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    report = queue.main(queue.Config(only=("good",), out_dir=str(tmp_path / "gpu")))
    assert report["good"]["replaced"] == "no lpips here: ssim in its place"


def test_a_later_call_adds_to_the_report_and_keeps_no_old_file(queue, tmp_path, monkeypatch):
    items = {
        "first": item(queue, tmp_path, "first", "json.dump({'ratio': 2}, open(out, 'w'))"),
        "second": item(queue, tmp_path, "second", "raise ValueError('broken')"),
    }
    monkeypatch.setattr(queue, "QUEUE", items)
    folder = tmp_path / "out"
    queue.main(queue.Config(device="cpu", only=("first",), out_dir=str(folder)))
    (folder / "second_gpu.json").write_text('{"ratio": 1}')  # of an earlier call, when it passed
    made = queue.main(queue.Config(device="cpu", only=("second",), out_dir=str(folder)))
    assert list(made) == ["second"] and not (folder / "second_gpu.json").exists()
    states = {name: entry["state"] for name, entry in json.loads((folder / "queue.json").read_text()).items()}
    assert states == {"first": "passed", "second": "failed"} and (folder / "first_gpu.json").is_file()


def test_a_queue_that_is_told_to_stop_ends_its_item(tmp_path, queue):
    (tmp_path / "item.py").write_text(
        "import os, sys, time\nopen(sys.argv[-1] + '.pid', 'w').write(str(os.getpid()))\ntime.sleep(60)\n"
    )
    code = (
        f"import sys; sys.path.insert(0, {str(queue.ROOT / 'benchmarks')!r}); import gpu_queue as queue\n"
        f"queue.QUEUE = {{'slow': queue.Item('', 50, {str(tmp_path / 'item.py')!r}, '')}}\n"
        "with queue.clear_errors(), queue.signals_end_this_process():\n"
        f"    queue.main(queue.Config(device='cpu', out_dir={str(tmp_path)!r}))\n"
    )
    process, written = subprocess.Popen([sys.executable, "-c", code]), tmp_path / "slow_gpu.json.pid"
    while not (written.exists() and written.read_text()):
        assert process.poll() is None
        time.sleep(0.05)
    process.terminate()
    assert process.wait(20) == 128 + signal.SIGTERM
    assert ended(int(written.read_text()))
    assert json.loads((tmp_path / "queue.json").read_text())["slow"]["state"] == "was interrupted"


def test_flags_of_the_items(queue, load_benchmark, monkeypatch):
    monkeypatch.setattr(queue.importlib.util, "find_spec", lambda name: name != "lpips" or None)
    words = queue.QUEUE["rft step"].words("cuda", Path("o.json"))
    assert " ".join(words[2:]) == (
        "--sizes paper --policy paper --perceptual ssim --repeats 2 --versions none --device cuda --out o.json"
    )
    for entry in queue.QUEUE.values():
        benchmark = load_benchmark(entry.script.removesuffix(".py"))
        for device in ("cuda", "cpu"):
            words = entry.words(device, Path("o.json"))
            cfg = parse(benchmark.Config, benchmark.PRESETS, words[2:])
            assert (cfg.device, cfg.out) == (device, "o.json") and ("smoke" in words) == (device == "cpu")
    assert sum(entry.seconds for entry in queue.QUEUE.values() if not entry.alone) <= 540
    assert "--no-stages" not in queue.QUEUE["check"].words("cuda", Path("o.json"))
    monkeypatch.setattr(queue.importlib.util, "find_spec", lambda name: None)
    assert "--no-stages" in queue.QUEUE["check"].words("cuda", Path("o.json"))
    with pytest.raises(ValueError, match="unknown item 'fast': there are check, rft step"):
        queue.Config(only=("fast",))


def test_no_gpu_is_said_before_anything_runs(queue, load_benchmark, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(RuntimeError, match="torch finds no GPU here: --device cpu runs the queue at smoke size"):
        queue.main(queue.Config(out_dir=str(tmp_path / "out")))
    assert not (tmp_path / "out").exists()
    with pytest.raises(RuntimeError, match="torch finds no GPU here"):
        load_benchmark("gpu_world_model").main(load_benchmark("gpu_world_model").PRESETS["smoke"])


def test_the_list_is_up_to_date(queue):
    assert (queue.ROOT / "benchmarks" / "gpu_queue.md").read_text() == queue.listing()


def test_a_result_is_stale_when_its_code_has_changed(queue, tmp_path, monkeypatch):
    def git(*words: str) -> str:
        who = "-c", "user.name=A", "-c", "user.email=a@b.c"
        return subprocess.run(["git", *who, *words], cwd=tmp_path, check=True, capture_output=True, text=True).stdout

    monkeypatch.setattr(queue, "ROOT", tmp_path)
    script, other = (tmp_path / "benchmarks" / name for name in ("own.py", "other.py"))
    script.parent.mkdir()
    assert queue.commit() == "unknown" and queue.state_of("r.json", "benchmarks/own.py") == "missing"
    git("init")
    script.touch()
    other.touch()
    git("add", ".")
    git("commit", "-m", "first")
    (tmp_path / "r.json").write_text(json.dumps({"commit": (first := queue.commit())}))
    other.write_text("changed")
    assert queue.commit() == f"{first}+" and queue.state_of("r.json", "benchmarks/own.py") == f"measured at {first}"
    script.write_text("changed")
    assert queue.state_of("r.json", "benchmarks/own.py") == f"stale: measured at {first}"
    git("commit", "-a", "-m", "second")
    assert queue.state_of("r.json", "benchmarks/own.py") == f"stale: measured at {first}"
    (tmp_path / "r.json").write_text('{"commit": "unknown"}')
    assert queue.state_of("r.json", "benchmarks/own.py") == "measured at unknown"


def test_checks_that_fail_are_named_and_the_others_run(load_benchmark, tmp_path, monkeypatch):
    benchmark = load_benchmark("gpu_check")
    cfg = replace(benchmark.PRESETS["smoke"], out=str(tmp_path / "c.json"), stages=False)
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self: None)  # a minute
    report = benchmark.main(cfg)
    assert {name: found["passed"] for name, found in report["checks"].items()} == {
        "static decoding": True, "bfloat16": True, "compiled decoder": True
    }  # fmt: skip
    rollout = WorldModel.rollout_tokens

    def broken(self, *args, static=None, **kwargs):
        return rollout(self, *args, static=static, **kwargs) * (0 if static else 1)

    monkeypatch.setattr(WorldModel, "rollout_tokens", broken)
    report = benchmark.main(cfg)
    assert not report["checks"]["static decoding"]["passed"] and report["checks"]["bfloat16"]["passed"]
    assert "AssertionError: {'equal_tokens'" in report["checks"]["static decoding"]["error"]
    assert json.loads((tmp_path / "c.json").read_text()) == json.loads(json.dumps(report))


def test_pieces_joined_are_the_model_in_bfloat16(load_benchmark, world_model_file, tmp_path, monkeypatch):
    benchmark = load_benchmark("gpu_world_model")
    model = Path(world_model_file)
    monkeypatch.setattr(benchmark, "PIECE", 100_000)
    pieces = benchmark.split(model, tmp_path)
    assert len(pieces) > 1
    benchmark.main(replace(benchmark.Config(), join=str(tmp_path), out=str(tmp_path / "wm")))
    before, after = load_file(model), load_file(tmp_path / "wm" / "model.safetensors")
    assert before.keys() == after.keys()
    weights = {name for name, _ in WorldModel.load(model).named_parameters()}
    for name, value in before.items():
        rounded = value.to(torch.bfloat16).to(value.dtype) if name in weights else value  # ranges stay exact
        assert torch.equal(after[name], rounded)
    assert WorldModel.load(tmp_path / "wm").cfg == WorldModel.load(model).cfg
    with pytest.raises(FileExistsError, match="wm/model.safetensors exists; give another folder as --out"):
        benchmark.join(tmp_path, tmp_path / "wm")
    with pytest.raises(FileNotFoundError, match="no world_model_0.safetensors in"):
        benchmark.join(tmp_path / "wm", tmp_path)
