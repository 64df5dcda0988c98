"""Ends the engine's processes when the server is gone, from their first moment on: after kill -9 nobody else would.

The server starts this module as a small process before the engine, and tells it which processes the engine has. It
finds those that the server could not name any more by a mark in their environment, which each of them starts with.
(vLLM overwrites the environment with a title later, so that the mark alone is not enough.)
"""

import os
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

_MARK = "ENGINE_OF_SERVER"
_CLEAN_END = "end"
# A process that the server had only just forked gets its mark within this time.
_SWEEP_SECONDS = 3.0
_SWEEP_AGAIN_SECONDS = 0.05
# It removes the shared memory of the others once they are gone, and then ends by itself.
_SPARED = b"multiprocessing.resource_tracker"


class EngineGuard:
    """The server's end of the guard. For one thread at a time."""

    def __init__(self) -> None:
        """Starts the guard, and marks the processes that this one starts from now on."""
        self.mark = uuid.uuid4().hex
        self._told: set[int] = set()
        self._process = self._start()
        os.environ[_MARK] = self.mark

    def tell(self, pids: Iterable[int]) -> None:
        """Names processes of the engine. Starts the guard again if somebody has killed it."""
        if self._process.poll() is not None:
            self._told, self._process = set(), self._start()
        for pid in sorted(set(pids) - self._told):
            self._say(str(pid))
            self._told.add(pid)

    def kill_engine(self) -> None:
        """Kills what is left of the engine, also where it is stopped and cannot end by itself."""
        kill_marked(self.mark)
        for pid in self._told:
            _kill(pid, None)
        self._told = set()

    def end(self) -> None:
        """Ends the guard of a server whose engine has ended."""
        self._say(_CLEAN_END)
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()

    def _start(self) -> "subprocess.Popen[bytes]":
        # -I and -S: it needs the standard library alone, and so it runs within milliseconds.
        command = [sys.executable, "-I", "-S", __file__, self.mark]
        # It outlives the server, and so must hold neither its terminal nor a pipe that others read to the end.
        process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, bufsize=0,
            start_new_session=True,
        )  # fmt: skip
        assert process.stdout is not None
        # Before it says so, a signal ends it. If it could not begin, tell() starts another.
        process.stdout.readline()
        process.stdout.close()
        return process

    def _say(self, line: str) -> None:
        assert self._process.stdin is not None
        with suppress(BrokenPipeError):  # It was killed; the next tell() starts another.
            self._process.stdin.write(f"{line}\n".encode())


def kill_marked(mark: str) -> int:
    """Kills every process whose environment has the mark, and returns how many there were."""
    entry = f"{_MARK}={mark}".encode()
    pids = (int(folder.name) for folder in Path("/proc").glob("[0-9]*"))
    return sum(_kill(pid, entry) for pid in pids if pid != os.getpid())


def _kill(pid: int, entry: bytes | None) -> bool:
    """Kills a process, if its environment has the entry or none is asked for. Returns whether it did."""
    try:
        # Opened before it is looked at: the number may belong to another process a moment later.
        handle = os.pidfd_open(pid)
    except OSError:
        return False
    try:
        folder = Path("/proc", str(pid))
        if entry is not None:
            is_ours = entry in (folder / "environ").read_bytes().split(b"\0")
            if not is_ours or _SPARED in (folder / "cmdline").read_bytes():
                return False
        signal.pidfd_send_signal(handle, signal.SIGKILL)
    except OSError:
        return False
    finally:
        os.close(handle)
    return True


def _main(mark: str) -> None:
    """Waits until the server's end of the pipe closes, however the server ends, and then kills what it left."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    print("ready", flush=True)
    handles: list[int] = []
    sweep_seconds = _SWEEP_SECONDS
    for line in sys.stdin:
        if line.strip() == _CLEAN_END:
            sweep_seconds = 0.0
            break
        with suppress(OSError):  # It is gone already.
            handles.append(os.pidfd_open(int(line)))
    for handle in handles:
        with suppress(OSError):
            signal.pidfd_send_signal(handle, signal.SIGKILL)
    deadline = time.monotonic() + sweep_seconds
    while kill_marked(mark) or time.monotonic() < deadline:
        time.sleep(_SWEEP_AGAIN_SECONDS)


if __name__ == "__main__":
    _main(sys.argv[1])
