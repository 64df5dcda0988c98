"""Reads what people preferred in Anthropic's HH-RLHF (Bai et al., arXiv 2204.05862): its texts, splits and tokens."""

from __future__ import annotations

import gzip
import hashlib
import json
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from alignd.v1 import types_pb2
from bench.learning.data import data_file
from policies.encoding import plain_token_ids
from policies.end_tokens import end_tokens
from policies.rendering import prompt_token_ids
from training.data.groups import Group

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_SOURCES = ("helpful-base", "helpful-online", "harmless-base")
_ROLES = {"Human": "user", "Assistant": "assistant"}
_TURNS = {"user": types_pb2.ROLE_USER, "assistant": types_pb2.ROLE_ASSISTANT}
_SPEAKER = re.compile(r"\n\n(Human|Assistant):")
_HELD_OUT_SHARE = 0.25


@dataclass(frozen=True)
class Message:
    """One turn of a conversation; `role` is "user" or "assistant"."""

    role: str
    text: str


@dataclass(frozen=True)
class Comparison:
    """Two completions of one conversation, which ends with a human turn, and which of them a person chose."""

    prompt: tuple[Message, ...]
    chosen: str
    rejected: str
    source: str


@dataclass(frozen=True)
class HumanData:
    """Comparisons in the order of their files, and how many records were left out for which reason."""

    comparisons: tuple[Comparison, ...]
    dropped: dict[str, int]


def read_comparisons(sources: Sequence[str] = _SOURCES) -> HumanData:
    """Reads the test files of the named parts of HH-RLHF.

    Raises:
        DataMissingError: a file is not there.
    """
    comparisons: list[Comparison] = []
    dropped: Counter[str] = Counter()
    for source in sources:
        with gzip.open(data_file(f"hh-rlhf/{source}.test.jsonl.gz"), "rt", encoding="utf-8") as lines:
            for line in lines:
                found = _parse(json.loads(line), source)
                if isinstance(found, Comparison):
                    comparisons.append(found)
                else:
                    dropped[found] += 1
    return HumanData(tuple(comparisons), dict(dropped))


def _parse(record: dict[str, str], source: str) -> Comparison | str:
    """Returns the comparison of one record, or the reason why there is none."""
    chosen, rejected = messages(record["chosen"]), messages(record["rejected"])
    if not (_is_dialogue(chosen) and _is_dialogue(rejected)):
        return "turns do not alternate, or one is empty"
    if chosen[:-1] != rejected[:-1]:
        return "no shared prompt"
    if not (chosen[-1].text and rejected[-1].text):
        return "empty completion"
    if chosen[-1].text == rejected[-1].text:
        return "equal completions"
    return Comparison(chosen[:-1], chosen[-1].text, rejected[-1].text, source)


def messages(transcript: str) -> tuple[Message, ...]:
    """Returns the turns of a transcript, without the white space around them; none if it opens with something else."""
    before, *parts = _SPEAKER.split(transcript)
    if before.strip():
        return ()
    return tuple(Message(_ROLES[who], text.strip()) for who, text in zip(parts[::2], parts[1::2], strict=True))


def _is_dialogue(turns: Sequence[Message]) -> bool:
    """Whether user and assistant take turns, to the assistant's last, and none before that is empty."""
    roles = [turn.role for turn in turns]
    return bool(turns) and roles == ["user", "assistant"] * (len(turns) // 2) and all(turn.text for turn in turns[:-1])


def split(
    comparisons: Iterable[Comparison], share: float = _HELD_OUT_SHARE, salt: str = ""
) -> tuple[list[Comparison], list[Comparison]]:
    """Returns (train, held out), by the first human turn: dialogues that begin alike are all on the same side."""
    sides: tuple[list[Comparison], list[Comparison]] = ([], [])
    for comparison in comparisons:
        sides[is_held_out(comparison.prompt[0].text, share, salt)].append(comparison)
    return sides


def is_held_out(first_turn: str, share: float = _HELD_OUT_SHARE, salt: str = "") -> bool:
    """Whether a prompt is among the `share` drawn by hash, ignoring case and spacing. Another salt is another draw."""
    number = int.from_bytes(hashlib.sha256((salt + beginning(first_turn)).encode()).digest()[:8], "big")
    return number < share * 2**64


def beginning(first_turn: str) -> str:
    """Returns what dialogues that begin alike have in common: their first turn, without its case and spacing."""
    return " ".join(first_turn.lower().split())


def as_group(
    tokenizer: PreTrainedTokenizerBase,
    conversation: Sequence[Message],
    answers: Sequence[str],
    *,
    max_prompt_tokens: int,
    max_completion_tokens: int,
) -> Group:
    """Returns a conversation and answers to it in tokens: its last ones, and the first ones of each answer and its end.

    Raises:
        jinja2.TemplateError: the tokenizer's template refuses the conversation.
    """
    turns = [types_pb2.Message(role=_TURNS[each.role], content=each.text) for each in conversation]
    prompt = prompt_token_ids(tokenizer, types_pb2.Prompt(chat=types_pb2.Chat(messages=turns)))
    end = end_tokens(tokenizer).of_turn
    completions = tuple((*plain_token_ids(tokenizer, each)[:max_completion_tokens], end) for each in answers)
    return Group(tuple(prompt[-max_prompt_tokens:]), completions)
