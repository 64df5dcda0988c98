"""When a call is tried again, after how long, and when not; against a real server that refuses."""

import threading
import time
import uuid
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import grpc
import pytest

from alignd.client import AligndError, SampleResponse
from serving.errors import bad_field, exhausted, unavailable
from tests.client.callers import CALLERS, Call
from tests.client.scripted_server import SAMPLE, Script, serving
from tests.kafka_broker import free_port

pytestmark = pytest.mark.parametrize("call", CALLERS.values(), ids=CALLERS)
ASK: dict[str, Any] = {"user_id": "ada"}
RANK = {"user_id": "ada", "best_first": ["a", ["b", "c"]], "feedback_token": "t"}


@pytest.mark.parametrize(
    ("refuse", "delay_seconds"),
    # Shorter and longer than what gRPC would wait of its own accord, which is 0.4 to 0.6 s.
    [(exhausted, 0.1), (unavailable, 0.8)],
)
def test_a_refused_call_is_tried_again_when_the_server_says(
    call: Call, refuse: Callable[..., Any], delay_seconds: float
) -> None:
    script = Script([refuse("BUSY", "come back", delay_seconds)])
    with serving(script) as address:
        assert call(address, "sample", "Hello", **ASK) == SAMPLE
    (waited,) = script.waits
    assert delay_seconds <= waited < delay_seconds + 0.25


def test_a_ranking_and_a_demonstration_keep_their_ids_over_all_tries(call: Call) -> None:
    script = Script([exhausted("OUTBOX_FULL", "no room", 0.01) for _ in range(4)])
    with serving(script) as address:
        assert call(address, "rank", **RANK).ranking_id == "r"
        assert len(script.requests) == 5
        assert len({uuid.UUID(request.request_id) for request in script.requests}) == 1  # type: ignore[attr-defined]
        again = call(address, "rank", **RANK) and script.requests[-1]
        assert again.request_id != script.requests[0].request_id  # type: ignore[attr-defined]
        script.refusals = [unavailable("OUTBOX_FAILED", "it cannot be stored", 0.01)]
        chosen = str(uuid.uuid4())
        call(address, "demonstrate", "t", "Like this.", user_id="ada", request_id=chosen)
    assert [request.request_id for request in script.requests[-2:]] == [chosen, chosen]  # type: ignore[attr-defined]


def test_a_server_that_goes_on_refusing_is_given_up_with_what_it_said(call: Call) -> None:
    script = Script([exhausted("TOO_MANY_COMPLETIONS", "64 of 64 are in flight", 0.01) for _ in range(9)])
    with serving(script) as address, pytest.raises(AligndError) as raised:
        call(address, "sample", "Hello", **ASK)
    assert len(script.requests) == 5
    assert (raised.value.code, raised.value.reason) == (
        grpc.StatusCode.RESOURCE_EXHAUSTED,
        "TOO_MANY_COMPLETIONS",
    )
    assert raised.value.retry_after_seconds == 0.01


def test_a_deadline_before_the_next_try_ends_the_call_at_once(call: Call) -> None:
    script = Script([exhausted("OUTBOX_FULL", "no room", 30.0)])
    with serving(script) as address, pytest.raises(AligndError) as raised:
        call(address, "rank", **RANK, timeout=20)
    assert (len(script.requests), raised.value.reason) == (1, "OUTBOX_FULL")


@pytest.mark.parametrize("refusal", [bad_field("prompt", "is empty"), unavailable("NOT_SERVING", "it starts", 0.01)])
def test_what_is_not_to_be_tried_again_is_not(call: Call, refusal: Any) -> None:
    """A request at fault never is, and nothing is by a client that was told so."""
    script = Script([refusal])
    once = {"max_attempts": 1} if refusal.retry_after_seconds else {}
    with serving(script) as address, pytest.raises(AligndError) as raised:
        call(address, "sample", "Hello", client=once, **ASK)
    assert (len(script.requests), raised.value.code) == (1, refusal.code)


def test_a_server_that_is_not_there_yet_is_waited_for(call: Call) -> None:
    port, script = free_port(), Script()
    with ExitStack() as stack:
        timer = threading.Timer(0.7, lambda: stack.enter_context(serving(script, port)))
        timer.start()
        assert call(f"127.0.0.1:{port}", "sample", "Hello", **ASK) == SAMPLE
        timer.join()
    assert len(script.requests) == 1


def test_a_server_that_does_not_answer_meets_the_deadline(call: Call) -> None:
    script = Script(hangs=True)
    began = time.monotonic()
    with serving(script) as address, pytest.raises(AligndError) as raised:
        call(address, "sample", "Hello", client={"timeout": 0.3}, **ASK)
    assert raised.value.code is grpc.StatusCode.DEADLINE_EXCEEDED
    assert time.monotonic() - began < 20
    assert script.cancelled.wait(30)


def test_a_long_request_is_tried_again_and_one_too_long_is_refused_at_once(call: Call) -> None:
    turn = {"role": "user", "content": "x" * 60_000}
    script = Script([exhausted("BUSY", "come back", 0.01)])
    with serving(script) as address:
        assert call(address, "sample", [turn] * 16, **ASK) == SAMPLE
        assert len(script.requests) == 2
        began = time.monotonic()
        with pytest.raises(AligndError, match="RESOURCE_EXHAUSTED"):
            call(address, "sample", [turn] * 18, **ASK)
    # Four more tries would take 13 s at least.
    assert time.monotonic() - began < 12


def test_a_stream_is_tried_again_until_it_has_begun(call: Call) -> None:
    script = Script([unavailable("NOT_SERVING", "it starts", 0.01)])
    with serving(script) as address:
        *deltas, sample = call(address, "stream", "Hello", **ASK)
        assert [delta.text for delta in deltas] == ["a", "b"]
        assert sample == SAMPLE
        assert isinstance(sample, SampleResponse)
        assert len(script.requests) == 2
        script.breaks_off, script.stream = unavailable("ENGINE_FAILED", "it failed", 0.01), script.stream[:2]
        with pytest.raises(AligndError) as raised:
            call(address, "stream", "Hello", **ASK)
    assert (len(script.requests), raised.value.reason) == (3, "ENGINE_FAILED")


def test_a_stream_without_its_sample_is_an_error(call: Call) -> None:
    script = Script()
    script.stream = script.stream[:2]
    with serving(script) as address, pytest.raises(AligndError, match="without the sample") as raised:
        call(address, "stream", "Hello", **ASK)
    assert raised.value.code is grpc.StatusCode.DATA_LOSS
