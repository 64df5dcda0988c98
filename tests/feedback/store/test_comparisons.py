"""A ranking gives each ordered pair once, and a tie none."""

from collections import Counter
from math import comb

from hypothesis import given
from hypothesis import strategies as st

from feedback.store.comparisons import comparisons


def test_a_ranking_with_a_tie() -> None:
    assert comparisons([1, 0, 1]) == [(1, 0), (1, 2)]


def test_no_order_no_comparison() -> None:
    assert comparisons([0, 0, 0]) == []
    assert comparisons([0]) == []


@given(st.lists(st.integers(0, 8), max_size=9))
def test_each_pair_once_the_better_first(ranks: list[int]) -> None:
    pairs = comparisons(ranks)
    assert all(ranks[chosen] < ranks[rejected] for chosen, rejected in pairs)
    assert len(set(pairs)) == len(pairs)
    ties = sum(comb(size, 2) for size in Counter(ranks).values())
    assert len(pairs) == comb(len(ranks), 2) - ties
