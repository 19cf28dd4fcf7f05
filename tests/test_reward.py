"""reward: R1, R2, R3 on constructed frames and actions; policies and world models that do not fit."""

import dataclasses

import pytest
import torch

from vlarft.data import Batch
from vlarft.metrics import perceptual
from vlarft.policy import VLAPolicy
from vlarft.reward import action_reward, check_same_robot, image_reward, make_scorer
from vlarft.world_model import PRESETS as WORLD_MODELS
from vlarft.world_model import Rollout, WorldModel


class Painter:
    """A world model whose frame t shows the running sum of the first action dimension as its brightness."""

    calls = 0

    def rollout(self, context_frame, actions, **how):
        self.calls, self.how = self.calls + 1, how
        shade = actions[..., 0].cumsum(-1)  # (S, G, T)
        frames = shade[..., None, None, None].expand(*shade.shape, 3, 16, 16)
        return Rollout(torch.zeros(*shade.shape, 1), frames, None)


def chunk(*values):
    actions = torch.zeros(len(values), 7)
    actions[:, 0] = torch.tensor(values)
    return actions


def windows(intended, executed=None, frames=None, shade=0.0):
    """Windows of S starts whose other fields nobody reads."""
    starts, steps = intended.shape[:2]
    frames = torch.full((starts, steps + 1, 3, 16, 16), shade) if frames is None else frames
    executed = torch.full_like(intended, torch.nan) if executed is None else executed
    rest = torch.zeros(starts, 8), ["push"] * starts, frames[:, 0], torch.zeros(starts, 3), torch.zeros(starts, 2)
    return Batch(frames, executed, intended, *rest, torch.zeros(starts, 8), torch.zeros(starts, steps, 8))


def test_r1_by_hand():
    policy = torch.stack([chunk(0.1, 0.2), chunk(0.0, 0.9)])[None]  # (1, 2, 2, 7)
    reward = action_reward(policy, chunk(0.1, 0.2)[None])
    torch.testing.assert_close(reward, -torch.tensor([[[0.0, 0.0], [0.1, 0.7]]]) / 7)


def test_the_references_features_are_computed_once():
    distance, images = perceptual("ssim"), []
    real = distance.features
    distance.features = lambda target: images.append(target.shape[:-3].numel()) or real(target)
    frames, reference = torch.rand(2, 5, 3, 3, 16, 16), torch.rand(2, 3, 3, 16, 16)
    reward = image_reward(frames, reference, distance)
    assert images == [2 * 3]
    one = image_reward(frames[1:, 4:, 2:], reference[1:, 2:], distance)
    torch.testing.assert_close(reward[1, 4, 2], one[0, 0, 0])


def test_image_reward_by_hand():
    frames, reference = torch.full((1, 2, 1, 3, 16, 16), 0.5), torch.full((1, 1, 3, 16, 16), 0.5)
    frames[0, 1] = 0.75
    assert image_reward(frames, reference, None).flatten().tolist() == [0.0, -0.25]
    both = image_reward(frames, reference, perceptual("ssim"))
    distance = perceptual("ssim")(frames[0, 1], reference[0]).item()
    assert distance > 0
    torch.testing.assert_close(both.flatten(), torch.tensor([0.0, -0.25 - distance]), atol=1e-5, rtol=0)


def test_r1_compares_with_the_intended_actions():
    batch = windows(intended=chunk(0.0, 0.0)[None], executed=chunk(0.5, 0.5)[None])
    reward = make_scorer("r1")(batch, chunk(0.0, 0.7)[None, None], None)
    torch.testing.assert_close(reward, -torch.tensor([[[0.0, 0.1]]]))


