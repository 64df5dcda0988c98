"""What ingest takes from the bus: our events that keep the contract. Of others it says why not."""

import time
from typing import Any

import pytest
from google.protobuf.message import Message

from alignd.v1 import events_pb2, types_pb2
from feedback.bus.contract import Delivered, Position
from feedback.bus.topics import DEMONSTRATIONS, RANKINGS, SAMPLES
from feedback.signature import signed
from feedback.store import stored
from feedback.store.decode import DeadLetter, Row, decode
from feedback.store.stored import is_off_distribution
from feedback.token import Keyring
from tests.feedback.events import KEYRING, delivered, demonstration, ranking, sample


def reason(record: Delivered) -> str:
    outcome = decode(record, KEYRING)
    assert isinstance(outcome, DeadLetter)
    return outcome.reason


def chat(*roles: int, content: str = "Why?") -> types_pb2.Prompt:
    messages = [types_pb2.Message(role=role, content=content) for role in roles]  # type: ignore[arg-type]
    return types_pb2.Prompt(chat=types_pb2.Chat(messages=messages))


@pytest.mark.parametrize(
    ("prompt", "field"),
    [
        (types_pb2.Prompt(text=""), "prompt.text"),
        (types_pb2.Prompt(text="x" * 65_537), "prompt.text"),
        (types_pb2.Prompt(), "prompt"),
        (chat(), "prompt.chat.messages"),
        (chat(0), "prompt.chat.messages[0].role"),
        (chat(2, 99), "prompt.chat.messages[1].role"),
        (chat(2, content=""), "prompt.chat.messages[0].content"),
        (chat(2, 3, content=""), "prompt.chat.messages[0].content"),
        (chat(2, 1), "the last one is the system's"),
        (chat(*[2] * 65), "prompt.chat.messages: must contain no more than 64"),
    ],
    ids=[
        "empty text",
        "long text",
        "no content",
        "no turns",
        "no role",
        "unknown role",
        "empty turn",
        "empty turns",
        "system last",
        "65 turns",
    ],
)
def test_a_prompt_that_a_request_could_not_have_is_refused_by_its_field(prompt: types_pb2.Prompt, field: str) -> None:
    """The trainer would end on some of these each time it starts."""
    event: Any = sample()
    event.prompt.CopyFrom(prompt)
    assert field in reason(delivered(event, 0))


def test_an_empty_answer_may_be_an_earlier_turn() -> None:
    event: Any = sample()
    event.prompt.CopyFrom(chat(2, 3, 2))
    event.prompt.chat.messages[1].content = ""
    assert isinstance(decode(delivered(event, 0), KEYRING), Row)
    event.prompt.chat.messages.pop()
    assert "prompt.chat.messages[1].content" in reason(delivered(event, 0))


def test_what_breaks_the_contract_elsewhere_is_refused_by_its_field() -> None:
    hot, wide, long = sample(), sample(num_completions=17), ranking("r", order=[[0], [1]])
    hot.sampling.temperature = 9  # type: ignore[attr-defined]
    long.comment = "x" * 4097  # type: ignore[attr-defined]
    assert "sampling.temperature" in reason(delivered(hot, 0))
    assert "completions: must contain no more than 16" in reason(delivered(wide, 0))
    assert "comment" in reason(delivered(long, 0))
    assert "groups: must contain no more than 16" in reason(delivered(ranking("r", order=[[0]] * 17), 0))
    assert "text" in reason(delivered(demonstration("d", text="x" * 65_537), 0))


