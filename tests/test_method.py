"""The method end to end, against hand-written equations: which values reach the networks, with which sign.

The demonstrations have other units in every dimension, ranges far from [-1, 1] that are not symmetric, and intended
actions that differ from the executed ones: a column, a unit or a kind of action in another's place changes a number
here. Most tests run a training script and watch the functions that it calls.
"""

import inspect
import json
import math
import sys
import types
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

import train_rft
import train_sft
import train_wm
from vlarft import diagnosis, flow, gate, metrics
from vlarft.data import Batch, WindowSampler, load_episodes
from vlarft.data.episodes import Episode
from vlarft.data.hdf5 import import_h5py, write_demo, write_task_attrs
from vlarft.nets.action_head import FlowConfig, FlowHead, SigmaNet
from vlarft.nets.dit import DiTConfig
from vlarft.nets.transformer import TransformerConfig
from vlarft.policy import PRESETS as POLICIES
from vlarft.policy import VLAPolicy
from vlarft.reward import action_reward
from vlarft.run.checkpoint import read_header, save_model
from vlarft.token_sampling import Sampling
from vlarft.tokenizer import PRESETS as TOKENIZERS
from vlarft.tokenizer import FrameTokenizer, TokenizerConfig
from vlarft.world_model import PRESETS as WORLD_MODELS
from vlarft.world_model import WorldModel, WorldModelConfig

CHUNK, STEPS, SIZE = 8, 12, 64
ACTION_RANGES = np.array([(-0.02, 0.05), (0.3, 0.9), (-3.0, -1.0), (2.0, 8.0), (-0.5, 0.1), (-40.0, -10.0)])
PROPRIO_RANGES = np.array(
    [(5.0, 9.0), (-0.3, -0.1), (0.0, 0.02), (-1.5, 2.0), (3.0, 3.1), (-9.0, 4.0), (0.2, 0.5), (20.0, 90.0)]
)


class World(NamedTuple):
    """Demonstrations, and a policy and models of smoke size with random weights that fit them."""

    demos: Path
    policy: Path
    world_model: Path
    tokenizer: Path


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> World:
    folder = tmp_path_factory.mktemp("world")
    rng = np.random.default_rng(0)
    low, high = ACTION_RANGES.T
    for colour in ("red", "blue"):
        path = folder / "demos" / "squares" / f"push_{colour}_demo.hdf5"
        path.parent.mkdir(parents=True, exist_ok=True)
        with import_h5py().File(path, "w") as file:
            data = file.create_group("data")
            write_task_attrs(data, f"push the {colour} square", {"suite": "squares"})
            for i in range(3):
                share = rng.uniform(0, 1, (STEPS, 6))
                gripper = np.where(np.arange(STEPS) < rng.integers(2, STEPS - 1), -1.0, 1.0)[:, None]
                executed = np.concatenate([low + share * (high - low), gripper], 1)
                intended = np.concatenate([low + (0.1 + 0.7 * share) * (high - low), -gripper[::-1]], 1)
                intended[:, :6] += 0.05 * rng.uniform(-1, 1, (STEPS, 6)) * (high - low)
                proprio = PROPRIO_RANGES[:, 0] + rng.uniform(0, 1, (STEPS, 8)) * np.ptp(PROPRIO_RANGES, 1)
                write_demo(
                    data,
                    i,
                    images={"agentview": rng.integers(0, 256, (STEPS, SIZE, SIZE, 3), dtype=np.uint8)},
                    actions=executed.astype(np.float32),
                    intended_actions=intended.astype(np.float32),
                    proprio=proprio.astype(np.float32),
                )
    episodes = load_episodes(folder / "demos")
    names = [e.name for e in episodes]
    split = {"train_episodes": names[:-2], "held_out_episodes": names[-2:], "validation_episodes": names[-2:]}

    torch.manual_seed(0)
    policy = VLAPolicy(replace(POLICIES["smoke"], crop_area=0.81))  # training has to crop as deployment does
    policy.normalizer.fit(of(episodes, "intended"), of(episodes, "proprio"))
    nn.init.normal_(policy.head.output.weight, std=0.1)  # zero at first, which hides what comes before
    policy.save(folder / "policy.safetensors", split)

    tokenizer = FrameTokenizer(TOKENIZERS["smoke"])
    model = WorldModel(WORLD_MODELS["smoke"])
    with torch.no_grad():
        tokenizer.quant_linear.weight.mul_(30)  # an untrained tokenizer gives the same token everywhere
        model.tokenizer.load_state_dict(tokenizer.state_dict())
        model.embed_values.weight.mul_(20)  # an untrained model hardly depends on its actions
    model.action_bins.set_range(of(episodes, "actions").amin(0), of(episodes, "actions").amax(0))
    save_model(folder / "tokenizer.safetensors", tokenizer, tokenizer.cfg, {"train_episodes": []})
    save_model(folder / "world_model.safetensors", model, model.cfg, {"train_episodes": [], "held_out_episodes": []})
    return World(folder / "demos", *(folder / f"{n}.safetensors" for n in ("policy", "world_model", "tokenizer")))


def of(episodes: list[Episode], column: str) -> Tensor:
    """All steps of a column of the episodes, raw."""
    return torch.from_numpy(np.concatenate([getattr(e, column) for e in episodes]))


def named(world: World, *names: str) -> list[Episode]:
    """The episodes that a checkpoint's header lists under one of these names."""
    extra = read_header(world.policy).extra
    return load_episodes(world.demos, names=next(extra[name] for name in names if name in extra))


def windows(episodes: list[Episode], column: str, padded: bool) -> Tensor:
    """(N, T, A) the actions of all windows; beyond the end no motion, the gripper held, or no such windows."""
    out = []
    for episode in episodes:
        rows = getattr(episode, column)
        held = np.concatenate([np.zeros(6, np.float32), rows[-1, 6:]])
        rows = np.concatenate([rows, np.tile(held, (CHUNK, 1))])
        count = len(episode) if padded else len(episode) - CHUNK
        out += [rows[t : t + CHUNK] for t in range(count)]
    return torch.from_numpy(np.stack(out))


