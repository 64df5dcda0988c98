"""Writes docs/results/learning.md and its plots from what the learning benchmark found."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from matplotlib.figure import Figure as Canvas

from bench.learning.human_curve import HUMAN_HEADINGS, draw_human, human_rows
from bench.learning.online_page import ONLINE_HEADINGS, online_rows
from bench.result import HEADINGS, BenchResult, cells, circumstances, markdown_table, save_plot
from training.data.best_of_n import best_of_n
from training.report.svg import kl_axis

_COLOURS = {"ppo": "#c44e52", "ppo-ptx": "#4c72b0"}
_RUN_HEADINGS = ("run", "rounds", "KL", "utility, first", "best", "last", "score, last", "stopped")
_MEANING = """\
A win rate is the probability that a completion by one policy is worth more than one by another, by the labelers' true
utility, on the same 128 held-out prompts in every experiment, with 8 completions of each (16 of SFT). Figures are means
over seeds with Student's 95 % interval. Where there is one seed, the interval is that seed's own, over prompts, windows
of text or items. Goals that were missed say NO.

The recipe is the shipped one (training/recipes/smollm2.toml), for SFT too. 256 rankings of 4 to 9 completions of the
SFT policy teach the reward model; a quarter of the 40 labelers are held out. SFT learns from demonstrations of 64
prompts: the truly best of 32 completions of the base. Best of n takes that of n completions of the SFT policy which the
reward model scores highest.

