"""The figures' intervals, against plain counts."""

import math

import pytest
import torch

from bench.learning.intervals import mean_interval
from training.rewards.evaluation import clustered_mean


def test_comparisons_of_one_prompt_are_one_observation() -> None:
    values_M, clusters_M = torch.tensor([1.0, 0.0, 1.0, 1.0]), torch.arange(4)
    alone = clustered_mean(values_M, clusters_M)
    twice = clustered_mean(values_M.repeat(2), clusters_M.repeat(2))
    assert twice == pytest.approx(alone)
    by_hand = 1.96 * math.sqrt(0.75 * 0.25 / 3)
    assert alone == pytest.approx((0.75, 0.75 - by_hand, 0.75 + by_hand), abs=1e-4)


def test_few_values_have_students_interval() -> None:
    values = [float(value) for value in range(8)]
    mean, low, high = mean_interval(values)
    error = math.sqrt(6.0) / math.sqrt(8)
    assert (mean, high - mean, mean - low) == pytest.approx((3.5, 2.365 * error, 2.365 * error), abs=0.005)
