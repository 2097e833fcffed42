"""However a call ends, nothing of it stays: no task, no watcher, no file, no process."""

from __future__ import annotations

import asyncio
import contextlib
import gc
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any, NamedTuple

import grpc
import pytest
import pytest_asyncio

from nst.v1 import (
    image_service_pb2,
    image_service_pb2_grpc,
    job_pb2,
    model_service_pb2,
    style_transfer_service_pb2,
)
from nst_server import Server
from nst_server.jobs import Job
from tests.server.conftest import FOREVER, Caller, idle, noise, read_until, tiny_settings, until
from tests.server.test_cancel import child_processes

Ask = Callable[..., style_transfer_service_pb2.StylizeRequest]

TIMES = 8
"""How often each call is made: what leaks is seen."""


class Footprint(NamedTuple):
    """What a process holds."""

    tasks: int
    watchers: int
    files: int
    processes: int

    @classmethod
    def of(cls, server: Server) -> Footprint:
        """Count."""
        own = [job for job in gc.get_objects() if type(job) is Job and job._archive is server._ledger]
        held = server._application._jobs if server._application else {}
        watchers = sum(len(job._watchers) + len(job._frames) for job in own) - len(held)  # whoever holds a job watches
        return cls(len(asyncio.all_tasks()), watchers, open_files(), len(child_processes()))


def open_files() -> int:
    """Return how many files this process has open, without those of the database, whose connections are kept."""
    links = []
    for descriptor in Path("/proc/self/fd").iterdir():
        with contextlib.suppress(FileNotFoundError):
            links.append(str(descriptor.readlink()))
    return len([link for link in links if "jobs.sqlite3" not in link])


async def back_to(before: Footprint, server: Server) -> None:
    """Wait until nothing is held beyond what was before. Fails if something stays."""
    for turn in range(20):
        now = Footprint.of(server)
        if all(count <= once for count, once in zip(now, before, strict=True)):
            return
        await asyncio.sleep(0.05 * turn)
        gc.collect()
    raise AssertionError(f"{now} is left of {before}: {[task.get_coro() for task in asyncio.all_tasks()]}")


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def server(tiny_weights_file: Path, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Server]:
    """The server of those tests that do not stop it."""
    settings = tiny_settings(tiny_weights_file, tmp_path_factory.mktemp("leaks"), queue_size=40, write_timeout_s=2)
    async with Server(settings) as running:
        yield running


@contextlib.asynccontextmanager
async def running_job(client: Caller, request: Any) -> AsyncIterator[str]:
    """A job that runs, and is cancelled at the end."""
    job = await client.jobs.CreateJob(style_transfer_service_pb2.CreateJobRequest(request=request))
    call = client.jobs.WatchJob(style_transfer_service_pb2.WatchJobRequest(name=job.name))
    await read_until(call, "progress")
    call.cancel()
    yield job.name
    await client.jobs.CancelJob(style_transfer_service_pb2.CancelJobRequest(name=job.name))


def unary_calls(client: Caller, ask: Ask, name: str, **how: Any) -> list[Any]:
    """Return calls of one answer that take a while, begun: two pictures are decoded, and a job is waited for."""
    return [
        client.jobs.CreateJob(style_transfer_service_pb2.CreateJobRequest(request=ask(content=noise(900, 900))), **how),
        client.jobs.GetJob(style_transfer_service_pb2.GetJobRequest(name=name), **how),
        client.jobs.UpdateJob(style_transfer_service_pb2.UpdateJobRequest(name=name, paused=False), **how),
    ]


def stream_calls(client: Caller, ask: Ask, name: str, **how: Any) -> list[Any]:
    """Return streams that would go on for long, begun: with and without pictures, each kept, and with a job's life."""
    stream = {"interval": 1}
    kept = {"interval": 1, "every_frame": True}
    return [
        client.jobs.WatchJob(style_transfer_service_pb2.WatchJobRequest(name=name, preview=stream), **how),
        client.jobs.WatchJob(style_transfer_service_pb2.WatchJobRequest(name=name, preview=kept), **how),
        client.jobs.Stylize(ask(preview=stream, **FOREVER), **how),
    ]


def export_calls(client: Caller, ask: Ask, name: str, **how: Any) -> list[Any]:
    """Return calls for files that are to be made, begun: two wait for the same, and one for another."""
    onnx = model_service_pb2.ExportModelRequest(format="EXPORT_FORMAT_ONNX")
    grams = model_service_pb2.ExportModelRequest(format="EXPORT_FORMAT_ONNX", graph="EXPORT_GRAPH_GRAMS")
    return [client.models.ExportModel(request, **how) for request in (onnx, onnx, grams)]


async def code_of(call: Any) -> grpc.StatusCode:
    """Read a call to its end; return its status."""
    with contextlib.suppress(grpc.aio.AioRpcError, asyncio.CancelledError):
        if hasattr(call, "read"):
            while await call.read() is not grpc.aio.EOF:
                pass
        else:
            await call
    return await call.code()


async def watch_of_the_unknown(client: Caller, ask: Ask, name: str) -> None:
    """Streams that are refused: of what is not there, from where nothing is, and with no room for pictures."""
    for request in (
        style_transfer_service_pb2.WatchJobRequest(name="jobs/none"),
        style_transfer_service_pb2.WatchJobRequest(name=name, after_sequence=1_000_000),
        style_transfer_service_pb2.WatchJobRequest(name=name, preview={"every_frame": True}),
    ):
        assert await code_of(client.jobs.WatchJob(request)) in (
            grpc.StatusCode.NOT_FOUND,
            grpc.StatusCode.INVALID_ARGUMENT,
            grpc.StatusCode.FAILED_PRECONDITION,
        )


