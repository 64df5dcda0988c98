"""Counts the new rankings that a run would learn from, which decide when one begins."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import islice

from feedback.heartbeat import beat
from feedback.store.reader import Store
from feedback.store.stored import RankedGroup, RankingSenders
from training.data.census import HELD_OUT, HELD_OUT_IN_PART, LeftOut
from training.data.split import Side, side_of

_PAGE = 500
# A count that takes longer than this is not repeated at once, and takes no more than a tenth of the time.
_LONG_SECONDS = 1.0
_PAUSES_FOR_EACH_SECOND = 9


@dataclass(frozen=True)
class New:
    """How many rankings are new and would be learned from, and when the oldest of them was given, in Unix seconds."""

    count: int
    oldest: float | None
    left_out: Mapping[str, int] = field(default_factory=dict)
    """How many of those looked at would not be learned from, by reason."""


@dataclass(frozen=True)
class _Count:
    """What was counted, when the store had these as its last, and until when it need not be counted again."""

    asked: tuple[int, int]
    stored: tuple[int, int]
    found: New
    good_until: float


@dataclass
class NewRankings:
    """Counts them again and again, as the store grows.

    A ranking is decoded once: what a user has ranked does not change. Whether it is its user's latest, and who sent its
    prompt first, may, and is asked of the store each time that something was stored.
    """

    store: Store
    held_out_share: float
    left_out: Callable[[RankedGroup], LeftOut | None]
    """Why a ranking that is not held out has nothing to learn from; None if it has."""
    _known: dict[int, str] = field(default_factory=dict)
    _last: _Count | None = None

    def count(self, after_seq: int, most: int) -> New:
        """Counts those after this number, and stops at `most`: however many rankings have come, few are read.

        Raises:
            sqlalchemy.exc.SQLAlchemyError: the database fails.
        """
        asked, stored = (after_seq, most), (self.store.last_seq(), self.store.last_sample_seq())
        last, began = self._last, time.monotonic()
        if last and last.asked == asked and (last.stored == stored or began < last.good_until):
            return last.found
        # What a run has seen is not asked for again.
        self._known = {seq: known for seq, known in self._known.items() if seq > after_seq}
        left_out: Counter[str] = Counter()
        times = [each.time for each in islice(self._teaching(after_seq, left_out), most)]
        found, seconds = New(len(times), min(times, default=None), dict(+left_out)), time.monotonic() - began
        pause = _PAUSES_FOR_EACH_SECOND * seconds if seconds > _LONG_SECONDS else 0.0
        self._last = _Count(asked, stored, found, time.monotonic() + pause)
        return found

    def _teaching(self, after_seq: int, left_out: Counter[str]) -> Iterator[RankingSenders]:
        while page := self.store.ranking_senders(after_seq, _PAGE):
            after_seq = page[-1].seq
            beat()
            sides = [side_of(each.user_id, each.first_user_id, self.held_out_share) for each in page]
            learned = [each for each, side in zip(page, sides, strict=True) if side is Side.LEARNED]
            left_out.update({HELD_OUT: sides.count(Side.MEASURED), HELD_OUT_IN_PART: sides.count(Side.NEITHER)})
            self._look_at([each.seq for each in learned if each.seq not in self._known])
            for each in learned:
                if reason := self._known.get(each.seq):
                    left_out[reason] += 1
                elif each.seq in self._known:
                    yield each

    def _look_at(self, seqs: list[int]) -> None:
        for group in self.store.ranked_groups_of(seqs) if seqs else ():
            found = self.left_out(group)
            self._known[group.seq] = found.reason if found else ""
            beat()
