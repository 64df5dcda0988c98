"""Each event is stored once, however often and in whatever order it is delivered, and whoever else writes."""

import random
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from feedback.bus.contract import Delivered
from feedback.bus.topics import RANKINGS
from feedback.store.ledger import Ledger, Offset, StaleError
from feedback.store.reader import Store
from tests.feedback.events import KEYRING, delivered, demonstration, ranking, sample
from tests.feedback.store.writing import unpublished, write, write_events


def test_the_same_thing_submitted_twice_is_one(ledger: Ledger, store: Store) -> None:
    # Two replicas that took attempts of the same request give the event different times.
    assert write_events(ledger, sample(), ranking("r1", time_seconds=0), ranking("r1", time_seconds=3)) == 0
    assert store.num_rankings() == 1


def test_of_two_contents_under_one_id_both_are_kept_and_the_last_one_counts(ledger: Ledger, store: Store) -> None:
    """Two replicas acknowledged them, since neither knew of the other's."""
    second = ranking("r1", order=[[2], [1], [0]], time_seconds=-9)
    twice = [demonstration("d1"), demonstration("d1", text="No")]
    assert write_events(ledger, sample(), ranking("r1"), second, *twice) == 0
    for _ in range(2):
        (group,) = store.ranked_groups()
        assert [each.completion_id for each in group.completions] == ["s1-2", "s1-1", "s1-0"]
        assert [each.text for each in store.demonstrations()] == ["No"]
        assert (store.num_rankings(), store.num_dead_letters()) == (2, 0)
        # Delivered again, the first one counts no more than before.
        write_events(ledger, ranking("r1"), demonstration("d1"))


def test_a_second_sample_under_one_id_is_a_dead_letter(ledger: Ledger, store: Store) -> None:
    assert write_events(ledger, sample(), sample(text="Why not?")) == 1
    assert write_events(ledger, sample(text="Why not?")) == 1
    assert [each.prompt.text for each in store.prompts(9)] == ["Why?"]


def test_a_stale_ingest_is_fenced(ledger: Ledger, store: Store, store_url: str) -> None:
    zombie = Ledger(store_url)
    before = zombie.offsets()
    batch = [delivered(ranking("r1"), 0)]
    after = {(RANKINGS, 0): Offset("log", 1)}
    ledger.write(batch, before, after, KEYRING)
    with pytest.raises(StaleError):
        zombie.write([delivered(ranking("r2"), 0)], before, after, KEYRING)
    moved = {(RANKINGS, 0): Offset("log", 2)}
    ledger.write([delivered(ranking("r3"), 1)], after, moved, KEYRING)
    with pytest.raises(StaleError):
        zombie.write([delivered(ranking("r2"), 1)], after, moved, KEYRING)
    with pytest.raises(StaleError):
        zombie.write([delivered(ranking("r2"), 2)], {(RANKINGS, 0): Offset("other", 2)}, moved, KEYRING)
    zombie.close()
    assert store.num_rankings() == 2
    assert ledger.offsets() == moved


EVENTS = [
    *(sample(f"s{i}") for i in range(4)),
    *(ranking(f"r{i}", f"s{i % 5}", time_seconds=i) for i in range(8)),
    ranking("r1", order=[[2], [1], [0]]),
    demonstration("d1"),
    ranking("", "s1"),
]
LOG = [delivered(event, offset) for offset, event in enumerate(EVENTS)]


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
def test_reordering_samples_and_repeating_change_nothing(tmp_path: Path, seed: int) -> None:
    """Partitions are read in any order, but what is about one sample stands in one of them."""
    valid, chance = LOG[:12], random.Random(seed)
    waiting = {each.key: [other for other in valid if other.key == each.key] for each in valid}
    shuffled: list[Delivered] = []
    while len(shuffled) < 24:
        waits = [key for key, events in waiting.items() if events]
        is_new = waits and (not shuffled or chance.random() < 0.5)
        shuffled.append(waiting[chance.choice(waits)].pop(0) if is_new else chance.choice(shuffled))
    shuffled += [each for events in waiting.values() for each in events]
    found = []
    for name, log in (("straight", valid), ("shuffled", shuffled)):
        url = f"sqlite:///{tmp_path}/{name}.db"
        ledger, store = Ledger(url), Store(url)
        write_in_batches(ledger, log, [3, 7])
        found.append(contents(store, ledger))
        ledger.close()
        store.close()
    assert found[0] == found[1]
