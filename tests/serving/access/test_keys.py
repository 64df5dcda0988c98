"""The file of keys: what is made is found, what is gone is refused, and nothing in it can be used as a key."""

import json
import threading
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from serving.access.keys import ApiKey, KeysError, KeysFile, create_key, find, read_keys, revoke_key, rotate_key


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "api_keys.json"


def test_a_key_is_found_by_its_secret_alone_and_its_file_does_not_have_it(path: Path) -> None:
    made, secret = create_key(path, "web", "shop", ["feedback", "sample"], "ada")
    assert find(read_keys(path), secret) == made
    assert (made.scopes, made.application, made.created_by) == (("sample", "feedback"), "shop", "ada")
    text = path.read_text()
    assert secret not in text
    assert secret.rpartition("_")[2] not in text
    assert path.stat().st_mode & 0o077 == 0
    for other in ("", secret[:-1], secret + "x", secret.replace(made.key_id, "0" * 12), "\udcff"):
        assert find(read_keys(path), other) is None


def test_a_key_expires_and_can_be_revoked(path: Path) -> None:
    create_key(path, "short", "shop", ["sample"], "ada", timedelta(seconds=-1))
    create_key(path, "long", "shop", ["sample"], "ada", timedelta(days=1))
    assert [key.state(datetime.now(UTC)) for key in read_keys(path)] == ["expired", "active"]
    revoke_key(path, "long", "eve")
    (_, revoked) = read_keys(path)
    assert (revoked.state(datetime.now(UTC)), revoked.revoked_by) == ("revoked", "eve")
    # What was ended stays in the file, for the audit; its name can be used again.
    create_key(path, "long", "shop", ["sample"], "ada")
    assert len(read_keys(path)) == 3


def test_a_rotated_key_lives_on_for_the_overlap(path: Path) -> None:
    _, old_secret = create_key(path, "web", "shop", ["sample"], "ada", timedelta(days=90))
    new, new_secret = rotate_key(path, "web", "ada", timedelta(hours=1))
    keys = read_keys(path)
    old, found = find(keys, old_secret), find(keys, new_secret)
    assert old
    assert old.expires_at
    assert found == new
    assert timedelta(minutes=59) < old.expires_at - datetime.now(UTC) < timedelta(minutes=61)
    assert new.expires_at
    assert new.expires_at - new.created_at == timedelta(days=90)
    rotate_key(path, "web", "ada", timedelta(0))
    later = datetime.now(UTC)
    assert [key.state(later) for key in read_keys(path)] == ["expired", "expired", "active"]


@pytest.mark.parametrize(
    ("name", "application", "scopes"),
    [("", "shop", ["sample"]), ("We b", "shop", ["sample"]), ("web", "sh/op", ["sample"]), ("web", "shop", []),
     ("web", "shop", ["sample", "root"])],
)  # fmt: skip
def test_a_bad_key_is_refused_and_none_is_made(path: Path, name: str, application: str, scopes: list[str]) -> None:
    with pytest.raises(KeysError):
        create_key(path, name, application, scopes, "ada")
    assert read_keys(path) == []


def test_a_name_is_that_of_one_active_key(path: Path) -> None:
    create_key(path, "web", "shop", ["sample"], "ada")
    with pytest.raises(KeysError, match="there is an active key web"):
        create_key(path, "web", "shop", ["sample"], "ada")
    with pytest.raises(KeysError, match="no active key app"):
        revoke_key(path, "app", "ada")


def test_keys_that_are_made_at_once_are_all_kept(path: Path) -> None:
    makers = [threading.Thread(target=create_key, args=(path, f"key-{i}", "shop", ["sample"], "ada")) for i in range(8)]
    for each in makers:
        each.start()
    for each in makers:
        each.join()
    assert sorted(key.name for key in read_keys(path)) == [f"key-{i}" for i in range(8)]


def test_a_running_server_sees_each_change_and_keeps_what_it_knew_through_a_fault(path: Path) -> None:
    file = KeysFile(path)
    assert file.now() == []
    create_key(path, "web", "shop", ["sample"], "ada")
    assert [key.name for key in file.now()] == ["web"]
    whole = path.read_text()
    for fault in ("{", "{}", json.dumps({"keys": [{"name": "web"}]}), "[]"):
        path.write_text(fault)
        assert [key.name for key in file.now()] == ["web"]
        with pytest.raises(KeysError, match="is no file of API keys"):
            read_keys(path)
    path.unlink()
    assert [key.name for key in file.now()] == ["web"]
    path.write_text(whole)
    revoke_key(path, "web", "ada")
    assert [key.revoked_by for key in file.now()] == ["ada"]


def test_a_revoked_key_is_refused_although_the_file_could_not_be_read_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "keys.json"
    create_key(path, "web", "shop", ["sample"], "ada")
    keys = KeysFile(path)
    revoke_key(path, "web", "ada")

    def no_descriptors(path: Path) -> list[ApiKey]:
        raise OSError(24, "Too many open files")

    with monkeypatch.context() as patched:
        patched.setattr("serving.access.keys.read_keys", no_descriptors)
        for _ in range(3):
            assert keys.now()[0].state(datetime.now(UTC)) == "active"
    assert keys.now()[0].state(datetime.now(UTC)) == "revoked"
    assert caplog.text.count("cannot be read again") == 1
