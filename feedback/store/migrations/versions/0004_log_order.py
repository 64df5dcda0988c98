"""What the log decides: which of two rankings counts, two contents under one id, and whether a log was set back."""

import sqlalchemy as sa
from alembic import op

revision = "0004"
down_revision = "0003"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Adds columns to the offsets, and lets an id have several contents."""
    op.add_column("offsets", sa.Column("last_digest", sa.LargeBinary, nullable=True))
    op.add_column("offsets", sa.Column("num_losses", sa.Integer, nullable=False, server_default="0"))
    for name in ("rankings", "demonstrations"):
        # SQLite cannot change a constraint; there the table is copied. Its numbers must not be given out again.
        with op.batch_alter_table(name, table_kwargs={"sqlite_autoincrement": True}) as table:
            table.drop_constraint(f"{name}_event_id", type_="unique")
            table.create_unique_constraint(f"{name}_event_id", ["event_id", "content_digest"])
    op.drop_index("rankings_sample", "rankings")
    op.create_index("rankings_sample", "rankings", ["sample_id", "user_id", "seq"])
