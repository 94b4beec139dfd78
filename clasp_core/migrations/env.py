"""Alembic's entry point: runs inside the connection and transaction that the catalogue opened."""

from alembic import context

context.configure(connection=context.config.attributes["connection"])
context.run_migrations()
