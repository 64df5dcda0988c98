"""Shows how far the demo is, by bars on a terminal and by lines elsewhere, and records how long each stage took."""

import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, SpinnerColumn, TaskID, TextColumn, TimeElapsedColumn

from deploy.cli.plain import plain
from deploy.demo.result import Stage

_LINE_EVERY_SECONDS = 15.0


@contextmanager
def only_ours(log: Path) -> Iterator[None]:
    """Keeps the terminal for the demo: sends what libraries write to standard error to `log`."""
    log.parent.mkdir(parents=True, exist_ok=True)
    sys.stderr.flush()
    terminal = os.dup(2)
    with log.open("ab") as output:
        os.dup2(output.fileno(), 2)
    try:
        yield
    finally:
        sys.stderr.flush()
        os.dup2(terminal, 2)
        os.close(terminal)


@dataclass
class Bar:
    """The progress of the current stage."""

    name: str
    console: Console
    progress: Progress | None
    task: TaskID | None
    started_at: float = field(default_factory=time.monotonic)
    spoke_at: float = field(default_factory=time.monotonic)

    def update(self, done: float, total: float | None, detail: str = "") -> None:
        """Shows how far the stage is. `total` is None while it is not known."""
        if self.progress and self.task is not None:
            self.progress.update(self.task, completed=done, total=total, detail=escape(plain(detail)))
        elif time.monotonic() - self.spoke_at >= _LINE_EVERY_SECONDS:
            self.spoke_at = time.monotonic()
            share = f"{done:.0f} of {total:.0f}" if total else f"{self.spoke_at - self.started_at:.0f} s"
            self.console.print(plain(f"  {self.name}: {share}  {detail}".rstrip()), highlight=False, markup=False)


class Stages:
    """The stages of the demo so far, in order, with their times."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self.finished: list[Stage] = []

    @contextmanager
    def stage(self, name: str) -> Iterator[Bar]:
        """Shows and times a stage, which is the body of the `with` statement."""
        started = time.monotonic()
        if self.console.is_terminal:
            columns = (
                SpinnerColumn(),
                TextColumn("{task.description:<42}"),
                BarColumn(24),
                TextColumn("{task.fields[detail]}"),
                TimeElapsedColumn(),
            )
            with Progress(*columns, console=self.console, transient=True) as progress:
                yield Bar(name, self.console, progress, progress.add_task(name, total=None, detail=""))
        else:
            self.console.print(f"{name} …", highlight=False)
            yield Bar(name, self.console, None, None)
        self.add(name, time.monotonic() - started)

    def add(self, name: str, seconds: float) -> None:
        """Records a stage that has ended, and prints its time."""
        self.finished.append(Stage(name, seconds))
        self.console.print(f"[green]✓[/] {name:<42} {seconds:6.1f} s", highlight=False)

    def split(self, parts: list[tuple[str, float]]) -> None:
        """Replaces the last stage by its parts, each a name and seconds, and a stage for the time that is left."""
        whole = self.finished.pop()
        rest = whole.seconds - sum(seconds for _, seconds in parts)
        self.finished += [Stage(name, seconds) for name, seconds in parts]
        self.finished.append(Stage("swap, and wait around it", max(0.0, rest)))
