"""Completions over the public API of a real server with a real engine, as any gRPC client meets it."""

import random
import time
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from pathlib import Path

import grpc
import pytest
from google.rpc import error_details_pb2
from transformers import AutoTokenizer

from alignd.v1 import types_pb2
from alignd.v1.inference_service_pb2 import StreamSampleRequest, StreamSampleResponse
from alignd.v1.types_pb2 import FINISH_REASON_LENGTH, FINISH_REASON_STOP, FINISH_REASON_UNSPECIFIED
from feedback.token import load_keyring, verify
from policies.rendering import prompt_token_ids
from serving.config import ServingConfig
from tests.serving.calls import (
    TIMEOUT_SECONDS,
    Stubs,
    chat,
    conversation,
    detail,
    draw,
    long_request,
    ranking_request,
    refused,
    sample_request,
    sampling,
    texts,
)
from tests.serving.processes import MAX_MODEL_LEN, Server, wait_until

pytestmark = pytest.mark.timeout(300)

INVALID = grpc.StatusCode.INVALID_ARGUMENT
QUOTA = ServingConfig().max_inflight_completions


def test_a_sample_has_all_that_the_contract_says(stubs: Stubs, server: Server, tiny_llama: Path) -> None:
    response = draw(stubs)
    assert [completion.index for completion in response.completions] == [0, 1, 2, 3]
    assert len({completion.completion_id for completion in response.completions}) == 4
    for completion in response.completions:
        assert completion.policy.version == 1
        assert len(completion.policy.weight_digest) == 64
        assert completion.finish_reason in (FINISH_REASON_STOP, FINISH_REASON_LENGTH)
        assert 1 <= completion.num_tokens <= 8
        assert not completion.spans_swap
    tokenizer = AutoTokenizer.from_pretrained(tiny_llama)
    assert response.num_prompt_tokens == len(prompt_token_ids(tokenizer, sample_request().prompt))
    claims = verify(response.feedback_token, load_keyring(server.data_dir / "feedback_keys"), datetime.now(UTC))
    assert (claims.sample_id, claims.user_id) == (response.sample_id, "ada")
    assert [each.completion_id for each in claims.completions] == [each.completion_id for each in response.completions]
    assert claims.expire_time == response.feedback_expire_time


def test_what_is_not_set_takes_the_default(stubs: Stubs) -> None:
    response = draw(stubs, sampling=None, num_completions=16)
    lengths = [each.num_tokens for each in response.completions]
    assert max(lengths) == ServingConfig().default_max_tokens
    assert len(set(texts(response))) > 1, "the default temperature is 1"


def test_a_seed_makes_the_draw_repeatable(stubs: Stubs) -> None:
    first, again = (draw(stubs, sampling=sampling(seed=7)) for _ in range(2))
    assert texts(first) == texts(again)
    assert len(set(texts(first))) == 4, "the completions of one sample differ"
    assert texts(first) != texts(draw(stubs, sampling=sampling(seed=8)))
    assert first.sample_id != again.sample_id
    assert len(draw(stubs, sampling=sampling(seed=2**63 - 1)).completions) == 4


@pytest.mark.parametrize(("seed", "other"), [(7, 8), (0, 2**32), (3, 2**62 + 3)])
def test_seeds_share_no_completion(stubs: Stubs, seed: int, other: int) -> None:
    """vLLM gives completion i the seed plus i, and torch takes the lowest 32 bits of it on a CPU."""
    ours, theirs = (texts(draw(stubs, num_completions=8, sampling=sampling(seed=each))) for each in (seed, other))
    assert len({*ours, *theirs}) == 16


def test_temperature_zero_is_greedy(stubs: Stubs) -> None:
    response = draw(stubs, sampling=sampling(temperature=0))
    assert len(set(texts(response))) == 1
    assert texts(response) == texts(draw(stubs, sampling=sampling(temperature=0, seed=3)))


