"""What both engines of the bus promise."""

import concurrent.futures
import signal
import time
import uuid
from collections import defaultdict
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from types import SimpleNamespace

import pytest
from kafka import KafkaAdminClient
from kafka.admin import ConfigResource, ConfigResourceType, NewTopic
from kafka.errors import TopicAuthorizationFailedError

from feedback.bus.contract import (
    MAX_RECORD_BYTES,
    Bus,
    BusError,
    Consumer,
    Delivered,
    Position,
    PublishError,
    Record,
    Refused,
    TopicSpec,
)
from feedback.bus.kafka_reading import EVENT_ID_HEADER, to_delivered
from feedback.bus.topics import TOPICS
from feedback.bus.url import open_bus
from tests.feedback import processes


@pytest.fixture
def bus(bus_url: str) -> Iterator[Bus]:
    opened = open_bus(bus_url)
    yield opened
    opened.close()


@pytest.fixture
def topic(bus: Bus) -> str:
    name = f"alignd.test.{uuid.uuid4().hex}"
    bus.create_topics([TopicSpec(name, partitions=4)])
    return name


def make_records(topic: str, count: int, num_keys: int = 10) -> list[Record]:
    return [Record(topic, b"k%d" % (i % num_keys), b"v%d" % i, f"e{i}") for i in range(count)]


def read(consumer: Consumer, count: int) -> list[Delivered]:
    """Polls until it has so many records, and then until no more come."""
    found: list[Delivered] = []
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        batch = consumer.poll(0.1)
        found += batch
        if len(found) >= count and not batch:
            break
    return found


def read_all(bus: Bus, topic: str, count: int, start: dict[tuple[str, int], int] | None = None) -> list[Delivered]:
    consumer = bus.consume([topic], start or {})
    try:
        return read(consumer, count)
    finally:
        consumer.close()


def test_what_was_published_is_read_once_and_whole(bus: Bus, topic: str) -> None:
    records = make_records(topic, 1200)
    bus.publish(records)
    found = read_all(bus, topic, 1200)
    assert sorted((each.event_id, each.key, each.value) for each in found) == sorted(
        (each.event_id, each.key, each.value) for each in records
    )
    assert len({each.position for each in found}) == 1200


def test_records_of_a_key_keep_their_order(bus: Bus, topic: str) -> None:
    for begin in range(0, 300, 50):
        bus.publish(make_records(topic, 300)[begin : begin + 50])
    by_key = defaultdict(list)
    for each in read_all(bus, topic, 300):
        by_key[each.key].append((each.position, int(each.value[1:])))
    assert len(by_key) == 10
    for places in by_key.values():
        assert len({position.partition for position, _ in places}) == 1
        assert [number for _, number in places] == sorted(number for _, number in places)
        assert [position.offset for position, _ in places] == sorted(position.offset for position, _ in places)


def test_reading_resumes_at_the_given_offsets(bus: Bus, topic: str) -> None:
    bus.publish(make_records(topic, 200))
    found = read_all(bus, topic, 200)
    reached: dict[tuple[str, int], int] = {}
    for each in found[:77]:
        reached[each.position.topic, each.position.partition] = each.position.offset + 1
    rest = read_all(bus, topic, 123, reached)
    assert {each.event_id for each in rest} == {each.event_id for each in found[77:]}


def test_a_waiting_consumer_gets_what_comes_later(bus: Bus, topic: str) -> None:
    consumer = bus.consume([topic], {})
    assert consumer.poll(0.1) == []
    bus.publish(make_records(topic, 3))
    assert len(read(consumer, 3)) == 3
    consumer.close()


def test_several_topics_are_read_together(bus: Bus, topic: str) -> None:
    other = topic + ".other"
    bus.create_topics([TopicSpec(other)])
    bus.publish([Record(topic, b"k", b"1", "a"), Record(other, b"k", b"2", "b")])
    consumer = bus.consume([topic, other], {})
    assert {(each.position.topic, each.event_id) for each in read(consumer, 2)} == {(topic, "a"), (other, "b")}
    consumer.close()


def test_end_offsets_say_where_the_log_ends(bus: Bus, topic: str) -> None:
    assert bus.end_offsets(topic) == dict.fromkeys(range(4), 0)
    bus.publish(make_records(topic, 100))
    ends = dict.fromkeys(range(4), 0)
    for each in read_all(bus, topic, 100):
        ends[each.position.partition] = each.position.offset + 1
    assert bus.end_offsets(topic) == ends
    assert read_all(bus, topic, 0, {(topic, p): end for p, end in bus.end_offsets(topic).items()}) == []


