"""Why a process ended: what its log says of it, in the forms that Python, vLLM and asyncio leave."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from deploy.endings import MOST_CHARACTERS, can_recur, cause, ended_rank, ending_of
from policies.process_watch import Watch, started_by

CHAINED = """
class EngineError(Exception): pass
try:
    raise KeyError("inner")
except KeyError as error:
    raise EngineError("vLLM did not start") from error
"""
GROUPED = """
import asyncio
async def fail(): raise ValueError("in a group")
async def main():
    async with asyncio.TaskGroup() as tasks: tasks.create_task(fail())
asyncio.run(main())
"""
FROM_VLLM = """
import sys
print("(EngineCore pid=7) ERROR 11-29 21:56:05 [core.py:1510] AttributeError: no init_cpu_memory_env", file=sys.stderr)
raise RuntimeError("Engine core initialization failed. See root cause above. Failed core proc(s): {}")
"""
AS_JSON = """
import logging
from deploy.cli.log import begin_log
begin_log("json")
try: raise ValueError("in JSON")
except ValueError: logging.getLogger("x").exception("it ended")
logging.getLogger("x").info("bye")
"""
IGNORED = """
class Resource:
    def __del__(self): raise TypeError("at the end of the interpreter")
kept = Resource()
raise ValueError("the cause")
"""


@pytest.mark.parametrize(
    ("program", "said"),
    [
        (IGNORED, "ValueError: the cause"),
        (IGNORED.replace('raise ValueError("the cause")', 'print("all is well")'), "all is well"),
        (CHAINED, "EngineError: vLLM did not start"),
        (GROUPED, "ValueError: in a group"),
        (AS_JSON, "ValueError: in JSON"),
        (FROM_VLLM, "AttributeError: no init_cpu_memory_env"),
        ("print('all is well'); print('   ')", "all is well"),
        ("", "It said nothing"),
        ("raise ValueError('x' * 9999)", "ValueError: " + "x" * (MOST_CHARACTERS - len("ValueError: "))),
    ],
)
def test_the_cause_is_one_line_of_what_the_process_said(tmp_path: Path, program: str, said: str) -> None:
    log = tmp_path / "log"
    log.write_text("OSError: what an earlier process died of\n")
    begin = log.stat().st_size
    with log.open("ab") as output:
        subprocess.run([sys.executable, "-c", program], stdout=output, stderr=output, check=False)
    assert cause(log, begin) == said


def test_a_log_that_is_not_there_is_no_reason_to_fail(tmp_path: Path) -> None:
    assert "No such file" in cause(tmp_path / "log")


@pytest.mark.parametrize(
    ("code", "recurs"),
    [(1, True), (2, True), (-signal.SIGSEGV, True), (0, False), (-signal.SIGKILL, False), (os.EX_TEMPFAIL, False)],
)
def test_who_was_asked_to_end_or_may_find_it_mended_does_not_count(code: int, recurs: bool) -> None:
    assert can_recur(code) is recurs


def test_who_was_ended_by_a_signal_that_somebody_sent_has_no_cause_in_its_log(tmp_path: Path) -> None:
    (tmp_path / "log").write_text("all is well\n")
    ending = ending_of(-signal.SIGKILL, 6, Watch(), tmp_path / "log", 0)
    assert ending.killing == ""
    assert ending.why.startswith("It was ended by SIGKILL: it had")


TORCHRUN = """
import os, signal, sys, time
if os.environ["RANK"] == "1":
    os.kill(os.getpid(), signal.SIGKILL)
time.sleep(60)
"""


def test_torchruns_report_names_the_rank_that_a_signal_ended(tmp_path: Path) -> None:
    program, log = tmp_path / "program.py", tmp_path / "log"
    program.write_text(TORCHRUN)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", str(program)]
    with log.open("wb") as output:
        launcher = subprocess.Popen(torchrun, stdout=output, stderr=output)
        watch = Watch()
        while launcher.poll() is None:
            watch.look(launcher.pid, *started_by(launcher.pid))
            time.sleep(0.01)
    found = ended_rank(log)
    assert found is not None
    assert (found.rank, found.code) == (1, -signal.SIGKILL)
    # It was watched like a process of its own. Nobody but the kernel, for want of memory, would make the run end.
    assert 0 < watch.peaks[found.pid] < watch.peaks[launcher.pid]
    ending = ending_of(launcher.returncode, launcher.pid, watch, log, 0)
    assert ending.killing == ""
    assert ending.why.startswith("It (rank 1) was ended by SIGKILL: it had 0.")
    watch.kills_before = -1
    ending = ending_of(launcher.returncode, launcher.pid, watch, log, 0)
    assert ending.killing.startswith("(rank 1) was ended by SIGKILL from the kernel, which had no memory left for it")
    assert ending.why == f"It {ending.killing}"


def test_ranks_that_torchrun_ended_itself_are_not_named(tmp_path: Path) -> None:
    log = tmp_path / "log"
    log.write_text("  rank      : 0 (local_rank: 0)\n  exitcode  : -15 (pid: 7)  (SIGTERM)\nValueError: the cause\n")
    assert ended_rank(log) is None
    assert ending_of(1, 6, Watch(), log, 0).why == "ValueError: the cause"
    assert ended_rank(tmp_path / "none") is None
