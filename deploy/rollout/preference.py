"""Which of two versions users prefer: an interval that holds at every look, however often and whenever one looks.

Both versions write completions of one sample, and a user ranks them blind. A ranking's outcome X is the share of its
(canary, live) pairs that the canary won; if neither is better, its mean is 1/2. Users repeat themselves and differ, so
what counts is users, not rankings: the interval is Robbins' normal mixture (Howard et al. 2021, arXiv 1810.08240) with
the variance over users. It is asymptotic, which `RHO` and `LEAST_USERS` are for.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum

ALPHA = 0.05
"""How often the interval may ever miss the true win rate."""
RHO = 10.0
"""At about how much variance over users the interval is tightest."""
MOST_OF_A_USER = 10
"""Rankings of one user that count, the first ones: nobody decides by being busy."""
LEAST_USERS = 20
"""Users below which nothing is said."""


@dataclass(frozen=True)
class Interval:
    """Where the canary's win rate lies."""

    low: float
    high: float

    @property
    def middle(self) -> float:
        """The win rate so far."""
        return (self.low + self.high) / 2


@dataclass(frozen=True)
class Sums:
    """All that is kept of the rankings that count, n of them by many users: n_u and s_u are a user's count and sum."""

    rankings: float = 0.0
    """n."""
    wins: float = 0.0
    """S, the sum of all outcomes."""
    squared_wins: float = 0.0
    """Sum of s_u² over users."""
    wins_by_rankings: float = 0.0
    """Sum of s_u n_u over users."""
    squared_rankings: float = 0.0
    """Sum of n_u² over users."""
    users: int = 0


@dataclass
class Preference:
    """The rankings of one pair of versions so far. The order in which users come does not matter."""

    sums: Sums = field(default_factory=Sums)
    by_user: dict[str, tuple[int, float]] = field(default_factory=dict)
    """The count and the sum of outcomes of each user's rankings that count."""

    def add(self, user: str, outcome: float) -> bool:
        """Counts one ranking, unless its user has as many as count. Returns whether it counted."""
        count, total = self.by_user.get(user, (0, 0.0))
        if count == MOST_OF_A_USER:
            return False
        self.by_user[user] = (count + 1, total + outcome)
        self.sums = added(self.sums, count, total, outcome)
        return True

    def interval(self) -> Interval | None:
        """Returns where the win rate lies; None as long as too few users have ranked."""
        return interval(self.sums)


def outcome(groups: Sequence[Iterable[str]], is_canary: Mapping[str, bool]) -> float | None:
    """Returns the share of a ranking's (canary, live) pairs that the canary won, a tie counting one half.

    Args:
        groups: the ids of completions, the best first; those of one group are tied.
        is_canary: by id, whether the canary wrote it. Ids that are not in it are of other versions, and pass.

    Returns:
        The share; None if the ranking has not both.
    """
    won, live_above, pairs = 0.0, 0, 0
    sides = [[is_canary[each] for each in group if each in is_canary] for group in groups]
    num_live = sum(side.count(False) for side in sides)
    for side in sides:
        canary, live = side.count(True), side.count(False)
        won += canary * (num_live - live_above - live / 2)
        live_above += live
        pairs += canary * num_live
    return won / pairs if pairs else None


def added(sums: Sums, count: int, total: float, outcome: float) -> Sums:
    """Returns the sums with one more ranking, of a user who had `count` with the sum `total`."""
    after = total + outcome
    return Sums(
        rankings=sums.rankings + 1,
        wins=sums.wins + outcome,
        squared_wins=sums.squared_wins + after * after - total * total,
        wins_by_rankings=sums.wins_by_rankings + after * (count + 1) - total * count,
        squared_rankings=sums.squared_rankings + 2 * count + 1,
        users=sums.users + (count == 0),
    )


def interval(sums: Sums) -> Interval | None:
    """Returns where the win rate lies; None as long as fewer than `LEAST_USERS` have ranked.

    With V the sum over users of (s_u - n_u S/n)², it is S/n ± sqrt((V + ρ) (ln((V + ρ)/ρ) + 2 ln(1/α))) / n.
    """
    if sums.users < LEAST_USERS:
        return None
    rate = sums.wins / sums.rankings
    variance = sums.squared_wins - 2 * rate * sums.wins_by_rankings + rate * rate * sums.squared_rankings
    # What is left of a difference of large sums may be below 0.
    spread = max(variance, 0.0) + RHO
    half = math.sqrt(spread * (math.log(spread / RHO) + 2 * math.log(1 / ALPHA))) / sums.rankings
    return Interval(rate - half, rate + half)


class Verdict(Enum):
    """What the evidence says."""

    OPEN = "more rankings are needed"
    BETTER = "users prefer the canary"
    NO_GAIN = "the canary is no gain worth having"
    INCONCLUSIVE = "an operator decides"


@dataclass(frozen=True)
class Rule:
    """When the evidence is enough."""

    better_above: float = 0.5
    no_gain_below: float = 0.53
    most_rankings: int = 2000
    most_days: float = 14.0


def judge(found: Interval | None, num_rankings: int, days: float, rule: Rule) -> Verdict:
    """Returns what an interval says, after as many rankings and days. No traffic is neither for nor against."""
    if found and found.low > rule.better_above:
        return Verdict.BETTER
    if found and found.high < rule.no_gain_below:
        return Verdict.NO_GAIN
    over = num_rankings >= rule.most_rankings or days >= rule.most_days
    return Verdict.INCONCLUSIVE if over and num_rankings else Verdict.OPEN
