"""Prompts are told apart by what they say, and their first sender is found by time; a lease tells its process."""

import sqlalchemy as sa
from alembic import op
from google.protobuf.message import DecodeError

from alignd.v1 import events_pb2
from feedback.store.prompt_identity import prompt_identity

revision = "0003"
down_revision = "0002"
branch_labels = None
depends_on = None

_BATCH = 500


def upgrade() -> None:
    """Computes the digest of each stored prompt anew, and adds an index and the lease's columns."""
    samples = sa.table("samples", sa.column("seq"), sa.column("event"), sa.column("prompt_digest"))
    connection, last = op.get_bind(), 0
    page = sa.select(samples.c.seq, samples.c.event).order_by(samples.c.seq).limit(_BATCH)
    renew = (
        sa.update(samples)
        .where(samples.c.seq == sa.bindparam("of"))
        .values(prompt_digest=sa.bindparam("digest", type_=sa.LargeBinary))
    )
    while rows := connection.execute(page.where(samples.c.seq > last)).all():
        connection.execute(renew, [{"of": row.seq, "digest": _digest(row.event)} for row in rows])
        last = rows[-1].seq
    op.create_index("samples_first", "samples", ["prompt_digest", "event_time_us", "event_id"])
    op.add_column("trainer", sa.Column("lease_us", sa.BigInteger, nullable=False, server_default="0"))
    op.add_column("trainer", sa.Column("process", sa.Text, nullable=False, server_default=""))


def _digest(event: bytes) -> bytes:
    try:
        return prompt_identity(events_pb2.SampleEvent.FromString(event).prompt)
    except DecodeError:
        # Nothing will be read from it either.
        return b""
