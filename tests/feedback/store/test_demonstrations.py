"""Demonstrations are read with their samples, each user's last one of each sample."""

from typing import Any

from alignd.v1 import types_pb2
from feedback.store.ledger import Ledger
from feedback.store.reader import Store
from feedback.store.stored import StoredDemonstration
from tests.feedback.events import demonstration, sample
from tests.feedback.store.writing import write_events


def test_a_demonstration_is_joined_with_its_sample(ledger: Ledger, store: Store) -> None:
    assert store.demonstrations() == []
    write_events(ledger, demonstration("d2", "s2", "early"), sample("s1", "Why?"), demonstration("d1", "s1", "So."))
    (found,) = store.demonstrations()
    assert found == StoredDemonstration(found.seq, "d1", "s1", "u", types_pb2.Prompt(text="Why?"), "So.", "u")
    write_events(ledger, sample("s2", "How?"))
    assert [(each.demonstration_id, each.prompt.text) for each in store.demonstrations()] == [
        ("d2", "How?"),
        ("d1", "Why?"),
    ]
    assert [each.demonstration_id for each in store.demonstrations(after_seq=found.seq - 1)] == ["d1"]
    assert store.demonstrations(after_seq=found.seq) == []


def test_a_users_last_demonstration_of_a_sample_counts(ledger: Ledger, store: Store) -> None:
    earlier_by_clock: Any = demonstration("a", text="last in the log")
    others: Any = demonstration("c")
    earlier_by_clock.event_time.seconds -= 1
    others.user_id = "v"
    log = [sample("s1"), sample("s2"), demonstration("b"), earlier_by_clock, others, demonstration("d", "s2")]
    write_events(ledger, *log)
    assert [each.demonstration_id for each in store.demonstrations()] == ["a", "c", "d"]
    write_events(ledger, demonstration("e", "s2", "another"))
    assert [each.demonstration_id for each in store.demonstrations()] == ["a", "c", "e"]