def quantiles(values: Tensor) -> Tensor:
    """The quantiles of 1 % and 99 % of each column, (2, D)."""
    return torch.from_numpy(np.quantile(values.double().numpy(), (0.01, 0.99), axis=0)).float()


def unit(values: Tensor, of_training: Tensor) -> Tensor:
    """Raw values on the scale where the training data's quantiles of 1 % and 99 % are -1 and 1, clipped."""
    low, high = quantiles(of_training)
    return (2 * (values - low) / (high - low) - 1).clamp(-1, 1)


def encoded(actions: Tensor, of_training: Tensor) -> Tensor:
    """Normalised actions by hand: motion as `unit`, the gripper 1 where it opens (-1) and 0 where it closes (1)."""
    return torch.cat([unit(actions[..., :6], of_training[:, :6]), (1 - actions[..., 6:]) / 2], -1)


def decoded(actions: Tensor, of_training: Tensor) -> Tensor:
    """Raw actions by hand, the inverse of `encoded`."""
    low, high = quantiles(of_training[:, :6])
    motion = low + (actions[..., :6].clamp(-1, 1) + 1) / 2 * (high - low)
    return torch.cat([motion, torch.where(actions[..., 6:] < 0.5, 1.0, -1.0)], -1)


def row_in(row: Tensor, rows: Tensor, tolerance: float = 1e-4) -> int | None:
    """Which of the rows a row is, or None."""
    distance = (rows.float() - row.float()).abs().flatten(1).amax(1)
    return int(distance.argmin()) if distance.min() < tolerance else None


def assert_rows_in(found: Tensor, rows: Tensor, tolerance: float = 1e-4) -> None:
    """Every row of `found` is one of `rows`."""
    assert len(found) and all(row_in(row, rows, tolerance) is not None for row in found)


class Call(NamedTuple):
    """One call of a watched function: its arguments by name, its result."""

    given: dict[str, Any]
    result: Any


def watch(monkeypatch: pytest.MonkeyPatch, function: Callable, owner: type | None = None) -> list[Call]:
    """The calls of a method of `owner`, or of a function wherever a module has imported it."""
    calls, signature = [], inspect.signature(function)

    def watched(*args: Any, **kwargs: Any) -> Any:
        given = signature.bind(*args, **kwargs)
        given.apply_defaults()
        result = function(*args, **kwargs)
        calls.append(Call(dict(given.arguments), result))
        return result

    if owner is not None:
        monkeypatch.setattr(owner, function.__name__, watched)
        return calls
    for name, module in list(sys.modules.items()):
        if name.split(".")[0] in ("vlarft", "train_rft", "train_sft", "train_wm"):
            for attribute, value in list(vars(module).items()):
                if value is function:
                    monkeypatch.setattr(module, attribute, watched)
    return calls


def fine_tune(world: World, out_dir: Path, **changes: Any) -> list[dict[str, float]]:
    """Run train_rft.main at smoke size, without gate; the rows of its log."""
    files = {"policy": str(world.policy), "world_model": str(world.world_model), "demos": (str(world.demos),)}
    defaults = {"out_dir": str(out_dir), "gate_starts": 0, "warmup": 0, "clip_norm": 1e9, "perceptual": "none"}
    cfg = replace(train_rft.PRESETS["smoke"], **files, **(defaults | changes))
    train_rft.main(cfg)
    return [json.loads(line) for line in (out_dir / "log.jsonl").read_text().splitlines()]


def optimizer_groups(out_dir: Path) -> list[dict[str, Any]]:
    """The optimizer's parameter groups as the last step left them."""
    return torch.load(out_dir / "train_state.pt", weights_only=True)["optimizer"]["param_groups"]


def r1(actions: Tensor, reference: Tensor) -> Tensor:
    """Reward R1 by hand: (S, G, T, A) and (S, T, A) raw -> (S, G)."""
    return -(actions - reference[:, None]).abs().mean(-1).sum(-1)


def rollouts(chains: list[Call], rows: int) -> list[Call]:
    """The calls of `sample_chain` for a batch of so many rollouts: not those of diagnostics."""
    return [call for call in chains if len(call.result.x) == rows]


def test_the_loss_is_surrogate_minus_entropy_plus_matching_loss(world, tmp_path, monkeypatch):
    """Eq. (8), (9), (11) to (13) by hand, from the chains that were sampled and how they were scored."""
    chains, scores = watch(monkeypatch, flow.sample_chain), watch(monkeypatch, flow.chain_log_prob)
    matching = watch(monkeypatch, flow.matching_loss)
    batches = watch(monkeypatch, WindowSampler.batch, WindowSampler)
    options = {"reward": "r1", "starts": 3, "group": 4, "steps": 2, "epochs": 2, "lr": 1e-4, "sigma_lr": 3e-3}
    log = fine_tune(world, tmp_path, **options, mse_weight=0.7, entropy_weight=0.3, divide_by_std=False)
    sampled = rollouts(chains, 12)
    assert len(log) == len(sampled) == len(batches) == 2 and len(scores) == len(matching) == 4
    intended = of(load_episodes(world.demos), "intended")
    for step, row in enumerate(log):
        chain = sampled[step].result
        actions = decoded(chain.x[:, -1], intended).unflatten(0, (3, 4))
        reward = r1(actions, batches[step].result.intended)
        assert row["reward"] == pytest.approx(reward.mean().item(), rel=1e-4)
        assert row["reward_std"] == pytest.approx(reward.std(1).mean().item(), rel=1e-3)
        advantage = (reward - reward.mean(1, keepdim=True)).flatten()  # (S * G,)
        assert row["adv_std"] == pytest.approx(advantage.square().mean().sqrt().item(), rel=1e-3)
        parts = []
        for epoch in range(2):
            score = scores[2 * step + epoch].result
            log_ratio = score.log_prob.sum((2, 3)).mean(1) - chain.log_prob.sum((2, 3)).mean(1)  # (S * G,)
            ratio = log_ratio.exp()
            clipped = ratio.clamp(0.8, 1.2)
            entropy = (0.5 * math.log(2 * math.pi * math.e) + score.sigma.log()).mean()
            mse = matching[2 * step + epoch].result[0]
            surrogate = -(clipped * advantage).mean()
            parts.append(
                {
                    "policy_loss": surrogate,
                    "entropy": entropy,
                    "mse": mse,
                    "loss": surrogate - 0.3 * entropy + 0.7 * mse,
                    "approx_kl": (ratio - 1 - log_ratio).mean(),
                    "clip_frac": (ratio != clipped).float().mean(),
                    "ratio_mean": ratio.mean(),
                    "sigma": score.sigma.mean(),
                }
            )
        for name in parts[0]:
            by_hand = sum(part[name].item() for part in parts) / 2
            assert row[name] == pytest.approx(by_hand, rel=2e-3, abs=2e-4), (step, name)
        assert (
            abs(parts[1]["policy_loss"]) > 0.01 and row["clip_frac"] > 0
        )  # the second pass scores a policy that moved
    first = scores[0].result
    assert first.sigma.mean().item() == pytest.approx(math.sqrt(0.08 * 0.2), rel=1e-4)
    assert log[0]["loss"] == pytest.approx(log[0]["policy_loss"] - 0.3 * log[0]["entropy"] + 0.7 * log[0]["mse"])


