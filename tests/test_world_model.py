"""World model: layout, loss, cached rollouts against full forwards, groups, sampling, closed loop, errors."""

import warnings
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch.testing import assert_close

from vlarft.data.episode import RobotState
from vlarft.nets.transformer import TransformerConfig
from vlarft.run.checkpoint import save_model
from vlarft.token_sampling import Sampling, restrict
from vlarft.tokenizer import PRESETS as TOKENIZERS
from vlarft.tokenizer import TokenizerConfig
from vlarft.world_model import PRESETS, WorldModel, WorldModelConfig

GOLDEN = Path(__file__).parent / "golden"
TOKENIZER = TokenizerConfig(
    image_size=(16, 16),
    stem=4,
    block_channels=(8,),
    res_blocks=1,
    mid_res_blocks=1,
    latent_channels=4,
    future_patch=2,
    context_levels=(5, 3),
    future_levels=(3, 3),
    norm_groups=4,
    dropout=0.0,
)
SMALL = WorldModelConfig(
    tokenizer=TOKENIZER,
    transformer=TransformerConfig(depth=2, width=32, num_heads=4, num_kv_heads=4, ffn_dim=48, init_std=0.3),
    chunk=3,
    action_dim=2,
    action_bins=8,
)


def make(config: WorldModelConfig = SMALL) -> WorldModel:
    torch.manual_seed(0)
    model = WorldModel(config).eval()
    with torch.no_grad():
        model.tokenizer.quant_linear.weight.mul_(30)  # an untrained tokenizer gives the same token everywhere
        model.tokenizer.quant_conv.weight.mul_(30)
    return model


def full_logits(model: WorldModel, context: torch.Tensor, future: torch.Tensor, actions: torch.Tensor) -> torch.Tensor:
    """Logits (B, T, Nf, V) of the future codes of frames 1..T, by one forward of the whole sequence."""
    ids = model.layout.sequence(context, future, model.action_bins.encode(actions))
    with torch.no_grad():
        tables = model.tables()
        logits = F.linear(model.decoder(model.embed(ids, tables)), tables.head)
    positions = model.layout.frame_positions(actions.shape[1])
    return logits[:, positions - 1, : model.layout.num_future_codes]


def test_paper_preset_size_and_layout():
    with torch.device("meta"):
        model = WorldModel(replace(PRESETS["paper"], tokenizer=TOKENIZERS["paper"]))
    count = sum(p.numel() for name, p in model.named_parameters() if not name.startswith("tokenizer."))
    assert count == 127_101_696
    layout = model.layout
    assert (layout.vocab_size, layout.context_offset, layout.action_offset) == (9008, 4375, 8750)
    assert (layout.bos, layout.eos) == (9006, 9007)
    assert layout.prefix_length + layout.action_length == 1095 and layout.length(8) == 1656


def test_layout_matches_the_published_sequence():
    golden, layout = load_file(GOLDEN / "world_model_sequence.safetensors"), PRESETS["paper"].layout
    bins = golden["action_ids"].long()[:, :8] - layout.action_offset
    ids = layout.sequence(golden["ctx_tokens"][:, 0].long(), golden["dyn_tokens"].long(), bins)
    assert torch.equal(ids, golden["input_ids"].long()[:, :1656])  # which ends with one more copy of the last action
    labelled = (golden["labels"][0, :1656] != -100).nonzero()[:, 0]  # the public loss predicts actions as well
    assert torch.equal(labelled, torch.arange(layout.prefix_length, 1656))
    frames = labelled[golden["input_ids"][0, labelled] < layout.num_future_codes]
    assert torch.equal(layout.frame_positions(8).flatten(), frames)


