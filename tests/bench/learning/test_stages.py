"""Stages run once, and a result of other settings is never taken for one of these."""

from pathlib import Path
from typing import Any

import pytest

from bench.learning.stages import MadeOtherwiseError, begin, once


def test_a_stage_that_is_done_is_read_back(tmp_path: Path) -> None:
    calls: list[str] = []

    def stage() -> dict[str, Any]:
        calls.append("made")
        return {"found": 1}

    begin(tmp_path / "chat-0", "so many rankings")
    first = once(tmp_path / "chat-0", "sft", stage)
    begin(tmp_path / "chat-0", "so many rankings")
    assert once(tmp_path / "chat-0", "sft", stage) == first
    assert (first["found"], calls) == (1, ["made"])


@pytest.mark.parametrize("made", [None, "fewer rankings"])
def test_stages_that_were_made_otherwise_are_refused(tmp_path: Path, made: str | None) -> None:
    folder = tmp_path / "chat-0"
    if made:
        begin(folder, made)
    else:
        folder.mkdir()
    with pytest.raises(MadeOtherwiseError, match="remove it"):
        begin(folder, "so many rankings")
