"""Many clients that do everything at once, for as long as is wanted: nothing grows, nothing is left.

`pytest tests/faults/test_soak.py -s --soak-minutes=240`
"""

from __future__ import annotations

import asyncio
import collections
import contextlib
import gc
import os
import random
import signal
import statistics
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any, NamedTuple

import grpc
import pytest

from nst.v1 import image_service_pb2, image_service_pb2_grpc, job_pb2, style_transfer_service_pb2
from tests.server.conftest import Caller, noise, until
from tests.server.test_process import Process, memory_mib

Ask = Callable[..., style_transfer_service_pb2.StylizeRequest]

CLIENTS = 8

GROWTH_MIB = 40.0
"""How much larger a process may be in the last third than in the second: allocators settle slowly."""

GROWTH_MIB_PER_HOUR = 10.0
"""And how much beyond that for each hour in between."""

ENDED = (job_pb2.JOB_STATE_SUCCEEDED, job_pb2.JOB_STATE_FAILED, job_pb2.JOB_STATE_CANCELLED)

SERVER = """
import asyncio, json, signal, sys
from nst_server.__main__ import main

def tell(*_):
    tasks = len(asyncio.all_tasks(asyncio.get_running_loop()))
    print(json.dumps({"event": "tasks", "count": tasks}), file=sys.stderr, flush=True)

signal.signal(signal.SIGUSR1, tell)
main()
"""


class Sample(NamedTuple):
    """What the front takes at a moment, and its worker with what that is forked from: MiB, and files of the front."""

    time_s: float
    front_mib: float
    worker_mib: float
    files: tuple[str, ...]

    @classmethod
    def of(cls, server: Process) -> Sample:
        """Measure. Of the database's files none count: a few connections are kept."""
        front = server.process.pid
        others = sum(memory_mib(pid) for pid in server.group() if pid != front)
        files = []
        for descriptor in Path(f"/proc/{front}/fd").iterdir():
            with contextlib.suppress(FileNotFoundError):
                files.append(str(descriptor.readlink()))
        left = tuple(sorted(file for file in files if "sqlite3" not in file))
        return cls(time.monotonic(), memory_mib(front), others, left)


