"""The figures of the learning benchmark, from its experiments' results: win rates, taxes and accuracies, over seeds.

An interval over seeds is Student's, of the seeds' means. With one seed it is that seed's own, over prompts, windows of
text or items. Accuracies on HH-RLHF are over comparisons, since its seeds are splits of the same comparisons.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any

from bench.learning.factors import FACTOR
from bench.learning.human_curve import human_figures
from bench.learning.intervals import mean_interval, over_seeds
from bench.learning.online_page import online_figures
from bench.result import Figure, at_least
from training.data.best_of_n import best_of_n
from training.data.intervals import win_rate

Found = dict[str, list[dict[str, Any]]]

_POLICIES = ("base", "few-shot", "sft", "ppo", "ppo-ptx")
_OURS = ("ppo", "ppo-ptx")
_GOALS = {
    ("sft", "base"): 0.5,
    **{(policy, other): goal for policy in _OURS for other, goal in (("base", 0.85), ("few-shot", 0.71), ("sft", 0.5))},
}
_PTX_GOAL = 0.5
_TAXES = (("sft", "base"), *((policy, "sft") for policy in _OURS))


def figures_of(found: Found) -> list[Figure]:
    """Returns all figures, in the order of the experiments."""
    figures: list[Figure] = []
    for name, seeds in found.items():
        if name == "human":
            figures += human_figures(seeds)
        elif name == "online":
            figures += online_figures(seeds)
        elif name.startswith(FACTOR):
            figures.append(_factor_figure(name, seeds))
        else:
            figures += [*_win_figures(name, seeds), *_best_of_n_figures(name, seeds), *_tax_figures(name, seeds)]
    return figures


def _win_figures(name: str, seeds: Sequence[dict[str, Any]]) -> list[Figure]:
    """Returns the mean true utility of each policy on held-out prompts, and win rates by it."""
    known = [policy for policy in _POLICIES if f"answers-{policy}" in seeds[0]]
    figures = [over_seeds(f"{name}: utility of {each}", [_utility(seed, each) for seed in seeds]) for each in known]
    for index, policy in enumerate(known):
        for other in known[:index]:
            rates = [_rate(seed[f"answers-{policy}"], seed[f"answers-{other}"]) for seed in seeds]
            figure = over_seeds(f"{name}: {policy} over {other}", rates)
            goal = _GOALS.get((policy, other))
            figures.append(at_least(goal, figure) if goal else figure)
    return figures


def _utility(seed: dict[str, Any], policy: str) -> list[float]:
    return mean_interval([statistics.fmean(values) for values in seed[f"answers-{policy}"]["utilities"]])


def _rate(ours: dict[str, Any], theirs: dict[str, Any]) -> list[float]:
    rate = win_rate(ours["utilities"], theirs["utilities"])
    return [rate.value, rate.low, rate.high]


def _best_of_n_figures(name: str, seeds: Sequence[dict[str, Any]]) -> list[Figure]:
    """Returns how often the SFT policy's best of n by the reward model is worth more than a completion of the base."""
    found: dict[str, list[list[float]]] = {}
    for seed in seeds:
        utilities, base = (seed[f"answers-{policy}"]["utilities"] for policy in ("sft", "base"))
        wins = [
            [statistics.fmean((value > other) + 0.5 * (value == other) for other in theirs) for value in ours]
            for ours, theirs in zip(utilities, base, strict=True)
        ]
        for each in best_of_n(seed["scores-sft"]["scores"], wins):
            label = f"{name}: best of {each.n} over base, at {each.kl:.2f} nats"
            found.setdefault(label, []).append(mean_interval(each.values))
    return [over_seeds(label, values) for label, values in found.items()]


def _factor_figure(name: str, seeds: Sequence[dict[str, Any]]) -> Figure:
    """Returns how often a completion with one factor of the recipe changed is worth more than one of the recipe."""
    rates = [_rate(seed["answers"], seed["answers-ppo"]) for seed in seeds]
    return over_seeds(f"{name.removeprefix(FACTOR)} over the recipe", rates)


def _tax_figures(name: str, seeds: Sequence[dict[str, Any]]) -> list[Figure]:
    """Returns the changes on WikiText-2 and HellaSwag, and the share of PPO's loss that the pretraining mix undoes."""
    if "tax-ppo" not in seeds[0]:
        return []
    figures, losses = [], {}
    for policy, before in _TAXES:
        loss = over_seeds(
            f"{name}: WikiText-2 loss, {policy} less {before}",
            [_change(seed, before, policy, "wikitext") for seed in seeds], "nats/token",
        )  # fmt: skip
        hits = [_change(seed, before, policy, "hellaswag") for seed in seeds]
        losses[policy] = loss
        figures += [loss, over_seeds(f"{name}: HellaSwag accuracy, {policy} less {before}", hits)]
    # Of a loss that may be none, no share can be said.
    if (losses["ppo"].low or 0.0) > 0:
        given_back = 1 - losses["ppo-ptx"].value / losses["ppo"].value
        figures.append(at_least(_PTX_GOAL, Figure(f"{name}: tax that ptx gives back", given_back, "share")))
    return figures


def _change(seed: dict[str, Any], before: str, policy: str, measure: str) -> list[float]:
    pairs = zip(seed[f"tax-{before}"][measure], seed[f"tax-{policy}"][measure], strict=True)
    return mean_interval([new - old for old, new in pairs])
