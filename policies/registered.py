"""Checks that the files of a registered version are those that were registered, before an engine is given them."""

from pathlib import Path

from policies.artifact import ComparisonError, verify_artifact
from policies.location import folder_below
from policies.state import PolicyRecord


def verify_registered(record: PolicyRecord, root: Path, shapes_like: Path | None = None) -> Path:
    """Checks every byte of a registered version against the manifest in the log, and returns its folder.

    Args:
        record: the version.
        root: the folder of all versions, below which it must lie.
        shapes_like: the folder of a version whose weights have the same form. One that cannot be read is ignored.

    Raises:
        UnreadableError: the version cannot be read now, which says nothing about it.
        ArtifactError: the version was read, and is not what was registered.
    """
    folder = folder_below(root, record.artifact_uri)
    try:
        verify_artifact(folder, shapes_like, record.manifest)
    except ComparisonError:
        verify_artifact(folder, None, record.manifest)
    return folder
