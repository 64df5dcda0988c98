"""Learning rates at their first, middle and last steps."""

import pytest

from training.schedule import cosine_to_tenth, linear_warmup


def test_a_cosine_falls_from_the_peak_to_a_tenth() -> None:
    assert [cosine_to_tenth(step, 5) for step in range(5)] == pytest.approx([1.0, 0.868198, 0.55, 0.231802, 0.1])
    assert cosine_to_tenth(0, 1) == 1.0


def test_a_warm_up_rises_evenly_and_stays() -> None:
    assert [linear_warmup(step, 3) for step in range(6)] == [0.25, 0.5, 0.75, 1.0, 1.0, 1.0]
    assert linear_warmup(0, 0) == 1.0
