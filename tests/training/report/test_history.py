"""A run is read back as it was written, and a change is distinguished from noise."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from training.report.history import Change, fall_from_best, series
from training.runs.record import read_lines


def test_a_line_that_is_still_being_written_is_no_line(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"a": 1}\n{"a": 2')
    assert read_lines(path, {"a"}).found == [{"a": 1}]
    assert read_lines(path, {"a"}).num_unreadable == 0
    assert read_lines(tmp_path / "none.jsonl").found == []


@given(st.lists(st.floats(allow_nan=True, allow_infinity=True, width=16), max_size=40))
def test_change_is_that_of_the_means_at_both_ends(values: list[float]) -> None:
    change = Change.of(series([{"x": value} for value in values], "x"))
    finite = [value for value in values if math.isfinite(value)]
    size = max(1, len(finite) // 5)
    if not finite:
        assert math.isnan(change.before)
        assert change.words == "was never finite"
    else:
        assert change.before == pytest.approx(sum(finite[:size]) / size)
        assert change.after == pytest.approx(sum(finite[-size:]) / size)


def test_change_is_clear_only_beyond_the_noise() -> None:
    noise = np.random.default_rng(0).normal(size=200)
    assert Change.of(noise).words == "did not clearly change"
    assert Change.of(noise + np.linspace(0, 3, 200)).words.startswith("rose by")
    assert Change.of(noise - np.linspace(0, 3, 200)).words.startswith("fell by")
    assert not Change.of(np.full(20, 0.5)).clear


def test_fall_from_best_is_zero_for_noise_and_measured_for_a_fall() -> None:
    noise = np.random.default_rng(1).normal(scale=0.05, size=100)
    hill = np.concatenate([np.linspace(0, 1, 50), np.linspace(1, 0, 50)])
    assert fall_from_best(noise) == 0.0
    assert fall_from_best(hill[:50] + noise[:50]) == 0.0
    best = max(sum(hill[i : i + 20]) / 20 for i in range(81))
    assert fall_from_best(hill) == pytest.approx(best - sum(hill[80:]) / 20)
