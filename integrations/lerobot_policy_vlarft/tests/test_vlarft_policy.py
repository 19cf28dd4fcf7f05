"""The plugin in lerobot itself: loading, chunks, lerobot-eval, lerobot-train, and what it refuses."""

import dataclasses
import importlib.metadata
import json
import os
import re
import shutil
import subprocess
import sys
import warnings

import numpy as np
import pytest

pytest.importorskip("lerobot", reason="lerobot is not installed: pip install 'lerobot[training,evaluation]>=0.6.1'")
pytest.importorskip(
    "lerobot_policy_vlarft", reason="the lerobot plugin is not installed: pip install -e .", exc_type=ImportError
)

import torch
from lerobot.configs import FeatureType, NormalizationMode, PolicyFeature, PreTrainedConfig
from lerobot.envs import preprocess_observation
from lerobot.policies import get_policy_class, make_policy_config, make_pre_post_processors
from lerobot.utils.import_utils import register_third_party_plugins
from lerobot_policy_vlarft import VlarftConfig, VlarftEnv, VlarftPolicy, make_vlarft_pre_post_processors
from lerobot_policy_vlarft.__main__ import main as export

from vlarft.data.episode import Episode
from vlarft.data.lerobot_writer import write_lerobot
from vlarft.policy import PRESETS, VLAPolicy
from vlarft.run.checkpoint import read_header

TASKS = ["pick up the red block", "open the drawer", "go"]
FLAGS = ["--policy.type=vlarft", "--policy.device=cpu"]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run folder of vlarft with an untrained policy of smoke size; config.json is that of a script."""
    folder = tmp_path_factory.mktemp("runs") / "sft"
    folder.mkdir()
    torch.manual_seed(0)
    policy = VLAPolicy(PRESETS["smoke"])
    actions = torch.rand(100, 7) * 2 - 1
    actions[:, 6] = actions[:, 6].sign()
    policy.normalizer.fit(actions, torch.randn(100, 8))
    torch.nn.init.normal_(policy.head.output.weight, std=0.5)  # zero at the start
    policy.save(folder / "model.safetensors", {"train_episodes": ["a"], "held_out_episodes": ["b"]})
    (folder / "config.json").write_text(json.dumps({"steps": 4, "demos": ["demos"]}))
    return folder


def observations(rows=3, size=(64, 64)):
    rng = np.random.default_rng(rows)
    images = rng.integers(0, 256, (rows, *size, 3), dtype=np.uint8)
    state = rng.normal(size=(rows, 8)).astype(np.float32)
    batch = preprocess_observation({"pixels": {"agentview": images}, "agent_pos": state})
    ours = [{"agentview": i, "proprio": s, "instruction": t} for i, s, t in zip(images, state, TASKS)]
    return {**batch, "task": TASKS[:rows]}, ours


def loaded(place, **options):
    policy = VlarftPolicy.from_pretrained(place, config=VlarftConfig(device="cpu", **options) if options else None)
    return policy, *make_pre_post_processors(policy.config)


def test_lerobot_finds_the_plugin():
    register_third_party_plugins()
    assert get_policy_class("vlarft") is VlarftPolicy
    assert isinstance(make_policy_config("vlarft"), VlarftConfig)
    assert importlib.metadata.metadata("lerobot_policy_vlarft")["Name"].startswith("lerobot_policy_")


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("size", [(64, 64), (96, 128)])
@pytest.mark.parametrize("kind", ["run folder", "file", "weights alone", "exported"])
def test_the_chunk_is_that_of_act(run, tmp_path, kind, rows, size, monkeypatch):
    place = {"run folder": run, "file": run / "model.safetensors"}.get(kind, tmp_path / "folder")
    if kind == "weights alone":
        place.mkdir()
        shutil.copy(run / "model.safetensors", place)
    if kind == "exported":
        monkeypatch.setattr(sys, "argv", ["export", str(run), str(place)])
        export()
    policy, pre, post = loaded(place)
    batch, ours = observations(rows, size)
    noise = torch.randn(rows, 8, 7)
    model = VLAPolicy.load(run)
    expected = model.act(ours, noise=noise)
    assert torch.equal(post(policy.predict_action_chunk(pre(batch), noise=noise)), expected)
    played = [post(policy.select_action(pre(batch), noise=noise)) for _ in range(8)]
    assert torch.equal(torch.stack(played, 1), expected)
    torch.manual_seed(5)
    sampled = policy.predict_action_chunk(pre(batch))
    torch.manual_seed(5)
    assert torch.equal(sampled, model.act(ours))


def test_one_observation_without_batch(run):
    """As lerobot's robots give it: the processor adds the batch."""
    policy, pre, _ = loaded(run)
    batch, ours = observations(1)
    single = {k: v[0] for k, v in batch.items()}
    noise = torch.randn(1, 8, 7)
    assert torch.equal(policy.predict_action_chunk(pre(single), noise), VLAPolicy.load(run).act(ours, noise=noise))


