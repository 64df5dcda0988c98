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
Student's 95 % interval; with one seed, that seed's own over prompts, windows of text or items. The prompts are the same
for all seeds, and intervals over seeds say nothing of other prompts: over those, 300 of them with the seeds' mean of
each, a win rate is sure to about 3 points. Goals that were missed say NO. Accuracies on HH-RLHF are over the
comparisons that any of three splits holds out, dialogues that begin alike taken together.

The pretraining mix is WikiText-2's validation part, and the tax is measured on its test part: a policy that gives back
more than was lost has learned WikiText, not got back what it knew. HellaSwag has nothing to do with the mix; from 0 to
0 means as many right in every seed, of 100 a seed, where one seed by itself is sure to 4 points.

The recipe is as shipped but for its size: PPO takes 12 rounds and two passes over each round's rollouts in place of 10
and one, SFT two epochs in place of four, and a quarter of the labelers are held out in place of 35 % of users. Two
passes learned faster in six rounds of a smaller experiment with seed 0 of the utility called chat; nothing else was
chosen on any of these experiments. Both utilities pay for a completion that ends, and the recipe marks down those that
do not (`missing_eos_penalty`): that much needs no ranking.

SFT learns from the best of four of the base's own completions of 64 prompts, and is judged as it is: where it is no
better than the base, to beat it is to beat the base once more.

What was tried for the goals of 85 and 71 %: 15 rounds on 200 rankings, with which two seeds of an earlier commit had 77
and 79 % over the base (only these figures are left); and, on a seed and prompts that are not reported, four minibatches
a pass in place of two: 81 % where two had 77, one run each, which proves no difference and was not taken. With chat the
true utility of PPO still rises towards the twelfth round; that of PPO-ptx has been level since the ninth."""
_RAN_HEADINGS = ("experiment", "commit", "computed in", "CPU", "cores", "hours")
_RAN_MEANING = """\
The commit is that of its last stage. Of the six with PPO only its stages (ppo, ppo-ptx, online and what judges them)
are of that commit; SFT, the base's and SFT's answers and tax, and the reward models were made before, and kept, at
93c4519 (chat-0), 309beed (chat-1 and chat-2, with uncommitted changes), and 60dfd23 (plain-0, plain-2; plain-1 with
uncommitted changes): what came between changes PPO's rollouts, and how many prompts a round of `--quick` has. Hours are
of one process, which may have shared its machine: they say what to expect, not how fast anything is."""
_RUNS_MEANING = """\
Each row is one run of PPO: where it ended, in KL from the SFT policy; the true utility of the rollouts of its first
round, of its best, and of its last; the learned score of its last; and why the run stopped itself, if it did. Where
the score rises and the utility falls, the policy is over-optimised (Gao et al. 2022)."""


def write_page(
    found: dict[str, list[dict[str, Any]]],
    ran: dict[str, dict[str, Any]],
    result: BenchResult,
    folder: Path,
    missing: Sequence[str] = (),
) -> Path:
    """Writes the page: a table of all figures, one of all runs of PPO, for each utility a plot against √KL, what each
    experiment of `ran` ran on, and, first of all, which are missing.
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
    """A row for each run of PPO."""
    for name, seeds in found.items():
        for each in seeds:
            for variant in _COLOURS:
                if variant in each:
                    yield [f"{name}, {variant}, seed {each['seed']}", *_run_row(each[variant])]


def _run_row(run: dict[str, Any]) -> list[str]:
    """What one run came to, as `_RUNS_MEANING` says."""
    rounds, last = run["rounds"], run["rounds"][-1]
    worth = [each["utility"] for each in rounds]
    numbers = _root_kl(last), worth[0], max(worth), worth[-1], last["objective/score"]
    return [str(len(rounds)), *(f"{number:.2f}" for number in numbers), run["stopped"] or "-"]


def _ran_row(name: str, found: dict[str, Any]) -> list[str]:
    """What this experiment ran on."""
    on = found["on"]
    stages = [each["seconds"] for each in found.values() if isinstance(each, dict) and "seconds" in each]
    hours = (sum(stages) or found["seconds"]) / 3600
    return [name, on["commit"], on["computes_in"], on["cpu"], str(on["cores"]), f"{hours:.1f}"]


def _root_kl(metrics: dict[str, Any]) -> float:
    """√KL from the reference of a round, in √nats a completion. Estimated from samples, KL may come out negative."""
    return float(max(metrics["objective/kl"], 0.0) ** 0.5)


def _draw(seeds: Sequence[dict[str, Any]], path: Path) -> None:
    """True utility of each round's rollouts, and below it their learned score, against √KL; a line a run."""
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
