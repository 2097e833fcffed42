"""Real servers with a tiny feature model, and what tests need to talk to them on real loopback channels.

A server takes seconds to start, so most tests share one. All of a session runs on one event loop.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import io
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
import pytest_asyncio
from google.rpc import error_details_pb2
from grpc_status import rpc_status
from PIL import Image

from nst.v1 import (
    image_pb2,
    job_pb2,
    model_service_pb2_grpc,
    style_service_pb2_grpc,
    style_transfer_service_pb2,
    style_transfer_service_pb2_grpc,
)
from nst_server import Server, Settings

QUEUE_SIZE = 4
"""Of the shared server."""

STRICT_TIMEOUT_S = 1.5
"""How long the strict server waits for clients."""

QUICK = {"preset": "PRESET_GATYS", "size_px": 48, "iterations": 2, "precision": "PRECISION_FP32"}
"""Options of a job of one scale that is over in a moment."""

FOREVER = {"iterations": 10_000, "size_px": 192, "init": "INIT_NOISE", "precision": "PRECISION_FP32"}
"""Options of a job that lasts until it is ended: the tiny model makes about 50 such iterations a second."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Run the tests of this folder on the session's loop, where the shared server runs."""
    here = Path(__file__).parent
    for item in items:
        if here in item.path.parents and pytest_asyncio.is_async_test(item):
            item.add_marker(pytest.mark.asyncio(loop_scope="session"), append=False)


def tiny_settings(weights_file: Path, data_dir: Path, **changed: object) -> Settings:
    """Return settings for a server on a free port that computes with the tiny model on the CPU."""
    settings: dict[str, Any] = {
        "listen": "localhost:0",
        "data_dir": data_dir,
        "devices": ["cpu"],
        "threads": 1,
        "default_model": "vgg16",
        "weights": {"vgg16": weights_file},
        "queue_size": QUEUE_SIZE,
    }
    return Settings(**(settings | changed))


class Told:
    """What a stream told: its events, and the sizes of its messages in bytes."""

    def __init__(self, responses: Sequence[style_transfer_service_pb2.StylizeResponse]) -> None:
        self.events = [response.event for response in responses]
        self.sizes = [response.ByteSize() for response in responses]

    @property
    def kinds(self) -> list[str]:
        """Kind of each event."""
        return [event.WhichOneof("event") for event in self.events]

    @property
    def numbered(self) -> list[job_pb2.JobEvent]:
        """The events that have a number of their own; of a result in parts the first."""
        results = [event for event in self.of("result") if event.result.image.offset]
        return [event for event in self.events if event not in results and not _unnumbered(event)]

    @property
    def progress(self) -> list[job_pb2.Progress]:
        """Progress of each iteration."""
        return [event.progress for event in self.of("progress")]

    @property
    def frames(self) -> list[tuple[int, int, image_pb2.ImagePart, bytes]]:
        """Iteration, skipped, first part and file of each frame."""
        parts = [(event.frame.iteration, event.frame.skipped, event.frame.image) for event in self.of("frame")]
        found = []
        for file in files(part for _, _, part in parts):
            iteration, skipped, first = parts[sum(count for *_, count in found)]
            found.append((iteration, skipped, first, *file))
        return [frame[:-1] for frame in found]

    @property
    def states(self) -> list[int]:
        """States the job entered."""
        return [event.state_change.job.state for event in self.of("state_change")]

    @property
    def job(self) -> job_pb2.Job:
        """The job as the last event has it."""
        return self.events[-1].state_change.job

    @property
    def result(self) -> bytes:
        """File of the result, whole and of the right hash."""
        ((data, _),) = files(event.result.image for event in self.of("result"))
        return data

    @property
    def pixels(self) -> np.ndarray:
        """The result, HWC uint8."""
        return np.asarray(opened(self.result))

    def of(self, kind: str) -> list[job_pb2.JobEvent]:
        """Return the events of one kind."""
        return [event for event in self.events if event.WhichOneof("event") == kind]


