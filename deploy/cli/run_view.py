"""How a training run stands, as operators see it: by the run's folder, and by what they ask of the trainer."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from training.runs.folder import RECIPE_FILE
from training.runs.record import COUNTED, ENDS, RECORD_KEYS

if TYPE_CHECKING:
    from training.runs.lease import Control

_NO_FIGURES = {*RECORD_KEYS, "reason"}


@dataclass(frozen=True)
class RunView:
    """A run as operators see it. A field is None, or empty, until the run has something to put there."""

    run: str
    state: str
    """running, waiting, done or stopped. A run that was killed and will be resumed is running."""
    reason: str
    """Why it stopped, what it waits for, or which version it made."""
    phase: str
    """Its last phase, `done` and `stopped` aside."""
    num_done: int
    """How many rankings, rounds or epochs of this phase have ended."""
    count: int
    """How many the phase has."""
    score: float | None
    """Of the last PPO round, in standard deviations of the reference policy's scores."""
    kl: float | None
    """Of the last PPO round, in nats a completion."""
    updated: float | None
    """When it wrote its last record, in Unix seconds."""

    @property
    def has_ended(self) -> bool:
        """Whether nothing will resume the run."""
        return self.state in ENDS


def run_folders(runs_dir: Path) -> list[Path]:
    """Returns the folders of all runs, newest first. Their names begin with the time at which they began."""
    return sorted((path.parent for path in runs_dir.glob(f"*/{RECIPE_FILE}")), reverse=True)


def read_records(folder: Path) -> Sequence[Mapping[str, Any]]:
    """Returns what a run has written to metrics.jsonl, oldest first."""
    from training.runs.record import METRICS_FILE, read_lines

    return read_lines(folder / METRICS_FILE).found


def view_run(folder: Path) -> RunView:
    """Returns how a run stands, by its folder alone."""
    records = read_records(folder)
    working = [record for record in records if record["phase"] not in ENDS]
    last: Mapping[str, Any] = working[-1] if working else {"phase": "", "index": -1, "count": 0}
    ppo = [record for record in working if record["phase"] == "ppo"]
    state, reason = _state(folder, records)
    return RunView(
        run=folder.name,
        state=state,
        reason=reason,
        phase=last["phase"],
        num_done=last["index"] + 1,
        count=last["count"],
        score=_finite(ppo[-1].get("objective/score")) if ppo else None,
        kl=_finite(ppo[-1].get("objective/kl")) if ppo else None,
        updated=records[-1]["time"] if records else None,
    )


def _state(folder: Path, records: Sequence[Mapping[str, Any]]) -> tuple[str, str]:
    """Returns the state, and the reason."""
    from training.runs.folder import RunFolder

    end = records[-1] if records and records[-1]["phase"] in ENDS else None
    guards = [f"PPO stopped itself: {record['stopped/reason']}" for record in records if "stopped/reason" in record]
    if end is None:
        if RunFolder(folder).ended:
            return "stopped", "it was killed, and left nothing to resume from"
        waits = RunFolder(folder).waits_for
        return ("waiting", "; ".join([*guards, waits])) if waits else ("running", "; ".join(guards))
    if end["phase"] == "stopped":
        return "stopped", str(end.get("reason", "no reason given"))
    return "done", "; ".join([f"made v{end['version']}", *guards] if "version" in end else guards)


def progress(view: RunView) -> str:
    """Returns how much of its phase a run has done, such as `3 of 128 rounds`."""
    unit = f" {COUNTED[view.phase]}s" if view.phase in COUNTED else ""
    return f"{view.num_done} of {view.count}{unit}"


def is_sft(name: str) -> bool:
    """Whether this is the id of a run of SFT, or of a lease's holder that works on one."""
    from training.runs.folder import SFT_SUFFIX

    return name.endswith(SFT_SUFFIX)


def is_worked_on(run: str, control: Control) -> bool:
    """Whether the lease's holder works on this unfinished run: it works on SFT alone, or on all other runs."""
    return trainer_lives(control) and is_sft(control.holder) == is_sft(run)


def with_control(views: Sequence[RunView], control: Control) -> list[RunView]:
    """Returns the views with, for each that runs, what holds it up or will end it."""
    return [RunView(**(asdict(view) | {"reason": _reason(view, control)})) for view in views]


def _reason(view: RunView, control: Control) -> str:
    """Returns a view's reason, with what operators ask of the trainer about this run."""
    if view.has_ended:
        return view.reason
    reasons = [view.reason] if view.reason else []
    if control.abort_run == view.run:
        reasons.append("ends after its current round, epoch or phase, as requested")
    elif control.paused:
        reasons.append("paused; `alignd runs resume` resumes it")
    if not is_worked_on(view.run, control):
        reasons.append("`alignd sft` resumes it" if is_sft(view.run) else "no trainer runs now")
    return "; ".join(reasons)


def last_metrics(records: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, float | str | None]]:
    """Returns the metrics of each phase's last record, with the phases in the order in which they came."""
    found: dict[str, dict[str, float | str | None]] = {}
    for record in records:
        # Lists, such as accuracies by labeler, are for the report.
        found[record["phase"]] = {
            key: value if isinstance(value, str) else _finite(value)
            for key, value in record.items()
            if key not in _NO_FIGURES and isinstance(value, int | float | str)
        }
    return {phase: figures for phase, figures in found.items() if figures}


def _finite(value: object) -> float | None:
    """Returns a finite number, or None: JSON has no other numbers."""
    return value if isinstance(value, int | float) and math.isfinite(value) else None


def trainer_lives(control: Control) -> bool:
    """Whether a trainer is at work: it holds the lease, which has not expired, and has not ended on this machine."""
    return bool(control.holder) and control.seconds_left > 0
