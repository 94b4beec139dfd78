"""What tells this library from others that share an engine with it, and whose turn it is to do what one
process should do for all."""

import sqlalchemy as sa
from alembic import op

revision = "0007"
down_revision = "0006"


def upgrade() -> None:
    op.create_table(
        "library",
        sa.Column("row", sa.Integer, primary_key=True, autoincrement=False),  # 1
        sa.Column("id", sa.Text, nullable=False),
    )
    op.create_table(
        "turns",
        sa.Column("name", sa.Text, primary_key=True),
        sa.Column("owner", sa.Text, nullable=False),
        sa.Column("until", sa.Float, nullable=False),
    )
