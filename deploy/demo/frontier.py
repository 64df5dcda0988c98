"""Measures the frontier: what users gain by the new policy, and by the reference's best of n, against its KL.

The trainer's run leaves the completions that it evaluated, with their scores by the reward model. What users want is
known to the demo alone, so that here the same completions get their true utility.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from statistics import fmean

from deploy.demo.result import Frontier, Gain
from deploy.simulation.config import SimulationConfig
from deploy.simulation.user import as_prompt
from deploy.simulation.utility import Utility, measure
from training.data.best_of_n import best_of_n
from training.data.dataset import text_of
from training.data.intervals import mean
from training.runs.folder import SamplePair


@dataclass(frozen=True)
class Sent:
    """A user's prompt, and the text of it that a run's samples have."""

    prompt: str
    text: str


def as_sent(config: SimulationConfig, prompt: str) -> Sent:
    """Returns a user's prompt with its text in a run's samples, where the system prompt comes before it."""
    return Sent(prompt, text_of(as_prompt(config.system_prompt, prompt)))


def frontier_of(samples: Sequence[SamplePair], kl: float, utility: Utility, sent: Sequence[Sent]) -> Frontier:
    """Returns true utility above the reference policy's against KL, on the prompts that the run was evaluated on.

    Args:
        samples: of the run, those of a prompt one after the other.
        kl: of the new policy, as the run measured it on these prompts.
        utility: what users want.
        sent: what users may have asked; samples of other prompts are left out.

    Raises:
        UtilityError: a utility is not a finite number.
        ValueError: nothing of what users may have asked is among the samples.
    """
    asked = {each.text: each.prompt for each in sent}
    by_text = {text: list(pairs) for text, pairs in groupby(samples, key=lambda pair: pair.prompt) if text in asked}
    before = [measure(utility, asked[text], [each.before for each in pairs]) for text, pairs in by_text.items()]
    after = [measure(utility, asked[text], [each.after for each in pairs]) for text, pairs in by_text.items()]
    scores = [[each.before_score for each in pairs if each.before_score is not None] for pairs in by_text.values()]

    def gain(kl: float, values: Sequence[float]) -> Gain:
        return Gain(kl, mean([value - fmean(reference) for value, reference in zip(values, before, strict=True)]))

    return Frontier(
        new_policy=gain(kl, [fmean(each) for each in after]),
        best_of_n={each.n: gain(each.kl, each.values) for each in best_of_n(scores, before) if each.n > 1},
    )
