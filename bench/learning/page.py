"""Writes docs/results/learning.md and its plots from what the learning benchmark found."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure as Canvas

from bench.result import BenchResult, cells

COLOURS = {"ppo": "#c44e52", "ppo-ptx": "#4c72b0", "online": "#55a868"}


def write_page(found: dict[str, list[dict[str, Any]]], result: BenchResult, folder: Path) -> Path:
    """Writes the page with a table of all figures, and one plot a utility of true utility and score against √KL."""
    folder.mkdir(parents=True, exist_ok=True)
    plots = []
    for name, seeds in found.items():
        if name != "human":
            path = folder / f"learning-{name}.svg"
            draw(seeds, path)
            plots.append(f"![{name}: score and true utility against √KL]({path.name})")
    header = "| figure | value | unit | low | high | peer | goal | met |\n|---|---|---|---|---|---|---|---|"
    rows = ["| " + " | ".join(cells(figure)) + " |" for figure in result.figures]
    circumstances = ", ".join(f"{key} {value}" for key, value in {**result.machine, **result.versions}.items())
    page = folder / "learning.md"
    page.write_text(
        "\n".join(
            [
                "# Does it learn?",
                "",
                f"`{result.command}` on {circumstances}.",
                "",
                "Win rates are by the true utility, on held-out prompts, one completion each. Figures are means over "
                "seeds with Student's 95 % interval; with one seed, that seed's own over prompts.",
                "",
                header,
                *rows,
                "",
                "## Over-optimisation",
                "",
                *plots,
                "",
            ]
        )
    )
    return page


def draw(seeds: Sequence[dict[str, Any]], path: Path) -> None:
    """Learned score (dashed) and true utility (whole) of the rollouts of each round against √KL, a line a seed."""
    canvas = Canvas(figsize=(8, 4.5))
    FigureCanvasSVG(canvas)
    left = canvas.subplots()
    right = left.twinx()
    for seed in seeds:
        for name, colour in COLOURS.items():
            rounds = seed[name]["rounds"]
            distance = [max(each["objective/kl"], 0.0) ** 0.5 for each in rounds]
            label = name if seed is seeds[0] else None
            left.plot(distance, [each["utility"] for each in rounds], color=colour, label=label)
            right.plot(distance, [each["objective/score"] for each in rounds], color=colour, linestyle="--", alpha=0.5)
    left.set_xlabel("√KL from the reference (√nats a completion)")
    left.set_ylabel("true utility of the rollouts (whole lines)")
    right.set_ylabel("learned score (dashed lines)")
    left.legend(loc="lower right")
    canvas.tight_layout()
    canvas.savefig(path, format="svg")
