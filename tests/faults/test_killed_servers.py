"""Servers that are killed, and jobs that do not mind."""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import grpc
import pytest

from nst.v1 import image_pb2, job_pb2, options_pb2, style_transfer_service_pb2, style_transfer_service_pb2_grpc
from tests.conftest import picture_bytes
from tests.end_to_end.conftest import _address

BIN = Path(sys.executable).parent

CHAINS = 2
"""Servers killed beside one another, each with a job and a data folder of its own: what takes time is their start."""

KILLS = 10
"""Of each."""

AT_MOST = 40
"""Events that a server lives to tell."""

ITERATIONS = 250
"""At each of the scales: more than all servers together live to tell."""


@contextlib.contextmanager
def serving(weights: Path, folder: Path) -> Iterator[tuple[subprocess.Popen[bytes], str]]:
    """Run `nst-server` on a data folder; yield its process and address."""
    settings = {
        "NST_LISTEN": "localhost:0",
        "NST_DATA_DIR": str(folder / "data"),
        "NST_DEVICES": '["cpu"]',
        "NST_DEFAULT_MODEL": "vgg16",
        "NST_WEIGHTS": json.dumps({"vgg16": str(weights)}),
        "NST_LOG_FORMAT": "json",
        "NST_THREADS": "1",
        "NST_CHECKPOINT_INTERVAL_S": "0.1",
        "NST_GRACE_S": "0",
    }
    folder.mkdir(exist_ok=True)
    with (
        (folder / "log").open("wb") as log,
        subprocess.Popen([BIN / "nst-server"], env=os.environ | settings, stderr=log) as process,
    ):
        try:
            yield process, _address(folder / "log", process)
        finally:
            process.send_signal(signal.SIGTERM)
            process.wait(30)


@contextlib.contextmanager
def connected(address: str) -> Iterator[Any]:
    """Yield a stub of a server."""
    with grpc.insecure_channel(address) as channel:
        yield style_transfer_service_pb2_grpc.StyleTransferServiceStub(channel)


def created(jobs: Any) -> str:
    """Ask for a job of some seconds, always the same; return its name."""
    asked = style_transfer_service_pb2.StylizeRequest(
        content=image_pb2.Image(data=picture_bytes(96, 72, seed=1)),
        styles=[
            style_transfer_service_pb2.StyleInput(image=image_pb2.Image(data=picture_bytes(64, 64, seed=2))),
        ],
        options=options_pb2.StylizeOptions(
            size_px=96, first_size_px=48, iterations=ITERATIONS, precision=options_pb2.PRECISION_FP32
        ),
    )
    return str(jobs.CreateJob(style_transfer_service_pb2.CreateJobRequest(request=asked)).name)


def watched(jobs: Any, name: str, after: int, count: float = float("inf")) -> list[job_pb2.JobEvent]:
    """Return at most so many of a job's numbered events after a number; without `count` all, up to its end."""
    preview = style_transfer_service_pb2.Preview(interval=0)
    asked = style_transfer_service_pb2.WatchJobRequest(name=name, after_sequence=after, preview=preview)
    events: list[job_pb2.JobEvent] = []
    call = jobs.WatchJob(asked)
    while len(events) < count and (response := next(call, None)):
        if response.event.WhichOneof("event") in ("state_change", "progress", "result"):
            events.append(response.event)
    call.cancel()
    return events


def result_of(events: list[job_pb2.JobEvent]) -> bytes:
    """Return the file of the result."""
    return b"".join(event.result.image.data for event in events if event.WhichOneof("event") == "result")


def losses_of(events: list[job_pb2.JobEvent]) -> list[tuple[int, float]]:
    """Return each iteration with its loss, as told."""
    return [(event.progress.iteration, event.progress.loss) for event in events if event.HasField("progress")]


def killed_again_and_again(
    weights: Path, folder: Path, seed: int
) -> tuple[list[job_pb2.JobEvent], list[job_pb2.JobEvent], int]:
    """Return what a job told in all, what the same job told undisturbed, and how often its server was killed."""
    dice = random.Random(seed)
    name, told = "", []
    for _ in range(KILLS):
        with serving(weights, folder) as (process, address), connected(address) as jobs:
            name = name or created(jobs)
            told += watched(jobs, name, len(told), dice.randint(0, AT_MOST))
            time.sleep(dice.uniform(0, 0.02))
            process.kill()
            process.wait()
    assert told[-1].WhichOneof("event") != "result", "it was over too soon"
    with serving(weights, folder) as (_, address), connected(address) as jobs:
        told += watched(jobs, name, len(told))
        return told, watched(jobs, created(jobs), 0), KILLS


@pytest.mark.timeout(600)
def test_a_server_killed_again_and_again_loses_nothing(tiny_weights_file: Path, tmp_path: Path) -> None:
    """Kill -9 at random moments: the job goes on by itself, no event is lost or told twice, the picture is the same."""
    with ThreadPoolExecutor(CHAINS) as pool:
        folders = [tmp_path / f"chain-{index}" for index in range(CHAINS)]
        runs = list(pool.map(killed_again_and_again, [tiny_weights_file] * CHAINS, folders, range(CHAINS)))
    assert sum(kills for *_, kills in runs) == 20
    for told, calm, kills in runs:
        assert [event.sequence for event in told] == list(range(1, len(told) + 1))
        assert told[-1].state_change.job.state == job_pb2.JOB_STATE_SUCCEEDED
        attempts = [event.attempt for event in told]
        assert attempts == sorted(attempts)
        assert attempts[-1] > kills / 2, "the kills did not hit the job"
        assert result_of(told) == result_of(calm) != b""
        undisturbed = dict(losses_of(calm))
        assert sorted({iteration for iteration, _ in losses_of(told)}) == sorted(undisturbed)
        assert all(undisturbed[iteration] == loss for iteration, loss in losses_of(told))
        first_in_last = next(
            event.progress for event in told if event.HasField("progress") and event.attempt == attempts[-1]
        )
        assert first_in_last.iteration > 0, "it began anew each time"
