"""Writes the report of a training run from its folder: one HTML file that needs nothing but a browser."""

from __future__ import annotations

from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from feedback.durable import replace_file
from training.data.census import KINDS, outcomes
from training.report.history import RunHistory, read_run
from training.report.plots import draw_plots
from training.report.summary import Figure, figures, finding, fitting_figures, settings, stops
from training.runs.folder import REPORT_FILE
from training.runs.record import last_of

TEMPLATE = "report.html.jinja"
_NUM_OPEN_SAMPLES = 5


def write_report(folder: Path) -> Path:
    """Writes REPORT.html into a run's folder, whole or not at all, and returns its path.

    If the run stopped early, or has not ended, the report shows what there is.
    """
    path = folder / REPORT_FILE
    # A policy may write half a surrogate pair, which UTF-8 cannot encode.
    html = render(read_run(folder)).encode("utf-8", errors="backslashreplace").decode("utf-8")
    replace_file(path, html)
    return path


def render(run: RunHistory) -> str:
    """Returns the report as one HTML page, with its style and plots inside. All text in it is escaped."""
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template(TEMPLATE).render(
        run=run,
        finding=finding(run),
        figures=figures(run),
        read=what_was_read(run),
        fitting=fitting_figures(run),
        plots=draw_plots(run.records, run.recipe.get("ppo", {})),
        stops=stops(run),
        settings=list(settings(run.recipe)),
        num_open=_NUM_OPEN_SAMPLES,
    )


def what_was_read(run: RunHistory) -> list[Figure]:
    """Returns how many rankings, prompts or demonstrations the run read, and what became of them."""
    record = last_of(run.records, "data")
    unrendered = [(kind, record[f"{kind}/unrendered"]) for kind in KINDS if f"{kind}/unrendered" in record]
    return [
        *(Figure(f"{kind} read", count, outcome) for kind, count, outcome in outcomes(record)),
        *(Figure(f"{kind} that cannot be rendered", "", f"of the samples {which}") for kind, which in unrendered),
    ]
