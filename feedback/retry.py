"""Keeps a process working while what it stands on fails: tries again, later each time, and reports only the first."""

import math
import random
import threading
import time
from collections.abc import Callable

_FIRST_WAIT_SECONDS = 0.1


def keep_running(
    work: Callable[[Callable[[], None]], None],
    stop: threading.Event,
    *,
    passing: tuple[type[Exception], ...],
    max_wait_seconds: float,
    report: Callable[[Exception], None],
) -> None:
    """Calls `work` again and again until `stop` is set, however often it raises one of `passing`.

    Args:
        work: works until `stop` is set. It calls the function it is given once all that it needs is there.
        stop: ends this, also while it waits.
        passing: errors after which it may go better. Any other ends this.
        max_wait_seconds: the longest wait before the next attempt; an attempt that worked for longer makes the next
            failure a first one again.
        report: hears of the first failure in a row.
    """
    failures = 0
    while not stop.is_set():
        up_since = [math.inf]

        def is_up(up_since: list[float] = up_since) -> None:
            up_since[0] = time.monotonic()

        try:
            work(is_up)
        except passing as error:
            failures = 1 if time.monotonic() - up_since[0] > max_wait_seconds else failures + 1
            if failures == 1:
                report(error)
            stop.wait(backoff_seconds(failures, max_wait_seconds))


def backoff_seconds(failures: int, max_wait_seconds: float) -> float:
    """Returns how long to wait after so many failures in a row: doubling, with jitter so that replicas spread."""
    return min(max_wait_seconds, _FIRST_WAIT_SECONDS * 2.0 ** min(failures - 1, 30)) * random.uniform(0.5, 1.0)