def test_creating_a_topic_again_changes_nothing(bus: Bus, topic: str) -> None:
    bus.publish(make_records(topic, 10))
    log_id = bus.log_id(topic)
    bus.create_topics([TopicSpec(topic, partitions=4)])
    assert bus.log_id(topic) == log_id
    assert len(read_all(bus, topic, 10)) == 10


def test_a_topic_of_one_partition_must_have_one(bus: Bus, topic: str) -> None:
    with pytest.raises(BusError, match="exactly 1"):
        bus.create_topics([TopicSpec(topic, partitions=1, compacted=True)])


def test_a_compacted_topic_takes_records(bus: Bus, topic: str) -> None:
    bus.create_topics([TopicSpec(topic + ".compacted", compacted=True)])
    bus.publish([Record(topic + ".compacted", b"a", b"1", "a"), Record(topic + ".compacted", b"b", b"2", "b")])
    assert [each.event_id for each in read_all(bus, topic + ".compacted", 2)] == ["a", "b"]


def test_large_and_empty_values_arrive(bus: Bus, topic: str) -> None:
    values = [b"", b"\0" * 3_000_000, b"\xff" * (MAX_RECORD_BYTES - 1)]
    bus.publish([Record(topic, b"k", value, f"e{i}") for i, value in enumerate(values)])
    assert [each.value for each in read_all(bus, topic, 3)] == values


def test_a_record_that_is_too_large_is_refused(bus: Bus, topic: str) -> None:
    with pytest.raises(BusError, match="bytes"):
        bus.publish([Record(topic, b"k", b"x" * MAX_RECORD_BYTES, "e")])
    assert read_all(bus, topic, 0) == []


def test_a_record_that_is_too_large_does_not_hold_up_the_others(bus: Bus, topic: str) -> None:
    records = make_records(topic, 3)
    records.insert(1, Record(topic, b"k", b"x" * MAX_RECORD_BYTES, "large"))
    with pytest.raises(PublishError, match="large: it has 16777217 bytes") as raised:
        bus.publish(records)
    assert [isinstance(each, Refused) for each in raised.value.outcomes] == [False, True, False, False]
    assert {each.event_id for each in read_all(bus, topic, 3)} == {"e0", "e1", "e2"}


def test_publishing_says_where_each_record_stands_and_reading_there_finds_it(bus: Bus, topic: str) -> None:
    bus.publish(make_records(topic, 50))
    records = make_records(topic, 30)
    positions = bus.publish(records)
    found = {each.position: each for each in read_all(bus, topic, 80)}
    assert [found[at].value for at in positions] == [each.value for each in records]
    last = list({at.partition: at for at in positions}.values())
    for _ in range(2):
        assert bus.read_at(last) == {at: found[at] for at in last}
    beyond = Position(topic, 0, bus.end_offsets(topic)[0])
    assert bus.read_at([beyond, last[-1]]) == {last[-1]: found[last[-1]]}
    assert bus.read_at([]) == {}


def not_allowed(*_: object) -> None:
    raise TopicAuthorizationFailedError("no")


