"""train_tokenizer.py at smoke size: a run and its files, resume, schedule, errors."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch

import train_tokenizer
from train_tokenizer import PRESETS, Config, main
from vlarft.checkpoint import read_header
from vlarft.config import parse
from vlarft.data.episodes import load_episodes, split_episodes
from vlarft.tokenizer import FrameTokenizer

SMOKE = replace(PRESETS["smoke"], steps=6, save_every=2, validate_every=3, log_every=1, validation_fraction=0.2)


def run(demos, out_dir, **changes) -> dict:
    return main(replace(SMOKE, demos=str(demos), out_dir=str(out_dir), **changes))


def losses(out_dir) -> list[float]:
    return [json.loads(line)["loss"] for line in (out_dir / "log.jsonl").read_text().splitlines()]


def test_a_run_trains_and_writes_its_files(demos, tmp_path):
    metrics = run(demos, tmp_path / "run", steps=30, validate_every=30, save_every=30)
    found = losses(tmp_path / "run")
    assert len(found) == 30 and np.mean(found[-5:]) < 0.8 * np.mean(found[:5])
    assert metrics["val_psnr_future"] > 8 and metrics["val_psnr_moving_copy"] < 20
    extra = read_header(tmp_path / "run" / "model.safetensors").extra
    train, held_out = split_episodes(load_episodes(demos), 0.2, 0)
    assert extra["held_out_episodes"] == [e.name for e in held_out] and len(extra["train_episodes"]) == len(train) == 5
    assert FrameTokenizer.load(tmp_path / "run" / "model.safetensors").cfg == SMOKE.model
    from PIL import Image

    picture = np.asarray(Image.open(tmp_path / "run" / "reconstructions.png"))
    assert picture.shape[0] > 4 * 64 and picture.std() > 10


def test_resume_equals_no_interruption(demos, tmp_path, monkeypatch):
    run(demos, tmp_path / "whole")
    check, seen = train_tokenizer.check_finite, []

    def interrupt(loss, step, metrics):
        seen.append(step)
        if step == 5:
            raise KeyboardInterrupt
        check(loss, step, metrics)

    monkeypatch.setattr(train_tokenizer, "check_finite", interrupt)
    with pytest.raises(KeyboardInterrupt):
        run(demos, tmp_path / "parts")
    assert seen == [0, 1, 2, 3, 4, 5]
    monkeypatch.setattr(train_tokenizer, "check_finite", check)
    run(demos, tmp_path / "parts")
    assert losses(tmp_path / "parts") == losses(tmp_path / "whole")
    files = [tmp_path / name / "model.safetensors" for name in ("whole", "parts")]
    whole, parts = (FrameTokenizer.load(file).state_dict() for file in files)
    assert all(torch.equal(whole[k], parts[k]) for k in whole)
    before = (tmp_path / "whole" / "model.safetensors").read_bytes()
    run(demos, tmp_path / "whole")  # a finished run is left as it is
    assert (tmp_path / "whole" / "model.safetensors").read_bytes() == before


def test_perceptual_term_is_added(demos, tmp_path):
    run(demos, tmp_path, steps=1, perceptual="ssim", still_weight=0.0)
    entry = json.loads((tmp_path / "log.jsonl").read_text().splitlines()[0])
    assert entry["loss"] == pytest.approx(
        entry["context_error"] + entry["future_error"] + entry["perceptual"], rel=1e-5
    )


def test_the_clock_ends_a_run(demos, tmp_path):
    run(demos, tmp_path, steps=10_000, max_minutes=0.02, validate_every=10_000, save_every=10_000)
    assert 1 <= len(losses(tmp_path)) < 1000 and (tmp_path / "model.safetensors").is_file()


def test_errors(demos, tmp_path, capsys):
    with pytest.raises(ValueError, match=r"images of 64x64, the tokenizer is for 32x32: give --model.image-size 64 64"):
        run(demos, tmp_path / "a", model=replace(SMOKE.model, image_size=(32, 32)))
    with pytest.raises(ValueError, match="future_frames=10 exceeds segment=9"):
        run(demos, tmp_path / "b", future_frames=10)
    with pytest.raises(FileNotFoundError, match="nowhere does not exist"):
        run(tmp_path / "nowhere", tmp_path / "c")
    run(demos, tmp_path / "d", steps=1)
    with pytest.raises(ValueError, match="lr: 0.002 against 0.1"):
        run(demos, tmp_path / "d", steps=1, lr=0.1)
    with pytest.raises(SystemExit) as stop:
        parse(Config, PRESETS, ["--preset", "smoke", "--model.image-size", "60", "64"])
    assert stop.value.code == 2 and "image_size 60x64 cannot be tokenized" in capsys.readouterr().err
