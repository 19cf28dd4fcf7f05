"""Success model: labels, thresholds and agreement by hand; it learns; training resumes; every refusal."""

import contextlib
import dataclasses
import json
import math
import shutil
import time
import warnings
from pathlib import Path
from types import SimpleNamespace

import h5py
import numpy as np
import pytest
import torch
from conftest import files_of, interrupted, refused_with_converted_episodes

import train_success
from vlarft import success_frames
from vlarft.data import convert, load_episodes
from vlarft.data.consistency import check_outcomes
from vlarft.data.convention import image_convention
from vlarft.data.episode import Episode
from vlarft.imagined_episodes import imagined_episodes
from vlarft.run import clock
from vlarft.run.checkpoint import read_header, save_model
from vlarft.run.pixels import to_floats
from vlarft.success import (
    PRESETS,
    SuccessModel,
    best_threshold,
    check_judge,
    compare_outcomes,
    longest_held,
)
from vlarft.world_model import PRESETS as WORLD_MODELS
from vlarft.world_model import WorldModel

SMOKE = train_success.PRESETS["smoke"]


def lamps(index: int, success: bool) -> Episode:
    """Two lamps; the one that the instruction names is lit at the end of a success, the other one in a failure."""
    rng = np.random.default_rng(index)
    images = rng.integers(90, 110, (20, 64, 64, 3)).astype(np.uint8)
    name = ("left", "right")[index % 2]
    lit = slice(8, 24) if (name == "left") == success else slice(40, 56)
    images[14:, 24:40, lit] = 250
    zeros = np.zeros((20, 8), np.float32)
    return Episode(f"s/f/{index}", f"light the {name} lamp", images, zeros, zeros[:, :7], zeros[:, :7], success)


@pytest.fixture(scope="module")
def places(both_outcomes) -> Path:
    return both_outcomes


@pytest.fixture(scope="module")
def world_model(places, tmp_path_factory) -> Path:
    """A world model with random weights that holds out two episodes of each outcome."""
    torch.manual_seed(0)
    model = WorldModel(dataclasses.replace(WORLD_MODELS["smoke"], proprio_dim=8))
    episodes = load_episodes(places, successes_only=False)
    actions = torch.cat([torch.from_numpy(e.actions) for e in episodes])
    model.action_bins.set_range(actions.amin(0), actions.amax(0))
    names = [e.name for e in episodes]
    extra = {"held_out_episodes": names[:2] + names[-2:], **image_convention(episodes, "agentview")}
    path = tmp_path_factory.mktemp("wm") / "model.safetensors"
    save_model(path, model, model.cfg, extra)
    return path


@pytest.fixture
def config(places, world_model, tmp_path):
    return dataclasses.replace(
        SMOKE, demos=(str(places),), world_model=str(world_model), out_dir=str(tmp_path / "success"), margin=4
    )


def test_labels_by_hand():
    success, progress = success_frames.labels(lamps(0, True), positive=3, margin=5)
    assert success[:12].tolist() == [0] * 12 and np.isnan(success[12:17]).all() and success[17:].tolist() == [1] * 3
    assert progress[[0, 17, 19]].tolist() == [0, 1, 1] and progress[8] == pytest.approx(8 / 17)
    success, progress = success_frames.labels(lamps(1, False), positive=3, margin=5)
    assert not success.any() and np.isnan(progress).all()
    short = dataclasses.replace(lamps(0, True), actions=np.zeros((2, 7), np.float32))
    assert [values.tolist() for values in success_frames.labels(short, positive=4, margin=12)] == [[0, 1], [0, 1]]


def test_a_success_is_held():
    model = SuccessModel(dataclasses.replace(PRESETS["smoke"], threshold=0.6, hold=3))
    values = torch.tensor([[0.9, 0.9, 0.1, 0.7, 0.6, 0.8, 0.9], [0.9, 0.9, 0.1, 0.9, 0.9, 0.5, 0.9]])
    assert model.solved(values).tolist() == [[False] * 5 + [True] * 2, [False] * 7]
    assert [round(longest_held(row, 3).item(), 4) for row in values] == [0.6, 0.5]
    assert longest_held(values[0], 9) == 0 and not model.solved(values[:, :2]).any()


