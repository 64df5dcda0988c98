"""Both clients behind one face, so that a test of what they share is written once and run for each."""

import asyncio
from collections.abc import Callable
from typing import Any

from alignd.client import AsyncClient, Client

Call = Callable[..., Any]


def call_sync(address: str, method: str, *arguments: Any, client: dict[str, Any] | None = None, **named: Any) -> Any:
    """Calls a method of a new Client; a stream is read to its end."""
    with Client(address, **(client or {})) as connected:
        answer = getattr(connected, method)(*arguments, **named)
        return list(answer) if method == "stream" else answer


def call_async(address: str, method: str, *arguments: Any, client: dict[str, Any] | None = None, **named: Any) -> Any:
    """Calls a method of a new AsyncClient, on a new event loop."""

    async def call() -> Any:
        async with AsyncClient(address, **(client or {})) as connected:
            answer = getattr(connected, method)(*arguments, **named)
            return [each async for each in answer] if method == "stream" else await answer

    return asyncio.run(call())


CALLERS = {"Client": call_sync, "AsyncClient": call_async}
