"""How a process shows that it makes progress: it touches a file at each turn of its work, which `alignd up` looks at.

A process that only lives does not beat: the calls stand where a turn, a step or a wait has ended. Until `start` was
called, as in tests and in programs of others, nothing happens.
"""

import os
import threading
import time
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

_LEAST_SECONDS = 0.5
_WAIT_SECONDS = 1.0
T = TypeVar("T")


class _Heart:
    """The process's own file, and when it was touched last."""

    def __init__(self) -> None:
        self.path: Path | None = None
        self.beat_at = 0.0


@dataclass(frozen=True)
class Seen:
    """What is seen of a process from outside."""

    at: float
    """When it beat last or was made, in Unix seconds."""
    is_starting: bool
    """Whether it has not beaten yet."""


_heart = _Heart()


def start(data_dir: Path, verb: str) -> None:
    """Makes this process beat as that of `verb`. That is no beat yet: what it imports next may take long."""
    path = path_of(data_dir, verb)
    if not path.exists():
        make(data_dir, verb)
    _heart.path = path


def beat() -> None:
    """Says that there was progress. Cheap enough for any loop: the file is touched twice a second at most."""
    now = time.monotonic()
    if _heart.path is None or now - _heart.beat_at < _LEAST_SECONDS:
        return
    with suppress(OSError):
        if not _heart.beat_at:
            # Tells the first beat. A hole takes no room, also on a full disk.
            os.truncate(_heart.path, 1)
        os.utime(_heart.path)
    _heart.beat_at = now


def each(items: Iterable[T]) -> Iterator[T]:
    """Yields the items, and beats before each: for work that is long where there are many."""
    for item in items:
        beat()
        yield item


def wait(seconds: float, stop: threading.Event | None = None) -> None:
    """Waits, no longer than until `stop` is set, and beats meanwhile: a wait that was meant is no hang."""
    deadline = time.monotonic() + seconds
    while (left := deadline - time.monotonic()) > 0 and not (stop and stop.is_set()):
        beat()
        if stop:
            stop.wait(min(left, _WAIT_SECONDS))
        else:
            time.sleep(min(left, _WAIT_SECONDS))


def make(data_dir: Path, verb: str) -> None:
    """Makes the file of a process that starts. A full disk is no reason to fail: then there is no file to look at."""
    path = path_of(data_dir, verb)
    with suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
        os.truncate(path, 0)


def look(data_dir: Path, verb: str) -> Seen | None:
    """Returns what is seen of a process; None if nobody knows."""
    try:
        found = path_of(data_dir, verb).stat()
    except OSError:
        return None
    return Seen(found.st_mtime, is_starting=found.st_size == 0)


def path_of(data_dir: Path, verb: str) -> Path:
    """Returns the file that a process touches. It is empty until the first time."""
    return data_dir / "heartbeats" / verb
