"""`Client` and `AsyncClient` against a real servicer on a loopback channel. Most tests run with both."""

from __future__ import annotations

import asyncio
import gc
import io
import signal
import socket
import subprocess
import threading
import time
from contextlib import closing
from pathlib import Path
from typing import Any

import grpc
import pytest
from google.protobuf.duration_pb2 import Duration
from google.protobuf.empty_pb2 import Empty
from google.protobuf.struct_pb2 import ListValue, Struct, Value
from google.rpc.error_details_pb2 import BadRequest, ErrorInfo, RetryInfo
from PIL import Image

from nst.v1 import (
    image_pb2,
    model_service_pb2,
    model_service_pb2_grpc,
    options_pb2,
    style_service_pb2,
    style_service_pb2_grpc,
    style_transfer_service_pb2,
    style_transfer_service_pb2_grpc,
)
from nst_client import (
    NO_PREVIEW,
    AlreadyExistsError,
    AsyncClient,
    BrokenStreamError,
    Client,
    ClientClosedError,
    DeadlineExceededError,
    Encoding,
    FailedPreconditionError,
    Frame,
    ImageFormat,
    ImageNotReadableError,
    InvalidArgumentError,
    JobCancelledError,
    JobFailedError,
    JobState,
    MessageTooLargeError,
    ModelState,
    NotFoundError,
    OptionType,
    Preset,
    Preview,
    Progress,
    QueueFullError,
    ResourceExhaustedError,
    Result,
    ServerError,
    Snapshot,
    StateChange,
    Style,
    StyleInput,
    StyleName,
    UnavailableError,
    UnknownOptionError,
    Weighted,
)
from nst_client.status import nst_error

# What is sent


def test_request_says_what_the_caller_said(caller: Any, serve: Any, story: Any, photo: Path, wave: Path) -> None:
    """Every argument of `stylize` arrives in its field, and nothing that was not said."""
    server = serve(story.whole())
    pil = Image.new("RGB", (20, 20))
    caller.result(
        server.address,
        photo,
        [str(wave), Weighted(wave.read_bytes(), 2), StyleName("starry"), Weighted(StyleName("styles/night"), 0.5), pil],
        model="vgg19",
        preview=Preview(interval=5, size_px=64, encoding=Encoding(format="webp", quality=40)),
        output=Encoding(format="jpeg"),
        iterations=4,
        init="noise",
    )
    [request] = server.requests
    assert request.content.data == photo.read_bytes()
    assert [style.WhichOneof("source") for style in request.styles] == ["image", "image", "style", "style", "image"]
    assert [style.weight if style.HasField("weight") else None for style in request.styles] == [
        None,
        2,
        None,
        0.5,
        None,
    ]
    assert (request.styles[0].image.data, request.styles[2].style) == (wave.read_bytes(), "starry")
    assert request.styles[4].image.data.startswith(b"\x89PNG")
    assert (request.model, request.preview.interval, request.preview.size_px) == ("vgg19", 5, 64)
    assert request.preview.encoding == image_pb2.Encoding(format="IMAGE_FORMAT_WEBP", quality=40)
    assert request.output == image_pb2.Encoding(format="IMAGE_FORMAT_JPEG")
    assert request.options == options_pb2.StylizeOptions(iterations=4, init=options_pb2.INIT_NOISE)


def test_regions_and_starting_picture_arrive(caller: Any, serve: Any, story: Any, photo: Path, wave: Path) -> None:
    """Masks, as any kind of image source, stand beside their style; the picture to start from beside the photograph."""
    server = serve(story.whole(kind="TIFF"))
    mask = Image.new("1", (20, 20), 1)
    result = caller.result(
        server.address,
        b"photo",
        [
            StyleInput(wave, weight=2, region=photo, style_region=b"part"),
            StyleInput(StyleName("starry"), region=mask),
            Weighted(b"style", 3),
        ],
        init_image=photo,
        output=Encoding(format="tiff", bit_depth=16),
    )
    [request] = server.requests
    sea, starry, plain = request.styles
    assert (sea.image.data, sea.weight, sea.region.data) == (wave.read_bytes(), 2, photo.read_bytes())
    assert sea.style_region.data == b"part"
    assert (starry.style, starry.HasField("weight"), starry.HasField("style_region")) == ("starry", False, False)
    assert Image.open(io.BytesIO(starry.region.data)).getpixel((0, 0)) == 255
    assert (plain.weight, plain.HasField("region"), plain.HasField("style_region")) == (3, False, False)
    assert request.init_image.data == photo.read_bytes()
    assert request.output == image_pb2.Encoding(format="IMAGE_FORMAT_TIFF", bit_depth=16)
    assert request.options == options_pb2.StylizeOptions()
    assert result.format is ImageFormat.TIFF


