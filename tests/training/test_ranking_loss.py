"""The K-way loss is the mean of pairwise losses, and ties say nothing."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from feedback.comparisons import comparisons
from training.ranking_loss import num_correct, ranking_loss

RANKED = st.lists(st.tuples(st.floats(-20, 20), st.integers(0, 4)), min_size=2, max_size=9)


@given(ranked=RANKED)
@settings(max_examples=100, deadline=None)
def test_equals_the_sum_of_pairwise_losses_over_k_choose_2(ranked: list[tuple[float, int]]) -> None:
    scores, ranks = zip(*ranked, strict=True)
    losses = [math.log1p(math.exp(-(scores[w] - scores[r]))) for w, r in comparisons(ranks)]
    expected = sum(losses) / math.comb(len(ranked), 2)
    found = ranking_loss(torch.tensor(scores, dtype=torch.float64), torch.tensor(ranks))
    assert float(found) == pytest.approx(expected, rel=1e-9, abs=1e-12)


def test_all_ties_give_no_loss_and_no_gradient() -> None:
    scores_K = torch.tensor([3.0, -1.0, 0.5], requires_grad=True)
    loss = ranking_loss(scores_K, torch.tensor([2, 2, 2]))
    loss.backward()
    assert loss.item() == 0
    assert scores_K.grad is not None
    assert not scores_K.grad.any()


def test_gradient_raises_the_chosen_and_lowers_the_rejected() -> None:
    scores_K = torch.zeros(3, requires_grad=True)
    ranking_loss(scores_K, torch.tensor([0, 1, 2])).backward()
    assert scores_K.grad is not None
    assert scores_K.grad.tolist() == pytest.approx([-1 / 3, 0, 1 / 3])


def test_counts_comparisons_in_the_labelers_order() -> None:
    assert num_correct(torch.tensor([3.0, 2.0, 1.0]), torch.tensor([0, 1, 2])) == (3.0, 3)
    assert num_correct(torch.tensor([1.0, 1.0, 2.0]), torch.tensor([0, 1, 1])) == (0.5, 2)
