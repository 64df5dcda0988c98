"""Watches the memory of processes from outside, and says of one that a signal ended what it had, and what there was."""

import signal
import time
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from policies.host_memory import HostMemory, host_memory, kills

_GIB = 1 << 30
_RECENT_SECONDS = 10.0
# Somebody sends these to end a process.
ASKED_TO_END = (-signal.SIGTERM, -signal.SIGINT, -signal.SIGKILL)


@dataclass
class Watch:
    """What is seen of a process, and of those that it has started, from its start on."""

    kills_before: int = field(default_factory=kills)
    """How often the kernel had killed a process for memory some seconds ago: an older kill says nothing of this one."""
    kills_since: int = field(default_factory=kills)
    looked_at: float = field(default_factory=time.monotonic)
    peaks: dict[int, int] = field(default_factory=dict)
    """The most memory that each process has had, in bytes."""

    def look(self, *pids: int) -> None:
        """Notes how much memory processes have had so far, and how often the kernel has killed any for memory."""
        if time.monotonic() - self.looked_at > _RECENT_SECONDS:
            self.kills_before, self.kills_since, self.looked_at = self.kills_since, kills(), time.monotonic()
        for pid in pids:
            with suppress(OSError, ValueError, IndexError):
                status = Path(f"/proc/{pid}/status").read_text()
                peak = 1024 * int(status.partition("VmHWM:")[2].split()[0])
                self.peaks[pid] = max(peak, self.peaks.get(pid, 0))

    def is_for_memory(self, code: int) -> bool:
        """Whether it was the kernel that has just ended a process, which ended with this code, for want of memory."""
        return code == -signal.SIGKILL and kills() > self.kills_before

    def killing(self, code: int, pid: int) -> str:
        """Returns which signal ended a process, in words; "" if none did, or somebody sent it to end the process."""
        if code in ASKED_TO_END and not self.is_for_memory(code):
            return ""
        return self.ending(code, pid)

    def ending(self, code: int, pid: int) -> str:
        """Returns which signal ended a process, whoever sent it, with the memory that it had; "" if none did."""
        if code >= 0:
            return ""
        return ended_by(code, self.peaks.get(pid, 0), host_memory(), for_memory=self.is_for_memory(code))


def ended_by(code: int, peak: int, memory: HostMemory, *, for_memory: bool) -> str:
    """Returns in words that a signal ended a process which had so many bytes of this memory at its peak."""
    by = " from the kernel, which had no memory left for it" if for_memory else ""
    name = signal.Signals(-code).name if -code in [*signal.Signals] else f"signal {-code}"
    return (
        f"was ended by {name}{by}: it had {peak / _GIB:.1f} GiB at its peak, and "
        f"{memory.limited_by} is {memory.limit / _GIB:.1f} GiB"
    )


def started_by(pid: int) -> list[int]:
    """Returns the processes that this one has started and not yet seen end."""
    found: list[int] = []
    for thread in Path(f"/proc/{pid}/task").glob("*/children"):
        with suppress(OSError):
            found += map(int, thread.read_text().split())
    return found