def test_layout_by_hand():
    # 9 future codes, 15 context codes, 8 bins; 16 context tokens, 4 per frame, 2 per action
    layout = SMALL.layout
    assert (layout.context_offset, layout.action_offset, layout.vocab_size) == (9, 24, 34)
    future = torch.arange(8).reshape(1, 2, 4)
    ids = layout.sequence(torch.zeros(1, 16, dtype=torch.long), future, torch.tensor([[[0, 7]]]))
    assert ids.tolist() == [[9] * 16 + [0, 1, 2, 3] + [24, 31] + [4, 5, 6, 7]]
    slots = layout.slots(torch.arange(30)).tolist()
    assert slots == list(range(16)) + [16, 17, 18, 19, 20, 21] * 2 + [16, 17] and layout.num_slots == 22
    assert layout.frame_positions(1).tolist() == [[22, 23, 24, 25]] and layout.length(1) == 26


def test_loss_is_the_mean_cross_entropy_of_future_frames():
    model = make()
    frames, actions = torch.rand(2, 4, 3, 16, 16), torch.rand(2, 3, 2) * 2 - 1
    loss, metrics = model.loss(frames, actions)
    context, future = model.tokenize(frames)
    ids = model.layout.sequence(context, future, model.action_bins.encode(actions))
    logits = model.lm_head(model.decoder(model.embed(ids, model.tables())))
    terms = [
        F.cross_entropy(logits[b, p - 1], ids[b, p])
        for b in range(2)
        for t in range(3)
        for p in range(16 + 4 + 2 + t * 6, 16 + 4 + 2 + t * 6 + 4)
    ]
    assert_close(loss, torch.stack(terms).mean())
    right = full_logits(model, context, future, actions).argmax(-1)  # over future codes; the metric is over all ids
    assert metrics["accuracy"] <= (right == future[:, 1:]).float().mean() + 1e-6
    assert metrics["outside"] == 0
    assert model.loss(frames, actions + 9)[1]["outside"] == 1


def test_loss_over_future_codes_only():
    frames, actions = torch.rand(2, 4, 3, 16, 16), torch.rand(2, 3, 2) * 2 - 1
    model = make(replace(SMALL, future_codes_only=True))
    context, future = model.tokenize(frames)
    logits = full_logits(model, context, future, actions)
    want = F.cross_entropy(logits.flatten(0, 2), future[:, 1:].flatten())
    loss, metrics = model.loss(frames, actions)
    assert_close(loss, want)
    assert_close(metrics["accuracy"], (logits.argmax(-1) == future[:, 1:]).float().mean())


def test_stale_frames_are_inputs_only():
    model = make()
    frames, actions = torch.rand(3, 4, 3, 16, 16), torch.rand(3, 3, 2) * 2 - 1
    context, future = model.tokenize(frames)
    hidden = torch.ones(3, 4, dtype=torch.bool)
    loss = model.token_loss(context, future, actions, hidden)[0]
    frozen = future[:, :1].expand_as(future)
    logits = model.lm_head(
        model.decoder(
            model.embed(model.layout.sequence(context, frozen, model.action_bins.encode(actions)), model.tables())
        )
    )
    positions = model.layout.frame_positions(3).flatten()
    assert_close(loss, F.cross_entropy(logits[:, positions - 1].flatten(0, 1), future[:, 1:].flatten()))
    assert loss != model.token_loss(context, future, actions)[0]
    hidden[:, 1:] = False  # frame 0 cannot be staler than it is
    assert_close(model.token_loss(context, future, actions, hidden)[0], model.token_loss(context, future, actions)[0])


def test_loss_does_not_see_the_future():
    model = make()
    frames, actions = torch.rand(1, 4, 3, 16, 16), torch.rand(1, 3, 2) * 2 - 1
    context, future = model.tokenize(frames)
    before = full_logits(model, context, future, actions)
    changed = actions.clone()
    changed[:, 1] = -changed[:, 1]
    after = full_logits(model, context, future, changed)
    assert_close(before[:, 0], after[:, 0])  # action 1 leads from frame 1 to frame 2
    assert (before[:, 1] - after[:, 1]).abs().max() > 1e-3
    later = future.clone()
    later[:, 2] = (later[:, 2] + 1) % 9
    after = full_logits(model, context, later, actions)
    assert_close(before[:, :1], after[:, :1])
    assert_close(before[:, 1, 0], after[:, 1, 0])  # the first token of frame 2 is drawn before any of it is seen


