"""The frontier is the users' own utility of what the run evaluated, and best of n is chosen by the reward model."""

from statistics import fmean

import pytest

from deploy.demo.frontier import as_sent, frontier_of
from deploy.simulation.config import SimulationConfig
from training.runs.folder import SamplePair

SIMULATION = SimulationConfig(system_prompt="Be brief.")
SENT = [as_sent(SIMULATION, prompt) for prompt in ("Why?", "When?", "Never asked")]


def utility(prompt: str, completion: str) -> float:
    """Takes the user's own prompt, without the system prompt."""
    return {"Why?": 10.0, "When?": 0.0}[prompt] + float(completion)


def pairs(text: str, *rows: tuple[float, float, float]) -> list[SamplePair]:
    """Pairs of a prompt: utility and score of the reference's completion, and utility of the new policy's."""
    return [
        SamplePair(text, str(before), str(after), index, score, 0.0)
        for index, (before, score, after) in enumerate(rows)
    ]


SAMPLES = [
    # By score the second of the first prompt is best, and by utility the first.
    *pairs("Be brief.\nWhy?", (3.0, 0.1, 4.0), (1.0, 0.9, 6.0)),
    *pairs("somebody else's prompt", (100.0, 0.0, 0.0), (100.0, 1.0, 0.0)),
    *pairs("Be brief.\nWhen?", (1.0, -2.0, 2.0), (2.0, -1.0, 3.0)),
]


def test_gains_are_over_the_reference_prompt_by_prompt() -> None:
    found = frontier_of(SAMPLES, 4.5, utility, SENT)
    assert found.new_policy.kl == 4.5
    assert found.new_policy.utility.count == 2
    assert found.new_policy.utility.value == pytest.approx(fmean([5.0 - 2.0, 2.5 - 1.5]))
    assert list(found.best_of_n) == [2]
    best = found.best_of_n[2]
    assert best.kl == pytest.approx(0.1931, abs=1e-4)
    assert best.utility.value == pytest.approx(fmean([1.0 - 2.0, 2.0 - 1.5]))


def test_one_completion_of_each_prompt_has_no_best_of_n() -> None:
    alone = [pair for pair in SAMPLES if pair.index == 0]
    assert frontier_of(alone, 1.0, utility, SENT).best_of_n == {}


def test_samples_that_users_did_not_ask_for_are_no_frontier() -> None:
    with pytest.raises(ValueError, match="at least one"):
        frontier_of(SAMPLES[2:4], 1.0, utility, SENT)
