"""How much room the outbox has left, asked before the work is done whose result would not fit."""

import shutil
import sqlite3
from contextlib import closing
from pathlib import Path

from feedback.outbox.file import OutboxError, used_bytes


def room_bytes(path: Path, max_bytes: int) -> int:
    """Returns how many bytes the outbox still takes: by its limit, or by what the disk has left.

    It opens a connection of its own, so that any thread may ask while others write.

    Raises:
        OutboxError: the file or its folder cannot be read.
    """
    try:
        with closing(sqlite3.connect(f"{path.absolute().as_uri()}?mode=ro", uri=True)) as connection:
            used = used_bytes(connection)
        return min(max_bytes - used, shutil.disk_usage(path.parent).free)
    except (sqlite3.Error, OSError) as error:
        raise OutboxError(f"outbox: {error}") from error
