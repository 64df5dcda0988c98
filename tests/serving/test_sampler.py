"""A sample's bookkeeping: the quota, and completions put together from what the engine wrote."""

from datetime import UTC, datetime, timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import grpc
import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoTokenizer

from alignd.v1 import inference_service_pb2
from alignd.v1.inference_service_pb2 import SampleRequest
from alignd.v1.types_pb2 import (
    FINISH_REASON_STOP,
    FINISH_REASON_UNSPECIFIED,
    ROLE_USER,
    Chat,
    Message,
    PolicyRef,
    Prompt,
    SamplingParams,
)
from deploy.models import make_tiny_llama
from feedback.bus.contract import MAX_RECORD_BYTES
from feedback.token import Keyring, TokenError, verify
from serving.drawing import Delta, Draw
from serving.errors import Refusal
from serving.sampler import Draft, Plan, Quota, append, as_completions, as_deltas, as_event, plan, render, sign
from serving.slot import Hold

PERSON, BATCH = inference_service_pb2.PRIORITY_INTERACTIVE, inference_service_pb2.PRIORITY_BATCH
KEYS = Keyring("k1", {"k1": b"s" * 32})


def test_the_quota_refuses_what_does_not_fit_and_takes_it_again_later() -> None:
    quota = Quota(20)
    with quota.taken_for(16, PERSON):
        with pytest.raises(Refusal) as raised, quota.taken_for(5, PERSON):
            pass
        assert raised.value.code is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert raised.value.retry_after_seconds
        with quota.taken_for(4, PERSON):
            assert quota.taken == 20
    with quota.taken_for(16, PERSON):
        assert quota.taken == 16
    assert quota.taken == 0


def test_a_batch_leaves_a_third_to_people() -> None:
    quota = Quota(48)
    with quota.taken_for(16, BATCH), quota.taken_for(16, BATCH):
        with pytest.raises(Refusal, match="32 that a batch may take"), quota.taken_for(1, BATCH):
            pass
        with quota.taken_for(16, PERSON):
            assert quota.taken == 48
    # It can always take the largest request alone.
    with Quota(16).taken_for(16, BATCH):
        pass


@given(texts=st.lists(st.tuples(st.integers(0, 3), st.text(max_size=5)), max_size=30))
def test_a_completion_is_what_was_written_of_it(texts: list[tuple[int, str]]) -> None:
    drafts = [Draft() for _ in range(4)]
    for index, text in texts:
        append(drafts[index], Delta(index, text, [ord(char) for char in text], FINISH_REASON_UNSPECIFIED))
    for index, draft in enumerate(drafts):
        append(draft, Delta(index, "", [2], FINISH_REASON_STOP, 2))
    policy = PolicyRef(version=7, weight_digest="d" * 64)
    completions = as_completions("s1", Hold(policy), drafts, str)
    for index, completion in enumerate(completions):
        expected = "".join(text for where, text in texts if where == index)
        assert (completion.index, completion.text, completion.num_tokens) == (index, expected, len(expected) + 1)
        assert list(completion.token_ids) == [*map(ord, expected), completion.end_token_id] == [*map(ord, expected), 2]
        assert (completion.finish_reason, completion.policy) == (FINISH_REASON_STOP, policy)
    assert len({completion.completion_id for completion in completions}) == 4


def planned(*token_ids: int) -> Plan:
    return Plan(list(token_ids), Draw(num_completions=1, temperature=1, top_p=1, max_tokens=1))


