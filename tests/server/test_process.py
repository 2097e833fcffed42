"""The `nst-server` process: signals, exit codes, health, reflection, log."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import socket
import sys
import time
from collections.abc import AsyncIterator, Callable, Sequence
from pathlib import Path
from typing import Any

import grpc
import pytest
import pytest_asyncio
from grpc_health.v1 import health_pb2, health_pb2_grpc

from nst.v1 import job_pb2, style_transfer_service_pb2, style_transfer_service_pb2_grpc
from nst_server.server import SERVICES
from tests.server.conftest import FOREVER, Caller, Refusal, noise, read_until, rest, until, watched

Ask = Callable[..., style_transfer_service_pb2.StylizeRequest]

START_S = 30


class Process:
    """An `nst-server` process in a process group of its own.

    Attributes:
        lines: its log, parsed; what is no JSON is there as it came.
        caller: a client of it, once it serves.
    """

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self.process = process
        self.lines: list[Any] = []
        self.caller: Caller
        self._reading = asyncio.create_task(self._read())

    async def serving(self) -> dict[str, Any]:
        """Wait until it serves; return that line of the log."""
        await until(lambda: bool(self.said("serving")) or self._reading.done(), START_S)
        (line,) = self.said("serving")
        self.caller = Caller(line["address"])
        return line

    async def ended(self, within_s: float) -> int:
        """Wait for its end; return its exit code. Fails if any process of its group is left."""
        code = await asyncio.wait_for(self.process.wait(), within_s)
        await self._reading
        await until(lambda: not self.group())
        return code

    def said(self, event: str) -> list[dict[str, Any]]:
        """Return the lines of the log about an event."""
        return [line for line in self.lines if isinstance(line, dict) and line["event"] == event]

    def group(self) -> list[int]:
        """Return the processes of its group that are alive."""
        found = []
        for stat in Path("/proc").glob("[0-9]*/stat"):
            with contextlib.suppress(FileNotFoundError, ProcessLookupError):
                state, _, group = stat.read_text().rpartition(")")[2].split()[:3]
                if int(group) == self.process.pid and state != "Z":
                    found.append(int(stat.parent.name))
        return found

    async def _read(self) -> None:
        assert self.process.stderr
        async for line in self.process.stderr:
            try:
                self.lines.append(json.loads(line))
            except json.JSONDecodeError:
                self.lines.append(line.decode())


@pytest_asyncio.fixture(loop_scope="session")
async def launch(tiny_weights_file: Path, tmp_path: Path) -> AsyncIterator[Callable[..., Any]]:
    """Return what starts `nst-server` with the tiny model and further arguments; `program` may do so in its own way."""
    launched = []

    async def start(*arguments: str, program: Sequence[str] = ("-m", "nst_server")) -> Process:
        command = [sys.executable, *program, "--listen=localhost:0", f"--data-dir={tmp_path / 'data'}"]
        command += ["--devices=cpu", "--threads=1", "--default-model=vgg16", f"--weights=vgg16={tiny_weights_file}"]
        process = await asyncio.create_subprocess_exec(
            *command, "--log-format=json", *arguments, stderr=asyncio.subprocess.PIPE, start_new_session=True
        )
        launched.append(Process(process))
        return launched[-1]

    yield start
    for server in launched:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(server.process.pid, signal.SIGKILL)
        await server.process.wait()
        if hasattr(server, "caller"):
            await server.caller.channel.close()


async def health(channel: grpc.aio.Channel, service: str = "") -> int:
    """Return a service's health."""
    stub = health_pb2_grpc.HealthStub(channel)
    return (await stub.Check(health_pb2.HealthCheckRequest(service=service))).status


async def test_sigterm_lets_the_running_job_finish(launch: Callable[..., Any], ask: Ask) -> None:
    """While it drains: who waits is told to come back, new ones too; health is NOT_SERVING; exit code 0; none lost."""
    server = await launch("--grace-s=60")
    await server.serving()
    caller = server.caller
    assert await health(caller.channel) == health_pb2.HealthCheckResponse.SERVING
    running = caller.jobs.Stylize(ask(iterations=150, size_px=192))
    first = await read_until(running, "progress")
    waiting = caller.jobs.Stylize(ask())
    name = (await read_until(waiting, "snapshot")).snapshot.name
    await asyncio.sleep(0.2)

    server.process.send_signal(signal.SIGTERM)
    for refusal in (await asyncio.wait_for(caller.refusal(rest(waiting)), 5), await caller.refusal(ask())):
        assert refusal.code == grpc.StatusCode.UNAVAILABLE
        assert (refusal.reason, refusal.domain) == ("SERVER_STOPPING", "nst")
        assert refusal.retry_s > 0
    for service in ("", *SERVICES):
        assert await health(caller.channel, service) == health_pb2.HealthCheckResponse.NOT_SERVING
    told = await rest(running)
    assert first.progress.iteration < 150, "the job was over before the signal came"
    assert told.job.state == job_pb2.JOB_STATE_SUCCEEDED
    assert told.result
    assert await server.ended(5) == 0
    # One line at a job's start and one at its end, and nothing that is no log line.
    (start,) = server.said("job started")
    (end,) = server.said("job ended")
    assert start["job"] == end["job"] == told.job.name
    assert start["device"] == end["device"] == "cpu"
    assert end["state"] == "succeeded"
    assert end["size"] == "192×128"
    assert end["iterations"] == 150
    assert end["seconds"] > 0
    assert end["loss"] > 0
    assert all(isinstance(line, dict) for line in server.lines), server.lines

    later = await launch()
    await later.serving()
    assert (await watched(later.caller, name)).job.state == job_pb2.JOB_STATE_SUCCEEDED


