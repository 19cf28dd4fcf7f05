"""Trust gate and diagnostics: a world model that tells actions apart passes, one that does not stops the run."""

import dataclasses
import json

import numpy as np
import pytest
import torch
from PIL import Image

import train_rft
from vlarft.data import WindowSampler, load_episodes
from vlarft.gate import check_gate, diagnose, held_out_names, trust_gate
from vlarft.policy import VLAPolicy
from vlarft.run.checkpoint import load_model, save_model
from vlarft.run.pictures import histograms
from vlarft.world_model import Rollout, WorldModel, WorldModelConfig

SMOKE = train_rft.PRESETS["smoke"]
CFG = dataclasses.replace(SMOKE, gate_starts=4, gate_draws=3, gate_samples=6, perceptual="none", reference="executed")


@pytest.fixture()
def config(demos, policy_file, world_model_file, tmp_path):
    places = {"policy": str(policy_file), "world_model": str(world_model_file), "demos": str(demos)}
    return dataclasses.replace(SMOKE, **places, out_dir=str(tmp_path / "rft"))


@pytest.fixture()
def policy(policy_file):
    policy = VLAPolicy.load(policy_file)
    torch.manual_seed(0)
    policy.make_stochastic("sigma_net")
    return policy.eval()


class Oracle:
    """A world model that paints the value of each action dim: R3 is then the action error itself."""

    def __init__(self, model, sign=1):
        self.action_bins, self.sign = model.action_bins, sign

    def rollout(self, context_frame, actions, **how):
        level = (actions + 1) / 2 if self.sign else torch.zeros_like(actions)
        frames = level[..., None, None, :].expand(*actions.shape[:3], 3, 8, 7).contiguous()
        return Rollout(torch.zeros(*actions.shape[:3], 1), frames)


def held_out_batch(demos, policy_file):
    names = load_model(policy_file, VLAPolicy, type(VLAPolicy.load(policy_file).cfg))[1]["validation_episodes"]
    episodes = load_episodes(demos, names=names)
    return WindowSampler(episodes, 9, 8).spread(4), episodes


def test_a_model_that_tells_actions_apart_passes_and_one_that_does_not_fails(
    policy, demos, policy_file, world_model_file
):
    model = WorldModel.load(world_model_file)
    batch, episodes = held_out_batch(demos, policy_file)
    found = trust_gate(CFG, CFG, policy, Oracle(model), batch, episodes, None, (0,))
    assert found["gate"] == min(found["gate_dataset"], found["gate_policy"])
    assert found["gate_dataset"] > 0.999 and found["gate_policy"] > 0.999 and found["gate_policy_pairs"] > 0.999
    assert found["gate_policy_se"] < 1e-3
    assert found == trust_gate(CFG, CFG, policy, Oracle(model), batch, episodes, None, (0,), at_once=4)
    check_gate(dataclasses.replace(CFG, gate_stop=True, gate_threshold=0.9), CFG, found, 0)

    blind = trust_gate(CFG, CFG, policy, Oracle(model, sign=0), batch, episodes, None, (0,))
    assert blind["gate"] == 0 and blind["gate_dataset_pairs"] == 0.5
    check_gate(CFG, CFG, blind, 0)  # told to go on
    stop = dataclasses.replace(CFG, gate_stop=True, gate_threshold=0.9)
    with pytest.raises(
        RuntimeError, match=r"gate at step 7: .* action error with Spearman 0.00 ± 0.00 .* around .* 0.9\. Train"
    ):
        check_gate(stop, CFG, blind, 7)
    with pytest.raises(RuntimeError, match="or go on with --no-gate-stop"):
        check_gate(stop, CFG, {**found, "gate": float("nan")}, 0)


class Simulator:
    """Outcomes whose true error is the reverse of the action error among the policy's own chunks."""

    def state_error(self, episode, start, chunks):
        error = torch.from_numpy(np.abs(chunks - chunks[:1]).mean(2)).double()  # (P, T)
        error[-CFG.gate_samples :] *= -1
        return error


def test_true_error_decides_where_there_is_one(policy, demos, policy_file, world_model_file):
    batch, episodes = held_out_batch(demos, policy_file)
    oracle = Oracle(WorldModel.load(world_model_file))
    found = trust_gate(CFG, CFG, policy, oracle, batch, episodes, None, (0,), Simulator())
    assert found["gate_dataset_true"] > 0.999 and found["gate_policy"] > 0.999
    assert found["gate"] == found["gate_policy_true"] < -0.999
    with pytest.raises(
        RuntimeError, match="by their true error with Spearman 1.00 ± 0.00 .* -1.00 ± 0.00 among the policy's own"
    ):
        check_gate(dataclasses.replace(CFG, gate_stop=True), CFG, found, 0)


def test_held_out_names():
    policy = {"validation_episodes": ["a", "b"]}
    assert held_out_names("p", policy, "w", {"train_episodes": ["a", "c"]}) == ["b"]
    assert held_out_names("p", policy, "w", {}) == ["a", "b"]
    with pytest.raises(
        ValueError, match=r"saw the evaluation split: w was trained on 3 episodes, among them all 2 that p"
    ):
        held_out_names("p", policy, "w", {"train_episodes": ["a", "b", "c"]})
    with pytest.raises(ValueError, match="p names no validation episodes"):
        held_out_names("p", {}, "w", {})