OPTIONS = pytest.mark.parametrize("options", [{}, {"slot_embedding": True, "factored_tokens": True}])


@OPTIONS
def test_gradient_reaches_every_trained_parameter_and_no_frozen_one(options):
    model = make(replace(SMALL, **options)).train()
    assert not model.tokenizer.training
    model.loss(torch.rand(2, 4, 3, 16, 16), torch.rand(2, 3, 2))[0].backward()
    for name, parameter in model.named_parameters():
        if name.startswith("tokenizer."):
            assert parameter.grad is None and not parameter.requires_grad, name
        else:  # the rows of the head beyond the future codes too: the loss is normalised over all of them
            assert parameter.grad.abs().max() > 0, name


@OPTIONS
def test_greedy_rollout_is_the_argmax_of_the_full_forward(options):
    model = make(replace(SMALL, **options))
    start, actions = torch.rand(2, 3, 16, 16), torch.rand(2, 3, 3, 2) * 2 - 1
    rollout = model.rollout(start, actions, greedy=True)
    assert rollout.tokens.shape == (2, 3, 3, 4) and rollout.frames.shape == (2, 3, 3, 3, 16, 16)
    assert rollout.tokens.max() < 9
    context, first = model.tokenize(start[:, None])
    for g in range(3):
        future = torch.cat([first, rollout.tokens[:, g]], dim=1)
        logits = full_logits(model, context, future, actions[:, g])
        assert torch.equal(logits.argmax(-1), rollout.tokens[:, g])
    whole = model.tokenizer.encode_context(start)
    assert_close(rollout.frames, model.tokenizer.decode(rollout.tokens, whole))


@OPTIONS
@pytest.mark.parametrize("settings", [{"greedy": True}, {"top_p": 0.9}, {"common_random_numbers": True}])
def test_decoding_at_fixed_shapes_draws_the_same(options, settings):
    model, sampling = make(replace(SMALL, **options)).requires_grad_(False), Sampling(**settings)
    kept = []
    for seed in (0, 1):  # the second time in the memory of the first
        start, actions = torch.rand(4, 3, 16, 16), torch.rand(4, 3, 8, 2) * 2 - 1  # chunks of 3, 3 and 2
        draws = [torch.Generator().manual_seed(seed) for _ in range(2)]
        state = model.begin(start)
        expected = model.rollout_tokens(state, actions, sampling, draws[0])
        assert len(kept) == seed == (model._static_decoding is not None)  # not on a CPU, unless asked for
        got = model.rollout_tokens(state, actions, sampling, draws[1], static=True)
        assert torch.equal(got, expected) and expected.unique().numel() > 1
        kept.append(model._static_decoding[1])
        model.embed_tokens.weight.data = model.embed_tokens.weight.data.flip(0)  # the tables are taken anew
    assert kept[0] is kept[1] and len(kept[0].passes) == 6  # two kinds of pass for each frame
    model.rollout_tokens(model.begin(start), actions[:, :2], sampling, static=True)
    assert model._static_decoding[1] is not kept[0]


@OPTIONS
def test_imagination_in_bfloat16(options):
    model = make(replace(SMALL, **options))
    start, actions = torch.rand(2, 3, 16, 16), torch.rand(2, 3, 3, 2) * 2 - 1
    expected, context = model.rollout(start, actions, greedy=True), model.tokenizer.encode_context(start)
    model.to_bfloat16()
    assert model.decoder.norm.weight.dtype == model.tables().head.dtype == torch.bfloat16
    rollout = model.rollout(start, actions, greedy=True)
    assert (rollout.tokens == expected.tokens).float().mean() > 0.9 and rollout.frames.dtype == torch.float32
    again = model.tokenizer.encode_context(start)
    assert torch.equal(again.tokens, context.tokens)
    error = (model.tokenizer.decode(expected.tokens, again) - expected.frames).abs()
    assert 0 < error.mean() < 0.004 and error.max() < 0.1


