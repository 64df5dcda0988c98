"""Says how long to wait after failures in a row, and keeps a process running while what it depends on fails."""

import math
import random
import re
import threading
import time
from collections.abc import Callable

from feedback import heartbeat

_FIRST_WAIT_SECONDS = 0.1


def keep_running(
    work: Callable[[Callable[[], None]], None],
    stop: threading.Event,
    *,
    transient: tuple[type[Exception], ...],
    max_wait_seconds: float,
    report: Callable[[Exception], None],
) -> None:
    """Calls `work` until `stop` is set, and again each time that it raises one of `transient`.

    Args:
        work: works until `stop` is set. It calls the function it is given once everything it needs is up.
        stop: ends the loop, also while it waits.
        transient: errors after which another attempt may succeed. Any other error is passed on.
        max_wait_seconds: the longest wait before the next attempt. When an attempt was up for longer than this, its
            failure counts as a first one again.
        report: is called with the first failure in a row.
    """
    failures = 0
    while not stop.is_set():
        up_since = [math.inf]

        def is_up(up_since: list[float] = up_since) -> None:
            up_since[0] = time.monotonic()

        try:
            work(is_up)
        except transient as error:
            failures = 1 if time.monotonic() - up_since[0] > max_wait_seconds else failures + 1
            if failures == 1:
                report(error)
            heartbeat.wait(backoff_seconds(failures, max_wait_seconds), stop)


def place(why: str) -> str:
    """Returns a text that is equal for two failures at the same place: their words, without figures."""
    return re.sub(r"[0-9][0-9.]*", "#", why)


def backoff_seconds(failures: int, max_wait_seconds: float, first_wait_seconds: float = _FIRST_WAIT_SECONDS) -> float:
    """Returns the wait after this many failures in a row, at least 1. It doubles each time, up to the longest.

    It is random, down to half of that, so that replicas spread.
    """
    return min(max_wait_seconds, first_wait_seconds * 2.0 ** min(failures - 1, 30)) * random.uniform(0.5, 1.0)
