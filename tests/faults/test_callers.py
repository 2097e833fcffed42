"""Callers that die, lose their network, fall asleep, come twice or change their mind."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import random
import signal
import statistics
import sys
import threading
import time
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import pytest
import pytest_asyncio

from nst.v1 import job_pb2, style_transfer_service_pb2, style_transfer_service_pb2_grpc
from nst_server import Server, images
from tests.conftest import picture_bytes
from tests.server.conftest import FOREVER, QUICK, Caller, noise, rest, tiny_settings, until, watched

Ask = Callable[..., style_transfer_service_pb2.StylizeRequest]

PAUSE_S = 30.0

ENDED = (job_pb2.JOB_STATE_SUCCEEDED, job_pb2.JOB_STATE_FAILED, job_pb2.JOB_STATE_CANCELLED)

CLIENT = """
import sys
import grpc
from nst.v1 import style_transfer_service_pb2, style_transfer_service_pb2_grpc

request = style_transfer_service_pb2.WatchJobRequest.FromString(sys.stdin.buffer.read())
with grpc.insecure_channel(sys.argv[1]) as channel:
    for response in style_transfer_service_pb2_grpc.StyleTransferServiceStub(channel).WatchJob(request):
        event = response.event
        kind = event.WhichOneof("event")
        print(kind, event.sequence, event.frame.skipped, flush=True)
"""


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def server(tiny_weights_file: Path, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Server]:
    """The server of these tests."""
    settings = tiny_settings(tiny_weights_file, tmp_path_factory.mktemp("callers"), queue_size=64)
    async with Server(settings) as running:
        yield running


@pytest_asyncio.fixture(loop_scope="session")
async def caller(server: Server) -> AsyncIterator[Caller]:
    """A client of it."""
    client = Caller(server.address)
    async with client.channel:
        yield client


@dataclass
class Watcher:
    """A process that watches a job and prints each event's kind, number and skipped frames."""

    process: asyncio.subprocess.Process
    name: str

    async def events(self) -> list[tuple[str, int, int]]:
        """Return what it printed, up to its end."""
        assert self.process.stdout
        lines = [line.decode().split() async for line in self.process.stdout if line.endswith(b"\n")]
        return [(kind, int(sequence), int(skipped)) for kind, sequence, skipped in lines]


async def watcher(address: str, name: str, **preview: Any) -> Watcher:
    """Start a process that watches a job."""
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-c", CLIENT, address, stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE
    )
    assert process.stdin
    request = style_transfer_service_pb2.WatchJobRequest(name=name, preview=preview)
    process.stdin.write(request.SerializeToString())
    process.stdin.close()
    return Watcher(process, name)


async def create(caller: Caller, **options: Any) -> job_pb2.Job:
    """Create a job: a QUICK one, options and fields changed as told."""
    return await create_by(caller, asked(**options))


async def create_by(caller: Caller, request: style_transfer_service_pb2.StylizeRequest) -> job_pb2.Job:
    """Send a request by CreateJob."""
    return await caller.jobs.CreateJob(style_transfer_service_pb2.CreateJobRequest(request=request))


def asked(*, content: bytes = b"", request_id: str = "", **options: Any) -> style_transfer_service_pb2.StylizeRequest:
    """Return a request: a QUICK one, options and fields changed as told."""
    return style_transfer_service_pb2.StylizeRequest(
        content={"data": content or picture_bytes(96, 64, seed=1)},
        styles=[{"image": {"data": picture_bytes(64, 80, seed=2)}}],
        options=QUICK | options,
        request_id=request_id,
    )


async def get(caller: Caller, name: str) -> job_pb2.Job:
    """Return a job."""
    return await caller.jobs.GetJob(style_transfer_service_pb2.GetJobRequest(name=name))


async def cancel(caller: Caller, name: str) -> job_pb2.Job:
    """Cancel a job."""
    return await caller.jobs.CancelJob(style_transfer_service_pb2.CancelJobRequest(name=name))


@pytest_asyncio.fixture(scope="module", loop_scope="session", autouse=True)
async def sleeper(server: Server) -> AsyncIterator[tuple[Watcher, float]]:
    """A client that is stopped while it watches a job, and since when; the other tests run meanwhile."""
    client = Caller(server.address)
    async with client.channel:
        job = await create(client, content=noise(256, 256), size_px=256, iterations=150)
        watching = await watcher(server.address, job.name, encoding={"format": "IMAGE_FORMAT_PNG"})
        live = server._application._jobs[job.name]
        try:
            await until(lambda: len(live._frames) == 1 and live.now.progress is not None, 60)
            watching.process.send_signal(signal.SIGSTOP)
            yield watching, time.monotonic()
        finally:
            with contextlib.suppress(ProcessLookupError):
                watching.process.kill()
            await watching.process.wait()


