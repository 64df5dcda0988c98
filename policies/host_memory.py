"""Reads how much memory this process may use, as its control group or the machine has it, and gives back what it can.

Beyond that limit the kernel kills a process, whatever the machine has.
"""

from __future__ import annotations

import ctypes
import gc
import os
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

_GROUPS = Path("proc/self/cgroup")
_MOUNT = Path("sys/fs/cgroup")
# Version 1 of control groups says "no limit" by a number near the greatest that there is.
_NO_LIMIT = 1 << 60
_KIB = 1 << 10


@dataclass(frozen=True)
class HostMemory:
    """What this process and those beside it may use together, in bytes."""

    limit: int
    free: int
    """What of it nobody uses now; what only caches files counts as free."""
    is_limited: bool = False
    """Whether a control group sets the limit."""

    @property
    def limited_by(self) -> str:
        """What sets the limit, in words."""
        return "the limit of this container or control group" if self.is_limited else "all memory of this machine"


def host_memory(root: Path = Path("/")) -> HostMemory:
    """Returns the least of the machine's memory and the limits of this process's control group and those above it."""
    machine = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    free = _KIB * _counts(root / "proc/meminfo").get("MemAvailable:", machine // _KIB)
    limit = machine
    for folder in _folders(root):
        found = _limit(folder)
        if found is not None and found < machine:
            limit, free = min(limit, found), min(free, max(0, found - _used(folder)))
    return HostMemory(limit, free, is_limited=limit < machine)


def used_memory() -> int | None:
    """Returns what this process's control group uses, without what only caches files; None where nothing limits it."""
    found = host_memory()
    return found.limit - found.free if found.is_limited else None


def give_back() -> None:
    """Gives the machine back what this process has freed: glibc keeps much of it, and every limit counts that."""
    gc.collect()
    # Other libraries than glibc have no such function.
    with suppress(AttributeError, OSError):
        ctypes.CDLL(None).malloc_trim(0)


def kills(root: Path = Path("/")) -> int:
    """Returns how often the kernel has killed a process for memory: one of this control group if it limits memory.

    Where none does, those of the whole machine count.
    """
    limiting = [folder for folder in _folders(root) if _limit(folder) is not None]
    files = [folder / name for folder in limiting for name in ("memory.events", "memory.oom_control")]
    return max(map(_kills, files or [root / "proc/vmstat"]))


def _folders(root: Path) -> Iterator[Path]:
    """Yields the folders of this process's control group for memory and of all groups above it.

    Inside a container the group's own path may not be there: its folder is then the root of the mount.
    """
    try:
        lines = (root / _GROUPS).read_text().splitlines()
    except OSError:
        return
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers and "memory" not in controllers.split(","):
            continue
        mount = root / _MOUNT / controllers
        group = mount / path.lstrip("/")
        yield from (folder for folder in (group, *group.parents) if folder == mount or mount in folder.parents)


def _limit(folder: Path) -> int | None:
    found = (_number(folder / name) for name in ("memory.max", "memory.limit_in_bytes"))
    return next((number for number in found if number is not None and number < _NO_LIMIT), None)


def _used(folder: Path) -> int:
    """Returns the bytes that a control group uses, without those that only cache files."""
    used = next(filter(None, (_number(folder / name) for name in ("memory.current", "memory.usage_in_bytes"))), 0)
    kinds = _counts(folder / "memory.stat")
    caches = (kinds.get(f"total_{name}", kinds.get(name, 0)) for name in ("inactive_file", "active_file"))
    return used - sum(caches)


def _number(path: Path) -> int | None:
    try:
        return int(path.read_text())
    except (OSError, ValueError):
        return None


def _kills(path: Path) -> int:
    return _counts(path).get("oom_kill", 0)


def _counts(path: Path) -> dict[str, int]:
    """Returns a file's lines of a name and a number; nothing if the file cannot be read."""
    try:
        words = [line.split() for line in path.read_text().splitlines()]
        return {each[0]: int(each[1]) for each in words if len(each) > 1}
    except (OSError, ValueError):
        return {}