def test_options_of_playing(run):
    batch, ours = observations()
    policy, pre, _ = loaded(run, noise="zero", n_action_steps=2, num_flow_steps=3)
    model = VLAPolicy.load(run)
    first = model.act(ours, noise=torch.zeros(3, 8, 7), num_steps=3)
    assert torch.equal(policy.predict_action_chunk(pre(batch)), first)
    other, others = dict(batch, task=["fold it"] * 3), [{**o, "instruction": "fold it"} for o in ours]
    second = model.act(others, noise=torch.zeros(3, 8, 7), num_steps=3)
    assert not torch.equal(first, second)
    played = [policy.select_action(pre(b)) for b in (batch, other, other)]  # a new chunk after two
    assert torch.equal(torch.stack(played), torch.stack([first[:, 0], first[:, 1], second[:, 0]]))
    policy.reset()
    assert torch.equal(policy.select_action(pre(batch)), first[:, 0])
    with pytest.raises(ValueError, match=r"batch: 1 observations, the chunk in play is of 3: call reset\(\)"):
        policy.select_action(pre(observations(1)[0]))
    with pytest.raises(ValueError, match=r"noise: got shape \(3, 8, 6\), expected \(3, 8, 7\)"):
        policy.predict_action_chunk(pre(batch), noise=torch.zeros(3, 8, 6))
    with pytest.raises(ValueError, match="no observation.images.agentview"):
        policy.predict_action_chunk({k: v for k, v in batch.items() if "image" not in k})


def test_two_cameras(tmp_path):
    cfg = PRESETS["smoke"]
    vlm = dataclasses.replace(cfg.vlm, num_cameras=2)
    model = VLAPolicy(dataclasses.replace(cfg, vlm=vlm, cameras=("agentview", "eye_in_hand")))
    torch.nn.init.normal_(model.head.output.weight, std=0.5)
    model.normalizer.fitted.fill_(True)
    model.save(tmp_path / "model.safetensors")
    policy, pre, _ = loaded(tmp_path / "model.safetensors")
    rng = np.random.default_rng(0)
    views = [rng.integers(0, 256, (2, *size, 3), dtype=np.uint8) for size in ((64, 64), (48, 80))]
    state, noise = np.zeros((2, 8), np.float32), torch.randn(2, 8, 7)
    batch = preprocess_observation({"pixels": {"image2": views[1], "image": views[0]}, "agent_pos": state})
    ours = [{"agentview": a, "eye_in_hand": b, "proprio": s, "instruction": "go"} for a, b, s in zip(*views, state)]
    played = policy.predict_action_chunk(pre({**batch, "task": ["go"] * 2}), noise)
    assert torch.equal(played, VLAPolicy.load(tmp_path / "model.safetensors").act(ours, noise=noise))


