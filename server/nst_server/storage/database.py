"""The database of jobs: SQLite in the data folder, PostgreSQL by URL, or memory.

Every method is one transaction: what it returns has happened and survives a loss of power; what raises has not.
"""

from __future__ import annotations

import asyncio
import contextlib
import sqlite3
from collections.abc import Awaitable, Callable, Collection, Coroutine, Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from alembic import command
from alembic.config import Config
from alembic.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy import (
    ColumnElement,
    Connection,
    Select,
    Update,
    and_,
    bindparam,
    delete,
    event,
    exists,
    func,
    insert,
    or_,
    select,
    update,
)
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.engine import URL, make_url
from sqlalchemy.exc import ArgumentError, IntegrityError
from sqlalchemy.ext.asyncio import AsyncEngine, create_async_engine
from sqlalchemy.pool import StaticPool
from sqlalchemy.util import await_only

from nst_server.errors import (
    JobEnded,
    NotFound,
    RequestIdReused,
    StorageDamaged,
    StorageFull,
    StorageReadOnly,
    StorageUnavailable,
)
from nst_server.storage.faults import LeaseLost, OutOfSequence, SchemaNewer, refused
from nst_server.storage.records import (
    ENDED,
    PAUSED,
    PROGRESS,
    QUEUED,
    Batch,
    EventRecord,
    Fence,
    ImageRecord,
    JobRecord,
    Json,
    UploadRecord,
)
from nst_server.storage.reserve import Reserve
from nst_server.storage.tables import events, images, job_images, jobs, uploads

MEMORY = ":memory:"

BUSY_TIMEOUT_MS = 10_000
"""How long SQLite waits for another process that writes."""

CONNECT_TIMEOUT_S = 10

LOG_PAGES = 256
"""Pages of 4 KiB after which SQLite carries over what is in its log; see `Reserve`."""

THINNED = 500
"""Events of progress that are dropped at once on a full disk: they take 0.3 MB of SQLite's log."""

MIGRATING = 0x6E7374
"""PostgreSQL's advisory lock that whoever migrates holds."""

MIGRATIONS = Path(__file__).parent / "migrations"

SCHEMES = {
    "sqlite": "sqlite+aiosqlite",
    "postgres": "postgresql+asyncpg",
    "postgresql": "postgresql+asyncpg",
}

T = TypeVar("T")

Remove = Callable[[Sequence[str]], Awaitable[None]]
"""What deletes the blobs of some SHA-256s."""


