"""Choosing at test time: one candidate is plain playing, the best one by hand, evaluation, every refusal."""

import dataclasses
import itertools
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from test_imagined_world import success_model  # noqa: F401, fixtures
from test_success import places, world_model  # noqa: F401

import eval_libero
from vlarft.data.episode import RobotState
from vlarft.planning import Planner
from vlarft.policy import VLAPolicy
from vlarft.run.checkpoint import read_header, save_model
from vlarft.sim.evaluate import PlanningActor, PolicyActor
from vlarft.success import Judgement, SuccessModel
from vlarft.world_model import WorldModel

OPTIONS = {"seed": 0, "noise": "zero", "num_flow_steps": 10}


@pytest.fixture
def policy(policy_file):
    return VLAPolicy.load(policy_file)


@pytest.fixture
def planner(policy, world_model, success_model):  # noqa: F811
    return Planner(policy, WorldModel.load(world_model), SuccessModel.load(success_model))


def observations(count: int) -> list[dict]:
    rng = np.random.default_rng(0)
    return [
        {
            "agentview": rng.integers(0, 255, (64, 64, 3)).astype(np.uint8),
            "proprio": rng.normal(size=8).astype(np.float32),
            "instruction": "push the red square",
        }
        for _ in range(count)
    ]


def test_one_candidate_is_plain_playing(planner):
    for noise in ("zero", "sampled"):
        options = {**OPTIONS, "noise": noise}
        plain = PolicyActor(planner.policy, "tabletop_object", 0, **options)
        planned = PlanningActor(planner, 1, "tabletop_object", 0, 8, **options)
        for chunk in (0, 1):
            assert np.array_equal(planned([3, 4], chunk, observations(2)), plain([3, 4], chunk, observations(2)))


def test_the_best_candidate_is_played(planner, monkeypatch):
    seen = {}

    def judge(frames, first_frames, instructions):
        seen.update(frames=frames, first=first_frames, texts=instructions)
        success = torch.zeros(frames.shape[:2])
        # second candidate of the first episode, middle one of the second; a value that is not held does not count
        success[1, 3:6], success[4, :3], success[2, 7:9] = 0.9, 0.5, 1.0
        progress = torch.zeros(frames.shape[:2])
        progress[5, -1] = 0.8  # and the third one gets further
        progress[0, 2] = 1.0  # before the end: does not count
        return Judgement(success, progress)

    monkeypatch.setattr(planner.judge, "judge", judge)
    noise = torch.randn(2, 3, 8, 7, generator=torch.Generator().manual_seed(0))
    first = torch.rand(2, 3, 64, 64)
    plan = planner.choose(observations(2), first, noise)
    assert plan.choice.tolist() == [1, 2] and plan.scores[0].tolist() == pytest.approx([0, 0.9, 0])
    expected = planner.policy.act(observations(2), noise=noise[[0, 1], [1, 2]])
    torch.testing.assert_close(plan.actions, expected, atol=1e-5, rtol=1e-4)
    assert seen["frames"].shape == (6, 16, 3, 64, 64) and torch.equal(seen["first"][3], first[1])
    assert seen["texts"] == ["push the red square"] * 6
    monkeypatch.setattr(planner.judge, "judge", lambda frames, *_: Judgement(*torch.zeros(2, *frames.shape[:2])))
    assert planner.choose(observations(2), first, noise).choice.tolist() == [0, 0]  # of equal scores the first


