"""reward: R1, R2, R3 on constructed frames and actions; policies and world models that do not fit."""

import dataclasses

import pytest
import torch

from vlarft.action_bins import ActionBins
from vlarft.metrics import perceptual
from vlarft.policy import VLAPolicy
from vlarft.reward import action_reward, check_same_robot, image_reward, mirror, reduce_frames, verified_reward
from vlarft.world_model import Rollout, WorldModel


class Painter:
    """A world model whose frame t shows the running sum of the first action dimension as its brightness."""

    calls = 0

    def rollout(self, context_frame, actions, **how):
        self.calls, self.how = self.calls + 1, how
        shade = actions[..., 0].cumsum(-1)  # (S, G, T)
        frames = shade[..., None, None, None].expand(*shade.shape, 3, 16, 16)
        return Rollout(torch.zeros(*shade.shape, 1), frames)


def chunk(*values):
    actions = torch.zeros(len(values), 7)
    actions[:, 0] = torch.tensor(values)
    return actions


def test_r1_by_hand():
    policy = torch.stack([chunk(0.1, 0.2), chunk(0.0, 0.9)])[None]  # (1, 2, 2, 7)
    reward = action_reward(policy, chunk(0.1, 0.2)[None])
    torch.testing.assert_close(reward, -torch.tensor([[[0.0, 0.0], [0.1, 0.7]]]) / 7)


def test_reductions_over_frames():
    per_frame = torch.tensor([[[1.0, 2.0, 6.0]]])
    assert [reduce_frames(per_frame, over).item() for over in ("sum", "mean", "last")] == [9.0, 3.0, 6.0]
    assert reduce_frames(per_frame, "discounted", 0.5).item() == 1 + 2 / 2 + 6 / 4
    assert reduce_frames(per_frame, "discounted").item() == 9.0
    with pytest.raises(ValueError, match=r"gamma must lie in \(0, 1\], got 1.5"):
        reduce_frames(per_frame, "discounted", 1.5)
    with pytest.raises(ValueError, match="gamma 0.5 is of no use with over_frames='sum'; choose discounted"):
        reduce_frames(per_frame, "sum", 0.5)


def test_the_references_features_are_computed_once():
    distance, images = perceptual("ssim"), []
    real = distance.features
    distance.features = lambda target: images.append(target.shape[:-3].numel()) or real(target)
    frames, reference = torch.rand(2, 5, 3, 3, 16, 16), torch.rand(2, 3, 3, 16, 16)
    reward = image_reward(frames, reference, perceptual=distance)
    assert images == [2 * 3]
    one = image_reward(frames[1:, 4:, 2:], reference[1:, 2:], perceptual=distance)
    torch.testing.assert_close(reward[1, 4, 2], one[0, 0, 0])


def test_image_reward_by_hand():
    frames, reference = torch.full((1, 2, 1, 3, 16, 16), 0.5), torch.full((1, 1, 3, 16, 16), 0.5)
    frames[0, 1] = 0.75
    assert image_reward(frames, reference, perceptual=None, l1_weight=2.0).flatten().tolist() == [0.0, -0.5]
    both = image_reward(frames, reference, perceptual=perceptual("ssim"), perceptual_weight=3.0)
    distance = perceptual("ssim")(frames[0, 1], reference[0]).item()
    assert distance > 0
    torch.testing.assert_close(both.flatten(), torch.tensor([0.0, -0.25 - 3 * distance]), atol=1e-5, rtol=0)


def test_r2_compares_with_the_dataset_and_r3_with_imagination():
    actions = torch.stack([chunk(0.1, 0.2), chunk(0.3, 0.2)])[None]  # brightness 0.1 0.3 | 0.3 0.5
    dataset_actions = chunk(0.1, 0.2)[None]
    frames = torch.full((1, 3, 3, 16, 16), 0.4)
    model = Painter()
    r2 = verified_reward("r2", model, actions, dataset_actions, frames)
    torch.testing.assert_close(r2.reward, -torch.tensor([[0.3 + 0.1, 0.1 + 0.1]]))
    r3 = verified_reward("r3", model, actions, dataset_actions, frames, imagination="common")
    torch.testing.assert_close(r3.reward, -torch.tensor([[0.0, 0.2 + 0.2]]))
    torch.testing.assert_close(r3.per_frame, -torch.tensor([[[0.0, 0.0], [0.2, 0.2]]]))
    assert model.calls == 2  # the reference is part of the same rollout
    assert model.how["common_random_numbers"] and not model.how["greedy"]
    assert r3.frames.shape == (1, 2, 2, 3, 16, 16) and r3.reference.shape == (1, 2, 3, 16, 16)


class OneSided(Painter):
    """Shows what goes beyond the first action dimension's 0.1 only, as a world model that is deaf on one side."""

    action_bins = ActionBins(7, 256)  # -1 to 1

    def rollout(self, context_frame, actions, **how):
        heard = actions.clone()
        heard[..., 0] = (actions[..., 0] - 0.1).clamp(min=0)
        return super().rollout(context_frame, heard, **how)


def test_a_symmetric_reward_favours_no_side():
    dataset, frames = chunk(0.1, 0.1)[None], torch.zeros(1, 3, 3, 16, 16)
    actions = torch.stack([chunk(0.3, 0.1), chunk(-0.1, 0.1), chunk(0.1, 0.1)])[None]
    model = OneSided()
    plain = verified_reward("r3", model, actions, dataset, frames)
    torch.testing.assert_close(plain.reward, -torch.tensor([[0.4, 0.0, 0.0]]))  # pushed to the deaf side
    fair = verified_reward("r3", model, actions, dataset, frames, symmetric=True, over_frames="mean")
    torch.testing.assert_close(fair.per_frame, -torch.tensor([[[0.1, 0.1], [0.1, 0.1], [0.0, 0.0]]]))
    torch.testing.assert_close(fair.reward, fair.per_frame.mean(-1))
    assert torch.equal(fair.frames, plain.frames) and torch.equal(fair.reference, plain.reference)
    with pytest.raises(ValueError, match="reward r1 of no world model is as symmetric as it gets"):
        verified_reward("r1", None, actions, dataset, frames, symmetric=True)