def test_cached_logits_equal_the_full_forward(monkeypatch):
    model, seen = make(), []
    sample = Sampling.sample

    def record(self, logits, group_size, generator):
        seen.append(logits)
        return sample(self, logits, group_size, generator)

    monkeypatch.setattr(Sampling, "sample", record)
    start, actions = torch.rand(2, 3, 16, 16), torch.rand(2, 2, 3, 2) * 2 - 1
    rollout = model.rollout(start, actions, temperature=2.0, top_p=1.0, generator=torch.Generator().manual_seed(0))
    cached = torch.stack(seen, dim=1).unflatten(1, (3, 4)).unflatten(0, (2, 2))  # (S, G, T, Nf, V)
    context, first = model.tokenize(start[:, None])
    for g in range(2):
        want = full_logits(model, context, torch.cat([first, rollout.tokens[:, g]], 1), actions[:, g])
        assert_close(cached[:, g], want, atol=1e-4, rtol=1e-4)


def test_divergence_is_that_of_the_full_forwards_distributions(monkeypatch):
    model = make()
    frames, actions, reference = torch.rand(2, 4, 3, 16, 16), torch.rand(2, 3, 3, 2) * 2 - 1, torch.rand(2, 3, 2) - 0.5
    actions[1, 2] = reference[1]
    context, future = model.tokenize(frames)

    def probabilities(chunk):  # (2, T, Nf, V)
        return full_logits(model, context, future, chunk).double().softmax(-1)

    theirs = probabilities(reference)
    ours = torch.stack([probabilities(actions[:, g]) for g in range(3)], 1)
    want = (theirs[:, None] * (theirs[:, None] / ours).log()).sum((-1, -2))
    found = model.divergence(frames, actions, reference)
    assert found.shape == (2, 3, 3) and want[0].min() > 1e-4
    assert_close(found.double(), want, atol=1e-5, rtol=1e-3)
    assert found[1, 2].abs().max() < 1e-6 < found[1, 0].min()
    monkeypatch.setattr("vlarft.world_model.rows_at_once", lambda bytes_per_row, device: 1)
    assert_close(model.divergence(frames, actions, reference), found)


def test_prefix_is_computed_once_per_start(monkeypatch):
    model, rows = make(), []
    forward = model.decoder.forward
    monkeypatch.setattr(model.decoder, "forward", lambda x, *rest: rows.append(x.shape[:2]) or forward(x, *rest))
    model.rollout(torch.rand(2, 3, 16, 16), torch.zeros(2, 5, 3, 2), greedy=True)
    assert rows[0] == (2, 16) and sum(n for _, n in rows[1:]) == 4 + 3 * 6 - 1 and all(b == 10 for b, _ in rows[1:])


@pytest.mark.parametrize("common", [False, True])
def test_group_rollouts_equal_single_rollouts(common):
    model = make()
    start, actions = torch.rand(2, 3, 16, 16), torch.rand(2, 3, 3, 2) * 2 - 1
    options = {"greedy": not common, "common_random_numbers": common, "temperature": 3.0, "top_p": 1.0}
    together = model.rollout(start, actions, generator=torch.Generator().manual_seed(3), **options)
    for g in range(3):
        generator = torch.Generator().manual_seed(3)
        alone = model.rollout(start, actions[:, g : g + 1], generator=generator, **options)
        assert torch.equal(alone.tokens[:, 0], together.tokens[:, g])
    assert (together.tokens[:, 0] != together.tokens[:, 1]).any()


