"""train_wm.py at smoke size: a run and its files, resume, stale frames, errors."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import files_of, interrupted, refused_with_converted_episodes, write_moving_square

import train_tokenizer
import train_wm
from train_wm import PRESETS, load_tokenizer, main
from vlarft.data.episode import Episode
from vlarft.data.episodes import load_episodes, split_episodes
from vlarft.run.checkpoint import load_model, load_train_state, read_header, save_model
from vlarft.run.config import parse
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


@pytest.fixture(scope="module")
def world_model(demos, tokenizer, tmp_path_factory) -> Path:
    """Run folder of a world model to refresh."""
    out_dir = tmp_path_factory.mktemp("world_model")
    run(demos, tokenizer, out_dir)
    return out_dir


@pytest.fixture(scope="module")
def rollouts(tmp_path_factory) -> Path:
    """Folder of 3 episodes that a policy played, with larger actions than those of `demos`."""
    import h5py

    path = tmp_path_factory.mktemp("rollouts") / "played" / "push_red_demo.hdf5"
    write_moving_square(path, 3, 14, 7, "push the red square", low=-1.25)
    with h5py.File(path, "r+") as file:
        for demo in file["data"].values():
            demo.attrs.update(kind="policy", success=False)
    return path.parents[1]


def run(demos, tokenizer, out_dir, **changes) -> dict:
    return main(replace(SMOKE, demos=(str(demos),), tokenizer=str(tokenizer), out_dir=str(out_dir), **changes))


def refresh(places, world_model, out_dir, **changes) -> dict:
    demos = tuple(map(str, places))
    return main(replace(SMOKE, demos=demos, init=str(world_model), tokenizer="none", out_dir=str(out_dir), **changes))


def log_of(out_dir: Path) -> list[dict]:
    return [json.loads(line) for line in (out_dir / "log.jsonl").read_text().splitlines()]


def losses(out_dir: Path, name: str = "loss") -> list[float]:
    return [line[name] for line in log_of(out_dir)]


def test_a_run_trains_and_writes_its_files(demos, tokenizer, tmp_path):
    metrics = run(demos, tokenizer, tmp_path, seed=2, steps=20, lr=1e-2, pose_dims=0)
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
    interrupted(monkeypatch, train_wm, 5, lambda: run(demos, tokenizer, tmp_path / "parts"))
    run(demos, tokenizer, tmp_path / "parts")
    assert losses(tmp_path / "parts") == losses(tmp_path / "whole")
    whole, parts = (WorldModel.load(tmp_path / name / "model.safetensors").state_dict() for name in ("whole", "parts"))
    assert all(torch.equal(whole[k], parts[k]) for k in whole)
    before = files_of(tmp_path / "whole")
    metrics = run(demos, tokenizer, tmp_path / "whole")  # a finished run is left as it is
    assert files_of(tmp_path / "whole") == before and metrics["val_loss"] == log_of(tmp_path / "whole")[-1]["val_loss"]
    refused_with_converted_episodes(monkeypatch, train_wm, lambda: run(demos, tokenizer, tmp_path / "whole"))
    assert files_of(tmp_path / "whole") == before


def test_refresh_goes_on_from_weights_and_split(demos, rollouts, world_model, tmp_path):
    """With other presets of what the checkpoint fixes: its sizes, its split and its tokenizer count."""
    ignored = {"size": "tiny", "factored_tokens": False}
    with pytest.warns(UserWarning, match="lie outside the ranges that the world model was trained on"):
        refresh([demos, rollouts], world_model, tmp_path / "two", steps=4, validation_fraction=0.3, **ignored)
    old, new = (read_header(folder / "model.safetensors") for folder in (world_model, tmp_path / "two"))
    played = {e.name for e in load_episodes(rollouts, successes_only=False)}
    held_out = old.extra["held_out_episodes"]
    assert new.extra["held_out_episodes"][: len(held_out)] == held_out and new.config == old.config
    unseen = set(new.extra["held_out_episodes"][len(held_out) :])
    assert len(played) == 3 and len(unseen) == 1 and unseen < played  # a share of the new ones
    assert set(new.extra["train_episodes"]) == {*old.extra["train_episodes"], *played} - unseen
    assert len(new.extra["train_episodes"]) == 7 and new.extra["demos"] == [str(demos), str(rollouts)]

    before, *steps = log_of(tmp_path / "two")
    assert before["step"] == -1 and before.keys() - {"step"} == old.extra["metrics"].keys()
    assert [line["step"] for line in steps] == [0, 1, 2, 3] and any(line["outside"] > 0 for line in steps)
    one, two = (WorldModel.load(folder).state_dict() for folder in (world_model, tmp_path / "two"))
    kept = {k for k in one if torch.equal(one[k], two[k])}
    assert kept == {k for k in one if k.startswith(("tokenizer.", "action_bins."))}
    trained = load_episodes([demos, rollouts], successes_only=False)
    actions = np.concatenate([e.actions for e in trained if e.name in new.extra["train_episodes"]])
    np.testing.assert_allclose(two["robot.action_mean"], actions.mean(0), atol=1e-5)  # the robot is fitted anew

    refresh([demos, rollouts], tmp_path / "two", tmp_path / "three", steps=1, split_seed=5, validation_fraction=0.5)
    extra = read_header(tmp_path / "three" / "model.safetensors").extra
    assert set(extra["train_episodes"]) == set(new.extra["train_episodes"])  # nothing was new
    assert log_of(tmp_path / "three")[0] == {"step": -1, **new.extra["metrics"]}  # its last validation, by number


def test_attempts_from_a_start_stay_where_those_before_them_are(monkeypatch, tmp_path):
    def attempt(number: int, start: str | None) -> Episode:
        zeros = np.zeros((2, 7), np.float32)
        return Episode(f"s/f/{number}", "push", zeros, zeros, zeros, zeros, kind="policy", start=start)

    old = [attempt(i, f"mark {i % 2}") for i in range(4)]
    new = [attempt(4, "mark 0"), attempt(5, "mark 1"), attempt(6, None), attempt(7, None), attempt(8, "mark 0")]
    extra = {"train_episodes": ["s/f/0", "s/f/2"], "held_out_episodes": ["s/f/1", "s/f/3"]}
    monkeypatch.setattr(train_wm, "load_episodes", lambda *_, **__: old + new)
    monkeypatch.setattr(train_wm, "read_header", lambda _: SimpleNamespace(extra=extra))
    train, held_out = train_wm.load_split(replace(SMOKE, init=str(tmp_path), validation_fraction=0.5))
    names = [{e.name[-1] for e in part} for part in (train, held_out)]
    assert {"0", "2", "4", "8"} < names[0] and {"1", "3", "5"} < names[1]
    assert len(names[0] & {"6", "7"}) == 1 and names[0] | names[1] == set("012345678")


def test_the_other_actions_are_those_of_segments_far_away(demos, tokenizer, tmp_path, monkeypatch):
    given, loss = [], WorldModel.token_loss
    run(demos, tokenizer, tmp_path, steps=1)
    model = WorldModel.load(tmp_path)
    held_out = train_wm.load_split(replace(SMOKE, demos=(str(demos),)))[1]
    batch = train_wm.WindowSampler(held_out, 9, 8, None).spread(33)
    monkeypatch.setattr(WorldModel, "token_loss", lambda self, *args: given.append(args[2]) or loss(self, *args))
    train_wm.validate(model, batch, batch, torch.device("cpu"), torch.autocast("cpu", enabled=False))
    own, others = torch.cat(given[::2]), torch.cat(given[1::2])
    assert len(own) > 3 and torch.equal(others, own.roll(len(own) // 2, 0))


def test_validation_imagines_with_predicted_poses(demos, tokenizer, tmp_path, monkeypatch):
    """As fine-tuning does: recorded ones would tell the model where the robot goes."""
    asked, rollout = [], WorldModel.rollout
    monkeypatch.setattr(WorldModel, "rollout", lambda *a, **options: asked.append(options) or rollout(*a, **options))
    run(demos, tokenizer, tmp_path, pose_dims=3, steps=1)
    assert asked and all("proprio_after" not in options and options["robot"] is not None for options in asked)


def test_poses_drive_a_model_and_its_refresh(demos, tokenizer, tmp_path):
    run(demos, tokenizer, tmp_path / "one", pose_dims=3, steps=2)
    model, episodes = WorldModel.load(tmp_path / "one"), load_episodes(demos)
    names = read_header(tmp_path / "one").extra["train_episodes"]
    assert (model.cfg.pose_dims, model.cfg.gripper_dims, model.cfg.action_dim, model.cfg.proprio_dim) == (3, (6,), 7, 8)
    poses = np.concatenate([e.proprio[1:, :3] for e in episodes if e.name in names])
    assert (model.action_bins.low[:3].numpy() == poses.min(0)).all() and model.action_bins.low[3] == -1
    assert model.robot.proprio_std.min() < 1 and model.robot.net[-1].weight.abs().max() > 0  # fitted
    refresh([demos], tmp_path / "one", tmp_path / "two", steps=1)
    again = WorldModel.load(tmp_path / "two")
    assert again.cfg == model.cfg
    with pytest.warns(UserWarning, match="--pose-dims 2 is for a world model from scratch: .*one.* keeps its 3"):
        refresh([demos], tmp_path / "one", tmp_path / "three", pose_dims=2, steps=1)  # those of a preset, say
    assert WorldModel.load(tmp_path / "three").cfg == model.cfg


def test_poses_are_those_after_the_actions(demos, tokenizer, tmp_path, monkeypatch):
    given, loss = [], WorldModel.token_loss
    monkeypatch.setattr(WorldModel, "token_loss", lambda self, *args: given.append(args[2]) or loss(self, *args))
    run(demos, tokenizer, tmp_path, pose_dims=8, steps=1)
    sampler = train_wm.WindowSampler(train_wm.load_split(replace(SMOKE, demos=(str(demos),)))[0], 9, 8, None)
    batch = sampler.batch(SMOKE.batch_size, SMOKE.seed, 0)
    assert torch.equal(given[0], torch.cat([batch.proprio_after, batch.actions[..., 6:]], -1))


@pytest.mark.parametrize(
    ("dims", "width", "names", "left_out"),
    [
        (6, 8, (), None),
        (7, 7, (), None),
        (6, 14, (), "6 of 14, 7 of 14"),
        (7, 8, (), "7 of 8"),
        (6, 8, ("x", "y", "z", "rx", "ry", "rz", "gripper", "Finger_2"), None),
        (6, 8, ("j1", "j2", "j3", "j4", "j5", "j6", "j7", "gripper"), "j7 are no part"),
    ],
)
def test_what_is_left_out_of_the_pose(dims, width, names, left_out, recwarn):
    zeros = np.zeros((2, width), np.float32)
    one = Episode("s/f/1", "push", np.zeros((2, 4, 4, 3), np.uint8), zeros, zeros, zeros, proprio_names=names)
    train_wm.check_pose(dims, one)
    told = [str(w.message) for w in recwarn]
    assert len(told) == bool(left_out) and (not left_out or f"dimensions {left_out}" in told[0])
    with pytest.raises(ValueError, match=f"--pose-dims 15: the proprio of s/f/1 has {width} dimensions"):
        train_wm.check_pose(15, one)


def test_angles_that_wrap_are_named(recwarn):
    def one(*angle: float) -> Episode:
        proprio = np.zeros((len(angle), 8), np.float32)
        proprio[:, 3] = angle
        return Episode("s/f/1", "push", proprio, proprio, proprio, proprio)

    train_wm.warn_wrapping_angles(6, [one(0.0, 0.5, 3.1), one(-3.1, -2.5)])  # not within an episode
    train_wm.warn_wrapping_angles(6, [one(0.0, 6.2, 12.1)])  # a position, in whatever units
    train_wm.warn_wrapping_angles(3, [one(3.1, -3.1)])  # no part of the pose
    assert not recwarn
    with pytest.warns(UserWarning, match="--pose-dims 6: proprio dimensions 3 jump by a full turn, as angles"):
        train_wm.warn_wrapping_angles(6, [one(0.0, 0.5), one(3.0, 3.1, -3.1, -3.0)])


def test_context_frames_of_another_range_get_a_warning(demos, tokenizer, tmp_path):
    model, extra = load_model(tokenizer / "model.safetensors", FrameTokenizer, TokenizerConfig)
    save_model(tmp_path / "model.safetensors", model, model.cfg, {**extra, "context_lookback": 0})
    with pytest.warns(UserWarning, match="tokenizer .* was trained with --context-lookback 0, this run has 3"):
        run(demos, tmp_path / "model.safetensors", tmp_path / "one", steps=1, context_lookback=3)
    with pytest.warns(UserWarning, match="world model .* was trained with --context-lookback 3, this run has none"):
        refresh([demos], tmp_path / "one", tmp_path / "two", steps=1)


def test_episodes_recorded_anew_under_their_old_names_get_a_warning(demos, tokenizer, tmp_path, recwarn):
    run(demos, tokenizer, tmp_path / "one", steps=1)
    refresh([demos], tmp_path / "one", tmp_path / "two", steps=1)
    assert not [w for w in recwarn if "by name" in str(w.message)]
    digests = [read_header(path).extra["episode_digests"] for path in (tmp_path / "two", tokenizer)]
    assert digests[0] == digests[1] and digests[0].keys() == {e.name for e in load_episodes(demos)}
    anew = tmp_path / "anew"
    shutil.copytree(demos, anew)
    import h5py

    first, *_ = (path for path in sorted(anew.rglob("*.hdf5")))
    with h5py.File(first, "r+") as file:
        file["data/demo_0/actions"][0, 0] += 0.01
    with pytest.warns(UserWarning, match=r"knows 1 of \d+ episodes by name, first .*demo_0, with other actions"):
        run(anew, tokenizer, tmp_path / "three", steps=1)
    with pytest.warns(UserWarning, match="one.* knows 1 of"):
        refresh([anew], tmp_path / "one", tmp_path / "four", steps=1)
    kept = read_header(tmp_path / "four").extra
    assert kept["episode_digests"].keys() >= set(kept["train_episodes"])


def test_held_out_episodes_keep_their_order(demos, world_model, tmp_path):
    """On which the segments of a validation depend."""
    names, model = sorted(e.name for e in load_episodes(demos)), WorldModel.load(world_model)
    save_model(tmp_path / "model.safetensors", model, model.cfg, {"held_out_episodes": [names[4], names[1]]})
    train, held_out = train_wm.load_split(replace(SMOKE, demos=(str(demos),), init=str(tmp_path)))
    assert [e.name for e in held_out] == [names[4], names[1]]
    assert sorted(e.name for e in train) == [name for i, name in enumerate(names) if i not in (1, 4)]


def test_an_interrupted_refresh_goes_on(demos, rollouts, world_model, tmp_path, monkeypatch):
    places = [demos, rollouts]
    refresh(places, world_model, tmp_path / "whole")
    for last in (1, 5):  # before the first checkpoint, and after the second
        interrupted(monkeypatch, train_wm, last, lambda: refresh(places, world_model, tmp_path / "parts"))
    refresh(places, world_model, tmp_path / "parts")
    logs = [
        [{k: v for k, v in line.items() if k != "minutes"} for line in log_of(tmp_path / n)] for n in ("whole", "parts")
    ]
    assert logs[0] == logs[1] and len(logs[0]) == 7
    whole, parts = (WorldModel.load(tmp_path / name / "model.safetensors").state_dict() for name in ("whole", "parts"))
    assert all(torch.equal(whole[k], parts[k]) for k in whole)


def test_errors_of_a_refresh(demos, rollouts, world_model, world_model_file, tmp_path):
    (held_out,) = read_header(world_model).extra["held_out_episodes"]
    message = rf"holds out 1 episodes, of which --demos \S+ lacks 1, first {held_out}: .* \(--demos {demos} ...\)"
    with pytest.raises(ValueError, match=message):
        refresh([rollouts], world_model, tmp_path / "a")
    with pytest.raises(ValueError, match="names no held-out episodes: give a world model that train_wm.py wrote"):
        refresh([demos], world_model_file, tmp_path / "a")
    with pytest.raises(FileNotFoundError, match="no checkpoint at"):
        refresh([demos], tmp_path / "nothing", tmp_path / "a")
    model, extra = WorldModel.load(world_model), read_header(world_model).extra
    six = WorldModel(replace(model.cfg, action_dim=6))
    save_model(tmp_path / "six.safetensors", six, six.cfg, extra)
    with pytest.raises(ValueError, match="six.safetensors has 6 action dimensions, this run 7: train a new one"):
        refresh([demos], tmp_path / "six.safetensors", tmp_path / "a")
    save_model(tmp_path / "wrist.safetensors", model, model.cfg, {**extra, "camera": "wrist"})
    with pytest.raises(ValueError, match="wrist.safetensors has camera 'wrist', the demonstrations .* has 'agentview'"):
        refresh([demos], tmp_path / "wrist.safetensors", tmp_path / "a")


def test_places_on_the_command_line():
    cfg = parse(train_wm.Config, PRESETS, ["--demos", "demos", "own_rollouts", "--init", "runs/wm"])
    assert (cfg.demos, cfg.init) == (("demos", "own_rollouts"), "runs/wm")
    assert PRESETS["paper"].demos == ("demos",) and PRESETS["paper"].init is None


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


def test_models_of_another_image_size_are_refused(demos, tokenizer, world_model, tmp_path):
    small = replace(FrameTokenizer.load(tokenizer).cfg, image_size=(32, 32))
    facts, model = read_header(tokenizer).extra, WorldModel.load(world_model)
    save_model(tmp_path / "small.safetensors", FrameTokenizer(small), small, facts)
    with pytest.raises(ValueError, match=r"tokenizer \S+ takes images of 32x32, \S+ has 64x64: resize .* --size 32 32"):
        run(demos, tmp_path / "small.safetensors", tmp_path / "a")
    smaller = replace(model.cfg, tokenizer=small)
    save_model(tmp_path / "wm.safetensors", WorldModel(smaller), smaller, read_header(world_model).extra)
    with pytest.raises(ValueError, match=r"world model \S+ takes images of 32x32, \S+ has 64x64"):
        refresh([demos], tmp_path / "wm.safetensors", tmp_path / "a")
    assert not (tmp_path / "a").exists()


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
