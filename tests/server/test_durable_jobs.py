"""Jobs that outlive calls: every method on them and on images, end to end; and servers that share a store."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import hashlib
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
from google.protobuf import empty_pb2

from nst.v1 import image_service_pb2, image_service_pb2_grpc, job_pb2, style_transfer_service_pb2
from nst_server import Server
from nst_server.errors import StorageUnavailable
from tests.server.conftest import FOREVER, Caller, Refusal, files, noise, opened, read_until, rest, until, watched
from tests.server.storage.conftest import postgresql, postgresql_url

Ask = Callable[..., style_transfer_service_pb2.StylizeRequest]
Serve = Callable[..., Any]

__all__ = ["postgresql", "postgresql_url"]

QUEUED, RUNNING, PAUSED = job_pb2.JOB_STATE_QUEUED, job_pb2.JOB_STATE_RUNNING, job_pb2.JOB_STATE_PAUSED
SUCCEEDED, CANCELLED = job_pb2.JOB_STATE_SUCCEEDED, job_pb2.JOB_STATE_CANCELLED


async def create(client: Caller, request: style_transfer_service_pb2.StylizeRequest) -> job_pb2.Job:
    """Create a job."""
    return await client.jobs.CreateJob(style_transfer_service_pb2.CreateJobRequest(request=request))


async def get(client: Caller, name: str) -> job_pb2.Job:
    """Return a job."""
    return await client.jobs.GetJob(style_transfer_service_pb2.GetJobRequest(name=name))


async def cancel(client: Caller, name: str) -> job_pb2.Job:
    """Cancel a job."""
    return await client.jobs.CancelJob(style_transfer_service_pb2.CancelJobRequest(name=name))


async def update(client: Caller, name: str, **changes: Any) -> job_pb2.Job:
    """Change a job."""
    return await client.jobs.UpdateJob(style_transfer_service_pb2.UpdateJobRequest(name=name, **changes))


async def delete(client: Caller, name: str) -> empty_pb2.Empty:
    """Delete a job."""
    return await client.jobs.DeleteJob(style_transfer_service_pb2.DeleteJobRequest(name=name))


async def listed(client: Caller, **request: Any) -> list[str]:
    """Return the names of all jobs that are listed, page by page."""
    names, token = [], ""
    while True:
        asked = style_transfer_service_pb2.ListJobsRequest(page_token=token, **request)
        page = await client.jobs.ListJobs(asked)
        assert len(page.jobs) <= (request.get("page_size") or 50)
        names += [job.name for job in page.jobs]
        if not (token := page.next_page_token):
            return names


async def in_state(client: Caller, name: str, state: int, within_s: float = 20) -> job_pb2.Job:
    """Wait until a job is in a state; return it."""
    async with asyncio.timeout(within_s):
        while (job := await get(client, name)).state != state:
            await asyncio.sleep(0.02)
    return job


async def has_begun(client: Caller, name: str) -> None:
    """Wait until a job has made its first iteration."""
    call = client.jobs.WatchJob(style_transfer_service_pb2.WatchJobRequest(name=name, preview={"interval": 0}))
    await read_until(call, "progress")
    call.cancel()


async def test_a_job_outlives_the_call_that_made_it(caller: Caller, ask: Ask) -> None:
    """CreateJob returns it queued, GetJob what it is now, WatchJob all of it; its result can be downloaded."""
    job = await create(caller, ask())
    assert (job.state, job.width, job.height, job.attempt) == (QUEUED, 48, 32, 0)
    told = await watched(caller, job.name)
    now = await get(caller, job.name.removeprefix("jobs/"))

    assert told.kinds[0] == "snapshot"
    assert told.states == [RUNNING, SUCCEEDED]
    assert now == told.job
    assert (now.sequence, now.attempt, now.result.iteration) == (
        told.events[-1].sequence,
        1,
        told.progress[-1].iteration,
    )
    assert await downloaded(caller, now.result.image) == told.result
    assert len(told.result) == now.result.total_bytes


async def test_a_stream_begins_after_any_event(caller: Caller, ask: Ask) -> None:
    """With a snapshot and the events after that number; beyond the last one INVALID_ARGUMENT."""
    told = await caller.told(ask(iterations=6))
    name, last = told.job.name, told.job.sequence
    for after in range(last + 1):
        again = await watched(caller, name, after)
        assert again.kinds[0] == "snapshot"
        assert [event.sequence for event in again.numbered] == list(range(after + 1, last + 1))
    for after in (-1, last + 1):
        refusal = await caller.refusal(watched(caller, name, after))
        assert (refusal.code, refusal.field) == (grpc.StatusCode.INVALID_ARGUMENT, "after_sequence")
        assert f"0 to {last}" in refusal.message


async def test_jobs_are_listed(serve: Serve, ask: Ask) -> None:
    """The newest first, by state, page by page; what is malformed is INVALID_ARGUMENT."""
    _, client = await serve(queue_size=10)
    ended = [(await client.told(ask())).job.name for _ in range(2)]
    running = (await create(client, ask(**FOREVER))).name
    await in_state(client, running, RUNNING)
    waiting = [(await create(client, ask())).name for _ in range(3)]
    newest_first = [*reversed(waiting), running, *reversed(ended)]

    for size in (0, 1, 2, 100):
        assert await listed(client, page_size=size) == newest_first
    assert await listed(client, states=[QUEUED], page_size=2) == newest_first[:3]
    assert await listed(client, states=[RUNNING, SUCCEEDED]) == newest_first[3:]
    assert await listed(client, states=[PAUSED]) == []
    for wrong, field in (
        ({"page_size": 101}, "page_size"),
        ({"page_size": -1}, "page_size"),
        ({"page_token": "yesterday"}, "page_token"),
        ({"page_token": base64.urlsafe_b64encode(b"after:2026-01-01T00:00:00 jobs/x\0").decode()[:-4]}, "page_token"),
        ({"page_token": base64.urlsafe_b64encode(b"after:9999-12-31T23:59:59-23:59 jobs/x").decode()}, "page_token"),
        ({"states": [0]}, "states[0]"),
        ({"states": [QUEUED, 99]}, "states[1]"),
    ):
        call = client.jobs.ListJobs(style_transfer_service_pb2.ListJobsRequest(**wrong))
        refusal = await client.refusal(call)
        assert (refusal.code, refusal.field) == (grpc.StatusCode.INVALID_ARGUMENT, field)


async def test_names_that_no_database_takes_are_no_names(serve: Serve, tmp_path: Path, postgresql_url: str) -> None:
    """A NUL byte, which PostgreSQL refuses in any text: NOT_FOUND, or INVALID_ARGUMENT in a page token."""
    _, client = await serve(database=postgresql_url, blobs=f"file://{tmp_path}/blobs")
    upload = image_service_pb2.GetUploadRequest(name="uploads/\0")
    described = image_service_pb2.GetImageRequest(name="images/a\0")
    for call in (
        get(client, "jobs/\0"),
        delete(client, "\0"),
        watched(client, "a\0"),
        image_stub(client).GetUpload(upload),
        image_stub(client).GetImage(described),
        downloaded(client, "images/" + "0" * 63 + "\0"),
    ):
        refusal = await client.refusal(call)
        assert (refusal.code, refusal.reason) == (grpc.StatusCode.NOT_FOUND, "NOT_FOUND")
    token = base64.urlsafe_b64encode(b"after:2026-01-01T00:00:00+00:00 jobs/\0").decode()
    refusal = await client.refusal(listed_after(client, token))
    assert (refusal.code, refusal.field) == (grpc.StatusCode.INVALID_ARGUMENT, "page_token")


async def listed_after(client: Caller, token: str) -> style_transfer_service_pb2.ListJobsResponse:
    """Return the page of jobs that a token stands for."""
    return await client.jobs.ListJobs(style_transfer_service_pb2.ListJobsRequest(page_token=token))


async def test_a_job_is_steered_while_it_runs(caller: Caller, ask: Ask) -> None:
    """Its weights change the loss from then on, its budget its end; the change is one of its events."""
    job = await create(caller, ask(**(FOREVER | {"iterations": 1000, "size_px": 48})))
    watching = asyncio.create_task(watched(caller, job.name))
    await has_begun(caller, job.name)
    await update(caller, job.name, options={"style_weight": 0.0, "iterations": 300})
    told = await asyncio.wait_for(watching, 60)

    (steered,) = [
        event
        for event in told.of("state_change")
        if event.state_change.job.state == RUNNING and event.state_change.job.options.iterations == 300
    ][:1]
    after = [event.progress for event in told.of("progress") if event.sequence > steered.sequence + 1]
    options = steered.state_change.job.options
    for progress in after[:5]:
        parts = (
            options.content_weight * progress.content_loss
            + options.tv_weight * progress.tv_loss
            + options.laplacian_weight * progress.laplacian_loss
        )
        assert progress.loss == pytest.approx(parts, rel=1e-4)
    assert told.job.options.style_weight == 0
    assert told.progress[-1].iteration <= 300
    assert told.job.state == SUCCEEDED


async def test_a_paused_job_gives_its_device_back(caller: Caller, ask: Ask) -> None:
    """The next one runs; resumed it goes on where it was, as another attempt; twice does no harm."""
    job = await create(caller, ask(iterations=150, size_px=96))
    watching = asyncio.create_task(watched(caller, job.name))
    await has_begun(caller, job.name)
    for _ in range(2):
        await update(caller, job.name, paused=True)
    paused = await in_state(caller, job.name, PAUSED)
    assert paused.device == ""
    assert (await caller.told(ask())).job.state == SUCCEEDED
    for _ in range(2):
        assert (await update(caller, job.name, paused=False)).state in (QUEUED, RUNNING)
    told = await asyncio.wait_for(watching, 60)

    assert told.states == [RUNNING, PAUSED, QUEUED, RUNNING, SUCCEEDED]
    assert [progress.iteration for progress in told.progress] == list(range(151))
    assert told.job.attempt == 2
    assert (told.pixels == (await caller.told(ask(iterations=150, size_px=96))).pixels).all()


async def test_what_a_job_was_told_last_holds_for_its_next_attempt(serve: Serve, ask: Ask) -> None:
    """Changed while it is paused, or just before its worker is killed: its checkpoint, which is older, is overruled."""
    server, caller = await serve(checkpoint_interval_s=0.1)
    (executor,) = server.executors
    job = await create(caller, ask(**(FOREVER | {"size_px": 48})))
    watching = asyncio.create_task(watched(caller, job.name))
    await has_begun(caller, job.name)
    assert (await update(caller, job.name, paused=True)).state == PAUSED
    await update(caller, job.name, options={"style_weight": 0.0})
    await update(caller, job.name, paused=False)
    await until(lambda: server._application._jobs[job.name].now.attempt == 2)
    await has_begun(caller, job.name)
    await asyncio.sleep(0.5)
    told = await update(caller, job.name, options={"iterations": 2000})
    os.kill(executor.pid, signal.SIGKILL)
    assert told.options.iterations == 2000
    told = await asyncio.wait_for(watching, 100)

    assert told.progress[-1].iteration <= 2000
    assert (told.job.state, told.job.attempt, told.job.options.iterations) == (SUCCEEDED, 3, 2000)
    for event in told.of("progress"):
        if event.attempt > 1:
            progress, options = event.progress, told.job.options
            style = progress.loss - options.content_weight * progress.content_loss
            assert style == pytest.approx(options.tv_weight * progress.tv_loss, rel=1e-3, abs=1e-5)


async def test_machines_take_turns(serve: Serve, ask: Ask) -> None:
    """A job from another address goes before the second of the one that has filled the queue."""
    server, _ = await serve()
    port = server.address.rpartition(":")[2]
    one, other = Caller(f"127.0.0.1:{port}"), Caller(f"[::1]:{port}")
    running = await create(one, ask(**FOREVER))
    await in_state(one, running.name, RUNNING)
    first, second = [await create(one, ask(**FOREVER)) for _ in range(2)]
    late = await create(other, ask(**FOREVER))
    async with asyncio.timeout(10):  # it moves at once, and is told when that is durable
        while (await get(other, second.name)).queue_position != 2:
            await asyncio.sleep(0.01)
    assert [(await get(other, job.name)).queue_position for job in (first, late)] == [0, 1]
    for client in (one, other):
        await client.channel.close()


async def test_a_paused_job_may_be_given_fewer_iterations_than_it_has_made(caller: Caller, ask: Ask) -> None:
    """Resumed it ends at once, with the best picture it has made."""
    job = await create(caller, ask(**(FOREVER | {"size_px": 48})))
    watching = asyncio.create_task(watched(caller, job.name))
    await has_begun(caller, job.name)
    await asyncio.sleep(0.5)
    paused = await update(caller, job.name, paused=True)
    made = paused.progress.iteration
    assert made > 5
    await update(caller, job.name, options={"iterations": 5})
    await update(caller, job.name, paused=False)
    told = await asyncio.wait_for(watching, 30)
    assert told.job.state == SUCCEEDED
    assert told.job.result.stop_reason == job_pb2.STOP_REASON_ITERATIONS
    assert 0 < told.job.result.iteration <= made
    assert told.progress[-1].iteration == made


async def test_cancel_follows_pause_at_once(caller: Caller, ask: Ask) -> None:
    """Whatever its worker is at, both are answered, and it ends."""
    for delay_s in (0, 0.002, 0.01):
        job = await create(caller, ask(**FOREVER))
        await has_begun(caller, job.name)
        pausing = asyncio.create_task(update(caller, job.name, paused=True))
        await asyncio.sleep(delay_s)
        assert (await asyncio.wait_for(cancel(caller, job.name), 5)).state == CANCELLED
        with contextlib.suppress(grpc.aio.AioRpcError):
            await asyncio.wait_for(pausing, 5)


async def test_enough_is_not_forgotten(serve: Serve, ask: Ask, tmp_path: Path) -> None:
    """Of a job that waits: the next server ends it as soon as its turn comes."""
    server, caller = await serve(data_dir=tmp_path)
    running = await create(caller, ask(**FOREVER))
    waiting = await create(caller, ask(**FOREVER))
    await update(caller, waiting.name, finish=True)
    await update(caller, running.name, paused=True)
    await server.stop(0)
    _, caller = await serve(data_dir=tmp_path)

    told = await asyncio.wait_for(watched(caller, waiting.name), 30)
    assert (told.job.state, told.job.result.stop_reason) == (SUCCEEDED, job_pb2.STOP_REASON_FINISHED)
    assert (await get(caller, running.name)).state == PAUSED
    await cancel(caller, running.name)


async def test_fewer_iterations_than_were_made_are_those_that_were_made(caller: Caller, ask: Ask) -> None:
    """The change says so, and so does the job that has ended: as many as it made, and it made them all."""
    job = await create(caller, ask(**(FOREVER | {"size_px": 48})))
    watching = asyncio.create_task(watched(caller, job.name))
    await has_begun(caller, job.name)
    await asyncio.sleep(0.3)
    changed = await update(caller, job.name, options={"iterations": 5})
    told = await asyncio.wait_for(watching, 30)
    assert changed.progress.iterations >= changed.progress.iteration > 5
    assert told.job.state == SUCCEEDED
    assert told.job.progress.iteration == told.job.progress.iterations == told.progress[-1].iteration


async def test_wait_and_enough_do_not_go_together(caller: Caller, ask: Ask) -> None:
    """INVALID_ARGUMENT, and the job goes on as it was; to go on and then end is fine."""
    job = await create(caller, ask(**FOREVER))
    await has_begun(caller, job.name)
    refusal = await caller.refusal(update(caller, job.name, paused=True, finish=True))
    assert (refusal.code, refusal.field) == (grpc.StatusCode.INVALID_ARGUMENT, "paused")
    assert (await get(caller, job.name)).state == RUNNING
    await update(caller, job.name, paused=False, finish=True)
    assert (await watched(caller, job.name)).job.state == SUCCEEDED


async def test_limits_are_for_new_requests(serve: Serve, ask: Ask, tmp_path: Path) -> None:
    """A server that is started again with smaller ones goes on with what was accepted, running or waiting."""
    server, caller = await serve(data_dir=tmp_path)
    jobs = [await create(caller, ask(iterations=30, size_px=192)) for _ in range(2)]
    await server.stop(0)
    _, caller = await serve(data_dir=tmp_path, max_size_px=64, memory_gib=0.001)

    for job in jobs:
        assert (await asyncio.wait_for(watched(caller, job.name), 30)).job.state == SUCCEEDED
    assert (await caller.refusal(ask(size_px=192))).field == "options.size_px"


async def test_enough_is_a_result(caller: Caller, ask: Ask) -> None:
    """A running job ends with its best picture, at once; one that waits with the picture it would start from."""
    running = await create(caller, ask(**FOREVER))
    await has_begun(caller, running.name)
    waiting = await create(caller, ask(init="INIT_CONTENT"))
    await update(caller, waiting.name, finish=True)
    await update(caller, running.name, finish=True)

    told = await asyncio.wait_for(watched(caller, running.name), 30)
    assert told.job.state == SUCCEEDED
    assert told.job.result.stop_reason == job_pb2.STOP_REASON_FINISHED
    assert told.job.result.loss == min(progress.loss for progress in told.progress)
    told = await asyncio.wait_for(watched(caller, waiting.name), 30)
    assert (told.job.state, len(told.progress)) == (SUCCEEDED, 1)


async def test_what_cannot_be_changed_is_refused(caller: Caller, ask: Ask) -> None:
    """By field; of a job that has ended anything; and the job is as it was."""
    job = await create(caller, ask(**FOREVER))
    for options, field in (
        ({"size_px": 64}, "options.size_px"),
        ({"style_weight": -1.0}, "options.style_weight"),
        ({"iterations": 0}, "options.iterations"),
        ({"style_layers": {"relu9_9": 1.0}}, "options.style_layers[relu9_9]"),
    ):
        refusal = await caller.refusal(update(caller, job.name, options=options))
        assert (refusal.code, refusal.field) == (grpc.StatusCode.INVALID_ARGUMENT, field)
    assert (await get(caller, job.name)).options == job.options
    await cancel(caller, job.name)
    for changes in ({"paused": True}, {"finish": True}, {"options": {"style_weight": 1.0}}):
        refusal = await caller.refusal(update(caller, job.name, **changes))
        assert (refusal.code, refusal.reason) == (grpc.StatusCode.FAILED_PRECONDITION, "JOB_ENDED")
    assert (await cancel(caller, job.name)).state == CANCELLED


async def test_a_deleted_job_is_gone(caller: Caller, ask: Ask, shared: Server) -> None:
    """One that runs is cancelled first, and whoever watches it is told; every method says NOT_FOUND after that."""
    running = await create(caller, ask(**FOREVER))
    watching = asyncio.create_task(watched(caller, running.name))
    await has_begun(caller, running.name)
    await delete(caller, running.name)

    assert (await watching).job.state == CANCELLED
    for call in (get, cancel, delete, update, watched):
        refusal = await caller.refusal(call(caller, running.name))
        assert (refusal.code, refusal.reason) == (grpc.StatusCode.NOT_FOUND, "NOT_FOUND")
    assert running.name not in await listed(caller)
    job = (await caller.told(ask())).job
    await delete(caller, job.name)
    assert (await caller.refusal(watched(caller, job.name))).code == grpc.StatusCode.NOT_FOUND


async def test_a_model_may_be_named_in_any_way_by_the_same_request(caller: Caller, ask: Ask) -> None:
    """Not at all, for the default, by its id, or by its full name."""
    names = set()
    for model in ("", "vgg16", "models/vgg16"):
        request = ask(model=model)
        request.request_id = "any-way"
        names.add((await create(caller, request)).name)
    assert len(names) == 1
    await watched(caller, names.pop())


async def test_a_request_id_stands_for_one_request(caller: Caller, ask: Ask) -> None:
    """The same again is the same job, also when it has ended and by the other method; another is ALREADY_EXISTS."""
    request = ask()
    request.request_id = "mine.1"
    first = await create(caller, request)
    assert first.request_id == "mine.1"
    told = await watched(caller, first.name)
    assert (await create(caller, request)) == told.job
    assert (await caller.told(request)).result == told.result

    request.options.iterations += 1
    for refusal in (await caller.refusal(create(caller, request)), await caller.refusal(request)):
        assert (refusal.code, refusal.reason) == (grpc.StatusCode.ALREADY_EXISTS, "REQUEST_ID_REUSED")
    for wrong in ("a" * 65, "no spaces", "ü"):
        request.request_id = wrong
        refusal = await caller.refusal(create(caller, request))
        assert (refusal.code, refusal.field) == (grpc.StatusCode.INVALID_ARGUMENT, "request_id")


async def test_a_repeated_request_needs_no_place(serve: Serve, ask: Ask) -> None:
    """However full the queue is, it finds its job, running or waiting; a new one, and one without a name, do not."""
    _, client = await serve(queue_size=1)
    running, waiting = ask(**FOREVER), ask(**FOREVER)
    running.request_id, waiting.request_id = "running", "waiting"
    jobs = {request.request_id: await create(client, request) for request in (running, waiting)}
    for request in (running, waiting):
        assert (await create(client, request)).name == jobs[request.request_id].name
        call = client.jobs.Stylize(request)
        assert (await read_until(call, "snapshot")).snapshot.name == jobs[request.request_id].name
        call.cancel()
    for name in ("new", ""):
        waiting.request_id = name
        for refusal in (await client.refusal(create(client, waiting)), await client.refusal(waiting)):
            assert (refusal.code, refusal.reason) == (grpc.StatusCode.RESOURCE_EXHAUSTED, "QUEUE_FULL")
    # The job of CreateJob is not that of the streams that found it.
    await asyncio.sleep(0.2)
    for job in jobs.values():
        assert (await get(client, job.name)).state in (QUEUED, RUNNING)
        await cancel(client, job.name)


async def test_many_at_once_of_one_request_are_one_job(serve: Serve, ask: Ask) -> None:
    """Also if there are more of them than places in the queue."""
    _, client = await serve(queue_size=1)
    request = ask(**FOREVER)
    request.request_id = "once"
    jobs = await asyncio.gather(*(create(client, request) for _ in range(32)))
    assert len({job.name for job in jobs}) == 1
    assert await listed(client) == [jobs[0].name]
    await cancel(client, jobs[0].name)


async def test_a_request_that_takes_long_to_check_is_answered(
    serve: Serve, ask: Ask, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The time limit is for its arrival."""
    server, client = await serve(write_timeout_s=1)
    checked = server._application._checked

    def slowly(request: Any) -> Any:
        time.sleep(1.5)
        return checked(request)

    monkeypatch.setattr(server._application, "_checked", slowly)
    assert (await asyncio.wait_for(create(client, ask()), 10)).state == QUEUED
    assert (await asyncio.wait_for(client.told(ask()), 10)).job.state == SUCCEEDED


