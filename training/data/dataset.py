"""Makes the data of a run from the store's rankings and prompts: in tokens, and split by user.

A hash of their id decides whether a user is held out. A prompt is held out if the first user who sent it is. So the
split stays the same at every refresh. Rankings by held-out users of held-out prompts only measure; the reward model
learns from rankings by the other users of the other prompts; all remaining rankings are left out.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from alignd.v1 import types_pb2
from feedback.store.reader import RankedCompletion, RankedGroup, StoredDemonstration, StoredPrompt
from policies.rendering import prompt_token_ids
from training.data.groups import Group, RankedExample

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
    held_out_texts: frozenset[str]
    """The texts of all held-out prompts, also of those that are too long."""


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
    than `max_group_tokens`. So no row needs more memory than there is, whatever users send.
    """
    held_out_texts = _held_out_texts(groups, prompts, held_out_share)
    tokenized = [_tokenize(tokenizer, prompt) for prompt in _distinct(prompts)]
    short = [prompt for prompt in tokenized if len(prompt.token_ids) <= max_prompt_tokens]
    sides = [(is_held_out(g.user_id, held_out_share), text_of(g.prompt) in held_out_texts, g) for g in groups]
    learned = [group for by_held_out, of_held_out, group in sides if not (by_held_out or of_held_out)]
    measured = [group for by_held_out, of_held_out, group in sides if by_held_out and of_held_out]
    return Dataset(
        training=_examples(tokenizer, learned, max_prompt_tokens, max_group_tokens),
        held_out=_examples(tokenizer, measured, max_prompt_tokens, max_group_tokens),
        training_prompts=tuple(prompt for prompt in short if prompt.text not in held_out_texts),
        held_out_prompts=tuple(prompt for prompt in short if prompt.text in held_out_texts),
        rankings=log_ranges(learned),
        held_out_texts=held_out_texts,
    )  # fmt: skip


def split_demonstrations(
    stored: Sequence[StoredDemonstration],
    prompts: Sequence[StoredPrompt],
    *,
    held_out_share: float,
    validation_share: float,
) -> tuple[list[StoredDemonstration], list[StoredDemonstration]]:
    """Returns the demonstrations that SFT learns from, and those whose prompts are used to choose its best epoch.

    The rule is that for rankings. SFT learns nothing from users and prompts that rankings hold out by `held_out_share`,
    as far as `prompts` lists who was the first to send a prompt.
    """
    share = max(held_out_share, validation_share)
    texts = _held_out_texts(stored, prompts, share)
    return (
        [each for each in stored if not (is_held_out(each.user_id, share) or text_of(each.prompt) in texts)],
        [each for each in stored if is_held_out(each.user_id, validation_share) and text_of(each.prompt) in texts],
    )


def _held_out_texts(
    feedback: Sequence[RankedGroup] | Sequence[StoredDemonstration], prompts: Sequence[StoredPrompt], share: float
) -> frozenset[str]:
    listed = {text_of(each.prompt) for each in prompts}
    # Only the newest prompts are listed. Another prompt counts as first sent by whoever ranked or demonstrated it.
    senders = [(text_of(each.prompt), each.first_user_id) for each in prompts] + [
        (text, each.user_id) for each in feedback if (text := text_of(each.prompt)) not in listed
    ]
    return frozenset(text for text, user in senders if is_held_out(user, share))


def is_held_out(user_id: str, share: float) -> bool:
    """Whether this user is held out. About `share` of all users are; for the same share the answer never changes."""
    digest = hashlib.sha256(b"alignd held-out users\n" + user_id.encode()).digest()
    return int.from_bytes(digest[:8]) < share * 2**64


def completion_token_ids(tokenizer: PreTrainedTokenizerBase, completion: RankedCompletion) -> tuple[int, ...]:
    """Returns a stored completion's text in tokens, with the end token if the policy ended it."""
    return completion_token_ids_of(tokenizer, completion.text, ended=completion.ended)


def completion_token_ids_of(tokenizer: PreTrainedTokenizerBase, text: str, *, ended: bool) -> tuple[int, ...]:
    """Returns a completion's text in tokens, with the end token if the completion has `ended`."""
    # Text that looks like a special token is only text: the server leaves special tokens out when it decodes.
    tokens: list[int] = tokenizer.encode(text, add_special_tokens=False, split_special_tokens=True)
    if ended:
        tokens.append(int(tokenizer.eos_token_id))
    return tuple(tokens)


def log_ranges(groups: Sequence[RankedGroup]) -> tuple[LogRange, ...]:
    """Returns the first and last offset of these rankings in each partition of the log."""
    offsets: dict[tuple[str, int], list[int]] = {}
    for group in groups:
        offsets.setdefault((group.position.topic, group.position.partition), []).append(group.position.offset)
    return tuple(
        LogRange(topic, partition, min(found), max(found)) for (topic, partition), found in sorted(offsets.items())
    )


def _examples(
    tokenizer: PreTrainedTokenizerBase, groups: Sequence[RankedGroup], max_prompt_tokens: int, max_group_tokens: int
) -> tuple[RankedExample, ...]:
    examples = []
    for group in groups:
        prompt = tuple(prompt_token_ids(tokenizer, group.prompt))
        encoded = [(completion_token_ids(tokenizer, each), each.rank) for each in group.completions]
        # A completion that was cut off before its first character has no token to score.
        scored = _fitting([(tokens, rank) for tokens, rank in encoded if tokens], max_group_tokens - len(prompt))
        if len(prompt) <= max_prompt_tokens and len({rank for _, rank in scored}) > 1:
            tokens, ranks = zip(*scored, strict=True)
            examples.append(RankedExample(Group(prompt, tokens), ranks, group.user_id, group.seq))
    return tuple(examples)


def _fitting(scored: list[tuple[tuple[int, ...], int]], room: int) -> list[tuple[tuple[int, ...], int]]:
    """Removes the longest completions until the others have room, and returns these in their order."""
    while scored and sum(len(tokens) for tokens, _ in scored) > room:
        scored.remove(max(scored, key=lambda each: len(each[0])))
    return scored


def _distinct(prompts: Sequence[StoredPrompt]) -> list[StoredPrompt]:
    return list({text_of(prompt.prompt): prompt for prompt in prompts}.values())


def _tokenize(tokenizer: PreTrainedTokenizerBase, prompt: StoredPrompt) -> TokenizedPrompt:
    return TokenizedPrompt(prompt.sample_id, text_of(prompt.prompt), tuple(prompt_token_ids(tokenizer, prompt.prompt)))


def text_of(prompt: types_pb2.Prompt) -> str:
    """Returns all that a prompt says, one turn a line. Prompts with the same text count as the same prompt."""
    if prompt.WhichOneof("content") == "text":
        return prompt.text
    return "\n".join(message.content for message in prompt.chat.messages)
