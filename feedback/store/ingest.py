"""Reads feedback from the bus into the store: each event once, however often ingest or the bus is killed."""

import logging
import random
import threading
import time
from collections.abc import Callable, Mapping, Sequence, Set
from contextlib import ExitStack, closing

from sqlalchemy.exc import SQLAlchemyError

from feedback.bus.contract import Bus, BusError, Delivered, Record
from feedback.bus.topics import DEAD_LETTERS, FEEDBACK_TOPICS, TOPICS
from feedback.bus.url import open_bus
from feedback.config import DEFAULTS, FeedbackConfig
from feedback.retry import keep_running
from feedback.store.ledger import Ledger, Offset, Partition, StaleError

logger = logging.getLogger(__name__)

_POLL_SECONDS = 0.2
_DEAD_LETTER_BATCH = 100


def run_ingest(bus_url: str, store_url: str, stop: threading.Event, config: FeedbackConfig = DEFAULTS) -> None:
    """Reads until `stop` is set. While the bus or the database fails, it retries.

    Several may run at once: the offsets in the store stop the one that comes too late.

    Raises:
        ValueError: a URL is not that of a bus or a store.
    """

    def work(is_up: Callable[[], None]) -> None:
        with ExitStack() as stack:
            bus = stack.enter_context(closing(open_bus(bus_url)))
            ledger = stack.enter_context(closing(Ledger(store_url)))
            bus.create_topics(TOPICS)
            logger.info("ingest: the bus and the store are up")
            is_up()
            while not stop.is_set():
                _follow(bus, ledger, stop, config.bus_check_seconds)

    transient = (BusError, SQLAlchemyError, OSError)
    keep_running(work, stop, transient=transient, max_wait_seconds=config.retry_max_seconds, report=_report)


def _report(error: Exception) -> None:
    logger.warning("ingest: the bus or the store is down: %s", error)


def _follow(bus: Bus, ledger: Ledger, stop: threading.Event, check_seconds: float) -> None:
    """Reads from the offsets in the store, until `stop` is set or another ingest has moved them."""
    log_ids = {topic: bus.log_id(topic) for topic in FEEDBACK_TOPICS}
    partitions = {topic: bus.end_offsets(topic).keys() for topic in FEEDBACK_TOPICS}
    before = ledger.offsets()
    reached = {
        partition: offset for partition, offset in before.items() if _is_still_there(bus, log_ids, partition, offset)
    }
    start = {partition: offset.next_offset for partition, offset in reached.items()}
    with closing(bus.consume(FEEDBACK_TOPICS, start)) as consumer:
        next_check = time.monotonic() + check_seconds
        while not stop.is_set():
            batch = consumer.poll(_POLL_SECONDS)
            is_due = time.monotonic() >= next_check
            if batch or is_due:
                # Checked after the poll, so that what was read surely comes from this log, not from a later one.
                _check_logs(bus, log_ids)
            if is_due:
                _check_partitions(bus, partitions)
                next_check = time.monotonic() + check_seconds
            if batch:
                after = _after(batch, log_ids)
                try:
                    num_dead_letters = ledger.write(batch, before, after)
                except StaleError as error:
                    logger.warning("ingest: another ingest has moved the offsets; reading from there: %s", error)
                    stop.wait(random.uniform(0.05, 0.5))
                    return
                before |= after
                if num_dead_letters:
                    logger.warning("ingest: %d records became dead letters", num_dead_letters)
            _publish_dead_letters(bus, ledger)


def _check_logs(bus: Bus, log_ids: Mapping[str, str]) -> None:
    for topic, log_id in log_ids.items():
        if bus.log_id(topic) != log_id:
            raise BusError(f"topic {topic} was lost and created again")


def _check_partitions(bus: Bus, partitions: Mapping[str, Set[int]]) -> None:
    for topic, numbers in partitions.items():
        if bus.end_offsets(topic).keys() != numbers:
            raise BusError(f"topic {topic} has other partitions than before")


def _is_still_there(bus: Bus, log_ids: Mapping[str, str], partition: Partition, offset: Offset) -> bool:
    """Whether the log still has what was read up to here. If not, all is read again; event ids make that harmless."""
    topic, number = partition
    if offset.log_id == log_ids.get(topic) and offset.next_offset <= bus.end_offsets(topic).get(number, 0):
        return True
    logger.warning("ingest: the bus lost records of %s/%d; reading it from the beginning", topic, number)
    return False


def _after(batch: Sequence[Delivered], log_ids: Mapping[str, str]) -> dict[Partition, Offset]:
    """Returns the offsets once this batch is stored. Positions grow within a partition, so the last one counts."""
    positions = [delivered.position for delivered in batch]
    return {(each.topic, each.partition): Offset(log_ids[each.topic], each.offset + 1) for each in positions}


def _publish_dead_letters(bus: Bus, ledger: Ledger) -> None:
    letters = ledger.unpublished_dead_letters(_DEAD_LETTER_BATCH)
    if letters:
        bus.publish([Record(DEAD_LETTERS, event_id.encode(), event, event_id) for event_id, event in letters])
        ledger.mark_published([event_id for event_id, _ in letters])