def test_saved_folders_are_lerobots_and_vlarfts(run, tmp_path):
    policy = VlarftPolicy(VlarftConfig(device="cpu", checkpoint=str(run), noise="zero", train="head"))
    decayed, others = (group["params"] for group in policy.get_optim_params())
    head = list(policy.model.head.parameters())
    assert len(decayed) + len(others) == len(head) and {p.ndim > 1 for p in decayed} == {True}
    policy.save_pretrained(tmp_path / "saved")
    config = PreTrainedConfig.from_pretrained(tmp_path / "saved")
    assert (config.noise, config.train, config.checkpoint) == ("zero", "head", None)
    assert config.input_features["observation.state"].shape == (8,) and config.output_features["action"].shape == (7,)
    assert config.input_features["observation.images.agentview"].shape == (3, 64, 64)
    assert read_header(tmp_path / "saved") == read_header(run)
    weights, again = VLAPolicy.load(run).state_dict(), VLAPolicy.load(tmp_path / "saved").state_dict()
    assert all(torch.equal(weights[k], again[k]) for k in weights)
    whole = {k: v + 1 if v.is_floating_point() else v for k, v in policy.state_dict().items()}  # of a sharded run
    policy.save_pretrained(tmp_path / "whole", state_dict=whole)
    assert torch.equal(VLAPolicy.load(tmp_path / "whole").head.output.weight, policy.model.head.output.weight + 1)


def test_folder_of_save_pretrained_plays(run, tmp_path):
    """The config.json that vlarft writes for the Hub has no type, and is passed over."""
    VLAPolicy.load(run).save_pretrained(tmp_path)
    assert "type" not in json.loads((tmp_path / "config.json").read_text())
    chunks = []
    for place in (run, tmp_path):
        policy, pre, _ = loaded(place)
        chunks.append(policy.predict_action_chunk(pre(observations()[0]), torch.zeros(3, 8, 7)))
    assert torch.equal(*chunks)


def test_processors_do_not_normalise(run):
    policy, pre, post = loaded(run)
    pre_stats, _ = make_vlarft_pre_post_processors(policy.config, {"observation.state": {"mean": [9.0] * 8}})
    batch, _ = observations()
    for pipeline in (pre, pre_stats):
        out = pipeline(batch)
        assert all(torch.equal(out[k], batch[k]) for k in batch if k.startswith("observation"))
    actions = torch.randn(3, 7)
    assert torch.equal(post(actions), actions)
    with pytest.raises(ValueError, match=r"normalization_mapping has \{'STATE': .*normalised twice"):
        VlarftConfig(device="cpu", normalization_mapping={"STATE": NormalizationMode.MEAN_STD})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"noise": "none"}, r"policy.noise is 'none', expected one of \('sampled', 'zero', 'gripper'\)"),
        ({"size": "huge"}, "policy.size is 'huge', expected one of"),
        ({"train": "vlm"}, "policy.train is 'vlm', expected one of"),
        ({"size": "tiny", "checkpoint": "x"}, "policy.checkpoint x and policy.size tiny: give one of them"),
        ({"num_flow_steps": 0}, "policy.num_flow_steps is 0, expected 1 or more"),
        ({"n_action_steps": 9}, "policy.n_action_steps is 9, expected 1 to 8"),
        ({"n_obs_steps": 2}, "policy.n_obs_steps is 2: the policy sees one frame"),
    ],
)
def test_bad_options_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        VlarftConfig(device="cpu", **options)


def features(**shapes):
    kinds = {"observation.state": FeatureType.STATE, "action": FeatureType.ACTION}
    return {k.replace("__", "."): PolicyFeature(kinds.get(k, FeatureType.VISUAL), s) for k, s in shapes.items()}


def test_another_robot_is_refused(run):
    image, state = {"observation.images.image": (3, 64, 64)}, {"observation.state": (8,)}
    for inputs, outputs, message in (
        (
            {**image, "observation.state": (6,)},
            {},
            r"observation.state has shape \(6,\), .* takes \(8,\): another robot",
        ),
        ({**image, **state}, {"action": (6,)}, r"action has shape \(6,\), .* takes \(7,\): another robot's\?"),
        ({"observation.images.top": (3, 64, 64), **state}, {}, "no observation.images.agentview, .*--rename_map"),
        (state, {}, "input_features observation.state: none is an image"),
        (image, {}, "input_features observation.images.image: no observation.state"),
        ({}, {"observation.images.image": (3, 1, 1)}, "output_features .*: no action of type ACTION"),
    ):
        config = VlarftConfig(device="cpu", input_features=features(**inputs), output_features=features(**outputs))
        with pytest.raises(ValueError, match=message):
            VlarftPolicy.from_pretrained(run, config=config)
    with pytest.raises(ValueError, match="policy.chunk_size is 16, .*sft.* has chunks of 8 steps"):
        loaded(run, chunk_size=16)


