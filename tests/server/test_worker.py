"""Workers: processes that may die at any moment, and the front that outlives them and never imports torch."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import platform
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from google.rpc import code_pb2

from nst.v1 import job_pb2, style_transfer_service_pb2
from nst_model import StylizeOptions
from nst_server import worker
from nst_server.executor import OBEY_S, PATIENCE, ExecutorUnavailable, ProcessExecutor
from nst_server.messages import (
    Cancel,
    Cancelled,
    Failed,
    Finish,
    Message,
    Progressed,
    Started,
    StyleImage,
    StylizeTask,
    Suspend,
    WorkerConfig,
)
from tests.server.conftest import FOREVER, Caller, Told, idle, read_until, rest, tiny_settings, until, watched

Ask = Callable[..., style_transfer_service_pb2.StylizeRequest]

START_S = 30
"""A worker starts within this, on a busy machine."""

FRONT = """
import asyncio, json, sys
import grpc
from nst.v1 import model_service_pb2, model_service_pb2_grpc
from nst.v1 import style_transfer_service_pb2, style_transfer_service_pb2_grpc
from nst_server import Server, Settings

async def main():
    async with Server(Settings.model_validate_json(sys.argv[1])) as server:
        whole, endless = (
            style_transfer_service_pb2.StylizeRequest.FromString(bytes.fromhex(request)) for request in sys.argv[2:]
        )
        async with grpc.aio.insecure_channel(server.address) as channel:
            stub = style_transfer_service_pb2_grpc.StyleTransferServiceStub(channel)
            async for _ in stub.Stylize(whole):
                pass
            export = model_service_pb2.ExportModelRequest(format="EXPORT_FORMAT_TORCHSCRIPT")
            async for _ in model_service_pb2_grpc.ModelServiceStub(channel).ExportModel(export):
                pass
            async for response in stub.Stylize(endless):
                if response.event.progress.iteration == 5:
                    heavy = [name for name in ("torch", "torchvision", "nst_model.stylization") if name in sys.modules]
                    print(json.dumps({"worker": server.executors[0].pid, "heavy": heavy}), flush=True)

if __name__ == "__main__":
    asyncio.run(main())
