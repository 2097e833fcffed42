"""What the service costs: per iteration, until the first frame, after a cancel, and in memory at rest."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import io
import itertools
import json
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from PIL import Image

import nst_model
from nst_client import AsyncClient, Frame, JobState, Preview, Progress, StateChange
from nst_model import FeatureModel, Style, StylizeOptions, load_weights
from nst_model.calibration import dead_leaves, one_over_f_noise

WARM_UP = 2


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

    def __init__(self, device: str, size_px: int, iterations: int) -> None:
        self._model = FeatureModel(load_weights(nst_model.DEFAULT_MODEL), device)
        self._options = StylizeOptions.of("gatys", size_px=size_px, iterations=iterations)
        self._content, style = (nst_model.from_pixels(picture(size_px, seed)) for seed in (1, 0))
        self._styles = [Style(style)]

    def iteration_seconds(self) -> list[float]:
        """Return the time of each iteration of one run, seconds, warm-up left out."""
        moments = [
            time.perf_counter() for _ in nst_model.stylize(self._model, self._content, self._styles, self._options)
        ]
        return [after - before for before, after in itertools.pairwise(moments)][WARM_UP:]


async def streamed(client: AsyncClient, size_px: int, iterations: int) -> tuple[list[float], float]:
    """Return the time of each iteration of one streamed run with a frame for each, and the time to the first frame."""
    files = [png(picture(size_px, seed)) for seed in (1, 0)]
    began = time.perf_counter()
    first_frame, moments = 0.0, []
    async with client.stylize(
        *files, preset="gatys", size_px=size_px, iterations=iterations, preview=Preview(interval=1, size_px=size_px)
    ) as run:
        async for event in run:
            if isinstance(event, Frame) and not first_frame:
                first_frame = time.perf_counter() - began
            if isinstance(event, Progress):
                moments.append(event.elapsed_s)
    return [after - before for before, after in itertools.pairwise(moments)][WARM_UP:], first_frame


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


async def overhead(device: str, size_px: int, iterations: int, rounds: int) -> dict[str, float]:
    """Return the seconds of an iteration alone and streamed with a frame each, interleaved, and what that adds."""
    core = Core(device, size_px, iterations)
    alone: list[float] = []
    served: list[float] = []
    with tempfile.TemporaryDirectory() as folder, running_server(device, Path(folder)) as (address, _):
        async with AsyncClient(address) as client:
            await streamed(client, size_px, WARM_UP + 1)
            for _ in range(rounds):
                alone += await asyncio.to_thread(core.iteration_seconds)
                served += (await streamed(client, size_px, iterations))[0]
    alone_s, served_s = statistics.median(alone), statistics.median(served)
    return {"size_px": size_px, "alone_s": alone_s, "served_s": served_s, "added": served_s / alone_s - 1}


async def measure(device: str, size_px: int, iterations: int, rounds: int) -> list[str]:
    """Return the table's lines."""
    core = Core(device, size_px, iterations)
    alone: list[float] = []
    served: list[float] = []
    firsts: list[float] = []
    with tempfile.TemporaryDirectory() as folder, running_server(device, Path(folder)) as (address, pid):
        front_mib, worker_mib = memory_mib(pid), memory_mib(worker_pid(pid))
        async with AsyncClient(address) as client:
            await streamed(client, size_px, WARM_UP + 1)
            for _ in range(rounds):
                alone += await asyncio.to_thread(core.iteration_seconds)
                seconds, first = await streamed(client, size_px, iterations)
                served += seconds
                firsts.append(first)
            cancels = [await cancel_seconds(client, size_px, after) for after in range(1, rounds + 1)]
    iteration_s, served_s = statistics.median(alone), statistics.median(served)
    first_ms = 1000 * (statistics.median(firsts) - iteration_s)
    cancel_ms = [1000 * (seconds - iteration_s) for seconds in (statistics.median(cancels), max(cancels))]
    return [
        f"| one iteration at {size_px} px: core alone; streamed, with a frame each; added "
        f"| {iteration_s:.3f} s; {served_s:.3f} s; {100 * (served_s / iteration_s - 1):+.1f} % |",
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
    print("| what | figure |\n| --- | --- |")
    print("\n".join(asyncio.run(measure(options.device, options.size, options.iterations, options.rounds))))


if __name__ == "__main__":
    main()