class JobStore:
    """Jobs, their events, images and uploads in one database, for one event loop.

    A method that is cancelled completes its transaction nevertheless. All raise StorageFull, StorageReadOnly,
    StorageDamaged and StorageUnavailable.
    """

    def __init__(self, engine: AsyncEngine, place: str) -> None:
        """Use `open`."""
        self._engine = engine
        self._place = place
        file = engine.url.database if _is_sqlite(engine.url) else None
        self._reserve = Reserve(Path(f"{file}-reserve")) if file else None
        self._tasks: set[asyncio.Task[Any]] = set()
        # SQLite has one writer at a time: those of one process wait here, in turn, and not in its busy loop. In memory
        # there is one connection only.
        nothing = contextlib.nullcontext()
        self._writing = asyncio.Lock() if engine.dialect.name == "sqlite" else nothing
        self._reading = self._writing if isinstance(engine.pool, StaticPool) else nothing

    @classmethod
    async def open(cls, where: Path | str) -> JobStore:
        """Return the store in an SQLite file, at a URL (`postgresql://…`, `sqlite:///…`) or in MEMORY.

        Makes the file and its folder, and brings the schema up to date. Raises SchemaNewer if a newer server did so,
        StorageDamaged, ModuleNotFoundError if PostgreSQL's driver is not installed, ValueError for a malformed URL.
        """
        url = _url(where)
        shown = url.set(drivername=url.get_backend_name()).render_as_string()  # without the password
        place = f"the database {url.database or MEMORY if _is_sqlite(url) else shown}"
        with refused(place):
            if _is_sqlite(url) and url.database:
                Path(url.database).parent.mkdir(parents=True, exist_ok=True)
        store = cls(_engine(url), place)
        try:
            await store._write(_migrate)
            await store.hold_reserve()
        except StorageDamaged as error:
            await store.close()
            advice = "restore it from a backup, or move it away with its -wal and -shm files: its jobs are lost then"
            raise StorageDamaged(f"{error}; {advice}") from error
        except BaseException:
            await store.close()
            raise
        return store

    async def close(self) -> None:
        """Finish what is being written, and close the database."""
        if self._tasks:
            await asyncio.wait(self._tasks)
        await self._engine.dispose()

    async def create(
        self, job: JobRecord, events: Sequence[EventRecord] = (), images: Sequence[str] = ()
    ) -> tuple[JobRecord, bool]:
        """Store a job with its first events and the images it holds; return it and True.

        If the caller's `request_id` came before, return the job of that time and False. Raises RequestIdReused if that
        was another request, NotFound for an image that is not here.
        """

        def work(connection: Connection) -> JobRecord:
            connection.execute(insert(jobs), asdict(job))
            (failure,) = _append(connection, [Batch(job.id, events, images=images)])
            if failure:
                raise failure
            return _get(connection, job.id)

        try:
            return await self._write(work), True
        except IntegrityError:
            there = await self.find(job.caller, job.request_id)
            if there is None:
                raise
        if there.request_sha256 != job.request_sha256:
            raise RequestIdReused(job.request_id, there.id)
        return there, False

    async def get(self, id: str) -> JobRecord:
        """Return a job. Raises NotFound."""
        return await self._read(lambda connection: _get(connection, id))

    async def find(self, caller: str, request_id: str) -> JobRecord | None:
        """Return the job that a caller's request made, if there is one."""
        query = select(jobs).where(jobs.c.caller == caller, jobs.c.request_id == request_id, jobs.c.request_id != "")
        return next(iter(await self._read(lambda connection: _jobs(connection, query))), None)

    async def now(self) -> datetime:
        """Return the time by the clock that everybody who uses the database goes by."""
        if self._engine.dialect.name == "sqlite":  # one machine
            return datetime.now(UTC)
        clock = select(func.clock_timestamp())
        return await self._read(lambda connection: connection.execute(clock).scalar_one().astimezone(UTC))

    async def hold_reserve(self) -> None:
        """Keep some room on the disk for deletions, once there is any."""
        if self._reserve is not None:
            await asyncio.to_thread(self._reserve.hold)

    async def delete(self, id: str, remove: Remove) -> int:
        """Delete a job with its events and the images that nothing else holds; return how many bytes those were.

        Whoever adds such an image anew waits until `remove` is done with its blob. Raises NotFound.
        """

        def work(connection: Connection) -> int:
            connection.execute(select(jobs.c.id).where(jobs.c.id == id).with_for_update())
            held = connection.scalars(select(job_images.c.sha256).where(job_images.c.job == id)).all()
            if not connection.execute(delete(jobs).where(jobs.c.id == id)).rowcount:
                raise _no_job(id)
            _lock_images(connection, held)
            return _forget(connection, images.c.sha256.in_(held), remove)

        return await self._free(work, partial(_thin, id=id))

    async def claim(self, owner: str, until: datetime, now: datetime | None = None) -> list[JobRecord]:
        """Take the jobs that have not ended and that nobody holds any more, and return them, the oldest first.

        Those are the ones whose owner gave them up or has not renewed its leases before `now`; None says that every
        other owner is gone.
        """
        others = jobs.c.owner != owner
        left = others if now is None else or_(jobs.c.owner == "", and_(others, jobs.c.lease_until < now))
        statement = update(jobs).where(jobs.c.state.not_in(ENDED), left).values(owner=owner, lease_until=until)

        def work(connection: Connection) -> list[JobRecord]:
            taken = list(connection.scalars(statement.returning(jobs.c.id)))
            query = select(jobs).where(jobs.c.id.in_(taken)).order_by(jobs.c.create_time, jobs.c.id)
            return _jobs(connection, query)

        return await self._write(work)

    async def attempt(self, id: str, owner: str) -> JobRecord | None:
        """Begin the next attempt at a queued job and return it; None if it is not queued or another owner's."""
        mine = update(jobs).where(jobs.c.id == id, jobs.c.state == QUEUED, jobs.c.owner == owner)
        statement = mine.values(attempt=jobs.c.attempt + 1)

        def work(connection: Connection) -> JobRecord | None:
            return _get(connection, id) if connection.execute(statement).rowcount else None

        return await self._write(work)

    async def renew(self, owner: str, until: datetime) -> dict[str, Json | None]:
        """Prolong every lease of an owner; return the ids of its jobs, each with the command left for it, if any."""

        def work(connection: Connection) -> dict[str, Json | None]:
            mine = jobs.c.owner == owner
            connection.execute(update(jobs).where(mine).values(lease_until=until))
            return dict(connection.execute(select(jobs.c.id, jobs.c.command).where(mine)).all())

        return await self._write(work)

    async def command(self, id: str, command: Json) -> bool:
        """Leave a command for the owner of a job, and return whether it will get it: not if one waits, or it ended."""
        free = and_(jobs.c.id == id, jobs.c.command.is_(None), jobs.c.state.not_in(ENDED))
        statement = update(jobs).where(free).values(command=command)
        return await self._write(lambda connection: bool(connection.execute(statement).rowcount))

    async def obeyed(self, id: str, owner: str) -> None:
        """Remove the command of a job that its owner has obeyed, so that the next can be left."""
        mine = update(jobs).where(jobs.c.id == id, jobs.c.owner.in_(("", owner)))
        await self._write(lambda connection: connection.execute(mine.values(command=None)))

    async def release(self, owner: str) -> list[str]:
        """Give up every job of an owner, as it is; return their ids."""
        return await self._changed(update(jobs).where(jobs.c.owner == owner).values(owner="", lease_until=None))

    async def append(
        self,
        id: str,
        fence: Fence | None = None,
        events: Sequence[EventRecord] = (),
        changes: Json | None = None,
        images: Sequence[str] = (),
    ) -> None:
        """Add events to a job, change its columns, and let it hold images.

        A job that ends loses its lease. Raises LeaseLost if another than the fence's owner
        and attempt has the lease, OutOfSequence unless the events continue the job's, JobEnded if the job has ended and
        this is more than a change of columns other than the state, NotFound.
        """
        (failure,) = await self.append_many([Batch(id, events, changes or {}, images, fence)])
        if failure:
            raise failure

    async def append_many(self, batches: Sequence[Batch]) -> list[Exception | None]:
        """Do what `append` does for many jobs at the cost of one; return for each batch why it was not done.

        What one job alone is to blame for, damage for instance, is that job's: each then gets a transaction of its own.
        """
        if not batches:
            return []
        try:
            return await self._write(partial(_append, batches=batches))
        except (StorageFull, StorageReadOnly, StorageUnavailable):
            raise
        except Exception as error:
            if len(batches) == 1:
                return [error]
            return [failure for batch in batches for failure in await self.append_many([batch])]

    async def events(self, id: str, after: int = 0, limit: int = 1000) -> list[EventRecord]:
        """Return the events of a job after a number, in order; those of progress are gone up to `compacted`."""
        columns = [column for column in events.c if column.name != "job"]
        query = select(*columns).where(events.c.job == id, events.c.sequence > after)
        query = query.order_by(events.c.sequence).limit(limit)
        return await self._read(lambda connection: [EventRecord(**row._mapping) for row in connection.execute(query)])

    async def compact(self, id: str, through: int) -> None:
        """Drop a job's events of progress up to a number."""
        await self._free(partial(_compact, id=id, through=through), partial(_thin, id=id, through=through))

    async def ended_before(self, time: datetime) -> list[tuple[str, int]]:
        """Return the jobs that ended before a time and are not compacted whole, each with its last event's number."""
        old = and_(jobs.c.state.in_(ENDED), jobs.c.end_time < time, jobs.c.compacted < jobs.c.sequence)
        query = select(jobs.c.id, jobs.c.sequence).where(old).order_by(jobs.c.end_time, jobs.c.id)
        return await self._read(lambda connection: [(id, number) for id, number in connection.execute(query)])

    async def at_rest(self, before: datetime, owner: str) -> list[str]:
        """Return the jobs that ended, or are an owner's and were paused, before a time; the longest at rest first."""
        since = func.coalesce(jobs.c.end_time, events.c.time)
        last = and_(events.c.job == jobs.c.id, events.c.sequence == jobs.c.sequence)
        rests = or_(jobs.c.state.in_(ENDED), and_(jobs.c.state == PAUSED, jobs.c.owner == owner))
        query = select(jobs.c.id).outerjoin_from(jobs, events, last).where(rests, since < before)
        query = query.order_by(since, jobs.c.id)
        return await self._read(lambda connection: list(connection.scalars(query)))

    async def add_image(self, image: ImageRecord, job: str = "") -> ImageRecord:
        """Note an image, and return it as first noted but last used now; let a job hold it, if one is named.

        To be done before its blob is put: then it cannot be collected in between. Raises NotFound if the job is gone.
        """

        def work(connection: Connection) -> ImageRecord:
            dialect = postgresql if connection.dialect.name == "postgresql" else sqlite
            new = dialect.insert(images).values(asdict(image))
            used = {"last_used": new.excluded.last_used}
            if job and connection.scalar(select(jobs.c.id).where(jobs.c.id == job).with_for_update()) is None:
                raise _no_job(job)
            row = connection.execute(
                new.on_conflict_do_update(index_elements=["sha256"], set_=used).returning(*images.c)
            ).one()
            if job:
                _hold(connection, [(job, image.sha256)])
            return ImageRecord(**row._mapping)

        return await self._write(work)

    async def image(self, sha256: str) -> ImageRecord:
        """Return an image. Raises NotFound."""

        def work(connection: Connection) -> ImageRecord:
            row = connection.execute(select(images).where(images.c.sha256 == sha256)).one_or_none()
            if row is None:
                raise NotFound("name", f"there is no image {sha256!r}")
            return ImageRecord(**row._mapping)

        return await self._read(work)

    async def known(self, sha256s: Collection[str]) -> set[str]:
        """Return which of some images are noted."""
        query = select(images.c.sha256).where(images.c.sha256.in_(sha256s))
        return await self._read(lambda connection: set(connection.scalars(query)))

    async def unreferenced(self, older_than: datetime) -> list[str]:
        """Return the images that neither a job nor an upload holds and that were last used before a time.

        The oldest first.
        """
        query = select(images.c.sha256).where(images.c.last_used < older_than, _unheld()).order_by(images.c.last_used)
        return await self._read(lambda connection: list(connection.scalars(query)))

    async def collect(self, sha256: str, older_than: datetime, remove: Remove) -> int:
        """Forget an image if it is still unreferenced, and remove its blob by `remove`; return its bytes, else 0.

        Whoever adds the image anew waits until its blob is gone.
        """
        loose = and_(images.c.sha256 == sha256, images.c.last_used < older_than)
        return await self._free(lambda connection: _forget(connection, loose, remove))

    async def add_upload(self, upload: UploadRecord) -> None:
        """Note that an image is about to come."""
        await self._write(lambda connection: connection.execute(insert(uploads), asdict(upload)))

    async def upload(self, id: str) -> UploadRecord:
        """Return an upload. Raises NotFound."""

        def work(connection: Connection) -> UploadRecord:
            row = connection.execute(select(uploads).where(uploads.c.id == id)).one_or_none()
            if row is None:
                raise NotFound("name", f"there is no upload {id!r}")
            return UploadRecord(**row._mapping)

        return await self._read(work)

    async def advance_upload(self, id: str, offset: int, length: int) -> bool:
        """Note that bytes came; return False, and note nothing, if those before or others in their place did not."""
        end = offset + length
        there = and_(uploads.c.id == id, uploads.c.received == offset, uploads.c.size >= end)
        statement = update(uploads).where(there).values(received=end)
        return await self._write(lambda connection: bool(connection.execute(statement).rowcount))

    async def use(self, sha256: str) -> ImageRecord:
        """Return an image, and keep it from being collected for a while. Raises NotFound."""

        def work(connection: Connection) -> ImageRecord:
            if not _use(connection, {sha256}):
                raise _no_image(sha256)
            row = connection.execute(select(images).where(images.c.sha256 == sha256)).one()
            return ImageRecord(**row._mapping)

        return await self._write(work)

    async def complete_upload(self, id: str, sha256: str) -> None:
        """Note which image came of an upload."""
        await self._write(
            lambda connection: connection.execute(update(uploads).where(uploads.c.id == id).values(sha256=sha256))
        )

    async def delete_upload(self, id: str) -> None:
        """Forget an upload, if it is there."""
        await self._free(lambda connection: connection.execute(delete(uploads).where(uploads.c.id == id)))

    async def uploads_before(self, time: datetime) -> list[str]:
        """Return the uploads that were begun before a time, oldest first."""
        query = select(uploads.c.id).where(uploads.c.create_time < time).order_by(uploads.c.create_time)
        return await self._read(lambda connection: list(connection.scalars(query)))

    async def _changed(self, statement: Update) -> list[str]:
        return await self._write(lambda connection: list(connection.scalars(statement.returning(jobs.c.id))))

    async def _write(self, work: Callable[[Connection], T]) -> T:
        return await self._run(partial(self._transact, work, writes=True), self._writing)

    async def _read(self, work: Callable[[Connection], T]) -> T:
        return await self._run(partial(self._transact, work, writes=False), self._reading)

    async def _free(self, work: Callable[[Connection], T], thin: Callable[[Connection], bool] | None = None) -> T:
        """Write what makes room; on a full disk in the reserve, at which nobody else gets, as it is our turn.

        What takes more than that is done by `thin` before, in steps, as long as it says that there are more.
        """

        async def free() -> T:
            try:
                done = await self._transact(work, writes=True)
            except StorageFull:
                if self._reserve is None or not self._reserve.spend():
                    raise
                await self._shorten_log()
                more = thin is not None
                while thin and more:
                    more = await self._transact(thin, writes=True)
                    await self._shorten_log()
                done = await self._transact(work, writes=True)
                await self._shorten_log()
            await self.hold_reserve()
            return done

        return await self._run(free, self._writing)

    async def _shorten_log(self) -> None:
        """Have SQLite carry over what is in its log, and give back the room of that, if it can."""
        async with self._engine.connect() as connection:
            driver: Any = (await connection.get_raw_connection()).driver_connection
            with contextlib.suppress(sqlite3.Error):
                await driver.execute("PRAGMA wal_checkpoint(TRUNCATE)")

    async def _transact(self, work: Callable[[Connection], T], *, writes: bool) -> T:
        with refused(self._place):
            async with self._engine.connect() as connection:
                await connection.execution_options(writes=writes)
                async with connection.begin():
                    return await connection.run_sync(work)

    async def _run(
        self, transact: Callable[[], Coroutine[Any, Any, T]], turn: contextlib.AbstractAsyncContextManager[None]
    ) -> T:
        async def in_turn() -> T:
            async with turn:
                return await transact()

        # To break off a transaction is to break its connection, which in memory would take the database with it.
        task = asyncio.create_task(in_turn())
        self._tasks.add(task)
        task.add_done_callback(self._done)
        return await asyncio.shield(task)

    def _done(self, task: asyncio.Task[Any]) -> None:
        self._tasks.discard(task)
        if not task.cancelled():
            task.exception()  # whoever asked may have gone

    async def list(
        self,
        caller: str | None = None,
        states: Collection[str] = (),
        page_size: int = 100,
        before: tuple[datetime, str] | None = None,
    ) -> list[JobRecord]:
        """Return jobs, newest first: of a caller, in some states, and older than a `create_time` and id."""
        query = select(jobs).order_by(jobs.c.create_time.desc(), jobs.c.id.desc()).limit(page_size)
        if caller is not None:
            query = query.where(jobs.c.caller == caller)
        if states:
            query = query.where(jobs.c.state.in_(states))
        if before:
            time, id = before
            same_time = and_(jobs.c.create_time == time, jobs.c.id < id)
            query = query.where(or_(jobs.c.create_time < time, same_time))
        return await self._read(lambda connection: _jobs(connection, query))


