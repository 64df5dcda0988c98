"""Where training computes, and how: in the precision of the device (policies.precision)."""

from __future__ import annotations

import torch

from policies.precision import compute_dtype


def training_device() -> torch.device:
    """This process's GPU, the first unless it is one of several, or else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def autocast(device: torch.device) -> torch.autocast:
    """Computes in that precision what is kept in fp32."""
    enabled = compute_dtype(device) is torch.bfloat16
    # Each weight is used once in a pass: a cache would only keep all of them in bf16 until its end.
    return torch.autocast(device.type, torch.bfloat16, enabled=enabled, cache_enabled=False)
