"""The tokens of a sample: what the engine drew is what the caller gets on request, and what the trainer reads."""

from pathlib import Path

import pytest
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from alignd.v1.inference_service_pb2 import SampleResponse, StreamSampleRequest
from alignd.v1.types_pb2 import FINISH_REASON_LENGTH, FINISH_REASON_STOP, Completion
from feedback.store.reader import Store
from feedback.store.stored import RankedGroup
from policies.encoding import plain_token_ids, tokenizer_digest
from policies.rendering import prompt_token_ids
from tests.serving.calls import (
    END_TOKEN_IDS,
    TIMEOUT_SECONDS,
    Stubs,
    chat,
    conversation,
    draw,
    ranking_request,
    sample_request,
    sampling,
    texts,
)
from tests.serving.processes import Server, wait_until
from training.data.tokens import completion_token_ids, sample_prompt_token_ids

pytestmark = pytest.mark.timeout(300)


@pytest.fixture(scope="module")
def tokenizer(tiny_llama: Path) -> PreTrainedTokenizerBase:
    loaded: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(tiny_llama)
    return loaded


def ranked(stubs: Stubs, server: Server, response: SampleResponse) -> RankedGroup:
    """Ranks a sample, best first by index, and returns it as the trainer reads it."""
    store = Store(server.store_url)
    found: list[RankedGroup] = []

    def is_stored() -> bool:
        found[:] = [each for each in store.ranked_groups() if each.sample_id == response.sample_id]
        return bool(found)

    try:
        stubs.feedback.SubmitRanking(ranking_request(response), timeout=TIMEOUT_SECONDS)
        wait_until(is_stored, 30, "the ranking in the store")
    finally:
        store.close()
    return found[0]


def test_the_trainer_reads_the_tokens_that_were_drawn_and_either_end_token(
    stubs: Stubs, server: Server, tokenizer: PreTrainedTokenizerBase
) -> None:
    response = draw(stubs, num_completions=16, sampling=sampling(max_tokens=450, seed=5), return_token_ids=True)
    assert list(response.prompt_token_ids) == prompt_token_ids(tokenizer, chat())
    for completion in response.completions:
        token_ids = list(completion.token_ids)
        assert len(token_ids) == completion.num_tokens
        ended = completion.HasField("end_token_id")
        assert completion.finish_reason == (FINISH_REASON_STOP if ended else FINISH_REASON_LENGTH)
        assert not set(token_ids[:-1]) & set(END_TOKEN_IDS)
        assert (token_ids[-1] in END_TOKEN_IDS) == ended
        assert not ended or token_ids[-1] == completion.end_token_id
        assert tokenizer.decode(token_ids, skip_special_tokens=True).startswith(completion.text)
    assert {each.end_token_id for each in response.completions if each.HasField("end_token_id")} == {*END_TOKEN_IDS}
    encoded = [plain_token_ids(tokenizer, each.text) for each in response.completions]
    drawn = [list(each.token_ids) for each in response.completions]
    assert any(one != other[: len(one)] for one, other in zip(encoded, drawn, strict=True)), "text does not say which"

    group = ranked(stubs, server, response)
    assert {each.drawn.tokenizer_digest for each in group.completions if each.drawn} == {tokenizer_digest(tokenizer)}
    assert sample_prompt_token_ids(tokenizer, group.prompt, group.completions) == tuple(response.prompt_token_ids)
    assert [list(completion_token_ids(tokenizer, group.prompt, each)) for each in group.completions] == drawn
    assert [each.ended for each in group.completions] == [
        each.HasField("end_token_id") for each in response.completions
    ]


def test_behind_a_stop_string_nothing_is_learned(
    stubs: Stubs, server: Server, tokenizer: PreTrainedTokenizerBase
) -> None:
    response = draw(stubs, sampling=sampling(max_tokens=200, stop=["e", "a"], seed=3), return_token_ids=True)
    assert {each.finish_reason for each in response.completions} == {FINISH_REASON_STOP}
    assert not any(each.HasField("end_token_id") for each in response.completions)
    group = ranked(stubs, server, response)
    for stored, completion in zip(group.completions, response.completions, strict=True):
        learned = completion_token_ids(tokenizer, group.prompt, stored)
        assert not stored.ended
        assert tokenizer.decode(list(learned), skip_special_tokens=True) == completion.text


def test_only_who_asks_gets_tokens(stubs: Stubs) -> None:
    response = draw(stubs)
    assert not response.prompt_token_ids
    assert not any(each.token_ids or each.HasField("end_token_id") for each in response.completions)


def test_a_stream_and_a_call_return_the_same_tokens(stubs: Stubs) -> None:
    request = sample_request(sampling=sampling(seed=11, stop=["e"]), return_token_ids=True)
    (*_, last) = stubs.inference.StreamSample(
        StreamSampleRequest.FromString(request.SerializeToString()), timeout=TIMEOUT_SECONDS
    )
    response = stubs.inference.Sample(request, timeout=TIMEOUT_SECONDS)

    def tokens(completion: Completion) -> list[int]:
        return list(completion.token_ids)

    assert [tokens(each) for each in last.finished.completions] == [tokens(each) for each in response.completions]
    assert list(last.finished.prompt_token_ids) == list(response.prompt_token_ids)


def test_the_assistants_last_turn_is_continued(stubs: Stubs, tokenizer: PreTrainedTokenizerBase) -> None:
    prompt = conversation(("user", "Why?"), ("assistant", "Because the air"))
    response = draw(stubs, prompt=prompt, return_token_ids=True)
    rendered = "<|im_start|>user\nWhy?<|im_end|>\n<|im_start|>assistant\nBecause the air"
    assert tokenizer.decode(list(response.prompt_token_ids)) == rendered
    assert not any("Because the air" in text for text in texts(response))


def test_an_empty_completion_can_be_sent_back(stubs: Stubs) -> None:
    prompt = conversation(("user", "Why?"), ("assistant", ""), ("user", "And?"))
    assert draw(stubs, prompt=prompt).completions
