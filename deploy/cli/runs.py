"""`alignd runs`: shows training runs, pauses the trainer, and ends a run."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.table import Column, Table

from deploy.cli.plain import plain
from deploy.cli.process import fail
from deploy.cli.run_view import (
    is_sft,
    is_worked_on,
    last_metrics,
    progress,
    read_records,
    run_folders,
    trainer_lives,
    view_run,
    with_control,
)
from deploy.config import load_config
from training.runs.folder import RECIPE_FILE, REPORT_FILE

if TYPE_CHECKING:
    from sqlalchemy import Engine

    from training.runs.lease import Control

app = typer.Typer(help="List and show training runs; pause the trainer, or end a run.", no_args_is_help=True)
console = Console(highlight=False, markup=False, soft_wrap=True)
errors = Console(stderr=True, highlight=False, markup=False, soft_wrap=True)

RunId = Annotated[str, typer.Argument(metavar="RUN", help="A run's id, as `alignd runs list` prints it.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]


@app.command("list")
def list_runs(as_json: Json = False) -> None:
    """List the runs, newest first."""
    views = [view_run(folder) for folder in run_folders(load_config().runs_dir)]
    if not all(view.has_ended for view in views):
        with _store_engine() as engine:
            views = with_control(views, _control_of(engine))
    if as_json:
        typer.echo(json.dumps([asdict(view) for view in views], indent=2))
        return
    if not views:
        console.print("No run yet: the trainer begins one when there are enough rankings; see `alignd status`.")
        return
    table = Table(Column("run", no_wrap=True), "state", "phase", "done", "score", "kl", Column("", overflow="fold"))
    for view in views:
        done = progress(view) if view.phase else "-"
        figures = ("-" if each is None else f"{each:z.2f}" for each in (view.score, view.kl))
        table.add_row(view.run, view.state, view.phase or "-", done, *figures, plain(view.reason))
    console.print(table, soft_wrap=False)


@app.command()
def show(run: RunId, as_json: Json = False) -> None:
    """Show one run: its state, where its recipe and report are, and the last metrics of each phase."""
    folder = _find_run(run)
    view = view_run(folder)
    if not view.has_ended:
        with _store_engine() as engine:
            (view,) = with_control([view], _control_of(engine))
    report = str(folder / REPORT_FILE) if (folder / REPORT_FILE).exists() else None
    whole = asdict(view) | {"recipe": str(folder / RECIPE_FILE), "report": report}
    metrics = last_metrics(read_records(folder))
    if as_json:
        typer.echo(json.dumps(whole | {"metrics": metrics}, indent=2))
        return
    phase = f"{view.phase}, {progress(view)}" if view.phase else None
    updated = view.updated and datetime.fromtimestamp(view.updated, UTC).isoformat(" ", "seconds")
    console.print(f"{view.run} {view.state}")
    for name, text in (whole | {"phase": phase, "updated": updated}).items():
        if text and name in ("reason", "phase", "updated", "recipe", "report"):
            console.print(f"{name:<9}{plain(text)}")
    for name, figures in metrics.items():
        console.print(name)
        for metric, value in figures.items():
            shown = f"{value:.4g}" if isinstance(value, float) else value
            console.print(plain(f"  {metric} {shown}"))


@app.command()
def pause() -> None:
    """Pause the trainer after its current round, epoch or phase, until `alignd runs resume`."""
    from training.runs.lease import set_paused

    with _store_engine() as engine:
        before = _control_of(engine)
        set_paused(engine, True)
    if before.paused:
        console.print("The trainer is paused already. `alignd runs resume` resumes it.")
    elif trainer_lives(before):
        console.print("The trainer pauses after its current round, epoch or phase. `alignd runs resume` resumes it.")
    else:
        console.print("No trainer runs now. The next one pauses before it begins, until `alignd runs resume`.")


@app.command()
def resume() -> None:
    """Resume a paused trainer."""
    from training.runs.lease import set_paused

    with _store_engine() as engine:
        before = _control_of(engine)
        set_paused(engine, False)
    if not before.paused:
        console.print("The trainer was not paused: nothing has changed.")
    elif trainer_lives(before):
        console.print("The trainer resumes where it paused. `alignd runs list` shows its progress.")
    else:
        console.print("No longer paused, but no trainer runs now: start one with `alignd up` or `alignd train`.")


@app.command()
def abort(run: RunId) -> None:
    """End a run after its current round, epoch or phase. Its rankings are not tried again."""
    from training.runs.lease import request_abort

    view = view_run(_find_run(run))
    if view.has_ended:
        undo = " `alignd policies rollback` takes back the version that it made." if view.state == "done" else ""
        raise fail(f"{run} has ended already ({view.state}: {view.reason}), so there is nothing to abort.{undo}")
    with _store_engine() as engine:
        before = _control_of(engine)
        request_abort(engine, run)
    restart = "once `alignd sft` resumes it" if is_sft(run) else "when a trainer starts: none runs now"
    when = "after its current round, epoch or phase" if is_worked_on(run, before) else restart
    kept = "The live policy stays" if is_sft(run) else "Its rankings are not tried again, and the live policy stays"
    console.print(f"{run} ends {when}. {kept}. `alignd runs show {run}` says when it has ended.")
    if before.abort_run not in ("", run):
        console.print(f"This replaces the request to end {before.abort_run}.")


def _find_run(run: str) -> Path:
    """Returns a run's folder.

    Raises:
        typer.Exit: there is no such run; the message has been printed.
    """
    runs_dir = load_config().runs_dir
    for folder in run_folders(runs_dir):
        if folder.name == run:
            return folder
    raise fail(f"there is no run {run} in {runs_dir}; `alignd runs list` shows which there are.")


def _control_of(engine: Engine) -> Control:
    """Returns what operators ask of the trainer."""
    from training.runs.lease import read_control

    return read_control(engine)


@contextmanager
def _store_engine() -> Iterator[Engine]:
    """Yields the store's database.

    Raises:
        typer.Exit: it cannot be used; the message has been printed.
    """
    from sqlalchemy.engine import make_url
    from sqlalchemy.exc import SQLAlchemyError

    from feedback.store.engine import open_engine

    url = load_config().store_url
    try:
        engine = open_engine(url)
        try:
            yield engine
        finally:
            engine.dispose()
    except (SQLAlchemyError, OSError, ValueError) as error:
        raise fail(
            f"the store {make_url(url)!r} cannot be used: {error}; `store` sets it, see `alignd config`."
        ) from error
