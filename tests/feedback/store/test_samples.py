"""Samples are read with what is known of each completion: its tokens, its end, and whether it spans a swap."""

import pytest

from alignd.v1 import events_pb2, types_pb2
from feedback.store.ledger import Ledger
from feedback.store.reader import Store
from feedback.store.stored import DrawnTokens
from tests.feedback.events import ranking, sample
from tests.feedback.store.writing import write_events


@pytest.mark.parametrize(
    ("reason", "stop", "ended"),
    [
        (types_pb2.FINISH_REASON_STOP, [], True),
        (types_pb2.FINISH_REASON_LENGTH, [], False),
        (types_pb2.FINISH_REASON_STOP, ["."], False),
    ],
    ids=["ended", "cut off by a limit", "perhaps cut off by a stop string"],
)
def test_a_completion_has_its_end_only_where_the_policy_is_known_to_have_ended_it(
    ledger: Ledger, store: Store, reason: types_pb2.FinishReason, stop: list[str], ended: bool
) -> None:
    drawn = sample()
    assert isinstance(drawn, events_pb2.SampleEvent)
    drawn.sampling.stop.extend(stop)
    for each in drawn.completions:
        each.finish_reason = reason
    write_events(ledger, drawn)
    assert [each.ended for found in store.unranked(9) for each in found.completions] == [ended] * 3
    write_events(ledger, ranking("r1"))
    assert [each.ended for found in store.ranked_groups() for each in found.completions] == [ended] * 3


def test_a_completions_tokens_and_its_end_token_are_read_as_they_were_drawn(ledger: Ledger, store: Store) -> None:
    drawn = sample()
    assert isinstance(drawn, events_pb2.SampleEvent)
    drawn.sampling.stop.append(".")
    drawn.prompt_token_ids.extend([7, 8])
    drawn.tokenizer_digest = "d" * 64
    for each in drawn.completions:
        each.token_ids.extend([5, 250_000 + each.index])
    drawn.completions[0].end_token_id = 250_000
    write_events(ledger, drawn)
    unranked = [each for found in store.unranked(9) for each in found.completions]
    write_events(ledger, ranking("r1"))
    (group,) = store.ranked_groups()
    for completions in (unranked, group.completions):
        assert [each.ended for each in completions] == [True, False, False]
        assert [each.drawn for each in completions] == [
            DrawnTokens((7, 8), (5, 250_000 + index), index > 0, "d" * 64, None if index else 250_000)
            for index in range(3)
        ]


def test_the_end_token_is_read_where_the_others_are_not_kept(ledger: Ledger, store: Store) -> None:
    """A sample that would be too long for the bus with its tokens has none but these."""
    long = sample()
    assert isinstance(long, events_pb2.SampleEvent)
    long.tokenizer_digest = "d" * 64
    long.completions[0].end_token_id = 0
    write_events(ledger, long)
    (found,) = store.unranked(9)
    assert [each.drawn for each in found.completions] == [
        DrawnTokens((), (), index > 0, "d" * 64, None if index else 0) for index in range(3)
    ]
    assert [each.ended for each in found.completions] == [True, False, False]


def test_a_completion_that_spans_a_swap_is_left_out(ledger: Ledger, store: Store) -> None:
    write_events(ledger, sample("s1", spanning=1), ranking("r1", "s1"), sample("s2", num_completions=2, spanning=0))
    write_events(ledger, ranking("r2", "s2", order=[[0], [1]]))
    group, alone = store.ranked_groups()
    assert [(each.completion_id, each.rank) for each in group.completions] == [("s1-0", 0), ("s1-2", 2)]
    assert (group.spanning_ranks, len(alone.completions), alone.spanning_ranks) == ((1,), 1, (0,))


def test_samples_that_nobody_ranked_come_the_newest_first(ledger: Ledger, store: Store) -> None:
    cut = sample("s3", num_completions=2, spanning=0)
    write_events(ledger, sample("s1"), sample("s2"), cut, sample("s4", spanning=1), ranking("r", "s2"))
    found = store.unranked(9)
    assert [each.sample_id for each in found] == ["s4", "s1"]
    assert [each.text for each in found[0].completions] == ["because 0", "because 2"]
    assert [each.sample_id for each in store.unranked(1)] == ["s4"]
    assert [each.sample_id for each in store.unranked(9, up_to_seq=0, up_to_sample_seq=2)] == ["s2", "s1"]
