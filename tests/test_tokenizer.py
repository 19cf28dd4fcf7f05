"""FSQ, action bins, frame tokenizer: hand-computed and golden values, sizes, conditioning, round trips, errors."""

import math
import warnings
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch.testing import assert_close

from vlarft.action_bins import ActionBins
from vlarft.nets.frame_networks import CrossAttention, GroupNorm
from vlarft.run.checkpoint import save_model
from vlarft.tokenizer import (
    FSQ,
    PRESETS,
    FrameTokenizer,
    TokenizerConfig,
)
from vlarft.tokenizer_loss import reconstruction_loss

GOLDEN = Path(__file__).parent / "golden"
SMALL = TokenizerConfig(
    image_size=(16, 24),
    stem=2,
    block_channels=(8, 16),
    res_blocks=1,
    mid_res_blocks=2,
    latent_channels=6,
    future_patch=2,
    context_levels=(5, 3),
    future_levels=(3, 3, 3),
    norm_groups=4,
)


def make(config: TokenizerConfig = SMALL) -> FrameTokenizer:
    torch.manual_seed(0)
    model = FrameTokenizer(config).eval()
    with torch.no_grad():  # an untrained tokenizer gives the same token everywhere
        model.quant_linear.weight.mul_(30)
        model.quant_conv.weight.mul_(30)
    return model


def test_fsq_by_hand():
    fsq = FSQ((7, 5))
    # tanh(0.5) = 0.46212; times 3.003 = 1.3878 -> 1; tanh(-1) = -0.76159, times 2.002 = -1.5247 -> -2.
    z = torch.tensor([[0.5, -1.0], [9.0, -9.0], [0.0, 0.0]])
    assert_close(fsq.bound(z)[0], torch.tensor([1.38774, -1.52471]), atol=1e-4, rtol=0)
    codes, indices = fsq(z)
    assert_close(codes, torch.tensor([[1 / 3, -1.0], [1.0, -1.0], [0.0, 0.0]]))
    assert indices.tolist() == [(1 + 3) + 7 * (-2 + 2), 6 + 0, 3 + 7 * 2]


def test_fsq_golden():
    golden, fsq = load_file(GOLDEN / "fsq.safetensors"), FSQ((7, 5, 5, 5, 5))
    codes, indices = fsq(golden["z"])
    assert_close(fsq.bound(golden["z"]), golden["bounded"], atol=1e-6, rtol=0)
    assert_close(codes, golden["codes"], atol=1e-6, rtol=0)
    assert torch.equal(indices.int(), golden["indices"].int())


def test_fsq_round_trip_and_straight_through():
    fsq = FSQ((5, 3, 7))
    indices = torch.arange(fsq.num_codes)
    codes = fsq.decode(indices)
    assert codes.unique(dim=0).shape == (105, 3) and codes.abs().max() == 1
    z = torch.atanh(codes * 0.95).requires_grad_()
    again, same = fsq(z)
    assert torch.equal(same, indices)
    assert_close(again, codes)
    again.sum().backward()
    half = torch.tensor([2.0, 1.0, 3.0])
    assert_close(z.grad, (1 - torch.tanh(z.detach()) ** 2) * (half * 2 * 1.001 / 2) / half)


def test_action_bins_golden():
    golden = load_file(GOLDEN / "world_model_sequence.safetensors")
    bins = ActionBins(7, 256)
    bins.low.copy_(golden["action_ranges"][:, 0])
    bins.high.copy_(golden["action_ranges"][:, 1])
    assert torch.equal(bins.encode(golden["edge_actions"]).int(), golden["edge_bins"].int())