CALLS = {"unary": unary_calls, "stream": stream_calls, "export": export_calls}


@pytest.mark.parametrize("calls", CALLS.values(), ids=CALLS)
@pytest.mark.parametrize("end", ["cancel", "deadline"])
async def test_callers_that_go_leave_nothing(
    server: Server, ask: Ask, calls: Callable[..., list[Any]], end: str
) -> None:
    """Cancelled, or their time is up, at once and after a moment."""
    client = Caller(server.address)
    async with client.channel, running_job(client, ask(**FOREVER)) as name:
        before = Footprint.of(server)
        for turn in range(TIMES):
            moment_s = 0.04 * turn
            begun = calls(client, ask, name, **({"timeout": moment_s + 0.001} if end == "deadline" else {}))
            if end == "cancel":
                await asyncio.sleep(moment_s)
                for call in begun:
                    call.cancel()
            codes = [await code_of(call) for call in begun]
            if calls is not unary_calls:
                expected = {"cancel": grpc.StatusCode.CANCELLED, "deadline": grpc.StatusCode.DEADLINE_EXCEEDED}[end]
                assert set(codes) <= {expected, grpc.StatusCode.RESOURCE_EXHAUSTED}
        listed = style_transfer_service_pb2.ListJobsRequest(states=[job_pb2.JOB_STATE_QUEUED])
        for job in (await client.jobs.ListJobs(listed)).jobs:  # CreateJob may have been faster than its caller
            await client.jobs.CancelJob(style_transfer_service_pb2.CancelJobRequest(name=job.name))
        await back_to(before, server)
    await until(lambda: idle(server))


@pytest.mark.parametrize("kind", ["unary", "stream"])
async def test_calls_that_fail_leave_nothing(server: Server, ask: Ask, kind: str) -> None:
    """Refused for what they ask; of streams also those that cannot begin, for want of room."""
    client = Caller(server.address)
    async with client.channel, running_job(client, ask(**FOREVER)) as name:
        spool = server._settings.data_dir / "spool"
        with contextlib.suppress(OSError):
            spool.rmdir()
        if not spool.exists():
            spool.write_text("a file in the folder's place")
        before = Footprint.of(server)
        for _ in range(TIMES):
            if kind == "stream":
                await watch_of_the_unknown(client, ask, name)
                continue
            bad = style_transfer_service_pb2.CreateJobRequest(request=ask(content=b"no image"))
            assert (await client.refusal(client.jobs.CreateJob(bad))).code == grpc.StatusCode.INVALID_ARGUMENT
            none = style_transfer_service_pb2.GetJobRequest(name="none")
            assert (await client.refusal(client.jobs.GetJob(none))).code == grpc.StatusCode.NOT_FOUND
        await back_to(before, server)
        spool.unlink()
    await until(lambda: idle(server))


async def test_readers_that_stall_leave_nothing(server: Server, ask: Ask) -> None:
    """A watcher and a download that nobody reads are given up with STREAM_UNREAD, and the job goes on."""
    large = noise(1000, 1000)
    client = Caller(server.address)
    async with (
        client.channel,
        running_job(client, ask(content=noise(300, 300), **(FOREVER | {"size_px": 300}))) as name,
    ):
        stub = image_service_pb2_grpc.ImageServiceStub(client.channel)
        upload = await stub.CreateUpload(image_service_pb2.CreateUploadRequest(total_bytes=len(large)))
        image = await stub.WriteUpload(image_service_pb2.WriteUploadRequest(name=upload.name, data=large))
        many = [Caller(server.address, [("nst.own", index)]) for index in range(2)]
        before = Footprint.of(server)
        png = {"encoding": {"format": "IMAGE_FORMAT_PNG"}}
        stalled = [many[0].jobs.WatchJob(style_transfer_service_pb2.WatchJobRequest(name=name, preview=png))]
        sleepy = image_service_pb2_grpc.ImageServiceStub(many[1].channel)
        stalled += [sleepy.DownloadImage(image_service_pb2.DownloadImageRequest(name=image.image)) for _ in range(12)]
        for call in stalled:
            await call.read()
        live = server._application._jobs[name]
        await until(lambda: not live._frames, 20)
        await asyncio.sleep(2.5)
        codes = {await code_of(call) for call in stalled}
        assert grpc.StatusCode.UNAVAILABLE in codes
        assert codes <= {grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.OK}
        for sleeper in many:
            await sleeper.channel.close()
        del call, stalled, sleepy  # a call holds its connection
        await back_to(before, server)


@pytest.mark.parametrize("kind", CALLS)
async def test_a_stop_leaves_nothing(serve: Callable[..., Awaitable[Any]], ask: Ask, kind: str) -> None:
    """In the midst of calls: all of them end, and so does everything of the server."""
    server, client = await serve(queue_size=40)
    await client.channel.close()
    await server.stop(0)  # the first on this machine starts the process that workers are forked from
    before = Footprint.of(server)

    server, client = await serve(queue_size=40)
    job = await client.jobs.CreateJob(style_transfer_service_pb2.CreateJobRequest(request=ask(**FOREVER)))
    begun = client.jobs.WatchJob(style_transfer_service_pb2.WatchJobRequest(name=job.name))
    await read_until(begun, "progress")
    calls = [begun]
    for _ in range(TIMES):
        calls += CALLS[kind](client, ask, job.name)
    endings = [asyncio.create_task(code_of(call)) for call in calls]
    await asyncio.sleep(0.2)
    await server.stop(0)
    codes = await asyncio.wait_for(asyncio.gather(*endings), 10)
    assert set(codes) <= {grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.OK, grpc.StatusCode.CANCELLED}
    assert codes[0] == grpc.StatusCode.UNAVAILABLE
    await client.channel.close()
    await back_to(before, server)
