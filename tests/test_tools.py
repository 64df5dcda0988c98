"""Finding tools: the order of the places, and an error that names what is missing."""

from pathlib import Path

import pytest

from tests import tools


def executable(folder: Path) -> Path:
    folder.mkdir()
    path = folder / "some-tool"
    path.write_text("#!/bin/sh\n")
    path.chmod(0o755)
    return path


def test_places_are_tried_in_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    named, on_path, beside = (executable(tmp_path / name) for name in ("named", "on_path", "beside"))
    monkeypatch.setenv("ALIGND_TEST_TOOLS", str(named.parent))
    monkeypatch.setenv("PATH", str(on_path.parent))
    monkeypatch.setattr(tools, "BESIDE_THE_CHECKOUT", beside.parent)
    assert tools.find_tool("some-tool") == named
    monkeypatch.delenv("ALIGND_TEST_TOOLS")
    assert tools.find_tool("some-tool") == on_path
    on_path.unlink()
    assert tools.find_tool("some-tool") == beside


def test_missing_tool_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("ALIGND_TEST_TOOLS", raising=False)
    with pytest.raises(FileNotFoundError, match="need the tool no-such-tool"):
        tools.find_tool("no-such-tool")
