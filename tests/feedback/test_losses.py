"""What a bus that was set back, a missing key, a damaged row or a record that is too large costs: nothing else."""

import sqlite3
from collections import Counter
from contextlib import closing
from datetime import UTC, datetime
from functools import partial
from pathlib import Path

import pytest
from kafka import KafkaAdminClient
from kafka.admin import ConfigResource, ConfigResourceType

from alignd.v1 import events_pb2
from feedback.bus.topics import DEAD_LETTERS, RANKINGS, SAMPLES, TOPICS
from feedback.bus.url import open_bus
from feedback.outbox.file import Entry, OutboxFile
from feedback.outbox.relay import run_relay
from feedback.store.ingest import run_ingest
from feedback.store.reader import Store
from tests.feedback.bus.test_bus import not_allowed
from tests.feedback.events import KEYRING_FILE, ranking, record, sample
from tests.feedback.test_delivery import acknowledge, thread, wait_until


@pytest.fixture
def outbox(tmp_path: Path) -> Path:
    return tmp_path / "outbox.db"


def test_a_bus_that_was_set_back_and_has_grown_past_ingest_since_loses_nothing(tmp_path: Path, outbox: Path) -> None:
    """The log's id and its end look as before; only the records at the places that were reached are others."""
    path, store_url = tmp_path / "bus.db", f"sqlite:///{tmp_path}/store.db"
    bus_url, backup = f"sqlite:///{path}", tmp_path / "backup.db"
    files = [path.with_name(path.name + suffix) for suffix in ("", "-wal", "-shm")]
    with (
        closing(Store(store_url)) as store,
        thread(run_relay, outbox, bus_url),
        thread(run_ingest, bus_url, store_url, KEYRING_FILE),
    ):
        acknowledge(outbox, 0, 40)
        wait_until(lambda: len(store.ranked_groups()) == 40)
        with closing(sqlite3.connect(path)) as source, closing(sqlite3.connect(backup)) as target:
            source.backup(target)
        acknowledge(outbox, 40, 50)
        wait_until(lambda: len(store.ranked_groups()) == 50)
        # Another replica's feedback comes to the restored log first.
        with closing(open_bus(f"sqlite:///{backup}")) as bus:
            bus.publish([record(each) for i in range(50, 75) for each in (sample(f"s{i}"), ranking(f"r{i}", f"s{i}"))])
        for each in files:
            each.unlink(missing_ok=True)
        backup.rename(path)
        wait_until(lambda: len(store.ranked_groups()) == 75)
        wait_until(lambda: store.num_losses() > 0)
        with closing(open_bus(bus_url)) as bus, closing(bus.consume([RANKINGS], {})) as consumer:
            found: set[str] = set()

            def all_are_there() -> bool:
                found.update(each.event_id for each in consumer.poll(0.1))
                return len(found) == 75

            wait_until(all_are_there)
        assert (store.num_rankings(), store.num_dead_letters()) == (75, 0)


def test_another_record_at_the_place_that_was_reached_is_noticed_on_kafka(
    kafka_url: str, tmp_path: Path, outbox: Path
) -> None:
    """A broker cannot be set back within a test. So what relay and ingest remember is changed instead of the log."""
    store_url = f"sqlite:///{tmp_path}/store.db"
    ingest = (run_ingest, kafka_url, store_url, KEYRING_FILE)
    acknowledge(outbox, 0, 5)
    with closing(Store(store_url)) as store, closing(open_bus(kafka_url)) as bus:
        with thread(run_relay, outbox, kafka_url), thread(*ingest):
            wait_until(lambda: len(store.ranked_groups()) == 5)
        for path, table in ((tmp_path / "store.db", "offsets"), (outbox, "logs")):
            with closing(sqlite3.connect(path)) as disk, disk:
                disk.execute(f"UPDATE {table} SET last_digest = x'00' WHERE last_digest IS NOT NULL")
        with thread(run_relay, outbox, kafka_url), thread(*ingest):
            wait_until(lambda: store.num_losses() > 0 and sum(bus.end_offsets(RANKINGS).values()) == 10, 20)
        assert (store.num_rankings(), store.num_dead_letters()) == (5, 0)


