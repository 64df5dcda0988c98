"""Turns what is stored into tokens, and says of a sample that it cannot be done rather than ending the trainer."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

from alignd.v1 import types_pb2
from feedback.store.stored import RankedCompletion, StoredCompletion
from policies.rendering import prompt_token_ids
from training.data.tokens import completion_token_ids, sample_prompt_token_ids

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# They say something of the machine, not of what is rendered.
_OF_THE_MACHINE = (OSError, MemoryError)


class NotRenderedError(ValueError):
    """A sample cannot be turned into tokens by this tokenizer and its template; the message says why."""


@contextmanager
def rendering() -> Iterator[None]:
    """Turns whatever a template or a tokenizer raises over the content of a sample into one error.

    A template is a program of the model's author, and the tokenizer is compiled code: no list of their errors would be
    complete.

    Raises:
        NotRenderedError: the block has raised an error, except for one of the machine, which passes as it is.
    """
    try:
        yield
    except (NotRenderedError, *_OF_THE_MACHINE):
        raise
    except BaseException as error:
        # A panic of the compiled tokenizer is no Exception.
        if isinstance(error, Exception) or type(error).__name__ == "PanicException":
            raise NotRenderedError(f"{type(error).__name__}: {error}") from error
        raise


def rendered_prompt(tokenizer: PreTrainedTokenizerBase, prompt: types_pb2.Prompt) -> tuple[int, ...]:
    """Returns the tokens of a stored prompt, at least one.

    Raises:
        NotRenderedError: it cannot be rendered.
    """
    with rendering():
        tokens = tuple(prompt_token_ids(tokenizer, prompt))
    return _some(tokens)


def rendered_sample(
    tokenizer: PreTrainedTokenizerBase,
    prompt: types_pb2.Prompt,
    completions: Sequence[RankedCompletion] | Sequence[StoredCompletion],
) -> tuple[tuple[int, ...], list[tuple[int, ...]]]:
    """Returns the tokens of a sample's prompt, at least one, and of each completion, perhaps none.

    Raises:
        NotRenderedError: the sample cannot be rendered, and its tokens are not stored.
    """
    with rendering():
        tokens = sample_prompt_token_ids(tokenizer, prompt, completions)
        answers = [completion_token_ids(tokenizer, prompt, each) for each in completions]
    return _some(tokens), answers


def _some(prompt_tokens: tuple[int, ...]) -> tuple[int, ...]:
    if not prompt_tokens:
        raise NotRenderedError("the prompt has no token")
    return prompt_tokens