def test_thresholds_by_hand():
    true = [True, True, False, False, True]
    assert best_threshold([0.9, 0.8, 0.3, 0.1, 0.7], true, 0.0) == pytest.approx(0.5)
    # one failure looks like a success: without false successes, two successes are given up
    highest = [0.9, 0.8, 0.85, 0.1, 0.7]
    assert best_threshold(highest, true, 0.0) == pytest.approx(0.875)
    assert best_threshold(highest, true, 0.5) == pytest.approx(0.4)
    # no threshold is right: none is a success, even where probabilities saturate
    assert best_threshold([0.5, 0.5, 0.9, 0.9, 0.5], true, 0.0) == pytest.approx(1.1)
    assert best_threshold([0.4, 0.5, 0.3, 0.45], [True, False, True, True], 0.02) == pytest.approx(1.1)
    assert best_threshold([1.0, 0.99, 1.0, 0.2, 0.9], true, 0.02) == pytest.approx(1.1)
    assert best_threshold([0.0, 0.8, 0.0, 0.0, 0.9], true, 0.0) == pytest.approx(0.4)  # 0 is never a success
    assert best_threshold([0.0, 0.0], [True, False], 0.99) > 0


def test_a_share_of_false_successes_is_one_of_the_failures():
    """One failure of two looks better than all eight successes: half of the failures, a tenth of the episodes."""
    highest, true = [0.85, 0.1] + [0.8] * 8, [False, False] + [True] * 8
    assert best_threshold(highest, true, 0.5) == pytest.approx(0.45)
    assert best_threshold(highest, true, 0.2) > 0.85


def test_agreement_by_hand():
    found = compare_outcomes([True, False, True, False], [True, True, False, False])
    assert found == (2, 2, 1, 1) and found.agreement == found.balanced == 0.5
    found = compare_outcomes([False] * 10, [True] + [False] * 9)
    assert found.agreement == 0.9 and found.balanced == 0.5
    for same in ([True, True], [False], []):
        with pytest.raises(ValueError, match=f"{sum(same)} of {len(same)} episodes succeeded: both outcomes"):
            compare_outcomes(same, same)


def test_loss_by_hand_and_gradients():
    torch.manual_seed(0)
    model = SuccessModel(PRESETS["smoke"])
    frames, first = torch.rand(3, 3, 64, 64), torch.rand(3, 3, 64, 64)
    texts, success = ["a", "b", "a"], torch.tensor([1.0, 0.0, 0.0])
    loss, _ = model.loss(frames, first, texts, success, torch.tensor([1.0, float("nan"), 0.25]))
    p, q = model(frames, first, texts).sigmoid().unbind(1)
    by_hand = -(p[0].log() + (1 - p[1]).log() + (1 - p[2]).log()) / 3
    by_hand = by_hand - (q[0].log() + 0.25 * q[2].log() + 0.75 * (1 - q[2]).log()) / 2
    torch.testing.assert_close(loss, by_hand)
    loss.backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters())
    with pytest.raises(ValueError, match=r"this encoder takes \(B, 6, 64, 64\)"):
        model(frames[..., :32], first[..., :32], texts)


def test_judging_in_parts_is_judging_at_once():
    torch.manual_seed(0)
    model = SuccessModel(PRESETS["smoke"]).eval()
    frames, first = torch.rand(2, 5, 3, 64, 64), torch.rand(2, 3, 64, 64)
    whole, parts = (model.judge(frames, first, ["a", "b"], at_once=n) for n in (256, 3))
    torch.testing.assert_close(whole, parts)
    one = model(frames[1, 2:3], first[1:], ["b"]).sigmoid()
    torch.testing.assert_close(torch.stack([whole.success[1, 2], whole.progress[1, 2]]), one[0])
    values = model.judge(frames[:1, 1:], frames[:1, 0], ["a"]).success[0]  # of an episode: against its first frame
    assert model.highest(frames[0], "a") == pytest.approx(longest_held(values, model.cfg.hold).item())
    # the frame, the episode's first frame and the instruction all count
    frame, other = frames[:1, 0], torch.rand(1, 3, 64, 64)
    found = [
        model(a, b, [text])
        for a, b, text in (
            (frame, first[:1], "a"),
            (other, first[:1], "a"),
            (frame, other, "a"),
            (frame, first[:1], "b"),
        )
    ]
    assert all((value - found[0]).abs().max() > 1e-3 for value in found[1:])


