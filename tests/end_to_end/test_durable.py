"""Servers that are killed, and jobs that do not mind."""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import grpc
import pytest

from nst.v1 import image_pb2, job_pb2, options_pb2, style_transfer_service_pb2, style_transfer_service_pb2_grpc
from tests.conftest import picture_bytes
from tests.end_to_end.conftest import _address

BIN = Path(sys.executable).parent
KILLS = 20


@contextlib.contextmanager
def serving(weights: Path, data: Path, log_file: Path) -> Iterator[tuple[subprocess.Popen[bytes], str]]:
    """Run `nst-server` on a data folder; yield its process and address."""
    settings = {
        "NST_LISTEN": "localhost:0",
        "NST_DATA_DIR": str(data),
        "NST_DEVICES": '["cpu"]',
        "NST_DEFAULT_MODEL": "vgg16",
        "NST_WEIGHTS": json.dumps({"vgg16": str(weights)}),
        "NST_LOG_FORMAT": "json",
        "NST_THREADS": "1",
        "NST_CHECKPOINT_INTERVAL_S": "0.1",
    }
    log_file.write_bytes(b"")
    with (
        log_file.open("wb") as log,
        subprocess.Popen([BIN / "nst-server"], env=os.environ | settings, stderr=log) as process,
    ):
        try:
            yield process, _address(log_file, process)
        finally:
            process.send_signal(signal.SIGTERM)
            process.wait(30)


def request() -> style_transfer_service_pb2.CreateJobRequest:
    """Ask for a job of some seconds, always the same."""
    asked = style_transfer_service_pb2.StylizeRequest(
        content=image_pb2.Image(data=picture_bytes(96, 72, seed=1)),
        styles=[
            style_transfer_service_pb2.StyleInput(image=image_pb2.Image(data=picture_bytes(64, 64, seed=2))),
        ],
        options=options_pb2.StylizeOptions(
            size_px=192, first_size_px=96, iterations=60, precision=options_pb2.PRECISION_FP32
        ),
    )
    return style_transfer_service_pb2.CreateJobRequest(request=asked)


def watched(address: str, name: str, after: int, seconds: float | None = None) -> tuple[list[job_pb2.JobEvent], bool]:
    """Return the events of a job after a number, at most for some seconds, and whether the last one is its end."""
    events: list[job_pb2.JobEvent] = []
    with grpc.insecure_channel(address) as channel:
        jobs = style_transfer_service_pb2_grpc.StyleTransferServiceStub(channel)
        preview = style_transfer_service_pb2.Preview(interval=0)
        asked = style_transfer_service_pb2.WatchJobRequest(name=name, after_sequence=after, preview=preview)
        try:
            for response in jobs.WatchJob(asked, timeout=seconds):
                events.append(response.event)
        except grpc.RpcError as error:
            assert error.code() in (grpc.StatusCode.DEADLINE_EXCEEDED, grpc.StatusCode.UNAVAILABLE), error
            return events, False
    return events, True


def numbered(events: list[job_pb2.JobEvent]) -> list[job_pb2.JobEvent]:
    """Return the events that have a number of their own."""
    return [event for event in events if event.WhichOneof("event") in ("state_change", "progress", "result")]


def result_of(events: list[job_pb2.JobEvent]) -> bytes:
    """Return the file of the result."""
    return b"".join(event.result.image.data for event in events if event.WhichOneof("event") == "result")


def pixels(file: bytes) -> bytes:
    """Return a picture's pixels: the file also says how often its job was taken up."""
    import io

    from PIL import Image

    return Image.open(io.BytesIO(file)).tobytes()


@pytest.mark.timeout(900)
def test_a_server_killed_again_and_again_loses_nothing(tiny_weights_file: Path, tmp_path: Path) -> None:
    """Kill -9 at random moments: the job goes on by itself, no event is lost or told twice, the picture is the same."""
    dice = random.Random(5)
    with serving(tiny_weights_file, tmp_path / "calm", tmp_path / "log") as (_, address):
        with grpc.insecure_channel(address) as channel:
            job = style_transfer_service_pb2_grpc.StyleTransferServiceStub(channel).CreateJob(request())
        calm, _ = watched(address, job.name, 0)
    undisturbed = result_of(calm)
    assert undisturbed

    name, told, over, kills = "", [], False, 0
    while not over:
        with serving(tiny_weights_file, tmp_path / "data", tmp_path / "log") as (process, address):
            if not name:
                with grpc.insecure_channel(address) as channel:
                    jobs = style_transfer_service_pb2_grpc.StyleTransferServiceStub(channel)
                    name = jobs.CreateJob(request()).name
            patience = dice.uniform(0.05, 1.0) if kills < KILLS else None
            events, over = watched(address, name, told[-1].sequence if told else 0, patience)
            told += numbered(events)
            if not over:
                process.kill()
                process.wait()
                kills += 1
    assert kills == KILLS, "the job was over before it had been killed often enough; make it longer"
    sequences = [event.sequence for event in told]
    assert sequences == list(range(1, len(told) + 1))
    assert told[-1].state_change.job.state == job_pb2.JOB_STATE_SUCCEEDED
    assert [event.attempt for event in told] == sorted(event.attempt for event in told)
    assert pixels(result_of(told)) == pixels(undisturbed)
    losses = {event.progress.iteration: event.progress.loss for event in calm if event.HasField("progress")}
    assert all(losses[e.progress.iteration] == e.progress.loss for e in told if e.HasField("progress"))