def test_silence_is_sent_as_silence(caller: Any, serve: Any, story: Any) -> None:
    """With photograph and style alone, all else is left to the server."""
    server = serve(story.whole())
    caller.result(server.address, b"photo", b"style")
    expected = style_transfer_service_pb2.StylizeRequest(options=options_pb2.StylizeOptions())
    expected.content.data = b"photo"
    expected.styles.add().image.data = b"style"
    # What a job needs to outlive its stream, and to be made once only.
    expected.cancel_on_disconnect = False
    expected.request_id = server.requests[0].request_id
    assert len(expected.request_id) == 32
    assert server.requests == [expected]


def test_one_style_needs_no_list(caller: Any, serve: Any, story: Any) -> None:
    """A style, weighted or stored, stands for itself; a format stands for an encoding."""
    server = serve(story.whole())
    stored = Style(name="styles/a", display_name="", images=(), create_time=None, prepared=())
    for style in (StyleName("a"), stored, Weighted(stored, 3)):
        caller.result(server.address, b"photo", style, output="webp", preview=NO_PREVIEW)
    assert [request.styles[0].style for request in server.requests] == ["a", "styles/a", "styles/a"]
    assert server.requests[0].output.format == image_pb2.IMAGE_FORMAT_WEBP
    assert server.requests[0].preview == style_transfer_service_pb2.Preview(interval=0)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"iteration": 5}, UnknownOptionError, "did you mean 'iterations'"),
        ({"init": "foo"}, InvalidArgumentError, "init must be one of"),
        ({"output": "bmp"}, InvalidArgumentError, "output.format must be one of jpeg, png, webp, tiff, not 'bmp'"),
        ({"output": Encoding(quality="x")}, InvalidArgumentError, "output.quality must be a whole number"),  # type: ignore[arg-type]
        ({"output": Encoding(bit_depth="x")}, InvalidArgumentError, "output.bit_depth must be a whole number"),  # type: ignore[arg-type]
        ({"preview": Preview(interval=1.5)}, InvalidArgumentError, "preview.interval must be a whole number"),  # type: ignore[arg-type]
        ({"content": "nope.jpg"}, ImageNotReadableError, "content: there is no file 'nope.jpg'"),
        ({"styles": [b"x", "nope.jpg"]}, ImageNotReadableError, r"styles\[1\]: there is no file 'nope.jpg'"),
        ({"content": None}, InvalidArgumentError, "content must be a path, .* not NoneType"),
        ({"styles": None}, InvalidArgumentError, r"styles\[0\] must be a path, .* not NoneType"),
        ({"styles": StyleInput(Weighted(b"x", 2))}, InvalidArgumentError, r"styles\[0\] must be .* not Weighted"),  # type: ignore[arg-type]
        ({"styles": StyleInput(b"x", weight="2")}, InvalidArgumentError, r"styles\[0\]: the weight must be a number"),  # type: ignore[arg-type]
        ({"styles": StyleInput(b"x", region="m.png")}, ImageNotReadableError, r"styles\[0\].region: there is no file"),
        (
            {"styles": StyleInput(b"x", style_region=5)},
            InvalidArgumentError,
            r"styles\[0\].style_region must be a path",
        ),  # type: ignore[arg-type]
        ({"init_image": "nope.png"}, ImageNotReadableError, "init_image: there is no file 'nope.png'"),
        ({"styles": Weighted(b"x", "2")}, InvalidArgumentError, r"styles\[0\]: the weight must be a number, not '2'"),  # type: ignore[arg-type]
    ],
)
def test_wrong_arguments_are_refused_before_anything_is_sent(
    *, caller: Any, serve: Any, story: Any, options: dict[str, Any], error: type[Exception], message: str
) -> None:
    """What is wrong with the arguments alone costs no call."""
    server = serve(story.whole())
    with pytest.raises(error, match=message):
        caller.result(server.address, **{"content": b"photo", "styles": b"style", **options})
    assert server.requests == []


# What comes back


def test_events_arrive_in_order(caller: Any, serve: Any, story: Any) -> None:
    """All events of a job arrive, typed, and the last is the terminal state."""
    events = caller.events(serve(story.whole(iterations=2)).address, b"photo", b"style")
    kinds = [Snapshot, StateChange, *[Progress, Frame] * 3, Result, StateChange]
    assert [type(event) for event in events] == kinds
    assert [frame.iteration for frame in events if isinstance(frame, Frame)] == [0, 1, 2]
    assert events[-1].job.state is JobState.SUCCEEDED


def test_result_larger_than_a_message_arrives_with_grpc_defaults(caller: Any, serve: Any, story: Any) -> None:
    """A result of many mebibytes comes whole although no message may exceed gRPC's default 4 MiB."""
    data = bytes(range(256)) * (40 << 10)
    result = caller.result(serve(story.snapshot().result(data, parts=5).state("SUCCEEDED")).address, b"p", b"s")
    assert result.data == data


def test_unknown_event_kind_is_passed_over(caller: Any, serve: Any, story: Any) -> None:
    """A stream with events of a newer contract works."""
    server = serve(story.snapshot().event().then(1e-3).result().state("SUCCEEDED"))
    assert [type(event) for event in caller.events(server.address, b"p", b"s")] == [Snapshot, Result, StateChange]