def test_common_random_numbers_and_seeds():
    model = make()
    start, actions = torch.rand(2, 3, 16, 16), (torch.rand(2, 1, 3, 2) * 2 - 1).expand(2, 4, 3, 2)

    def roll(seed: int, common: bool) -> torch.Tensor:
        generator = torch.Generator().manual_seed(seed)
        return model.rollout(
            start, actions, temperature=3.0, top_p=1.0, generator=generator, common_random_numbers=common
        ).tokens

    same = roll(0, True)
    assert (same == same[:, :1]).all() and (same != roll(1, True)).any()
    different = roll(0, False)
    assert (different != different[:, :1]).any()
    assert torch.equal(different, roll(0, False))


@pytest.mark.parametrize("common", [False, True])
def test_shares_of_a_batch_draw_what_the_whole_batch_draws(common):
    model = make()
    start, actions = torch.rand(4, 3, 16, 16), torch.rand(4, 3, 3, 2) * 2 - 1
    options = {"temperature": 3.0, "top_p": 1.0, "common_random_numbers": common}
    whole = model.rollout(start, actions, generator=torch.Generator().manual_seed(5), **options).tokens
    for number in range(2):
        rows, draws = slice(2 * number, 2 * number + 2), torch.Generator().manual_seed(5)
        share = model.rollout(start[rows], actions[rows], generator=draws, part=(number, 2), **options).tokens
        assert torch.equal(share, whole[rows])


def test_first_frame_may_differ_from_the_context_frame():
    model = make()
    frames, actions = torch.rand(1, 4, 3, 16, 16), torch.rand(1, 1, 3, 2)
    other = torch.rand(1, 3, 16, 16)
    rollout = model.rollout(other, actions, greedy=True, first_frame=frames[:, 0])
    context, first = model.tokenize(frames[:, :1], other)
    logits = full_logits(model, context, torch.cat([first, rollout.tokens[:, 0]], 1), actions[:, 0])
    assert torch.equal(logits.argmax(-1), rollout.tokens[:, 0])


def test_restrict_by_hand():
    logits = torch.tensor([[0.5, 0.3, 0.15, 0.05]]).log()

    def kept(top_p: float) -> list[bool]:
        return torch.isfinite(restrict(logits, top_p))[0].tolist()

    assert kept(1.0) == [True] * 4
    assert kept(0.8) == [True, True, False, False]  # 0.5 + 0.3 reach 0.8
    assert kept(0.81) == [True, True, True, False]
    assert kept(0.01) == [True, False, False, False]


def test_draws_follow_the_distribution():
    logits = torch.tensor([0.6, 0.3, 0.1]).log().expand(20000, 3)
    got = Sampling(top_p=1.0).sample(logits, 1, torch.Generator().manual_seed(0))
    share = torch.bincount(got, minlength=3) / len(got)
    assert_close(share, torch.tensor([0.6, 0.3, 0.1]), atol=0.015, rtol=0)
    shared = Sampling(top_p=1.0, common_random_numbers=True).sample(logits, 4, torch.Generator().manual_seed(0))
    assert (shared.unflatten(0, (-1, 4)) == shared[::4, None]).all()


def driven_by_poses() -> tuple[WorldModel, RobotState]:
    """A model of two action dimensions, one a gripper, and three of proprio, two of them a pose; and two robots."""
    model = make(replace(SMALL, proprio_dim=3, pose_dims=2, gripper_dims=(1,)))
    model.action_bins.set_range(-3 * torch.ones(3), 3 * torch.ones(3))
    with torch.no_grad():
        model.robot.net[-1].weight.normal_(std=0.1)
    return model, RobotState(torch.rand(2, 3), torch.rand(2, 3))


