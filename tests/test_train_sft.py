"""Supervised training: resume, EMA, LoRA on export, kept copies, continuing, errors."""

import json
import re
import shutil
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import h5py
import numpy as np
import pytest
import torch
from conftest import files_of, write_moving_square
from safetensors.torch import load_file
from small_text import tokenizer_json
from test_pretrained_policy import PAPER

from vlarft.data import convert
from vlarft.data.augment import Augmentation, augment
from vlarft.data.episodes import load_episodes, split_episodes
from vlarft.nets.lora import LoRAConfig
from vlarft.policy import PRESETS as POLICIES
from vlarft.policy import VLAPolicy
from vlarft.pretrained import public_policy_config
from vlarft.run.checkpoint import read_header

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))
import train_sft  # noqa: E402

SMOKE = train_sft.PRESETS["smoke"]


def config(demos: Path, out_dir: Path, **changes) -> train_sft.Config:
    return replace(SMOKE, demos=(str(demos),), out_dir=str(out_dir), **changes)


def weights(out_dir: Path) -> dict[str, torch.Tensor]:
    return load_file(out_dir / "model.safetensors")


def assert_same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> None:
    assert a.keys() == b.keys()
    for key in a:
        assert torch.equal(a[key], b[key]), key


class Killed(Exception):
    pass


def test_trains_logs_and_writes_a_policy(demos, tmp_path):
    metrics = train_sft.main(config(demos, tmp_path / "run", seed=2))
    assert {"val_flow_mse", "val_key_loss"} <= set(metrics)
    held_out = split_episodes(load_episodes(demos), SMOKE.validation_fraction, 0)[1]
    assert read_header(tmp_path / "run").extra["held_out_episodes"] == [e.name for e in held_out]
    lines = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 3]
    assert {"loss", "flow_mse", "key_loss", "lr", "grad_norm", "step_s", "val_flow_mse"} <= set(lines[-1])
    policy = VLAPolicy.load(tmp_path / "run" / "model.safetensors")
    assert policy.normalizer.fitted and policy.normalizer.action_high.max() <= 0.9 + 1e-6  # of the intended actions
    images = np.zeros((1, 64, 64, 3), np.uint8)
    assert policy.act(images, ["pick up the red block"], np.zeros((1, 8))).shape == (1, 8, 7)


def test_demonstrations_of_two_places(demos, tmp_path):
    """The second one has a policy's attempts, relabelled by data.convert: successes are imitated, failures are not."""
    for k, (folder, success) in enumerate((("won", True), ("lost", False))):
        path = tmp_path / "own" / folder / "push_red_demo.hdf5"
        write_moving_square(path, 2, 14, 10 + k, "push the red square")
        with h5py.File(path, "r+") as file:
            for demo in file["data"].values():
                demo.attrs.update(kind="policy", success=success)
    convert.main([str(tmp_path / "own"), str(tmp_path / "cloned"), "--format", "hdf5", "--kind", "expert"])
    both = str(demos), str(tmp_path / "cloned")
    train_sft.main(replace(config(demos, tmp_path / "run", steps=1), demos=both))
    extra = read_header(tmp_path / "run").extra
    names = [*extra["train_episodes"], *extra["held_out_episodes"]]
    assert len(names) == 8 and sum(name.startswith("cloned/") for name in names) == 2
    assert extra["instructions"] == sorted({e.instruction for e in load_episodes(both)})


def test_the_checkpoint_names_the_instructions_of_all_its_trainings(policy_file, tmp_path):
    policy, episodes = VLAPolicy.load(policy_file), [SimpleNamespace(instruction=text) for text in ("b", "a", "b")]
    assert train_sft.instructions(replace(SMOKE, init=None), episodes) == {"instructions": ["a", "b"]}
    for number, extra in enumerate(({"instructions": ["c"]}, {})):
        policy.save(tmp_path / f"{number}.safetensors", extra)
    known, unknown = (replace(SMOKE, init=str(tmp_path / f"{number}.safetensors")) for number in (0, 1))
    assert train_sft.instructions(known, episodes) == {"instructions": ["a", "b", "c"]}
    assert train_sft.instructions(unknown, episodes) == {}


