"""Draws the plots of a training run. Each has its finding as its title; a metric that was not measured is not drawn."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator
from numpy.typing import NDArray

from training.report.frontier import score_by_kl
from training.report.history import Change, duration, greatest, last_finite, series
from training.report.reward_plots import accuracy_plot, calibration_plot
from training.report.svg import (
    DASHED,
    HEIGHT,
    NEUTRAL,
    POLICY,
    REWARD_MODEL,
    STYLE,
    VALUE,
    Plot,
    legend,
    panels,
    sentence,
    to_svg,
)
from training.runs.record import Record, last_of, of_phase

Floats = NDArray[np.float64]
_MOST_MARKERS = 30


def draw_plots(records: Sequence[Record], limits: Mapping[str, Any]) -> list[Plot]:
    """Draws all plots that the run has figures for.

    Args:
        records: all of the run's.
        limits: the recipe's "ppo", whose limits are marked where the run comes near them.
    """
    rounds, rewards = of_phase(records, "ppo"), last_of(records, "reward_model_evaluation")
    with mpl.rc_context(STYLE):  # type: ignore[arg-type, unused-ignore]
        plots = (
            score_by_kl(records),
            _kl_and_entropy(rounds, limits),
            _completions(rounds),
            _updates(rounds),
            _value_and_sampler(rounds, limits),
            accuracy_plot(rewards),
            calibration_plot(rewards),
            _seconds(rounds),
        )
    return [plot for plot in plots if plot]


def _kl_and_entropy(rounds: Sequence[Record], limits: Mapping[str, Any]) -> Plot | None:
    kl, entropy = series(rounds, "objective/kl"), series(rounds, "objective/entropy")
    figure, (upper, lower) = panels(2, HEIGHT, shared=True)
    drawn = _line(upper, rounds, kl, POLICY), _line(lower, rounds, entropy, POLICY)
    if not any(drawn):
        return None
    marked = _mark_limit(upper, kl, limits.get("max_kl"))
    upper.set_ylabel("KL (nats)")
    lower.set(ylabel="entropy (nats)", xlabel="PPO round")
    title = sentence(
        f"the last rollouts are {last_finite(kl):.2g} nats from the reference" if drawn[0] else "",
        f"their entropy {Change.of(entropy).words}" if drawn[1] else "",
    )
    caption = (
        f"n = {len(rounds)} PPO rounds. KL from the reference policy is summed over a completion; entropy is per token."
    )
    return Plot(title, to_svg(figure, "kl-and-entropy"), caption + (" Dashed: where PPO stops." if marked else ""))


def _completions(rounds: Sequence[Record]) -> Plot | None:
    length, ended = series(rounds, "completion/length"), 100 * series(rounds, "completion/eos_rate")
    figure, (upper, lower) = panels(2, HEIGHT, shared=True)
    drawn = _line(upper, rounds, length, POLICY), _line(lower, rounds, ended, POLICY)
    if not any(drawn):
        return None
    upper.set(ylabel="length (tokens)", ylim=(0, None))
    lower.set(ylabel="ended by itself (%)", xlabel="PPO round", ylim=(-4, 104))
    tokens, share = Change.of(length), Change.of(ended)
    title = sentence(
        f"completions go from {tokens.before:.0f} to {tokens.after:.0f} tokens" if drawn[0] else "",
        f"{share.before:.0f}% end by themselves in early rounds, {share.after:.0f}% in late ones" if drawn[1] else "",
    )
    caption = (
        f"n = {len(rounds)} PPO rounds; means over each round’s rollouts. Completions that do not end by themselves "
        "are cut off at the maximum length."
    )
    return Plot(title, to_svg(figure, "completions"), caption)


def _updates(rounds: Sequence[Record]) -> Plot | None:
    clipped, moved = 100 * series(rounds, "policy/clipfrac"), series(rounds, "policy/approx_kl")
    figure, (upper, lower) = panels(2, HEIGHT, shared=True)
    drawn = (
        _line(upper, rounds, clipped, POLICY, "policy"),
        _line(upper, rounds, 100 * series(rounds, "val/clipfrac"), VALUE, "value function"),
        _line(lower, rounds, moved, POLICY),
    )
    if not any(drawn):
        return None
    upper.set(ylabel="clipped tokens (%)", ylim=(0, None))
    lower.set(ylabel="approx. KL (nats)", xlabel="PPO round", ylim=(0, None))
    legend(upper)
    title = sentence(
        f"an update clips at most {greatest(clipped):.2g}% of the policy’s tokens" if drawn[0] else "",
        f"it moves the policy by at most {greatest(moved):.2g} nats a token" if drawn[2] else "",
    )
    caption = (
        f"n = {len(rounds)} PPO rounds. Approximate KL is per token, between the policies before and after an update."
    )
    return Plot(title or "Only the value function’s clipping was measured", to_svg(figure, "updates"), caption)


def _value_and_sampler(rounds: Sequence[Record], limits: Mapping[str, Any]) -> Plot | None:
    explained, gap = series(rounds, "val/explained_variance"), series(rounds, "rollout/sampler_gap")
    figure, (upper, lower) = panels(2, HEIGHT, shared=True)
    drawn = _line(upper, rounds, explained, VALUE), _line(lower, rounds, gap, POLICY)
    if not any(drawn):
        return None
    upper.axhline(0, **DASHED)
    # The first rounds may be far below 0, and would flatten the curve of the later ones.
    cut = drawn[0] and np.nanmin(explained) < -1 < np.nanmedian(explained)
    if cut:
        upper.set_ylim(-1.05, 1.05)
    upper.set_ylabel("explained variance")
    lower.set(ylabel="sampler gap (nats)", xlabel="PPO round", ylim=(0, None))
    marked = _mark_limit(lower, gap, limits.get("max_sampler_gap"))
    change = Change.of(explained)
    title = sentence(
        f"the value function’s explained variance goes from {change.before:z.2f} to {change.after:z.2f}"
        if drawn[0]
        else "",
        f"sampler and trainer differ by at most {greatest(gap):.2g} nats a token" if drawn[1] else "",
    )
    caption = (
        f"n = {len(rounds)} PPO rounds. At 0 the values explain no more than the mean return would"
        f"{'; values below -1 are cut off' if cut else ''}. The gap is the mean difference of log-probabilities."
        f"{' Dashed below: where PPO stops.' if marked else ''}"
    )
    return Plot(title, to_svg(figure, "value-and-sampler"), caption)


def _seconds(rounds: Sequence[Record]) -> Plot | None:
    parts = (("rollouts", POLICY), ("scoring", REWARD_MODEL), ("update", NEUTRAL))
    seconds = {name: np.nan_to_num(series(rounds, f"seconds/{name}")) for name, _ in parts}
    total = sum(float(spent.sum()) for spent in seconds.values())
    if not total:
        return None
    figure, (axes,) = panels(1, HEIGHT)
    number = series(rounds, "index") + 1
    edges = np.append(number - 0.5, number[-1] + 0.5)
    below = np.zeros(len(rounds))
    for name, color in parts:
        axes.stairs(below + seconds[name], edges, baseline=below, fill=True, color=color, label=name)
        below = below + seconds[name]
    axes.set(xlabel="PPO round", ylabel="time (s)", xlim=(edges[0], edges[-1]))
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    legend(axes)
    longest = max(seconds, key=lambda name: float(seconds[name].sum()))
    share = float(seconds[longest].sum()) / total
    title = f"{longest.capitalize()} took {share:.0%} of PPO’s {duration(total)}"
    caption = f"n = {len(rounds)} PPO rounds, {total / len(rounds):.1f} s each on average."
    return Plot(title, to_svg(figure, "seconds"), caption)


def _line(axes: Axes, rounds: Sequence[Record], values: Floats, color: str, label: str | None = None) -> bool:
    """Draws a metric by round. Returns False if no value is finite, which a panel without other lines says."""
    if not np.isfinite(values).any():
        if not label:
            axes.text(0.5, 0.5, "not measured", transform=axes.transAxes, ha="center", va="center")
        return False
    # A value alone between two gaps is visible only with a marker.
    marker = "o" if len(values) <= _MOST_MARKERS or not np.isfinite(values).all() else ""
    axes.plot(series(rounds, "index") + 1, values, color=color, marker=marker, markersize=4, label=label)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    return True


def _mark_limit(axes: Axes, values: Floats, limit: object) -> bool:
    """Marks the limit at which PPO stops, and returns True, if the run came near enough to it for a readable plot."""
    if not isinstance(limit, int | float) or not greatest(values) > 0.4 * limit:
        return False
    axes.axhline(limit, **DASHED)
    return True
