"""What the outbox acknowledged is on disk, once, whatever happens next."""

import asyncio
import resource
import signal
import sqlite3
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import closing
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from feedback.bus.contract import MAX_RECORD_BYTES, Position, Record
from feedback.outbox.door import Outbox, OutboxConflict, OutboxError, OutboxFull, Receipt
from feedback.outbox.file import Entry, LogEnd, Mark, OutboxFile
from feedback.sqlite_file import open_sqlite
from tests.feedback import processes

NOW = datetime(2026, 1, 1, 12, 0, 0, 123456, tzinfo=UTC)
MAX_BYTES = 1 << 30


def make_record(number: int, size: int = 100) -> Record:
    return Record("topic", b"key", b"x" * size, f"e{number}")


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "deep" / "outbox.db"


@pytest.fixture
def outbox(path: Path) -> Iterator[Outbox]:
    opened = Outbox(path, MAX_BYTES)
    yield opened
    opened.close()


@pytest.fixture
def file(path: Path) -> Iterator[OutboxFile]:
    opened = OutboxFile(path, MAX_BYTES)
    yield opened
    opened.close()


def fill(file: OutboxFile, count: int, size: int = 100) -> None:
    file.append([Entry(make_record(number, size), b"d", NOW) for number in range(count)])


def stored_ids(path: Path) -> list[str]:
    file = OutboxFile(path, MAX_BYTES)
    try:
        return [each.record.event_id for each in file.pending(1_000_000)]
    finally:
        file.close()


async def test_an_event_is_there_when_append_returns(outbox: Outbox, path: Path) -> None:
    receipt = await outbox.append(make_record(1), b"digest", NOW)
    assert receipt.is_new
    assert receipt.acknowledge_time == NOW
    assert stored_ids(path) == ["e1"]


async def test_a_retry_gets_the_first_time(outbox: Outbox, path: Path) -> None:
    await outbox.append(make_record(1), b"digest", NOW)
    receipt = await outbox.append(make_record(1, size=101), b"digest", NOW + timedelta(hours=1))
    assert not receipt.is_new
    assert receipt.acknowledge_time == NOW
    assert stored_ids(path) == ["e1"]


async def test_the_same_id_with_other_contents_is_a_conflict(outbox: Outbox, path: Path) -> None:
    results = await asyncio.gather(
        outbox.append(make_record(1), b"digest", NOW),
        outbox.append(make_record(1), b"another", NOW),
        outbox.append(make_record(2), b"digest", NOW),
        return_exceptions=True,
    )
    assert isinstance(results[1], OutboxConflict)
    assert stored_ids(path) == ["e1", "e2"]


async def test_requests_that_come_together_share_an_fsync(outbox: Outbox, monkeypatch: pytest.MonkeyPatch) -> None:
    commits: list[int] = []
    append = OutboxFile.append

    def counted(file: OutboxFile, entries: Sequence[Entry]) -> Sequence[Receipt | OutboxError]:
        commits.append(len(entries))
        return append(file, entries)

    monkeypatch.setattr(OutboxFile, "append", counted)
    receipts = await asyncio.gather(*(outbox.append(make_record(number), b"d", NOW) for number in range(2000)))
    assert all(receipt.is_new for receipt in receipts)
    assert sum(commits) == 2000
    assert len(commits) < 200


def test_a_commit_is_on_disk_before_it_returns(tmp_path: Path) -> None:
    """In WAL mode this needs synchronous=FULL. A power failure would show its absence; kill -9 would not."""
    with closing(open_sqlite(tmp_path / "any.db")) as connection:
        assert connection.execute("PRAGMA synchronous").fetchone() == (2,)
        assert connection.execute("PRAGMA journal_mode").fetchone() == ("wal",)


async def test_a_caller_that_leaves_harms_nobody(outbox: Outbox, path: Path) -> None:
    leaver = asyncio.create_task(outbox.append(make_record(1), b"d", NOW))
    await asyncio.sleep(0)
    leaver.cancel()
    await outbox.append(make_record(2), b"d", NOW)
    assert "e2" in stored_ids(path)


async def test_a_record_too_large_for_the_bus_is_refused(outbox: Outbox, path: Path) -> None:
    with pytest.raises(ValueError, match="bytes"):
        await outbox.append(make_record(1, MAX_RECORD_BYTES), b"d", NOW)
    assert stored_ids(path) == []


