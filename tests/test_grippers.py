"""Which action dimensions are grippers: from the file to the actions that are played."""

import json
import warnings
from dataclasses import replace

import numpy as np
import pytest
import torch

import train_sft
from vlarft.data import WindowSampler, load_episodes
from vlarft.data.check import check
from vlarft.data.consistency import same_robot
from vlarft.data.convert import change
from vlarft.data.convert import main as convert
from vlarft.data.episode import Episode, no_ops
from vlarft.data.lerobot_writer import write_lerobot
from vlarft.normalizer import Normalizer
from vlarft.policy import VLAPolicy
from vlarft.sensitivity import Perturbations, half_range, perturb

STEPS, SIZE = 40, 64
BASE = {"names": ["vx", "vy", "omega"]}


def motions(width: int, seed: int) -> np.ndarray:
    """(T, A) waves of half the unit range."""
    t = np.arange(STEPS)[:, None] / 10
    return 0.5 * np.sin(t * (1 + np.arange(width)) + seed).astype(np.float32)


def commands(seed: int) -> np.ndarray:
    return np.where(np.arange(STEPS) < 10 + seed, -1, 1).astype(np.float32)


def episode(actions: np.ndarray, seed: int = 0, **fields) -> Episode:
    rng = np.random.default_rng(seed)
    images = rng.integers(0, 256, (len(actions), 1, 1, 3), dtype=np.uint8) + np.zeros((1, SIZE, SIZE, 1), np.uint8)
    proprio = 0.1 * np.cumsum(actions, 0)
    cameras = {"agentview": images}
    return Episode(f"s/{seed}", "go", images, proprio, actions, actions, cameras=cameras, **fields)


def make(root, action: dict, columns=lambda seed: motions(3, seed), **about):
    """A LeRobot set of 12 episodes; `action` and `about` go into info.json."""
    write_lerobot(root, (episode(columns(i), i) for i in range(12)), 10, images="png")
    info = json.loads((root / "meta/info.json").read_text())
    info["features"]["action"] |= action
    info["vlarft"] |= about
    (root / "meta/info.json").write_text(json.dumps(info))
    return root


@pytest.mark.parametrize(
    ("names", "dims"),
    [
        (["x", "y", "z", "gripper"], (3,)),
        ({"motors": ["left_arm", "left_Gripper.pos", "right_arm", "right_gripper.pos"]}, (1, 3)),
        ({"gripper": 0, "z": 3, "y": 2, "x": 1}, (0,)),
        ([["vx", "vy", "omega", "lift"]], ()),
        (["motor_0", "motor_1", "motor_2", "motor_3"], None),  # says nothing
        (["actions"], None),
        (None, None),
    ],
)
def test_names_say_which_dimensions_are_grippers(tmp_path, names, dims):
    def columns(seed):
        out = motions(4, seed)
        out[:, list((3,) if dims is None else dims)] = commands(seed)[:, None]
        return out

    make(tmp_path / "set", {"names": names}, columns)
    first = load_episodes(tmp_path / "set")[0]
    assert first.gripper_dims == dims and first.grippers == ((3,) if dims is None else dims)
    report, _ = check(tmp_path / "set")
    shown = ", ".join(map(str, first.grippers)) or "none"
    source = "assumed: the files do not say" if dims is None else "as the files say"
    assert report.facts["gripper dimensions"] == f"{shown} ({source})" and not report.errors


