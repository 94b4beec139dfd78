"""API keys; an id is one recording's in its collection and no longer in all; lists by time of arrival."""

from typing import Any

import sqlalchemy as sa
from alembic import op

revision = "0004"
down_revision = "0003"


def upgrade() -> None:
    op.create_table(
        "api_keys",
        sa.Column("id", sa.Text, primary_key=True),
        sa.Column("name", sa.Text, nullable=False, unique=True),
        sa.Column("sha256", sa.Text, nullable=False),
        sa.Column("scopes", sa.JSON, nullable=False),
        sa.Column("collections", sa.JSON),
        sa.Column("created_at", sa.DateTime, nullable=False),
        sa.Column("revoked_at", sa.DateTime),
    )
    if op.get_bind().dialect.name == "sqlite":
        _rebuild_recordings()
    else:
        op.drop_constraint("recordings_id_key", "recordings", type_="unique")
        op.create_unique_constraint("recordings_by_id", "recordings", ["id", "collection"])
    op.create_index("recordings_by_arrival", "recordings", ["created_at", "id", "collection"])
    op.create_index("recordings_by_collection", "recordings", ["collection", "created_at", "id"])
    op.create_index("recordings_by_readiness", "recordings", ["collection", "status", "key"])


def _rebuild_recordings() -> None:
    """SQLite cannot drop a constraint: the table is made anew and put in the place of the old one, to which
    segments go on pointing. The last key that was given out goes with it, so that none is used twice."""
    db = op.get_bind()
    if db.exec_driver_sql("PRAGMA foreign_keys").scalar_one():
        raise RuntimeError("with foreign keys heeded, dropping recordings would delete their segments")
    columns: list[sa.Column[Any]] = [
        sa.Column("key", sa.Integer, primary_key=True, autoincrement=True),
        sa.Column("id", sa.Text, nullable=False),
        sa.Column("collection", sa.Text, nullable=False),
        sa.Column("sha256", sa.Text, nullable=False),
        sa.Column("size_bytes", sa.BigInteger, nullable=False),
        sa.Column("media_type", sa.Text),
        sa.Column("lang", sa.Text),
        sa.Column("metadata", sa.JSON, nullable=False),
        sa.Column("created_at", sa.DateTime, nullable=False),
        sa.Column("status", sa.Text, nullable=False),
        sa.Column("duration_s", sa.Float),
        sa.Column("segments", sa.Integer),
        sa.Column("model", sa.Text),
        sa.Column("error_code", sa.Text),
        sa.Column("error_detail", sa.Text),
        sa.Column("attempts", sa.Integer, nullable=False),
        sa.Column("lease_owner", sa.Text),
        sa.Column("lease_until", sa.Float),
    ]
    names = ", ".join(column.name for column in columns)
    op.create_table(
        "recordings_0004",
        *columns,
        sa.UniqueConstraint("collection", "sha256"),
        sa.UniqueConstraint("id", "collection", name="recordings_by_id"),
        sqlite_autoincrement=True,
    )
    op.execute(f"INSERT INTO recordings_0004 ({names}) SELECT {names} FROM recordings ORDER BY key")  # noqa: S608
    op.execute("DELETE FROM sqlite_sequence WHERE name = 'recordings_0004'")
    op.execute(
        "INSERT INTO sqlite_sequence (name, seq)"
        " SELECT 'recordings_0004', seq FROM sqlite_sequence WHERE name = 'recordings'"
    )
    op.drop_table("recordings")
    op.rename_table("recordings_0004", "recordings")
    op.create_index("ix_recordings_sha256", "recordings", ["sha256"])
    op.create_index("recordings_by_status", "recordings", ["status", "key"])
