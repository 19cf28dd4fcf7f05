"""train_tokenizer.py at smoke size: a run and its files, resume, schedule, errors."""

import json
import math
from contextlib import nullcontext
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import files_of, refused_with_converted_episodes

import train_tokenizer
from train_tokenizer import PRESETS, Config, main, tokenizer_forward, train_batch, undone
from vlarft.data.augment import OFF, Augmentation, Symmetry, augment
from vlarft.data.episodes import load_episodes, split_episodes
from vlarft.data.windows import WindowSampler
from vlarft.run.checkpoint import load_train_state, read_header
from vlarft.run.config import parse
from vlarft.tokenizer import FrameTokenizer, Reconstruction
from vlarft.tokenizer_loss import WEIGHTINGS, colour_weights

SMOKE = replace(
    PRESETS["smoke"], steps=6, save_interval=2, validation_interval=3, log_interval=1, validation_fraction=0.2
)
STILL = WEIGHTINGS["small_objects"].still
GAN = replace(SMOKE, gan_start=2, augment="full", weighting="uniform", context_lookback=5)


def run(demos, out_dir, base=SMOKE, **changes) -> dict:
    return main(replace(base, demos=(str(demos),), out_dir=str(out_dir), **changes))


def log_of(out_dir) -> list[dict]:
    return [json.loads(line) for line in (out_dir / "log.jsonl").read_text().splitlines()]


def losses(out_dir) -> list[float]:
    return [row["loss"] for row in log_of(out_dir)]


def networks(out_dir) -> dict[str, torch.Tensor]:
    """Weights of tokenizer and discriminator."""
    state = load_train_state(out_dir / "train_state.pt")["networks"]
    return {f"{name}.{k}": v for name, network in state.items() for k, v in network.items()}


def test_a_run_trains_and_writes_its_files(demos, tmp_path):
    metrics = run(demos, tmp_path / "run", seed=2, steps=30, validation_interval=30, save_interval=30)
    found = losses(tmp_path / "run")
    assert len(found) == 30 and np.mean(found[-5:]) < 0.8 * np.mean(found[:5])
    state = load_train_state(tmp_path / "run" / "train_state.pt")
    rate = state["optimizers"]["tokenizer"]["param_groups"][0]["lr"]  # of the last step: a cosine that ends at 0
    assert rate == pytest.approx(SMOKE.lr * (1 + math.cos(math.pi * 29 / 30)) / 2)
    assert metrics["val_psnr_future"] > 8 and metrics["val_psnr_moving_copy"] < 20
    extra = read_header(tmp_path / "run" / "model.safetensors").extra
    train, held_out = split_episodes(load_episodes(demos), 0.2, 0)  # by the split's seed
    assert held_out != split_episodes(load_episodes(demos), 0.2, 2)[1]
    assert extra["held_out_episodes"] == [e.name for e in held_out] and len(extra["train_episodes"]) == len(train) == 5
    assert FrameTokenizer.load(tmp_path / "run" / "model.safetensors").cfg == SMOKE.network()
    from PIL import Image

    picture = np.asarray(Image.open(tmp_path / "run" / "reconstructions.png"))
    assert picture.shape[0] > 4 * 64 and picture.std() > 10


def test_two_places_are_one_data_set(demos, tmp_path):
    files = tuple(str(path) for path in sorted(demos.rglob("*.hdf5")))
    run(demos, tmp_path / "folder", steps=2)
    assert len(files) == 2
    main(replace(SMOKE, demos=files, out_dir=str(tmp_path / "files"), steps=2))
    assert losses(tmp_path / "files") == losses(tmp_path / "folder")
    extras = [read_header(tmp_path / name / "model.safetensors").extra for name in ("folder", "files")]
    assert extras[0] == extras[1]


