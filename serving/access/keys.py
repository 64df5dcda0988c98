"""API keys: whom a server lets in, and for what. Their file has digests alone, so whoever reads it can use none.

A key is 256 random bits, so that a plain SHA-256 of it can be neither guessed nor tried. All replicas read one file; a
replica reads it again when it has changed.
"""

import dataclasses
import fcntl
import hashlib
import hmac
import json
import logging
import re
import secrets
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from feedback.durable import make_private, replace_file_by

logger = logging.getLogger(__name__)

SCOPES = ("sample", "feedback", "operate", "train")
_PREFIX = "alignd"
_KEY = re.compile(rf"{_PREFIX}_([0-9a-f]{{12}})_[A-Za-z0-9_-]{{43}}")
_NAME = re.compile(r"[a-z0-9][a-z0-9-]{0,63}")


class KeysError(Exception):
    """The file of keys, or what is to be done with it, is wrong. The text says what, and never contains a key."""


@dataclass(frozen=True)
class ApiKey:
    """What is kept of a key."""

    key_id: str
    """The part of the key that is no secret."""
    name: str
    application: str
    """Whose users its user ids are. Empty for the application without a name."""
    scopes: tuple[str, ...]
    digest: str = field(repr=False)
    """SHA-256 of the whole key, in hexadecimal."""
    created_at: datetime
    created_by: str
    """The operating system's user who made it."""
    expires_at: datetime | None = None
    revoked_at: datetime | None = None
    revoked_by: str = ""
    replaces: str = ""
    """The id of the key that it was made in place of, by a rotation."""

    def state(self, now: datetime) -> str:
        """Returns "active", "expired" or "revoked"."""
        if self.revoked_at:
            return "revoked"
        return "expired" if self.expires_at and self.expires_at <= now else "active"


def find(keys: Sequence[ApiKey], secret: str) -> ApiKey | None:
    """Returns what is kept of a key that a caller sent, or None if it is none of ours. It may be expired or revoked."""
    match = _KEY.fullmatch(secret)
    digest = _digest(secret)
    for key in keys:
        if match and key.key_id == match[1] and hmac.compare_digest(key.digest, digest):
            return key
    return None


def read_keys(path: Path) -> list[ApiKey]:
    """Returns the keys of a file, the oldest first; none if there is no file.

    Raises:
        KeysError: it is no file of keys.
        OSError: it cannot be read.
    """
    try:
        rows = json.loads(path.read_bytes())["keys"]
        return [_from_row(row) for row in rows]
    except FileNotFoundError:
        return []
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise KeysError(f"{path} is no file of API keys: {error!r}") from error


def create_key(
    path: Path,
    name: str,
    application: str,
    scopes: Sequence[str],
    actor: str,
    lifetime: timedelta | None = None,
) -> tuple[ApiKey, str]:
    """Adds a key to the file, and returns it with its secret, which is kept nowhere.

    Raises:
        KeysError: a name or scope is not allowed, an active key has this name, or the file is no file of keys.
        OSError: the file cannot be read or written.
    """
    for value, what in ((name, "a name"), (application, "an application")):
        if not _NAME.fullmatch(value) and (value or what == "a name"):
            raise KeysError(f"{value!r} is not {what}: 1 to 64 of a-z, 0-9 and -, and no - first")
    unknown = sorted(set(scopes) - set(SCOPES))
    if unknown or not scopes:
        raise KeysError(f"{', '.join(unknown) or 'no scope'}: a key has one or more of {', '.join(SCOPES)}")
    now = datetime.now(UTC)
    with _changing(path) as keys:
        if any(key.name == name and key.state(now) == "active" for key in keys):
            raise KeysError(f"there is an active key {name}: rotate or revoke it, or choose another name")
        made, secret = _new(name, application, tuple(s for s in SCOPES if s in scopes), actor, now, lifetime)
        keys.append(made)
    return made, secret


def revoke_key(path: Path, name: str, actor: str) -> list[ApiKey]:
    """Revokes every active key of this name or id, and returns them as they are now.

    Raises:
        KeysError: there is none, or the file is no file of keys.
        OSError: the file cannot be read or written.
    """
    now = datetime.now(UTC)
    _check_some(path, name)
    with _changing(path) as keys:
        places = _active(keys, name, now)
        for place in places:
            keys[place] = dataclasses.replace(keys[place], revoked_at=now, revoked_by=actor)
        return [keys[place] for place in places]


