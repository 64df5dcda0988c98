"""The figures and the table of what being online is worth."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Sequence
from typing import Any

from bench.learning.intervals import over_seeds
from bench.result import Figure
from training.data.intervals import win_rate

Seeds = Sequence[dict[str, Any]]

ONLINE_HEADINGS = ("arm", "rounds", "KL, last", "utility, first", "last", "right about part 2, %", "3, %", "stopped")
_ARMS = ("offline", "online", "online-chosen")
_PAIRS = tuple((ours, theirs) for index, ours in enumerate(_ARMS) for theirs in ("sft", *_ARMS[:index]))


def online_figures(seeds: Seeds) -> list[Figure]:
    """Returns the win rate of each arm over the SFT policy and over the arms before it, and how far each arm went."""
    figures = [
        over_seeds(f"online: {ours} over {theirs}", [_rate(seed, ours, theirs) for seed in seeds])
        for ours, theirs in _PAIRS
    ]
    for arm in _ARMS:
        last = [seed[arm]["rounds"][-1]["objective/kl"] for seed in seeds]
        figures.append(Figure(f"online: KL of {arm}", statistics.fmean(last), "nats", min(last), max(last)))
    return figures


def online_rows(seeds: Seeds) -> Iterator[list[str]]:
    """Yields a row for each arm of each seed, under `ONLINE_HEADINGS`.

    It has how many comparisons of a part the rewards had right before they learned from it. Offline there are no
    rewards by then.
    """
    for seed in seeds:
        for arm in _ARMS:
            run = seed[arm]
            first, last = run["rounds"][0], run["rounds"][-1]
            known = [f"{100 * part['accuracy before'][0]:.0f}" for part in run["parts"] if "accuracy before" in part]
            numbers = last["objective/kl"], first["utility"], last["utility"]
            yield [
                f"{arm}, seed {seed['seed']}", str(len(run["rounds"])), *(f"{number:.2f}" for number in numbers),
                *[*known, "-", "-"][:2], run["stopped"] or "-",
            ]  # fmt: skip


def _rate(seed: dict[str, Any], ours: str, theirs: str) -> list[float]:
    rate = win_rate(*(seed[f"answers-{name}"]["utilities"] for name in (ours, theirs)))
    return [rate.value, rate.low, rate.high]