class Client:
    """A client that does one thing after the other, at random, and checks what it is told."""

    def __init__(self, address: str, ask: Ask, seed: int) -> None:
        self.dice = random.Random(seed)
        self.done: collections.Counter[str] = collections.Counter()
        self._address = address
        self._ask = ask
        self._images = [noise(self.dice.randint(40, 90), 48, seed=seed) for _ in range(3)]

    async def work(self, until_s: float) -> None:
        """Go on until a time. A full queue is waited for."""
        deeds: list[Callable[[Caller], Awaitable[None]]] = [
            self.watch,
            self.watch,
            self.come_back,
            self.come_back,
            self.leave,
            self.pause,
            self.steer,
            self.cancel,
            self.delete,
            self.look,
            self.carry,
            self.blunder,
        ]
        while time.monotonic() < until_s:
            deed = self.dice.choice(deeds)
            caller = Caller(self._address, [("nst.own", self.dice.random().hex())])
            async with caller.channel:
                try:
                    await deed(caller)
                    self.done[deed.__name__] += 1
                except grpc.aio.AioRpcError as error:
                    if error.code() is not grpc.StatusCode.RESOURCE_EXHAUSTED:
                        raise
                    self.done["full"] += 1
                    await asyncio.sleep(0.2)

    async def watch(self, caller: Caller) -> None:
        """Watch a job to its end."""
        events = await self._watched(caller, await self._created(caller), 0)
        assert events[-1].state_change.job.state == job_pb2.JOB_STATE_SUCCEEDED

    async def come_back(self, caller: Caller) -> None:
        """Drop the connection in the midst of a stream, and take it up on another."""
        name, told = await self._created(caller), []
        while not (told and told[-1].state_change.job.state in ENDED):
            other = Caller(self._address, [("nst.own", self.dice.random().hex())])
            told += await self._watched(other, name, len(told), self.dice.randint(1, 30))
            await other.channel.close()

    async def leave(self, caller: Caller) -> None:
        """Begin a job by Stylize, and leave."""
        call = caller.jobs.Stylize(self._request())
        for _ in range(self.dice.randint(1, 20)):
            if await call.read() is grpc.aio.EOF:
                break
        call.cancel()

    async def pause(self, caller: Caller) -> None:
        """Pause a job, let it go on, and watch it to its end."""
        name = await self._created(caller)
        for paused in (True, False):
            await asyncio.sleep(self.dice.uniform(0, 0.5))
            with contextlib.suppress(Ended):
                await _unless_ended(
                    caller.jobs.UpdateJob(style_transfer_service_pb2.UpdateJobRequest(name=name, paused=paused))
                )
        while (await self._got(caller, name)).state == job_pb2.JOB_STATE_PAUSED:  # it was asked while it was pausing
            with contextlib.suppress(Ended):
                await _unless_ended(
                    caller.jobs.UpdateJob(style_transfer_service_pb2.UpdateJobRequest(name=name, paused=False))
                )
        await self._watched(caller, name, 0)

    async def steer(self, caller: Caller) -> None:
        """Change a job, and then say that it is enough."""
        name = await self._created(caller)
        await asyncio.sleep(self.dice.uniform(0, 0.5))
        for changes in ({"options": {"style_weight": 10.0}}, {"finish": True}):
            with contextlib.suppress(Ended):
                await _unless_ended(
                    caller.jobs.UpdateJob(style_transfer_service_pb2.UpdateJobRequest(name=name, **changes))
                )
        events = await self._watched(caller, name, 0)
        assert events[-1].state_change.job.state == job_pb2.JOB_STATE_SUCCEEDED

    async def cancel(self, caller: Caller) -> None:
        """Cancel a job at some moment."""
        name = await self._created(caller)
        await asyncio.sleep(self.dice.uniform(0, 0.5))
        job = await caller.jobs.CancelJob(style_transfer_service_pb2.CancelJobRequest(name=name))
        assert job.state in ENDED

    async def delete(self, caller: Caller) -> None:
        """Delete a job at some moment."""
        name = await self._created(caller)
        await asyncio.sleep(self.dice.uniform(0, 0.5))
        await caller.jobs.DeleteJob(style_transfer_service_pb2.DeleteJobRequest(name=name))

    async def look(self, caller: Caller) -> None:
        """List jobs, and look at one."""
        page = await caller.jobs.ListJobs(style_transfer_service_pb2.ListJobsRequest(page_size=20))
        for job in page.jobs[:1]:
            with contextlib.suppress(Ended):
                await _unless_ended(caller.jobs.GetJob(style_transfer_service_pb2.GetJobRequest(name=job.name)))

    async def carry(self, caller: Caller) -> None:
        """Carry an image there and back."""
        stub, data = image_service_pb2_grpc.ImageServiceStub(caller.channel), self.dice.choice(self._images)
        upload = await stub.CreateUpload(image_service_pb2.CreateUploadRequest(total_bytes=len(data)))
        for start in range(0, len(data), 4096):
            part = image_service_pb2.WriteUploadRequest(name=upload.name, offset=start, data=data[start : start + 4096])
            upload = await stub.WriteUpload(part)
        request = image_service_pb2.DownloadImageRequest(name=upload.image)
        assert b"".join([part.data async for part in stub.DownloadImage(request)]) == data

    async def blunder(self, caller: Caller) -> None:
        """Ask for nonsense."""
        request = self._request()
        request.content.data = b"no image"
        refusal = await caller.refusal(request)
        assert refusal.code in (grpc.StatusCode.INVALID_ARGUMENT, grpc.StatusCode.RESOURCE_EXHAUSTED)

    def _request(self) -> style_transfer_service_pb2.StylizeRequest:
        preview = {"interval": 1, "every_frame": self.dice.random() < 0.2}
        return self._ask(
            content=self.dice.choice(self._images),
            preview=preview,
            iterations=self.dice.choice((2, 10, 40)),
            size_px=self.dice.choice((32, 48, 64)),
        )

    async def _created(self, caller: Caller) -> str:
        request = style_transfer_service_pb2.CreateJobRequest(request=self._request())
        return str((await caller.jobs.CreateJob(request)).name)

    async def _got(self, caller: Caller, name: str) -> job_pb2.Job:
        return await caller.jobs.GetJob(style_transfer_service_pb2.GetJobRequest(name=name))

    async def _watched(
        self, caller: Caller, name: str, after: int, count: float = float("inf")
    ) -> list[job_pb2.JobEvent]:
        """Return at most so many numbered events after a number, in which there is no gap."""
        request = style_transfer_service_pb2.WatchJobRequest(
            name=name, after_sequence=after, preview={"interval": 1, "every_frame": self.dice.random() < 0.2}
        )
        call, events = caller.jobs.WatchJob(request), []
        while len(events) < count and (response := await call.read()) is not grpc.aio.EOF:
            if response.event.WhichOneof("event") in ("state_change", "progress", "result"):
                events.append(response.event)
                assert response.event.sequence == after + len(events)
        call.cancel()
        return events


