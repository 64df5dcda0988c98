"""Signed events: ingest takes only what one of our servers wrote, whoever else can write to the bus."""

import hashlib
import hmac
import logging
import threading
from pathlib import Path

from google.protobuf.message import Message

from feedback.token import Keyring, KeyringError, read_keyring

logger = logging.getLogger(__name__)

# The fields `key_id` and `signature` on the wire: number times 8, and 2 for "a length and so many bytes".
_KEY_ID_TAG, _SIGNATURE_TAG = bytes([14 * 8 + 2]), bytes([15 * 8 + 2])
_SIGNATURE_BYTES = hashlib.sha256().digest_size
_TAIL_BYTES = 2 + _SIGNATURE_BYTES


class SignatureError(ValueError):
    """An event is not signed by one of our keys. The text says why."""


class KeyFile:
    """The keys of a file, which is read again when it has changed: a server may sign with a new key at any moment.

    Safe for use by several threads.
    """

    def __init__(self, path: Path) -> None:
        """Reads the file.

        Raises:
            KeyringError: the file is not one of keys.
            OSError: the file cannot be read.
        """
        self._path = path
        self._lock = threading.Lock()
        self._read_at = _version(path)
        self._keyring = read_keyring(path)

    def keyring(self) -> Keyring:
        """Returns the keys of now; those of before if the file is away or not whole."""
        with self._lock:
            try:
                version = _version(self._path)
                if version != self._read_at:
                    self._keyring, self._read_at = read_keyring(self._path), version
            except (KeyringError, OSError) as error:
                logger.warning("the feedback keys cannot be read again, those of before are used: %s", error)
            return self._keyring


def signed(event: Message, keyring: Keyring) -> bytes:
    """Returns the event as it is published: serialised, and signed with the current key.

    What is signed are the bytes themselves, which nobody has to serialise again to check them.
    """
    key_id = keyring.current.encode()
    body = event.SerializeToString() + _KEY_ID_TAG + bytes([len(key_id)]) + key_id
    signature = _signature(type(event), body, keyring.secrets[keyring.current])
    return body + _SIGNATURE_TAG + bytes([_SIGNATURE_BYTES]) + signature


def check_signature(kind: type[Message], value: bytes, keyring: Keyring) -> None:
    """Checks that one of our keys signed these bytes as an event of this kind. It parses nothing.

    Raises:
        SignatureError: none did.
    """
    body, tail = value[:-_TAIL_BYTES], value[-_TAIL_BYTES:]
    if len(tail) < _TAIL_BYTES or tail[:2] != _SIGNATURE_TAG + bytes([_SIGNATURE_BYTES]):
        raise SignatureError("it is not signed")
    named = [
        key_id for key_id in keyring.secrets if body.endswith(_KEY_ID_TAG + bytes([len(key_id)]) + key_id.encode())
    ]
    if not named:
        raise SignatureError("it is signed with a key that the file of feedback keys does not have")
    if not any(hmac.compare_digest(_signature(kind, body, keyring.secrets[each]), tail[2:]) for each in named):
        raise SignatureError(f"its signature with the key {named[0]} is wrong")


def _signature(kind: type[Message], body: bytes, secret: bytes) -> bytes:
    # The name keeps an event from being taken for one of another kind, and the signatures from those of tokens.
    return hmac.digest(secret, kind.DESCRIPTOR.full_name.encode() + b"\0" + body, hashlib.sha256)


def _version(path: Path) -> tuple[int, int, int]:
    found = path.stat()
    return found.st_ino, found.st_mtime_ns, found.st_size
