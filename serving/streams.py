"""Ends the streams of gRPC's own services at a stop: health.Watch and reflection never end, and would hold it up."""

import asyncio
import inspect
from collections.abc import Awaitable, Callable
from typing import Any

import grpc

# In which a watch can still send that the server no longer serves.
_LAST_WORDS_SECONDS = 0.2


class EndsStreams(grpc.aio.ServerInterceptor):
    """Wraps every streaming method that is not of alignd.v1, whose streams end by themselves."""

    def __init__(self) -> None:
        self._stopped = asyncio.Event()

    async def end(self) -> None:
        """Ends every stream, after it could say a last word."""
        await asyncio.sleep(_LAST_WORDS_SECONDS)
        self._stopped.set()

    async def intercept_service(
        self, continuation: Callable[[grpc.HandlerCallDetails], Awaitable[Any]], handler_call_details: Any
    ) -> Any:
        """Returns the method's handler, wrapped."""
        handler = await continuation(handler_call_details)
        if handler is None or not handler.response_streaming or handler_call_details.method.startswith("/alignd.v1."):
            return handler
        make = (
            grpc.stream_stream_rpc_method_handler if handler.request_streaming else grpc.unary_stream_rpc_method_handler
        )
        method = handler.stream_stream if handler.request_streaming else handler.unary_stream
        return make(self._ending(method), handler.request_deserializer, handler.response_serializer)

    def _ending(self, method: Callable[..., Any]) -> Callable[..., Awaitable[None]]:
        async def handle(request: Any, context: Any) -> None:
            working = asyncio.ensure_future(_send_all(method(request, context), context))
            stopping = asyncio.ensure_future(self._stopped.wait())
            try:
                await asyncio.wait({working, stopping}, return_when=asyncio.FIRST_COMPLETED)
                if working.done():
                    await working
                else:
                    await context.abort(grpc.StatusCode.UNAVAILABLE, "the server is stopping")
            finally:
                for task in (working, stopping):
                    task.cancel()

        return handle


async def _send_all(answers: Any, context: Any) -> None:
    """Sends what a method answers; one that is no generator sends it by itself."""
    if inspect.isasyncgen(answers):
        async for answer in answers:
            await context.write(answer)
    else:
        await answers
