"""What is said in a segment, by models that write it down."""

import sqlalchemy as sa
from alembic import op

revision = "0003"
down_revision = "0002"


def upgrade() -> None:
    op.add_column("segments", sa.Column("transcript", sa.Text))
