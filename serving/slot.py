"""The place of one policy version in an engine: who may use it, and when it may be exchanged.

A request holds the slot from admission to its end, so its version stays the same. An exchange closes the slot to new
requests, waits for those inside, and opens it again. Requests that arrive meanwhile wait; they do not fail.
"""

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass

from alignd.v1.types_pb2 import PolicyRef
from serving.errors import unavailable


@dataclass(eq=False)
class Hold:
    """A request's claim on the slot. `spans_swap` turns true if an exchange could not wait for it."""

    policy: PolicyRef
    spans_swap: bool = False


@dataclass(frozen=True)
class Exchange:
    """How long an exchange waited for the requests inside, in seconds, and the monotonic time when they were gone."""

    drain_seconds: float
    emptied_at: float


class Slot:
    """Holds at most one policy version."""

    def __init__(self) -> None:
        self.policy: PolicyRef | None = None
        self._holds: set[Hold] = set()
        self._open = asyncio.Event()
        self._empty = asyncio.Event()
        self._empty.set()
        self._shut = False

    @asynccontextmanager
    async def hold(self) -> AsyncIterator[Hold]:
        """Admits a request. Waits while an exchange is under way.

        Raises:
            Refusal: UNAVAILABLE if the slot was shut.
        """
        # Checked again after the wait: another exchange may have begun before this request got its turn.
        while not (self._open.is_set() or self._shut):
            await self._open.wait()
        if self._shut:
            message = "the server is stopping, or its engine failed; wait for its health to be SERVING again"
            raise unavailable("NOT_SERVING", message)
        assert self.policy is not None
        hold = Hold(self.policy)
        self._holds.add(hold)
        self._empty.clear()
        try:
            yield hold
        finally:
            self._holds.discard(hold)
            if not self._holds:
                self._empty.set()

    async def close(self, timeout_seconds: float) -> Exchange:
        """Admits nobody from now on. Returns when those inside are gone, or are marked after `timeout_seconds`."""
        started = time.monotonic()
        self._open.clear()
        try:
            async with asyncio.timeout(timeout_seconds):
                await self._empty.wait()
        except TimeoutError:
            for hold in self._holds:
                hold.spans_swap = True
        now = time.monotonic()
        return Exchange(drain_seconds=now - started, emptied_at=now)

    def open(self, policy: PolicyRef) -> None:
        """Admits requests to `policy`."""
        self.policy = policy
        self._open.set()

    def shut(self) -> None:
        """Refuses all requests that wait or arrive from now on. Those inside stay."""
        self._shut = True
        self._open.set()

    @property
    def idle(self) -> bool:
        """Whether no request is inside."""
        return not self._holds
