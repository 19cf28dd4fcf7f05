"""Closed-loop reinforcement learning: episodes, masks and weights by hand, exact ratios, resume, the simulator."""

import dataclasses
import functools
import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import files_of

import train_rl
from vlarft.closed_loop import Answer, Attempts, action_weights, play
from vlarft.data.episodes import load_episodes
from vlarft.data.windows import WindowSampler
from vlarft.flow import chain_log_prob, matching_loss
from vlarft.grpo import advantages
from vlarft.policy import VLAPolicy
from vlarft.run.random import generator
from vlarft.sim.simulated_world import Place, Played, SimulatedWorld, environment
from vlarft.sim.suites import make_env

SMOKE = train_rl.PRESETS["smoke"]


class Toy:
    """Two starts; an episode succeeds after as many actions as a function of its number and first chunk says."""

    def __init__(self, ends, horizon=20):
        self.ends, self.horizon, self.names = ends, horizon, ["toy/0", "toy/1"]

    def begin(self, group, *numbers):
        self.numbers = numbers
        rng = np.random.default_rng(numbers)
        self.images = [rng.integers(0, 255, (64, 64, 3)).astype(np.uint8) for _ in range(2)]
        self.group, self.played, self.first = group, {}, {}
        return [self.observation(i) for i in range(2 * group)]

    def observation(self, i):
        image = np.roll(self.images[i // self.group], self.played.get(i, 0), 0)
        return {"agentview": image, "proprio": np.zeros(8, np.float32), "instruction": "push"}

    def step(self, episodes, actions):
        success, steps = [], []
        for i, chunk in zip(episodes, actions, strict=True):
            end = self.ends(i, self.first.setdefault(i, chunk))
            left = min(end, self.horizon) - self.played.get(i, 0)
            steps.append(min(left, len(chunk)))
            self.played[i] = self.played.get(i, 0) + steps[-1]
            success.append(self.played[i] == end)
        done = [ok or self.played[i] == self.horizon for ok, i in zip(success, episodes)]
        return Answer([self.observation(i) for i in episodes], *map(torch.tensor, (success, steps, done)))

    def close(self):
        pass


def by_number(i, chunk):
    return (3, 99, 16, 10)[i]  # actions until success; 99: never


def by_action(i, chunk):
    return 10 if chunk[0, 0] > 0 else 99


@pytest.fixture
def policy(policy_file):
    policy = VLAPolicy.load(policy_file)
    policy.add_sigma_net()
    torch.nn.init.normal_(policy.sigma_net.output.weight, generator=torch.Generator().manual_seed(0))
    return policy


def attempts_of(policy, world, group=2, **options):
    stream = functools.partial(generator, "cpu", "episode chains", 0, 0)
    return play(policy, world, group, (0, 0), stream, **options)


@pytest.fixture
def config(demos, policy_file, tmp_path):
    return dataclasses.replace(
        SMOKE, policy=str(policy_file), demos=(str(demos),), out_dir=str(tmp_path / "rl"), starts=2, lr=1e-3
    )


def test_episodes_end_with_success_or_the_horizon(policy):
    attempts = attempts_of(policy, Toy(by_number))
    assert attempts.success.tolist() == [[True, False], [True, True]]
    assert attempts.steps.tolist() == [[3, 20], [16, 10]]
    # chunks in order of time: all four, then all but the first, then the one that goes on to the horizon
    assert attempts.episode.tolist() == [0, 1, 2, 3, 1, 2, 3, 1]
    assert attempts.played.sum(1).tolist() == [3, 8, 8, 8, 8, 8, 2, 4]
    assert attempts.played[0].tolist() == [True] * 3 + [False] * 5


def test_the_world_gets_raw_actions(policy):
    """What the flow ends with, decoded by the policy's normaliser, which is not the identity."""
    world = Toy(by_number)
    chunks = attempts_of(policy, world).x[:4, -1]  # the first chunk of each episode
    played = torch.stack([torch.as_tensor(world.first[i]) for i in range(4)])
    torch.testing.assert_close(played, policy.normalizer.decode_actions(chunks))
    assert not torch.allclose(played[..., :3], chunks[..., :3], atol=0.05)


def test_noise_does_not_depend_on_the_others(policy):
    """Nor do observations: the same episode has the same chain, whoever else is still playing."""
    some, all_of_them = (attempts_of(policy, Toy(ends)) for ends in (by_number, lambda i, chunk: 99))
    last = some.x[some.episode == 1][2]
    torch.testing.assert_close(last, all_of_them.x[all_of_them.episode == 1][2], atol=1e-4, rtol=0)
    assert not torch.allclose(last, some.x[some.episode == 1][1], atol=0.1)
    assert not torch.allclose(some.x[0], some.x[1], atol=0.1)  # of one start
    x_0 = some.x[some.episode == 1][:, 0]
    assert not torch.allclose(x_0[0], x_0[1], atol=0.1)  # of two chunks


def test_from_zero_only_the_steps_are_noisy(policy, config):
    attempts = attempts_of(policy, Toy(by_number), from_zero=True)
    assert not attempts.x[:, 0].any() and attempts.x[:, 1].std() > 0.01
    assert not torch.allclose(attempts.x[0, -1], attempts.x[1, -1], atol=0.05)  # of one start
    train_rl.make_trainable(dataclasses.replace(config, sigma_max=policy.cfg.flow.sigma_max), policy)
    weight = action_weights(attempts, advantages(attempts.success.float()))
    assert train_rl.backward(config, policy, attempts, weight)["ratio_max"] == pytest.approx(1, abs=1e-5)


def test_weights_by_hand():
    played = torch.tensor([[1, 1], [1, 1], [1, 1], [1, 0], [1, 1], [1, 1]], dtype=torch.bool)
    success = torch.tensor([[True, False], [True, True]])
    attempts = Attempts(torch.tensor([0, 1, 2, 0, 1, 3]), *[None] * 4, played, success, torch.tensor([[3, 4], [2, 2]]))
    advantage = advantages(success.float())  # +-1/2 in the first group, 0 in the second
    weight = action_weights(attempts, advantage)
    # half of the episodes are in a group of both outcomes: a mean over these two
    plus, minus = 0.5 / 3 / 2, -0.5 / 4 / 2
    expected = [[plus, plus], [minus, minus], [0, 0], [plus, 0], [minus, minus], [0, 0]]
    assert torch.allclose(weight, torch.tensor(expected))
    equal = attempts._replace(success=torch.tensor([[True, True], [False, False]]))
    assert not action_weights(equal, advantages(equal.success.float())).any()


def test_first_update_has_ratio_one_and_the_gradient_of_reinforce(policy, config):
    attempts = attempts_of(policy, Toy(by_number), group=2)
    weight = action_weights(attempts, advantages(attempts.success.float(), divide_by_std=True))
    cfg = dataclasses.replace(config, micro_chunks=3)
    nets = train_rl.make_trainable(dataclasses.replace(cfg, sigma_max=policy.cfg.flow.sigma_max), policy)
    metrics = train_rl.backward(cfg, policy, attempts, weight)
    assert metrics["ratio_max"] == pytest.approx(1, abs=1e-5) and metrics["approx_kl"] == pytest.approx(0, abs=1e-6)
    parameters = [p for net in nets.values() for p in net.parameters()]
    found = [p.grad.clone() for p in parameters if p.grad is not None]
    policy.zero_grad()
    cond = policy.condition(attempts.context, attempts.proprio)
    log_prob = chain_log_prob(policy.head, policy.sigma_net, attempts.x, cond).log_prob  # (M, K, T, A)
    by_action = log_prob.sum(3).mean(1)
    total = sum(weight[m, t] * by_action[m, t] for m in range(len(weight)) for t in range(8) if attempts.played[m, t])
    (-total).backward()
    expected = [p.grad for p in parameters if p.grad is not None]
    assert len(found) == len(expected) > 10
    for ours, theirs in zip(found, expected):
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-3)


def test_metrics_are_of_the_actions_played_however_they_are_split(policy, config):
    attempts = attempts_of(policy, Toy(by_number), group=2)
    noise = torch.randn(attempts.log_prob.shape, generator=torch.Generator().manual_seed(0))
    attempts = attempts._replace(log_prob=attempts.log_prob + 0.1 * noise)
    weight = action_weights(attempts, advantages(attempts.success.float()))
    train_rl.make_trainable(dataclasses.replace(config, sigma_max=policy.cfg.flow.sigma_max), policy)
    found = []
    for micro_chunks in (1, 64):
        found.append(
            train_rl.backward(dataclasses.replace(config, micro_chunks=micro_chunks), policy, attempts, weight)
        )
    for name in ("ratio_mean", "clip_frac", "approx_kl"):
        assert found[0][name] == pytest.approx(found[1][name], rel=1e-4), name
    assert found[0]["approx_kl"] > 0 and len(set(attempts.played[weight.ne(0).any(1)].sum(1).tolist())) > 1


def test_a_sigma_net_that_reads_x_stays_one(policy, config):
    """As that of public weights."""
    flow = dataclasses.replace(policy.cfg.flow, sigma_uses_x=True)
    policy.cfg, policy.sigma_net = dataclasses.replace(policy.cfg, flow=flow), None
    train_rl.make_trainable(config, policy)
    assert policy.cfg.flow.sigma_uses_x and policy.sigma_net.cfg.sigma_uses_x


def test_the_ratio_is_clipped(policy, config):
    """Chunks that have become far more likely count 1 + clip for each action that was played."""
    train_rl.make_trainable(dataclasses.replace(config, sigma_max=policy.cfg.flow.sigma_max), policy)
    attempts = attempts_of(policy, Toy(by_number))
    before = attempts._replace(log_prob=attempts.log_prob - 1)
    loss, metrics = train_rl.episode_loss(
        dataclasses.replace(config, clip=0.3), policy, before, attempts.played.float()
    )
    assert loss.item() == pytest.approx(-1.3 * attempts.played.sum().item(), rel=1e-5) and metrics["clip_frac"] == 1


def test_what_succeeds_becomes_more_likely(policy, config):
    cfg = dataclasses.replace(config, mse_weight=0.0, steps=8, group=16, lr=4e-3)
    train_rl.main(cfg, world=Toy(by_action))
    rates = [json.loads(line)["success"] for line in Path(cfg.out_dir, "log.jsonl").read_text().splitlines()]
    assert np.mean(rates[-3:]) > np.mean(rates[:3]) + 0.2, rates


def test_head_and_sigma_net_move_and_nothing_else(config, policy_file):
    metrics = train_rl.main(dataclasses.replace(config, seed=3), world=(world := Toy(by_number)))
    assert world.numbers == (3, config.steps - 1)  # other starts in every step
    groups = torch.load(f"{config.out_dir}/train_state.pt", weights_only=True)["optimizer"]["param_groups"]
    assert [group["lr"] for group in groups] == pytest.approx([config.lr * 2 / 3, config.sigma_lr * 2 / 3])  # warm-up
    before, after = VLAPolicy.load(policy_file), VLAPolicy.load(config.out_dir)
    moved = {k for k, v in before.named_parameters() if not torch.equal(v, after.get_parameter(k))}
    assert moved and all(k.startswith("head.") for k in moved)
    assert after.sigma_net.output.weight.abs().max() > 0  # started at zero
    assert metrics["success"] == 0.75 and metrics["constant_groups"] == 0.5 and metrics["episode_steps"] == 49 / 4
    assert {"policy_loss", "mse", "grad_norm", "sigma", "approx_kl", "play_s", "update_s"} <= set(metrics)


def test_every_step_explores_with_noise_of_its_own(config, monkeypatch):
    asked, real = [], train_rl.play

    def noted(policy, world, group, numbers, stream, **options):
        asked.append((numbers, stream(1).initial_seed(), options["from_zero"]))
        return real(policy, world, group, numbers, stream, **options)

    monkeypatch.setattr(train_rl, "play", noted)
    weights, backward = [], train_rl.backward
    monkeypatch.setattr(train_rl, "backward", lambda *args: weights.append(args[2:]) or backward(*args))
    for seed, noise in ((3, "zero"), (4, "sampled")):
        cfg = dataclasses.replace(config, seed=seed, noise=noise, out_dir=f"{config.out_dir}{seed}")
        train_rl.main(cfg, world=Toy(by_number))
    assert [(numbers, zero) for numbers, _, zero in asked] == [
        ((3, 0), True), ((3, 1), True), ((4, 0), False), ((4, 1), False)
    ]  # fmt: skip
    assert len({first for _, first, _ in asked}) == 4
    attempts, weight = weights[0]
    expected = action_weights(attempts, advantages(attempts.success.float(), divide_by_std=True))
    assert torch.equal(weight, expected)


def test_a_loss_that_is_not_finite_names_starts_and_demonstrations(config, monkeypatch):
    monkeypatch.setattr(train_rl, "demonstration_loss", lambda *_: torch.tensor(float("nan"), requires_grad=True))
    with pytest.raises(FloatingPointError, match="loss is nan at step 0 .*from episodes toy/0, toy/1, .*demo_"):
        train_rl.main(config, world=Toy(by_number))


def test_without_a_mixed_group_there_is_no_update(config, policy_file):
    """Nor one of the flow-matching term alone."""
    metrics = train_rl.main(config, world=Toy(lambda i, chunk: 99))
    assert config.mse_weight and metrics["constant_groups"] == 1 and "grad_norm" not in metrics
    state = torch.load(f"{config.out_dir}/train_state.pt", weights_only=True)
    assert not state["optimizer"]["state"] and not VLAPolicy.load(config.out_dir).sigma_net.output.weight.any()
    before, after = VLAPolicy.load(policy_file), VLAPolicy.load(config.out_dir)
    assert all(torch.equal(v, after.get_parameter(k)) for k, v in before.named_parameters())


def test_the_flow_matching_term_imitates_what_was_intended(policy, config, monkeypatch):
    windows = WindowSampler(load_episodes(config.demos, successes_only=False), 1, policy.cfg.flow.chunk)
    batch = windows.batch(train_rl.MSE_CHUNKS, config.seed, 5)
    noisy = batch._replace(actions=(batch.actions + 0.3).clamp(-1, 1))
    monkeypatch.setattr(
        windows, "batch", lambda size, *numbers, device: {(train_rl.MSE_CHUNKS, 0, 5): noisy}[(size, *numbers)]
    )
    found = train_rl.demonstration_loss(config, policy, windows, 5)
    context = policy.encode_frames(batch.frames[:, 0], batch.instructions)
    target, cond = policy.normalizer.encode_actions(batch.intended), policy.condition(context, batch.proprio)
    noise = generator("cpu", "flow matching", 0, 5)
    expected = matching_loss(policy.head, target, cond, generator=noise, draws=train_rl.MSE_DRAWS)[0]
    torch.testing.assert_close(found, expected)


def test_the_weight_of_the_flow_matching_term(config, tmp_path, monkeypatch):
    """Where the objective has no gradient, it is all that updates, with another batch in every step and epoch."""
    norms, asked, term, objective = {}, [], train_rl.demonstration_loss, train_rl.episode_loss
    monkeypatch.setattr(
        train_rl, "demonstration_loss", lambda *arguments: asked.append(arguments[3:]) or term(*arguments)
    )
    monkeypatch.setattr(train_rl, "episode_loss", lambda *arguments: (0 * objective(*arguments)[0], {}))
    for weight in (0.5, 1.0):
        cfg = dataclasses.replace(config, mse_weight=weight, out_dir=str(tmp_path / str(weight)))
        train_rl.main(cfg, world=Toy(by_number))
        rows = [json.loads(line) for line in Path(cfg.out_dir, "log.jsonl").read_text().splitlines()]
        norms[weight] = rows[0]["grad_norm"]
    assert norms[1.0] == pytest.approx(2 * norms[0.5], rel=1e-4)
    train_rl.main(dataclasses.replace(config, epochs=2), world=Toy(by_number))
    assert asked == [(0,), (1,)] * 2 + [(0,), (1,), (2,), (3,)]


@pytest.mark.parametrize("changes", [{"epochs": 3, "clip": 0.01}, {"precision": "bf16", "keep_interval": 1}])
def test_options(config, changes, monkeypatch):
    given, played = [], train_rl.play
    monkeypatch.setattr(train_rl, "play", lambda *a, **k: given.append(k["bf16"]) or played(*a, **k))
    metrics = train_rl.main(dataclasses.replace(config, **changes), world=Toy(by_number))
    assert all(np.isfinite(v) for v in metrics.values()) and set(given) == {"precision" in changes}
    copies = Path(config.out_dir).glob("model_*.safetensors")
    assert {c.stem for c in copies} == ({f"model_{n:06}" for n in (1, 2)} if "keep_interval" in changes else set())
    if "epochs" in changes:  # the second epoch scores an updated policy
        assert metrics["ratio_mean"] != pytest.approx(1, abs=1e-6) and metrics["clip_frac"] > 0


def test_metrics_of_a_step_are_of_all_its_updates():
    updates = [{"mse": 1.0, "ratio_max": 3.0}, {"mse": 2.0, "ratio_max": 1.0}]
    assert train_rl.over_epochs(updates) == {"mse": 1.5, "ratio_max": 3.0} and train_rl.over_epochs([]) == {}


def test_resume_equals_no_interruption(config, tmp_path, monkeypatch):
    config = dataclasses.replace(config, steps=3)
    train_rl.main(config, world=Toy(by_action))
    whole = torch.load(f"{config.out_dir}/train_state.pt", weights_only=True)
    interrupted = dataclasses.replace(config, out_dir=str(tmp_path / "interrupted"))

    class Stops(Toy):
        begun = 0

        def begin(self, group, *numbers):
            self.begun += 1
            if self.begun == 3:
                raise KeyboardInterrupt
            return super().begin(group, *numbers)

    with pytest.raises(KeyboardInterrupt):
        train_rl.main(interrupted, world=Stops(by_action))
    load = train_rl.load_episodes
    with monkeypatch.context() as patch, pytest.raises(ValueError, match="was begun with 4 imitated episodes, today"):
        patch.setattr(train_rl, "load_episodes", lambda *a, **k: load(*a, **k)[1:])
        train_rl.main(interrupted, world=Toy(by_action))
    train_rl.main(interrupted, world=Toy(by_action))
    resumed = torch.load(f"{interrupted.out_dir}/train_state.pt", weights_only=True)
    assert whole["step"] == resumed["step"] == 3
    assert all(torch.equal(value, resumed["policy"][key]) for key, value in whole["policy"].items())
    for slots, others in zip(whole["optimizer"]["state"].values(), resumed["optimizer"]["state"].values()):
        assert all(torch.equal(slots[k], others[k]) for k in slots)
    before = files_of(config.out_dir)
    train_rl.main(config, world=Toy(by_action))  # a finished run is left as it is
    assert files_of(config.out_dir) == before


def test_errors(config, monkeypatch):
    with pytest.raises(ValueError, match="--sigma-min 0.3 exceeds --sigma-max 0.2"):
        dataclasses.replace(config, sigma_min=0.3, sigma_max=0.2)
    with pytest.raises(ValueError, match="--late-starts 0.5 is for imagination"):
        dataclasses.replace(config, world="simulator", late_starts=0.5)
    with pytest.raises(ValueError, match="unknown suite 'tabletop_objects'"):
        train_rl.main(dataclasses.replace(config, world="simulator", suites=("tabletop_objects",)))
    with pytest.raises(ValueError, match="unknown task 'x' of tabletop_object"):
        train_rl.main(dataclasses.replace(config, world="simulator", tasks=("x",)))
    policy = VLAPolicy.load(config.policy)
    policy.cfg = dataclasses.replace(policy.cfg, cameras=("agentview", "eye_in_hand"))
    with pytest.raises(ValueError, match="sees 2 cameras, the flow-matching term reads one: give --mse-weight 0"):
        train_rl.demonstrated(config, policy, {}, [])
    assert train_rl.demonstrated(dataclasses.replace(config, mse_weight=0.0), policy, {}, []) is None
    policy, episodes = VLAPolicy.load(config.policy), load_episodes(config.demos)
    with pytest.warns(UserWarning, match=f"policy {config.policy} knows 1 of {len(episodes)} episodes by name, first"):
        train_rl.demonstrated(config, policy, {"episode_digests": {episodes[1].name: "of before"}}, episodes)
    known = {"train_episodes": [episodes[0].name, "of/another/folder"]}
    with pytest.warns(
        UserWarning, match="lacks 1 of the 2 demonstrations .* first of/another/folder: .* other 1 alone"
    ):
        assert [e.name for e in train_rl.demonstrated(config, policy, known, episodes).episodes] == [episodes[0].name]
    monkeypatch.setattr(train_rl.distributed, "world_size", lambda: 2)
    with pytest.raises(ValueError, match="runs in one process"):
        train_rl.main(config)


PLACES = [Place("tabletop_object", task, 32, ("agentview",)) for task in (0, 1)]


def test_starts_are_of_all_tasks_in_turn():
    """Also of more tasks than a step has starts."""
    world = SimulatedWorld([PLACES[0]._replace(task=task) for task in range(5)], 2, 0)
    world.workers = SimpleNamespace(run=lambda _, jobs: [(job, Played(*[None] * 5), 0.0) for job in jobs])
    met = []
    for step in range(5):
        world.begin(1, 0, step)
        met += [int(name.split("/")[1]) for name in world.names]
    assert met == [0, 1, 2, 3, 4, 0, 1, 2, 3, 4]


def test_a_simulated_episode_is_that_of_its_environment():
    world = SimulatedWorld(PLACES, 3, 0)
    observations = world.begin(2, 5, 7)
    assert len(observations) == 6 and [name.rpartition("/")[0] for name in world.names] == [
        "tabletop_object/1",
        "tabletop_object/0",
        "tabletop_object/1",
    ]
    many = SimulatedWorld(PLACES, 100, 0)
    many.workers = SimpleNamespace(run=lambda _, jobs: [(job, Played(*[None] * 5), 0.0) for job in jobs])
    many.begin(1, 5, 7)
    assert len(set(many.names)) == 100  # starts without number: none is met twice
    again = SimulatedWorld(PLACES, 3, 0).begin(2, 5, 7)
    assert all(np.array_equal(a["agentview"], b["agentview"]) for a, b in zip(observations, again))
    assert np.array_equal(observations[0]["agentview"], observations[1]["agentview"])  # a group has one start
    assert not np.array_equal(observations[0]["agentview"], observations[4]["agentview"])
    actions = torch.rand(2, 8, 7, generator=torch.Generator().manual_seed(0)) * 2 - 1
    for chunk in (actions[:, :4], actions[:, 4:]):
        answer = world.step([3, 4], chunk)
    env = make_env("tabletop_object", 0, 32)
    env.reset(seed=int(world.names[1].rpartition("/")[2]))
    for action in actions[0].numpy():
        env.step(action)
    assert np.array_equal(answer.observations[0]["agentview"], env.observe()["agentview"])
    assert answer.steps.tolist() == [4, 4] and not answer.done.any() and not answer.success.any()
    assert world.now[0].steps == 0  # nobody else moved


def test_the_horizon_ends_a_simulated_episode():
    world = SimulatedWorld(PLACES[:1], 1, 0)
    world.begin(2, 0)
    still = torch.zeros(1, 179, 7)
    assert not world.step([1], still).done.any()
    answer = world.step([1], still)
    assert answer.done.tolist() == [True] and answer.success.tolist() == [False] and answer.steps.tolist() == [1]
    world = SimulatedWorld([PLACES[0]._replace(horizon=5)], 1, 0)
    world.begin(1, 0)
    answer = world.step([0], still[:, :8])
    assert answer.done.tolist() == [True] and answer.steps.tolist() == [5]
    assert environment(PLACES[0]._replace(horizon=999)).horizon == 180  # the suite's limit at the latest


def test_workers_change_nothing():
    actions = torch.rand(6, 8, 7, generator=torch.Generator().manual_seed(0)) * 2 - 1
    answers = []
    for count in (0, 2):
        world = SimulatedWorld(PLACES, 3, count)
        world.begin(2, 1)
        answers.append(world.step(range(6), actions))
        world.close()
    one, other = answers
    for a, b in zip(one.observations, other.observations, strict=True):
        assert np.array_equal(a["agentview"], b["agentview"]) and np.array_equal(a["proprio"], b["proprio"])
    assert all(torch.equal(a, b) for a, b in zip(one[1:], other[1:]))


def test_success_ends_a_simulated_episode(tmp_path):
    """An expert's demonstration, chunk by chunk."""
    from vlarft.sim.suites import make_expert

    world = SimulatedWorld(PLACES[:1], 1, 0)
    world.begin(1, 3)
    env = make_env("tabletop_object", 0, 32)
    env.reset(seed=int(world.names[0].rpartition("/")[2]))
    expert, actions = make_expert(env, 0), []
    while not env.success():
        actions.append(np.asarray(expert.act()[0], dtype=np.float32))
        env.step(actions[-1])
    rest = len(actions) % 8 or 8
    chunks = torch.from_numpy(np.stack(actions + [actions[-1]] * 8))
    for i in range(0, len(actions), 8):
        answer = world.step([0], chunks[None, i : i + 8])
    assert answer.success.tolist() == [True] and answer.done.tolist() == [True] and answer.steps.tolist() == [rest]

    # a judge's episodes go on, as long as it sees no success
    blind = SimpleNamespace(
        cfg=SimpleNamespace(hold=3),
        judge=lambda frames, *_: SimpleNamespace(success=torch.zeros(frames.shape[:2])),
        solved=lambda values: values > 0.5,
        parameters=lambda: iter([torch.zeros(1)]),
    )
    judged = SimulatedWorld(PLACES[:1], 1, 0, blind)
    judged.begin(1, 3)
    for i in range(0, len(actions), 8):
        answer = judged.step([0], chunks[None, i : i + 8])
    assert answer.success.tolist() == [False] and answer.done.tolist() == [False] and answer.steps.tolist() == [8]
