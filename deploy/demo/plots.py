"""The demo's own plots: what the users gained by the new policy, how often they prefer it, and where the time went.

How training went is drawn in the training run's report.
"""

from __future__ import annotations

import math

import matplotlib as mpl
from matplotlib.axes import Axes

from deploy.demo.result import DemoResult, Gain
from training.report.svg import DASHED, INK, NEUTRAL, POLICY, REWARD_MODEL, STYLE, Plot, kl_axis, panels, to_svg

HEIGHT = 2.7  # inches


def draw_plots(result: DemoResult) -> list[Plot]:
    """Returns the plots in the order in which the page shows them."""
    with mpl.rc_context(STYLE):  # type: ignore[arg-type, unused-ignore]
        return [_frontier(result), _win_rates(result), _stages(result)]


def _frontier(result: DemoResult) -> Plot:
    new, best = result.frontier.new_policy, result.frontier.best_of_n
    end = math.sqrt(max(0.0, *(gain.kl for gain in (new, *best.values()))))
    figure, (axes,) = panels(1, 3.6)
    axes.axhline(0, **DASHED)
    roots = [math.sqrt(max(gain.kl, 0.0)) for gain in best.values()]
    axes.plot(
        [0, *roots], [0, *(gain.utility.value for gain in best.values())], color=REWARD_MODEL, linestyle=(0, (4, 2))
    )
    for n, gain in best.items():
        _mark(axes, gain, f"best of {n}", REWARD_MODEL, "D", roots[-1])
    _mark(axes, new, "new policy", POLICY, "*", end)
    axes.plot(0, 0, "o", color=INK, markersize=9)
    axes.annotate("reference", (0, 0), (2, -14), textcoords="offset points")
    kl_axis(axes, end**2)
    axes.set_ylabel("utility above the reference’s")
    axes.margins(x=0.09, y=0.12)
    title = f"The new policy gains {new.utility.value:z.3f} of true utility for {new.kl:z.1f} nats"
    if best:
        most = max(best)
        title += f"; best of {most} gains {best[most].utility.value:z.3f} for {best[most].kl:.1f}"
    caption = (
        f"The hidden utility of completions, less its mean for the reference policy, on n = {new.utility.count} "
        "prompts that the trainer held out. Best of n: of the reference policy’s completions, the one that the reward "
        "model scores highest. Bars: 95% intervals over prompts."
    )
    return Plot(title, to_svg(figure, "frontier"), caption)


def _mark(axes: Axes, gain: Gain, name: str, color: str, marker: str, end: float) -> None:
    """Marks a point with its interval. `end` is the greatest √KL that is drawn."""
    root, utility = math.sqrt(max(gain.kl, 0.0)), gain.utility
    axes.plot([root, root], [utility.low, utility.high], color=color, linewidth=2.5, alpha=0.5, solid_capstyle="round")
    axes.plot(root, utility.value, marker, color=color, markersize=18 if marker == "*" else 8)
    # Where there is room: not beyond the page, nor on the line from the reference.
    offset, side = ((-9, 5), "right") if root > 0.5 * end else ((10, -15), "left")
    axes.annotate(name, (root, utility.value), offset, textcoords="offset points", ha=side)


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
    axes.set_xlabel("pairs of completions won by the new policy (%)")
    axes.grid(axis="y", visible=False)
    by_utility, by_model = result.by_utility, result.by_reward_model
    caption = (
        f"By the hidden utility: {by_utility.wins} wins, {by_utility.ties} ties and {by_utility.losses} losses among "
        f"the pairs of n = {by_utility.count} prompts. By the reward model: n = {by_model.count} prompts of the "
        "trainer's own. Bars: 95% intervals over prompts; a tie counts as half a win."
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
