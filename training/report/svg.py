"""Writes figures as SVG that takes its colours and font from the page around it, so that light and dark both work.

Each colour means the same in all plots: the policy, the reward model, the held-out reward model (a second reward model,
fitted to held-out labelers), or the value function. Everything else is grey.
"""

from __future__ import annotations

import io
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

# Figures are drawn in these colours, which nothing else uses. In the SVG, CSS variables of the page replace them.
INK, _GRID, NEUTRAL = "#010101", "#020202", "#030303"
POLICY, REWARD_MODEL, HELD_OUT_MODEL, VALUE = "#040404", "#050505", "#060606", "#070707"
_CSS_VARIABLES = {
    INK: "--ink-soft",
    _GRID: "--grid",
    NEUTRAL: "--neutral",
    POLICY: "--policy",
    REWARD_MODEL: "--reward-model",
    HELD_OUT_MODEL: "--held-out-model",
    VALUE: "--value",
}
STYLE = {
    "svg.fonttype": "none",
    "svg.hashsalt": "alignd",  # the same run gives the same page
    "font.size": 11,
    "text.color": INK,
    "axes.edgecolor": _GRID,
    "axes.labelcolor": INK,
    "axes.facecolor": "none",
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.spines.left": False,
    "grid.color": _GRID,
    "grid.linewidth": 0.8,
    "xtick.color": _GRID,
    "ytick.color": _GRID,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "ytick.major.size": 0,
    "lines.linewidth": 2,
    "legend.frameon": False,
}
_KL_TICKS = (0.01, 0.1, 0.25, 0.5, 1, 2, 4, 8, 16, 32, 64, 128)
_KL_TICK_GAP = 0.1  # of the axis
WIDTH, HEIGHT = 5.4, 3.9  # inches: about the size on a page of 900 px, so that 11 pt stay readable
DASHED: Mapping[str, Any] = {"color": INK, "linewidth": 1.2, "linestyle": (0, (4, 3)), "zorder": 1}


@dataclass(frozen=True)
class Plot:
    """A drawn figure: its finding in a sentence, the drawing, and what a reader must know to read it."""

    title: str
    svg: str
    caption: str


def panels(count: int, height: float, *, shared: bool = False) -> tuple[Figure, list[Axes]]:
    """Makes a figure of panels one above the other. `height` is in inches; `shared` gives all one horizontal axis."""
    figure = Figure(figsize=(WIDTH, height), layout="constrained")
    axes = [figure.add_subplot(count, 1, 1)]
    for index in range(2, count + 1):
        axes.append(figure.add_subplot(count, 1, index, sharex=axes[0] if shared else None))
    for above in axes[:-1]:
        above.tick_params(labelbottom=not shared)
    figure.align_ylabels(axes)
    return figure, axes


def legend(axes: Axes) -> None:
    """Names the colours above the panel, where nothing is drawn."""
    if axes.get_legend_handles_labels()[1]:
        axes.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=3, borderaxespad=0, handlelength=1.2, fontsize=10)


def kl_axis(axes: Axes, most: float) -> None:
    """Labels a horizontal axis of √KL in nats. Scores rise about as the root does (Gao et al. 2022).

    `most` is the greatest KL that is drawn.
    """
    end = math.sqrt(max(most, _KL_TICKS[0]))
    roots = [0.0]
    # The numbers of nearer ones would touch.
    for root in (math.sqrt(tick) for tick in _KL_TICKS):
        if roots[-1] + _KL_TICK_GAP * end < root <= end:
            roots.append(root)
    axes.set_xticks(roots, [f"{root**2:.3g}" for root in roots])
    axes.set_xlabel("KL from the reference policy (nats, on a √ scale)")


def sentence(*clauses: str) -> str:
    """Joins the clauses that are not empty, as a title."""
    text = "; ".join(clause for clause in clauses if clause)
    return text[:1].upper() + text[1:]


def to_svg(figure: Figure, name: str) -> str:
    """Returns the figure as an SVG element for HTML. Its ids begin with `name`, and it links to nothing outside."""
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", transparent=True)
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r' (?:xmlns(?::\w+)?|width|height|version)="[^"]*"', "", svg, count=5)
    svg = re.sub(r'(id="|href="#|url\(#)', rf"\1{name}-", svg)
    svg = re.sub(r"(font: [\d.]+px) [^;\"]*", r"\1 var(--sans)", svg)
    for color, variable in _CSS_VARIABLES.items():
        svg = svg.replace(color, f"var({variable})")
    return svg