@pytest.mark.parametrize(
    "changes",
    [{}, {"ema": None, "lora_rank": 2, "schedule": "constant"}],
    ids=["ema", "lora"],
)
def test_resume_is_bitwise(demos, tmp_path, monkeypatch, changes):
    cfg = config(demos, tmp_path / "a", **changes)
    expected = train_sft.main(cfg)
    original, calls = train_sft.compute_loss, []

    def killed(*args, train):
        calls.append(train)
        if calls.count(True) == 2 + 4:  # two for the estimate of the memory
            raise Killed
        return original(*args, train=train)

    monkeypatch.setattr(train_sft, "compute_loss", killed)
    with pytest.raises(Killed):
        train_sft.main(replace(cfg, out_dir=str(tmp_path / "b")))
    monkeypatch.setattr(train_sft, "compute_loss", original)
    assert train_sft.main(replace(cfg, out_dir=str(tmp_path / "b"))) == expected
    assert_same(weights(tmp_path / "a"), weights(tmp_path / "b"))
    states = [torch.load(tmp_path / run / "train_state.pt", weights_only=True) for run in "ab"]
    assert_same(states[0]["policy"], states[1]["policy"])
    logs = [(tmp_path / run / "log.jsonl").read_text().splitlines() for run in "ab"]
    timeless = [
        [{k: v for k, v in json.loads(line).items() if k not in ("step_s", "minutes")} for line in log] for log in logs
    ]
    assert timeless[0] == timeless[1]
    before = files_of(tmp_path / "a")
    assert train_sft.main(cfg) == expected and files_of(tmp_path / "a") == before  # a finished run is left as it is


def test_resume_with_other_episodes_is_refused(demos, tmp_path):
    """New recordings would move episodes that were trained on to the held-out part."""
    path, cfg = tmp_path / "mine" / "squares", config(tmp_path / "mine", tmp_path / "run", steps=1)
    shutil.copytree(demos / "squares", path)
    train_sft.main(cfg)
    write_moving_square(path / "push_green_demo.hdf5", 2, 14, 7, "push the green square")
    text = r"run was begun with \d+ train episodes, today there are \d+ \(first that differs: squares/push_green_demo/d"
    with pytest.raises(ValueError, match=text):
        train_sft.main(cfg)
    (path / "push_green_demo.hdf5").unlink()
    train_sft.main(cfg)


def test_resume_with_converted_episodes_is_refused(demos, tmp_path):
    """They have the names of those that the run began with."""
    path, cfg = tmp_path / "mine" / "squares", config(tmp_path / "mine", tmp_path / "run", steps=1)
    shutil.copytree(demos / "squares", path)
    train_sft.main(cfg)
    before = files_of(tmp_path / "run")
    file = sorted(path.glob("*.hdf5"))[0]
    original = file.read_bytes()
    with h5py.File(file, "r+") as opened:
        opened["data/demo_0/actions"][0, 0] += 0.1
    with pytest.raises(ValueError, match=r"run was begun with other contents of these episodes \(actions, .*--out-dir"):
        train_sft.main(cfg)
    file.write_bytes(original)
    for file in path.glob("*.hdf5"):
        with h5py.File(file, "r+") as opened:
            del opened["data"].attrs["image_convention"]  # turns the images, and nothing else
    with pytest.raises(ValueError, match="begun with other contents of these episodes"):
        train_sft.main(cfg)
    assert files_of(tmp_path / "run") == before


def test_regression_brings_chunks_closer_to_the_datasets(demos, tmp_path):
    base = config(demos, tmp_path / "base", steps=40, lr=1e-3, schedule="constant", ema=None, augment="full")
    train_sft.main(base)
    init = str(tmp_path / "base" / "model.safetensors")
    cfg = replace(base, init=init, train="head", key_batch=0, objective="regression", steps=20)
    cfg = replace(cfg, validation_interval=1)
    metrics = train_sft.main(replace(cfg, out_dir=str(tmp_path / "run")))
    assert {"val_chunk_l1"} <= set(metrics) and "val_flow_mse" not in metrics
    lines = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    assert lines[-1]["val_chunk_l1"] < 0.95 * lines[0]["val_chunk_l1"]