class Ended(Exception):
    """A job had ended, or been deleted, before something could be done to it."""


async def _unless_ended(call: Awaitable[Any]) -> None:
    try:
        await call
    except grpc.aio.AioRpcError as error:
        if error.code() not in (grpc.StatusCode.FAILED_PRECONDITION, grpc.StatusCode.NOT_FOUND):
            raise
        raise Ended from error


async def tasks_of(server: Process) -> int:
    """Return how many tasks the front has."""
    told = len(server.said("tasks"))
    os.kill(server.process.pid, signal.SIGUSR1)
    await until(lambda: len(server.said("tasks")) > told)
    return int(server.said("tasks")[-1]["count"])


@pytest.mark.timeout(0)
async def test_soak(launch: Callable[..., Any], ask: Ask, pytestconfig: pytest.Config) -> None:
    """Memory does not grow with time; in the end there are as many tasks, files and processes as in the beginning."""
    duration_s = 60 * pytestconfig.getoption("--soak-minutes")
    server = await launch("--queue-size=40", program=("-c", SERVER))
    address = (await server.serving())["address"]
    await asyncio.gather(*(Client(address, ask, seed).work(time.monotonic() + 2) for seed in range(3)))
    await asyncio.sleep(1)
    before, tasks, processes = Sample.of(server), await tasks_of(server), len(server.group())

    clients = [Client(address, ask, seed) for seed in range(CLIENTS)]
    began = time.monotonic()
    working = [asyncio.create_task(client.work(began + duration_s)) for client in clients]
    samples = []
    while not all(task.done() for task in working):
        await asyncio.wait(working, timeout=max(0.5, duration_s / 1000))
        samples.append(Sample.of(server))
    await asyncio.gather(*working)

    async with (caller := Caller(address)).channel:
        open_states = [job_pb2.JOB_STATE_QUEUED, job_pb2.JOB_STATE_RUNNING, job_pb2.JOB_STATE_PAUSED]
        request = style_transfer_service_pb2.ListJobsRequest(states=open_states, page_size=100)
        for job in (await caller.jobs.ListJobs(request)).jobs:
            await caller.jobs.CancelJob(style_transfer_service_pb2.CancelJobRequest(name=job.name))
    gc.collect()  # a call that is in a cycle holds its connection
    for _ in range(20):
        if len(Sample.of(server).files) <= len(before.files):
            break
        await asyncio.sleep(0.5)
    after, left = Sample.of(server), await tasks_of(server)

    hours = duration_s / 3600
    done = sum((client.done for client in clients), collections.Counter())
    third = len(samples) // 3
    found = [f"{sum(done.values())} deeds: {dict(done)}"]
    grown = {}
    for field in ("front_mib", "worker_mib"):
        middle, end = (
            statistics.median(getattr(sample, field) for sample in part)
            for part in (samples[third : 2 * third], samples[2 * third :])
        )
        grown[field] = end - middle
        found.append(f"{field} {middle:.0f} → {end:.0f}, {(end - middle) / (hours / 3):+.1f} MiB/h")
    found.append(
        f"files {len(before.files)} → {len(after.files)}, at most {max(len(sample.files) for sample in samples)}"
    )
    found.append(f"tasks {tasks} → {left}")
    print("\n".join(["", *found]))  # noqa: T201 - what a soak is for
    assert set(done) >= {"watch", "come_back", "leave", "pause", "steer", "cancel", "delete", "carry", "blunder"}, found
    for field, mib in grown.items():
        assert mib <= GROWTH_MIB + GROWTH_MIB_PER_HOUR * hours / 3, (field, found)
    assert len(after.files) <= len(before.files), (before.files, after.files)
    assert left <= tasks, found
    assert len(server.group()) == processes
    unexpected = [line for line in server.lines if not isinstance(line, dict) or line.get("level") == "error"]
    assert not unexpected, unexpected[:3]
    server.process.send_signal(signal.SIGTERM)
    assert await server.ended(20) == 0
