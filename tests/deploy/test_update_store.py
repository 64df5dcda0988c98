"""`alignd up` brings a store of an earlier release up to date before it starts what it kills for silence."""

import os
import sqlite3
import subprocess
import sys
import time
from contextlib import closing
from pathlib import Path

import pytest
from alembic import command

from deploy.config import AligndConfig
from deploy.up import free_port, update_store
from feedback.store.engine import open_engine

REPOSITORY = Path(__file__).parents[2]


def test_a_store_of_an_earlier_release_is_up_to_date_before_ingest_starts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    upgrade = command.upgrade
    monkeypatch.setattr("feedback.store.engine.command.upgrade", lambda config, _: upgrade(config, "0002"))
    open_engine(f"sqlite:///{tmp_path}/store.db").dispose()
    monkeypatch.undo()
    environment = {name: value for name, value in os.environ.items() if not name.startswith("ALIGND_")}
    environment |= {"ALIGND_DATA_DIR": str(tmp_path)}
    verb = ("up", "--without", "serve", "--without", "relay", "--without", "train")
    up = subprocess.Popen([sys.executable, "-m", "deploy.cli", *verb], cwd=REPOSITORY, env=environment)
    try:
        deadline = time.monotonic() + 60
        while not (tmp_path / "logs" / "ingest.log").exists():
            assert time.monotonic() < deadline
            time.sleep(0.01)
        # Ingest has still to import all that it needs.
        with closing(sqlite3.connect(tmp_path / "store.db")) as store:
            assert store.execute("SELECT version_num FROM alembic_version").fetchone() > ("0002",)
    finally:
        up.terminate()
        up.wait(40)


def test_a_store_that_is_away_keeps_nothing_from_starting(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    update_store(AligndConfig(data_dir=tmp_path, store=f"postgresql://nobody@127.0.0.1:{free_port('127.0.0.1')}/x"))
    assert "the store cannot be used yet" in caplog.text
