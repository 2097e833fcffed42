"""Run by Alembic, on the connection and in the transaction of whoever opens the database."""

from __future__ import annotations

from alembic import context

from nst_server.storage.tables import metadata

context.configure(connection=context.config.attributes["connection"], target_metadata=metadata, transactional_ddl=True)
with context.begin_transaction():
    context.run_migrations()
