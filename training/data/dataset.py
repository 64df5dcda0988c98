"""Makes the data of a run from the store's rankings and prompts: in tokens, and split by user.

Who is held out says training.data.split; the split stays the same at every refresh. Rankings by held-out users of
held-out prompts only measure; the reward model learns from rankings by the other users of the other prompts; all
remaining rankings are left out. All that is left out is counted, with the reason.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING

from alignd.v1 import types_pb2
from feedback import heartbeat
from feedback.store.stored import RankedGroup, StoredPrompt
from training.data import census
from training.data.census import Census, LeftOut, not_rendered, take_census
from training.data.groups import Group, RankedExample
from training.data.readable import differ, has_comparison, lost_comparison, readable
from training.data.rendering import NotRenderedError, rendered_prompt, rendered_sample
from training.data.split import Side, is_held_out, side_of

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

MAX_STORED_PROMPTS = 100_000


@dataclass(frozen=True)
class LogRange:
    """A range of records in one partition of the log."""

    topic: str
    partition: int
    first_offset: int
    last_offset: int


@dataclass(frozen=True)
class TokenizedPrompt:
    """A prompt as text, for people, and in tokens, for the policy."""

    sample_id: str
    text: str
    token_ids: tuple[int, ...]


@dataclass(frozen=True)
class Dataset:
    """Rankings and prompts, each split in two."""

    training: tuple[RankedExample, ...]
    held_out: tuple[RankedExample, ...]
    training_prompts: tuple[TokenizedPrompt, ...]
    held_out_prompts: tuple[TokenizedPrompt, ...]
    rankings: tuple[LogRange, ...]
    """Where in the log the training rankings are."""
    censuses: tuple[Census, Census]
    """What became of the rankings and prompts that were given."""


def make_dataset(
    tokenizer: PreTrainedTokenizerBase,
    groups: Sequence[RankedGroup],
    prompts: Sequence[StoredPrompt],
    *,
    held_out_share: float,
    max_prompt_tokens: int,
    max_group_tokens: int,
) -> Dataset:
    """Splits rankings and prompts by user and tokenizes them.

    Prompts longer than `max_prompt_tokens` are left out, and so are the longest completions of a ranking that is longer
    than `max_group_tokens`. So no row needs more memory than there is, whatever users send. A sample that cannot be
    rendered is left out too, by whichever template.
    """
    as_example = partial(example_of, tokenizer, max_prompt_tokens=max_prompt_tokens, max_group_tokens=max_group_tokens)
    by_side, of_rankings = _split_rankings(groups, held_out_share, as_example)
    asked, of_prompts = _split_prompts(tokenizer, prompts, held_out_share, max_prompt_tokens)
    learned = {example.seq for example in by_side[Side.LEARNED]}
    return Dataset(
        training=tuple(by_side[Side.LEARNED]),
        held_out=tuple(by_side[Side.MEASURED]),
        training_prompts=tuple(asked[Side.LEARNED]),
        held_out_prompts=tuple(asked[Side.MEASURED]),
        rankings=log_ranges([group for group in groups if group.seq in learned]),
        censuses=(of_rankings, of_prompts),
    )


def _split_rankings(
    groups: Sequence[RankedGroup], held_out_share: float, as_example: Callable[[RankedGroup], RankedExample | LeftOut]
) -> tuple[dict[Side, list[RankedExample]], Census]:
    by_side: dict[Side, list[RankedExample]] = {Side.LEARNED: [], Side.MEASURED: []}
    left_out: list[tuple[str, LeftOut]] = []
    num_shortened = num_off_distribution = 0
    for group in heartbeat.each(groups):
        side = side_of(group.user_id, group.first_user_id, held_out_share)
        found = LeftOut(census.HELD_OUT_IN_PART) if side is Side.NEITHER else as_example(group)
        if isinstance(found, LeftOut):
            left_out.append((group.sample_id, found))
            continue
        by_side[side].append(found)
        num_shortened += len(found.ranks) < len(readable(group))
        num_off_distribution += group.off_distribution
    num_learned, num_measured = len(by_side[Side.LEARNED]), len(by_side[Side.MEASURED])
    taken = take_census(census.RANKINGS, num_learned, num_measured, left_out, num_shortened)
    return by_side, replace(taken, num_off_distribution=num_off_distribution)


def _split_prompts(
    tokenizer: PreTrainedTokenizerBase, prompts: Sequence[StoredPrompt], held_out_share: float, max_prompt_tokens: int
) -> tuple[dict[Side, list[TokenizedPrompt]], Census]:
    by_side: dict[Side, list[TokenizedPrompt]] = {Side.LEARNED: [], Side.MEASURED: []}
    left_out: list[tuple[str, LeftOut]] = []
    for each in heartbeat.each(prompts):
        try:
            tokens = rendered_prompt(tokenizer, each.prompt)
        except NotRenderedError as error:
            left_out.append((each.sample_id, not_rendered(error)))
            continue
        if len(tokens) > max_prompt_tokens:
            left_out.append((each.sample_id, LeftOut(census.TOO_LONG)))
            continue
        side = Side.MEASURED if is_held_out(each.first_user_id, held_out_share) else Side.LEARNED
        by_side[side].append(TokenizedPrompt(each.sample_id, text_of(each.prompt), tokens))
    num_learned, num_measured = len(by_side[Side.LEARNED]), len(by_side[Side.MEASURED])
    return by_side, take_census(census.PROMPTS, num_learned, num_measured, left_out)


def example_of(
    tokenizer: PreTrainedTokenizerBase, group: RankedGroup, *, max_prompt_tokens: int, max_group_tokens: int
) -> RankedExample | LeftOut:
    """Returns a ranking in tokens, or why nothing can be learned from it; see `make_dataset`."""
    if not has_comparison(group):
        return LeftOut(census.SPANS_SWAP if lost_comparison(group) else census.NO_COMPARISON)
    try:
        prompt, encoded = rendered_sample(tokenizer, group.prompt, group.completions)
    except NotRenderedError as error:
        return not_rendered(error)
    if len(prompt) > max_prompt_tokens:
        return LeftOut(census.PROMPT_TOO_LONG)
    # A completion that was cut off before its first character has no token to score.
    scored = [(tokens, each.rank) for tokens, each in zip(encoded, group.completions, strict=True) if tokens]
    if not differ(rank for _, rank in scored):
        return LeftOut(census.NO_COMPARISON)
    fitting = _fitting(scored, max_group_tokens - len(prompt))
    if not differ(rank for _, rank in fitting):
        return LeftOut(census.TOO_LONG)
    tokens, ranks = zip(*fitting, strict=True)
    return RankedExample(Group(prompt, tokens), ranks, group.user_id, group.seq)


def log_ranges(groups: Sequence[RankedGroup]) -> tuple[LogRange, ...]:
    """Returns the first and last offset of these rankings in each partition of the log."""
    offsets: dict[tuple[str, int], list[int]] = {}
    for group in groups:
        offsets.setdefault((group.position.topic, group.position.partition), []).append(group.position.offset)
    return tuple(
        LogRange(topic, partition, min(found), max(found)) for (topic, partition), found in sorted(offsets.items())
    )


def _fitting(scored: list[tuple[tuple[int, ...], int]], room: int) -> list[tuple[tuple[int, ...], int]]:
    """Removes the longest completions until the others have room, and returns these in their order."""
    while scored and sum(len(tokens) for tokens, _ in scored) > room:
        scored.remove(max(scored, key=lambda each: len(each[0])))
    return scored


def text_of(prompt: types_pb2.Prompt) -> str:
    """Returns all that a prompt says, one turn a line, for people to read."""
    if prompt.WhichOneof("content") == "text":
        return prompt.text
    return "\n".join(message.content for message in prompt.chat.messages)
