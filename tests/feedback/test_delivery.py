"""From the outbox to the store, while processes are killed and the bus goes away: all that was acknowledged, once."""

import random
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from datetime import UTC, datetime
from pathlib import Path

import pytest
from kafka import KafkaAdminClient, KafkaProducer
from kafka.admin import NewPartitions

from alignd.v1 import events_pb2
from feedback.bus.contract import Record
from feedback.bus.topics import DEAD_LETTERS, RANKINGS, TOPICS
from feedback.bus.url import open_bus
from feedback.outbox.file import Entry, OutboxFile
from feedback.outbox.relay import run_relay
from feedback.retry import backoff_seconds
from feedback.signature import signed
from feedback.store.ingest import run_ingest
from feedback.store.reader import Store
from tests.conftest import new_database
from tests.feedback import processes
from tests.feedback.events import KEYRING, KEYRING_FILE, ranking, record, sample
from tests.kafka_broker import free_port, running_tansu

NUM_RANKINGS = 600


@contextmanager
def thread(target: Callable[..., None], *arguments: object) -> Iterator[None]:
    """Runs a loop of the feedback path in a thread for as long as the block runs."""
    stop = threading.Event()
    runner = threading.Thread(target=target, args=(*arguments, stop, processes.QUICK))
    runner.start()
    try:
        yield
    finally:
        stop.set()
        runner.join(timeout=60)
        assert not runner.is_alive()


@contextmanager
def running(commands: Sequence[tuple[object, ...]]) -> Iterator[list[subprocess.Popen[str]]]:
    """Runs processes for as long as the block runs, or until it ends them."""
    started = [processes.start(*command) for command in commands]
    try:
        yield started
    finally:
        for process in started:
            process.kill()
            process.communicate()


def wait_until(is_done: Callable[[], bool], timeout_seconds: float = 60) -> None:
    deadline = time.monotonic() + timeout_seconds
    while not is_done():
        assert time.monotonic() < deadline, "it took too long"
        time.sleep(0.05)


def acknowledge(path: Path, begin: int, end: int) -> None:
    """Puts samples and rankings into the outbox, as the server does before it answers."""
    events = [event for i in range(begin, end) for event in (sample(f"s{i}"), ranking(f"r{i}", f"s{i}"))]
    with closing(OutboxFile(path, 1 << 30)) as outbox:
        outbox.append([Entry(record(event), b"d", datetime.now(UTC)) for event in events])


@pytest.fixture
def outbox(tmp_path: Path) -> Path:
    return tmp_path / "outbox.db"


@pytest.fixture
def store_url_for(bus_url: str, tmp_path: Path, request: pytest.FixtureRequest) -> str:
    """The pairs that people will run: SQLite with SQLite, PostgreSQL with Kafka."""
    if bus_url.startswith("kafka"):
        return new_database(request.getfixturevalue("postgres_server"))
    return f"sqlite:///{tmp_path}/store.db"


def kill_now_and_then(command: tuple[object, ...], stop: threading.Event, seed: int, kills: list[int]) -> None:
    """Keeps a process running, and kills it with SIGKILL after a random time, again and again."""
    chance = random.Random(seed)
    while not stop.is_set():
        process = processes.start(*command)
        assert process.stdout is not None
        process.stdout.readline()
        stop.wait(chance.uniform(0.05, 1.0))
        process.send_signal(signal.SIGKILL)
        process.communicate()
        kills.append(process.pid)


def test_all_arrives_once_while_relay_and_ingest_are_killed(bus_url: str, store_url_for: str, outbox: Path) -> None:
    kills: list[int] = []
    killing = threading.Event()
    killers = [
        threading.Thread(target=kill_now_and_then, args=(command, killing, seed, kills))
        for seed, command in enumerate([("relay", outbox, bus_url), ("ingest", bus_url, store_url_for)])
    ]
    acknowledge(outbox, 0, 100)
    for killer in killers:
        killer.start()
    for begin in range(100, NUM_RANKINGS, 20):
        acknowledge(outbox, begin, begin + 20)
        time.sleep(0.3)
    killing.set()
    for killer in killers:
        killer.join()
    with (
        thread(run_relay, outbox, bus_url),
        thread(run_ingest, bus_url, store_url_for, KEYRING_FILE),
        closing(Store(store_url_for)) as store,
    ):
        wait_until(lambda: store.num_rankings() >= NUM_RANKINGS and len(store.ranked_groups()) >= NUM_RANKINGS)
        groups = store.ranked_groups()
        num_dead_letters = store.num_dead_letters()
    assert sorted(group.ranking_id for group in groups) == sorted(f"r{i}" for i in range(NUM_RANKINGS))
    assert num_dead_letters == 0
    assert len(kills) >= 4


def test_a_poison_message_is_reported_and_the_rest_goes_on(bus_url: str, store_url_for: str) -> None:
    with closing(open_bus(bus_url)) as bus:
        bus.create_topics(TOPICS)
        bus.publish([Record(RANKINGS, b"k", b"\xff not an event", "x"), record(ranking("r1"))])
        with thread(run_ingest, bus_url, store_url_for, KEYRING_FILE), closing(Store(store_url_for)) as store:
            wait_until(lambda: store.num_rankings() == 1 and sum(bus.end_offsets(DEAD_LETTERS).values()) > 0)
            assert store.num_dead_letters() == 1
        with closing(bus.consume([DEAD_LETTERS], {})) as consumer:
            (found,) = consumer.poll(10)
    letter = events_pb2.DeadLetterEvent.FromString(found.value)
    assert letter.event_id == found.event_id
    assert letter.value == b"\xff not an event"
    assert letter.position.topic == RANKINGS


