"""What a caller hears when an event cannot be made durable, and that it may be sent again."""

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import grpc
import pytest
from transformers import AutoTokenizer

from alignd.v1 import events_pb2, types_pb2
from alignd.v1.inference_service_pb2 import SampleRequest, StreamSampleRequest
from alignd.v1.types_pb2 import PolicyRef, Prompt
from deploy.models import make_tiny_llama
from feedback.bus.topics import DEMONSTRATIONS, SAMPLES
from feedback.outbox.door import Outbox
from feedback.token import Keyring
from serving.access.limits import Limits
from serving.config import LimitsConfig, ServingConfig
from serving.errors import Refusal
from serving.inference_service import InferenceService, Serving
from serving.recording import check_room, record
from serving.sampler import Quota
from serving.slot import Slot
from serving.vllm_engine import EngineError
from tests.feedback.events import KEYRING

MAX_BYTES = 1 << 20


@pytest.fixture
async def outbox(tmp_path: Path) -> AsyncIterator[Outbox]:
    opened = Outbox(tmp_path / "outbox.db", MAX_BYTES)
    yield opened
    await asyncio.to_thread(opened.close)


def demonstration(number: int) -> events_pb2.DemonstrationEvent:
    return events_pb2.DemonstrationEvent(event_id=f"d{number}", user_id="ada", sample_id="s", text="x" * 100_000)


async def fill(outbox: Outbox) -> tuple[int, Refusal]:
    """Returns how many events found room, and the refusal of the next."""
    for number in range(100):
        try:
            await record(outbox, KEYRING, DEMONSTRATIONS, "s", demonstration(number))
        except Refusal as refusal:
            return number, refusal
    raise AssertionError("there is no end of room")


async def test_a_full_outbox_is_resource_exhausted_and_takes_again_when_there_is_room(outbox: Outbox) -> None:
    stored, refusal = await fill(outbox)
    assert 0 < stored < 20
    assert (refusal.code, refusal.reason) == (grpc.StatusCode.RESOURCE_EXHAUSTED, "OUTBOX_FULL")
    assert refusal.retry_after_seconds
    # The acknowledged event is there, and a retry of it needs no room.
    await record(outbox, KEYRING, DEMONSTRATIONS, "s", demonstration(0))
    file = outbox._file
    file.mark_published(dict.fromkeys(each.seq for each in file.pending(100)))
    while file.prune(0.0):
        pass
    await record(outbox, KEYRING, DEMONSTRATIONS, "s", demonstration(stored))


async def test_a_sample_that_no_bus_could_carry_is_refused_by_what_makes_it_so_large(outbox: Outbox) -> None:
    completions = [types_pb2.Completion(completion_id=f"s.{index}", text="x" * 1_100_000) for index in range(16)]
    large = events_pb2.SampleEvent(event_id="s", user_id="ada", completions=completions)
    with pytest.raises(Refusal, match="at most 16777216 can be kept") as raised:
        await record(outbox, KEYRING, SAMPLES, "s", large)
    assert (raised.value.code, raised.value.reason) == (grpc.StatusCode.INVALID_ARGUMENT, "SAMPLE_TOO_LARGE")
    assert [violation.field for violation in raised.value.violations] == ["sampling.max_tokens"]
    assert outbox._file.pending(1) == []


async def test_a_sample_that_could_not_be_stored_is_refused_before_anything_is_generated(
    outbox: Outbox, tmp_path: Path
) -> None:
    asked: list[str] = []

    def generate(request_id: str, *_: Any, **__: Any) -> Any:
        asked.append(request_id)
        raise EngineError("it was asked")

    tokenizer = AutoTokenizer.from_pretrained(make_tiny_llama(tmp_path / "tiny"))
    engine = cast(Any, SimpleNamespace(tokenizer=tokenizer, max_model_len=512, vocabulary=10**6, generate=generate))
    slot = Slot()
    slot.open(PolicyRef(version=1))
    serving = Serving(slot, cast(Any, None), Quota(16), engine, accepting=True)
    service = InferenceService(
        serving, outbox, Keyring("k", {"k": b"x" * 32}), Limits(LimitsConfig()), ServingConfig(), 60
    )
    request = SampleRequest(user_id="ada", prompt=Prompt(text="Why?"), num_completions=4)
    request.sampling.max_tokens = 400
    streamed = StreamSampleRequest.FromString(request.SerializeToString())

    async def refusals() -> list[str]:
        reasons = []
        for call in (service.Sample(request, None), anext(aiter(service.StreamSample(streamed, None)))):
            with pytest.raises(Refusal) as raised:
                await call
            reasons.append(raised.value.reason)
        return reasons

    await fill(outbox)
    assert (await refusals(), asked) == (["OUTBOX_FULL", "OUTBOX_FULL"], [])
    assert serving.quota.taken == 0
    file = outbox._file
    file.mark_published(dict.fromkeys(each.seq for each in file.pending(100)))
    while file.prune(0.0):
        pass
    with pytest.raises(Refusal, match="engine failed"):
        await service.Sample(request, None)
    assert len(asked) == 1


async def test_a_disk_without_room_is_a_full_outbox_too(outbox: Outbox, monkeypatch: pytest.MonkeyPatch) -> None:
    await check_room(outbox, 100_000)
    monkeypatch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=50_000))
    with pytest.raises(Refusal) as raised:
        await check_room(outbox, 100_000)
    assert (raised.value.code, raised.value.reason) == (grpc.StatusCode.RESOURCE_EXHAUSTED, "OUTBOX_FULL")
    await check_room(outbox, 40_000)


async def test_an_outbox_that_fails_is_unavailable(outbox: Outbox) -> None:
    await asyncio.to_thread(outbox.close)
    with pytest.raises(Refusal) as raised:
        await record(outbox, KEYRING, DEMONSTRATIONS, "s", demonstration(0))
    assert (raised.value.code, raised.value.reason) == (grpc.StatusCode.UNAVAILABLE, "OUTBOX_FAILED")
    assert raised.value.retry_after_seconds


async def test_an_id_that_was_used_for_something_else_is_refused_by_name(outbox: Outbox) -> None:
    await record(outbox, KEYRING, DEMONSTRATIONS, "s", demonstration(0))
    other = demonstration(0)
    other.text = "something else"
    with pytest.raises(Refusal) as raised:
        await record(outbox, KEYRING, DEMONSTRATIONS, "s", other)
    assert raised.value.code is grpc.StatusCode.ALREADY_EXISTS
    assert [violation.field for violation in raised.value.violations] == ["request_id"]
