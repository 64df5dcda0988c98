"""The guard: whatever the engine's processes are doing, they end when the server does; those of others do not."""

import os
import signal
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

from tests.serving.processes import REPOSITORY, is_alive, wait_until

# A server with four processes of its engine: one, one that is stopped, one that has only just come, and one that has
# overwritten its environment, as vLLM's do. The last two lines name a process from before, and the tracker's like.
SERVER = """
import os, signal, subprocess, sys, time
from serving.engine_guard import EngineGuard
sleep = [sys.executable, "-c", "import time; time.sleep(60)"]
other = subprocess.Popen(sleep, stdout=subprocess.DEVNULL)
guard = EngineGuard()
titled = subprocess.Popen([sys.executable, "-c",
    "import time, setproctitle; setproctitle.setproctitle('VLLM::EngineCore'); print(flush=True); time.sleep(60)"],
    stdout=subprocess.PIPE)
titled.stdout.readline()
guard.tell([titled.pid])
plain, stopped = (subprocess.Popen(sleep, stdout=subprocess.DEVNULL) for _ in range(2))
os.kill(stopped.pid, signal.SIGSTOP)
tracker = subprocess.Popen([*sleep, "multiprocessing.resource_tracker"], stdout=subprocess.DEVNULL)
print(plain.pid, stopped.pid, titled.pid, other.pid, tracker.pid, flush=True)
if sys.argv[1] == "retire":
    guard.kill_engine()
    print(flush=True)
if sys.argv[1] == "end":
    guard.end()
    sys.exit()
time.sleep(60)
"""


def pids_of(server: "subprocess.Popen[str]") -> list[int]:
    """Returns the processes that the server has started: the engine's three, and two others."""
    assert server.stdout
    return [int(each) for each in server.stdout.readline().split()]


def start(what: str) -> "subprocess.Popen[str]":
    command = [sys.executable, "-c", SERVER, what]
    return subprocess.Popen(command, cwd=REPOSITORY, stdout=subprocess.PIPE, text=True)


def guards_of(pid: int) -> list[int]:
    """Returns the guards that a server has started."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):  # It has ended meanwhile.
            is_guard = b"engine_guard.py" in (folder / "cmdline").read_bytes()
            if is_guard and f"\nPPid:\t{pid}\n" in (folder / "status").read_text():
                found.append(int(folder.name))
    return found


def check_that_only_the_engine_ended(pids: list[int]) -> None:
    wait_until(lambda: not any(is_alive(pid) for pid in pids[:3]), 20, "the end of the engine's processes")
    assert all(is_alive(pid) for pid in pids[3:])
    for pid in pids[3:]:
        os.kill(pid, signal.SIGKILL)


def test_a_server_that_is_killed_leaves_no_process_of_its_engine() -> None:
    server = start("wait")
    pids, (guard,) = pids_of(server), guards_of(server.pid)
    # What asks a whole terminal to end does not end the guard.
    os.kill(guard, signal.SIGINT)
    server.kill()
    server.communicate()
    check_that_only_the_engine_ended(pids)


def test_an_engine_is_ended_beneath_a_server_that_stays() -> None:
    server = start("retire")
    pids = pids_of(server)
    assert server.stdout
    server.stdout.readline()
    check_that_only_the_engine_ended(pids)
    assert server.poll() is None
    server.kill()
    server.communicate()


def test_a_server_that_ends_takes_its_guard_and_the_rest_of_its_engine_along() -> None:
    server = start("end")
    pids = pids_of(server)
    assert server.wait(10) == 0
    assert guards_of(server.pid) == []
    check_that_only_the_engine_ended(pids)
    server.communicate()
