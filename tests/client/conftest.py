"""A real servicer on a real loopback channel that tells the stories the tests write."""

from __future__ import annotations

import asyncio
import hashlib
import io
import socket
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, suppress
from pathlib import Path
from typing import Any

import grpc
import pytest
from google.protobuf.any_pb2 import Any as AnyMessage
from google.protobuf.empty_pb2 import Empty
from google.protobuf.message import Message
from google.rpc import status_pb2
from grpc_status import rpc_status
from PIL import Image

from nst.v1 import (
    image_pb2,
    image_service_pb2_grpc,
    job_pb2,
    model_service_pb2_grpc,
    options_pb2,
    style_service_pb2_grpc,
    style_transfer_service_pb2,
    style_transfer_service_pb2_grpc,
)
from nst_client import AsyncClient, Client, Result

JOB = "jobs/j1"


class Abort(Exception):
    """Ends a call with a status and google.rpc details."""

    def __init__(self, code: grpc.StatusCode, message: str, *details: Message) -> None:
        super().__init__(message)
        packed = []
        for detail in details:
            packed.append(AnyMessage())
            packed[-1].Pack(detail)
        self.status = rpc_status.to_status(status_pb2.Status(code=code.value[0], message=message, details=packed))


class Story:
    """The messages of one stream, written one after another; each method appends and returns the story."""

    def __init__(self) -> None:
        self.steps: list[Any] = []
        self.sequence = 0
        self.attempt = 1

    def after(self, sequence: int, *, attempt: int = 1) -> Story:
        """Go on counting after an event."""
        self.sequence, self.attempt = sequence, attempt
        return self

    def then(self, step: Any) -> Story:
        """Append a message, an exception to raise, seconds to sleep, or a function to call."""
        self.steps.append(step)
        return self

    def event(self, *, numbered: bool = False, **event: Any) -> Story:
        """Append an event."""
        self.sequence += numbered
        message = job_pb2.JobEvent(sequence=self.sequence, attempt=self.attempt, **event)
        message.event_time.FromNanoseconds(1_700_000_000_000_000_000)
        # WatchJobResponse is the same on the wire.
        return self.then(style_transfer_service_pb2.StylizeResponse(event=message))

    def job(self, state: str, **fields: Any) -> job_pb2.Job:
        """Return the job in a state."""
        options = options_pb2.StylizeOptions(iterations=4, init="INIT_NOISE", style_layers={"relu1_1": 1.0})
        number = job_pb2.JobState.Value(f"JOB_STATE_{state}")
        job = job_pb2.Job(name=JOB, state=number, model="models/tiny", options=options, width=8, height=6, **fields)
        job.create_time.FromSeconds(1_700_000_000)
        return job

    def snapshot(self, **fields: Any) -> Story:
        """Append the first event of every stream."""
        return self.event(snapshot=self.job(fields.pop("state", "QUEUED"), **fields))

    def state(self, state: str, **fields: Any) -> Story:
        """Append a state change."""
        return self.event(numbered=True, state_change=job_pb2.StateChange(job=self.job(state, **fields)))

    def progress(self, iteration: int, *, of: int = 4) -> Story:
        """Append an iteration's numbers."""
        progress = job_pb2.Progress(
            iteration=iteration,
            iterations=of,
            loss=8.0 / (1 + iteration),
            content_loss=0.5,
            style_losses={"relu1_1": 0.25},
            elapsed_s=iteration * 0.5,
            iterations_per_second=2.0 if iteration > 1 else 0.0,
            remaining_s=(of - iteration) * 0.5 if iteration > 1 else 0.0,
        )
        return self.event(numbered=True, progress=progress)

    def frame(self, iteration: int, data: bytes | None = None, *, parts: int = 1, skipped: int = 0) -> Story:
        """Append a frame, in parts."""
        data = encoded("JPEG", shade=iteration * 20 % 256) if data is None else data
        for part in parts_of(data, "JPEG", parts):
            self.event(frame=job_pb2.Frame(iteration=iteration, skipped=skipped, image=part))
        return self

    def result(self, data: bytes | None = None, *, parts: int = 1, kind: str = "PNG", iteration: int = 4) -> Story:
        """Append the result, in parts that share one number."""
        self.sequence += 1
        for part in parts_of(encoded(kind) if data is None else data, kind, parts):
            result = job_pb2.Result(
                image=part, iteration=iteration, loss=0.125, stop_reason=job_pb2.STOP_REASON_ITERATIONS
            )
            self.event(result=result)
        return self

    def whole(self, *, iterations: int = 4, parts: int = 1, kind: str = "PNG") -> Story:
        """Append a job's life from its first event to its good end, a frame for every iteration."""
        self.snapshot(queue_position=1).state("RUNNING", device="cpu", precision=options_pb2.PRECISION_FP32)
        for iteration in range(iterations + 1):
            self.progress(iteration, of=iterations).frame(iteration)
        return self.result(parts=parts, kind=kind, iteration=iterations).state("SUCCEEDED", device="cpu")


