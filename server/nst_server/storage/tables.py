"""The schema, as the newest migration leaves it, in types that mean the same to SQLite and to PostgreSQL."""

from __future__ import annotations

import json
from datetime import UTC, datetime
from typing import Any

from sqlalchemy import (
    BigInteger,
    Boolean,
    Column,
    DateTime,
    Dialect,
    ForeignKey,
    Index,
    Integer,
    MetaData,
    String,
    Table,
    Text,
    TypeDecorator,
)

from nst_server.errors import StorageDamaged


class Utc(TypeDecorator[datetime]):
    """A time that knows its zone, kept in UTC. SQLite keeps none."""

    impl = DateTime(timezone=True)
    cache_ok = True

    def process_bind_param(self, value: datetime | None, dialect: Dialect) -> datetime | None:  # noqa: ARG002
        """Return a time for the database. Raises ValueError for one without a zone."""
        if value is not None and value.tzinfo is None:
            raise ValueError(f"{value} has no time zone")
        return value and value.astimezone(UTC)

    def process_result_value(self, value: datetime | None, dialect: Dialect) -> datetime | None:  # noqa: ARG002
        """Return a time from the database."""
        return value and (value.astimezone(UTC) if value.tzinfo else value.replace(tzinfo=UTC))


class Json(TypeDecorator[Any]):
    """JSON as text, which keeps NaN and infinity: losses that PostgreSQL's own type refuses."""

    impl = Text
    cache_ok = True

    def process_bind_param(self, value: Any, dialect: Dialect) -> str | None:  # noqa: ARG002
        """Return a value for the database."""
        return None if value is None else json.dumps(value, ensure_ascii=False, separators=(",", ":"))

    def process_result_value(self, value: str | None, dialect: Dialect) -> Any:  # noqa: ARG002
        """Return a value from the database. Raises StorageDamaged for what is no JSON."""
        try:
            return None if value is None else json.loads(value)
        except ValueError as error:
            raise StorageDamaged(f"a row of the database is damaged: {error}") from error


metadata = MetaData(
    naming_convention={
        "ix": "ix_%(table_name)s_%(column_0_N_name)s",
        "pk": "pk_%(table_name)s",
        "fk": "fk_%(table_name)s_%(column_0_name)s",
    }
)

jobs = Table(
    "jobs",
    metadata,
    Column("id", String(64), primary_key=True),
    Column("create_time", Utc, nullable=False),
    Column("caller", Text, nullable=False),
    Column("request_id", Text, nullable=False),
    Column("request_sha256", String(64), nullable=False),
    Column("state", String(16), nullable=False),
    Column("model", Text, nullable=False),
    Column("width", Integer, nullable=False),
    Column("height", Integer, nullable=False),
    Column("request", Json, nullable=False),
    Column("options", Json, nullable=False),
    Column("start_time", Utc),
    Column("end_time", Utc),
    Column("attempt", Integer, nullable=False),
    Column("owner", Text, nullable=False),
    Column("lease_until", Utc),
    Column("sequence", BigInteger, nullable=False),
    Column("compacted", BigInteger, nullable=False),
    Column("device", Text, nullable=False),
    Column("precision", Text, nullable=False),
    Column("progress", Json),
    Column("result", Json),
    Column("error", Json),
    Column("checkpoint", Json),
    Column("command", Json),
    Column("finishing", Boolean, nullable=False),
    Column("queue_position", Integer, nullable=False),
)
named = jobs.c.request_id != ""
Index("ix_jobs_request", jobs.c.caller, jobs.c.request_id, unique=True, sqlite_where=named, postgresql_where=named)
Index("ix_jobs_newest", jobs.c.create_time, jobs.c.id)
Index("ix_jobs_caller", jobs.c.caller, jobs.c.create_time, jobs.c.id)
Index("ix_jobs_state", jobs.c.state, jobs.c.create_time, jobs.c.id)
leased = jobs.c.owner != ""
Index("ix_jobs_owner", jobs.c.owner, sqlite_where=leased, postgresql_where=leased)

events = Table(
    "events",
    metadata,
    Column("job", ForeignKey(jobs.c.id, ondelete="CASCADE"), primary_key=True),
    Column("sequence", BigInteger, primary_key=True),
    Column("attempt", Integer, nullable=False),
    Column("time", Utc, nullable=False),
    Column("kind", String(32), nullable=False),
    Column("payload", Json, nullable=False),
    sqlite_with_rowid=False,
)

images = Table(
    "images",
    metadata,
    Column("sha256", String(64), primary_key=True),
    Column("bytes", BigInteger, nullable=False),
    Column("width", Integer, nullable=False),
    Column("height", Integer, nullable=False),
    Column("mime", Text, nullable=False),
    Column("caller", Text, nullable=False),
    Column("create_time", Utc, nullable=False),
    Column("last_used", Utc, nullable=False, index=True),
)

job_images = Table(
    "job_images",
    metadata,
    Column("job", ForeignKey(jobs.c.id, ondelete="CASCADE"), primary_key=True),
    Column("sha256", ForeignKey(images.c.sha256), primary_key=True, index=True),
    sqlite_with_rowid=False,
)

uploads = Table(
    "uploads",
    metadata,
    Column("id", String(64), primary_key=True),
    Column("caller", Text, nullable=False),
    Column("size", BigInteger, nullable=False),
    Column("sha256", String(64), nullable=False),
    Column("create_time", Utc, nullable=False, index=True),
    Column("received", BigInteger, nullable=False),
)