def test_r2_compares_with_the_recorded_frames_and_r3_with_imagination():
    actions = torch.stack([chunk(0.1, 0.2), chunk(0.3, 0.2)])[None]  # brightness 0.1 0.3 | 0.3 0.5
    batch = windows(intended=chunk(0.1, 0.2)[None], executed=chunk(9.0, 9.0)[None], shade=0.4)
    model = Painter()
    r2 = make_scorer("r2", model)(batch, actions, None)
    torch.testing.assert_close(r2, -torch.tensor([[[0.3, 0.1], [0.1, 0.1]]]))
    r3 = make_scorer("r3", model, imagination="common", part=(1, 2))
    torch.testing.assert_close(r3(batch, actions, None), -torch.tensor([[[0.0, 0.0], [0.2, 0.2]]]))
    assert model.calls == 2  # the reference is part of the same rollout
    assert model.how["common_random_numbers"] and not model.how["greedy"] and model.how["part"] == (1, 2)
    make_scorer("r3", model, imagination="greedy")(batch, actions, None)
    assert model.how["greedy"] and not model.how["common_random_numbers"]
    imagined = r3.imagine(batch, actions)
    assert imagined.frames.shape == (1, 2, 2, 3, 16, 16) and imagined.reference.shape == (1, 2, 3, 16, 16)
    torch.testing.assert_close(imagined.reference[0, :, 0, 0, 0], torch.tensor([0.1, 0.3]))


def test_r1_needs_no_world_model_and_the_others_do():
    for kind in ("r2", "r3", "divergence"):
        with pytest.raises(ValueError, match=f"reward {kind} plays actions inside a world model; give one, or choose"):
            make_scorer(kind)
    with pytest.raises(ValueError, match="unknown reward 'r4'; there are: r1, r2, r3, divergence"):
        make_scorer("r4")


def sensitive(world_model_file):
    """A world model that answers to its actions; an untrained one hardly does."""
    torch.manual_seed(0)
    model = WorldModel.load(world_model_file)
    with torch.no_grad():
        model.embed_values.weight.mul_(20)
    return model


@pytest.mark.parametrize("imagination", ["greedy", "common"])
def test_the_demonstrations_actions_themselves_earn_the_best_reward(world_model_file, imagination):
    model = sensitive(world_model_file)
    batch = windows(intended=torch.rand(2, 8, 7) - 0.5, frames=torch.rand(2, 9, 3, 64, 64))
    actions = torch.stack([batch.intended, torch.rand(2, 8, 7) - 0.5], 1)
    reward = make_scorer("r3", model, None, imagination)(batch, actions, torch.Generator().manual_seed(0)).sum(-1)
    assert reward[:, 0].abs().max() == 0
    assert (reward[:, 1] < 0).all()


def test_sampled_imagination_is_a_function_of_its_generator(world_model_file):
    model = sensitive(world_model_file)
    batch = windows(intended=torch.rand(2, 8, 7) - 0.5, frames=torch.rand(2, 9, 3, 64, 64))
    actions, score = torch.rand(2, 2, 8, 7) - 0.5, make_scorer("r3", model, None, "sample")
    first, again, other = (score(batch, actions, torch.Generator().manual_seed(s)) for s in (0, 0, 1))
    assert torch.equal(first, again) and not torch.equal(first, other)


def test_divergence_of_expectations(world_model_file):
    model = sensitive(world_model_file)
    batch = windows(intended=torch.rand(2, 8, 7) - 0.5, frames=torch.rand(2, 9, 3, 64, 64))
    actions = torch.stack([batch.intended, torch.rand(2, 8, 7) - 0.5], 1)
    reward = make_scorer("divergence", model)(batch, actions, None)
    torch.testing.assert_close(reward, -model.divergence(batch.frames, actions, batch.intended))
    assert reward[:, 0].abs().max() < 1e-5 and (reward[:, 1].sum(-1) < -1e-3).all()


def test_same_robot(policy_file, world_model_file):
    policy, model = VLAPolicy.load(policy_file), WorldModel.load(world_model_file)
    check_same_robot(policy, model)
    model.action_bins.high[1] = 0.05
    with pytest.raises(ValueError, match=r"dimension 1 the policy emits \[-0.*\], the world model was trained on"):
        check_same_robot(policy, model)
    model.cfg = dataclasses.replace(model.cfg, chunk=4)
    with pytest.raises(ValueError, match="chunk length: the policy has 8, the world model has 4"):
        check_same_robot(policy, model)
    policy.normalizer.fitted.fill_(False)
    with pytest.raises(ValueError, match="the policy's normaliser was never fitted: its actions have no units"):
        check_same_robot(policy, model)


