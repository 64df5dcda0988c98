"""Rankings are read with their samples, each user's last one of each sample, within the bounds that are asked for."""

from typing import Any

import pytest

from alignd.v1 import types_pb2
from feedback.bus.contract import Position
from feedback.bus.topics import RANKINGS
from feedback.store.ledger import Ledger
from feedback.store.reader import Store
from feedback.store.stored import Tally
from tests.feedback.events import TIME_SECONDS, demonstration, ranking, sample
from tests.feedback.store.writing import write_events


def test_a_ranking_is_joined_with_its_sample(ledger: Ledger, store: Store) -> None:
    write_events(ledger, sample(), ranking("r1", order=[[2], [0, 1]]))
    (group,) = store.ranked_groups()
    assert (group.ranking_id, group.sample_id, group.user_id, group.seq) == ("r1", "s1", "u", store.last_seq())
    assert group.prompt == types_pb2.Prompt(text="Why?")
    assert group.position == Position(RANKINGS, 0, 1)
    assert [(each.completion_id, each.rank, each.text) for each in group.completions] == [
        ("s1-2", 0, "because 2"),
        ("s1-0", 1, "because 0"),
        ("s1-1", 1, "because 1"),
    ]
    assert {each.policy_version for each in group.completions} == {7}
    assert all(each.ended for each in group.completions)


def test_a_ranking_may_come_before_its_sample(ledger: Ledger, store: Store) -> None:
    write_events(ledger, ranking("r1"))
    assert store.num_rankings() == 1
    assert store.ranked_groups() == []
    write_events(ledger, sample())
    assert [group.ranking_id for group in store.ranked_groups()] == ["r1"]


@pytest.mark.parametrize("order_in_the_log", [[0, 1, 2], [2, 1, 0], [1, 2, 0]])
def test_the_last_ranking_in_the_log_replaces_the_others_whatever_clocks_say(
    ledger: Ledger, store: Store, order_in_the_log: list[int]
) -> None:
    """A clock that is set back would otherwise let a correction lose for ever against what it corrects."""
    rankings = [ranking("c", time_seconds=0), ranking("a", time_seconds=10), ranking("b", time_seconds=10)]
    write_events(ledger, sample(), *(rankings[index] for index in order_in_the_log))
    assert [group.ranking_id for group in store.ranked_groups()] == ["cab"[order_in_the_log[-1]]]
    assert store.num_rankings() == 3


def test_another_users_ranking_replaces_nothing(ledger: Ledger, store: Store) -> None:
    other = ranking("r2", time_seconds=10)
    other.user_id = "v"  # type: ignore[attr-defined]
    write_events(ledger, sample(), ranking("r1"), other)
    assert [group.ranking_id for group in store.ranked_groups()] == ["r1", "r2"]


def test_rankings_are_counted_and_read_from_a_number_on(ledger: Ledger, store: Store) -> None:
    assert (store.last_seq(), store.num_rankings()) == (0, 0)
    write_events(ledger, sample("s1"), sample("s2"), ranking("r1", "s1"))
    seq = store.last_seq()
    write_events(ledger, ranking("r2", "s2"), ranking("r3", "s1", time_seconds=5))
    assert store.num_rankings(after_seq=seq) == 2
    assert [group.ranking_id for group in store.ranked_groups(after_seq=seq)] == ["r2", "r3"]
    assert store.last_seq() > seq


def test_the_newest_rankings_come_oldest_first(ledger: Ledger, store: Store) -> None:
    samples = [sample(f"s{number}") for number in range(4)]
    write_events(ledger, *samples, *(ranking(f"r{number}", f"s{number}") for number in range(4)))
    assert [group.ranking_id for group in store.ranked_groups(newest=2)] == ["r2", "r3"]
    assert store.ranked_groups(newest=9) == store.ranked_groups()


def test_with_bounds_a_reader_sees_what_was_there(ledger: Ledger, store: Store) -> None:
    write_events(ledger, sample("s1"), ranking("first", "s1"), ranking("early", "s2"))
    seq, sample_seq = store.last_seq(), store.last_sample_seq()
    before = store.ranked_groups(up_to_seq=seq, up_to_sample_seq=sample_seq)
    assert [group.ranking_id for group in before] == ["first"]
    write_events(ledger, sample("s2"), ranking("second", "s1", time_seconds=5), ranking("other", "s2", time_seconds=5))
    assert store.ranked_groups(up_to_seq=seq, up_to_sample_seq=sample_seq) == before
    assert [group.ranking_id for group in store.ranked_groups(up_to_seq=seq)] == ["first", "early"]
    assert [group.ranking_id for group in store.ranked_groups()] == ["second", "other"]


def test_a_ranking_is_replaced_within_the_bound(ledger: Ledger, store: Store) -> None:
    write_events(ledger, sample(), ranking("a"), ranking("b", time_seconds=5), ranking("c", time_seconds=10))
    (newest,) = store.ranked_groups()
    assert newest.ranking_id == "c"
    bounds = range(newest.seq - 3, newest.seq + 1)
    assert [[g.ranking_id for g in store.ranked_groups(up_to_seq=bound)] for bound in bounds] == [
        [],
        ["a"],
        ["b"],
        ["c"],
    ]
    assert store.ranked_groups(after_seq=newest.seq - 2, up_to_seq=newest.seq - 2) == []
    # The ranking that counts has a number before the first one that is asked for.
    assert [g.ranking_id for g in store.ranked_groups(after_seq=newest.seq - 2, up_to_seq=newest.seq - 1)] == ["b"]


def test_who_ranked_and_who_asked_first_is_told_of_what_would_be_read(ledger: Ledger, store: Store) -> None:
    asked: Any = sample("s0", "Why?", user_id="ann")
    asked.event_time.seconds -= 10
    late: Any = ranking("r2", "s2", time_seconds=5)
    late.event_time.nanos = 250_000_000
    write_events(ledger, sample("s1"), sample("s2", "How?"), ranking("r1"), late, ranking("r3", time_seconds=9))
    write_events(ledger, asked, ranking("orphan", "elsewhere"))
    second, third = store.ranking_senders(0, 9)
    assert (second.user_id, second.first_user_id, second.time) == ("u", "u", TIME_SECONDS + 5.25)
    assert (third.first_user_id, third.time) == ("ann", TIME_SECONDS + 9)
    assert store.ranking_senders(second.seq, 9) == [third]
    assert store.ranking_senders(0, 1) == [second]
    assert [group.ranking_id for group in store.ranked_groups_of([third.seq])] == ["r3"]


def test_what_is_never_read_is_counted(ledger: Ledger, store: Store) -> None:
    write_events(ledger, sample("s1"), ranking("r1"), ranking("r2", time_seconds=5), ranking("orphan", "s2"))
    seq, sample_seq = store.last_seq(), store.last_sample_seq()
    write_events(ledger, sample("s2", "How?"), ranking("r3", time_seconds=9), demonstration("d1", "s3"))
    assert store.tally_rankings(seq, sample_seq) == Tally(stored=3, no_sample=1, superseded=1)
    assert store.tally_rankings() == Tally(stored=4, no_sample=0, superseded=2)
    assert store.tally_demonstrations() == Tally(stored=1, no_sample=1, superseded=0)
    assert (store.num_prompts(), store.num_prompts(sample_seq)) == (2, 1)
