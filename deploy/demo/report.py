"""Tells what a run of the demo found: on the terminal, and as one HTML file that needs nothing but a browser."""

from __future__ import annotations

from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from rich.console import Console, Group, RenderableType
from rich.padding import Padding
from rich.rule import Rule
from rich.table import Table
from rich.text import Text
from rich.tree import Tree

from deploy.demo.plots import draw_plots
from deploy.demo.result import DemoResult, first_and_last
from feedback.durable import replace_file
from training.data.intervals import WinRate

TEMPLATE = "report.html.jinja"
NEW, OLD, QUIET = "bold blue", "bright_black", "bright_black"


def write_html(result: DemoResult, path: Path) -> None:
    """Writes the report to `path`, whole or not at all."""
    replace_file(path, render_html(result))


def render_html(result: DemoResult) -> str:
    """The report as one HTML page, with its style and plots inside. All text in it is escaped."""
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template(TEMPLATE).render(result=result, plots=draw_plots(result))


def print_report(result: DemoResult, console: Console) -> None:
    """Prints the report to `console`."""
    for part in (
        Rule(style=QUIET),
        Text(result.verdict, style="bold"),
        _figures(result),
        _examples(result),
        _stages(result),
        _lineage(result),
        Text(f"{result.machine} · {_versions(result)}", style=QUIET),
    ):
        console.print(Padding(part, (0, 0, 1, 2)))


def _figures(result: DemoResult) -> RenderableType:
    table = Table(box=None, show_header=False, padding=(0, 2, 0, 0))
    table.add_column(style=QUIET)
    table.add_column(justify="right", style=NEW)
    table.add_column(style=QUIET)
    table.add_row("win rate by hidden utility", *_win_rate(result.by_utility))
    table.add_row("win rate by reward model", *_win_rate(result.by_reward_model))
    if result.ppo_steps:
        before, after = first_and_last(result.ppo_steps, "objective/score")
        _, kl = first_and_last(result.ppo_steps, "objective/kl")
        cost = f"for {kl:z.1f} nats of KL, in {len(result.ppo_steps)} PPO rounds"
        table.add_row("score", f"{before:z.2f} → {after:z.2f}", cost)
    model = result.reward_model
    held_out = f"of {model.comparisons} held-out comparisons; two users agree on {model.labeler_agreement:.1%}"
    table.add_row("reward model accuracy", f"{model.accuracy:.1%}", held_out)
    swap = (
        f"paused, after {result.swap.drain_seconds:.2f} s of draining; probes within {result.swap.probe_error:.2g} nats"
    )
    table.add_row("swap", f"{result.swap.pause_seconds:.2f} s", swap)
    traffic = result.traffic
    served = f"of {traffic.samples_served} samples and {traffic.rankings_served} rankings served"
    table.add_row("failed requests", str(traffic.failed), served)
    if result.seconds_to_first_ranking is not None:
        table.add_row("clone to first ranking", f"{result.seconds_to_first_ranking:.0f} s", "")
    return table


def _win_rate(rate: WinRate) -> tuple[str, str]:
    return f"{rate.value:.1%}", f"95% interval {rate.low:.1%} to {rate.high:.1%}, {rate.count} held-out prompts"


def _examples(result: DemoResult) -> RenderableType:
    blocks: list[RenderableType] = []
    for example in result.examples:
        table = Table(box=None, show_header=False, padding=(0, 2, 0, 2))
        table.add_column(style=QUIET, no_wrap=True)
        table.add_column(overflow="fold")
        # As Text, so that brackets in what a policy wrote are not taken for markup.
        table.add_row("before", Text(example.before, style=OLD))
        table.add_row("after", Text(example.after))
        blocks += [Text(example.prompt, style="bold"), table, Text()]
    return Group(*blocks[:-1])


def _stages(result: DemoResult) -> RenderableType:
    table = Table(box=None, show_header=False, padding=(0, 2, 0, 0))
    table.add_column(style=QUIET)
    table.add_column(justify="right")
    table.add_column(style="blue")
    longest = max(stage.seconds for stage in result.stages)
    for stage in result.stages:
        table.add_row(stage.name, f"{stage.seconds:.0f} s", "█" * round(30 * stage.seconds / longest))
    table.add_row("in all", f"{result.seconds:.0f} s", "", style="bold")
    return table


def _lineage(result: DemoResult) -> RenderableType:
    lineage = result.lineage
    tree = Tree(Text(f"v{lineage.version}  {lineage.weight_digest[:12]}", style=NEW), guide_style=QUIET)
    tree.add(f"parent v{lineage.parent}, reference policy v{lineage.reference}")
    tree.add(f"{lineage.algorithm} run {lineage.run_id}, seed {lineage.seed}")
    model = tree.add(f"reward model {lineage.reward_model_digest[:12]}")
    rankings = model.add(f"{lineage.num_rankings} rankings")
    for ranking_range in lineage.ranking_ranges:
        rankings.add(Text(ranking_range, style=QUIET))
    return tree


def _versions(result: DemoResult) -> str:
    return " · ".join(f"{name} {version}" for name, version in result.versions.items())
