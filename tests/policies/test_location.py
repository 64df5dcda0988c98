"""One rule says where a version lies, for server and trainer alike."""

from pathlib import Path

import pytest

from policies.artifact import ArtifactError
from policies.location import artifact_folder


@pytest.mark.parametrize(
    ("uri", "folder"),
    [
        ("/var/policies/v7", "/var/policies/v7"),
        ("file:///var/policies/v7", "/var/policies/v7"),
        ("file://localhost/var/a%20b/v7", "/var/a b/v7"),
    ],
)
def test_a_folder_of_this_machine_is_found(uri: str, folder: str) -> None:
    assert artifact_folder(uri) == Path(folder)


@pytest.mark.parametrize("uri", ["s3://bucket/v7", "file://other/var/v7", "policies/v7", "", "http://[::1"])
def test_what_is_elsewhere_is_refused_and_never_taken_for_a_local_path(uri: str) -> None:
    with pytest.raises(ArtifactError, match="must be an absolute path or a file:// URL"):
        artifact_folder(uri)
