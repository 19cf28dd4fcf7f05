"""train_wm.py at smoke size: a run and its files, resume, stale frames, errors."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import write_moving_square

import train_tokenizer
import train_wm
from train_wm import PRESETS, build_model, main
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
    cfg = replace(train_tokenizer.PRESETS["smoke"], steps=10, demos=str(demos), out_dir=str(out_dir), **SPLIT)
    train_tokenizer.main(cfg)
    path = out_dir / "model.safetensors"
    model, extra = load_model(path, FrameTokenizer, TokenizerConfig)
    with torch.no_grad():
        model.quant_linear.weight.mul_(30)
        model.quant_conv.weight.mul_(30)
    save_model(path, model, model.cfg, extra)
    return out_dir


def run(demos, tokenizer, out_dir, **changes) -> dict:
    return main(replace(SMOKE, demos=str(demos), tokenizer=str(tokenizer), out_dir=str(out_dir), **changes))


def losses(out_dir: Path, name: str = "loss") -> list[float]:
    return [json.loads(line)[name] for line in (out_dir / "log.jsonl").read_text().splitlines()]


def test_a_run_trains_and_writes_its_files(demos, tokenizer, tmp_path):
    metrics = run(demos, tokenizer, tmp_path, steps=20, lr=1e-2)
    found = losses(tmp_path)
    assert len(found) == 20 and sum(found[-3:]) < 0.8 * sum(found[:3])
    assert 0 <= metrics["val_accuracy"] <= 1 and metrics["val_loss"] > 0 and "rollout_psnr_moving" in metrics
    extra = read_header(tmp_path / "model.safetensors").extra
    train, held_out = split_episodes(load_episodes(demos), 0.2, 0)
    assert extra["held_out_episodes"] == [e.name for e in held_out] and extra["demos"] == str(demos)
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


def own_rollouts(folder: Path, seed: int, **changes) -> Path:
    """A folder of a policy's own episodes, failures among them, with stronger actions than the demonstrations'."""
    import h5py

    path = folder / "squares" / "push_the_red_square_rollouts.hdf5"
    write_moving_square(path, 4, 30, seed, "push the red square", low=-1.5)
    with h5py.File(path, "r+") as file:
        for name in file["data"]:
            file[f"data/{name}"].attrs.update({"kind": "policy", "success": name != "demo_1", **changes})
    return folder


def test_a_world_model_is_refreshed_on_a_policys_own_episodes(demos, tokenizer, tmp_path, capsys):
    run(demos, tokenizer, tmp_path / "first")
    own = str(own_rollouts(tmp_path / "own", 7))
    before = WorldModel.load(tmp_path / "first" / "model.safetensors")
    capsys.readouterr()
    refresh = {"init": str(tmp_path / "first"), "rollouts": own, "lr": 1e-3}
    run(demos, "unused", tmp_path / "second", **refresh)
    printed = capsys.readouterr().out
    assert printed.startswith("before: val_loss") or "\nbefore: val_loss" in printed
    first, second = (read_header(tmp_path / name / "model.safetensors").extra for name in ("first", "second"))
    names = [e.name for e in load_episodes(own, successes_only=False)]
    assert len(names) == 4
    assert second["held_out_episodes"] == first["held_out_episodes"] and second["demos"] == str(demos)
    assert second["train_episodes"] == first["train_episodes"] + names
    after = WorldModel.load(tmp_path / "second" / "model.safetensors")
    assert all(torch.equal(v, after.state_dict()[k]) for k, v in before.state_dict().items() if "tokenizer" in k)
    assert torch.equal(after.action_bins.low, before.action_bins.low)  # the rollouts' wider actions do not change them
    moved = (after.lm_head.weight - before.lm_head.weight).abs().max()
    assert 0 < moved < 0.1  # it went on from there
    last = json.loads((tmp_path / "second" / "log.jsonl").read_text().splitlines()[0])
    assert last["outside"] >= 0

    def interrupt(loss, step, *rest):
        raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train_wm, "check_finite", lambda loss, step, *rest: interrupt(loss, step) if step == 5 else None)
        with pytest.raises(KeyboardInterrupt):
            run(demos, "unused", tmp_path / "parts", **refresh)
    run(demos, "unused", tmp_path / "parts", **refresh)
    again = WorldModel.load(tmp_path / "parts" / "model.safetensors").state_dict()
    assert all(torch.equal(v, again[k]) for k, v in after.state_dict().items())


def test_rollouts_that_do_not_fit_are_refused(demos, tokenizer, tmp_path):
    with pytest.raises(ValueError, match=r"both have an episode squares/push.*--demos-per-task 0"):
        run(demos, tokenizer, tmp_path / "a", rollouts=str(demos))
    own = own_rollouts(tmp_path / "own", 7)
    run(demos, tokenizer, tmp_path / "first", steps=1)
    given = {"init": str(tmp_path / "first"), "rollouts": str(own)}
    with pytest.raises(ValueError, match=r"was trained on \d of the \d held-out episodes.*--split-seed"):
        run(demos, "unused", tmp_path / "b", split_seed=5, **given)
    with pytest.raises(ValueError, match=r"has other sizes than this run: factored_tokens: False against True.*--size"):
        run(demos, "unused", tmp_path / "c", factored_tokens=False, **given)
    mirrored = {"camera": "agentview", "mean_frame": [[[float(x == y)] * 3 for x in range(8)] for y in range(8)]}
    upright = {**mirrored, "mean_frame": mirrored["mean_frame"][::-1]}
    with pytest.MonkeyPatch.context() as patch:  # the fixture's plain scene looks the same upside down
        kinds = {"expert": upright, "policy": mirrored}
        patch.setattr(train_wm, "image_convention", lambda episodes, camera: kinds[episodes[0].kind])
        with pytest.raises(ValueError, match=r"image conventions differ: the images of the rollouts .*own look like"):
            run(demos, "unused", tmp_path / "d", **given)
    import h5py

    for path in own.rglob("*.hdf5"):
        with h5py.File(path, "r+") as file:
            file["data"].attrs["control_freq"] = 10.0
    for path in shutil.copytree(demos, tmp_path / "demos").rglob("*.hdf5"):
        with h5py.File(path, "r+") as file:
            file["data"].attrs["control_freq"] = 20.0
    with pytest.raises(ValueError, match=r"the rollouts .*own: episodes differ in fps: 20.0 in .*, 10.0 in"):
        run(tmp_path / "demos", "unused", tmp_path / "e", **given)


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
        build_model(replace(SMOKE, tokenizer=str(tokenizer)), episodes, episodes[:1], torch.device("cpu"))
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
