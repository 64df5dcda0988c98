"""Reads what was sampled, ranked and demonstrated from the store, each event once."""

from dataclasses import dataclass
from typing import Any

from sqlalchemy import Column, ColumnElement, Row, Select, Table, and_, exists, func, or_, select, true

from alignd.v1 import events_pb2, types_pb2
from feedback.bus.contract import Position
from feedback.store.engine import open_engine
from feedback.store.tables import DEAD_LETTERS, DEMONSTRATIONS, RANKINGS, SAMPLES

_MICROSECONDS = 1_000_000


@dataclass(frozen=True)
class RankedCompletion:
    """A completion and the rank that its labeler gave it. Rank 0 is the best; equal ranks are a tie."""

    completion_id: str
    text: str
    ended: bool
    """Whether the policy ended it: it was not cut off by a limit, nor, as far as is known, by a stop string."""
    rank: int
    policy_version: int


@dataclass(frozen=True)
class RankedGroup:
    """A ranking with its sample: at least 2 completions, best first. `position` is the ranking's place in the log."""

    seq: int
    ranking_id: str
    sample_id: str
    user_id: str
    prompt: types_pb2.Prompt
    completions: tuple[RankedCompletion, ...]
    position: Position


@dataclass(frozen=True)
class StoredPrompt:
    """A prompt, the sample that it was last sent for, and the user who sent it first."""

    sample_id: str
    first_user_id: str
    prompt: types_pb2.Prompt


@dataclass(frozen=True)
class StoredCompletion:
    """The text that a policy wrote, and whether the policy ended it; see RankedCompletion."""

    text: str
    ended: bool


@dataclass(frozen=True)
class StoredSample:
    """A prompt, the user it was sampled for, and its completions, without those that span a swap."""

    sample_id: str
    user_id: str
    prompt: types_pb2.Prompt
    completions: tuple[StoredCompletion, ...]


@dataclass(frozen=True)
class StoredDemonstration:
    """The answer that a user wanted to a sample's prompt."""

    seq: int
    demonstration_id: str
    sample_id: str
    user_id: str
    prompt: types_pb2.Prompt
    text: str


class Store:
    """The store as the trainer reads it. Safe for use by several threads.

    Raises:
        sqlalchemy.exc.SQLAlchemyError: any method except close, if the database fails.
    """

    def __init__(self, url: str) -> None:
        """Opens the database and brings its tables up to date; see feedback.store.engine.open_engine."""
        self._engine = open_engine(url)

    def num_rankings(self, after_seq: int = 0) -> int:
        """Returns how many rankings were stored after the one with this number."""
        return self._scalar(select(func.count()).where(RANKINGS.c.seq > after_seq))

    def last_seq(self) -> int:
        """Returns the number of the newest ranking; 0 when there is none. Later rankings have greater numbers."""
        return self._scalar(_last_seq(RANKINGS))

    def last_sample_seq(self) -> int:
        """Returns the number of the newest sample; 0 when there is none. Later samples have greater numbers."""
        return self._scalar(_last_seq(SAMPLES))

    def oldest_ranking_time(self, after_seq: int) -> float | None:
        """Returns when the earliest ranking after this number was acknowledged, in Unix seconds; None if none was."""
        earliest = select(func.min(RANKINGS.c.event_time_us)).where(RANKINGS.c.seq > after_seq)
        with self._engine.connect() as connection:
            time_us = connection.execute(earliest).scalar_one()
        return None if time_us is None else time_us / _MICROSECONDS

    def num_dead_letters(self) -> int:
        """Returns how many records could not be used."""
        return self._scalar(select(func.count()).select_from(DEAD_LETTERS))

    def ranked_groups(
        self,
        after_seq: int = 0,
        up_to_seq: int | None = None,
        up_to_sample_seq: int | None = None,
        newest: int | None = None,
    ) -> list[RankedGroup]:
        """Returns rankings with their samples, oldest first; only a user's latest ranking of each sample.

        Three things are left out: rankings whose sample is not stored yet, completions that span a swap, and rankings
        that then have fewer than two completions. A ranking whose sample came late appears under its old number.

        With last_seq() and last_sample_seq() of some moment as bounds, the answer is that of then, whatever was stored
        since.

        Args:
            after_seq: only rankings after this number are read.
            up_to_seq: rankings after this number are not read, and replace none.
            up_to_sample_seq: rankings whose sample is after this number are left out.
            newest: only this many rankings are read, the last ones.
        """
        statement = _current(RANKINGS, after_seq, up_to_seq).where(_up_to(SAMPLES.c.seq, up_to_sample_seq))
        latest_first = statement.order_by(None).order_by(RANKINGS.c.seq.desc()).limit(newest)
        with self._engine.connect() as connection:
            rows = connection.execute(latest_first).all()
        groups = (_ranked_group(row) for row in reversed(rows))
        return [group for group in groups if len(group.completions) >= 2]

    def unranked(
        self, limit: int, up_to_seq: int | None = None, up_to_sample_seq: int | None = None
    ) -> list[StoredSample]:
        """Returns the newest samples that nobody has ranked, of at least two completions; at most `limit` are read.

        `up_to_seq` and `up_to_sample_seq` are bounds as in `ranked_groups`.
        """
        is_ranked = exists().where(RANKINGS.c.sample_id == SAMPLES.c.event_id, _up_to(RANKINGS.c.seq, up_to_seq))
        newest = (
            select(SAMPLES.c.event)
            .where(_up_to(SAMPLES.c.seq, up_to_sample_seq), ~is_ranked)
            .order_by(SAMPLES.c.seq.desc())
            .limit(limit)
        )
        with self._engine.connect() as connection:
            rows = connection.execute(newest).all()
        samples = (_sample(events_pb2.SampleEvent.FromString(row.event)) for row in rows)
        return [sample for sample in samples if len(sample.completions) >= 2]

    def demonstrations(self, after_seq: int = 0) -> list[StoredDemonstration]:
        """Returns the demonstrations after this number, oldest first; only a user's latest of each sample.

        Demonstrations whose sample is not stored yet are left out; they appear under their old numbers once it is.
        """
        with self._engine.connect() as connection:
            rows = connection.execute(_current(DEMONSTRATIONS, after_seq)).all()
        return [_demonstration(row) for row in rows]

    def prompts(self, limit: int, up_to_seq: int | None = None) -> list[StoredPrompt]:
        """Returns the prompts of the samples, each once, the last seen first; at most `limit`.

        With `up_to_seq`, only samples up to this number count, so that the answer does not change when more come.
        """
        newest = (
            select(func.max(SAMPLES.c.seq).label("last"), func.min(SAMPLES.c.seq).label("first"))
            .where(_up_to(SAMPLES.c.seq, up_to_seq))
            .group_by(SAMPLES.c.prompt_digest)
            .order_by(func.max(SAMPLES.c.seq).desc())
            .limit(limit)
            .subquery()
        )
        first = SAMPLES.alias("first")
        rows = (
            select(SAMPLES.c.event_id, SAMPLES.c.event, first.c.user_id.label("first_user_id"))
            .join(newest, SAMPLES.c.seq == newest.c.last)
            .join(first, first.c.seq == newest.c.first)
            .order_by(SAMPLES.c.seq.desc())
        )
        with self._engine.connect() as connection:
            found = connection.execute(rows).all()
        return [
            StoredPrompt(row.event_id, row.first_user_id, events_pb2.SampleEvent.FromString(row.event).prompt)
            for row in found
        ]

    def close(self) -> None:
        """Closes the connections. Safe to call twice."""
        self._engine.dispose()

    def _scalar(self, statement: Select[int]) -> int:
        with self._engine.connect() as connection:
            return connection.execute(statement).scalar_one()


