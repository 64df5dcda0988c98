"""What a reward model must beat on held-out comparisons: the longer completion, and a linear model of its words.

N comparisons, V words and word pairs of the vocabulary, M entries of a sparse matrix; I is an axis of one.
"""

from __future__ import annotations

import math
import re
import statistics
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor
from torch.nn.functional import softplus

from bench.learning.hh_rlhf import Comparison, split

L2_WEIGHTS = (1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1, 3e-1)
_VALIDATION_SHARE = 0.2
_MIN_COMPLETIONS = 3  # a word that fewer completions have may be chance
_MAX_ITERATIONS = 200


@dataclass(frozen=True)
class LengthBaseline:
    """Length alone, in characters: the longer or the shorter wins, whichever won more often in the training data."""

    right: tuple[float, ...]
    """1 for each held-out comparison that it orders correctly, else 0; 0.5 where lengths are equal."""
    sign: int
    """1 if the longer won in the training data, else -1."""


@dataclass(frozen=True)
class BagOfWords:
    """A linear score of a completion: weights of log(1 + count) of each word and word pair."""

    vocabulary: dict[str, int]
    weights_V: Tensor


@dataclass(frozen=True)
class BagOfWordsBaseline:
    """The bag of words on held-out comparisons, and how its L2 weight was chosen."""

    right: tuple[float, ...]
    """1 for each comparison that it orders correctly, else 0; 0.5 where scores are equal."""
    l2_weight: float
    validation: dict[float, float]
    """Accuracy on the validation part of the training data, by L2 weight."""


def length_baseline(train: Sequence[Comparison], held_out: Sequence[Comparison]) -> LengthBaseline:
    """Predicts `held_out` by length; only the sign is learned.

    Raises:
        ValueError: `train` is empty.
    """
    sign = 1 if statistics.fmean(_longer_wins(train, 1)) >= 0.5 else -1
    return LengthBaseline(_longer_wins(held_out, sign), sign)


def _longer_wins(comparisons: Sequence[Comparison], sign: int) -> tuple[float, ...]:
    return right(sign * (len(each.chosen) - len(each.rejected)) for each in comparisons)


def right(margins: Iterable[float]) -> tuple[float, ...]:
    """Returns 1 where the chosen completion has the greater score, 0.5 where scores are equal, else 0."""
    return tuple(float(margin > 0) + 0.5 * float(margin == 0) for margin in margins)


def bag_of_words_baseline(train: Sequence[Comparison], held_out: Sequence[Comparison]) -> BagOfWordsBaseline:
    """Fits the bag of words to `train` and measures it on `held_out`, from which nothing is learned.

    The L2 weight is the one that does best on a validation part of `train`, split by prompt. With it the model is then
    fitted to all of `train`.

    Raises:
        ValueError: there is nothing to validate on.
    """
    fitting, validating = split(train, _VALIDATION_SHARE, salt="validation")
    validation = {
        weight: statistics.fmean(credits_of(model, validating)) for weight, model in fit(fitting, L2_WEIGHTS).items()
    }
    # Among equals, the one that keeps weights smaller.
    best = max(L2_WEIGHTS, key=lambda weight: (validation[weight], weight))
    model = fit(train, [best])[best]
    return BagOfWordsBaseline(credits_of(model, held_out), best, validation)


def fit(comparisons: Sequence[Comparison], l2_weights: Sequence[float]) -> dict[float, BagOfWords]:
    """Fits one model to `comparisons` for each L2 weight."""
    vocabulary = _vocabulary(comparisons)
    difference_NV = differences(comparisons, vocabulary)
    return {weight: BagOfWords(vocabulary, logistic_weights(difference_NV, weight)) for weight in l2_weights}


def logistic_weights(difference_NV: Tensor, l2_weight: float) -> Tensor:
    """Returns the w, [V], that minimises mean -log σ(x · w) + l2_weight / 2 · |w|² over the rows x, by L-BFGS.

    A row is the features of a chosen completion less those of the rejected one; an intercept would cancel out.
    """
    weights_VI = torch.zeros(difference_NV.shape[1], 1, requires_grad=True)
    optimizer = torch.optim.LBFGS([weights_VI], max_iter=_MAX_ITERATIONS, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        optimizer.zero_grad()
        margin_NI = torch.sparse.mm(difference_NV, weights_VI)
        value = softplus(-margin_NI).mean() + l2_weight / 2 * weights_VI.square().sum()
        value.backward()
        return value

    optimizer.step(loss)
    return weights_VI.detach()[:, 0]


def credits_of(model: BagOfWords, comparisons: Sequence[Comparison]) -> tuple[float, ...]:
    """Returns whether the chosen completion scores higher, as `right` does.

    Raises:
        ValueError: there are no comparisons.
    """
    if not comparisons:
        raise ValueError("an accuracy needs at least one comparison")
    margin_N = torch.sparse.mm(differences(comparisons, model.vocabulary), model.weights_V[:, None])[:, 0]
    return right(margin_N.tolist())


def terms(text: str) -> Counter[str]:
    """Counts the words of `text`, in lower case, and its pairs of neighbouring words."""
    words = re.findall(r"[^\W_]+(?:['\u2019][^\W_]+)?|[?!]", text.lower())
    return Counter([*words, *(f"{first} {second}" for first, second in pairwise(words))])


def _vocabulary(comparisons: Sequence[Comparison]) -> dict[str, int]:
    found = Counter(term for c in comparisons for text in (c.chosen, c.rejected) for term in terms(text))
    return {term: index for index, term in enumerate(sorted(t for t, n in found.items() if n >= _MIN_COMPLETIONS))}


def differences(comparisons: Sequence[Comparison], vocabulary: dict[str, int]) -> Tensor:
    """Returns the features of the chosen completions less those of the rejected ones, sparse, [N, V]."""
    entries = list(_entries(comparisons, vocabulary))
    places = torch.tensor([[row for row, _, _ in entries], [column for _, column, _ in entries]], dtype=torch.long)
    values_M = torch.tensor([value for _, _, value in entries])
    shape = len(comparisons), len(vocabulary)
    return torch.sparse_coo_tensor(places, values_M, shape, check_invariants=True).coalesce()


def _entries(comparisons: Sequence[Comparison], vocabulary: dict[str, int]) -> Iterator[tuple[int, int, float]]:
    for row, comparison in enumerate(comparisons):
        chosen, rejected = terms(comparison.chosen), terms(comparison.rejected)
        for term in chosen.keys() | rejected.keys():
            if term in vocabulary and chosen[term] != rejected[term]:
                yield row, vocabulary[term], math.log1p(chosen[term]) - math.log1p(rejected[term])
