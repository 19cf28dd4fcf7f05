"""The DiT trunk: adaLN-Zero, shared keys and values, time features, gradients."""

import math

import pytest
import torch

from vlarft.nets.dit import DiT, DiTConfig, sincos_positions, time_features

CFG = DiTConfig(width=16, depth=3, num_heads=2, mlp_dim=24, cross_attention_blocks=(0, 2), gamma_init=1.0)


def scrambled(cfg: DiTConfig = CFG) -> DiT:
    torch.manual_seed(0)
    model = DiT(cfg, out_dim=5)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return model


def test_starts_at_zero():
    torch.manual_seed(0)
    model = DiT(CFG, out_dim=5)
    out = model(torch.randn(2, 4, 16), model.modulations(torch.randn(2, 16)), model.prepare(torch.randn(2, 6, 16)))
    assert out.shape == (2, 4, 5) and not out.any()
    # adaLN-Zero: each block's self-attention and MLP start as the identity
    without_cross = DiT(DiTConfig(width=16, depth=3, num_heads=2, mlp_dim=24, cross_attention_blocks=()), out_dim=5)
    x = torch.randn(2, 4, 16)
    assert torch.equal(without_cross.blocks[1](x, without_cross.modulations(torch.randn(2, 16))[1], None), x)


def test_rows_share_a_context_as_if_it_were_copied():
    model, rows = scrambled(), 3
    x, c, context = torch.randn(2 * rows, 4, 16), model.modulations(torch.randn(2 * rows, 16)), torch.randn(2, 6, 16)
    shared = model(x, c, model.prepare(context))
    copied = model(x, c, model.prepare(context.repeat_interleave(rows, dim=0)))
    torch.testing.assert_close(shared, copied, atol=1e-5, rtol=1e-5)
    # and rows do not see each other
    changed = torch.cat([x[:1] + 1, x[1:]])
    torch.testing.assert_close(model(changed, c, model.prepare(context))[1:], shared[1:], atol=1e-6, rtol=1e-6)


def test_cross_attention_is_torch_attention():
    model = scrambled()
    cross, project = model.blocks[0].cross_attn, model.context_kv["0"]
    oracle = torch.nn.MultiheadAttention(16, 2, batch_first=True)
    with torch.no_grad():
        oracle.in_proj_weight.copy_(torch.cat([cross.q.weight, project.k.weight, project.v.weight]))
        oracle.in_proj_bias.copy_(torch.cat([cross.q.bias, project.k.bias, project.v.bias]))
        oracle.out_proj.load_state_dict(cross.out.state_dict())
    x, context = torch.randn(2, 4, 16), torch.randn(2, 6, 16)
    normed = project.norm(context)
    expected = x + cross.gamma * oracle(cross.norm(x), normed, normed)[0]
    torch.testing.assert_close(cross(x, project(context)), expected, atol=1e-5, rtol=1e-5)


def test_gradient_reaches_every_parameter():
    model = scrambled()
    context = torch.randn(2, 6, 16, requires_grad=True)
    c = model.modulations(torch.randn(4, 16))
    model(torch.randn(4, 4, 16), c, model.prepare(context)).square().sum().backward()
    assert all(parameter.grad.abs().sum() > 0 for parameter in model.parameters())
    assert context.grad.abs().sum() > 0


def test_time_features_by_hand():
    # frequencies 1 and 1e4 ** -0.5 = 0.01
    expected = [math.cos(0.5), math.cos(0.005), math.sin(0.5), math.sin(0.005)]
    assert time_features(torch.tensor([0.5]), 4)[0].tolist() == pytest.approx(expected, abs=1e-7)


def test_positions_by_hand():
    positions = sincos_positions(3, 4)
    assert positions.shape == (1, 3, 4)
    assert positions[0, 2].tolist() == pytest.approx([math.sin(2), math.sin(0.02), math.cos(2), math.cos(0.02)])


def test_errors():
    with pytest.raises(ValueError, match=r"cross_attention_blocks \(0, 3\): indices must lie in 0\.\.2"):
        DiT(DiTConfig(width=16, depth=3, num_heads=2, mlp_dim=24, cross_attention_blocks=(0, 3)), out_dim=5)