def test_a_last_dimension_that_is_no_gripper_is_refused_until_someone_says_what_it_is(tmp_path):
    make(tmp_path / "set", {"names": None})
    text = r"dimension 2\), the last, as the files do not name one, lies between -0.9 and 0.9 in 100% .*--held-dims 2"
    with pytest.raises(ValueError, match=text):
        load_episodes(tmp_path / "set")
    for number, (flags, grippers, held) in enumerate(
        [(["--gripper-dims"], (), ()), (["--held-dims", "2"], (), (2,)), (["--held-dims", "1", "2"], (), (1, 2))]
    ):
        out = tmp_path / str(number)
        convert([str(tmp_path / "set"), str(out), "--format", "lerobot", "--images", "png", *flags])
        first = load_episodes(out)[0]
        assert (first.gripper_dims, first.held_dims) == (grippers, held)
    assert load_episodes(make(tmp_path / "said", {"names": None}, gripper_dims=[]))[0].gripper_dims == ()
    small = make(tmp_path / "small", {"names": ["x", "y", "grip"]}, lambda i: motions(3, i).round() * 0.3)
    with pytest.raises(ValueError, match=r"gripper action \(dimension 2\) lies between -0.9 and 0.9 in 100% "):
        load_episodes(small)  # -0.3 and 0.3 would be played as -1 and +1
    for wrong in ([3], [-1], ["2"], 2, [True]):
        make(tmp_path / f"wrong {wrong}", {"names": None}, gripper_dims=wrong)
        with pytest.raises(ValueError, match=r"meta/info.json: vlarft.gripper_dims is .*a list from 0 \.\. 2"):
            load_episodes(tmp_path / f"wrong {wrong}")


@pytest.mark.parametrize(("scale", "lies"), [(200.0, r"\[.*\]; expected"), (0.5, r"\[0, 0.\d+\], never below 0; ")])
def test_an_assumed_gripper_in_other_units_may_be_none(tmp_path, scale, lies):
    """As of pusht, whose two actions are coordinates."""
    place = make(tmp_path / "set", {"names": None}, lambda i: scale * np.abs(motions(2, i) - motions(2, i)[:1]))
    text = (
        rf"dimension 1\) lies in {lies}.* do not name a gripper, .* --gripper-dims without a number, .* --held-dims 1$"
    )
    with pytest.raises(ValueError, match=text):
        load_episodes(place)
    named = make(tmp_path / "named", {"names": ["x", "grip"]}, lambda i: scale * np.abs(motions(2, i)))
    with pytest.raises(ValueError, match=r"\(dimension 1\) lies in .*two$"):
        load_episodes(named)


def test_robots_whose_dimensions_have_other_names(tmp_path):
    """Degrees and -100 .. 100 of one arm: widths and ranges do not tell them apart."""

    def columns(seed):
        return np.concatenate([motions(2, seed), commands(seed)[:, None]], 1)

    joints = {"old": ["main_pan", "main_lift", "gripper"], "new": ["pan.pos", "lift.pos", "gripper"], "none": None}
    for number, (name, names) in enumerate(joints.items()):
        make(tmp_path / "all" / name, {"names": names}, lambda seed, n=number: columns(seed + n), gripper_dims=[2])
    old, new, none = (tmp_path / "all" / name for name in joints)
    text = r"action 0 is 'main_pan' in old/episode_000000, 'pan.pos' in new/episode_000000: if they are other joints"
    with pytest.warns(UserWarning, match=text):
        load_episodes([old, new])
    for places in ([old, none], [new]):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            load_episodes(places)
        assert not any("joints" in str(w.message) for w in caught)
    assert any("action 0 is 'pan.pos' in new" in warning for warning in check(tmp_path / "all")[0].warnings)
    options = ["--format", "lerobot", "--images", "png"]
    text = (
        r"old/episode_000000 has the action main_pan, main_lift, gripper, the episodes before it pan.pos, .*two apart"
    )
    with pytest.raises(ValueError, match=text):
        convert([str(tmp_path / "all"), str(tmp_path / "one"), *options])