def test_the_imagination_is_of_the_chosen_chunk(planner):
    """From the present frame in the episode's context; then of the policy's chunk from x_0 = 0 at its last frame."""
    frames, judge = {}, planner.judge.judge
    planner.judge.judge = lambda images, *rest: frames.update(images=images) or judge(images, *rest)
    obs, first = observations(1), torch.rand(1, 3, 64, 64)
    noise = torch.randn(1, 2, 8, 7, generator=torch.Generator().manual_seed(0))
    planner.choose(obs, first, noise)
    actions = torch.stack([planner.policy.act(obs, noise=noise[:, n])[0] for n in (0, 1)])[None]
    now = torch.from_numpy(obs[0]["agentview"]).movedim(-1, 0)[None].float() / 255
    proprio = torch.from_numpy(obs[0]["proprio"])[None]
    robot = RobotState(proprio, torch.zeros(1, 8))
    rollout = planner.model.rollout(first, actions, greedy=True, first_frame=now, robot=robot)
    torch.testing.assert_close(frames["images"][:, :8], rollout.frames[0], atol=1e-4, rtol=0)
    last, proprio = rollout.frames[0, :, -1], rollout.state.robot.proprio[0]
    after = planner.policy.act(last.clamp(0, 1), [obs[0]["instruction"]] * 2, proprio, noise=torch.zeros(2, 8, 7))
    going_on = planner.model.rollout(rollout.state, after[None], greedy=True)
    torch.testing.assert_close(frames["images"][:, 8:], going_on.frames[0], atol=1e-4, rtol=0)


def test_the_robot_goes_on_from_chunk_to_chunk(planner, monkeypatch):
    """Each imagined chunk begins with the proprio and the motion that the last one ended with."""
    asked, encode = [], planner.policy.normalizer.encode_proprio
    monkeypatch.setattr(planner.policy.normalizer, "encode_proprio", lambda x: asked.append(x) or encode(x))
    moves, rollout = [], planner.model.robot.rollout

    def robot(state, actions):
        moves.append((*state, actions, *rollout(state, actions)))
        return moves[-1][3:]

    monkeypatch.setattr(planner.model.robot, "rollout", robot)
    planner.model.robot.motion_mean.fill_(0.1)
    planner.chunks, noise = 3, torch.randn(1, 2, 8, 7, generator=torch.Generator().manual_seed(0))
    plan = planner.choose(obs := observations(1), torch.rand(1, 3, 64, 64), noise)
    start = torch.from_numpy(obs[0]["proprio"])[None]
    proprio, motion, actions = moves[0][:3]
    assert torch.equal(proprio, start.repeat(2, 1)) and not motion.any()
    assert torch.equal(actions[plan.choice], plan.actions)
    for (*_, states, end), (proprio, motion, actions, *_) in itertools.pairwise(moves):
        assert torch.equal(proprio, states[:, -1]) and torch.equal(motion, end.motion) and motion.any()
        assert not torch.equal(actions[plan.choice], plan.actions)  # those that follow
    assert [torch.equal(x, y[0]) for x, y in zip(asked[1:], moves[1:], strict=True)] == [True, True]
    assert torch.equal(asked[0], start)


def test_a_plan_begins_with_the_motion_of_what_was_executed(planner, monkeypatch):
    motions, contexts, choose = [], [], planner.choose
    monkeypatch.setattr(
        planner, "choose", lambda *args: motions.append(args[4]) or contexts.append(args[1]) or choose(*args)
    )
    planner.model.robot.motion_mean.fill_(0.1)
    actor = PlanningActor(planner, 2, "tabletop_object", 0, 4, **OPTIONS)
    played = torch.from_numpy(actor([3, 4], 0, obs := observations(2)))
    later = [{**observations(1)[0], "agentview": np.full((64, 64, 3), 9, np.uint8)}]
    actor([4], 1, later)
    actor([3], 0, later)  # a new episode
    assert torch.equal(contexts[1], contexts[0][1:]) and contexts[2].unique().tolist() == pytest.approx([9 / 255])
    proprio = torch.from_numpy(np.stack([o["proprio"] for o in obs]))
    robot = RobotState(proprio, torch.zeros(2, 8))
    for action in played[:, :4].unbind(1):
        motion = planner.model.robot(*robot, action)
        robot = RobotState(robot.proprio + motion, motion)
    assert not motions[0].any() and not motions[2].any()
    torch.testing.assert_close(motions[1], robot.motion[1:])


