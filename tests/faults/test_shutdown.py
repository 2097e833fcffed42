"""SIGTERM to a server with a lot to do, and the next server."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import grpc
import pytest

from nst.v1 import job_pb2, style_transfer_service_pb2
from tests.server.conftest import FOREVER, Caller, noise, read_until, watched

Ask = Callable[..., style_transfer_service_pb2.StylizeRequest]

JOBS = 24
PAUSED = 4
GRACE_S = 6.0


@pytest.mark.timeout(200)
async def test_sigterm_under_load_loses_no_job(launch: Callable[..., Any], ask: Ask) -> None:
    """One runs, many wait, some are paused: exit within the grace; the next server ends them all with success.

    Those who watch are told to come back, and then read on without a gap.
    """
    server = await launch("--queue-size=40", f"--grace-s={GRACE_S}")
    await server.serving()
    jobs = server.caller.jobs

    async def create(index: int) -> str:
        options = {"iterations": 1500, "size_px": 128} if index == 0 else {"iterations": 20, "size_px": 48}
        request = style_transfer_service_pb2.CreateJobRequest(request=ask(**options))
        return (await jobs.CreateJob(request)).name

    first = await create(0)
    names = [first, *await asyncio.gather(*(create(index) for index in range(1, JOBS)))]
    for name in names[-PAUSED:]:
        await jobs.UpdateJob(style_transfer_service_pb2.UpdateJobRequest(name=name, paused=True))
    seen: dict[str, list[int]] = {name: [] for name in names}

    async def watch(name: str) -> grpc.StatusCode:
        request = style_transfer_service_pb2.WatchJobRequest(name=name, preview={"interval": 1})
        call = jobs.WatchJob(request)
        with contextlib.suppress(grpc.aio.AioRpcError):
            async for response in call:
                if response.event.WhichOneof("event") in ("state_change", "progress"):
                    seen[name].append(response.event.sequence)
        return await call.code()

    watching = [asyncio.create_task(watch(name)) for name in names]
    while len(seen[first]) < 20:
        await asyncio.sleep(0.05)

    began = time.monotonic()
    server.process.send_signal(signal.SIGTERM)
    await asyncio.wait_for(server.process.wait(), GRACE_S + 30)
    took_s = time.monotonic() - began
    assert await server.ended(10) == 0
    assert took_s <= GRACE_S, server.said("stopping") + server.said("stopped")
    assert set(await asyncio.gather(*watching)) == {grpc.StatusCode.UNAVAILABLE}
    assert server.said("job ended") == []

    later = await launch("--queue-size=40")
    await later.serving()
    listed = await later.caller.jobs.ListJobs(style_transfer_service_pb2.ListJobsRequest(page_size=100))
    assert {job.name for job in listed.jobs} == set(names)
    paused = [job.name for job in listed.jobs if job.state == job_pb2.JOB_STATE_PAUSED]
    assert sorted(paused) == sorted(names[-PAUSED:])
    for name in paused:
        await later.caller.jobs.UpdateJob(style_transfer_service_pb2.UpdateJobRequest(name=name, paused=False))
    await later.caller.jobs.UpdateJob(style_transfer_service_pb2.UpdateJobRequest(name=first, finish=True))
    ends = await asyncio.gather(*(watched(later.caller, name, max(seen[name], default=0)) for name in names))
    for name, told in zip(names, ends, strict=True):
        assert told.job.state == job_pb2.JOB_STATE_SUCCEEDED
        assert told.result
        sequences = seen[name] + [event.sequence for event in told.numbered]
        assert sequences == list(range(1, told.job.sequence + 1))
    assert ends[0].job.attempt == 2
    assert ends[0].progress[0].iteration > 0, "it began anew"


STALLED = 5
HINDERED_GRACE_S = 8.0


async def test_neither_a_worker_that_hangs_nor_watchers_that_stall_hold_up_a_stop(
    launch: Callable[..., Any], ask: Ask
) -> None:
    """With both of them, the server has ended when the grace has, and leaves no process; the next one has the job."""
    server = await launch(f"--grace-s={HINDERED_GRACE_S}", "--checkpoint-interval-s=0.2")
    await server.serving()
    asked = ask(content=noise(256, 256), **{**FOREVER, "size_px": 256})
    created = await server.caller.jobs.CreateJob(style_transfer_service_pb2.CreateJobRequest(request=asked))
    channels = []
    for index in range(STALLED):
        # A window that is soon full, so that a watcher who reads no more is stalled at once.
        window = [("grpc.http2.bdp_probe", 0), ("grpc.http2.lookahead_bytes", 65536)]
        stalled = Caller(server.caller.address, [("nst.own", index), *window])
        png = {"interval": 1, "encoding": {"format": "IMAGE_FORMAT_PNG"}}
        call = stalled.jobs.WatchJob(style_transfer_service_pb2.WatchJobRequest(name=created.name, preview=png))
        await read_until(call, "frame")
        channels.append((stalled, call))
    await asyncio.sleep(3)  # until each has got what its window takes
    os.kill(worker_of(server), signal.SIGSTOP)

    began = time.monotonic()
    server.process.send_signal(signal.SIGTERM)
    await asyncio.wait_for(server.process.wait(), HINDERED_GRACE_S + 30)
    took_s = time.monotonic() - began
    assert await server.ended(10) == 0
    assert took_s <= HINDERED_GRACE_S, server.said("stopping") + server.said("stopped")
    for stalled, call in channels:
        call.cancel()
        await stalled.channel.close()

    later = await launch()
    await later.serving()
    cancel = style_transfer_service_pb2.CancelJobRequest(name=created.name)
    assert (await later.caller.jobs.CancelJob(cancel)).attempt == 2


def worker_of(server: Any) -> int:
    """Return the process id of a server's worker, a child of a child of it."""
    found = []
    for process in server.group():
        parent = int(Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[1])
        if parent in server.group() and parent != server.process.pid:
            found.append(process)
    (worker,) = found
    return worker


async def test_a_long_queue_does_not_hold_up_a_stop(serve: Callable[..., Any], ask: Ask) -> None:
    """What waits is left as it is: nobody is told that he has moved."""
    server, client = await serve(queue_size=200)
    request = style_transfer_service_pb2.CreateJobRequest(request=ask(**FOREVER))
    names = [(await client.jobs.CreateJob(request)).name for _ in range(150)]
    before = [server._application._jobs[name].now.sequence for name in names[2:]]
    jobs = [server._application._jobs[name] for name in names[2:]]
    began = time.monotonic()
    await server.stop(1)
    assert time.monotonic() - began < 5
    assert [job.now.sequence for job in jobs] == before
