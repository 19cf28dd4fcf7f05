import pytest
import torch
import torch.nn.functional as F

from vlarft.nets.attention import attend


def make(dtype, key_heads=4):
    random = torch.Generator().manual_seed(0)
    sizes = (2, 4, 9, 16), (2, key_heads, 9, 16), (2, key_heads, 9, 16)
    return [torch.randn(size, generator=random).to(dtype) for size in sizes]


def by_hand(query, key, value, allowed):
    """Softmax of the scaled scores over the allowed keys, in float64; a query's heads share keys in turn."""
    query, key, value = (x.double() for x in (query, key, value))
    key, value = (x.repeat_interleave(query.shape[1] // key.shape[1], 1) for x in (key, value))
    scores = query @ key.transpose(2, 3) / query.shape[-1] ** 0.5
    return scores.masked_fill(~allowed, -torch.inf).softmax(-1) @ value


@pytest.mark.parametrize("key_heads", [4, 2])
@pytest.mark.parametrize("kind", ["all", "causal", "boolean", "additive"])
def test_it_is_scaled_dot_product_attention(kind, key_heads):
    query, key, value = make(torch.float32, key_heads)
    allowed, options = torch.ones(9, 9, dtype=torch.bool), {"grouped": key_heads == 2}
    if kind == "causal":
        allowed, options["causal"] = allowed.tril(), True
    elif kind != "all":
        allowed = torch.arange(9) < 5 + torch.arange(9)[:, None]
        options["mask"] = allowed if kind == "boolean" else torch.zeros(9, 9).masked_fill(~allowed, -torch.inf)
    out = attend(query, key, value, **options)
    torch.testing.assert_close(out.double(), by_hand(query, key, value, allowed), atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("autocast", [True, False])
def test_a_cpu_computes_it_in_float32_whatever_comes_in(autocast):
    query, key, value = make(torch.bfloat16)
    mask = torch.zeros(9, 9, dtype=torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        out, of_floats = attend(query, key, value, mask), attend(query.float(), key.float(), value.float())
    expected = F.scaled_dot_product_attention(query.float(), key.float(), value.float())
    assert out.dtype == torch.bfloat16 and of_floats.dtype == torch.float32
    assert torch.equal(out, expected.bfloat16()) and torch.equal(of_floats, expected)


def test_dropout_leaves_out_keys():
    query, key, value = make(torch.float32)
    torch.manual_seed(0)
    assert not torch.equal(attend(query, key, value, dropout=0.5), attend(query, key, value))