def _last_seq(table: Table) -> Select[int]:
    return select(func.coalesce(func.max(table.c.seq), 0))


def _up_to(seq: Column[Any], last: int | None) -> ColumnElement[bool]:
    return true() if last is None else seq <= last


def _current(table: Table, after_seq: int, up_to_seq: int | None = None) -> Select[Any]:
    """Selects rows with their sample, except those that the same user replaced by a later one up to `up_to_seq`.

    Later means acknowledged later, not stored later. Ids decide between equal times, so that the answer does not depend
    on the order of arrival.
    """
    later = table.alias("later")
    is_replaced = exists().where(
        later.c.sample_id == table.c.sample_id,
        later.c.user_id == table.c.user_id,
        _up_to(later.c.seq, up_to_seq),
        or_(
            later.c.event_time_us > table.c.event_time_us,
            and_(later.c.event_time_us == table.c.event_time_us, later.c.event_id > table.c.event_id),
        ),
    )
    return (
        select(table, SAMPLES.c.event.label("sample"))
        .join(SAMPLES, SAMPLES.c.event_id == table.c.sample_id)
        .where(table.c.seq > after_seq, _up_to(table.c.seq, up_to_seq), ~is_replaced)
        .order_by(table.c.seq)
    )


def _sample(sample: events_pb2.SampleEvent) -> StoredSample:
    whole = tuple(
        StoredCompletion(each.text, _ended(sample, each)) for each in sample.completions if not each.spans_swap
    )
    return StoredSample(sample.event_id, sample.user_id, sample.prompt, whole)


def _ended(sample: events_pb2.SampleEvent, completion: types_pb2.Completion) -> bool:
    # STOP means that the policy ended it or that a stop string was met. If the request had any, no end is assumed.
    return completion.finish_reason == types_pb2.FINISH_REASON_STOP and not sample.sampling.stop


def _demonstration(row: Row[Any]) -> StoredDemonstration:
    prompt = events_pb2.SampleEvent.FromString(row.sample).prompt
    text = events_pb2.DemonstrationEvent.FromString(row.event).text
    return StoredDemonstration(row.seq, row.event_id, row.sample_id, row.user_id, prompt, text)


def _ranked_group(row: Row[Any]) -> RankedGroup:
    sample = events_pb2.SampleEvent.FromString(row.sample)
    ranking = events_pb2.RankingEvent.FromString(row.event)
    completions = {each.completion_id: each for each in sample.completions if not each.spans_swap}
    ranked = tuple(
        RankedCompletion(
            completion_id,
            completions[completion_id].text,
            _ended(sample, completions[completion_id]),
            rank,
            completions[completion_id].policy.version,
        )
        for rank, group in enumerate(ranking.groups)
        for completion_id in group.completion_ids
        if completion_id in completions
    )
    position = Position(row.topic, row.partition, row.offset)
    return RankedGroup(row.seq, row.event_id, row.sample_id, row.user_id, sample.prompt, ranked, position)