def test_shifts_are_whole_pixels_and_the_same_for_both_images():
    rows, columns = torch.arange(20.0)[:, None].expand(20, 30), torch.arange(30.0).expand(20, 30)
    images = torch.stack([rows, columns]).expand(40, 2, 2, 20, 30)
    found = success_frames.shifted(images, torch.Generator().manual_seed(0))
    assert torch.equal(found[:, 0], found[:, 1])
    down, right = (found[:, 0, i, 10, 15] - (10, 15)[i] for i in (0, 1))
    assert set(down.tolist()) == {-2, -1, 0, 1, 2} and set(right.tolist()) == {-3, -2, -1, 0, 1, 2, 3}
    assert (found[:, 0, 0, 0] == down.clamp_min(0)[:, None]).all()  # the border is repeated


def test_turned_images_are_read():
    """As LIBERO's files are: turned on disk, so that the reader's array runs backwards."""
    images = np.random.default_rng(0).integers(0, 255, (3, 4, 4, 3), dtype=np.uint8)
    column = np.zeros((3, 7), np.float32)
    turned = Episode("a/b", "push", images[:, ::-1, ::-1], column, column, column)
    (version,) = success_frames.versions([turned], None, contextlib.nullcontext())
    assert torch.equal(version.frames.permute(0, 2, 3, 1), torch.from_numpy(images).flip(1, 2))
    frames = to_floats(turned.images)
    torch.testing.assert_close(frames.permute(0, 2, 3, 1) * 255, torch.from_numpy(images).flip(1, 2).float())


