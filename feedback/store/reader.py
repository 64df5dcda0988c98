"""Reads what was sampled, ranked and demonstrated from the store, each event once."""

from collections.abc import Sequence
from typing import Any

from sqlalchemy import Column, ColumnElement, Label, Select, Table, exists, func, select, true

from alignd.v1 import events_pb2
from feedback.store.engine import open_engine
from feedback.store.stored import (
    RankedGroup,
    RankingSenders,
    StoredDemonstration,
    StoredPrompt,
    StoredSample,
    Tally,
    demonstration_of,
    ranked_group_of,
    sample_of,
)
from feedback.store.tables import DEAD_LETTERS, DEMONSTRATIONS, OFFSETS, RANKINGS, SAMPLES

_MICROSECONDS = 1_000_000


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

    def ranking_senders(self, after_seq: int, limit: int) -> list[RankingSenders]:
        """Returns who gave the rankings after this number that `ranked_groups` would return; the oldest ones."""
        columns = (RANKINGS.c.seq, RANKINGS.c.user_id, RANKINGS.c.event_time_us, _first_user(None))
        statement = _current(RANKINGS, after_seq).with_only_columns(*columns).limit(limit)
        with self._engine.connect() as connection:
            rows = connection.execute(statement).all()
        return [
            RankingSenders(row.seq, row.user_id, row.first_user_id, row.event_time_us / _MICROSECONDS) for row in rows
        ]

    def tally_rankings(self, up_to_seq: int | None = None, up_to_sample_seq: int | None = None) -> Tally:
        """Counts rankings, and those that `ranked_groups` leaves out with the same bounds."""
        return self._tally(RANKINGS, up_to_seq, up_to_sample_seq)

    def tally_demonstrations(self) -> Tally:
        """Counts demonstrations, and those that `demonstrations` leaves out."""
        return self._tally(DEMONSTRATIONS, None, None)

    def num_prompts(self, up_to_seq: int | None = None) -> int:
        """Returns how many prompts there are; see `prompts`."""
        distinct = func.count(SAMPLES.c.prompt_digest.distinct())
        return self._scalar(select(distinct).where(_up_to(SAMPLES.c.seq, up_to_seq)))

    def num_dead_letters(self) -> int:
        """Returns how many records could not be used."""
        return self._scalar(select(func.count()).select_from(DEAD_LETTERS))

    def num_losses(self) -> int:
        """Returns how often a partition of the log was found to have lost records that were stored."""
        return self._scalar(select(func.coalesce(func.sum(OFFSETS.c.num_losses), 0)))

    def ranked_groups(
        self,
        after_seq: int = 0,
        up_to_seq: int | None = None,
        up_to_sample_seq: int | None = None,
        newest: int | None = None,
    ) -> list[RankedGroup]:
        """Returns rankings with their samples, oldest first; only a user's latest ranking of each sample.

        Rankings whose sample is not stored yet are left out. A ranking whose sample came late appears under its old
        number. All that span a swap is left out of its completions, so that few or none may remain.

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
            rows = connection.execute(latest_first.add_columns(_first_user(up_to_sample_seq))).all()
        return [ranked_group_of(row) for row in reversed(rows)]

    def ranked_groups_of(self, seqs: Sequence[int]) -> list[RankedGroup]:
        """Returns the rankings of these numbers as `ranked_groups` does."""
        statement = _current(RANKINGS, 0).where(RANKINGS.c.seq.in_(seqs)).add_columns(_first_user(None))
        with self._engine.connect() as connection:
            rows = connection.execute(statement).all()
        return [ranked_group_of(row) for row in rows]

    def unranked(
        self, limit: int, up_to_seq: int | None = None, up_to_sample_seq: int | None = None
    ) -> list[StoredSample]:
        """Returns the newest samples that nobody has ranked, of at least two completions; at most `limit` are read.

        `up_to_seq` and `up_to_sample_seq` are bounds as in `ranked_groups`.
        """
        is_ranked = exists().where(RANKINGS.c.sample_id == SAMPLES.c.event_id, _up_to(RANKINGS.c.seq, up_to_seq))
        newest = (
            select(SAMPLES.c.event, _first_user(up_to_sample_seq))
            .where(_up_to(SAMPLES.c.seq, up_to_sample_seq), ~is_ranked)
            .order_by(SAMPLES.c.seq.desc())
            .limit(limit)
        )
        with self._engine.connect() as connection:
            rows = connection.execute(newest).all()
        samples = (sample_of(events_pb2.SampleEvent.FromString(row.event), row.first_user_id) for row in rows)
        return [sample for sample in samples if len(sample.completions) >= 2]

    def demonstrations(self, after_seq: int = 0) -> list[StoredDemonstration]:
        """Returns the demonstrations after this number, oldest first; only a user's latest of each sample.

        Demonstrations whose sample is not stored yet are left out; they appear under their old numbers once it is.
        """
        with self._engine.connect() as connection:
            rows = connection.execute(_current(DEMONSTRATIONS, after_seq).add_columns(_first_user(None))).all()
        return [demonstration_of(row) for row in rows]

    def prompts(self, limit: int, up_to_seq: int | None = None) -> list[StoredPrompt]:
        """Returns the prompts of the samples, each once, the last seen first; at most `limit`.

        With `up_to_seq`, only samples up to this number count, so that the answer does not change when more come.
        """
        newest = (
            select(func.max(SAMPLES.c.seq).label("last"))
            .where(_up_to(SAMPLES.c.seq, up_to_seq))
            .group_by(SAMPLES.c.prompt_digest)
            .order_by(func.max(SAMPLES.c.seq).desc())
            .limit(limit)
            .subquery()
        )
        rows = (
            select(SAMPLES.c.event_id, SAMPLES.c.event, _first_user(up_to_seq))
            .join(newest, SAMPLES.c.seq == newest.c.last)
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

    def _tally(self, table: Table, up_to_seq: int | None, up_to_sample_seq: int | None) -> Tally:
        within = _up_to(table.c.seq, up_to_seq)
        has_sample = exists().where(SAMPLES.c.event_id == table.c.sample_id, _up_to(SAMPLES.c.seq, up_to_sample_seq))
        current = _current(table, 0, up_to_seq).where(_up_to(SAMPLES.c.seq, up_to_sample_seq)).order_by(None)
        stored = self._scalar(select(func.count()).select_from(table).where(within))
        joined = self._scalar(select(func.count()).select_from(table).where(within, has_sample))
        read = self._scalar(select(func.count()).select_from(current.with_only_columns(table.c.seq).subquery()))
        return Tally(stored, stored - joined, joined - read)

    def _scalar(self, statement: Select[int]) -> int:
        with self._engine.connect() as connection:
            return connection.execute(statement).scalar_one()


def _last_seq(table: Table) -> Select[int]:
    return select(func.coalesce(func.max(table.c.seq), 0))


def _up_to(seq: Column[Any], last: int | None) -> ColumnElement[bool]:
    return true() if last is None else seq <= last


def _first_user(up_to_sample_seq: int | None) -> Label[str]:
    """Selects `first_user_id`: who was the first, by event time, to send the prompt of a sample. Ids decide ties."""
    first = SAMPLES.alias("first")
    return (
        select(first.c.user_id)
        .where(first.c.prompt_digest == SAMPLES.c.prompt_digest, _up_to(first.c.seq, up_to_sample_seq))
        .order_by(first.c.event_time_us, first.c.event_id)
        .limit(1)
        .correlate(SAMPLES)
        .scalar_subquery()
        .label("first_user_id")
    )


def _current(table: Table, after_seq: int, up_to_seq: int | None = None) -> Select[Any]:
    """Selects rows with their sample, except those that the same user replaced by a later one up to `up_to_seq`.

    Later means later in the log, where all feedback on a sample stands in one partition, and not by a clock, which may
    be set back. Numbers have this order, so a store that is built again from the log gives the same answer; unless the
    log had lost records, and was filled again in another order.
    """
    later = table.alias("later")
    is_replaced = exists().where(
        later.c.sample_id == table.c.sample_id,
        later.c.user_id == table.c.user_id,
        _up_to(later.c.seq, up_to_seq),
        later.c.seq > table.c.seq,
    )
    return (
        select(table, SAMPLES.c.event.label("sample"))
        .join(SAMPLES, SAMPLES.c.event_id == table.c.sample_id)
        .where(table.c.seq > after_seq, _up_to(table.c.seq, up_to_seq), ~is_replaced)
        .order_by(table.c.seq)
    )
