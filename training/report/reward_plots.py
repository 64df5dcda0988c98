"""Draws the plots of a reward model's evaluation: where it errs, and whether its probabilities are calibrated."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from matplotlib.axes import Axes
from matplotlib.ticker import MultipleLocator

from training.data.intervals import wilson_interval
from training.report.svg import DASHED, HEIGHT, REWARD_MODEL, Plot, panels, to_svg
from training.runs.record import Record

_CHANCE = 50.0  # %
_INTERVALS = "Bars: 95% Wilson intervals, as if comparisons were independent."


@dataclass(frozen=True)
class Share:
    """One row of an evaluation's table: what it is about, and the share that is right with its 95 % interval, in %."""

    about: Sequence[Any]
    percent: float
    low: float
    high: float
    count: int


def shares(rows: Sequence[Sequence[Any]]) -> list[Share]:
    """Reads rows of [what they are about..., share right, count]; leaves out rows without a comparison."""
    found = []
    for *about, share, count in rows:
        if count and isinstance(share, int | float) and math.isfinite(share):
            low, high = wilson_interval(share * count, count)
            # At 0 and at 1 an end of the interval is the share itself, except for rounding.
            found.append(Share(about, 100 * share, 100 * min(low, share), 100 * max(high, share), count))
    return found


def accuracy_plot(rewards: Record) -> Plot | None:
    """Draws held-out accuracy by completions in a ranking, and by how much longer the chosen completion was."""
    by_k, by_length = shares(rewards.get("by_k", ())), shares(rewards.get("by_length_difference", ()))
    drawn = [
        (by_k, [f"{each.about[0]}" for each in by_k], "completions in a ranking (K)"),
        (by_length, [_range(*each.about) for each in by_length], "chosen minus rejected completion (tokens)"),
    ]
    drawn = [panel for panel in drawn if panel[0]]
    if not drawn:
        return None
    figure, all_axes = panels(len(drawn), HEIGHT + 0.3)
    for axes, (found, names, label) in zip(all_axes, drawn, strict=True):
        _dots(axes, range(len(found)), found)
        _against_chance(axes, found)
        axes.set_xticks(range(len(found)), names)
        axes.set(xlabel=label, xlim=(-0.6, len(found) - 0.4))
        axes.grid(axis="x", visible=False)
    caption = f"n = {_count(drawn[0][0])} held-out comparisons. Dashed: chance. {_INTERVALS}"
    return Plot(_accuracy_title(by_k or by_length, by_length), to_svg(figure, "accuracy"), caption)


def _accuracy_title(found: Sequence[Share], by_length: Sequence[Share]) -> str:
    longer = [each for each in by_length if each.about[0] is not None and each.about[0] >= 0]
    shorter = [each for each in by_length if each.about[1] is not None and each.about[1] <= 0]
    if not (longer and shorter):
        return f"The reward model is right on {_mean(found):.0f}% of held-out comparisons"
    return (
        f"The reward model is right on {_mean(longer):.0f}% where users chose the longer completion, "
        f"on {_mean(shorter):.0f}% where they chose the shorter"
    )


def calibration_plot(rewards: Record) -> Plot | None:
    """Draws the share of labelers that agreed by predicted probability, and accuracy by how much the heads differ."""
    bins, spreads = shares(rewards.get("calibration", ())), shares(rewards.get("uncertainty", ()))
    if not bins:
        return None
    figure, (upper, *lower) = panels(2 if spreads else 1, HEIGHT + 0.3)
    predicted = [100 * each.about[0] for each in bins]
    upper.plot([0, 100], [0, 100], **DASHED)
    _dots(upper, predicted, bins)
    start = 48 if min(predicted) >= _CHANCE else -2
    upper.set(xlim=(start, 102), ylim=(min(start, *(each.low - 2 for each in bins)), 102))
    upper.set(xlabel="predicted probability (%)", ylabel="agreed (%)")
    for axes in lower:
        _dots(axes, [each.about[0] for each in spreads], spreads)
        _against_chance(axes, spreads)
        axes.set_xlabel("spread of the heads (standard deviation of the margin)")
    surest, said = max(zip(bins, predicted, strict=True), key=lambda pair: abs(pair[1] - _CHANCE))
    off = sum(abs(each.percent - p) * each.count for each, p in zip(bins, predicted, strict=True)) / _count(bins)
    title = f"Where the reward model is surest, it predicts {said:.0f}%, and {surest.percent:.0f}% agree"
    caption = (
        f"n = {_count(bins)} held-out comparisons. Its predictions are off by {off:.1f} points on average (expected "
        "calibration error). "
        f"Dashed: perfect calibration{', and chance below' if lower else ''}. {_INTERVALS}"
    )
    return Plot(title, to_svg(figure, "calibration"), caption)


def _count(found: Sequence[Share]) -> int:
    return sum(each.count for each in found)


def _mean(found: Sequence[Share]) -> float:
    return sum(each.percent * each.count for each in found) / _count(found)


def _range(low: float | None, high: float | None) -> str:
    if low is None:
        return "any" if high is None else f"below\n{high:g}"
    return f"{low:g}\nor more" if high is None else f"{low:g}\nto {high:g}"


def _against_chance(axes: Axes, found: Sequence[Share]) -> None:
    """Marks chance, on an axis that begins a little below it or below the lowest interval."""
    axes.axhline(_CHANCE, **DASHED)
    axes.set(ylabel="right (%)", ylim=(min(_CHANCE - 5, *(each.low - 3 for each in found)), 102))
    axes.yaxis.set_major_locator(MultipleLocator(25))


def _dots(axes: Axes, places: Sequence[float], found: Sequence[Share]) -> None:
    reach = [[each.percent - each.low for each in found], [each.high - each.percent for each in found]]
    heights = [each.percent for each in found]
    axes.errorbar(places, heights, yerr=reach, fmt="o", color=REWARD_MODEL, elinewidth=1.5)
