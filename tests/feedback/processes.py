"""The processes of the feedback path, for tests that kill them: python -m tests.feedback.processes NAME ARGUMENT..."""

import asyncio
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from pathlib import Path

from feedback.bus.contract import Record
from feedback.bus.url import open_bus
from feedback.config import FeedbackConfig
from feedback.outbox.door import Outbox
from feedback.outbox.relay import run_relay

REPOSITORY = Path(__file__).parents[2]
QUICK = FeedbackConfig(relay_batch_size=20, bus_check_seconds=0.2, retry_max_seconds=0.5)


def start(*name_and_arguments: object) -> subprocess.Popen[str]:
    """Starts one of the processes below; it reports on its stdout."""
    command = [sys.executable, "-m", "tests.feedback.processes", *map(str, name_and_arguments)]
    return subprocess.Popen(command, cwd=REPOSITORY, stdout=subprocess.PIPE, text=True)


def relay(outbox: str, bus_url: str) -> None:
    """Runs the relay until SIGTERM."""
    run_relay(Path(outbox), bus_url, _stop_on_sigterm(), QUICK)


def ingest(bus_url: str, store_url: str) -> None:
    """Runs ingest until SIGTERM."""
    # Imported here, so that the processes that need no database start sooner.
    from feedback.store.ingest import run_ingest
    from tests.feedback.events import KEYRING_FILE

    run_ingest(bus_url, store_url, KEYRING_FILE, _stop_on_sigterm(), QUICK)


def append(outbox: str) -> None:
    """Appends events e0, e1, ... without end, several at a time, and prints each when it was acknowledged."""
    asyncio.run(_append(Outbox(Path(outbox), 1 << 30)))


def publish(bus_url: str, topic: str, prefix: str, count: str) -> None:
    """Publishes records prefix/0, prefix/1, ..., prints each when the bus has it, and then waits to be killed."""
    bus = open_bus(bus_url)
    for number in range(int(count)):
        bus.publish([Record(topic, prefix.encode(), str(number).encode(), f"{prefix}/{number}")])
        print(f"{prefix}/{number}", flush=True)
    signal.pause()


def open_store(url: str) -> None:
    """Opens a store, and prints how many rankings it has."""
    from feedback.store.reader import Store

    store = Store(url)
    print(store.num_rankings())
    store.close()


async def _append(outbox: Outbox) -> None:
    async def one(number: int) -> None:
        record = Record("topic", b"key", b"x" * 500, f"e{number}")
        await outbox.append(record, record.event_id.encode(), datetime.now(UTC))
        print(record.event_id, flush=True)

    for begin in range(0, 1_000_000, 10):
        await asyncio.gather(*(one(begin + each) for each in range(10)))


def _stop_on_sigterm() -> threading.Event:
    stop = threading.Event()
    signal.signal(signal.SIGTERM, lambda *_: stop.set())
    print("started", flush=True)
    return stop


PROCESSES: Mapping[str, Callable[..., None]] = {
    each.__name__: each for each in (relay, ingest, append, publish, open_store)
}

if __name__ == "__main__":
    PROCESSES[sys.argv[1]](*sys.argv[2:])
