"""The figures of the learning benchmark, from what its experiments left: win rates, taxes and accuracies, over seeds.

An interval over seeds is Student's, of the seeds' means; where there is one seed it is that seed's own, over prompts.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from typing import Any

from bench.result import Figure, at_least
from training.evaluate import win_rate

Found = dict[str, list[dict[str, Any]]]

# Two-sided 95 % points of Student's distribution, by degrees of freedom.
STUDENT = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571, 6: 2.447, 7: 2.365, 8: 2.306, 9: 2.262}
POLICIES = ("few-shot", "sft", "ppo", "ppo-ptx", "online")
GOALS = {("ppo-ptx", "base"): 0.85, ("ppo-ptx", "few-shot"): 0.71, ("ppo-ptx", "sft"): 0.5}
PTX_GOAL = 0.5


def figures_of(found: Found) -> list[Figure]:
    """All figures, in the order of the experiments."""
    figures = human_figures(found["human"])
    for name, seeds in found.items():
        if name != "human":
            figures += win_figures(name, seeds) + tax_figures(name, seeds)
    return figures


def human_figures(seeds: Sequence[dict[str, Any]]) -> list[Figure]:
    """Held-out accuracy on HH-RLHF; the peer is the better of length alone and a bag of words."""
    best = max(statistics.fmean(seed[name][0] for seed in seeds) for name in ("length", "bag of words"))
    rows = [(name, [seed[name] for seed in seeds]) for name in ("reward model", "length", "bag of words")]
    figures = [over_seeds(f"HH-RLHF accuracy: {name}", values) for name, values in rows]
    first = at_least(max(best, 0.5), Figure(**{**vars(figures[0]), "peer": best}))
    return [first, *figures[1:]]


def win_figures(name: str, seeds: Sequence[dict[str, Any]]) -> list[Figure]:
    """Win rates by the true utility on held-out prompts."""
    figures = []
    for policy in POLICIES:
        for other in ("base", "few-shot", "sft"):
            if (policy, other) in (("few-shot", "few-shot"), ("few-shot", "sft"), ("sft", "sft"), ("sft", "few-shot")):
                continue
            rates = [
                win_rate(seed[f"answers-{policy}"]["utilities"], seed[f"answers-{other}"]["utilities"])
                for seed in seeds
            ]
            figure = over_seeds(f"{name}: {policy} over {other}", [[rate.value, rate.low, rate.high] for rate in rates])
            goal = GOALS.get((policy, other))
            figures.append(at_least(goal, figure) if goal else figure)
    return figures


def tax_figures(name: str, seeds: Sequence[dict[str, Any]]) -> list[Figure]:
    """Changes from SFT on WikiText-2 and HellaSwag, and the share of PPO's loss that the pretraining mix gives back."""
    figures, losses = [], {}
    for policy in ("ppo", "ppo-ptx"):
        loss = [_change(seed, policy, "wikitext") for seed in seeds]
        hits = [_change(seed, policy, "hellaswag") for seed in seeds]
        losses[policy] = statistics.fmean(change for change, _, _ in loss)
        figures.append(over_seeds(f"{name}: WikiText-2 loss, {policy} less sft", loss, "nats/token"))
        figures.append(over_seeds(f"{name}: HellaSwag accuracy, {policy} less sft", hits, "share"))
    if losses["ppo"] > 0:
        given_back = 1 - losses["ppo-ptx"] / losses["ppo"]
        figures.append(at_least(PTX_GOAL, Figure(f"{name}: tax that ptx gives back", given_back, "share")))
    return figures


def _change(seed: dict[str, Any], policy: str, measure: str) -> list[float]:
    before, after = seed["tax-sft"][measure], seed[f"tax-{policy}"][measure]
    changes = [new - old for old, new in zip(before, after, strict=True)]
    mean, error = statistics.fmean(changes), statistics.stdev(changes) / math.sqrt(len(changes))
    return [mean, mean - 1.96 * error, mean + 1.96 * error]


def over_seeds(name: str, values: Sequence[Sequence[float]], unit: str = "share") -> Figure:
    """The mean of [value, low, high] over seeds, with its interval."""
    means = [value for value, _, _ in values]
    if len(means) == 1:
        return Figure(name, means[0], unit, values[0][1], values[0][2])
    mean = statistics.fmean(means)
    half = STUDENT[len(means) - 1] * statistics.stdev(means) / math.sqrt(len(means))
    return Figure(name, mean, unit, mean - half, mean + half)
