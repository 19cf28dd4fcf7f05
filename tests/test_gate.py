"""Trust gate: a world model that tells actions apart passes, one that does not stops the run."""

import dataclasses
import json

import pytest
import torch
from PIL import Image

import train_rft
from vlarft import gate
from vlarft.data import WindowSampler, load_episodes
from vlarft.gate import check_gate, held_out_names, trust_gate
from vlarft.policy import PolicyConfig, VLAPolicy
from vlarft.reward import make_scorer
from vlarft.run.checkpoint import load_model, save_model
from vlarft.sensitivity import Perturbations
from vlarft.world_model import Rollout, WorldModel, WorldModelConfig

SIZES = {"perturbed": Perturbations((0.05, 0.15, 0.4), 3, 0), "samples": 6}


@pytest.fixture()
def policy(policy_file):
    policy = VLAPolicy.load(policy_file)
    torch.manual_seed(0)
    policy.add_sigma_net()
    return policy.eval()


class Oracle:
    """A world model that paints the value of each action dim: R3 is then the action error itself."""

    def __init__(self, model, sign=1):
        self.action_bins, self.sign = model.action_bins, sign

    def rollout(self, context_frame, actions, **how):
        level = (actions + 1) / 2 if self.sign else torch.zeros_like(actions)
        frames = level[..., None, None, :].expand(*actions.shape[:3], 3, 8, 7).contiguous()
        return Rollout(torch.zeros(*actions.shape[:3], 1), frames, None)


@pytest.fixture()
def held_out(demos, policy_file):
    names = load_model(policy_file, VLAPolicy, PolicyConfig)[1]["held_out_episodes"]
    return WindowSampler(load_episodes(demos, names=names), 9, 8).spread(4)


def test_a_model_that_tells_actions_apart_passes_and_one_that_does_not_fails(policy, held_out, world_model_file):
    model = WorldModel.load(world_model_file)
    ask = (policy, held_out, 0)
    found = trust_gate(make_scorer("r3", Oracle(model)), *ask, **SIZES)
    assert found["gate"] == min(found["gate_dataset"], found["gate_policy"])
    assert found["gate_dataset"] > 0.999 and found["gate_policy"] > 0.999 and found["gate_policy_pairs"] > 0.999
    assert found["gate_policy_se"] < 1e-3
    assert found == trust_gate(make_scorer("r3", Oracle(model)), *ask, **SIZES, at_once=3)
    check_gate(found, 0.9, "r3")
    alone = trust_gate(make_scorer("r3", Oracle(model)), policy, held_out.rows(slice(0, 2)), 0, **SIZES)
    assert alone["gate_policy_se"] < 1e-3  # two starts of one episode
    with pytest.raises(RuntimeError, match="1.00 ± 0.00"):
        check_gate(alone, 1.1, "r3")

    blind = trust_gate(make_scorer("r3", Oracle(model, sign=0)), *ask, **SIZES)
    assert blind["gate"] == 0 and blind["gate_dataset_pairs"] == 0.5
    check_gate(blind, None, "r3")  # told to go on
    with pytest.raises(
        RuntimeError, match=r"reward r3 .* action error with Spearman 0.00 ± 0.00 .* around .* 0.9\. Train"
    ):
        check_gate(blind, 0.9, "r3")
    with pytest.raises(RuntimeError, match="or go on with --gate-threshold none"):
        check_gate(dict.fromkeys(found, float("nan")), 0.25, "r3")
    unsure = {**blind, "gate_policy": 0.5, "gate_policy_se": 0.1, "gate_dataset": 0.1, "gate_dataset_se": 0.08}
    with pytest.warns(UserWarning, match=r"0.10 ± 0.08 .* 0.25, by less than chance may do: hold out more episodes"):
        check_gate({**unsure, "gate": 0.1}, 0.25, "r3")  # 0.257 is not below
    single = {"gate_policy_se": float("nan"), "gate_dataset_se": float("nan"), "gate": 0.1}
    with pytest.warns(UserWarning, match=r"0.10 ± nan .* by less than chance may do"):
        check_gate({**unsure, **single}, 0.25, "r3")
    with pytest.raises(RuntimeError, match=r"0.10 ± 0.07"):
        check_gate({**unsure, "gate": 0.1, "gate_dataset_se": 0.07}, 0.25, "r3")


