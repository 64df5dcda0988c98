"""Shows what the demo found: on the terminal, and as an HTML page that needs nothing but a browser."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from rich.console import Console, Group, RenderableType
from rich.padding import Padding
from rich.rule import Rule
from rich.table import Table
from rich.text import Text

from deploy.cli.plain import plain
from deploy.demo.plots import draw_plots
from deploy.demo.result import DemoResult, Gain
from feedback.durable import replace_file, write_json
from training.data.intervals import WinRate
from training.report.page import write_report
from training.runs.folder import REPORT_FILE

TEMPLATE = "report.html.jinja"
NEW, OLD, _QUIET = "bold blue", "bright_black", "bright_black"


def finish(result: DemoResult, folder: Path, console: Console) -> None:
    """Writes the report to `folder` as a page and as JSON, and prints it with the paths of both reports."""
    page, run_page = folder / REPORT_FILE, folder / result.run.report
    if not run_page.exists():
        # The trainer was ended after its policy went live, but before it wrote this page.
        write_report(run_page.parent)
    write_html(result, page)
    write_json(folder / "report.json", asdict(result))
    print_report(result, console)
    for name, path in (("This report, with its plots:  ", page), ("The training run's report:    ", run_page)):
        console.print(plain(f"{name}{path.resolve()}"), highlight=False, markup=False, soft_wrap=True)


def write_html(result: DemoResult, path: Path) -> None:
    """Writes the report to `path`, whole or not at all."""
    replace_file(path, render_html(result))


def render_html(result: DemoResult) -> str:
    """Returns the report as one HTML page, with its style and plots inside. All text in it is escaped."""
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
        Rule(style=_QUIET),
        Text(result.verdict, style="bold"),
        _figures(result),
        Text(f"The training run learned from {result.run.num_rankings} rankings. {result.run.finding}"),
        _examples(result),
        _stages(result),
        Text(f"{result.machine} · {_versions(result)}", style=_QUIET),
    ):
        console.print(Padding(part, (0, 0, 1, 2)))


def _figures(result: DemoResult) -> RenderableType:
    table = Table(box=None, show_header=False, padding=(0, 2, 0, 0))
    table.add_column(style=_QUIET)
    table.add_column(justify="right", style=NEW)
    table.add_column(style=_QUIET)
    table.add_row("win rate by hidden utility", *_win_rate(result.by_utility))
    table.add_row("win rate by reward model", *_win_rate(result.by_reward_model))
    frontier = result.frontier
    for name, gain in (
        ("new policy", frontier.new_policy),
        *((f"best of {n}", g) for n, g in frontier.best_of_n.items()),
    ):
        table.add_row(f"utility gained by {name}", *_gain(gain))
    swap = (
        f"paused, after {result.swap.drain_seconds:.2f} s of draining; probes within {result.swap.probe_error:.2g} nats"
    )
    table.add_row("swap", f"{result.swap.pause_seconds:.2f} s", swap)
    traffic = result.traffic
    served = f"{traffic.samples_served} samples and {traffic.rankings_served} rankings served to {_users(result)}"
    table.add_row("failed requests", str(traffic.failed), served)
    if result.seconds_to_first_ranking is not None:
        table.add_row("clone to first ranking", f"{result.seconds_to_first_ranking:.0f} s", "")
    return table


def _users(result: DemoResult) -> str:
    return f"{result.users.count} simulated users, two of whom agree on {result.users.agreement:.1%} of comparisons"


def _win_rate(rate: WinRate) -> tuple[str, str]:
    return f"{rate.value:.1%}", f"95% interval {rate.low:.1%} to {rate.high:.1%}, {rate.count} held-out prompts"


def _gain(gain: Gain) -> tuple[str, str]:
    low, high = gain.utility.low, gain.utility.high
    return f"{gain.utility.value:z.3f}", f"95% interval {low:z.3f} to {high:z.3f}, at a KL of {gain.kl:.2f} nats"


def _examples(result: DemoResult) -> RenderableType:
    blocks: list[RenderableType] = []
    for example in result.examples:
        table = Table(box=None, show_header=False, padding=(0, 2, 0, 2))
        table.add_column(style=_QUIET, no_wrap=True)
        table.add_column(overflow="fold")
        # As Text, so that brackets in what a policy wrote are not taken for markup.
        table.add_row("before", Text(plain(example.before, lines=True), style=OLD))
        table.add_row("after", Text(plain(example.after, lines=True)))
        blocks += [Text(plain(example.prompt, lines=True), style="bold"), table, Text()]
    return Group(*blocks[:-1])


def _stages(result: DemoResult) -> RenderableType:
    table = Table(box=None, show_header=False, padding=(0, 2, 0, 0))
    table.add_column(style=_QUIET)
    table.add_column(justify="right")
    table.add_column(style="blue")
    longest = max(stage.seconds for stage in result.stages)
    for stage in result.stages:
        table.add_row(stage.name, f"{stage.seconds:.0f} s", "█" * round(30 * stage.seconds / longest))
    table.add_row("in all", f"{result.seconds:.0f} s", "", style="bold")
    return table


def _versions(result: DemoResult) -> str:
    return " · ".join(f"{name} {version}" for name, version in result.versions.items())