@pytest.mark.parametrize(("num_tokens", "kept"), [(8192, True), (2_000_000, False)])
def test_a_sample_is_stored_with_its_tokens_unless_the_bus_would_refuse_it(num_tokens: int, kept: bool) -> None:
    """16 completions of 8,192 tokens of the largest vocabularies are far below the limit."""
    drafts = [Draft(["text"], [250_000] * num_tokens, FINISH_REASON_STOP, 250_000) for _ in range(16 if kept else 3)]
    completions = as_completions("s1", Hold(PolicyRef(version=7)), drafts, str)
    request = SampleRequest(user_id="ada", prompt=Prompt(text="Why?"), sampling=SamplingParams(max_tokens=9))
    event = as_event(request, "shop", "s1", completions, planned(7, 8), "d" * 64)
    assert event.ByteSize() < MAX_RECORD_BYTES
    assert [len(each.token_ids) for each in event.completions] == [num_tokens if kept else 0] * len(drafts)
    assert list(event.prompt_token_ids) == ([7, 8] if kept else [])
    assert {each.end_token_id for each in event.completions} == {250_000}
    assert (event.tokenizer_digest, event.user_id, event.sampling.max_tokens) == ("d" * 64, "ada", 9)
    assert [len(each.token_ids) for each in completions] == [num_tokens] * len(drafts), "the response has all"


def test_only_what_is_still_written_when_a_swap_comes_spans_it() -> None:
    drafts = [Draft(), Draft()]
    append(drafts[0], Delta(0, "a", [1], FINISH_REASON_STOP))
    append(drafts[1], Delta(1, "b", [1], FINISH_REASON_UNSPECIFIED))
    append(drafts[1], Delta(1, "c", [1], FINISH_REASON_STOP), spans_swap=True)
    completions = as_completions("s1", Hold(PolicyRef(version=7), spans_swap=True), drafts, str)
    assert [completion.spans_swap for completion in completions] == [False, True]


def test_deltas_are_in_order_of_the_completions() -> None:
    deltas = as_deltas({2: "b", 0: "a"}, {2: FINISH_REASON_STOP, 0: FINISH_REASON_UNSPECIFIED}).deltas
    assert [(each.index, each.text, each.finish_reason) for each in deltas] == [
        (0, "a", FINISH_REASON_UNSPECIFIED),
        (2, "b", FINISH_REASON_STOP),
    ]


def test_the_token_says_what_was_shown_to_whom_until_it_expires() -> None:
    completions = as_completions("s1", Hold(PolicyRef(version=7)), [Draft(), Draft()], str)
    token, expires = sign(KEYS, "s1", "shop", "ada", completions, ttl_seconds=60)
    now = datetime.now(UTC)
    claims = verify(token, KEYS, now)
    assert (claims.sample_id, claims.user_id, claims.expire_time) == ("s1", "ada", expires)
    assert [(each.completion_id, each.policy_version) for each in claims.completions] == [("s1.0", 7), ("s1.1", 7)]
    assert 59 < (expires.ToDatetime(tzinfo=UTC) - now).total_seconds() <= 60
    with pytest.raises(TokenError):
        verify(token, KEYS, now + timedelta(seconds=61))


def test_a_conversation_that_the_template_refuses_is_the_callers_fault(tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(make_tiny_llama(tmp_path / "tiny"))
    tokenizer.chat_template = "{{ raise_exception('roles must alternate') }}"
    prompt = Prompt(chat=Chat(messages=[Message(role=ROLE_USER, content="Why?")]))
    with pytest.raises(Refusal) as raised:
        render(prompt, cast(Any, SimpleNamespace(tokenizer=tokenizer)))
    assert raised.value.code is grpc.StatusCode.INVALID_ARGUMENT
    (violation,) = raised.value.violations
    assert (violation.field, "roles must alternate" in violation.description) == ("prompt.chat", True)


def test_a_token_that_the_model_has_no_embedding_for_is_refused_before_it_ends_the_engine(tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(make_tiny_llama(tmp_path / "tiny"))
    request = SampleRequest(prompt=Prompt(text="Why is the sky blue?"), num_completions=1)

    def planned(vocabulary: int) -> list[int]:
        return plan(
            request, cast(Any, SimpleNamespace(tokenizer=tokenizer, vocabulary=vocabulary, max_model_len=64)), 8
        ).token_ids

    most = max(planned(len(tokenizer)))
    with pytest.raises(Refusal) as raised:
        planned(most)
    assert raised.value.code is grpc.StatusCode.INVALID_ARGUMENT
    (violation,) = raised.value.violations
    token = tokenizer.convert_ids_to_tokens(most)
    assert (violation.field, violation.description) == (
        "prompt",
        f"has token {token!r} ({most}), which the model does not have: it has {most}",
    )
