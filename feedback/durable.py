"""Files and folders that survive a crash of the process and of the machine: written aside, fsync'd, renamed."""

import contextlib
import json
import os
import stat
from collections.abc import Callable
from pathlib import Path


def replace_file(path: Path, text: str) -> None:
    """Replaces a file by this text, either completely or not at all.

    Raises:
        OSError: the file cannot be written, for example because the disk is full.
    """
    replace_file_by(path, lambda draft: draft.write_text(text, encoding="utf-8"))


def write_json(path: Path, value: object) -> None:
    """Replaces a file by this value as JSON, either completely or not at all.

    Raises:
        OSError: the file cannot be written.
    """
    replace_file(path, json.dumps(value, indent=2) + "\n")


def replace_file_by(path: Path, write: Callable[[Path], object]) -> None:
    """Replaces a file by what `write` puts into the draft it is given, either completely or not at all.

    Only one writer at a time may replace a path. If `write` raises, its error is passed on and the file stays as it
    was.

    Raises:
        OSError: the file cannot be written.
    """
    draft = path.with_name(f"{path.name}.tmp")
    try:
        write(draft)
        fsync(draft)
        draft.replace(path)
    finally:
        draft.unlink(missing_ok=True)
    fsync(path.parent)


def rename_folder(draft: Path, target: Path) -> None:
    """Gives a folder that was written under another name its own, once everything in it is durable.

    Raises:
        OSError: the target exists and is not empty, or the disk fails.
    """
    _fsync_tree(draft)
    draft.rename(target)
    fsync(target.parent)


def _fsync_tree(folder: Path) -> None:
    """Makes a folder and everything in it durable.

    Raises:
        OSError: something in it cannot be read, or the disk fails.
    """
    for each in folder.rglob("*"):
        fsync(each)
    fsync(folder)


def fsync(path: Path) -> None:
    """Makes durable the contents of a file, or the names of the files in a folder.

    Raises:
        OSError: the path cannot be opened, or the disk fails.
    """
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def private_folder(path: Path) -> None:
    """Makes a folder, and those above it, for their owner alone, whatever the umask. What is there stays as it is.

    Raises:
        OSError: it cannot be made.
    """
    missing = [each for each in (path, *path.parents) if not each.exists()]
    for each in reversed(missing):
        with contextlib.suppress(FileExistsError):
            each.mkdir(mode=0o700)
            each.chmod(0o700)


def make_private(path: Path, *, create: bool = False) -> None:
    """Takes from others what they may do with a file or a folder, if it is there and ours, or else makes an empty file.

    What the group may do is left: it may have been let in on purpose. So is a folder that is meant for all, as /tmp is.

    Raises:
        OSError: it cannot be made.
    """
    if create:
        with contextlib.suppress(FileExistsError):
            descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
            os.fchmod(descriptor, 0o600)
            os.close(descriptor)
    # Another may own the file, and have opened it to us.
    with contextlib.suppress(FileNotFoundError, PermissionError):
        mode = path.stat().st_mode
        is_ours_alone = stat.S_ISREG(mode) or (stat.S_ISDIR(mode) and not mode & stat.S_ISVTX)
        if is_ours_alone and mode & stat.S_IRWXO:
            path.chmod(stat.S_IMODE(mode) & ~stat.S_IRWXO)
