"""Limits of what a key, and a user within it, may ask of a replica: requests, tokens, completions in flight.

A sample reserves all tokens that it may take when it is admitted, and gives back what it did not take when it ends, so
that callers who ask at once cannot pass a limit together. What is refused takes nothing. A minute is one of the clock,
and its counts are forgotten with it.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from serving.access.callers import Caller
from serving.config import LimitsConfig
from serving.errors import Refusal, exhausted

_MINUTE_SECONDS = 60
_IN_FLIGHT_RETRY_SECONDS = 1.0

_Whose = tuple[str, ...]


@dataclass(frozen=True)
class Bound:
    """One limit: what is counted, of whom, and how much there may be."""

    name: str
    """The setting that sets it."""
    whose: _Whose
    most: int


@dataclass
class Reservation:
    """Tokens that a sample may take, of which minute. `used` is how many it took; all of them until it has ended."""

    bounds: tuple[Bound, ...]
    minute: int
    num_tokens: int
    used: int


class Limits:
    """The limits of one replica. For one event loop."""

    def __init__(self, config: LimitsConfig) -> None:
        self._config = config
        self._minute = 0
        self._counts: Counter[_Whose] = Counter()
        self._in_flight: Counter[_Whose] = Counter()

    def request(self, caller: Caller, user_id: str, kind: str) -> None:
        """Counts a request of a kind, "sample" or "feedback".

        Raises:
            Refusal: RESOURCE_EXHAUSTED, with the limit's name, and when to ask again.
        """
        self._take(self._bounds(caller, user_id, "requests_per_minute", kind), 1)

    def reserve(self, caller: Caller, user_id: str, num_tokens: int) -> Reservation:
        """Reserves the tokens that a sample may take; `settle` gives back those that it did not.

        Raises:
            Refusal: RESOURCE_EXHAUSTED, with the limit's name, and when to ask again, if that can help.
        """
        bounds = self._bounds(caller, user_id, "tokens_per_minute", "tokens")
        self._take(bounds, num_tokens)
        return Reservation(bounds, self._minute, num_tokens, num_tokens)

    def settle(self, reservation: Reservation) -> None:
        """Gives back what a sample did not take, if the minute in which it was reserved still runs."""
        self._turn_minute()
        if reservation.minute == self._minute:
            for bound in reservation.bounds:
                self._counts[bound.whose] -= reservation.num_tokens - reservation.used

    @contextmanager
    def in_flight(self, caller: Caller, user_id: str, count: int) -> Iterator[None]:
        """Holds room for completions while they are written.

        Raises:
            Refusal: RESOURCE_EXHAUSTED, with the limit's name.
        """
        bounds = self._bounds(caller, user_id, "inflight_completions", "in flight")
        for bound in bounds:
            taken = self._in_flight[bound.whose]
            if taken + count > bound.most:
                raise _refusal(bound, f"{taken} of {bound.most} completions are in flight", _IN_FLIGHT_RETRY_SECONDS)
        for bound in bounds:
            self._in_flight[bound.whose] += count
        try:
            yield
        finally:
            for bound in bounds:
                self._in_flight[bound.whose] -= count
                if not self._in_flight[bound.whose]:
                    del self._in_flight[bound.whose]

    def _bounds(self, caller: Caller, user_id: str, name: str, kind: str) -> tuple[Bound, ...]:
        """Returns the limits of this name that are set: the key's first, which bounds how many users are counted."""
        key = (kind, caller.application, caller.name)
        both = ((name, key), (f"user_{name}", (*key, user_id)))
        limits = ((each, whose, getattr(self._config, each)) for each, whose in both)
        return tuple(Bound(each, whose, most) for each, whose, most in limits if most is not None)

    def _take(self, bounds: tuple[Bound, ...], amount: int) -> None:
        self._turn_minute()
        for bound in bounds:
            taken = self._counts.get(bound.whose, 0)
            if amount > bound.most:
                raise _refusal(bound, f"{amount} at once are more than the limit of {bound.most} a minute", None)
            if taken + amount > bound.most:
                why = f"{taken} of {bound.most} a minute are taken, and {amount} are asked for"
                raise _refusal(bound, why, _MINUTE_SECONDS - time.time() % _MINUTE_SECONDS)
        for bound in bounds:
            self._counts[bound.whose] += amount

    def _turn_minute(self) -> None:
        minute = int(time.time() // _MINUTE_SECONDS)
        if minute != self._minute:
            self._minute = minute
            self._counts.clear()


def _refusal(bound: Bound, why: str, retry_after_seconds: float | None) -> Refusal:
    refusal = exhausted("LIMIT_REACHED", f"limits.{bound.name}: {why}")
    refusal.metadata["limit"] = bound.name
    refusal.retry_after_seconds = retry_after_seconds
    return refusal
