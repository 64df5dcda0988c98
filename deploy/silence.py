"""Tells which process of `alignd up` has made no progress for too long: it may live, and yet hang."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from feedback import heartbeat

SILENT_SECONDS: Mapping[str, float] = {"serve": 60.0, "gateway": 60.0, "relay": 60.0, "ingest": 60.0, "train": 600.0}
"""How long a process may make no progress (feedback.heartbeat) before it is killed and started again."""
# Before its first turn a process imports what it needs, reads models and opens files.
_LONGEST_START_SECONDS = 600.0
_LONGEST_LOOK_SECONDS = 1.0


@dataclass
class Silence:
    """How long one process has been seen without progress."""

    looked_at: float
    """By the monotonic clock."""
    seen: heartbeat.Seen | None = None
    """What was seen of it last; None if nothing is known of it."""
    seconds: float = 0.0

    @classmethod
    def begin(cls, data_dir: Path, verb: str, now: float) -> Silence:
        """Returns that of a process that is about to be started, and makes its file."""
        heartbeat.make(data_dir, verb)
        return cls(now, heartbeat.look(data_dir, verb))

    def look(self, data_dir: Path, verb: str, now: float, most: Mapping[str, float] = SILENT_SECONDS) -> str:
        """Returns why the process must be killed, in words that follow its name; "" if it need not."""
        seen = heartbeat.look(data_dir, verb)
        if seen is None or seen != self.seen:
            self.seen, self.seconds = seen, 0.0
        else:
            # A look that comes late says that `alignd up` was held up, perhaps with all others: a laptop that slept.
            self.seconds += min(now - self.looked_at, _LONGEST_LOOK_SECONDS)
        self.looked_at = now
        if seen is None or self.seconds <= _limit_seconds(verb, seen, most):
            return ""
        return f"had made no progress for {self.seconds:.0f} s, and was killed"


def in_words(data_dir: Path, verb: str, now: float) -> str:
    """Returns how long a process has made no progress by `now`, in Unix seconds; "" if less than half of its limit."""
    seen = heartbeat.look(data_dir, verb)
    if seen is None or now - seen.at <= _limit_seconds(verb, seen, SILENT_SECONDS) / 2:
        return ""
    return f"no progress for {now - seen.at:.0f} s"


def _limit_seconds(verb: str, seen: heartbeat.Seen, most: Mapping[str, float]) -> float:
    return max(_LONGEST_START_SECONDS if seen.is_starting else 0.0, most.get(verb, math.inf))
