"""Closed-loop learning in imagination: episodes by hand, the robot's motion, the gate, a run from end to end."""

import dataclasses
import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import every_other_succeeds, interrupted, refused_with_converted_episodes
from test_success import places, world_model  # noqa: F401, fixtures

import eval_wm
import train_rl
import train_success
from vlarft.data import load_episodes
from vlarft.data.convention import image_convention
from vlarft.data.episode import Episode, RobotState
from vlarft.imagined_world import ImaginedWorld
from vlarft.outcome_gate import (
    Evaluation,
    check_outcome_gate,
    imagined_rate,
    outcome_gate,
    rank_policies,
    read_evaluation,
)
from vlarft.policy import VLAPolicy
from vlarft.proprio_model import ProprioModel, fit_proprio_model
from vlarft.run.checkpoint import model_digest, read_header, save_model
from vlarft.sim.simulated_world import Place, SimulatedWorld
from vlarft.success import Agreement, Judgement, Referee, SuccessModel
from vlarft.world_model import Rollout, WorldModel

NO_CAST = torch.autocast("cpu", enabled=False)


def episode(number: int, length: int = 10, success: bool = True) -> Episode:
    images = np.full((length, 8, 8, 3), 20 * number, np.uint8)
    proprio = np.full((length, 8), number, np.float32)
    actions = np.zeros((length, 7), np.float32)
    return Episode(f"s/f/{number}", f"do {number}", images, proprio, actions, actions, success)


class Sums:
    """A world model whose frames show the sum of all first action dimensions so far, over 100."""

    cfg = SimpleNamespace(chunk=4)

    def parameters(self):
        yield torch.zeros(1)

    def begin(self, frames, first, robot):
        self.begun, self.first, self.robot = frames, first, robot
        return SimpleNamespace(total=torch.zeros(len(frames), 1), robot=RobotState(*(v[:, None] for v in robot)))

    def rollout(self, state, actions, generator=None, **options):
        self.asked, self.options = actions, options
        self.random = None if generator is None else torch.rand(1, generator=generator).item()
        if isinstance(state, torch.Tensor):  # a first frame, as `imagined_episodes` has it
            none = torch.zeros(len(state), 1, 8)
            state = SimpleNamespace(total=torch.zeros(len(state), 1), robot=RobotState(none, none))
        moved = actions[..., 0].cumsum(-1)  # (S, G, T): the robot moves as far, in all dimensions
        total = state.total[..., None] + moved
        frames = (total / 100)[..., None, None, None].expand(*total.shape, 3, 8, 8)
        robot = RobotState(state.robot.proprio + moved[..., -1:], actions[..., -1, :1].expand(-1, -1, 8))
        return Rollout(None, frames, SimpleNamespace(total=total[..., -1], robot=robot))


class Bright:
    """A judge that sees a success where a frame is brighter than a number."""

    def __init__(self, level: float, hold: int) -> None:
        self.level, self.cfg = level, SimpleNamespace(hold=hold, threshold=0.75)

    def parameters(self):
        yield torch.zeros(1)

    def judge(self, frames, first_frames, instructions):
        self.seen = first_frames, instructions
        bright = frames.mean((2, 3, 4)) > self.level - 1e-6
        return Judgement(torch.where(bright, 0.9, 0.6), None)

    solved, highest = SuccessModel.solved, SuccessModel.highest


def make(level=0.06, hold=2, horizon=10, starts=2, model=None) -> ImaginedWorld:
    options = {"starts": starts, "horizon": horizon, "camera": "agentview", "autocast": NO_CAST, "greedy": True}
    return ImaginedWorld(model or Sums(), Bright(level, hold), [episode(1), episode(2)], **options)


def chunk(*values: float) -> torch.Tensor:
    """A row of chunks (B, 4, 7) that move dimension 0 by a constant."""
    actions = torch.zeros(len(values), 4, 7)
    actions[..., 0] = torch.tensor(values)[:, None]
    return actions


