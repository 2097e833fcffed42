"""What it costs that jobs outlive everything: checkpoints, restarts, durable events, watchers."""

from __future__ import annotations

import argparse
import asyncio
import os
import statistics
import sys
import tempfile
import time
from datetime import UTC, datetime
from pathlib import Path

import nst_model
from benchmarks.service import memory_mib, picture, png, running_server
from nst_client import AsyncClient, Client, JobState, Preview, Progress
from nst_model import FeatureModel, Style, StylizeOptions, load_weights
from nst_model.stylization import Stylization
from nst_server.journal import Journal
from nst_server.storage.blobs import Blobs
from nst_server.storage.database import JobStore
from nst_server.storage.records import Batch, EventRecord, JobRecord
from nst_server.worker import SELDOM

TICKS_PER_S = os.sysconf("SC_CLK_TCK")
CHECKPOINT_INTERVAL_S = 5.0
"""The server's default."""


def checkpoint(size_px: int, iterations: int) -> str:
    """Keep a run with a full history some times, as a worker does, beside the time of its iterations."""
    model = FeatureModel(load_weights(nst_model.DEFAULT_MODEL), "cpu")
    content, style = (nst_model.from_pixels(picture(size_px, seed)) for seed in (1, 0))
    options = StylizeOptions(size_px=size_px, first_size_px=4096, history=iterations, iterations=iterations)
    run = Stylization(model, content, [Style(style)], options)
    copies, writes, costs, size = [], [], [], 0
    with tempfile.TemporaryDirectory() as folder:
        blobs = Blobs.open(Path(folder))
        for iterate in run:
            if iterate.index > iterations // 2:
                began, processor = time.perf_counter(), time.thread_time()
                state = run.state()
                copies.append(time.perf_counter() - began)
                data = state.to_bytes()
                size = len(data)
                blobs.write_now("checkpoints/job/1", data)
                writes.append(time.perf_counter() - began)
                costs.append(time.thread_time() - processor)
    copy_s, write_s, cost_s = (statistics.median(each) for each in (copies, writes, costs))
    every_s = max(CHECKPOINT_INTERVAL_S, SELDOM * cost_s)
    return (
        f"| checkpoint at {size_px} px, history {iterations}: size; copy, in the optimizer's way; all, beside it; its "
        f"processor time; so one is made every; the copy's share of that time; that of all "
        f"| {size / 2**20:.0f} MiB; {1000 * copy_s:.0f} ms; {write_s:.2f} s; {cost_s:.2f} s; {every_s:.0f} s; "
        f"{copy_s / every_s:.2%}; {cost_s / every_s:.2%} |"
    )


def restart(size_px: int) -> str:
    """Kill a server in the middle of a job, start it, and wait for the job's next iteration."""
    files = [png(picture(size_px, seed)) for seed in (1, 0)]
    with tempfile.TemporaryDirectory() as folder:
        with running_server("cpu", Path(folder)) as (address, pid), Client(address) as client:
            name = client.create_job(*files, preset="gatys", size_px=size_px, iterations=10_000).name
            for event in client.watch_job(name, preview=Preview(interval=0)):
                if isinstance(event, Progress) and event.elapsed_s > CHECKPOINT_INTERVAL_S + 3:
                    last = event
                    break
            os.kill(pid, 9)
        began = time.perf_counter()
        with running_server("cpu", Path(folder)) as (address, _), Client(address) as client:
            serving_s = time.perf_counter() - began
            watching = client.watch_job(name, after_sequence=last.sequence, preview=Preview(interval=0))
            again = next(event for event in watching if isinstance(event, Progress) and event.attempt > last.attempt)
            resumed_s = time.perf_counter() - began
            client.cancel_job(name)
    return (
        f"| kill -9 of the server at {size_px} px: started again, serving; next iteration made; iterations made again "
        f"| {serving_s:.1f} s; {resumed_s:.1f} s; {last.iteration - again.iteration + 1} |"
    )


