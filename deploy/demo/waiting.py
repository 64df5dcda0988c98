"""Waits for the processes of the demo, but no longer than they live."""

import asyncio
import contextlib
import subprocess
import time
from collections.abc import Awaitable
from pathlib import Path
from typing import Any, TypeVar

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from deploy.demo.progress import Bar
from deploy.endings import cause
from policies.server_connection import ServerConnection

START_TIMEOUT_SECONDS = 300.0
POLL_SECONDS = 0.5
T = TypeVar("T")


class DemoError(Exception):
    """The demo failed; the message says why."""


async def until_ended(supervisor: subprocess.Popen[bytes], log: Path) -> None:
    """Waits until `alignd up` has ended.

    Raises:
        DemoError: always, with the cause from its log.
    """
    while supervisor.poll() is None:
        await asyncio.sleep(POLL_SECONDS)
    raise DemoError(cause(log))


async def beside(other: asyncio.Task[None], work: Awaitable[T]) -> T:
    """Returns the result of `work`; cancels it if `other` fails first.

    Raises:
        Exception: what `work` or `other` raised.
    """
    working = asyncio.ensure_future(work)
    await asyncio.wait({working, other}, return_when=asyncio.FIRST_COMPLETED)
    if other.done() and not working.done():
        working.cancel()
        other.result()
    return await working


async def until_serving(server: ServerConnection, log: Path, bar: Bar) -> None:
    """Waits for the health of the server that writes to `log`.

    Raises:
        DemoError: the server was not ready in START_TIMEOUT_SECONDS.
    """
    started = time.monotonic()
    async with server.async_channel() as channel:
        health: Any = health_pb2_grpc.HealthStub(channel)
        while time.monotonic() - started < START_TIMEOUT_SECONDS:
            with contextlib.suppress(grpc.aio.AioRpcError):
                response = await health.Check(health_pb2.HealthCheckRequest(), timeout=POLL_SECONDS)
                if response.status == health_pb2.HealthCheckResponse.SERVING:
                    return
            bar.update(time.monotonic() - started, None, "loading vLLM")
            await asyncio.sleep(POLL_SECONDS)
    raise DemoError(f"the server was not ready in {START_TIMEOUT_SECONDS:.0f} s; the end of its log: {cause(log)}")
