"""Recordings, their segments with vectors, and the sequence of changes."""

import sqlalchemy as sa
from alembic import op

revision = "0001"
down_revision = None


def upgrade() -> None:
    key = sa.BigInteger().with_variant(sa.Integer(), "sqlite")
    op.create_table(
        "recordings",
        sa.Column("key", key, primary_key=True, autoincrement=True),
        sa.Column("id", sa.Text, nullable=False, unique=True),
        sa.Column("collection", sa.Text, nullable=False),
        sa.Column("sha256", sa.Text, nullable=False, index=True),
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
        sa.UniqueConstraint("collection", "sha256"),
        sqlite_autoincrement=True,
    )
    op.create_index("recordings_by_status", "recordings", ["status", "key"])
    op.create_table(
        "segments",
        sa.Column("recording", key, sa.ForeignKey("recordings.key", ondelete="CASCADE"), primary_key=True),
        sa.Column("ordinal", sa.Integer, primary_key=True),
        sa.Column("start_s", sa.Float, nullable=False),
        sa.Column("end_s", sa.Float, nullable=False),
        sa.Column("vector", sa.LargeBinary, nullable=False),
    )
    op.create_table(
        "changes",
        sa.Column("seq", key, primary_key=True, autoincrement=True),
        sa.Column("recording", key, nullable=False),
        sa.Column("token", sa.Text, nullable=False),
        sqlite_autoincrement=True,
    )
