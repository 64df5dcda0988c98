"""Win rates and their intervals."""

import pytest

from training.data.intervals import Mean, mean, wilson_interval, win_rate


def test_a_tie_counts_half() -> None:
    assert win_rate([1.0, 2.0, 3.0, 0.0], [0.0, 2.0, 4.0, -1.0]).value == pytest.approx(0.625)


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
    with pytest.raises(ValueError, match="at least one"):
        mean([])
