"""What operators see of a training run: how it stands, by its folder and by what the trainer has been asked to do."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from training.runs.lease import Control

RECIPE, METRICS = "recipe.json", "metrics.jsonl"
ENDS = ("done", "stopped")
NO_FIGURES = ("time", "phase", "index", "count", "reason")


@dataclass(frozen=True)
class RunView:
    """A run as operators see it. What it has not come to yet is None, or empty."""

    run: str
    state: str
    """running, done or stopped; a run that was killed and will be gone on with is running."""
    reason: str
    """Why it stopped or waits, or what it made."""
    phase: str
    """The last phase that it came to, before its end."""
    num_done: int
    count: int
    """Of this phase."""
    score: float | None
    kl: float | None
    """Of PPO's last round: deviations of the reference policy's scores, and nats a completion."""
    updated: float | None
    """When it last wrote down something, in Unix seconds."""


def run_folders(runs_dir: Path) -> list[Path]:
    """Returns the folders of all runs, newest first. Their names begin with the time at which they began."""
    return sorted((path.parent for path in runs_dir.glob(f"*/{RECIPE}")), reverse=True)


def read_records(folder: Path) -> Sequence[Mapping[str, Any]]:
    """Returns what a run has written to metrics.jsonl, oldest first."""
    from training.runs.record import read_lines

    return read_lines(folder / METRICS).found


def view_run(folder: Path) -> RunView:
    """Returns how a run stands, by its folder alone."""
    records = read_records(folder)
    working = [record for record in records if record["phase"] not in ENDS]
    last: Mapping[str, Any] = working[-1] if working else {"phase": "", "index": -1, "count": 0}
    ppo = [record for record in working if record["phase"] == "ppo"]
    state, reason = state_of(folder, records)
    return RunView(
        run=folder.name,
        state=state,
        reason=reason,
        phase=last["phase"],
        num_done=last["index"] + 1,
        count=last["count"],
        score=finite(ppo[-1].get("objective/score")) if ppo else None,
        kl=finite(ppo[-1].get("objective/kl")) if ppo else None,
        updated=records[-1]["time"] if records else None,
    )


def state_of(folder: Path, records: Sequence[Mapping[str, Any]]) -> tuple[str, str]:
    """Returns running, done or stopped, and why."""
    from training.runs.folder import RunFolder

    end = records[-1] if records and records[-1]["phase"] in ENDS else None
    guards = [f"PPO stopped itself: {record['stopped/reason']}" for record in records if "stopped/reason" in record]
    if end is None:
        if RunFolder(folder).ended:
            return "stopped", "it was killed, and has left nothing to go on from"
        waits = RunFolder(folder).waits_for
        return "running", "; ".join([*guards, f"waits: {waits}"] if waits else guards)
    if end["phase"] == "stopped":
        return "stopped", str(end.get("reason", "no reason given"))
    return "done", "; ".join([f"made v{end['version']}", *guards] if "version" in end else guards)


def is_sft(name: str) -> bool:
    """Returns whether a run learns from demonstrations, or whoever has the lease works on such a one."""
    from training.runs.folder import SFT_SUFFIX

    return name.endswith(SFT_SUFFIX)


def is_worked_on(run: str, control: Control) -> bool:
    """Returns whether somebody goes on with this unfinished run, by the lease: whoever has it is of one kind."""
    return trainer_lives(control) and is_sft(control.holder) == is_sft(run)


def with_control(views: Sequence[RunView], control: Control) -> list[RunView]:
    """Returns the same, with what holds up those that run, or ends them."""
    return [RunView(**(asdict(view) | {"reason": waits_for(view, control)})) for view in views]


def waits_for(view: RunView, control: Control) -> str:
    """Returns a view's reason, and what the trainer has been asked to do about the run."""
    if view.state != "running":
        return view.reason
    reasons = [view.reason] if view.reason else []
    if control.abort_run == view.run:
        reasons.append("ends at its next step, as asked")
    elif control.paused:
        reasons.append("paused; `alignd runs resume` has it go on")
    if not is_worked_on(view.run, control):
        reasons.append("`alignd sft` goes on with it" if is_sft(view.run) else "no trainer runs now")
    return "; ".join(reasons)


def last_metrics(records: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, float | str | None]]:
    """Returns the figures of each phase's last record, by phase in the order in which they came."""
    found: dict[str, dict[str, float | str | None]] = {}
    for record in records:
        # Lists, such as accuracies by labeler, are for the report.
        found[record["phase"]] = {
            key: value if isinstance(value, str) else finite(value)
            for key, value in record.items()
            if key not in NO_FIGURES and isinstance(value, int | float | str)
        }
    return {phase: figures for phase, figures in found.items() if figures}


def finite(value: object) -> float | None:
    """Returns a number, or None for what JSON has no number for."""
    return value if isinstance(value, int | float) and math.isfinite(value) else None


def trainer_lives(control: Control) -> bool:
    """Returns whether somebody trains, by the lease."""
    return bool(control.holder) and control.expires_at > time.time()
