"""Stages of work that are done once: each leaves what it found in a file, and is skipped where that is there."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any


def once(folder: Path, name: str, stage: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """What `stage` found, now or in an earlier attempt, and the seconds that it took."""
    path = folder / f"{name}.json"
    if not path.exists():
        print(f"{folder.name}: {name}", flush=True)
        folder.mkdir(parents=True, exist_ok=True)
        began = time.monotonic()
        found = stage() | {"seconds": time.monotonic() - began}
        draft = path.with_suffix(".tmp")
        draft.write_text(json.dumps(found))
        draft.rename(path)
    loaded: dict[str, Any] = json.loads(path.read_text())
    return loaded
