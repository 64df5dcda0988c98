"""How much memory a process may use: the least of the limits that both versions of control groups set."""

import os
from pathlib import Path

import pytest

from policies import host_memory as host
from policies.host_memory import HostMemory, host_memory, kills
from policies.vllm_settings import count_caches_as_free

MACHINE = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
MIB = 1 << 20


def write(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


@pytest.mark.parametrize(
    ("files", "limit"),
    [
        ({}, MACHINE),
        ({"proc/self/cgroup": "0::/a/b\n", "sys/fs/cgroup/a/b/memory.max": "max\n"}, MACHINE),
        ({"proc/self/cgroup": "0::/a/b\n", "sys/fs/cgroup/a/b/memory.max": f"{300 * MIB}\n"}, 300 * MIB),
        # A group above may be narrower.
        (
            {
                "proc/self/cgroup": "0::/a/b\n",
                "sys/fs/cgroup/a/memory.max": f"{200 * MIB}\n",
                "sys/fs/cgroup/a/b/memory.max": f"{300 * MIB}\n",
            },
            200 * MIB,
        ),
        # Inside a container, the path is one of the host's.
        ({"proc/self/cgroup": "0::/host/path\n", "sys/fs/cgroup/memory.max": f"{100 * MIB}\n"}, 100 * MIB),
        (
            {
                "proc/self/cgroup": "8:pids:/x\n4:memory:/x/y\n0::/\n",
                "sys/fs/cgroup/memory/memory.limit_in_bytes": "9223372036854771712\n",
                "sys/fs/cgroup/memory/x/y/memory.limit_in_bytes": f"{50 * MIB}\n",
            },
            50 * MIB,
        ),
    ],
    ids=["no groups", "no limit", "version 2", "a group above", "in a container", "version 1"],
)
def test_the_least_limit_counts(tmp_path: Path, files: dict[str, str], limit: int) -> None:
    found = host_memory(write(tmp_path, files))
    assert found.limit == limit
    assert found.is_limited == (limit < MACHINE)


@pytest.mark.parametrize(
    ("files", "count"),
    [
        ({}, 0),
        ({"proc/vmstat": "nr_free_pages 12\noom_kill 3\n"}, 3),
        (
            {
                "proc/vmstat": "oom_kill 9\n",
                "proc/self/cgroup": "0::/a\n",
                "sys/fs/cgroup/a/memory.max": f"{MIB}\n",
                "sys/fs/cgroup/a/memory.events": "oom 4\noom_kill 2\n",
            },
            2,
        ),
        (
            {
                "proc/vmstat": "oom_kill 9\n",
                "proc/self/cgroup": "4:memory:/a\n",
                "sys/fs/cgroup/memory/a/memory.limit_in_bytes": f"{MIB}\n",
                "sys/fs/cgroup/memory/a/memory.oom_control": "oom_kill 1\n",
            },
            1,
        ),
        # Other containers' kills are none of a process whose group limits it; where no group does, all count.
        ({"proc/vmstat": "oom_kill 9\n", "proc/self/cgroup": "0::/a\n", "sys/fs/cgroup/a/memory.max": "max\n"}, 9),
    ],
)
def test_the_kernels_kills_are_counted(tmp_path: Path, files: dict[str, str], count: int) -> None:
    assert kills(write(tmp_path, files)) == count


@pytest.mark.parametrize(
    "files",
    [
        {
            "proc/self/cgroup": "0::/a\n",
            "sys/fs/cgroup/a/memory.max": f"{300 * MIB}\n",
            "sys/fs/cgroup/a/memory.current": f"{120 * MIB}\n",
            "sys/fs/cgroup/a/memory.stat": f"anon 1\nactive_file {15 * MIB}\ninactive_file {5 * MIB}\n",
        },
        {
            "proc/self/cgroup": "4:memory:/a\n",
            "sys/fs/cgroup/memory/a/memory.limit_in_bytes": f"{300 * MIB}\n",
            "sys/fs/cgroup/memory/a/memory.usage_in_bytes": f"{120 * MIB}\n",
            "sys/fs/cgroup/memory/a/memory.stat": f"total_active_file {20 * MIB}\nactive_file 7\n",
        },
    ],
    ids=["version 2", "version 1"],
)
def test_what_only_caches_files_is_free(tmp_path: Path, files: dict[str, str]) -> None:
    assert host_memory(write(tmp_path, files)).free == 200 * MIB


def test_what_others_on_the_machine_use_is_not_free(tmp_path: Path) -> None:
    meminfo = {"proc/meminfo": "MemTotal: 9 kB\nMemAvailable: 4096 kB\nHugePages_Total: 0\n"}
    found = host_memory(write(tmp_path, meminfo))
    assert (found.limit, found.free) == (MACHINE, 4 * MIB)


def test_this_machine_has_memory() -> None:
    found = host_memory()
    assert 0 < found.free < found.limit <= MACHINE


def test_vllm_counts_as_used_what_we_do(monkeypatch: pytest.MonkeyPatch) -> None:
    """vLLM asks for the usage before it takes memory for its cache, and refuses to start where too much is used."""
    from vllm.utils import cpu_resource_utils

    monkeypatch.setattr(cpu_resource_utils, "get_cgroup_memory_usage", cpu_resource_utils.get_cgroup_memory_usage)
    monkeypatch.setattr(host, "host_memory", lambda: HostMemory(6 * MIB, 5 * MIB, is_limited=True))
    monkeypatch.setattr(cpu_resource_utils, "get_cgroup_memory_limit", lambda: 6 * MIB)
    count_caches_as_free(cpu_resource_utils)
    assert cpu_resource_utils.get_memory_node_info(0).available_memory == 5 * MIB
