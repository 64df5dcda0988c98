"""How often a policy's completions beat the reference policy's on the same held-out prompts, by the reward model."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

Z_95 = 1.959964


@dataclass(frozen=True)
class WinRate:
    """A share of wins with its 95 % interval. A tie counts half."""

    value: float
    low: float
    high: float
    count: int


def win_rate(scores: Sequence[float], reference_scores: Sequence[float]) -> WinRate:
    """Compares the scores of two completions of each prompt, one prompt an observation.

    The interval is Wilson's score interval (1927), which holds near 0 and 1 too. Raises ValueError if there are none.
    """
    if not scores:
        raise ValueError("a win rate needs at least one prompt")
    wins = sum(
        1.0 if score > reference else 0.5 if score == reference else 0.0
        for score, reference in zip(scores, reference_scores, strict=True)
    )
    low, high = wilson_interval(wins, len(scores))
    return WinRate(wins / len(scores), low, high, len(scores))


def wilson_interval(wins: float, count: int, z: float = Z_95) -> tuple[float, float]:
    """Bounds of the share p at which `wins` of `count` would lie z standard errors away."""
    share = wins / count
    centre = share + z * z / (2 * count)
    spread = z * math.sqrt(share * (1 - share) / count + z * z / (4 * count * count))
    scale = 1 + z * z / count
    return max(0.0, (centre - spread) / scale), min(1.0, (centre + spread) / scale)