def test_its_error_is_over_the_episodes_of_the_starts(policy, held_out, world_model_file, monkeypatch):
    asked, measure = [], gate.agreement
    monkeypatch.setattr(gate, "agreement", lambda *words: asked.append(words[3:]) or measure(*words))
    trust_gate(make_scorer("r3", Oracle(WorldModel.load(world_model_file))), policy, held_out, 0, **SIZES)
    (of,) = asked[0]
    assert of.tolist() == held_out.index[:, 0].tolist() and 1 < len(of.unique()) < len(of)


def test_true_error_decides_where_there_is_one(policy, held_out, world_model_file):
    model = WorldModel.load(world_model_file)

    def true_reward(batch, actions, generator):
        """The reverse of the action error among the policy's own chunks, which come last."""
        error = (actions - batch.intended[:, None]).abs().mean(3)  # (S, P, T)
        error[:, -SIZES["samples"] :] *= -1
        return -error

    score = make_scorer("r3", Oracle(model))
    found = trust_gate(score, policy, held_out, 0, true_reward=true_reward, **SIZES)
    assert found["gate_dataset_true"] > 0.999 and found["gate_policy"] > 0.999
    assert found["gate"] == found["gate_policy_true"] < -0.999
    with pytest.raises(
        RuntimeError, match="by their true error with Spearman 1.00 ± 0.00 .* -1.00 ± 0.00 among chunks sampled"
    ):
        check_gate(found, 0.25, "r3")


def test_held_out_names():
    policy = {"held_out_episodes": ["a", "b"]}
    assert held_out_names("p", policy, "w", {"train_episodes": ["a", "c"]}) == ["b"]
    assert held_out_names("p", policy, "w", {}) == ["a", "b"]
    with pytest.raises(
        ValueError, match=r"saw the evaluation split: w was trained on 3 episodes, among them all 2 that p"
    ):
        held_out_names("p", policy, "w", {"train_episodes": ["a", "b", "c"]})
    with pytest.raises(ValueError, match="p names no held-out episodes"):
        held_out_names("p", {}, "w", {})


def test_the_run_stops_before_it_changes_anything(rft_config, world_model_file, tmp_path):
    stop = dataclasses.replace(rft_config, gate_threshold=1.0, steps=1)
    with pytest.raises(RuntimeError, match="trust gate: on held-out starts reward r3"):
        train_rft.main(stop)
    assert not (tmp_path / "rft" / "model.safetensors").exists()
    train_rft.main(dataclasses.replace(stop, gate_threshold=None))  # the same folder: nothing but leave to go on
    row = json.loads((tmp_path / "rft" / "log.jsonl").read_text())
    assert {"gate", "gate_dataset", "gate_policy", "reward_mean_action", "error_x", "std_gripper"} <= set(row)
    with Image.open(tmp_path / "rft" / "actions.png") as image:
        assert image.size == (720, 240)

    model, extra = load_model(world_model_file, WorldModel, WorldModelConfig)
    names = [e.name for e in load_episodes(rft_config.demos)]
    save_model(tmp_path / "saw.safetensors", model, model.cfg, {**extra, "train_episodes": names})
    with pytest.raises(
        ValueError, match="the world model saw the evaluation split: .*saw.safetensors was trained on 6"
    ):
        train_rft.main(
            dataclasses.replace(stop, world_model=str(tmp_path / "saw.safetensors"), out_dir=str(tmp_path / "x"))
        )


@pytest.mark.parametrize("changes", [{"perturbed": Perturbations((0.1,), 1, 0)}, {"samples": 2}])
def test_too_few_chunks_have_no_ranking(changes, policy, held_out, world_model_file):
    model = WorldModel.load(world_model_file)
    with pytest.raises(ValueError, match=r"[12] (perturbed chunks|samples of the policy) per start; a ranking needs"):
        trust_gate(make_scorer("r3", model), policy, held_out, 0, **{**SIZES, **changes})
