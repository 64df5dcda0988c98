"""A folder for data that a test writes."""

from pathlib import Path

import pytest


@pytest.fixture
def data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder, where the data sets are looked for."""
    monkeypatch.setenv("ALIGND_TEST_DATA", str(tmp_path))
    return tmp_path
