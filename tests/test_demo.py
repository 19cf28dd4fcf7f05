"""The demo at smoke size: every stage script through its command line, the pictures, the second call."""

import dataclasses
import json
from importlib.metadata import version
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import collect_demos
import demo

ROOT = Path(__file__).parents[1]


def run_notebook(name: str) -> dict:
    """Run the code cells of a notebook in order; returns their variables."""
    path, names = ROOT / "notebooks" / name, {"__name__": "notebook"}
    for cell in json.loads(path.read_text())["cells"]:
        if cell["cell_type"] == "code":
            exec(compile("".join(cell["source"]), str(path), "exec"), names)
    return names


@pytest.mark.slow
def test_whole_pipeline(tmp_path, capfd, monkeypatch):
    cfg = dataclasses.replace(demo.PRESETS["smoke"], out_dir=str(tmp_path))
    summary = demo.main(cfg)
    names = ["collect", "tokenizer", "wm", "eval_wm", "sft", "rft", "sft_extra", "eval", "eval_zero"]
    assert list(summary["stages"]) == names
    assert all(s["done"] and s["peak_bytes"] > 2**27 for s in summary["stages"].values())
    rows = summary["evaluation"]
    assert list(rows) == ["SFT", "SFT, x_0 = 0", "+ extra SFT", "+ RFT"]
    assert [row["all"]["episodes"] for row in rows.values()] == [2, 2, 2, 2]
    assert ["against_first" in row for row in rows.values()] == [False, True, True, True]
    assert summary["versions"]["torch"] == version("torch") and {"python", "mujoco"} < set(summary["versions"])
    for name in ("demonstrations.png", "curves.png", "before_after.gif", "rft/rollouts.png", "wm/rollouts.png"):
        with Image.open(tmp_path / name) as image:
            assert min(image.size) >= 64, name
    printed = capfd.readouterr().out
    assert "[sft] python train_sft.py --preset smoke --seed 0 --split-seed 0 --demos" in printed
    assert "+ RFT" in printed and "SFT, x_0 = 0" in printed and "its numbers mean nothing" in printed

    before = json.loads((tmp_path / "stages.json").read_text())
    demo.main(cfg)  # nothing is done again
    assert json.loads((tmp_path / "stages.json").read_text()) == before
    assert "[eval] done in" in capfd.readouterr().out

    monkeypatch.setenv("DEMO", str(tmp_path))
    monkeypatch.setenv("MPLBACKEND", "Agg")
    cells = run_notebook("imagination.ipynb")
    assert len(cells["imagined"]) == 9 and cells["rollout"].frames.shape[:3] == (1, 4, 8)
    cells = run_notebook("rft_step.ipynb")
    assert cells["reward"].shape == cells["advantage"].shape == (4, 8) and cells["loss"].isfinite()


def test_the_seed_reaches_every_stage(tmp_path, monkeypatch):
    stages = {}
    monkeypatch.setattr(demo, "run_stage", lambda folder, name, script, /, **flags: stages.setdefault(name, flags))
    seconds = {f"{phase}_s": np.array([[0, 60.0], [1, 60.0]]) for phase in ("policy", "world_model", "update")}
    monkeypatch.setattr(demo, "read_log", lambda folder: seconds)
    demo.run_stages(demo.Config(out_dir=str(tmp_path), seed=2))
    assert {name: flags["seed"] for name, flags in stages.items()} == {
        name: 2000 if name == "collect" else 2 for name in stages
    }
    assert len(stages) == 9 and stages["eval_zero"]["noise"] == "zero" and stages["sft_extra"]["max_minutes"] == "6.00"
    assert [name for name, flags in stages.items() if flags.get("split_seed") == 2] == [
        "tokenizer",
        "wm",
        "sft",
        "sft_extra",
    ]
    # no start seed serves two seeds of the demo
    assert collect_demos.PRESETS["tiny"].demos_per_task < demo.DEMOS_PER_SEED


def test_a_stage_that_fails_stops_the_demo(tmp_path):
    with pytest.raises(SystemExit, match=r"\[rft\] ended with status 1; the same command goes on from there"):
        demo.run_stage(tmp_path, "rft", "train_rft.py", preset="smoke", policy=tmp_path / "none", out_dir=tmp_path)
    assert json.loads((tmp_path / "stages.json").read_text())["rft"]["done"] is False
