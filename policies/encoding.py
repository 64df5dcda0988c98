"""Encodes text so that none of it becomes a control token, whoever typed it and whichever tokenizer it is.

Every added token of a tokenizer counts as a control token, whether it is flagged as special or not: `<|im_end|>`,
`<tool_call>`. Only those of nothing but white space are text. Text is encoded by a copy of the tokenizer
in which the control tokens have names that nobody knows. So what a person types cannot name one, while the templates'
own are named as they are in the copy. The copy differs in nothing else, and is never changed, so several threads may
use it at once.
"""

from __future__ import annotations

import hashlib
import json
import secrets
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from itertools import groupby
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerBase

# The character that stands for a space in the vocabularies of SentencePiece.
_SPACE_MARK = "\u2581"
_ORDINARY = 0


class EncodingError(ValueError):
    """Text cannot be encoded safely with this tokenizer."""


@dataclass(frozen=True)
class Encoder:
    """A tokenizer whose control tokens nobody can type."""

    secret_names: Mapping[str, str]
    """The secret name of each control token by its text."""
    prefix: tuple[int, ...]
    """What the tokenizer puts before a text: the token that begins one, or nothing."""
    digest: str
    """Names the tokenizer: the SHA-256 of its vocabulary and its rules."""
    largest_id: int
    """The last token of the vocabulary."""
    backend: Tokenizer
    """The tokenizer itself, for decoding."""
    _copy: Tokenizer
    _finder: Tokenizer

    def encode(self, text: str) -> list[int]:
        """Returns the tokens of `text`, without any that begin or end it. Only secret names become control tokens."""
        # Of a batch, because only for one does the library let other threads run meanwhile.
        return list(self._copy.encode_batch_fast([text], add_special_tokens=False)[0].ids)

    def control_token_at_start(self, text: str) -> int | None:
        """Returns the control token that `text` begins with; None if it begins with none."""
        found = self._finder.encode(text, add_special_tokens=False)
        if not found.ids or found.ids[0] == _ORDINARY:
            return None
        start, end = found.offsets[0]
        token_id: int | None = self.backend.token_to_id(text[start:end])
        return token_id

    def replace_control_tokens(self, text: str, replacement: Callable[[str], str]) -> str:
        """Returns `text` with each control token in it replaced; of several at one place, the longest.

        The time that this takes grows with the text alone, however many control tokens there are.
        """
        (found,) = self._finder.encode_batch([text], add_special_tokens=False)
        spans = zip(found.offsets, found.ids, strict=True)
        return "".join(
            replacement(text[start:end]) if token_id != _ORDINARY else text[start:end]
            for (start, end), token_id in spans
        )


_encoders: WeakKeyDictionary[PreTrainedTokenizerBase, Encoder] = WeakKeyDictionary()