def test_other_candidates_have_their_own_noise(planner, monkeypatch):
    noises = []
    choose = planner.choose
    monkeypatch.setattr(planner, "choose", lambda *args: noises.append(args[2]) or choose(*args))
    actor = PlanningActor(planner, 3, "tabletop_object", 0, 4, **OPTIONS)
    actor([3, 4], 0, observations(2))
    actor([4], 1, observations(1))
    first, second = noises
    assert not first[:, 0].any()  # x_0 = 0 is among them
    assert len({row.sum().item() for row in (*first[:, 1], *first[:, 2], *second[:, 1], *second[:, 2])}) == 6
    again = PlanningActor(planner, 3, "tabletop_object", 0, 4, **OPTIONS)
    again([4], 0, observations(1))
    assert torch.equal(noises[-1][0], first[1])  # whoever else is playing


@pytest.fixture
def config(policy_file, world_model, success_model, tmp_path):  # noqa: F811
    judge, header = SuccessModel.load(success_model), read_header(success_model)
    texts = ["pick up the red block and place it in the bin"]
    save_model(tmp_path / "judge.safetensors", judge, judge.cfg, {**header.extra, "instructions": texts})
    return dataclasses.replace(
        eval_libero.PRESETS["smoke"],
        policies=(str(policy_file),),
        episodes=1,
        noise="zero",
        plan=2,
        plan_chunks=1,
        world_model=str(world_model),
        success_model=str(tmp_path / "judge.safetensors"),
        workers=0,
        out_dir=str(tmp_path / "eval"),
    )


def test_evaluation_with_a_choice(config, capsys, monkeypatch):
    seen, choose = [], Planner.choose
    monkeypatch.setattr(
        Planner, "choose", lambda self, *args: seen.append((args[2].shape[1], self.chunks)) or choose(self, *args)
    )
    results = eval_libero.main(dataclasses.replace(config, plan_chunks=3))
    assert seen == [(2, 3)] * 8  # in each of the chunks of 64 actions
    assert results["policies"][0]["chunk_ms"] > 0 and "ms a chunk)" in capsys.readouterr().out
    record = json.loads(Path(config.out_dir, "episodes.jsonl").read_text())
    assert record["chunk_ms"] > 0 and record["steps"] == len(record["actions"])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"success_model": None}, "--plan 2 imagines and judges: give --world-model and --success-model"),
        ({"noise": "stochastic"}, "--plan chooses among chunks of the deterministic flow"),
        ({"policies": ("random",)}, "--plan chooses among a policy's chunks; random has none"),
        ({"tasks": ("0", "1")}, "does not know the instruction"),
        ({"image_size": 32}, "imagines images of 64x64, .* is played with 32x32: give --image-size 64"),
    ],
)
def test_refusals(config, changes, message):
    with pytest.raises(ValueError, match=message):
        eval_libero.main(dataclasses.replace(config, **changes))


def test_contexts_of_another_range_are_warned_about(config, tmp_path):
    model, header = WorldModel.load(config.world_model), read_header(config.world_model)
    save_model(tmp_path / "wm.safetensors", model, model.cfg, {**header.extra, "context_lookback": 15})
    with pytest.warns(UserWarning, match="was trained with --context-lookback 15, this run has -1"):
        eval_libero.check_plan(dataclasses.replace(config, world_model=str(tmp_path / "wm.safetensors")))


def test_a_planner_needs_a_chunk_and_one_camera(planner):
    with pytest.raises(ValueError, match="a plan of 0 chunks looks at nothing"):
        Planner(planner.policy, planner.model, planner.judge, 0)
    planner.policy.cfg = dataclasses.replace(planner.policy.cfg, cameras=("agentview", "eye_in_hand"))
    with pytest.raises(ValueError, match="sees 2 cameras"):
        Planner(planner.policy, planner.model, planner.judge)