def test_slow_server_is_waited_for(caller: Any, serve: Any, story: Any) -> None:
    """A pause between events is no error."""
    server = serve(story.snapshot().then(0.5).result().state("SUCCEEDED"))
    assert caller.result(server.address, b"p", b"s").iteration == 4


def test_failed_job_is_an_event_and_an_error_of_result(caller: Any, serve: Any, story: Any) -> None:
    """Iterating shows a failure as a state; `result` raises it with the server's reason."""
    error = {"code": 14, "reason": "WORKER_DIED", "message": "the worker died; try again"}
    server = serve(story.snapshot().state("RUNNING").state("FAILED", error=error))
    assert caller.events(server.address, b"p", b"s")[-1].job.error.reason == "WORKER_DIED"
    with pytest.raises(JobFailedError, match="the worker died; try again") as caught:
        caller.result(server.address, b"p", b"s")
    assert (caught.value.code, caught.value.reason, caught.value.job.name) == ("UNAVAILABLE", "WORKER_DIED", "jobs/j1")


def test_job_cancelled_by_the_server(caller: Any, serve: Any, story: Any) -> None:
    """A job that the server cancelled raises from `result`."""
    server = serve(story.snapshot().state("CANCELLED"))
    with pytest.raises(JobCancelledError, match="jobs/j1 was cancelled"):
        caller.result(server.address, b"p", b"s")


def test_damaged_stream_is_refused_and_hung_up(caller: Any, serve: Any, story: Any, parts: Any) -> None:
    """A broken part raises at once and ends the call; the job, which may be watched anew, is left alone."""
    piece, _ = parts(b"0123456789", "PNG", 2)
    piece.offset = 3
    server = serve(story.snapshot().event(numbered=True, result={"image": piece}).then(30))
    with pytest.raises(BrokenStreamError):
        caller.events(server.address, b"p", b"s")
    assert server.hung_up.wait(5)
    assert not server.cancelled.is_set()


def test_early_end_is_an_error(caller: Any, serve: Any, story: Any) -> None:
    """A stream that ends before the job raises, iterated or not."""
    server = serve(story.snapshot().state("RUNNING"))
    for use in (caller.events, caller.result):
        with pytest.raises(BrokenStreamError, match="ended before the job did"):
            use(server.address, b"p", b"s")


# Errors

CODE = grpc.StatusCode
INFO = ErrorInfo(reason="SOME_REASON", domain="nst")
IN_3_S = RetryInfo(retry_delay=Duration(seconds=2, nanos=500_000_000))
BAD_FIELD = BadRequest(
    field_violations=[BadRequest.FieldViolation(field="options.iterations", description="at least 1")]
)

STATUSES: list[Any] = [
    (CODE.INVALID_ARGUMENT, (INFO, BAD_FIELD), InvalidArgumentError, {"field": "options.iterations"}),
    (CODE.INVALID_ARGUMENT, (), InvalidArgumentError, {"field": "", "reason": ""}),
    (CODE.OUT_OF_RANGE, (), InvalidArgumentError, {"code": "OUT_OF_RANGE"}),
    (CODE.NOT_FOUND, (INFO,), NotFoundError, {"reason": "SOME_REASON"}),
    (CODE.ALREADY_EXISTS, (INFO,), AlreadyExistsError, {}),
    (CODE.FAILED_PRECONDITION, (INFO,), FailedPreconditionError, {}),
    (CODE.RESOURCE_EXHAUSTED, (INFO, IN_3_S), QueueFullError, {"retry_after_s": 2.5}),
    (CODE.RESOURCE_EXHAUSTED, (INFO,), ResourceExhaustedError, {"retry_after_s": None}),
    (CODE.UNAVAILABLE, (INFO, IN_3_S), UnavailableError, {"retry_after_s": 2.5}),
    (CODE.DEADLINE_EXCEEDED, (), DeadlineExceededError, {}),
    (CODE.CANCELLED, (), JobCancelledError, {}),
    (CODE.INTERNAL, (), ServerError, {"code": "INTERNAL"}),
    (CODE.UNKNOWN, (), ServerError, {"code": "UNKNOWN"}),
    (CODE.DATA_LOSS, (), ServerError, {"code": "DATA_LOSS"}),
    (CODE.PERMISSION_DENIED, (), ServerError, {"code": "PERMISSION_DENIED"}),
]


def status_id(value: object) -> str:
    """Return the part of a case that names it."""
    return str(getattr(value, "name", ""))


