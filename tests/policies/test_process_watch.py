"""What is seen of a process's memory from outside, and what is said of one that a signal ended."""

import signal
import subprocess
import sys

import pytest

from policies import process_watch
from policies.host_memory import HostMemory
from policies.process_watch import Watch


@pytest.mark.parametrize(
    ("number", "said"),
    [
        (signal.SIGSEGV, "was ended by SIGSEGV: it had"),
        (signal.SIGABRT, "was ended by SIGABRT: it had"),
        # Somebody sent these.
        (signal.SIGKILL, ""),
        (signal.SIGTERM, ""),
    ],
)
def test_a_signal_is_named_with_the_memory_that_the_process_had(
    monkeypatch: pytest.MonkeyPatch, number: signal.Signals, said: str
) -> None:
    monkeypatch.setattr(process_watch, "host_memory", lambda: HostMemory(6 << 30, 6 << 30, is_limited=True))
    watch = Watch()
    process = subprocess.Popen([sys.executable, "-c", "import time; kept = bytearray(64 << 20); time.sleep(60)"])
    while watch.peaks.get(process.pid, 0) < 64 << 20:
        watch.look(process.pid)
    process.send_signal(number)
    code = process.wait()
    found = watch.killing(code, process.pid)
    assert found.startswith(said) and bool(found) == bool(said)
    assert not said or found.endswith(
        "0.1 GiB at its peak, and the limit of this container or control group is 6.0 GiB"
    )
    # Who asks how it ended is told, whoever sent the signal.
    assert watch.ending(code, process.pid).startswith(f"was ended by {number.name}: it had 0.1 GiB")
    assert watch.ending(1, process.pid) == ""


def test_a_kill_for_memory_is_told_from_one_that_somebody_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernel counts its own kills; here a counter stands in for it."""
    watch = Watch(kills_before=3)
    for count, is_told in ((3, False), (4, True)):
        monkeypatch.setattr(process_watch, "kills", lambda count=count: count)
        found = watch.killing(-signal.SIGKILL, 1)
        assert ("the kernel, which had no memory left for it" in found) == is_told == bool(found)
