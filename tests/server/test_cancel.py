"""Callers that leave: by cancelling, by a deadline, by dying; at every moment of a job."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import random
import signal
import sys
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import grpc
import pytest

from nst.v1 import job_pb2, style_transfer_service_pb2
from nst_server import Server
from tests.server.conftest import FOREVER, STRICT_TIMEOUT_S, Caller, Refusal, idle, noise, read_until, until

Ask = Callable[..., style_transfer_service_pb2.StylizeRequest]

FREE_WITHIN_S = 1.0
"""One evaluation of the tiny model takes about 20 ms; the rest is for a busy machine."""

SETUP_S = 3.0
"""What comes before the first evaluation, on a busy machine: Gram matrices, scripting, memory for the optimizer."""

CLIENT = """
import sys, time
import grpc
from nst.v1 import style_transfer_service_pb2, style_transfer_service_pb2_grpc

request = style_transfer_service_pb2.StylizeRequest.FromString(sys.stdin.buffer.read())
with grpc.insecure_channel(sys.argv[1]) as channel:
    for response in style_transfer_service_pb2_grpc.StyleTransferServiceStub(channel).Stylize(request):
        if response.event.WhichOneof("event") == sys.argv[2]:
            print("there", flush=True)
            if sys.argv[3] == "stall":
                time.sleep(60)
"""


@contextlib.asynccontextmanager
async def client_process(
    address: str, request: style_transfer_service_pb2.StylizeRequest, moment: str, manner: str = "read"
) -> AsyncIterator[asyncio.subprocess.Process]:
    """A client in a process of its own, once it has seen an event of kind `moment`; killed at the end."""
    client = await asyncio.create_subprocess_exec(
        sys.executable,
        "-c",
        CLIENT,
        address,
        moment,
        manner,
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
    )
    assert client.stdin
    assert client.stdout
    try:
        client.stdin.write(request.SerializeToString())
        client.stdin.close()
        assert await client.stdout.readline() == b"there\n"
        yield client
    finally:
        with contextlib.suppress(ProcessLookupError):
            client.kill()
        await client.wait()


async def test_cancelling_a_running_job_frees_the_worker(caller: Caller, ask: Ask, shared: Server) -> None:
    """The job ends as cancelled within one evaluation, nobody watches it any more, and the next one starts at once."""
    call = caller.jobs.Stylize(ask(**FOREVER))
    await read_until(call, "progress")
    (job,) = [run.job for run in shared._application.scheduler._running.values()]

    call.cancel()
    await until(lambda: not shared._application.scheduler._running, FREE_WITHIN_S)

    await until(lambda: bool(job.state.terminal))
    assert job.state == "cancelled"
    assert job.now.end_time is not None
    await until(lambda: not job._watchers)
    began = time.monotonic()
    await read_until(following := caller.jobs.Stylize(ask(**FOREVER)), "progress")
    assert time.monotonic() - began < 1
    following.cancel()


async def test_a_deadline_ends_the_job(caller: Caller, ask: Ask, shared: Server) -> None:
    """When the call's time is up, the caller gets DEADLINE_EXCEEDED and the worker is free."""
    call = caller.jobs.Stylize(ask(**FOREVER), timeout=0.7)
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        async for _ in call:
            pass

    assert Refusal(caught.value).code == grpc.StatusCode.DEADLINE_EXCEEDED
    await until(lambda: idle(shared), FREE_WITHIN_S)


@pytest.mark.parametrize(("moment", "manner"), [("snapshot", "read"), ("frame", "read"), ("frame", "stall")])
async def test_a_killed_client_ends_its_job(caller: Caller, ask: Ask, shared: Server, moment: str, manner: str) -> None:
    """SIGKILL of the client frees the worker, also when the client had stopped reading and a write was blocked."""
    large = {"content": noise(384, 384), "preview": {"encoding": {"format": "IMAGE_FORMAT_PNG"}}}
    request = ask(**(FOREVER | large | {"size_px": 384}))
    async with client_process(shared.address, request, moment, manner) as client:
        if manner == "stall":
            await asyncio.sleep(1.5)
        assert not idle(shared)
        client.send_signal(signal.SIGKILL)
        await until(lambda: idle(shared), FREE_WITHIN_S + SETUP_S * (moment == "snapshot"))


async def test_a_queued_job_can_be_cancelled(caller: Caller, ask: Ask, shared: Server) -> None:
    """It leaves the queue without ever running, and those behind it move up."""
    running = caller.jobs.Stylize(ask(**FOREVER))
    await read_until(running, "state_change")
    first, second = caller.jobs.Stylize(ask(**FOREVER)), None
    await read_until(first, "snapshot")
    second = caller.jobs.Stylize(ask())
    assert (await read_until(second, "snapshot")).snapshot.queue_position == 1
    (job, _) = shared._application.scheduler._waiting

    first.cancel()
    moved = (await read_until(second, "state_change")).state_change.job

    assert (moved.state, moved.queue_position) == (job_pb2.JOB_STATE_QUEUED, 0)
    assert job.state == "cancelled"
    assert job.now.start_time is None
    running.cancel()
    ended = await read_until(second, "result")
    assert ended.result.image.data
    second.cancel()


async def test_a_client_that_leaves_while_its_images_are_decoded_leaves_nothing(
    caller: Caller, ask: Ask, shared: Server
) -> None:
    """Its place in the queue is free again, and no job comes of it."""
    call = caller.jobs.Stylize(ask(content=noise(2500, 2500), **FOREVER))
    await until(lambda: shared._application.scheduler._reserved == 1)
    call.cancel()

    await until(lambda: shared._application.scheduler._reserved == 0)
    await asyncio.sleep(0.3)
    assert idle(shared)


