"""What waveforms are drawn from: of a recording without such a row, none can be."""

import sqlalchemy as sa
from alembic import op

revision = "0008_bears_0007"
down_revision = "0007"


def upgrade() -> None:
    key = sa.BigInteger().with_variant(sa.Integer(), "sqlite")
    op.create_table(
        "waveforms",
        sa.Column(
            "recording",
            key,
            sa.ForeignKey("recordings.key", ondelete="CASCADE"),
            primary_key=True,
            autoincrement=False,
        ),
        sa.Column("step_s", sa.Float, nullable=False),
        sa.Column("levels", sa.LargeBinary, nullable=False),
    )