def test_poses_drive_the_frames():
    """What stands in the sequence is the pose after each action, predicted or recorded, and the gripper command."""
    model, robot = driven_by_poses()
    start, actions = torch.rand(2, 3, 16, 16), torch.rand(2, 2, 8, 2) * 2 - 1
    assert model.layout.action_length == model.cfg.control_dim == 3
    whole = model.rollout(start, actions, greedy=True, robot=robot)
    for g in range(2):
        proprio, end = model.robot.rollout(robot, actions[:, g])
        controls = torch.cat([proprio[..., :2], actions[:, g, :, 1:]], -1)
        assert torch.equal(model.controls(actions[:, g], proprio), controls)
        given = model.rollout_tokens(model.begin(start), controls[:, None], Sampling(greedy=True))
        assert torch.equal(given[:, 0], whole.tokens[:, g])
        assert_close([v[:, g] for v in whole.state.robot], list(end))
        recorded = model.rollout(start, actions[:, g : g + 1], greedy=True, proprio_after=proprio[:, None])
        assert torch.equal(recorded.tokens[:, 0], whole.tokens[:, g])
        assert_close([v[:, 0] for v in recorded.state.robot], list(end))
    after = torch.rand(2, 1, 1, 3)  # of one action
    for known, motion in ((robot, after[:, :, 0] - robot.proprio[:, None]), (None, torch.zeros(2, 1, 3))):
        state = model.rollout(start, actions[:, :1, :1], greedy=True, robot=known, proprio_after=after).state
        assert_close(state.robot.motion, motion)
    moved = RobotState(robot.proprio + 1, robot.motion)
    assert not torch.equal(model.rollout(start, actions, greedy=True, robot=moved).tokens, whole.tokens)
    first, then = actions.split([3, 5], dim=2)
    part = model.rollout(start, first, greedy=True, robot=robot)
    assert torch.equal(model.rollout(part.state, then, greedy=True).tokens, whole.tokens[:, :, 3:])
    model.reset(start, robot=robot)
    frames = torch.stack([model.step(actions[:, 0, t]) for t in range(8)], dim=1)
    assert_close(frames, whole.frames[:, 0], atol=1e-5, rtol=1e-4)
    with pytest.raises(ValueError, match=r"proprio_after has shape \(2, 1, 8, 3\), expected .* with \(2, 2, 8\) first"):
        model.rollout(start, actions, proprio_after=proprio[:, None])
    for call in (lambda: model.rollout(start, actions), lambda: model.step(actions[:, 0, 0])):
        model.reset(start)
        with pytest.raises(ValueError, match="poses drive this world model: give the robot's state at the first frame"):
            call()


def test_the_robot_stays_in_float32():
    """A pose is known to a millimetre in half a metre, which bfloat16 would lose."""
    model, robot = driven_by_poses()
    assert all(p.dtype == torch.float32 for p in model.to_bfloat16().robot.parameters())
    actions = torch.rand(2, 1, 4, 2)
    with torch.autocast("cpu", torch.bfloat16):
        rollout = model.rollout(torch.rand(2, 3, 16, 16), actions, robot=robot)
    assert torch.equal(rollout.state.robot.proprio[:, 0], model.robot.rollout(robot, actions[:, 0])[1].proprio)


def test_divergence_of_poses():
    model, robot = driven_by_poses()
    frames, actions = torch.rand(2, 4, 3, 16, 16), torch.rand(2, 2, 3, 2) * 2 - 1
    found = model.divergence(frames, actions, actions[:, 0], robot)
    assert found[:, 0].abs().max() < 1e-5 and found[:, 1].min() > 0
    other = RobotState(robot.proprio + 1, robot.motion)
    assert not torch.allclose(model.divergence(frames, actions, actions[:, 0], other)[:, 1], found[:, 1])


