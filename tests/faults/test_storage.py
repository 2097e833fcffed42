"""Storage that fails beneath a running server: what is said, and what is not harmed."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import hashlib
import os
import re
import signal
import sqlite3
import subprocess
from collections.abc import Callable, Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import grpc
import pytest

from nst.v1 import image_service_pb2, image_service_pb2_grpc, job_pb2, style_transfer_service_pb2
from nst_server.errors import NotFound, StorageFull, StorageUnavailable
from nst_server.housekeeping import Housekeeper
from nst_server.jobs import Job
from nst_server.journal import patiently
from nst_server.storage.database import JobStore
from nst_server.storage.records import EventRecord, JobRecord
from tests.server.conftest import FOREVER, Caller, noise, until, watched
from tests.server.storage.conftest import postgresql, postgresql_url
from tests.server.test_process import START_S
from tests.server.test_styles import small_disk

Ask = Callable[..., style_transfer_service_pb2.StylizeRequest]
Serve = Callable[..., Any]

SUCCEEDED, FAILED = job_pb2.JOB_STATE_SUCCEEDED, job_pb2.JOB_STATE_FAILED

__all__ = ["postgresql", "postgresql_url"]

KEEP, LATER = timedelta(hours=1), datetime.now(UTC) + timedelta(hours=2)
"""How long jobs are kept, and a time at which those that ended while this runs have been for longer."""

PROGRESS = {"losses": "0.123456789 " * 40}
"""As large as an iteration's numbers."""

LONG = {"iterations": 200, "size_px": 96}
"""Options of a job of some seconds."""


async def create(client: Caller, request: style_transfer_service_pb2.StylizeRequest) -> str:
    """Create a job; return its name."""
    return (await client.jobs.CreateJob(style_transfer_service_pb2.CreateJobRequest(request=request))).name


async def get(client: Caller, name: str) -> job_pb2.Job:
    """Return a job."""
    return await client.jobs.GetJob(style_transfer_service_pb2.GetJobRequest(name=name))


async def download(client: Caller, name: str) -> bytes:
    """Return an image's file."""
    stub = image_service_pb2_grpc.ImageServiceStub(client.channel)
    return b"".join([part.data async for part in stub.DownloadImage(image_service_pb2.DownloadImageRequest(name=name))])


def checkpoints(data: Path, name: str) -> list[Path]:
    """Return the files of a job's checkpoints."""
    folder = data / "objects" / "checkpoints" / name.removeprefix("jobs/")
    return [file for file in folder.glob("[0-9]*-*[0-9]") if "#" not in file.name]  # which is still being written


def fill(disk: Path) -> Path:
    """Fill a disk; return the file that does."""
    filling = disk / "filling"
    with contextlib.suppress(OSError), filling.open("wb", buffering=0) as stream:
        while True:
            stream.write(bytes(4096))
    return filling


async def test_a_full_disk_delays_what_is_told_and_loses_nothing(serve: Serve, tmp_path: Path, ask: Ask) -> None:
    """A new job is refused, running and waiting ones are not harmed, reading goes on; with room all is told."""
    with small_disk(tmp_path / "disk") as disk:
        subprocess.run(["mount", "-o", "remount,size=16m", str(disk)], check=True)
        server, client = await serve(data_dir=disk / "data")
        running, waiting = await create(client, ask(**FOREVER)), await create(client, ask(size_px=32))
        live = server._application._jobs[running]
        await until(lambda: live.now.progress is not None, 20)
        filling = fill(disk)
        await until(lambda: live.now.sequence > live.snapshot().sequence + 20, 20)  # nothing is durable any more

        refusal = await client.refusal(
            client.jobs.CreateJob(style_transfer_service_pb2.CreateJobRequest(request=ask()))
        )
        assert (refusal.code, refusal.reason) == (grpc.StatusCode.RESOURCE_EXHAUSTED, "STORAGE_FULL")
        assert (await get(client, running)).state == job_pb2.JOB_STATE_RUNNING
        listed = await client.jobs.ListJobs(style_transfer_service_pb2.ListJobsRequest())
        assert {job.name for job in listed.jobs} == {running, waiting}, "what was refused is there by half"
        filling.unlink()
        await client.jobs.UpdateJob(style_transfer_service_pb2.UpdateJobRequest(name=running, finish=True))

        for name in (running, waiting):
            told = await asyncio.wait_for(watched(client, name), 60)
            assert (told.job.state, told.job.attempt) == (SUCCEEDED, 1)
            assert [event.sequence for event in told.numbered] == list(range(1, len(told.numbered) + 1))
            assert await download(client, told.job.result.image) == told.result
        await server.stop(0)