async def test_a_server_that_stops_says_so_of_what_it_will_not_do(serve: Serve, ask: Ask, tmp_path: Path) -> None:
    """A job that waits while its server stops can be neither changed nor cancelled there; at the next one it can."""
    server, client = await serve()
    running = await create(client, ask(**FOREVER))
    await has_begun(client, running.name)
    waiting, paused = await create(client, ask(**FOREVER)), await create(client, ask(**FOREVER))
    await update(client, paused.name, paused=True)
    stopping = asyncio.create_task(server.stop(3))
    await until(lambda: server._application.scheduler.stopping)
    for call in (
        update(client, waiting.name, options={"content_weight": 7}),
        update(client, waiting.name, finish=True),
        update(client, paused.name, paused=False),
        cancel(client, waiting.name),
        cancel(client, paused.name),
        delete(client, waiting.name),
    ):
        refusal = await asyncio.wait_for(client.refusal(call), 2)
        assert (refusal.code, refusal.reason) == (grpc.StatusCode.UNAVAILABLE, "SERVER_STOPPING")
        assert refusal.retry_s
    # What runs still obeys.
    assert (await update(client, running.name, options={"content_weight": 7})).options.content_weight == 7
    assert (await cancel(client, running.name)).state == CANCELLED
    await stopping

    _, client = await serve()
    for job, state in ((waiting, RUNNING), (paused, PAUSED)):
        now = await in_state(client, job.name, state)
        assert now.options.content_weight == job.options.content_weight
        assert (await cancel(client, job.name)).state == CANCELLED