async def test_a_job_that_outlasts_the_grace_goes_on_at_the_next_start(launch: Callable[..., Any], ask: Ask) -> None:
    """Ctrl-C, which signals the whole group: the stream ends UNAVAILABLE, and what was done is not done again."""
    server = await launch("--grace-s=2")
    await server.serving()
    running = server.caller.jobs.Stylize(ask(iterations=600, size_px=192))
    name = (await read_until(running, "snapshot")).snapshot.name
    await read_until(running, "progress")

    os.killpg(server.process.pid, signal.SIGINT)
    refusal = await server.caller.refusal(rest(running))

    assert (refusal.code, refusal.reason) == (grpc.StatusCode.UNAVAILABLE, "SERVER_STOPPING")
    assert await server.ended(4) == 0
    assert all(isinstance(line, dict) for line in server.lines), server.lines
    assert server.said("job ended") == []

    later = await launch()
    await later.serving()
    told = await watched(later.caller, name)
    assert told.job.state == job_pb2.JOB_STATE_SUCCEEDED
    assert [event.sequence for event in told.numbered] == list(range(1, len(told.numbered) + 1))
    assert [progress.iteration for progress in told.progress] == list(range(601))
    assert {event.attempt for event in told.of("progress")} == {1, 2}


async def test_one_server_for_a_data_folder(launch: Callable[..., Any], tmp_path: Path) -> None:
    """A second one is refused in one line; when the first has been killed the next may come."""
    first = await launch()
    await first.serving()
    second = await launch()
    assert await second.ended(START_S) == 1
    assert second.lines == [f"nst-server: another nst-server uses the data folder {tmp_path / 'data'}\n"]
    os.killpg(first.process.pid, signal.SIGKILL)
    third = await launch()
    await third.serving()


@pytest.mark.parametrize("delay_s", [0.3, 1.2, 2.5])
async def test_it_can_be_stopped_while_it_starts(launch: Callable[..., Any], delay_s: float) -> None:
    """SIGINT to the group at whatever moment of the start: it ends soon, and no process is left."""
    server = await launch()
    await asyncio.sleep(delay_s)
    os.killpg(server.process.pid, signal.SIGINT)

    await server.ended(4)


async def test_two_hundred_large_requests_at_once_and_an_impatient_operator(
    launch: Callable[..., Any], ask: Ask
) -> None:
    """Requests that are refused are not received: 200 of 2 MiB leave the front less than 200 MiB larger.

    Then signals: whoever does not want to wait for the grace asks again, and again: no process is left.
    """
    server = await launch("--queue-size=4", "--grace-s=600")
    await server.serving()
    before = memory_mib(server.process.pid)
    request = ask(content=noise(840, 840), **FOREVER)
    stub = style_transfer_service_pb2_grpc.StyleTransferServiceStub(server.caller.channel)
    calls = [stub.Stylize(request) for _ in range(200)]

    async def first_word(call: Any) -> grpc.StatusCode:
        try:
            await call.read()
        except grpc.aio.AioRpcError as error:
            return Refusal(error).code
        return grpc.StatusCode.OK

    words = await asyncio.gather(*(first_word(call) for call in calls))
    assert words.count(grpc.StatusCode.OK) == 5
    assert words.count(grpc.StatusCode.RESOURCE_EXHAUSTED) == 195
    for call in calls:
        call.cancel()
    assert (await server.caller.told(ask())).job.state == job_pb2.JOB_STATE_SUCCEEDED
    grown = memory_mib(server.process.pid) - before
    assert grown < 200

    running = server.caller.jobs.Stylize(ask(**FOREVER))
    await read_until(running, "progress")
    telling = asyncio.create_task(rest(running))
    for _ in range(3):
        with contextlib.suppress(ProcessLookupError):  # it may have gone after the second
            server.process.send_signal(signal.SIGTERM)
        await asyncio.sleep(0.2)
    began = time.monotonic()
    await server.ended(6)
    assert time.monotonic() - began < 3
    assert (await server.caller.refusal(telling)).code == grpc.StatusCode.UNAVAILABLE


@pytest.mark.parametrize("taken", ["127.0.0.1", "::1"])
async def test_a_port_in_use_is_one_line(launch: Callable[..., Any], taken: str) -> None:
    """Exit code 1, and one line that names the address; also if only one of the addresses of `localhost` is taken."""
    with socket.create_server((taken, 0), family=socket.AF_INET6 if ":" in taken else socket.AF_INET) as other:
        address = f"localhost:{other.getsockname()[1]}"
        server = await launch(f"--listen={address}")
        assert await server.ended(START_S) == 1
    assert server.lines == [f"nst-server: cannot listen on {address}: another program does\n"]


async def test_an_unknown_device_is_one_line(launch: Callable[..., Any]) -> None:
    """Exit code 1, and one line that names the device."""
    server = await launch('--devices=["abacus"]')
    assert await server.ended(START_S) == 1
    (line,) = server.lines
    assert line.startswith("nst-server: 'abacus' is no device")


async def test_an_unusable_data_folder_is_one_line(launch: Callable[..., Any], tmp_path: Path) -> None:
    """Exit code 1, and one line that names the folder."""
    (tmp_path / "file").write_text("not a folder")
    server = await launch(f"--data-dir={tmp_path / 'file' / 'data'}")
    assert await server.ended(START_S) == 1
    (line,) = server.lines
    assert str(tmp_path / "file") in line


def memory_mib(pid: int) -> float:
    """Return the memory that a process occupies."""
    (line,) = [line for line in Path(f"/proc/{pid}/status").read_text().splitlines() if line.startswith("VmRSS:")]
    return int(line.split()[1]) / 1024
