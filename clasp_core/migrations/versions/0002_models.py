"""Vectors by the fingerprint of their model; which model is the active one; the way to another."""

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"


def upgrade() -> None:
    key = sa.BigInteger().with_variant(sa.Integer(), "sqlite")
    op.create_table(
        "models",
        sa.Column("fingerprint", sa.Text, primary_key=True),
        sa.Column("name", sa.Text, nullable=False),
        sa.Column("dim", sa.Integer, nullable=False),
        sa.Column("state", sa.Text, nullable=False),
        sa.Column("hold_until", sa.Float),
        sa.Column("kept_until", sa.Float),
    )
    only = sa.text("state = 'active'")
    op.create_index(
        "one_active_model", "models", ["state"], unique=True, sqlite_where=only, postgresql_where=only
    )
    op.create_table(
        "reindexing",
        sa.Column("recording", key, sa.ForeignKey("recordings.key", ondelete="CASCADE"), primary_key=True),
        sa.Column("model", sa.Text, primary_key=True),
        sa.Column("status", sa.Text, nullable=False),
        sa.Column("duration_s", sa.Float),
        sa.Column("segments", sa.Integer),
        sa.Column("error_code", sa.Text),
        sa.Column("error_detail", sa.Text),
        sa.Column("attempts", sa.Integer, nullable=False),
        sa.Column("lease_owner", sa.Text),
        sa.Column("lease_until", sa.Float),
    )
    op.create_index("reindexing_by_status", "reindexing", ["model", "status", "recording"])
    op.add_column("changes", sa.Column("model", sa.Text))
    op.create_index("changes_by_recording", "changes", ["recording", "seq"])

    # the name of a model was not kept until now: it is filled in when the library is next opened
    op.execute(
        "INSERT INTO models (fingerprint, name, dim, state) "
        "SELECT recordings.model, '', max(length(segments.vector)) / 4, 'active' "
        "FROM recordings JOIN segments ON segments.recording = recordings.key "
        "WHERE recordings.status = 'ready' AND recordings.model IS NOT NULL "
        "GROUP BY recordings.model ORDER BY count(*) DESC LIMIT 1"
    )
    op.execute(
        "UPDATE recordings SET status = 'pending', model = NULL, segments = NULL, attempts = 0 "
        "WHERE status = 'ready' AND model NOT IN (SELECT fingerprint FROM models)"
    )
    op.rename_table("segments", "segments_0001")
    op.create_table(
        "segments",
        sa.Column("recording", key, sa.ForeignKey("recordings.key", ondelete="CASCADE"), nullable=False),
        sa.Column("model", sa.Text, nullable=False),
        sa.Column("ordinal", sa.Integer, nullable=False),
        sa.Column("start_s", sa.Float, nullable=False),
        sa.Column("end_s", sa.Float, nullable=False),
        sa.Column("vector", sa.LargeBinary, nullable=False),
        sa.PrimaryKeyConstraint("recording", "model", "ordinal", name="segments_by_model"),
    )
    op.execute(
        "INSERT INTO segments (recording, model, ordinal, start_s, end_s, vector) "
        "SELECT old.recording, recordings.model, old.ordinal, old.start_s, old.end_s, old.vector "
        "FROM segments_0001 AS old JOIN recordings ON recordings.key = old.recording "
        "WHERE recordings.model IN (SELECT fingerprint FROM models) ORDER BY 1, 3"
    )
    op.drop_table("segments_0001")
