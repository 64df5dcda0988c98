"""Lists and opens a folder's files as what they should be, plain files: it follows no link, and never waits."""

import errno
import io
import os
import stat
from pathlib import Path

_FOLDER = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
# A named pipe would be waited for without O_NONBLOCK; to plain files it makes no difference.
_FILE = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
# What Linux says of a link that is not followed, of a file in place of a folder, and of a socket.
_NOT_PLAIN = frozenset({errno.ELOOP, errno.ENOTDIR, errno.ENXIO})


class NotPlainError(Exception):
    """There is a link, a pipe or a device where a plain file or a folder should be. The text names it."""


def open_plain(folder: Path, path: str) -> io.BufferedReader:
    """Opens a plain file for reading.

    Args:
        folder: a folder, which must not be a link itself.
        path: the file's path inside it, with forward slashes.

    Raises:
        NotPlainError: a part of the path, or the folder, is a link, or the file is not a plain one.
        OSError: it cannot be opened now; its `filename` is the whole path.
    """
    *folders, name = path.split("/")
    try:
        inside = os.open(folder, _FOLDER)
        try:
            for each in folders:
                inside, outer = os.open(each, _FOLDER, dir_fd=inside), inside
                os.close(outer)
            file = os.open(name, _FILE, dir_fd=inside)
        finally:
            os.close(inside)
        if not stat.S_ISREG(os.fstat(file).st_mode):
            os.close(file)
            raise NotPlainError(f"{path} is not a plain file")
    except OSError as error:
        if error.errno in _NOT_PLAIN:
            raise NotPlainError(f"{path} is not a plain file, or lies behind a link") from error
        raise OSError(error.errno, error.strerror, str(folder / path)) from error
    return os.fdopen(file, "rb")


def list_plain(folder: Path) -> list[str]:
    """Returns the paths of the files below a folder, with forward slashes, sorted.

    Raises:
        NotPlainError: something below the folder is neither a plain file nor a folder, or the folder is a link.
        OSError: the folder, or one below it, cannot be listed now.
    """
    if folder.is_symlink():
        raise NotPlainError(f"{folder.name} is a link")
    found, left = [], [folder]
    while left:
        with os.scandir(left.pop()) as entries:
            for entry in entries:
                path = Path(entry.path)
                if entry.is_dir(follow_symlinks=False):
                    left.append(path)
                elif entry.is_file(follow_symlinks=False):
                    found.append(path.relative_to(folder).as_posix())
                else:
                    raise NotPlainError(f"{path.relative_to(folder).as_posix()} is not a plain file")
    return sorted(found)