def test_a_model_of_actions_may_predict_the_robot_beside_them():
    model, blind = make(replace(SMALL, proprio_dim=3)), make()
    start, actions, robot = torch.rand(2, 3, 16, 16), torch.rand(2, 2, 3, 2) * 2 - 1, RobotState(*torch.rand(2, 2, 3))
    blind.load_state_dict({k: v for k, v in model.state_dict().items() if not k.startswith("robot.")})
    with_robot, without = (
        model.rollout(start, actions, greedy=True, robot=robot),
        blind.rollout(start, actions, greedy=True),
    )
    assert torch.equal(with_robot.tokens, without.tokens) and without.state.robot is None
    proprio, _ = model.robot.rollout(robot, actions[:, 1])
    assert_close(with_robot.state.robot.proprio[:, 1], proprio[:, -1])
    assert blind.rollout(start, actions, robot=robot).state.robot is None  # there is no network that predicts it


@pytest.mark.parametrize("common", [False, True])
def test_an_episode_is_a_row_of_chunks_with_one_context(common):
    model = make()
    start, actions = torch.rand(2, 3, 16, 16), torch.rand(2, 2, 8, 2) * 2 - 1  # chunks of 3, 3 and 2
    options = {"greedy": not common, "common_random_numbers": common, "temperature": 3.0, "top_p": 1.0}
    whole = model.rollout(start, actions, generator=torch.Generator().manual_seed(3), **options)
    draws, going_on, parts = torch.Generator().manual_seed(3), start, []
    for chunk in actions.split(3, dim=2):
        rollout = model.rollout(going_on, chunk, generator=draws, **options)
        going_on, parts = rollout.state, [*parts, rollout]
    assert torch.equal(torch.cat([part.tokens for part in parts], 2), whole.tokens)
    assert torch.equal(torch.cat([part.frames for part in parts], 2), whole.frames)
    assert torch.equal(whole.state.tokens, whole.tokens[:, :, -1])
    # the oracle: the full forward over ctx(f0) | dyn(f3) a3 | ..., with the tokens of the first chunk's last frame
    if not common:
        context, _ = model.tokenize(start[:, None])
        for g in range(2):
            logits = full_logits(model, context, whole.tokens[:, g, 2:6], actions[:, g, 3:6])
            assert torch.equal(logits.argmax(-1), whole.tokens[:, g, 3:6])


def test_members_go_on_from_their_own_frames():
    model = make()
    start, actions = torch.rand(2, 3, 16, 16), torch.rand(2, 3, 3, 2) * 2 - 1
    state = model.rollout(start, actions, temperature=3.0, top_p=1.0).state
    assert (state.tokens[:, 0] != state.tokens[:, 1]).any()
    together = model.rollout(state, actions, greedy=True).tokens
    for g in range(3):
        alone = model.rollout(state._replace(tokens=state.tokens[:, g : g + 1]), actions[:, g : g + 1], greedy=True)
        assert torch.equal(alone.tokens[:, 0], together[:, g])
    with pytest.raises(ValueError, match="3 members per start, the actions have 2"):
        model.rollout(state, actions[:, :2])


def test_frame_by_frame_equals_rollout_over_several_chunks():
    model = make()
    start, actions = torch.rand(2, 3, 16, 16), torch.rand(2, 1, 7, 2) * 2 - 1
    model.reset(start)
    frames = torch.stack([model.step(actions[:, 0, t]) for t in range(7)], dim=1)
    assert_close(frames, model.rollout(start, actions, greedy=True).frames[:, 0], atol=1e-5, rtol=1e-4)


