"""What is no event of ours becomes a dead letter, and the rest is stored."""

from dataclasses import replace
from typing import Any

from google.protobuf.message import Message
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from alignd.v1 import events_pb2
from feedback.bus.contract import Delivered, Position
from feedback.bus.topics import FEEDBACK_TOPICS
from feedback.store.ledger import Ledger, Offset
from feedback.store.reader import Store
from feedback.token import Keyring
from tests.feedback.events import delivered, demonstration, ranking, sample
from tests.feedback.store.writing import unpublished, write


def invalid_events() -> list[Message]:
    broken: list[Any] = [sample(), sample(), sample(num_completions=0), sample(), sample("x" * 257), sample("a\0b")]
    broken[0].ClearField("prompt")
    broken[1].completions[1].completion_id = broken[1].completions[0].completion_id
    broken[3].ClearField("event_time")
    rankings: list[Any] = [
        ranking(""),
        ranking("r", ""),
        ranking("r", order=[]),
        ranking("r", order=[[0], []]),
        ranking("r", order=[[0], [0]]),
        ranking("r", order=[[0, 0]]),
        ranking("r"),
        ranking("r"),
        ranking("r"),
    ]
    rankings[-1].user_id = ""
    rankings[-2].user_id = "u\0"
    rankings[-3].event_time.seconds = 1 << 60
    return [*broken, *rankings, demonstration(""), demonstration("d", ""), demonstration("d", text="")]


def test_each_invalid_event_is_a_dead_letter_and_the_rest_is_stored(ledger: Ledger, store: Store) -> None:
    poison = [delivered(event, offset) for offset, event in enumerate(invalid_events())]
    assert write(ledger, [*poison, delivered(ranking("good"), len(poison))]) == len(poison)
    letters = {event_id: events_pb2.DeadLetterEvent.FromString(raw) for event_id, raw in unpublished(ledger)}
    assert all(letter.event_id == event_id and letter.reason for event_id, letter in letters.items())
    kept = {(each.position.topic, each.position.offset, each.key, each.value) for each in letters.values()}
    assert kept == {(each.position.topic, each.position.offset, each.key, each.value) for each in poison}
    assert store.num_rankings() == 1
    ledger.mark_published(list(letters))
    assert unpublished(ledger) == []


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.binary(max_size=300), st.sampled_from(FEEDBACK_TOPICS))
def test_no_bytes_break_the_ledger(ledger: Ledger, value: bytes, topic: str) -> None:
    offset = max((offset.next_offset for offset in ledger.offsets().values()), default=0)
    assert write(ledger, [Delivered(Position(topic, 0, offset), b"key", value, "id")]) in {0, 1}
    assert ledger.offsets()[topic, 0] == Offset("log", offset + 1)


def test_what_is_stored_is_none_when_the_log_is_read_again_without_its_key(ledger: Ledger, store: Store) -> None:
    stored = [delivered(event, n) for n, event in enumerate([sample(), ranking("r"), demonstration("d")])]
    assert write(ledger, stored) == 0
    forged = replace(delivered(ranking("r", order=[[1], [0], [2]]), 3), event_id="r")
    nameless = replace(delivered(ranking("other"), 4), event_id="r\0")
    without = Keyring("new", {"new": b"n" * 32})
    again = [*stored, forged, nameless]
    after = {(each.position.topic, each.position.partition): Offset("log", 9) for each in again}
    assert ledger.write(again, ledger.offsets(), after, without) == 2
    assert (store.num_rankings(), store.num_dead_letters()) == (1, 2)
