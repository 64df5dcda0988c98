"""Says why a process ended, from its exit code and its log, and whether it may do better the next time."""

import json
import os
import re
import signal
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from policies.process_watch import ASKED_TO_END, Watch

_MOST_BYTES_READ = 1 << 18
MOST_CHARACTERS = 400
# From sysexits.h: the cause, such as a bus that does not answer, may be gone by the next start.
PASSING_CODE = os.EX_TEMPFAIL
# The process itself has tried several times, and failed at the same place each time.
GAVE_UP_CODE = os.EX_SOFTWARE
# `some.module.SomeError: what was wrong`, also in a group, and where a logger has put its time and place before it.
_EXCEPTION = re.compile(r"^(?:.*\] | *\| )?(?P<kind>(?:\w+\.)*[A-Z]\w*(?:Error|Exception|Interrupt)): (?P<said>\S.*)$")
_POINTS_ABOVE = "See root cause above"
_IGNORED = "Exception ignored in"
# torchrun's report of a rank that a signal ended. The root cause comes last.
_RANK = re.compile(r"^ +rank +: (?P<rank>\d+) .*\n +exitcode +: (?P<code>-\d+) \(pid: (?P<pid>\d+)\)", re.MULTILINE)


@dataclass(frozen=True)
class Ending:
    """How a process ended, in words."""

    killing: str
    """Which signal killed it or one of its ranks; "" if none did."""
    why: str


@dataclass(frozen=True)
class EndedRank:
    """A process of several that train together, which a signal ended."""

    rank: int
    pid: int
    code: int


def can_recur(code: int) -> bool:
    """Whether a process that ended with this code may end so each time: nobody asked it to end."""
    return code not in (0, *ASKED_TO_END, PASSING_CODE)


def ending_of(code: int, pid: int, watch: Watch, log: Path, begin: int) -> Ending:
    """Returns how the process `pid` ended, which wrote to `log` from byte `begin` on."""
    killing = watch.killing(code, pid)
    if killing:
        return Ending(killing, f"It {killing}")
    if code in ASKED_TO_END:
        # It had no time to say anything, so the last line of its log is no cause.
        return Ending("", f"It {watch.ending(code, pid)}")
    rank = ended_rank(log, begin) if code else None
    if rank is None:
        return Ending("", cause(log, begin))
    killing = watch.killing(rank.code, rank.pid)
    named = f"(rank {rank.rank})"
    return Ending(killing and f"{named} {killing}", f"It {named} {watch.ending(rank.code, rank.pid)}")


def cause(log: Path, begin: int = 0) -> str:
    """Returns in one line why a process ended, from what it wrote to `log` from byte `begin` on.

    This is the last exception in the log, or the first one if the last one points to it; without exceptions, it is the
    last line that has words.
    """
    try:
        lines = list(_without_ignored(_from_json(_end_of(log, begin).splitlines())))
    except OSError as error:
        return str(error)
    exceptions = [_without_module(found) for found in map(_EXCEPTION.match, lines) if found]
    if exceptions:
        return exceptions[0 if _POINTS_ABOVE in exceptions[-1] else -1][:MOST_CHARACTERS]
    words = (line.strip() for line in reversed(lines) if any(map(str.isalpha, line)))
    return next(words, "It said nothing")[:MOST_CHARACTERS]


def ended_rank(log: Path, begin: int = 0) -> EndedRank | None:
    """Returns which rank a signal ended first, by what torchrun wrote to `log` from byte `begin` on; None if none.

    torchrun itself then ends the others by SIGTERM, and exits with 1.
    """
    try:
        told = _RANK.finditer(_end_of(log, begin))
    except OSError:
        return None
    found = [EndedRank(int(each["rank"]), int(each["pid"]), int(each["code"])) for each in told]
    return next((each for each in reversed(found) if each.code != -signal.SIGTERM), None)


def _end_of(log: Path, begin: int) -> str:
    with log.open("rb") as file:
        file.seek(max(begin, log.stat().st_size - _MOST_BYTES_READ))
        return file.read().decode(errors="replace")


def _from_json(lines: Iterable[str]) -> Iterator[str]:
    """Yields a log's lines, of those that are JSON what they say and their traceback."""
    for line in lines:
        try:
            record = json.loads(line) if line.startswith("{") else None
        except ValueError:
            record = None
        if isinstance(record, dict) and "message" in record:
            yield from f"{record['message']}\n{record.get('traceback') or ''}".splitlines()
        else:
            yield line


def _without_ignored(lines: Iterable[str]) -> Iterator[str]:
    """Yields all lines but those of exceptions that Python ignored, such as of an object's end: they end no process."""
    ignored = False
    for line in lines:
        ignored = ignored or line.startswith(_IGNORED)
        if not ignored:
            yield line
        elif _EXCEPTION.match(line):
            ignored = False


def _without_module(found: re.Match[str]) -> str:
    return f"{found['kind'].rpartition('.')[2]}: {found['said']}"
