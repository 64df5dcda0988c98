"""The servers that tests of several rooms share: a Kafka broker and a PostgreSQL server, each started once."""

import os
import uuid
from collections.abc import Iterator
from pathlib import Path

import psycopg
import pytest
from hypothesis import settings

from tests.kafka_broker import Broker, is_tansu, running_broker
from tests.postgres_server import running_postgres

# Nothing that alignd runs on a CPU may need a compiler, so here there is none.
os.environ |= {"CC": "/bin/false", "CXX": "/bin/false"}

settings.register_profile("alignd", deadline=None)
settings.load_profile("alignd")


def pytest_configure(config: pytest.Config) -> None:
    """Lets kafka-python be imported although it reads its schemas by a deprecated function."""
    config.addinivalue_line("filterwarnings", "ignore:(read|open)_text is deprecated:DeprecationWarning")


TANSU_DIFFERS = {
    "test_end_offsets_say_where_the_log_ends[kafka]": "its end offsets count batches",
    "test_a_topic_that_does_not_exist_is_an_error[kafka-publish]": "it makes a topic that is published to",
    "test_publishing_says_where_each_record_stands_and_reading_there_finds_it[kafka]": "its end offsets count batches",
    "test_a_topic_that_takes_less_refuses_the_record_alone_and_is_widened": "it takes records of any size",
    "test_an_event_that_the_broker_refuses_goes_to_the_dead_letters_once": "it cannot change a topic's settings",
    "test_another_record_at_the_place_that_was_reached_is_noticed_on_kafka": "its end offsets count batches",
    "test_kafka_keeps_what_was_published_for_good": "it does not tell a topic's settings",
    "test_a_cluster_that_asks_for_tls_and_a_password_takes_who_has_both": "it speaks neither TLS nor SASL",
    "test_partitions_that_are_added_are_read": "it cannot add partitions",
}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What Apache Kafka does and Tansu does not is expected to fail where there is only Tansu, and must fail there."""
    if is_tansu():
        for item in items:
            if item.name in TANSU_DIFFERS:
                item.add_marker(pytest.mark.xfail(strict=True, reason=f"Tansu: {TANSU_DIFFERS[item.name]}"))


@pytest.fixture(scope="session")
def kafka_broker(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Iterator[Broker]:
    """A Kafka broker; never skipped."""
    with running_broker(tmp_path_factory.mktemp("kafka")) as broker:
        reporter = request.config.pluginmanager.get_plugin("terminalreporter")
        if reporter is not None:
            reporter.write_line(f"\nKafka tests run on {broker.kind}")
        yield broker


@pytest.fixture
def kafka_url(kafka_broker: Broker) -> Iterator[str]:
    """The URL of a Kafka bus without topics: one of its own, since the cluster may be somebody's."""
    # Here, so that the tests of other rooms do not load it.
    from kafka import KafkaAdminClient

    name = f"test-{uuid.uuid4().hex}"
    yield f"kafka://{kafka_broker.servers}/{name}"
    admin = KafkaAdminClient(bootstrap_servers=kafka_broker.servers)
    try:
        admin.delete_topics([topic for topic in admin.list_topics() if topic.startswith(f"{name}.")])
    finally:
        admin.close()


@pytest.fixture(params=["sqlite", "kafka"])
def bus_url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """The URL of an empty bus, of each engine in turn."""
    if request.param == "kafka":
        return str(request.getfixturevalue("kafka_url"))
    return f"sqlite:///{tmp_path}/bus.db"


@pytest.fixture(scope="session")
def postgres_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A PostgreSQL server; never skipped."""
    with running_postgres(tmp_path_factory.mktemp("postgres")) as url:
        yield url


@pytest.fixture
def postgres_url(postgres_server: str) -> str:
    """The URL of an empty PostgreSQL database."""
    return new_database(postgres_server)


@pytest.fixture(params=["sqlite", "postgres"])
def store_url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """The URL of an empty store, of each engine in turn."""
    if request.param == "postgres":
        return str(request.getfixturevalue("postgres_url"))
    return f"sqlite:///{tmp_path}/store.db"


def new_database(server: str) -> str:
    """Makes an empty database, and returns its URL."""
    name = f"alignd_{uuid.uuid4().hex}"
    with psycopg.connect(server, autocommit=True) as connection:
        connection.execute(f'CREATE DATABASE "{name}"')
    return f"{server.rpartition('/')[0]}/{name}"
