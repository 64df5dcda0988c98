"""Turns what the demo observed into the figures of its report."""

import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass

from alignd.v1 import policy_service_pb2 as pb
from alignd.v1.inference_service_pb2 import SampleResponse
from deploy.config import AligndConfig
from deploy.demo.follow import RunView
from deploy.demo.result import DemoResult, Example, Stage, Swap, Traffic, TrainingRun, Users
from deploy.demo.users import Tally
from deploy.machine import machine, versions
from deploy.simulation.config import SimulationConfig
from deploy.simulation.prompts import load_prompts
from deploy.simulation.utility import Utility, load_utility
from training.data.intervals import WinRate, win_rate
from training.report.page import REPORT
from training.report.record import read_run
from training.report.summary import WIN_RATE, finding

NUM_EXAMPLES = 3


@dataclass(frozen=True)
class Observed:
    """What the story came to."""

    before: Sequence[SampleResponse]
    after: Sequence[SampleResponse]
    run: RunView
    replica: pb.ReplicaStatus
    policy: pb.Policy
    seconds_to_first_ranking: float | None


def summarize(
    config: AligndConfig,
    simulation: SimulationConfig,
    model: str,
    observed: Observed,
    stages: Sequence[Stage],
    tally: Tally,
) -> DemoResult:
    """Returns the result of a run."""
    prompts = load_prompts("held_out")[: len(observed.before)]
    utility = load_utility(simulation.utility)
    before, after = utilities(utility, prompts, observed.before), utilities(utility, prompts, observed.after)
    where = machine()
    return DemoResult(
        model=model,
        by_utility=win_rate(after, before),
        by_reward_model=reward_model_win_rate(observed.run),
        run=training_run(config, observed.policy),
        users=Users(simulation.num_users, simulation.agreement, simulation.utility),
        examples=examples(prompts, observed),
        swap=Swap(observed.replica.pause_seconds, observed.replica.drain_seconds, observed.replica.probe_error),
        traffic=Traffic(tally.samples, tally.rankings, len(tally.failures)),
        stages=stages,
        machine=f"{where['cpu']}, {where['cores']} cores, {where['memory_gib']} GiB, {where['system']}; {bus(config)}",
        versions=versions(),
        command=shlex.join(["alignd", *sys.argv[1:]]),
        seconds_to_first_ranking=observed.seconds_to_first_ranking,
    )


def utilities(utility: Utility, prompts: Sequence[str], responses: Sequence[SampleResponse]) -> list[float]:
    """Returns what each prompt's one completion is worth."""
    pairs = zip(prompts, responses, strict=True)
    return [utility(prompt, response.completions[0].text) for prompt, response in pairs]


def reward_model_win_rate(run: RunView) -> WinRate:
    """Returns the trainer's own win rate over the reference, on the prompts it held out."""
    record = run.of("evaluate")[-1]
    return WinRate(
        value=record[WIN_RATE],
        low=record["low"],
        high=record["high"],
        wins=int(record["wins"]),
        ties=int(record["ties"]),
        losses=int(record["losses"]),
    )


def examples(prompts: Sequence[str], observed: Observed) -> list[Example]:
    """Returns the first held-out prompts: not chosen by what was answered."""
    shown = zip(prompts, observed.before, observed.after, strict=True)
    return [
        Example(prompt, before.completions[0].text, after.completions[0].text)
        for prompt, before, after in list(shown)[:NUM_EXAMPLES]
    ]


def training_run(config: AligndConfig, policy: pb.Policy) -> TrainingRun:
    """Returns the run that made the new policy, with what its own report says of it."""
    folder = config.runs_dir / policy.manifest.training.run_id
    return TrainingRun(
        run_id=folder.name,
        version=policy.version,
        reference=policy.manifest.reference_version,
        num_rankings=policy.manifest.training.num_rankings,
        finding=finding(read_run(folder)),
        report=(folder / REPORT).relative_to(config.data_dir.resolve()).as_posix(),
    )


def bus(config: AligndConfig) -> str:
    """Returns the bus in words."""
    return "Kafka bus" if config.bus_url.startswith("kafka://") else "SQLite bus"