"""


async def test_a_worker_that_refuses_to_start_is_not_replaced(tiny_weights_file: Path, tmp_path: Path) -> None:
    """Whoever starts it is told why, and nothing else happens, however long it takes to give up."""
    executor = ProcessExecutor(WorkerConfig("abacus", 1, "vgg16", {"vgg16": tiny_weights_file}, tmp_path, 1 << 20))
    with pytest.raises(ExecutorUnavailable, match="'abacus' is no device"):
        await executor.start()
    await until(lambda: executor.pid is None)
    assert executor._replacing is None
    await executor.close()


async def test_a_task_ends_once_however_many_workers_die(tiny_weights_file: Path, tmp_path: Path) -> None:
    """One dies before the task is sent, its successor while starting: the third must not compute what has ended."""
    executor = ProcessExecutor(WorkerConfig("cpu", 1, "vgg16", {"vgg16": tiny_weights_file}, tmp_path, 1 << 20))
    await executor.start()
    heard: list[Message] = []

    def endless(attempt: int) -> StylizeTask:
        pixels = np.zeros((48, 48, 3), np.uint8)
        options = StylizeOptions.of("gatys", iterations=10_000, init="noise")
        styles = (StyleImage(pixels, "0" * 64, 48, 1.0),)
        return StylizeTask("jobs/a", "vgg16", pixels, styles, options, 0, attempt=attempt)

    assert executor.pid is not None
    os.kill(executor.pid, signal.SIGKILL)
    await until(lambda: executor._replacing is not None)
    first = asyncio.create_task(executor.run(endless(1), heard.append))
    await until(lambda: executor.pid is not None)
    assert executor.pid is not None
    os.kill(executor.pid, signal.SIGKILL)
    assert isinstance(await asyncio.wait_for(first, START_S), Failed)

    again = asyncio.create_task(executor.run(endless(2), heard.append))
    await until(lambda: any(isinstance(message, Progressed) for message in heard), START_S)
    executor.order(Cancel("jobs/a"))
    assert isinstance(await asyncio.wait_for(again, 5), Cancelled)
    assert sum(isinstance(message, Started) for message in heard) == 1
    await executor.close()


async def test_a_killed_workers_job_goes_on_at_once(serve: Callable[..., Any], ask: Ask) -> None:
    """Within 2 s and what it takes to make again what came after the last checkpoint; to the same picture."""
    server, client = await serve(checkpoint_interval_s=0.2)
    (executor,) = server.executors
    asked = ask(iterations=100, size_px=192, first_size_px=96)
    undisturbed = await client.told(asked)

    responses, died, back = [], 0.0, 0.0
    async for response in client.jobs.Stylize(asked):
        responses.append(response)
        event = response.event
        if event.HasField("progress") and event.progress.iteration >= 120 and not died:
            died = time.monotonic()
            os.kill(executor.pid, signal.SIGKILL)
        if event.HasField("progress") and event.attempt == 2 and not back:
            back = time.monotonic()
            resumed = event.progress
    told = Told(responses)
    before = max(event.progress.iteration for event in told.of("progress") if event.attempt == 1)
    assert back - died < 2
    assert 0 < resumed.iteration <= before + 1
    assert resumed.elapsed_s > 0.2, "the clock goes on where the checkpoint was"
    assert [event.sequence for event in told.numbered] == list(range(1, len(told.numbered) + 1))
    running, queued = job_pb2.JOB_STATE_RUNNING, job_pb2.JOB_STATE_QUEUED
    assert told.states == [running, queued, running, job_pb2.JOB_STATE_SUCCEEDED]
    assert (told.pixels == undisturbed.pixels).all()


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="how other C libraries keep memory is their affair")
async def test_a_worker_at_rest_gives_memory_back(serve: Callable[..., Any], ask: Ask) -> None:
    """What it freed while it computed served the next block; nobody needs it when the job has ended.

    Nor what was still being written then: the picture, a checkpoint.
    """
    server, client = await serve(checkpoint_interval_s=0.1)
    (executor,) = server.executors
    await client.told(ask())
    before = resident_mib(executor.pid)
    told = await client.told(ask(size_px=768, iterations=8))
    assert told.job.state == job_pb2.JOB_STATE_SUCCEEDED
    assert resident_mib(executor.pid, "VmHWM") > before + 100
    await until(lambda: resident_mib(executor.pid) < before + 30)


def test_memory_is_given_back_when_the_last_thing_is_written(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not before, not twice, and never while a task is there to take it."""
    told: list[str] = []
    monkeypatch.setattr(worker, "return_memory", lambda: told.append("given back"))

    class Reader:
        def next_task(self, within_s: float | None = None) -> str | None:
            told.append("waits" if within_s is None else "looks")
            return "task" if within_s is None or len(told) == tasks_after else None

    class Writer:
        def __init__(self, *at_rest: bool) -> None:
            self._at_rest = iter(at_rest)

        @property
        def at_rest(self) -> bool:
            return next(self._at_rest)

    tasks_after = 0
    keeper, sender = Writer(False, True, True), Writer(False, True)
    assert worker._next_task(Reader(), keeper, sender) == "task"  # type: ignore[arg-type, comparison-overlap]
    assert told == ["looks", "looks", "looks", "given back", "waits"]
    told.clear()
    tasks_after = 2
    assert worker._next_task(Reader(), Writer(False), Writer()) == "task"  # type: ignore[arg-type, comparison-overlap]
    assert told == ["looks", "looks"]


def resident_mib(pid: int, which: str = "VmRSS") -> float:
    """Return the memory that a process occupies, MiB, or as `VmHWM` the most that it ever did."""
    status = Path(f"/proc/{pid}/status").read_text()
    return int(status.partition(f"{which}:")[2].split()[0]) / 1024