async def test_a_command_that_nobody_obeyed_is_found_at_the_next_start(serve: Serve, ask: Ask) -> None:
    """Whatever kept the server that it was for from it."""
    server, client = await serve()
    job = await create(client, ask(**FOREVER))
    await update(client, job.name, paused=True)
    store = server._application._ledger.store
    assert await store.command(job.name.removeprefix("jobs/"), {"cancel": True})
    await server.stop(0)
    _, client = await serve()
    await in_state(client, job.name, CANCELLED)


def image_stub(client: Caller) -> Any:
    """Return what calls a server's ImageService."""
    return image_service_pb2_grpc.ImageServiceStub(client.channel)


async def begin(client: Caller, data: bytes, sha256: str = "") -> image_service_pb2.Upload:
    """Begin an upload."""
    request = image_service_pb2.CreateUploadRequest(total_bytes=len(data), sha256=sha256)
    return await image_stub(client).CreateUpload(request)


async def write(client: Caller, name: str, data: bytes, start: int, end: int) -> image_service_pb2.Upload:
    """Send a part of a file."""
    request = image_service_pb2.WriteUploadRequest(name=name, offset=start, data=data[start:end])
    return await image_stub(client).WriteUpload(request)


async def downloaded(client: Caller, name: str, offset: int = 0) -> bytes:
    """Return an image's file from an offset on."""
    request = image_service_pb2.DownloadImageRequest(name=name, offset=offset)
    return b"".join([part.data async for part in image_stub(client).DownloadImage(request)])


