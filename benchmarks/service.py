"""What the service costs: per iteration, until the first frame, after a cancel, and in memory at rest."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import io
import json
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import AsyncIterator, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

import nst_model
from nst_client import AsyncClient, Frame, JobState, Preview, Progress, StateChange
from nst_model import FeatureModel, Style, StylizeOptions, load_weights
from nst_model.calibration import dead_leaves, one_over_f_noise
from nst_model.devices import reuse_memory

WARM_UP = 3
"""Iterations that are not counted: on a GPU the third is recorded."""


def picture(size_px: int, seed: int) -> np.ndarray:
    """Return a picture, 4:3, HWC uint8."""
    make = one_over_f_noise if seed else dead_leaves
    return nst_model.to_pixels(make(size_px, torch.Generator().manual_seed(seed))[:, : size_px * 3 // 4])


def png(pixels: np.ndarray) -> bytes:
    """Return pixels as a PNG file."""
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


class Core:
    """The same stylization without a server, in this process."""

    def __init__(self, model: FeatureModel, size_px: int, iterations: int) -> None:
        self._model = model
        self._options = StylizeOptions.of("gatys", size_px=size_px, iterations=iterations + WARM_UP)
        self._content, style = (nst_model.from_pixels(picture(size_px, seed)) for seed in (1, 0))
        self._styles = [Style(style)]

    def iteration_s(self) -> float:
        """Return the seconds of an iteration, the mean of one run without its warm-up."""
        run = nst_model.stylize(self._model, self._content, self._styles, self._options)
        return mean_step([time.perf_counter() for _ in run])


def mean_step(moments: list[float]) -> float:
    """Return the mean time between two iterates, seconds, given the moment of each; those of the warm-up are left out.

    A mean and not a median, in which an iteration that had to wait for a frame now and then would not be seen.
    """
    counted = moments[WARM_UP:]
    return (counted[-1] - counted[0]) / (len(counted) - 1)


async def streamed(client: AsyncClient, size_px: int, iterations: int) -> tuple[float, float]:
    """Return the seconds of an iteration, of one run streamed with a frame for each, and those to the first frame."""
    files = [png(picture(size_px, seed)) for seed in (1, 0)]
    options = {"preset": "gatys", "size_px": size_px, "iterations": iterations + WARM_UP}
    began = time.perf_counter()
    first_frame, moments = 0.0, []
    async with client.stylize(*files, **options, preview=Preview(interval=1, size_px=size_px)) as run:
        async for event in run:
            if isinstance(event, Frame) and not first_frame:
                first_frame = time.perf_counter() - began
            if isinstance(event, Progress):
                moments.append(event.elapsed_s)
    return mean_step(moments), first_frame


async def cancel_seconds(client: AsyncClient, size_px: int, after_iterations: int) -> float:
    """Return how long after a cancelled job the next one, already waiting, gets the worker."""
    files = [png(picture(size_px, seed)) for seed in (1, 0)]
    first = client.stylize(*files, preset="gatys", size_px=size_px, iterations=1000)
    async with first:
        async for event in first:
            if isinstance(event, Progress) and event.iteration == after_iterations:
                break
        async with client.stylize(*files, preset="gatys", size_px=64, iterations=1) as second:
            cancelled = None
            async for event in second:
                if cancelled is None:
                    await asyncio.sleep(0.05 * after_iterations)
                    cancelled = time.perf_counter()
                    await first.cancel()
                elif isinstance(event, StateChange) and event.job.state is JobState.RUNNING:
                    return time.perf_counter() - cancelled
    raise AssertionError("the second job never ran")


def memory_mib(pid: int) -> float:
    """Return a process's share of physical memory, MiB (Linux: proportional set size)."""
    lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    return sum(int(line.split()[1]) for line in lines if line.startswith("Pss:")) / 1024


