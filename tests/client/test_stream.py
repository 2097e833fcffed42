"""Messages in, events out: without a network, so that every broken stream can be written down."""

import hashlib
from collections.abc import Callable
from typing import Any

import pytest

from nst.v1 import image_pb2, job_pb2
from nst_client import (
    BrokenStreamError,
    Frame,
    ImageFormat,
    JobFailedError,
    JobState,
    Progress,
    Result,
    Snapshot,
    StateChange,
    StopReason,
)
from nst_client.retry import Connection
from nst_client.stream import JobStream


@pytest.fixture
def stream() -> JobStream:
    """Return a stream of which nothing is known."""
    return JobStream(Connection("localhost:50051", patience_s=60, on_connection=None), owns_job=True)


def received(stream: JobStream, story: Any) -> list[Any]:
    """Return the events that a story makes."""
    return [event for step in story.steps if (event := stream.receive(step.event)) is not None]


def test_events_are_typed_and_numbered(stream: JobStream, story: Any) -> None:
    """Every kind of event comes with the server's numbers, in order."""
    story.snapshot(queue_position=3).state("RUNNING", device="cpu").progress(0).frame(0, skipped=2).progress(2)
    story.result().state("SUCCEEDED")
    events = received(stream, story)
    kinds = [Snapshot, StateChange, Progress, Frame, Progress, Result, StateChange]
    assert [type(event) for event in events] == kinds
    assert [event.sequence for event in events] == [0, 1, 2, 2, 3, 4, 5]
    snapshot, running, _, frame, progress, result, ended = events
    assert (snapshot.job.queue_position, snapshot.job.state, snapshot.attempt) == (3, JobState.QUEUED, 1)
    assert snapshot.time.isoformat() == "2023-11-14T22:13:20+00:00"
    assert snapshot.job.options == {"iterations": 4, "init": "noise", "style_layers": {"relu1_1": 1.0}}
    assert (snapshot.job.start_time, snapshot.job.precision, snapshot.job.progress) == (None, "", None)
    assert running.job.device == "cpu"
    assert (frame.iteration, frame.skipped, frame.format, frame.width, frame.height) == (0, 2, "jpeg", 8, 6)
    assert (progress.iteration, progress.iterations, progress.loss) == (2, 4, 8 / 3)
    assert (progress.style_losses, progress.remaining_s) == ({"relu1_1": 0.25}, 1.0)
    assert (result.loss, result.stop_reason, result.format) == (0.125, StopReason.ITERATIONS, ImageFormat.PNG)
    assert ended.job.state.is_terminal
    stream.end()
    assert stream.outcome() is result


def test_layers_come_in_the_order_of_their_names(stream: JobStream, story: Any) -> None:
    """Losses and weights by layer are in a stable order, though the wire has none."""
    layers = [f"relu{block}_{layer}" for block in range(1, 6) for layer in range(1, 5)]
    job = story.job("QUEUED")
    job.options.style_layers.update(dict.fromkeys(reversed(layers), 1.0))
    progress = job_pb2.Progress(style_losses=dict.fromkeys(reversed(layers), 1.0))
    snapshot, event = received(stream, story.event(snapshot=job).event(numbered=True, progress=progress))
    assert [layer for layer in snapshot.job.options["style_layers"] if layer in layers] == layers
    assert list(event.style_losses) == layers


def test_parts_become_one_picture(stream: JobStream, story: Any) -> None:
    """However many parts a picture comes in, it is one event with the whole file."""
    data = bytes(range(256)) * 40
    story.snapshot().frame(0, data, parts=7).frame(1, data[:99], parts=3).result(data, parts=11).state("SUCCEEDED")
    pictures = [event for event in received(stream, story) if isinstance(event, Frame | Result)]
    assert [picture.data for picture in pictures] == [data, data[:99], data]


def test_progress_between_parts_is_allowed(stream: JobStream, story: Any, parts: Any) -> None:
    """Only parts of the same kind of picture must follow each other."""
    first, second = parts(b"0123456789", "JPEG", 2)
    story.snapshot().event(frame=job_pb2.Frame(image=first)).progress(1).result(parts=2)
    story.event(frame=job_pb2.Frame(image=second))
    assert [type(event) for event in received(stream, story)] == [Snapshot, Progress, Result, Frame]


def test_unknown_event_kind_is_ignored(stream: JobStream, story: Any) -> None:
    """An event kind that a newer server sends changes nothing."""
    story.snapshot()
    newer = job_pb2.JobEvent.FromString(b"\x08\x01" + b"\xfa\x7f\x03abc")
    assert newer.WhichOneof("event") is None
    assert stream.receive(newer) is None
    assert [type(event) for event in received(stream, story)] == [Snapshot]


