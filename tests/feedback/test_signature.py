"""Keys come and go while ingest runs, and it must know each before the first event that is signed with it."""

from pathlib import Path

import pytest

from feedback.signature import KeyFile, SignatureError, check_signature, signed
from feedback.token import KeyringError
from tests.feedback.events import KEYRING, demonstration


def line(key_id: str, byte: str) -> str:
    return f"{key_id}:{byte * 32}\n"


def test_a_key_that_is_added_is_known_at_once(tmp_path: Path) -> None:
    path = tmp_path / "keys"
    path.write_text(line("old", "0a"))
    keys = KeyFile(path)
    before = signed(demonstration("d"), keys.keyring())
    path.write_text(line("new", "0b") + line("old", "0a"))
    after = signed(demonstration("d"), keys.keyring())
    assert (b"\x72\x03old" in before, b"\x72\x03new" in after) == (True, True)
    for value in (before, after):
        check_signature(type(demonstration("d")), value, keys.keyring())
    path.write_text(line("new", "0b"))
    with pytest.raises(SignatureError, match="does not have"):
        check_signature(type(demonstration("d")), before, keys.keyring())


@pytest.mark.parametrize("damage", [lambda path: path.unlink(), lambda path: path.write_text("new:0b")])
def test_a_file_that_cannot_be_read_again_takes_no_key_away(tmp_path: Path, damage: object) -> None:
    path = tmp_path / "keys"
    path.write_text(line("old", "0a"))
    keys = KeyFile(path)
    damage(path)  # type: ignore[operator]
    assert list(keys.keyring().secrets) == ["old"]


def test_a_file_that_is_not_one_of_keys_is_refused_at_first(tmp_path: Path) -> None:
    (tmp_path / "keys").write_text("no keys")
    with pytest.raises(KeyringError, match="key_id:hex"):
        KeyFile(tmp_path / "keys")


def test_any_byte_that_changes_is_noticed() -> None:
    event = demonstration("d")
    value = signed(event, KEYRING)
    for index in range(len(value)):
        changed = value[:index] + bytes([value[index] ^ 0x20]) + value[index + 1 :]
        with pytest.raises(SignatureError):
            check_signature(type(event), changed, KEYRING)
