"""Follows a training run from outside: by its metrics.jsonl, and by which version the replicas serve."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from alignd.v1 import policy_service_pb2 as pb
from training.runs.folder import RunFolder
from training.runs.record import ENDS, METRICS_FILE, PHASES, Record, of_phase, read_lines


class RunError(Exception):
    """The trainer stopped its run; the message is its reason."""


@dataclass(frozen=True)
class RunSoFar:
    """What a run has written so far, oldest first."""

    folder: Path | None
    records: Sequence[Record]

    def of(self, phase: str) -> list[Record]:
        """Returns the records of one phase."""
        return of_phase(self.records, phase)

    @property
    def last(self) -> Record:
        """The newest record."""
        return self.records[-1] if self.records else {"phase": "waiting", "index": 0, "count": 1}

    def detail(self) -> str:
        """Returns what the run waits for, or else its newest metrics, in a few words."""
        waits_for = RunFolder(self.folder).waits_for if self.folder else ""
        if waits_for:
            return f"waits: {waits_for}"
        record = self.last
        shown = (
            ("objective/score", "score {:z.2f}"),
            ("objective/kl", "kl {:z.1f}"),
            ("completion/length", "len {:.0f}"),
            ("completion/eos_rate", "ends {:.0%}"),
            ("reward_model/loss", "loss {:.3f}"),
            ("reward_model/accuracy", "accuracy {:.0%}"),
        )
        return "  ".join(text.format(record[key]) for key, text in shown if key in record)


def read_run(runs_dir: Path) -> RunSoFar:
    """Returns the newest run under `runs_dir`.

    Raises:
        RunError: the trainer stopped this run.
    """
    files = sorted(runs_dir.glob(f"*/{METRICS_FILE}"), key=lambda path: path.stat().st_mtime)
    if not files:
        return RunSoFar(None, ())
    view = RunSoFar(files[-1].parent, read_lines(files[-1]).found)
    if view.last["phase"] == "stopped":
        raise RunError(f"the trainer stopped its run: {view.last['reason']}")
    return view


def phase_seconds(view: RunSoFar, started: float) -> list[tuple[str, float]]:
    """Returns the seconds that each phase took, in order. The first phase counts from `started`, in Unix time.

    A run may have begun before that.
    """
    spans: dict[str, float] = {}
    before = started
    for record in view.records:
        if record["phase"] not in ENDS:
            name = PHASES[record["phase"]]
            spans[name] = spans.get(name, 0.0) + max(record["time"] - before, 0.0)
        before = record["time"]
    return list(spans.items())


def swapped(response: pb.ListPoliciesResponse, version: int) -> pb.ReplicaStatus | None:
    """Returns the status of a replica that serves `version`, or None while there is none.

    Raises:
        RunError: a replica could not swap to it, for a reason that will not pass by itself.
    """
    for replica in response.replicas:
        tries_again = replica.state == pb.REPLICA_STATE_DEGRADED and not replica.failed_version
        if replica.error_message and not tries_again:
            raise RunError(f"{replica.replica_id} could not swap: {replica.error_message}")
        if replica.policy.version == version:
            return replica
    return None
