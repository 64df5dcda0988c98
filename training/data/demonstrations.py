"""Makes the data of SFT from the store's demonstrations: in tokens, split by user, with what is left out counted."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from feedback.store.stored import StoredDemonstration
from training.data import census
from training.data.census import Census, LeftOut, not_rendered, take_census
from training.data.dataset import text_of
from training.data.rendering import NotRenderedError, rendered_prompt, rendering
from training.data.split import Side, demonstration_sides
from training.data.tokens import text_token_ids

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Asked = list[tuple[tuple[int, ...], str]]
"""Prompts, in tokens and as text."""


@dataclass(frozen=True)
class Demonstration:
    """A prompt and the completion that a user demonstrated, in tokens; the completion has its end token."""

    prompt: tuple[int, ...]
    completion: tuple[int, ...]


@dataclass(frozen=True)
class Chosen:
    """What SFT learns from, and the prompts that it chooses its best epoch by, in order of their tokens."""

    learned: list[Demonstration]
    asked: Asked
    census: Census


def choose(
    tokenizer: PreTrainedTokenizerBase,
    stored: Sequence[StoredDemonstration],
    *,
    held_out_share: float,
    validation_share: float,
    max_tokens: int,
    max_prompt_tokens: int,
) -> Chosen:
    """Splits demonstrations by user and tokenizes them.

    Left out are demonstrations of more than `max_tokens` with their prompt; prompts of more than `max_prompt_tokens`,
    which the engine has no room for; and what cannot be rendered.
    """
    sides = demonstration_sides(stored, held_out_share=held_out_share, validation_share=validation_share)
    learned: list[Demonstration] = []
    asked: dict[tuple[int, ...], str] = {}
    left_out: list[tuple[str, LeftOut]] = []
    num_measured = 0
    for each, side in zip(stored, sides, strict=True):
        found = LeftOut(census.HELD_OUT_IN_PART) if side is Side.NEITHER else _in_tokens(tokenizer, each)
        if isinstance(found, LeftOut):
            left_out.append((each.sample_id, found))
        elif side is Side.LEARNED and len(found.prompt) + len(found.completion) > max_tokens:
            left_out.append((each.sample_id, LeftOut(census.TOO_LONG)))
        elif side is Side.LEARNED:
            learned.append(found)
        elif len(found.prompt) > max_prompt_tokens:
            left_out.append((each.sample_id, LeftOut(census.PROMPT_TOO_LONG)))
        else:
            num_measured += 1
            asked[found.prompt] = text_of(each.prompt)
    taken = take_census(census.DEMONSTRATIONS, len(learned), num_measured, left_out)
    return Chosen(learned, sorted(asked.items()), taken)


def _in_tokens(tokenizer: PreTrainedTokenizerBase, each: StoredDemonstration) -> Demonstration | LeftOut:
    try:
        prompt = rendered_prompt(tokenizer, each.prompt)
        with rendering():
            # A demonstration is complete, so that it has its end token: in a chat that which closes a turn.
            return Demonstration(prompt, text_token_ids(tokenizer, each.prompt, each.text, ended=True))
    except NotRenderedError as error:
        return not_rendered(error)
