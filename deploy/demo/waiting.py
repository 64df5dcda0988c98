"""Waits for what comes of the processes, and no longer than they live."""

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

START_TIMEOUT_SECONDS = 300.0
POLL_SECONDS = 0.5
T = TypeVar("T")


class DemoError(Exception):
    """The demo cannot go on; the message says what to look at."""


async def until_ended(supervisor: subprocess.Popen[bytes], log: Path) -> None:
    """Raises DemoError, with its last words, once `alignd up` has ended."""
    while supervisor.poll() is None:
        await asyncio.sleep(POLL_SECONDS)
    raise DemoError(cause(log))


async def beside(other: asyncio.Task[None], work: Awaitable[T]) -> T:
    """Returns what `work` does. Raises at once, and does not wait for what will never come, if `other` fails first."""
    working = asyncio.ensure_future(work)
    await asyncio.wait({working, other}, return_when=asyncio.FIRST_COMPLETED)
    if other.done() and not working.done():
        working.cancel()
        other.result()
    return await working


async def until_serving(address: str, log: Path, bar: Bar) -> None:
    """Waits for the health of the server that writes to `log`.

    Raises:
        DemoError: that takes longer than anything that still makes progress.
    """
    started = time.monotonic()
    async with grpc.aio.insecure_channel(address) as channel:
        health: Any = health_pb2_grpc.HealthStub(channel)
        while time.monotonic() - started < START_TIMEOUT_SECONDS:
            with contextlib.suppress(grpc.aio.AioRpcError):
                response = await health.Check(health_pb2.HealthCheckRequest(), timeout=POLL_SECONDS)
                if response.status == health_pb2.HealthCheckResponse.SERVING:
                    return
            bar.update(time.monotonic() - started, None, "loading vLLM")
            await asyncio.sleep(POLL_SECONDS)
    raise DemoError(f"the server was not ready in {START_TIMEOUT_SECONDS:.0f} s; last it said: {cause(log)}")
