"""What one run of the demo found: all that its report tells, and nothing that knows how it is told."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from training.data.intervals import WinRate

Steps = Sequence[Mapping[str, float]]
"""Records of metrics.jsonl, oldest first."""


def first_and_last(steps: Steps, key: str) -> tuple[float, float]:
    """Means of one metric over the first and the last tenth of the steps, at least one each."""
    values = [step[key] for step in steps]
    tenth = max(1, len(values) // 10)
    return sum(values[:tenth]) / tenth, sum(values[-tenth:]) / tenth


@dataclass(frozen=True)
class Example:
    """One held-out prompt, and what each policy made of it."""

    prompt: str
    before: str
    after: str


@dataclass(frozen=True)
class Swap:
    """How the new policy went live."""

    pause_seconds: float
    """How long no new request was admitted to the engine."""
    drain_seconds: float
    """How long the requests in flight were given to finish first."""
    probe_error: float
    """Mean absolute difference between the served log-probabilities of the probes and the trainer's, in nats."""


@dataclass(frozen=True)
class Traffic:
    """What the application asked for in all, while policies were trained and swapped."""

    samples_served: int
    rankings_served: int
    failed: int
    """Requests of either kind that did not succeed at the first try."""


@dataclass(frozen=True)
class Stage:
    """A stretch of the run."""

    name: str
    seconds: float


@dataclass(frozen=True)
class RewardModelFigures:
    """How well the reward model tells what users prefer, on rankings it did not learn from."""

    accuracy: float
    """Share of held-out comparisons in which the chosen completion scores higher."""
    comparisons: int
    """How many those are."""
    labeler_agreement: float
    """Share of comparisons on which two users agree: how well one user's choice predicts another's."""


@dataclass(frozen=True)
class Lineage:
    """Where the new policy comes from."""

    version: int
    weight_digest: str
    parent: int
    reference: int
    algorithm: str
    run_id: str
    seed: int
    num_rankings: int
    ranking_ranges: tuple[str, ...]
    """Ranges of the log, in words: topic, partition, first and last offset."""
    reward_model_digest: str


@dataclass(frozen=True)
class DemoResult:
    """Everything the report tells."""

    model: str
    by_utility: WinRate
    by_reward_model: WinRate
    ppo_steps: Steps
    """Those of phase "ppo"; empty if it was cut short before the first."""
    reward_model: RewardModelFigures
    examples: Sequence[Example]
    swap: Swap
    traffic: Traffic
    stages: Sequence[Stage]
    lineage: Lineage
    machine: str
    versions: Mapping[str, str]
    command: str
    seconds_to_first_ranking: float | None = None
    """From a fresh clone to the first ranking; None where set-up was not part of the run."""

    @property
    def seconds(self) -> float:
        """All stages together."""
        return sum(stage.seconds for stage in self.stages)

    @property
    def verdict(self) -> str:
        """The finding of the run, in one sentence."""
        won = self.by_utility
        share = f"{won.value:.0%} of {won.count} held-out prompts"
        if won.low > 0.5:
            return f"Users prefer the new policy on {share}."
        if won.high < 0.5:
            return f"Users prefer the reference policy: the new one wins on only {share}."
        return f"Users do not clearly prefer either policy: the new one wins on {share}."
