"""Win rates and means, with their confidence intervals."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

Z_95 = 1.959964
_FEW = {1: 12.706, 2: 4.303, 3: 3.182}


@dataclass(frozen=True)
class WinRate:
    """The probability that a completion by one policy beats one by another of the same prompt, a tie counting half.

    It is the mean over prompts of the share of pairs that are won, with its 95 % interval.
    """

    value: float
    low: float
    high: float
    count: int
    """Prompts."""
    wins: int
    """Pairs won, over all prompts; `ties` and `losses` likewise."""
    ties: int
    losses: int

    @property
    def num_pairs(self) -> int:
        """Pairs compared, over all prompts."""
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


def win_rate(scores: Sequence[Sequence[float]], reference_scores: Sequence[Sequence[float]]) -> WinRate:
    """Compares, prompt by prompt, the score of each of its completions with that of each of the reference's.

    Pairs of a prompt share the prompt and their completions, so it is prompts that are counted as observations.

    Raises:
        ValueError: there is no prompt, or one without a completion.
    """
    if not scores or not all((*scores, *reference_scores)):
        raise ValueError("a win rate needs at least one prompt, and completions of each by both policies")
    shares, wins, ties, num_pairs = [], 0, 0, 0
    for ours, theirs in zip(scores, reference_scores, strict=True):
        won = sum(one > other for one in ours for other in theirs)
        tied = sum(one == other for one in ours for other in theirs)
        shares.append((won + tied / 2) / (len(ours) * len(theirs)))
        wins, ties, num_pairs = wins + won, ties + tied, num_pairs + len(ours) * len(theirs)
    low, high = interval_of_shares(shares, num_pairs)
    return WinRate(statistics.fmean(shares), low, high, len(shares), wins, ties, num_pairs - wins - ties)


def interval_of_shares(shares: Sequence[float], num_pairs: int | None = None) -> tuple[float, float]:
    """Returns the 95 % interval of the mean of independent shares, each from 0 to 1, of `num_pairs` wins and losses.

    It is Wilson's at the effective number of shares, as in surveys of clusters (Dean & Pagano 2015). Wilson's interval
    itself takes each share for a win or a loss. Shares between 0 and 1 vary less, so that it would be about twice too
    wide for the pairs of 4 completions by each policy. Therefore their number is divided by the design effect, which is
    their variance over that of wins and losses with the same mean, and the quantile is Student's. The interval of
    Student's t itself is too narrow for few prompts with a mean near 0 or 1, and leaves this range. Shares that are all
    equal show no variance of their own: they are taken for wins and losses.
    """
    count, share = len(shares), statistics.fmean(shares)
    variance, most = statistics.pvariance(shares), share * (1 - share)
    effective = count * most / variance if variance > 0 else count
    if num_pairs is not None:
        # A few shares that are nearly equal by chance are no more observations than what they are shares of.
        effective = min(effective, num_pairs)
    return wilson_interval(share * effective, effective, student_quantile(count - 1))


def wilson_interval(wins: float, count: float, z: float = Z_95) -> tuple[float, float]:
    """Returns Wilson's interval (1927): the two shares p from which `wins` / `count` is z standard errors away."""
    share = wins / count
    centre = share + z * z / (2 * count)
    spread = z * math.sqrt(share * (1 - share) / count + z * z / (4 * count * count))
    scale = 1 + z * z / count
    return max(0.0, (centre - spread) / scale), min(1.0, (centre + spread) / scale)


def student_quantile(freedom: int) -> float:
    """Returns the 97.5 % quantile of Student's t, to 0.01; from four degrees on by Abramowitz & Stegun 26.7.5.

    Without any, for a single observation, it returns that of the normal distribution.
    """
    if freedom < 1:
        return Z_95
    if freedom in _FEW:
        return _FEW[freedom]
    z, inverse = Z_95, 1 / freedom
    first, second = (z**3 + z) / 4, (5 * z**5 + 16 * z**3 + 3 * z) / 96
    third = (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384
    return z + inverse * (first + inverse * (second + inverse * third))
