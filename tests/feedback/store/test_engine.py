"""A store that is opened has all its tables, or stays as it was."""

import sqlite3
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from alembic import command

from feedback.store.engine import open_engine


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
