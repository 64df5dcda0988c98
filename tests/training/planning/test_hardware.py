"""Roofs are measured, and those of several devices add up."""

from policies.host_memory import host_memory
from training.planning.hardware import Hardware, this_machine


def test_this_machine_is_measured() -> None:
    found = this_machine(read_bytes=1 << 20)
    assert found.bandwidth_gb_s > 0
    assert found.matmul_gflop_s > 0
    assert found.memory_gib > 0
    if found.name.startswith("CPU"):
        assert found.memory_gib == host_memory().limit / 2**30
        assert found.num_devices == 1


def test_devices_add_up() -> None:
    eight = Hardware("some GPU", bandwidth_gb_s=3350.0, matmul_gflop_s=989e3, memory_gib=79.0, num_devices=8)
    assert eight.bandwidth == 8 * 3.35e12
    assert eight.flops == 8 * 989e12