def test_events_of_a_key_that_was_missing_are_read_again_once_it_is_there(tmp_path: Path) -> None:
    bus_url, store_url, keys = f"sqlite:///{tmp_path}/bus.db", f"sqlite:///{tmp_path}/store.db", tmp_path / "keys"
    keys.write_text(f"another:{'0b' * 32}\n")
    with closing(open_bus(bus_url)) as bus, closing(Store(store_url)) as store:
        bus.create_topics(TOPICS)
        bus.publish([record(sample()), record(ranking("r1"))])
        with thread(run_ingest, bus_url, store_url, keys):
            wait_until(lambda: store.num_dead_letters() == 2)
        keys.write_text(KEYRING_FILE.read_text())
        with thread(partial(run_ingest, from_beginning=True), bus_url, store_url, keys):
            wait_until(lambda: len(store.ranked_groups()) == 1)


def test_a_damaged_event_goes_to_the_dead_letters_and_the_others_arrive(tmp_path: Path, outbox: Path) -> None:
    bus_url, store_url = f"sqlite:///{tmp_path}/bus.db", f"sqlite:///{tmp_path}/store.db"
    acknowledge(outbox, 0, 5)
    with closing(sqlite3.connect(outbox)) as disk, disk:
        (value,) = disk.execute("SELECT value FROM events WHERE event_id = 'r3'").fetchone()
        disk.execute("UPDATE events SET value = ? WHERE event_id = 'r3'", (value.replace(b"s3-0", b"s3-9"),))
    with (
        closing(Store(store_url)) as store,
        thread(run_relay, outbox, bus_url),
        thread(run_ingest, bus_url, store_url, KEYRING_FILE),
    ):
        # The operators are told: `alignd status` has the number.
        wait_until(lambda: len(store.ranked_groups()) == 4 and store.num_dead_letters() == 1)
        with closing(open_bus(bus_url)) as bus, closing(bus.consume([DEAD_LETTERS], {})) as consumer:
            (found,) = consumer.poll(10)
    letter = events_pb2.DeadLetterEvent.FromString(found.value)
    assert (letter.position.topic, letter.position.partition) == (RANKINGS, -1)
    assert "checksum" in letter.reason
    assert b"s3-9" in letter.value


def test_an_event_that_the_broker_refuses_goes_to_the_dead_letters_once(
    kafka_url: str, outbox: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    servers, _, name = kafka_url.removeprefix("kafka://").partition("/")
    with closing(open_bus(kafka_url)) as bus:
        bus.create_topics(TOPICS)
        events = [sample(f"s{i}", text="x" * (60_000 if i == 2 else 10)) for i in range(5)]
        with closing(OutboxFile(outbox, 1 << 30)) as file:
            file.append([Entry(record(event), b"d", datetime.now(UTC)) for event in events])
            with thread(run_relay, outbox, kafka_url):
                wait_until(lambda: file.pending(1) == [])
                admin = KafkaAdminClient(bootstrap_servers=servers)
                try:
                    limit = {"max.message.bytes": "20000"}
                    admin.alter_configs([ConfigResource(ConfigResourceType.TOPIC, f"{name}.{SAMPLES}", configs=limit)])
                finally:
                    admin.close()
                monkeypatch.setattr(KafkaAdminClient, "alter_configs", not_allowed)
                more = [sample(f"t{i}", text="x" * (60_000 if i == 2 else 10)) for i in range(15)]
                file.append([Entry(record(event), b"d", datetime.now(UTC)) for event in more])
                wait_until(lambda: file.pending(1) == [])
        with closing(bus.consume([SAMPLES, DEAD_LETTERS], {})) as consumer:
            found: list[str] = []
            while batch := consumer.poll(1):
                found += [each.event_id for each in batch]
    letters = [each for each in found if each.startswith("outbox/")]
    assert set(found) - set(letters) == {*(f"s{i}" for i in range(5)), *(f"t{i}" for i in range(15) if i != 2)}
    assert len(letters) == 1
    # kafka-python gives up what is on its way to other partitions too: it is sent again, once.
    assert max(Counter(found).values()) <= 2
