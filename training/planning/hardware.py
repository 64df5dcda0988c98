"""Measures the limits that a plan assumes: how fast a device reads memory and multiplies matrices, and its memory.

It also has the share of these speeds, the roofs, that training reaches in practice.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from policies.host_memory import host_memory
from policies.precision import compute_dtype
from training.models.device import training_device

GIB = 2**30
_MATMUL_SECONDS = 0.3
# Widths of square matrices that keep the device busy, and bytes to read that are more than any cache has.
_MATMUL_WIDTH = {"cpu": 2048, "cuda": 8192}
_READ_BYTES = GIB
_NUM_READS = 3


@dataclass(frozen=True)
class Efficiency:
    """The share of the roof that each kind of work reaches in practice."""

    decode: float
    scoring: float
    update: float
    pretraining: float
    reward_model: float


# bench.growth measured 0.34 to 0.70 for scoring (median 0.55) and 0.46 to 0.68 for the update (median 0.58), with more
# for larger work (docs/results/growth.md): a half is close. Decoding reached 0.21 with 16 rollouts at a time in bf16,
# and 0.55 with 64 in fp32, where products take longer than reading: a quarter is a cautious value. The others are
# assumed.
CPU_EFFICIENCY = Efficiency(decode=0.25, scoring=0.5, update=0.5, pretraining=0.5, reward_model=0.5)
# bench.gpu measured these on one H100, with a model of 1.5B and rows of 5,120 tokens, whose mask keeps SDPA from using
# its fastest kernel (docs/results/gpu.json). Update and pretraining were measured together.
GPU_EFFICIENCY = Efficiency(decode=0.1, scoring=0.17, update=0.27, pretraining=0.27, reward_model=0.17)


@dataclass(frozen=True)
class Hardware:
    """What each of several equal devices reaches at best."""

    name: str
    bandwidth_gb_s: float
    """Speed of reading memory, in 10⁹ bytes a second."""
    matmul_gflop_s: float
    """Speed of matrix products in the device's precision, in 10⁹ floating-point operations a second."""
    memory_gib: float
    num_devices: int = 1
    computes_in: torch.dtype = torch.bfloat16
    efficiency: Efficiency = CPU_EFFICIENCY

    @property
    def bandwidth(self) -> float:
        """Bytes a second of all devices together."""
        return self.bandwidth_gb_s * 1e9 * self.num_devices

    @property
    def flops(self) -> float:
        """FLOPs a second of all devices together."""
        return self.matmul_gflop_s * 1e9 * self.num_devices


def this_machine(read_bytes: int = _READ_BYTES) -> Hardware:
    """Measures this machine in about a second: the first of its GPUs, or its CPU if there is none.

    On a CPU `memory_gib` is what this process may use (policies.host_memory). On a GPU it is the memory that
    is free now, because what others use there is not expected to become free.
    """
    device = training_device()
    if device.type == "cuda":
        name, num_devices = torch.cuda.get_device_name(), torch.cuda.device_count()
        memory = torch.cuda.mem_get_info()[0]
    else:
        name, num_devices = f"CPU, {torch.get_num_threads()} threads", 1
        memory = host_memory().limit
    return Hardware(
        name=name,
        bandwidth_gb_s=_read_rate(device, read_bytes) / 1e9,
        matmul_gflop_s=_matmul_rate(device) / 1e9,
        memory_gib=memory / GIB,
        num_devices=num_devices,
        computes_in=compute_dtype(device),
        efficiency=GPU_EFFICIENCY if device.type == "cuda" else CPU_EFFICIENCY,
    )


def _read_rate(device: torch.device, num_bytes: int) -> float:
    """Returns bytes read a second: the best of a few sums over memory."""
    values = torch.ones(num_bytes // 4, device=device)
    return values.nbytes / min(_seconds(device, values.sum) for _ in range(_NUM_READS))


def _matmul_rate(device: torch.device) -> float:
    """Returns FLOPs a second: the best of the matrix products done in a fixed time."""
    width = _MATMUL_WIDTH[device.type]
    a, b = (torch.randn(width, width, device=device).to(compute_dtype(device)) for _ in range(2))
    best, until = float("inf"), time.perf_counter() + _MATMUL_SECONDS
    while True:
        best = min(best, _seconds(device, lambda: a @ b))
        if time.perf_counter() > until:
            return 2 * width**3 / best


def _seconds(device: torch.device, run: Callable[[], Tensor]) -> float:
    started = time.perf_counter()
    run()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - started
