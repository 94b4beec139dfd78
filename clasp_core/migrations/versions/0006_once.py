"""Requests that are to be done once, by their names: what became of them."""

import sqlalchemy as sa
from alembic import op

revision = "0006"
down_revision = "0005"


def upgrade() -> None:
    op.create_table(
        "once",
        sa.Column("name", sa.Text, primary_key=True),
        sa.Column("request", sa.Text, nullable=False),
        sa.Column("recording", sa.BigInteger, nullable=False),
        sa.Column("id", sa.Text, nullable=False),
        sa.Column("created", sa.Boolean, nullable=False),
        sa.Column("created_at", sa.DateTime, nullable=False),
        sa.Column("kept_until", sa.Float, nullable=False),
    )
    op.create_index("once_by_end", "once", ["kept_until"])
