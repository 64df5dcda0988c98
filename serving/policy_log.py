"""The replica's view of the `policies` topic: follows it, and appends to it.

The topic is the truth. A proposal is appended and then read back, so that its caller learns the outcome in the order
that every replica sees. All state is changed on the event loop; a thread only reads the bus.
"""

import asyncio
import logging
import threading
import time
import uuid
from collections.abc import AsyncIterator

from google.protobuf.message import DecodeError

from alignd.v1 import events_pb2, policy_service_pb2
from feedback.bus.contract import Bus, BusError, Delivered, Record
from feedback.bus.topics import POLICIES
from feedback.retry import backoff_seconds
from policies.state import Outcome, PolicyState, apply
from serving.errors import unavailable

logger = logging.getLogger(__name__)

READ_BACK_TIMEOUT_SECONDS = 15.0
_POLL_SECONDS = 1.0
_FIRST_WAIT_SECONDS, LONGEST_WAIT_SECONDS = 1.0, 300.0


class PolicyLogError(Exception):
    """The topic is no longer followed, because of an unexpected error; the process must be started again."""


class PolicyLog:
    """Follows the `policies` topic on `bus`."""

    def __init__(self, bus: Bus) -> None:
        self.bus = bus
        self.state = PolicyState()
        self.changes: list[policy_service_pb2.WatchResponse] = []
        self.passed_over: list[str] = []
        """Why events changed nothing: they could not be used, or came too late."""
        self._outcomes: dict[str, Outcome] = {}
        self._read_to: dict[int, int] = {}
        self._changed = asyncio.Event()
        self._stop = threading.Event()
        self._watchable = True
        self.started = False
        """Whether everything that was in the topic at the start has been read."""
        self._thread: threading.Thread | None = None
        self._failure: Exception | None = None

    async def start(self) -> None:
        """Starts to follow, and returns when everything that was in the topic has been read.

        Raises:
            PolicyLogError: the topic cannot be followed.
        """
        loop = asyncio.get_running_loop()
        self._thread = threading.Thread(target=self._follow, args=(loop,), name="policy-log", daemon=True)
        self._thread.start()
        ends = await asyncio.to_thread(self._end_offsets)
        while any(self._read_to.get(partition, 0) < end for partition, end in ends.items()):
            await self.changed()
        self.started = True

    async def stop(self) -> None:
        """Stops the thread."""
        self._stop.set()
        if self._thread:
            await asyncio.to_thread(self._thread.join)

    async def changed(self) -> None:
        """Returns when the next event has been read.

        Raises:
            PolicyLogError: none will be.
        """
        if self._failure is None:
            await self._changed.wait()
        if self._failure is not None:
            raise PolicyLogError(f"the policies topic is no longer followed: {self._failure}") from self._failure

    async def propose(self, event: events_pb2.PolicyEvent) -> Outcome:
        """Appends `event`, and returns its outcome.

        Raises:
            Refusal: UNAVAILABLE if the bus did not take the event, or did not return it in time; safe to retry.
        """
        event.event_id = str(uuid.uuid4())
        record = Record(POLICIES, event.event_id.encode(), event.SerializeToString(), event.event_id)
        try:
            await asyncio.to_thread(self.bus.publish, [record])
            async with asyncio.timeout(READ_BACK_TIMEOUT_SECONDS):
                while event.event_id not in self._outcomes:
                    await self.changed()
        except (BusError, TimeoutError) as error:
            raise unavailable("BUS_UNAVAILABLE", f"the event bus does not answer: {error or 'timed out'}") from error
        return self._outcomes[event.event_id]

    async def watch(self, after_revision: int) -> AsyncIterator[policy_service_pb2.WatchResponse]:
        """Yields every change after `after_revision`, and then each new one as it happens.

        Raises:
            Refusal: UNAVAILABLE when this replica stops; other replicas have the same revisions.
        """
        revision = after_revision
        while self._watchable:
            # One at a time, since more may come while a change is being sent.
            if revision < len(self.changes):
                revision += 1
                yield self.changes[revision - 1]
            else:
                await self.changed()
        raise unavailable("STOPPING", f"the server is stopping; watch again, after revision {revision}")

    def end_watches(self) -> None:
        """Ends every watch. Otherwise a watch would delay the server's stop for as long as the grace period allows."""
        self._watchable = False
        self._wake()

    def _end_offsets(self) -> dict[int, int]:
        while not self._stop.is_set():
            try:
                return self.bus.end_offsets(POLICIES)
            except BusError as error:
                logger.warning("the event bus does not answer (%s); trying again", error)
                self._stop.wait(_POLL_SECONDS)
        return {}

    def _follow(self, loop: asyncio.AbstractEventLoop) -> None:
        """Reads the topic; if this thread dies, everybody who waits for an event is woken with its error."""
        try:
            self._read_topic(loop)
        except Exception as error:
            logger.exception("the policies topic is no longer followed")
            loop.call_soon_threadsafe(self._fail, error)

    def _fail(self, error: Exception) -> None:
        self._failure = error
        self._wake()

    def _read_topic(self, loop: asyncio.AbstractEventLoop) -> None:
        """Reads the topic from the beginning until it is stopped. What is read twice is dropped by its event id."""
        while not self._stop.is_set():
            try:
                consumer = self.bus.consume([POLICIES], {})
                while not self._stop.is_set():
                    for delivered in consumer.poll(_POLL_SECONDS):
                        loop.call_soon_threadsafe(self._read, delivered)
                consumer.close()
            except BusError as error:
                logger.warning("cannot read the policies topic (%s); trying again", error)
                time.sleep(_POLL_SECONDS)

    def _read(self, delivered: Delivered) -> None:
        position = delivered.position
        self._read_to[position.partition] = max(self._read_to.get(position.partition, 0), position.offset + 1)
        if delivered.fault:
            logger.error("the record at %s is passed over: %s", position, delivered.fault)
            self._wake()
            return
        try:
            event = events_pb2.PolicyEvent.FromString(delivered.value)
        except DecodeError:
            logger.error("the record at %s is not a PolicyEvent; skipping it", position)
        else:
            if event.event_id not in self._outcomes:
                self._record(event)
        self._wake()

    def _wake(self) -> None:
        """Wakes all that wait for a change."""
        self._changed.set()
        self._changed = asyncio.Event()

    def _record(self, event: events_pb2.PolicyEvent) -> None:
        try:
            outcome = apply(self.state, event)
        except Exception as error:
            # Nothing that anybody can write to the topic may keep all replicas from following it.
            logger.exception("event %r cannot be applied", event.event_id)
            outcome = Outcome(self.state, refusal=f"it cannot be applied: {error}")
        if outcome.refusal:
            logger.warning("event %r of the policies topic is passed over: %s", event.event_id, outcome.refusal)
            self.passed_over.append(outcome.refusal)
        self.state = outcome.state
        self._outcomes[event.event_id] = outcome
        for change in outcome.changes:
            response = policy_service_pb2.WatchResponse(revision=len(self.changes) + 1)
            if isinstance(change, policy_service_pb2.StageChange):
                response.stage_change.CopyFrom(change)
            else:
                response.replica_status.CopyFrom(change)
            self.changes.append(response)


def retry_wait_seconds(failures: int) -> float:
    """Returns how long to wait before what failed so often in a row, at least once, is tried again."""
    return backoff_seconds(failures, LONGEST_WAIT_SECONDS, _FIRST_WAIT_SECONDS)