def test_a_stop_string_ends_a_completion_and_is_not_part_of_it(stubs: Stubs) -> None:
    (whole,) = texts(draw(stubs, num_completions=1, sampling=sampling(temperature=0)))
    stop = whole[len(whole) // 2 :][:2]
    response = draw(stubs, num_completions=1, sampling=sampling(temperature=0, stop=[stop, "never met"]))
    assert texts(response) == [whole[: whole.index(stop)]]
    assert response.completions[0].finish_reason == FINISH_REASON_STOP


def test_raw_text_is_continued_without_a_template(stubs: Stubs, tiny_llama: Path) -> None:
    response = draw(stubs, prompt=types_pb2.Prompt(text="The sky is"))
    tokenizer = AutoTokenizer.from_pretrained(tiny_llama)
    assert response.num_prompt_tokens == len(tokenizer.encode("The sky is"))


def test_control_tokens_in_what_a_user_says_are_read_as_text(stubs: Stubs, tiny_llama: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_llama)
    plain, control = (draw(stubs, prompt=chat(text)).num_prompt_tokens for text in ("a", "a<|im_end|>"))
    assert control - plain == len(tokenizer.encode("<|im_end|>", split_special_tokens=True))


def test_a_conversation_of_several_turns(stubs: Stubs) -> None:
    prompt = conversation(("system", "Be brief."), ("user", "Why?"), ("assistant", "So."), ("user", "And?"))
    assert draw(stubs, prompt=prompt).num_prompt_tokens > draw(stubs).num_prompt_tokens


@pytest.mark.parametrize(
    ("turns", "field"),
    [
        ([("user", "Why?"), ("system", "Be brief.")], "prompt.chat.messages"),
        ([("user", ""), ("assistant", "So."), ("user", "And?")], "prompt.chat.messages[0].content"),
        ([("system", ""), ("user", "And?")], "prompt.chat.messages[0].content"),
        ([("user", "Why?"), ("assistant", "")], "prompt.chat.messages[1].content"),
    ],
)
def test_turns_that_have_no_meaning_are_refused(stubs: Stubs, turns: list[tuple[str, str]], field: str) -> None:
    refused(stubs.inference.Sample, sample_request(prompt=conversation(*turns)), INVALID, field)


def test_a_prompt_that_fills_the_context_is_refused(stubs: Stubs) -> None:
    error = refused(stubs.inference.Sample, sample_request(prompt=chat("why " * 1000)), INVALID, "prompt")
    assert str(MAX_MODEL_LEN - 1) in error.details()


def test_more_tokens_than_there_is_room_for_are_refused(stubs: Stubs) -> None:
    room = MAX_MODEL_LEN - draw(stubs).num_prompt_tokens
    too_many = sample_request(sampling=sampling(max_tokens=room + 1))
    refused(stubs.inference.Sample, too_many, INVALID, "sampling.max_tokens")
    refused(stubs.inference.StreamSample, too_many, INVALID, "sampling.max_tokens")
    assert draw(stubs, sampling=sampling(max_tokens=room, stop=["e"])).completions


@pytest.mark.parametrize("policy", ["", "live", "v1"])
def test_the_served_policy_can_be_named(stubs: Stubs, policy: str) -> None:
    assert draw(stubs, policy=policy).completions[0].policy.version == 1


def test_a_policy_that_is_not_there_is_not_found(stubs: Stubs) -> None:
    error = refused(stubs.inference.Sample, sample_request(policy="v999"), grpc.StatusCode.NOT_FOUND)
    assert detail(error, error_details_pb2.ErrorInfo).metadata == {"policy": "v999", "served": "v1"}


def stream(stubs: Stubs, request: StreamSampleRequest) -> list[StreamSampleResponse]:
    return list(stubs.inference.StreamSample(request, timeout=TIMEOUT_SECONDS))


def test_a_stream_is_a_start_its_text_and_an_end_that_repeats_it(stubs: Stubs) -> None:
    request = long_request()
    request.sampling.max_tokens = 60
    events = stream(stubs, request)
    kinds = [event.WhichOneof("event") for event in events]
    assert kinds[0] == "started"
    assert kinds[-1] == "finished"
    assert set(kinds[1:-1]) == {"deltas"}
    assert len(kinds) > 3, "the text comes as it is written"
    finished = events[-1].finished
    assert events[0].started.sample_id == finished.sample_id
    texts_so_far, reasons = [""] * 4, [FINISH_REASON_UNSPECIFIED] * 4
    for event in events[1:-1]:
        for delta in event.deltas.deltas:
            assert reasons[delta.index] == FINISH_REASON_UNSPECIFIED, "text after the last delta"
            texts_so_far[delta.index] += delta.text
            reasons[delta.index] = delta.finish_reason
    assert texts_so_far == texts(finished)
    assert reasons == [each.finish_reason for each in finished.completions]
    stubs.feedback.SubmitRanking(ranking_request(finished), timeout=TIMEOUT_SECONDS)


def test_a_stream_and_a_call_draw_the_same(stubs: Stubs) -> None:
    request = sample_request(sampling=sampling(seed=11))
    (*_, last) = stream(stubs, StreamSampleRequest.FromString(request.SerializeToString()))
    assert texts(last.finished) == texts(draw(stubs, sampling=sampling(seed=11)))


def test_callers_that_leave_give_their_room_back(stubs: Stubs) -> None:
    """Callers ask for and leave far more completions than may be in flight; then all the room must be free again."""
    chance = random.Random(0)
    for _ in range(60):
        call = stubs.inference.StreamSample(long_request(num_completions=16), timeout=TIMEOUT_SECONDS)
        for _ in range(chance.randrange(4)):
            try:
                next(call)
            except grpc.RpcError as error:
                assert error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
                break
        call.cancel()
        future = stubs.inference.Sample.future(
            sample_request(sampling=sampling(max_tokens=400)), timeout=TIMEOUT_SECONDS
        )
        time.sleep(chance.uniform(0, 0.02))
        future.cancel()
    wait_until(lambda: all_room_is_free(stubs), 20, "room given back")


def all_room_is_free(stubs: Stubs) -> bool:
    """Whether as many completions as are allowed can be drawn at once."""
    request = sample_request(num_completions=16, sampling=sampling(max_tokens=4))
    calls = [stubs.inference.Sample.future(request, timeout=TIMEOUT_SECONDS) for _ in range(QUOTA // 16)]
    codes = {call.code() for call in calls}
    assert codes <= {grpc.StatusCode.OK, grpc.StatusCode.RESOURCE_EXHAUSTED}
    return codes == {grpc.StatusCode.OK}


def test_what_is_beyond_the_room_is_refused_with_a_delay(stubs: Stubs) -> None:
    wait_until(lambda: all_room_is_free(stubs), 20, "room given back")
    calls = [
        stubs.inference.StreamSample(long_request(num_completions=16), timeout=TIMEOUT_SECONDS)
        for _ in range(QUOTA // 16)
    ]
    for call in calls:
        assert next(call).WhichOneof("event") == "started"
    error = refused(stubs.inference.Sample, sample_request(), grpc.StatusCode.RESOURCE_EXHAUSTED)
    assert detail(error, error_details_pb2.RetryInfo).retry_delay.ToMilliseconds() > 0
    assert detail(error, error_details_pb2.ErrorInfo).reason == "TOO_MANY_COMPLETIONS"
    for call in calls:
        call.cancel()
    wait_until(lambda: all_room_is_free(stubs), 20, "room given back")


def test_a_deadline_ends_the_call_and_gives_the_room_back(stubs: Stubs) -> None:
    began = time.monotonic()
    calls = [stubs.inference.StreamSample(long_request(num_completions=16), timeout=0.3) for _ in range(QUOTA // 16)]
    assert {call.code() for call in calls} == {grpc.StatusCode.DEADLINE_EXCEEDED}
    assert time.monotonic() - began < 20
    wait_until(lambda: all_room_is_free(stubs), 20, "room given back")


def test_many_callers_at_once_all_get_their_own(server: Server) -> None:
    def call(number: int) -> str:
        with grpc.insecure_channel(server.address) as channel:
            response = draw(Stubs(channel), user_id=f"u{number}", num_completions=2)
            ranking = ranking_request(response, user_id=f"u{number}")
            return Stubs(channel).feedback.SubmitRanking(ranking, timeout=TIMEOUT_SECONDS).ranking_id  # type: ignore[no-any-return]

    with ThreadPoolExecutor(16) as pool:
        assert len(set(pool.map(call, range(64)))) == 64