def test_a_topic_that_takes_less_refuses_the_record_alone_and_is_widened(
    kafka_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Topics that were made by hand have the broker's default of 1 MB."""
    servers, _, name = kafka_url.removeprefix("kafka://").partition("/")
    topic = "alignd.narrow"
    admin = KafkaAdminClient(bootstrap_servers=servers)
    try:
        admin.create_topics([NewTopic(f"{name}.{topic}", num_partitions=1, replication_factor=1)])
    finally:
        admin.close()
    records = [Record(topic, b"k", b"x" * size, f"e{i}") for i, size in enumerate([10, 2_000_000, 20, 30])]
    with closing(open_bus(kafka_url)) as bus:
        with monkeypatch.context() as patch:
            patch.setattr(KafkaAdminClient, "alter_configs", not_allowed)
            for _ in range(2):
                with pytest.raises(PublishError, match=r"^1 of 4 events .* e1: .*max\.message\.bytes") as raised:
                    bus.publish(records)
                assert [type(each) for each in raised.value.outcomes] == [Position, Refused, Position, Position]
        bus.publish(records)
        expected = ["e0", "e2", "e3", "e0", "e2", "e3", "e0", "e1", "e2", "e3"]
        assert [each.event_id for each in read_all(bus, topic, 10)] == expected


@pytest.mark.parametrize("ask", ["publish", "consume", "end_offsets", "log_id"])
def test_a_topic_that_does_not_exist_is_an_error(bus: Bus, ask: str) -> None:
    argument = {
        "publish": [Record("alignd.nowhere", b"k", b"v", "e")],
        "consume": ["alignd.nowhere"],
    }.get(ask, "alignd.nowhere")
    with pytest.raises(BusError):
        getattr(bus, ask)(argument, *([{}] if ask == "consume" else []))


def test_many_processes_publish_at_once(bus: Bus, bus_url: str, topic: str) -> None:
    writers = [processes.start("publish", bus_url, topic, f"p{i}", 40) for i in range(3)]
    try:
        found = [each.event_id for each in read_all(bus, topic, 120)]
    finally:
        for writer in writers:
            writer.kill()
            writer.communicate()
    assert sorted(found) == sorted(f"p{i}/{number}" for i in range(3) for number in range(40))
    for i in range(3):
        own = [each for each in found if each.startswith(f"p{i}/")]
        assert own == [f"p{i}/{number}" for number in range(40)]


def test_threads_share_a_bus(bus: Bus, topic: str) -> None:
    def publish(i: int) -> None:
        bus.publish([Record(topic, b"%d" % i, b"v", f"e{i}")])

    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        list(pool.map(publish, range(60)))
    assert {each.event_id for each in read_all(bus, topic, 60)} == {f"e{i}" for i in range(60)}


def test_what_was_acknowledged_survives_the_publisher(bus: Bus, bus_url: str, topic: str) -> None:
    publisher = processes.start("publish", bus_url, topic, "p", 1_000_000)
    assert publisher.stdout is not None
    acknowledged = [publisher.stdout.readline().strip() for _ in range(30)]
    publisher.send_signal(signal.SIGKILL)
    acknowledged += publisher.communicate()[0].split()
    found = [each.event_id for each in read_all(bus, topic, len(acknowledged))]
    # The kill may have cut the last line short; all lines before it are whole.
    assert set(acknowledged[:-1]) <= set(found)
    assert len(found) == len(set(found))


def test_closing_twice_is_harmless(bus: Bus, topic: str) -> None:
    consumer = bus.consume([topic], {})
    for _ in range(2):
        consumer.close()
        bus.close()
    assert consumer is not None


@pytest.mark.parametrize("url", ["", "sqlite://", "sqlite:///", "kafka://", "mysql://x", "kafka:host:1"])
def test_what_is_no_bus_is_refused(url: str) -> None:
    with pytest.raises(ValueError, match="not a bus"):
        open_bus(url)


def test_names_keep_deployments_on_one_cluster_apart(kafka_url: str) -> None:
    topic = "alignd.test"
    buses = [open_bus(kafka_url), open_bus(f"{kafka_url}.other")]
    for bus, value in zip(buses, (b"ours", b"theirs"), strict=True):
        bus.create_topics([TopicSpec(topic)])
        bus.publish([Record(topic, b"key", value, "event")])
    for bus, value in zip(buses, (b"ours", b"theirs"), strict=True):
        consumer = bus.consume([topic], {})
        (delivered,) = read(consumer, 1)
        assert (delivered.value, delivered.position.topic) == (value, topic)
        consumer.close()
        bus.close()


def test_a_bus_that_cannot_be_opened_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "bus.db").write_bytes(b"no database at all" * 1000)
    with pytest.raises(BusError):
        open_bus(f"sqlite:///{tmp_path}/bus.db")


def test_kafka_keeps_what_was_published_for_good(kafka_url: str) -> None:
    """The brokers' default must not matter: what ingest has not read yet is stored nowhere else."""
    servers, _, name = kafka_url.removeprefix("kafka://").partition("/")
    with closing(open_bus(kafka_url)) as bus:
        bus.create_topics(TOPICS)
    topics = [f"{name}.{spec.name}" for spec in TOPICS]
    admin = KafkaAdminClient(bootstrap_servers=servers)
    try:
        found = admin.describe_configs([ConfigResource(ConfigResourceType.TOPIC, topic) for topic in topics])
    finally:
        admin.close()
    assert {topic: found["topic"][topic]["retention.ms"]["value"] for topic in topics} == dict.fromkeys(topics, "-1")


def test_a_header_that_is_null_is_as_none() -> None:
    """Kafka allows a header without a value, though kafka-python does not write one."""
    record = SimpleNamespace(
        topic="p.t", partition=0, offset=3, key=None, value=b"v", headers=[(EVENT_ID_HEADER, None)]
    )
    assert to_delivered(record, "p.") == Delivered(Position("t", 0, 3), b"", b"v", "")
