"""Carries events from the outbox to the bus: at least once, in order, and without dropping one."""

import logging
import threading
import time
from collections.abc import Callable
from contextlib import ExitStack, closing
from pathlib import Path

from feedback.bus.contract import Bus, BusError
from feedback.bus.topics import FEEDBACK_TOPICS, TOPICS
from feedback.bus.url import open_bus
from feedback.config import DEFAULTS, FeedbackConfig
from feedback.outbox.file import PRUNE_ROWS, LogEnd, OutboxError, OutboxFile
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
        if time.monotonic() >= next_check:
            _check(outbox, bus)
            while outbox.prune(config.outbox_retention_seconds) == PRUNE_ROWS:
                pass
            next_check = time.monotonic() + config.bus_check_seconds
        batch = outbox.pending(config.relay_batch_size)
        if batch:
            bus.publish([record for _, record in batch])
            outbox.mark_published([seq for seq, _ in batch])
        else:
            stop.wait(config.relay_idle_seconds)


def _check(outbox: OutboxFile, bus: Bus) -> None:
    """Makes all events pending again if the bus has lost records."""
    log_ids = {topic: bus.log_id(topic) for topic in FEEDBACK_TOPICS}
    ends = [
        LogEnd(topic, partition, log_ids[topic], end_offset)
        for topic in FEEDBACK_TOPICS
        for partition, end_offset in bus.end_offsets(topic).items()
    ]
    num_events = outbox.compare_logs(ends)
    if num_events:
        logger.warning("relay: the bus lost records; publishing %d retained events again", num_events)