async def test_a_killed_watcher_harms_nothing(server: Server, caller: Caller) -> None:
    """SIGKILL: the server forgets it, the job goes on, and another watcher takes up where it was, without a gap."""
    job = await create(caller, iterations=150, size_px=96)
    live = server._application._jobs[job.name]
    watching = await watcher(server.address, job.name)
    assert watching.process.stdout
    seen = []
    while len(seen) < 20:
        seen.append((await asyncio.wait_for(watching.process.stdout.readline(), 30)).split())
    watching.process.kill()
    last = int(((await watching.events()) or [seen[-1]])[-1][1])
    told = await watched(caller, job.name, last)

    assert [event.sequence for event in told.numbered] == list(range(last + 1, told.events[-1].sequence + 1))
    assert told.job.state == job_pb2.JOB_STATE_SUCCEEDED
    assert told.job.attempt == 1
    assert [each.iteration for each in (await watched(caller, job.name)).progress] == list(range(151))
    await until(lambda: not (live._watchers or live._frames))
    await watching.process.wait()


async def test_a_network_that_is_cut_harms_nothing(server: Server, caller: Caller) -> None:
    """Ten times, the connection reset in the midst of the stream: each time it goes on without a gap."""
    job = await create(caller, iterations=200, size_px=96)
    live = server._application._jobs[job.name]
    dice, told = random.Random(3), []
    async with cut_after(server.address) as (address, cut):
        for _ in range(10):
            client, count = Caller(address), dice.randint(1, 12)
            async with client.channel:
                preview = {"interval": 1}
                request = style_transfer_service_pb2.WatchJobRequest(
                    name=job.name, after_sequence=told[-1] if told else 0, preview=preview
                )
                call = client.jobs.WatchJob(request)
                with contextlib.suppress(grpc.aio.AioRpcError):
                    while (response := await call.read()) is not grpc.aio.EOF:
                        kind = response.event.WhichOneof("event")
                        if kind in ("state_change", "progress"):
                            told.append(response.event.sequence)
                            count -= 1
                        if not count:
                            cut()
                assert await call.code() == grpc.StatusCode.UNAVAILABLE
    remaining = await watched(caller, job.name, told[-1])
    told += [event.sequence for event in remaining.numbered]
    assert told == list(range(1, len(told) + 1))
    assert (remaining.job.state, remaining.job.attempt) == (job_pb2.JOB_STATE_SUCCEEDED, 1)
    await until(lambda: not (live._watchers or live._frames))


async def test_one_request_from_32_threads_is_one_job(server: Server, caller: Caller) -> None:
    """By CreateJob, from as many threads with a channel each; all learn of the same job, and it runs once."""
    barrier = threading.Barrier(32)

    def create_it(_: int) -> str:
        with grpc.insecure_channel(server.address) as channel:
            jobs = style_transfer_service_pb2_grpc.StyleTransferServiceStub(channel)
            barrier.wait()
            request = style_transfer_service_pb2.CreateJobRequest(request=asked(request_id="thirty-two"))
            return jobs.CreateJob(request).name

    with ThreadPoolExecutor(32) as pool:
        loop = asyncio.get_running_loop()
        names = await asyncio.gather(*(loop.run_in_executor(pool, create_it, index) for index in range(32)))

    assert len(set(names)) == 1
    listed = await caller.jobs.ListJobs(style_transfer_service_pb2.ListJobsRequest())
    assert [job.request_id for job in listed.jobs].count("thirty-two") == 1
    told = await watched(caller, names[0])
    assert (told.job.state, told.job.attempt) == (job_pb2.JOB_STATE_SUCCEEDED, 1)


async def test_one_request_in_32_streams_is_one_job(caller: Caller) -> None:
    """By Stylize, five times: each stream tells of the same job, from its beginning to its end."""
    for attempt in range(5):
        calls = [caller.jobs.Stylize(asked(request_id=f"stream-{attempt}")) for _ in range(32)]
        told = await asyncio.wait_for(asyncio.gather(*(rest(call) for call in calls)), 30)
        assert len({one.job.name for one in told}) == 1
        assert {one.job.state for one in told} == {job_pb2.JOB_STATE_SUCCEEDED}
        for one in told:
            assert [event.sequence for event in one.numbered] == list(range(1, one.events[-1].sequence + 1))


