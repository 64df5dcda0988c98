"""Feedback tokens: signed proof of what was shown to whom, so that any replica can accept a ranking by itself."""

import base64
import hashlib
import hmac
import os
import re
import secrets
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from enum import Enum
from pathlib import Path

from google.protobuf.message import DecodeError

from alignd.v1.feedback_token_pb2 import FeedbackClaims
from feedback.durable import fsync

_MIN_SECRET_BYTES = 32
# Signed with the payload, so that no other use of the same key can make a token.
_PURPOSE = b"alignd.v1.FeedbackClaims\0"


class TokenReason(Enum):
    """Why a token was refused."""

    MALFORMED = "malformed"
    UNKNOWN_KEY = "signed by an unknown key"
    BAD_SIGNATURE = "badly signed"
    EXPIRED = "expired"


class TokenError(Exception):
    """A token was refused. The error never contains the token."""

    def __init__(self, reason: TokenReason) -> None:
        super().__init__(f"the feedback token is {reason.value}")
        self.reason = reason


class KeyringError(Exception):
    """The key file cannot be used. The text says why."""


@dataclass(frozen=True)
class Keyring:
    """The keys that are accepted, and the one that signs."""

    current: str
    secrets: Mapping[str, bytes] = field(repr=False)


def sign(claims: FeedbackClaims, keyring: Keyring) -> str:
    """Returns the claims as a token, signed with the current key. The key id in `claims` is replaced."""
    signed = FeedbackClaims()
    signed.CopyFrom(claims)
    signed.key_id = keyring.current
    payload = _encode(signed.SerializeToString(deterministic=True))
    return f"{payload}.{_signature(payload, keyring.secrets[keyring.current])}"


def verify(token: str, keyring: Keyring, now: datetime) -> FeedbackClaims:
    """Returns the claims of a token that one of our keys signed and that has not expired.

    Args:
        token: as the client sent it.
        keyring: our keys.
        now: the time to compare with, with a time zone.

    Raises:
        TokenError: the token is malformed, signed by an unknown key, badly signed or expired.
    """
    payload, _, signature = token.partition(".")
    claims = _parse(payload)
    secret = keyring.secrets.get(claims.key_id)
    if secret is None:
        raise TokenError(TokenReason.UNKNOWN_KEY)
    # The texts are compared, not the bytes they stand for: base64 has several texts for the same bytes.
    if not hmac.compare_digest(_signature(payload, secret).encode(), signature.encode(errors="replace")):
        raise TokenError(TokenReason.BAD_SIGNATURE)
    if now >= claims.expire_time.ToDatetime(tzinfo=UTC):
        raise TokenError(TokenReason.EXPIRED)
    return claims


def load_keyring(path: Path) -> Keyring:
    """Reads keys, one `key_id:hex` a line; the first one signs. Creates the file, with one key, if there is none.

    Processes that create it at once end up with the same file.

    Raises:
        KeyringError: a line is not a key, an id is repeated, or the file has no key.
        OSError: the file cannot be read or created.
    """
    if not path.exists():
        _create_keyring(path)
    return read_keyring(path)


def read_keyring(path: Path) -> Keyring:
    """Reads keys as load_keyring does, from a file that must be there.

    Raises:
        KeyringError: a line is not a key, an id is repeated, or the file has no key.
        OSError: the file cannot be read.
    """
    keys: dict[str, bytes] = {}
    for line in path.read_text().splitlines():
        match = re.fullmatch(r"([A-Za-z0-9_-]{1,64}):((?:[0-9a-f]{2})+)", line)
        if match is None or match[1] in keys or len(match[2]) < 2 * _MIN_SECRET_BYTES:
            raise KeyringError(
                f"{path}: each line must be key_id:hex, with another id each, and {_MIN_SECRET_BYTES} bytes at least"
            )
        keys[match[1]] = bytes.fromhex(match[2])
    if not keys:
        raise KeyringError(f"{path} has no key")
    return Keyring(next(iter(keys)), keys)


def _create_keyring(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(f".{path.name}.{secrets.token_hex(8)}")
    file = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    try:
        os.write(file, f"{secrets.token_hex(4)}:{secrets.token_hex(_MIN_SECRET_BYTES)}\n".encode())
        os.fsync(file)
        # A link never replaces a file: of several processes one wins, and none reads half a file.
        path.hardlink_to(draft)
        fsync(path.parent)
    except FileExistsError:
        pass
    finally:
        os.close(file)
        draft.unlink()


def _parse(payload: str) -> FeedbackClaims:
    try:
        claims = FeedbackClaims.FromString(base64.urlsafe_b64decode(payload + "=" * (-len(payload) % 4)))
        claims.expire_time.ToDatetime()
    except (ValueError, DecodeError, OverflowError) as error:
        raise TokenError(TokenReason.MALFORMED) from error
    return claims


def _signature(payload: str, secret: bytes) -> str:
    return _encode(hmac.digest(secret, _PURPOSE + payload.encode(), hashlib.sha256))


def _encode(data: bytes) -> str:
    return base64.urlsafe_b64encode(data).rstrip(b"=").decode()
