"""Jobs, their events, images and uploads."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0001"
down_revision = None

TIME = sa.DateTime(timezone=True)


def upgrade() -> None:
    """Make the tables."""
    op.create_table(
        "jobs",
        sa.Column("id", sa.String(64), nullable=False),
        sa.Column("create_time", TIME, nullable=False),
        sa.Column("caller", sa.Text, nullable=False),
        sa.Column("request_id", sa.Text, nullable=False),
        sa.Column("request_sha256", sa.String(64), nullable=False),
        sa.Column("state", sa.String(16), nullable=False),
        sa.Column("model", sa.Text, nullable=False),
        sa.Column("width", sa.Integer, nullable=False),
        sa.Column("height", sa.Integer, nullable=False),
        sa.Column("request", sa.Text, nullable=False),
        sa.Column("options", sa.Text, nullable=False),
        sa.Column("start_time", TIME),
        sa.Column("end_time", TIME),
        sa.Column("attempt", sa.Integer, nullable=False),
        sa.Column("owner", sa.Text, nullable=False),
        sa.Column("lease_until", TIME),
        sa.Column("sequence", sa.BigInteger, nullable=False),
        sa.Column("compacted", sa.BigInteger, nullable=False),
        sa.Column("device", sa.Text, nullable=False),
        sa.Column("precision", sa.Text, nullable=False),
        sa.Column("progress", sa.Text),
        sa.Column("result", sa.Text),
        sa.Column("error", sa.Text),
        sa.Column("checkpoint", sa.Text),
        sa.Column("command", sa.Text),
        sa.Column("finishing", sa.Boolean, nullable=False),
        sa.PrimaryKeyConstraint("id", name="pk_jobs"),
    )
    named, leased = sa.text("request_id != ''"), sa.text("owner != ''")
    op.create_index(
        "ix_jobs_request", "jobs", ["caller", "request_id"], unique=True, sqlite_where=named, postgresql_where=named
    )
    op.create_index("ix_jobs_newest", "jobs", ["create_time", "id"])
    op.create_index("ix_jobs_caller", "jobs", ["caller", "create_time", "id"])
    op.create_index("ix_jobs_state", "jobs", ["state", "create_time", "id"])
    op.create_index("ix_jobs_owner", "jobs", ["owner"], sqlite_where=leased, postgresql_where=leased)
    op.create_table(
        "events",
        sa.Column("job", sa.String(64), nullable=False),
        sa.Column("sequence", sa.BigInteger, nullable=False),
        sa.Column("attempt", sa.Integer, nullable=False),
        sa.Column("time", TIME, nullable=False),
        sa.Column("kind", sa.String(32), nullable=False),
        sa.Column("payload", sa.Text, nullable=False),
        sa.PrimaryKeyConstraint("job", "sequence", name="pk_events"),
        sa.ForeignKeyConstraint(["job"], ["jobs.id"], name="fk_events_job", ondelete="CASCADE"),
        sqlite_with_rowid=False,
    )
    op.create_table(
        "images",
        sa.Column("sha256", sa.String(64), nullable=False),
        sa.Column("bytes", sa.BigInteger, nullable=False),
        sa.Column("width", sa.Integer, nullable=False),
        sa.Column("height", sa.Integer, nullable=False),
        sa.Column("mime", sa.Text, nullable=False),
        sa.Column("caller", sa.Text, nullable=False),
        sa.Column("create_time", TIME, nullable=False),
        sa.Column("last_used", TIME, nullable=False),
        sa.PrimaryKeyConstraint("sha256", name="pk_images"),
    )
    op.create_index("ix_images_last_used", "images", ["last_used"])
    op.create_table(
        "job_images",
        sa.Column("job", sa.String(64), nullable=False),
        sa.Column("sha256", sa.String(64), nullable=False),
        sa.PrimaryKeyConstraint("job", "sha256", name="pk_job_images"),
        sa.ForeignKeyConstraint(["job"], ["jobs.id"], name="fk_job_images_job", ondelete="CASCADE"),
        sa.ForeignKeyConstraint(["sha256"], ["images.sha256"], name="fk_job_images_sha256"),
        sqlite_with_rowid=False,
    )
    op.create_index("ix_job_images_sha256", "job_images", ["sha256"])
    op.create_table(
        "uploads",
        sa.Column("id", sa.String(64), nullable=False),
        sa.Column("caller", sa.Text, nullable=False),
        sa.Column("size", sa.BigInteger, nullable=False),
        sa.Column("sha256", sa.String(64), nullable=False),
        sa.Column("create_time", TIME, nullable=False),
        sa.Column("received", sa.BigInteger, nullable=False),
        sa.PrimaryKeyConstraint("id", name="pk_uploads"),
    )
    op.create_index("ix_uploads_create_time", "uploads", ["create_time"])
