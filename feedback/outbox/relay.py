"""Carries events from the outbox to the bus: at least once, in order, and without dropping one that the bus takes."""

import logging
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack, closing
from pathlib import Path

from feedback import heartbeat
from feedback.bus.contract import Bus, BusError, Outcome, Position, PublishError, Refused, record_digest
from feedback.bus.topics import FEEDBACK_TOPICS, TOPICS
from feedback.bus.url import open_bus
from feedback.config import DEFAULTS, FeedbackConfig
from feedback.dead_letters import OUTBOX_PREFIX, dead_letter_event, publish_dead_letters
from feedback.outbox.file import PRUNE_ROWS, LogEnd, Mark, OutboxError, OutboxFile, Pending
from feedback.retry import keep_running

logger = logging.getLogger(__name__)


def run_relay(outbox_path: Path, bus_url: str, stop: threading.Event, config: FeedbackConfig = DEFAULTS) -> None:
    """Publishes the outbox's events until `stop` is set. While the bus or the disk fails, it retries."""

    def work(is_up: Callable[[], None]) -> None:
        with ExitStack() as stack:
            outbox = stack.enter_context(closing(OutboxFile(outbox_path, config.outbox_max_mib << 20)))
            bus = stack.enter_context(closing(open_bus(bus_url)))
            bus.create_topics(TOPICS)
            logger.info("relay: the bus is up")
            is_up()
            _relay(outbox, bus, stop, config)

    transient = (BusError, OutboxError)
    keep_running(work, stop, transient=transient, max_wait_seconds=config.retry_max_seconds, report=_report)


def _report(error: Exception) -> None:
    what = "the bus is down" if isinstance(error, BusError) else "the outbox fails"
    logger.warning("relay: %s, events stay in the outbox: %s", what, error)


def _relay(outbox: OutboxFile, bus: Bus, stop: threading.Event, config: FeedbackConfig) -> None:
    next_check = 0.0
    while not stop.is_set():
        heartbeat.beat()
        if time.monotonic() >= next_check:
            _check(outbox, bus)
            while outbox.prune(config.outbox_retention_seconds) == PRUNE_ROWS:
                heartbeat.beat()
            next_check = time.monotonic() + config.bus_check_seconds
        batch = outbox.pending(config.relay_batch_size)
        if batch:
            _publish(outbox, bus, batch)
        else:
            heartbeat.wait(config.relay_idle_seconds, stop)


def _publish(outbox: OutboxFile, bus: Bus, batch: Sequence[Pending]) -> None:
    """Publishes a batch, and marks what the bus has then, also if it does not have all.

    An event that can never be published goes to the dead letters, so that it does not keep the others waiting.

    Raises:
        BusError: the bus fails.
    """
    outcomes: list[Outcome] = []
    failure: BusError | None = None
    whole = [each for each in batch if each.is_whole]
    try:
        outcomes += bus.publish([each.record for each in whole])
    except PublishError as error:
        outcomes += error.outcomes
        failure = error if None in outcomes else None
    settled = list(zip(whole, outcomes, strict=True))
    hopeless = [(each, "the outbox has not kept it whole (wrong checksum)") for each in batch if not each.is_whole]
    hopeless += [(each, outcome.reason) for each, outcome in settled if isinstance(outcome, Refused)]
    for each, reason in hopeless:
        logger.error("relay: event %s of %s goes to the dead letters: %s",
                     each.record.event_id, each.record.topic, reason)  # fmt: skip
    # Marked before the dead letters are published, which may fail.
    outbox.mark_published(
        {each.seq: Mark(at, record_digest(each.record)) for each, at in settled if isinstance(at, Position)}
    )
    if hopeless:
        publish_dead_letters(bus, [_dead_letter(each, reason) for each, reason in hopeless])
        outbox.mark_published({each.seq: None for each, _ in hopeless})
    if failure:
        raise failure


def _dead_letter(pending: Pending, reason: str) -> bytes:
    """Returns the dead letter of an event. The same event always gets the same id."""
    record = pending.record
    event_id = f"{OUTBOX_PREFIX}{pending.seq}/{record_digest(record).hex()[:16]}"
    nowhere = Position(record.topic, partition=-1, offset=-1)
    return dead_letter_event(event_id, nowhere, record.key, record.value, reason).SerializeToString()


def _check(outbox: OutboxFile, bus: Bus) -> None:
    """Makes all events pending again if the bus has lost records."""
    log_ids = {topic: bus.log_id(topic) for topic in FEEDBACK_TOPICS}
    ends = [
        LogEnd(topic, partition, log_ids[topic], end_offset)
        for topic in FEEDBACK_TOPICS
        for partition, end_offset in bus.end_offsets(topic).items()
    ]
    num_events = outbox.compare_logs(ends, _replaced(outbox.marks(), bus))
    if num_events:
        logger.warning("relay: the bus lost records; publishing %d retained events again", num_events)


def _replaced(marks: Sequence[Mark], bus: Bus) -> list[Mark]:
    """Returns the marks at whose place another record stands: the log went back, and has grown past them since."""
    found = bus.read_at([mark.position for mark in marks])
    return [
        mark
        for mark in marks
        # The first record after the place says nothing: the topic's own retention may have removed ours.
        if (there := found.get(mark.position)) and there.position == mark.position and there.digest != mark.digest
    ]
