"""Clients that do not read what is streamed to them: they hold up nobody, and learn what became of it."""

import asyncio
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import grpc
import pytest

from alignd.v1.inference_service_pb2 import SampleStarted, StreamSampleResponse
from alignd.v1.inference_service_pb2_grpc import InferenceServiceServicer, add_InferenceServiceServicer_to_server
from alignd.v1.types_pb2 import FINISH_REASON_STOP, FINISH_REASON_UNSPECIFIED
from serving.boundary import Boundary
from serving.config import ServingConfig
from serving.drawing import Delta
from serving.listening import options
from serving.unread import Unread
from tests.serving import raw_http2
from tests.serving.calls import Stubs, draw, long_request, ranking_request
from tests.serving.processes import Server, wait_until
from tests.serving.rollout import new_version, promote, replica, wait_served
from tests.serving.test_rpcs import all_room_is_free

pytestmark = pytest.mark.timeout(300)

PATH = "/alignd.v1.InferenceService/StreamSample"
QUOTA = ServingConfig().max_inflight_completions


@pytest.fixture
def unread(server: Server, stubs: Stubs) -> Iterator[list[raw_http2.Connection]]:
    """Streams that take all the room there is, and whose clients take in not one byte."""
    request = raw_http2.message(long_request(num_completions=16).SerializeToString())
    wait_until(lambda: all_room_is_free(stubs), 60, "all room free")
    with ExitStack() as opened:
        connections = [opened.enter_context(raw_http2.connect(server.address, window=0)) for _ in range(QUOTA // 16)]
        for connection in connections:
            connection.call(PATH, request)
        for connection in connections:
            connection.wait_answered()
        yield connections


@pytest.mark.usefixtures("version_1_again")
def test_streams_that_nobody_reads_hold_up_neither_callers_nor_a_swap(
    stubs: Stubs, root: Path, unread: list[raw_http2.Connection]
) -> None:
    wait_until(lambda: all_room_is_free(stubs), 60, "room for others while the streams are unread")
    _, manifest = new_version(stubs, root)
    promote(stubs, manifest.version)
    wait_served(stubs, manifest.version)
    assert replica(stubs).drain_seconds < 5
    assert draw(stubs).completions[0].policy.version == manifest.version
    for connection in unread:
        connection.read_on()
        messages, trailers = connection.messages()
        assert b"grpc-status\x010" in trailers
        *_, last = (StreamSampleResponse.FromString(each) for each in messages)
        assert len(messages) < 6, "text that nobody read is joined"
        assert {(each.policy.version, each.spans_swap) for each in last.finished.completions} == {(1, False)}
        stubs.feedback.SubmitRanking(ranking_request(last.finished), timeout=20)


class Endless(InferenceServiceServicer):
    """Streams for ever, and notes when it is told to stop: it stands in for an engine that writes for minutes."""

    def __init__(self) -> None:
        self.stopped = asyncio.Event()

    async def StreamSample(self, request: Any, context: Any) -> AsyncIterator[StreamSampleResponse]:  # noqa: N802
        try:
            while True:
                yield StreamSampleResponse(started=SampleStarted(sample_id="s" * 10_000))
        finally:
            self.stopped.set()


async def test_a_stream_that_nobody_reads_is_ended_and_its_client_told_when_it_reads() -> None:
    servicer = Endless()
    server = grpc.aio.server(interceptors=[Boundary(0.2, {})], options=options(1))
    add_InferenceServiceServicer_to_server(servicer, server)
    address = f"127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}"
    await server.start()
    with raw_http2.connect(address, window=0) as connection:
        await asyncio.to_thread(connection.call, PATH, raw_http2.message(long_request().SerializeToString()))
        await asyncio.wait_for(servicer.stopped.wait(), 10)
        connection.read_on()
        _, trailers = await asyncio.to_thread(connection.messages)
    assert b"grpc-status\x0210" in trailers, trailers
    assert b"the client read nothing for 0.2 s" in trailers
    await server.stop(0)


async def test_a_client_that_vanished_is_noticed() -> None:
    server = grpc.aio.server(options=options(1, ping_after_ms=500))
    address = f"127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}"
    await server.start()
    began = time.monotonic()
    with raw_http2.connect(address) as connection:
        # It answers no ping, as if its machine were gone.
        await asyncio.to_thread(list, connection.frames())
    assert 0.5 < time.monotonic() - began < 10
    await server.stop(0)


async def test_what_is_unread_is_joined() -> None:
    unread = Unread()
    assert unread.take() == []
    unread.start("s1")
    for text in "abc":
        unread.add(Delta(1, text, [1], FINISH_REASON_UNSPECIFIED))
    unread.add(Delta(0, "x", [2], FINISH_REASON_STOP))
    await asyncio.wait_for(unread.wait(), 5)
    started, deltas = unread.take()
    assert started.started.sample_id == "s1"
    assert [(each.index, each.text, each.finish_reason) for each in deltas.deltas.deltas] == [
        (0, "x", FINISH_REASON_STOP),
        (1, "abc", FINISH_REASON_UNSPECIFIED),
    ]
    assert unread.take() == []
    unread.end()
    await asyncio.wait_for(unread.wait(), 5)
