"""The gateway's channel to the server, opened anew when the certificates change by which the server is checked."""

from __future__ import annotations

import asyncio

import grpc

from policies.server_connection import ServerConnection

# Calls that use the channel of before end by then.
_GRACE_SECONDS = 300.0


class Channel:
    """One channel at a time. For one event loop."""

    def __init__(self, server: ServerConnection) -> None:
        self._server = server
        self._version: tuple[tuple[int, int], ...] = ()
        self._channel: grpc.aio.Channel | None = None
        self._closing: set[asyncio.Task[None]] = set()

    def open(self) -> grpc.aio.Channel:
        """Returns the channel of now.

        Raises:
            ServerConnectionError: a certificate cannot be read.
        """
        version = self._server.files_version()
        if self._channel is None or version != self._version:
            before, self._channel, self._version = self._channel, self._server.async_channel(), version
            if before:
                closing = asyncio.ensure_future(before.close(_GRACE_SECONDS))
                self._closing.add(closing)
                closing.add_done_callback(self._closing.discard)
        return self._channel

    async def close(self) -> None:
        """Ends the channel, and every call on it."""
        for each in self._closing:
            each.cancel()
        if self._channel:
            await self._channel.close()