@pytest.mark.parametrize(("code", "details", "kind", "attributes"), STATUSES, ids=status_id)
def test_status_becomes_our_exception(
    *,
    caller: Any,
    serve: Any,
    story: Any,
    aborted: Any,
    code: Any,
    details: Any,
    kind: type[Exception],
    attributes: dict[str, Any],
) -> None:
    """Every status is one exception of ours, with the google.rpc details as attributes and gRPC's error as cause."""
    server = serve(story.then(aborted(code, "iterations must be at least 1, not 0", *details)))
    caller.settings["patience_s"] = 0
    with pytest.raises(kind) as caught:
        caller.result(server.address, b"p", b"s")
    assert type(caught.value) is kind
    assert caught.value.code == code.name
    assert {name: getattr(caught.value, name) for name in attributes} == attributes
    if kind is not DeadlineExceededError:
        assert "iterations must be at least 1, not 0" in str(caught.value)


def test_error_in_the_middle_of_a_stream(caller: Any, serve: Any, story: Any, aborted: Any) -> None:
    """A server that stops says so in its own words, after the events that were before."""
    story.snapshot().state("RUNNING").then(aborted(CODE.UNAVAILABLE, "the server is stopping", INFO))
    caller.settings["patience_s"] = 0
    with pytest.raises(UnavailableError, match="is not available: the server is stopping"):
        caller.events(serve(story).address, b"p", b"s")


def test_a_bug_in_the_server_is_a_server_error(caller: Any, serve: Any, story: Any) -> None:
    """An exception in a handler arrives as ServerError naming the address."""

    def fail() -> None:
        raise RuntimeError("a bug")

    server = serve(story.snapshot().then(fail))
    with pytest.raises(ServerError, match=rf"{server.address} failed with UNKNOWN: .*a bug"):
        caller.events(server.address, b"p", b"s")


def test_request_above_the_servers_limit(caller: Any, serve: Any, story: Any) -> None:
    """Images that the server's message limit refuses are an error that says both sizes, not a riddle."""
    server = serve(story.whole(), options=[("grpc.max_receive_message_length", 1 << 20)])
    with pytest.raises(MessageTooLargeError, match=r"the request takes 3\.0 MiB, and the server .* takes 1\.0 MiB"):
        caller.result(server.address, bytes(3 << 20), b"s")


def test_message_above_our_limit_is_the_servers_fault(caller: Any, serve: Any, story: Any) -> None:
    """A server that breaks the 3 MiB rule is named as the one at fault."""
    server = serve(story.snapshot().result(bytes(5 << 20)).state("SUCCEEDED"))
    with pytest.raises(BrokenStreamError, match=r"the server sent a message of 5\.0 MiB; gRPC takes 4\.0 MiB"):
        caller.result(server.address, b"p", b"s")


def test_nothing_listens(caller: Any) -> None:
    """Connecting to nothing fails within seconds, naming the address."""
    with closing(socket.create_server(("localhost", 0))) as free:
        address = f"localhost:{free.getsockname()[1]}"
    began = time.monotonic()
    with pytest.raises(UnavailableError, match=f"cannot reach a server at {address}") as caught:
        caller.result(address, b"p", b"s")
    assert time.monotonic() - began < 5
    assert caught.value.address == address


def test_a_listener_that_never_answers(caller: Any) -> None:
    """A port that accepts and then says nothing fails within seconds too."""
    with closing(socket.create_server(("localhost", 0))) as mute:
        address = f"localhost:{mute.getsockname()[1]}"
        began = time.monotonic()
        with pytest.raises(UnavailableError, match=f"cannot reach a server at {address}"):
            caller.call(address, "describe_options", limit_s=60)
        assert time.monotonic() - began < 8


def test_connection_that_breaks(caller: Any, serve: Any, story: Any, wire: Any) -> None:
    """A connection lost in the middle of a job is told apart from a server that was never reached."""
    wires: list[Any] = []

    def cut() -> None:
        wires[0].cut()

    server = serve(story.snapshot().progress(1).then(0.2).then(cut).then(30))
    wires.append(wire(server.address))
    caller.settings["patience_s"] = 0
    with pytest.raises(UnavailableError, match=f"the connection to the server at {wires[0].address} broke"):
        caller.events(wires[0].address, b"p", b"s")
    assert server.hung_up.wait(5)


def test_details_that_contradict_the_status_are_left_out() -> None:
    """A proxy that changes the status does not make the client trip over the old details."""

    class Contradiction(grpc.RpcError):
        def code(self) -> Any:
            return CODE.NOT_FOUND

        def details(self) -> str:
            return "gone"

        def trailing_metadata(self) -> Any:
            return (("grpc-status-details-bin", b"\xff\xff not a status"),)

    assert type(nst_error(Contradiction(), address="here")) is NotFoundError


# Time and ends


def test_time_limit_ends_the_job(caller: Any, serve: Any, story: Any) -> None:
    """When `timeout_s` has passed the call ends with our error, a TimeoutError too, and the server is told."""
    server = serve(story.snapshot().then(30))
    with pytest.raises(DeadlineExceededError, match="took longer than its time limit") as caught:
        caller.result(server.address, b"p", b"s", timeout_s=0.3)
    assert isinstance(caught.value, TimeoutError)
    assert server.cancelled.wait(5)