def files(parts: Any) -> list[tuple[bytes, int]]:
    """Return the files that parts make up, each with its number of parts; every promise of ImagePart is asserted."""
    found, buffer, count = [], b"", 0
    for part in parts:
        assert part.offset == len(buffer)
        assert 0 < len(part.data) <= 2 * 1024 * 1024
        buffer, count = buffer + part.data, count + 1
        if len(buffer) < part.total_bytes:
            assert not part.sha256
            continue
        assert len(buffer) == part.total_bytes
        assert part.sha256 == hashlib.sha256(buffer).hexdigest()
        picture = opened(buffer)
        assert picture.size == (part.width, part.height)
        assert picture.format == image_pb2.ImageFormat.Name(part.format).removeprefix("IMAGE_FORMAT_")
        found.append((buffer, count))
        buffer, count = b"", 0
    assert not buffer, "the last file is not whole"
    return found


def opened(data: bytes) -> Image.Image:
    """Return the picture in a file, decoded."""
    picture = Image.open(io.BytesIO(data))
    picture.load()
    return picture


def saved(picture: Image.Image, file_format: str = "PNG", **options: Any) -> bytes:
    """Return a picture as a file."""
    buffer = io.BytesIO()
    picture.save(buffer, file_format, **options)
    return buffer.getvalue()


def noise(width: int, height: int, seed: int = 0) -> bytes:
    """Return a PNG of white noise, which no format compresses well."""
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return saved(Image.fromarray(pixels))


class Refusal:
    """A status that ended a call, with its google.rpc details; what there is no detail for is None."""

    def __init__(self, error: grpc.aio.AioRpcError) -> None:
        self.code: grpc.StatusCode = error.code()
        self.message: str = error.details() or ""
        self.reason = self.domain = self.field = self.retry_s = self.quota = None
        status = rpc_status.from_call(error)
        for detail in status.details if status else ():
            if detail.Is(error_details_pb2.ErrorInfo.DESCRIPTOR):
                info = error_details_pb2.ErrorInfo.FromString(detail.value)
                self.reason, self.domain = info.reason, info.domain
            elif detail.Is(error_details_pb2.BadRequest.DESCRIPTOR):
                self.field = error_details_pb2.BadRequest.FromString(detail.value).field_violations[0].field
            elif detail.Is(error_details_pb2.QuotaFailure.DESCRIPTOR):
                self.quota = error_details_pb2.QuotaFailure.FromString(detail.value).violations[0].subject
            elif detail.Is(error_details_pb2.RetryInfo.DESCRIPTOR):
                delay = error_details_pb2.RetryInfo.FromString(detail.value).retry_delay
                self.retry_s = delay.ToTimedelta().total_seconds()

    def __repr__(self) -> str:
        return f"{self.code.name} {self.message!r} {self.reason} {self.field}"


class Caller:
    """A client with every gRPC default left alone, on a channel of its own."""

    def __init__(self, address: str, options: Sequence[tuple[str, Any]] = ()) -> None:
        self.address = address
        self.channel = grpc.aio.insecure_channel(address, options=options)
        self.jobs = style_transfer_service_pb2_grpc.StyleTransferServiceStub(self.channel)
        self.styles = style_service_pb2_grpc.StyleServiceStub(self.channel)
        self.models = model_service_pb2_grpc.ModelServiceStub(self.channel)

    async def told(self, request: style_transfer_service_pb2.StylizeRequest) -> Told:
        """Return all that a Stylize call tells."""
        return Told([response async for response in self.jobs.Stylize(request)])

    async def refusal(self, call: Any) -> Refusal:
        """Return the status that a call ends with. A Stylize request may stand for its call."""
        if isinstance(call, style_transfer_service_pb2.StylizeRequest):
            call = self.told(call)
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await call
        return Refusal(caught.value)


async def until(condition: Callable[[], bool], within_s: float = 5) -> float:
    """Wait until a condition holds; return how long that took. Fails after `within_s`."""
    began = time.monotonic()
    while not condition():
        assert time.monotonic() < began + within_s, f"waited {within_s} s in vain"
        await asyncio.sleep(0.005)
    return time.monotonic() - began