def encoded(kind: str = "PNG", *, size: tuple[int, int] = (8, 6), shade: int = 90) -> bytes:
    """Return a small image file."""
    buffer = io.BytesIO()
    Image.new("RGB", size, (shade, 120, 200)).save(buffer, kind)
    return buffer.getvalue()


def recorded_parameters(**changes: Any) -> dict[str, Any]:
    """Return the parameters that a result of this version carries, for a photograph and a style image."""
    options = {
        "size_px": 64,
        "iterations": 7,
        "preset": "fine",
        "init": "content",
        "style_layers": {"relu1_1": 2.0, "relu2_1": 1.0},
        "scale_iterations": [9, 5],
        "deterministic": True,
        "seed": 3,
    }
    return {
        "nst": "0.1.0",
        "model": "vgg16-hed",
        "model_sha256": "aa" * 32,
        "options": options,
        "content_sha256": hashlib.sha256(encoded()).hexdigest(),
        "styles": [{"sha256": [hashlib.sha256(encoded("JPEG", shade=10)).hexdigest()], "weight": 1.0}],
        "loss": 0.5,
        "iteration": 7,
        "stop_reason": "iterations",
        **changes,
    }


def described_image(description: str | None, kind: str = "PNG") -> bytes:
    """Return a small image file with this text in its EXIF field ImageDescription."""
    exif = Image.Exif()
    if description is not None:
        exif[0x010E] = description
    buffer = io.BytesIO()
    Image.new("RGB", (8, 6)).save(buffer, kind, exif=exif)
    return buffer.getvalue()


