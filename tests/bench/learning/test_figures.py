"""The figures' intervals, against plain counts."""

import math

import pytest
import torch

from bench.learning.figures import held_out_accuracy, mean_interval
from training.rewards.evaluation import clustered_mean

SEEDS = [
    {"held_out": [0, 1, 2], "prompts": [0, 0, 2], "ours": [1.0, 1.0, 0.0], "theirs": [0.0, 1.0, 0.5]},
    {"held_out": [2, 3], "prompts": [2, 3], "ours": [1.0, 1.0], "theirs": [0.5, 0.0]},
]


def test_a_comparison_counts_once_whatever_number_of_splits_hold_it_out() -> None:
    ours, difference = held_out_accuracy(SEEDS, "ours"), held_out_accuracy(SEEDS, "ours", "theirs")
    assert ours.value == pytest.approx((1 + 1 + 0.5 + 1) / 4)
    assert difference.value == pytest.approx((1 + 0 + 0 + 1) / 4)
    assert difference.name == "HH-RLHF accuracy: ours less theirs"
    for each in (ours, difference):
        assert each.low is not None
        assert each.high is not None
        assert each.low < each.value < each.high


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
    assert (mean, high - mean, mean - low) == pytest.approx((3.5, 2.365 * error, 2.365 * error))
