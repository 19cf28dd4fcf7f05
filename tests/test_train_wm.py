"""train_wm.py at smoke size: a run and its files, resume, stale frames, errors."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import train_tokenizer
import train_wm
from train_wm import PRESETS, load_tokenizer, main
from vlarft.data.episodes import load_episodes, split_episodes
from vlarft.run.checkpoint import load_model, load_train_state, read_header, save_model
from vlarft.tokenizer import FrameTokenizer, TokenizerConfig
from vlarft.world_model import WorldModel

ROOT = Path(__file__).parents[1]
SPLIT = {"validation_fraction": 0.2, "split_seed": 0}
SMOKE = replace(PRESETS["smoke"], steps=6, save_interval=2, validation_interval=3, log_interval=1, **SPLIT)


@pytest.fixture(scope="module")
def tokenizer(demos, tmp_path_factory) -> Path:
    """Run folder of a tokenizer that has seen a few steps, its codes spread: they would all be the middle one."""
    out_dir = tmp_path_factory.mktemp("tokenizer")
    cfg = replace(train_tokenizer.PRESETS["smoke"], steps=10, demos=(str(demos),), out_dir=str(out_dir), **SPLIT)
    train_tokenizer.main(cfg)
    path = out_dir / "model.safetensors"
    model, extra = load_model(path, FrameTokenizer, TokenizerConfig)
    with torch.no_grad():
        model.quant_linear.weight.mul_(30)
        model.quant_conv.weight.mul_(30)
    save_model(path, model, model.cfg, extra)
    return out_dir


def run(demos, tokenizer, out_dir, **changes) -> dict:
    return main(replace(SMOKE, demos=(str(demos),), tokenizer=str(tokenizer), out_dir=str(out_dir), **changes))


def losses(out_dir: Path, name: str = "loss") -> list[float]:
    return [json.loads(line)[name] for line in (out_dir / "log.jsonl").read_text().splitlines()]


def test_a_run_trains_and_writes_its_files(demos, tokenizer, tmp_path):
    metrics = run(demos, tokenizer, tmp_path, steps=20, lr=1e-2)
    found = losses(tmp_path)
    assert len(found) == 20 and sum(found[-3:]) < 0.8 * sum(found[:3])
    assert 0 <= metrics["val_accuracy"] <= 1 and metrics["val_loss"] > 0 and "rollout_psnr_moving" in metrics
    extra = read_header(tmp_path / "model.safetensors").extra
    train, held_out = split_episodes(load_episodes(demos), 0.2, 0)
    assert extra["held_out_episodes"] == [e.name for e in held_out] and extra["demos"] == [str(demos)]
    model = WorldModel.load(tmp_path / "model.safetensors")
    actions = torch.cat([torch.from_numpy(e.actions) for e in train])
    assert torch.equal(model.action_bins.low, actions.amin(0)) and torch.equal(model.action_bins.high, actions.amax(0))
    frozen = FrameTokenizer.load(tokenizer / "model.safetensors").state_dict()
    assert all(torch.equal(v, frozen[k]) for k, v in model.tokenizer.state_dict().items())
    assert (tmp_path / "rollouts.png").stat().st_size > 1000


def test_experts_only_leaves_noisy_attempts_to_the_validation(demos, tokenizer, tmp_path):
    import h5py

    shutil.copytree(demos, tmp_path / "demos")
    for path in (tmp_path / "demos").rglob("*.hdf5"):
        with h5py.File(path, "r+") as file:
            file["data/demo_1"].attrs["kind"] = "noisy"
    blank = FrameTokenizer.load(tokenizer / "model.safetensors")  # has seen no episodes: the split is another one
    save_model(tmp_path / "blank.safetensors", blank, blank.cfg)
    run(tmp_path / "demos", tmp_path / "blank.safetensors", tmp_path / "run", steps=1, experts_only=True)
    extra = read_header(tmp_path / "run" / "model.safetensors").extra
    train, held_out = split_episodes(load_episodes(tmp_path / "demos", successes_only=False), 0.2, 0)
    assert extra["held_out_episodes"] == [e.name for e in held_out]
    assert extra["train_episodes"] == [e.name for e in train if e.kind == "expert"] and len(train) > 3
    assert {e.kind for e in train} == {"expert", "noisy"}


def test_resume_equals_no_interruption(demos, tokenizer, tmp_path, monkeypatch):
    run(demos, tokenizer, tmp_path / "whole")
    check = train_wm.check_finite

    def interrupt(loss, step, *rest):
        if step == 5:
            raise KeyboardInterrupt
        check(loss, step, *rest)

    monkeypatch.setattr(train_wm, "check_finite", interrupt)
    with pytest.raises(KeyboardInterrupt):
        run(demos, tokenizer, tmp_path / "parts")
    monkeypatch.setattr(train_wm, "check_finite", check)
    run(demos, tokenizer, tmp_path / "parts")
    assert losses(tmp_path / "parts") == losses(tmp_path / "whole")
    whole, parts = (WorldModel.load(tmp_path / name / "model.safetensors").state_dict() for name in ("whole", "parts"))
    assert all(torch.equal(whole[k], parts[k]) for k in whole)


def test_a_loss_that_is_no_number_stops_the_run(demos, tokenizer, tmp_path):
    with pytest.raises(
        FloatingPointError, match=r"^grad_norm is nan at step [1-5] \(loss=.*is from episodes squares/push_"
    ):
        run(demos, tokenizer, tmp_path / "run", lr=1e30, save_interval=1)
    state = load_train_state(tmp_path / "run" / "train_state.pt")
    assert state["step"] >= 1 and all(value.isfinite().all() for value in state["model"].values())


@pytest.mark.parametrize(
    "changes", [{"accumulate": 4}, {"checkpoint_activations": True}], ids=["accumulated", "recomputed"]
)
def test_how_a_step_is_computed_does_not_change_it(demos, tokenizer, tmp_path, changes):
    common = {"steps": 3, "save_interval": 3, "validation_interval": 3, "context_lookback": 5}
    run(demos, tokenizer, tmp_path / "one", **common)
    run(demos, tokenizer, tmp_path / "two", **common, **changes)
    for name in ("loss", "grad_norm"):
        assert losses(tmp_path / "one", name) == pytest.approx(losses(tmp_path / "two", name), rel=1e-5), name
    one, two = (WorldModel.load(tmp_path / name / "model.safetensors").state_dict() for name in ("one", "two"))
    for key in one:  # a gradient near zero may change sign by rounding alone, which Adam makes a full step of
        assert (one[key] - two[key]).abs().mean() < 2e-5, key


def test_stale_frames_by_share_and_process():
    cfg = replace(SMOKE, stale=0.3, batch_size=4000)
    whole = train_wm.stale_frames(cfg, 5, (0, 1))
    assert whole.shape == (4000, 9) and whole.float().mean() == pytest.approx(0.3, abs=0.02)
    assert whole.float().mean(1).std() > 0.15  # the share varies between segments
    assert torch.equal(torch.cat([train_wm.stale_frames(cfg, 5, (rank, 4)) for rank in range(4)]), whole)
    assert not torch.equal(train_wm.stale_frames(cfg, 6, (0, 1)), whole)
    assert not train_wm.stale_frames(replace(cfg, stale=0.0), 5, (0, 1)).any()


def test_errors(demos, tokenizer, tmp_path):
    with pytest.raises(ValueError, match="batch size 4 does not divide by 1 processes x 3 micro-batches"):
        run(demos, tokenizer, tmp_path / "a", accumulate=3)
    with pytest.raises(ValueError, match=r"was trained on 1 of the 1 held-out episodes.*--split-seed"):
        episodes = [e for e in load_episodes(demos) if e.name in _trained_on(tokenizer)]
        load_tokenizer(replace(SMOKE, tokenizer=str(tokenizer)), episodes[:1], {}, torch.device("cpu"))
    with pytest.raises(FileNotFoundError, match="no checkpoint at"):
        run(demos, tmp_path / "nothing.safetensors", tmp_path / "b")
    with pytest.raises(ValueError, match=r"expected frames .*\(3, 64, 64\)"):
        model = WorldModel.load(_smoke_world_model(demos, tokenizer, tmp_path / "c"))
        model.tokenize(torch.rand(1, 2, 3, 32, 32))


def _trained_on(tokenizer: Path) -> list[str]:
    return read_header(tokenizer / "model.safetensors").extra["train_episodes"]


def _smoke_world_model(demos: Path, tokenizer: Path, out_dir: Path) -> Path:
    run(demos, tokenizer, out_dir, steps=1)
    return out_dir / "model.safetensors"