async def test_an_upload_is_resumed(caller: Caller, ask: Ask) -> None:
    """From where it is; a part that is there already changes nothing, the last one included; a gap is OUT_OF_RANGE."""
    data = noise(120, 90, seed=11)
    upload = await begin(caller, data)
    assert (upload.received_bytes, upload.image) == (0, "")
    assert (await write(caller, upload.name, data, 0, 1000)).received_bytes == 1000
    refusal = await caller.refusal(write(caller, upload.name, data, 1001, 2000))
    assert (refusal.code, refusal.reason) == (grpc.StatusCode.OUT_OF_RANGE, "PART_MISSING")
    for start, end, received in ((0, 1000, 1000), (500, 1500, 1500), (100, 200, 1500)):
        assert (await write(caller, upload.name, data, start, end)).received_bytes == received
    resumed = await image_stub(caller).GetUpload(image_service_pb2.GetUploadRequest(name=upload.name))
    done = await write(caller, upload.name, data, resumed.received_bytes, len(data))

    sha256 = hashlib.sha256(data).hexdigest()
    assert (done.image, done.received_bytes) == (f"images/{sha256}", len(data))
    assert await write(caller, upload.name, data, resumed.received_bytes, len(data)) == done
    assert await image_stub(caller).GetUpload(image_service_pb2.GetUploadRequest(name=upload.name)) == done
    described = await image_stub(caller).GetImage(image_service_pb2.GetImageRequest(name=done.image))
    assert (described.width, described.height, described.media_type) == (120, 90, "image/png")
    assert (await begin(caller, data, sha256)).image == done.image, "there is no need to send it again"
    request = ask()
    request.content.Clear()
    request.content.name = done.image
    assert (await caller.told(request)).job.state == SUCCEEDED


