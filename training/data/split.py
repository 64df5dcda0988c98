"""Decides who is held out, and so what is learned from, what only measures, and what does neither."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from enum import Enum

from feedback.store.stored import StoredDemonstration


class Side(Enum):
    """What a ranking or a demonstration is used for."""

    LEARNED = "learned from"
    MEASURED = "measured with"
    NEITHER = "neither"


def is_held_out(user_id: str, share: float) -> bool:
    """Whether this user is held out. About `share` of all users are; for the same share the answer never changes."""
    digest = hashlib.sha256(b"alignd held-out users\n" + user_id.encode()).digest()
    return int.from_bytes(digest[:8]) < share * 2**64


def side_of(user_id: str, first_user_id: str, share: float) -> Side:
    """Returns the side of what a user said of a prompt that `first_user_id` was the first to send.

    A prompt is held out if that user is, whoever sends it later.
    """
    if is_held_out(user_id, share) != is_held_out(first_user_id, share):
        return Side.NEITHER
    return Side.MEASURED if is_held_out(user_id, share) else Side.LEARNED


def demonstration_sides(
    stored: Sequence[StoredDemonstration], *, held_out_share: float, validation_share: float
) -> list[Side]:
    """Returns the side of each demonstration: SFT learns from it, chooses its best epoch by its prompt, or neither.

    The rule is that for rankings. SFT learns nothing from users and prompts that rankings hold out by `held_out_share`.
    """
    return [_demonstration_side(each, max(held_out_share, validation_share), validation_share) for each in stored]


def _demonstration_side(each: StoredDemonstration, share: float, validation_share: float) -> Side:
    side = side_of(each.user_id, each.first_user_id, share)
    if side is Side.MEASURED and not is_held_out(each.user_id, validation_share):
        return Side.NEITHER
    return side
