"""The figures of the learning benchmark, from its experiments' results: win rates, taxes and accuracies, over seeds.

An interval over seeds is Student's, of the seeds' means. With one seed it is that seed's own, over prompts, windows of
text or items. Accuracies on HH-RLHF are over comparisons, since its seeds are splits of the same comparisons.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from typing import Any

import torch

from bench.result import Figure, at_least
from training.data.intervals import Z_95, win_rate
from training.rewards.evaluation import clustered_mean

Found = dict[str, list[dict[str, Any]]]

# Two-sided 95 % points of Student's distribution, by degrees of freedom.
_STUDENT = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571, 6: 2.447, 7: 2.365, 8: 2.306, 9: 2.262}
_RIVALS = ("bag of words", "length")
_POLICIES = ("base", "few-shot", "sft", "ppo", "ppo-ptx", "online")
_GOALS = {("ppo-ptx", "base"): 0.85, ("ppo-ptx", "few-shot"): 0.71, ("ppo-ptx", "sft"): 0.5}
_PTX_GOAL = 0.5


def figures_of(found: Found) -> list[Figure]:
    """Returns all figures, in the order of the experiments."""
    figures = []
    for name, seeds in found.items():
        figures += _human_figures(seeds) if name == "human" else _win_figures(name, seeds) + _tax_figures(name, seeds)
    return figures


def _human_figures(seeds: Sequence[dict[str, Any]]) -> list[Figure]:
    """Returns the held-out accuracy on HH-RLHF, and how much more the reward model has than each rival."""
    ours, *rivals = accuracies = [held_out_accuracy(seeds, name) for name in ("reward model", *_RIVALS)]
    best = max(0.5, *(rival.value for rival in rivals))
    return [
        at_least(best, Figure(**{**vars(ours), "peer": best})),
        *accuracies[1:],
        *(held_out_accuracy(seeds, "reward model", rival) for rival in _RIVALS),
    ]


def held_out_accuracy(seeds: Sequence[dict[str, Any]], name: str, rival: str | None = None) -> Figure:
    """Returns the accuracy over all comparisons that some split holds out, or how much greater it is than a rival's.

    A comparison counts once, with its mean over the splits that hold it out.
    """
    found: dict[int, list[float]] = {}
    prompts: dict[int, int] = {}
    for seed in seeds:
        less = seed[rival] if rival else [0.0] * len(seed[name])
        for index, prompt, right, other in zip(seed["held_out"], seed["prompts"], seed[name], less, strict=True):
            found.setdefault(index, []).append(right - other)
            prompts[index] = prompt
    values_M = torch.tensor([statistics.fmean(each) for each in found.values()])
    mean, low, high = clustered_mean(values_M, torch.tensor([prompts[index] for index in found]))
    return Figure(f"HH-RLHF accuracy: {name}" + (f" less {rival}" if rival else ""), mean, "share", low, high)


def _win_figures(name: str, seeds: Sequence[dict[str, Any]]) -> list[Figure]:
    """Returns the mean true utility of each policy on held-out prompts, and win rates by it."""
    known = [policy for policy in _POLICIES if f"answers-{policy}" in seeds[0]]
    figures = [
        _over_seeds(f"{name}: utility of {policy}", [_utility(seed, policy) for seed in seeds]) for policy in known
    ]
    for index, policy in enumerate(known):
        for other in known[:index]:
            rates = [
                win_rate(seed[f"answers-{policy}"]["utilities"], seed[f"answers-{other}"]["utilities"])
                for seed in seeds
            ]
            figure = _over_seeds(
                f"{name}: {policy} over {other}", [[rate.value, rate.low, rate.high] for rate in rates]
            )
            goal = _GOALS.get((policy, other))
            figures.append(at_least(goal, figure) if goal else figure)
    return figures


def _utility(seed: dict[str, Any], policy: str) -> list[float]:
    return mean_interval(seed[f"answers-{policy}"]["utilities"])


def _tax_figures(name: str, seeds: Sequence[dict[str, Any]]) -> list[Figure]:
    """Returns the changes on WikiText-2 and HellaSwag, and the share of PPO's loss that the pretraining mix undoes."""
    if "tax-ppo" not in seeds[0]:
        return []
    figures, losses = [], {}
    for policy, before in (("sft", "base"), ("ppo", "sft"), ("ppo-ptx", "sft")):
        loss = [_change(seed, before, policy, "wikitext") for seed in seeds]
        hits = [_change(seed, before, policy, "hellaswag") for seed in seeds]
        losses[policy] = statistics.fmean(change for change, _, _ in loss)
        figures.append(_over_seeds(f"{name}: WikiText-2 loss, {policy} less {before}", loss, "nats/token"))
        figures.append(_over_seeds(f"{name}: HellaSwag accuracy, {policy} less {before}", hits, "share"))
    if losses["ppo"] > 0:
        given_back = 1 - losses["ppo-ptx"] / losses["ppo"]
        figures.append(at_least(_PTX_GOAL, Figure(f"{name}: tax that ptx gives back", given_back, "share")))
    return figures


def _change(seed: dict[str, Any], before: str, policy: str, measure: str) -> list[float]:
    pairs = zip(seed[f"tax-{before}"][measure], seed[f"tax-{policy}"][measure], strict=True)
    return mean_interval([new - old for old, new in pairs])


def mean_interval(values: Sequence[float]) -> list[float]:
    """Returns the mean and its 95 % interval: Student's if there are few values, else normal."""
    mean, error = statistics.fmean(values), statistics.stdev(values) / math.sqrt(len(values))
    width = _STUDENT.get(len(values) - 1, Z_95)
    return [mean, mean - width * error, mean + width * error]


def _over_seeds(name: str, values: Sequence[Sequence[float]], unit: str = "share") -> Figure:
    """Returns the mean of [value, low, high] over seeds, with its interval."""
    means = [value for value, _, _ in values]
    if len(means) == 1:
        return Figure(name, means[0], unit, values[0][1], values[0][2])
    mean = statistics.fmean(means)
    half = _STUDENT[len(means) - 1] * statistics.stdev(means) / math.sqrt(len(means))
    return Figure(name, mean, unit, mean - half, mean + half)
