"""Decoder: parity with transformers, causality, KV cache and shared prefixes, padding, gradients, errors."""

import pytest
import torch
from torch.testing import assert_close

from vlarft.nets.kv_cache import KVCache
from vlarft.nets.transformer import Decoder, TransformerConfig, rotary_tables, rotate

SMALL = TransformerConfig(depth=2, width=32, num_heads=4, num_kv_heads=2, ffn_dim=48, qkv_bias=True, init_std=0.3)


def make(config: TransformerConfig = SMALL) -> Decoder:
    torch.manual_seed(0)
    decoder = Decoder(config).eval()
    for name, parameter in decoder.named_parameters():
        if name.endswith("bias") or "norm" in name:
            torch.nn.init.normal_(parameter, mean=1.0 if "norm" in name else 0.0, std=0.2)
    return decoder


def test_paper_size_on_meta_device():
    with torch.device("meta"):
        decoder = Decoder(TransformerConfig())
    assert sum(p.numel() for p in decoder.parameters()) == 113_265_408


def test_rotation_by_hand():
    cos, sin = rotary_tables(torch.tensor([0, 1]), 4, 100.0)
    # Two pairs (0, 2) and (1, 3) with frequencies 1 and 100 ** -0.5 = 0.1.
    turned = rotate(torch.tensor([1.0, 0.0, 0.0, 1.0]).expand(2, 1, 4), cos, sin)[:, 0]
    assert_close(turned[0], torch.tensor([1.0, 0.0, 0.0, 1.0]))
    one, tenth = torch.tensor(1.0), torch.tensor(0.1)
    assert_close(turned[1], torch.stack([one.cos(), -tenth.sin(), one.sin(), tenth.cos()]))


@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_matches_transformers(family, transformers):
    bias = family == "qwen2"
    config = TransformerConfig(
        depth=2, width=32, num_heads=4, num_kv_heads=2, ffn_dim=48, qkv_bias=bias, init_std=0.3, rope_theta=500.0
    )
    ours = make(config)
    widths = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    sizes = {**widths, "num_attention_heads": 4, "num_key_value_heads": 2}
    kinds = {
        "llama": (transformers.LlamaConfig, transformers.LlamaModel),
        "qwen2": (transformers.Qwen2Config, transformers.Qwen2Model),
    }
    config_class, model_class = kinds[family]
    try:
        reference_config = config_class(
            **sizes, vocab_size=8, rms_norm_eps=1e-6, rope_parameters={"rope_type": "default", "rope_theta": 500.0}
        )
    except TypeError:  # transformers < 5 takes rope_theta itself
        reference_config = config_class(**sizes, vocab_size=8, rms_norm_eps=1e-6, rope_theta=500.0)
    reference_config._attn_implementation = "eager"
    reference = model_class(reference_config).eval()
    missing, unexpected = reference.load_state_dict(ours.state_dict(), strict=False)
    assert missing == ["embed_tokens.weight"] and not unexpected
    x = torch.randn(3, 11, 32)
    with torch.no_grad():
        assert_close(ours(x), reference(inputs_embeds=x).last_hidden_state, atol=2e-5, rtol=1e-4)


def test_no_leak_from_the_future():
    decoder = make()
    x = torch.randn(2, 9, 32)
    changed = x.clone()
    changed[:, 5:] += 1.0
    with torch.no_grad():
        before, after = decoder(x), decoder(changed)
    assert_close(before[:, :5], after[:, :5])
    assert (before[:, 5:] - after[:, 5:]).abs().amin(dim=(0, 2)).min() > 1e-4


def test_cache_equals_full_forward():
    decoder = make()
    x = torch.randn(2, 10, 32)
    cache = KVCache(2, 10)
    with torch.no_grad():
        parts = [decoder(x[:, a:b], cache) for a, b in [(0, 4), (4, 5), (5, 8), (8, 10)]]
        assert_close(torch.cat(parts, dim=1), decoder(x), atol=1e-5, rtol=1e-5)
    assert cache.length == 10


@pytest.mark.parametrize(("block", "rooms"), [(None, [7, 7, 7]), (4, [4, 4, 7])])
def test_shared_prefix_equals_full_forward_and_is_not_copied(block, rooms):
    decoder = make()
    starts, group = 2, 3
    prefix, rest = torch.randn(starts, 5, 32), torch.randn(starts * group, 6, 32)
    with torch.no_grad():
        cache = KVCache(starts, 5)
        decoder(prefix, cache)
        members, parts = cache.expand(group, 7, block), []
        assert members.prefix[0][0].data_ptr() == cache.own[0][0].data_ptr()
        for (first, last), room in zip([(0, 1), (1, 4), (4, 6)], rooms, strict=True):
            parts.append(decoder(rest[:, first:last], members))
            for part in (part for layer in members.own for part in layer):
                assert part.shape[2] == room and part.is_contiguous()
                assert part[:, :, last:].count_nonzero() == 0  # where nothing was written, attention reads 0
        want = decoder(torch.cat([prefix.repeat_interleave(group, 0), rest], dim=1))[:, 5:]
    assert_close(torch.cat(parts, dim=1), want, atol=1e-5, rtol=1e-5)
    assert members.length == 11


def test_gradient_reaches_every_parameter():
    decoder = make().train()
    decoder(torch.randn(2, 5, 32)).square().sum().backward()
    for name, parameter in decoder.named_parameters():
        # Softmax does not see a shift of all scores of a query: the key bias has a gradient only through rotation.
        assert parameter.grad is not None and parameter.grad.abs().max() > 1e-7, name


def test_bfloat16_autocast_keeps_float32_norms():
    decoder = make()
    x = torch.randn(1, 4, 32)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        low = decoder(x)
    with torch.no_grad():
        assert_close(low.float(), decoder(x), atol=0.15, rtol=0.1)


def test_errors():
    with pytest.raises(ValueError, match="num_heads=4 must be a multiple of num_kv_heads=3"):
        TransformerConfig(num_heads=4, num_kv_heads=3, width=32)
    with pytest.raises(ValueError, match="width=30 must be a multiple of num_heads=4"):
        TransformerConfig(num_heads=4, num_kv_heads=4, width=30)
    with pytest.raises(ValueError, match="head width 3 must be even"):
        TransformerConfig(num_heads=4, num_kv_heads=4, width=12)
    decoder, x = make(), torch.randn(2, 4, 32)
    with pytest.raises(ValueError, match="KV cache has 1 rows, the input 2"):
        decoder(x, KVCache(1, 4))
    with pytest.raises(ValueError, match="room for 3 tokens, 4 needed"):
        decoder(x, KVCache(2, 3))
    with pytest.raises(ValueError, match="exceed max_positions=3"):
        Decoder(TransformerConfig(depth=1, width=32, num_heads=4, num_kv_heads=4, ffn_dim=8, max_positions=3))(x)
    with pytest.raises(ValueError, match="run the prefix through it first"):
        KVCache(2, 3).expand(2, 3)
