"""What the bus of one machine says of a file that changed under it: on the disk, by a backup, by a release."""

import sqlite3
from contextlib import closing
from pathlib import Path

import pytest

from feedback.bus.contract import BusError, Record, TopicSpec
from feedback.bus.sqlite import SqliteBus
from tests.feedback.bus.test_bus import make_records, read_all


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "bus.db"


def filled(path: Path, count: int) -> SqliteBus:
    bus = SqliteBus(path)
    bus.create_topics([TopicSpec("t")])
    bus.publish(make_records("t", count))
    return bus


def test_a_byte_that_flipped_on_the_disk_is_told_from_what_was_published(path: Path) -> None:
    with closing(filled(path, 5)) as bus:
        with closing(sqlite3.connect(path)) as disk, disk:
            disk.execute("UPDATE records SET value = x'7633ff', event_id = CAST(x'65b3' AS TEXT) WHERE \"offset\" = 3")
        found = read_all(bus, "t", 5)
        assert [bool(each.fault) for each in found] == [False, False, False, True, False]
        assert "checksum" in found[3].fault
        assert bus.read_at([found[3].position])[found[3].position].fault


def test_a_file_of_an_earlier_release_is_read_and_written(path: Path) -> None:
    filled(path, 2).close()
    with closing(sqlite3.connect(path)) as disk, disk:
        disk.execute("ALTER TABLE records DROP COLUMN checksum")
    with closing(SqliteBus(path)) as bus:
        bus.publish([Record("t", b"k", b"new", "new")])
        assert [(each.event_id, each.fault) for each in read_all(bus, "t", 3)] == [("e0", ""), ("e1", ""), ("new", "")]


def test_a_file_that_was_replaced_is_noticed_by_who_writes_and_who_reads(path: Path, tmp_path: Path) -> None:
    """What is written to the old file, which has no name any more, would be seen by nobody."""
    filled(tmp_path / "backup.db", 1).close()
    with closing(filled(path, 5)) as bus, closing(bus.consume(["t"], {})) as consumer:
        assert len(consumer.poll(1)) == 5
        for each in (path, path.with_name("bus.db-wal"), path.with_name("bus.db-shm")):
            each.unlink()
        (tmp_path / "backup.db").rename(path)
        with pytest.raises(BusError, match="replaced"):
            consumer.poll(1)
        bus.publish([Record("t", b"k", b"v", "after")])
        with closing(SqliteBus(path)) as other:
            assert [each.event_id for each in read_all(other, "t", 2)] == ["e0", "after"]
