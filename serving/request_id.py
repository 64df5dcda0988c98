"""The id of the request that is being answered: its caller may give one, gets it back, and finds it in the log."""

import re
import uuid
from contextvars import ContextVar

REQUEST_ID = "x-request-id"
"""The metadata key, and the HTTP header."""

_GOOD = re.compile(r"[\x21-\x7e]{1,128}")
_request_id: ContextVar[str] = ContextVar("request_id", default="")


def begin_request(given: str | bytes | None) -> str:
    """Makes the caller's id, or a new one where it gave none that can be used, the id of what this task does."""
    text = given if isinstance(given, str) else ""
    found = text if _GOOD.fullmatch(text) else uuid.uuid4().hex
    _request_id.set(found)
    return found


def request_id() -> str:
    """Returns the id of the request that this task answers; "" if it answers none."""
    return _request_id.get()
