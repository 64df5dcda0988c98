"""Turns a ranking into ordered pairs."""

from collections.abc import Sequence


def comparisons(ranks: Sequence[int]) -> list[tuple[int, int]]:
    """Returns (chosen, rejected) for each pair of different ranks, as indices into `ranks`; rank 0 is the best.

    Ties give no comparison, so K completions give at most K(K-1)/2 (arXiv 2203.02155, section 3.5).
    """
    return [
        (chosen, rejected)
        for chosen, better in enumerate(ranks)
        for rejected, worse in enumerate(ranks)
        if better < worse
    ]