def plain_token_ids(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Returns the tokens of `text`, none of them a control token, without any that begin or end it.

    Raises:
        EncodingError: the tokenizer has no such encoding.
    """
    return encoder(tokenizer).encode(text)


def tokenizer_digest(tokenizer: PreTrainedTokenizerBase) -> str:
    """Returns what names a tokenizer: with the same digest, the same token ids mean the same text.

    Raises:
        EncodingError: the tokenizer is not one of the tokenizers library.
    """
    return encoder(tokenizer).digest


def encoder(tokenizer: PreTrainedTokenizerBase) -> Encoder:
    """Returns the encoder of a tokenizer. The first call for a tokenizer takes seconds where it is a large one.

    Raises:
        EncodingError: the tokenizer is not one of the tokenizers library, or its control tokens cannot be renamed.
    """
    if tokenizer not in _encoders:
        _encoders[tokenizer] = _make_encoder(tokenizer)
    return _encoders[tokenizer]


def _make_encoder(tokenizer: PreTrainedTokenizerBase) -> Encoder:
    from tokenizers import Tokenizer

    backend: Tokenizer | None = getattr(tokenizer, "backend_tokenizer", None)
    if not isinstance(backend, Tokenizer):
        raise EncodingError(f"{type(tokenizer).__name__} has no tokenizer.json, as tokenizers of transformers have")
    settings = json.loads(backend.to_str())
    # These two are state: they change with the last call that used them.
    settings["truncation"] = settings["padding"] = None
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()
    vocabulary = settings["model"]["vocab"]
    pieces = set(vocabulary if isinstance(vocabulary, dict) else (piece for piece, _ in vocabulary))
    secret = secrets.token_hex(16)
    # Letters and digits, which no normalizer changes. All have one length, so that none begins another.
    names = {
        added["content"]: f"{secret}{index:08d}"
        for index, added in enumerate(settings["added_tokens"])
        if _is_control(added["content"], pieces)
    }
    for added in settings["added_tokens"]:
        added["content"] = names.get(added["content"], added["content"])
    _rename(settings["model"], names)
    try:
        copy = Tokenizer.from_str(json.dumps(settings))
    except Exception as error:
        # The library raises plain exceptions.
        raise EncodingError(f"the tokenizer's control tokens cannot be renamed: {error}") from error
    moved = [text for text, name in names.items() if copy.token_to_id(name) != backend.token_to_id(text)]
    if moved:
        raise EncodingError(f"the tokenizer's control tokens cannot be renamed: {', '.join(moved[:5])}")
    largest_id = max(backend.get_vocab().values(), default=0)
    return Encoder(names, _prefix(copy), digest, largest_id, backend, copy, _make_finder(names))


def _make_finder(control_tokens: Iterable[str]) -> Tokenizer:
    """Returns what cuts a text into control tokens and the text between them, which is _ORDINARY."""
    from tokenizers import AddedToken, Tokenizer, models

    finder = Tokenizer(models.WordLevel({"": _ORDINARY}, unk_token=""))
    finder.add_tokens([AddedToken(token, normalized=False) for token in control_tokens])
    return finder


def _is_control(text: str, pieces: set[str]) -> bool:
    """Whether an added token is more than text.

    White space is text: runs of spaces are in any code. So is one character that is a piece of the vocabulary, without
    which the character could not be encoded.
    """
    return bool(text.replace(_SPACE_MARK, " ").strip()) and not (len(text) == 1 and text in pieces)


def _rename(model: dict[str, Any], names: Mapping[str, str]) -> None:
    """Renames control tokens in the vocabulary too, where ordinary text could otherwise be cut into them."""
    vocabulary = model["vocab"]
    if isinstance(vocabulary, dict):
        model["vocab"] = {names.get(piece, piece): token_id for piece, token_id in vocabulary.items()}
    else:
        model["vocab"] = [[names.get(piece, piece), score] for piece, score in vocabulary]
    if "merges" in model:
        prefix = model.get("continuing_subword_prefix") or ""
        pairs = [merge.split(" ", 1) if isinstance(merge, str) else merge for merge in model["merges"]]
        model["merges"] = [
            [left, right]
            for left, right in pairs
            if names.keys().isdisjoint((left, right, left + right.removeprefix(prefix)))
        ]
    if isinstance(model.get("unk_token"), str):
        model["unk_token"] = names.get(model["unk_token"], model["unk_token"])


def _prefix(copy: Tokenizer) -> tuple[int, ...]:
    """Returns what the tokenizer puts before a text, each token once: some begin a text twice."""
    bare = copy.encode("a", add_special_tokens=False).ids
    whole = copy.encode("a", add_special_tokens=True).ids
    places = (start for start in range(len(whole) - len(bare) + 1) if whole[start : start + len(bare)] == bare)
    return _each_once(whole[: next(places, 0)])


def _each_once(token_ids: Iterable[int]) -> tuple[int, ...]:
    return tuple(token_id for token_id, _ in groupby(token_ids))