def parts_of(data: bytes, kind: str, count: int) -> list[image_pb2.ImagePart]:
    """Return a file cut into parts."""
    step = -(-len(data) // count)
    parts = [
        image_pb2.ImagePart(
            format=image_pb2.ImageFormat.Value(f"IMAGE_FORMAT_{kind}"),
            width=8,
            height=6,
            total_bytes=len(data),
            offset=offset,
            data=data[offset : offset + step],
        )
        for offset in range(0, len(data), step)
    ]
    parts[-1].sha256 = hashlib.sha256(data).hexdigest()
    return parts


class Server:
    """A served servicer: where it listens, and what it saw."""

    def __init__(self) -> None:
        self.address = ""
        self.requests: list[Any] = []
        """What Stylize and CreateJob were asked for."""
        self.calls: list[Any] = []
        """Every request about jobs, in order."""
        self.metadata: list[dict[str, Any]] = []
        self.hung_up = threading.Event()
        """Set when a client leaves a stream."""
        self.cancelled = threading.Event()
        """Set when a client cancels the job."""
        self.grpc_server: grpc.Server

    def asked(self, kind: str) -> list[Any]:
        """Return the requests of one method."""
        return [request for request in self.calls if type(request).__name__ == f"{kind}Request"]


class StoryTeller(style_transfer_service_pb2_grpc.StyleTransferServiceServicer):
    """Has one job. Answers each stream with the next of some stories, and the last one again and again."""

    def __init__(self, server: Server, *stories: Story) -> None:
        self._server = server
        self._stories = list(stories)
        self._job = Story().job("QUEUED")

    def Stylize(self, request: Any, context: grpc.ServicerContext) -> Iterator[Any]:  # noqa: N802
        """Tell a story."""
        self._server.requests.append(request)
        self._job.request_id = request.request_id
        return self._told(request, context)

    def WatchJob(self, request: Any, context: grpc.ServicerContext) -> Iterator[Any]:  # noqa: N802
        """Tell a story."""
        return self._told(request, context)

    def CreateJob(self, request: Any, context: grpc.ServicerContext) -> Any:  # noqa: N802
        """Return the job; refuse if the story begins with that, and wait if it begins so."""
        self._server.requests.append(request.request)
        self._note(request, context)
        self._job.request_id = request.request.request_id
        match self._stories[0].steps:
            case [Abort() as abort, *_]:
                if len(self._stories) > 1:
                    self._stories.pop(0)
                context.abort_with_status(abort.status)
            case [float() as seconds, *_]:
                time.sleep(seconds)
        return self._job

    def GetJob(self, request: Any, context: grpc.ServicerContext) -> Any:  # noqa: N802
        """Return the job."""
        self._note(request, context)
        return self._job

    def ListJobs(self, request: Any, context: grpc.ServicerContext) -> Any:  # noqa: N802
        """Return the job, if anybody made it."""
        self._note(request, context)
        return style_transfer_service_pb2.ListJobsResponse(jobs=[self._job] if self._job.request_id else [])

    def UpdateJob(self, request: Any, context: grpc.ServicerContext) -> Any:  # noqa: N802
        """Pause or resume the job."""
        self._note(request, context)
        if request.HasField("paused"):
            self._job.state = job_pb2.JOB_STATE_PAUSED if request.paused else job_pb2.JOB_STATE_QUEUED
        return self._job

    def CancelJob(self, request: Any, context: grpc.ServicerContext) -> Any:  # noqa: N802
        """Note it."""
        self._note(request, context)
        self._job.state = job_pb2.JOB_STATE_CANCELLED
        self._server.cancelled.set()
        return self._job

    def DeleteJob(self, request: Any, context: grpc.ServicerContext) -> Any:  # noqa: N802
        """Note it."""
        self._note(request, context)
        return Empty()

    def _note(self, request: Any, context: grpc.ServicerContext) -> None:
        self._server.calls.append(request)
        self._server.metadata.append(dict(context.invocation_metadata()))

    def _told(self, request: Any, context: grpc.ServicerContext) -> Iterator[Any]:
        self._note(request, context)
        story = self._stories.pop(0) if len(self._stories) > 1 else self._stories[0]
        left = threading.Event()
        context.add_callback(left.set)
        context.add_callback(self._server.hung_up.set)
        for step in story.steps:
            if isinstance(step, Abort):
                context.abort_with_status(step.status)
            elif isinstance(step, Message):
                yield step
            elif callable(step):
                step()
            elif not left.wait(step):
                continue
            else:
                return


class SyncCaller:
    """Uses `Client`."""

    def __init__(self) -> None:
        self.settings: dict[str, Any] = {}

    def events(self, address: str, *arguments: Any, **options: Any) -> list[Any]:
        """Return all events of a stylization."""
        with Client(address, **self.settings) as client, client.stylize(*arguments, **options) as stylization:
            return list(stylization)

    def watched(self, address: str, *arguments: Any, **options: Any) -> list[Any]:
        """Return all events of a job."""
        with Client(address, **self.settings) as client, client.watch_job(*arguments, **options) as stylization:
            return list(stylization)

    def result(self, address: str, *arguments: Any, **options: Any) -> Result:
        """Return the result of a stylization."""
        with Client(address, **self.settings) as client:
            return client.stylize(*arguments, **options).result()

    def call(self, address: str, method: str, *arguments: Any, limit_s: float = 5.0, **options: Any) -> Any:
        """Return what a method returns; a list for what it yields."""
        with Client(address, timeout_s=limit_s, **self.settings) as client:
            answer = getattr(client, method)(*arguments, **options)
            return list(answer) if isinstance(answer, Iterator) else answer


class AsyncCaller:
    """Uses `AsyncClient`."""

    def __init__(self) -> None:
        self.settings: dict[str, Any] = {}

    def events(self, address: str, *arguments: Any, **options: Any) -> list[Any]:
        """Return all events of a stylization."""

        async def run() -> list[Any]:
            async with (
                AsyncClient(address, **self.settings) as client,
                client.stylize(*arguments, **options) as stylization,
            ):
                return [event async for event in stylization]

        return asyncio.run(run())

    def watched(self, address: str, *arguments: Any, **options: Any) -> list[Any]:
        """Return all events of a job."""

        async def run() -> list[Any]:
            async with AsyncClient(address, **self.settings) as client, client.watch_job(*arguments, **options) as job:
                return [event async for event in job]

        return asyncio.run(run())

    def result(self, address: str, *arguments: Any, **options: Any) -> Result:
        """Return the result of a stylization."""

        async def run() -> Result:
            async with AsyncClient(address, **self.settings) as client:
                return await client.stylize(*arguments, **options).result()

        return asyncio.run(run())

    def call(self, address: str, method: str, *arguments: Any, limit_s: float = 5.0, **options: Any) -> Any:
        """Return what a method returns; a list for what it yields."""

        async def run() -> Any:
            async with AsyncClient(address, timeout_s=limit_s, **self.settings) as client:
                answer = getattr(client, method)(*arguments, **options)
                return [item async for item in answer] if hasattr(answer, "__aiter__") else await answer

        return asyncio.run(run())


@pytest.fixture(params=[SyncCaller, AsyncCaller], ids=["sync", "async"])
def caller(request: pytest.FixtureRequest) -> Any:
    """Return what uses one of the two clients."""
    return request.param()


@pytest.fixture
def tell() -> Callable[[], Story]:
    """Return the maker of stories, for those who need several."""
    return Story


@pytest.fixture
def story() -> Story:
    """Return an empty story."""
    return Story()


@pytest.fixture
def aborted() -> type[Abort]:
    """Return the step of a story that ends it with a status."""
    return Abort


@pytest.fixture
def picture() -> Callable[..., bytes]:
    """Return the maker of small image files."""
    return encoded


@pytest.fixture
def recorded() -> Callable[..., dict[str, Any]]:
    """Return the maker of the parameters that results carry."""
    return recorded_parameters


@pytest.fixture
def described() -> Callable[..., bytes]:
    """Return the maker of images with a description."""
    return described_image


@pytest.fixture
def parts() -> Callable[..., list[image_pb2.ImagePart]]:
    """Return the cutter of files."""
    return parts_of


@pytest.fixture
def serve() -> Iterator[Callable[..., Server]]:
    """Return what serves a story, or servicers, on a free loopback port until the test ends."""
    running: list[grpc.Server] = []

    def start(*served: Any, credentials: Any = None, options: Any = (), port: int = 0) -> Server:
        server = Server()
        server.grpc_server = grpc.server(ThreadPoolExecutor(16), options=options)
        stories = [servicer for servicer in served if isinstance(servicer, Story)]
        if stories:
            add(server, StoryTeller(server, *stories))
        for servicer in served:
            if not isinstance(servicer, Story):
                add(server, servicer)
        if credentials is None:
            port = server.grpc_server.add_insecure_port(f"localhost:{port}")
        else:
            port = server.grpc_server.add_secure_port("localhost:0", credentials)
        server.address = f"localhost:{port}"
        server.grpc_server.start()
        running.append(server.grpc_server)
        return server

    def add(server: Server, servicer: Any) -> None:
        if isinstance(servicer, style_transfer_service_pb2_grpc.StyleTransferServiceServicer):
            style_transfer_service_pb2_grpc.add_StyleTransferServiceServicer_to_server(servicer, server.grpc_server)
        elif isinstance(servicer, style_service_pb2_grpc.StyleServiceServicer):
            style_service_pb2_grpc.add_StyleServiceServicer_to_server(servicer, server.grpc_server)
        elif isinstance(servicer, image_service_pb2_grpc.ImageServiceServicer):
            image_service_pb2_grpc.add_ImageServiceServicer_to_server(servicer, server.grpc_server)
        else:
            model_service_pb2_grpc.add_ModelServiceServicer_to_server(servicer, server.grpc_server)

    yield start
    for server in running:
        server.stop(grace=0).wait(5)


class Wire:
    """A wire between a client and a server, which can be cut.

    With `breaks` it breaks by itself, each time that it has carried so many bytes to the client, and can be used anew.
    """

    def __init__(self, address: str, breaks: Sequence[int] = ()) -> None:
        self._carried, self._breaks = 0, list(breaks)
        host, _, port = address.rpartition(":")
        self._target = (host, int(port))
        self._listener = socket.create_server(("localhost", 0))
        self._sockets = [self._listener]
        self._frozen: set[socket.socket] = set()
        self.address = f"localhost:{self._listener.getsockname()[1]}"
        threading.Thread(target=self._accept, daemon=True).start()

    def cut(self) -> None:
        """Cut the wire: both ends see a reset, as when a machine's power fails."""
        for end in self._sockets:
            with closing(end), suppress(OSError):
                end.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\x01\x00\x00\x00\x00\x00\x00\x00")
                end.shutdown(socket.SHUT_RDWR)

    def freeze(self) -> None:
        """Carry nothing more over the connections that stand, as when a machine loses its network."""
        self._frozen |= set(self._sockets)

    def _accept(self) -> None:
        with suppress(OSError):
            while True:
                near, _ = self._listener.accept()
                far = socket.create_connection(self._target)
                self._sockets += [near, far]
                for source, sink in ((near, far), (far, near)):
                    threading.Thread(target=self._carry, args=(source, sink, sink is near), daemon=True).start()

    def _carry(self, source: socket.socket, sink: socket.socket, to_client: bool) -> None:
        with suppress(OSError):
            while data := source.recv(1 << 16):
                if source not in self._frozen:
                    sink.sendall(data)
                self._carried += len(data) * to_client
                if self._breaks and self._carried >= self._breaks[0]:
                    del self._breaks[0]
                    for end in (source, sink):
                        end.shutdown(socket.SHUT_RDWR)


@pytest.fixture
def wire() -> Iterator[Callable[[str], Wire]]:
    """Return what lays a wire to a server, for the time of the test."""
    wires: list[Wire] = []

    def lay(address: str) -> Wire:
        wires.append(Wire(address))
        return wires[-1]

    yield lay
    for laid in wires:
        laid.cut()


@pytest.fixture
def photo(tmp_path: Path) -> Path:
    """Return the path of a small photograph."""
    path = tmp_path / "photo.png"
    path.write_bytes(encoded())
    return path


@pytest.fixture
def wave(tmp_path: Path) -> Path:
    """Return the path of a small style image."""
    path = tmp_path / "wave.jpg"
    path.write_bytes(encoded("JPEG", shade=10))
    return path


@pytest.fixture
def eventually() -> Callable[[Callable[[], bool]], None]:
    """Return what waits until a condition holds, and fails after five seconds."""

    def wait(condition: Callable[[], bool]) -> None:
        deadline = time.monotonic() + 5
        while not condition():
            assert time.monotonic() < deadline, "waited five seconds in vain"
            time.sleep(0.01)

    return wait