async def test_an_upload_of_something_else_is_refused(caller: Caller) -> None:
    """A wrong checksum, no image, bytes beyond the end, none at all; a refused whole is gone."""
    data = noise(20, 20, seed=12)
    wrong = await begin(caller, data, "0" * 64)
    no_image = await begin(caller, b"no image")
    for upload, file, field in ((wrong, data, "sha256"), (no_image, b"no image", "data")):
        refusal = await caller.refusal(write(caller, upload.name, file, 0, len(file)))
        assert (refusal.code, refusal.field) == (grpc.StatusCode.INVALID_ARGUMENT, field)
        refusal = await caller.refusal(write(caller, upload.name, file, 0, len(file)))
        assert refusal.code == grpc.StatusCode.NOT_FOUND
    upload = await begin(caller, data)
    for part, offset, field in ((b"", 0, "data"), (data + b"x", 0, "offset"), (b"x", -1, "offset")):
        request = image_service_pb2.WriteUploadRequest(name=upload.name, offset=offset, data=part)
        refusal = await caller.refusal(image_stub(caller).WriteUpload(request))
        assert (refusal.code, refusal.field) == (grpc.StatusCode.INVALID_ARGUMENT, field)
    for total, sha256, field in ((0, "", "total_bytes"), (2**40, "", "total_bytes"), (1, "xyz", "sha256")):
        request = image_service_pb2.CreateUploadRequest(total_bytes=total, sha256=sha256)
        refusal = await caller.refusal(image_stub(caller).CreateUpload(request))
        assert (refusal.code, refusal.field) == (grpc.StatusCode.INVALID_ARGUMENT, field)


