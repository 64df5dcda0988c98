"""What was taken of each limit in this minute: counted here, or in a store that all replicas count in.

Where the store does not answer, this replica counts for itself until it does: a limit is then held by each replica
alone, and nobody is refused because of the store. A minute is one of the clock, and its counts are forgotten with it.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import json
import logging
import time
from collections import Counter
from collections.abc import Coroutine, Sequence
from dataclasses import dataclass
from typing import Any

from limits.aio.storage import RedisStorage
from limits.errors import StorageError
from redis.asyncio import ConnectionPool

from serving.errors import Refusal, exhausted

logger = logging.getLogger(__name__)

_MINUTE_SECONDS = 60
# A replica's clock may be behind another's.
_KEPT_SECONDS = 2 * _MINUTE_SECONDS
_STORE_TIMEOUT_SECONDS = 0.5
_STORE_AWAY_SECONDS = 5.0
# Calls that ask the store at a time. The others wait, since a store with much to do is not away.
_MOST_AT_A_TIME = 32

Whose = tuple[str, ...]


@dataclass(frozen=True)
class Bound:
    """One limit: what is counted, of whom, and how much there may be."""

    name: str
    """The setting that sets it."""
    whose: Whose
    most: int


@dataclass(frozen=True)
class Taken:
    """What was taken, of which bounds, in which minute, and whether it was counted in the store."""

    bounds: tuple[Bound, ...]
    amount: int
    minute: int
    shared: bool


class Counts:
    """The counts of one replica. For one event loop."""

    def __init__(self, store_url: str = "") -> None:
        """Prepares to count: here, or in the Redis at `store_url`, such as redis://host:6379/0."""
        self._minute = 0
        self._here: Counter[Whose] = Counter()
        self._connections = _connections(store_url) if store_url else None
        self._store = _store(store_url, self._connections) if self._connections else None
        self._store_away_until = 0.0
        self._turns = asyncio.Semaphore(_MOST_AT_A_TIME)
        self._giving: set[asyncio.Task[None]] = set()

    async def take(self, bounds: tuple[Bound, ...], amount: int) -> Taken:
        """Takes an amount of each bound, or of none.

        Raises:
            Refusal: RESOURCE_EXHAUSTED, with the limit's name, and when to ask again, if that can help.
        """
        for bound in bounds:
            if amount > bound.most:
                raise refusal(bound, f"{amount} at once are more than the limit of {bound.most} a minute", None)
        if bounds and self._store and not self._store_is_away():
            taking = asyncio.ensure_future(self._take_shared(self._store, bounds, amount))
            try:
                taken = await asyncio.shield(taking)
            except asyncio.CancelledError:
                self._in_background(self._give_all_back(taking))
                raise
            if taken:
                return taken
        return self._take_here(bounds, amount)

    def give_back(self, taken: Taken, amount: int) -> None:
        """Gives back a part of what was taken, if its minute still runs."""
        if not amount or taken.minute != _minute():
            return
        if not taken.shared:
            self._turn_minute()
            for bound in taken.bounds:
                self._here[bound.whose] -= amount
        elif self._store:
            keys = [_key(bound.whose, taken.minute) for bound in taken.bounds]
            self._in_background(self._give_back_shared(self._store, keys, amount))

    async def close(self) -> None:
        """Ends the connections to the store."""
        if self._connections:
            while self._giving:
                await asyncio.gather(*self._giving)
            await self._connections.aclose()

    def _take_here(self, bounds: tuple[Bound, ...], amount: int) -> Taken:
        self._turn_minute()
        for bound in bounds:
            before = self._here.get(bound.whose, 0)
            if before + amount > bound.most:
                raise _reached(bound, before, amount)
        for bound in bounds:
            self._here[bound.whose] += amount
        return Taken(bounds, amount, self._minute, shared=False)

    async def _take_shared(self, store: RedisStorage, bounds: tuple[Bound, ...], amount: int) -> Taken | None:
        """Counts first and looks then, so that no two replicas pass a limit together. None if the store is away."""
        minute, counted = _minute(), list[str]()
        async with self._turns:
            if self._store_is_away():
                # It was found to be while this call waited.
                return None
            try:
                for bound in bounds:
                    key = _key(bound.whose, minute)
                    after = await store.incr(key, _KEPT_SECONDS, amount)
                    counted.append(key)
                    if after > bound.most:
                        await _subtract(store, counted, amount)
                        raise _reached(bound, after - amount, amount)
            except StorageError as error:
                self._note_away(error)
                self._in_background(self._give_back_shared(store, counted, amount))
                return None
        return Taken(bounds, amount, minute, shared=True)

    async def _give_all_back(self, taking: asyncio.Task[Taken | None]) -> None:
        """Gives back what a caller has taken who is gone by then."""
        with contextlib.suppress(Refusal):
            taken = await taking
            if taken:
                self.give_back(taken, taken.amount)

    def _in_background(self, giving: Coroutine[None, None, None]) -> None:
        """Gives back in a task of its own, which outlives the call."""
        task = asyncio.ensure_future(giving)
        self._giving.add(task)
        task.add_done_callback(self._giving.discard)

    async def _give_back_shared(self, store: RedisStorage, keys: Sequence[str], amount: int) -> None:
        async with self._turns:
            try:
                await _subtract(store, keys, amount)
            except StorageError as error:
                self._note_away(error)

    def _store_is_away(self) -> bool:
        return time.monotonic() < self._store_away_until

    def _note_away(self, error: StorageError) -> None:
        if not self._store_is_away():
            logger.warning("limits are held by each replica alone, because their store does not answer: %s", error)
        self._store_away_until = time.monotonic() + _STORE_AWAY_SECONDS

    def _turn_minute(self) -> None:
        if self._minute != _minute():
            self._minute = _minute()
            self._here.clear()


async def _subtract(store: RedisStorage, keys: Sequence[str], amount: int) -> None:
    for key in keys:
        await store.incr(key, _KEPT_SECONDS, -amount)


def refusal(bound: Bound, why: str, retry_after_seconds: float | None) -> Refusal:
    """Returns RESOURCE_EXHAUSTED for one limit."""
    found = exhausted("LIMIT_REACHED", f"limits.{bound.name}: {why}")
    found.metadata["limit"] = bound.name
    found.retry_after_seconds = retry_after_seconds
    return found


def _reached(bound: Bound, before: int, amount: int) -> Refusal:
    why = f"{min(before, bound.most)} of {bound.most} a minute are taken, and {amount} are asked for"
    return refusal(bound, why, _MINUTE_SECONDS - time.time() % _MINUTE_SECONDS)


def _connections(url: str) -> ConnectionPool:
    timeout = _STORE_TIMEOUT_SECONDS
    return ConnectionPool.from_url(url, socket_timeout=timeout, socket_connect_timeout=timeout)


def _store(url: str, connections: ConnectionPool) -> RedisStorage:
    # Its annotation leaves out the pool, which its docstring names.
    options: dict[str, Any] = {"connection_pool": connections}
    return RedisStorage(f"async+{url}", True, "redispy", "alignd", **options)


def _minute() -> int:
    return int(time.time() // _MINUTE_SECONDS)


def _key(whose: Whose, minute: int) -> str:
    """Returns a key that does not tell who is counted."""
    return f"{minute}/{hashlib.sha256(json.dumps(whose).encode(errors='surrogatepass')).hexdigest()}"