def test_two_ingests_at_once_store_each_event_once(bus_url: str, store_url_for: str, outbox: Path) -> None:
    acknowledge(outbox, 0, 200)
    with (
        thread(run_relay, outbox, bus_url),
        thread(run_ingest, bus_url, store_url_for, KEYRING_FILE),
        thread(run_ingest, bus_url, store_url_for, KEYRING_FILE),
        closing(Store(store_url_for)) as store,
    ):
        wait_until(lambda: len(store.ranked_groups()) >= 200)
        assert store.num_rankings() == 200
        assert store.num_dead_letters() == 0


def test_the_relay_waits_for_a_bus_that_is_down(tmp_path: Path, outbox: Path) -> None:
    (tmp_path / "bus.db").mkdir()
    bus_url = f"sqlite:///{tmp_path}/bus.db"
    acknowledge(outbox, 0, 10)
    with thread(run_relay, outbox, bus_url):
        time.sleep(0.5)
        with closing(OutboxFile(outbox, 1 << 30)) as file:
            assert len(file.pending(100)) == 20
            (tmp_path / "bus.db").rmdir()
            wait_until(lambda: file.pending(100) == [])


def test_a_broker_that_comes_back_empty_gets_all_again(tmp_path: Path, outbox: Path) -> None:
    port = free_port()
    bus_url, store_url = f"kafka://127.0.0.1:{port}", f"sqlite:///{tmp_path}/store.db"
    # Processes of their own, since kafka-python leaves sockets to the garbage collector when a server does not answer.
    commands = [("relay", outbox, bus_url), ("ingest", bus_url, store_url)]
    with running(commands), closing(Store(store_url)) as store:
        for life in range(2):
            with running_tansu(tmp_path, port):
                acknowledge(outbox, life * 50, life * 50 + 50)
                wait_until(lambda life=life: len(store.ranked_groups()) == life * 50 + 50)  # type: ignore[misc]
        with running_tansu(tmp_path, port), closing(OutboxFile(outbox, 1 << 30)) as file:
            # Everything that the broker lost is published again, for other consumers than the store.
            with closing(open_bus(bus_url)) as bus:
                bus.create_topics(TOPICS)
                found: set[str] = set()
                with closing(bus.consume([RANKINGS], {})) as consumer:
                    deadline = time.monotonic() + 60
                    while len(found) < 100 and time.monotonic() < deadline:
                        found |= {each.event_id for each in consumer.poll(0.1)}
                assert len(found) == 100
            wait_until(lambda: file.pending(1) == [])
        assert store.num_rankings() == 100


def test_sigterm_ends_relay_and_ingest(tmp_path: Path, outbox: Path) -> None:
    bus_url = f"sqlite:///{tmp_path}/bus.db"
    commands = [("relay", outbox, bus_url), ("ingest", bus_url, f"sqlite:///{tmp_path}/s.db")]
    with running(commands) as started:
        for process in started:
            assert process.stdout is not None
            assert process.stdout.readline() == "started\n"
            process.terminate()
            process.communicate(timeout=20)
            assert process.returncode == 0


def test_retries_wait_longer_and_longer_up_to_the_limit() -> None:
    whole = [min(0.1 * 2**failures, 5.0) for failures in range(100)]
    waits = [backoff_seconds(failures, 5.0) for failures in range(1, 101)]
    assert all(longest / 2 <= wait <= longest for wait, longest in zip(waits, whole, strict=True))
    assert 1.5 <= backoff_seconds(2, 300.0, 3.0) / 2 <= 3.0
    assert 150 <= backoff_seconds(5_000, 300.0, 3.0) <= 300, "no failure is one too many"


def test_partitions_that_are_added_are_read(kafka_url: str, tmp_path: Path) -> None:
    servers, _, name = kafka_url.removeprefix("kafka://").partition("/")
    store_url = f"sqlite:///{tmp_path}/store.db"
    with closing(open_bus(kafka_url)) as bus, closing(Store(store_url)) as store:
        bus.create_topics(TOPICS)
        bus.publish([record(ranking("first"))])
        with thread(run_ingest, kafka_url, store_url, KEYRING_FILE):
            wait_until(lambda: store.num_rankings() == 1)
            admin = KafkaAdminClient(bootstrap_servers=servers)
            try:
                admin.create_partitions({f"{name}.{RANKINGS}": NewPartitions(total_count=8)})
            finally:
                admin.close()
            wait_until(lambda: len(bus.end_offsets(RANKINGS)) == 8)
            producer = KafkaProducer(bootstrap_servers=servers)
            try:
                for number in range(8):
                    event = ranking(f"later-{number}")
                    producer.send(f"{name}.{RANKINGS}", signed(event, KEYRING), partition=number).get(10)
            finally:
                producer.close()
            wait_until(lambda: store.num_rankings() == 9)