def test_resume_equals_no_interruption(demos, tmp_path, monkeypatch):
    cfg = replace(GAN, precision="bf16")
    run(demos, tmp_path / "whole", cfg)
    check, seen = train_tokenizer.check_finite, []

    def interrupt(loss, step, *rest):
        seen.append(step)
        if step == 5:
            raise KeyboardInterrupt
        check(loss, step, *rest)

    monkeypatch.setattr(train_tokenizer, "check_finite", interrupt)
    with pytest.raises(KeyboardInterrupt):
        run(demos, tmp_path / "parts", cfg)
    assert seen == [0, 1, 2, 3, 4, 5]
    monkeypatch.setattr(train_tokenizer, "check_finite", check)
    run(demos, tmp_path / "parts", cfg)
    timeless = [
        [{k: v for k, v in r.items() if k != "minutes"} for r in log_of(tmp_path / n)] for n in ("whole", "parts")
    ]
    assert timeless[0] == timeless[1] and "hinge" in timeless[0][2] and "hinge" not in timeless[0][1]
    whole, parts = networks(tmp_path / "whole"), networks(tmp_path / "parts")
    assert all(torch.equal(whole[k], parts[k]) for k in whole) and "discriminator.convs.0.left" in whole
    states = [load_train_state(tmp_path / n / "train_state.pt") for n in ("whole", "parts")]
    assert states[0]["balance"] == states[1]["balance"] > 0
    before = files_of(tmp_path / "whole")
    run(demos, tmp_path / "whole", cfg)  # a finished run is left as it is
    refused_with_converted_episodes(monkeypatch, train_tokenizer, lambda: run(demos, tmp_path / "whole", cfg))
    assert files_of(tmp_path / "whole") == before


@pytest.mark.parametrize(
    "changes", [{"accumulate": 4}, {"checkpoint_activations": True}], ids=["accumulated", "recomputed"]
)
def test_how_a_step_is_computed_does_not_change_it(demos, tmp_path, changes):
    steps = {"steps": 4, "save_interval": 4, "validation_interval": 4}
    run(demos, tmp_path / "one", GAN, **steps)
    run(demos, tmp_path / "two", GAN, **steps, **changes)
    logs = log_of(tmp_path / "one"), log_of(tmp_path / "two")
    for name in ("loss", "grad_norm", "gan_grad_norm", "balance"):
        one, two = ([row[name] for row in log if name in row] for log in logs)
        assert one == pytest.approx(two, rel=1e-3) and len(one) >= 2, name
    one, two = networks(tmp_path / "one"), networks(tmp_path / "two")
    for key in one:  # a gradient near zero may change sign by rounding alone, which Adam makes a full step of
        assert (one[key] - two[key]).abs().mean() < 5e-5, key


def test_adversarial_term_steps_both_networks(demos, tmp_path):
    logs = {}
    for name, weight in (("with", 0.1), ("without", 0.0)):
        changes = {"steps": 5, "gan_start": 1, "gan_weight": weight, "save_interval": 5, "validation_interval": 5}
        run(demos, tmp_path / name, replace(GAN, augment="none", weighting="small_objects"), **changes)
        logs[name] = log_of(tmp_path / name)
    rows = logs["with"]
    assert "balance" not in rows[0] and rows[1]["balance"] == 0 < rows[2]["balance"]  # known one step later
    assert len({row["balance"] for row in rows[1:]}) == 4
    for row in rows[1:]:
        pixels = row["context_error"] + row["future_error"] + row["generated_error"] + STILL * row["still_code"]
        assert row["loss"] == pytest.approx(pixels + 0.1 * row["balance"] * row["adversarial"], rel=1e-5)
        # before and after the tokenizer's step the discriminator sees the same decoded frames
        assert row["logit_decoded"] == pytest.approx(-row["adversarial"], abs=1e-5)
    assert rows[2]["hinge"] != rows[1]["hinge"] and losses(tmp_path / "with")[:2] == losses(tmp_path / "without")[:2]
    one, two = networks(tmp_path / "with"), networks(tmp_path / "without")
    assert not torch.equal(one["tokenizer.cond_decoder.conv_out.weight"], two["tokenizer.cond_decoder.conv_out.weight"])


def test_the_loss_gets_what_is_usual_in_the_training_frames(demos, tmp_path, monkeypatch):
    given, loss = {}, train_tokenizer.reconstruction_loss
    monkeypatch.setattr(
        train_tokenizer, "reconstruction_loss", lambda *args, **options: given.update(options) or loss(*args, **options)
    )
    run(demos, tmp_path, steps=1)
    train, _ = split_episodes(load_episodes(demos), 0.2, 0)
    frames = WindowSampler(train, 9, 9).sample_frames()
    weighting = WEIGHTINGS["small_objects"]
    assert torch.equal(given["median_frame"], frames.median(dim=0).values) and given["median_frame"].std() > 0.01
    assert torch.equal(given["colour_weight"], colour_weights(frames, weighting.rare))
    assert given["weighting"] == weighting and given["perceptual"] is None


