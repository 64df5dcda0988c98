"""Says which tokens end a completion, alike for the server, rollouts, the reward model and SFT.

A model may have several: that of its tokenizer, those of its generation_config.json, which vLLM obeys whatever a server
asks for, and the one with which its chat template closes a turn. They need not be the same: of Llama 3's three, chats
end with one and other texts with another. Whichever the policy draws ends its completion and stays in it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import jinja2

from alignd.v1 import types_pb2
from policies.encoding import encoder
from policies.rendering import render_conversation

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_TURNS = ({"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Hello"})


class EndTokenError(ValueError):
    """A model has no token that ends a completion."""


@dataclass(frozen=True)
class EndTokens:
    """The tokens that end a completion."""

    token_ids: tuple[int, ...]
    """All of them, in ascending order."""
    of_turn: int
    """The one that closes the assistant's turn in a chat."""
    of_text: int
    """The one that ends a text without a template."""

    def of_prompt(self, prompt: types_pb2.Prompt) -> int:
        """Returns the one that ends a completion of this prompt where its text is all that is known."""
        return self.of_turn if prompt.WhichOneof("content") == "chat" else self.of_text


_found: WeakKeyDictionary[PreTrainedTokenizerBase, EndTokens] = WeakKeyDictionary()


def end_tokens(tokenizer: PreTrainedTokenizerBase) -> EndTokens:
    """Returns the end tokens of the model from whose folder the tokenizer was loaded.

    Raises:
        EndTokenError: it has none, or what its files say of them is no token id.
        EncodingError: the tokenizer is not one of the tokenizers library.
    """
    if tokenizer not in _found:
        _found[tokenizer] = _end_tokens(Path(tokenizer.name_or_path), tokenizer)
    return _found[tokenizer]


def _end_tokens(folder: Path, tokenizer: PreTrainedTokenizerBase) -> EndTokens:
    configured = _configured(folder)
    of_text = tokenizer.eos_token_id if tokenizer.eos_token_id is not None else next(iter(configured), None)
    of_turn = _of_turn(tokenizer)
    found = {each for each in (*configured, of_text, of_turn) if each is not None}
    vocabulary_size = _vocabulary_size(folder)
    beyond = sorted(token_id for token_id in found if not 0 <= token_id < vocabulary_size)
    if beyond:
        raise EndTokenError(
            f"the end token {beyond[0]} is not among the {vocabulary_size} tokens of the model: correct eos_token_id "
            "in generation_config.json, and the tokenizer's eos_token"
        )
    if of_turn is None:
        of_turn = of_text
    if of_text is None:
        of_text = of_turn
    if of_turn is None or of_text is None:
        raise EndTokenError(
            "the model has no end token, so that no completion would ever end: name it as eos_token_id in "
            "generation_config.json"
        )
    return EndTokens(tuple(sorted(found)), int(of_turn), int(of_text))


def _configured(folder: Path) -> list[int]:
    """Returns the end tokens of generation_config.json, or without that file of config.json, in their order."""
    path = folder / "generation_config.json"
    named = _settings(path if path.exists() else folder / "config.json").get("eos_token_id")
    listed = named if isinstance(named, list) else [] if named is None else [named]
    wrong = [each for each in listed if type(each) is not int]
    if wrong:
        raise EndTokenError(f"eos_token_id should be the number of a token, or a list of them, not {named!r}")
    return listed


def _vocabulary_size(folder: Path) -> int:
    """Returns how many tokens the model can draw. Models of text and images have their text's settings apart."""
    settings = _settings(folder / "config.json")
    return int(settings.get("vocab_size") or settings.get("text_config", {}).get("vocab_size") or 2**31)


def _settings(path: Path) -> Mapping[str, Any]:
    try:
        settings = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise EndTokenError(f"{path.name} cannot be read: {error}") from error
    return settings if isinstance(settings, dict) else {}


def _of_turn(tokenizer: PreTrainedTokenizerBase) -> int | None:
    """Returns the control token with which the chat template closes a turn; None if it does so otherwise."""
    try:
        continued, closed = (render_conversation(tokenizer, _TURNS, ending=each) for each in ("continued", "closed"))
    except jinja2.TemplateError:
        return None
    ending = closed[len(continued) :].lstrip()
    if not closed.startswith(continued):
        return None
    return encoder(tokenizer).control_token_at_start(ending)
