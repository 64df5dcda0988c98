"""The edge of the server: every request is parsed and validated here, and every exception becomes a status.

Requests are parsed here and not by grpc, so that bytes that are no message are refused like any other bad field.
"""

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Mapping
from typing import Any

import grpc
from google.protobuf import descriptor_pool, message_factory
from google.protobuf.message import DecodeError, Message

from alignd.client.rules import broken_rules
from serving import wire
from serving.calls import log_fault, refuse
from serving.errors import Refusal, Violation, bad_field, bad_fields

# Of a request with more fields, the first fault is named and the others are not looked for.
_MOST_FIELDS_FOR_ALL_FAULTS = 500

CheckFirst = Callable[[Any], None]
"""What a service checks of a request before its rules. Raises Refusal."""


class Boundary(grpc.aio.ServerInterceptor):
    """Wraps every method of alignd.v1; health and reflection pass through."""

    def __init__(self, stall_seconds: float, check_first: Mapping[str, CheckFirst]) -> None:
        """Prepares to wrap.

        Args:
            stall_seconds: how long a client may leave a stream unread.
            check_first: by the full name of a service, what is checked of its requests before the contract's rules.
        """
        self._stall_seconds = stall_seconds
        self._check_first = check_first

    async def intercept_service(
        self, continuation: Callable[[grpc.HandlerCallDetails], Awaitable[Any]], handler_call_details: Any
    ) -> Any:
        """Returns the method's handler, wrapped."""
        handler = await continuation(handler_call_details)
        if handler is None or not handler_call_details.method.startswith("/alignd.v1."):
            return handler
        message_class = request_class(handler_call_details.method)
        check_first = self._check_first.get(handler_call_details.method.split("/")[1])
        if handler.response_streaming:
            return grpc.unary_stream_rpc_method_handler(
                _stream_boundary(handler.unary_stream, message_class, check_first, self._stall_seconds),
                None,
                handler.response_serializer,
            )
        return grpc.unary_unary_rpc_method_handler(
            _unary_boundary(handler.unary_unary, message_class, check_first), None, handler.response_serializer
        )


def request_class(method: str) -> type[Message]:
    """Returns the class of a method's request, for a path such as "/alignd.v1.PolicyService/Promote"."""
    name = method.lstrip("/").replace("/", ".")
    descriptor = descriptor_pool.Default().FindMethodByName(name).input_type
    return message_factory.GetMessageClass(descriptor)


def _unary_boundary(
    method: Callable[..., Awaitable[Message]], message_class: type[Message], check_first: CheckFirst | None
) -> Callable[..., Any]:
    """Returns `method` as a handler of raw bytes."""

    async def handle(raw: bytes, context: Any) -> Message:
        try:
            return await method(parse(raw, message_class, check_first), context)
        except Refusal as refusal:
            await refuse(context, refusal)
        except Exception as error:
            if _is_abort(error):
                raise
            log_fault(error)
            await refuse(context, _internal())

    return handle


def _stream_boundary(
    method: Callable[..., AsyncGenerator[Message, None]],
    message_class: type[Message],
    check_first: CheckFirst | None,
    stall_seconds: float,
) -> Callable[..., AsyncIterator[Message]]:
    """Returns a streaming `method` as a handler of raw bytes."""

    async def handle(raw: bytes, context: Any) -> AsyncIterator[Message]:
        try:
            responses = method(parse(raw, message_class, check_first), context)
            async for response in _until_stalled(responses, stall_seconds):
                yield response
        except Refusal as refusal:
            await refuse(context, refusal)
        except Exception as error:
            if _is_abort(error):
                raise
            log_fault(error)
            await refuse(context, _internal())

    return handle


async def _until_stalled(
    responses: AsyncGenerator[Message, None], stall_seconds: float
) -> AsyncGenerator[Message, None]:
    """Yields `responses`. What makes them is ended at once where the client reads nothing for `stall_seconds`.

    Raises:
        Refusal: ABORTED, as soon as such a client reads again; before that, gRPC could not tell it.
    """
    loop = asyncio.get_running_loop()
    ending: list[asyncio.Task[None]] = []
    async for response in responses:
        # The next response is asked for when the client, with what gRPC keeps for it, has room for it.
        stalled = loop.call_later(stall_seconds, lambda: ending.append(loop.create_task(responses.aclose())))
        try:
            yield response
        finally:
            stalled.cancel()
        if ending:
            why = f"the client read nothing for {stall_seconds:g} s; call again, and read the stream as it comes"
            raise Refusal(grpc.StatusCode.ABORTED, "STREAM_NOT_READ", why)


def _is_abort(error: Exception) -> bool:
    return isinstance(error, grpc.aio.AbortError | grpc.aio.UsageError)


def _internal() -> Refusal:
    """Returns the refusal for a failure of the server, without the error's text, which may quote another user."""
    return Refusal(grpc.StatusCode.INTERNAL, "INTERNAL", "the server failed; its log says why")


def parse(raw: bytes, message_class: type[Message], check_first: CheckFirst | None = None) -> Message:
    """Returns the request that was serialised as `raw`.

    What costs little is checked first: how much there is of what is repeated, and what `check_first` checks.

    Raises:
        Refusal: INVALID_ARGUMENT, naming the fields that break a rule of the contract, or what `check_first` raises.
    """
    descriptor = message_class.DESCRIPTOR
    try:
        num_fields = wire.count(raw, descriptor)
        message = message_class.FromString(raw)
    except wire.TooManyError as error:
        raise bad_field(error.field, error.description) from None
    except (wire.WireError, DecodeError):
        field = wire.find_invalid_utf8(raw, descriptor)
        if field:
            raise bad_field(field, "must be valid UTF-8") from None
        raise bad_field("request", f"is not a serialised {descriptor.full_name}") from None
    if check_first:
        check_first(message)
    violations = broken_rules(message, first_only=num_fields > _MOST_FIELDS_FOR_ALL_FAULTS)
    if violations:
        raise bad_fields([Violation(each.field, each.description) for each in violations])
    return message
