"""Where training computes, and in what precision: bf16 where the device multiplies it, or else fp32.

A policy's weights are saved in bf16 always.
"""

from __future__ import annotations

import functools

import torch


def training_device() -> torch.device:
    """This process's GPU, the first unless it is one of several, or else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def compute_dtype(device: torch.device) -> torch.dtype:
    """What the device computes in.

    A CPU without instructions for bf16, such as one with AVX2 alone, multiplies it a hundred times slower than fp32.
    """
    return torch.bfloat16 if device.type == "cuda" or _cpu_multiplies_bf16() else torch.float32


def precision(dtype: torch.dtype) -> str:
    """Its name in short."""
    return "bf16" if dtype is torch.bfloat16 else "fp32"


@functools.cache
def _cpu_multiplies_bf16() -> bool:
    return torch.backends.mkldnn.is_available() and bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def autocast(device: torch.device) -> torch.autocast:
    """Computes in that precision what is kept in fp32."""
    enabled = compute_dtype(device) is torch.bfloat16
    # Each weight is used once in a pass: a cache would only keep all of them in bf16 until its end.
    return torch.autocast(device.type, torch.bfloat16, enabled=enabled, cache_enabled=False)
