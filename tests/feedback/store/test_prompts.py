"""Prompts are read once each, with the user who was the first to send it."""

from typing import Any

from feedback.store.ledger import Ledger
from feedback.store.reader import Store
from tests.feedback.events import chat, sample
from tests.feedback.store.writing import write_events


def test_prompts_come_once_each_the_newest_first(ledger: Ledger, store: Store) -> None:
    write_events(ledger, sample("s1", "a"), sample("s2", "b"), sample("s3", "a"), sample("s4", "c"))
    assert [(each.sample_id, each.prompt.text) for each in store.prompts(10)] == [("s4", "c"), ("s3", "a"), ("s2", "b")]
    assert [each.sample_id for each in store.prompts(1)] == ["s4"]


def test_a_prompt_has_the_user_who_was_the_first_to_send_it(ledger: Ledger, store: Store) -> None:
    write_events(ledger, sample("s1", "a", user_id="ann"), sample("s2", "a", user_id="bob"), sample("s3", "b"))
    seq = store.last_sample_seq()
    write_events(ledger, sample("s4", "a", user_id="eve"))
    found = [(each.sample_id, each.first_user_id) for each in store.prompts(10)]
    assert found == [("s4", "ann"), ("s3", "u")]
    found = [(each.sample_id, each.first_user_id) for each in store.prompts(10, up_to_seq=seq)]
    assert found == [("s3", "u"), ("s2", "ann")]


def test_a_store_that_is_built_anew_has_the_same_first_senders(ledger: Ledger, store: Store) -> None:
    """They are the first by the events' time: what arrives first differs from one reading of the log to the next."""
    events: list[Any] = [sample(f"s{index}", "a", user_id=f"user {index}") for index in range(4)]
    for event, seconds in zip(events, (3, 1, 2, 1), strict=True):
        event.event_time.seconds += seconds
    write_events(ledger, *events)
    (found,) = store.prompts(10)
    assert (found.sample_id, found.first_user_id) == ("s3", "user 1")
    assert [each.first_user_id for each in store.unranked(9)] == ["user 1"] * 4
    (early,) = store.prompts(10, up_to_seq=1)
    assert early.first_user_id == "user 0"


def test_a_prompt_is_the_same_however_its_white_space_is_written(ledger: Ledger, store: Store) -> None:
    asked: Any = sample("s4", user_id="eve")
    asked.prompt.CopyFrom(chat("rice?"))
    write_events(ledger, sample("s1", "rice?", user_id="ann"), sample("s2", " rice? ", user_id="bob"), asked)
    assert [(each.sample_id, each.first_user_id) for each in store.prompts(10)] == [("s4", "eve"), ("s2", "ann")]


def test_prompts_up_to_a_sample_do_not_change_when_more_come(ledger: Ledger, store: Store) -> None:
    assert store.last_sample_seq() == 0
    write_events(ledger, sample("s1", "a"), sample("s2", "b"))
    seq = store.last_sample_seq()
    before = store.prompts(10)
    write_events(ledger, sample("s3", "a"), sample("s4", "c"))
    assert store.last_sample_seq() > seq
    assert store.prompts(10, up_to_seq=seq) == before
    assert [each.sample_id for each in store.prompts(1, up_to_seq=seq)] == ["s2"]
    assert store.prompts(10, up_to_seq=0) == []