async def events(jobs: int, seconds: float) -> str:
    """Let many jobs make events as fast as the journal makes them durable."""
    with tempfile.TemporaryDirectory() as folder:
        store = await JobStore.open(Path(folder) / "jobs.sqlite3")
        journal = Journal(store)
        now = datetime.now(UTC)
        for number in range(jobs):
            await store.create(JobRecord(str(number), now))
        until, written, waits = time.perf_counter() + seconds, 0, []

        async def make(id: str) -> None:
            nonlocal written
            sequence = 0
            progress = {"iteration": 1, "loss": 1.0, "style_losses": {f"relu{block}_1": 0.1 for block in range(1, 6)}}
            while time.perf_counter() < until:
                durable, began = asyncio.Event(), time.perf_counter()
                sequence += 1
                event = EventRecord(sequence, 1, datetime.now(UTC), "progress", progress)
                journal.add(Batch(id, [event], {"progress": progress}), lambda _, durable=durable: durable.set())
                await durable.wait()
                waits.append(time.perf_counter() - began)
                written += 1

        await asyncio.gather(*(make(str(number)) for number in range(jobs)))
        await journal.close(5)
        await store.close()
    median_ms, worst_ms = 1000 * statistics.median(waits), 1000 * sorted(waits)[int(0.99 * len(waits))]
    return (
        f"| durable events of {jobs} jobs, SQLite: a second; until durable: median; 99th percentile "
        f"| {written / seconds:.0f}; {median_ms:.0f} ms; {worst_ms:.0f} ms |"
    )


def cpu_s(pid: int) -> float:
    """Return the processor time that a process has taken."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / TICKS_PER_S


WATCHER = """
import asyncio, sys
from nst_client import AsyncClient, Frame, Preview

async def watch(address, name):
    async with AsyncClient(address) as client:
        seen = 0
        async for event in client.watch_job(name, preview=Preview(interval=1, size_px=512)):
            seen += isinstance(event, Frame)
        print(seen, flush=True)

async def main():
    await asyncio.gather(*(watch(sys.argv[1], sys.argv[2]) for _ in range(int(sys.argv[3]))))

asyncio.run(main())
"""


async def watchers(size_px: int, count: int, iterations: int) -> str:
    """Watch one job many times over, and see what the front's processor does for it."""
    files = [png(picture(size_px, seed)) for seed in (1, 0)]
    with tempfile.TemporaryDirectory() as folder, running_server("cpu", Path(folder)) as (address, pid):
        async with AsyncClient(address) as client:
            used, frames, memory = [], 0, []
            for watching in (1, count):
                job = await client.create_job(*files, preset="gatys", size_px=size_px, iterations=iterations)
                before = cpu_s(pid)
                process = await asyncio.create_subprocess_exec(
                    sys.executable, "-c", WATCHER, address, job.name, str(watching), stdout=asyncio.subprocess.PIPE
                )
                while (await client.get_job(job.name)).state is not JobState.RUNNING:
                    await asyncio.sleep(0.1)
                await asyncio.sleep(2)
                memory.append(memory_mib(pid))
                told, _ = await process.communicate()
                used.append(cpu_s(pid) - before)
                frames = sum(map(int, told.split()))
    each_ms = 1000 * (used[1] - used[0]) / max(1, frames)
    return (
        f"| {count} watchers of {size_px} px frames: processor time of the front for one frame of one watcher, its "
        f"numbers included; so one core serves; memory of one watcher "
        f"| {each_ms:.2f} ms; {1000 / each_ms:.0f} frames a second; {1024 * (memory[1] - memory[0]) / count:.0f} KiB |"
    )


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--size", type=int, default=256)
    given = parser.parse_args()
    print("| what | figure |\n| --- | --- |", flush=True)
    for size in (given.size, 2 * given.size):
        print(checkpoint(size, 20), flush=True)
    print(restart(given.size), flush=True)
    for jobs in (1, 20, 200):
        print(asyncio.run(events(jobs, 5)), flush=True)
    print(asyncio.run(watchers(given.size, 50, 60)), flush=True)


if __name__ == "__main__":
    main()
