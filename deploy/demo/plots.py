"""The plots of a run, as SVG that takes its colours from the page it stands in, so that light and dark both work.

One colour means one thing everywhere: the new policy, or the reward model. What is none of
them is drawn in a neutral grey.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from deploy.demo.result import DemoResult, Steps, first_and_last
from training.report.svg import INK, NEUTRAL, POLICY, REWARD_MODEL, STYLE, Plot, to_svg

WIDE, TALL = (5.6, 2.7), (5.6, 3.7)  # inches


def draw_plots(result: DemoResult) -> list[Plot]:
    """All plots that the run has figures for, in the order in which they are told."""
    with mpl.rc_context(STYLE):  # type: ignore[arg-type, unused-ignore]
        plots = [_win_rates(result)]
        if result.ppo_steps:
            plots += [_score_by_kl(result.ppo_steps), _score_and_kl(result.ppo_steps), _lengths(result.ppo_steps)]
        return [*plots, _reward_model(result), _stages(result)]


def _win_rates(result: DemoResult) -> Plot:
    figure, axes = _axes(WIDE)
    rows = (("hidden utility", result.by_utility, POLICY), ("reward model", result.by_reward_model, REWARD_MODEL))
    for row, (_, rate, color) in enumerate(rows):
        axes.plot([100 * rate.low, 100 * rate.high], [row, row], color=color, linewidth=3, solid_capstyle="round")
        axes.plot(100 * rate.value, row, "o", color=color, markersize=10)
        axes.annotate(f"{rate.value:.0%}", (100 * rate.value, row), (0, 11), textcoords="offset points", ha="center")
    axes.axvline(50, color=INK, linewidth=1.5, linestyle=(0, (4, 3)))
    axes.annotate("no difference", (50, 1.62), (-5, 0), textcoords="offset points", ha="right")
    axes.set(xlim=(0, 100), ylim=(1.8, -0.7), yticks=[0, 1], yticklabels=[f"by {name}" for name, _, _ in rows])
    axes.set_xlabel("held-out prompts won by the new policy (%)")
    axes.grid(axis="y", visible=False)
    rate = result.by_utility
    caption = (
        f"n = {rate.count} held-out prompts, a completion of each policy for each. By hidden utility: {rate.wins} "
        f"wins, {rate.ties} ties, {rate.losses} losses. Bars: 95% Wilson intervals, a tie counting as half a win."
    )
    return Plot(result.verdict.rstrip("."), to_svg(figure, "win-rate"), caption)


def _score_by_kl(steps: Steps) -> Plot:
    root_kl = [math.sqrt(max(step["objective/kl"], 0.0)) for step in steps]
    score = [step["objective/score"] for step in steps]
    figure, axes = _axes(WIDE)
    axes.plot(root_kl, score, color=POLICY, linewidth=1, alpha=0.5)
    axes.scatter(root_kl, score, s=[12 + 28 * i / len(steps) for i in range(len(steps))], color=POLICY)
    axes.annotate("start", (root_kl[0], score[0]), (9, -3), textcoords="offset points")
    axes.set(xlabel="√KL from the reference policy (√nat)", ylabel="score (reward model)")
    (before, after), kl = first_and_last(steps, "objective/score"), first_and_last(steps, "objective/kl")[1]
    return Plot(
        f"Score went from {before:z.2f} to {after:z.2f} for {kl:z.1f} nats of KL",
        to_svg(figure, "score-by-kl"),
        f"n = {len(steps)} PPO rounds; later steps are drawn larger. KL is summed over a completion's tokens. A score "
        "that rises while users gain nothing would be over-optimisation (Gao et al. 2022).",
    )


def _score_and_kl(steps: Steps) -> Plot:
    figure, (upper, lower) = _two_axes()
    x = range(1, len(steps) + 1)
    upper.plot(x, [step["objective/score"] for step in steps], color=POLICY)
    lower.plot(x, [step["objective/kl"] for step in steps], color=POLICY)
    upper.set_ylabel("score")
    lower.set(ylabel="KL (nats)", xlabel="PPO round")
    _, kl = first_and_last(steps, "objective/kl")
    title = f"The new policy ends {kl:z.1f} nats from the reference policy"
    caption = f"n = {len(steps)} PPO rounds, means over the rollouts of each. KL is summed over a completion's tokens."
    return Plot(title, to_svg(figure, "score-and-kl"), caption)


def _lengths(steps: Steps) -> Plot:
    figure, (upper, lower) = _two_axes()
    x = range(1, len(steps) + 1)
    upper.plot(x, [step["completion/length"] for step in steps], color=POLICY)
    lower.plot(x, [100 * step["completion/eos_rate"] for step in steps], color=POLICY)
    upper.set(ylabel="length (tokens)", ylim=(0, None))
    lower.set(ylabel="ended by itself (%)", xlabel="PPO round", ylim=(-4, 104))
    (short, long), (first, last) = (
        first_and_last(steps, "completion/eos_rate"),
        first_and_last(steps, "completion/length"),
    )
    title = f"Completions that end by themselves: {short:.0%} → {long:.0%}; tokens: {first:.0f} → {last:.0f}"
    caption = f"n = {len(steps)} PPO rounds, means over the rollouts of each."
    return Plot(title, to_svg(figure, "lengths"), caption)


def _reward_model(result: DemoResult) -> Plot:
    figures = result.reward_model
    figure, axes = _axes(WIDE)
    bars = (
        ("chance", 0.5, NEUTRAL),
        ("reward model", figures.accuracy, REWARD_MODEL),
        ("another user", figures.labeler_agreement, NEUTRAL),
    )
    _bars(axes, [(name, 100 * value, f"{value:.1%}", color) for name, value, color in bars])
    axes.set(xlim=(0, 100), xlabel="held-out comparisons predicted (%)")
    return Plot(
        f"The reward model predicts {figures.accuracy:.0%} of comparisons it has not seen",
        to_svg(figure, "reward-model"),
        f"n = {figures.comparisons} held-out comparisons. Another user predicts {figures.labeler_agreement:.1%}: that "
        "is how often two users agree.",
    )


def _stages(result: DemoResult) -> Plot:
    figure, axes = _axes((WIDE[0], 1.0 + 0.34 * len(result.stages)))
    _bars(axes, [(stage.name, stage.seconds, f"{stage.seconds:.0f} s", NEUTRAL) for stage in result.stages])
    axes.set(xlabel="time (s)", xlim=(0, 1.15 * max(stage.seconds for stage in result.stages)))
    longest = max(result.stages, key=lambda stage: stage.seconds)
    name = longest.name[0].upper() + longest.name[1:]
    title = f"{name} took {longest.seconds / result.seconds:.0%} of {result.seconds / 60:.1f} minutes"
    return Plot(title, to_svg(figure, "stages"), "n = 1 run. Stages in the order in which they began.")


def _axes(size: tuple[float, float]) -> tuple[Figure, Axes]:
    figure = Figure(figsize=size, layout="constrained")
    return figure, figure.add_subplot()


def _two_axes() -> tuple[Figure, tuple[Axes, Axes]]:
    figure = Figure(figsize=TALL, layout="constrained")
    upper, lower = figure.subplots(2, 1, sharex=True)
    figure.align_ylabels([upper, lower])
    return figure, (upper, lower)


def _bars(axes: Axes, bars: Sequence[tuple[str, float, str, str]]) -> None:
    """Horizontal bars, the first on top: name, length, label, colour."""
    for row, (_, length, label, color) in enumerate(bars):
        axes.barh(row, length, height=0.62, color=color)
        axes.annotate(label, (length, row), (5, 0), textcoords="offset points", va="center")
    axes.set(yticks=range(len(bars)), yticklabels=[name for name, _, _, _ in bars], ylim=(len(bars) - 0.5, -0.5))
    axes.grid(axis="y", visible=False)
