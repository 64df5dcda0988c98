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

from alignd.v1.types_pb2 import (
    FINISH_REASON_STOP,
    FINISH_REASON_UNSPECIFIED,
    ROLE_USER,
    Chat,
    Message,
    PolicyRef,
    Prompt,
)
from deploy.models import make_tiny_llama
from feedback.token import Keyring, TokenError, verify
from serving.errors import Refusal
from serving.sampler import Draft, Quota, append, as_completions, as_deltas, render, sign
from serving.slot import Hold
from serving.vllm_engine import Delta

KEYS = Keyring("k1", {"k1": b"s" * 32})


def test_the_quota_refuses_what_does_not_fit_and_takes_it_again_later() -> None:
    quota = Quota(20)
    quota.take(16)
    with pytest.raises(Refusal) as raised:
        quota.take(5)
    assert raised.value.code is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert raised.value.retry_after_seconds
    quota.take(4)
    quota.give_back(16)
    quota.take(16)
    assert quota.taken == 20


@given(texts=st.lists(st.tuples(st.integers(0, 3), st.text(max_size=5)), max_size=30))
def test_a_completion_is_what_was_written_of_it(texts: list[tuple[int, str]]) -> None:
    drafts = [Draft() for _ in range(4)]
    for index, text in texts:
        append(drafts[index], Delta(index, text, len(text), FINISH_REASON_UNSPECIFIED))
    for index, draft in enumerate(drafts):
        append(draft, Delta(index, "", 1, FINISH_REASON_STOP))
    policy = PolicyRef(version=7, weight_digest="d" * 64)
    completions = as_completions("s1", Hold(policy, spans_swap=True), drafts)
    for index, completion in enumerate(completions):
        expected = "".join(text for where, text in texts if where == index)
        assert (completion.index, completion.text, completion.num_tokens) == (index, expected, len(expected) + 1)
        assert (completion.finish_reason, completion.policy) == (FINISH_REASON_STOP, policy)
        assert completion.spans_swap
    assert len({completion.completion_id for completion in completions}) == 4


def test_deltas_are_in_order_of_the_completions() -> None:
    deltas = as_deltas({2: "b", 0: "a"}, {2: FINISH_REASON_STOP, 0: FINISH_REASON_UNSPECIFIED}).deltas
    assert [(each.index, each.text, each.finish_reason) for each in deltas] == [
        (0, "a", FINISH_REASON_UNSPECIFIED),
        (2, "b", FINISH_REASON_STOP),
    ]


def test_the_token_says_what_was_shown_to_whom_until_it_expires() -> None:
    completions = as_completions("s1", Hold(PolicyRef(version=7)), [Draft(), Draft()])
    token, expires = sign(KEYS, "s1", "ada", completions, ttl_seconds=60)
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
