"""Turns the artifact URI of a policy version into a folder of this machine, by one rule for all rooms."""

from pathlib import Path
from urllib.parse import urlsplit
from urllib.request import url2pathname

from policies.artifact import ArtifactError


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
    if parts.scheme not in ("", "file") or parts.netloc not in ("", "localhost") or not path.is_absolute():
        raise ArtifactError(f"artifact URI {uri!r}: must be an absolute path or a file:// URL")
    return path
