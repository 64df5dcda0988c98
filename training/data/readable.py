"""Says which completions of a ranking have something to read, and whether these compare; no token is looked at."""

from __future__ import annotations

from collections.abc import Iterable

from feedback.store.stored import RankedCompletion, RankedGroup


def readable(group: RankedGroup) -> list[RankedCompletion]:
    """Returns the completions that were not cut off before their first character or token."""
    return [each for each in group.completions if each.text or each.ended or _has_tokens(each)]


def _has_tokens(completion: RankedCompletion) -> bool:
    """Whether it has tokens to read; those that a stop string cut count as far as the text goes."""
    drawn = completion.drawn
    return drawn is not None and bool(drawn.completion) and not drawn.cut


def has_comparison(group: RankedGroup) -> bool:
    """Whether a ranking orders two completions that can be learned from."""
    return differ(each.rank for each in readable(group))


def lost_comparison(group: RankedGroup) -> bool:
    """Whether it would order two if none of its completions spanned a swap."""
    return differ([*(each.rank for each in readable(group)), *group.spanning_ranks])


def differ(ranks: Iterable[int]) -> bool:
    """Whether there are two different ranks, which is what makes a comparison."""
    return len(set(ranks)) > 1