def _append(connection: Connection, batches: Sequence[Batch]) -> list[Exception | None]:
    """Write what can be; a handful of statements, however many batches there are."""
    columns = (jobs.c.id, jobs.c.state, jobs.c.sequence, jobs.c.owner, jobs.c.attempt)
    # Whoever locks several jobs locks them in the same order.
    asked = select(*columns).where(jobs.c.id.in_({batch.id for batch in batches})).order_by(jobs.c.id).with_for_update()
    found = {row.id: dict(row._mapping) for row in connection.execute(asked)}
    there = _use(connection, {sha256 for batch in batches for sha256 in batch.images})
    changed: dict[str, dict[str, Any]] = {}
    told, held = [], set()
    failures: list[Exception | None] = []
    for batch in batches:
        failure = _hindrance(found.get(batch.id), batch, there)
        if failure and batch.events and _told(connection, batch.id, batch.events[-1]):
            failures.append(None)  # it was written before, and the answer was lost
            continue
        failures.append(failure)
        if failure:
            continue
        changes = dict(batch.changes)
        if batch.events:
            changes["sequence"] = batch.events[-1].sequence
        if changes.get("state") in ENDED:
            changes |= {"owner": "", "lease_until": None}
        found[batch.id] |= changes
        changed.setdefault(batch.id, {}).update(changes)
        told += [{"job": batch.id} | asdict(event) for event in batch.events]
        held |= {(batch.id, sha256) for sha256 in batch.images}

    alike: dict[tuple[str, ...], list[dict[str, Any]]] = {}
    for id, changes in changed.items():
        if changes:
            alike.setdefault(tuple(sorted(changes)), []).append({"this": id} | changes)
    for rows in alike.values():
        connection.execute(update(jobs).where(jobs.c.id == bindparam("this")), rows)
    if told:
        connection.execute(insert(events), told)
    if held:
        _hold(connection, held)
    return failures


