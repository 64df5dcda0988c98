"""The precision that server and trainer both compute policies in: bf16 where the device can multiply it, else fp32.

It is decided here, once, because a server that computes in another precision than the trainer fails the proof of its
swap. Weights are always saved in bf16.
"""

import functools
from typing import Literal

import torch

# A processor multiplies bf16 with one of these; without them bf16 is a hundred times slower than fp32.
_BF16_INSTRUCTIONS = ("avx512_bf16", "amx_bf16")


def compute_dtype(device: torch.device) -> torch.dtype:
    """Returns the dtype that the device computes in: torch.bfloat16 or torch.float32."""
    return torch.bfloat16 if device.type == "cuda" or cpu_multiplies_bf16() else torch.float32


def dtype_name(dtype: torch.dtype) -> Literal["bfloat16", "float32"]:
    """Returns the dtype's name as vLLM takes it."""
    return "bfloat16" if dtype is torch.bfloat16 else "float32"


def short_name(dtype: torch.dtype) -> str:
    """Returns the dtype's name as people say it: "bf16" or "fp32"."""
    return "bf16" if dtype is torch.bfloat16 else "fp32"


@functools.cache
def cpu_multiplies_bf16() -> bool:
    """Whether this machine's processor has instructions that multiply bf16."""
    found = torch.cpu.get_capabilities()
    return any(found.get(name, False) for name in _BF16_INSTRUCTIONS)
