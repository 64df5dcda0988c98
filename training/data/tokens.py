"""Turns what is stored of a sample into the tokens that are learned from: those that the policy drew, where it can.

Text does not say which tokens it was written in: one text has many encodings, and a policy draws others than its
tokenizer would choose. So the tokens themselves are stored. A completion is encoded from its text in three cases only:

- There are no tokens: the sample was stored before tokens were kept, or would have been too long with them.
- They are another tokenizer's, or not of its vocabulary.
- A stop string cut the text inside a token. Users judged the text that they saw, so nothing behind it is learned. Where
  the text ends between two tokens, the tokens up to there are used.

The end token with which the policy ended a completion is stored even where its other tokens are not.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from alignd.v1 import types_pb2
from feedback.store.stored import DrawnTokens, RankedCompletion, StoredCompletion
from policies.encoding import encoder, plain_token_ids
from policies.end_tokens import end_tokens
from policies.rendering import prompt_token_ids

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def sample_prompt_token_ids(
    tokenizer: PreTrainedTokenizerBase,
    prompt: types_pb2.Prompt,
    completions: Sequence[RankedCompletion] | Sequence[StoredCompletion],
) -> tuple[int, ...]:
    """Returns the prompt of a sample with these completions in tokens: as the policy read it, if that is stored.

    Raises:
        jinja2.TemplateError: the prompt has to be rendered, and cannot be.
    """
    read = next((each.drawn for each in completions if each.drawn is not None), None)
    if read is not None and read.prompt and _is_own(tokenizer, read):
        return read.prompt
    return tuple(prompt_token_ids(tokenizer, prompt))


def completion_token_ids(
    tokenizer: PreTrainedTokenizerBase, prompt: types_pb2.Prompt, completion: RankedCompletion | StoredCompletion
) -> tuple[int, ...]:
    """Returns a stored completion of `prompt` in tokens, with the end token if the policy ended it."""
    drawn = completion.drawn
    if drawn is None or not _is_own(tokenizer, drawn):
        return text_token_ids(tokenizer, prompt, completion.text, ended=completion.ended)
    token_ids = _up_to_cut(tokenizer, drawn, completion.text) if drawn.cut else drawn.completion
    if token_ids:
        return token_ids
    end = () if drawn.end_token_id is None else (drawn.end_token_id,)
    return (*plain_token_ids(tokenizer, completion.text), *end)


def text_token_ids(
    tokenizer: PreTrainedTokenizerBase, prompt: types_pb2.Prompt, text: str, *, ended: bool
) -> tuple[int, ...]:
    """Returns a completion's text in tokens, with the end token of this kind of prompt if it has `ended`.

    Text that looks like a control token is text.
    """
    token_ids = plain_token_ids(tokenizer, text)
    return (*token_ids, end_tokens(tokenizer).of_prompt(prompt)) if ended else tuple(token_ids)


def _is_own(tokenizer: PreTrainedTokenizerBase, drawn: DrawnTokens) -> bool:
    """Whether these are tokens of this tokenizer."""
    known = encoder(tokenizer)
    if drawn.tokenizer_digest != known.digest:
        return False
    end = () if drawn.end_token_id is None else (drawn.end_token_id,)
    parts = [part for part in (drawn.prompt, drawn.completion, end) if part]
    return all(min(part) >= 0 and max(part) <= known.largest_id for part in parts)


def _up_to_cut(tokenizer: PreTrainedTokenizerBase, drawn: DrawnTokens, text: str) -> tuple[int, ...] | None:
    """Returns the first tokens that say `text`, decoded as the server did; None if none end where it ends."""
    from tokenizers.decoders import DecodeStream

    backend = encoder(tokenizer).backend
    stream = DecodeStream(ids=list(drawn.prompt), skip_special_tokens=True)
    said = ""
    try:
        for index, token_id in enumerate(drawn.completion):
            if said == text:
                return drawn.completion[:index]
            said += stream.step(backend, token_id) or ""
    except Exception:
        # The library raises plain exceptions for tokens that make no text together.
        return None
    return drawn.completion if said == text else None