def test_places_without_a_policy_are_named(run, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(FileNotFoundError, match=r"no vlarft policy at /no/such/run: neither a run folder, nor"):
        VlarftPolicy.from_pretrained("/no/such/run")
    with pytest.raises(FileNotFoundError, match="no checkpoint at .*; give a run folder or its model.safetensors"):
        VlarftPolicy.from_pretrained(tmp_path)
    with pytest.raises(FileNotFoundError, match="no checkpoint at /no/such/run"):
        VlarftPolicy(VlarftConfig(device="cpu", checkpoint="/no/such/run"))
    with pytest.raises(ValueError, match="a vlarft policy needs weights: give --policy.checkpoint RUN"):
        VlarftPolicy(VlarftConfig(device="cpu"))
    with pytest.raises(ValueError, match="policy.size smoke makes a new policy for lerobot-train; else give"):
        VlarftPolicy(VlarftConfig(device="cpu", size="smoke"))
    shutil.copy(run / "model.safetensors", tmp_path)
    make_policy_config("act", device="cpu")._save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"config.json is of a policy of type act, expected vlarft"):
        VlarftPolicy.from_pretrained(tmp_path)


def test_export_ends_a_mistake_in_one_line(run, tmp_path):
    for arguments, message in (
        ([str(run), str(tmp_path)], f"ERROR: {tmp_path} exists; remove it, or give another folder"),
        (
            [str(tmp_path / "no"), str(tmp_path / "x")],
            f"ERROR: no vlarft policy at {tmp_path / 'no'}: neither a run folder, nor a model.safetensors, nor a "
            r"repository of the Hub with one \(.*\) \(--debug shows where\)",
        ),
        ([str(run)], r"ERROR: the following arguments are required: folder \(--help lists what there is\)"),
    ):
        command = [sys.executable, "-m", "lerobot_policy_vlarft", *arguments]
        done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "HF_HUB_OFFLINE": "1"})
        assert done.returncode == 2 and re.fullmatch(message, done.stderr.splitlines()[-1]), done.stderr
        assert "Traceback" not in done.stderr
    debug = subprocess.run([*command, str(tmp_path), "--debug"], capture_output=True, text=True)
    assert debug.returncode == 1 and "Traceback" in debug.stderr and "FileExistsError" in debug.stderr