def test_symmetries_are_undone():
    generator = torch.Generator().manual_seed(0)
    whole = Symmetry.sample(64, generator)
    assert len({(*order, mirrored) for order, mirrored in zip(whole.order.tolist(), whole.mirrored.tolist())}) == 12
    parts = [Symmetry.sample(32, torch.Generator().manual_seed(0), (i, 2)) for i in (0, 1)]
    assert all(torch.equal(torch.cat(values), value) for values, value in zip(zip(*parts), whole))
    images = torch.rand(64, 2, 3, 4, 6, generator=generator)
    changed = whole.apply(images)
    assert torch.equal(whole.undo(changed), images)
    by_hand = images[7, 1, whole.order[7]]
    assert torch.equal(changed[7, 1], by_hand.flip(-1) if whole.mirrored[7] else by_hand)
    mask = whole.apply(images[:, :, :1])  # has no colours
    assert torch.equal(mask[3], images[3, :, :1].flip(-1) if whole.mirrored[3] else images[3, :, :1])


def test_what_a_changed_segment_becomes_is_changed_back():
    """All that the loss reads: a tokenizer that treats all directions and colours alike gives the same as without."""

    def fake(context, frames):
        grey = frames.mean(-3, keepdim=True)  # (S, L, 1, 4, 8)
        codes = torch.nn.functional.avg_pool2d(grey.flatten(0, 1), 2).unflatten(0, frames.shape[:2])  # (S, L, 1, 2, 4)
        codes = (
            torch.cat([codes, 2 * codes, 3 * codes], 2).flatten(3).transpose(2, 3)
        )  # (S, L, 8, 3): three, as colours
        return Reconstruction(context, frames, codes, codes, codes, codes, generated=frames / 2, mask=grey)

    context, frames = torch.rand(16, 3, 4, 8), torch.rand(16, 2, 3, 4, 8)
    change = Symmetry.sample(16, torch.Generator().manual_seed(1))
    found = undone(change, fake(change.apply(context), change.apply(frames)), (2, 4))
    expected = fake(context, frames)
    for name in ("context_frame", "frames", "generated", "mask", "future_codes"):
        torch.testing.assert_close(getattr(found, name), getattr(expected, name))
    assert undone(change, expected._replace(mask=None, generated=None), (2, 4)).mask is None
    fake.cfg = SimpleNamespace(future_grid=(2, 4))
    given = {"reconstruction": lambda out, *true: ((out.frames - true[1]).abs().mean(), {}), "gan_weight": 0.0}
    loss = tokenizer_forward(fake, None, context, frames, **given, autocast=nullcontext(), change=change).loss
    assert loss == 0  # with the frames as they are


def test_symmetries_train(demos, tmp_path, monkeypatch):
    """Every step with changes of its own, of the seed; held-out frames are seen as they are."""
    seen, sample = [], Symmetry.sample
    monkeypatch.setattr(Symmetry, "sample", lambda *args: seen.append(sample(*args)) or seen[-1])
    found = [run(demos, tmp_path / name, SMOKE, augment="symmetries", steps=3, seed=5) for name in "ab"]
    assert found[0] == found[1] and len(seen) == 6
    assert all(torch.equal(one.order, other.order) for one, other in zip(seen[:3], seen[3:]))
    assert not torch.equal(seen[0].order, seen[1].order) or not torch.equal(seen[1].order, seen[2].order)
    assert run(demos, tmp_path / "c", SMOKE, augment="none", steps=3, seed=5) != found[0]
    with pytest.raises(ValueError, match="--augment symmetries .*: give --gan-start none"):
        replace(GAN, augment="symmetries")


