"""The estimate of best of n is the mean over all choices of n, is unbiased, and its KL is that of the distribution."""

import math
import random
from itertools import combinations
from statistics import fmean

import pytest

from training.data.best_of_n import best_of_n, best_of_n_kl, expected_best


def by_brute_force(scores: list[float], values: list[float], n: int) -> float:
    """Goes through all choices of n; of those with the highest score, any is as likely to be kept."""
    kept = []
    for chosen in combinations(range(len(scores)), n):
        highest = max(scores[index] for index in chosen)
        kept.append(fmean(values[index] for index in chosen if scores[index] == highest))
    return fmean(kept)


@pytest.mark.parametrize("n", [1, 2, 3, 7])
def test_it_is_the_mean_over_all_choices(n: int) -> None:
    draw = random.Random(n)
    scores, values = [draw.gauss() for _ in range(7)], [draw.gauss() for _ in range(7)]
    assert expected_best(scores, values, n) == pytest.approx(by_brute_force(scores, values, n))
    assert expected_best(scores, scores, n) == pytest.approx(by_brute_force(scores, scores, n))


def test_completions_of_equal_score_share_what_one_is_worth() -> None:
    assert expected_best([2.0, 1.0, 2.0, 2.0], [1.0, 100.0, 2.0, 6.0], 4) == pytest.approx(3.0)
    # All that can tie, do: the same whatever is kept, and in whichever order they come.
    assert expected_best([0.0, 0.0, 0.0], [3.0, 6.0, 9.0], 2) == pytest.approx(6.0)


def test_it_is_unbiased_for_the_best_of_independent_draws() -> None:
    # The expected maximum of n uniform draws is n / (n + 1); 8 draws say so of the best of 4 without bias.
    draw = random.Random(0)
    drawn = [[draw.random() for _ in range(8)] for _ in range(4000)]
    estimates = [expected_best(each, each, 4) for each in drawn]
    assert fmean(estimates) == pytest.approx(4 / 5, abs=0.005)


def test_its_kl_is_that_of_the_best_from_a_draw() -> None:
    # By rank u in [0, 1] the best of n has the density n u^(n - 1), and a draw 1.
    steps = [(step + 0.5) / 100_000 for step in range(100_000)]
    for n in (2, 16):
        kl = fmean(n * u ** (n - 1) * math.log(n * u ** (n - 1)) for u in steps)
        assert best_of_n_kl(n) == pytest.approx(kl, abs=1e-3)
    assert best_of_n_kl(1) == 0


def test_it_goes_as_far_as_every_prompt_has_completions() -> None:
    scores = [[1.0, 2.0, 3.0, 4.0, 5.0], [4.0, 3.0, 2.0, 1.0]]
    found = best_of_n(scores, scores)
    assert [each.n for each in found] == [1, 2, 4]
    assert found[0].values == pytest.approx((3.0, 2.5))
    assert found[2].values[1] == 4.0
    assert [each.n for each in best_of_n([[1.0]], [[1.0]])] == [1]
    assert best_of_n([], []) == []


def test_more_than_there_are_cannot_be_estimated() -> None:
    with pytest.raises(ValueError, match="best of 3"):
        expected_best([1.0, 2.0], [1.0, 2.0], 3)
