"""What both engines of the store promise: each event once, however often and in whatever order it is delivered."""

import random
from collections.abc import Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from google.protobuf.message import Message
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from alignd.v1 import events_pb2, types_pb2
from feedback.bus.contract import Delivered, Position
from feedback.bus.topics import FEEDBACK_TOPICS, RANKINGS
from feedback.store.ledger import Ledger, Offset, StaleError
from feedback.store.reader import Store, StoredDemonstration
from tests.feedback import processes
from tests.feedback.events import TIME_SECONDS, delivered, demonstration, ranking, sample


@pytest.fixture
def ledger(store_url: str) -> Iterator[Ledger]:
    opened = Ledger(store_url)
    yield opened
    opened.close()


@pytest.fixture
def store(ledger: Ledger, store_url: str) -> Iterator[Store]:
    opened = Store(store_url)
    yield opened
    opened.close()


def write(ledger: Ledger, batch: Sequence[Delivered], log_id: str = "log") -> int:
    """Writes a batch, like an ingest that has just read the offsets."""
    after = {(each.position.topic, each.position.partition): Offset(log_id, each.position.offset + 1) for each in batch}
    return ledger.write(batch, ledger.offsets(), after)


def write_events(ledger: Ledger, *events: Message) -> int:
    return write(ledger, [delivered(event, offset) for offset, event in enumerate(events)])


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


def test_a_ranking_may_come_before_its_sample(ledger: Ledger, store: Store) -> None:
    write_events(ledger, ranking("r1"))
    assert store.num_rankings() == 1
    assert store.ranked_groups() == []
    write_events(ledger, sample())
    assert [group.ranking_id for group in store.ranked_groups()] == ["r1"]


@pytest.mark.parametrize("order_of_arrival", [[0, 1, 2], [2, 1, 0], [1, 2, 0]])
def test_the_latest_ranking_replaces_the_others(ledger: Ledger, store: Store, order_of_arrival: list[int]) -> None:
    rankings = [ranking("c", time_seconds=0), ranking("a", time_seconds=10), ranking("b", time_seconds=10)]
    write_events(ledger, sample(), *(rankings[index] for index in order_of_arrival))
    assert [group.ranking_id for group in store.ranked_groups()] == ["b"]
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


def test_a_completion_that_spans_a_swap_is_left_out(ledger: Ledger, store: Store) -> None:
    write_events(ledger, sample("s1", spanning=1), ranking("r1", "s1"), sample("s2", num_completions=2, spanning=0))
    write_events(ledger, ranking("r2", "s2", order=[[0], [1]]))
    (group,) = store.ranked_groups()
    assert [(each.completion_id, each.rank) for each in group.completions] == [("s1-0", 0), ("s1-2", 2)]


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


def test_the_newest_rankings_come_oldest_first(ledger: Ledger, store: Store) -> None:
    samples = [sample(f"s{number}") for number in range(4)]
    write_events(ledger, *samples, *(ranking(f"r{number}", f"s{number}") for number in range(4)))
    assert [group.ranking_id for group in store.ranked_groups(newest=2)] == ["r2", "r3"]
    assert store.ranked_groups(newest=9) == store.ranked_groups()


def test_samples_that_nobody_ranked_come_the_newest_first(ledger: Ledger, store: Store) -> None:
    cut = sample("s3", num_completions=2, spanning=0)
    write_events(ledger, sample("s1"), sample("s2"), cut, sample("s4", spanning=1), ranking("r", "s2"))
    found = store.unranked(9)
    assert [each.sample_id for each in found] == ["s4", "s1"]
    assert [each.text for each in found[0].completions] == ["because 0", "because 2"]
    assert [each.sample_id for each in store.unranked(1)] == ["s4"]
    assert [each.sample_id for each in store.unranked(9, up_to_seq=0, up_to_sample_seq=2)] == ["s2", "s1"]


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


def test_the_oldest_new_rankings_time(ledger: Ledger, store: Store) -> None:
    assert store.oldest_ranking_time(0) is None
    write_events(ledger, ranking("r1", time_seconds=0), ranking("r2", time_seconds=20))
    seq = store.last_seq()
    late = ranking("r4", time_seconds=5)
    late.event_time.nanos = 250_000_000  # type: ignore[attr-defined]
    write_events(ledger, ranking("r3", time_seconds=10), late)
    assert store.oldest_ranking_time(0) == TIME_SECONDS
    assert store.oldest_ranking_time(seq) == TIME_SECONDS + 5.25
    assert store.oldest_ranking_time(store.last_seq()) is None


def test_a_demonstration_is_joined_with_its_sample(ledger: Ledger, store: Store) -> None:
    assert store.demonstrations() == []
    write_events(ledger, demonstration("d2", "s2", "early"), sample("s1", "Why?"), demonstration("d1", "s1", "So."))
    (found,) = store.demonstrations()
    assert found == StoredDemonstration(found.seq, "d1", "s1", "u", types_pb2.Prompt(text="Why?"), "So.")
    write_events(ledger, sample("s2", "How?"))
    assert [(each.demonstration_id, each.prompt.text) for each in store.demonstrations()] == [
        ("d2", "How?"),
        ("d1", "Why?"),
    ]
    assert [each.demonstration_id for each in store.demonstrations(after_seq=found.seq - 1)] == ["d1"]
    assert store.demonstrations(after_seq=found.seq) == []


