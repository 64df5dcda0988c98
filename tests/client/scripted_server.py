"""A real gRPC server, with the boundary of alignd, whose answers a test writes beforehand."""

import asyncio
import threading
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import grpc
from google.protobuf.message import Message

from alignd.v1 import (
    feedback_service_pb2,
    feedback_service_pb2_grpc,
    inference_service_pb2,
    inference_service_pb2_grpc,
)
from serving.boundary import Boundary
from serving.errors import Refusal

SAMPLE = inference_service_pb2.SampleResponse(sample_id="s", feedback_token="t")
STREAM = (
    inference_service_pb2.StreamSampleResponse(started=inference_service_pb2.SampleStarted(sample_id="s")),
    inference_service_pb2.StreamSampleResponse(
        deltas=inference_service_pb2.CompletionDeltas(
            deltas=[inference_service_pb2.CompletionDelta(index=0, text=text) for text in ("a", "b")]
        )
    ),
    inference_service_pb2.StreamSampleResponse(finished=SAMPLE),
)


@dataclass
class Script:
    """What the server does, and what it saw."""

    refusals: list[Refusal] = field(default_factory=list)
    """What it answers the first calls, one each, before it serves."""
    hangs: bool = False
    """Whether a call it serves never ends: a stream, after its first events."""
    stream: tuple[inference_service_pb2.StreamSampleResponse, ...] = STREAM
    breaks_off: Refusal | None = None
    """What it ends a stream with after its events."""
    requests: list[Message] = field(default_factory=list)
    metadata: list[dict[str, Any]] = field(default_factory=list)
    times: list[float] = field(default_factory=list)
    """When each call came, by the monotonic clock, in seconds."""
    cancelled: threading.Event = field(default_factory=threading.Event)

    @property
    def waits(self) -> list[float]:
        """Seconds from each call to the next."""
        return [later - earlier for earlier, later in zip(self.times, self.times[1:], strict=False)]

    async def take(self, request: Message, context: Any) -> None:
        """Notes a call, and refuses it if the script says so."""
        self.times.append(time.monotonic())
        self.requests.append(request)
        self.metadata.append(dict(context.invocation_metadata()))
        if self.refusals:
            raise self.refusals.pop(0)

    async def hang(self) -> None:
        """Waits for the caller to leave, if the script says so."""
        if self.hangs:
            try:
                await asyncio.Event().wait()
            finally:
                self.cancelled.set()


class Inference(inference_service_pb2_grpc.InferenceServiceServicer):
    """Answers by the script."""

    def __init__(self, script: Script) -> None:
        self.script = script

    async def Sample(self, request: Message, context: Any) -> inference_service_pb2.SampleResponse:  # noqa: N802
        await self.script.take(request, context)
        await self.script.hang()
        return SAMPLE

    async def StreamSample(  # noqa: N802
        self, request: Message, context: Any
    ) -> AsyncIterator[inference_service_pb2.StreamSampleResponse]:
        await self.script.take(request, context)
        for event in self.script.stream:
            yield event
            if event.HasField("deltas"):
                await self.script.hang()
        if self.script.breaks_off:
            raise self.script.breaks_off


class Feedback(feedback_service_pb2_grpc.FeedbackServiceServicer):
    """Answers by the script."""

    def __init__(self, script: Script) -> None:
        self.script = script

    async def SubmitRanking(self, request: Message, context: Any) -> Message:  # noqa: N802
        await self.script.take(request, context)
        return feedback_service_pb2.SubmitRankingResponse(ranking_id="r")

    async def SubmitDemonstration(self, request: Message, context: Any) -> Message:  # noqa: N802
        await self.script.take(request, context)
        return feedback_service_pb2.SubmitDemonstrationResponse(demonstration_id="d")


@contextmanager
def serving(script: Script, port: int = 0, credentials: grpc.ServerCredentials | None = None) -> Iterator[str]:
    """Runs the server on an event loop of its own, and yields its address."""
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever)
    thread.start()

    async def start() -> tuple[grpc.aio.Server, int]:
        server = grpc.aio.server(
            interceptors=[Boundary(stall_seconds=30.0, check_first={})],
            options=[("grpc.max_receive_message_length", 1 << 20)],
        )
        inference_service_pb2_grpc.add_InferenceServiceServicer_to_server(Inference(script), server)
        feedback_service_pb2_grpc.add_FeedbackServiceServicer_to_server(Feedback(script), server)
        address = f"127.0.0.1:{port}"
        bound = server.add_secure_port(address, credentials) if credentials else server.add_insecure_port(address)
        await server.start()
        return server, bound

    server, bound = asyncio.run_coroutine_threadsafe(start(), loop).result(10)
    try:
        yield f"localhost:{bound}"
    finally:
        asyncio.run_coroutine_threadsafe(server.stop(0), loop).result(10)
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        loop.close()