def test_a_mirror_image_goes_on_from_its_chunks_frame():
    shades = torch.tensor([0.1, 0.2, 0.9])  # two rollouts, and the reference last
    starts = shades[None, :, None, None, None].expand(1, 3, 3, 16, 16)
    model, seen = OneSided(), []
    real = model.rollout
    model.rollout = lambda frames, actions, **how: seen.append((frames[:, 0, 0, 0], actions)) or real(frames, actions)
    dataset, actions = chunk(0.0, 0.0)[None], torch.stack([chunk(0.3, 0.1), chunk(0.5, 0.0)])[None]
    verified_reward("r3", model, actions, dataset, torch.zeros(1, 3, 3, 16, 16), symmetric=True, start_frames=starts)
    ((frames, played),) = seen
    torch.testing.assert_close(frames, shades[[0, 1, 0, 1, 2]])
    torch.testing.assert_close(played[:, 0, 0, 0], torch.tensor([0.3, 0.5, -0.3, -0.5, 0.0]))


def test_mirror():
    actions, reference = torch.zeros(1, 2, 1, 7), torch.full((1, 1, 7), 0.4)
    actions[0, 1, 0, 0], actions[..., 6] = -0.5, -1.0
    low, high = torch.full((7,), -1.0), torch.full((7,), 1.0)
    found = mirror(actions, reference, low, high)
    torch.testing.assert_close(found[0, 0, 0], torch.tensor([0.8] * 6 + [-1.0]))  # the gripper stays
    assert found[0, 1, 0, 0] == 1.0  # 1.3, clipped
    torch.testing.assert_close(mirror(found, reference, low, high)[0, 0], actions[0, 0])


def test_r1_needs_no_world_model_and_the_others_do():
    actions, frames = torch.zeros(1, 2, 2, 7), torch.zeros(1, 3, 3, 16, 16)
    assert verified_reward("r1", None, actions, actions[:, 0], frames).reward.tolist() == [[0.0, 0.0]]
    with pytest.raises(ValueError, match="reward r3 plays actions inside a world model"):
        verified_reward("r3", None, actions, actions[:, 0], frames)


@pytest.mark.parametrize("imagination", ["greedy", "common"])
def test_the_dataset_actions_themselves_earn_the_best_reward(world_model_file, imagination):
    torch.manual_seed(0)
    model = WorldModel.load(world_model_file)
    with torch.no_grad():  # an untrained model hardly looks at its actions
        model.embed_values.weight.mul_(20)
    dataset_actions, frames = torch.rand(2, 8, 7) - 0.5, torch.rand(2, 9, 3, 64, 64)
    actions = torch.stack([dataset_actions, torch.rand(2, 8, 7) - 0.5], 1)
    generator = torch.Generator().manual_seed(0)
    reward = verified_reward(
        "r3", model, actions, dataset_actions, frames, imagination=imagination, generator=generator
    ).reward
    assert reward[:, 0].abs().max() == 0
    assert (reward[:, 1] < 0).all()


@pytest.mark.parametrize("history", ["frames", "start"])
def test_divergence_of_expectations(world_model_file, history):
    torch.manual_seed(0)
    model = WorldModel.load(world_model_file)
    with torch.no_grad():
        model.embed_values.weight.mul_(20)
    dataset_actions, frames = torch.rand(2, 8, 7) - 0.5, torch.rand(2, 9, 3, 64, 64)
    actions = torch.stack([dataset_actions, torch.rand(2, 8, 7) - 0.5], 1)
    options = {"over_frames": "discounted", "gamma": 0.5, "history": history}
    found = verified_reward("divergence", model, actions, dataset_actions, frames, **options)
    per_frame = -model.divergence(frames, actions, dataset_actions, history)
    torch.testing.assert_close(found.per_frame, per_frame)
    torch.testing.assert_close(found.reward, (per_frame * 0.5 ** torch.arange(8)).sum(-1))
    assert found.reward[:, 0].abs().max() < 1e-5 and (found.reward[:, 1] < -1e-3).all()
    assert found.frames is None and found.reference is None


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


@pytest.mark.parametrize("term", ["ssim", "none"])
def test_images_compared_at_once_make_no_difference(monkeypatch, term):
    torch.manual_seed(0)
    frames, reference = torch.rand(2, 3, 4, 3, 16, 16), torch.rand(2, 4, 3, 16, 16)
    found = []
    for at_once in (1000, 7, 1):
        monkeypatch.setattr("vlarft.reward.rows_at_once", lambda bytes_per_row, device, n=at_once: n)
        found.append(image_reward(frames, reference, perceptual=perceptual(term)))
    pairs = [[[(frames[i, g, t], reference[i, t]) for t in range(4)] for g in range(3)] for i in range(2)]
    distance = perceptual(term)
    want = [[[-(a - b).abs().mean() - distance(a[None], b[None])[0] for a, b in row] for row in rows] for rows in pairs]
    torch.testing.assert_close(found[0], torch.tensor(want))
    assert found[0].unique().numel() == 24
    torch.testing.assert_close(found[1], found[0])
    torch.testing.assert_close(found[2], found[0])
