"""The K-way loss against its definition, pair by pair."""

import math
from itertools import combinations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from training.rewards.loss import Comparisons, compare, margins, ranking_losses

RANKING = st.lists(st.tuples(st.floats(-20, 20), st.integers(0, 3)), min_size=2, max_size=9)


def ranking_loss(scores_N: Tensor, among: Comparisons) -> Tensor:
    """The loss of one head that weighs all rankings alike."""
    num_rankings = int(among.rankings_M.max()) + 1 if len(among.rankings_M) else 1
    return ranking_losses(scores_N[:, None], among, torch.ones(num_rankings, 1))[0]


def naive_loss(scores: list[float], ranks: list[int]) -> float:
    total = 0.0
    for (score_a, rank_a), (score_b, rank_b) in combinations(zip(scores, ranks, strict=True), 2):
        if rank_a != rank_b:
            margin = score_a - score_b if rank_a < rank_b else score_b - score_a
            total += math.log1p(math.exp(-margin))
    return total / math.comb(len(scores), 2)


@given(st.lists(st.tuples(RANKING, st.floats(0.1, 5)), min_size=1, max_size=4))
def test_is_the_weighted_mean_over_rankings_of_the_mean_over_pairs(
    rankings: list[tuple[list[tuple[float, int]], float]],
) -> None:
    scores_N = torch.tensor([score for ranking, _ in rankings for score, _ in ranking], dtype=torch.float64)
    ranks, weights = [[rank for _, rank in ranking] for ranking, _ in rankings], [weight for _, weight in rankings]
    naive = [naive_loss([score for score, _ in ranking], [rank for _, rank in ranking]) for ranking, _ in rankings]
    expected = sum(weight * loss for weight, loss in zip(weights, naive, strict=True)) / sum(weights)
    assert ranking_loss(scores_N, compare(ranks, weights)).item() == pytest.approx(expected, rel=1e-6, abs=1e-9)


def test_ties_give_no_comparison_and_no_gradient() -> None:
    scores_N = torch.tensor([1.0, 2.0, 3.0], requires_grad=True)
    loss = ranking_loss(scores_N, compare([[0, 0, 0]]))
    loss.backward()
    assert loss.item() == 0.0
    assert scores_N.grad is not None
    assert not scores_N.grad.any()


def test_a_comparison_knows_its_ranking_and_its_sides() -> None:
    found = compare([[1, 0], [0, 1, 1]])
    assert found.winners_M.tolist() == [1, 2, 2]
    assert found.losers_M.tolist() == [0, 3, 4]
    assert found.rankings_M.tolist() == [0, 1, 1]
    assert margins(torch.tensor([0.0, 1.0, 5.0, 2.0, 3.0]), found).tolist() == [1.0, 3.0, 2.0]


def test_equals_trl_on_the_expanded_pairs() -> None:
    # TRL's RewardTrainer: -logsigmoid(chosen - rejected).mean() over pairs, each a row of its own.
    scores_N, ranks = torch.tensor([0.3, -1.2, 2.0, 0.9]), [2, 3, 0, 1]
    pairs = [(i, j) for i in range(4) for j in range(4) if ranks[i] < ranks[j]]
    chosen, rejected = scores_N[[i for i, _ in pairs]], scores_N[[j for _, j in pairs]]
    trl = -torch.nn.functional.logsigmoid(chosen - rejected).mean()
    torch.testing.assert_close(ranking_loss(scores_N, compare([ranks])), trl)
