"""What one run of the demo found: all that its report shows, and nothing about how it is shown."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from training.data.intervals import Mean, WinRate


@dataclass(frozen=True)
class Example:
    """A held-out prompt, and the answer of each policy to it."""

    prompt: str
    before: str
    after: str


@dataclass(frozen=True)
class Swap:
    """How the new policy went live."""

    pause_seconds: float
    """From the last request of the old version to the first of the new one."""
    drain_seconds: float
    """Before that: how long new requests waited for those in flight to finish."""
    probe_error: float
    """Mean absolute difference between the served log-probabilities of the probes and the trainer's, in nats."""


@dataclass(frozen=True)
class Users:
    """Who asked."""

    count: int
    agreement: float
    """Share of comparisons on which two of them agree."""
    utility: str
    """What they want, as `package.module:function`."""


@dataclass(frozen=True)
class Traffic:
    """All requests of the users, including those while a policy was trained and swapped."""

    samples_served: int
    rankings_served: int
    failed: int
    """Requests of either kind that did not succeed at the first try."""


@dataclass(frozen=True)
class Stage:
    """A stretch of the demo."""

    name: str
    seconds: float


@dataclass(frozen=True)
class TrainingRun:
    """The run that made the new policy. What it measured is in its own report."""

    run_id: str
    version: int
    """The new policy."""
    reference: int
    """The policy that it is compared with."""
    num_rankings: int
    """How many rankings it learned from."""
    finding: str
    """The sentence at the head of its report."""
    report: str
    """The path of its report, from the folder of the demo's."""


@dataclass(frozen=True)
class Gain:
    """How much more users value a policy's completions than the reference policy's, and how far it is from that."""

    kl: float
    """KL from the reference policy, in nats a completion."""
    utility: Mean
    """Utility above the reference policy's, as the mean over prompts."""


@dataclass(frozen=True)
class Frontier:
    """What each step from the reference policy brings: true utility against KL, on the prompts of the evaluation."""

    new_policy: Gain
    best_of_n: Mapping[int, Gain]
    """Of the reference policy's best of n completions by the reward model, for each n above 1."""


@dataclass(frozen=True)
class DemoResult:
    """Everything that the report shows."""

    model: str
    by_utility: WinRate
    """Of the new policy over the reference policy on held-out prompts, by what the users want."""
    by_reward_model: WinRate
    """The same by the reward model, on prompts that the trainer held out."""
    frontier: Frontier
    run: TrainingRun
    users: Users
    examples: Sequence[Example]
    swap: Swap
    traffic: Traffic
    stages: Sequence[Stage]
    machine: str
    versions: Mapping[str, str]
    command: str
    seconds_to_first_ranking: float | None = None
    """From a fresh clone to the first ranking; None where set-up was not part of the demo."""

    @property
    def seconds(self) -> float:
        """All stages together."""
        return sum(stage.seconds for stage in self.stages)

    @property
    def verdict(self) -> str:
        """The finding of the demo, in one sentence."""
        won = self.by_utility
        share = f"{won.value:.0%} of pairs, on {won.count} held-out prompts"
        if won.low > 0.5:
            return f"Users prefer the new policy in {share}."
        if won.high < 0.5:
            return f"Users prefer the reference policy: the new one wins only {share}."
        return f"Users do not clearly prefer either policy: the new one wins {share}."
