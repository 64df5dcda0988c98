"""Means over seeds, prompts, windows of text or items, with their 95 % intervals."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence

from bench.result import Figure
from training.data.intervals import student_quantile


def mean_interval(values: Sequence[float]) -> list[float]:
    """Returns the mean and its 95 % interval by Student's distribution."""
    mean, error = statistics.fmean(values), statistics.stdev(values) / math.sqrt(len(values))
    width = student_quantile(len(values) - 1)
    return [mean, mean - width * error, mean + width * error]


def over_seeds(name: str, values: Sequence[Sequence[float]], unit: str = "share") -> Figure:
    """Returns the mean of [value, low, high] over seeds, with its interval. A single seed has its own."""
    value, low, high = values[0] if len(values) == 1 else mean_interval([each[0] for each in values])
    return Figure(name, value, unit, low, high)