def test_ema_is_what_is_exported(demos, tmp_path):
    train_sft.main(config(demos, tmp_path / "run", steps=1, warmup=0, ema=0.999))
    state = torch.load(tmp_path / "run" / "train_state.pt", weights_only=True)
    name = "head.net.dit.out.bias"
    # zero-initialised, one step of decay min(0.999, 1 / 10)
    torch.testing.assert_close(weights(tmp_path / "run")[name], 0.9 * state["policy"][name])
    trained = [name for name, _ in VLAPolicy(POLICIES["smoke"]).named_parameters()]
    for average, key in zip(state["ema"].values(), trained, strict=True):
        assert torch.equal(weights(tmp_path / "run")[key], average), key


def test_lora_trains_little_and_leaves_no_trace(demos, tmp_path):
    train_sft.main(config(demos, tmp_path / "base"))
    init = str(tmp_path / "base" / "model.safetensors")
    train_sft.main(config(demos, tmp_path / "run", init=init, lora_rank=2, ema=None))
    before, after = weights(tmp_path / "base"), weights(tmp_path / "run")
    changed = {k for k in after if not torch.equal(before[k], after[k])}
    assert "vlm.language_model.layers.0.mlp.up_proj.weight" in changed and "vlm.action_queries.weight" in changed
    assert not {"vlm.embed_tokens.weight", "vlm.language_model.norm.weight", "vlm.projector.fc1.bias"} & changed
    # merged: the exported policy computes what the adapted one did
    state = torch.load(tmp_path / "run" / "train_state.pt", weights_only=True)["policy"]
    key = "vlm.projector.fc2"
    merged = state[f"{key}.weight"] + 128.0 / 2 * state[f"{key}.lora_b"] @ state[f"{key}.lora_a"]
    torch.testing.assert_close(after[f"{key}.weight"], merged)


def test_init_keeps_the_normaliser_and_starts_a_new_schedule(demos, tmp_path):
    train_sft.main(config(demos, tmp_path / "base"))
    path = tmp_path / "base" / "model.safetensors"
    policy = VLAPolicy.load(path)
    policy.normalizer.action_low.fill_(-0.623)
    policy.save(tmp_path / "edited.safetensors")
    train_sft.main(config(demos, tmp_path / "run", init=str(tmp_path / "edited.safetensors"), steps=2))
    after = VLAPolicy.load(tmp_path / "run" / "model.safetensors")
    assert torch.equal(after.normalizer.action_low, policy.normalizer.action_low)
    first = json.loads((tmp_path / "run" / "log.jsonl").read_text().splitlines()[0])
    assert first["step"] == 1 and first["lr"] == pytest.approx(SMOKE.lr * 0.5)