def test_leaving_the_block_cancels(serve: Any, story: Any) -> None:
    """Whoever leaves the `with` block has stopped the job, before or after it began."""
    server = serve(story.snapshot().then(30))
    with Client(server.address) as client:
        with client.stylize(b"p", b"s") as stylization:
            next(stylization)
        assert server.cancelled.wait(5)
        with pytest.raises(JobCancelledError, match="jobs/j1 was cancelled"):
            stylization.result()


async def test_leaving_the_async_block_cancels(serve: Any, story: Any) -> None:
    """Whoever leaves the `async with` block has stopped the job."""
    server = serve(story.snapshot().then(30))
    async with AsyncClient(server.address) as client:
        async with client.stylize(b"p", b"s") as stylization:
            await anext(stylization)
        assert await asyncio.to_thread(server.cancelled.wait, 5)
        with pytest.raises(JobCancelledError, match="jobs/j1 was cancelled"):
            await stylization.result()


def test_cancel_ends_the_iteration(serve: Any, story: Any) -> None:
    """`cancel`, from any thread, ends the loop without an error; `result` raises, and tells the job."""
    server = serve(story.snapshot().then(30))
    with Client(server.address) as client:
        stylization = client.stylize(b"p", b"s")
        threading.Timer(0.3, stylization.cancel).start()
        assert [type(event) for event in stylization] == [Snapshot]
        assert list(stylization) == []
        with pytest.raises(JobCancelledError) as caught:
            stylization.result()
    assert caught.value.job is not None
    assert server.cancelled.wait(5)


async def test_async_cancel_ends_the_iteration(serve: Any, story: Any) -> None:
    """`cancel` from another task ends the loop without an error, and without cancelling the task that reads."""
    server = serve(story.snapshot().then(30))
    tasks: list[asyncio.Task[None]] = []
    async with AsyncClient(server.address) as client:
        stylization = client.stylize(b"p", b"s")
        asyncio.get_running_loop().call_later(0.3, lambda: tasks.append(asyncio.create_task(stylization.cancel())))
        assert [type(event) async for event in stylization] == [Snapshot]
        assert [event async for event in stylization] == []
        with pytest.raises(JobCancelledError):
            await stylization.result()
    assert await asyncio.to_thread(server.cancelled.wait, 5)


async def test_async_cancel_before_the_start_sends_nothing(serve: Any, story: Any) -> None:
    """A stylization that was cancelled before it was awaited never starts."""
    server = serve(story.whole())
    async with AsyncClient(server.address) as client:
        stylization = client.stylize(b"p", b"s")
        await stylization.cancel()
        with pytest.raises(JobCancelledError):
            await stylization.result()
    assert server.requests == []


async def test_cancelling_the_task_cancels_the_job(serve: Any, story: Any) -> None:
    """A task that is cancelled while it reads is cancelled like any other, and its job with it."""
    server = serve(story.snapshot().then(30))
    async with AsyncClient(server.address) as client:
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.3):
                await client.stylize(b"p", b"s").result()
        assert await asyncio.to_thread(server.cancelled.wait, 5)


def test_cancel_after_the_end_changes_nothing(serve: Any, story: Any) -> None:
    """The result of a job that has ended survives `cancel` and `close`."""
    with Client(serve(story.whole()).address) as client:
        with client.stylize(b"p", b"s") as stylization:
            list(stylization)
        stylization.cancel()
        assert stylization.result().iteration == 4


def test_forgotten_stylization_is_cancelled(serve: Any, story: Any) -> None:
    """A job whose stream nobody holds any more does not go on."""
    server = serve(story.snapshot().then(30))
    with Client(server.address) as client:
        next(client.stylize(b"p", b"s"))
        gc.collect()
        assert server.cancelled.wait(5)


async def test_forgotten_async_stylization_is_cancelled(serve: Any, story: Any) -> None:
    """A job whose stream nobody holds any more does not go on, under asyncio too."""
    server = serve(story.snapshot().then(30))
    async with AsyncClient(server.address) as client:
        await anext(client.stylize(b"p", b"s"))
        gc.collect()
        assert await asyncio.to_thread(server.cancelled.wait, 5)


def test_keyboard_interrupt_cancels(serve: Any, story: Any) -> None:
    """Ctrl-C while waiting for an event is a KeyboardInterrupt, and the job is cancelled."""
    server = serve(story.snapshot().then(30))
    with Client(server.address) as client:
        stylization = client.stylize(b"p", b"s")
        next(stylization)
        threading.Timer(0.3, signal.raise_signal, [signal.SIGINT]).start()
        with pytest.raises(KeyboardInterrupt):
            next(stylization)
        assert server.cancelled.wait(5)


def test_error_is_raised_again_by_result(serve: Any, story: Any, aborted: Any) -> None:
    """What broke the stream while iterating is what `result` raises."""
    with Client(serve(story.snapshot().then(aborted(CODE.INTERNAL, "oh"))).address) as client:
        stylization = client.stylize(b"p", b"s")
        with pytest.raises(ServerError) as first:
            list(stylization)
        with pytest.raises(ServerError) as second:
            stylization.result()
    assert first.value is second.value


