"""Who calls: the key that came with a call, whether it may, and what the call's handler learns of it."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

import grpc
from google.protobuf import descriptor_pool

from alignd.v1 import access_pb2
from serving.access.keys import ApiKey, find
from serving.errors import Refusal

_BEARER = "bearer "
_OURS = "/alignd.v1."
# Whoever watches whether the server is up has no key, and learns nothing else.
_OPEN = ("/grpc.health.v1.Health/Check",)


@dataclass(frozen=True)
class Caller:
    """Who calls."""

    name: str
    """The key's name; empty without a key."""
    application: str
    """Whose users are meant by user ids."""
    scopes: tuple[str, ...]


NOBODY = Caller("", "", ("sample", "feedback"))
"""Who calls without a key, where none is needed."""

# Who has not come through the door may do nothing.
_OUTSIDE = Caller("", "", ())
_caller: ContextVar[Caller] = ContextVar("caller", default=_OUTSIDE)


def caller() -> Caller:
    """Returns who made the call that this is the handler of."""
    return _caller.get()


def let_in(found: Caller) -> None:
    """Makes this the caller of the handler that runs after it in the same task."""
    _caller.set(found)


def scopes_of(method: str) -> tuple[str, ...] | None:
    """Returns the scopes of which a method, such as "/alignd.v1.PolicyService/Promote", needs one.

    Other packages' methods need any key, except for health, which needs none: that is None.
    """
    if method.startswith(_OPEN):
        return None
    if not method.startswith(_OURS):
        return ("sample", "feedback", "operate", "train")
    options: Any = descriptor_pool.Default().FindMethodByName(method.lstrip("/").replace("/", ".")).GetOptions()
    scopes: Iterable[access_pb2.Scope] = options.Extensions[access_pb2.scopes]
    return tuple(access_pb2.Scope.Name(scope).removeprefix("SCOPE_").lower() for scope in scopes)


def check(
    method: str, metadata: Mapping[str, str | bytes], keys: Callable[[], Sequence[ApiKey]], *, needs_key: bool
) -> Caller:
    """Returns who calls a method.

    Args:
        method: its path.
        metadata: what came with the call.
        keys: returns the keys there are.
        needs_key: whether callers without a key are refused.

    Raises:
        Refusal: UNAUTHENTICATED without a good key, PERMISSION_DENIED if it is not for this.
    """
    needed = scopes_of(method)
    if needed is None:
        return NOBODY
    given = metadata.get("authorization")
    found = _by_key(given, keys()) if given is not None else NOBODY
    if given is None and (needs_key or not set(needed) & set(NOBODY.scopes)):
        raise _unauthenticated("NO_API_KEY", "send an API key as the metadata `authorization: Bearer KEY`")
    if not set(needed) & set(found.scopes):
        wanted = " or ".join(needed) or "one that no key has"
        raise Refusal(
            grpc.StatusCode.PERMISSION_DENIED,
            "MISSING_SCOPE",
            f"{method.rpartition('/')[2]} needs a key with the scope {wanted}; {found.name} has "
            f"{', '.join(found.scopes)}",
            metadata={"needed": ",".join(needed), "key": found.name},
        )
    return found


def _by_key(given: str | bytes, keys: Sequence[ApiKey]) -> Caller:
    text = given.decode(errors="replace") if isinstance(given, bytes) else given
    if not text.lower().startswith(_BEARER):
        raise _unauthenticated("BAD_API_KEY", "the metadata `authorization` must be `Bearer KEY`")
    key = find(keys, text[len(_BEARER) :].strip())
    state = key.state(datetime.now(UTC)) if key else ""
    if key is None or state == "revoked":
        # Who tries keys learns no more of one that was revoked than of one that never was.
        raise _unauthenticated("BAD_API_KEY", "the API key is unknown or revoked")
    if state == "expired":
        raise _unauthenticated("API_KEY_EXPIRED", f"the API key {key.name} has expired")
    return Caller(key.name, key.application, key.scopes)


def _unauthenticated(reason: str, message: str) -> Refusal:
    return Refusal(grpc.StatusCode.UNAUTHENTICATED, reason, message)