async def test_a_job_that_kills_its_workers_fails_alone(
    serve: Callable[..., Any], ask: Ask, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the end it fails with WORKER_DIED and its stream ends OK; those that wait go on with a new worker.

    So it does if the replacement dies too, while it is starting and after that, and if an idle worker dies.
    """
    monkeypatch.setattr("nst_server.scheduler.MAX_DEATHS", 2)
    server, client = await serve()
    (executor,) = server.executors

    async def killed_while_running() -> None:
        call, responses = client.jobs.Stylize(ask(**FOREVER)), []
        async for response in call:
            responses.append(response)
            if response.event.HasField("progress") and response.event.progress.iteration == 2:
                with contextlib.suppress(ProcessLookupError):  # killed, and not yet replaced
                    os.kill(executor.pid, signal.SIGKILL)
        told = Told(responses)
        assert told.states == [
            job_pb2.JOB_STATE_RUNNING,
            job_pb2.JOB_STATE_QUEUED,
            job_pb2.JOB_STATE_RUNNING,
            job_pb2.JOB_STATE_FAILED,
        ]
        assert [event.sequence for event in told.numbered] == list(range(1, len(told.numbered) + 1))
        assert told.job.error.reason == "WORKER_DIED"
        assert told.job.error.code == code_pb2.UNAVAILABLE
        assert "signal 9" in told.job.error.message
        assert "cpu" in told.job.error.message

    running = asyncio.create_task(killed_while_running())
    await until(lambda: bool(server._application.scheduler._running))
    waiting = asyncio.create_task(client.told(ask()))
    first_pid = executor.pid
    await running
    await until(lambda: executor.pid != first_pid and alive(executor.pid))
    os.kill(executor.pid, signal.SIGKILL)  # while it is starting
    told = await asyncio.wait_for(waiting, START_S)
    assert told.job.state == job_pb2.JOB_STATE_SUCCEEDED

    os.kill(executor.pid, signal.SIGKILL)  # while it is idle
    await until(lambda: executor._replacing is not None)
    told = await asyncio.wait_for(client.told(ask()), START_S)
    assert told.job.state == job_pb2.JOB_STATE_SUCCEEDED

    await killed_while_running()
    began = time.monotonic()
    await server.stop()
    assert time.monotonic() - began < 2, "a server does not wait for a worker that nobody needs any more"


@pytest.mark.timeout(60)
@pytest.mark.parametrize("order", ["cancel", "delete"])
async def test_a_worker_that_hangs_is_killed_when_its_job_is_to_end(
    serve: Callable[..., Any], ask: Ask, monkeypatch: pytest.MonkeyPatch, order: str
) -> None:
    """SIGSTOP, as a GPU that does not answer: the caller is answered in time, and the device takes the next job."""
    monkeypatch.setitem(OBEY_S, Cancel, 0.5)
    server, client = await serve()
    (executor,) = server.executors
    name = await hanging(client, executor, ask(**FOREVER))
    within_s = patience_s(executor) + 2
    began = time.monotonic()
    if order == "cancel":
        job = await client.jobs.CancelJob(style_transfer_service_pb2.CancelJobRequest(name=name))
        assert job.state == job_pb2.JOB_STATE_CANCELLED
    else:
        await client.jobs.DeleteJob(style_transfer_service_pb2.DeleteJobRequest(name=name))
    assert time.monotonic() - began < within_s
    told = await asyncio.wait_for(client.told(ask()), START_S)
    assert told.job.state == job_pb2.JOB_STATE_SUCCEEDED


@pytest.mark.timeout(60)
async def test_a_job_whose_worker_hangs_can_be_paused_and_finished(
    serve: Callable[..., Any], ask: Ask, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing that was kept is lost: it goes on from its last checkpoint, on another worker."""
    monkeypatch.setitem(OBEY_S, Suspend, 0.5)
    monkeypatch.setitem(OBEY_S, Finish, 0.5)
    server, client = await serve(checkpoint_interval_s=0.1)
    (executor,) = server.executors
    name = await hanging(client, executor, ask(**FOREVER), progress=100)

    update = style_transfer_service_pb2.UpdateJobRequest
    within_s = patience_s(executor) + 2
    job = await asyncio.wait_for(client.jobs.UpdateJob(update(name=name, paused=True)), within_s)
    assert job.state == job_pb2.JOB_STATE_PAUSED
    await client.jobs.UpdateJob(update(name=name, paused=False))
    call = client.jobs.WatchJob(style_transfer_service_pb2.WatchJobRequest(name=name, after_sequence=job.sequence))
    resumed = await read_until(call, "progress")
    os.kill(executor.pid or 0, signal.SIGSTOP)
    call.cancel()
    assert (resumed.attempt, resumed.progress.iteration > 1) == (2, True), "it began anew"
    await client.jobs.UpdateJob(update(name=name, finish=True))

    told = await asyncio.wait_for(watched(client, name), START_S)
    assert told.job.state == job_pb2.JOB_STATE_SUCCEEDED
    assert told.job.attempt == 3
    assert told.job.result.stop_reason == job_pb2.STOP_REASON_FINISHED


async def test_a_worker_that_obeys_is_left_alone(serve: Callable[..., Any], ask: Ask) -> None:
    """Cancel, pause, finish: the process is the same, also when the time for it has passed."""
    server, client = await serve()
    (executor,) = server.executors
    pid = executor.pid
    with pytest.MonkeyPatch.context() as patch:
        for order in OBEY_S:
            patch.setitem(OBEY_S, order, 2)
        call = client.jobs.Stylize(ask(**FOREVER))
        name = (await read_until(call, "snapshot")).snapshot.name
        await read_until(call, "progress")
        update = style_transfer_service_pb2.UpdateJobRequest
        await client.jobs.UpdateJob(update(name=name, paused=True))
        await client.jobs.UpdateJob(update(name=name, paused=False))
        await client.jobs.UpdateJob(update(name=name, finish=True))
        assert (await rest(call)).job.state == job_pb2.JOB_STATE_SUCCEEDED
        running = client.jobs.Stylize(ask(**FOREVER))
        await read_until(running, "progress")
        await asyncio.sleep(2.2)
        running.cancel()
        await until(lambda: idle(server))
        assert executor.pid == pid


async def hanging(client: Caller, executor: ProcessExecutor, request: Any, *, progress: int = 5) -> str:
    """Create a job, and stop its worker when it has made some iterations; return the job's name."""
    created = await client.jobs.CreateJob(style_transfer_service_pb2.CreateJobRequest(request=request))
    call = client.jobs.WatchJob(style_transfer_service_pb2.WatchJobRequest(name=created.name))
    while (await read_until(call, "progress")).progress.iteration < progress:
        pass
    os.kill(executor.pid or 0, signal.SIGSTOP)
    call.cancel()
    return str(created.name)


def patience_s(executor: ProcessExecutor) -> float:
    """Return how long a worker may be silent that is told to end its task, here: longer on a machine that is busy."""
    assert executor._running is not None
    return 0.5 + PATIENCE * executor._running.silence_s


async def test_front_never_imports_torch_and_takes_its_worker_with_it(
    tiny_weights_file: Path, tmp_path: Path, ask: Ask
) -> None:
    """Torch stays in the worker: for starting, for whole jobs, for their pictures.

    And SIGKILL of the front in the middle of a job leaves no worker behind.
    """
    program = tmp_path / "front.py"
    program.write_text(FRONT)
    settings = tiny_settings(tiny_weights_file, tmp_path).model_dump_json()
    requests = [request.SerializeToString().hex() for request in (ask(), ask(**FOREVER))]
    process = await asyncio.create_subprocess_exec(
        sys.executable, str(program), settings, *requests, stdout=asyncio.subprocess.PIPE
    )
    assert process.stdout
    try:
        while not (line := await asyncio.wait_for(process.stdout.readline(), START_S)).startswith(b"{"):
            assert line, "the server process ended early"
        told = json.loads(line)
        assert told["heavy"] == []
        assert alive(told["worker"])
    finally:
        process.kill()
        await process.wait()
    await until(lambda: not alive(told["worker"]), 2)


async def test_executor_can_be_closed_at_any_moment(tiny_weights_file: Path, tmp_path: Path) -> None:
    """Before it was started and while it starts: it closes at once, and leaves no process."""
    config = WorkerConfig("cpu", 1, "vgg16", {"vgg16": tiny_weights_file}, tmp_path, 1 << 20)
    await ProcessExecutor(config).close()
    for delay_s in (0, 0.05, 0.5):
        executor = ProcessExecutor(config)
        starting = asyncio.create_task(executor.start())
        await asyncio.sleep(delay_s)
        starting.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await starting
        await asyncio.wait_for(executor.close(), 2)
        assert executor.pid is None or not alive(executor.pid)


def alive(pid: int) -> bool:
    """Return whether a process exists and is no zombie."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False