def test_action_bins_round_trip_and_ranges():
    bins = ActionBins(2, 10)
    bins.set_range(torch.tensor([0.0, 3.0]), torch.tensor([1.0, 3.0]))
    assert bins.low.tolist() == [0.0, 2.0] and bins.high.tolist() == [1.0, 4.0]  # a constant dimension keeps a width
    assert bins.encode(torch.tensor([[0.05, 3.0], [-7.0, 99.0]])).tolist() == [[0, 5], [0, 9]]
    assert_close(bins.decode(torch.tensor([[0, 5]])), torch.tensor([[0.05, 3.1]]))
    every = torch.arange(10)[:, None].expand(10, 2)
    assert torch.equal(bins.encode(bins.decode(every)), every)
    assert bins.outside(torch.tensor([[0.5, 3.0], [1.0, 4.0001]])) == 0  # rounding
    assert bins.outside(torch.tensor([[0.5, 3.0], [math.nan, 9.0]])) == 0.5
    with pytest.warns(UserWarning, match=r"1 of 4 action values \(25.0%, in dimensions \[0\]\) lie outside the ranges"):
        bins.warn_outside(torch.tensor([[0.5, 3.0], [1.5, 3.0]]))
    with warnings.catch_warnings():  # once is enough
        warnings.simplefilter("error")
        bins.warn_outside(torch.tensor([[0.5, 3.0], [1.5, 3.0]]))


def test_paper_preset_is_the_published_layout():
    with torch.device("meta"):
        model = FrameTokenizer(PRESETS["paper"])
    assert sum(p.numel() for p in model.parameters()) == 128_792_656
    shapes = {k: tuple(v.shape) for k, v in model.state_dict().items()}
    assert len(shapes) == 506
    assert shapes["cond_encoder.cross_att_blocks.0.kv_pos_emb"] == (1024, 256)
    assert shapes["cond_encoder.cross_att_blocks.1.att.in_proj_weight"] == (1536, 512)
    assert shapes["cond_decoder.mid_block.attentions.0.to_out.0.weight"] == (512, 512)
    assert shapes["decoder.up_blocks.3.resnets.0.conv_shortcut.weight"] == (128, 256, 1, 1)
    assert shapes["quant_linear.weight"] == (5, 1024)
    assert (PRESETS["paper"].num_context_tokens, PRESETS["paper"].num_future_tokens) == (1024, 64)


