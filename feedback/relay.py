"""Carries events from the outbox to the bus, at least once, in order, and never drops one."""

import logging
import math
import random
import threading
import time
from contextlib import ExitStack, closing
from pathlib import Path

from feedback.bus import Bus, BusError
from feedback.bus_url import open_bus
from feedback.config import DEFAULTS, FeedbackConfig
from feedback.outbox_file import PRUNE_ROWS, LogEnd, OutboxError, OutboxFile
from feedback.topics import FEEDBACK_TOPICS, TOPICS

log = logging.getLogger(__name__)

FIRST_RETRY_S = 0.1


def run_relay(outbox_path: Path, bus_url: str, stop: threading.Event, config: FeedbackConfig = DEFAULTS) -> None:
    """Publishes what the outbox holds until `stop` is set, however long the bus or the disk fails in between."""
    failures = 0
    while not stop.is_set():
        up_since = math.inf
        try:
            with ExitStack() as stack:
                outbox = stack.enter_context(closing(OutboxFile(outbox_path, config.outbox_max_bytes)))
                bus = stack.enter_context(closing(open_bus(bus_url)))
                bus.create_topics(TOPICS)
                log.info("relay: the bus is up")
                up_since = time.monotonic()
                _relay(outbox, bus, stop, config)
        except (BusError, OutboxError) as error:
            failures = 1 if time.monotonic() - up_since > config.retry_max_s else failures + 1
            if failures == 1:
                what = "the bus is down" if isinstance(error, BusError) else "the outbox fails"
                log.warning("relay: %s, events stay in the outbox: %s", what, error)
            stop.wait(backoff_s(failures, config.retry_max_s))


def _relay(outbox: OutboxFile, bus: Bus, stop: threading.Event, config: FeedbackConfig) -> None:
    next_check = 0.0
    while not stop.is_set():
        if time.monotonic() >= next_check:
            _check(outbox, bus)
            while outbox.prune(config.outbox_retention_s) == PRUNE_ROWS:
                pass
            next_check = time.monotonic() + config.bus_check_s
        batch = outbox.pending(config.relay_batch_size)
        if batch:
            bus.publish([record for _, record in batch])
            outbox.mark_published([seq for seq, _ in batch])
        else:
            stop.wait(config.relay_idle_s)


def _check(outbox: OutboxFile, bus: Bus) -> None:
    """Publishes all again if the bus came back without what it had."""
    log_ids = {topic: bus.log_id(topic) for topic in FEEDBACK_TOPICS}
    ends = [
        LogEnd(topic, partition, log_ids[topic], end_offset)
        for topic in FEEDBACK_TOPICS
        for partition, end_offset in bus.end_offsets(topic).items()
    ]
    num_events = outbox.compare_logs(ends)
    if num_events:
        log.warning("relay: the bus lost records; publishing %d retained events again", num_events)


def backoff_s(failures: int, max_s: float) -> float:
    """Seconds to wait after so many failures in a row: doubling up to `max_s`, with jitter so that replicas spread."""
    return min(max_s, FIRST_RETRY_S * 2.0 ** min(failures - 1, 30)) * random.uniform(0.5, 1.0)
