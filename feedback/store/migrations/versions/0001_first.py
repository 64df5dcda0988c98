"""The first tables: samples, rankings, demonstrations, offsets, dead letters."""

import sqlalchemy as sa
from alembic import op

revision = "0001"
down_revision = None
branch_labels = None
depends_on = None

SEQUENCE = sa.BigInteger().with_variant(sa.Integer, "sqlite")


def upgrade() -> None:
    """Creates the tables."""
    _create_event_table("samples", sa.Column("prompt_digest", sa.LargeBinary, nullable=False))
    op.create_index("samples_prompt", "samples", ["prompt_digest", "seq"])
    for name in ("rankings", "demonstrations"):
        _create_event_table(name, sa.Column("sample_id", sa.Text, nullable=False))
    op.create_index("rankings_sample", "rankings", ["sample_id", "user_id", "event_time_us", "event_id"])
    op.create_index("demonstrations_sample", "demonstrations", ["sample_id"])
    op.create_table(
        "offsets",
        sa.Column("topic", sa.Text, primary_key=True),
        sa.Column("partition", sa.Integer, primary_key=True, autoincrement=False),
        sa.Column("log_id", sa.Text, nullable=False),
        sa.Column("next_offset", sa.BigInteger, nullable=False),
    )
    op.create_table(
        "dead_letters",
        sa.Column("event_id", sa.Text, primary_key=True),
        sa.Column("reason", sa.Text, nullable=False),
        sa.Column("event", sa.LargeBinary, nullable=False),
        sa.Column("event_time_us", sa.BigInteger, nullable=False),
        sa.Column("published", sa.Integer, nullable=False, server_default="0"),
    )
    op.create_index("dead_letters_published", "dead_letters", ["published"])


def _create_event_table(name: str, own: sa.Column[object]) -> None:
    op.create_table(
        name,
        sa.Column("seq", SEQUENCE, primary_key=True, autoincrement=True),
        sa.Column("event_id", sa.Text, nullable=False),
        own,
        sa.Column("topic", sa.Text, nullable=False),
        sa.Column("partition", sa.Integer, nullable=False),
        sa.Column("offset", sa.BigInteger, nullable=False),
        sa.Column("user_id", sa.Text, nullable=False),
        sa.Column("event_time_us", sa.BigInteger, nullable=False),
        sa.Column("event", sa.LargeBinary, nullable=False),
        sa.Column("content_digest", sa.LargeBinary, nullable=False),
        sa.UniqueConstraint("event_id", name=f"{name}_event_id"),
        sqlite_autoincrement=True,
    )
    op.create_index(f"{name}_user", name, ["user_id"])