@pytest.mark.parametrize("size", [(64, 64), (128, 128), (256, 256), (64, 96)])
def test_shapes_at_every_image_size(size):
    config = replace(PRESETS["smoke"], image_size=size)
    model = make(config)
    frames = torch.rand(2, 3, 3, *size)
    context = model.encode_context(frames[:, 0])
    cells = size[0] * size[1] // 64
    assert context.tokens.shape == (2, cells) == (2, config.num_context_tokens)
    tokens = model.encode_future(frames, context)
    assert tokens.shape == (2, 3, cells // 4) == (2, 3, config.num_future_tokens)
    assert tokens.min() >= 0 and tokens.max() < math.prod(config.future_levels)
    decoded = model.decode(tokens, context)
    assert decoded.shape == frames.shape and decoded.min() >= 0 and decoded.max() <= 1
    groups = tokens[:, None].expand(2, 4, 3, -1)
    # Larger batches take other convolution kernels: equal up to rounding.
    assert_close(model.decode(groups, context)[:, 3], decoded, atol=1e-5, rtol=1e-4)
    assert_close(model.decode(groups, context, frames_at_once=1)[:, 0], decoded, atol=1e-5, rtol=1e-4)
    assert model.decode_context(context).shape == frames[:, 0].shape


def test_starts_do_not_mix_and_frames_are_independent():
    model = make()
    frames = torch.rand(3, 2, 3, 16, 24)
    context = model.encode_context(frames[:, 0])
    tokens = model.encode_future(frames, context)
    decoded = model.decode(tokens, context)
    assert (tokens.flatten(0, 1)[:, None] != tokens.flatten(0, 1)[None]).any(-1).sum() == 6 * 5  # no two are alike
    for s in range(3):
        alone = model.encode_context(frames[s : s + 1, 0])
        assert torch.equal(alone.tokens, context.tokens[s : s + 1])
        one = model.encode_future(frames[s : s + 1, 1:], alone)
        assert torch.equal(one, tokens[s : s + 1, 1:])
        assert_close(model.decode(one, alone), decoded[s : s + 1, 1:], atol=1e-5, rtol=1e-4)


def test_frames_with_the_same_tokens_are_decoded_once(monkeypatch):
    model = make()
    frames = torch.rand(2, 3, 3, 16, 24)
    context = model.encode_context(frames[:, 0])
    tokens = torch.randint(27, (2, 3, 1, model.cfg.num_future_tokens))
    tokens[1, 2] = tokens[1, 0]
    repeated = tokens[:, [0, 1, 2, 1, 0]].expand(2, 5, 4, -1)  # 20 frames of each start, of which 3 and 2 differ
    rows = []
    own = model._decode_future
    monkeypatch.setattr(model, "_decode_future", lambda codes, context: rows.append(len(codes)) or own(codes, context))
    decoded = model.decode(repeated, context)
    assert rows == [2 * 3]
    for g, kind in enumerate([0, 1, 2, 1, 0]):
        for t in range(4):
            alone = model.decode(tokens[:, kind], context)[:, 0]
            assert_close(decoded[:, g, t], alone, atol=1e-5, rtol=1e-4)


def test_future_depends_on_the_context_and_decoding_on_its_tokens_only():
    model = make()
    frames, other = torch.rand(1, 2, 3, 16, 24), torch.rand(1, 3, 16, 24)
    context, changed = model.encode_context(frames[:, 0]), model.encode_context(other)
    tokens = model.encode_future(frames, context)
    assert not torch.allclose(model.decode(tokens, context), model.decode(tokens, changed), atol=1e-3)
    rebuilt = model.context_from_tokens(context.tokens)
    assert_close(model.decode(tokens, rebuilt), model.decode(tokens, context), atol=1e-6, rtol=1e-5)
    with pytest.raises(ValueError, match="rebuilt from tokens"):
        model.encode_future(frames, rebuilt)


def test_training_pass_equals_encode_and_decode():
    model = make()
    frames = torch.rand(2, 3, 3, 16, 24)
    with torch.no_grad():
        out, context = model(frames[:, 0], frames), model.encode_context(frames[:, 0])
        assert torch.equal(out.future_tokens, model.encode_future(frames, context))
        assert_close(out.frames.clamp(0, 1), model.decode(out.future_tokens, context), atol=1e-5, rtol=1e-4)
        assert_close(out.context_frame.clamp(0, 1), model.decode_context(context), atol=1e-5, rtol=1e-4)
        rounded = model.future_fsq.decode(out.future_tokens)  # 3 levels: -1, 0, 1
        assert out.future_codes.abs().max() <= 1 and (out.future_codes - rounded).abs().max() < 0.501


def test_composition_shows_the_context_frame_where_the_mask_is_closed():
    model = make(replace(SMALL, compose=True))
    frames = torch.rand(2, 3, 3, 16, 24)
    with torch.no_grad():
        context = model.encode_context(frames[:, 0])
        out, decoded = model(frames[:, 0], frames), model.decode(model.encode_future(frames, context), context)
        assert out.mask.min() > 0 and out.mask.max() < 1 and out.generated.shape == frames.shape
        want = out.mask * out.generated + (1 - out.mask) * frames[:, :1]
        assert_close(out.frames, want)
        assert_close(decoded, want.clamp(0, 1), atol=1e-5, rtol=1e-4)
        last, stem = model.cond_decoder.conv_out, SMALL.stem
        last.weight[-(stem**2) :] = 0  # the last channel before the pixel shuffle: the mask's logits
        last.bias[-(stem**2) :] = torch.tensor([-50.0, 50.0]).repeat(stem**2 // 2)  # shut in even columns, else open
        closed = model.decode(model.encode_future(frames, context), context)
        assert_close(closed[..., ::2], frames[:, :1, ..., ::2].expand_as(closed[..., ::2]))
        assert (closed[..., 1::2] - frames[:, :1, ..., 1::2]).abs().mean() > 0.05


def test_composing_encoder_and_decoder_see_the_pixels_of_the_context():
    model = make(replace(SMALL, compose=True))
    frames = torch.rand(1, 2, 3, 16, 24)
    context = model.encode_context(frames[:, 0])
    tokens = model.encode_future(frames, context)
    other = context._replace(frame=1 - frames[:, 0])  # same keys
    assert not torch.equal(model.encode_future(frames, other), tokens)
    inverted = context._replace(pixels=model.cond_decoder.pixels(1 - frames[:, 0]))  # same tokens and keys
    assert not torch.allclose(model.decode(tokens, inverted), model.decode(tokens, context), atol=1e-3)
    with pytest.raises(ValueError, match="shows the context frame itself"):
        model.context_from_tokens(context.tokens)


def test_codes_above_what_float32_can_count():
    fsq = FSQ((5,) * 12)
    indices = torch.tensor([0, 2**24 + 1, 5**12 - 1])
    codes, again = fsq(torch.atanh(fsq.decode(indices) * 0.99))
    assert torch.equal(again, indices)
    assert_close(codes, fsq.decode(indices))


def test_initial_gain_of_the_quantisers():
    models = []
    for gain in (1.0, 6.0):
        torch.manual_seed(0)
        models.append(FrameTokenizer(replace(SMALL, quant_gain=gain)).state_dict())
    changed = {name for name in models[0] if not torch.equal(models[0][name], models[1][name])}
    assert changed == {"quant_linear.weight", "quant_conv.weight"}
    for name in changed:
        assert_close(models[1][name], 6 * models[0][name])


@pytest.mark.parametrize("local_init", [False, True])
def test_gradient_reaches_every_parameter(local_init):
    model = make(replace(SMALL, local_init=local_init)).train()
    for module in model.modules():
        if isinstance(module, CrossAttention) and not local_init:
            torch.nn.init.normal_(module.kv_pos_emb, std=0.1)  # at zero it gets a gradient, but a very small one
    frames = torch.rand(2, 2, 3, 16, 24)
    loss, _ = reconstruction_loss(model(frames[:, 0], frames), frames[:, 0], frames)
    loss.backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().max() > 0, name


def test_cross_attention_against_torch():
    config = replace(SMALL, dropout=0.0)
    torch.manual_seed(0)
    block = CrossAttention(16, 6, config).eval()
    for parameter in block.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    z, feature = torch.randn(4, 16, 2, 3), torch.randn(2, 16, 2, 3)
    reference = torch.nn.MultiheadAttention(16, 4, batch_first=True)
    reference.load_state_dict(block.att.state_dict())
    kv = (block.kv_norm(feature).flatten(2).mT + block.kv_pos_emb).repeat_interleave(2, 0)
    q = block.q_norm(z).flatten(2).mT + block.q_pos_emb
    want = torch.nn.functional.silu(z + reference(q, kv, kv)[0].mT.unflatten(2, (2, 3)))
    assert_close(block(z, block.keys_values(feature)), want, atol=1e-5, rtol=1e-5)


def test_local_init_looks_at_its_own_place():
    torch.manual_seed(0)
    block = CrossAttention(64, 16, replace(SMALL, local_init=True, block_channels=(64,)))
    feature = torch.randn(1, 64, 4, 4)
    key, _ = block.keys_values(feature)
    tokens = block.q_norm(torch.randn(1, 64, 4, 4)).flatten(2).mT + block.q_pos_emb
    query = (tokens @ block.att.in_proj_weight[:64].T).unflatten(2, (4, 16)).transpose(1, 2)
    weights = (query @ key.mT / 4).softmax(-1)
    assert (weights.mean(1)[0].argmax(-1) == torch.arange(16)).float().mean() > 0.9


def test_save_and_load(tmp_path):
    model = make()
    save_model(tmp_path / "model.safetensors", model, SMALL)
    again = FrameTokenizer.load(tmp_path / "model.safetensors")
    frames = torch.rand(1, 2, 3, 16, 24)
    context = again.encode_context(frames[:, 0])
    assert again.cfg == SMALL
    assert torch.equal(
        again.encode_future(frames, context), model.encode_future(frames, model.encode_context(frames[:, 0]))
    )


def test_checkpoint_of_another_grid_is_refused_by_name(tmp_path):
    """Public checkpoints exist with 32 x 40 positions for what is a 32 x 32 grid here."""
    wide = make(replace(SMALL, image_size=(16, 32)))
    save_model(tmp_path / "model.safetensors", wide, SMALL)
    with pytest.raises(ValueError, match=r"cond_decoder.*kv_pos_emb has shape \(32, 16\), expected \(24, 16\)"):
        FrameTokenizer.load(tmp_path / "model.safetensors")


def test_frames_out_of_range():
    model, frames = make(), torch.rand(1, 2, 3, 16, 24)
    context = model.encode_context(frames[:, 0])
    for wrong, shown in ((frames * 255, "from 0[.].* to 25[0-9]"), (frames * 2 - 1, "from -"), (frames / 0, "nan|inf")):
        for call in (lambda x: model.encode_context(x[:, 0]), lambda x: model.encode_future(x, context)):
            with pytest.raises(ValueError, match=rf"frames in \[0, 1\], got values {shown}.*divide .* by 255"):
                call(wrong)
    model.encode_context(frames[:, 0] * 1.0005)  # rounding of a resize


def test_errors():
    with pytest.raises(ValueError, match=r"image_size 60x64 cannot be tokenized.*multiples of 16"):
        replace(PRESETS["tiny"], image_size=(60, 64))
    with pytest.raises(ValueError, match=r"future_levels=\(4, 3\): every FSQ level must be odd"):
        replace(SMALL, future_levels=(4, 3))
    with pytest.raises(ValueError, match="norm_groups=3 must divide"):
        replace(SMALL, norm_groups=3)
    model = make()
    with pytest.raises(ValueError, match=r"\(C, H, W\) = \(3, 16, 24\), got shape \(1, 3, 24, 16\)"):
        model.encode_context(torch.rand(1, 3, 24, 16))
    with pytest.raises(ValueError, match="divide uint8 images by 255"):
        model.encode_context(torch.zeros(1, 3, 16, 24, dtype=torch.uint8))
    with pytest.raises(ValueError, match="expected a float tensor in \\[0, 1\\], got ndarray of float32"):
        model.encode_context(torch.zeros(1, 3, 16, 24).numpy())
    bins = ActionBins(7, 256)
    with pytest.raises(ValueError, match=r"actions of dimension 7, got shape \(2, 6\)"):
        bins.encode(torch.zeros(2, 6))
    with pytest.raises(ValueError, match="expected 7 action ranges"):
        bins.set_range(torch.zeros(6), torch.ones(6))
    with pytest.raises(ValueError, match="finite with low <= high"):
        bins.set_range(torch.ones(7), torch.zeros(7))


def test_channels_last_stay_last_behind_the_group_norm_of_a_gpu(monkeypatch):
    class OnGPU(torch.Tensor):
        is_cuda = True
        __torch_function__ = torch._C._disabled_torch_function_impl  # what is computed from it is a plain tensor

    def of_cuda(x, *args):  # its kernel returns channels first
        return plain(x, *args).contiguous()

    plain, last = torch.nn.functional.group_norm, torch.channels_last
    monkeypatch.setattr(torch.nn.functional, "group_norm", of_cuda)
    x = torch.rand(2, 8, 4, 4).contiguous(memory_format=last)
    out = GroupNorm(2, 8)(x.as_subclass(OnGPU))
    assert out.is_contiguous(memory_format=last) and not of_cuda(x, 2).is_contiguous(memory_format=last)
    assert torch.equal(out, plain(x, 2))
    assert not GroupNorm(2, 8)(x.contiguous().as_subclass(OnGPU)).is_contiguous(memory_format=last)
