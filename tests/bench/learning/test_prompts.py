"""Prompts, none that trains near one that is held out, and the few shots."""

from pathlib import Path

import pytest

from bench.learning import prompts
from deploy.simulation.prompts import load_prompts
from tests.bench.learning.data import task, write_hh, write_self_instruct

LONG = "This is what a person wrote, and it goes on for more than twenty words so that it is long enough to be shown."


def dialogue(prompt: str, answer: str) -> tuple[str, str]:
    return f"\n\nHuman: {prompt}\n\nAssistant: {answer}", f"\n\nHuman: {prompt}\n\nAssistant: No."


@pytest.fixture
def small_data(data: Path) -> Path:
    """Some tasks that should be taken, and some that should not."""
    held_out = load_prompts("held_out")[0]
    fact, snack, paris = prompts.FEW_SHOT_PROMPTS
    seeds = [
        task("Describe a violin to a child.", LONG),
        task("Explain this word to a beginner.", LONG, "origami"),
        task("Is this a fish or a bird?", "Fish", "trout", is_classification=True),
        task("Write a python program that prints a drum.", LONG),
        task("Name a planet.", "Mars"),
        task(held_out, LONG),
        task("Give me some names for a canoe club.", LONG),
        task(paris.split("\n\n")[0], LONG, paris.split("\n\n")[1]),
    ]
    write_self_instruct(data, "seed_tasks", seeds)
    write_self_instruct(data, "user_oriented_instructions", [task("Please suggest names for a canoe club.", LONG)])
    other = dialogue("How do I tune a banjo at home?", LONG + "\n\nHuman: And a lute?\n\nAssistant: Alike.")
    write_hh(data, "helpful-online", [other, dialogue(fact, LONG), dialogue(snack, LONG)])
    return data


def test_prompts_are_the_simulated_users_and_what_asks_for_prose(small_data: Path) -> None:
    train, held_out = prompts.train_prompts(703), prompts.held_out_prompts(201)
    extra = {
        "Describe a violin to a child.",
        "Explain this word to a beginner.\n\norigami",
        prompts.FEW_SHOT_PROMPTS[2],
    }
    assert set(train) == {*load_prompts("train"), *extra}
    assert set(held_out) == {*load_prompts("held_out"), "Please suggest names for a canoe club."}
    assert prompts.train_prompts(50) == train[:50]
    with pytest.raises(ValueError, match="there are 703 training prompts, not 704"):
        prompts.train_prompts(704)
    with pytest.raises(ValueError, match="there are 201 held-out prompts, not 202"):
        prompts.held_out_prompts(202)


def test_few_shot_prefix_is_three_demonstrations_as_turns(small_data: Path) -> None:
    turns = prompts.few_shot_prefix()
    assert [turn.role for turn in turns] == ["user", "assistant"] * 3
    assert tuple(turn.text for turn in turns[::2]) == prompts.FEW_SHOT_PROMPTS
    assert {turn.text for turn in turns[1::2]} == {LONG}
