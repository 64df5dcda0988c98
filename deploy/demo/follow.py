"""Follows a training run from outside: by its metrics.jsonl, and by which version the replicas serve."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from alignd.v1 import policy_service_pb2 as pb
from training.runs.record import METRICS_FILE, read_lines

# The name of each phase of metrics.jsonl among the stages of the demo.
PHASE_NAMES = {
    "reward_model": "refresh the reward model",
    "reward_model_evaluation": "refresh the reward model",
    "normalise": "sample the reference",
    "ppo": "PPO",
    "evaluate": "evaluate the new policy",
    "register": "write and register the version",
}


class RunError(Exception):
    """The trainer stopped its run; the message is its reason."""


@dataclass(frozen=True)
class RunView:
    """What a run has written so far, oldest first."""

    folder: Path | None
    records: Sequence[Mapping[str, Any]]

    def of(self, phase: str) -> list[Mapping[str, Any]]:
        """Returns the records of one phase."""
        return [record for record in self.records if record["phase"] == phase]

    @property
    def last(self) -> Mapping[str, Any]:
        """The newest record."""
        return self.records[-1] if self.records else {"phase": "waiting", "index": 0, "count": 1}

    def detail(self) -> str:
        """Returns the newest metrics, in a few words."""
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


def read_run(runs_dir: Path) -> RunView:
    """Returns the newest run under `runs_dir`.

    Raises:
        RunError: the trainer stopped this run.
    """
    files = sorted(runs_dir.glob(f"*/{METRICS_FILE}"), key=lambda path: path.stat().st_mtime)
    if not files:
        return RunView(None, ())
    view = RunView(files[-1].parent, read_lines(files[-1]).found)
    if view.last["phase"] == "stopped":
        raise RunError(f"the trainer stopped its run: {view.last['reason']}")
    return view


def phase_seconds(view: RunView, started: float) -> list[tuple[str, float]]:
    """Returns the seconds that each phase took, in order. The first phase counts from `started`, in Unix time."""
    spans: dict[str, float] = {}
    before = started
    for record in view.records:
        name = PHASE_NAMES.get(record["phase"])
        if name:
            spans[name] = spans.get(name, 0.0) + record["time"] - before
        before = record["time"]
    return list(spans.items())


def swapped(response: pb.ListPoliciesResponse, version: int) -> pb.ReplicaStatus | None:
    """Returns the status of a replica that serves `version`, or None while there is none.

    Raises:
        RunError: a replica could not swap to it.
    """
    for replica in response.replicas:
        if replica.error_message:
            raise RunError(f"{replica.replica_id} could not swap: {replica.error_message}")
        if replica.policy.version == version:
            return replica
    return None