async def test_a_job_whose_turn_comes_while_the_disk_is_full_waits(serve: Serve, tmp_path: Path, ask: Ask) -> None:
    """It is no fault of the job, which begins when there is room."""
    with small_disk(tmp_path / "disk") as disk:
        server, client = await serve(data_dir=disk / "data")
        running, waiting = await create(client, ask(**FOREVER)), await create(client, ask(size_px=32))
        await until(lambda: bool(server._application.scheduler._running), 20)
        filling = fill(disk)
        cancelling = asyncio.create_task(_cancelled(client, running))
        scheduler = server._application.scheduler
        await until(lambda: waiting in scheduler._running, 20)  # the device was free at once
        await asyncio.sleep(1.5)
        assert server._application._jobs[waiting].now.attempt == 0
        filling.unlink()

        assert await asyncio.wait_for(cancelling, 20) == job_pb2.JOB_STATE_CANCELLED
        assert (await asyncio.wait_for(watched(client, waiting), 60)).job.state == SUCCEEDED
        await server.stop(0)


async def test_a_full_disk_is_said_to_whoever_waits(
    serve: Serve, tmp_path: Path, ask: Ask, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Who cancels is told after a while that it is not durable; the device is free at once, with room it is done."""
    monkeypatch.setattr("nst_server.journal.PATIENCE_S", 1.0)
    with small_disk(tmp_path / "disk") as disk:
        subprocess.run(["mount", "-o", "remount,size=16m", str(disk)], check=True)
        server, client = await serve(data_dir=disk / "data")
        running = await create(client, ask(**FOREVER))
        live = server._application._jobs[running]
        await until(lambda: live.now.progress is not None, 20)
        filling = fill(disk)
        await until(lambda: live.now.sequence > live.snapshot().sequence + 20, 20)
        for call in (_cancelled, _cancelled):
            refusal = await asyncio.wait_for(client.refusal(call(client, running)), 10)
            assert (refusal.code, refusal.reason) == (grpc.StatusCode.RESOURCE_EXHAUSTED, "STORAGE_FULL")
        assert not server._application.scheduler._running
        filling.unlink()
        assert (await asyncio.wait_for(watched(client, running), 20)).job.state == job_pb2.JOB_STATE_CANCELLED
        await server.stop(0)


async def test_a_full_disk_can_be_emptied(serve: Serve, tmp_path: Path, ask: Ask) -> None:
    """Jobs that ended can be deleted, with their images, though nothing can be written; so can one that runs."""
    with small_disk(tmp_path / "disk") as disk:
        subprocess.run(["mount", "-o", "remount,size=24m", str(disk)], check=True)
        server, client = await serve(data_dir=disk / "data")
        ended = [await create(client, ask(seed=seed, init="INIT_NOISE", size_px=64)) for seed in range(3)]
        for name in ended:
            assert (await watched(client, name)).job.state == SUCCEEDED
        result = (await get(client, ended[0])).result.image
        running = await create(client, ask(**FOREVER))
        live = server._application._jobs[running]
        await until(lambda: live.now.progress is not None, 20)
        watching = asyncio.create_task(client.refusal(watched(client, running)))
        fill(disk)
        await until(lambda: live.now.sequence > live.snapshot().sequence + 20, 20)

        await asyncio.wait_for(_deleted(client, ended[0]), 10)
        assert (await client.refusal(get(client, ended[0]))).code == grpc.StatusCode.NOT_FOUND
        assert (await client.refusal(download(client, result))).code == grpc.StatusCode.NOT_FOUND
        fill(disk)
        await asyncio.wait_for(Housekeeper(server._ledger, server._application.delete_job, KEEP, None).sweep(LATER), 20)
        for name in ended:
            assert (await client.refusal(get(client, name))).code == grpc.StatusCode.NOT_FOUND
        fill(disk)
        await asyncio.wait_for(_deleted(client, running), 10)
        assert (await asyncio.wait_for(watching, 10)).code == grpc.StatusCode.NOT_FOUND
        await until(lambda: not server._application.scheduler._running, 10)
        await server.stop(0)


async def test_a_full_disk_lets_go_of_a_job_with_many_events(tmp_path: Path) -> None:
    """More than the reserve could take at once, while others write whatever becomes free."""
    with small_disk(tmp_path / "disk") as disk:
        subprocess.run(["mount", "-o", "remount,size=48m", str(disk)], check=True)
        store, now = await JobStore.open(disk / "jobs.sqlite3"), datetime.now(UTC)
        for id in "ab":
            await store.create(JobRecord(id, now))
        numbers = iter(range(1, 10**6))
        for _ in range(20):
            await store.append(
                "a", events=[EventRecord(next(numbers), 1, now, "progress", PROGRESS) for _ in range(1000)]
            )
        fill(disk)

        async def writing() -> None:
            for number in range(1, 10**6):
                event = EventRecord(number, 1, now, "progress", PROGRESS)
                await patiently(functools.partial(store.append, "b", events=[event]), "no room")

        writer = asyncio.create_task(writing())
        await asyncio.sleep(0.2)
        await asyncio.wait_for(store.delete("a", _removed), 30)
        writer.cancel()
        with pytest.raises(NotFound):
            await store.get("a")
        assert (disk / "jobs.sqlite3-reserve").exists(), "the next deletion has no room"
        await store.close()


async def _removed(sha256s: Sequence[str]) -> None:
    assert not sha256s


async def _deleted(client: Caller, name: str) -> None:
    await client.jobs.DeleteJob(style_transfer_service_pb2.DeleteJobRequest(name=name))


async def test_a_read_only_database_is_said_and_harms_nothing(
    serve: Serve, ask: Ask, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, postgresql: Any, postgresql_url: str
) -> None:
    """Streams and callers are told, not left to wait; when it can be written to again everything has gone on."""
    monkeypatch.setattr("nst_server.journal.PATIENCE_S", 1.0)
    monkeypatch.setattr(Job.watch, "__defaults__", (0, 0.5))
    server, client = await serve(database=postgresql_url, blobs=f"file://{tmp_path}/blobs")
    name = await create(client, ask(**FOREVER))
    live = server._application._jobs[name]
    await until(lambda: live.now.progress is not None, 20)
    watching = asyncio.create_task(client.refusal(watched(client, name)))

    def read_only(value: str) -> None:
        postgresql(f"ALTER DATABASE nst SET default_transaction_read_only = {value}")
        postgresql("SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = 'nst'")

    await asyncio.to_thread(read_only, "on")
    refusals = [await asyncio.wait_for(watching, 20)]
    for call in (_updated, _cancelled, _deleted):
        refusals.append(await asyncio.wait_for(client.refusal(call(client, name)), 20))
    for refusal in refusals:
        assert (refusal.code, refusal.reason) == (grpc.StatusCode.FAILED_PRECONDITION, "STORAGE_READ_ONLY")
    await asyncio.to_thread(read_only, "off")
    await until(lambda: server._ledger.read_only is None)
    told = await asyncio.wait_for(watched(client, name), 30)
    assert told.job.state == job_pb2.JOB_STATE_CANCELLED  # which was told to it meanwhile
    assert [event.sequence for event in told.numbered] == list(range(1, len(told.numbered) + 1))


async def _updated(client: Caller, name: str) -> None:
    await client.jobs.UpdateJob(style_transfer_service_pb2.UpdateJobRequest(name=name, paused=True))


async def _cancelled(client: Caller, name: str) -> int:
    return (await client.jobs.CancelJob(style_transfer_service_pb2.CancelJobRequest(name=name))).state


async def test_a_read_only_folder_of_images_is_said(serve: Serve, tmp_path: Path, ask: Ask) -> None:
    """What would write there is FAILED_PRECONDITION, the job that runs fails with the reason; the rest goes on."""
    (tmp_path / "data").mkdir()
    with small_disk(tmp_path / "data" / "objects") as objects:
        server, client = await serve(data_dir=tmp_path / "data")
        before = (await watched(client, await create(client, ask()))).job
        running = await create(client, ask(**LONG))
        await until(lambda: server._application._jobs[running].now.progress is not None, 20)
        subprocess.run(["mount", "-o", "remount,ro", str(objects)], check=True)

        new = style_transfer_service_pb2.CreateJobRequest(request=ask(content=noise(50, 50)))
        refusal = await client.refusal(client.jobs.CreateJob(new))
        assert (refusal.code, refusal.reason) == (grpc.StatusCode.FAILED_PRECONDITION, "STORAGE_READ_ONLY")
        told = await asyncio.wait_for(watched(client, running), 60)
        assert (told.job.state, told.job.error.reason) == (FAILED, "STORAGE_READ_ONLY")
        assert (await get(client, before.name)).state == SUCCEEDED
        assert await download(client, before.result.image)
        refusal = await client.refusal(_written(client, b"abc"))
        assert (refusal.code, refusal.reason) == (grpc.StatusCode.FAILED_PRECONDITION, "STORAGE_READ_ONLY")

        subprocess.run(["mount", "-o", "remount,rw", str(objects)], check=True)
        assert (await watched(client, await create(client, ask()))).job.state == SUCCEEDED
        await server.stop(0)


async def _written(client: Caller, data: bytes) -> None:
    uploads = image_service_pb2_grpc.ImageServiceStub(client.channel)
    upload = await uploads.CreateUpload(image_service_pb2.CreateUploadRequest(total_bytes=len(data)))
    await uploads.WriteUpload(image_service_pb2.WriteUploadRequest(name=upload.name, data=data))


async def test_a_read_only_data_folder_is_one_line(launch: Callable[..., Any], tmp_path: Path) -> None:
    """At the start: exit code 1, and one line that names the folder."""
    with small_disk(tmp_path / "disk") as disk:
        subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
        server = await launch(f"--data-dir={disk / 'data'}")
        assert await server.ended(START_S) == 1
    (line,) = server.lines
    assert str(disk) in line


async def test_a_damaged_checkpoint_costs_time_only(serve: Serve, tmp_path: Path, ask: Ask) -> None:
    """The worker dies, and its checkpoints are no good: the job begins anew and ends with the same picture."""
    server, client = await serve(checkpoint_interval_s=0.1)
    (executor,) = server.executors
    undisturbed = await client.told(ask(**LONG))
    for damage in ("torn", "altered", "empty"):
        name = await create(client, ask(**LONG))
        await until(lambda name=name: bool(checkpoints(tmp_path / "data", name)), 20)
        os.kill(executor.pid, signal.SIGSTOP)
        for file in checkpoints(tmp_path / "data", name):
            data = bytearray(file.read_bytes())
            if damage == "altered":
                data[len(data) // 2] ^= 255
            file.write_bytes({"torn": data[: len(data) // 2], "altered": data, "empty": b""}[damage])
        os.kill(executor.pid, signal.SIGKILL)
        told = await asyncio.wait_for(watched(client, name), 60)

        assert (told.job.state, told.job.attempt) == (SUCCEEDED, 2)
        assert [event.sequence for event in told.numbered] == list(range(1, len(told.numbered) + 1))
        again = [event.progress.iteration for event in told.of("progress") if event.attempt == 2]
        assert again == list(range(201))
        assert (told.pixels == undisturbed.pixels).all()


async def test_a_damaged_page_of_the_database_harms_one_job(
    serve: Serve, launch: Callable[..., Any], tmp_path: Path, ask: Ask
) -> None:
    """What it holds is DATA_LOSS; other jobs go on, new ones too. The next start says which file is damaged."""
    server, client = await serve()
    damaged, other = await create(client, ask(**LONG)), await create(client, ask())
    for name in (damaged, other):
        assert (await watched(client, name)).job.state == SUCCEEDED
    running = await create(client, ask(**LONG))
    await until(lambda: server._application._jobs[running].now.progress is not None, 20)
    file, store = tmp_path / "data" / "jobs.sqlite3", server._ledger.store
    async with store._writing:
        with contextlib.closing(sqlite3.connect(file)) as connection:
            connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
        _damage(file, damaged)
        await store._engine.dispose()  # open connections have the page in their memory

    refusal = await client.refusal(watched(client, damaged))
    assert (refusal.code, refusal.reason) == (grpc.StatusCode.DATA_LOSS, "STORAGE_DAMAGED")
    assert "jobs.sqlite3 is damaged" in refusal.message
    assert (await watched(client, other)).result
    assert (await asyncio.wait_for(watched(client, running), 60)).job.state == SUCCEEDED
    assert (await watched(client, await create(client, ask()))).job.state == SUCCEEDED

    await server.stop(0)
    later = await launch()
    assert await later.ended(START_S) == 1
    (line,) = later.lines
    assert re.search(r"nst-server: .*jobs\.sqlite3 is damaged: .*; restore it from a backup", line)


def _damage(file: Path, name: str) -> None:
    """Overwrite the header of a page in the middle of a job's events: a leaf of a B-tree."""
    data = bytearray(file.read_bytes())
    id = name.removeprefix("jobs/").encode()
    leaves = [start for start in range(4096, len(data), 4096) if data[start] in (10, 13)]
    full = [start for start in leaves if data[start : start + 4096].count(id) > 1]
    start = full[len(full) // 3]
    data[start : start + 64] = b"\xff" * 64
    file.write_bytes(data)


async def test_a_damaged_row_fails_one_job(serve: Serve, tmp_path: Path, ask: Ask) -> None:
    """A waiting job's request that nobody can read: that job fails, and the next one runs."""
    server, client = await serve()
    blocking = await create(client, ask(**FOREVER))
    bad, good = await create(client, ask()), await create(client, ask())
    watching = asyncio.create_task(watched(client, bad))
    await until(lambda: bool(server._application._jobs[bad]._frames))
    with contextlib.closing(sqlite3.connect(tmp_path / "data" / "jobs.sqlite3")) as connection, connection:
        connection.execute("UPDATE jobs SET request = '{' WHERE id = ?", [bad.removeprefix("jobs/")])
    assert await _cancelled(client, blocking) == job_pb2.JOB_STATE_CANCELLED

    assert (await asyncio.wait_for(watched(client, good), 30)).job.state == SUCCEEDED
    told = await asyncio.wait_for(watching, 30)
    assert (told.job.state, told.job.error.reason) == (FAILED, "STORAGE_DAMAGED")
    refusal = await client.refusal(get(client, bad))
    assert (refusal.code, refusal.reason) == (grpc.StatusCode.DATA_LOSS, "STORAGE_DAMAGED")


async def test_a_damaged_result_is_said(serve: Serve, tmp_path: Path, ask: Ask) -> None:
    """Torn or altered, it is never given as if it were whole: DATA_LOSS, and other jobs' results are there."""
    _, client = await serve()
    torn, altered, whole = [
        (await watched(client, await create(client, ask(seed=seed, init="INIT_NOISE")))).job for seed in (1, 2, 3)
    ]
    for job, keep in ((torn, 100), (altered, None)):
        sha256 = job.result.image.removeprefix("images/")
        file = tmp_path / "data" / "objects" / "blobs" / sha256[:2] / sha256
        file.write_bytes(file.read_bytes()[:keep] if keep else b"\0" * job.result.total_bytes)
        refusal = await client.refusal(watched(client, job.name))
        assert (refusal.code, refusal.reason) == (grpc.StatusCode.DATA_LOSS, "STORAGE_DAMAGED")
        assert (await get(client, job.name)).state == SUCCEEDED
    for job in (torn, altered):
        refusal = await asyncio.wait_for(client.refusal(download(client, job.result.image)), 5)
        assert (refusal.code, refusal.reason) == (grpc.StatusCode.DATA_LOSS, "STORAGE_DAMAGED")
    assert (await watched(client, whole.name)).result


async def test_an_upload_mends_a_damaged_image(serve: Serve, tmp_path: Path) -> None:
    """It is not taken for complete because something is there by its name."""
    _, client = await serve()
    stub, data = image_service_pb2_grpc.ImageServiceStub(client.channel), noise(60, 60)
    sha256 = hashlib.sha256(data).hexdigest()
    request = image_service_pb2.CreateUploadRequest(total_bytes=len(data), sha256=sha256)
    first = await stub.CreateUpload(request)
    whole = image_service_pb2.WriteUploadRequest(name=first.name, data=data)
    image = (await stub.WriteUpload(whole)).image
    assert (await stub.CreateUpload(request)).image == image
    file = tmp_path / "data" / "objects" / "blobs" / sha256[:2] / sha256
    file.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))

    refusal = await client.refusal(download(client, image))
    assert (refusal.code, refusal.reason) == (grpc.StatusCode.DATA_LOSS, "STORAGE_DAMAGED")
    assert not (await stub.GetUpload(image_service_pb2.GetUploadRequest(name=first.name))).image
    again = await stub.CreateUpload(request)
    assert (again.image, again.received_bytes) == ("", 0)
    await stub.WriteUpload(image_service_pb2.WriteUploadRequest(name=again.name, data=data))
    assert await download(client, image) == data


