"""The first interceptor: lets a call in if its key may make it, and tells the handler who calls."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import grpc

from serving.access.callers import check, let_in
from serving.access.keys import KeysFile
from serving.calls import note, refuse
from serving.errors import Refusal

# Calls that last until the caller ends them.
_ENDLESS = "PolicyService/Watch"
_LOOK_AGAIN_SECONDS = 1.0


class Door(grpc.aio.ServerInterceptor):
    """Stands before every method of the server, those of other packages too."""

    def __init__(self, keys: KeysFile, *, needs_key: bool) -> None:
        self._keys = keys
        self._needs_key = needs_key

    async def intercept_service(
        self, continuation: Callable[[grpc.HandlerCallDetails], Awaitable[Any]], handler_call_details: Any
    ) -> Any:
        """Returns the method's handler, or one that refuses the call."""
        handler = await continuation(handler_call_details)
        if handler is None:
            return None
        method, metadata = handler_call_details.method, dict(handler_call_details.invocation_metadata)

        def look() -> None:
            # The handler runs in this task, after this.
            found = check(method, metadata, self._keys.now, needs_key=self._needs_key)
            let_in(found)
            note(key=found.name, application=found.application)

        try:
            look()
        except Refusal as refusal:
            return _refusing(handler, refusal)
        if method.endswith(_ENDLESS):
            return grpc.unary_stream_rpc_method_handler(
                _looking_again(handler.unary_stream, look), handler.request_deserializer, handler.response_serializer
            )
        return handler


def _looking_again(method: Callable[..., AsyncIterator[Any]], look: Callable[[], None]) -> Callable[..., Any]:
    """Returns a stream without end that ends soon after its caller's key does."""

    async def handle(request: Any, context: Any) -> AsyncIterator[Any]:
        answers = aiter(method(request, context))
        coming = asyncio.ensure_future(anext(answers))
        try:
            while True:
                await asyncio.wait({coming}, timeout=_LOOK_AGAIN_SECONDS)
                look()
                if coming.done():
                    yield coming.result()
                    coming = asyncio.ensure_future(anext(answers))
        except StopAsyncIteration:
            return
        except Refusal as refusal:
            await refuse(context, refusal)
        finally:
            coming.cancel()
            await asyncio.wait({coming})

    return handle


def _refusing(handler: Any, refusal: Refusal) -> Any:
    """Returns a handler of the same kind that refuses each call."""

    async def answer(request: Any, context: Any) -> Any:
        await refuse(context, refusal)

    async def stream(request: Any, context: Any) -> AsyncIterator[Any]:
        await refuse(context, refusal)
        yield  # makes this a stream, which never gets here

    if handler.response_streaming:
        make = (
            grpc.stream_stream_rpc_method_handler if handler.request_streaming else grpc.unary_stream_rpc_method_handler
        )
        return make(stream, None, handler.response_serializer)
    make = grpc.stream_unary_rpc_method_handler if handler.request_streaming else grpc.unary_unary_rpc_method_handler
    return make(answer, None, handler.response_serializer)
