"""The prompts of the learning benchmark, kept apart: nothing held out is near anything that is learned from.

They are the simulated users' prompts (deploy/simulation/PROMPTS.md), more from Self-Instruct (Wang et al., arXiv
2212.10560), and a few answers that people wrote or chose. Self-Instruct's user-oriented instructions are held out,
since their authors ask that nothing be trained on them. Every list is shuffled in one fixed order, so that its first n
are a fair sample of size n.
"""

from __future__ import annotations

import gzip
import json
import random
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TypeVar

from bench.learning.data import data_file
from bench.learning.hh_rlhf import Message, messages
from deploy.simulation.make_prompts import PRIVATE, TALKS_TO_MODEL, UNWANTED_WORD, without_near_duplicates
from deploy.simulation.prompts import load_prompts

_SEED = 20221220  # the day Self-Instruct was published
_MAX_PROMPT_CHARACTERS = 300
_MIN_OUTPUT_WORDS = 12  # whoever wants less does not want prose
# A task with one of these words does not ask for prose, or is not fit to be shown.
_UNWANTED_TASK = re.compile(
    r"(?i)\b(?:python|program\w*|code|coding|sql|json|latex|regular expression|sudoku|pars(?:e|ing)|yaml|markdown|"
    r"excel|notation|stereotyp\w+|ssn|address of)\b|[_\[<|]"
)
_HH_SOURCE = "helpful-online"
# Demonstrations of a question of fact, of a request for advice, and of one for a list.
FEW_SHOT_PROMPTS = (
    "What is the pituitary gland?",
    "I'm sooooooo hungry! What's a quick and easy afternoon snack?",
    "Make a list of things to do in the given city.\n\nParis",
)

_T = TypeVar("_T")


@dataclass(frozen=True)
class _Demonstration:
    """A prompt, and an answer to it that a person wrote or chose."""

    prompt: str
    answer: str


def train_prompts(num: int) -> list[str]:
    """Returns `num` prompts to train with: the simulated users', and Self-Instruct's seed tasks.

    Raises:
        ValueError: there are not as many.
        DataMissingError: Self-Instruct is not there.
    """
    known = [*load_prompts("held_out"), *load_prompts("train"), *_user_oriented()]
    seeds = [task.prompt for task in _self_instruct("seed_tasks")]
    return _first(num, [*load_prompts("train"), *_new(known, seeds)], "training prompts")


def held_out_prompts(num: int) -> list[str]:
    """Returns `num` prompts for evaluation only: simulated users', and Self-Instruct's user-oriented instructions.

    Raises:
        ValueError: there are not as many.
        DataMissingError: Self-Instruct is not there.
    """
    return _first(num, [*load_prompts("held_out"), *_user_oriented()], "held-out prompts")


def few_shot_prefix() -> list[Message]:
    """Returns three demonstrations as turns before a prompt: they show the policy the task without training it.

    This is InstructGPT's "GPT-3 (prompted)", section 3.5.

    Raises:
        DataMissingError: a data set is not there.
    """
    known = {each.prompt: each.answer for each in (*_self_instruct("seed_tasks"), *_first_answers())}
    return [
        message
        for prompt in FEW_SHOT_PROMPTS
        for message in (Message("user", prompt), Message("assistant", known[prompt]))
    ]


def _user_oriented() -> list[str]:
    """Returns the user-oriented instructions that are near no prompt of the simulated users."""
    known = [*load_prompts("held_out"), *load_prompts("train")]
    return _new(known, [task.prompt for task in _self_instruct("user_oriented_instructions")])


def _self_instruct(name: str) -> Iterator[_Demonstration]:
    """Yields tasks that ask for prose and are fit to be shown, each with its first instance."""
    for line in data_file(f"self-instruct/{name}.jsonl").read_text(encoding="utf-8").splitlines():
        task = json.loads(line)
        given, output = (task["instances"][0][key].strip() for key in ("input", "output"))
        prompt = "\n\n".join(part for part in (task["instruction"].strip(), given) if part)
        wants_prose = not task.get("is_classification") and len(output.split()) >= _MIN_OUTPUT_WORDS
        unfit = any(pattern.search(prompt) for pattern in (UNWANTED_WORD, _UNWANTED_TASK, PRIVATE, TALKS_TO_MODEL))
        if wants_prose and prompt.isascii() and len(prompt) <= _MAX_PROMPT_CHARACTERS and not unfit:
            yield _Demonstration(prompt, output)


def _first_answers() -> Iterator[_Demonstration]:
    """Yields the first answer of each dialogue: one that was chosen, or that the rest of the dialogue follows."""
    with gzip.open(data_file(f"hh-rlhf/{_HH_SOURCE}.test.jsonl.gz"), "rt", encoding="utf-8") as lines:
        for line in lines:
            asked, answered, *_ = *messages(json.loads(line)["chosen"]), Message("", ""), Message("", "")
            yield _Demonstration(" ".join(asked.text.split()), answered.text)


def _new(known: Sequence[str], prompts: Sequence[str]) -> list[str]:
    """Returns the prompts that are no near duplicates of `known` ones or of each other."""
    return without_near_duplicates([*known, *prompts])[len(known) :]


def _first(num: int, items: Sequence[_T], what: str) -> list[_T]:
    if num > len(items):
        raise ValueError(f"there are {len(items)} {what}, not {num}")
    return random.Random(_SEED).sample(items, len(items))[:num]