def test_an_update_raises_the_log_prob_of_the_better_rollouts(world, tmp_path, monkeypatch):
    chains, conditions = watch(monkeypatch, flow.sample_chain), watch(monkeypatch, VLAPolicy.condition, VLAPolicy)
    batches = watch(monkeypatch, WindowSampler.batch, WindowSampler)
    options = {"reward": "r1", "starts": 4, "group": 6, "steps": 1, "lr": 1e-4, "sigma_lr": 1e-4}
    fine_tune(world, tmp_path, **options, mse_weight=0.0, entropy_weight=0.0)
    (sampled,) = rollouts(chains, 24)
    (given,) = {
        id(c.given["self"]): c.given for c in conditions if c.result.base is sampled.given["cond"].base
    }.values()
    policy = given["self"]  # with its weights after the update
    assert not policy.training
    trained = {name.split(".")[0] for name, parameter in policy.named_parameters() if parameter.requires_grad}
    assert trained == {"head", "sigma_net"}
    with torch.no_grad():
        cond = policy.condition(given["context"], given["proprio"]).repeat(6)
        after = flow.chain_log_prob(policy.head, policy.sigma_net, sampled.result.x, cond).log_prob
    rise = (after - sampled.result.log_prob).sum((1, 2, 3)).unflatten(0, (4, 6))
    intended = of(load_episodes(world.demos), "intended")
    actions = decoded(sampled.result.x[:, -1], intended).unflatten(0, (4, 6))
    reward = r1(actions, batches[0].result.intended)
    advantage = reward - reward.mean(1, keepdim=True)
    rise = rise - rise.mean(1, keepdim=True)
    correlation = (rise * advantage).sum() / (rise.norm() * advantage.norm())
    assert correlation > 0.3, correlation


@pytest.mark.parametrize("reward", ["r2", "r3"])
def test_the_world_model_plays_raw_actions_from_the_frames_of_the_starts(world, tmp_path, monkeypatch, reward):
    """Policy's actions decoded by hand, beside the intended actions; the reward by hand from what was imagined."""
    chains, played = watch(monkeypatch, flow.sample_chain), watch(monkeypatch, WorldModel.rollout, WorldModel)
    batches = watch(monkeypatch, WindowSampler.batch, WindowSampler)
    options = {"reward": reward, "starts": 3, "group": 4, "steps": 1, "imagination": "greedy", "perceptual": "ssim"}
    options |= {"divide_by_std": True}
    log = fine_tune(world, tmp_path, **options)
    (sampled,), batch = rollouts(chains, 12), batches[0].result
    starts = torch.cat([c.given["start"].repeat_interleave(c.given["actions"].shape[1], 0) for c in played])
    actions = torch.cat([call.given["actions"].flatten(0, 1) for call in played])  # (N, T, A)
    frames = torch.cat([call.result.frames.flatten(0, 1) for call in played])  # (N, T, C, H, W)

    def imagined(start: Tensor, chunk: Tensor) -> Tensor:
        """(T, C, H, W), what was seen of this chunk from this start."""
        rows = ((starts - start).abs().flatten(1).amax(1) < 1e-6).nonzero().flatten()
        row = row_in(chunk, actions[rows]) if len(rows) else None
        assert row is not None, "the world model never played these raw actions from this start"
        return frames[rows[row]]

    raw = decoded(sampled.result.x[:, -1], of(load_episodes(world.demos), "intended")).unflatten(0, (3, 4))
    low, high = torch.from_numpy(ACTION_RANGES.T).float()
    for values in (raw, actions):
        assert (values[..., :6] >= low - 1e-3).all() and (values[..., :6] <= high + 1e-3).all()
        assert (values[..., 6].abs() == 1).all()
    rewards = torch.zeros(3, 4)
    for s, (number, t) in enumerate(batch.index.tolist()):
        episode = batches[0].given["self"].episodes[number]
        true = torch.from_numpy(episode.images[t : t + CHUNK + 1]).movedim(-1, 1) / 255
        reference = true[1:]
        if reward == "r3":
            reference = imagined(true[0], torch.from_numpy(episode.intended[t : t + CHUNK]))
        for g in range(4):
            seen = imagined(true[0], raw[s, g])
            distance = (seen - reference).abs().mean((1, 2, 3)) + (1 - metrics.ssim(seen, reference)) / 2
            rewards[s, g] = -distance.sum()
    assert rewards.std(1).min() > 1e-4  # this world model does depend on actions
    assert log[0]["reward"] == pytest.approx(rewards.mean().item(), rel=1e-4)
    assert log[0]["reward_std"] == pytest.approx(rewards.std(1).mean().item(), rel=1e-3)
    advantage = (rewards - rewards.mean(1, keepdim=True)) / rewards.std(1, keepdim=True)
    assert log[0]["adv_std"] == pytest.approx(advantage.square().mean().sqrt().item(), rel=1e-2)
    assert all(call.given["greedy"] and not call.given["common_random_numbers"] for call in played)