async def read_until(call: Any, kind: str) -> job_pb2.JobEvent:
    """Read a Stylize call up to the first event of a kind, and return that."""
    while True:
        response = await call.read()
        assert response is not grpc.aio.EOF, f"the stream ended without any {kind}"
        if response.event.WhichOneof("event") == kind:
            return response.event


async def watched(caller: Caller, name: str, after: int = 0, **preview: Any) -> Told:
    """Return what WatchJob tells of a job after an event, up to its end; without previews unless they are asked for."""
    preview = preview or {"interval": 0}
    request = style_transfer_service_pb2.WatchJobRequest(name=name, after_sequence=after, preview=preview)
    return Told([response async for response in caller.jobs.WatchJob(request)])


async def rest(call: Any) -> Told:
    """Read a Stylize call to its end; return what it told from here on."""
    responses = []
    while (response := await call.read()) is not grpc.aio.EOF:
        responses.append(response)
    return Told(responses)


@pytest.fixture
def ask(photo: bytes, painting: bytes) -> Callable[..., style_transfer_service_pb2.StylizeRequest]:
    """Return what makes a Stylize request: a QUICK one, fields and options changed as told."""

    def build(
        *,
        content: bytes = photo,
        styles: Any = None,
        model: str = "",
        preview: Any = None,
        output: Any = None,
        **options: Any,
    ) -> style_transfer_service_pb2.StylizeRequest:
        if styles is None:
            styles = [{"image": {"data": painting}}]
        options = QUICK | options
        return style_transfer_service_pb2.StylizeRequest(
            content={"data": content}, styles=styles, model=model, options=options, preview=preview, output=output
        )

    return build


@pytest_asyncio.fixture(scope="session", loop_scope="session")
async def shared(tiny_weights_file: Path, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Server]:
    """The server that most tests share. Whoever leaves it changed or busy spoils it for the others."""
    settings = tiny_settings(tiny_weights_file, tmp_path_factory.mktemp("shared"))
    async with Server(settings) as running:
        yield running


@pytest_asyncio.fixture(loop_scope="session")
async def caller(shared: Server) -> AsyncIterator[Caller]:
    """A client of the shared server, which is idle again when the test has ended."""
    client = Caller(shared.address)
    async with client.channel:
        yield client
    await until(lambda: idle(shared))


@pytest_asyncio.fixture(scope="session", loop_scope="session")
async def strict_server(tiny_weights_file: Path, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Server]:
    """A server that takes little at once and gives up soon on clients that neither read nor answer."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("nst_server.server.KEEPALIVE_S", 1)
        limits = {"max_message_mib": 4, "max_size_px": 600, "max_megapixels": 2, "write_timeout_s": STRICT_TIMEOUT_S}
        async with Server(tiny_settings(tiny_weights_file, tmp_path_factory.mktemp("strict"), **limits)) as running:
            yield running


@pytest_asyncio.fixture(loop_scope="session")
async def strict(strict_server: Server) -> AsyncIterator[Caller]:
    """A client of the strict server, which is idle again when the test has ended."""
    client = Caller(strict_server.address)
    async with client.channel:
        yield client
    await until(lambda: idle(strict_server))


@pytest_asyncio.fixture(loop_scope="session")
async def serve(
    tiny_weights_file: Path, tmp_path: Path
) -> AsyncIterator[Callable[..., Awaitable[tuple[Server, Caller]]]]:
    """Return what starts a server of the test's own, with settings changed as told, and a client of it."""
    async with contextlib.AsyncExitStack() as stack:

        async def start(**changed: Any) -> tuple[Server, Caller]:
            settings = tiny_settings(tiny_weights_file, changed.pop("data_dir", tmp_path / "data"), **changed)
            server = await stack.enter_async_context(Server(settings))
            client = Caller(server.address)
            await stack.enter_async_context(client.channel)
            return server, client

        yield start


def idle(server: Server) -> bool:
    """Return whether a server computes nothing and nothing waits in it."""
    scheduler = server._application.scheduler
    waiting = scheduler._waiting or scheduler._reserved or scheduler._preparations
    return not (waiting or scheduler._running or scheduler._endings)


def _unnumbered(event: job_pb2.JobEvent) -> bool:
    return event.WhichOneof("event") in ("snapshot", "frame", "heartbeat")
