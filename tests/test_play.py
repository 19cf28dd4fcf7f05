"""The repository's checkpoints: play.py, its page and what it refuses; and the notebooks."""

import dataclasses
import json
import os
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
from conftest import files_of

import collect_demos
import eval_libero
import play
from vlarft.data.convention import check_same_images
from vlarft.policy import VLAPolicy
from vlarft.reward import check_same_robot
from vlarft.run.checkpoint import read_header, save_model
from vlarft.sim import make_env, policy_check, replay
from vlarft.sim.policy_check import check_policy
from vlarft.world_model import WorldModel

ROOT = Path(__file__).parents[1]


def run_notebook(name: str) -> dict:
    """Run the code cells of a notebook in order; returns their variables."""
    path, names = ROOT / "notebooks" / name, {"__name__": "notebook"}
    for cell in json.loads(path.read_text())["cells"]:
        if cell["cell_type"] == "code":
            exec(compile("".join(cell["source"]), str(path), "exec"), names)
    return names


def records(*outcomes):
    return {
        ("suite", task, state): {"success": won}
        for task, states in enumerate(outcomes)
        for state, won in enumerate(states)
    }


def test_of_each_task_the_first_start_that_one_policy_alone_wins():
    before = records([True, False, True], [False, False], [True, True])
    after = records([True, True, False], [False, False], [True, False])
    chosen = [("suite", 0, 1), ("suite", 1, 0), ("suite", 2, 1)]
    assert play.chosen_starts([before, after]) == play.chosen_starts([after, before]) == chosen


def test_the_checkpoints_are_found_from_another_folder(tmp_path):
    code, where = "import play; c = play.Config(); print(*c.policies, c.world_model)", {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=tmp_path, env=os.environ | where, capture_output=True, text=True, check=True)
    assert all((tmp_path / place / "model.safetensors").is_file() for place in done.stdout.split())