def test_factored_tokens_add_a_linear_function_of_what_a_token_stands_for():
    model = make(replace(SMALL, factored_tokens=True, action_bins=64))
    layout, values = model.layout, model.token_values
    assert values.shape == (layout.vocab_size, 3 + 3 + 3 + 5 + 9)  # levels (3, 3) and (3, 5); 9 of an action value
    assert values[5].tolist() == [0, 0, 1, 0, 1, 0] + [0] * 17  # code 5 = 2 + 1 * 3
    assert values[layout.context_offset + 7].nonzero().flatten().tolist() == [6 + 2, 6 + 5 + 1]  # 7 = 2 + 1 * 5
    assert (
        values[layout.action_offset, 14] == -2 and values[layout.bos - 1, 14] == 2 and (values[layout.bos :] == 0).all()
    )
    plain, tables = make(replace(SMALL, action_bins=64)).tables(), model.tables()
    assert_close(tables.embedding, model.embed_tokens.weight + values @ model.embed_values.weight.T)
    assert_close(tables.head, model.lm_head.weight + values @ model.head_values.weight.T)
    assert torch.equal(plain.embedding, model.embed_tokens.weight)  # the same seed: the rows themselves do not change
    actions = (values @ model.embed_values.weight.T)[layout.action_offset : layout.bos]
    assert F.cosine_similarity(actions[:-1], actions[1:]).mean() > 0.9  # neighbours share what is learnt


def test_save_and_load(tmp_path):
    model = make()
    model.action_bins.set_range(torch.tensor([-0.5, -2.0]), torch.tensor([0.5, 1.0]))
    save_model(tmp_path / "model.safetensors", model, SMALL)
    again = WorldModel.load(tmp_path / "model.safetensors")
    assert again.cfg == SMALL and again.action_bins.low.tolist() == [-0.5, -2.0]
    start, actions = torch.rand(1, 3, 16, 16), torch.rand(1, 2, 3, 2)
    a, b = (m.rollout(start, actions, greedy=True) for m in (model, again))
    assert torch.equal(a.tokens, b.tokens) and torch.equal(a.frames, b.frames)


def test_actions_outside_the_ranges_are_clipped_with_one_warning():
    model, start = make(), torch.rand(1, 3, 16, 16)
    actions = torch.tensor([[[[0.5, -3.0], [0.0, 0.0], [2.0, 0.0]]]])  # ranges of -1 to 1
    with pytest.warns(UserWarning, match=r"2 of 6 action values \(33.3%, in dimensions \[0, 1\]\).*raw environment"):
        rollout = model.rollout(start, actions, greedy=True)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch.equal(model.rollout(start, actions.clamp(-1, 1), greedy=True).tokens, rollout.tokens)
        model.rollout(start, actions, greedy=True)
    model = make()
    model.reset(start)
    with pytest.warns(UserWarning, match="1 of 2 action values"):
        model.step(actions[:, 0, 0])


def test_checkpoint_of_another_vocabulary_is_refused_by_name(tmp_path):
    save_model(tmp_path / "model.safetensors", make(replace(SMALL, action_bins=16)), SMALL)
    with pytest.raises(ValueError, match=r"embed_tokens.weight has shape \(42, 32\), expected \(34, 32\)"):
        WorldModel.load(tmp_path / "model.safetensors")


def test_errors():
    model = make()
    with pytest.raises(ValueError, match=r"actions \(S, G, T, 2\) with S = 2 starts and T > 0, got shape \(2, 3, 2\)"):
        model.rollout(torch.rand(2, 3, 16, 16), torch.zeros(2, 3, 2))
    with pytest.raises(ValueError, match=r"T > 0, got shape \(2, 3, 0, 2\)"):
        model.rollout(torch.rand(2, 3, 16, 16), torch.zeros(2, 3, 0, 2))
    with pytest.raises(ValueError, match="a state has first frame and robot already"):
        state = model.begin(torch.rand(1, 3, 16, 16))
        model.rollout(state, torch.zeros(1, 1, 1, 2), first_frame=torch.rand(1, 3, 16, 16))
    with pytest.raises(ValueError, match="call reset"):
        model.step(torch.zeros(1, 2))
    with pytest.raises(ValueError, match="temperature must be positive, got 0"):
        Sampling(temperature=0)
    with pytest.raises(ValueError, match="top_p must lie in"):
        Sampling(top_p=0)
    short = replace(SMALL, transformer=replace(SMALL.transformer, max_positions=30))
    with pytest.raises(ValueError, match="a segment of 3 actions has 38 tokens"):
        WorldModel(short)