async def test_an_image_is_downloaded_from_anywhere(caller: Caller) -> None:
    """In parts of 2 MiB; from its end nothing; beyond it INVALID_ARGUMENT."""
    data = noise(1100, 1000, seed=13)
    assert len(data) > 2**21
    name = (await write(caller, (await begin(caller, data)).name, data, 0, len(data))).image
    parts = [p async for p in image_stub(caller).DownloadImage(image_service_pb2.DownloadImageRequest(name=name))]
    assert files(parts) == [(data, 2)]
    for offset in (1, 2**21 + 5, len(data)):
        assert await downloaded(caller, name, offset) == data[offset:]
    for offset in (-1, len(data) + 1):
        refusal = await caller.refusal(downloaded(caller, name, offset))
        assert (refusal.code, refusal.field) == (grpc.StatusCode.INVALID_ARGUMENT, "offset")
    for none in ("images/none", "images/" + "0" * 64):
        assert (await caller.refusal(downloaded(caller, none))).code == grpc.StatusCode.NOT_FOUND


async def test_a_job_starts_from_anothers_result(caller: Caller, ask: Ask) -> None:
    """By name, without sending it back; its first picture is that one."""
    first = await caller.told(ask(iterations=5))
    request = ask(iterations=1, preview={"every_frame": True, "encoding": {"format": "IMAGE_FORMAT_PNG"}})
    request.init_image.name = first.job.result.image
    told = await caller.told(request)
    (iteration, _, _, picture), *_ = told.frames
    assert iteration == 0
    assert (np.asarray(opened(picture)) == first.pixels).all()
    request.init_image.name = "images/" + "1" * 64
    refusal = await caller.refusal(request)
    assert (refusal.code, refusal.field) == (grpc.StatusCode.NOT_FOUND, "init_image.name")


async def test_every_frame_waits_for_a_reader_that_stalls(caller: Caller, ask: Ask, shared: Server) -> None:
    """None is left out, though the job has long ended; the disk it took is free after that."""
    preview = {"every_frame": True, "encoding": {"format": "IMAGE_FORMAT_PNG"}}
    request = ask(content=noise(256, 256), size_px=256, iterations=60, preview=preview)
    request.cancel_on_disconnect = False
    call = caller.jobs.Stylize(request)
    name = (await read_until(call, "snapshot")).snapshot.name
    await read_until(call, "frame")
    job = await in_state(caller, name, SUCCEEDED, 60)
    told = await asyncio.wait_for(rest(call), 60)

    assert [iteration for iteration, *_ in told.frames] == list(range(1, 61))
    assert not any(skipped for _, skipped, *_ in told.frames)
    assert told.job == job
    assert not list((shared._settings.data_dir / "spool").iterdir())


