"""The number format of the networks' forward passes; weights, losses and whatever is reported stay float32."""

from functools import cache
from typing import Literal

import torch

from vlarft.run import distributed

Precision = Literal["auto", "bf16", "fp32"]


@cache
def in_bf16(precision: Precision, device: torch.device) -> bool:
    """Return whether to compute in bfloat16. `auto` asks the device, and the main process prints once what it chose.

    A GPU has it since Ampere, a processor with AMX or AVX512-BF16 (docs/performance.md has what the latter gains).
    """
    if precision != "auto":
        return precision == "bf16"
    if device.type == "cuda":
        half, what = torch.cuda.is_bf16_supported(including_emulation=False), torch.cuda.get_device_name(device)
    else:
        known = {"AMX": torch.cpu._is_amx_tile_supported(), "AVX512-BF16": torch.cpu._is_avx512_bf16_supported()}
        half = any(known.values())
        having = " and ".join(name for name, there in known.items() if there)
        what = f"a processor with {having}" if half else "a processor without AMX and AVX512-BF16"
    if distributed.is_main():
        print(f"precision auto: {'bfloat16' if half else 'float32'}, on {what}", flush=True)
    return half
