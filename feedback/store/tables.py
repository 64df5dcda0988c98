"""The tables of the store, as SQLAlchemy sees them. The migrations create them."""

from sqlalchemy import (
    BigInteger,
    CheckConstraint,
    Column,
    Index,
    Integer,
    LargeBinary,
    MetaData,
    Table,
    Text,
    UniqueConstraint,
)

METADATA = MetaData()

# In SQLite only a key of the type INTEGER grows by itself.
_Sequence64 = BigInteger().with_variant(Integer, "sqlite")


def _event_columns() -> tuple[Column[object], ...]:
    """Returns the columns that the tables of all events have: the event, and where it stands in the log."""
    return (
        Column("topic", Text, nullable=False),
        Column("partition", Integer, nullable=False),
        Column("offset", BigInteger, nullable=False),
        Column("user_id", Text, nullable=False),
        Column("event_time_us", BigInteger, nullable=False),
        Column("event", LargeBinary, nullable=False),
        Column("content_digest", LargeBinary, nullable=False),
    )


# `seq` grows in the order in which rows became visible, and within a partition in the order of the log.
SAMPLES = Table(
    "samples",
    METADATA,
    Column("seq", _Sequence64, primary_key=True, autoincrement=True),
    Column("event_id", Text, nullable=False),
    Column("prompt_digest", LargeBinary, nullable=False),
    *_event_columns(),
    UniqueConstraint("event_id", name="samples_event_id"),
    Index("samples_prompt", "prompt_digest", "seq"),
    Index("samples_first", "prompt_digest", "event_time_us", "event_id"),
    Index("samples_user", "user_id"),
    sqlite_autoincrement=True,
)

# Two replicas may acknowledge two contents under one id: rankings and demonstrations have a row for each.
RANKINGS = Table(
    "rankings",
    METADATA,
    Column("seq", _Sequence64, primary_key=True, autoincrement=True),
    Column("event_id", Text, nullable=False),
    Column("sample_id", Text, nullable=False),
    *_event_columns(),
    UniqueConstraint("event_id", "content_digest", name="rankings_event_id"),
    Index("rankings_sample", "sample_id", "user_id", "seq"),
    Index("rankings_user", "user_id"),
    sqlite_autoincrement=True,
)

DEMONSTRATIONS = Table(
    "demonstrations",
    METADATA,
    Column("seq", _Sequence64, primary_key=True, autoincrement=True),
    Column("event_id", Text, nullable=False),
    Column("sample_id", Text, nullable=False),
    *_event_columns(),
    UniqueConstraint("event_id", "content_digest", name="demonstrations_event_id"),
    Index("demonstrations_sample", "sample_id"),
    Index("demonstrations_user", "user_id"),
    sqlite_autoincrement=True,
)

# How far ingest has read: written in one transaction with the rows that it read.
OFFSETS = Table(
    "offsets",
    METADATA,
    Column("topic", Text, primary_key=True),
    Column("partition", Integer, primary_key=True, autoincrement=False),
    Column("log_id", Text, nullable=False),
    Column("next_offset", BigInteger, nullable=False),
    # Of the record before `next_offset`, to notice that the log was set back and has grown past it since.
    Column("last_digest", LargeBinary),
    # How often the log was found to have lost records that were read.
    Column("num_losses", Integer, nullable=False, server_default="0"),
)

DEAD_LETTERS = Table(
    "dead_letters",
    METADATA,
    Column("event_id", Text, primary_key=True),
    Column("reason", Text, nullable=False),
    Column("event", LargeBinary, nullable=False),
    Column("event_time_us", BigInteger, nullable=False),
    # Whether the topic of dead letters has it yet.
    Column("published", Integer, nullable=False, server_default="0"),
    Index("dead_letters_published", "published"),
)

# Who trains, and what operators ask of the trainer: one row, which the migration inserts.
TRAINER = Table(
    "trainer",
    METADATA,
    Column("id", Integer, primary_key=True, autoincrement=False),
    # Empty for nobody.
    Column("holder", Text, nullable=False),
    Column("expires_at_us", BigInteger, nullable=False),
    # Grows at every change of holder.
    Column("epoch", BigInteger, nullable=False),
    Column("paused", Integer, nullable=False),
    # The run that is to end; empty for none.
    Column("abort_run", Text, nullable=False),
    # How long the holder takes the lease at a time, and which process it is; see training/runs/lease.py.
    Column("lease_us", BigInteger, nullable=False, server_default="0"),
    Column("process", Text, nullable=False, server_default=""),
    CheckConstraint("id = 1", name="trainer_one_row"),
)
