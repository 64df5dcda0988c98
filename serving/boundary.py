"""The edge of the server: every request is parsed and validated here, and every exception becomes a status.

Requests are parsed here and not by grpc, so that bytes that are no message are refused like any other bad field.
"""

import logging
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import grpc
from google.protobuf import descriptor_pool, empty_pb2, message_factory
from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.message import DecodeError, Message
from google.protobuf.unknown_fields import UnknownFieldSet

from alignd.client.rules import broken_rules
from serving.errors import Refusal, Violation, bad_field, bad_fields, trailing_metadata

logger = logging.getLogger(__name__)

_LENGTH_DELIMITED = 2


class Boundary(grpc.aio.ServerInterceptor):
    """Wraps every method of alignd.v1; health and reflection pass through."""

    async def intercept_service(
        self, continuation: Callable[[grpc.HandlerCallDetails], Awaitable[Any]], handler_call_details: Any
    ) -> Any:
        """Returns the method's handler, wrapped."""
        handler = await continuation(handler_call_details)
        if handler is None or not handler_call_details.method.startswith("/alignd.v1."):
            return handler
        message_class = request_class(handler_call_details.method)
        if handler.response_streaming:
            return grpc.unary_stream_rpc_method_handler(
                _stream_boundary(handler.unary_stream, message_class), None, handler.response_serializer
            )
        return grpc.unary_unary_rpc_method_handler(
            _unary_boundary(handler.unary_unary, message_class), None, handler.response_serializer
        )


def request_class(method: str) -> type[Message]:
    """Returns the class of a method's request, for a path such as "/alignd.v1.PolicyService/Promote"."""
    name = method.lstrip("/").replace("/", ".")
    descriptor = descriptor_pool.Default().FindMethodByName(name).input_type
    return message_factory.GetMessageClass(descriptor)


def _unary_boundary(method: Callable[..., Awaitable[Message]], message_class: type[Message]) -> Callable[..., Any]:
    """Returns `method` as a handler of raw bytes."""

    async def handle(raw: bytes, context: Any) -> Message:
        try:
            return await method(parse(raw, message_class), context)
        except Refusal as refusal:
            await _refuse(context, refusal)
        except Exception as error:
            if _is_abort(error):
                raise
            logger.exception("%s failed", message_class.__name__)
            await _refuse(context, _internal())
        raise AssertionError("refuse raises")

    return handle


def _stream_boundary(
    method: Callable[..., AsyncIterator[Message]], message_class: type[Message]
) -> Callable[..., AsyncIterator[Message]]:
    """Returns a streaming `method` as a handler of raw bytes."""

    async def handle(raw: bytes, context: Any) -> AsyncIterator[Message]:
        try:
            async for response in method(parse(raw, message_class), context):
                yield response
        except Refusal as refusal:
            await _refuse(context, refusal)
        except Exception as error:
            if _is_abort(error):
                raise
            logger.exception("%s failed", message_class.__name__)
            await _refuse(context, _internal())

    return handle


async def _refuse(context: Any, refusal: Refusal) -> None:
    """Answers a call with a refusal. It always raises, as gRPC's abort does."""
    await context.abort(refusal.code, refusal.message, trailing_metadata(refusal, context.time_remaining()))


def _is_abort(error: Exception) -> bool:
    return isinstance(error, grpc.aio.AbortError | grpc.aio.UsageError)


def _internal() -> Refusal:
    """Returns the refusal for a failure of the server, without the error's text, which may quote another user."""
    return Refusal(grpc.StatusCode.INTERNAL, "INTERNAL", "the server failed; its log says why")


def parse(raw: bytes, message_class: type[Message]) -> Message:
    """Returns the request that was serialised as `raw`.

    Raises:
        Refusal: INVALID_ARGUMENT, naming every field that breaks a rule of the contract.
    """
    try:
        message = message_class.FromString(raw)
    except DecodeError:
        field = _find_invalid_utf8(raw, message_class.DESCRIPTOR)
        if field:
            raise bad_field(field, "must be valid UTF-8") from None
        raise bad_field("request", f"is not a serialised {message_class.DESCRIPTOR.full_name}") from None
    violations = broken_rules(message)
    if violations:
        raise bad_fields([Violation(each.field, each.description) for each in violations])
    return message


def _find_invalid_utf8(raw: bytes, descriptor: Any) -> str:
    """Returns the path of the first string field in `raw` that is not UTF-8, or "" if none is found."""
    try:
        unknown: Any = UnknownFieldSet(empty_pb2.Empty.FromString(raw))
    except DecodeError:
        return ""
    for item in unknown:
        field = descriptor.fields_by_number.get(item.field_number)
        if field is None or item.wire_type != _LENGTH_DELIMITED:
            continue
        if field.type == FieldDescriptor.TYPE_STRING:
            try:
                item.data.decode("utf-8")
            except UnicodeDecodeError:
                return str(field.name)
        if field.type == FieldDescriptor.TYPE_MESSAGE and field.message_type is not None:
            inner = _find_invalid_utf8(item.data, field.message_type)
            if inner:
                return f"{field.name}.{inner}"
    return ""
