"""Computes the figures of the demo's report from what the demo observed."""

import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from alignd.v1 import policy_service_pb2 as pb
from alignd.v1.inference_service_pb2 import SampleResponse
from deploy.config import AligndConfig
from deploy.demo.follow import RunSoFar
from deploy.demo.frontier import as_sent, frontier_of
from deploy.demo.result import DemoResult, Example, Frontier, Stage, Swap, Traffic, TrainingRun, Users
from deploy.demo.users import Tally
from deploy.machine import machine, versions
from deploy.simulation.config import SimulationConfig
from deploy.simulation.prompts import load_prompts
from deploy.simulation.utility import Utility, load_utility, measure
from training.data.intervals import WinRate, win_rate
from training.report.history import read_run
from training.report.summary import KL, WIN_RATE, finding
from training.runs.folder import REPORT_FILE
from training.runs.record import Record

_NUM_EXAMPLES = 3


@dataclass(frozen=True)
class Observed:
    """What the demo saw and received while it ran."""

    before: Sequence[SampleResponse]
    after: Sequence[SampleResponse]
    run: RunSoFar
    replica: pb.ReplicaStatus
    policy: pb.Policy
    seconds_to_first_ranking: float | None


@dataclass(frozen=True)
class Compared:
    """Both policies by what users want."""

    won: WinRate
    frontier: Frontier


def compare(config: AligndConfig, simulation: SimulationConfig, observed: Observed) -> Compared:
    """Compares both policies by the users' utility, of what they answered here and of what the run evaluated.

    Raises:
        UtilityError: a utility is not a finite number.
    """
    prompts, utility = load_prompts("held_out")[: len(observed.before)], load_utility(simulation.utility)
    before, after = _utilities(utility, prompts, observed.before), _utilities(utility, prompts, observed.after)
    samples = read_run(_folder(config, observed.policy)).samples
    sent = [as_sent(simulation, prompt) for prompt in load_prompts("train")]
    kl = observed.run.of("evaluate")[-1][KL]
    return Compared(win_rate(after, before), frontier_of(samples, kl, utility, sent))


def summarize(
    config: AligndConfig,
    simulation: SimulationConfig,
    model: str,
    observed: Observed,
    compared: Compared,
    stages: Sequence[Stage],
    tally: Tally,
) -> DemoResult:
    """Returns the result of the demo."""
    prompts = load_prompts("held_out")[: len(observed.before)]
    where = machine()
    return DemoResult(
        model=model,
        by_utility=compared.won,
        by_reward_model=_reward_model_win_rate(observed.run.of("evaluate")[-1]),
        frontier=compared.frontier,
        run=training_run(config, observed.policy),
        users=Users(simulation.num_users, simulation.agreement, simulation.utility),
        examples=_examples(prompts, observed),
        swap=Swap(observed.replica.pause_seconds, observed.replica.drain_seconds, observed.replica.probe_error),
        traffic=Traffic(tally.samples, tally.rankings, len(tally.failures)),
        stages=stages,
        machine=f"{where['cpu']}, {where['cores']} cores, {where['memory_gib']} GiB, {where['system']}; {_bus(config)}",
        versions=versions(),
        command=shlex.join(["alignd", *sys.argv[1:]]),
        seconds_to_first_ranking=observed.seconds_to_first_ranking,
    )


def _utilities(utility: Utility, prompts: Sequence[str], responses: Sequence[SampleResponse]) -> list[list[float]]:
    """Returns the utility of each prompt's completions."""
    pairs = zip(prompts, responses, strict=True)
    return [measure(utility, prompt, [each.text for each in response.completions]) for prompt, response in pairs]


def _reward_model_win_rate(record: Record) -> WinRate:
    """Returns the win rate that the trainer measured by its reward model, on prompts that it held out itself."""
    return WinRate(
        value=record[WIN_RATE],
        low=record["low"],
        high=record["high"],
        count=int(record["prompts"]),
        wins=int(record["wins"]),
        ties=int(record["ties"]),
        losses=int(record["losses"]),
    )


def _examples(prompts: Sequence[str], observed: Observed) -> list[Example]:
    """Returns the first held-out prompts with both answers. They are not chosen by the answers."""
    shown = zip(prompts, observed.before, observed.after, strict=True)
    return [
        Example(prompt, before.completions[0].text, after.completions[0].text)
        for prompt, before, after in list(shown)[:_NUM_EXAMPLES]
    ]


def training_run(config: AligndConfig, policy: pb.Policy) -> TrainingRun:
    """Returns the run that made the new policy, with what its own report says of it."""
    folder = _folder(config, policy)
    return TrainingRun(
        run_id=folder.name,
        version=policy.version,
        reference=policy.manifest.reference_version,
        num_rankings=policy.manifest.training.num_rankings,
        finding=finding(read_run(folder)),
        report=(folder / REPORT_FILE).relative_to(config.data_dir.resolve()).as_posix(),
    )


def _folder(config: AligndConfig, policy: pb.Policy) -> Path:
    """Returns the folder of the run that made a policy."""
    return config.runs_dir / policy.manifest.training.run_id


def _bus(config: AligndConfig) -> str:
    """Returns which kind of bus there is."""
    return "Kafka bus" if config.bus_url.startswith("kafka://") else "SQLite bus"