@pytest.mark.parametrize("event", [sample(), ranking("r"), demonstration("d")], ids=["sample", "ranking", "demo"])
def test_only_what_our_keys_signed_is_taken(event: Message) -> None:
    record = delivered(event, 0)
    assert isinstance(decode(record, KEYRING), Row)
    assert isinstance(decode(record, Keyring("older", {"older": b"o" * 32, **KEYRING.secrets})), Row)
    foreign = Keyring("test", {"test": b"x" * 32})
    for value, said in {
        event.SerializeToString(): "not signed",
        signed(event, foreign): "signature with the key test is wrong",
        signed(event, Keyring("stranger", {"stranger": b"x" * 32})): "a key that the file of feedback keys",
        record.value[:9] + bytes([record.value[9] ^ 1]) + record.value[10:]: "is wrong",
        record.value + b"\x1a\x01v": "not signed",
        b"": "not signed",
    }.items():
        assert said in reason(Delivered(record.position, record.key, value, record.event_id))


def test_an_event_is_not_taken_for_one_of_another_kind() -> None:
    value = signed(ranking("r"), KEYRING)
    assert "is wrong" in reason(Delivered(Position(DEMONSTRATIONS, 0, 0), b"s1", value, "r"))


def test_a_flood_of_elements_that_nobody_signed_is_refused_before_it_is_parsed() -> None:
    for topic, element in ((SAMPLES, b"\x22\x02\x0a\x00"), (RANKINGS, b"\x2a\x00")):
        began_at = time.process_time()
        assert "not signed" in reason(Delivered(Position(topic, 0, 0), b"k", element * 1_000_000, "x"))
        assert time.process_time() - began_at < 0.5


@pytest.mark.parametrize("name", ["prompt.chat.messages", "completions", "groups", "groups[0].completion_ids"])
def test_a_flood_is_counted_before_each_element_is_looked_at(name: str) -> None:
    asked: Any = sample()
    ranked: Any = ranking("r")
    if name.startswith("groups"):
        ids = [str(number) for number in range(50_000)]
        del ranked.groups[:]
        for each in [ids] if "[0]" in name else [[each] for each in ids]:
            ranked.groups.add(completion_ids=each)
    elif name == "completions":
        asked.completions.extend([asked.completions[0]] * 50_000)
    else:
        asked.prompt.CopyFrom(chat(*[2] * 50_000))
    record = delivered(ranked if name.startswith("groups") else asked, 0)
    began_at = time.process_time()
    assert f"{name}: must contain no more than" in reason(record)
    assert time.process_time() - began_at < 1


def test_the_signature_does_not_make_two_attempts_differ() -> None:
    first = decode(delivered(ranking("r"), 0), KEYRING)
    again = ranking("r", time_seconds=7)
    other = signed(again, Keyring("older", KEYRING.secrets))
    second = decode(Delivered(Position(RANKINGS, 0, 1), b"s1", other, "r"), KEYRING)
    assert isinstance(first, Row)
    assert isinstance(second, Row)
    assert first.content_digest == second.content_digest
    assert events_pb2.RankingEvent.FromString(second.event).key_id == "older"


@pytest.mark.parametrize(
    ("fields", "off"),
    [
        ({}, False),
        ({"temperature": 1.0, "top_p": 1.0, "min_p": 0.0, "repetition_penalty": 1.0, "max_tokens": 9}, False),
        ({"stop": ["a"], "seed": 7}, False),
        ({"temperature": 0.0}, True),
        ({"temperature": 0.7}, True),
        ({"top_p": 0.9}, True),
        ({"top_k": 5}, True),
        ({"min_p": 0.1}, True),
        ({"presence_penalty": -1.0}, True),
        ({"frequency_penalty": 1.0}, True),
        ({"repetition_penalty": 1.1}, True),
        ({"structured": types_pb2.StructuredOutput(regex="a+")}, True),
    ],
)
def test_a_sample_tells_whether_it_was_drawn_as_the_policy_draws(fields: dict[str, Any], off: bool) -> None:
    assert is_off_distribution(types_pb2.SamplingParams(**fields)) is off


def test_every_parameter_was_thought_of() -> None:
    known = {*stored._OWN, "top_k", "structured", "ignore_eos"}
    harmless = {"max_tokens", "stop", "seed"}
    assert {field.name for field in types_pb2.SamplingParams.DESCRIPTOR.fields} == known | harmless
