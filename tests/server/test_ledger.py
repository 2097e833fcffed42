"""Jobs as they are stored, between servers that share the store."""

from __future__ import annotations

import contextlib
import datetime as datetimes
from collections.abc import AsyncIterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio
from structlog.testing import capture_logs

from nst_server.errors import Moved, NotFound
from nst_server.jobs import Job, JobSnapshot
from nst_server.ledger import Ledger
from nst_server.storage.blobs import MEMORY, Blobs
from nst_server.storage.database import JobStore
from tests.server.conftest import until
from tests.server.memory import new_spec
from tests.server.storage.conftest import postgresql, postgresql_url, shared_where

__all__ = ["postgresql", "postgresql_url", "shared_where"]


@contextlib.asynccontextmanager
async def sharing(where: Path | str) -> AsyncIterator[tuple[Ledger, Ledger]]:
    """Hold the ledgers of two servers that share a database."""
    blobs = Blobs.open(MEMORY)
    here, there = [Ledger(await JobStore.open(where), blobs, None) for _ in range(2)]
    yield here, there
    for ledger in (here, there):
        await ledger.close(1)


@pytest_asyncio.fixture(loop_scope="session")
async def two(shared_where: Path | str) -> AsyncIterator[tuple[Ledger, Ledger]]:
    """The ledgers of two servers that share a database."""
    async with sharing(shared_where) as ledgers:
        yield ledgers


async def created(ledger: Ledger) -> Job:
    """Return a new job that a server has."""
    job = Job(JobSnapshot.queued(new_spec()), ledger, new_spec())
    await ledger.create(job.now, {}, "", (), "")
    assert await ledger.attempt(job)
    return job


@pytest.mark.parametrize("ahead_h", [-1, 1])
async def test_a_server_whose_clock_is_wrong_takes_nobodys_jobs(
    postgresql_url: str, monkeypatch: pytest.MonkeyPatch, ahead_h: int
) -> None:
    """Leases go by the database's clock: an hour more or less on a machine neither ends one nor makes one eternal."""

    class Wrong(datetimes.datetime):
        @classmethod
        def now(cls, tz: Any = None) -> datetimes.datetime:
            return datetimes.datetime.now(tz) + timedelta(hours=ahead_h)

    async with sharing(postgresql_url) as (here, there):
        job = await created(here)
        with monkeypatch.context() as patch:
            for module in ("ledger", "storage.database"):
                patch.setattr(f"nst_server.{module}.datetime", Wrong)
            assert await there.claim(alone=False) == []
            assert list(await here.renew()) == [job.name]
        assert await there.claim(alone=False) == []
        monkeypatch.setattr("nst_server.ledger.LEASE_S", -1.0)
        await here.renew()
        assert [taken.name for taken, _ in await there.claim(alone=False)] == [job.name]


@pytest.mark.parametrize("fate", ["taken over", "deleted"])
async def test_a_job_is_lost_once(two: tuple[Ledger, Ledger], fate: str) -> None:
    """However many of its events wait to be written then: one line in the log, one reason for who watches."""
    here, there = two
    job = await created(here)
    job.started("cpu", "fp32")
    await until(lambda: job.snapshot().sequence == 1)
    if fate == "deleted":
        await there.delete(job.name)
    else:
        await there.claim(alone=True)
    with capture_logs() as logs:
        for position in range(50):
            job.moved(position + 1)
        await here.journal.flush()

    assert [line["event"] for line in logs] == ["job lost"]
    with pytest.raises(NotFound if fate == "deleted" else Moved):
        job.check()
