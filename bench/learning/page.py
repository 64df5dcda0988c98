"""Writes docs/results/learning.md and its plots from what the learning benchmark found."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure as Canvas

from bench.result import HEADINGS, BenchResult, cells, circumstances, markdown_table, save_plot

_COLOURS = {"ppo": "#c44e52", "ppo-ptx": "#4c72b0", "online": "#55a868"}
_RUN_HEADINGS = ("run", "rounds", "√KL", "utility, first", "best", "last", "score, last", "stopped")
_MEANING = """\
Win rates are by the labelers' true utility, on held-out prompts, one completion each. Figures are means over seeds with
Student's 95 % interval. Where there is one seed, the interval is that seed's own, over prompts, windows of text or
items. All seeds have the same 300 prompts, and intervals over seeds say nothing about other prompts. Over prompts, with
the mean of the seeds for each, a win rate is accurate to about 3 points. Goals that were missed say NO. Accuracies on
HH-RLHF are over the comparisons that at least one of three splits holds out. Their intervals count dialogues that begin
alike as one.

The pretraining mix is the validation part of WikiText-2, and the alignment tax is measured on its test part. So a
policy that gives back more than was lost has learned WikiText, and has not regained what it knew. HellaSwag has nothing
to do with the mix. An interval from 0 to 0 means that in every seed both policies had as many right, of 100 a seed. One
seed by itself is accurate to 4 points.

The recipe is the shipped one except for its size: PPO takes 12 rounds in place of 10 and two epochs over each round's
rollouts in place of one, SFT takes two epochs in place of four, and a quarter of the labelers are held out in place of
35 % of users. Two epochs learned faster in six rounds of a smaller experiment with seed 0 of the utility called chat.
Nothing else was chosen on any of these experiments. Both utilities reward a completion that ends, and the recipe lowers
the score of one that does not (`missing_eos_penalty`): that much needs no ranking.

SFT learns from the best of four of the base's own completions of 64 prompts, and is evaluated as it is. Where it is no
better than the base, a win over it is one more win over the base.

This was tried for the goals of 85 and 71 %. First, 15 rounds on 200 rankings, with which two seeds of an earlier commit
had 77 and 79 % over the base (only these figures remain). Second, on a seed and prompts that are not reported, four
minibatches an epoch in place of two: 81 % where two had 77, one run each, which proves no difference, so it was not
adopted. With chat the true utility of PPO still rises towards the twelfth round. That of PPO-ptx has been level since
the ninth."""
_RAN_HEADINGS = ("experiment", "commit", "computed in", "CPU", "cores", "hours")
_RAN_MEANING = """\
The commit is that of an experiment's last stage. In the six with PPO, only some stages are of that commit: ppo,
ppo-ptx, online, and their evaluation. SFT, the answers and the tax of base and SFT, and the reward models were made
before, and kept, at 93c4519 (chat-0), 309beed (chat-1 and chat-2, with uncommitted changes), and 60dfd23 (plain-0 and
plain-2; plain-1 with uncommitted changes). The commits in between change PPO's rollouts, and how many prompts a round
of `--quick` has. Hours are of one process, which may have shared its machine. They say what to expect, not how fast
anything is."""
_RUNS_MEANING = """\
Each row is one run of PPO. It shows where the run ended, in KL from the SFT policy; the true utility of the rollouts of
its first round, of its best round and of its last; the learned score of its last round; and why the run stopped itself,
if it did. Where the score rises and the utility falls, the policy is over-optimised (Gao et al. 2022)."""


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
    plots = []
    for name, seeds in found.items():
        if name != "human":
            path = folder / f"learning-{name}.svg"
            _draw(seeds, path)
            plots.append(f"![{name}: score and true utility against √KL]({path.name})")
    parts = [
        "# Does it learn?",
        *([f"**Not finished.** Missing: {', '.join(missing)}."] if missing else []),
        f"`{result.command}` on {circumstances(result)}.",
        _MEANING,
        markdown_table(HEADINGS, map(cells, result.figures)),
        "## Score and true utility against √KL",
        _RUNS_MEANING,
        markdown_table(_RUN_HEADINGS, _run_rows(found)),
        *plots,
        "## What each experiment ran on",
        _RAN_MEANING,
        markdown_table(_RAN_HEADINGS, (_ran_row(name, each) for name, each in ran.items())),
    ]
    page = folder / "learning.md"
    page.write_text("\n\n".join(parts) + "\n")
    return page


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
    numbers = _root_kl(last), worth[0], max(worth), worth[-1], last["objective/score"]
    return [str(len(rounds)), *(f"{number:.2f}" for number in numbers), run["stopped"] or "-"]


def _ran_row(name: str, found: dict[str, Any]) -> list[str]:
    """Returns what this experiment ran on."""
    on = found["on"]
    stages = [each["seconds"] for each in found.values() if isinstance(each, dict) and "seconds" in each]
    hours = (sum(stages) or found["seconds"]) / 3600
    return [name, on["commit"], on["computes_in"], on["cpu"], str(on["cores"]), f"{hours:.1f}"]


def _root_kl(metrics: dict[str, Any]) -> float:
    """Returns √KL from the reference of a round, in √nats a completion. KL estimated from samples may be negative."""
    return float(max(metrics["objective/kl"], 0.0) ** 0.5)


def _draw(seeds: Sequence[dict[str, Any]], path: Path) -> None:
    """Draws true utility of each round's rollouts, and below it their learned score, against √KL; one line a run."""
    canvas = Canvas(figsize=(8, 6.5))
    upper, lower = canvas.subplots(2, 1, sharex=True)
    for seed in seeds:
        for name, colour in _COLOURS.items():
            rounds = seed[name]["rounds"] if name in seed else []
            distance = [_root_kl(each) for each in rounds]
            label = name if rounds and seed is seeds[0] else None
            for panel, key in ((upper, "utility"), (lower, "objective/score")):
                values = [each[key] for each in rounds]
                panel.plot(distance, values, color=colour, linewidth=0.5, alpha=0.5)
                panel.scatter(distance, values, color=colour, s=14, label=label)
    upper.set_ylabel("true utility of the rollouts")
    upper.legend(loc="lower right")
    lower.set_ylabel("learned score of the rollouts")
    lower.set_xlabel("√KL from the reference (√nats a completion)")
    canvas.tight_layout()
    save_plot(canvas, path)
