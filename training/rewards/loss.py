"""The reward model's loss: how likely the labelers' rankings are under the scores, by the Bradley-Terry model.

All functions are pure functions of scores and ranks. Shapes: N completions of several rankings, laid end to end; M
comparisons among them.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import softplus

from feedback.store.comparisons import comparisons


@dataclass(frozen=True)
class Comparisons:
    """All comparisons of some rankings. The weight of each is 1/(K choose 2) of its ranking's weight."""

    winners_M: Tensor
    """Index into the N completions of the preferred one."""
    losers_M: Tensor
    weights_M: Tensor
    rankings_M: Tensor
    """Index of the ranking that a comparison comes from."""
    total_weight: float
    """Weight of all rankings, including those without a comparison."""


def compare(ranks: Sequence[Sequence[int]], weights: Sequence[float] | None = None) -> Comparisons:
    """Returns the comparisons in rankings: every pair of completions with different ranks; a tie gives none.

    Args:
        ranks: for each ranking, the rank of each completion, 0 for the best.
        weights: the weight of each ranking; 1 by default.
    """
    weights = weights or [1.0] * len(ranks)
    winners, losers, shares, rankings = [], [], [], []
    first = 0
    for ranking, (ranks_K, weight) in enumerate(zip(ranks, weights, strict=True)):
        num_pairs = max(1, len(ranks_K) * (len(ranks_K) - 1) // 2)
        for chosen, rejected in comparisons(ranks_K):
            winners.append(first + chosen)
            losers.append(first + rejected)
            shares.append(weight / num_pairs)
            rankings.append(ranking)
        first += len(ranks_K)
    as_index = [torch.tensor(each, dtype=torch.long) for each in (winners, losers, rankings)]
    return Comparisons(as_index[0], as_index[1], torch.tensor(shares), as_index[2], float(sum(weights)))


def margins(scores_N: Tensor, among: Comparisons) -> Tensor:
    """Returns the preferred completion's score minus the other's, [M, ...] from scores [N, ...]."""
    return scores_N[among.winners_M] - scores_N[among.losers_M]


def ranking_losses(scores_NE: Tensor, among: Comparisons, weights_RE: Tensor) -> Tensor:
    """Returns each head's weighted mean over R rankings of -1/(K choose 2) Σ log σ(r_w - r_l), [E].

    This is InstructGPT's equation 1. All comparisons of a ranking are one term, however many they are; a ranking with
    only ties has loss 0. `weights_RE` are each head's own weights, by which those in `among` are multiplied.
    """
    losses_ME = softplus(-margins(scores_NE, among))
    weights_ME = among.weights_M[:, None] * weights_RE[among.rankings_M]
    return (weights_ME.to(losses_ME) * losses_ME).sum(0) / among.total_weight