async def test_a_commit_whose_answer_is_lost_is_no_loss(
    serve: Serve, ask: Ask, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As when a connection breaks: what was written is written again, which changes nothing."""
    monkeypatch.setattr("nst_server.journal.RETRY_S", 0.05)
    server, client = await serve()
    name = await create(client, ask(iterations=60, size_px=96))
    store, lost = server._ledger.store, 0
    append_many = store.append_many

    async def unanswered(batches: Any) -> Any:
        nonlocal lost
        done = await append_many(batches)
        if lost < 5:
            lost += 1
            raise StorageUnavailable("the connection broke")
        return done

    monkeypatch.setattr(store, "append_many", unanswered)
    told = await asyncio.wait_for(watched(client, name), 60)
    assert (told.job.state, lost) == (SUCCEEDED, 5)
    assert [event.sequence for event in told.numbered] == list(range(1, len(told.numbered) + 1))
    assert [progress.iteration for progress in told.progress] == list(range(61))


async def test_storage_that_is_away_for_a_moment_costs_a_job_nothing(
    serve: Serve, ask: Ask, monkeypatch: pytest.MonkeyPatch
) -> None:
    """When its result is to be kept, which is tried again."""
    monkeypatch.setattr("nst_server.journal.RETRY_S", 0.05)
    server, client = await serve()
    name = await create(client, ask(iterations=30, size_px=96))
    blobs, refused = server._ledger.blobs, 0
    write = blobs.write

    async def away(key: str, data: bytes) -> None:
        nonlocal refused
        if key.startswith("blobs/") and refused < 3:
            refused += 1
            raise StorageUnavailable("the bucket is away")
        await write(key, data)

    monkeypatch.setattr(blobs, "write", away)
    told = await asyncio.wait_for(watched(client, name), 60)
    assert (told.job.state, refused) == (SUCCEEDED, 3)


async def test_an_image_is_here_when_its_file_is(serve: Serve, ask: Ask, monkeypatch: pytest.MonkeyPatch) -> None:
    """An upload whose last step failed is not complete; sent again it is."""
    server, client = await serve()
    stub, data = image_service_pb2_grpc.ImageServiceStub(client.channel), noise(60, 60)
    request = image_service_pb2.CreateUploadRequest(total_bytes=len(data), sha256=hashlib.sha256(data).hexdigest())
    upload = await stub.CreateUpload(request)
    part = image_service_pb2.WriteUploadRequest(name=upload.name, data=data)
    write = server._ledger.blobs.write

    async def full(key: str, data: bytes) -> None:
        if key.startswith("blobs/"):
            raise StorageFull("the folder is full")
        await write(key, data)

    with monkeypatch.context() as patch:
        patch.setattr(server._ledger.blobs, "write", full)
        assert (await client.refusal(stub.WriteUpload(part))).reason == "STORAGE_FULL"
        assert not (await stub.CreateUpload(request)).image
    again = await stub.WriteUpload(part)
    assert await download(client, again.image) == data
    assert (await stub.CreateUpload(request)).image == again.image


async def test_parts_that_overlap_are_one_image(serve: Serve) -> None:
    """A call that was given up, and its repetition with another length, at the same time."""
    _, client = await serve()
    stub, data = image_service_pb2_grpc.ImageServiceStub(client.channel), noise(800, 800)
    upload = await stub.CreateUpload(image_service_pb2.CreateUploadRequest(total_bytes=len(data)))

    async def write(start: int, end: int) -> image_service_pb2.Upload:
        part = image_service_pb2.WriteUploadRequest(name=upload.name, offset=start, data=data[start:end])
        return await stub.WriteUpload(part)

    await asyncio.gather(*(write(0, end) for end in (400_000, 900_000, 100_000, 700_000)))
    *_, last = await asyncio.gather(*(write(900_000, len(data)) for _ in range(3)))
    assert await download(client, last.image) == data
