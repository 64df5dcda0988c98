"""Errors in OpenAI's shape: what the server refused, and what of a body is wrong, with the parameter at fault."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import grpc
from starlette.responses import JSONResponse

from alignd.client import read_error

_STATUS = {
    grpc.StatusCode.INVALID_ARGUMENT: 400,
    grpc.StatusCode.FAILED_PRECONDITION: 400,
    grpc.StatusCode.UNAUTHENTICATED: 401,
    grpc.StatusCode.PERMISSION_DENIED: 403,
    grpc.StatusCode.NOT_FOUND: 404,
    grpc.StatusCode.ALREADY_EXISTS: 409,
    grpc.StatusCode.ABORTED: 409,
    grpc.StatusCode.RESOURCE_EXHAUSTED: 429,
    grpc.StatusCode.UNAVAILABLE: 503,
    grpc.StatusCode.DEADLINE_EXCEEDED: 504,
}
_TYPES = {401: "authentication_error", 403: "permission_error", 404: "not_found_error", 429: "rate_limit_error"}
# How fields of the gRPC contract are called here.
_PARAMS = (
    (re.compile(r"^prompt\.chat(\.messages)?"), "messages"),
    (re.compile(r"^prompt\.text$"), "prompt"),
    (re.compile(r"^sampling\.structured\.json_schema$|^sampling\.structured$"), "response_format"),
    (re.compile(r"^sampling\.structured\.regex$"), "regex"),
    (re.compile(r"^sampling\."), ""),
    (re.compile(r"^num_completions$"), "n"),
    (re.compile(r"^user_id$"), "user"),
    (re.compile(r"^policy$"), "model"),
    (re.compile(r"^groups(\[\d+\])\.completion_ids"), r"ranking\1"),
    (re.compile(r"^groups"), "ranking"),
    (re.compile(r"^shown_completion_ids"), "shown"),
)


def error(
    status: int,
    message: str,
    code: str | None = None,
    param: str | None = None,
    headers: Mapping[str, str] | None = None,
) -> JSONResponse:
    """Returns an error in OpenAI's shape."""
    kind = _TYPES.get(status, "invalid_request_error" if status < 500 else "server_error")
    content = {"error": {"message": message, "type": kind, "param": param, "code": code}}
    return JSONResponse(content, status, headers)


def refused(failed: grpc.aio.AioRpcError, names: Mapping[str, str]) -> JSONResponse:
    """Returns the answer to a call that the server refused, or did not answer.

    `names` are those of the contract's fields that this request calls otherwise than most.
    """
    status, content, headers = explained(failed, names)
    return JSONResponse(content, status, headers)


def explained(failed: grpc.aio.AioRpcError, names: Mapping[str, str]) -> tuple[int, dict[str, Any], dict[str, str]]:
    """Returns the status, body and headers of such an answer."""
    found = read_error(failed)
    status = _STATUS.get(found.code, 500)
    if status == 503 and not found.reason:
        # What gRPC itself says of a connection names addresses behind the gateway.
        return 503, {"error": {"message": "the server does not answer", "type": "server_error", "param": None,
                               "code": "unreachable"}}, {"Retry-After": "5"}  # fmt: skip
    field = found.violations[0].field if found.violations else None
    said = "; ".join(f"{_param(each.field, names)}: {each.description}" for each in found.violations) or found.message
    headers: dict[str, str] = {}
    if status == 401:
        headers["WWW-Authenticate"] = "Bearer"
    if found.retry_after_seconds is not None and status in (429, 503):
        headers["Retry-After"] = str(max(1, round(found.retry_after_seconds)))
    kind = _TYPES.get(status, "invalid_request_error" if status < 500 else "server_error")
    code = found.reason.lower() or None
    return status, {"error": {"message": said, "type": kind, "param": _param(field, names), "code": code}}, headers


def invalid(errors: Sequence[Mapping[str, Any]]) -> JSONResponse:
    """Returns the answer to a body that is not what its route takes."""
    first = errors[0]
    param = _path(first["loc"][1:])
    if first["type"] == "extra_forbidden":
        return error(400, f"{param} is not supported", "unsupported_parameter", param)
    if first["type"] == "json_invalid":
        return error(400, "the body is not JSON", "invalid_json")
    message = f"{param}: {first['msg']}" if param else str(first["msg"])
    return error(400, message, "invalid_parameter", param or None)


def _param(field: str | None, names: Mapping[str, str]) -> str | None:
    if field is not None and field in names:
        return names[field]
    for pattern, name in _PARAMS:
        if field and pattern.search(field):
            return pattern.sub(name, field)
    return field


def _path(parts: Sequence[int | str]) -> str:
    """Returns where in a body something is: messages[0].content."""
    # Of a field of several types, pydantic names the type that it tried too.
    named = [part for part in parts if isinstance(part, int) or "[" not in part]
    path = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in named).lstrip(".")
    return re.sub(r"\.(str|int|float|bool|list|dict)\b", "", path)