def seen_by_act(policy: VLAPolicy, episodes: list[Episode], monkeypatch: pytest.MonkeyPatch) -> tuple[Tensor, Tensor]:
    """Context and proprio that reach the head when `act` is asked at every step of the episodes."""
    with monkeypatch.context() as patch:
        calls = watch(patch, FlowHead.prepare, FlowHead)
        for episode in episodes:
            noise = torch.zeros(len(episode), CHUNK, 7)
            policy.act(np.asarray(episode.images), [episode.instruction] * len(episode), episode.proprio, noise=noise)
    return tuple(torch.cat([call.given[name] for call in calls]) for name in ("context", "proprio"))


@pytest.mark.parametrize("stage", ["sft", "rft"])
def test_training_conditions_on_what_act_conditions_on(world, tmp_path, monkeypatch, stage):
    """The normalised proprio by hand; image, instruction and proprio of the same step, as in deployment."""
    with monkeypatch.context() as patch:
        calls = watch(patch, FlowHead.prepare, FlowHead)
        if stage == "rft":
            of_sigma_net = watch(patch, SigmaNet.prepare, SigmaNet)
            batches = watch(patch, WindowSampler.batch, WindowSampler)
            fine_tune(world, tmp_path, reward="r1", lr=0.0, sigma_lr=0.0, steps=1, starts=8)
            assert len(set(batches[0].result.instructions)) == 2
            assert len(of_sigma_net) >= 2  # sampled and scored
            calls += of_sigma_net
        else:
            same = {"lr": 0.0, "ema": None, "augment": "none", "init": str(world.policy), "steps": 1}
            train_sft.main(
                replace(train_sft.PRESETS["smoke"], demos=(str(world.demos),), out_dir=str(tmp_path), **same)
            )
    episodes = load_episodes(world.demos)
    context, proprio = seen_by_act(VLAPolicy.load(tmp_path / "model.safetensors"), episodes, monkeypatch)
    assert_close(proprio, unit(of(episodes, "proprio"), of(episodes, "proprio")), atol=1e-5, rtol=0)
    for call in calls:
        given = call.given["context"].detach(), call.given["proprio"].detach()
        for row_context, row_proprio in zip(*given, strict=True):
            row = row_in(row_proprio, proprio)
            assert row is not None, "proprio that act does not see"
            assert_close(row_context, context[row], atol=1e-3, rtol=1e-3)


def test_supervised_training_imitates_the_intended_actions(world, tmp_path, monkeypatch):
    """Targets and loss by hand, with fresh windows, times and noise in every step."""
    matching, taus = watch(monkeypatch, flow.matching_loss), watch(monkeypatch, flow.sample_tau)
    batches = watch(monkeypatch, WindowSampler.batch, WindowSampler)
    preprocessed = watch(monkeypatch, VLAPolicy.preprocess, VLAPolicy)
    files = {"demos": str(world.demos), "out_dir": str(tmp_path)}
    options = {"validation_fraction": 0.2, "augment": "full", "key_weight": 0.3, "warmup": 8, "schedule": "constant"}
    train_sft.main(replace(train_sft.PRESETS["smoke"], **files, **options))
    of_training = [call for call in taus if call.given["num"] == 4 * 2][-4:]  # 4 steps of 4 chunks, 2 times each
    assert all((call.given["alpha"], call.given["beta"]) == (1.5, 1.0) for call in taus)
    assert len(torch.stack([call.result for call in of_training]).unique()) == 4 * 4 * 2
    windows_of_steps = [tuple(call.result.index.flatten().tolist()) for call in batches[-4:]]
    assert len(set(windows_of_steps)) == 4
    for call in batches[-4:]:  # the hand at the next change of the intended gripper command, or at the end
        for key, (number, t) in zip(call.result.key_position, call.result.index.tolist(), strict=True):
            episode = call.given["self"].episodes[number]
            gripper = episode.intended[:, 6]
            changes = [u for u in range(t + 1, STEPS) if gripper[u] != gripper[u - 1]]
            assert key.tolist() == episode.proprio[changes[0] if changes else -1, :3].tolist()
    # the random crop of training is the only one; the two validations crop the centre
    assert sum(call.given["crop"] for call in preprocessed) == 2 < len(preprocessed) - 4

    extra = read_header(tmp_path / "model.safetensors").extra
    episodes, training = load_episodes(world.demos), load_episodes(world.demos, names=extra["train_episodes"])
    assert len(episodes) / 2 < len(training) < len(episodes)
    normalizer, intended = VLAPolicy.load(tmp_path / "model.safetensors").normalizer, of(training, "intended")
    assert_close(torch.stack([normalizer.action_low, normalizer.action_high]), quantiles(intended[:, :6]))
    proprio = quantiles(of(training, "proprio"))
    assert_close(torch.stack([normalizer.proprio_low, normalizer.proprio_high]), proprio)
    targets = torch.cat([call.given["actions"] for call in matching])
    assert_rows_in(targets, encoded(windows(episodes, "intended", padded=True), intended), 1e-3)

    for row in (json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()):
        assert row["loss"] == pytest.approx(row["flow_mse"] + 0.3 * row["key_loss"], rel=1e-5)
    vectors, matrices = optimizer_groups(tmp_path)  # weight decay on matrices only, half of the warm-up is over
    trained = list(VLAPolicy(POLICIES["smoke"]).parameters())
    assert (vectors["weight_decay"], matrices["weight_decay"]) == (0, 0.01)
    assert len(matrices["params"]) == sum(p.ndim > 1 for p in trained) == len(trained) - len(vectors["params"])
    assert vectors["lr"] == matrices["lr"] == pytest.approx(train_sft.PRESETS["smoke"].lr * 4 / 8)