@pytest.mark.slow
def test_the_page_of_the_repositorys_checkpoints(tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(ROOT)  # where the checkpoints are
    config = dataclasses.replace(play.PRESETS["smoke"], out_dir=str(tmp_path / "play"), size=64)
    page = play.main(config)
    text, kept = page.read_text(), files_of(tmp_path / "play" / "eval") | {".lock": b""}  # of each process
    assert all(f"{name}: " in text and f"{name}, imagined" in text for name in ("before", "after"))
    assert text.count('type="range"') == 1
    records = [json.loads(line) for line in (tmp_path / "play" / "eval" / "episodes.jsonl").read_text().splitlines()]
    assert [(r["task"], r["init_state"]) for r in records] == [(0, 0), (0, 0)]
    assert (
        play.main(config) == page and files_of(page.parent / "eval") | {".lock": b""} == kept
    )  # nothing is played twice


def test_what_does_not_belong_together_is_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    config = dataclasses.replace(play.PRESETS["smoke"], out_dir=str(tmp_path / "play"))
    with pytest.raises(ValueError, match="tabletop_before/model.safetensors holds a VLAPolicy, expected a WorldModel"):
        play.main(dataclasses.replace(config, world_model="checkpoints/tabletop_before"))
    model = WorldModel.load(config.world_model)
    model.action_bins.set_range(model.action_bins.low / 10, model.action_bins.high / 10)
    save_model(tmp_path / "model.safetensors", model, model.cfg)
    with pytest.raises(ValueError, match="the world model"):  # of a robot that moves less
        play.main(dataclasses.replace(config, world_model=str(tmp_path)))
    model, header = WorldModel.load(config.world_model), read_header(config.world_model)
    save_model(tmp_path / "model.safetensors", model, model.cfg, {**header.extra, "camera": "eye_in_hand"})
    with pytest.raises(ValueError, match="policy .* has camera 'agentview', world model .* has 'eye_in_hand'"):
        play.main(dataclasses.replace(config, world_model=str(tmp_path)))
    assert not (tmp_path / "play" / "play.html").exists()
    with pytest.raises(SystemExit, match="2"):  # of the evaluation, which has said why
        play.main(dataclasses.replace(config, tasks=("99",)))


@pytest.mark.parametrize("fast", [True, None])
def test_policies_play_as_their_images_were_rendered(tmp_path, monkeypatch, fast):
    """The evaluation, the films and the first frame of the imagination."""
    monkeypatch.chdir(ROOT)
    policies, rendered = [], []
    for name, path in zip(play.NAMES, play.Config.policies, strict=True):
        policy = VLAPolicy.load(path)
        policies.append(str(tmp_path / name / "model.safetensors"))
        save_model(policies[-1], policy, policy.cfg, {"fast_rendering": fast})
    config = dataclasses.replace(play.PRESETS["smoke"], policies=tuple(policies), out_dir=str(tmp_path / "play"))

    def evaluate(words):
        assert ("--fast-rendering" in words) == bool(fast)
        start = {"suite": config.suite, "task": 0, "init_state": 0, "success": True, "actions": [[0.0] * 7] * 8}
        (tmp_path / "play" / "eval").mkdir(parents=True)
        lines = [json.dumps({"policy": path, **start}) + "\n" for path in policies]
        (tmp_path / "play" / "eval" / "episodes.jsonl").write_text("".join(lines))
        return subprocess.CompletedProcess(words, 0)

    def make(*where, fast_rendering, **options):
        rendered.append(fast_rendering)
        return make_env(*where, **options)

    monkeypatch.setattr(play.subprocess, "run", evaluate)
    monkeypatch.setattr(play, "make_env", make)
    monkeypatch.setattr(replay, "make_env", make)
    monkeypatch.setattr(play, "sections", lambda folders: [])
    play.main(config)
    assert rendered == [bool(fast)] * 4


def test_the_checkpoints_fit_a_repository():
    folders = sorted((ROOT / "checkpoints").iterdir())
    names = [f.name for f in folders]
    assert names[:2] == ["libero_object_sft", "libero_object_world_model"]
    assert names[2:] == ["tabletop_after", "tabletop_before", "tabletop_world_model"]
    for folder in folders:
        assert {"model.safetensors", "README.md"} <= set(os.listdir(folder))
    assert sum(path.stat().st_size for path in (ROOT / "checkpoints").rglob("*") if path.is_file()) < 40e6


@pytest.mark.slow
def test_notebooks_run(tmp_path, monkeypatch):
    for name in ("checkpoints", "collect_demos.py"):
        (tmp_path / name).symlink_to(ROOT / name)
    (tmp_path / "notebooks").mkdir()
    monkeypatch.chdir(tmp_path / "notebooks")
    monkeypatch.setenv("MPLBACKEND", "Agg")
    cells = run_notebook("imagination.ipynb")
    assert len(cells["imagined"]) == 9 and cells["rollout"].frames.shape[:3] == (1, 4, 8)
    cells = run_notebook("rft_step.ipynb")
    assert cells["reward"].shape == cells["advantage"].shape == (4, 8) and cells["loss"].isfinite()


def test_liberos_checkpoints_fit_together_and_with_their_preset(monkeypatch):
    places = [ROOT / "checkpoints" / f"libero_object_{name}" for name in ("sft", "world_model")]
    policy, model = VLAPolicy.load(places[0]), WorldModel.load(places[1])
    check_same_robot(policy, model)
    headers = [read_header(place) for place in places]
    check_same_images(headers[0].extra, "policy", headers[1].extra, "world model")
    assert set(headers[0].extra["train_episodes"]) <= set(headers[1].extra["train_episodes"])
    demos, played = collect_demos.PRESETS["libero"], eval_libero.PRESETS["libero"]
    sizes = [policy.vlm.image_size, model.cfg.tokenizer.image_size[0], demos.image_size, played.image_size or 128]
    assert sizes == [128] * 4 and demos.fast_rendering and played.fast_rendering
    seen = {"image_size": [128, 128], "fast_rendering": True, "visuals": "stand-in visuals"}
    assert all({key: header.extra.get(key) for key in seen} == seen for header in headers)
    how = str(places[0]), headers[0], "libero_object", range(10)
    monkeypatch.setattr(policy_check, "visuals_of", lambda suite: "stand-in visuals")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check_policy(*how, played.image_size, True)
    with pytest.warns(UserWarning, match="trained on images of fast rendering and plays with full: give --fast-render"):
        check_policy(*how, 128, False)
    with pytest.warns(UserWarning, match="trained on images of 128x128 and plays with 256x256"):
        check_policy(*how, 256, True)
    monkeypatch.setattr(policy_check, "visuals_of", lambda suite: "own visuals")
    with pytest.warns(UserWarning, match="trained on images of stand-in visuals, and plays with own visuals"):
        check_policy(*how, 128, True)