def _hindrance(job: dict[str, Any] | None, batch: Batch, there: Collection[str]) -> Exception | None:
    """Return why a batch does not fit a job, of which the columns are given, and the images that are there."""
    if job is None:
        return _no_job(batch.id)
    if unknown := batch.changes.keys() - jobs.c.keys():
        raise KeyError(f"jobs have no column {min(unknown)!r}")
    if job["state"] in ENDED and (batch.events or "state" in batch.changes):
        return JobEnded(f"the job {batch.id!r} has {job['state']} and changes no more")
    if batch.fence and batch.fence != (job["owner"], job["attempt"]):
        holder = f"{job['owner'] or 'nobody'} has attempt {job['attempt']}"
        return LeaseLost(f"{batch.fence.owner} lost attempt {batch.fence.attempt} of job {batch.id!r}; {holder}")
    numbers = [event.sequence for event in batch.events]
    if numbers != list(range(job["sequence"] + 1, job["sequence"] + 1 + len(numbers))):
        return OutOfSequence(f"the next event of job {batch.id!r} is {job['sequence'] + 1}; these are {numbers}")
    if missing := set(batch.images) - set(there):
        return _no_image(min(missing))
    return None


def _told(connection: Connection, id: str, event: EventRecord) -> bool:
    """Return whether this very event of a job is there."""
    query = select(events.c.time, events.c.kind).where(events.c.job == id, events.c.sequence == event.sequence)
    return connection.execute(query).all() == [(event.time, event.kind)]


