"""What is removed when, and that there is never more than may be kept."""

from __future__ import annotations

import asyncio
import hashlib
import os
from collections.abc import AsyncIterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

import grpc
import pytest
import pytest_asyncio

from nst_server.errors import StorageFull
from nst_server.housekeeping import JUST_ENDED, LOOSE, PRESSED, Housekeeper
from nst_server.ledger import Ledger, _boundless
from nst_server.library import Library
from nst_server.storage.blobs import Blobs
from nst_server.storage.database import JobStore
from nst_server.storage.records import EventRecord, JobRecord
from tests.server.conftest import FOREVER, noise, until, watched
from tests.server.test_durable_jobs import Ask, Serve, begin, create, delete, downloaded, get, update, write

MIB = 2**20
MINUTE = timedelta(minutes=1)


@pytest_asyncio.fixture(loop_scope="session")
async def ledger(tmp_path: Path) -> AsyncIterator[Ledger]:
    """Where jobs and images are kept, in a folder."""
    opened = Ledger(await JobStore.open(tmp_path / "jobs.sqlite3"), Blobs.open(tmp_path / "objects"), None)
    yield opened
    await opened.close(1)


def size(folder: Path) -> int:
    """Return how many bytes the files of a folder have."""
    return sum(file.stat().st_size for file in (folder / "objects").rglob("*") if file.is_file())


async def job(ledger: Ledger, id: str, state: str, ago: timedelta, megabytes: float = 1) -> None:
    """Store a job that has been in a state for some time, and holds an image of its own."""
    data = os.urandom(round(megabytes * MIB))
    await ledger.keep_image(data, 16, 16, "image/png")
    now = datetime.now(UTC)
    images = [hashlib.sha256(data).hexdigest()]
    await ledger.store.create(JobRecord(id, now - 2 * ago, owner=ledger.owner, state="queued"), images=images)
    changes = {"state": state, "end_time": None if state in ("paused", "running") else now - ago}
    await ledger.store.append(id, None, [EventRecord(1, 1, now - ago, "state", {})], changes)


async def left(ledger: Ledger) -> set[str]:
    """Return the ids of the jobs that are there."""
    return {record.id for record in await ledger.store.list()}


def keeping(ledger: Ledger, keep_bytes: int | None, keep: timedelta | None = None) -> Housekeeper:
    """Return a housekeeper."""
    return Housekeeper(ledger, ledger.delete, keep, keep_bytes)


async def test_what_may_be_kept_bounds_the_disk(ledger: Ledger, tmp_path: Path) -> None:
    """After a sweep there is no more, not a day later: the jobs that ended last, and all that lives, are left."""
    for number in range(20):
        await job(ledger, f"{number:02}", "succeeded", (30 - number) * MINUTE)
    await job(ledger, "running", "running", 99 * MINUTE)
    await keeping(ledger, 5 * MIB).sweep(datetime.now(UTC))

    assert await left(ledger) == {"running", "17", "18", "19"}
    assert size(tmp_path) <= 5 * MIB


async def test_a_job_that_has_just_ended_stays(ledger: Ledger) -> None:
    """However much there is: its caller is about to ask for the result."""
    await job(ledger, "just", "succeeded", JUST_ENDED / 2)
    await job(ledger, "before", "succeeded", JUST_ENDED * 2)
    await keeping(ledger, 1000).sweep(datetime.now(UTC))
    assert await left(ledger) == {"just"}


async def test_paused_jobs_push_out_no_newer_ones(ledger: Ledger, tmp_path: Path) -> None:
    """They count as what ended when they were paused, and go like that: by size and by age."""
    for number, state in enumerate(["paused", "succeeded", "paused", "failed", "succeeded"]):
        await job(ledger, f"{number}", state, (30 - number) * MINUTE)
    await keeping(ledger, 3 * MIB).sweep(datetime.now(UTC))
    assert await left(ledger) == {"3", "4"}
    await job(ledger, "old", "paused", 40 * MINUTE)
    await keeping(ledger, None, 35 * MINUTE).sweep(datetime.now(UTC))
    assert await left(ledger) == {"3", "4"}


async def test_checkpoints_count(ledger: Ledger, tmp_path: Path) -> None:
    """Those of paused jobs are the largest things there are, and go with them."""
    await job(ledger, "paused", "paused", 5 * MINUTE, 0.1)
    await job(ledger, "ended", "succeeded", 4 * MINUTE)
    await ledger.blobs.write("checkpoints/paused/1-10", os.urandom(4 * MIB))
    await keeping(ledger, 3 * MIB).sweep(datetime.now(UTC))
    assert await left(ledger) == {"ended"}
    assert size(tmp_path) == MIB


async def test_uploads_that_nobody_goes_on_with_count(ledger: Ledger, tmp_path: Path) -> None:
    """When there is too much they and loose images go before any job; what still comes is never taken."""
    library = Library(ledger, 100 * MIB, 10**8)
    await job(ledger, "ended", "succeeded", 99 * MINUTE)
    idle, coming = [await library.create(4 * MIB, "") for _ in range(2)]
    for upload in (idle, coming):
        await library.write(upload.id, 0, os.urandom(2 * MIB))
    loose = os.urandom(MIB)
    await ledger.keep_image(loose, 16, 16, "image/png")
    housekeeper = keeping(ledger, 4 * MIB)
    await housekeeper.sweep(datetime.now(UTC))
    assert size(tmp_path) == 5 * MIB, "what was used a moment ago was taken"
    assert await left(ledger) == set()

    later = datetime.now(UTC) + PRESSED + MINUTE
    ledger.make_room = _boundless
    await job(ledger, "another", "succeeded", 5 * MINUTE)
    (part,) = await ledger.blobs.keys(f"uploads/{coming.id}")
    os.utime(tmp_path / "objects" / part, (later.timestamp(), later.timestamp()))
    await housekeeper.sweep(later)
    assert (await library.get(coming.id)).received_bytes == 2 * MIB
    assert await ledger.blobs.keys("uploads") == [part]
    assert await left(ledger) == {"another"}
    assert size(tmp_path) <= 4 * MIB
    await housekeeper.sweep(later + LOOSE + MINUTE)
    assert await ledger.blobs.keys("uploads") == []


