"""The ledger: jobs as they are stored. Between `jobs.Job` and the database and blobs that it is kept in."""

from __future__ import annotations

import asyncio
import dataclasses
import uuid
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from typing import Any

import structlog

from nst_server import archive
from nst_server.errors import RequestError
from nst_server.images import EncodedImage
from nst_server.jobs import Event, Job, JobSnapshot
from nst_server.journal import Journal
from nst_server.messages import Checkpoint
from nst_server.storage.blobs import Blobs
from nst_server.storage.database import JobStore
from nst_server.storage.records import Batch, Fence, ImageRecord, JobRecord

log = structlog.get_logger()

LEASE_S = 10.0
"""A server that has not renewed its leases for so long is taken for dead, and its jobs go back to the queue."""

RENEW_S = 3.0


class Ledger:
    """Everything durable of the jobs of one server. An `Archive` for its jobs."""

    def __init__(self, store: JobStore, blobs: Blobs) -> None:
        self.owner = uuid.uuid4().hex
        self.store = store
        self.blobs = blobs
        self.journal = Journal(store)
        self._renewing = asyncio.create_task(self._renew(), name="leases")
        self._chores: set[asyncio.Task[None]] = set()

    async def close(self, patience_s: float) -> None:
        """Write what is left, give back all leases, and close the store."""
        self._renewing.cancel()
        await asyncio.wait([self._renewing, *self._chores])
        await self.journal.close(patience_s)
        try:
            await self.store.release(self.owner)
        except RequestError as error:
            log.error("leases not given back", error=str(error))
        await self.store.close()

    def append(self, job: Job, events: Sequence[Event], images: Sequence[str]) -> None:
        """Write a job's next events; see `jobs.Archive`."""
        now = job.now
        batch = Batch(
            _id(job.name),
            [archive.event_to_record(event) for event in events],
            archive.columns(now),
            images,
            self._fence(job),
        )
        self.journal.add(batch, lambda failure: job.lost(failure) if failure else job.written(events, now))

    async def events(self, name: str, after: int) -> list[Event]:
        """Return some of a job's events after a number; see `jobs.Archive`."""
        return [archive.event_from_record(record) for record in await self.store.events(_id(name), after)]

    async def file(self, sha256: str) -> bytes:
        """Return a result's file; see `jobs.Archive`."""
        return await self.blobs.get(sha256)

    async def create(
        self, snapshot: JobSnapshot, request: dict[str, Any], request_sha256: str, images: Sequence[str], caller: str
    ) -> tuple[JobRecord, bool]:
        """Store a new job; return it, or the one that the same request made before and False."""
        record = JobRecord(
            id=_id(snapshot.name),
            create_time=snapshot.create_time,
            caller=caller,
            request_id=snapshot.request_id,
            request_sha256=request_sha256,
            model=snapshot.model,
            width=snapshot.width,
            height=snapshot.height,
            request=request,
            **archive.columns(snapshot),
        )
        return await self.store.create(record, images=images)

    async def lease(self, job: Job) -> bool:
        """Take a waiting job for the next attempt at it; return False if it waits no more."""
        await self.journal.flush()
        record = await self.store.lease(_id(job.name), self.owner, _in(LEASE_S))
        if record is None:
            return False
        job.leased(self.owner, record.attempt)
        return True

    async def keep_result(self, image: EncodedImage, media_type: str) -> None:
        """Keep a result's file."""
        now = datetime.now(UTC)
        await self.store.add_image(
            ImageRecord(image.sha256, len(image.data), image.width, image.height, media_type, "", now, now)
        )
        await self.blobs.put(image.data)

    def keep_checkpoint(self, job: Job, checkpoint: Checkpoint) -> None:
        """Note a job's newest checkpoint, and remove the one before it once that is durable."""
        before, job.checkpoint = job.checkpoint, checkpoint
        changes = {"checkpoint": dataclasses.asdict(checkpoint)}

        def settled(failure: Exception | None) -> None:
            stale = checkpoint if failure else before
            if stale is not None and stale.key != (job.checkpoint and job.checkpoint.key):
                self._later(self.blobs.remove(stale.key))

        self.journal.add(Batch(_id(job.name), (), changes, (), self._fence(job)), settled)

    def drop_checkpoints(self, job: Job) -> None:
        """Remove all that was kept of a job on the way."""
        job.checkpoint = None
        self._later(self.blobs.remove_below(f"checkpoints/{_id(job.name)}/"))

    def _fence(self, job: Job) -> Fence | None:
        return Fence(job.owner, job.now.attempt) if job.owner else None

    def _later(self, work: Any) -> None:
        async def chore() -> None:
            try:
                await work
            except RequestError as error:
                log.warning("not tidied up", error=str(error))

        self._chores.add(task := asyncio.create_task(chore()))
        task.add_done_callback(self._chores.discard)

    async def _renew(self) -> None:
        while True:
            try:
                await self.store.renew(self.owner, _in(LEASE_S))
            except RequestError as error:
                log.error("leases not renewed", error=str(error))
            await asyncio.sleep(RENEW_S)


def _id(name: str) -> str:
    return name.removeprefix("jobs/")


def _in(seconds: float) -> datetime:
    return datetime.now(UTC) + timedelta(seconds=seconds)