def test_closing_the_client_ends_its_streams(serve: Any, story: Any) -> None:
    """A client that is closed cancels what still runs; the reader learns it."""
    client = Client(serve(story.snapshot().then(30)).address)
    stylization = client.stylize(b"p", b"s")
    next(stylization)
    threading.Timer(0.3, client.close).start()
    with pytest.raises(JobCancelledError):
        next(stylization)


async def test_closing_the_async_client_ends_its_streams(serve: Any, story: Any) -> None:
    """A client that is closed cancels what still runs; the reader learns it, and is not cancelled itself."""
    client = AsyncClient(serve(story.snapshot().then(30)).address)
    stylization = client.stylize(b"p", b"s")
    await anext(stylization)
    closing_soon = asyncio.create_task(client.close())
    with pytest.raises(JobCancelledError):
        await anext(stylization)
    await closing_soon


def test_closed_client_says_so(serve: Any, story: Any) -> None:
    """Using a client after its `with` block is an error of ours."""
    with Client(serve(story.whole()).address) as client:
        pass
    for use in (lambda: client.stylize(b"p", b"s"), client.describe_options, client.connect):
        with pytest.raises(ClientClosedError, match="is closed"):
            use()


async def test_closed_async_client_says_so(serve: Any, story: Any) -> None:
    """Using a client after its `async with` block is an error of ours."""
    async with AsyncClient(serve(story.whole()).address) as client:
        await client.connect()
    for use in (lambda: client.stylize(b"p", b"s").result(), client.describe_options, client.connect):
        with pytest.raises(ClientClosedError, match="is closed"):
            await use()