def test_unknown_enum_values_are_unknown(stream: JobStream, story: Any) -> None:
    """A state or format that is newer than the client is `unknown`, not an error."""
    job = story.job("RUNNING")
    job.state = 99
    data = b"new"
    part = image_pb2.ImagePart(format=77, total_bytes=3, data=data, sha256=hashlib.sha256(data).hexdigest())
    story.event(snapshot=job).event(frame=job_pb2.Frame(image=part))
    snapshot, frame = received(stream, story)
    assert snapshot.job.state is JobState.UNKNOWN
    assert frame.format is ImageFormat.UNKNOWN


DAMAGES: dict[str, Callable[[list[image_pb2.ImagePart]], object]] = {
    "a part is missing": lambda parts: parts.pop(1),
    "the first part is missing": lambda parts: parts.pop(0),
    "a part comes twice": lambda parts: parts.insert(1, parts[0]),
    "parts are swapped": lambda parts: parts.reverse(),
    "a bit is flipped": lambda parts: setattr(parts[1], "data", b"XXXX"),
    "the checksum is wrong": lambda parts: setattr(parts[-1], "sha256", "0" * 64),
    "the checksum is missing": lambda parts: setattr(parts[-1], "sha256", ""),
    "there is more than announced": lambda parts: setattr(parts[-1], "data", parts[-1].data + b"more"),
    "the length changes": lambda parts: setattr(parts[1], "total_bytes", 10_000),
    "the format changes": lambda parts: setattr(parts[1], "format", image_pb2.IMAGE_FORMAT_WEBP),
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
@pytest.mark.parametrize("kind", ["frame", "result"])
def test_damaged_pictures_are_refused(
    stream: JobStream, story: Any, parts: Any, kind: str, damage: Callable[[list[image_pb2.ImagePart]], object]
) -> None:
    """Parts that do not make the announced picture raise, and never become an event."""
    pieces = parts(b"0123456789ab", "PNG", 3)
    damage(pieces)
    message = {"frame": job_pb2.Frame, "result": job_pb2.Result}[kind]
    story.snapshot()
    for index, piece in enumerate(pieces):
        story.event(numbered=index == 0, **{kind: message(image=piece)})
    with pytest.raises(BrokenStreamError) as caught:
        received(stream, story)
    assert stream.failure is caught.value
    assert stream.result is None


def test_an_empty_file_is_no_picture(stream: JobStream, story: Any) -> None:
    """A picture of no bytes is refused, although its checksum can be right."""
    part = image_pb2.ImagePart(sha256=hashlib.sha256(b"").hexdigest())
    with pytest.raises(BrokenStreamError):
        received(stream, story.snapshot().event(frame=job_pb2.Frame(image=part)))


def test_a_new_frame_within_a_frame_is_refused(stream: JobStream, story: Any, parts: Any) -> None:
    """A frame that begins before the last one is whole has lost its parts."""
    piece, _ = parts(b"0123456789", "JPEG", 2)
    _, other = parts(b"0123456789", "JPEG", 2)
    story.snapshot().event(frame=job_pb2.Frame(iteration=1, image=piece))
    story.event(frame=job_pb2.Frame(iteration=2, image=other))
    with pytest.raises(BrokenStreamError, match="does not continue"):
        received(stream, story)


def test_an_early_end_is_broken(stream: JobStream, story: Any) -> None:
    """A stream that ends with OK before the job has ended is an error, not a quiet end."""
    received(stream, story.snapshot().state("RUNNING"))
    with pytest.raises(BrokenStreamError, match="localhost:50051 ended before the job did"):
        stream.end()


def test_an_end_within_a_picture_is_broken(stream: JobStream, story: Any, parts: Any) -> None:
    """A job cannot have ended well with half a result."""
    piece, _ = parts(b"0123456789", "PNG", 2)
    received(stream, story.snapshot().event(numbered=True, result=job_pb2.Result(image=piece)).state("SUCCEEDED"))
    with pytest.raises(BrokenStreamError):
        stream.end()


def test_success_without_a_result_is_broken(stream: JobStream, story: Any) -> None:
    """A job that succeeded without a picture contradicts the contract."""
    received(stream, story.snapshot().state("SUCCEEDED"))
    stream.end()
    with pytest.raises(BrokenStreamError, match="jobs/j1 ended without a result"):
        stream.outcome()


def test_failure_carries_the_servers_reason(stream: JobStream, story: Any) -> None:
    """A failed job raises with the server's words, its reason for programs, and the job."""
    error = job_pb2.JobError(code=8, reason="OUT_OF_MEMORY", message="the device has too little memory for 4096 px")
    received(stream, story.snapshot().state("FAILED", error=error))
    stream.end()
    with pytest.raises(JobFailedError, match="too little memory for 4096 px") as caught:
        stream.outcome()
    assert (caught.value.code, caught.value.reason) == ("RESOURCE_EXHAUSTED", "OUT_OF_MEMORY")
    assert caught.value.job is not None
    assert caught.value.job.state is JobState.FAILED