def test_a_users_latest_demonstration_of_a_sample_counts(ledger: Ledger, store: Store) -> None:
    later: Any = demonstration("a", text="later")
    others: Any = demonstration("c")
    later.event_time.seconds += 1
    others.user_id = "v"
    write_events(ledger, sample("s1"), sample("s2"), later, demonstration("b"), others, demonstration("d", "s2"))
    assert [each.demonstration_id for each in store.demonstrations()] == ["a", "c", "d"]
    # Of two at the same moment the one with the greater id counts, as with rankings.
    write_events(ledger, demonstration("e", "s2", "the same moment"))
    assert [each.demonstration_id for each in store.demonstrations()] == ["a", "c", "e"]


def test_the_same_thing_submitted_twice_is_one(ledger: Ledger, store: Store) -> None:
    # Two replicas that took attempts of the same request give the event different times.
    assert write_events(ledger, sample(), ranking("r1", time_seconds=0), ranking("r1", time_seconds=3)) == 0
    assert store.num_rankings() == 1


def test_the_same_id_with_other_contents_is_a_dead_letter(ledger: Ledger, store: Store) -> None:
    assert write_events(ledger, sample(), ranking("r1"), ranking("r1", order=[[2], [1], [0]])) == 1
    assert write_events(ledger, ranking("r1", order=[[1], [2], [0]])) == 1
    (group,) = store.ranked_groups()
    assert [each.completion_id for each in group.completions] == ["s1-0", "s1-1", "s1-2"]
    assert store.num_dead_letters() == 2


def test_a_stale_ingest_is_fenced(ledger: Ledger, store: Store, store_url: str) -> None:
    zombie = Ledger(store_url)
    before = zombie.offsets()
    batch = [delivered(ranking("r1"), 0)]
    after = {(RANKINGS, 0): Offset("log", 1)}
    ledger.write(batch, before, after)
    with pytest.raises(StaleError):
        zombie.write([delivered(ranking("r2"), 0)], before, after)
    moved = {(RANKINGS, 0): Offset("log", 2)}
    ledger.write([delivered(ranking("r3"), 1)], after, moved)
    with pytest.raises(StaleError):
        zombie.write([delivered(ranking("r2"), 1)], after, moved)
    with pytest.raises(StaleError):
        zombie.write([delivered(ranking("r2"), 2)], {(RANKINGS, 0): Offset("other", 2)}, moved)
    zombie.close()
    assert store.num_rankings() == 2
    assert ledger.offsets() == moved


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


EVENTS = [
    *(sample(f"s{i}") for i in range(4)),
    *(ranking(f"r{i}", f"s{i % 5}", time_seconds=i) for i in range(8)),
    ranking("r1", order=[[2], [1], [0]]),
    demonstration("d1"),
    ranking("", "s1"),
]
LOG = [delivered(event, offset) for offset, event in enumerate(EVENTS)]


def unpublished(ledger: Ledger) -> list[tuple[str, bytes]]:
    return ledger.unpublished_dead_letters(100)


def contents(store: Store, ledger: Ledger) -> tuple[object, ...]:
    groups = [(group.ranking_id, group.completions) for group in store.ranked_groups()]
    letters = sorted(event_id for event_id, _ in unpublished(ledger))
    return sorted(groups), store.num_rankings(), sorted(each.prompt.text for each in store.prompts(100)), letters


def write_in_batches(ledger: Ledger, log: Sequence[Delivered], cuts: Sequence[int]) -> None:
    bounds = [0, *sorted(cuts), len(log)]
    for begin, end in pairwise(bounds):
        if begin < end:
            write(ledger, log[begin:end])


@settings(max_examples=30, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(cuts=st.lists(st.integers(0, len(LOG)), max_size=6), starts=st.lists(st.integers(0, len(LOG) - 1), max_size=4))
def test_replaying_the_log_changes_nothing(ledger: Ledger, store: Store, cuts: list[int], starts: list[int]) -> None:
    write_in_batches(ledger, LOG, cuts)
    first = contents(store, ledger)
    for start in [0, *starts]:
        write_in_batches(ledger, LOG[start:], cuts)
    assert contents(store, ledger) == first


@pytest.mark.parametrize("seed", range(3))
def test_reordering_and_repeating_change_nothing(tmp_path: Path, seed: int) -> None:
    valid = LOG[:12]
    shuffled = [*valid, *valid]
    random.Random(seed).shuffle(shuffled)
    found = []
    for name, log in (("straight", valid), ("shuffled", shuffled)):
        url = f"sqlite:///{tmp_path}/{name}.db"
        ledger, store = Ledger(url), Store(url)
        write_in_batches(ledger, log, [3, 7])
        found.append(contents(store, ledger))
        ledger.close()
        store.close()
    assert found[0] == found[1]


def test_processes_open_an_empty_store_at_once(store_url: str) -> None:
    openers = [processes.start("open_store", store_url) for _ in range(3)]
    answers = [opener.communicate(timeout=60)[0].strip() for opener in openers]
    assert answers == ["0"] * 3
    assert [opener.returncode for opener in openers] == [0] * 3


def test_the_migrations_make_the_tables_that_the_code_knows(ledger: Ledger) -> None:
    from alembic.autogenerate import compare_metadata
    from alembic.migration import MigrationContext

    from feedback.store.tables import METADATA

    with ledger._engine.connect() as connection:
        assert compare_metadata(MigrationContext.configure(connection), METADATA) == []


@pytest.mark.parametrize("url", ["mysql://x/y", "sqlite://"])
def test_what_is_no_store_is_refused(url: str) -> None:
    with pytest.raises(ValueError, match="not a store"):
        Store(url)
