"""Keeps prompts from holding up the event loop: a thread tokenises them, and what cannot fit is refused by its bytes.

A megabyte takes seconds to tokenise. There is one thread, because two cannot use one tokenizer at once, and short
prompts have their turn before long ones, which they hardly delay.
"""

import asyncio
import heapq
import itertools
import json
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, TypeVar

from alignd.v1 import types_pb2
from serving.errors import bad_field, exhausted

T = TypeVar("T")

# With requests of a megabyte, the default limit, these take 256 MiB.
MOST_WAITING = 256
# How many times shorter, in bytes, NFC can make a text: three letters of Hangul become one syllable.
_NFC_SHRINKS = 3
# What the two kinds of tokenizers that know every byte call each of them; that of GPT-2 renames those it cannot print.
_PRINTABLE = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
_OTHERS = itertools.count(0x100)
_BYTE_LEVEL = [chr(byte if byte in _PRINTABLE else next(_OTHERS)) for byte in range(256)]
_BYTE_FALLBACK = [f"<0x{byte:02X}>" for byte in range(256)]


class Tokenising:
    """The thread that tokenises, and who waits for it."""

    def __init__(self) -> None:
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="tokenising")
        self._waiting: list[tuple[int, int, asyncio.Future[None]]] = []
        self._arrivals = itertools.count()
        self._turn: asyncio.Future[None] | None = None

    async def run(self, size: int, work: Callable[..., T], *arguments: Any) -> T:
        """Returns what `work` returns, done in the thread. A caller that leaves before its turn takes no time of it.

        Args:
            size: how long the work takes, compared with others'.
            work: a function.
            arguments: what it is given.

        Raises:
            Refusal: RESOURCE_EXHAUSTED if too many wait for shorter work.
        """
        loop = asyncio.get_running_loop()
        turn: asyncio.Future[None] = loop.create_future()
        waiting = (size, next(self._arrivals), turn)
        heapq.heappush(self._waiting, waiting)
        self._admit()
        if len(self._waiting) > MOST_WAITING:
            longest = max(self._waiting)
            self._forget(longest)
            longest[2].set_exception(exhausted("TOO_MANY_PROMPTS", f"{MOST_WAITING} shorter prompts wait to be read"))
        try:
            await turn
            return await loop.run_in_executor(self._thread, work, *arguments)
        finally:
            if self._turn is turn:
                self._turn = None
            elif waiting in self._waiting:
                self._forget(waiting)
            self._admit()

    def _admit(self) -> None:
        """Gives the shortest that waits its turn."""
        while self._waiting and self._turn is None:
            _, _, turn = heapq.heappop(self._waiting)
            if not turn.done():
                turn.set_result(None)
                self._turn = turn

    def _forget(self, waiting: tuple[int, int, asyncio.Future[None]]) -> None:
        self._waiting.remove(waiting)
        heapq.heapify(self._waiting)


def check_bytes(prompt: types_pb2.Prompt, tokenizer: Any, max_tokens: int) -> None:
    """Checks that a prompt has no more bytes than `max_tokens` tokens could ever hold.

    Blank space and earlier answers do not count: a chat template may leave them out.

    Raises:
        Refusal: INVALID_ARGUMENT, naming the prompt.
    """
    if prompt.ByteSize() <= max_tokens:
        return
    held = bytes_of_a_token(tokenizer)
    if held is None:
        return
    texts = [prompt.text, *(each.content for each in prompt.chat.messages if each.role != types_pb2.ROLE_ASSISTANT)]
    size = sum(len("".join(text.split()).encode().translate(None, held.ignored)) for text in texts)
    if size > max_tokens * held.most:
        what = f"{max_tokens} tokens, the most that leave room for a completion"
        raise bad_field("prompt", f"has {size} bytes, which cannot fit into {what}")


@dataclass(frozen=True)
class TokenBytes:
    """How many bytes of text one token stands for at most, and which bytes are in no token."""

    most: int
    ignored: bytes


@lru_cache(maxsize=1)
def bytes_of_a_token(tokenizer: Any) -> TokenBytes | None:
    """Returns how much text a token holds, or None if no limit is known."""
    backend: Any = getattr(tokenizer, "backend_tokenizer", None)
    shrinks = None if backend is None else _shrinks(backend.normalizer)
    if shrinks is None:
        return None
    before, added = _state(backend.pre_tokenizer), tokenizer.get_added_vocab()
    names = tokenizer.get_vocab().keys() - added.keys()
    if b'"ByteLevel"' in before and b'"Removed"' not in before:
        lengths, alphabet = [len(name) for name in names], _BYTE_LEVEL
    elif getattr(backend.model, "byte_fallback", False) and b'"Removed"' not in before:
        lengths, alphabet = [len(name.encode()) for name in names], _BYTE_FALLBACK
    else:
        # Characters that are in no token are left out, or several of them are one unknown token.
        return None
    ignored = bytes(byte for byte, name in enumerate(alphabet) if name not in names)
    return TokenBytes(shrinks * max(lengths + [len(name.encode()) for name in added]), ignored)


def _shrinks(normalizer: Any) -> int | None:
    """Returns how many times shorter a normalizer can make a text, in bytes; None if no limit is known."""
    if normalizer is None:
        return 1
    found = json.loads(_state(normalizer))
    shrinks = 1
    for each in found.get("normalizers", [found]):
        if each["type"] == "NFC":
            shrinks *= _NFC_SHRINKS
        elif each["type"] == "Replace":
            replaced = each["pattern"].get("String")
            if replaced is None or len(each["content"].encode()) < len(replaced.encode()):
                return None
        elif each["type"] != "Prepend":
            return None
    return shrinks


def _state(part: Any) -> bytes:
    """Returns a part of a tokenizer as JSON."""
    return b"" if part is None else bytes(part.__getstate__())
