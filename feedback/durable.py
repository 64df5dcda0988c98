"""Files and folders that survive a crash of the process and of the machine: written aside, fsync'd, renamed."""

import json
import os
from collections.abc import Callable
from pathlib import Path


def replace_file(path: Path, text: str) -> None:
    """Replaces a file by this text, at once or not at all. Raises OSError, such as for a full disk."""
    replace_file_by(path, lambda draft: draft.write_text(text, encoding="utf-8"))


def write_json(path: Path, value: object) -> None:
    """Replaces a file by this value as JSON, at once or not at all. Raises OSError."""
    replace_file(path, json.dumps(value, indent=2) + "\n")


def replace_file_by(path: Path, write: Callable[[Path], object]) -> None:
    """Replaces a file by what `write` puts into the draft it is given, at once or not at all.

    One writer at a time for each path. Raises OSError, and what `write` raises; then the file is as it was.
    """
    draft = path.with_name(f"{path.name}.tmp")
    try:
        write(draft)
        fsync(draft)
        draft.replace(path)
    finally:
        draft.unlink(missing_ok=True)
    fsync(path.parent)


def fsync_tree(folder: Path) -> None:
    """Makes durable all that is in this folder. Raises OSError."""
    for each in folder.rglob("*"):
        fsync(each)
    fsync(folder)


def fsync(path: Path) -> None:
    """Makes durable what a file holds, or of a folder which names its files have. Raises OSError."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