def test_the_run_stops_before_it_changes_anything(config, world_model_file, tmp_path):
    stop = dataclasses.replace(config, gate_stop=True, gate_threshold=1.0, steps=1)
    with pytest.raises(RuntimeError, match="trust gate at step 0"):
        train_rft.main(stop)
    assert not (tmp_path / "rft" / "model.safetensors").exists()
    train_rft.main(dataclasses.replace(stop, gate_stop=False))  # the same folder: nothing but leave to go on
    row = json.loads((tmp_path / "rft" / "log.jsonl").read_text())
    assert {"gate", "gate_dataset", "gate_policy", "reward_mean_action", "error_x", "error_gripper"} <= set(row)
    with Image.open(tmp_path / "rft" / "actions.png") as image:
        assert image.size == (720, 240)

    model, extra = load_model(world_model_file, WorldModel, WorldModelConfig)
    names = [e.name for e in load_episodes(config.demos)]
    save_model(tmp_path / "saw.safetensors", model, model.cfg, {**extra, "train_episodes": names})
    with pytest.raises(
        ValueError, match="the world model saw the evaluation split: .*saw.safetensors was trained on 6"
    ):
        train_rft.main(
            dataclasses.replace(stop, world_model=str(tmp_path / "saw.safetensors"), out_dir=str(tmp_path / "x"))
        )


@pytest.mark.parametrize("changes", [{"gate_noise": (0.1,), "gate_draws": 1}, {"gate_samples": 2}])
def test_one_chunk_has_no_order(changes, policy, demos, policy_file, world_model_file):
    batch, episodes = held_out_batch(demos, policy_file)
    with pytest.raises(ValueError, match=r"gate_(noise x gate_draws|samples) is [12]: an order needs at least 3"):
        model = WorldModel.load(world_model_file)
        trust_gate(dataclasses.replace(CFG, **changes), CFG, policy, model, batch, episodes, None, (0,))


def test_diagnosis_of_a_policy_that_knows(policy, demos, policy_file, world_model_file):
    batch, _ = held_out_batch(demos, policy_file)
    target = policy.normalizer.encode_actions(batch.actions)  # (S, T, A)

    def velocity(x, tau, cond, k):  # straight to the dataset's actions, 0.1 beside them in y
        goal = target.repeat_interleave(len(x) // len(target), 0).clone()
        goal[..., 1] += 0.1 * (goal[..., 1] < 0) - 0.1 * (goal[..., 1] >= 0)
        return (goal - x) / (1 - tau[:, None, None])

    policy.head.velocity = velocity
    oracle = Oracle(WorldModel.load(world_model_file))
    found, chunks = diagnose(CFG, policy, oracle, batch, None, (0,), draws=3)
    assert chunks.shape == (4, 3, 8, 7) and found["error_y"] == pytest.approx(0.1, abs=1e-3)
    assert found["error_x"] < 1e-3 and found["error_gripper"] < 1e-3
    assert max(found[f"spread_{name}"] for name in ("x", "y", "rz", "gripper")) < 1e-3  # one end, from every x_0
    # the oracle's frames show (a + 1) / 2 of 7 dims, of which y alone is off, by 0.1 of half its range
    half_range = ((policy.normalizer.action_high - policy.normalizer.action_low) / 2)[1].item()
    clipped = policy.normalizer.decode_actions(target)
    beyond = ((clipped - batch.actions).abs().mean() / 2).item()  # dataset actions outside the quantiles
    assert found["reward_mean_action"] == pytest.approx(-8 * 0.1 * half_range / 7 / 2, abs=8 * beyond + 1e-3)


def test_diagnosis_of_a_policy_that_does_not(policy, demos, policy_file, world_model_file):
    batch, _ = held_out_batch(demos, policy_file)
    policy.head.velocity = lambda x, tau, cond, k: torch.zeros_like(x)  # the chunk is x_0
    error = torch.tensor([0.1, 0.3])

    def simulator(index, chunks, dataset):  # a state error that tells one chunk from several
        return -error[int(chunks.shape[1] > 1)].expand(*chunks.shape[:3])

    oracle = Oracle(WorldModel.load(world_model_file))
    found, _ = diagnose(CFG, policy, oracle, batch, None, (0,), simulator, draws=200)
    assert found["spread_x"] == pytest.approx(1.0, abs=0.05) and found["spread_gripper"] == pytest.approx(1.0, abs=0.05)
    assert found["true_error"] == pytest.approx(0.3) and found["true_error_mean_action"] == pytest.approx(0.1)


def test_histograms():
    picture = histograms(
        {"x": {"a": torch.zeros(10), "b": torch.randn(100)}, "z": {"a": torch.ones(3)}}, size=(200, 120)
    )
    assert picture.shape == (120, 400, 3) and (picture[:, :200] != 255).any() and (picture[:, 200:] != 255).any()
