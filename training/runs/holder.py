"""Names the process that holds a lease, so that another one on the same machine sees when it has ended."""

from __future__ import annotations

import os
import socket
from pathlib import Path

_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")
_NAMESPACE = Path("/proc/self/ns/pid")
# Fields of /proc/PID/stat after the command's name: see proc(5), which counts them from 3.
_STATE, _STARTED = 0, 19
_ENDED = ("Z", "X")


def this_process() -> str:
    """Returns what names this process among all there ever were; empty where that cannot be known.

    A process id alone does not: it is given out again, by each machine and, in containers, by each namespace.
    """
    pid = os.getpid()
    stat, place = _stat(pid), _place()
    return f"{place} {pid} {stat[_STARTED]}" if stat and place else ""


def has_ended(process: str) -> bool:
    """Whether the process that `this_process` named so has ended. False where this process could not see it."""
    if not process:
        return False
    place, pid, started = process.rsplit(" ", 2)
    if place != _place():
        return False
    try:
        os.kill(int(pid), 0)
    except ProcessLookupError:
        return True
    except PermissionError:
        pass
    stat = _stat(int(pid))
    return bool(stat) and (stat[_STATE] in _ENDED or stat[_STARTED] != started)


def _place() -> str:
    """Returns the host, its boot and its namespace of process ids: in the same place the same ids can be seen."""
    try:
        return f"{socket.gethostname()} {_BOOT_ID.read_text().strip()} {_NAMESPACE.readlink()}"
    except OSError:
        return ""


def _stat(pid: int) -> list[str]:
    """Returns the fields after the command's name, which may have spaces and brackets; none if they cannot be read."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return []
