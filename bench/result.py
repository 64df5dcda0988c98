"""The one form in which every benchmark reports: figures with their goals, as JSON and as a table."""

import argparse
import json
import shlex
import statistics
import sys
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from matplotlib import rc_context
from matplotlib.figure import Figure as Canvas
from rich.console import Console
from rich.table import Table

from deploy.machine import machine, versions

HEADINGS = ("figure", "value", "unit", "low", "high", "peer", "goal", "met")


@dataclass(frozen=True)
class Figure:
    """One measured number.

    `low` and `high` bound it (a 95 % interval, or the spread of the repetitions). `peer` is the figure of the best
    other system. `goal` is what we want, and `met` whether this figure reaches it. None means that there is none.
    """

    name: str
    value: float
    unit: str
    low: float | None = None
    high: float | None = None
    peer: float | None = None
    goal: float | None = None
    met: bool | None = None


def at_most(goal: float, figure: Figure) -> Figure:
    """Returns `figure` with a goal that smaller values meet."""
    return Figure(**{**asdict(figure), "goal": goal, "met": figure.value <= goal})


def at_least(goal: float, figure: Figure) -> Figure:
    """Returns `figure` with a goal that larger values meet."""
    return Figure(**{**asdict(figure), "goal": goal, "met": figure.value >= goal})


@dataclass(frozen=True)
class BenchResult:
    """What one run of one benchmark measured, and on which machine."""

    name: str
    machine: dict[str, str | int | float]
    versions: dict[str, str]
    command: str
    figures: tuple[Figure, ...]


def bench_result(name: str, figures: Sequence[Figure]) -> BenchResult:
    """Returns the result of the running benchmark, with this machine, these versions and this command."""
    command = shlex.join(["python", *sys.orig_argv[1:]])
    return BenchResult(name, machine(), versions(), command, tuple(figures))


def spread(name: str, unit: str, values: Sequence[float], peer: float | None = None) -> Figure:
    """Returns the median, with the least and the greatest value."""
    return Figure(name, statistics.median(values), unit, min(values), max(values), peer=peer)


def times_as_fast(name: str, seconds: Sequence[float], peer_seconds: Sequence[float]) -> Figure:
    """Returns how many times as fast as the peer we are, by medians.

    The bounds compare our slowest run with the peer's fastest, and our fastest with its slowest.
    """
    ratio = statistics.median(peer_seconds) / statistics.median(seconds)
    return Figure(name, ratio, "x", min(peer_seconds) / max(seconds), max(peer_seconds) / min(seconds))


def write_json(result: BenchResult, path: Path) -> None:
    """Writes `result` to `path`, making its folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(asdict(result), indent=2) + "\n")


def print_table(result: BenchResult, console: Console | None = None) -> None:
    """Prints the same as the JSON holds: the figures as a table, and under it what they were measured on."""
    table = Table(title=f"bench.{result.name}", title_justify="left")
    for heading in HEADINGS:
        table.add_column(heading, justify="left" if heading in {"figure", "unit", "met"} else "right")
    for figure in result.figures:
        table.add_row(*cells(figure))
    console = console or Console()
    console.print(table)
    console.print(circumstances(result), style="dim", markup=False)
    console.print(result.command, style="dim", markup=False)


def circumstances(result: BenchResult) -> str:
    """Returns the machine and the versions that the benchmark ran on, as text."""
    return ", ".join(f"{key} {value}" for key, value in {**result.machine, **result.versions}.items())


def markdown_table(headings: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Returns a table in Markdown."""
    return "\n".join("| " + " | ".join(row) + " |" for row in (headings, ["---"] * len(headings), *rows))


def save_plot(canvas: Canvas, path: Path) -> None:
    """Writes a plot as SVG. The same plot gives the same file, so that a diff shows what was measured again."""
    with rc_context({"svg.hashsalt": "alignd"}):
        canvas.savefig(path, format="svg", metadata={"Date": None})


def cells(figure: Figure) -> list[str]:
    """Returns one row of the table; a dash where there is nothing."""
    numbers = [number(value) for value in (figure.low, figure.high, figure.peer, figure.goal)]
    met = "-" if figure.met is None else ("yes" if figure.met else "NO")
    return [figure.name, number(figure.value), figure.unit, *numbers, met]


def number(value: float | None) -> str:
    """Returns three significant digits; large numbers as whole numbers with separated thousands."""
    if value is None:
        return "-"
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the two options that every benchmark takes."""
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures there as JSON as well")
    parser.add_argument("--quick", action="store_true", help="a small run that shows that it works, not how fast it is")


def report(result: BenchResult, json_path: Path | None) -> None:
    """Prints the table, and writes the JSON if a path was given."""
    print_table(result)
    if json_path is not None:
        write_json(result, json_path)
