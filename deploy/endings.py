"""Says why a process ended, from its exit code and its log, and whether it may do better when it is started again."""

import os
import re
import signal
from pathlib import Path

_MOST_BYTES_READ = 1 << 18
MOST_CHARACTERS = 400
# From sysexits.h: the cause, such as a bus that does not answer, may be gone by the next start.
PASSING_CODE = os.EX_TEMPFAIL
_ASKED_TO_END = (0, -signal.SIGTERM, -signal.SIGINT, -signal.SIGKILL)
# `some.module.SomeError: what was wrong`, also in a group, and where a logger has put its time and place before it.
_EXCEPTION = re.compile(r"^(?:.*\] | *\| )?(?P<kind>(?:\w+\.)*[A-Z]\w*(?:Error|Exception|Interrupt)): (?P<said>\S.*)$")
_POINTS_ABOVE = "See root cause above"


def can_recur(code: int) -> bool:
    """Whether a process that ended with this code may end so each time: nobody asked it to end."""
    return code not in _ASKED_TO_END and code != PASSING_CODE


def cause(log: Path, begin: int = 0) -> str:
    """Returns in one line why a process ended, from what it wrote to `log` from byte `begin` on.

    This is the last exception in the log, or the first one if the last one points to it; without exceptions, it is the
    last line that has words.
    """
    try:
        with log.open("rb") as file:
            file.seek(max(begin, log.stat().st_size - _MOST_BYTES_READ))
            lines = file.read().decode(errors="replace").splitlines()
    except OSError as error:
        return str(error)
    exceptions = [_without_module(found) for found in map(_EXCEPTION.match, lines) if found]
    if exceptions:
        return exceptions[0 if _POINTS_ABOVE in exceptions[-1] else -1][:MOST_CHARACTERS]
    words = (line.strip() for line in reversed(lines) if any(map(str.isalpha, line)))
    return next(words, "It said nothing")[:MOST_CHARACTERS]


def place(code: int, why: str) -> str:
    """Returns a text that is equal for two processes that died at the same place: it leaves out all figures."""
    return f"{code} {re.sub(r'[0-9][0-9.]*', '#', why)}"


def _without_module(found: re.Match[str]) -> str:
    return f"{found['kind'].rpartition('.')[2]}: {found['said']}"