PPO-ptx mixes in the text of GSM8K's training part. The alignment tax is measured by other text: by WikiText-2's test
part and by 1,000 items of HellaSwag."""
_RAN_HEADINGS = ("experiment", "commit", "computed in", "CPU", "cores", "hours")
_RAN_MEANING = """\
The commit is that of an experiment's last stage. Hours are of one process, which may have shared its machine. They say
what to expect, not how fast anything is."""
_RUNS_MEANING = """\
Each row is one run of PPO. It shows where the run ended, in KL from the SFT policy, in nats a completion; the true
utility of the rollouts of its first round, of its best round and of its last; the learned score of its last round; and
why the run stopped itself, if it did. Where the score rises and the utility falls, the policy is over-optimised (Gao et
al. 2022). The line of best of n is what the reward model alone gives."""
_ONLINE_MEANING = """\
At equal rankings and rounds: `offline` ranks the SFT policy's answers alone, `online` those of the policy as it is by
then, in three parts, and `online-chosen` those of its samples that the heads of the reward model disagree about most.
With each part comes how many of its comparisons the rewards had right before they learned from it."""
_HUMAN_MEANING = """\
Accuracy on comparisons of real people that were held out, by kind of reward model and by how many comparisons it
learned from. Intervals count dialogues that begin alike as one."""


def write_page(
    found: dict[str, list[dict[str, Any]]],
    ran: dict[str, dict[str, Any]],
    result: BenchResult,
    folder: Path,
    missing: Sequence[str] = (),
) -> Path:
    """Writes the page, and returns its path.

    It begins with which experiments are missing. Then come a table of all figures, one of all runs of PPO, for each
    utility a plot against √KL, and what each experiment of `ran` ran on.
    """
    folder.mkdir(parents=True, exist_ok=True)
    parts = [
        "# Does it learn?",
        *([f"**Not finished.** Missing: {', '.join(missing)}."] if missing else []),
        f"`{result.command}` on {circumstances(result)}.",
        _MEANING,
        markdown_table(HEADINGS, map(cells, result.figures)),
        *_frontiers({name: seeds for name, seeds in found.items() if "ppo" in seeds[0]}, folder),
    ]
    if "online" in found:
        rows = online_rows(found["online"])
        parts += ["## What being online is worth", _ONLINE_MEANING, markdown_table(ONLINE_HEADINGS, rows)]
    if "human" in found:
        draw_human(found["human"], folder / "learning-human.svg")
        picture = "![Accuracy by number of comparisons](learning-human.svg)"
        table = markdown_table(HUMAN_HEADINGS, human_rows(found["human"]))
        parts += ["## Real people", _HUMAN_MEANING, picture, table]
    ran_rows = (_ran_row(name, each) for name, each in ran.items())
    parts += ["## What each experiment ran on", _RAN_MEANING, markdown_table(_RAN_HEADINGS, ran_rows)]
    page = folder / "learning.md"
    page.write_text("\n\n".join(parts) + "\n")
    return page


def _frontiers(found: dict[str, list[dict[str, Any]]], folder: Path) -> list[str]:
    """Returns the part of the page about the runs of PPO, and draws a plot for each utility."""
    if not found:
        return []
    plots = []
    for name, seeds in found.items():
        path = folder / f"learning-{name}.svg"
        _draw(seeds, path)
        plots.append(f"![{name}: true utility and score against KL]({path.name})")
    table = markdown_table(_RUN_HEADINGS, _run_rows(found))
    return ["## True utility and score against KL", _RUNS_MEANING, table, *plots]


def _run_rows(found: dict[str, list[dict[str, Any]]]) -> Iterator[list[str]]:
    """Yields a row for each run of PPO."""
    for name, seeds in found.items():
        for each in seeds:
            for variant in _COLOURS:
                if variant in each:
                    yield [f"{name}, {variant}, seed {each['seed']}", *_run_row(each[variant])]


def _run_row(run: dict[str, Any]) -> list[str]:
    """Returns the results of one run, as `_RUNS_MEANING` explains them."""
    rounds, last = run["rounds"], run["rounds"][-1]
    worth = [each["utility"] for each in rounds]
    numbers = last["objective/kl"], worth[0], max(worth), worth[-1], last["objective/score"]
    return [str(len(rounds)), *(f"{number:.2f}" for number in numbers), run["stopped"] or "-"]


def _ran_row(name: str, found: dict[str, Any]) -> list[str]:
    """Returns what this experiment ran on."""
    on = found["on"]
    stages = [each["seconds"] for each in found.values() if isinstance(each, dict) and "seconds" in each]
    hours = (sum(stages) or found["seconds"]) / 3600
    return [name, on["commit"], on["computes_in"], on["cpu"], str(on["cores"]), f"{hours:.1f}"]


def _draw(seeds: Sequence[dict[str, Any]], path: Path) -> None:
    """Draws true utility of each round's rollouts, and below it their score, against KL; and best of n."""
    canvas = Canvas(figsize=(8, 6.5))
    upper, lower = canvas.subplots(2, 1, sharex=True)
    for seed in seeds:
        for name, colour in _COLOURS.items():
            rounds = seed[name]["rounds"]
            distance = [_root(each["objective/kl"]) for each in rounds]
            for panel, key in ((upper, "utility"), (lower, "objective/score")):
                values = [each[key] for each in rounds]
                panel.plot(distance, values, color=colour, linewidth=0.5, alpha=0.5)
                panel.scatter(distance, values, color=colour, s=14, label=name if seed is seeds[0] else None)
        scores, worth = seed["scores-sft"]["scores"], seed["answers-sft"]["utilities"]
        for panel, values in ((upper, worth), (lower, scores)):
            best = best_of_n(scores, values)
            label = "best of n by the reward model" if seed is seeds[0] else None
            panel.plot([_root(each.kl) for each in best], [fmean(e.values) for e in best], "k.--", lw=1, label=label)
    upper.set_ylabel("true utility")
    upper.legend(loc="lower right")
    lower.set_ylabel("score by the reward model")
    kl_axis(lower, max(each["objective/kl"] for seed in seeds for name in _COLOURS for each in seed[name]["rounds"]))
    canvas.tight_layout()
    save_plot(canvas, path)


def _root(kl: float) -> float:
    """Returns √KL. KL that is estimated from samples may be negative."""
    return float(max(kl, 0.0) ** 0.5)
