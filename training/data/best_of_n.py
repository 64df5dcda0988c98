"""Best of n: what the best of n completions by one score is worth, and how far that is from the policy in KL.

Drawing n completions and keeping the one with the highest score is the optimiser that PPO is to be measured against: it
needs no training, and its KL is known.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby


@dataclass(frozen=True)
class BestOfN:
    """The best of n completions of each prompt."""

    n: int
    kl: float
    """KL from the policy that drew them, in nats a completion."""
    values: tuple[float, ...]
    """Estimate of what the best is worth, for each prompt."""


def best_of_n(scores: Sequence[Sequence[float]], values: Sequence[Sequence[float]]) -> list[BestOfN]:
    """Estimates the value of the best of n = 1, 2, 4, … completions by score, as far as every prompt has so many.

    Args:
        scores: of the completions of each prompt, by which the best is chosen.
        values: what these completions are worth, by the same score or by another measure.
    """
    drawn = list(zip(scores, values, strict=True))
    most = min((len(each) for each in scores), default=0)
    sizes = [2**power for power in range(most.bit_length())]
    return [BestOfN(n, best_of_n_kl(n), tuple(expected_best(*each, n) for each in drawn)) for n in sizes]


def best_of_n_kl(n: int) -> float:
    """Returns the KL of the best of n from the policy that draws them, in nats: log n - (n - 1) / n.

    It is exact where no two completions are alike, and else an upper bound (Beirami et al. 2024).
    """
    return math.log(n) - (n - 1) / n


def expected_best(scores: Sequence[float], values: Sequence[float], n: int) -> float:
    """Returns the mean, over all choices of n of these completions, of the value of the one with the highest score.

    For n independent draws from the policy this is unbiased, as the mean of the n-th order statistic over subsets: the
    completion at place i of N by score, the lowest first, is the best of (i - 1 choose n - 1) of the (N choose n).
    Completions of equal score are equally likely to be kept.

    Raises:
        ValueError: there are fewer than n completions.
    """
    if not 1 <= n <= len(scores):
        raise ValueError(f"the best of {n} cannot be estimated from {len(scores)} completions")
    total, done = 0.0, 0
    ordered = sorted(zip(scores, values, strict=True))
    for _, tied in groupby(ordered, key=lambda each: each[0]):
        worth = [value for _, value in tied]
        chosen = math.comb(done + len(worth), n) - math.comb(done, n)
        total += chosen * sum(worth) / len(worth)
        done += len(worth)
    return total / math.comb(len(scores), n)
