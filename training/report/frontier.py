"""Draws the frontier: score against KL, of PPO round by round, of its result, and of the reference's best of n."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from matplotlib.axes import Axes
from numpy.typing import NDArray

from training.report.history import Change, fall_from_best, greatest, series
from training.report.svg import (
    HEIGHT,
    HELD_OUT_MODEL,
    INK,
    REWARD_MODEL,
    Plot,
    kl_axis,
    legend,
    panels,
    sentence,
    to_svg,
)
from training.runs.record import Record, last_of, of_phase

Floats = NDArray[np.float64]
_MOST_POINTS = 100


@dataclass(frozen=True)
class _Scorer:
    """One of the two reward models, and where its figures are."""

    name: str
    whose: str
    color: str
    of_rounds: str
    """Its key in a round's record."""
    of_result: str
    """Its key in the record of the evaluation."""
    column: int
    """Its column in the table of best of n."""


_SCORERS = (
    _Scorer("reward model", "the reward model’s score", REWARD_MODEL, "objective/score", "score", 2),
    _Scorer(
        "held-out reward model", "the held-out reward model’s", HELD_OUT_MODEL,
        "objective/held_out_score", "held_out_score", 3,
    ),
)  # fmt: skip


def score_by_kl(records: Sequence[Record]) -> Plot | None:
    """Returns the plot, or None if no round has a score and a KL."""
    rounds, evaluated = of_phase(records, "ppo"), last_of(records, "evaluate")
    best = _finite_rows(last_of(records, "normalise").get("best_of_n", ()))
    size = max(1, math.ceil(len(rounds) / _MOST_POINTS))
    kl = series(rounds, "objective/kl")
    root_kl = _block_means(np.sqrt(np.maximum(kl, 0.0)), size)
    result_kl = float(series([evaluated], "objective/kl_from_reference")[0])
    figure, (axes,) = panels(1, HEIGHT)
    clauses, has_result = [], False
    for scorer in _SCORERS:
        scores = _block_means(series(rounds, scorer.of_rounds), size)
        if not np.isfinite(root_kl + scores).any():
            continue
        axes.plot(root_kl, scores, color=scorer.color, linewidth=1, alpha=0.5)
        axes.scatter(root_kl, scores, s=np.linspace(12, 48, len(scores)), color=scorer.color, label=scorer.name)
        clauses.append(f"{scorer.whose} {Change.of(series(rounds, scorer.of_rounds)).words}")
        _draw_best(axes, best, scorer)
        has_result |= _draw_result(axes, result_kl, float(series([evaluated], scorer.of_result)[0]), scorer)
    if not clauses:
        return None
    if fall := fall_from_best(series(rounds, "objective/held_out_score")):
        clauses[-1] += f" and ends {fall:.2g} below its best"
    if best:
        _number_best(axes, best)
    furthest = [greatest(kl), result_kl, best[-1][1] if best else 0.0]
    kl_axis(axes, max(each for each in furthest if math.isfinite(each)))
    axes.margins(y=0.1)
    axes.set_ylabel("score (reference: mean 0, deviation 1)")
    legend(axes)
    # Where nobody is held out, the held-out reward model is fitted to the same labelers as the reward model.
    apart = len(clauses) > 1 and "reward_model/held_out_accuracy" in last_of(records, "reward_model_evaluation")
    caption = _caption(len(rounds), size, best, has_result=has_result, apart=apart)
    return Plot(sentence(*clauses), to_svg(figure, "score-by-kl"), caption)


def _draw_best(axes: Axes, best: Sequence[Sequence[float]], scorer: _Scorer) -> None:
    if best:
        roots, scores = [math.sqrt(row[1]) for row in best], [row[scorer.column] for row in best]
        axes.plot(
            roots, scores, color=scorer.color, linewidth=1.5, linestyle=(0, (4, 2)), marker="D", markersize=6,
            markerfacecolor="none",
        )  # fmt: skip


def _number_best(axes: Axes, best: Sequence[Sequence[float]]) -> None:
    """Writes each n above the higher of its two points."""
    for n, kl, *scores in best:
        name = f"best of {n:.0f}" if n == best[-1][0] else f"{n:.0f}"
        axes.annotate(name, (math.sqrt(kl), max(scores)), (5, 8), textcoords="offset points", ha="right")


def _draw_result(axes: Axes, kl: float, score: float, scorer: _Scorer) -> bool:
    if not math.isfinite(kl + score):
        return False
    axes.plot(
        math.sqrt(max(kl, 0.0)), score, marker="*", markersize=17, color=scorer.color, linestyle="none",
        markeredgecolor=INK, zorder=3,
    )  # fmt: skip
    return True


def _finite_rows(table: object) -> list[list[float]]:
    """Returns the rows of best of n: n, KL, and the scores by both reward models."""
    rows = [row for row in table if isinstance(row, list) and len(row) == 4] if isinstance(table, list) else []
    return [row for row in rows if all(isinstance(each, int | float) and math.isfinite(each) for each in row)]


def _caption(num_rounds: int, size: int, best: Sequence[object], *, has_result: bool, apart: bool) -> str:
    parts = [
        f"Dots: n = {num_rounds} PPO rounds{f', in means of {size}' if size > 1 else ''}; those of later rounds are "
        "larger. KL is summed over a completion."
    ]
    if best:
        parts.append(
            "Diamonds: on held-out prompts, the reference policy’s best of 1, 2, 4, … completions by the reward model."
        )
    if has_result:
        parts.append("Stars: the new policy’s answers to held-out prompts.")
    if apart:
        parts.append(
            "The held-out reward model is fitted to labelers unknown to the reward model: where the two scores part, "
            "the policy is over-optimised (Gao et al. 2022)."
        )
    return " ".join(parts)


def _block_means(values: Floats, size: int) -> Floats:
    """Returns means over blocks of `size` rounds; the last block may be smaller. A block with NaN has the mean NaN."""
    starts = np.arange(0, len(values), size)
    return np.add.reduceat(values, starts) / np.diff(np.append(starts, len(values))) if len(values) else values