async def test_an_ephemeral_server_keeps_jobs_while_it_lives(serve: Serve, ask: Ask, tmp_path: Path) -> None:
    """Every method works; nothing of a job is on its disk, and the next server knows of none."""
    server, client = await serve(ephemeral=True)
    job = await create(client, ask())
    told = await watched(client, job.name)
    assert await downloaded(client, told.job.result.image) == told.result
    running = await create(client, ask(**FOREVER))
    await has_begun(client, running.name)
    await update(client, running.name, paused=True)
    await in_state(client, running.name, PAUSED)
    await update(client, running.name, paused=False)
    await update(client, running.name, finish=True)
    assert (await watched(client, running.name)).job.state == SUCCEEDED
    assert not [file for file in (tmp_path / "data").rglob("*") if file.name in ("objects", "jobs.sqlite3", "spool")]
    await server.stop(0)
    _, client = await serve(ephemeral=True)
    assert await listed(client) == []


@pytest.fixture(params=["sqlite", "postgresql"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> dict[str, str]:
    """Settings of servers that share a store."""
    url = f"sqlite:///{tmp_path / 'shared.sqlite3'}"
    if request.param == "postgresql":
        url = request.getfixturevalue("postgresql_url")
    return {"database": url, "blobs": f"file://{tmp_path / 'blobs'}"}


async def two(serve: Serve, store: dict[str, str], tmp_path: Path) -> tuple[tuple[Server, Caller], ...]:
    """Start two servers that share a store."""
    return (
        await serve(data_dir=tmp_path / "one", checkpoint_interval_s=0.1, **store),
        await serve(data_dir=tmp_path / "two", checkpoint_interval_s=0.1, **store),
    )


@pytest.mark.timeout(120)
async def test_a_job_is_reached_through_another_server(
    serve: Serve, store: dict[str, str], tmp_path: Path, ask: Ask, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Watched, changed, paused, cancelled and deleted there; a repeated request finds it; a stop says come back."""
    monkeypatch.setattr("nst_server.application.TEND_S", 0.2)
    (_, here), (second, there) = await two(serve, store, tmp_path)
    request = ask(**FOREVER)
    request.request_id = "shared"
    job = await create(here, request)
    await has_begun(here, job.name)
    watching = asyncio.create_task(watched(there, job.name))
    assert (await create(there, request)).name == job.name
    await update(there, job.name, paused=True)
    await in_state(here, job.name, PAUSED)
    await update(there, job.name, paused=False)
    await in_state(there, job.name, RUNNING)
    assert await listed(here) == await listed(there) == [job.name]
    # Commands that follow one another at once are all obeyed, in their order.
    await update(there, job.name, options={"content_weight": 7})
    await asyncio.gather(*(update(there, job.name, options={"tv_weight": weight}) for weight in (1, 2)))
    now = await get(here, job.name)
    assert (now.options.content_weight, now.options.tv_weight in (1, 2)) == (7, True)
    await cancel(there, job.name)
    told = await asyncio.wait_for(watching, 20)
    assert told.job.state == CANCELLED
    assert [event.sequence for event in told.numbered] == list(range(1, len(told.numbered) + 1))

    job = await create(here, ask(**FOREVER))
    await has_begun(here, job.name)
    assert (await asyncio.wait_for(cancel(there, job.name), 10)).state == CANCELLED
    job = await create(here, ask(**FOREVER))
    watching = asyncio.create_task(there.refusal(watched(there, job.name)))
    await has_begun(there, job.name)
    await second.stop(0)
    refusal = await asyncio.wait_for(watching, 5)
    assert (refusal.code, refusal.reason) == (grpc.StatusCode.UNAVAILABLE, "SERVER_STOPPING")
    assert (await get(here, job.name)).state == RUNNING
    await cancel(here, job.name)


async def test_a_server_that_drains_leaves_what_is_wanted_to_the_next(
    serve: Serve, store: dict[str, str], tmp_path: Path, ask: Ask, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A rolling restart: what is asked of one of its jobs through another server is done there when it has gone."""
    monkeypatch.setattr("nst_server.application.TEND_S", 0.2)
    (first, here), (_, there) = await two(serve, store, tmp_path)
    running = await create(here, ask(**FOREVER))
    await has_begun(here, running.name)
    changed, ended = await create(here, ask(**FOREVER)), await create(here, ask(**FOREVER))
    stopping = asyncio.create_task(first.stop(2))
    await until(lambda: first._application.scheduler.stopping)
    wanted = asyncio.gather(
        update(there, changed.name, options={"content_weight": 7}, paused=True), cancel(there, ended.name)
    )
    await asyncio.sleep(0.5)
    assert not wanted.done(), "a server that stops has obeyed"
    await stopping
    updated, cancelled = await asyncio.wait_for(wanted, 20)
    assert (updated.state, updated.options.content_weight) == (PAUSED, 7)
    assert cancelled.state == CANCELLED
    for job in (running, changed):
        await cancel(there, job.name)


async def test_any_server_tells_a_jobs_place_in_the_queue(
    serve: Serve, store: dict[str, str], tmp_path: Path, ask: Ask
) -> None:
    """The one that it has at its own server, in a list, too; when it will begin only that server can tell."""
    (_, here), (_, there) = await two(serve, store, tmp_path)
    jobs = [await create(here, ask(**FOREVER)) for _ in range(4)]
    await in_state(here, jobs[0].name, RUNNING)
    async with asyncio.timeout(10):
        while (await get(here, jobs[3].name)).queue_position != 2:
            await asyncio.sleep(0.01)
    for client, estimates in ((here, [False, True, True, True]), (there, [False] * 4)):
        told = [await get(client, job.name) for job in jobs]
        assert [job.queue_position for job in told] == [0, 0, 1, 2]
        assert [job.HasField("estimated_start_time") for job in told] == estimates
        page = await client.jobs.ListJobs(style_transfer_service_pb2.ListJobsRequest())
        assert [job.queue_position for job in reversed(page.jobs)] == [0, 0, 1, 2]
    for job in reversed(jobs):
        await cancel(here, job.name)


async def test_whoever_watches_a_job_that_another_server_deletes_is_told(
    serve: Serve, store: dict[str, str], tmp_path: Path, ask: Ask, monkeypatch: pytest.MonkeyPatch
) -> None:
    """NOT_FOUND, if it did not hear of the job's end before: it does not wait for ever."""
    (_, here), (_, there) = await two(serve, store, tmp_path)
    job = await create(here, ask(**FOREVER))
    watching = asyncio.create_task(there.refusal(watched(there, job.name)))
    await has_begun(there, job.name)
    monkeypatch.setattr("nst_server.jobs.FOLLOW_S", 2.0)
    await asyncio.sleep(0.6)
    await asyncio.wait_for(delete(here, job.name), 10)
    assert (await asyncio.wait_for(watching, 10)).code == grpc.StatusCode.NOT_FOUND


async def test_whoever_watches_through_another_server_outlasts_the_database(
    serve: Serve, store: dict[str, str], tmp_path: Path, ask: Ask, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While it does not answer there are heartbeats; then the stream goes on without a gap."""
    monkeypatch.setattr("nst_server.jobs.FOLLOW_S", 0.1)
    (_, here), (second, there) = await two(serve, store, tmp_path)
    job = await create(here, ask(**FOREVER))
    await has_begun(here, job.name)
    call = there.jobs.WatchJob(style_transfer_service_pb2.WatchJobRequest(name=job.name, preview={"interval": 0}))
    await read_until(call, "progress")
    asked = second._ledger.store.events

    async def away(*_: object) -> None:
        raise StorageUnavailable("the database cannot be reached")

    monkeypatch.setattr(second._ledger.store, "events", away)
    await read_until(call, "heartbeat")
    monkeypatch.setattr(second._ledger.store, "events", asked)
    last = (await read_until(call, "progress")).sequence
    assert (await read_until(call, "progress")).sequence == last + 1
    call.cancel()
    await cancel(here, job.name)


@pytest.mark.timeout(120)
async def test_a_dead_servers_jobs_are_taken_over(
    serve: Serve, store: dict[str, str], tmp_path: Path, ask: Ask, monkeypatch: pytest.MonkeyPatch
) -> None:
    """When its leases have run out, from the last checkpoint; its own watchers are told to go elsewhere."""
    monkeypatch.setattr("nst_server.application.TEND_S", 0.2)
    monkeypatch.setattr("nst_server.ledger.LEASE_S", 1.0)
    (first, here), (_, there) = await two(serve, store, tmp_path)
    running = await create(here, ask(iterations=400, size_px=96))
    waiting = await create(here, ask())
    paused = await create(here, ask())
    await update(here, paused.name, paused=True)
    cut_off = asyncio.create_task(here.refusal(watched(here, running.name)))
    follower = asyncio.create_task(watched(there, running.name))
    await has_begun(there, running.name)
    await asyncio.sleep(0.3)
    _dies(first)

    told = await asyncio.wait_for(follower, 60)
    assert (told.job.state, told.job.attempt) == (SUCCEEDED, 2)
    assert [event.sequence for event in told.numbered] == list(range(1, len(told.numbered) + 1))
    assert next(event.progress.iteration for event in told.of("progress") if event.attempt == 2) > 0
    assert (await asyncio.wait_for(watched(there, waiting.name), 30)).job.state == SUCCEEDED
    refusal: Refusal = await asyncio.wait_for(cut_off, 10)
    assert (refusal.code, refusal.reason) == (grpc.StatusCode.UNAVAILABLE, "JOB_MOVED")
    assert refusal.retry_s
    # Nothing that the dead one still believes, or tidies up, does any harm.
    refusal = await here.refusal(cancel(here, paused.name))
    assert (refusal.code, refusal.reason) == (grpc.StatusCode.UNAVAILABLE, "JOB_MOVED")
    assert (await get(there, paused.name)).state == PAUSED
    assert (await update(there, paused.name, paused=False)).state in (QUEUED, RUNNING)
    for job in (running, waiting, paused):
        await in_state(here, job.name, SUCCEEDED)
    undisturbed = await there.told(ask(iterations=400, size_px=96))
    assert (undisturbed.pixels == told.pixels).all()


def _dies(server: Server) -> None:
    """Let a server be as good as dead to the others, while its worker goes on: it renews no lease any more."""
    for task in asyncio.all_tasks():
        if task in server._application._tasks and "_tend" in repr(task.get_coro()):
            task.cancel()