def test_several_threads_share_a_client(serve: Any, story: Any) -> None:
    """One client serves several stylizations at once."""
    results: list[Result] = []
    with Client(serve(story.snapshot().then(0.1).whole()).address) as client:
        threads = [
            threading.Thread(target=lambda: results.append(client.stylize(b"p", b"s").result())) for _ in range(4)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert len(results) == 4


async def test_several_tasks_share_a_client(serve: Any, story: Any) -> None:
    """One async client serves several stylizations at once."""
    async with AsyncClient(serve(story.whole()).address) as client:
        results = await asyncio.gather(*(client.stylize(b"p", b"s").result() for _ in range(4)))
    assert len(results) == 4


# Connections


@pytest.mark.parametrize("address", ["", "http://localhost:50051", "https://nst.example"])
def test_url_is_no_address(address: str) -> None:
    """An address is host:port; anything with a scheme is refused with an example."""
    for kind in (Client, AsyncClient):
        with pytest.raises(InvalidArgumentError, match="must be host:port, localhost:50051 for instance"):
            kind(address)


@pytest.mark.parametrize(
    ("given", "used"),
    [("localhost", "localhost:50051"), ("[::1]", "[::1]:50051"), ("[::1]:7", "[::1]:7"), ("unix:/x", "unix:/x")],
)
def test_port_may_be_left_out(given: str, used: str) -> None:
    """Without a port it is the service's."""
    with Client(given) as client:
        assert client.address == used


def test_connect_waits_for_a_server(caller: Any, serve: Any, story: Any) -> None:
    """`connect` waits for a server that is starting and raises if none comes."""
    with closing(socket.create_server(("localhost", 0))) as free:
        address = f"localhost:{free.getsockname()[1]}"
    with pytest.raises(UnavailableError, match=rf"cannot reach a server at {address} within 0\.3 s"):
        caller.call(address, "connect", timeout_s=0.3)
    caller.call(serve(story).address, "connect")


def test_new_client_tries_at_once(caller: Any, serve: Any, story: Any) -> None:
    """A client that failed, and now waits before it tries again, does not make another in the same process wait."""
    with closing(socket.create_server(("localhost", 0))) as free:
        address = f"localhost:{free.getsockname()[1]}"
    with Client(address) as early:
        with pytest.raises(UnavailableError):
            early.describe_options()
        serve(story.whole(), port=int(address.rpartition(":")[2]))
        assert caller.result(address, b"p", b"s").iteration == 4


def test_proxy_is_not_asked_for_loopback(caller: Any, serve: Any, story: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A company's proxy settings do not keep anyone from the server on their own machine."""
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    monkeypatch.delenv("no_proxy", raising=False)
    assert caller.result(serve(story.whole()).address, b"p", b"s").iteration == 4


def test_client_introduces_itself(caller: Any, serve: Any, story: Any) -> None:
    """The server sees which client calls."""
    server = serve(story.whole())
    caller.result(server.address, b"p", b"s")
    assert server.metadata[0]["user-agent"].startswith("nst-client/0.")


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> tuple[bytes, bytes]:
    """Return the key and certificate of a server called localhost."""
    home = tmp_path_factory.mktemp("tls")
    make = "openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -days 2 -subj /CN=localhost"
    arguments = ["-addext", "subjectAltName=DNS:localhost", "-keyout", home / "key", "-out", home / "cert"]
    subprocess.run([*make.split(), *arguments], check=True, capture_output=True)
    return (home / "key").read_bytes(), (home / "cert").read_bytes()


def test_credentials_encrypt(serve: Any, story: Any, certificate: tuple[bytes, bytes]) -> None:
    """With credentials both clients speak TLS, and refuse a server that the credentials do not vouch for."""
    server = serve(story.whole(), credentials=grpc.ssl_server_credentials([certificate]))
    trusted = grpc.ssl_channel_credentials(certificate[1])

    async def over_async(credentials: Any) -> Result:
        async with AsyncClient(server.address, credentials=credentials) as client:
            return await client.stylize(b"p", b"s").result()

    with Client(server.address, credentials=trusted) as client:
        assert client.stylize(b"p", b"s").result().data == asyncio.run(over_async(trusted)).data
    with pytest.raises(UnavailableError):
        asyncio.run(over_async(grpc.ssl_channel_credentials()))


# Styles, models, options


class Shelf(style_service_pb2_grpc.StyleServiceServicer):
    """Keeps styles in a dict; lists them two a page."""

    def __init__(self) -> None:
        self.styles: dict[str, style_service_pb2.Style] = {}

    def CreateStyle(self, request: Any, context: Any) -> Any:  # noqa: N802
        """Keep a style."""
        name = f"styles/{request.style_id or 'made'}"
        if name in self.styles:
            context.abort(CODE.ALREADY_EXISTS, f"{name} is another style")
        kept = style_service_pb2.Style(name=name, display_name=request.style.display_name)
        kept.create_time.FromSeconds(1_700_000_000)
        for image in request.style.images:
            kept.images.add(sha256=f"{len(image.image.data):064x}", width=8, height=6, weight=image.weight or 1.0)
        kept.prepared.add(model="models/tiny", size_px=512, layers=["relu1_1"])
        self.styles[name] = kept
        return kept

    def GetStyle(self, request: Any, context: Any) -> Any:  # noqa: N802
        """Return a style."""
        name = f"styles/{request.name.removeprefix('styles/')}"
        if name not in self.styles:
            context.abort(CODE.NOT_FOUND, f"there is no {name}")
        return self.styles[name]

    def ListStyles(self, request: Any, _context: Any) -> Any:  # noqa: N802
        """Return a page of two."""
        begin = int(request.page_token or 0)
        names = sorted(self.styles)
        token = str(begin + 2) if begin + 2 < len(names) else ""
        page = [self.styles[name] for name in names[begin : begin + 2]]
        return style_service_pb2.ListStylesResponse(styles=page, next_page_token=token)

    def DeleteStyle(self, request: Any, context: Any) -> Any:  # noqa: N802
        """Forget a style."""
        del self.styles[self.GetStyle(request, context).name]
        return Empty()


def test_styles_are_created_shown_listed_and_deleted(caller: Any, serve: Any, photo: Path, wave: Path) -> None:
    """The life of a stored style, by its id, its name or the object itself."""
    shelf = Shelf()
    address = serve(shelf).address
    made = caller.call(address, "create_style", [photo, Weighted(wave, 3)], style_id="sea", display_name="The sea")
    assert (made.name, made.display_name, [image.weight for image in made.images]) == ("styles/sea", "The sea", [1, 3])
    assert (made.create_time.year, made.prepared[0].layers) == (2023, ("relu1_1",))
    for name in ("sea", "styles/sea", StyleName("sea"), made):
        assert caller.call(address, "get_style", name) == made
    assert caller.call(address, "create_style", photo).name == "styles/made"
    caller.call(address, "delete_style", made)
    assert list(shelf.styles) == ["styles/made"]


def test_listing_goes_through_all_pages(caller: Any, serve: Any) -> None:
    """However many pages a list has, it is one iteration."""
    shelf = Shelf()
    shelf.styles = {f"styles/s{index}": style_service_pb2.Style(name=f"styles/s{index}") for index in range(5)}
    listed = caller.call(serve(shelf).address, "list_styles")
    assert [style.name for style in listed] == sorted(shelf.styles)


def test_errors_of_styles(caller: Any, serve: Any, photo: Path) -> None:
    """What is not there, what is there already, and what cannot be read are errors of ours."""
    address = serve(Shelf()).address
    caller.call(address, "create_style", photo, style_id="sea")
    with pytest.raises(AlreadyExistsError, match="styles/sea is another style"):
        caller.call(address, "create_style", photo, style_id="sea")
    for method in ("get_style", "delete_style"):
        with pytest.raises(NotFoundError, match="there is no styles/nope"):
            caller.call(address, method, "nope")
    with pytest.raises(ImageNotReadableError, match=r"style\.images\[1\]: there is no file"):
        caller.call(address, "create_style", [photo, "nope.jpg"])


def test_models_are_described(caller: Any, serve: Any) -> None:
    """A model comes with its state and layers."""

    class Models(model_service_pb2_grpc.ModelServiceServicer):
        def ListModels(self, _request: Any, _context: Any) -> Any:  # noqa: N802
            layer = model_service_pb2.Layer(name="relu1_1", channels=64, stride_px=1, receptive_field_px=3)
            state = model_service_pb2.MODEL_STATE_NOT_FETCHED
            model = model_service_pb2.Model(name="models/vgg19", state=state, is_default=True, layers=[layer])
            return model_service_pb2.ListModelsResponse(models=[model])

    [model] = caller.call(serve(Models()).address, "list_models")
    assert (model.name, model.state, model.is_default) == ("models/vgg19", ModelState.NOT_FETCHED, True)
    assert (model.layers[0].name, model.layers[0].receptive_field_px) == ("relu1_1", 3)


class Describer(style_transfer_service_pb2_grpc.StyleTransferServiceServicer):
    """Describes one option of each type, after a pause."""

    def __init__(self, pause_s: float = 0.0) -> None:
        self._pause_s = pause_s

    def DescribeOptions(self, _request: Any, _context: Any) -> Any:  # noqa: N802
        """Describe them."""
        time.sleep(self._pause_s)
        weights = Struct()
        weights.update({"relu4_2": 1.0})
        kinds = options_pb2.OptionType
        described = [
            options_pb2.OptionDescription(
                name="size_px",
                type=kinds.OPTION_TYPE_INTEGER,
                default_value=Value(number_value=512),
                minimum=16,
                maximum=4096,
                unit="px",
                description="Longer edge.",
            ),
            options_pb2.OptionDescription(
                name="init",
                type=kinds.OPTION_TYPE_CHOICE,
                default_value=Value(string_value="content"),
                choices=["content", "noise"],
            ),
            options_pb2.OptionDescription(
                name="content_layers",
                type=kinds.OPTION_TYPE_LAYER_WEIGHTS,
                default_value=Value(struct_value=weights),
                minimum=0,
            ),
            options_pb2.OptionDescription(
                name="style_scale", type=kinds.OPTION_TYPE_NUMBER, default_value=Value(number_value=1)
            ),
            options_pb2.OptionDescription(
                name="deterministic", type=kinds.OPTION_TYPE_BOOLEAN, default_value=Value(bool_value=False)
            ),
            options_pb2.OptionDescription(
                name="scale_iterations",
                type=kinds.OPTION_TYPE_INTEGERS,
                default_value=Value(list_value=ListValue(values=[Value(number_value=9), Value(number_value=5)])),
            ),
        ]
        gatys = options_pb2.StylizeOptions(preset="PRESET_GATYS", size_px=512, content_layers={"relu4_2": 1})
        return style_transfer_service_pb2.DescribeOptionsResponse(
            options=described,
            presets=[
                style_transfer_service_pb2.PresetDescription(
                    name="gatys", description="As in the paper.", options=gatys
                )
            ],
        )


def test_options_are_described(caller: Any, serve: Any) -> None:
    """Every option comes with default, bounds and choices in Python's types."""
    size, init, layers, scale, deterministic, iterations = caller.call(serve(Describer()).address, "describe_options")
    assert (size.name, size.type, size.default, size.minimum, size.maximum, size.unit) == (
        "size_px",
        OptionType.INTEGER,
        512,
        16,
        4096,
        "px",
    )
    assert isinstance(size.default, int)
    assert (init.default, init.choices, init.minimum, init.maximum) == ("content", ("content", "noise"), None, None)
    assert (layers.type, layers.default) == (OptionType.LAYER_WEIGHTS, {"relu4_2": 1.0})
    assert isinstance(scale.default, float)
    assert (deterministic.type, deterministic.default) == (OptionType.BOOLEAN, False)
    assert isinstance(deterministic.default, bool)
    assert (iterations.type, iterations.default) == (OptionType.INTEGERS, [9, 5])
    assert all(isinstance(number, int) for number in iterations.default)


def test_presets_are_described(caller: Any, serve: Any) -> None:
    """Every preset comes with its options in the form in which `stylize` takes them."""
    [preset] = caller.call(serve(Describer()).address, "describe_presets")
    options = {"preset": "gatys", "size_px": 512, "content_layers": {"relu4_2": 1.0}}
    assert preset == Preset(name="gatys", description="As in the paper.", options=options)


def test_short_calls_have_a_time_limit(caller: Any, serve: Any) -> None:
    """A server that hangs does not hang its client."""
    with pytest.raises(DeadlineExceededError):
        caller.call(serve(Describer(pause_s=1)).address, "describe_options", limit_s=0.2)


def test_older_server_is_named(caller: Any, serve: Any) -> None:
    """A call that the server does not know is an error that says so."""
    with pytest.raises(ServerError, match="does not know this call") as caught:
        caller.call(serve(Shelf()).address, "list_models")
    assert caught.value.code == "UNIMPLEMENTED"
