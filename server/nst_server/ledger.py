"""The ledger: jobs as they are stored. Between `jobs.Job` and the database and blobs that it is kept in."""

from __future__ import annotations

import asyncio
import functools
import hashlib
import io
import tempfile
import uuid
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, BinaryIO

import structlog

from nst_server import archive
from nst_server.errors import (
    Moved,
    NotFound,
    RequestError,
    RequestIdReused,
    StorageDamaged,
)
from nst_server.jobs import FOLLOW_S, Event, Job, JobSnapshot, JobState
from nst_server.journal import Journal, patiently
from nst_server.messages import Checkpoint
from nst_server.requests import JobRequest
from nst_server.storage.blobs import Blobs
from nst_server.storage.database import JobStore
from nst_server.storage.faults import refused
from nst_server.storage.records import Batch, Fence, ImageRecord, JobRecord

log = structlog.get_logger()

LEASE_S = 15.0
"""A server that has not renewed its leases for so long is taken for dead, and another takes its jobs."""

OBEDIENCE_S = 2 * LEASE_S
"""How long a command for another server may take to be obeyed: by then its successor would have done it."""


class Ledger:
    """Everything durable of the jobs of one server. An `Archive` for its jobs.

    Args:
        spool: folder for frames that wait to be read; None for memory.

    Attributes:
        owner: this server, to others that use the same store.
    """

    def __init__(self, store: JobStore, blobs: Blobs, spool: Path | None) -> None:
        self.owner = uuid.uuid4().hex
        self.store = store
        self.blobs = blobs
        self._spool = spool
        self.journal = Journal(store)
        self._chores: set[asyncio.Task[None]] = set()

    async def close(self, patience_s: float) -> None:
        """Write what is left, give up all jobs that have not ended, and close the store."""
        await self.journal.close(patience_s)
        if self._chores:
            await asyncio.wait(self._chores)
        try:
            await self.store.release(self.owner)
        except RequestError as error:
            log.error("jobs not given up", error=str(error))
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
        self.journal.add(batch, lambda failure: self._refused(job, failure) if failure else job.written(events, now))

    async def events(self, name: str, after: int) -> list[Event]:
        """Return some of a job's events after a number; see `jobs.Archive`."""
        records = await self.store.events(_id(name), after)
        if not records:
            await self.store.get(_id(name))  # or it is gone
        return [archive.event_from_record(record) for record in records]

    async def file(self, sha256: str) -> bytes:
        """Return a result's file; see `jobs.Archive`."""
        try:
            return await self.blobs.get(sha256)
        except NotFound as error:
            raise StorageDamaged(f"the result images/{sha256} is not stored any more") from error

    def spool(self) -> BinaryIO:
        """Return an empty file that is gone when it is closed; see `jobs.Archive`."""
        if self._spool is None:
            return io.BytesIO()
        with refused(f"the folder {self._spool}"):
            self._spool.mkdir(parents=True, exist_ok=True)
            return tempfile.TemporaryFile(dir=self._spool, buffering=0)

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
            owner=self.owner,
            lease_until=_in(LEASE_S),
            **archive.columns(snapshot),
        )
        return await self.store.create(record, images=images)

    def job(self, record: JobRecord) -> Job:
        """Return a job as it is stored."""
        job = Job(archive.snapshot_from_record(record), self)
        job.checkpoint = archive.checkpoint_from_json(record.checkpoint)
        job.elsewhere = record.owner != self.owner
        return job

    async def get(self, name: str) -> Job:
        """Return a stored job. Raises NotFound."""
        return self.job(await self.store.get(_id(name)))

    async def find(self, caller: str, request_id: str, request_sha256: str) -> Job | None:
        """Return the job that a caller's request made. Raises RequestIdReused if that was another request."""
        record = await self.store.find(caller, request_id)
        if record is None:
            return None
        if record.request_sha256 != request_sha256:
            raise RequestIdReused(request_id, record.id)
        return self.job(record)

    async def page(
        self, caller: str, states: Sequence[JobState], page_size: int, before: tuple[datetime, str] | None
    ) -> list[Job]:
        """Return a caller's jobs in some states, or in all, the newest first, that are older than a time and id."""
        records = await self.store.list(caller, [state.value for state in states], page_size, before)
        return [self.job(record) for record in records]

    async def claim(self, *, alone: bool) -> list[tuple[Job, Mapping[str, Any] | None]]:
        """Take the jobs that servers that are gone have left, and return them, the oldest first.

        Each comes with the command that was left for it and not obeyed, if any.

        `alone` says that no other server can be using the store: then nobody's lease needs to run out.
        """
        found = await self.store.claim(self.owner, _in(LEASE_S), None if alone else datetime.now(UTC))
        return [(self.job(record), record.command) for record in found]

    async def renew(self) -> dict[str, Any]:
        """Prolong the leases of this server's jobs; return their names, each with the command left for it, if any."""
        return {f"jobs/{id}": command for id, command in (await self.store.renew(self.owner, _in(LEASE_S))).items()}

    async def command(self, job: Job, command: dict[str, Any]) -> None:
        """Leave a command for the server that has a job, and wait until it has been obeyed, or the job has ended.

        Each command waits for the one before it. Raises Moved if no server obeys in the time that it takes to find that
        one is gone; the command stays.
        """
        left = False
        try:
            async with asyncio.timeout(OBEDIENCE_S):
                while True:
                    left = left or await self.store.command(_id(job.name), command)
                    record = await self.store.get(_id(job.name))
                    if JobState(record.state).terminal or (left and record.command is None):
                        return
                    await asyncio.sleep(FOLLOW_S)
        except TimeoutError:
            raise Moved(f"{job.name} is on another server, which has not carried out the command yet") from None

    async def obeyed(self, job: Job) -> None:
        """Note that the command for a job was carried out."""
        await self.store.obeyed(_id(job.name), self.owner)

    async def delete(self, name: str) -> None:
        """Delete a job with its events and checkpoints; its images go when nothing else holds them. Raises NotFound."""
        await self.journal.flush()
        await self.store.delete(_id(name))
        await self.blobs.remove_below(f"checkpoints/{_id(name)}/")

    async def request(self, job: Job) -> JobRequest:
        """Return what was asked for, with names in place of image files."""
        return JobRequest.restored((await self.store.get(_id(job.name))).request)

    async def image_file(self, name: str, field: str) -> bytes:
        """Return the file of an image. Raises NotFound, naming `field`."""
        try:
            return await self.blobs.get(name.removeprefix("images/"))
        except NotFound as error:
            raise NotFound(field, f"there is no image {name!r}") from error

    async def attempt(self, job: Job) -> bool:
        """Begin the next attempt at a queued job; return False if this server has it no more."""
        await self.journal.flush()
        begin = functools.partial(self.store.attempt, _id(job.name), self.owner)
        record = await patiently(begin, f"{job.name} cannot begin")
        if record is None:
            job.lost(Moved(f"{job.name} has been taken over by another server"))
            return False
        job.attempted(record.attempt)
        return True

    async def keep_image(
        self, data: bytes, width: int, height: int, media_type: str, *, sha256: str = "", caller: str = ""
    ) -> None:
        """Keep an image file."""
        now = datetime.now(UTC)
        sha256 = sha256 or await asyncio.to_thread(lambda: hashlib.sha256(data).hexdigest())
        await self.store.add_image(ImageRecord(sha256, len(data), width, height, media_type, caller, now, now))
        await self.blobs.put(data)

    def keep_checkpoint(self, job: Job, checkpoint: Checkpoint) -> None:
        """Note a job's newest checkpoint, and remove the one before it once that is durable."""
        before, job.checkpoint = job.checkpoint, checkpoint
        if checkpoint.data:
            return
        changes = {"checkpoint": archive.checkpoint_to_json(checkpoint)}

        def settled(failure: Exception | None) -> None:
            stale = checkpoint if failure else before
            if stale is not None and stale.key != (job.checkpoint and job.checkpoint.key):
                self._later(self.blobs.remove(stale.key))

        self.journal.add(Batch(_id(job.name), (), changes, (), self._fence(job)), settled)

    def drop_checkpoints(self, job: Job) -> None:
        """Remove all that was kept of a job on the way once it is durable that it has ended."""
        job.checkpoint = None

        async def drop() -> None:
            await job.ended()
            if not job.gone:  # else they are another server's
                await self.blobs.remove_below(f"checkpoints/{_id(job.name)}/")

        self._later(drop())

    def _fence(self, job: Job) -> Fence:
        return Fence(self.owner, job.now.attempt)

    def _refused(self, job: Job, failure: Exception) -> None:
        """Give a job up whose events the store refuses: another server has it, or they cannot be written any more."""
        log.error("job lost", job=job.name, error=str(failure))
        moved = Moved(f"{job.name} has been taken over by another server")
        job.lost(failure if isinstance(failure, StorageDamaged) else moved)

    def _later(self, work: Any) -> None:
        async def chore() -> None:
            try:
                await work
            except RequestError as error:
                log.warning("not tidied up", error=str(error))

        self._chores.add(task := asyncio.create_task(chore()))
        task.add_done_callback(self._chores.discard)


def _id(name: str) -> str:
    if "\0" in name:  # PostgreSQL takes no such text
        raise NotFound("name", f"there is no job {name!r}")
    return name.removeprefix("jobs/")


def _in(seconds: float) -> datetime:
    return datetime.now(UTC) + timedelta(seconds=seconds)
