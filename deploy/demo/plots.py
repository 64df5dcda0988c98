"""The demo's own plots: what the users thought of the new policy, and where the time went.

How training went is drawn in the training run's report.
"""

from __future__ import annotations

import matplotlib as mpl

from deploy.demo.result import DemoResult
from training.report.svg import DASHED, NEUTRAL, POLICY, REWARD_MODEL, STYLE, Plot, panels, to_svg

HEIGHT = 2.7  # inches


def draw_plots(result: DemoResult) -> list[Plot]:
    """Returns the plots in the order in which the page shows them."""
    with mpl.rc_context(STYLE):  # type: ignore[arg-type, unused-ignore]
        return [_win_rates(result), _stages(result)]


def _win_rates(result: DemoResult) -> Plot:
    figure, (axes,) = panels(1, HEIGHT)
    rows = (("hidden utility", result.by_utility, POLICY), ("reward model", result.by_reward_model, REWARD_MODEL))
    for row, (_, rate, color) in enumerate(rows):
        axes.plot([100 * rate.low, 100 * rate.high], [row, row], color=color, linewidth=3, solid_capstyle="round")
        axes.plot(100 * rate.value, row, "o", color=color, markersize=10)
        axes.annotate(f"{rate.value:.0%}", (100 * rate.value, row), (0, 11), textcoords="offset points", ha="center")
    axes.axvline(50, **DASHED)
    axes.annotate("no difference", (50, 1.62), (-5, 0), textcoords="offset points", ha="right")
    axes.set(xlim=(0, 100), ylim=(1.8, -0.7), yticks=[0, 1], yticklabels=[f"by {name}" for name, _, _ in rows])
    axes.set_xlabel("held-out prompts won by the new policy (%)")
    axes.grid(axis="y", visible=False)
    by_utility, by_model = result.by_utility, result.by_reward_model
    caption = (
        f"By the hidden utility: {by_utility.wins} wins, {by_utility.ties} ties and {by_utility.losses} losses on "
        f"n = {by_utility.count} prompts, one completion of each policy for each. By the reward model: n = "
        f"{by_model.count} prompts of the trainer's own. Bars: 95% Wilson intervals; a tie counts as half a win."
    )
    return Plot(result.verdict.rstrip("."), to_svg(figure, "win-rate"), caption)


def _stages(result: DemoResult) -> Plot:
    stages = result.stages
    figure, (axes,) = panels(1, 1.0 + 0.34 * len(stages))
    for row, stage in enumerate(stages):
        axes.barh(row, stage.seconds, height=0.62, color=NEUTRAL)
        label = f"{stage.seconds:.0f} s"
        axes.annotate(label, (stage.seconds, row), (5, 0), textcoords="offset points", va="center")
    axes.set(yticks=range(len(stages)), yticklabels=[stage.name for stage in stages], ylim=(len(stages) - 0.5, -0.5))
    longest = max(stages, key=lambda stage: stage.seconds)
    axes.set(xlabel="time (s)", xlim=(0, 1.15 * longest.seconds))
    axes.grid(axis="y", visible=False)
    name = longest.name[0].upper() + longest.name[1:]
    title = f"{name} took {longest.seconds / result.seconds:.0%} of {result.seconds / 60:.1f} minutes"
    return Plot(title, to_svg(figure, "stages"), "n = 1 demo. Stages in the order in which they began.")
