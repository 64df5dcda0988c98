"""The precision that policies are computed in, alike by server and trainer: bf16 where the device multiplies it.

Decided once, because a server that computes otherwise than the trainer fails its swap's proof. Weights are saved in
bf16 always.
"""

import functools
from typing import Literal

import torch

# What a processor must have to multiply bf16; without it bf16 is a hundred times slower than fp32.
_BF16_INSTRUCTIONS = ("avx512_bf16", "amx_bf16")


def compute_dtype(device: torch.device) -> torch.dtype:
    """Returns what the device computes in: torch.bfloat16 or torch.float32."""
    return torch.bfloat16 if device.type == "cuda" or cpu_multiplies_bf16() else torch.float32


def dtype_name(dtype: torch.dtype) -> Literal["bfloat16", "float32"]:
    """Returns its name as vLLM takes it."""
    return "bfloat16" if dtype is torch.bfloat16 else "float32"


def short_name(dtype: torch.dtype) -> str:
    """Returns its name as people say it: "bf16" or "fp32"."""
    return "bf16" if dtype is torch.bfloat16 else "fp32"


@functools.cache
def cpu_multiplies_bf16() -> bool:
    """Whether this machine's processor has instructions for products in bf16."""
    found = torch.cpu.get_capabilities()
    return any(found.get(name, False) for name in _BF16_INSTRUCTIONS)
