"""Scaled dot-product attention, in the number format that is fastest where it runs. Rollouts of the world model that
share a prefix have their own, `transformer.grouped_attention`.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def attend(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None, *, dropout: float = 0.0,
    causal: bool = False, grouped: bool = False,
) -> Tensor:  # fmt: skip
    """`torch.nn.functional.scaled_dot_product_attention`; on a CPU always in float32.

    torch's kernel for bfloat16 is slower there, above all backward and for sequences of tens of tokens (torch 2.13),
    and would cost much of what bfloat16 gains elsewhere; benchmarks/precision.py times whole training steps.

    Args:
        query, key, value: (B, heads, tokens, d) each; with `grouped`, several heads of the query share one of the keys.
        mask: additive or boolean, True where a query may look.
        causal: a query sees the keys up to its own place.

    Returns:
        (B, heads, tokens, d), of the query's dtype.
    """
    options = {"dropout_p": dropout, "is_causal": causal, "enable_gqa": grouped}
    if query.device.type != "cpu":
        return F.scaled_dot_product_attention(query, key, value, mask, **options)
    mask = mask.float() if mask is not None and mask.is_floating_point() else mask
    with torch.autocast("cpu", enabled=False):
        out = F.scaled_dot_product_attention(query.float(), key.float(), value.float(), mask, **options)
    return out.to(query.dtype)