async def test_a_caller_may_leave_while_its_job_is_stored(
    server: Server, caller: Caller, monkeypatch: pytest.MonkeyPatch
) -> None:
    """CreateJob: the job is there and runs, and the request repeated finds it. Stylize: the job ends, as it is its."""
    store, written, go_on = server._ledger.store.create, asyncio.Event(), asyncio.Event()

    async def slow(*given: Any, **named: Any) -> Any:
        stored = await store(*given, **named)
        written.set()
        await go_on.wait()
        return stored

    ends = {}
    for method in (caller.jobs.CreateJob, caller.jobs.Stylize):
        written.clear()
        go_on.clear()
        monkeypatch.setattr(server._ledger.store, "create", slow)
        request = asked(request_id=f"left-{method is caller.jobs.Stylize}")
        if method is caller.jobs.CreateJob:
            call = method(style_transfer_service_pb2.CreateJobRequest(request=request))
        else:
            call = method(request)
        await asyncio.wait_for(written.wait(), 10)
        monkeypatch.undo()
        call.cancel()
        await until(lambda: not server._application.scheduler._reserved)
        again = asyncio.create_task(create_by(caller, request))
        await asyncio.sleep(0.2)
        go_on.set()
        told = await asyncio.wait_for(watched(caller, (await again).name), 30)
        ends[method is caller.jobs.Stylize] = told.job.state
    assert ends == {False: job_pb2.JOB_STATE_SUCCEEDED, True: job_pb2.JOB_STATE_CANCELLED}


async def test_a_running_job_is_cancelled_within_an_evaluation(server: Server, caller: Caller) -> None:
    """The device is free after one evaluation and 50 ms at most; the best of five tries, for a busy machine."""
    scheduler, delays = server._application.scheduler, []
    for _ in range(5):
        job = await create(caller, **FOREVER)
        live = server._application._jobs[job.name]
        await until(lambda live=live: live.snapshot().sequence > 10, 20)
        clock = [event.payload.elapsed_s for event in live._log if hasattr(event.payload, "elapsed_s")]
        evaluation_s = statistics.median(after - before for before, after in itertools.pairwise(clock))
        began = time.monotonic()
        cancelling = asyncio.create_task(cancel(caller, job.name))
        while scheduler._running:
            await asyncio.sleep(0.001)
        delays.append(time.monotonic() - began - evaluation_s)
        assert (await cancelling).state == job_pb2.JOB_STATE_CANCELLED
        assert_ended_once(await watched(caller, job.name))
    assert min(delays) <= 0.05


async def test_cancel_while_queued_and_paused(server: Server, caller: Caller) -> None:
    """It ends at once and never gets a device again; the job that runs is not disturbed."""
    running = await create(caller, **FOREVER)
    queued, paused = await create(caller), await create(caller)
    pausing = style_transfer_service_pb2.UpdateJobRequest(name=paused.name, paused=True)
    assert (await caller.jobs.UpdateJob(pausing)).state == job_pb2.JOB_STATE_PAUSED

    for name in (queued.name, paused.name):
        assert (await asyncio.wait_for(cancel(caller, name), 5)).state == job_pb2.JOB_STATE_CANCELLED
        told = await watched(caller, name)
        assert_ended_once(told)
        assert told.job.attempt == 0
    assert (await get(caller, running.name)).state == job_pb2.JOB_STATE_RUNNING
    assert (await cancel(caller, running.name)).state == job_pb2.JOB_STATE_CANCELLED


async def test_cancel_of_a_job_that_ran_and_is_paused(server: Server, caller: Caller) -> None:
    """It ends, and leaves no checkpoint."""
    job = await create(caller, **FOREVER)
    live = server._application._jobs[job.name]
    await until(lambda: live.now.progress is not None, 20)
    await caller.jobs.UpdateJob(style_transfer_service_pb2.UpdateJobRequest(name=job.name, paused=True))
    await until(lambda: live.snapshot().state == "paused")
    folder = server._settings.data_dir / "objects" / "checkpoints" / job.name.removeprefix("jobs/")
    await until(lambda: bool(list(folder.glob("*"))))

    assert (await cancel(caller, job.name)).state == job_pb2.JOB_STATE_CANCELLED
    assert_ended_once(await watched(caller, job.name))
    await until(lambda: not list(folder.glob("*")))


