"""Turns the artifact URI of a policy version into a folder of this machine, by one rule for all rooms."""

import os
import re
from pathlib import Path
from urllib.parse import urlsplit
from urllib.request import url2pathname

from policies.artifact import ArtifactError

_VERSION_FOLDER = re.compile("v[1-9][0-9]{0,8}", re.ASCII)


def artifact_folder(uri: str) -> Path:
    """Returns the folder that an artifact URI names, whether or not it is there.

    Raises:
        ArtifactError: the URI is neither an absolute path nor a file:// URL of this machine.
    """
    try:
        parts = urlsplit(uri)
    except ValueError:
        parts = urlsplit("unreadable:")
    path = Path(url2pathname(parts.path) if parts.scheme == "file" else uri)
    elsewhere = parts.scheme not in ("", "file") or parts.netloc not in ("", "localhost")
    if elsewhere or not path.is_absolute() or "\0" in str(path):
        raise ArtifactError(f"artifact URI {uri!r}: must be an absolute path or a file:// URL of this machine")
    return path


def folder_below(root: Path, uri: str) -> Path:
    """Returns the folder that an artifact URI names, if it lies below `root`. Links may lead to `root` itself.

    The last part of the path is not followed if it is a link: whoever opens it refuses that.

    Raises:
        ArtifactError: the URI is none, or the folder lies elsewhere; the text is the same whatever lies there.
    """
    folder = artifact_folder(uri)
    real = Path(os.path.realpath(folder.parent)) / folder.name
    if Path(os.path.realpath(root)) not in real.parents:
        raise ArtifactError("it does not lie in the folder of policy versions, `policies` in data_dir")
    return real


def version_folders(root: Path) -> dict[int, Path]:
    """Returns the folders below `root` that are named like versions, such as v7, by version.

    Raises:
        OSError: `root` is there, but cannot be listed now.
    """
    try:
        found = list(root.iterdir())
    except FileNotFoundError:
        return {}
    return {int(path.name[1:]): path for path in found if _VERSION_FOLDER.fullmatch(path.name)}