def test_an_export_that_fails_leaves_nothing(run, tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["export", str(run), str(tmp_path / "folder")])
    with monkeypatch.context() as patch:
        patch.setattr("lerobot_policy_vlarft.__main__.make_vlarft_pre_post_processors", lambda _: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            export()
    assert not list(tmp_path.iterdir())
    export()
    assert (tmp_path / "folder/policy_preprocessor.json").is_file()


# lerobot-train and lerobot-eval


def write_set(root, low=-1.0, gripper=(-1, 1), camera="agentview", extra=None, kinds=("expert",) * 3):
    """A LeRobot set of 3 episodes of a robot with LIBERO's dimensions."""
    rng = np.random.default_rng(0)

    def episode(i):
        actions = rng.uniform(low, -low, (14, 7)).astype(np.float32)
        actions[:, 6] = np.where(np.arange(14) < 7, *gripper)
        images = rng.integers(0, 256, (14, 64, 64, 3), dtype=np.uint8)
        proprio = rng.normal(size=(14, 8)).astype(np.float32)
        intended = actions if extra is None else actions * extra
        about = {"cameras": {camera: images}, "kind": kinds[i]}
        return Episode(f"s/{i}", TASKS[i], images, proprio, actions, intended, **about)

    write_lerobot(root, (episode(i) for i in range(3)), 10, images="png")
    info = json.loads((root / "meta/info.json").read_text())
    info["features"]["action"]["names"] = ["x", "y", "z", "rx", "ry", "rz", "gripper"]
    (root / "meta/info.json").write_text(json.dumps(info))
    return root


def train(monkeypatch, root, out, *flags):
    from lerobot.scripts.lerobot_train import main

    data = ["--dataset.repo_id=someone/set", f"--dataset.root={root}"]
    run = ["--steps=2", "--batch_size=4", "--num_workers=0", "--log_freq=1", f"--output_dir={out}"]
    # log_freq 1: every loss is looked at
    flags = ["lerobot-train", *data, *run, "--policy.push_to_hub=false", *flags]
    monkeypatch.setattr(sys, "argv", flags)
    main()
    return out / "checkpoints" / "last" / "pretrained_model"


def test_lerobot_trains_a_new_policy_and_goes_on(tmp_path, monkeypatch):
    root = write_set(tmp_path / "set")
    saved = train(monkeypatch, root, tmp_path / "new", *FLAGS, "--policy.size=smoke")
    model = VLAPolicy.load(saved)
    actions = np.concatenate(list(_column(root, "action")))
    torch.testing.assert_close(
        model.normalizer.action_high,
        torch.from_numpy(np.quantile(actions[:, :6], 0.99, axis=0)).float(),
        atol=0.15,
        rtol=0,
    )
    assert model.cfg.cameras == ("image",) and model.cfg.gripper_dims == (6,)  # the converter's name of agentview
    assert read_header(saved).extra == {"lerobot": {"dataset": "someone/set"}}
    more = train(monkeypatch, root, tmp_path / "more", f"--policy.path={saved}", "--policy.train=head")
    other = VLAPolicy.load(more)
    same = {k: torch.equal(v, other.state_dict()[k]) for k, v in model.state_dict().items()}
    assert all(
        kept == (not name.startswith("head.")) or "sigma" in name for name, kept in same.items() if "weight" in name
    )


def _column(root, name):
    import pyarrow.parquet as pq

    for file in sorted((root / "data").rglob("*.parquet")):
        yield np.stack(pq.read_table(file)[name].to_pylist())


def test_the_loss_is_vlarfts(run, tmp_path):
    from lerobot.datasets.lerobot_dataset import LeRobotDataset

    from vlarft.data import WindowSampler, load_episodes

    root = write_set(tmp_path / "set")
    policy, pre, _ = loaded(run)
    policy.train()
    data = LeRobotDataset("someone/set", root=root, delta_timestamps={"action": [i / 10 for i in range(8)]})
    rows = [0, 11, 27, 41]  # the second and the fourth reach beyond the end of their episodes
    batch = torch.utils.data.default_collate([data[i] for i in rows])
    windows = WindowSampler(load_episodes(root), num_frames=1, chunk=8)
    ours = windows.windows(np.array([[i // 14, i % 14] for i in rows]))
    torch.manual_seed(3)
    loss, metrics = policy.forward(pre(batch))
    model = VLAPolicy.load(run).train()
    torch.manual_seed(3)
    expected, terms = model(model.preprocess(ours.frames), ours.instructions, ours.proprio, ours.actions)
    assert loss.item() == expected.item() and metrics == {"flow_mse": float(terms["flow_mse"])}
    loss.backward()
    assert policy.model.head.output.weight.grad.abs().sum() > 0
    with pytest.raises(ValueError, match="reduction 'none': the loss is a mean"):
        policy.forward(pre(batch), reduction="none")


def test_data_that_do_not_fit_are_refused(run, tmp_path, monkeypatch):
    hundred = write_set(tmp_path / "hundred", gripper=(100, 0))
    new = [*FLAGS, "--policy.size=smoke"]
    with pytest.raises(ValueError, match=r"info.json: the gripper \(action dimension 6\) lies in \[0, 100\].*convert"):
        train(monkeypatch, hundred, tmp_path / "a", *new)
    half = write_set(tmp_path / "half", gripper=(-0.4, 0.4))
    with pytest.raises(ValueError, match=r"lies in \[-0.4, 0.4\], expected the commands -1"):
        train(monkeypatch, half, tmp_path / "b", *new)
    stats = json.loads((half / "meta/stats.json").read_text())
    stats["action"] = {k: v for k, v in stats["action"].items() if not k.startswith("q")}
    (half / "meta/stats.json").write_text(json.dumps(stats))
    with pytest.raises(ValueError, match=r"meta/stats.json has no q01 and q99 of action, the ranges"):
        train(monkeypatch, half, tmp_path / "c", *new)
    tuned = [*FLAGS, f"--policy.checkpoint={run}"]
    for name, gripper in (("zero_one", (0, 1)), ("hundreds", (100, 0))):
        with pytest.raises(ValueError, match=r"the gripper \(action dimension 6\) lies in .*expected the commands -1"):
            train(monkeypatch, write_set(tmp_path / name, gripper=gripper), tmp_path / "g", *tuned)
    other = write_set(tmp_path / "other")
    info = json.loads((other / "meta/info.json").read_text())
    info["features"]["action"]["names"] = ["gripper", "x", "y", "z", "rx", "ry", "rz"]
    info.pop("vlarft", None)
    (other / "meta/info.json").write_text(json.dumps(info))
    with pytest.raises(ValueError, match=r"has the gripper dimensions \[0\], the policy \[6\]: another robot"):
        train(monkeypatch, other, tmp_path / "g", *tuned)
    wide = write_set(tmp_path / "wide")
    stats = json.loads((wide / "meta/stats.json").read_text())
    stats["action"]["q50"][1] = 30.0
    (wide / "meta/stats.json").write_text(json.dumps(stats))
    with pytest.raises(ValueError, match=r"action: the data set's median of dimension 1, 30, lies outside \[-0.9"):
        train(monkeypatch, wide, tmp_path / "d", *tuned)
    model = VLAPolicy.load(run)
    model.normalizer.action_low[2] = model.normalizer.action_high[2] = 0.25
    model.save(tmp_path / "still.safetensors")
    still = [*FLAGS, f"--policy.checkpoint={tmp_path / 'still.safetensors'}"]
    with pytest.raises(ValueError, match=r"action: dimension 2 moves in the data set and is always 0.25 by the pol"):
        train(monkeypatch, write_set(tmp_path / "moves"), tmp_path / "f", *still)
    with pytest.warns(UserWarning, match="someone/set has intended_action, .*train_sft.py is better"):
        train(monkeypatch, write_set(tmp_path / "noisy", extra=0.9), tmp_path / "e", *tuned)


@pytest.mark.parametrize("name", ["median", "mean"])
def test_units_are_told_by_the_median_or_else_the_mean(run, tmp_path, name):
    from lerobot.datasets import LeRobotDatasetMetadata

    meta = LeRobotDatasetMetadata("someone/set", write_set(tmp_path / "set"))
    config, actions = VlarftConfig(device="cpu", checkpoint=str(run)), meta.stats["action"]
    if name == "mean":
        del actions["q50"]
    VlarftPolicy(config, meta.stats, meta)
    actions["q50" if name == "median" else name][1] = 30.0
    with pytest.raises(ValueError, match=rf"action: the data set's {name} of dimension 1, 30, lies outside \[-0.9"):
        VlarftPolicy(config, meta.stats, meta)
    meta.stats["action"] = {k: v for k, v in actions.items() if k not in ("q50", "mean")}
    with pytest.raises(ValueError, match="action: the data set's statistics have neither q50 nor mean, which tell its"):
        VlarftPolicy(config, meta.stats, meta)


def test_attempts_that_would_be_imitated_are_named(run, tmp_path):
    from lerobot.datasets import LeRobotDatasetMetadata

    meta = LeRobotDatasetMetadata("someone/set", write_set(tmp_path / "set", kinds=("expert", "noisy", "expert")))
    with pytest.warns(UserWarning, match=r"1 of 3 episodes are failed, .*--dataset.episodes='\[0,2\]'"):
        VlarftPolicy(VlarftConfig(device="cpu", checkpoint=str(run)), meta.stats, meta)


@pytest.mark.parametrize("size", [64, 48])
def test_what_a_checkpoint_says_of_images_is_kept(run, tmp_path, size):
    from lerobot.datasets import LeRobotDatasetMetadata

    meta = LeRobotDatasetMetadata("someone/set", write_set(tmp_path / "set"))
    top = {"dtype": "image", "shape": (32, 32, 3), "names": ["height", "width", "channel"]}
    meta.features["observation.images.top"] = top  # a camera of another size, which the policy does not see
    images = {"camera": "agentview", "image_size": [size, size], "mean_frame": [[[0.5] * 3]]}
    facts = {**images, "train_episodes": ["a"], "instructions": ["go", "stop"]}
    VLAPolicy.load(run).save(tmp_path / "model.safetensors", facts)
    plain, *_ = loaded(tmp_path)
    assert plain.config.input_features["observation.images.agentview"].shape == (3, size, size) and plain.facts == facts
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        policy = VlarftPolicy(plain.config, meta.stats, meta, checkpoint=tmp_path)
    text = f"observation.images.image is of 64x64 pixels, {tmp_path} was trained on images of 48x48: resized ones look"
    assert [text in str(w.message) for w in caught if "pixels" in str(w.message)] == [True] * (size == 48)
    kept = {"instructions": sorted({*TASKS, "stop"}), "lerobot": {"dataset": "someone/set"}}
    assert policy.facts == (kept if size == 48 else {**images, **kept})


def test_the_environment_renders_the_cameras_that_are_asked_for(run, tmp_path):
    pytest.importorskip("mujoco", reason="the simulator of the lerobot test needs mujoco")
    policy = VLAPolicy.load(run)
    policy.cfg = dataclasses.replace(policy.cfg, cameras=("eye_in_hand",))
    policy.save(tmp_path / "model.safetensors")
    wrist, *_ = loaded(tmp_path)
    for cameras in (None, ["eye_in_hand"], ["agentview", "eye_in_hand"]):
        config = VlarftEnv(task="tabletop_object", task_ids=[0], cameras=cameras)
        names = cameras or ["agentview"]
        assert [key for key in config.features if key.startswith("pixels/")] == [f"pixels/{name}" for name in names]
        envs = config.create_envs(1)["tabletop_object"][0]
        seen, _ = envs.reset(seed=[0])
        batch = {**preprocess_observation(seen), "task": list(envs.call("task_description"))}
        assert set(config.features_map.values()) - {"action"} <= set(batch)
        if "eye_in_hand" in names:
            assert wrist.predict_action_chunk(batch).shape == (1, 8, 7)
        else:
            with pytest.raises(ValueError, match=r"render.*--env.cameras='\[eye_in_hand\]'"):
                wrist.predict_action_chunk(batch)
        envs.close()


@pytest.mark.parametrize("batch", [1, 2])
def test_lerobot_eval_plays_it(run, tmp_path, monkeypatch, batch):
    pytest.importorskip("mujoco", reason="the simulator of the lerobot test needs mujoco")
    from lerobot.scripts import lerobot_eval

    from vlarft.sim import make_env

    seen = []
    predict = VlarftPolicy.predict_action_chunk
    monkeypatch.setattr(VlarftPolicy, "predict_action_chunk", lambda *a: seen.append(predict(*a)) or seen[-1])
    out = tmp_path / "out"
    env = ["--env.type=vlarft", "--env.task=tabletop_object", "--env.task_ids=[1]"]
    evaluation = [f"--eval.batch_size={batch}", "--eval.n_episodes=2", "--seed=7", f"--output_dir={out}"]
    flags = ["lerobot-eval", *FLAGS, f"--policy.checkpoint={run}", "--policy.noise=zero", *env, *evaluation]
    monkeypatch.setattr(sys, "argv", flags)
    lerobot_eval.main()
    info = json.loads((out / "eval_info.json").read_text())
    assert info["overall"]["n_episodes"] == 2 and info["per_task"][0]["task_group"] == "tabletop_object"
    plain = make_env("tabletop_object", 1, 64)
    plain.reset(init_state=7)
    obs = {**plain.observe(), "instruction": plain.instruction}
    model = VLAPolicy.load(run)
    expected = model.act([obs] * batch, noise=torch.zeros(batch, 8, 7))[0]  # batches of other sizes round otherwise
    assert torch.allclose(seen[0][0], expected, atol=1e-5)
