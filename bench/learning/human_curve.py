"""What was learned from HH-RLHF by the number of comparisons: its figures, its table and its plot.

A comparison counts once, with its mean over the splits that hold it out, since seeds are splits of the same
comparisons. Intervals count dialogues that begin alike as one.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure as Canvas

from bench.learning.human import HEADS, LAYERS, LENGTH, LORA, WORDS
from bench.result import Figure, at_least, save_plot
from training.rewards.evaluation import clustered_mean

Seeds = Sequence[dict[str, Any]]

HUMAN_HEADINGS = (
    "learned by", "comparisons", "accuracy, %", "low", "high", "of helpful", "of harmless", "less bag of words",
    "low", "high",
)  # fmt: skip
_COLOURS = {HEADS: "#4c72b0", LAYERS: "#c44e52", LORA: "#55a868", WORDS: "#8172b3", LENGTH: "#8c8c8c"}
_RIVALS = (WORDS, LENGTH)


def human_figures(seeds: Seeds) -> list[Figure]:
    """Returns each kind's accuracy at its greatest number, and how much more a reward model has than each rival."""
    figures = []
    for kind in _kinds(seeds):
        most = _numbers(seeds, kind)[-1]
        accuracy = held_out_accuracy(seeds, (kind, most))
        if kind in _RIVALS:
            figures.append(accuracy)
            continue
        best = max(0.5, *(held_out_accuracy(seeds, (rival, most)).value for rival in _RIVALS))
        figures.append(at_least(best, Figure(**{**vars(accuracy), "peer": best})))
        figures += [held_out_accuracy(seeds, (kind, most), (rival, most)) for rival in _RIVALS]
    return figures


def held_out_accuracy(
    seeds: Seeds, which: tuple[str, int], rival: tuple[str, int] | None = None, of: str = ""
) -> Figure:
    """Returns the accuracy over all comparisons that some split holds out, or how much greater it is than a rival's.

    Both are given by kind and number of training comparisons. `of` is what the names of the sources begin with.
    """
    found: dict[int, list[float]] = {}
    prompts: dict[int, int] = {}
    for seed in seeds:
        ours = _right(seed, which)
        less = _right(seed, rival) if rival else [0.0] * len(ours)
        known = zip(seed["held_out"], seed["prompts"], seed["sources"], strict=True)
        for (index, prompt, source), right, other in zip(known, ours, less, strict=True):
            if source.startswith(of):
                found.setdefault(index, []).append(right - other)
                prompts[index] = prompt
    values_M = torch.tensor([statistics.fmean(each) for each in found.values()])
    mean, low, high = clustered_mean(values_M, torch.tensor([prompts[index] for index in found]))
    name = f"HH-RLHF accuracy: {which[0]}, {which[1]} comparisons" + (f", less {rival[0]}" if rival else "")
    return Figure(name, mean, "share", low, high)


def human_rows(seeds: Seeds) -> Iterator[list[str]]:
    """Yields a row for each kind and number, under `HUMAN_HEADINGS`; differences are in points."""
    for kind in _kinds(seeds):
        for number in _numbers(seeds, kind):
            accuracy = held_out_accuracy(seeds, (kind, number))
            by_source = [held_out_accuracy(seeds, (kind, number), of=of) for of in ("helpful", "harmless")]
            cells = [*_percent(accuracy), *(_percent(each)[0] for each in by_source)]
            if kind in _RIVALS:
                yield [kind, str(number), *cells, "-", "-", "-"]
            else:
                yield [kind, str(number), *cells, *_percent(held_out_accuracy(seeds, (kind, number), (WORDS, number)))]


def draw_human(seeds: Seeds, path: Path) -> None:
    """Draws each kind's accuracy against the number of training comparisons, with its interval."""
    canvas = Canvas(figsize=(8, 4.5))
    panel = canvas.subplots()
    kinds = _kinds(seeds)
    for index, kind in enumerate(kinds):
        # Side by side, so that no interval hides another.
        aside = 1.02 ** (index - (len(kinds) - 1) / 2)
        found = [held_out_accuracy(seeds, (kind, number)) for number in _numbers(seeds, kind)]
        values, places = [100 * each.value for each in found], [number * aside for number in _numbers(seeds, kind)]
        widths = [100 * ((each.high or 0) - each.value) for each in found]
        panel.errorbar(places, values, widths, color=_COLOURS[kind], marker="o", markersize=4, linewidth=1, label=kind)
    numbers = sorted({number for kind in kinds for number in _numbers(seeds, kind)})
    panel.set_xscale("log")
    panel.set_xticks(numbers, [str(number) for number in numbers])
    panel.minorticks_off()
    panel.axhline(50, color="#cccccc", linewidth=0.8)
    panel.set_xlabel("training comparisons")
    panel.set_ylabel("held-out comparisons ordered as people did, %")
    panel.legend(loc="upper left", fontsize=8)
    canvas.tight_layout()
    save_plot(canvas, path)


def _kinds(seeds: Seeds) -> list[str]:
    return [kind for kind in _COLOURS if kind in seeds[0]["right"]]


def _numbers(seeds: Seeds, kind: str) -> list[int]:
    return sorted(map(int, seeds[0]["right"][kind]))


def _right(seed: dict[str, Any], which: tuple[str, int]) -> list[float]:
    found: list[float] = seed["right"][which[0]][str(which[1])]
    return found


def _percent(figure: Figure) -> list[str]:
    return [f"{100 * value:.1f}" for value in (figure.value, figure.low, figure.high) if value is not None]
