"""The demo at smoke size: every stage script through its command line, the pictures, the second call."""

import dataclasses
import json
from pathlib import Path

import pytest
from PIL import Image

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
    assert list(summary["stages"]) == ["collect", "tokenizer", "wm", "eval_wm", "sft", "rft", "sft_extra", "eval"]
    assert all(s["done"] and s["peak_bytes"] > 2**27 for s in summary["stages"].values())
    assert [p["all"]["episodes"] for p in summary["evaluation"]] == [2, 2, 2]
    for name in ("demonstrations.png", "curves.png", "before_after.gif", "rft/rollouts.png", "wm/rollouts.png"):
        with Image.open(tmp_path / name) as image:
            assert min(image.size) >= 64, name
    printed = capfd.readouterr().out
    assert "[sft] python train_sft.py --preset smoke --demos" in printed
    assert "+ RFT" in printed

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


def test_a_stage_that_fails_stops_the_demo(tmp_path):
    with pytest.raises(SystemExit, match=r"\[rft\] ended with status 1; the same command goes on from there"):
        demo.run_stage(tmp_path, "rft", "train_rft.py", preset="smoke", policy=tmp_path / "none", out_dir=tmp_path)
    assert json.loads((tmp_path / "stages.json").read_text())["rft"]["done"] is False