@contextlib.contextmanager
def running_server(device: str, folder: Path) -> Iterator[tuple[str, int]]:
    """Run `nst-server` while the block lasts; the value is its address and process id."""
    command = [
        "--listen",
        "localhost:0",
        "--log-format",
        "json",
        "--devices",
        f'["{device}"]',
        "--data-dir",
        str(folder),
    ]
    with subprocess.Popen([sys.executable, "-m", "nst_server", *command], stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        try:
            entries = (json.loads(line) for line in process.stderr if line.startswith("{"))
            serving = next(entry for entry in entries if entry["event"] == "serving")
            threading.Thread(target=process.stderr.read, daemon=True).start()  # keep the pipe empty
            yield serving["address"], process.pid
        finally:
            process.terminate()


def children(pid: int) -> list[int]:
    """Return the process ids of a process's children, grandchildren and so on."""
    found = [
        int(child)
        for thread in Path(f"/proc/{pid}/task").iterdir()
        for child in (thread / "children").read_text().split()
    ]
    return [*found, *(below for child in found for below in children(child))]


def worker_pid(server_pid: int) -> int:
    """Return the process id of a server's worker: the largest of the processes that it has started."""
    return max(children(server_pid), key=memory_mib)


@contextlib.asynccontextmanager
async def connected(device: str) -> AsyncIterator[tuple[AsyncClient, int]]:
    """Run a server with an empty folder while the block lasts; the value is a client of it, and its process id."""
    with tempfile.TemporaryDirectory() as folder, running_server(device, Path(folder)) as (address, pid):
        async with AsyncClient(address) as client:
            yield client, pid


async def compared(
    client: AsyncClient, model: FeatureModel, size_px: int, iterations: int, rounds: Iterable[object]
) -> dict[str, Any]:
    """Return the seconds of an iteration alone and streamed with a frame each, in turns, and what that adds."""
    core = Core(model, size_px, iterations)
    await streamed(client, size_px, 1)
    alone, served, firsts = [], [], []
    for _ in rounds:
        alone.append(await asyncio.to_thread(core.iteration_s))
        seconds, first = await streamed(client, size_px, iterations)
        served.append(seconds)
        firsts.append(first)
    alone_s, served_s = statistics.median(alone), statistics.median(served)
    return {
        "size_px": size_px,
        "iterations": iterations,
        "alone_s": alone_s,
        "served_s": served_s,
        "added": served_s / alone_s - 1,
        "first_frame_s": statistics.median(firsts),
    }


async def overhead(model: FeatureModel, size_px: int, iterations: int, rounds: Iterable[object]) -> dict[str, Any]:
    """Return what a server on the model's device adds to an iteration: see `compared`."""
    async with connected(str(model.device)) as (client, _):
        return await compared(client, model, size_px, iterations, rounds)


async def measure(model: FeatureModel, size_px: int, iterations: int, rounds: int) -> list[str]:
    """Return the table's lines."""
    async with connected(str(model.device)) as (client, pid):
        front_mib, worker_mib = memory_mib(pid), memory_mib(worker_pid(pid))
        found = await compared(client, model, size_px, iterations, range(rounds))
        cancels = [await cancel_seconds(client, size_px, after) for after in range(1, rounds + 1)]
    first_ms = 1000 * (found["first_frame_s"] - found["alone_s"])
    cancel_ms = [1000 * (seconds - found["alone_s"]) for seconds in (statistics.median(cancels), max(cancels))]
    return [
        f"| one iteration at {size_px} px: core alone; streamed, with a frame each; added "
        f"| {found['alone_s']:.3f} s; {found['served_s']:.3f} s; {100 * found['added']:+.1f} % |",
        f"| warm request to first frame, beyond one iteration | {first_ms:.0f} ms |",
        f"| cancel to worker free, beyond a closure: median; worst | {cancel_ms[0]:+.0f} ms; {cancel_ms[1]:+.0f} ms |",
        f"| memory at rest: front; worker | {front_mib:.0f} MiB; {worker_mib:.0f} MiB |",
    ]


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--size", type=int, default=512)
    parser.add_argument("--iterations", type=int, default=10)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    reuse_memory()  # as a worker does
    model = FeatureModel(load_weights(nst_model.DEFAULT_MODEL), options.device)
    print("| what | figure |\n| --- | --- |")
    print("\n".join(asyncio.run(measure(model, options.size, options.iterations, options.rounds))))


if __name__ == "__main__":
    main()
