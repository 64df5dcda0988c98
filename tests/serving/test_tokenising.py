"""Prompts are tokenised beside the event loop, in turn, and only those that can fit."""

import asyncio
import itertools
import threading
import time
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from alignd.v1.types_pb2 import ROLE_ASSISTANT, ROLE_USER, Chat, Message, Prompt
from deploy.models import make_tiny_llama
from serving.errors import Refusal
from serving.tokenising import MOST_WAITING, TokenBytes, Tokenising, bytes_of_a_token, check_bytes
from tests.serving.calls import TIMEOUT_SECONDS, Stubs, sample_request

LETTERS = {chr(code): code for code in range(0x21, 0x7F)}


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return AutoTokenizer.from_pretrained(make_tiny_llama(tmp_path_factory.mktemp("tokens") / "tiny"))


async def test_work_is_done_beside_the_event_loop() -> None:
    tokenising, ticks = Tokenising(), itertools.count()
    released = threading.Event()
    working = asyncio.ensure_future(tokenising.run(1, lambda: (released.wait(20), threading.current_thread())))
    while next(ticks) < 100:
        await asyncio.sleep(0)
    assert not working.done()
    released.set()
    waited, thread = await working
    assert waited
    assert thread is not threading.current_thread()


async def test_short_prompts_have_their_turn_before_long_ones_and_who_leaves_has_none() -> None:
    tokenising, released, order = Tokenising(), threading.Event(), list[int]()

    def work(size: int) -> int:
        released.wait(20)
        order.append(size)
        return size

    calls = [asyncio.ensure_future(tokenising.run(size, work, size)) for size in (5, 900, 30, 20, 10)]
    await asyncio.sleep(0.01)
    calls[3].cancel()
    await asyncio.sleep(0.01)
    released.set()
    done = await asyncio.gather(*calls, return_exceptions=True)
    assert order == [5, 10, 30, 900]
    assert isinstance(done[3], asyncio.CancelledError)
    assert await tokenising.run(1, work, 1) == 1


async def test_who_leaves_during_their_turn_leaves_it_to_the_next() -> None:
    tokenising, released = Tokenising(), threading.Event()
    leaving = asyncio.ensure_future(tokenising.run(1, released.wait, 20))
    await asyncio.sleep(0.01)
    leaving.cancel()
    released.set()
    assert await asyncio.wait_for(tokenising.run(1, lambda: "next"), 20) == "next"


async def test_of_too_many_the_longest_is_turned_away() -> None:
    tokenising, released = Tokenising(), threading.Event()
    first = asyncio.ensure_future(tokenising.run(1, released.wait, 20))
    calls = [asyncio.ensure_future(tokenising.run(size, int, size)) for size in range(1000, 1000 + MOST_WAITING)]
    await asyncio.sleep(0.01)
    with pytest.raises(Refusal, match="256 shorter prompts wait") as raised:
        await tokenising.run(9999, int, 9999)
    assert raised.value.code is grpc.StatusCode.RESOURCE_EXHAUSTED
    short = asyncio.ensure_future(tokenising.run(2, int, 2))
    await asyncio.sleep(0.01)
    released.set()
    *done, last = await asyncio.gather(*calls, return_exceptions=True)
    assert done == [*range(1000, 999 + MOST_WAITING)]
    assert isinstance(last, Refusal)
    assert (await first, await short) == (True, 2)


