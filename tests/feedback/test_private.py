"""What users wrote is for the owner of the files alone, whatever the umask of who starts alignd."""

import os
import stat
from collections.abc import Iterator
from contextlib import closing
from datetime import UTC, datetime
from pathlib import Path

import pytest

from feedback.bus.sqlite import SqliteBus
from feedback.bus.topics import TOPICS
from feedback.durable import make_private
from feedback.outbox.file import Entry, OutboxFile
from feedback.store.ledger import Ledger
from tests.feedback.events import record, sample


@pytest.fixture(params=[0o000, 0o022, 0o077])
def umask(request: pytest.FixtureRequest) -> Iterator[int]:
    before = os.umask(request.param)
    yield request.param
    os.umask(before)


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def write_all(folder: Path) -> dict[str, int]:
    """Writes an outbox, a bus and a store, and returns the mode of each file while they are open."""
    with (
        closing(OutboxFile(folder / "outbox.db", 1 << 20)) as outbox,
        closing(SqliteBus(folder / "bus.db")) as bus,
        closing(Ledger(f"sqlite:///{folder}/store.db")) as ledger,
    ):
        outbox.append([Entry(record(sample()), b"d", datetime.now(UTC))])
        bus.create_topics(TOPICS)
        ledger.mark_published(["x"])
        return {path.name: mode(path) for path in folder.iterdir()}


def test_files_and_folders_are_for_their_owner_alone(tmp_path: Path, umask: int) -> None:
    folder = tmp_path / "a" / "b"
    names = {f"{name}.db{suffix}" for name in ("outbox", "bus", "store") for suffix in ("", "-wal", "-shm")}
    assert write_all(folder) == dict.fromkeys(names, 0o600)
    assert (mode(folder), mode(folder.parent)) == (0o700, 0o700)


def test_a_folder_is_closed_to_others_unless_it_is_meant_for_all(tmp_path: Path) -> None:
    ours, of_all = tmp_path / "ours", tmp_path / "of_all"
    for path, before in ((ours, 0o755), (of_all, 0o1777)):
        path.mkdir()
        path.chmod(before)
        make_private(path)
    assert (mode(ours), mode(of_all)) == (0o750, 0o1777)


def test_what_others_could_read_is_closed_to_them(tmp_path: Path) -> None:
    """The group may have been let in on purpose."""
    write_all(tmp_path)
    for path in tmp_path.iterdir():
        path.chmod(0o664)
    assert {found & stat.S_IRWXO for found in write_all(tmp_path).values()} == {0}
    assert mode(tmp_path / "bus.db") == 0o660
