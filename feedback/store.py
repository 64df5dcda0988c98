"""What was sampled, ranked and demonstrated, once each: rows in SQLite or PostgreSQL."""

from dataclasses import dataclass
from typing import Any

from sqlalchemy import Row, Select, and_, exists, func, or_, select

from alignd.v1 import events_pb2, types_pb2
from feedback.bus import Position
from feedback.engine import open_engine
from feedback.tables import DEAD_LETTERS, RANKINGS, SAMPLES


@dataclass(frozen=True)
class RankedCompletion:
    """A completion and what its labeler made of it. `rank` 0 is the best; equal ranks are a tie."""

    completion_id: str
    text: str
    finish_reason: types_pb2.FinishReason
    rank: int
    policy_version: int


@dataclass(frozen=True)
class RankedGroup:
    """A ranking joined with its sample: 2 completions or more, best first. `position` is the ranking's in the log."""

    seq: int
    ranking_id: str
    sample_id: str
    user_id: str
    prompt: types_pb2.Prompt
    completions: tuple[RankedCompletion, ...]
    position: Position


@dataclass(frozen=True)
class StoredPrompt:
    """A prompt that somebody sent."""

    sample_id: str
    user_id: str
    prompt: types_pb2.Prompt


class Store:
    """Reads what ingest has written. Safe for use by several threads. Methods raise sqlalchemy.exc.SQLAlchemyError."""

    def __init__(self, url: str) -> None:
        """Opens the database and brings its tables up to date; see feedback.engine.open_engine."""
        self._engine = open_engine(url)

    def num_rankings(self, after_seq: int = 0) -> int:
        """How many rankings were stored after the one with this number."""
        return self._scalar(select(func.count()).where(RANKINGS.c.seq > after_seq))

    def last_seq(self) -> int:
        """The number of the newest ranking; 0 when there is none. Later rankings have greater ones."""
        return self._scalar(select(func.coalesce(func.max(RANKINGS.c.seq), 0)))

    def num_dead_letters(self) -> int:
        """How many records could not be used."""
        return self._scalar(select(func.count()).select_from(DEAD_LETTERS))

    def ranked_groups(self, after_seq: int = 0) -> list[RankedGroup]:
        """The rankings after this number with their samples, oldest first; only a user's latest of each sample.

        Left out are rankings whose sample is not here yet, completions that span a swap, and what then has fewer than
        two completions. A ranking whose sample came late appears under its old number.
        """
        with self._engine.connect() as connection:
            rows = connection.execute(_current_rankings(after_seq)).all()
        groups = (_ranked_group(row) for row in rows)
        return [group for group in groups if len(group.completions) >= 2]

    def prompts(self, limit: int) -> list[StoredPrompt]:
        """The prompts of the samples, each once, the last seen first; at most `limit`."""
        newest = (
            select(func.max(SAMPLES.c.seq).label("seq"))
            .group_by(SAMPLES.c.prompt_digest)
            .order_by(func.max(SAMPLES.c.seq).desc())
            .limit(limit)
            .subquery()
        )
        rows = select(SAMPLES).join(newest, SAMPLES.c.seq == newest.c.seq).order_by(SAMPLES.c.seq.desc())
        with self._engine.connect() as connection:
            found = connection.execute(rows).all()
        return [
            StoredPrompt(row.event_id, row.user_id, events_pb2.SampleEvent.FromString(row.event).prompt)
            for row in found
        ]

    def close(self) -> None:
        """Gives up the connections. Harmless when repeated."""
        self._engine.dispose()

    def _scalar(self, statement: Select[int]) -> int:
        with self._engine.connect() as connection:
            return connection.execute(statement).scalar_one()


def _current_rankings(after_seq: int) -> Select[Any]:
    """Rankings beside their sample, but for those that the same user has replaced with a later one.

    Later is what was acknowledged later, not what arrived later; ids decide between equals, so that the answer does not
    depend on the order of arrival.
    """
    later = RANKINGS.alias("later")
    is_replaced = exists().where(
        later.c.sample_id == RANKINGS.c.sample_id,
        later.c.user_id == RANKINGS.c.user_id,
        or_(
            later.c.event_time_us > RANKINGS.c.event_time_us,
            and_(later.c.event_time_us == RANKINGS.c.event_time_us, later.c.event_id > RANKINGS.c.event_id),
        ),
    )
    return (
        select(RANKINGS, SAMPLES.c.event.label("sample"))
        .join(SAMPLES, SAMPLES.c.event_id == RANKINGS.c.sample_id)
        .where(RANKINGS.c.seq > after_seq, ~is_replaced)
        .order_by(RANKINGS.c.seq)
    )


def _ranked_group(row: Row[Any]) -> RankedGroup:
    sample = events_pb2.SampleEvent.FromString(row.sample)
    ranking = events_pb2.RankingEvent.FromString(row.event)
    completions = {each.completion_id: each for each in sample.completions if not each.spans_swap}
    ranked = tuple(
        RankedCompletion(
            completion_id,
            completions[completion_id].text,
            completions[completion_id].finish_reason,
            rank,
            completions[completion_id].policy.version,
        )
        for rank, group in enumerate(ranking.groups)
        for completion_id in group.completion_ids
        if completion_id in completions
    )
    position = Position(row.topic, row.partition, row.offset)
    return RankedGroup(row.seq, row.event_id, row.sample_id, row.user_id, sample.prompt, ranked, position)