def test_a_segment_is_augmented_as_one(demos):
    sampler = WindowSampler(load_episodes(demos), 9, 9)
    cfg = replace(GAN, batch_size=4, future_frames=9, context_lookback=0)
    context, frames = train_batch(cfg, sampler, 3, (0, 1), torch.device("cpu"))
    plain = train_batch(replace(cfg, augment="none"), sampler, 3, (0, 1), torch.device("cpu"))
    assert torch.equal(plain[0], plain[1][:, 0])  # the context frame is the segment's first, and stays it
    torch.testing.assert_close(context, frames[:, 0])
    corner = frames[:, :, :, 0, 0]  # background, (B, L, C)
    assert (corner - corner[:, :1]).abs().max() < 0.01 and corner[:, 0].std(dim=0).min() > 0.01
    halves = [train_batch(cfg, sampler, 3, (i, 2), torch.device("cpu")) for i in range(2)]
    for whole, column in zip((context, frames), zip(*halves)):
        assert torch.equal(torch.cat(column), whole)
    assert not torch.equal(train_batch(cfg, sampler, 4, (0, 1), torch.device("cpu"))[0], context)
    assert PRESETS["paper"].gan_start == 10_000 and PRESETS["paper"].augment == "full"
    assert train_tokenizer.AUGMENTATIONS["full"] == Augmentation(brightness=0.1, contrast=0.1, saturation=0.1)
    assert all(PRESETS[name].gan_start is None and PRESETS[name].augment == "none" for name in ("tiny", "smoke"))


def test_crops_keep_a_share_of_the_area():
    ramp = torch.linspace(0, 1, 64).expand(400, 1, 3, 64, 64)  # the slope along a row is the zoom
    crop = replace(OFF, crop=True)
    out = augment(ramp, crop, crop_area=(0.5, 1.0), generator=torch.Generator().manual_seed(0))
    area = ((out[:, 0, 0, 32, 40] - out[:, 0, 0, 32, 20]) / (ramp[0, 0, 0, 32, 40] - ramp[0, 0, 0, 32, 20])).square()
    assert 0.499 < area.min() < 0.52 and 0.98 < area.max() < 1.001 and abs(area.mean() - 0.75) < 0.02
    white = augment(torch.ones_like(ramp), crop, crop_area=0.5, generator=torch.Generator().manual_seed(0))
    assert white.min() > 0.999  # nothing from beyond the border


def test_perceptual_term_is_added(demos, tmp_path):
    run(demos, tmp_path, steps=1, perceptual="ssim")
    entry = json.loads((tmp_path / "log.jsonl").read_text().splitlines()[0])
    pixels = entry["context_error"] + entry["future_error"] + entry["generated_error"] + STILL * entry["still_code"]
    assert entry["loss"] == pytest.approx(pixels + entry["perceptual"], rel=1e-5) and entry["still_code"] > 0


def test_the_clock_ends_a_run(demos, tmp_path):
    run(demos, tmp_path, steps=10_000, max_minutes=0.02, validation_interval=10_000, save_interval=10_000)
    assert 1 <= len(losses(tmp_path)) < 1000 and (tmp_path / "model.safetensors").is_file()


def test_errors(demos, tmp_path, capsys, monkeypatch):
    with pytest.raises(ValueError, match=r"images of 64x64, the tokenizer is for 32x32: give --image-size 64 64"):
        run(demos, tmp_path / "a", image_size=(32, 32))
    with pytest.raises(ValueError, match="future_frames=10 exceeds segment=9"):
        run(demos, tmp_path / "b", future_frames=10)
    with pytest.raises(ValueError, match="batch size 4 does not divide by 1 processes x 3 micro-batches"):
        run(demos, tmp_path / "b", accumulate=3)
    with pytest.raises(ValueError, match=r"small_objects compares .* give --weighting uniform, or --augment symm"):
        run(demos, tmp_path / "b", augment="full")
    with pytest.raises(ValueError, match="images of 64x64 are too small for a discriminator of 6 convolutions"):
        monkeypatch.setitem(train_tokenizer.DISCRIMINATORS, "smoke", train_tokenizer.DISCRIMINATORS["paper"])
        run(demos, tmp_path / "b", gan_start=0)
    assert not (tmp_path / "b").exists()
    with pytest.raises(FileNotFoundError, match="nowhere does not exist"):
        run(tmp_path / "nowhere", tmp_path / "c")
    run(demos, tmp_path / "d", steps=1)
    with pytest.raises(ValueError, match="lr: 0.002 against 0.1"):
        run(demos, tmp_path / "d", steps=1, lr=0.1)
    with pytest.raises(SystemExit) as stop:
        parse(Config, PRESETS, ["--preset", "smoke", "--image-size", "60", "64"])
    assert stop.value.code == 2 and "image_size 60x64 cannot be tokenized" in capsys.readouterr().err
