"""Rivals of the reward model that really learn."""

import math

import pytest
import torch

from bench.learning import baselines
from tests.bench.learning.data import comparison


def test_length_learns_its_sign_from_the_training_data_alone() -> None:
    short_wins = [comparison("no", "no, not at all")] * 3 + [comparison("yes, a lot", "yes")]
    held_out = [comparison("longer one", "short"), comparison("same", "size"), comparison("s", "long"), *short_wins[3:]]
    found = baselines.length_baseline(short_wins, held_out)
    assert found.sign == -1
    assert found.right == (0.0, 0.5, 1.0, 0.0)


def test_bag_of_words_learns_words_and_pairs_that_length_does_not_tell() -> None:
    """A word wins unless "not" stands before it, which only pairs of words show."""
    train = [comparison(f"it is good {i}", f"good it is not {i}", f"Prompt {i}") for i in range(40)]
    held_out = [comparison("it is good now", "good it is not"), comparison("is good", "is not")]
    found = baselines.bag_of_words_baseline(train, held_out)
    assert found.right == (1.0, 1.0)
    assert set(found.validation) == set(baselines.L2_WEIGHTS)
    # All do equally well here, so the weights are kept as small as can be.
    assert found.l2_weight == max(baselines.L2_WEIGHTS)
    assert baselines.length_baseline(train, held_out).right != (1.0, 1.0)


def test_words_never_seen_are_a_tie() -> None:
    model = baselines.fit([comparison("good", "bad")] * 3, [0.1])[0.1]
    assert baselines.credits_of(model, [comparison("unheard", "of"), comparison("good", "bad")]) == (0.5, 1.0)
    with pytest.raises(ValueError, match="at least one comparison"):
        baselines.credits_of(model, [])


def test_logistic_weights_are_where_the_gradient_of_the_loss_vanishes() -> None:
    torch.manual_seed(0)
    difference_NV, l2_weight = torch.randn(30, 5), 0.03
    weights_V = baselines.logistic_weights(difference_NV.to_sparse(), l2_weight).double()
    margin_N = difference_NV.double() @ weights_V
    gradient_V = -(torch.sigmoid(-margin_N)[:, None] * difference_NV).mean(0) + l2_weight * weights_V
    assert weights_V.abs().max() > 0.01
    torch.testing.assert_close(gradient_V, torch.zeros(5).double(), atol=1e-4, rtol=0)


def test_a_term_counts_by_the_log_of_one_more() -> None:
    model = baselines.BagOfWords({"so": 0, "so so": 1}, torch.tensor([1.0, -2.0]))
    assert baselines.terms("So, so: SO?") == {"so": 3, "?": 1, "so so": 2, "so ?": 1}
    difference_NV = baselines.differences([comparison("So so so", "so")], model.vocabulary).to_dense()
    torch.testing.assert_close(difference_NV, torch.tensor([[math.log(4) - math.log(2), math.log(3)]]))