async def test_closing_writes_what_waits(path: Path) -> None:
    outbox = Outbox(path, MAX_BYTES)
    waiting = [asyncio.create_task(outbox.append(make_record(number), b"d", NOW)) for number in range(100)]
    await asyncio.sleep(0)
    outbox.close()
    assert len(stored_ids(path)) == 100
    assert all(receipt.is_new for receipt in await asyncio.gather(*waiting))
    with pytest.raises(OutboxError, match="closed"):
        await outbox.append(make_record(101), b"d", NOW)


async def test_a_full_outbox_refuses_and_recovers(path: Path) -> None:
    outbox = Outbox(path, max_bytes=1 << 20)
    acknowledged = []
    with pytest.raises(OutboxFull):
        for number in range(1000):
            await outbox.append(make_record(number, 10_000), b"d", NOW)
            acknowledged.append(f"e{number}")
    assert 50 < len(acknowledged) < 110
    assert stored_ids(path) == acknowledged
    relay_side = OutboxFile(path, 1 << 20)
    relay_side.mark_published(dict.fromkeys(each.seq for each in relay_side.pending(30)))
    assert relay_side.prune(retention_seconds=3600) == 30
    relay_side.close()
    for number in range(1000, 1020):
        assert (await outbox.append(make_record(number, 10_000), b"d", NOW)).is_new
    outbox.close()


async def test_a_disk_that_cannot_be_written_is_reported_and_recovers(outbox: Outbox, path: Path) -> None:
    await outbox.append(make_record(1), b"d", NOW)
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (path.with_name(path.name + "-wal").stat().st_size, limit[1]))
    try:
        with pytest.raises(OutboxError):
            await outbox.append(make_record(2, 100_000), b"d", NOW)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    assert (await outbox.append(make_record(2, 100_000), b"d", NOW)).is_new
    assert stored_ids(path) == ["e1", "e2"]


async def test_a_full_disk_is_reported_as_full_and_recovers(outbox: Outbox, path: Path) -> None:
    await outbox.append(make_record(1), b"d", NOW)
    connection = outbox._file._file._connection
    assert connection is not None
    # SQLite's error is the same as on a full disk.
    connection.execute("PRAGMA max_page_count = 1")
    with pytest.raises(OutboxFull):
        await outbox.append(make_record(2, 100_000), b"d", NOW)
    assert stored_ids(path) == ["e1"]
    assert (await outbox.append(make_record(2, 100_000), b"d", NOW)).is_new


async def test_a_file_that_breaks_is_reported_and_recovers(outbox: Outbox, path: Path) -> None:
    await outbox.append(make_record(1), b"d", NOW)
    file = OutboxFile(path, MAX_BYTES)
    with file._file.transaction() as connection:
        connection.execute("ALTER TABLE events RENAME TO hidden")
    with pytest.raises(OutboxError):
        await outbox.append(make_record(2), b"d", NOW)
    with file._file.transaction() as connection:
        connection.execute("DROP TABLE IF EXISTS events")
        connection.execute("ALTER TABLE hidden RENAME TO events")
    assert (await outbox.append(make_record(2), b"d", NOW)).is_new
    file.close()
    assert stored_ids(path) == ["e1", "e2"]


async def test_an_event_that_cannot_be_written_is_refused_and_the_next_one_is_taken(outbox: Outbox, path: Path) -> None:
    unwritable = Record("topic", b"key", b"value", "half a character: \ud800")
    with pytest.raises(OutboxError, match="surrogates not allowed"):
        await asyncio.wait_for(outbox.append(unwritable, b"d", NOW), 20)
    assert (await asyncio.wait_for(outbox.append(make_record(1), b"d", NOW), 20)).is_new
    assert stored_ids(path) == ["e1"]


def test_a_file_that_is_no_outbox_is_refused(path: Path) -> None:
    path.parent.mkdir()
    path.write_bytes(b"no database" * 1000)
    with pytest.raises(OutboxError):
        Outbox(path, MAX_BYTES)


def test_pending_is_in_order_until_published(file: OutboxFile) -> None:
    fill(file, 10)
    first = file.pending(4)
    assert [each.record.event_id for each in first] == ["e0", "e1", "e2", "e3"]
    file.mark_published(dict.fromkeys(each.seq for each in first))
    assert [each.record.event_id for each in file.pending(100)] == [f"e{i}" for i in range(4, 10)]


def test_only_old_published_events_are_pruned(file: OutboxFile) -> None:
    fill(file, 10)
    file.mark_published(dict.fromkeys(each.seq for each in file.pending(4)))
    assert file.prune(retention_seconds=60) == 0
    time.sleep(0.02)
    assert file.prune(retention_seconds=0.01) == 4
    assert len(file.pending(100)) == 6