def test_same_robot_of_a_world_model_that_predicts_it(policy_file):
    policy, cfg = VLAPolicy.load(policy_file), WORLD_MODELS["smoke"]
    blind, poses = (
        WorldModel(dataclasses.replace(cfg, **given))
        for given in ({}, {"proprio_dim": 8, "pose_dims": 6, "gripper_dims": (6,)})
    )
    for model in (blind, poses):
        model.action_bins.set_range(-torch.ones(7), torch.ones(7))
        check_same_robot(policy, model)
    check_same_robot(policy, poses, closed_loop=True)
    with pytest.raises(
        ValueError, match="the world model does not predict the robot's proprio, which the policy reads"
    ):
        check_same_robot(policy, blind, closed_loop=True)
    poses.action_bins.high[2] = -0.9  # of a pose, not of an action
    check_same_robot(policy, poses)
    poses.robot.action_std[3:6] = 6.0  # noisy attempts turn the hand, which the demonstrations do not
    check_same_robot(policy, poses)
    mixed = torch.full((7,), 1.0).index_fill(0, torch.arange(3), 1000.0)  # millimetres, and radians
    for scale in (0.02, 7.0, 50.0, mixed):  # centimetres or so
        poses.robot.action_std.copy_(torch.as_tensor(scale))
        with pytest.raises(ValueError, match="actions: the policy's range is .* times the standard deviation of those"):
            check_same_robot(policy, poses)
    poses.cfg = dataclasses.replace(poses.cfg, gripper_dims=(5,))
    with pytest.raises(ValueError, match=r"gripper dimensions: the policy has \(6,\), the world model has \(5,\)"):
        check_same_robot(policy, poses)
    poses.cfg = dataclasses.replace(poses.cfg, proprio_dim=7)
    with pytest.raises(ValueError, match="proprio dim: the policy has 8, the world model has 7"):
        check_same_robot(policy, poses)
    with pytest.raises(ValueError, match="pose_dims 5: the proprio has 4 dimensions"):
        dataclasses.replace(cfg, proprio_dim=4, pose_dims=5)


@pytest.mark.parametrize("kind", ["r3", "divergence"])
def test_rewards_know_where_the_robot_is(kind):
    """In a world model that poses drive: its state at the start, from which actions move it."""
    torch.manual_seed(0)
    model = WorldModel(dataclasses.replace(WORLD_MODELS["smoke"], proprio_dim=8, pose_dims=6, gripper_dims=(6,)))
    model.action_bins.set_range(-torch.ones(7), torch.ones(7))
    torch.nn.init.normal_(model.robot.net[-1].weight)
    batch = windows(intended=torch.rand(2, 8, 7) - 0.5, frames=torch.rand(2, 9, 3, 64, 64))
    batch = batch._replace(proprio=torch.rand(2, 8), motion=torch.rand(2, 8))
    asked, move = [], model.robot.rollout
    model.robot.rollout = lambda state, actions: asked.append((state, actions)) or move(state, actions)
    actions = torch.rand(2, 3, 8, 7) - 0.5
    make_scorer(kind, model.eval(), None, "greedy")(batch, actions, None)
    ((state, moved),) = asked
    assert torch.equal(state.proprio.view(2, 4, 8), batch.proprio[:, None].expand(-1, 4, -1))
    assert torch.equal(state.motion.view(2, 4, 8), batch.motion[:, None].expand(-1, 4, -1))
    order = [actions, batch.intended[:, None]] if kind == "r3" else [batch.intended[:, None], actions]
    assert torch.equal(moved.view(2, 4, 8, 7), torch.cat(order, 1))


@pytest.mark.parametrize("term", ["ssim", "none"])
def test_images_compared_at_once_make_no_difference(monkeypatch, term):
    torch.manual_seed(0)
    frames, reference = torch.rand(2, 3, 4, 3, 16, 16), torch.rand(2, 4, 3, 16, 16)
    found = []
    for at_once in (1000, 7, 1):
        monkeypatch.setattr("vlarft.reward.rows_at_once", lambda bytes_per_row, device, n=at_once: n)
        found.append(image_reward(frames, reference, perceptual(term)))
    pairs = [[[(frames[i, g, t], reference[i, t]) for t in range(4)] for g in range(3)] for i in range(2)]
    distance = perceptual(term)
    want = [[[-(a - b).abs().mean() - distance(a[None], b[None])[0] for a, b in row] for row in rows] for rows in pairs]
    torch.testing.assert_close(found[0], torch.tensor(want))
    assert found[0].unique().numel() == 24
    torch.testing.assert_close(found[1], found[0])
    torch.testing.assert_close(found[2], found[0])