def test_what_the_initial_policy_has_seen_is_not_held_out(demos, tmp_path):
    train_sft.main(config(demos, tmp_path / "base", steps=1))
    before, init = read_header(tmp_path / "base").extra, str(tmp_path / "base")
    assert len(before["train_episodes"]) > 1 and before["held_out_episodes"]
    episodes = load_episodes(str(demos))
    other = [e for e in episodes if e.name in before["train_episodes"][:1]]
    own = [e for e in episodes if e.name in before["held_out_episodes"]]
    seen = train_sft.seen_episodes(init)
    train, held_out = train_sft.without_seen([], own + other, seen, init)
    assert [e.name for e in train] == [e.name for e in other] and held_out == own
    with pytest.raises(ValueError, match="was trained on all 1 episodes that this run would hold out"):
        train_sft.without_seen(own, other, seen, init)
    twin = replace(own[0], name="again", start=other[0].name)  # began where one that was seen did
    grouped = [replace(other[0], start=other[0].name)]
    assert train_sft.without_seen(grouped, [twin, *own], seen, init) == ([*grouped, twin], own)
    train_sft.main(config(demos, tmp_path / "on", init=init, validation_fraction=0.5, steps=1))
    after = read_header(tmp_path / "on").extra
    assert not set(before["train_episodes"]) & set(after["held_out_episodes"])
    assert set(after["seen_episodes"]) == {*before["train_episodes"], *after["train_episodes"]}
    header = {**before, "train_episodes": [], "seen_episodes": before["train_episodes"]}  # of a run two before
    VLAPolicy.load(init).save(tmp_path / "later.safetensors", header)
    assert train_sft.seen_episodes(str(tmp_path / "later.safetensors")) == seen
    assert after["episode_digests"] == before["episode_digests"]
    digests = {seen[0]: "of before", "robot/pour/demo_0": "of others"}
    VLAPolicy.load(init).save(tmp_path / "anew.safetensors", {**before, "episode_digests": digests})
    anew = config(demos, tmp_path / "two", init=str(tmp_path / "anew.safetensors"), validation_fraction=0.5, steps=1)
    with pytest.warns(UserWarning, match=f"policy .*anew.safetensors knows 1 of 6 episodes by name, first {seen[0]}"):
        train_sft.main(anew)
    assert read_header(tmp_path / "two").extra["episode_digests"] == {**digests, **before["episode_digests"]}


def test_init_of_other_images(demos, tmp_path):
    """Turned ones are refused; another camera may be meant, and is what the policy sees from then on."""
    train_sft.main(config(demos, tmp_path / "base", steps=1))
    policy, facts = VLAPolicy.load(tmp_path / "base"), read_header(tmp_path / "base").extra
    turned, init = np.array(facts["mean_frame"])[::-1, ::-1].tolist(), str(tmp_path / "init.safetensors")
    policy.save(init, {**facts, "mean_frame": turned})
    with pytest.raises(ValueError, match="look like those of policy .* turned by 180 degrees .*convert SRC DST --turn"):
        train_sft.main(config(demos, tmp_path / "run", init=init))
    assert not (tmp_path / "run").exists()
    policy.cfg = replace(policy.cfg, cameras=("wrist",))
    policy.save(init, {**facts, "camera": "wrist"})
    with pytest.warns(
        UserWarning, match="other images: policy .* has camera 'wrist', the demonstrations .* 'agentview'"
    ):
        train_sft.main(config(demos, tmp_path / "run", init=init, steps=1))
    assert VLAPolicy.load(tmp_path / "run").cfg.cameras == ("agentview",)


def test_a_policy_of_several_cameras_is_refused(demos, tmp_path):
    size = POLICIES["smoke"]
    vlm = replace(size.vlm, num_cameras=2)
    policy = VLAPolicy(replace(size, vlm=vlm, cameras=("agentview", "eye_in_hand")))
    policy.save(tmp_path / "two.safetensors")
    with pytest.raises(ValueError, match=r"sees 2 cameras \(agentview, eye_in_hand\), this script trains with one"):
        train_sft.main(config(demos, tmp_path / "run", init=str(tmp_path / "two.safetensors")))


def test_recomputed_activations_change_nothing(demos, tmp_path, capsys):
    options = {"lora_rank": 2}
    train_sft.main(config(demos, tmp_path / "kept", **options))
    train_sft.main(config(demos, tmp_path / "recomputed", checkpoint_activations=True, **options))
    assert_same(weights(tmp_path / "kept"), weights(tmp_path / "recomputed"))
    shown = capsys.readouterr().err
    assert shown.count("text: bytes, 259 tokens") == 2
    kept, recomputed = map(float, re.findall(r"estimated: [\d.]+ MiB \(.*activations ([\d.]+)\)", shown))
    assert recomputed < kept


