"""Win rates and their intervals."""

import math
from statistics import NormalDist

import numpy as np
import pytest

from training.data.intervals import (
    Z_95,
    Mean,
    interval_of_shares,
    mean,
    student_quantile,
    wilson_interval,
    win_rate,
)


def alone(*scores: float) -> list[list[float]]:
    """One completion of each prompt."""
    return [[score] for score in scores]


def test_a_tie_counts_half() -> None:
    found = win_rate(alone(1.0, 2.0, 3.0, 0.0), alone(0.0, 2.0, 4.0, -1.0))
    assert found.value == pytest.approx(0.625)
    assert (found.wins, found.ties, found.losses, found.count) == (2, 1, 1, 4)


def test_all_pairs_of_a_prompt_count_and_every_prompt_counts_alike() -> None:
    # 3.5 of 6 pairs, and 1 of 1.
    found = win_rate([[1.0, 4.0, 2.0], [1.0]], [[2.0, 0.0], [0.0]])
    assert found.value == pytest.approx((4.5 / 6 + 1) / 2)
    assert (found.wins, found.ties, found.losses, found.num_pairs, found.count) == (5, 1, 1, 7, 2)


def test_with_one_pair_a_prompt_the_interval_is_wilsons_with_students_quantile() -> None:
    found = win_rate(alone(*[1.0] * 12 + [0.0] * 4), alone(*[0.0] * 12 + [1.0] * 4))
    assert (found.low, found.high) == pytest.approx(wilson_interval(12, 16, 2.1314), abs=1e-4)


def test_students_quantile_has_its_published_values() -> None:
    published = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776, 7: 2.365, 15: 2.131, 63: 1.998, 127: 1.979}
    for freedom, quantile in published.items():
        assert student_quantile(freedom) == pytest.approx(quantile, abs=0.01)
    assert student_quantile(0) == Z_95


def test_shares_that_are_nearly_equal_by_chance_are_no_more_observations_than_their_pairs() -> None:
    """Two prompts with 16 pairs each, of which 12 and 13 were won."""
    scores = [[1.0] * 3 + [-1.0], [1.0] * 3 + [0.0]]
    found = win_rate(scores, [[0.5, 0.0, -0.5, 0.0], [0.5, 0.0, -0.5, -0.5]])
    assert (found.low, found.high) == pytest.approx(wilson_interval(found.value * 32, 32, 12.706), abs=1e-4)
    assert found.low < 0.5


def test_equal_shares_are_taken_for_wins_and_losses() -> None:
    """Their variance is zero, and an interval without width would be a claim that nobody can make."""
    for share in (0.0, 0.5, 1.0):
        assert interval_of_shares([share] * 16) == pytest.approx(wilson_interval(16 * share, 16, 2.1314), abs=1e-4)


@pytest.mark.parametrize(("num_prompts", "mean_gain"), [(8, 0.5), (64, 0.0), (64, 1.5)])
def test_the_interval_of_many_pairs_covers_the_truth_as_often_as_it_says(num_prompts: int, mean_gain: float) -> None:
    """Prompts differ, and 16 pairs of each share 8 completions. Wilson's interval at the number of prompts would cover
    always, and at the number of pairs hardly ever.
    """
    random = np.random.default_rng(0)
    # The new policy's scores of a prompt are N(gain, 1), where gain is N(mean_gain, 0.7²), and the reference's N(0, 1).
    truth = NormalDist(0, math.sqrt(2 + 0.7**2)).cdf(mean_gain)
    covered, too_wide, too_narrow, trials = 0, 0, 0, 600
    for _ in range(trials):
        gains_P = random.normal(mean_gain, 0.7, (num_prompts, 1))
        scores_PK = random.normal(size=(num_prompts, 4)) + gains_P
        found = win_rate(scores_PK.tolist(), random.normal(size=(num_prompts, 4)).tolist())
        covered += found.low <= truth <= found.high
        for count in (num_prompts, found.num_pairs):
            low, high = wilson_interval(found.value * count, count)
            too_wide += count == num_prompts and low <= truth <= high
            too_narrow += count != num_prompts and low <= truth <= high
    assert 0.92 <= covered / trials <= 0.975
    assert too_wide / trials > 0.99
    assert too_narrow / trials < 0.9


def test_wilson_interval_has_its_published_values() -> None:
    # Newcombe 1998, Statistics in Medicine 17, table I: 81 of 263, 15 of 148, 0 of 20.
    assert wilson_interval(81, 263) == pytest.approx((0.2553, 0.3662), abs=5e-5)
    assert wilson_interval(15, 148) == pytest.approx((0.0624, 0.1605), abs=5e-5)
    assert wilson_interval(0, 20) == pytest.approx((0.0, 0.1611), abs=5e-5)


def test_a_mean_has_the_interval_of_its_standard_error() -> None:
    found = mean([1.0, 2.0, 3.0, 6.0])
    half = 1.96 * (14 / 3) ** 0.5 / 2  # squares of -2, -1, 0 and 3 over n - 1; √n is 2
    assert (found.value, found.low, found.high, found.count) == (
        3.0,
        pytest.approx(3 - half, rel=1e-3),
        pytest.approx(3 + half, rel=1e-3),
        4,
    )
    assert mean([2.5]) == Mean(2.5, 2.5, 2.5, 1)


def test_refuses_no_prompts() -> None:
    with pytest.raises(ValueError, match="at least one"):
        win_rate([], [])
    with pytest.raises(ValueError, match="completions of each by both"):
        win_rate([[1.0], []], [[1.0], [1.0]])
    with pytest.raises(ValueError, match="at least one"):
        mean([])