def _use(connection: Connection, sha256s: Collection[str]) -> set[str]:
    """Keep images from being collected for a while; return those that are there."""
    if not sha256s:
        return set()
    _lock_images(connection, sha256s)
    used = update(images).where(images.c.sha256.in_(sha256s)).values(last_used=datetime.now(UTC))
    return set(connection.scalars(used.returning(images.c.sha256)))


def _compact(connection: Connection, id: str, through: int) -> None:
    """Drop a job's events of progress up to a number."""
    connection.execute(update(jobs).where(jobs.c.id == id, jobs.c.compacted < through).values(compacted=through))
    old = and_(events.c.job == id, events.c.sequence <= through, events.c.kind == PROGRESS)
    connection.execute(delete(events).where(old))


def _thin(connection: Connection, id: str, through: int | None = None) -> bool:
    """Drop some of a job's oldest events of progress, up to a number; return whether there were so many."""
    old = select(events.c.sequence).where(events.c.job == id, events.c.kind == PROGRESS)
    if through is not None:
        old = old.where(events.c.sequence <= through)
    found = connection.scalars(old.order_by(events.c.sequence).limit(THINNED)).all()
    if found:
        _compact(connection, id, found[-1])
    return len(found) == THINNED


def _lock_images(connection: Connection, sha256s: Collection[str]) -> None:
    """Let nobody else use, hold or forget images before this transaction ends; all who lock several do so in order."""
    locked = select(images.c.sha256).where(images.c.sha256.in_(sha256s)).order_by(images.c.sha256)
    connection.execute(locked.with_for_update())