def test_changes_by_hand(tmp_path):
    two = np.stack([commands(0), motions(1, 0)[:, 0], 50 + 50 * commands(0)], 1)
    one = change(episode(two), gripper_dims=(2,), gripper=(0, 100))
    assert one.actions[:, 2].tolist() == commands(0).tolist() and one.actions[:, 1].tolist() == two[:, 1].tolist()
    near = change(episode(two), gripper_dims=(2,), gripper=(5, 95))  # 5.6 % of the span beyond
    assert near.actions[:, 2].tolist() == commands(0).tolist()
    text = r"s/0: the gripper actions lie in \[0, 100\]; got --gripper 1 0: give the values"
    with pytest.raises(ValueError, match=text):
        change(episode(two), gripper_dims=(2,), gripper=(1, 0))
    with pytest.raises(ValueError, match=r"\[0, 100\]; got --gripper 0 80"):
        change(replace(episode(two), actions=two * 0), gripper_dims=(2,), gripper=(0, 80))  # the intended ones alone
    with pytest.raises(ValueError, match=r"action dimensions 0 \.\. 2, .* --gripper-dims \[3\], .*: 3 does not fit"):
        change(episode(two), gripper_dims=(3,))
    with pytest.raises(ValueError, match=r"got --gripper-dims \[1\], --held-dims \[1\]: 1 does not fit"):
        change(episode(two), gripper_dims=(1,), held_dims=(1,))
    with pytest.raises(ValueError, match="s/0 has no gripper dimension to convert; name it with --gripper-dims"):
        change(episode(two), gripper_dims=(), gripper=(0, 100))
    (problem,) = same_robot([one, replace(one, gripper_dims=(0, 2), name="o")])
    assert "gripper dimensions: (2,) in s/0, (0, 2) in o" in problem
    source = make(tmp_path / "wide", {"names": None}, lambda i: np.concatenate([motions(6, i), two[:, :1]], 1))
    first = replace(load_episodes(source)[0], gripper_dims=(6,))
    assert change(first, gripper_dims=(0,)).actions is first.actions


def test_beyond_the_end_motions_stop_and_grippers_and_held_dimensions_stay():
    actions = np.stack([commands(0), motions(1, 0)[:, 0], motions(1, 1)[:, 0], commands(5)], 1)
    for grippers, held, stays in (((0, 3), (), (0, 3)), ((0,), (2,), (0, 2)), ((), (), ()), (None, (), (3,))):
        one = episode(actions, gripper_dims=grippers, held_dims=held)
        batch = WindowSampler([one], num_frames=1, chunk=4).windows(np.array([[0, STEPS - 2]]))
        expected = [float(actions[-1, i]) if i in stays else 0.0 for i in range(4)]
        assert batch.intended[0, 2:].tolist() == batch.actions[0, 2:].tolist() == [expected] * 2
    one = episode(actions, gripper_dims=(0, 3))
    keys = WindowSampler([one], num_frames=1).key_positions[0]
    events = [10] * 10 + [15] * 5 + [STEPS - 1] * (STEPS - 15)  # the first gripper closes, the second, the end
    assert keys.tolist() == one.proprio[events, :3].tolist()


def test_no_ops_of_several_grippers():
    actions = np.zeros((5, 4), np.float32)
    actions[:, 0], actions[:, 3], actions[:, 2] = [-1, 1, 1, 1, 1], [-1, -1, 1, 1, 1], [0.2, 0.2, 0.2, 0.3, 0.3]
    one = episode(actions, gripper_dims=(0, 3), held_dims=(2,))
    one = replace(one, proprio=np.zeros_like(one.proprio))  # the robot rests
    assert no_ops(one).tolist() == [True, False, False, False, True]
    assert no_ops(replace(one, held_dims=())).tolist() == [False] * 5  # 0.2 is a motion


