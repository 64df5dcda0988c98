"""Answers that take a while: they end when their caller goes away, and may come piece by piece."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Coroutine, Mapping
from typing import Any, TypeVar

import grpc
from fastapi import Request
from sse_starlette.sse import EventSourceResponse
from starlette.exceptions import HTTPException
from starlette.responses import Response

from serving.gateway import answers, errors
from serving.gateway.requests import ChatRequest, CompletionRequest

_T = TypeVar("_T")
_DONE = "[DONE]"
# What is sent while nothing is written, so that no proxy takes the stream for dead, in seconds.
_PING_SECONDS = 15


async def unless_gone(request: Request, call: Coroutine[Any, Any, _T] | Awaitable[_T]) -> _T:
    """Returns the answer to a call, which is cancelled if the caller goes away."""
    calling = asyncio.ensure_future(call)
    leaving = asyncio.ensure_future(_gone(request))
    try:
        await asyncio.wait({calling, leaving}, return_when=asyncio.FIRST_COMPLETED)
        if not calling.done():
            raise HTTPException(499, "the caller has gone")
        return calling.result()
    finally:
        for task in (calling, leaving):
            task.cancel()


async def _gone(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


async def stream(request: Request, body: ChatRequest | CompletionRequest, call: Any) -> Response:
    """Returns a stream of server-sent events. A call that is refused at once has its status and no stream."""
    events = aiter(call)
    try:
        first = await unless_gone(request, _first(events))
    except BaseException:
        call.cancel()
        raise

    async def chunks() -> AsyncIterator[dict[str, str]]:
        sample_id, spoken = "", set[int]()
        message = first
        try:
            while message is not None:
                if message.HasField("started"):
                    sample_id = message.started.sample_id
                for delta in message.deltas.deltas:
                    if delta.text:
                        yield _event(answers.text_chunk(body, sample_id, delta, first=delta.index not in spoken))
                        spoken.add(delta.index)
                if message.HasField("finished"):
                    for each in answers.last_chunks(body, message.finished):
                        yield _event(each)
                message = await anext(events, None)
            yield {"data": _DONE}
        except grpc.aio.AioRpcError as failed:
            # The status of the whole is sent already.
            yield _event(errors.explained(failed, request.state.names)[1])
        finally:
            call.cancel()

    return EventSourceResponse(chunks(), ping=_PING_SECONDS)


async def _first(events: AsyncIterator[_T]) -> _T | None:
    return await anext(events, None)


def _event(data: Mapping[str, Any]) -> dict[str, str]:
    return {"data": json.dumps(data, ensure_ascii=False)}