def test_accumulated_gradients_are_those_of_one_batch(world, tmp_path):
    """Up to the noise, which is another one in each micro-batch."""
    norms = []
    for accumulate in (1, 4):
        files = {"demos": str(world.demos), "out_dir": str(tmp_path / str(accumulate))}
        options = {"steps": 1, "accumulate": accumulate, "batch_size": 32, "noise_samples": 4, "validation_interval": 1}
        train_sft.main(replace(train_sft.PRESETS["smoke"], **files, **options))
        norms.append(json.loads((tmp_path / str(accumulate) / "log.jsonl").read_text())["grad_norm"])
    assert norms[1] == pytest.approx(norms[0], rel=0.3)


def test_fine_tuning_is_held_to_the_intended_actions(world, tmp_path, monkeypatch):
    matching, batches = watch(monkeypatch, flow.matching_loss), watch(monkeypatch, WindowSampler.batch, WindowSampler)
    chains, taus = watch(monkeypatch, flow.sample_chain), watch(monkeypatch, flow.sample_tau)
    diagnosed = watch(monkeypatch, WindowSampler.spread, WindowSampler)
    rates = {"lr": 1e-5, "sigma_lr": 1e-4, "warmup": 4}
    fine_tune(world, tmp_path, reward="r1", steps=2, starts=4, group=3, **rates)
    assert [group["lr"] for group in optimizer_groups(tmp_path)] == pytest.approx([1e-5 * 2 / 4, 1e-4 * 2 / 4])
    assert all((call.given["alpha"], call.given["beta"]) == (1.5, 1.0) for call in taus)
    for fresh in ([c.result.x[:, 0] for c in rollouts(chains, 12)], [c.result for c in taus]):  # in every step
        assert len(fresh) == 2 and not torch.isclose(*fresh).any()
    assert not torch.equal(*(batch.result.index for batch in batches))
    for calls, names in ((batches, "train_episodes"), (diagnosed, "held_out_episodes")):
        assert [e.name for e in calls[0].given["self"].episodes] == [e.name for e in named(world, names)]
    targets, intended = torch.cat([c.given["actions"] for c in matching]), of(load_episodes(world.demos), "intended")
    assert len(targets) == 8
    assert_close(targets, encoded(torch.cat([b.result.intended for b in batches]), intended), atol=1e-4, rtol=0)
    assert_rows_in(targets, encoded(windows(named(world, "train_episodes"), "intended", padded=False), intended))


def test_the_world_model_learns_from_the_executed_actions(world, tmp_path, monkeypatch):
    """Every segment: frames t to t + T, the actions that were executed between them, a context frame before them."""
    losses = watch(monkeypatch, WorldModel.token_loss, WorldModel)
    tokenized = watch(monkeypatch, WorldModel.tokenize, WorldModel)
    played = watch(monkeypatch, WorldModel.rollout, WorldModel)
    options = {"steps": 3, "validation_interval": 3, "validation_fraction": 0.2, "context_lookback": 2}
    options |= {"warmup": 6, "schedule": "constant", "pose_dims": 0}
    files = {"demos": (str(world.demos),), "tokenizer": str(world.tokenizer), "out_dir": str(tmp_path)}
    found = train_wm.main(replace(train_wm.PRESETS["smoke"], **files, **options))
    episodes = load_episodes(world.demos)
    executed = windows(episodes, "actions", padded=False)  # (N, T, A)
    starts = [(e, t) for e in episodes for t in range(len(e) - CHUNK)]  # N of them

    def frames(chunk: Tensor, before: int = 0) -> Tensor:
        """(T + 1 + before, C, H, W), the frames around executed actions and so many before them."""
        episode, t = starts[row_in(chunk, executed)]
        return torch.from_numpy(episode.images[max(0, t - before) : t + CHUNK + 1]).movedim(-1, 1) / 255

    training = [call for call in losses if call.given["stale"] is not None]
    assert len(training) == 3 and len(losses) > 3 and played
    for call in losses:
        assert_rows_in(call.given["actions"], executed)
    earlier = 0
    for loss, tokens in zip(training, tokenized):
        assert torch.equal(loss.given["future_tokens"], tokens.result[1])
        segments = tokens.given["frames"], tokens.given["context_frame"]
        for chunk, segment, context_frame in zip(loss.given["actions"], *segments, strict=True):
            assert_close(segment, frames(chunk))
            assert row_in(context_frame, frames(chunk, before=2)[:-CHUNK]) is not None
            earlier += not torch.equal(context_frame, segment[0])
    assert earlier >= 3  # of 12 segments
    assert len({tuple(call.given["stale"].flatten().tolist()) for call in training}) == 3
    assert len({tuple(call.given["actions"].flatten().tolist()) for call in training}) == 3
    assert optimizer_groups(tmp_path)[0]["lr"] == pytest.approx(train_wm.PRESETS["smoke"].lr * 3 / 6)
    for call in played:
        for start, chunk in zip(call.given["first_frame"], call.given["actions"][:, 0], strict=True):
            assert_close(start, frames(chunk)[0])
    own, shuffled = (call.given for call in losses[-2:])  # of the last validation
    assert torch.equal(own["future_tokens"], shuffled["future_tokens"])
    assert (own["actions"] != shuffled["actions"]).flatten(1).any(1).all()  # those of other segments
    true = torch.stack([frames(chunk)[1:] for chunk in played[-1].given["actions"][:, 0]])
    error = (played[-1].result.frames[:, 0] - true).square().mean()
    assert found["rollout_psnr"] == pytest.approx(-10 * math.log10(error), rel=1e-4)
    names = read_header(tmp_path / "model.safetensors").extra["train_episodes"]
    actions = of(load_episodes(world.demos, names=names), "actions")
    ranges = WorldModel.load(tmp_path / "model.safetensors").action_bins
    assert torch.equal(ranges.low, actions.amin(0)) and torch.equal(ranges.high, actions.amax(0))


def held_out_starts(world: World, count: int = 4) -> Batch:
    """Windows of the episodes that the policy holds out."""
    return WindowSampler(named(world, "held_out_episodes"), CHUNK + 1, CHUNK).spread(count)


