"""Refuses a body that is too long before it is read to its end."""

from __future__ import annotations

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from serving.gateway.errors import error


class BodyLimit:
    """ASGI middleware that counts the bytes of each request's body."""

    def __init__(self, app: ASGIApp, max_bytes: int) -> None:
        self._app = app
        self._max_bytes = max_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Passes the request on as long as it is short enough."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        lengths = [value for name, value in scope["headers"] if name == b"content-length"]
        if lengths and lengths[0].isdigit() and int(lengths[0]) > self._max_bytes:
            await self._refuse(scope, receive, send)
            return
        read, began, too_long = 0, False, False

        async def counted() -> Message:
            nonlocal read, too_long
            message = await receive()
            read += len(message.get("body", b""))
            too_long = read > self._max_bytes
            # The rest is not read. Whatever the application answers then, this one answers in its place.
            return {"type": "http.disconnect"} if too_long else message

        async def noted(message: Message) -> None:
            nonlocal began
            if began or not too_long:
                began = True
                await send(message)

        await self._app(scope, counted, noted)
        if too_long and not began:
            await self._refuse(scope, receive, send)

    async def _refuse(self, scope: Scope, receive: Receive, send: Send) -> None:
        message = f"the body has more than {self._max_bytes} bytes"
        await error(413, message, "body_too_long", headers={"Connection": "close"})(scope, receive, send)