async def test_what_does_not_fit_is_refused(ledger: Ledger, tmp_path: Path) -> None:
    """Parts and images, when what must stay leaves no room; as soon as it may go there is room again."""
    library = Library(ledger, 100 * MIB, 10**8)
    keeping(ledger, 4 * MIB)
    upload = await library.create(2 * MIB, "")
    await library.write(upload.id, 0, os.urandom(MIB))
    await job(ledger, "live", "running", 99 * MINUTE, 2)
    with pytest.raises(StorageFull, match=r"no room for 2097152 bytes more: .* take 3145728 of the 4194304 bytes"):
        await library.create(2 * MIB, "")
    with pytest.raises(StorageFull):
        await ledger.keep_image(os.urandom(2 * MIB), 16, 16, "image/png")
    assert len(await ledger.store.uploads_before(datetime.now(UTC) + MINUTE)) == 1
    await ledger.store.append("live", changes={"state": "failed", "end_time": datetime.now(UTC) - 2 * MINUTE})
    keeping(ledger, 4 * MIB)
    await ledger.keep_image(os.urandom(2 * MIB), 16, 16, "image/png")
    await ledger.keep_image(os.urandom(MIB), 16, 16, "image/png")
    assert await left(ledger) == set()
    assert size(tmp_path) == 4 * MIB


async def test_what_the_storage_refuses_stops_no_other_chore(ledger: Ledger, tmp_path: Path) -> None:
    """A job that cannot be deleted, for instance: what nobody holds goes nevertheless."""

    async def refuse(name: str) -> int:
        raise StorageFull(f"{name} cannot be deleted")

    await job(ledger, "old", "succeeded", 99 * MINUTE)
    await ledger.keep_image(b"loose", 16, 16, "image/png")
    await Housekeeper(ledger, refuse, MINUTE, None).sweep(datetime.now(UTC) + 2 * LOOSE)
    assert await left(ledger) == {"old"}
    assert size(tmp_path) == MIB


async def test_a_deleted_jobs_images_are_gone(serve: Serve, ask: Ask) -> None:
    """Its result and what it was made of, but for what another job or an upload holds."""
    _, client = await serve()
    photo = noise(60, 60, seed=3)
    uploaded = await write(client, (await begin(client, photo)).name, photo, 0, len(photo))
    request = ask(seed=1, init="INIT_NOISE")
    request.content.Clear()
    request.content.name = uploaded.image
    first, second = [(await create(client, each)).name for each in (request, ask(seed=2, init="INIT_NOISE"))]
    results = [(await watched(client, name)).job.result.image for name in (first, second)]
    painting = f"images/{hashlib.sha256(request.styles[0].image.data).hexdigest()}"

    await delete(client, first)
    refusal = await client.refusal(downloaded(client, results[0]))
    assert refusal.code == grpc.StatusCode.NOT_FOUND
    for image in (results[1], painting, uploaded.image):
        assert await downloaded(client, image)
    await delete(client, second)
    for image in (results[1], painting):
        assert (await client.refusal(downloaded(client, image))).code == grpc.StatusCode.NOT_FOUND
    assert await downloaded(client, uploaded.image) == photo


async def test_jobs_of_the_same_picture_come_and_go(serve: Serve, ask: Ask) -> None:
    """Eight at a time, each deleted while the next are created: none misses an image that was sent with it."""
    _, client = await serve(queue_size=100)

    async def come_and_go() -> None:
        for _ in range(10):
            await delete(client, (await create(client, ask())).name)

    await asyncio.gather(*(come_and_go() for _ in range(8)))


async def test_a_paused_job_that_expires_is_gone_everywhere(serve: Serve, ask: Ask) -> None:
    """For its server, which has it in its memory, as for the store."""
    server, client = await serve()
    job = await create(client, ask(**FOREVER))
    await update(client, job.name, paused=True)
    housekeeper = Housekeeper(server._ledger, server._application.delete_job, timedelta(days=1), None)
    await housekeeper.sweep(datetime.now(UTC) + timedelta(days=2))
    assert (await client.refusal(get(client, job.name))).code == grpc.StatusCode.NOT_FOUND
    await until(lambda: not server._application._jobs)


async def test_machines_take_turns_after_a_restart(serve: Serve, ask: Ask, tmp_path: Path) -> None:
    """Whose the jobs are that wait is stored with them."""
    server, client = await serve(data_dir=tmp_path / "shared")
    names = [(await create(client, ask(**FOREVER))).name for _ in range(2)]
    (machine,) = {server._application._jobs[name].caller for name in names}
    await server.stop(0)
    server, client = await serve(data_dir=tmp_path / "shared")
    assert {server._application._jobs[name].caller for name in names} == {machine} != {""}
    for name in names:
        await delete(client, name)
