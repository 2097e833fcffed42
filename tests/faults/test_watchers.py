"""A hundred watchers, half of them stalled: the job does not notice, and neither does the other half."""

from __future__ import annotations

import asyncio
import bisect
import itertools
import json
import os
import statistics
import sys
from collections.abc import Callable
from typing import Any

import pytest

from nst.v1 import style_transfer_service_pb2
from nst_server import executor
from tests.faults.slow_worker import ITERATION_S, slow_worker_main
from tests.server.conftest import noise, until
from tests.server.test_process import memory_mib

Ask = Callable[..., style_transfer_service_pb2.StylizeRequest]

HEALTHY = STALLED = 50
ROUNDS = 2
ITERATIONS = 25
"""Of each stretch with watchers, and of each without."""

WATCHERS = """
import asyncio, json, sys, time
import grpc
from nst.v1 import style_transfer_service_pb2, style_transfer_service_pb2_grpc

address, name, healthy, stalled = sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
frames = []

async def watch(index):
    # A window that is soon full, so that a stalled watcher is one at once, and not some megabytes later.
    window = [("grpc.http2.bdp_probe", 0), ("grpc.http2.lookahead_bytes", 65536)]
    channel = grpc.aio.insecure_channel(address, options=[("nst.own", index), *window])
    stub = style_transfer_service_pb2_grpc.StyleTransferServiceStub(channel)
    preview = {"interval": 1, "size_px": 64} if index < healthy else {"encoding": {"format": "IMAGE_FORMAT_PNG"}}
    call = stub.WatchJob(style_transfer_service_pb2.WatchJobRequest(name=name, after_sequence=after, preview=preview))
    try:
        async for response in call:
            if response.event.WhichOneof("event") == "frame":
                if index >= healthy:
                    await asyncio.sleep(3600)
                frames.append((time.time(), response.event.frame.iteration))
    finally:
        call.cancel()
        await channel.close()

async def main():
    global after
    loop = asyncio.get_running_loop()
    while line := await loop.run_in_executor(None, sys.stdin.readline):
        after = int(line)
        tasks = [asyncio.create_task(watch(index)) for index in range(healthy + stalled)]
        await loop.run_in_executor(None, sys.stdin.readline)
        for task in tasks:
            task.cancel()
        await asyncio.wait(tasks)
        print(json.dumps(frames), flush=True)
        frames.clear()

asyncio.run(main())
"""


@pytest.mark.timeout(180)
async def test_a_hundred_watchers_are_not_felt(
    serve: Callable[..., Any], ask: Ask, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An iteration takes at most 3 % longer, a watcher costs at most 1 MB, a healthy one is at most 2 iterations late.

    By the clock of its worker (see `slow_worker`), the medians of alternating stretches of one job. The delay is the
    99th percentile: how many iterations had been made, by the server's clock, when a frame came.
    """
    monkeypatch.setattr(executor, "_worker_main", slow_worker_main)
    server, client = await serve()
    request = ask(content=noise(96, 96), size_px=96, iterations=10_000, optimizer="OPTIMIZER_ADAM")
    created = await client.jobs.CreateJob(style_transfer_service_pb2.CreateJobRequest(request=request))
    job = server._application._jobs[created.name]
    watchers = await asyncio.create_subprocess_exec(
        sys.executable,
        "-c",
        WATCHERS,
        *(server.address, job.name, str(HEALTHY), str(STALLED)),
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        limit=2**26,
    )
    assert watchers.stdin
    assert watchers.stdout

    async def stretch(iterations: int) -> range:
        """Let the job go on for a while; return the iterations of that time."""
        await until(lambda: job.now.progress is not None, 60)
        begin = job.now.progress.iteration
        await until(lambda: job.now.progress.iteration >= begin + iterations, 60)
        return range(begin, begin + iterations)

    alone, watched, memory, frames = [], [], [], []
    try:
        await stretch(5)
        for _ in range(ROUNDS):
            alone.append(await stretch(ITERATIONS))
            before = memory_mib(os.getpid())
            watchers.stdin.write(b"%d\n" % job.snapshot().sequence)
            await until(lambda: len(job._frames) == HEALTHY + STALLED, 30)
            await stretch(8)  # until those that stall are blocked
            watched.append(await stretch(ITERATIONS))
            memory.append(memory_mib(os.getpid()) - before)
            watchers.stdin.write(b"leave\n")
            frames += json.loads(await asyncio.wait_for(watchers.stdout.readline(), 30))
            await until(lambda: not job._frames, 30)
    finally:
        watchers.kill()
        await watchers.wait()
    progress = {e.payload.iteration: e for e in job._log if hasattr(e.payload, "elapsed_s")}
    clock = {iteration: event.payload.elapsed_s for iteration, event in progress.items()}

    def typical_s(stretches: list[range]) -> float:
        pairs = [pair for each in stretches for pair in itertools.pairwise(each)]
        return statistics.median(clock[after] - clock[before] for before, after in pairs)

    slower = typical_s(watched) / typical_s(alone) - 1
    made = sorted((event.time.timestamp(), iteration) for iteration, event in progress.items())
    delays = sorted(made[bisect.bisect(made, (came, 10**9)) - 1][1] - iteration for came, iteration in frames)
    late = delays[len(delays) * 99 // 100]
    found = f"{slower:.2%} slower, {max(memory) / (HEALTHY + STALLED):.2f} MiB a watcher, {late} iterations late"
    print(found, f"of {len(frames)} frames")  # noqa: T201 - to be seen with -s
    assert typical_s(alone) >= ITERATION_S
    assert len(frames) > HEALTHY * ROUNDS * ITERATIONS / 2
    assert slower <= 0.03, found
    assert max(memory) / (HEALTHY + STALLED) <= 1, found
    assert late <= 2, found
