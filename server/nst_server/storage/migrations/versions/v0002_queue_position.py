"""A job's place in its server's queue, for the other servers to tell."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"


def upgrade() -> None:
    """Add the column; where it is not known, a job is next until its server tells more."""
    op.add_column("jobs", sa.Column("queue_position", sa.Integer, nullable=False, server_default="0"))
