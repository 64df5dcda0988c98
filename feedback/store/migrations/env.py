"""Runs the migrations on the connection, and in the transaction, that feedback.store.engine hands over."""

from alembic import context

from feedback.store.tables import METADATA

context.configure(connection=context.config.attributes["connection"], target_metadata=METADATA)
context.run_migrations()
