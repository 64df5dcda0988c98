"""Win rates and their intervals."""

import pytest

from training.evaluate import wilson_interval, win_rate


def test_a_tie_counts_half() -> None:
    assert win_rate([1.0, 2.0, 3.0, 0.0], [0.0, 2.0, 4.0, -1.0]).value == pytest.approx(0.625)


def test_wilson_interval_has_its_published_values() -> None:
    # Newcombe 1998, Statistics in Medicine 17, table I: 81 of 263, 15 of 148, 0 of 20.
    assert wilson_interval(81, 263) == pytest.approx((0.2553, 0.3662), abs=5e-5)
    assert wilson_interval(15, 148) == pytest.approx((0.0624, 0.1605), abs=5e-5)
    assert wilson_interval(0, 20) == pytest.approx((0.0, 0.1611), abs=5e-5)


def test_refuses_no_prompts() -> None:
    with pytest.raises(ValueError, match="at least one"):
        win_rate([], [])
