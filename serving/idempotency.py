"""A Sample that is tried again under its request id returns the first one's sample: from the outbox, where it lies."""

from __future__ import annotations

import asyncio
import hashlib
import uuid
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta
from typing import TypeVar

import grpc

from alignd.v1 import events_pb2, inference_service_pb2
from feedback.identity import qualified
from feedback.outbox.door import Outbox, RequestKey
from serving.errors import Refusal, Violation, exhausted

# Tries of one request id that wait at a time. A client that sends more of them at once is broken.
_MOST_WAITING = 8

_T = TypeVar("_T")
Request = inference_service_pb2.SampleRequest | inference_service_pb2.StreamSampleRequest


def request_key(request: Request, application: str) -> RequestKey | None:
    """Returns what names a request, and a digest of all that it says; None if it has no id."""
    if not request.request_id:
        return None
    user = qualified(application, request.user_id)
    said = inference_service_pb2.SampleRequest.FromString(request.SerializeToString(deterministic=True))
    name = f"{uuid.UUID(request.request_id)}/{user}".encode(errors="surrogateescape")
    return RequestKey(
        hashlib.sha256(name).digest(), hashlib.sha256(said.SerializeToString(deterministic=True)).digest()
    )


class Retries:
    """Has each request id drawn once, however many tries of it come at once. For one event loop."""

    def __init__(self, outbox: Outbox, ttl_seconds: float) -> None:
        self._outbox = outbox
        self._ttl = timedelta(seconds=ttl_seconds)
        self._locks: dict[bytes, asyncio.Lock] = {}
        self._users: Counter[bytes] = Counter()

    @asynccontextmanager
    async def first(self, named: RequestKey | None) -> AsyncIterator[events_pb2.SampleEvent | None]:
        """Yields the sample of an earlier try, or None for the first, which others of this request id wait for.

        Raises:
            Refusal: ALREADY_EXISTS if the id was used with other contents, RESOURCE_EXHAUSTED if too many wait.
            OutboxError: the outbox cannot be read.
        """
        if named is None:
            yield None
            return
        key = named.key
        if self._users[key] >= _MOST_WAITING:
            raise exhausted("TOO_MANY_RETRIES", f"{_MOST_WAITING} requests with this request_id are waiting")
        lock = self._locks.setdefault(key, asyncio.Lock())
        self._users[key] += 1
        try:
            async with lock:
                yield await self._earlier(named)
        finally:
            self._users[key] -= 1
            if not self._users[key]:
                del self._users[key], self._locks[key]

    async def _earlier(self, named: RequestKey) -> events_pb2.SampleEvent | None:
        stored = await self._outbox.find_request(named.key)
        if stored is None:
            return None
        digest, value = stored
        found = events_pb2.SampleEvent.FromString(value)
        if datetime.now(UTC) >= found.event_time.ToDatetime(tzinfo=UTC) + self._ttl:
            # Nobody could rank it any more.
            return None
        if digest != named.digest:
            fault = Violation("request_id", "was used before with other contents; make a new one for new contents")
            message = f"{fault.field}: {fault.description}"
            raise Refusal(grpc.StatusCode.ALREADY_EXISTS, "REQUEST_ID_REUSED", message, violations=[fault])
        return found


async def to_the_end(work: asyncio.Future[_T]) -> _T:
    """Waits for `work` although the caller goes away: whoever waits for it finds it done, or not begun."""
    try:
        return await asyncio.shield(work)
    except asyncio.CancelledError:
        await asyncio.wait({work})
        raise