async def test_cancel_while_the_picture_is_encoded(
    server: Server, caller: Caller, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Too late: the job succeeds. The device is free meanwhile."""
    encode, begun, go_on = images.encode, threading.Event(), threading.Event()

    def slow(*given: Any, parameters: Any = None, **named: Any) -> Any:
        if parameters is not None:  # else it is a preview
            begun.set()
            go_on.wait(20)
        return encode(*given, parameters=parameters, **named)

    monkeypatch.setattr(images, "encode", slow)
    job = await create(caller)
    await until(begun.is_set, 20)
    cancelling = asyncio.create_task(cancel(caller, job.name))
    await until(lambda: not server._application.scheduler._running)
    await asyncio.sleep(0.1)
    assert not cancelling.done()
    go_on.set()
    assert (await cancelling).state == job_pb2.JOB_STATE_SUCCEEDED
    assert_ended_once(await watched(caller, job.name))


async def test_cancel_races_with_finish(server: Server, caller: Caller) -> None:
    """At moments around a job's end, and again after it: one terminal state, and every answer names the same."""
    dice, states = random.Random(7), set()
    for _ in range(20):
        job = await create(caller, size_px=32, iterations=10)
        watching, live = asyncio.create_task(watched(caller, job.name)), server._application._jobs[job.name]
        moment = dice.choice((0, 3, 6, 8, 9, 10, 10, 10))
        await until(lambda live=live, moment=moment: live.now.progress and live.now.progress.iteration >= moment, 20)
        await asyncio.sleep(dice.choice((0, 0, 0.005, 0.02)))
        cancelled = await cancel(caller, job.name)
        again = await cancel(caller, job.name)
        told = await watching
        assert cancelled.state == again.state == told.job.state == (await get(caller, job.name)).state
        assert_ended_once(told)
        assert ("result" in told.kinds) == (told.job.state == job_pb2.JOB_STATE_SUCCEEDED)
        states.add(told.job.state)
    assert states == {job_pb2.JOB_STATE_SUCCEEDED, job_pb2.JOB_STATE_CANCELLED}, "it was no race"


async def test_a_client_may_sleep_for_half_a_minute(
    server: Server, caller: Caller, sleeper: tuple[Watcher, float]
) -> None:
    """Stopped for 30 s in the midst of its stream: the job ends meanwhile, and it then reads on without a gap."""
    watching, since = sleeper
    live = server._application._jobs.get(watching.name)
    await asyncio.sleep(since + PAUSE_S - time.monotonic())
    job = await get(caller, watching.name)
    assert (job.state, job.attempt) == (job_pb2.JOB_STATE_SUCCEEDED, 1)
    assert live is None, "the job has ended"

    watching.process.send_signal(signal.SIGCONT)
    events = await asyncio.wait_for(watching.events(), 30)

    assert await watching.process.wait() == 0
    numbered = [sequence for kind, sequence, _ in events if kind in ("state_change", "progress")]
    (result,) = {sequence for kind, sequence, _ in events if kind == "result"}
    assert sorted([*numbered, result]) == list(range(1, job.sequence + 1))
    assert events[-1][:2] == ("state_change", job.sequence)
    assert any(skipped for kind, _, skipped in events if kind == "frame"), "it was never behind"


def assert_ended_once(told: Any) -> None:
    """Assert that a job's log has one end, which is its last event."""
    assert [event.sequence for event in told.numbered] == list(range(1, len(told.numbered) + 1))
    assert [state in ENDED for state in told.states].count(True) == 1
    assert told.states[-1] in ENDED


@contextlib.asynccontextmanager
async def cut_after(address: str) -> AsyncIterator[tuple[str, Callable[[], None]]]:
    """Yield the address of a proxy, and a function that resets every connection through it."""
    writers: list[asyncio.StreamWriter] = []

    async def pump(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError):
            while data := await reader.read(65536):
                writer.write(data)
                await writer.drain()

    async def proxy(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        host, _, port = address.rpartition(":")
        server_reader, server_writer = await asyncio.open_connection(host, int(port))
        writers.extend((writer, server_writer))
        await asyncio.gather(pump(reader, server_writer), pump(server_reader, writer))

    def cut() -> None:
        for writer in writers:
            writer.transport.abort()
        writers.clear()

    listening = await asyncio.start_server(proxy, "localhost", 0)
    yield f"localhost:{listening.sockets[0].getsockname()[1]}", cut
    cut()
    listening.close()
    await listening.wait_closed()
