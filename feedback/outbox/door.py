"""The outbox as the server uses it: an event is on disk when `append` returns."""

import asyncio
import logging
import queue
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from feedback.bus.contract import MAX_RECORD_BYTES, Record
from feedback.outbox.file import Entry, OutboxConflict, OutboxError, OutboxFile, OutboxFull, Receipt, RequestKey
from feedback.outbox.room import room_bytes

__all__ = ["Outbox", "OutboxConflict", "OutboxError", "OutboxFull", "Receipt", "RequestKey"]

logger = logging.getLogger(__name__)

_GROUP_SIZE = 256


@dataclass(frozen=True)
class _Waiting:
    entry: Entry
    receipt: asyncio.Future[Receipt]


class Outbox:
    """Stores events from asyncio. One thread writes them, with one fsync for all that wait (group commit)."""

    def __init__(self, path: Path, max_bytes: int) -> None:
        """Opens or creates the file.

        Raises:
            OutboxError: the file cannot be used.
        """
        self._path, self._max_bytes = path, max_bytes
        self._file = OutboxFile(path, max_bytes)
        self._reader, self._reading = OutboxFile(path, max_bytes), threading.Lock()
        self._file.pending(limit=1)  # Fails now, and not at the first request, if the file cannot be used.
        self._queue: queue.SimpleQueue[_Waiting | None] = queue.SimpleQueue()
        self._closed = False
        self._writer = threading.Thread(target=self._write, name="outbox", daemon=True)
        self._writer.start()

    async def append(
        self, record: Record, content_digest: bytes, acknowledge_time: datetime, request: RequestKey | None = None
    ) -> Receipt:
        """Stores an event, and returns when it is durable.

        If the event was stored before, the receipt has the time of the first call. `content_digest` covers what the
        caller said, without what differs between its retries.

        Raises:
            OutboxFull: the outbox has reached its limit, or the disk is full.
            OutboxConflict: the event id is stored with another digest.
            OutboxError: the disk fails, or this outbox is closed.
            ValueError: the record is too large for the bus.
        """
        if record.size_bytes > MAX_RECORD_BYTES:
            raise ValueError(f"event {record.event_id} has more than {MAX_RECORD_BYTES} bytes")
        if self._closed:
            raise OutboxError("the outbox is closed")
        entry = Entry(record, content_digest, acknowledge_time, request)
        waiting = _Waiting(entry, asyncio.get_running_loop().create_future())
        self._queue.put(waiting)
        # A caller that goes away does not withdraw its event, which may be written by now.
        return await waiting.receipt

    async def find_request(self, key: bytes) -> tuple[bytes, bytes] | None:
        """Returns the digest of an earlier request with this key, and the value of its event; None if there is none.

        Raises:
            OutboxError: the disk fails.
        """
        return await asyncio.to_thread(self._find_request, key)

    def _find_request(self, key: bytes) -> tuple[bytes, bytes] | None:
        # A connection of its own: the writer's is for its thread alone.
        with self._reading:
            return self._reader.find_request(key)

    async def check_room(self, num_bytes: int) -> None:
        """Checks that an event of this size would be taken now, for who would work in vain otherwise.

        Raises:
            OutboxFull: it would not.
            OutboxError: the disk fails.
        """
        room = await asyncio.to_thread(room_bytes, self._path, self._max_bytes)
        if num_bytes > room:
            raise OutboxFull(f"the outbox has room for {max(0, room)} bytes, and {num_bytes} may be needed")

    def close(self) -> None:
        """Writes the events that it was given, and closes the file. Safe to call twice."""
        self._closed = True
        self._queue.put(None)
        self._writer.join()
        with self._reading:
            self._reader.close()

    def _write(self) -> None:
        while (group := self._next_group()) is not None:
            outcomes: Sequence[Receipt | OutboxError]
            try:
                outcomes = self._file.append([waiting.entry for waiting in group])
            except OutboxError as error:
                outcomes = [error] * len(group)
            except Exception as error:
                # Unexpected. This thread must continue all the same, or every caller of append() would wait for ever.
                logger.exception("the outbox could not write %d events", len(group))
                outcomes = [OutboxError(f"an event could not be written: {error}")] * len(group)
            for waiting, outcome in zip(group, outcomes, strict=True):
                _settle(waiting, outcome)
        self._file.close()

    def _next_group(self) -> list[_Waiting] | None:
        """Waits for an event, and returns it with all others that have come by then; None when closed."""
        first = self._queue.get()
        if first is None:
            return None
        group = [first]
        while len(group) < _GROUP_SIZE and not self._queue.empty():
            waiting = self._queue.get()
            if waiting is None:
                self._queue.put(None)
                break
            group.append(waiting)
        return group


def _settle(waiting: _Waiting, outcome: Receipt | OutboxError) -> None:
    def settle() -> None:
        if waiting.receipt.cancelled():
            return
        if isinstance(outcome, OutboxError):
            waiting.receipt.set_exception(outcome)
        else:
            waiting.receipt.set_result(outcome)

    loop = waiting.receipt.get_loop()
    if not loop.is_closed():
        loop.call_soon_threadsafe(settle)