async def test_what_work_raises_is_raised() -> None:
    tokenising = Tokenising()
    with pytest.raises(ZeroDivisionError):
        await tokenising.run(1, lambda: 1 // 0)
    assert await tokenising.run(1, lambda: 2) == 2


@given(text=st.text(), max_tokens=st.integers(1, 12))
def test_nothing_that_fits_is_refused(tokenizer: Any, text: str, max_tokens: int) -> None:
    if len(tokenizer.encode(text)) <= max_tokens:
        check_bytes(Prompt(text=text), tokenizer, max_tokens)


def test_a_megabyte_is_refused_before_it_is_tokenised(tokenizer: Any) -> None:
    class Untouched:
        """Stands in for the tokenizer, to see that nothing is tokenised."""

        def __getattr__(self, name: str) -> Any:
            assert name in ("backend_tokenizer", "get_vocab", "get_added_vocab"), name
            return getattr(tokenizer, name)

    chat = Chat(messages=[Message(role=ROLE_USER, content="why " * 16_000)] * 16)
    began = time.process_time()
    with pytest.raises(Refusal) as raised:
        check_bytes(Prompt(chat=chat), Untouched(), 1024)
    assert time.process_time() - began < 1
    assert [each.field for each in raised.value.violations] == ["prompt"]
    assert "768000 bytes" in raised.value.message


def test_what_a_template_may_leave_out_does_not_count(tokenizer: Any) -> None:
    messages = [
        Message(role=ROLE_USER, content=" \n" * 20_000 + "Why?"),
        Message(role=ROLE_ASSISTANT, content="<think>" + "x" * 50_000),
        Message(role=ROLE_USER, content="And?"),
    ]
    check_bytes(Prompt(chat=Chat(messages=messages)), tokenizer, 100)


def fast(tokenizer: Tokenizer) -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


def byte_level(normalizer: Any = None, without: str = "") -> PreTrainedTokenizerFast:
    names = [each for each in sorted(pre_tokenizers.ByteLevel.alphabet()) if each not in without] + ["an", "and"]
    made = Tokenizer(models.BPE({name: index for index, name in enumerate(names)}, [("a", "n"), ("an", "d")]))
    made.pre_tokenizer, made.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    if normalizer:
        made.normalizer = normalizer
    return fast(made)


def test_a_token_holds_as_many_bytes_as_its_name_and_normal_forms_more() -> None:
    assert bytes_of_a_token(byte_level()) == TokenBytes(3, b"")
    assert bytes_of_a_token(byte_level(without="xĀ")) == TokenBytes(3, b"\0x")
    assert bytes_of_a_token(byte_level(normalizers.NFC())) == TokenBytes(9, b"")
    assert bytes_of_a_token(byte_level(normalizers.Sequence([normalizers.Replace(" ", "▁")]))) == TokenBytes(3, b"")


def test_where_a_token_can_hold_any_text_nothing_is_refused_by_its_bytes() -> None:
    unknown = Tokenizer(models.WordLevel({"why": 0, "?": 1}, unk_token="?"))
    fused = Tokenizer(models.BPE(LETTERS, [], unk_token="!", fuse_unk=True))
    removing = Tokenizer(models.BPE(LETTERS, [], byte_fallback=True))
    removing.pre_tokenizer = pre_tokenizers.Split("a", "removed")
    tokenizers = [fast(unknown), fast(fused), fast(removing)]
    for normalizer in (normalizers.NFKC(), normalizers.StripAccents(), normalizers.Replace("ab", "a")):
        tokenizers.append(byte_level(normalizer))
    for each in tokenizers:
        assert bytes_of_a_token(each) is None
        check_bytes(Prompt(text="a" * 60_000), each, 1)


def test_health_answers_while_a_long_chat_is_read(stubs: Stubs) -> None:
    """A megabyte of earlier answers, which a template may leave out, is tokenised."""
    messages = [Message(role=ROLE_ASSISTANT, content="why is it so? " * 4_600)] * 15
    chat = Chat(messages=[*messages, Message(role=ROLE_USER, content="Why?")])
    health: Any = health_pb2_grpc.HealthStub(stubs.channel)
    began = time.monotonic()
    call = stubs.inference.Sample.future(sample_request(prompt=Prompt(chat=chat)), timeout=TIMEOUT_SECONDS)
    longest = 0.0
    while not call.done():
        asked = time.monotonic()
        health.Check(health_pb2.HealthCheckRequest(), timeout=TIMEOUT_SECONDS)
        longest = max(longest, time.monotonic() - asked)
    lasted = time.monotonic() - began
    assert call.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert longest < lasted / 2, f"health took {longest:.2f} of the {lasted:.2f} s"
