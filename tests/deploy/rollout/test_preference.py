"""The interval by which users decide: its reference values, and what must not matter to it."""

import itertools
import math
import random
import statistics

import pytest
from hypothesis import given
from hypothesis import strategies as st

from deploy.rollout.preference import (
    ALPHA,
    LEAST_USERS,
    MOST_OF_A_USER,
    RHO,
    Interval,
    Preference,
    Rule,
    Verdict,
    interval,
    judge,
    outcome,
)

HALVES = st.sampled_from([0.0, 0.25, 0.5, 0.75, 1.0])
RANKINGS = st.lists(st.tuples(st.integers(0, 30), HALVES), max_size=200)


def of(rankings: list[tuple[int, float]]) -> Preference:
    preference = Preference()
    for user, each in rankings:
        preference.add(f"user-{user}", each)
    return preference


@pytest.mark.parametrize(
    ("groups", "share"),
    [
        ([["c1"], ["l1", "c2"], ["l2"]], 0.875),
        ([["c1", "c2"], ["l1", "l2"]], 1.0),
        ([["l1", "l2", "l3"], ["c1"]], 0.0),
        ([["c1", "l1", "c2", "l2"]], 0.5),
        ([["c1"], ["l1"], ["l2"], ["l3"]], 1.0),
        # A version that is neither, such as one of before, is passed over.
        ([["c1"], ["old"], ["l1"], ["c2", "old2"]], 0.5),
        ([["c1"], ["c2"]], None),
        ([["old"]], None),
        ([], None),
    ],
)
def test_an_outcome_is_the_share_of_pairs_that_the_canary_won(groups: list[list[str]], share: float | None) -> None:
    is_canary = {each: each.startswith("c") for group in groups for each in group if not each.startswith("old")}
    assert outcome(groups, is_canary) == share


@given(st.lists(st.lists(st.booleans(), max_size=3), max_size=5))
def test_an_outcome_is_what_counting_pairs_says_and_turned_round_with_the_versions(kinds: list[list[bool]]) -> None:
    names = itertools.count()
    groups = [[(f"{next(names)}", canary) for canary in group] for group in kinds]
    is_canary = {name: canary for group in groups for name, canary in group}
    places = [(place, canary) for place, group in enumerate(groups) for _, canary in group]
    pairs = [(ours, theirs) for ours, canary in places if canary for theirs, other in places if not other]
    expected = statistics.fmean((ours < theirs) + (ours == theirs) / 2 for ours, theirs in pairs) if pairs else None
    ranked = [[name for name, _ in group] for group in groups]
    assert outcome(ranked, is_canary) == (pytest.approx(expected) if pairs else None)
    turned = outcome(ranked, {name: not canary for name, canary in is_canary.items()})
    assert turned == (pytest.approx(1 - expected) if expected is not None else None)


def test_the_interval_has_its_reference_values() -> None:
    found = of([(user, (1.0, 0.5, 0.75, 0.5)[user % 4]) for user in range(40)]).interval()
    assert found
    assert (found.low, found.high) == pytest.approx((0.47526, 0.89974), abs=1e-5)


def test_all_won_by_users_of_whom_each_is_new_is_enough_at_the_twentieth() -> None:
    preference = Preference()
    said = []
    for user in range(25):
        preference.add(str(user), 1.0)
        said.append(judge(preference.interval(), user + 1, 0.0, Rule()))
    assert said.index(Verdict.BETTER) == LEAST_USERS - 1


@given(RANKINGS)
def test_the_interval_is_what_its_formula_says_of_each_users_first_rankings(rankings: list[tuple[int, float]]) -> None:
    found = of(rankings).interval()
    kept: dict[int, list[float]] = {}
    for user, each in rankings:
        kept.setdefault(user, []).append(each)
    counted = {user: each[:MOST_OF_A_USER] for user, each in kept.items()}
    if len(counted) < LEAST_USERS:
        assert found is None
        return
    n = sum(map(len, counted.values()))
    rate = sum(map(sum, counted.values())) / n
    variance = sum(sum(x - rate for x in each) ** 2 for each in counted.values())
    half = math.sqrt((variance + RHO) * (math.log((variance + RHO) / RHO) + 2 * math.log(1 / ALPHA))) / n
    assert found
    assert (found.low, found.high) == pytest.approx((rate - half, rate + half))


@given(RANKINGS, st.randoms(use_true_random=False))
def test_below_the_cap_the_order_does_not_matter(rankings: list[tuple[int, float]], order: random.Random) -> None:
    rankings = rankings[:MOST_OF_A_USER] + [(user + 100, each) for user, each in enumerate(e for _, e in rankings[10:])]
    mixed = list(rankings)
    order.shuffle(mixed)
    before, after = of(rankings), of(mixed)
    assert before.by_user.keys() == after.by_user.keys()
    one, other = interval(before.sums), interval(after.sums)
    assert (one is None) == (other is None)
    if one and other:
        assert (one.low, one.high) == pytest.approx((other.low, other.high))


def test_who_is_busy_counts_no_more_than_others_may() -> None:
    preference = Preference()
    assert [preference.add("busy", 1.0) for _ in range(MOST_OF_A_USER + 3)] == [True] * MOST_OF_A_USER + [False] * 3
    assert preference.interval() is None


@pytest.mark.parametrize(
    ("found", "rankings", "days", "verdict"),
    [
        (None, 0, 0.0, Verdict.OPEN),
        (None, 0, 99.0, Verdict.OPEN),
        (Interval(0.501, 0.7), 30, 0.1, Verdict.BETTER),
        (Interval(0.5, 0.7), 30, 0.1, Verdict.OPEN),
        (Interval(0.3, 0.529), 30, 0.1, Verdict.NO_GAIN),
        (Interval(0.3, 0.53), 30, 0.1, Verdict.OPEN),
        (Interval(0.4, 0.6), 2000, 0.1, Verdict.INCONCLUSIVE),
        (Interval(0.4, 0.6), 30, 14.0, Verdict.INCONCLUSIVE),
        (None, 3, 14.0, Verdict.INCONCLUSIVE),
        # A small gain that is sure is a gain.
        (Interval(0.51, 0.52), 2000, 14.0, Verdict.BETTER),
    ],
)
def test_a_verdict_follows_the_rule(found: Interval | None, rankings: int, days: float, verdict: Verdict) -> None:
    assert judge(found, rankings, days, Rule()) is verdict
