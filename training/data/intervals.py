"""Win rates and means, with their confidence intervals."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

Z_95 = 1.959964


@dataclass(frozen=True)
class WinRate:
    """A share of wins with its 95 % interval. A tie counts half."""

    value: float
    low: float
    high: float
    wins: int
    ties: int
    losses: int

    @property
    def count(self) -> int:
        """Prompts compared."""
        return self.wins + self.ties + self.losses


@dataclass(frozen=True)
class Mean:
    """A mean with its 95 % interval."""

    value: float
    low: float
    high: float
    count: int


def mean(values: Sequence[float]) -> Mean:
    """Returns the mean with its normal interval, which for a single value is that value.

    Raises:
        ValueError: there is no value.
    """
    if not values:
        raise ValueError("a mean needs at least one value")
    value = statistics.fmean(values)
    error = statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else 0.0
    return Mean(value, value - Z_95 * error, value + Z_95 * error, len(values))


def win_rate(scores: Sequence[float], reference_scores: Sequence[float]) -> WinRate:
    """Compares the scores of two completions of each prompt; each prompt is one observation.

    The interval is Wilson's score interval (1927), which is valid near 0 and 1 too.

    Raises:
        ValueError: there is no prompt.
    """
    if not scores:
        raise ValueError("a win rate needs at least one prompt")
    pairs = list(zip(scores, reference_scores, strict=True))
    wins = sum(score > reference for score, reference in pairs)
    ties = sum(score == reference for score, reference in pairs)
    share = (wins + ties / 2) / len(pairs)
    low, high = wilson_interval(share * len(pairs), len(pairs))
    return WinRate(share, low, high, wins, ties, len(pairs) - wins - ties)


def wilson_interval(wins: float, count: int, z: float = Z_95) -> tuple[float, float]:
    """Returns Wilson's interval: the two shares p from which `wins` / `count` is z standard errors away."""
    share = wins / count
    centre = share + z * z / (2 * count)
    spread = z * math.sqrt(share * (1 - share) / count + z * z / (4 * count * count))
    scale = 1 + z * z / count
    return max(0.0, (centre - spread) / scale), min(1.0, (centre + spread) / scale)
