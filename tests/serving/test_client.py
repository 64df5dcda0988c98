"""alignd.client, sync and async, on a real server: what an application does with it comes to the store."""

import uuid
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from typing import Any

import grpc
import pytest

from alignd.client import AligndError, Client, Prompt, SamplingParams
from feedback.store.reader import Store
from serving.config import ServingConfig
from tests.client.callers import CALLERS, Call
from tests.serving.processes import Server, wait_until

pytestmark = [pytest.mark.timeout(300), pytest.mark.parametrize("call", CALLERS.values(), ids=CALLERS)]

SHORT: dict[str, Any] = {"user_id": "ada", "sampling": SamplingParams(max_tokens=8)}
WHOLE_QUOTA = ServingConfig().max_inflight_completions


def test_what_is_streamed_is_ranked_and_learned_from(call: Call, server: Server) -> None:
    turns = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Why is the sky blue?"}]
    *deltas, sample = call(server.address, "stream", turns, num_completions=3, **SHORT)
    for completion in sample.completions:
        said = "".join(delta.text for delta in deltas if delta.index == completion.index)
        assert said == completion.text
    best, second, worst = (completion.completion_id for completion in sample.completions)
    rank: dict[str, Any] = {"user_id": "ada", "request_id": str(uuid.uuid4()), "shown": [worst, second, best]}
    first, again = (
        call(server.address, "rank", sample.feedback_token, [[second, best], worst], **rank) for _ in range(2)
    )
    assert first == again
    with closing(Store(server.store_url)) as store:
        wait_until(lambda: first.ranking_id in {each.ranking_id for each in store.ranked_groups()}, 30, "the ranking")
        (stored,) = (each for each in store.ranked_groups() if each.ranking_id == first.ranking_id)
    assert {each.completion_id: each.rank for each in stored.completions} == {best: 0, second: 0, worst: 1}


def test_plain_text_is_sampled_and_a_better_one_is_shown(call: Call, server: Server) -> None:
    sample = call(server.address, "sample", Prompt(text="Once upon a time"), num_completions=1, **SHORT)
    assert [completion.index for completion in sample.completions] == [0]
    done = call(server.address, "demonstrate", sample.feedback_token, " there was a king.", user_id="ada")
    assert uuid.UUID(done.demonstration_id)


def test_a_refusal_names_the_fields(call: Call, server: Server) -> None:
    sample = call(server.address, "sample", "Hello", num_completions=2, **SHORT)
    with pytest.raises(AligndError) as raised:
        call(server.address, "rank", sample.feedback_token, [sample.completions[0].completion_id, "x"], user_id="ada")
    assert (raised.value.code, raised.value.reason) == (grpc.StatusCode.INVALID_ARGUMENT, "INVALID_FIELD")
    assert {each.field for each in raised.value.violations} == {"groups"}
    with pytest.raises(AligndError) as raised:
        call(server.address, "sample", "Hello", policy="v999", **SHORT)
    assert (raised.value.reason, raised.value.metadata["policy"]) == ("NO_SUCH_POLICY", "v999")


def test_more_than_the_server_takes_at_a_time_is_served_all_the_same(call: Call, server: Server) -> None:
    """Those refused come again after the time that the server named."""
    callers = WHOLE_QUOTA // 16 + 2
    ask = {"user_id": "ada", "num_completions": 16, "sampling": SamplingParams(max_tokens=64)}
    with ThreadPoolExecutor(callers) as threads:
        asked = [threads.submit(call, server.address, "sample", f"Question {n}?", **ask) for n in range(callers)]
        samples = [each.result() for each in asked]
    assert [len(sample.completions) for sample in samples] == [16] * callers
    with Client(server.address, max_attempts=1) as impatient:
        streams = [impatient.stream("Wait", **{**ask, "sampling": SamplingParams(max_tokens=400)}) for _ in range(4)]
        for stream in streams:
            next(stream)
        with pytest.raises(AligndError) as raised:
            impatient.sample("Hello", **SHORT)
        for stream in streams:
            stream.close()  # type: ignore[attr-defined]
    assert (raised.value.reason, raised.value.retry_after_seconds) == ("TOO_MANY_COMPLETIONS", 1.0)