def test_the_gate_scores_raw_chunks_near_the_demonstrations_and_of_the_policy(world):
    policy, batch, scored = VLAPolicy.load(world.policy), held_out_starts(world), []
    policy.add_sigma_net()

    def score(batch: Batch, actions: Tensor, generator: torch.Generator) -> Tensor:
        scored.append(actions)
        return -(actions - batch.intended[:, None]).abs().mean(-1)  # ranks as the action error does

    found = gate.trust_gate(score, policy, batch, 0)
    assert found["gate"] == pytest.approx(1)
    (chunks,), intended = scored, of(load_episodes(world.demos), "intended")
    near, sampled = chunks[:, :9], chunks[:, 9:]
    assert ((near - batch.intended[:, None]).abs().amax((2, 3)) > 0).all()  # all of them perturbed, but the gripper
    assert torch.equal(near[..., 6], batch.intended[:, None, :, 6].expand_as(near[..., 6]))
    low, high = quantiles(intended[:, :6])
    moved = 2 * (near[..., :6] - batch.intended[:, None, :, :6]) / (high - low)  # (S, 9, T, 6), normalised units
    for number, size in enumerate((0.05, 0.15)):  # the third size is often clipped to what the policy can do
        rms = moved[:, 3 * number : 3 * number + 3].square().mean((0, 1, 2)).sqrt()
        assert_close(rms, torch.full((6,), size), atol=0, rtol=0.3)
    assert sampled.shape == (4, 8, CHUNK, 7) and (sampled[..., 6].abs() == 1).all()
    assert (sampled[..., :6] >= low - 1e-3).all() and (sampled[..., :6] <= high + 1e-3).all()
    assert found["gate_policy_pairs"] == 1 and len(sampled.flatten(0, 1).unique(dim=0)) == 32


def test_the_diagnosis_is_of_what_act_does(world, monkeypatch):
    policy, batch, scored = VLAPolicy.load(world.policy), held_out_starts(world), []
    flows = watch(monkeypatch, flow.sample_ode)

    def score(batch: Batch, actions: Tensor, generator: torch.Generator) -> Tensor:
        scored.append(actions)
        return action_reward(actions, batch.intended)

    found, chunks = diagnosis.diagnose(score, policy, batch, 0, draws=5)
    (call,) = flows
    rows = torch.arange(4).repeat_interleave(5)
    instructions = [batch.instructions[i] for i in rows]
    acted = policy.act(batch.frames[rows, 0], instructions, batch.proprio[rows], noise=call.given["noise"])
    assert_close(chunks, acted.unflatten(0, (4, 5)), atol=1e-3, rtol=1e-3)
    intended = of(load_episodes(world.demos), "intended")
    x = call.result.unflatten(0, (4, 5))
    mean = decoded(x.mean(1), intended)
    assert_close(scored[0], mean[:, None], atol=1e-3, rtol=1e-3)
    assert found["reward_mean_action"] == pytest.approx(r1(mean[:, None], batch.intended).mean().item(), rel=1e-4)
    errors = (encoded(mean, intended) - encoded(batch.intended, intended)).abs().mean((0, 1))
    for dim, name in enumerate(("x", "y", "z", "rx", "ry", "rz", "gripper")):
        assert found[f"error_{name}"] == pytest.approx(errors[dim].item(), rel=1e-3)
        assert found[f"std_{name}"] == pytest.approx(x[..., dim].std(1).mean().item(), rel=1e-3)


FLOW = FlowConfig(
    context_dim=12,
    embed_dim=6,
    dit=DiTConfig(width=16, depth=2, num_heads=2, mlp_dim=24, cross_attention_blocks=(0, 1), gamma_init=1.0),
)


@pytest.fixture
def networks() -> tuple[FlowHead, SigmaNet]:
    torch.manual_seed(0)
    head, sigma_net = FlowHead(FLOW), SigmaNet(FLOW)
    for name, parameter in (*head.named_parameters(), *sigma_net.named_parameters()):
        nn.init.normal_(parameter, std=0.5 if ".time." in name else 0.15)
    return head, sigma_net


def test_mean_and_sigma_of_a_step_are_those_of_its_own_time(networks):
    """Eq. (5) to (7) by hand at tau = k / K, both networks called directly, for sampling and scoring."""
    head, sigma_net = networks
    generator = torch.Generator().manual_seed(1)
    context, proprio = torch.randn(2, 5, 12, generator=generator), torch.randn(2, 8, generator=generator)
    num_steps, center, half = 10, math.log(0.08 * 0.2) / 2, math.log(0.2 / 0.08) / 2
    with torch.no_grad():
        cond = head.prepare(context, proprio, sigma_net)
        chain = flow.sample_chain(head, sigma_net, cond, generator=generator)
        score = flow.chain_log_prob(head, sigma_net, chain.x, cond)
        moments, noises = [], [chain.x[:, 0]]
        for k in range(num_steps):
            tau, x = torch.full((2,), k / num_steps), chain.x[:, k]
            mean = x + head.net(x, tau, head.net.prepare(context, proprio)) / num_steps
            sigma = (
                center + half * torch.tanh(sigma_net.net(None, tau, sigma_net.net.prepare(context, proprio)))
            ).exp()
            step = flow.transition(head, sigma_net, x, k, cond)
            for found, by_hand in ((step.mean, mean), (score.mean[:, k], mean), (step.stddev, sigma)):
                assert_close(found, by_hand, atol=1e-5, rtol=1e-5)
            assert_close(score.sigma[:, k], sigma, atol=1e-5, rtol=1e-5)
            steps = torch.full((2,), k)
            assert_close(sigma_net.log_sigma(cond.sigma, steps).exp(), sigma, atol=1e-5, rtol=1e-5)
            log_prob = -(((chain.x[:, k + 1] - mean) / sigma) ** 2) / 2 - sigma.log() - math.log(2 * math.pi) / 2
            assert_close(chain.log_prob[:, k], log_prob, atol=1e-3, rtol=1e-3)
            moments.append((mean - x, sigma))
            noises.append((chain.x[:, k + 1] - mean) / sigma)
    for values in zip(*moments):  # neither could be that of a step before or after
        assert torch.stack(values).diff(dim=0).abs().amax((1, 2, 3)).min() > 1e-3
    noise = torch.stack(noises)  # x_0 and the noise of the steps: 11 x 112 scalars
    assert abs(noise.mean()) < 0.1 and noise.std().item() == pytest.approx(1, abs=0.1)