def test_starts_from_public_weights(demos, tmp_path, monkeypatch):
    """A converted checkpoint trains: text by BPE, adapters, nothing of the parts that the features skip."""
    monkeypatch.setitem(POLICIES, "paper", PAPER)
    content = tokenizer_json().encode()
    torch.manual_seed(0)
    policy = VLAPolicy(public_policy_config(shift_context=False, text_bytes=len(content)))
    policy.vlm.fill_text(content)
    policy.save(tmp_path / "public.safetensors")
    cfg = replace(train_sft.PRESETS["paper"], demos=(str(demos),), out_dir=str(tmp_path / "run"), lora_rank=2, steps=2)
    cfg = replace(cfg, init=str(tmp_path / "public.safetensors"), batch_size=2, accumulate=2, validation_fraction=0.2)
    train_sft.main(cfg)
    after = VLAPolicy.load(tmp_path / "run" / "model.safetensors")
    assert after.normalizer.fitted and after.vlm.tokenizer.description.startswith("byte-level BPE")
    before, after = load_file(tmp_path / "public.safetensors"), weights(tmp_path / "run")
    changed = {k for k in after if not torch.equal(before[k], after[k]) and not k.startswith(("head.", "normalizer."))}
    assert {"vlm.action_queries.weight", "vlm.vision.blocks.0.attn.qkv.weight"} <= changed
    assert not [k for k in changed if "blocks.1." in k or "attn_pool" in k or k.endswith("bias")]
    # every parameter that trains has moments
    state = torch.load(tmp_path / "run" / "train_state.pt", weights_only=True)["optimizer"]
    assert len(state["state"]) == sum(len(group["params"]) for group in state["param_groups"])


def test_statistics_of_another_robot(demos, tmp_path):
    train_sft.main(config(demos, tmp_path / "base", steps=1))
    policy = VLAPolicy.load(tmp_path / "base" / "model.safetensors")
    policy.normalizer.proprio_low[2] += 50
    policy.normalizer.proprio_high[2] += 50
    policy.save(tmp_path / "other.safetensors")
    cfg = config(demos, tmp_path / "run", init=str(tmp_path / "other.safetensors"), steps=1)
    with pytest.raises(ValueError, match=r"another robot or other units: 100% of proprio 2 lie outside .*--refit-stat"):
        train_sft.main(cfg)
    train_sft.main(replace(cfg, out_dir=str(tmp_path / "refitted"), refit_statistics=True))
    refitted = VLAPolicy.load(tmp_path / "refitted" / "model.safetensors").normalizer
    assert refitted.proprio_high[2] < 10


def test_max_minutes_ends_a_run(demos, tmp_path):
    cfg = config(demos, tmp_path / "run", steps=100_000, max_minutes=0.02)
    train_sft.main(cfg)
    state = torch.load(tmp_path / "run" / "train_state.pt", weights_only=True)
    assert 1 <= state["step"] < 100_000 and state["minutes"] >= 0.02


def test_train_head_leaves_the_rest_alone(demos, tmp_path):
    init = tmp_path / "base" / "model.safetensors"
    train_sft.main(config(demos, tmp_path / "base"))
    changes = {"init": str(init), "steps": 1, "ema": None, "train": "head"}
    train_sft.main(config(demos, tmp_path / "run", key_batch=0, **changes))
    before, after = weights(tmp_path / "base"), weights(tmp_path / "run")
    changed = {k.split(".")[0] for k in after if not torch.equal(before[k], after[k])}
    assert changed == {"head"}
    with pytest.raises(ValueError, match=r"the 4 further images of --key-batch train nothing else"):
        config(demos, tmp_path / "more", key_batch=4, **changes)


def test_copies_of_the_exported_policy_are_kept(demos, tmp_path):
    folder = tmp_path / "run"
    train_sft.main(config(demos, folder, steps=5, save_interval=3, keep_interval=2, lora_rank=2))
    assert sorted(path.name for path in folder.glob("model_*")) == [
        "model_000002.safetensors",
        "model_000004.safetensors",
    ]
    last, kept = weights(folder), load_file(folder / "model_000004.safetensors")
    assert kept.keys() == last.keys()  # averaged, adapters merged: what eval_libero.py can play
    assert any(not torch.equal(kept[k], last[k]) for k in kept)
    assert [read_header(folder / f"model_{step:06d}.safetensors").extra["step"] for step in (2, 4)] == [2, 4]
    assert VLAPolicy.load(folder / "model_000002.safetensors").normalizer.fitted


