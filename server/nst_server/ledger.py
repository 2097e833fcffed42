"""The ledger: jobs as they are stored. Between `jobs.Job` and the database and blobs that it is kept in."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import hashlib
import io
import tempfile
import uuid
from collections.abc import Awaitable, Callable, Mapping, Sequence
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
    StorageFull,
)
from nst_server.jobs import FOLLOW_S, Event, Job, JobSnapshot, JobState
from nst_server.journal import ALSO_READ_ONLY, Journal, patiently
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


async def _boundless(size: int) -> None:
    pass


class Ledger:
    """Everything durable of the jobs of one server. An `Archive` for its jobs.

    Args:
        spool: folder for frames that wait to be read; None for memory.

    Attributes:
        owner: this server, to others that use the same store.
        make_room: makes room for so many bytes that are about to come; raises StorageFull. See `Housekeeper`.
    """

    def __init__(self, store: JobStore, blobs: Blobs, spool: Path | None) -> None:
        self.owner = uuid.uuid4().hex
        self.store = store
        self.blobs = blobs
        self._spool = spool
        self.journal = Journal(store)
        self.make_room: Callable[[int], Awaitable[None]] = _boundless
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

    @property
    def read_only(self) -> RequestError | None:
        """Why nothing that happens can be told; see `jobs.Archive`."""
        return self.journal.read_only

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
            lease_until=_lease(await self.store.now()),
            **archive.columns(snapshot),
        )
        return await self.store.create(record, images=images)

    def job(self, record: JobRecord) -> Job:
        """Return a job as it is stored."""
        job = Job(archive.snapshot_from_record(record), self, caller=record.request.get("machine", ""))
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
        now = await self.store.now()
        found = await self.store.claim(self.owner, _lease(now), None if alone else now)
        return [(self.job(record), record.command) for record in found]

    async def renew(self) -> dict[str, Any]:
        """Prolong the leases of this server's jobs; return their names, each with the command left for it, if any."""
        held = await self.store.renew(self.owner, _lease(await self.store.now()))
        return {f"jobs/{id}": command for id, command in held.items()}

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

    async def over(self, job: Job) -> None:
        """Wait until it is durable that a job has ended, unless the store takes nothing now: to delete makes room."""
        waiting = [asyncio.create_task(job.ended()), asyncio.create_task(self.journal.stuck.wait())]
        try:
            await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for wait in waiting:
                wait.cancel()
        job.check()

    async def delete(self, name: str) -> int:
        """Delete a job with its events, its checkpoints and the images that nothing else holds; return their bytes.

        Raises NotFound.
        """
        id = _id(name)
        freed = await self.store.delete(id, self.remove)
        async for found in self.blobs.below(f"checkpoints/{id}/"):
            await self.blobs.remove(found.key)
            freed += found.bytes
        return freed

    async def remove(self, sha256s: Sequence[str]) -> None:
        """Delete the files of some images."""
        await self.blobs.delete(*sha256s)

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
        record = await patiently(begin, f"{job.name} cannot begin", ALSO_READ_ONLY)
        if record is None:
            job.lost(Moved(f"{job.name} has been taken over by another server"))
            return False
        job.attempted(record.attempt)
        return True

    async def keep_image(
        self, data: bytes, width: int, height: int, media_type: str, *, sha256: str = "", caller: str = ""
    ) -> None:
        """Keep an image file that came from outside. Raises StorageFull also if there is enough of them."""
        sha256 = sha256 or await asyncio.to_thread(lambda: hashlib.sha256(data).hexdigest())
        try:
            await self.make_room(len(data))
        except StorageFull:
            if not await self.store.known({sha256}):
                raise
        await self.store.add_image(_image(sha256, data, (width, height), media_type, caller))
        await self.blobs.put(data)

    async def keep_result(self, job: Job, data: bytes, width: int, height: int, media_type: str) -> None:
        """Keep the file of a job's result, however much there is already; the job holds it from now on."""
        with contextlib.suppress(StorageFull):
            await self.make_room(len(data))
        sha256 = await asyncio.to_thread(lambda: hashlib.sha256(data).hexdigest())
        record = _image(sha256, data, (width, height), media_type)
        note = functools.partial(self.store.add_image, record, _id(job.name))
        await patiently(note, f"the result of {job.name} cannot be noted", ALSO_READ_ONLY)
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
        """Give a job up whose events the store refuses: it is another server's, deleted, or cannot be written to."""
        if job.gone:  # that has been said
            return
        log.error("job lost", job=job.name, error=str(failure))
        moved = Moved(f"{job.name} has been taken over by another server")
        job.lost(failure if isinstance(failure, StorageDamaged | NotFound) else moved)

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


def _lease(now: datetime) -> datetime:
    return now + timedelta(seconds=LEASE_S)


def _image(sha256: str, data: bytes, size: tuple[int, int], media_type: str, caller: str = "") -> ImageRecord:
    now = datetime.now(UTC)
    return ImageRecord(sha256, len(data), *size, media_type, caller, now, now)
