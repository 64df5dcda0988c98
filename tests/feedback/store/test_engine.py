"""A store that is opened has all its tables, or stays as it was."""

import sqlite3
import time
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import trustme
from alembic import command
from sqlalchemy import make_url, text
from sqlalchemy.exc import DatabaseError, SQLAlchemyError

from feedback.store.engine import open_engine, writing
from feedback.store.ledger import Ledger
from feedback.store.reader import Store
from tests.feedback import processes
from tests.tls_proxy import postgres_by_tls


def test_all_migrations_are_made_or_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Otherwise two processes that open a new store at once could each run a part of the migrations."""
    upgrade = command.upgrade

    def fail_at_the_end(*arguments: Any) -> None:
        upgrade(*arguments)
        raise RuntimeError("killed")

    monkeypatch.setattr("feedback.store.engine.command.upgrade", fail_at_the_end)
    with pytest.raises(RuntimeError):
        open_engine(f"sqlite:///{tmp_path}/store.db")
    with closing(sqlite3.connect(tmp_path / "store.db")) as file:
        assert file.execute("SELECT name FROM sqlite_master").fetchall() == []


def test_a_store_that_is_up_to_date_is_opened_while_another_process_writes(store_url: str) -> None:
    """Otherwise whoever opens it waits for ever behind a process that was stopped there."""
    first = open_engine(store_url)
    with writing(first) as connection:
        connection.execute(text("SELECT 1"))
        if first.dialect.name == "postgresql":
            # Should this process be stopped here, the server ends its transaction.
            timeout = connection.execute(text("SHOW idle_in_transaction_session_timeout")).scalar_one()
            assert timeout == "30s"
        began_at = time.monotonic()
        second = open_engine(store_url)
        assert time.monotonic() - began_at < 5
    for each in (first, second):
        each.dispose()


def test_a_store_of_the_release_before_keeps_its_rows_and_numbers(
    store_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    upgrade = command.upgrade
    monkeypatch.setattr("feedback.store.engine.command.upgrade", lambda config, _: upgrade(config, "0002"))
    old = open_engine(store_url)
    insert = text(
        'INSERT INTO rankings (event_id, sample_id, topic, partition, "offset", user_id, event_time_us, event,'
        " content_digest) VALUES (:id, 's', 't', 0, 0, 'u', 1, :blob, :blob)"
    )
    with old.begin() as connection:
        connection.execute(insert, [{"id": f"r{number}", "blob": b"x"} for number in range(3)])
        connection.execute(text("DELETE FROM rankings WHERE event_id = 'r2'"))
        connection.execute(text("INSERT INTO offsets VALUES ('t', 0, 'log', 7)"))
    old.dispose()
    monkeypatch.undo()
    new = open_engine(store_url)
    with new.begin() as connection:
        connection.execute(insert, [{"id": "r0", "blob": b"other contents"}])
        rows = connection.execute(text("SELECT seq, event_id FROM rankings ORDER BY seq")).all()
        offsets = connection.execute(text("SELECT next_offset, last_digest, num_losses FROM offsets")).all()
    new.dispose()
    assert [tuple(row) for row in rows[:2]] == [(1, "r0"), (2, "r1")]
    assert rows[2].event_id == "r0"
    assert rows[2].seq > 2
    assert [tuple(row) for row in offsets] == [(7, None, 0)]


def test_processes_open_an_empty_store_at_once(store_url: str) -> None:
    openers = [processes.start("open_store", store_url) for _ in range(3)]
    answers = [opener.communicate(timeout=60)[0].strip() for opener in openers]
    assert answers == ["0"] * 3
    assert [opener.returncode for opener in openers] == [0] * 3


def test_the_migrations_make_the_tables_that_the_code_knows(ledger: Ledger) -> None:
    from alembic.autogenerate import compare_metadata
    from alembic.migration import MigrationContext

    from feedback.store.tables import METADATA

    with ledger._engine.connect() as connection:
        assert compare_metadata(MigrationContext.configure(connection), METADATA) == []


@pytest.mark.parametrize("url", ["mysql://x/y", "sqlite://"])
def test_what_is_no_store_is_refused(url: str) -> None:
    with pytest.raises(ValueError, match="not a store"):
        Store(url)


def test_an_error_of_the_database_is_one_line_without_what_users_wrote(store_url: str, tmp_path: Path) -> None:
    (tmp_path / "none.db").write_bytes(b"no database " * 100)
    with pytest.raises(DatabaseError) as found:
        open_engine(f"sqlite:///{tmp_path}/none.db")
    assert str(found.value) == "(sqlite3.DatabaseError) file is not a database"
    engine = open_engine(store_url)
    with pytest.raises(SQLAlchemyError) as failed, engine.connect() as connection:
        connection.execute(text("SELECT 1 FROM absent WHERE :written = ''"), {"written": "a secret"})
    engine.dispose()
    assert "absent" in str(failed.value)
    assert not any(each in str(failed.value) for each in ("\n", "secret", "Background"))


def test_a_database_is_spoken_to_by_tls_and_only_if_its_certificate_is_the_right_one(
    tmp_path: Path, postgres_url: str
) -> None:
    roots = [trustme.CA(), trustme.CA()]
    files = [tmp_path / "right.pem", tmp_path / "wrong.pem"]
    for root, file in zip(roots, files, strict=True):
        root.cert_pem.write_to_path(file)
    url = make_url(postgres_url)
    assert url.port
    with postgres_by_tls(roots[0], url.port) as port:
        reached = url.set(host="localhost", port=port)

        def by(**query: str) -> str:
            return reached.update_query_dict(query).render_as_string(hide_password=False)

        engine = open_engine(by(sslmode="verify-full", sslrootcert=str(files[0])))
        with writing(engine) as connection:
            driver: Any = connection.connection.driver_connection
            assert driver.pgconn.ssl_in_use
        engine.dispose()
        with pytest.raises(SQLAlchemyError, match="certificate verify failed"):
            open_engine(by(sslmode="verify-full", sslrootcert=str(files[1])))
        # Who does not ask for TLS is not heard here.
        with pytest.raises(SQLAlchemyError):
            open_engine(by(sslmode="disable"))
