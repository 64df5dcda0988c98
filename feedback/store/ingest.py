"""Reads feedback from the bus into the store: each event once, however often ingest or the bus is killed."""

import logging
import random
import threading
import time
from collections.abc import Callable, Mapping, Sequence, Set
from contextlib import ExitStack, closing
from pathlib import Path

from sqlalchemy.exc import SQLAlchemyError

from feedback import heartbeat
from feedback.bus.contract import Bus, BusError, Delivered, Position
from feedback.bus.topics import INGESTED_TOPICS, TOPICS
from feedback.bus.url import open_bus
from feedback.config import DEFAULTS, FeedbackConfig
from feedback.dead_letters import publish_dead_letters
from feedback.retry import keep_running
from feedback.signature import KeyFile
from feedback.store.ledger import Ledger, Offset, Partition, StaleError
from feedback.token import KeyringError

logger = logging.getLogger(__name__)

_POLL_SECONDS = 0.2
_DEAD_LETTER_BATCH = 100


def run_ingest(
    bus_url: str,
    store_url: str,
    keyring_path: Path,
    stop: threading.Event,
    config: FeedbackConfig = DEFAULTS,
    *,
    from_beginning: bool = False,
) -> None:
    """Reads until `stop` is set. While the bus or the database fails, or there is no keyring yet, it retries.

    Several may run at once: the offsets in the store stop the one that comes too late.

    Args:
        bus_url: the bus to read from; see feedback.bus.url.open_bus.
        store_url: the store to write to; see feedback.store.engine.open_engine.
        keyring_path: the file of the keys that the server signs events with.
        stop: ends it when set.
        config: the settings of the feedback path.
        from_beginning: reads all of the log again first. Nothing is stored twice.

    Raises:
        ValueError: a URL is not that of a bus or a store.
    """

    def work(is_up: Callable[[], None]) -> None:
        nonlocal from_beginning
        with ExitStack() as stack:
            keys = _open_keys(keyring_path)
            bus = stack.enter_context(closing(open_bus(bus_url)))
            ledger = stack.enter_context(closing(Ledger(store_url)))
            bus.create_topics(TOPICS)
            if from_beginning:
                ledger.begin_all_again()
                from_beginning = False
            logger.info("ingest: the bus and the store are up")
            is_up()
            while not stop.is_set():
                _follow(bus, ledger, keys, stop, config.bus_check_seconds)

    transient = (BusError, SQLAlchemyError, OSError, KeyringError)
    keep_running(work, stop, transient=transient, max_wait_seconds=config.retry_max_seconds, report=_report)


def _open_keys(path: Path) -> KeyFile:
    """Reads the keys that events are signed with. It makes none: with keys of its own it would refuse every event.

    Raises:
        KeyringError: they are not there yet, or the file is not one of keys.
        OSError: the file cannot be read.
    """
    try:
        return KeyFile(path)
    except FileNotFoundError as error:
        raise KeyringError(f"{path} is not there; the server makes it, and ingest needs the server's") from error


def _report(error: Exception) -> None:
    if isinstance(error, KeyringError):
        logger.warning("ingest: waits for the keys that events are signed with: %s", error)
    else:
        logger.warning("ingest: the bus or the store is down: %s", error)


def _follow(bus: Bus, ledger: Ledger, keys: KeyFile, stop: threading.Event, check_seconds: float) -> None:
    """Reads from the offsets in the store, until `stop` is set or the offsets must be looked at anew."""
    log_ids = {topic: bus.log_id(topic) for topic in INGESTED_TOPICS}
    partitions = {topic: bus.end_offsets(topic).keys() for topic in INGESTED_TOPICS}
    before = ledger.offsets()
    lost = _lost(bus, log_ids, before)
    for partition in lost:
        if ledger.begin_again(partition, before[partition], log_ids[partition[0]]):
            logger.warning("ingest: the bus lost records of %s/%d; reading it from the beginning", *partition)
    if lost:
        return
    start = {partition: offset.next_offset for partition, offset in before.items()}
    with closing(bus.consume(INGESTED_TOPICS, start)) as consumer:
        next_check = time.monotonic() + check_seconds
        while not stop.is_set():
            heartbeat.beat()
            batch = consumer.poll(_POLL_SECONDS)
            is_due = time.monotonic() >= next_check
            if batch or is_due:
                # Checked after the poll, so that what was read surely comes from this log, not from a later one.
                _check_logs(bus, log_ids)
            if is_due:
                _check_partitions(bus, partitions)
                if _lost(bus, log_ids, before):
                    return
                next_check = time.monotonic() + check_seconds
            if batch:
                after = _after(batch, log_ids)
                try:
                    num_dead_letters = ledger.write(batch, before, after, keys.keyring())
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


def _lost(bus: Bus, log_ids: Mapping[str, str], offsets: Mapping[Partition, Offset]) -> list[Partition]:
    """Returns the partitions whose log no longer has what was read up to here.

    That is so if the log is another one, if it ends before the offset, or if the last record that was read is another
    one now: the log was set back, and has grown past the offset since. All of it is read again then; event ids make
    that harmless.
    """
    ends = {topic: bus.end_offsets(topic) for topic in log_ids}
    found = {(topic, number): offset for (topic, number), offset in offsets.items() if topic in ends}
    lost = [
        (topic, number)
        for (topic, number), offset in found.items()
        if offset.log_id != log_ids[topic] or offset.next_offset > ends[topic].get(number, 0)
    ]
    last_read = {
        Position(*partition, offset.next_offset - 1): offset.last_digest
        for partition, offset in found.items()
        if offset.last_digest is not None and partition not in lost
    }
    for position, there in bus.read_at(list(last_read)).items():
        # The first record after the place says nothing: the topic's own retention may have removed the one there.
        if there.position == position and there.digest != last_read[position]:
            lost.append((position.topic, position.partition))
    return lost


def _after(batch: Sequence[Delivered], log_ids: Mapping[str, str]) -> dict[Partition, Offset]:
    """Returns the offsets once this batch is stored. Positions grow within a partition, so the last one counts."""
    last = {(each.position.topic, each.position.partition): each for each in batch}
    return {
        partition: Offset(log_ids[partition[0]], each.position.offset + 1, each.digest)
        for partition, each in last.items()
    }


def _publish_dead_letters(bus: Bus, ledger: Ledger) -> None:
    letters = ledger.unpublished_dead_letters(_DEAD_LETTER_BATCH)
    if letters:
        publish_dead_letters(bus, [event for _, event in letters])
        ledger.mark_published([event_id for event_id, _ in letters])
