"""How often does the canary's rule decide wrongly, and how soon does it decide? Simulated rollouts, 1,000 a row.

    python -m bench.canary --json FILE [--quick]

Users come as Zipf's law has it (exponent 1), each with a win rate of its own around the truth, and rank two completions
of either version by a draw from Plackett-Luce. Some of them may rank at random, or as if they wanted the worse to win.
After each ranking the rule is asked (deploy.rollout.preference). Beside it stand two rules that it replaces: a z test
that is looked at after each ranking, and the same sequence with rankings in place of users.
"""

from __future__ import annotations

import argparse
import math
import statistics
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from bench.result import Figure, add_arguments, at_least, at_most, bench_result, report
from deploy.rollout.preference import Interval, Preference, Rule, Sums, Verdict, added, interval, judge

_REPLICATIONS, _QUICK = 1000, 100
_RULE = Rule()
_Look = Callable[[int, float], Interval | None]


@dataclass(frozen=True)
class Crowd:
    """Who ranks."""

    truth: float
    """The mean of users' win rates of the canary."""
    users: int = 300
    spread: float = 0.12
    """Standard deviation of users' own win rates."""
    random: float = 0.0
    """Share of users who rank at random."""
    hostile: float = 0.0
    """Share of users who rank the other way round."""


@dataclass(frozen=True)
class Decided:
    """How many rollouts ended in which way, and after how many rankings those ended that were decided."""

    verdicts: dict[Verdict, int]
    lengths: tuple[int, ...]
    """Of every rollout; as many as there may be for those that nothing decided."""

    def share(self, verdict: Verdict) -> float:
        """The share of rollouts with this verdict, in percent."""
        return 100 * self.verdicts.get(verdict, 0) / len(self.lengths)

    def length(self, percent: int) -> float:
        """The number of rankings after which this many percent of rollouts are decided."""
        return float(np.percentile(self.lengths, percent, method="higher"))


def by_users() -> _Look:
    """Returns the rule as it is shipped."""
    preference = Preference()

    def look(user: int, outcome: float) -> Interval | None:
        preference.add(str(user), outcome)
        return preference.interval()

    return look


def by_rankings() -> _Look:
    """Returns the same sequence without its cap and its users: each ranking counts as if somebody new had given it."""
    sums = Sums()

    def look(user: int, outcome: float) -> Interval | None:
        nonlocal sums
        sums = added(sums, 0, 0.0, outcome)
        return interval(sums)

    return look


def by_z_test() -> _Look:
    """Returns a z test at 5 %, as it is often done: looked at after each ranking."""
    count, total, squared = 0, 0.0, 0.0

    def look(user: int, outcome: float) -> Interval | None:
        nonlocal count, total, squared
        count, total, squared = count + 1, total + outcome, squared + outcome * outcome
        if count < 20:
            return None
        mean = total / count
        half = 1.96 * math.sqrt(max(squared / count - mean * mean, 0.0) / count)
        return Interval(mean - half, mean + half)

    return look


def simulate(crowd: Crowd, replications: int, rule: Callable[[], _Look] = by_users) -> Decided:
    """Returns how as many rollouts end."""
    verdicts: dict[Verdict, int] = {}
    lengths = []
    for seed in range(replications):
        look, verdict, length = rule(), Verdict.INCONCLUSIVE, _RULE.most_rankings
        for number, (user, outcome) in enumerate(_rankings(crowd, np.random.default_rng(seed)), 1):
            found = judge(look(user, outcome), number, 0.0, _RULE)
            if found is not Verdict.OPEN:
                verdict, length = found, number
                break
        verdicts[verdict] = verdicts.get(verdict, 0) + 1
        lengths.append(length)
    return Decided(verdicts, tuple(lengths))


def _rankings(crowd: Crowd, random: np.random.Generator) -> Iterator[tuple[int, float]]:
    """Yields as many rankings as a rollout may have: the user, and the share of pairs that the canary won."""
    rates = _win_rates(crowd, random)
    activity = 1.0 / np.arange(1, crowd.users + 1)
    users = random.choice(crowd.users, _RULE.most_rankings, p=activity / activity.sum())
    # A difference of two Gumbels is logistic, so a canary's completion is above a live one at the user's own rate.
    lead = np.log(rates / (1 - rates))[users, None]
    canary = random.gumbel(size=(_RULE.most_rankings, 2)) + lead
    live = random.gumbel(size=(_RULE.most_rankings, 2))
    outcomes = (canary[:, :, None] > live[:, None, :]).mean(axis=(1, 2))
    return zip(users.tolist(), outcomes.tolist(), strict=True)


def _win_rates(crowd: Crowd, random: np.random.Generator) -> npt.NDArray[np.float64]:
    """Returns the win rate of each user, from a beta distribution."""
    rates = np.full(crowd.users, crowd.truth)
    if crowd.spread:
        both = crowd.truth * (1 - crowd.truth) / crowd.spread**2 - 1
        rates = random.beta(crowd.truth * both, (1 - crowd.truth) * both, crowd.users)
    kind = random.random(crowd.users)
    rates = np.where(kind < crowd.random, 0.5, np.where(kind < crowd.random + crowd.hostile, 1 - rates, rates))
    return np.clip(rates, 1e-6, 1 - 1e-6)


def figures(replications: int) -> list[Figure]:
    """Returns all figures."""
    found: list[Figure] = []
    equal = Crowd(0.5)
    for name, rule in (("", by_users), ("z test, ", by_z_test), ("by ranking, ", by_rankings)):
        wrong = simulate(equal, replications, rule).share(Verdict.BETTER)
        figure = Figure(f"{name}50 %: promoted", wrong, "%")
        found.append(figure if name else at_most(3.5, figure))
    for users, spread in ((60, 0.12), (1500, 0.12), (300, 0.0), (300, 0.21)):
        decided = simulate(Crowd(0.5, users, spread), replications)
        name = f"50 %, {users} users, spread {spread:g}: promoted"
        found.append(at_most(3.5, Figure(name, decided.share(Verdict.BETTER), "%")))
    worse = simulate(Crowd(0.45), replications)
    found.append(at_most(1.0, Figure("45 %: promoted", worse.share(Verdict.BETTER), "%")))
    found.append(at_least(95.0, Figure("45 %: no gain", worse.share(Verdict.NO_GAIN), "%")))
    for truth in (0.55, 0.6, 0.65, 0.7):
        found += _of_better(Crowd(truth), "", replications)
        for share in (0.1, 0.3):
            found += _of_better(Crowd(truth, random=share), f"{100 * share:.0f} % random, ", replications)
            found += _of_better(Crowd(truth, hostile=share), f"{100 * share:.0f} % hostile, ", replications)
    return found


def _of_better(crowd: Crowd, name: str, replications: int) -> list[Figure]:
    decided = simulate(crowd, replications)
    name = f"{name}{100 * crowd.truth:.0f} %"
    median, most = statistics.median(decided.lengths), decided.length(90)
    return [
        Figure(f"{name}: promoted", decided.share(Verdict.BETTER), "%"),
        Figure(f"{name}: rankings", median, "median; high is of 90 %", high=most),
    ]


def main() -> None:
    """Runs the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_arguments(parser)
    arguments = parser.parse_args()
    report(bench_result("canary", figures(_QUICK if arguments.quick else _REPLICATIONS)), arguments.json)


if __name__ == "__main__":
    main()