def _forget(connection: Connection, which: ColumnElement[bool], remove: Remove) -> int:
    """Forget those of some images that nothing holds, and remove their blobs; return how many bytes they had."""
    forgotten = delete(images).where(which, _unheld()).returning(images.c.sha256, images.c.bytes)
    sizes = {row.sha256: row.bytes for row in connection.execute(forgotten)}
    if sizes:
        await_only(remove(list(sizes)))
    return sum(sizes.values())


def _unheld() -> ColumnElement[bool]:
    by_job = exists().where(job_images.c.sha256 == images.c.sha256)
    return and_(~by_job, images.c.sha256.not_in(select(uploads.c.sha256)))


def _hold(connection: Connection, pairs: Collection[tuple[str, str]]) -> None:
    """Let jobs hold images: pairs of their names."""
    query = select(job_images.c.job, job_images.c.sha256).where(job_images.c.job.in_({id for id, _ in pairs}))
    known = {(id, sha256) for id, sha256 in connection.execute(query)}
    if new := [{"job": id, "sha256": sha256} for id, sha256 in sorted(set(pairs) - known)]:
        connection.execute(insert(job_images), new)


def _get(connection: Connection, id: str) -> JobRecord:
    found = _jobs(connection, select(jobs).where(jobs.c.id == id))
    if not found:
        raise _no_job(id)
    return found[0]


