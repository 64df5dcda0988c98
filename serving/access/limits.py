"""Limits of what a key, and a user within it, may ask of a replica: requests, tokens, completions in flight.

A sample reserves all tokens that it may take when it is admitted, and gives back what it did not take when it ends, so
that callers who ask at once cannot pass a limit together. What is refused takes nothing. Where replicas share a store
(serving.access.counts), requests and tokens are counted over all of them; completions in flight are counted by each.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from serving.access.callers import Caller
from serving.access.counts import Bound, Counts, Taken, Whose, refusal
from serving.config import LimitsConfig

_IN_FLIGHT_RETRY_SECONDS = 1.0


@dataclass
class Reservation:
    """Tokens that a sample may take. `used` is how many it took; all of them until it has ended."""

    taken: Taken
    used: int

    @property
    def num_tokens(self) -> int:
        """How many were reserved."""
        return self.taken.amount


class Limits:
    """The limits of one replica. For one event loop."""

    def __init__(self, config: LimitsConfig) -> None:
        self._config = config
        self._counts = Counts(config.store.get_secret_value())
        self._in_flight: Counter[Whose] = Counter()

    async def request(self, caller: Caller, user_id: str, kind: str) -> None:
        """Counts a request of a kind, "sample" or "feedback".

        Raises:
            Refusal: RESOURCE_EXHAUSTED, with the limit's name, and when to ask again.
        """
        await self._counts.take(self._bounds(caller, user_id, "requests_per_minute", kind), 1)

    async def reserve(self, caller: Caller, user_id: str, num_tokens: int) -> Reservation:
        """Reserves the tokens that a sample may take; `settle` gives back those that it did not.

        Raises:
            Refusal: RESOURCE_EXHAUSTED, with the limit's name, and when to ask again, if that can help.
        """
        bounds = self._bounds(caller, user_id, "tokens_per_minute", "tokens")
        return Reservation(await self._counts.take(bounds, num_tokens), num_tokens)

    def settle(self, reservation: Reservation) -> None:
        """Gives back what a sample did not take, if the minute in which it was reserved still runs."""
        self._counts.give_back(reservation.taken, reservation.num_tokens - reservation.used)

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
                raise refusal(bound, f"{taken} of {bound.most} completions are in flight", _IN_FLIGHT_RETRY_SECONDS)
        for bound in bounds:
            self._in_flight[bound.whose] += count
        try:
            yield
        finally:
            for bound in bounds:
                self._in_flight[bound.whose] -= count
                if not self._in_flight[bound.whose]:
                    del self._in_flight[bound.whose]

    async def close(self) -> None:
        """Ends the connections to the store."""
        await self._counts.close()

    def _bounds(self, caller: Caller, user_id: str, name: str, kind: str) -> tuple[Bound, ...]:
        """Returns the limits of this name that are set: the key's first, which bounds how many users are counted."""
        key = (kind, caller.application, caller.name)
        both = ((name, key), (f"user_{name}", (*key, user_id)))
        limits = ((each, whose, getattr(self._config, each)) for each, whose in both)
        return tuple(Bound(each, whose, most) for each, whose, most in limits if most is not None)
