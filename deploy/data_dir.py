"""The folder that everything is written to: whether it can be used, and which `alignd up` runs on it."""

import errno
import fcntl
import json
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from deploy.config import ConfigError
from feedback.durable import private_folder

PROCESSES_FILE = "up.json"
_NO_ROOM = (errno.ENOSPC, errno.EDQUOT)
_MOST_PID = (1 << 31) - 1


def check_usable(folder: Path) -> None:
    """Makes the folder unless it is there, and checks that files can be made in it.

    A full disk is no reason to refuse the folder: room may be made while the processes wait, and each says so itself.

    Raises:
        ConfigError: nothing can be written there, for example because the file system is read-only.
    """
    try:
        private_folder(folder)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        if error.errno in _NO_ROOM and folder.is_dir():
            return
        raise ConfigError(
            f"data_dir: nothing can be written in {folder.absolute()} ({error.strerror}): name a folder that this "
            "user may write to"
        ) from error


@contextmanager
def only_up(folder: Path) -> Iterator[None]:
    """Keeps every other `alignd up` from this folder while the block runs: two would publish and store side by side.

    The kernel ends the lock with this process, however that ends.

    Raises:
        ConfigError: another one runs on it.
    """
    lock = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        _lock(lock, folder)
        yield
    finally:
        os.close(lock)


def _lock(descriptor: int, folder: Path) -> None:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        first = None
        with suppress(ValueError):
            # Not written yet while the first one imports a model.
            first = processes(folder).get("supervisor")
        raise ConfigError(
            f"data_dir: another `alignd up` runs on {folder.absolute()}{f', as process {first}' if first else ''}: end "
            "that first, or name another folder"
        ) from error


def processes(folder: Path) -> dict[str, int]:
    """Returns the ids of the processes that the present or a killed `alignd up` has written down, by their names.

    Raises:
        ValueError: the file holds no such ids, or cannot be read; the message says so.
    """
    path = folder / PROCESSES_FILE
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"nobody knows: {path} cannot be read ({error})") from error
    if not isinstance(found, dict) or not all(type(pid) is int and 0 < pid <= _MOST_PID for pid in found.values()):
        raise ValueError(f"nobody knows: {path} names no processes")
    return found