def test_an_event_that_is_published_is_still_recognised(file: OutboxFile) -> None:
    fill(file, 1)
    file.mark_published(dict.fromkeys(each.seq for each in file.pending(1)))
    (receipt,) = file.append([Entry(make_record(0), b"d", NOW + timedelta(days=1))])
    assert receipt == Receipt(NOW, is_new=False)


@pytest.mark.parametrize(("log_id", "end_offset", "again"), [("a", 6, 0), ("a", 4, 3), ("b", 9, 3)])
def test_a_bus_that_lost_records_gets_all_again(file: OutboxFile, log_id: str, end_offset: int, again: int) -> None:
    fill(file, 3)
    assert file.compare_logs([LogEnd("topic", 0, "a", 5)]) == 0
    file.mark_published(dict.fromkeys(each.seq for each in file.pending(3)))
    assert file.compare_logs([LogEnd("topic", 0, log_id, end_offset)]) == again
    assert len(file.pending(10)) == again
    assert file.compare_logs([LogEnd("topic", 0, log_id, end_offset)]) == 0


@pytest.mark.parametrize("column", ["value", "topic", "event_id", "content_digest"])
def test_an_event_that_the_disk_has_changed_is_told_from_the_others(file: OutboxFile, path: Path, column: str) -> None:
    fill(file, 3)
    kind = "TEXT" if column in {"topic", "event_id"} else "BLOB"
    with closing(sqlite3.connect(path)) as disk, disk:
        disk.execute(f"UPDATE events SET {column} = CAST(x'65f3' AS {kind}) WHERE seq = 2")
    assert [each.is_whole for each in file.pending(9)] == [True, False, True]


def test_a_bus_that_was_set_back_and_has_grown_since_gets_all_again(file: OutboxFile) -> None:
    fill(file, 3)
    ends = [LogEnd("topic", 0, "a", 5)]
    assert file.compare_logs(ends) == 0
    marks = {each.seq: Mark(Position("topic", 0, 4 + each.seq), bytes([each.seq])) for each in file.pending(9)}
    file.mark_published(marks)
    assert file.marks() == [Mark(Position("topic", 0, 7), b"\3")]
    assert file.compare_logs(ends, replaced=file.marks()) == 3
    assert (len(file.pending(9)), file.marks()) == (3, [])
    assert file.compare_logs(ends, replaced=file.marks()) == 0


def test_an_idle_relay_never_keeps_the_server_out(file: OutboxFile, path: Path) -> None:
    """Wherever it is stopped then, feedback is taken."""
    fill(file, 3)
    file.mark_published(dict.fromkeys(each.seq for each in file.pending(9)))
    file.compare_logs([LogEnd("topic", 0, "a", 5)])
    with closing(open_sqlite(path)) as writer:
        writer.execute("BEGIN IMMEDIATE")
        began_at = time.monotonic()
        assert file.pending(9) == []
        assert file.compare_logs([LogEnd("topic", 0, "a", 5)]) == 0
        assert file.prune(3600) == 0
        assert time.monotonic() - began_at < 5


def test_a_file_of_an_earlier_release_is_taken_over(file: OutboxFile, path: Path) -> None:
    fill(file, 2)
    file.compare_logs([LogEnd("topic", 0, "a", 5)])
    file.close()
    with closing(sqlite3.connect(path)) as disk, disk:
        for table, column in (("events", "checksum"), ("logs", "last_offset"), ("logs", "last_digest")):
            disk.execute(f"ALTER TABLE {table} DROP COLUMN {column}")
    file.append([Entry(make_record(2), b"d", NOW)])
    assert [(each.record.event_id, each.is_whole) for each in file.pending(9)] == [
        ("e0", True),
        ("e1", True),
        ("e2", True),
    ]


def test_what_was_acknowledged_survives_kill_9(path: Path) -> None:
    acknowledged: set[str] = set()
    for round_ms in (0, 3, 7, 20, 50):
        target = path.with_name(f"outbox-{round_ms}.db")
        writer = processes.start("append", target)
        assert writer.stdout is not None
        said = [writer.stdout.readline().strip() for _ in range(20)]
        timer = threading.Timer(round_ms / 1000, writer.send_signal, [signal.SIGKILL])
        timer.start()
        text = writer.stdout.read()
        # A last line without a line break may have been cut short.
        said += text[: text.rfind("\n") + 1].split()
        writer.wait()
        timer.join()
        writer.stdout.close()
        stored = stored_ids(target)
        assert set(said) <= set(stored)
        assert len(stored) == len(set(stored))
        acknowledged |= set(said)
    assert len(acknowledged) >= 20
