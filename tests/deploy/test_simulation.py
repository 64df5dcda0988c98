"""Simulated users want what people want, agree as often as people do, and answer the same in every run."""

from __future__ import annotations

import math
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
from pydantic import ValidationError

from deploy.simulation.config import SimulationConfig
from deploy.simulation.labelers import CalibrationError, Labeler, calibrate_temperature, make_labelers
from deploy.simulation.make_prompts import is_fit, without_near_duplicates
from deploy.simulation.prompts import load_prompts
from deploy.simulation.utility import UtilityError, chat_utility, load_utility, measure

QUESTION = "How do I get a red wine stain out of a carpet?"
GOOD = (
    "Blot the stain with a clean cloth, then pour cold water and baking soda on it. Let it dry and vacuum the carpet."
)


@pytest.mark.parametrize(
    ("fault", "completion"),
    [
        ("empty", ""),
        ("one word", "Yes."),
        ("cut off", GOOD[: GOOD.rindex(" the carpet")]),
        ("a list without its last item", "Here is how to clean a carpet:\n1. Blot the stain with cold water.\n2."),
        ("about something else", "The capital of France is Paris, which lies on the Seine and is known for good food."),
        ("a disclaimer", "As an AI language model, I cannot clean carpets. " + GOOD),
        ("a preamble", "I'd be happy to help you with that! " + GOOD),
        ("the prompt said again", QUESTION),
        ("a heap of the prompt's words", "Carpet stain red wine carpet stain red wine carpet stain red wine."),
        ("saying it three times", " ".join([GOOD] * 3)),
    ],
)
def test_a_plain_whole_answer_is_worth_more_than_one_that_is(fault: str, completion: str) -> None:
    assert chat_utility(QUESTION, completion) < chat_utility(QUESTION, GOOD) - 0.02, fault


def test_utility_lies_between_0_and_1() -> None:
    values = measure(chat_utility, QUESTION, ["", "\n", "…", "日本語です。", GOOD, GOOD * 50, "a " * 5000])
    assert all(0.0 <= value <= 1.0 for value in values)


def test_one_word_is_worth_next_to_nothing() -> None:
    assert chat_utility("Is honey good for a sore throat?", "Yes.") < 0.15


def test_any_function_of_prompt_and_completion_is_a_utility(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module = "def brevity(prompt, completion):\n    return -len(completion)\nconstant = 3\n"
    (tmp_path / "someones_taste.py").write_text(module)
    monkeypatch.syspath_prepend(tmp_path)
    assert measure(load_utility("someones_taste:brevity"), QUESTION, ["long", "st"]) == [-4.0, -2.0]
    with pytest.raises(UtilityError, match="has no function 'constant'"):
        load_utility("someones_taste:constant")


@pytest.mark.parametrize(
    ("spec", "complaint"),
    [("no_colon", "package.module:function"), (":f", "package.module:function"), ("no.such:f", "no module named 'no'")],
)
def test_a_utility_that_is_not_there_is_named(spec: str, complaint: str) -> None:
    with pytest.raises(UtilityError, match=complaint):
        load_utility(spec)


def test_a_utility_that_is_no_number_is_refused() -> None:
    with pytest.raises(UtilityError, match="not finite"):
        measure(lambda prompt, completion: math.nan, QUESTION, ["a"])


def test_two_labelers_agree_as_often_as_they_were_calibrated_to() -> None:
    utilities_GK = np.random.default_rng(0).normal(size=(4000, 4))
    temperature = calibrate_temperature(utilities_GK, agreement=0.726)
    first, second = make_labelers(num_users=2, seed=0, temperature=temperature)
    agreed_G = np.array([_agreement(first, second, f"prompt {g}", row) for g, row in enumerate(utilities_GK.tolist())])
    # Comparisons within a group are not independent of each other, groups are.
    standard_error = agreed_G.std(ddof=1) / math.sqrt(len(agreed_G))
    assert standard_error < 0.006
    assert abs(agreed_G.mean() - 0.726) < 3 * standard_error


def test_a_pair_is_chosen_as_bradley_terry_says() -> None:
    labeler = Labeler("u", seed=3, temperature=0.5)
    first_wins = [labeler.rank(f"prompt {i}", ["a", "b"], [0.6, 0.1])[0] == [0] for i in range(4000)]
    expected = 1 / (1 + math.exp(-1.0))
    assert abs(np.mean(first_wins) - expected) < 3 * math.sqrt(expected * (1 - expected) / 4000)


def test_a_labeler_judges_the_same_whatever_the_order_shown_or_the_run() -> None:
    labeler = Labeler("u", seed=3, temperature=0.5)
    assert labeler.rank(QUESTION, ["a", "b", "c"], [0.1, 0.2, 0.3]) == [[2], [1], [0]]
    assert labeler.rank(QUESTION, ["c", "a", "b"], [0.3, 0.1, 0.2]) == [[0], [2], [1]]


def test_completions_of_the_same_text_are_tied() -> None:
    groups = Labeler("u", seed=0, temperature=0.1).rank(QUESTION, ["same", "worse", "same"], [0.9, 0.1, 0.9])
    assert groups == [[0, 2], [1]]


@pytest.mark.parametrize(
    ("groups", "agreement", "complaint"),
    [
        ([[0.1, 0.9]], 0.5, "between 0.5 and 1"),
        ([[0.4, 0.4], [0.2]], 0.7, "nothing to agree on"),
        ([[0.4, 0.4], [0.2, 0.2], [0.1, 0.3]], 0.726, "below 72.6%"),
    ],
)
def test_an_agreement_out_of_reach_is_refused(groups: list[list[float]], agreement: float, complaint: str) -> None:
    with pytest.raises(CalibrationError, match=complaint):
        calibrate_temperature(groups, agreement)


def test_prompts_are_fit_distinct_and_kept_apart() -> None:
    train, held_out = load_prompts("train"), load_prompts("held_out")
    assert (len(train), len(held_out)) == (700, 200)
    assert all(map(is_fit, train + held_out))
    assert without_near_duplicates(held_out + train) == held_out + train


def test_config_refuses_what_it_does_not_know() -> None:
    assert load_utility(SimulationConfig().utility) is chat_utility
    with pytest.raises(ValidationError, match="num_uzers"):
        SimulationConfig.model_validate({"num_uzers": 3})


def _agreement(first: Labeler, second: Labeler, prompt: str, utilities: list[float]) -> float:
    """Share of the comparisons of one group on which both labelers choose the same completion."""
    texts = [f"completion {i}" for i in range(len(utilities))]
    places = []
    for labeler in (first, second):
        groups = labeler.rank(prompt, texts, utilities)
        places.append({i: place for place, group in enumerate(groups) for i in group})
    pairs = list(combinations(range(len(utilities)), 2))
    return sum((places[0][i] < places[0][j]) == (places[1][i] < places[1][j]) for i, j in pairs) / len(pairs)
