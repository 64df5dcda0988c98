"""Why a process ended: what its log says of it, in the forms that Python, vLLM and asyncio leave."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from deploy.endings import MOST_CHARACTERS, can_recur, cause, place

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


@pytest.mark.parametrize(
    ("program", "said"),
    [
        (CHAINED, "EngineError: vLLM did not start"),
        (GROUPED, "ValueError: in a group"),
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


def test_a_place_is_the_same_whatever_its_figures() -> None:
    assert place(1, "ValueError: 13.7 of 15.1 GiB") == place(1, "ValueError: 9 of 16 GiB")
    assert place(1, "process 12345 died") == place(1, "process 7 died")
    assert place(1, "process 7 died") != place(-signal.SIGSEGV, "process 7 died")
    assert place(1, "KeyError: a") != place(1, "KeyError: b")


@pytest.mark.parametrize(
    ("code", "recurs"),
    [(1, True), (2, True), (-signal.SIGSEGV, True), (0, False), (-signal.SIGKILL, False), (os.EX_TEMPFAIL, False)],
)
def test_who_was_asked_to_end_or_may_find_it_mended_does_not_count(code: int, recurs: bool) -> None:
    assert can_recur(code) is recurs