def test_augmentation():
    images = torch.rand(3, 2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    off = Augmentation(crop=False, brightness=0, contrast=0, saturation=0, hue=0)

    def run(cfg: Augmentation, area: float = 1.0, given: torch.Tensor = images) -> torch.Tensor:
        return augment(given, cfg, crop_area=area, generator=torch.Generator().manual_seed(0))

    assert torch.equal(run(off), images)
    grey = images.mean(2, keepdim=True).expand_as(images)
    for cfg in (replace(off, hue=0.5), replace(off, saturation=0.5)):  # colour changes leave grey alone
        torch.testing.assert_close(run(cfg, given=grey), grey)
        assert not torch.allclose(run(cfg), images)
    # a third of a turn takes red to green
    red = torch.tensor([0.6, 0.0, 0.0]).view(1, 1, 3, 1, 1)
    generator = torch.Generator().manual_seed(0)
    draw = 2 * torch.rand(1, generator=generator).item() - 1
    turned = run(replace(off, hue=1 / 3 / draw), given=red)
    torch.testing.assert_close(turned.flatten(), torch.tensor([0.0, 0.6, 0.0]), atol=1e-6, rtol=0)
    scaled = run(replace(off, brightness=0.2)) / images
    assert scaled[scaled.isfinite()].min() >= 0.8 and scaled[0].std() < 1e-2 and scaled[0].mean() != scaled[1].mean()
    cropped = run(replace(off, crop=True), area=0.5)
    assert cropped.shape == images.shape and not torch.allclose(cropped, images)
    assert torch.equal(run(replace(off, crop=True)), images)
    assert run(replace(off, pixel_noise=0.1)).sub(images).std().item() == pytest.approx(0.09, abs=0.02)


def test_paper_preset_needs_weights_or_says_random(demos, tmp_path, monkeypatch):
    cfg = replace(train_sft.PRESETS["paper"], demos=(str(demos),), out_dir=str(tmp_path / "run"))
    with pytest.raises(ValueError, match=r"size 'paper' without --init .*--init CHECKPOINT .*--init random"):
        train_sft.main(cfg)
    assert not (tmp_path / "run").exists()
    assert (cfg.lr, cfg.batch_size, cfg.steps, cfg.lora_rank, LoRAConfig().alpha) == (1e-4, 16, 150_000, 64, 128)
    assert cfg.key_weight == 0 and cfg.lora_rank == LoRAConfig().rank
    monkeypatch.setitem(POLICIES, "paper", POLICIES["smoke"])
    policy = train_sft.build_policy(replace(cfg, init="random"), action_dim=5, proprio_dim=4)
    assert policy.cfg.flow.action_dim == 5 and policy.cfg.flow.proprio_dim == 4
    again = train_sft.build_policy(replace(SMOKE, init=None), action_dim=5, proprio_dim=4)
    assert torch.equal(policy.head.output.weight, again.head.output.weight)


def test_errors(demos, tmp_path):
    with pytest.raises(FileNotFoundError, match="no checkpoint at"):
        train_sft.main(config(demos, tmp_path / "a", init=str(tmp_path / "none.safetensors")))
    with pytest.raises(ValueError, match=r"batch_size 4 must be a multiple of accumulate x processes = 3"):
        train_sft.main(config(demos, tmp_path / "b", accumulate=3))
    with pytest.raises(FileNotFoundError, match="demonstrations"):
        train_sft.main(config(tmp_path / "nowhere", tmp_path / "c"))
    train_sft.main(config(demos, tmp_path / "d"))
    with pytest.raises(ValueError, match="another configuration: lr"):
        train_sft.main(config(demos, tmp_path / "d", lr=0.5))
