"""Each call has an id that comes back, and one line in the log, which says no more than it may."""

import contextlib
import json
import logging
import subprocess
import sys
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import grpc
import pytest

from alignd.v1 import inference_service_pb2 as inference
from alignd.v1 import inference_service_pb2_grpc
from serving.access.door import Door
from serving.access.keys import KeysFile, create_key
from serving.boundary import Boundary
from serving.calls import CallLog, note, note_content
from serving.errors import exhausted
from serving.request_id import REQUEST_ID, request_id
from tests.serving.calls import chat, sample_request

CALL_SECONDS = 20.0
SECRET = "what nobody may read"


class Service(inference_service_pb2_grpc.InferenceServiceServicer):
    """Answers, refuses or fails as the user's id says."""

    async def Sample(self, request: Any, context: Any) -> inference.SampleResponse:  # noqa: N802
        note(sample_id="sample-1")
        note_content(prompt=str(request.prompt))
        if request.user_id == "refused":
            raise exhausted("LIMIT_REACHED", "later")
        if request.user_id == "fails":
            try:
                {}[SECRET]
            except KeyError as error:
                raise ValueError(f"cannot read {SECRET}") from error
        return inference.SampleResponse(sample_id=request_id())

    async def StreamSample(self, request: Any, context: Any) -> AsyncIterator[inference.StreamSampleResponse]:  # noqa: N802
        if request.user_id == "refused":
            raise exhausted("LIMIT_REACHED", "later")
        yield inference.StreamSampleResponse(finished=inference.SampleResponse(sample_id=request_id()))


@asynccontextmanager
async def serving(folder: Path, *, logs_content: bool = False, needs_key: bool = False) -> AsyncIterator[Any]:
    """Yields a stub to a server that logs its calls."""
    door = Door(KeysFile(folder / "keys.json"), needs_key=needs_key)
    server = grpc.aio.server(interceptors=[CallLog(logs_content=logs_content), door, Boundary(30.0, {})])
    inference_service_pb2_grpc.add_InferenceServiceServicer_to_server(Service(), server)
    port = server.add_insecure_port("localhost:0")
    await server.start()
    async with grpc.aio.insecure_channel(f"localhost:{port}") as channel:
        yield inference_service_pb2_grpc.InferenceServiceStub(channel)
    await server.stop(0)


@pytest.fixture
def lines(caplog: pytest.LogCaptureFixture) -> Callable[[], Sequence[logging.LogRecord]]:
    """Returns what the log of calls has by then."""
    caplog.set_level(logging.INFO, logger="serving.calls")
    return lambda: caplog.records


def returned(call: Any) -> Any:
    return dict(call)[REQUEST_ID]


async def test_a_request_id_comes_back_from_what_is_answered_and_from_what_is_refused(
    tmp_path: Path, lines: Callable[[], Sequence[logging.LogRecord]]
) -> None:
    async with serving(tmp_path) as stub:
        call = stub.Sample(sample_request(), timeout=CALL_SECONDS, metadata=((REQUEST_ID, "mine-7"),))
        assert (await call).sample_id == "mine-7"
        assert returned(await call.trailing_metadata()) == "mine-7"
        for given in ((), ((REQUEST_ID, "two words"),), ((REQUEST_ID, "x" * 129),)):
            call = stub.Sample(sample_request(), timeout=CALL_SECONDS, metadata=given)
            made = (await call).sample_id
            assert len(made) == 32
            assert returned(await call.trailing_metadata()) == made
        stream = stub.StreamSample(
            inference.StreamSampleRequest.FromString(sample_request().SerializeToString()),
            timeout=CALL_SECONDS, metadata=((REQUEST_ID, "mine-8"),),
        )  # fmt: skip
        assert [each.finished.sample_id async for each in stream] == ["mine-8"]
        for user, code in (("refused", grpc.StatusCode.RESOURCE_EXHAUSTED), ("fails", grpc.StatusCode.INTERNAL)):
            with pytest.raises(grpc.aio.AioRpcError) as raised:
                await stub.Sample(
                    sample_request(user_id=user), timeout=CALL_SECONDS, metadata=((REQUEST_ID, "mine-9"),)
                )
            assert (raised.value.code(), returned(raised.value.trailing_metadata())) == (code, "mine-9")
    ends = [each for each in lines() if hasattr(each, "code")]
    assert [each.code for each in ends] == ["OK"] * 5 + ["RESOURCE_EXHAUSTED", "INTERNAL"]
    assert ends[0].getMessage().startswith("InferenceService/Sample OK in ")
    assert "request_id=mine-7 sample_id=sample-1" in ends[0].getMessage()
    assert ends[5].reason == "LIMIT_REACHED"  # type: ignore[attr-defined]


