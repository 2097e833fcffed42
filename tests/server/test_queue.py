"""The queue: first come, first served; bounded; refusals that say when to come back."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import grpc
import pytest
from google.rpc import code_pb2

from nst.v1 import job_pb2, style_transfer_service_pb2
from nst_server import Server
from tests.conftest import picture_bytes
from tests.server.conftest import FOREVER, QUEUE_SIZE, Caller, Refusal, idle, read_until, until

Ask = Callable[..., style_transfer_service_pb2.StylizeRequest]


async def test_a_full_queue_refuses_and_says_when_to_come_back(caller: Caller, ask: Ask, shared: Server) -> None:
    """One runs, `queue_size` wait, the next one is RESOURCE_EXHAUSTED with RetryInfo; places become free again."""
    calls = await filled(caller, ask)

    refusal = await caller.refusal(ask())

    assert refusal.code == grpc.StatusCode.RESOURCE_EXHAUSTED
    assert (refusal.reason, refusal.domain) == ("QUEUE_FULL", "nst")
    assert refusal.retry_s > 0
    assert f"{QUEUE_SIZE} jobs" in refusal.message
    calls[-1].cancel()
    await until(lambda: len(shared._application.scheduler._waiting) == QUEUE_SIZE - 1)
    calls.append(caller.jobs.Stylize(ask(**FOREVER)))
    assert (await read_until(calls[-1], "snapshot")).snapshot.queue_position == QUEUE_SIZE - 1
    for call in calls:
        call.cancel()


async def test_jobs_wait_in_the_order_they_came(caller: Caller, ask: Ask, shared: Server) -> None:
    """Positions are told in the snapshot, then in a state change for every step forward; the first come runs first."""
    running = caller.jobs.Stylize(ask(**FOREVER))
    await read_until(running, "state_change")
    waiting = []
    for position in range(3):
        waiting.append(asyncio.create_task(caller.told(ask())))
        await until(lambda expected=position: len(shared._application.scheduler._waiting) == expected + 1)
    running.cancel()

    told = await asyncio.gather(*waiting)

    for position, one in enumerate(told):
        assert one.events[0].snapshot.queue_position == position
        queued = [event.state_change.job for event in one.of("state_change")]
        positions = [job.queue_position for job in queued if job.state == job_pb2.JOB_STATE_QUEUED]
        assert positions == list(range(position - 1, -1, -1))
        assert [event.sequence for event in one.numbered] == list(range(1, len(one.numbered) + 1))
    starts = [one.job.start_time.ToNanoseconds() for one in told]
    ends = [one.job.end_time.ToNanoseconds() for one in told]
    assert starts == sorted(starts)
    # The next job starts while the picture of the one before is being encoded, never before that.
    assert all(start > end - 1e9 for start, end in zip(starts[1:], ends, strict=False))


async def test_whoever_waits_is_told_how_long(caller: Caller, ask: Ask) -> None:
    """GetJob, CreateJob and a stream's first event say when a job will probably begin: the later, the further behind.

    So does what is new in a stream; nothing does once the job runs.
    """
    running, first, second = [await created(caller, ask(**FOREVER)) for _ in range(3)]
    watch, get = style_transfer_service_pb2.WatchJobRequest, style_transfer_service_pb2.GetJobRequest
    watching = [caller.jobs.WatchJob(watch(name=job.name)) for job in (first, second)]
    now = time.time()
    streamed = [(await read_until(call, "snapshot")).snapshot for call in watching]
    got = [await caller.jobs.GetJob(get(name=job.name)) for job in (first, second)]
    for early, late in ([first, second], streamed, got):
        begins = [job.estimated_start_time.ToNanoseconds() / 1e9 for job in (early, late)]
        assert now - 5 < begins[0] < begins[1] < now + 3600
    assert not (await caller.jobs.GetJob(get(name=running.name))).HasField("estimated_start_time")

    await caller.jobs.CancelJob(style_transfer_service_pb2.CancelJobRequest(name=running.name))
    moved = (await read_until(watching[1], "state_change")).state_change.job
    assert (moved.queue_position, moved.HasField("estimated_start_time")) == (0, True)
    begun = (await read_until(watching[0], "state_change")).state_change.job
    assert (begun.state, begun.HasField("estimated_start_time")) == (job_pb2.JOB_STATE_RUNNING, False)
    for call in watching:
        call.cancel()
    for job in (first, second):
        await caller.jobs.CancelJob(style_transfer_service_pb2.CancelJobRequest(name=job.name))


async def created(caller: Caller, request: style_transfer_service_pb2.StylizeRequest) -> job_pb2.Job:
    """Create a job."""
    return await caller.jobs.CreateJob(style_transfer_service_pb2.CreateJobRequest(request=request))


async def test_two_hundred_requests_at_once(caller: Caller, ask: Ask, shared: Server) -> None:
    """One runs, `queue_size` wait, the others are refused within seconds; afterwards the server is as good as new."""
    calls = [caller.jobs.Stylize(ask(**FOREVER)) for _ in range(200)]

    async def first_word(call: Any) -> Refusal | None:
        try:
            await call.read()
        except grpc.aio.AioRpcError as error:
            return Refusal(error)
        return None

    began = time.monotonic()
    words = await asyncio.wait_for(asyncio.gather(*(first_word(call) for call in calls)), 20)
    took_s = time.monotonic() - began

    refusals = [word for word in words if word is not None]
    assert len(words) - len(refusals) == QUEUE_SIZE + 1
    assert {refusal.code for refusal in refusals} == {grpc.StatusCode.RESOURCE_EXHAUSTED}
    assert all(refusal.retry_s for refusal in refusals)
    assert took_s < 5
    for call in calls:
        call.cancel()
    await until(lambda: idle(shared))
    assert (await caller.told(ask())).job.state == job_pb2.JOB_STATE_SUCCEEDED


async def test_refused_requests_give_their_places_back(caller: Caller, ask: Ask, shared: Server) -> None:
    """A request that turns out to be malformed holds no place afterwards."""
    refusals = await asyncio.gather(*(caller.refusal(ask(content=b"no image")) for _ in range(3)))
    assert {refusal.code for refusal in refusals} == {grpc.StatusCode.INVALID_ARGUMENT}

    await until(lambda: shared._application.scheduler._reserved == 0)
    for call in await filled(caller, ask):
        call.cancel()


@pytest.mark.skipif(
    Path("/proc/sys/vm/overcommit_memory").read_text().strip() == "1", reason="this kernel grants any amount of memory"
)
async def test_a_job_fails_alone(serve: Callable[..., Any], ask: Ask) -> None:
    """Too little memory: the job ends FAILED with reason and advice, its stream OK, and the next job succeeds."""
    _, caller = await serve(memory_gib=100_000)  # or it would have been refused
    layers = {"relu1_1": 1.0}
    told = await caller.told(
        ask(
            content=picture_bytes(64, 64),
            size_px=4096,
            style_scale=0.1,
            history=1000,
            iterations=1000,
            style_layers=layers,
            content_layers=layers,
        )
    )

    assert told.states == [job_pb2.JOB_STATE_RUNNING, job_pb2.JOB_STATE_FAILED]
    assert told.job.error.code == code_pb2.RESOURCE_EXHAUSTED
    assert told.job.error.reason == "OUT_OF_MEMORY"
    assert "size_px" in told.job.error.message
    assert told.job.HasField("end_time")
    assert "result" not in told.kinds
    assert (await caller.told(ask())).job.state == job_pb2.JOB_STATE_SUCCEEDED


async def filled(caller: Caller, ask: Ask) -> list[Any]:
    """Return calls that fill the shared server: the first runs, the others wait in their order."""
    calls = []
    for index in range(QUEUE_SIZE + 1):
        calls.append(caller.jobs.Stylize(ask(**FOREVER)))
        await read_until(calls[-1], "snapshot" if index else "state_change")
    return calls
