"""Stages of work that run once: each leaves its result in a file, and is skipped if the file is there.

The folder of an experiment also has the settings of its stages, so that a result of other settings is not taken for one
of these.
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
    """The stages in the folder were made with other settings."""


def begin(folder: Path, how: str) -> None:
    """Begins or resumes an experiment.

    Raises:
        MadeOtherwiseError: the experiment in the folder was made with other settings.
    """
    path = folder / _MADE_FILE
    if folder.exists() and (path.read_text() if path.exists() else None) != how:
        raise MadeOtherwiseError(f"the stages in {folder} were made with other settings: remove it")
    folder.mkdir(parents=True, exist_ok=True)
    replace_file(path, how)


def once(folder: Path, name: str, stage: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """Returns the result of `stage`, from now or from an earlier attempt, and the seconds that it took."""
    path = folder / f"{name}.json"
    if not path.exists():
        print(f"{folder.name}: {name}", flush=True)
        folder.mkdir(parents=True, exist_ok=True)
        began = time.monotonic()
        found = stage() | {"seconds": time.monotonic() - began}
        write_json(path, found)
    loaded: dict[str, Any] = json.loads(path.read_text())
    return loaded