async def test_who_is_refused_at_the_door_is_in_the_log_by_name_and_never_by_key(
    tmp_path: Path, lines: Callable[[], Sequence[logging.LogRecord]]
) -> None:
    secret = create_key(tmp_path / "keys.json", "ranks", "shop", ["feedback"], "ada")[1]
    good = create_key(tmp_path / "keys.json", "web", "shop", ["sample"], "ada")[1]
    streamed = inference.StreamSampleRequest.FromString(sample_request().SerializeToString())
    async with serving(tmp_path, needs_key=True) as stub:
        for key in ("", secret, f"{secret}x", good):
            metadata = (("authorization", f"Bearer {key}"),) if key else ()
            await stub.Sample(sample_request(), timeout=CALL_SECONDS, metadata=metadata).code()
            with contextlib.suppress(grpc.aio.AioRpcError):
                async for _ in stub.StreamSample(streamed, timeout=CALL_SECONDS, metadata=metadata):
                    pass
    said = [each.getMessage() for each in lines()]
    reasons = ["NO_API_KEY", "MISSING_SCOPE", "BAD_API_KEY"]
    assert [getattr(each, "reason", "") for each in lines()] == [*(r for r in reasons for _ in "12"), "", ""]
    assert all(" OK in " in each and "key=web application=shop" in each for each in said[-2:])
    assert not any(key in each for key in (secret, good) for each in said)


@pytest.mark.parametrize("logs_content", [False, True])
async def test_what_people_write_is_in_the_log_only_if_it_may_be(
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    lines: Callable[[], Sequence[logging.LogRecord]],
    logs_content: bool,
) -> None:
    async with serving(tmp_path, logs_content=logs_content) as stub:
        await stub.Sample(sample_request(prompt=chat(SECRET)), timeout=CALL_SECONDS)
        with pytest.raises(grpc.aio.AioRpcError):
            await stub.Sample(sample_request(user_id="fails"), timeout=CALL_SECONDS)
    failed = [each for each in lines() if each.levelname == "ERROR"]
    assert len(failed) == 1
    assert "Sample failed" in failed[0].getMessage()
    # Where it failed, and why by kind, is said in any case.
    assert all(kind in caplog.text for kind in ("ValueError", "KeyError", "in Sample"))
    assert (SECRET in caplog.text) is logs_content
    assert any(hasattr(each, "prompt") for each in lines()) is logs_content


def test_as_json_each_line_is_an_object_with_the_request_id_and_nobody_forges_one() -> None:
    program = """
import logging
from deploy.cli.log import begin_log
from serving.request_id import begin_request
begin_log("json")
logger = logging.getLogger("somebody")
logger.info("before")
begin_request("mine-7")
logger.info("a name\\n{forged}\\x1b[2J", extra={"code": "OK", "seconds": 0.5})
try:
    1 / 0
except ZeroDivisionError:
    logger.exception("failed")
"""
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=100)
    mine = [json.loads(line) for line in run.stderr.splitlines()]
    assert [each["message"] for each in mine] == ["before", "a name\n{forged}\x1b[2J", "failed"]
    assert [each.get("request_id") for each in mine] == [None, "mine-7", "mine-7"]
    assert (mine[1]["code"], mine[1]["seconds"], mine[1]["level"]) == ("OK", 0.5, "INFO")
    assert "ZeroDivisionError" in mine[2]["traceback"]
    assert all(each["time"] for each in mine)
