"""The outermost interceptor: gives each call its request id, sends that back, and logs in one line how the call ended.

A line names the method, status, reason, key, application and sample. What users and policies wrote is only in it if
`serving.log_content` is set, and keys and tokens never are.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any, NoReturn

import grpc

from serving.errors import Refusal, trailing_metadata
from serving.faults import told
from serving.request_id import REQUEST_ID, begin_request, request_id

logger = logging.getLogger(__name__)

_OURS = "/alignd.v1."
_BY_NUMBER = {code.value[0]: code.name for code in grpc.StatusCode}


@dataclass
class _Line:
    """What the log will say of a call."""

    method: str
    logs_content: bool
    began: float = field(default_factory=time.monotonic)
    values: dict[str, Any] = field(default_factory=dict)


_line: ContextVar[_Line | None] = ContextVar("line", default=None)


def note(**values: Any) -> None:
    """Adds values to the line of the call that this task answers."""
    line = _line.get()
    if line:
        line.values.update(values)


def note_content(**values: Any) -> None:
    """Adds what users or policies wrote, if the log may have it."""
    line = _line.get()
    if line and line.logs_content:
        line.values.update(values)


async def refuse(context: Any, refusal: Refusal) -> NoReturn:
    """Ends the call with a refusal. It always raises, as gRPC's abort does."""
    note(reason=refusal.reason)
    metadata = (*trailing_metadata(refusal, context.time_remaining()), (REQUEST_ID, request_id()))
    await context.abort(refusal.code, refusal.message, metadata)
    raise AssertionError("abort raises")


def log_fault(error: Exception) -> None:
    """Logs an error that the call should not have met: where, and of what kind.

    Its text may quote users, and is left out unless the log may have that.
    """
    line = _line.get()
    method = line.method if line else "a call"
    if line and line.logs_content:
        logger.error("%s failed", method, exc_info=error)
    else:
        logger.error("%s failed:\n%s", method, told(error))


class CallLog(grpc.aio.ServerInterceptor):
    """Stands before all other interceptors. Health and reflection are not logged."""

    def __init__(self, *, logs_content: bool) -> None:
        self._logs_content = logs_content

    async def intercept_service(
        self, continuation: Callable[[grpc.HandlerCallDetails], Awaitable[Any]], handler_call_details: Any
    ) -> Any:
        """Returns the method's handler, which sends the request id and logs its end."""
        method = handler_call_details.method
        begin_request(dict(handler_call_details.invocation_metadata).get(REQUEST_ID))
        # The handler runs in this task, after this.
        _line.set(_Line(method.removeprefix(_OURS), self._logs_content))
        handler = await continuation(handler_call_details)
        if handler is None or not method.startswith(_OURS):
            return handler
        make, handle = (
            (grpc.unary_stream_rpc_method_handler, _logged_stream(handler.unary_stream))
            if handler.response_streaming
            else (grpc.unary_unary_rpc_method_handler, _logged(handler.unary_unary))
        )
        return make(handle, handler.request_deserializer, handler.response_serializer)


def _logged(method: Callable[..., Awaitable[Any]]) -> Callable[..., Any]:
    async def handle(request: Any, context: Any) -> Any:
        context.set_trailing_metadata(((REQUEST_ID, request_id()),))
        try:
            answer = await method(request, context)
        except BaseException as error:
            _log_end(context, error)
            raise
        _log_end(context, None)
        return answer

    return handle


def _logged_stream(method: Callable[..., AsyncIterator[Any]]) -> Callable[..., Any]:
    async def handle(request: Any, context: Any) -> AsyncIterator[Any]:
        context.set_trailing_metadata(((REQUEST_ID, request_id()),))
        try:
            async for answer in method(request, context):
                yield answer
        except BaseException as error:
            _log_end(context, error)
            raise
        _log_end(context, None)

    return handle


def _log_end(context: Any, error: BaseException | None) -> None:
    line = _line.get()
    if line is None:
        return
    gone = isinstance(error, asyncio.CancelledError | GeneratorExit)
    code = "CANCELLED" if gone else _BY_NUMBER.get(_number(context.code()), "UNKNOWN")
    seconds = round(time.monotonic() - line.began, 4)
    values = {name: value for name, value in line.values.items() if value not in ("", None)}
    shown = "".join(f" {name}={value}" for name, value in values.items())
    logger.info(
        "%s %s in %.3f s request_id=%s%s", line.method, code, seconds, request_id(), shown,
        extra={"method": line.method, "code": code, "seconds": seconds, **values},
    )  # fmt: skip


def _number(code: Any) -> int:
    """Returns a status code as a number: gRPC gives what was set, of either type; 0 if nothing was."""
    if isinstance(code, grpc.StatusCode):
        return int(code.value[0])
    return int(code or 0)