class FakeScaling(nn.Module):
    """The package's: to the mean and deviation of ImageNet, on its scale of [-1, 1]."""

    def forward(self, x: Tensor) -> Tensor:
        shift, scale = torch.tensor([-0.030, -0.088, -0.188]), torch.tensor([0.458, 0.448, 0.450])
        return (x - shift[:, None, None]) / scale[:, None, None]


class FakeBackbone(nn.Module):
    """Two slices, with the names of parameters of the package's VGG."""

    def __init__(self) -> None:
        super().__init__()
        self.slice1, self.slice2 = nn.Sequential(), nn.Sequential()
        self.slice1.add_module("0", nn.Conv2d(3, 4, 3))
        self.slice2.add_module("5", nn.Conv2d(4, 6, 3, stride=2))

    def forward(self, x: Tensor) -> list[Tensor]:
        first = self.slice1(x).relu()
        return [first, self.slice2(first).relu()]


class FakeLPIPS(nn.Module):
    """What the package gives: layers of 1 x 1 convolutions behind a dropout that is off in evaluation."""

    def __init__(self, net: str, pnet_rand: bool, verbose: bool) -> None:
        super().__init__()
        assert (net, pnet_rand) == ("vgg", True)
        self.scaling_layer, self.net = FakeScaling(), FakeBackbone()
        heads = [nn.Sequential(nn.Dropout(), nn.Conv2d(width, 1, 1, bias=False)) for width in (4, 6)]
        self.lins = nn.ModuleList(heads)
        for head in heads:
            nn.init.uniform_(head[1].weight, 0, 1)


@pytest.fixture
def lpips(monkeypatch, tmp_path) -> tuple[metrics.PerceptualDistance, dict[str, Tensor]]:
    """The perceptual distance over a small backbone, and the weights that its file holds."""
    monkeypatch.setitem(sys.modules, "lpips", types.SimpleNamespace(LPIPS=FakeLPIPS))
    torch.manual_seed(0)
    weights = {"features.0": nn.Conv2d(3, 4, 3), "features.5": nn.Conv2d(4, 6, 3), "classifier.0": nn.Linear(2, 2)}
    stored = {f"{name}.{k}": v for name, layer in weights.items() for k, v in layer.state_dict().items()}
    torch.save(stored, tmp_path / "vgg.pth")
    return metrics.perceptual("lpips", tmp_path / "vgg.pth"), stored


def lpips_by_hand(pred: Tensor, target: Tensor, weights: dict[str, Tensor], heads: list[Tensor]) -> Tensor:
    """LPIPS of one pair of images (3, H, W) in [0, 1], as Zhang et al. (2018) define it."""

    def features(image: Tensor) -> list[Tensor]:
        image = image * 2 - 1
        image = torch.stack(
            [
                (image[0] + 0.030) / 0.458,
                (image[1] + 0.088) / 0.448,
                (image[2] + 0.188) / 0.450,
            ]
        )
        first = nn.functional.conv2d(image[None], weights["features.0.weight"], weights["features.0.bias"]).relu()
        second = nn.functional.conv2d(first, weights["features.5.weight"], weights["features.5.bias"], stride=2).relu()
        return [first[0], second[0]]

    total = torch.zeros(())
    for head, ours, theirs in zip(heads, features(pred), features(target), strict=True):
        height, width = ours.shape[1:]
        for y in range(height):
            for x in range(width):
                a, b = ours[:, y, x], theirs[:, y, x]
                a, b = a / (a.square().sum().sqrt() + 1e-10), b / (b.square().sum().sqrt() + 1e-10)
                total = total + (head * (a - b).square()).sum() / (height * width)
    return total


def test_lpips_by_hand(lpips):
    distance, weights = lpips
    heads = [head[1].weight.flatten() for head in distance.lpips.lins]
    generator = torch.Generator().manual_seed(1)
    targets, preds = torch.rand(2, 3, 9, 7, generator=generator), torch.rand(2, 3, 3, 9, 7, generator=generator)
    by_hand = [[lpips_by_hand(pred, targets[i], weights, heads) for pred in preds[i]] for i in range(2)]
    found = distance.distance_to(preds, distance.features(targets))  # each target serves three
    assert_close(found, torch.tensor(by_hand), atol=1e-5, rtol=1e-4)
    assert_close(distance(preds[:, 1], targets), found[:, 1])
    assert found.dtype == torch.float32 and found.min() > 0.05
    assert_close(distance(targets, targets), torch.zeros(2))
    half = distance.to_bfloat16().distance_to(preds, distance.features(targets))
    assert half.dtype == torch.float32 and 0 < (half - found).abs().max() < 0.05


def test_the_backbone_of_lpips_is_loaded_completely(lpips, tmp_path):
    distance, stored = lpips
    assert torch.equal(distance.lpips.net.slice2[0].bias, stored["features.5.bias"])
    assert not distance.training and not any(p.requires_grad for p in distance.parameters())
    torch.save({k: v for k, v in stored.items() if k != "features.5.bias"}, tmp_path / "part.pth")
    with pytest.raises(ValueError, match=r"part.pth is not torchvision's VGG16: it lacks features.5.bias"):
        metrics.perceptual("lpips", tmp_path / "part.pth")


def shares(sampling: Sampling, logits: Tensor, count: int = 40_000) -> list[float]:
    """How often each code is taken."""
    codes = sampling.sample(logits.expand(count, -1), 1, torch.Generator().manual_seed(0))
    return (torch.bincount(codes, minlength=len(logits)) / count).tolist()


