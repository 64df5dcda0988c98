"""Tells an error that nobody foresaw, without its text, which may quote users."""

from __future__ import annotations

import traceback

_MOST_CAUSES = 10


def told(error: BaseException) -> str:
    """Returns an error's kind, its causes' kinds, and where each was raised, without their texts."""
    causes: list[str] = []
    each: BaseException | None = error
    while each is not None and len(causes) < _MOST_CAUSES:
        frames = "".join(traceback.format_list(traceback.extract_tb(each.__traceback__)))
        causes.append(f"{frames}{type(each).__module__}.{type(each).__qualname__}")
        each = each.__cause__ or (None if each.__suppress_context__ else each.__context__)
    return "\nbecause of\n".join(causes)
