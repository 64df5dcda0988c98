"""Evaluates the reward model on held-out rankings: its accuracy with an interval, where it errs, and its calibration.

The model is right about a comparison if the preferred completion has the greater score; equal scores count half.
Comparisons of one ranking share its prompt and its labeler, and so depend on each other: intervals count rankings, not
comparisons.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from training.data.groups import RankedExample
from training.data.intervals import Z_95
from training.models.reward import RewardModel, group_features
from training.rewards.loss import Comparisons, compare, margins

Row = list[float | str | None]

_LENGTH_EDGES = (-20, -5, 5, 20)
_NUM_BINS = 5
_MOST_LABELERS = 20


@dataclass(frozen=True)
class RewardEvaluation:
    """Figures over the comparisons of held-out rankings. The last column of a table counts comparisons."""

    accuracy: float
    low: float
    high: float
    num_comparisons: int
    by_k: list[Row]
    """[completions ranked, accuracy, count]"""
    by_labeler: list[Row]
    """[labeler, accuracy, count], those with the most comparisons"""
    by_length_difference: list[Row]
    """[least, most, accuracy, count], where least and most bound how many tokens longer the preferred completion is"""
    calibration: list[Row]
    """[mean predicted probability of the likelier order, share of comparisons that have this order, count]"""
    uncertainty: list[Row]
    """[mean over comparisons of the standard deviation of the margin over heads, accuracy, count]"""


@torch.no_grad()
def evaluate_rewards(
    model: RewardModel,
    examples: Sequence[RankedExample],
    features: Sequence[Tensor] | None = None,
) -> RewardEvaluation | None:
    """Evaluates the model on rankings that it has not learned from; returns None if they have no comparison.

    `features` are what `group_features` returns for these rankings, if the caller has them already.
    """
    among = compare([example.ranks for example in examples])
    if not len(among.winners_M):
        return None
    found = features or group_features(model, [example.group for example in examples])
    margins_ME = margins((model.standardized(torch.cat(list(found))) @ model.heads_FE).cpu(), among)
    margin_M, spread_M = margins_ME.mean(1).double(), margins_ME.std(1).double()
    right_M = (margin_M > 0).double() + 0.5 * (margin_M == 0).double()
    lengths_N = torch.tensor([len(each) for example in examples for each in example.group.completions])
    longer_M = lengths_N[among.winners_M] - lengths_N[among.losers_M]
    accuracy, low, high = clustered_share(right_M, among.rankings_M)
    likelier_M = torch.sigmoid(margin_M.abs())
    return RewardEvaluation(
        accuracy=accuracy,
        low=low,
        high=high,
        num_comparisons=len(right_M),
        by_k=_by(lambda example: len(example.ranks), examples, among, right_M),
        by_labeler=_most(_by(lambda example: example.labeler, examples, among, right_M)),
        by_length_difference=_by_length(longer_M, right_M),
        calibration=_binned(likelier_M, right_M),
        uncertainty=_binned(spread_M, right_M),
    )


def clustered_share(right_M: Tensor, clusters_M: Tensor) -> tuple[float, float, float]:
    """Returns the mean of `right_M`, each from 0 to 1, with its 95 % interval: 0 to 1 if there is one cluster."""
    share, low, high = clustered_mean(right_M, clusters_M)
    return share, max(0.0, low), min(1.0, high)


def clustered_mean(values_M: Tensor, clusters_M: Tensor) -> tuple[float, float, float]:
    """Returns the mean with its 95 % interval; observations of one cluster may depend on each other.

    The interval is normal, with the variance of a ratio estimator over clusters (Cochran 1977, section 6.4). It is
    infinite if there is one cluster.
    """
    mean = float(values_M.mean())
    num_clusters = int(clusters_M.max()) + 1
    excess = torch.zeros(num_clusters, dtype=torch.double).index_add_(0, clusters_M, values_M.double() - mean)
    present = len(clusters_M.unique())
    if present < 2:
        return mean, -math.inf, math.inf
    error = math.sqrt(float((excess**2).sum()) * present / (present - 1)) / len(values_M)
    return mean, mean - Z_95 * error, mean + Z_95 * error


def _by(
    key: Callable[[RankedExample], int | str], examples: Sequence[RankedExample], among: Comparisons, right_M: Tensor
) -> list[Row]:
    rows: dict[int | str, list[float]] = {}
    for ranking, right in zip(among.rankings_M.tolist(), right_M.tolist(), strict=True):
        rows.setdefault(key(examples[ranking]), []).append(right)
    return [[name, sum(found) / len(found), len(found)] for name, found in sorted(rows.items())]


def _most(rows: list[Row]) -> list[Row]:
    return sorted(rows, key=lambda row: -float(row[-1] or 0))[:_MOST_LABELERS]


def _by_length(longer_M: Tensor, right_M: Tensor) -> list[Row]:
    edges = [None, *_LENGTH_EDGES, None]
    bins_M = torch.bucketize(longer_M, torch.tensor(_LENGTH_EDGES), right=True)
    return [
        [edges[index], edges[index + 1], float(right_M[bins_M == index].mean()), int((bins_M == index).sum())]
        for index in range(len(edges) - 1)
        if (bins_M == index).any()
    ]


def _binned(value_M: Tensor, right_M: Tensor) -> list[Row]:
    """Returns bins of equal count by value: [mean value, share right, count]."""
    order = value_M.argsort()
    parts = [part for part in order.tensor_split(_NUM_BINS) if len(part)]
    return [[float(value_M[part].mean()), float(right_M[part].mean()), len(part)] for part in parts]