def test_temperature_and_top_p_by_hand():
    logits = torch.tensor([0.0, 2.0, -1.0, 1.0])  # at temperature 1: 0.087 0.644 0.032 0.237

    def softmax(temperature: float, *codes: int) -> Any:
        """Their shares at this temperature, the others' 0."""
        weights = [math.exp(x / temperature) * (i in codes) for i, x in enumerate(logits.tolist())]
        return pytest.approx([w / sum(weights) for w in weights], abs=0.01)

    for temperature in (0.5, 1.0, 2.0):
        assert shares(Sampling(temperature=temperature, top_p=1.0), logits) == softmax(temperature, 0, 1, 2, 3)
    assert shares(Sampling(top_p=0.8), logits) == softmax(1.0, 1, 3)  # 0.644 + 0.237 reach 0.8
    assert shares(Sampling(top_p=0.6), logits) == [0, 1, 0, 0]
    # the nucleus is that of the tempered distribution: 0.167 0.455 0.102 0.276 at temperature 2
    assert shares(Sampling(temperature=2.0, top_p=0.8), logits) == softmax(2.0, 0, 1, 3)
    assert shares(Sampling(greedy=True, temperature=9.0), logits) == [0, 1, 0, 0]


SEQUENCE = WorldModelConfig(
    tokenizer=TokenizerConfig(
        image_size=(16, 16), stem=4, block_channels=(8,), res_blocks=1, mid_res_blocks=1, latent_channels=4,
        future_patch=2, context_levels=(5, 3), future_levels=(3, 3), norm_groups=4, dropout=0.0,
    ),
    transformer=TransformerConfig(depth=2, width=32, num_heads=4, num_kv_heads=4, ffn_dim=48, init_std=0.3),
    chunk=3, action_dim=2, action_bins=8,
)  # fmt: skip


def test_an_action_conditions_the_frame_after_it():
    """ctx(f0) | dyn(f0) a0 | dyn(f1) a1 | ... by hand, in the loss and in a rollout; actions in the order of dims."""
    torch.manual_seed(0)
    model = WorldModel(SEQUENCE).eval()
    model.action_bins.set_range(torch.tensor([0.0, -10.0]), torch.tensor([8.0, 6.0]))
    seen = []
    model.decoder.register_forward_pre_hook(lambda module, args: seen.append(args[0].detach()))
    generator = torch.Generator().manual_seed(0)
    context, future = (torch.randint(n, s, generator=generator) for n, s in ((15, (2, 16)), (9, (2, 4, 4))))
    actions = torch.tensor([[[0.5, -9.0], [1.5, 1.0], [7.5, 5.0]], [[2.5, -1.0], [3.5, -5.0], [4.5, 3.0]]])
    bins = [[(0, 0), (1, 5), (7, 7)], [(2, 4), (3, 2), (4, 6)]]  # of widths 1 and 2
    expected = []
    for row in range(2):
        ids = [9 + c for c in context[row].tolist()] + future[row, 0].tolist()
        for t in range(3):
            ids += [9 + 15 + b for b in bins[row][t]] + future[row, t + 1].tolist()
        expected.append(ids)
    expected = torch.tensor(expected)
    future[:, 2, :3] = future[:, 1, :3]  # most of frame 2 is that of frame 1
    expected[:, 28:31] = future[:, 2, :3]
    loss, found = model.token_loss(context, future, actions)
    assert_close(seen[0], model.embed_tokens(expected)[:, :-1])
    logits = model.lm_head(model.decoder(model.embed_tokens(expected)))
    places = [20 + 2 + t * 6 + i for t in range(3) for i in range(4)]
    terms = [
        -logits[b, p - 1].log_softmax(-1)[expected[b, p]] for b in range(2) for p in places
    ]  # each token from the one before it
    assert_close(loss, torch.stack(terms).mean())
    right = [[bool(logits[b, p - 1].argmax() == expected[b, p]) for p in places] for b in range(2)]
    changed = [[bool(future[b, t + 1, i] != future[b, t, i]) for t in range(3) for i in range(4)] for b in range(2)]
    right, changed = torch.tensor(right).float(), torch.tensor(changed)
    assert found["accuracy"] == right.mean() and found["accuracy_changed"] == right[changed].mean()

    # the same sequence is what a rollout builds up: a change of a_t leaves frames up to t and their logits alone
    seen.clear()
    frame = torch.rand(1, 3, 16, 16, generator=generator)
    tokens = model.rollout(frame, actions[None, :1], greedy=True).tokens[0, 0]  # (T, Nf)
    fed = torch.cat([x[0] for x in seen])
    first = model.tokenize(frame[:, None])
    ids = [9 + c for c in first[0][0].tolist()] + first[1][0, 0].tolist()
    for t in range(3):
        ids += [24 + b for b in bins[0][t]] + tokens[t].tolist()
    assert_close(fed, model.embed_tokens(torch.tensor(ids[:-1])))


def test_fine_tuning_with_r1_brings_actions_closer_to_the_demonstrations(world, tmp_path):
    noise = {"sigma_min": 0.2, "sigma_max": 0.4}
    options = {"reward": "r1", "starts": 8, "group": 32, "steps": 8, "lr": 1e-3, "sigma_lr": 1e-4, "save_interval": 99}
    fine_tune(world, tmp_path, **options, **noise, mse_weight=0.0, entropy_weight=0.0)
    episodes = named(world, "train_episodes")
    x0 = torch.randn(len(episodes) * STEPS, CHUNK, 7, generator=torch.Generator().manual_seed(0))
    images, proprio = np.concatenate([np.asarray(e.images) for e in episodes]), of(episodes, "proprio")
    instructions = [e.instruction for e in episodes for _ in range(STEPS)]
    keep = torch.tensor([t < STEPS - CHUNK for _ in episodes for t in range(STEPS)])  # windows that end inside
    intended, rewards = windows(episodes, "intended", padded=False), []
    for path in (world.policy, tmp_path / "model.safetensors"):
        actions = VLAPolicy.load(path).act(images, instructions, proprio, noise=x0)[keep]
        rewards.append(r1(actions[:, None], intended).mean().item())
    assert rewards[1] > 0.96 * rewards[0], rewards  # both are negative