def rotate_key(path: Path, name: str, actor: str, overlap: timedelta) -> tuple[ApiKey, str]:
    """Makes a new key like the active one of this name; that one expires after `overlap`, or before if it was to.

    Returns the new key and its secret. It lives as long as the old one was made for.

    Raises:
        KeysError: there is none, or the file is no file of keys.
        OSError: the file cannot be read or written.
    """
    now = datetime.now(UTC)
    _check_some(path, name)
    with _changing(path) as keys:
        old = keys[_active(keys, name, now)[-1]]
        lifetime = old.expires_at - old.created_at if old.expires_at else None
        for place in _active(keys, name, now):
            last = min(filter(None, (keys[place].expires_at, now + overlap)))
            keys[place] = dataclasses.replace(keys[place], expires_at=last)
        made, secret = _new(old.name, old.application, old.scopes, actor, now, lifetime)
        made = dataclasses.replace(made, replaces=old.key_id)
        keys.append(made)
    return made, secret


class KeysFile:
    """The keys of a file as they are now. Reading them costs a look at the file's date."""

    def __init__(self, path: Path) -> None:
        """Reads the file.

        Raises:
            KeysError: it is no file of keys.
            OSError: it cannot be read.
        """
        self.path = path
        self._version = _version(path)
        self._keys = read_keys(path)
        self._said = ""

    def now(self) -> list[ApiKey]:
        """Returns the keys of now; those of before where the file cannot be read, or is away, for the moment."""
        try:
            version = _version(self.path)
            if version != self._version and version is not None:
                self._keys = read_keys(self.path)
                self._version, self._said = version, ""
        except (KeysError, OSError) as error:
            # It is read again at the next look: a passing error must not keep a revoked key alive. It is said once.
            if str(error) != self._said:
                self._said = str(error)
                logger.warning("the API keys cannot be read again, those of before are used: %s", error)
        return self._keys


def _check_some(path: Path, name: str) -> None:
    """Checks that there is a file of keys, whose folder may not be there either."""
    if not path.exists():
        raise KeysError(f"there is no active key {name}")


def _active(keys: Sequence[ApiKey], name: str, now: datetime) -> list[int]:
    places = [i for i, key in enumerate(keys) if name in (key.name, key.key_id) and key.state(now) == "active"]
    if not places:
        raise KeysError(f"there is no active key {name}")
    return places


def _new(
    name: str, application: str, scopes: tuple[str, ...], actor: str, now: datetime, lifetime: timedelta | None
) -> tuple[ApiKey, str]:
    key_id = secrets.token_hex(6)
    secret = f"{_PREFIX}_{key_id}_{secrets.token_urlsafe(32)}"
    expires_at = now + lifetime if lifetime is not None else None
    return ApiKey(key_id, name, application, scopes, _digest(secret), now, actor, expires_at), secret


@contextmanager
def _changing(path: Path) -> Iterator[list[ApiKey]]:
    """Yields the file's keys, and writes what has become of them. Only one process at a time may be here."""
    # Behind a link, or that would be replaced by a file of its own.
    path = path.resolve()
    lock = path.with_name(f"{path.name}.lock")
    make_private(lock, create=True)
    with lock.open("r+") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        keys = read_keys(path)
        yield keys
        text = json.dumps({"keys": [_to_row(key) for key in keys]}, indent=2) + "\n"
        replace_file_by(path, lambda draft: _write_privately(draft, text))


def _write_privately(draft: Path, text: str) -> None:
    make_private(draft, create=True)
    draft.write_text(text)


def _digest(secret: str) -> str:
    return hashlib.sha256(secret.encode(errors="replace")).hexdigest()


def _version(path: Path) -> tuple[int, int, int] | None:
    try:
        found = path.stat()
    except FileNotFoundError:
        return None
    return found.st_ino, found.st_mtime_ns, found.st_size


def _to_row(key: ApiKey) -> dict[str, Any]:
    row = dataclasses.asdict(key)
    return {name: value.isoformat() if isinstance(value, datetime) else value for name, value in row.items()}


def _from_row(row: dict[str, Any]) -> ApiKey:
    times = {n: datetime.fromisoformat(row[n]) for n in ("created_at", "expires_at", "revoked_at") if row.get(n)}
    if any(time.tzinfo is None for time in times.values()):
        raise ValueError("a time without a time zone")
    return ApiKey(**{**row, **times, "scopes": tuple(row["scopes"])})