def _jobs(connection: Connection, query: Select[Any]) -> list[JobRecord]:
    return [JobRecord(**row._mapping) for row in connection.execute(query)]


def _no_job(id: str) -> NotFound:
    return NotFound("name", f"there is no job {id!r}")


def _no_image(sha256: str) -> NotFound:
    return NotFound("images", f"there is no image {sha256!r}")


def _url(where: Path | str) -> URL:
    if isinstance(where, Path):
        return URL.create(SCHEMES["sqlite"], database=str(where))
    if where == MEMORY:
        return URL.create(SCHEMES["sqlite"])
    try:
        url = make_url(where)
        driver = SCHEMES[url.drivername]
    except (ArgumentError, KeyError):
        raise ValueError(f"a database is at postgresql://… or sqlite:///…, not at {where.split('@')[-1]!r}") from None
    return url.set(drivername=driver)


def _is_sqlite(url: URL) -> bool:
    return url.drivername == SCHEMES["sqlite"]


def _engine(url: URL) -> AsyncEngine:
    if not _is_sqlite(url):
        try:
            return create_async_engine(url, pool_pre_ping=True, connect_args={"timeout": CONNECT_TIMEOUT_S})
        except ModuleNotFoundError as error:
            raise ModuleNotFoundError('PostgreSQL needs its driver: pip install "nst-service[postgres]"') from error
    engine = create_async_engine(url, poolclass=None if url.database else StaticPool)
    event.listen(engine.sync_engine, "connect", _connected)
    event.listen(engine.sync_engine, "begin", _begin)
    return engine


def _connected(connection: Any, _: Any) -> None:
    """Prepare a new connection to SQLite."""
    connection.isolation_level = None  # `_begin` begins transactions: Python's driver would do so too late
    cursor = connection.cursor()
    for setting in (
        f"busy_timeout = {BUSY_TIMEOUT_MS}",
        "journal_mode = WAL",
        "synchronous = FULL",
        f"wal_autocheckpoint = {LOG_PAGES}",
        "foreign_keys = ON",
    ):
        cursor.execute(f"PRAGMA {setting}")
    cursor.close()


def _begin(connection: Connection) -> None:
    # A transaction that reads first and writes later can fail in between; this one waits at its beginning.
    writes = connection.get_execution_options()["writes"]
    connection.exec_driver_sql("BEGIN IMMEDIATE" if writes else "BEGIN")


def _migrate(connection: Connection) -> None:
    """Check the database and bring its schema up to date."""
    if connection.dialect.name == "sqlite":
        if (found := connection.exec_driver_sql("PRAGMA quick_check(1)").scalar()) != "ok":
            raise StorageDamaged(
                f"the database {connection.engine.url.database} is damaged: {' '.join(str(found).split())}"
            )
    else:
        connection.execute(select(func.pg_advisory_xact_lock(MIGRATING)))
    config = Config()
    config.set_main_option("script_location", str(MIGRATIONS).replace("%", "%%"))
    config.attributes["connection"] = connection
    scripts = ScriptDirectory.from_config(config)
    present = set(MigrationContext.configure(connection).get_current_heads())
    if newer := present - {script.revision for script in scripts.walk_revisions()}:
        raise SchemaNewer(
            f"the database was made by a newer version of this server (schema {min(newer)}, this one knows "
            f"{scripts.get_current_head()}); run that version, or use another database"
        )
    if present != set(scripts.get_heads()):
        command.upgrade(config, "head")
