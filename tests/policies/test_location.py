"""One rule says where a version lies, for server and trainer alike."""

from pathlib import Path

import pytest

from policies.artifact import ArtifactError
from policies.location import artifact_folder, folder_below, version_folders


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


@pytest.mark.parametrize("uri", ["s3://bucket/v7", "file://other/var/v7", "policies/v7", "", "http://[::1", "/v7\0"])
def test_what_is_elsewhere_is_refused_and_never_taken_for_a_local_path(uri: str) -> None:
    with pytest.raises(ArtifactError, match="must be an absolute path or a file:// URL"):
        artifact_folder(uri)


def test_a_folder_below_the_root_is_found_whichever_links_lead_to_the_root(tmp_path: Path) -> None:
    (tmp_path / "root").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "root")
    for root in ("root", "link"):
        for uri in ("root/v1", "link/v1", "root/../root/v1"):
            assert folder_below(tmp_path / root, f"{tmp_path}/{uri}") == tmp_path / "root" / "v1"


def test_what_lies_elsewhere_is_refused_in_the_same_words(tmp_path: Path) -> None:
    (tmp_path / "root").mkdir()
    (tmp_path / "there").mkdir()
    (tmp_path / "root" / "out").symlink_to(tmp_path / "there")
    said = set()
    for uri in ("there", "not-there", "root", "root-2/v1", "root/../there", "root/out/v1"):
        with pytest.raises(ArtifactError) as raised:
            folder_below(tmp_path / "root", f"{tmp_path}/{uri}")
        said.add(str(raised.value))
    assert len(said) == 1


def test_folders_that_are_named_like_versions_are_found(tmp_path: Path) -> None:
    for name in ("v1", "v12", "v0", "v01", "v", "vx", "w1", ".tmp-1", "v²"):
        (tmp_path / name).mkdir()
    assert version_folders(tmp_path) == {1: tmp_path / "v1", 12: tmp_path / "v12"}
    assert version_folders(tmp_path / "not there") == {}
