"""Stages of work that are done once: each leaves what it found in a file, and is skipped where that is there.

The folder of an experiment also says how its stages are made, so that none is taken for one that was made otherwise.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from feedback.durable import replace_file, write_json

_MADE_FILE = "made.txt"


class MadeOtherwiseError(Exception):
    """What is in the folder was made in another way."""


def begin(folder: Path, how: str) -> None:
    """Begins an experiment, or goes on with one. Raises MadeOtherwiseError if that was not made like this."""
    path = folder / _MADE_FILE
    if folder.exists() and (path.read_text() if path.exists() else None) != how:
        raise MadeOtherwiseError(f"the stages in {folder} were not made as they would be now: remove it")
    folder.mkdir(parents=True, exist_ok=True)
    replace_file(path, how)


def once(folder: Path, name: str, stage: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """What `stage` found, now or in an earlier attempt, and the seconds that it took."""
    path = folder / f"{name}.json"
    if not path.exists():
        print(f"{folder.name}: {name}", flush=True)
        folder.mkdir(parents=True, exist_ok=True)
        began = time.monotonic()
        found = stage() | {"seconds": time.monotonic() - began}
        write_json(path, found)
    loaded: dict[str, Any] = json.loads(path.read_text())
    return loaded
