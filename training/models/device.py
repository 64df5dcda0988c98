"""Chooses the device that training computes on, and computes in that device's precision (policies.precision)."""

from __future__ import annotations

import torch

from policies.precision import compute_dtype


def training_device() -> torch.device:
    """Returns this process's GPU, or the CPU where there is none.

    That GPU is the first, unless this process is one of several ranks.
    """
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def autocast(device: torch.device) -> torch.autocast:
    """Returns a context in which weights in fp32 compute in the device's precision."""
    enabled = compute_dtype(device) is torch.bfloat16
    # A pass uses each weight once. A cache would only keep a bf16 copy of every weight until the pass ends.
    return torch.autocast(device.type, torch.bfloat16, enabled=enabled, cache_enabled=False)


def copy_dtype(device: torch.device, *, stochastic_rounding: bool) -> torch.dtype:
    """Returns the dtype of the copies of trained weights that models compute with (training.models.masters).

    Without stochastic rounding there are no copies: each pass rounds the weights themselves, to the nearest.
    """
    return compute_dtype(device) if stochastic_rounding else torch.float32