async def test_a_client_may_leave_between_result_and_last_event(caller: Caller, ask: Ask, shared: Server) -> None:
    """The job has succeeded by then; leaving changes nothing and breaks nothing."""
    for _ in range(5):
        call = caller.jobs.Stylize(ask())
        await read_until(call, "snapshot")
        (job,) = [
            *shared._application.scheduler._waiting,
            *(run.job for run in shared._application.scheduler._running.values()),
        ]
        await read_until(call, "result")
        call.cancel()
        assert job.state == "succeeded"


async def test_a_storm_of_leaving_clients_leaks_nothing(
    caller: Caller, ask: Ask, shared: Server, caplog: pytest.LogCaptureFixture
) -> None:
    """Sixty clients that leave at random moments, start and finish included; then all is as before, and unlogged."""
    await caller.told(ask())  # opens the connection
    dice = random.Random(1)
    tasks, descriptors = len(asyncio.all_tasks()), open_descriptors()
    children = set(child_processes())

    async def come_and_go(index: int) -> None:
        await asyncio.sleep(index * 0.03)
        call = caller.jobs.Stylize(ask(size_px=32, iterations=dice.choice((1, 2, 5))))
        with contextlib.suppress(grpc.aio.AioRpcError, TimeoutError, asyncio.CancelledError):
            async with asyncio.timeout(dice.uniform(0, 0.25)):
                while await call.read() is not grpc.aio.EOF:
                    pass
        call.cancel()

    with caplog.at_level(logging.WARNING):
        await asyncio.gather(*(come_and_go(index) for index in range(60)))
        await until(lambda: idle(shared))
        await until(lambda: len(asyncio.all_tasks()) <= tasks)

    await until(lambda: open_descriptors() <= descriptors)
    assert set(child_processes()) == children
    assert not [record for record in caplog.records if record.name != "asyncio" or "slow" not in record.message]
    assert (await caller.told(ask())).job.state == job_pb2.JOB_STATE_SUCCEEDED


async def test_a_client_that_falls_silent_ends_its_job(strict_server: Server, ask: Ask) -> None:
    """A machine that loses power says no goodbye: the server asks whether it is there, and then ends the job."""
    server = strict_server
    async with swallowing_proxy(server.address) as (address, swallow):
        client = Caller(address)
        async with client.channel:
            call = client.jobs.Stylize(ask(preview={"interval": 0}, **FOREVER))
            await read_until(call, "progress")
            swallow()
            await until(lambda: idle(server), 8)


async def test_a_client_that_leaves_in_the_middle_of_its_upload_leaves_nothing(
    caller: Caller, ask: Ask, shared: Server
) -> None:
    """It holds a place in the queue while its images are received, and no longer."""
    async with swallowing_proxy(shared.address, after_bytes=100_000) as (address, _):
        client = Caller(address)
        async with client.channel:
            uploading = asyncio.create_task(client.told(ask(content=noise(900, 900))))
            await until(lambda: shared._application.scheduler._reserved == 1)
            await asyncio.sleep(0.2)
            assert shared._application.scheduler._reserved == 1
    await until(lambda: shared._application.scheduler._reserved == 0)
    with contextlib.suppress(grpc.aio.AioRpcError, asyncio.CancelledError):
        await uploading


async def test_an_upload_that_never_ends_is_given_up(strict: Caller, strict_server: Server, ask: Ask) -> None:
    """A client that stays and does not complete its request holds its place as long as a write may take, no longer."""
    async with swallowing_proxy(strict_server.address, after_bytes=100_000) as (address, _):
        client = Caller(address)
        async with client.channel:
            uploading = asyncio.create_task(client.told(ask(content=noise(900, 900))))
            await until(lambda: strict_server._application.scheduler._reserved == 1)
            await until(lambda: strict_server._application.scheduler._reserved == 0, STRICT_TIMEOUT_S + 2)
            uploading.cancel()
    assert (await strict.told(ask())).result


@contextlib.asynccontextmanager
async def swallowing_proxy(
    address: str, after_bytes: float = float("inf")
) -> AsyncIterator[tuple[str, Callable[[], None]]]:
    """Yield the address of a proxy, and a function that makes it swallow everything from then on.

    It begins to do so by itself when one side has sent `after_bytes`.
    """
    swallowing = asyncio.Event()
    writers = []

    async def pump(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        sent = 0
        with contextlib.suppress(OSError):
            while data := await reader.read(65536):
                sent += len(data)
                if sent > after_bytes:
                    swallowing.set()
                if not swallowing.is_set():
                    writer.write(data)

    async def proxy(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        host, _, port = address.rpartition(":")
        server_reader, server_writer = await asyncio.open_connection(host, int(port))
        writers.extend((writer, server_writer))
        await asyncio.gather(pump(reader, server_writer), pump(server_reader, writer))

    listening = await asyncio.start_server(proxy, "localhost", 0)
    yield f"localhost:{listening.sockets[0].getsockname()[1]}", swallowing.set
    for writer in writers:
        writer.close()
    listening.close()
    await listening.wait_closed()


def open_descriptors() -> int:
    """Return how many file descriptors this process has open."""
    return len(list(Path("/proc/self/fd").iterdir()))


def child_processes() -> list[int]:
    """Return the ids of this process's children."""
    tasks = Path(f"/proc/{os.getpid()}/task").iterdir()
    return [int(child) for task in tasks for child in (task / "children").read_text().split()]