def test_it_learns_what_the_instruction_asks_for():
    cfg = dataclasses.replace(SMOKE, batch_size=32, positive=4, margin=4, world_model=None)
    episodes = [lamps(i, bool(i // 2 % 2)) for i in range(16)]
    cast = torch.autocast("cpu", enabled=False)
    chosen = {"positive": 4, "margin": 4, "others": cfg.frames, "seed": 0}
    table = success_frames.frame_table(success_frames.versions(episodes, None, cast), **chosen)
    assert table.success.sum() == 8 * 4 and len(table.frames) == 8 * (4 + 4) + 8 * 4
    few = table._replace(success=(torch.arange(96) == 5).float())  # one of 96: half of each batch all the same
    assert few.batch(8, 0, 0, torch.device("cpu"))[3].sum() == 4
    torch.manual_seed(0)
    model = SuccessModel(PRESETS["smoke"])
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for step in range(180):
        optimizer.zero_grad()
        model.loss(*table.batch(cfg.batch_size, 0, step, torch.device("cpu")))[0].backward()
        optimizer.step()
    others = [lamps(i, bool(i // 2 % 2)) for i in range(100, 116)]
    held_out = list(success_frames.versions(others, None, cast))
    metrics, threshold = train_success.validate(model.eval(), held_out[:8], held_out[8:], cfg, cast)
    assert metrics["real_agreement"] == 1 and metrics["real_brier"] < 0.1 and 0 < threshold < 1


def test_a_policys_own_attempts_alone_count_where_both_outcomes_are_among_them():
    model = SimpleNamespace(
        parameters=lambda: iter([torch.zeros(1)]), highest=lambda frames, _: round(frames.mean().item(), 1)
    )

    def shown(kind, success, level):
        episode = dataclasses.replace(lamps(0, success), kind=kind)
        return success_frames.Version(episode, "real", torch.full((2, 3, 4, 4), round(255 * level), dtype=torch.uint8))

    others = [shown("expert", True, 0.2), shown("noisy", False, 0.9)]  # both would be judged wrong
    own = [shown("policy", True, 0.8), shown("policy", False, 0.4)]
    cast = torch.autocast("cpu", enabled=False)
    metrics, threshold = train_success.validate(model, others + own, others + own, SMOKE, cast)
    assert threshold == pytest.approx(0.6) and metrics["real_agreement"] == 1
    with pytest.warns(UserWarning, match="nothing is judged a success"):
        metrics, threshold = train_success.validate(model, own[:1] + others, own[:1] + others, SMOKE, cast)
    assert threshold > 0.9 and metrics["real_agreement"] == pytest.approx(1 / 3)


def test_the_threshold_is_chosen_on_imagined_episodes_and_measured_on_others():
    model = SimpleNamespace(
        parameters=lambda: iter([torch.zeros(1)]), highest=lambda frames, _: round(frames.mean().item(), 2)
    )

    def shown(kind, success, level):
        frames = torch.full((2, 3, 4, 4), round(255 * level), dtype=torch.uint8)
        return success_frames.Version(lamps(0, success), kind, frames)

    chosen = [shown("real", True, 0.9), shown("real", False, 0.7)]
    chosen += [shown("imagined", True, 0.5), shown("imagined", False, 0.3)]
    measured = [shown("real", True, 0.45), shown("real", False, 0.35)]
    measured += [shown("imagined", True, 0.35), shown("imagined", False, 0.6), shown("imagined", False, 0.1)]
    cast = torch.autocast("cpu", enabled=False)
    with pytest.warns(UserWarning, match="chosen on 1 failures, of which --false-successes 0.02 allows none"):
        metrics, threshold = train_success.validate(model, chosen, measured, SMOKE, cast)
    assert metrics.pop("threshold") == threshold == pytest.approx(0.4)
    assert metrics == pytest.approx({
        "real_agreement": 1, "real_false_successes": 0, "real_false_failures": 0,
        "real_brier": (0.55**2 + 0.35**2) / 2,
        "imagined_agreement": 1 / 3, "imagined_false_successes": 1 / 2, "imagined_false_failures": 1,
        "imagined_brier": (0.65**2 + 0.6**2 + 0.1**2) / 3,
    })  # fmt: skip


def test_attempts_of_one_start_choose_the_threshold_or_measure(config, monkeypatch):
    found = [dataclasses.replace(lamps(i, i % 3 > 0), kind="policy", start=f"start {i // 4}") for i in range(48)]
    monkeypatch.setattr(train_success, "load_episodes", lambda *_, **__: found)
    split = train_success.load_split(dataclasses.replace(config, world_model=None, validation_fraction=0.5))
    sides = [{e.start for e in part} for part in (split.threshold, split.held_out)]
    assert all(sides) and not sides[0] & sides[1] and len(split.threshold) == 4 * len(sides[0])


def test_an_episode_of_one_frame_is_left_out(config, monkeypatch):
    """Its frame is the first one, with which others are compared."""
    episodes = load_episodes(config.demos, successes_only=False)
    one, *others = episodes
    short = {name: getattr(one, name)[:1] for name in ("images", "proprio", "actions", "intended")}
    monkeypatch.setattr(train_success, "load_episodes", lambda *_, **__: [dataclasses.replace(one, **short), *others])
    split = train_success.load_split(config)
    kept = {e.name for e in (*split.train, *split.threshold, *split.held_out)}
    assert kept == {e.name for e in others}


def test_versions_are_of_the_same_frames(places, world_model):
    model, cast = WorldModel.load(world_model), torch.autocast("cpu", enabled=False)
    episodes = load_episodes(places, successes_only=False)[:2]
    found = list(success_frames.versions(episodes, model, cast))
    assert [v.kind for v in found] == ["real", "decoded", "real", "decoded", "imagined", "imagined"]
    assert all(v.frames.shape == (14, 3, 64, 64) and v.frames.dtype == torch.uint8 for v in found)
    images = found[0].frames.float() / 255
    tokens = model.tokenize(images[None])[1]
    context = model.tokenizer.encode_context(images[:1])
    expected = success_frames.to_uint8(model.tokenizer.decode(tokens[:, None], context)[0, 0])
    assert (found[1].frames.int() - expected.int()).abs().max() <= 1  # rounding
    options = {"greedy": True, "seed": 0}
    replays = imagined_episodes(model, episodes, autocast=cast, **options)
    for version, replay in zip(found[4:], replays, strict=True):
        assert torch.equal(version.frames, success_frames.to_uint8(replay.imagined))
        assert not torch.equal(version.frames, success_frames.to_uint8(replay.true))
    table = success_frames.frame_table(found, positive=4, margin=4, others=4, seed=0)
    assert len(table.first_frames) == len(table.instructions) == 2
    real, other, imagined = (slice(i * 8, (i + 1) * 8) for i in (0, 2, 4))  # of episodes 0, 1 and 0
    assert torch.equal(table.progress[real], table.progress[imagined])
    assert not torch.equal(table.progress[real], table.progress[other])


def test_training_names_its_facts_and_resumes(config, tmp_path, monkeypatch):
    metrics = train_success.main(config)
    assert {"imagined_agreement", "imagined_false_successes", "real_agreement", "real_brier", "threshold"} <= set(
        metrics
    )
    header = read_header(config.out_dir)
    assert (
        header.extra["instructions"] == ["push the red square"] and header.config["threshold"] == metrics["threshold"]
    )
    held_out, others = header.extra["held_out_episodes"], header.extra["threshold_episodes"]
    assert len(held_out) == len(others) == 2 and not set(held_out) & set(others)
    assert {name.split("/")[0] for name in held_out} == {name.split("/")[0] for name in others} == {"expert", "policy"}
    assert len(header.extra["train_episodes"]) == 8

    parts = dataclasses.replace(config, out_dir=str(tmp_path / "interrupted"))
    interrupted(monkeypatch, train_success, 13, lambda: train_success.main(parts))
    assert Path(parts.out_dir, "imagined.pt").is_file()
    with monkeypatch.context() as patch:
        patch.setattr(success_frames, "imagined_episodes", lambda *_, **__: pytest.fail("imagined again"))
        split = train_success.load_split(config)
        other = [dataclasses.replace(e, instruction="push the blue square") for e in split.threshold]
        with patch.context() as inner:
            inner.setattr(train_success, "load_split", lambda _: split._replace(threshold=other))
            with pytest.raises(ValueError, match="was begun with other contents of these episodes"):
                train_success.main(parts)
            inner.setattr(train_success, "check_same_episodes", lambda *_: None)  # as before the first save
            with pytest.raises(pytest.fail.Exception, match="imagined again"):
                train_success.main(parts)
        assert train_success.main(parts) == metrics
    one, other = (SuccessModel.load(c.out_dir).state_dict() for c in (config, parts))
    assert all(torch.equal(v, other[k]) for k, v in one.items())
    logs = [Path(c.out_dir, "log.jsonl").read_text().splitlines() for c in (config, parts)]
    for a, b in zip(*logs, strict=True):
        assert {**json.loads(a), "minutes": 0} == {**json.loads(b), "minutes": 0}
    steps, last = config.steps, json.loads(logs[0][-1])
    assert last["lr"] == pytest.approx(config.lr * (1 + math.cos(math.pi * (steps - 1) / steps)) / 2)
    before = files_of(config.out_dir)
    assert "imagined.pt" not in before
    with monkeypatch.context() as patch:
        split = train_success.load_split(config)
        patch.setattr(train_success, "load_split", lambda _: split._replace(train=split.train[1:]))
        with pytest.raises(ValueError, match="was begun with 8 train episodes, today there are 7"):
            train_success.main(config)
    refused_with_converted_episodes(monkeypatch, train_success, lambda: train_success.main(config))
    monkeypatch.setattr(train_success, "prepared", lambda *_: pytest.fail("prepared a run that is complete"))
    assert train_success.main(config) == metrics and files_of(config.out_dir) == before  # it is left as it is


def test_imagining_does_not_use_up_the_minutes_of_training(config, monkeypatch):
    late, prepared = [0.0], train_success.prepared

    def slow(*args):
        late[0] += 3600
        return prepared(*args)

    monkeypatch.setattr(clock, "time", SimpleNamespace(monotonic=lambda: time.monotonic() + late[0]))
    monkeypatch.setattr(train_success, "prepared", slow)
    train_success.main(dataclasses.replace(config, max_minutes=10.0))
    rows = [json.loads(line) for line in Path(config.out_dir, "log.jsonl").read_text().splitlines()]
    assert rows[-1]["step"] == config.steps - 1 and rows[-1]["minutes"] < 10


def test_who_may_be_judged(config, tmp_path):
    train_success.main(dataclasses.replace(config, steps=1))
    images = read_header(config.world_model).extra
    good = {"images": images, "name": "world model", "image_size": 64, "world_model": config.world_model}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check_judge(
            config.out_dir, ["push the red square", "Push the  red square"], **good
        )  # its network reads the same
    with pytest.raises(ValueError, match="does not know the instruction 'push the blue square'"):
        check_judge(config.out_dir, ["push the red square", "push the blue square"], **good)
    with pytest.raises(ValueError, match="judges images of 64x64, world model has 128x128"):
        check_judge(config.out_dir, ["push the red square"], **{**good, "image_size": 128})
    with pytest.raises(ValueError, match="success model .*eye_in_hand|eye_in_hand.* success model"):
        check_judge(config.out_dir, ["push the red square"], **{**good, "images": {**images, "camera": "eye_in_hand"}})
    model = WorldModel.load(config.world_model)
    torch.nn.init.zeros_(model.lm_head.weight)
    save_model(tmp_path / "wm.safetensors", model, model.cfg, images)
    with pytest.warns(UserWarning, match="trained on the imaginations of another world model"):
        check_judge(config.out_dir, ["push the red square"], **{**good, "world_model": tmp_path / "wm.safetensors"})
    with pytest.warns(UserWarning, match="chose its threshold on imaginations and judges real frames here"):
        check_judge(config.out_dir, ["push the red square"], **{**good, "world_model": None})


def test_unknown_outcomes_get_a_warning(places, tmp_path):
    """They are kept as unknown by a conversion."""
    shutil.copytree(places, tmp_path / "episodes")
    for path in (tmp_path / "episodes" / "expert").iterdir():
        with h5py.File(path, "r+") as file:
            del file["data"]["demo_0"].attrs["success"]
    for format in ("hdf5", "lerobot"):
        images = ["--images", "png"] if format == "lerobot" else []
        convert.main([str(tmp_path / "episodes"), str(tmp_path / format), "--format", format, *images])
    for place in ("episodes", "hdf5", "lerobot"):
        cfg = dataclasses.replace(SMOKE, demos=(str(tmp_path / place),), world_model=None, validation_fraction=0.4)
        with pytest.warns(UserWarning, match=f"{place}: 1 of 12 episodes do not say whether they succeeded, first "):
            train_success.load_split(cfg)


def test_attempts_of_unknown_outcome_are_refused(places):
    expert, attempt = (load_episodes(places, successes_only=False)[i] for i in (0, -1))
    assert (expert.kind, attempt.kind) == ("expert", "policy")
    unknown = dataclasses.replace(attempt, outcome_known=False)
    with pytest.raises(
        ValueError, match=f"HERE: 1 of 2 episodes are attempts that do not say .* {attempt.name}: label"
    ):
        check_outcomes([expert, unknown], "HERE")
    check_outcomes([expert, attempt], "HERE")


def test_few_held_out_episodes_serve_both(config, world_model, tmp_path):
    model, extra = WorldModel.load(world_model), read_header(world_model).extra
    few = {**extra, "held_out_episodes": extra["held_out_episodes"][:1] + extra["held_out_episodes"][-1:]}
    save_model(tmp_path / "wm.safetensors", model, model.cfg, few)
    with pytest.warns(UserWarning, match="1 of the 2 held-out episodes .* All serve both"):
        split = train_success.load_split(dataclasses.replace(config, world_model=str(tmp_path / "wm.safetensors")))
    assert split.threshold == split.held_out and len(split.held_out) == 2 and len(split.train) == 10


def test_episodes_recorded_anew_under_their_old_names_get_a_warning(config, world_model, tmp_path):
    model, extra = WorldModel.load(world_model), read_header(world_model).extra
    digests = {extra["held_out_episodes"][0]: "of before"}
    save_model(tmp_path / "wm.safetensors", model, model.cfg, {**extra, "episode_digests": digests})
    with pytest.warns(UserWarning, match="world model .* knows 1 of 12 episodes by name"):
        train_success.load_split(dataclasses.replace(config, world_model=str(tmp_path / "wm.safetensors")))


def test_without_a_world_model(config):
    metrics = train_success.main(dataclasses.replace(config, world_model=None, validation_fraction=0.4, steps=3))
    assert "real_agreement" in metrics and not any(name.startswith("imagined") for name in metrics)


def test_at_most_takes_from_each_kind_and_outcome(places):
    episodes = load_episodes(places, successes_only=False)
    chosen = train_success.at_most(episodes, 2)
    assert [(e.kind, e.success) for e in chosen] == [("expert", True)] * 2 + [("policy", False)] * 2
    assert train_success.at_most(episodes, None) == episodes


def test_errors(config, demos, tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="--batch-size 9: half of the frames are positive"):
        dataclasses.replace(config, batch_size=9)
    with pytest.raises(ValueError, match="holds out none of the 6 episodes"):
        train_success.main(dataclasses.replace(config, demos=(str(demos),)))
    with pytest.raises(ValueError, match=r"4 of the 4 training episodes .* needs both outcomes"):
        train_success.main(dataclasses.replace(config, demos=(str(demos),), world_model=None, validation_fraction=0.34))
    with pytest.raises(ValueError, match="with --demos, and give a larger --validation-fraction$"):
        train_success.main(dataclasses.replace(config, demos=(str(demos),), world_model=None, validation_fraction=0.34))
    model = WorldModel.load(config.world_model)
    extra = read_header(config.world_model).extra
    save_model(tmp_path / "other.safetensors", model, model.cfg, {**extra, "camera": "eye_in_hand"})
    with pytest.raises(ValueError, match="other.safetensors .*eye_in_hand"):
        train_success.main(dataclasses.replace(config, world_model=str(tmp_path / "other.safetensors")))
    monkeypatch.setattr(train_success.distributed, "world_size", lambda: 2)
    with pytest.raises(ValueError, match="runs in one process"):
        train_success.main(config)