def test_normaliser_with_grippers_anywhere():
    actions = torch.from_numpy(np.stack([commands(0), *motions(2, 0).T, commands(5)], 1))
    for dims, gripper in (((0, 3), "zero_one_open"), ((3, 0), "identity"), ((), "identity"), (None, "zero_one_open")):
        normalizer = Normalizer(4, 2, gripper, dims).fit(actions, torch.zeros(STEPS, 2))
        motion = [i for i in range(4) if i not in ((3,) if dims is None else dims)]
        assert torch.equal(normalizer.action_low, torch.quantile(actions.double(), 0.01, 0)[motion].float())
        unit = normalizer.encode_actions(actions)
        back = normalizer.decode_actions(unit)
        inside = actions.clamp(*torch.quantile(actions, torch.tensor([0.01, 0.99]), 0))
        torch.testing.assert_close(back, inside)
        assert normalizer.action_unit().tolist() == pytest.approx(
            [(inside.amax(0) - inside.amin(0))[i].item() / 2 if i in motion else 1.0 for i in range(4)]
        )
        sign = -1 if gripper == "zero_one_open" else 1
        for i in normalizer.gripper_dims:  # a little closed is closed
            nearly = unit.clone()
            nearly[:, i] = 0.5 * (sign < 0) + sign * 0.1
            assert (normalizer.decode_actions(nearly)[:, i] == 1).all()
    with pytest.raises(ValueError, match=r"gripper dimensions \[4\] do not lie in 0 \.\. 3"):
        Normalizer(4, 2, gripper_dims=(4,))
    wide = torch.cat([actions[:, :3] * 9, actions[:, 3:]], 1)
    with pytest.raises(ValueError, match="of action 1 lie outside"):
        Normalizer(4, 2, gripper_dims=(0, 3)).fit(actions, torch.zeros(STEPS, 2)).check(
            wide * torch.tensor([1 / 9, 1, 1 / 9, 1]), torch.zeros(STEPS, 2)
        )


def test_perturbations_flip_all_grippers_or_none():
    actions = torch.from_numpy(np.stack([commands(0), *motions(2, 0).T, commands(0)], 1))[None, :8]
    low, high, unit = -torch.ones(4), torch.ones(4), torch.ones(4)
    source = torch.Generator().manual_seed(0)
    chunks, labels = perturb(actions, Perturbations((0.1,), 2, 1), low, high, unit, source, (0, 3))
    assert labels == ["noise 0.1"] * 2 + ["gripper flip"]
    assert torch.equal(chunks[0, 1:3][..., [0, 3]], actions[0][None, :, [0, 3]].expand(2, -1, -1))
    assert (chunks[0, 3, -1, [0, 3]] == -actions[0, -1, [0, 3]]).all() and (chunks[0, 1:3, :, 1:3] != 0).any()
    chunks, labels = perturb(actions, Perturbations((0.1,), 2, 1), low, high, unit, source, ())
    assert labels == ["noise 0.1"] * 2 and (chunks[0, 1, :, 3] != actions[0, :, 3]).any()
    unit = half_range([episode(actions[0].numpy(), gripper_dims=(0,))])
    assert unit[0] == 1 and unit[3] < 1e-6  # the last is a motion here, which never changes


@pytest.mark.slow
def test_a_base_without_gripper_plays_what_was_demonstrated(tmp_path):
    demos = make(tmp_path / "base", BASE, lambda i: 1.8 * motions(3, i))
    assert check(demos)[0].errors == []
    cfg = replace(train_sft.PRESETS["smoke"], demos=str(demos), out_dir=str(tmp_path / "sft"))
    train_sft.main(cfg)
    policy = VLAPolicy.load(tmp_path / "sft/model.safetensors")
    assert policy.cfg.gripper_dims == ()
    image = np.zeros((SIZE, SIZE, 3), np.uint8)
    played = policy.act({"agentview": image, "proprio": np.zeros(3), "instruction": "go"}).numpy()
    assert np.abs(played[:, 2]).max() <= 0.91 and not np.isin(played[:, 2], (-1, 1)).any()
    claw = make(tmp_path / "claw", {"names": ["x", "y", "claw"]}, lambda i: np.c_[motions(2, i), commands(i)])
    with pytest.raises(
        ValueError, match=r"gripper dimensions of claw/episode_\d+ are \[2\], of the policy \[\]: they "
    ):
        train_sft.main(replace(cfg, demos=str(claw), init=str(tmp_path / "sft"), out_dir=str(tmp_path / "other")))
