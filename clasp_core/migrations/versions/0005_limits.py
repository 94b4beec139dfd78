"""Limits of API keys, and which key uploaded a recording."""

import sqlalchemy as sa
from alembic import op

revision = "0005"
down_revision = "0004"


def upgrade() -> None:
    op.add_column("api_keys", sa.Column("rate", sa.Text))
    op.add_column("api_keys", sa.Column("max_recordings", sa.BigInteger))
    op.add_column("api_keys", sa.Column("max_bytes", sa.BigInteger))
    op.add_column("api_keys", sa.Column("max_hours", sa.Float))
    op.add_column("recordings", sa.Column("uploaded_by", sa.Text))
    # all that a quota is about, so that no recording need be read for it; empty where there are no keys
    somebody_s = sa.text("uploaded_by IS NOT NULL")
    op.create_index(
        "recordings_by_uploader",
        "recordings",
        ["uploaded_by", "size_bytes", "duration_s"],
        sqlite_where=somebody_s,
        postgresql_where=somebody_s,
    )
    op.create_index("recordings_by_size", "recordings", ["size_bytes"])
