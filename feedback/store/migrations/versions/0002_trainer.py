"""Who trains, and what operators ask of the trainer: a table of one row."""

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Creates the table and its row."""
    trainer = op.create_table(
        "trainer",
        sa.Column("id", sa.Integer, primary_key=True, autoincrement=False),
        sa.Column("holder", sa.Text, nullable=False),
        sa.Column("expires_at_us", sa.BigInteger, nullable=False),
        sa.Column("epoch", sa.BigInteger, nullable=False),
        sa.Column("paused", sa.Integer, nullable=False),
        sa.Column("abort_run", sa.Text, nullable=False),
        sa.CheckConstraint("id = 1", name="trainer_one_row"),
    )
    free = {"id": 1, "holder": "", "expires_at_us": 0, "epoch": 0, "paused": 0, "abort_run": ""}
    op.bulk_insert(trainer, [free])