def test_imaginations_by_hand():
    world = make()
    observations = world.begin(2, 3)
    assert len(observations) == 4 and world.model.begun.shape == (2, 3, 8, 8)
    numbers = [int(name[-1]) for name in world.names]
    for e, obs in enumerate(observations):
        assert obs["instruction"] == f"do {numbers[e // 2]}" and (obs["agentview"] == 20 * numbers[e // 2]).all()
        assert obs["proprio"].tolist() == [numbers[e // 2]] * 8
    # sums 1 2 3 4, 2 4 6 8, 3 6 9 12 and 0: two frames in a row of at least 6 are a success
    answer = world.step([0, 1, 2, 3], chunk(1, 2, 3, 0))
    assert answer.success.tolist() == [False, True, True, False] and answer.done.tolist() == answer.success.tolist()
    assert answer.steps.tolist() == [4, 4, 3, 4]
    assert answer.observations[0]["agentview"][0, 0, 0] == round(255 * 0.04)
    assert answer.observations[3]["proprio"].tolist() == [numbers[1]] * 8
    assert answer.observations[0]["proprio"].tolist() == [numbers[0] + 4] * 8
    # those that go on: 5 6 7 8, held across nothing; and 8 at once, its first frame is not held yet
    answer = world.step([0, 3], chunk(1, 8))
    assert answer.success.tolist() == [True, True] and answer.steps.tolist() == [3, 2]
    assert world.model.asked[:, :, 0, 0].tolist() == [[1, 2], [3, 8]] and world.model.options == {"greedy": True}
    first, texts = world.judge.seen
    assert texts == [f"do {numbers[0]}", f"do {numbers[1]}"] and first.shape == (2, 3, 8, 8)


def test_a_success_is_held_across_the_border_of_two_chunks():
    world = make(level=0.08)
    world.begin(1, 0)
    answer = world.step([0, 1], chunk(2, 2))  # 8 at the last frame
    assert not answer.success.any()
    answer = world.step([0], chunk(0))
    assert answer.success.tolist() == [True] and answer.steps.tolist() == [1]
    world.begin(1, 0)  # nothing is left of the last batch
    assert not world.step([0, 1], chunk(0, 0)).success.any()


def test_every_chunk_is_sampled_with_random_numbers_of_its_own():
    """They depend on the batch and on the number of the chunk."""
    drawn = []
    for numbers in ((3,), (3,), (4,)):
        world = make()
        world.begin(2, *numbers)
        for _ in range(2):
            world.step([0, 1, 2, 3], chunk(0, 0, 0, 0))
            drawn.append(world.model.random)
    assert drawn[:2] == drawn[2:4] and len(set(drawn)) == 4


def test_the_horizon_ends_an_imagination():
    world = make(horizon=6)
    world.begin(2, 0)
    assert not world.step([0, 1, 2, 3], chunk(0, 0, 0, 0)).done.any()
    answer = world.step([1, 2], chunk(3, 6))  # 3 6 9: too late; 6 12: just in time
    assert answer.done.all() and answer.success.tolist() == [False, True] and answer.steps.tolist() == [2, 2]


def test_starts_depend_on_the_numbers_alone():
    names = [make(starts=8) for _ in range(3)]
    for world, numbers in zip(names, ((0, 1), (0, 1), (0, 2))):
        world.begin(2, *numbers)
    assert names[0].names == names[1].names != names[2].names


def test_starts_are_different_episodes_as_far_as_there_are():
    world = make(starts=3)
    world.episodes = [episode(number) for number in range(5)]
    world.begin(1, 0)
    assert len(set(world.names)) == 3
    world.num_starts = 12
    world.begin(1, 0)
    assert sorted(world.names.count(e.name) for e in world.episodes) == [2, 2, 2, 3, 3]


def test_late_starts_are_in_failures_of_a_policy():
    def counting(number, **fields):
        one = episode(number, 20)
        one.images[:] = np.arange(20)[:, None, None, None]
        one.proprio[:] = np.arange(20)[:, None] ** 2
        return dataclasses.replace(one, **fields)

    lost = counting(1, success=False, kind="policy")
    others = [counting(2, success=True, kind="policy"), counting(3, success=False, kind="noisy")]
    world = make(starts=40)
    world.episodes, world.late_starts = [lost, *others], 0.5
    observations = world.begin(2, 0)
    assert not world.model.begun.any()  # the first frame is the context of all
    at = torch.tensor([obs["agentview"][0, 0, 0] for obs in observations])
    is_lost = torch.tensor([name == lost.name for name in world.names]).repeat_interleave(2)
    assert not at[~is_lost].any() and 0.2 < (at[is_lost] > 0).float().mean() < 0.8 and 5 < at.max() < 15
    assert torch.equal((world.model.first[:, 0, 0, 0] * 255).round(), at[::2].float())
    assert torch.equal(world.proprio[:, 0], at.float() ** 2)
    motion = world.model.robot.motion[:, 0].repeat_interleave(2)
    assert torch.equal(motion, torch.where(at > 0, 2 * at - 1, 0).float())  # t^2 - (t - 1)^2
    assert torch.equal(world.steps, at.long())  # the horizon counts from the first frame
    world.horizon = 8
    world.begin(2, 0)
    assert 0 < world.steps.max() <= 6


def test_the_proprio_model_adds_up_motion():
    rng = np.random.default_rng(0)
    episodes = []
    for number in range(30):
        actions = rng.uniform(0, 1, (40, 7)).astype(np.float32)
        velocity = np.zeros((41, 8), np.float32)
        for t in range(40):  # half of the last motion, and the action
            velocity[t + 1, :7] = 0.5 * velocity[t, :7] + 0.1 * actions[t]
        proprio = (1 + velocity[:-1].cumsum(0)).astype(np.float32)
        images = np.zeros((40, 2, 2, 3), np.uint8)
        episodes.append(Episode(f"s/f/{number}", "move", images, proprio, actions, actions))
    model = fit_proprio_model(episodes[:-1], 0, steps=300)
    last, start = episodes[-1], 5
    proprio = torch.from_numpy(last.proprio[start : start + 1])
    motion = proprio - torch.from_numpy(last.proprio[start - 1 : start])
    actions = torch.from_numpy(last.actions[None, start : start + 8])
    states, (end, moved) = model.rollout(RobotState(proprio, motion), actions)
    error = states[0] - torch.from_numpy(last.proprio[start + 1 : start + 9])
    moved_by = torch.from_numpy(last.proprio[start + 8] - last.proprio[start]).abs().mean()
    assert states.shape == (1, 8, 8) and torch.equal(end, states[:, -1]) and error.abs().mean() < 0.1 * moved_by
    torch.testing.assert_close(moved, states[:, 7] - states[:, 6])
    # the last motion, where it is known, tells the next one
    now, before, after = (torch.from_numpy(last.proprio[k : k + 30]) for k in (5, 4, 6))
    known, unknown = (
        (model.rollout(RobotState(now, motion), torch.from_numpy(last.actions[5:35, None]))[0][:, 0] - after)
        .abs()
        .mean()
        for motion in (now - before, torch.zeros_like(now))
    )
    assert known < 0.5 * unknown
    first = torch.from_numpy(last.proprio[:9])  # an episode begins at rest
    states, _ = model.rollout(RobotState(first[:1], torch.zeros(1, 8)), torch.from_numpy(last.actions[None, :8]))
    assert (states[0] - first[1:]).abs().mean() < 0.1 * (first[8] - first[0]).abs().mean()
    again = fit_proprio_model(episodes[:-1], 0, steps=300)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters()))
    fit_proprio_model(episodes, 0, horizon=60, steps=1)  # as far as they go
    short = dataclasses.replace(last, actions=last.actions[:2], proprio=last.proprio[:2])
    with pytest.raises(ValueError, match="no episode has three steps"):
        fit_proprio_model([short], 0)


def test_an_untrained_proprio_model_moves_on_average():
    model = ProprioModel(8, 7)
    model.motion_mean.fill_(0.5)
    states, _ = model.rollout(RobotState(torch.zeros(2, 8), torch.zeros(2, 8)), torch.zeros(2, 3, 7))
    assert states[0, :, 0].tolist() == [0.5, 1.0, 1.5]


def recorded(number: int, success: bool, speed: float, kind: str = "expert") -> Episode:
    one = episode(number, 10, success)
    one.actions[:, 0] = speed
    return dataclasses.replace(one, kind=kind)


def test_the_gate_by_hand(capsys):
    # sums reach 9 * speed: a success from 6 on, held for two frames
    won, lost = recorded(1, True, 1), recorded(2, False, 0.5)
    episodes = [won, lost, recorded(3, False, 2), recorded(4, True, 0.1)]
    found = outcome_gate(Sums(), Bright(0.06, 2), episodes, NO_CAST)
    assert found == Agreement(true_successes=2, true_failures=2, false_successes=1, false_failures=1)
    said = capsys.readouterr().err
    assert "50 % of 4 held-out episodes, too few of them attempts of the policy, have" in said
    # 0.9 where it is bright enough, else 0.6: squared errors of 0.01, 0.36, 0.81 and 0.16
    assert "false successes 1 of 2 [9 %, 91 %], false failures 1 of 2 [9 %, 91 %]; Brier score 0.3" in said
    with pytest.raises(RuntimeError, match=r"1 of 2 failures look like .* right is 0.50, less than --gate-threshold 0"):
        check_outcome_gate(found, 0.9)
    check_outcome_gate(found, 0.5)
    check_outcome_gate(found, None)
    # attempts of the policy count alone, and an episode of one frame not at all
    own = [recorded(5, True, 1, "policy"), recorded(6, False, 2, "policy"), recorded(7, False, 0, "policy")]
    short = dataclasses.replace(episode(8, 1, False), kind="policy")
    found = outcome_gate(Sums(), Bright(0.06, 2), [*episodes, *own, short], NO_CAST)
    assert found == Agreement(true_successes=1, true_failures=2, false_successes=1, false_failures=0)
    with pytest.raises(ValueError, match="1 of 1 episodes succeeded: both outcomes"):
        outcome_gate(Sums(), Bright(0.06, 2), [won], NO_CAST)
    nothing = Agreement(true_successes=1, true_failures=9, false_successes=0, false_failures=1)
    with pytest.raises(RuntimeError, match="0 of 9 failures .* 1 of 1 successes like a failure; .* 0.50"):
        check_outcome_gate(nothing, 0.9)


class Mover:
    """A policy that moves dimension 0 by a constant, and by x_0 beside it."""

    cfg = SimpleNamespace(flow=SimpleNamespace(chunk=4, action_dim=7))
    device = torch.device("cpu")

    def __init__(self, speed: float, noise: float = 0.0) -> None:
        self.speed, self.noise, self.seen = speed, noise, []

    def act(self, observations, noise):
        self.seen.append([obs["instruction"] for obs in observations])
        return self.noise * noise + chunk(*[self.speed] * len(observations))


def test_policies_are_ranked_by_what_they_reach_in_imagination(capsys):
    # sums of 10 actions reach 10 * speed: a success from 6 on, held for two frames
    policies = {"slow": Mover(0.2), "fast": Mover(0.7), "late": Mover(0.6)}
    assert [imagined_rate(policy, make(starts=3), 5, from_zero=True) for policy in policies.values()] == [0, 1, 0]
    assert [len(seen) for seen in policies["fast"].seen] == [3, 3, 3]  # after 4, 8 and 10 actions
    load = {**policies, "late": Mover(0.9)}.__getitem__
    world = make(starts=3)
    for true, rank in (((0.1, 0.5, 0.9), 3**0.5 / 2), ((0.9, 0.5, 0.1), -(3**0.5) / 2), ((0.5, 0.5, 0.5), 0)):
        evaluation = Evaluation(dict(zip(policies, true)), from_zero=True, suites=(), tasks=None, horizon=None)
        assert rank_policies(evaluation, load, world, 0) == pytest.approx(rank)
    told = capsys.readouterr().err
    assert "success 0 % in imagination, 10 % played: slow" in told and "3 policies, rank correlation of their" in told


def test_x_0_of_imagined_policies():
    """All policies get the same, and 0 where the evaluation had 0."""
    rates = [imagined_rate(Mover(0.55, 1.0), make(starts=64), 5, from_zero=zero) for zero in (True, False, False)]
    assert rates[0] == 0 and 0 < rates[1] == rates[2] < 1


def evaluation(path: Path, policies: dict[str, float], **config) -> Path:
    rows = [{"policy": p, "digest": model_digest(p), "all": {"rate": rate}} for p, rate in policies.items()]
    settings = {
        "noise": "zero",
        "perturb": None,
        "plan": 1,
        "suites": ["tabletop_object"],
        "tasks": ["0"],
        "horizon": 16,
    }
    path.write_text(json.dumps({"config": settings | config, "policies": rows}))
    return path


def test_the_gate_of_a_run_ranks_policies(config, tmp_path, capsys, monkeypatch):
    policy = VLAPolicy.load(config.policy)
    extra, paths = read_header(config.policy).extra, []
    for number in range(3):
        paths.append(str(tmp_path / f"{number}.safetensors"))
        torch.nn.init.normal_(policy.head.output.bias)
        policy.save(paths[-1], extra)
    rates = dict(zip(paths, (0.1, 0.2, 0.6)))
    given = evaluation(tmp_path / "results.json", rates)
    assert (
        read_evaluation(tmp_path) == read_evaluation(given) == Evaluation(rates, True, ("tabletop_object",), ("0",), 16)
    )
    for horizon, played in ((None, 180), (200, 180), (20, 20)):  # the suite's limit at the latest
        other = evaluation(tmp_path / "limit.json", rates, horizon=horizon)
        with pytest.raises(ValueError, match=f"of tabletop_object ended after {played} actions, imagined ones end aft"):
            train_rl.main(dataclasses.replace(config, gate_evaluation=str(other), steps=1))
    sampled = read_evaluation(evaluation(tmp_path / "sampled.json", rates, noise="sampled", tasks=None))
    assert not sampled.from_zero and sampled.tasks is None
    with pytest.raises(ValueError, match="results.json and the 2 held-out .* different tasks: only one has 'pick up"):
        train_rl.main(dataclasses.replace(config, gate_evaluation=str(given), steps=1))
    monkeypatch.setattr(
        train_rl, "instructions_of", lambda *of: {("tabletop_object", ("0",)): ["Push the red square"]}[of]
    )
    train_rl.main(dataclasses.replace(config, gate_evaluation=str(given), steps=1))
    assert capsys.readouterr().err.count("% in imagination, ") == 3
    row = json.loads(Path(config.out_dir, "log.jsonl").read_text())
    assert -1 <= row["gate_rank"] <= 1
    train_rl.main(dataclasses.replace(config, gate_evaluation=str(given), steps=1))  # as one that goes on
    assert "--gate-evaluation: no policy is ranked, that is before the first step" in capsys.readouterr().err
    world = SimpleNamespace(device="cpu", model=WorldModel.load(config.world_model), camera="wrist")
    with pytest.raises(ValueError, match="0.safetensors sees agentview, the world model imagines wrist"):
        train_rl.load_ranked(config, paths[0], world)

    few = evaluation(tmp_path / "few.json", dict(list(rates.items())[:2]))
    for path, message in (
        (few, "has 2 policies, an order needs 3 at least"),
        (evaluation(tmp_path / "perturbed.json", rates, perturb="object:5"), "was played with {'perturb': 'object:5'}"),
        (evaluation(tmp_path / "planned.json", rates, plan=8), "was played with {'plan': 8}"),
        (evaluation(tmp_path / "often.json", rates, execute=4), "was played with {'execute': 4}"),
        (evaluation(tmp_path / "noisy.json", rates, noise="stochastic"), "was played with {'noise': 'stochastic'}"),
    ):
        with pytest.raises(ValueError, match=message):
            read_evaluation(path)
    (tmp_path / "other.json").write_text("[]")
    with pytest.raises(ValueError, match="other.json is no results.json of eval_libero.py"):
        read_evaluation(tmp_path / "other.json")
    with pytest.raises(FileNotFoundError, match="no results at .*none.json"):
        read_evaluation(tmp_path / "none.json")
    policy.save(paths[0], extra)
    with pytest.raises(ValueError, match=r"0.safetensors has changed since .*results.json was written"):
        read_evaluation(given)


def test_a_referee_of_parts_is_a_referee_of_the_whole():
    values = torch.rand(3, 12, generator=torch.Generator().manual_seed(0))
    frames = values[..., None, None, None].expand(3, 12, 3, 8, 8)
    first = torch.zeros(3, 3, 8, 8)
    whole = Referee(Bright(0.4, 3), first, ["a"] * 3).success_at([0, 1, 2], frames)
    parts, found = Referee(Bright(0.4, 3), first, ["a"] * 3), torch.full((3,), 13)
    for start in range(0, 12, 4):
        at = parts.success_at([0, 1, 2], frames[:, start : start + 4])
        found = torch.where((found == 13) & (at <= 4), at + start, found)
    assert torch.equal(found, whole) and (whole <= 12).any()


def test_a_referee_compares_with_the_episodes_own_first_frame():
    judge, first = Bright(0.4, 3), torch.rand(3, 3, 8, 8)
    Referee(judge, first, ["a", "b", "c"]).success_at([2, 0], torch.zeros(2, 4, 3, 8, 8))
    assert torch.equal(judge.seen[0], first[[2, 0]]) and judge.seen[1] == ["c", "a"]


PLACE = Place("tabletop_object", 0, 32, ("agentview",))


def test_a_judge_in_the_simulator():
    """It decides in place of the true outcome, frame by frame, and the episode goes on until it does."""
    world = SimulatedWorld([PLACE], 1, 0, Bright(0.0, 3))  # everything is a success, once it is held
    world.begin(2, 0)
    answer = world.step([0, 1], torch.zeros(2, 8, 7))
    assert answer.success.all() and answer.steps.tolist() == [3, 3] and answer.done.all()
    assert world.judge.seen[0].shape == (2, 3, 32, 32) and "block" in world.judge.seen[1][0]
    world = SimulatedWorld([PLACE], 1, 0, Bright(2.0, 3))  # nothing is
    world.begin(2, 0)
    answer = world.step([0], torch.zeros(1, 177, 7))
    assert not answer.done.any() and answer.steps.tolist() == [177]
    answer = world.step([0], torch.zeros(1, 8, 7))
    assert answer.done.all() and not answer.success.any() and answer.steps.tolist() == [3]
    world = SimulatedWorld([PLACE], 1, 0, Bright(0.0, 181))  # held for longer than an episode has frames
    world.begin(1, 0)
    for chunk_steps in (176, 8):
        answer = world.step([0], torch.zeros(1, chunk_steps, 7))
    assert answer.done.all() and not answer.success.any() and answer.steps.tolist() == [4]


@pytest.fixture(scope="module")
def success_model(places, world_model, tmp_path_factory):  # noqa: F811
    out_dir = tmp_path_factory.mktemp("success")
    cfg = dataclasses.replace(
        train_success.PRESETS["smoke"], demos=(str(places),), world_model=str(world_model), steps=2
    )
    train_success.main(dataclasses.replace(cfg, out_dir=str(out_dir), margin=4))
    return out_dir


@pytest.fixture
def config(places, policy_file, world_model, success_model, tmp_path):  # noqa: F811
    policy = VLAPolicy.load(policy_file)
    episodes = load_episodes(places)
    extra = {"train_episodes": [e.name for e in episodes], **image_convention(episodes, "agentview")}
    policy.save(tmp_path / "policy.safetensors", extra)
    return dataclasses.replace(
        train_rl.PRESETS["smoke"],
        world="imagination",
        policy=str(tmp_path / "policy.safetensors"),
        demos=(str(places),),
        world_model=str(world_model),
        success_model=str(success_model),
        out_dir=str(tmp_path / "rl"),
        starts=2,
        horizon=16,
        gate_threshold=0.0,
    )


@pytest.fixture
def two_outcomes(monkeypatch):
    monkeypatch.setattr(train_rl, "play", every_other_succeeds)


@pytest.mark.parametrize("which", ["world_model", "success_model"])
def test_episodes_recorded_anew_under_their_old_names_get_a_warning(config, tmp_path, which):
    episodes, policy = load_episodes(config.demos, successes_only=False), VLAPolicy.load(config.policy)
    cls, path = {"world_model": WorldModel, "success_model": SuccessModel}[which], tmp_path / "anew.safetensors"
    model, extra = cls.load(getattr(config, which)), read_header(getattr(config, which)).extra
    save_model(path, model, model.cfg, {**extra, "episode_digests": {episodes[0].name: "of before"}})
    with pytest.warns(UserWarning, match=f"anew.safetensors knows 1 of {len(episodes)} episodes by name"):
        train_rl.imagined_world(dataclasses.replace(config, **{which: str(path)}), policy, {}, episodes)


def test_the_gate_warns_of_failures_that_last_longer_than_an_imagination(config):
    short = dataclasses.replace(config, horizon=8, steps=1)
    with pytest.warns(UserWarning, match="held-out failures are longer than --horizon 8: the gate replays them to the"):
        train_rl.main(short)


def test_a_run_in_imagination(config, tmp_path, capsys, two_outcomes):
    metrics = train_rl.main(config)
    assert metrics["episode_steps"] <= 16 and "mse" in metrics
    rows = [json.loads(line) for line in Path(config.out_dir, "log.jsonl").read_text().splitlines()]
    assert rows[0]["gate_true_failures"] == 1 and "gate" not in rows[1]
    assert "of 2 held-out episodes, too few of them attempts of the policy, have their" in capsys.readouterr().err
    assert read_header(config.out_dir).extra["rl"]["world"] == "imagination"
    policy, held_out = VLAPolicy.load(config.policy), set(read_header(config.success_model).extra["held_out_episodes"])
    episodes = load_episodes(config.demos, successes_only=False)
    world = train_rl.imagined_world(config, policy, read_header(config.policy).extra, episodes)
    assert {e.name for e in world.episodes} == {e.name for e in episodes} - held_out and len(held_out) == 2
    near = dataclasses.replace(config, world_model=str(tmp_path / "near.safetensors"))
    model, header = WorldModel.load(config.world_model), read_header(config.world_model)
    save_model(near.world_model, model, model.cfg, {**header.extra, "context_lookback": 15})
    with pytest.warns(UserWarning, match="was trained with --context-lookback 15, this run has -1"):
        train_rl.imagined_world(near, policy, read_header(config.policy).extra, episodes)
    sampled = dataclasses.replace(config, imagination="sample", out_dir=str(tmp_path / "sampled"), precision="bf16")
    assert all(np.isfinite(v) for v in train_rl.main(sampled).values())


def test_options_of_the_imagination(config, monkeypatch):
    """The gate replays as learning imagines."""
    policy, extra = VLAPolicy.load(config.policy), read_header(config.policy).extra
    episodes, asked, found = load_episodes(config.demos, successes_only=False), [], Agreement(1, 1, 0, 0)
    monkeypatch.setattr(train_rl, "outcome_gate", lambda *_, **options: asked.append(options["greedy"]) or found)
    for imagination in ("sample", "greedy"):
        cfg = dataclasses.replace(config, imagination=imagination, late_starts=0.25)
        world = train_rl.imagined_world(cfg, policy, extra, episodes)
        assert world.late_starts == 0.25 and world.sampling == {"greedy": imagination == "greedy"}
        train_rl.gate(cfg, world, episodes)
    assert asked == [False, True]


def test_the_gate_asks_about_no_episode_of_the_world_models_training(config, tmp_path):
    policy, extra = VLAPolicy.load(config.policy), read_header(config.policy).extra
    episodes = load_episodes(config.demos, successes_only=False)
    held_out = read_header(config.success_model).extra["held_out_episodes"]
    model, header = WorldModel.load(config.world_model), read_header(config.world_model)
    cfg = dataclasses.replace(config, world_model=str(tmp_path / "wm.safetensors"))
    lost = next(e.name for e in episodes if e.name in held_out and not e.success)
    save_model(cfg.world_model, model, model.cfg, {**header.extra, "train_episodes": [lost]})
    world = train_rl.imagined_world(cfg, policy, extra, episodes)
    with pytest.raises(ValueError, match="1 of 1 episodes succeeded"):  # the failure is left out
        train_rl.gate(cfg, world, episodes)
    save_model(cfg.world_model, model, model.cfg, {**header.extra, "train_episodes": held_out})
    with pytest.raises(ValueError, match="was trained on all that .* holds out. Train the success model again"):
        train_rl.gate(cfg, world, episodes)


def test_a_run_goes_on_with_its_own_episodes(config, monkeypatch, two_outcomes):
    interrupted(monkeypatch, train_rl, 1, lambda: train_rl.main(config))
    refused_with_converted_episodes(monkeypatch, train_rl, lambda: train_rl.main(config))
    load = train_rl.load_episodes
    monkeypatch.setattr(train_rl, "load_episodes", lambda *a, **k: [e for e in load(*a, **k) if e.success])
    with pytest.raises(ValueError, match="was begun with 10 imagined episodes, today there are 5 .* the files in --de"):
        train_rl.main(config)


def test_a_run_in_the_simulator_that_a_model_judges(config, tmp_path):
    judge = SuccessModel.load(config.success_model)
    judge = SuccessModel(dataclasses.replace(judge.cfg, threshold=1e-9, hold=3))  # all that it sees is a success
    text = "pick up the red block and place it in the bin"
    path = str(tmp_path / "judge.safetensors")
    save_model(path, judge, judge.cfg, {**read_header(config.success_model).extra, "instructions": [text]})
    given = {"world": "simulator", "success_model": path, "mse_weight": 0.0, "starts": 1, "steps": 1}
    found = train_rl.main(dataclasses.replace(config, **given))
    assert found["success"] == 1 and found["episode_steps"] == 3


def test_a_run_in_an_imagination_that_poses_drive(config, tmp_path, two_outcomes):
    header, sizes = read_header(config.world_model), WorldModel.load(config.world_model).cfg
    model = WorldModel(dataclasses.replace(sizes, pose_dims=6, gripper_dims=(6,)))
    model.action_bins.set_range(-torch.ones(7), torch.ones(7))
    given = {"demos": config.demos, "world_model": str(tmp_path / "poses.safetensors")}
    save_model(given["world_model"], model, model.cfg, header.extra)
    judge = dataclasses.replace(train_success.PRESETS["smoke"], **given, steps=1, margin=4, out_dir=str(tmp_path / "s"))
    train_success.main(judge)
    found = train_rl.main(dataclasses.replace(config, **given, success_model=judge.out_dir, steps=1))
    assert found["episode_steps"] <= 16 and found["grad_norm"] > 0
    cfg = dataclasses.replace(eval_wm.PRESETS["smoke"], **given, episodes=4, out_dir=str(tmp_path / "eval_wm"))
    found = eval_wm.main(dataclasses.replace(cfg, success_model=judge.out_dir))
    assert set(found["episodes"]["outcomes"]) == {"imagined", "true"} and found["sensitivity"]


def test_refusals(config, tmp_path, policy_file, monkeypatch):
    with pytest.raises(RuntimeError, match="outcome gate: replayed in imagination"):
        train_rl.main(dataclasses.replace(config, gate_threshold=1.1))
    with pytest.raises(ValueError, match="the gate needs episodes that both models hold out: none of"):
        train_rl.gate(config, None, [])
    judged = read_header(config.success_model)
    chose = {**judged.extra, "threshold_episodes": judged.extra["held_out_episodes"]}
    save_model(
        tmp_path / "chose.safetensors",
        SuccessModel.load(config.success_model),
        SuccessModel.load(config.success_model).cfg,
        chose,
    )
    flattered = {"success_model": str(tmp_path / "chose.safetensors"), "gate_threshold": 1.1}
    with (
        pytest.warns(UserWarning, match="chose its threshold on .* of the .* episodes of the gate"),
        pytest.raises(RuntimeError),
    ):
        train_rl.main(dataclasses.replace(config, **flattered))
    with pytest.raises(ValueError, match="nobody tells an imagination's outcome: give --success-model"):
        train_rl.main(dataclasses.replace(config, success_model=None))
    with pytest.raises(ValueError, match="is a demonstration that .* was trained on"):
        train_rl.main(dataclasses.replace(config, policy=str(policy_file)))
    judge, header = SuccessModel.load(config.success_model), read_header(config.success_model)
    other = str(tmp_path / "other.safetensors")
    save_model(other, judge, judge.cfg, {**header.extra, "instructions": ["open the door"]})
    with pytest.raises(ValueError, match="does not know the instruction 'push the red square'"):
        train_rl.main(dataclasses.replace(config, success_model=other))
    with pytest.raises(ValueError, match="does not know the instruction 'pick up the red block"):
        train_rl.main(dataclasses.replace(config, world="simulator", success_model=other))
    save_model(other, judge, judge.cfg, {**header.extra, "camera": "eye_in_hand"})
    for world in ("imagination", "simulator"):
        with pytest.raises(ValueError, match=r"success model .*other.safetensors"):
            train_rl.main(dataclasses.replace(config, world=world, success_model=other))
    hopeless = SuccessModel(dataclasses.replace(judge.cfg, threshold=1.1))
    save_model(other, hopeless, hopeless.cfg, header.extra)
    given = {"success_model": other, "out_dir": str(tmp_path / "hopeless"), "steps": 1}
    with pytest.warns(UserWarning, match="other.safetensors judges nothing a success: among the episodes"):
        found = train_rl.main(dataclasses.replace(config, **given))
    assert found["constant_groups"] == 1 and found["success"] == 0
    model = WorldModel.load(config.world_model)
    for dims, message in (
        (14, "proprio dim: the policy has 8, the world model has 14"),
        (0, "does not predict the robot"),
    ):
        robot = WorldModel(dataclasses.replace(model.cfg, proprio_dim=dims))
        save_model(other, robot, robot.cfg, read_header(config.world_model).extra)
        with pytest.raises(ValueError, match=message):
            train_rl.main(dataclasses.replace(config, world_model=other))
    with pytest.raises(ValueError, match="--horizon 2: a success is held for 3 frames"):
        train_rl.main(dataclasses.replace(config, horizon=2))
    policy, extra = VLAPolicy.load(config.policy), read_header(config.policy).extra
    policy.save(other, {**extra, "instructions": ["open the door"]})
    with pytest.warns(UserWarning, match="not trained on 1 of the instructions of .* 'push the red square'"):
        train_rl.main(dataclasses.replace(config, policy=other, steps=1, out_dir=str(tmp_path / "told")))
    policy.save(other, {**extra, "fast_rendering": True})
    slow = {**image_convention(load_episodes(config.demos), "agentview"), "fast_rendering": False}
    with monkeypatch.context() as patch:
        patch.setattr(train_rl, "image_convention", lambda *_: slow)
        for world in ("imagination", "simulator"):
            with pytest.raises(ValueError, match="policy .* has images of fast rendering, the episodes .* not"):
                train_rl.main(dataclasses.replace(config, policy=other, world=world, success_model=None))
    policy.normalizer.action_low[2], policy.normalizer.action_high[2] = 50.0, 51.0
    policy.save(other, extra)
    with pytest.raises(ValueError, match="other units: 100% of action 2 lie outside"):
        train_rl.main(dataclasses.replace(config, policy=other))
    with pytest.warns(UserWarning, match="--horizon 13: 6 of 6 recorded successes are longer, up to 14 steps"):
        train_rl.main(dataclasses.replace(config, horizon=13, steps=1))


@pytest.mark.parametrize("world", ["imagination", "simulator"])
def test_resume_equals_no_interruption(config, tmp_path, monkeypatch, capsys, world, two_outcomes):
    given = {"world": world, "success_model": None} if world == "simulator" else {"world": world}
    config = dataclasses.replace(config, steps=2, starts=1, **given)
    train_rl.main(config)
    parts = dataclasses.replace(config, out_dir=str(tmp_path / "interrupted"))
    interrupted(monkeypatch, train_rl, 1, lambda: train_rl.main(parts))
    capsys.readouterr()
    train_rl.main(parts)
    assert "outcome gate" not in capsys.readouterr().err  # it has passed
    one, other = (VLAPolicy.load(c.out_dir) for c in (config, parts))
    both = [policy.state_dict() | policy.sigma_net.state_dict() for policy in (one, other)]
    assert all(torch.equal(value, both[1][name]) for name, value in both[0].items())
    assert one.sigma_net.output.weight.any()  # zero before training


def test_eval_wm_judges_whole_episodes(config, tmp_path, capsys):
    cfg = dataclasses.replace(
        eval_wm.PRESETS["smoke"],
        demos=config.demos,
        world_model=config.world_model,
        success_model=config.success_model,
        starts=0,
        episodes=4,
        out_dir=str(tmp_path / "eval_wm"),
    )
    with pytest.warns(UserWarning, match="chose its threshold on 2 of the 4 episodes to judge"):
        found = eval_wm.main(cfg)["episodes"]["outcomes"]
    assert set(found) == {"imagined", "true"} and found["true"]["true_failures"] == found["true"]["true_successes"] == 2
    low, value, high = (found["imagined"][name] for name in ("low", "agreement", "high"))
    assert low - 1e-9 <= value <= high + 1e-9
    assert 0 <= found["true"]["brier"] <= 1 and 0 <= found["true"]["balanced"] <= 1
    assert "judged by the success model, imagined frames: " in capsys.readouterr().out
    for episodes, message in (
        (1, "--success-model .*: [01] of the 1 episodes to judge succeeded, both outcomes are needed"),
        (4, "--success-model .* was trained on 1 of the 4 episodes to judge, first "),
    ):
        header, judge = read_header(config.success_model), SuccessModel.load(config.success_model)
        extra = {**header.extra, "train_episodes": header.extra["held_out_episodes"][:1]}
        save_model(tmp_path / "seen.safetensors", judge, judge.cfg, extra)
        again = {"success_model": str(tmp_path / "seen.safetensors"), "out_dir": str(tmp_path / "none")}
        with pytest.raises(ValueError, match=message):
            eval_wm.main(dataclasses.replace(cfg, episodes=episodes, **again))
    assert not (tmp_path / "none").exists()  # before the work
