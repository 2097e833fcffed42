"""What the stream's messages promise whatever the job: their size, and names that match across the border."""

from __future__ import annotations

from datetime import UTC, datetime

import pytest

from nst.v1 import image_pb2, job_pb2, style_transfer_service_pb2
from nst_model.descent import StopReason
from nst_model.options import StylizeOptions
from nst_server import convert
from nst_server.images import EncodedImage, ImageFormat
from nst_server.jobs import Event, Finished, JobState, StoredResult
from nst_server.messages import FINISHED, Done

LIMIT = 3 * 1024 * 1024


@pytest.mark.parametrize("size", [1, convert.PART_BYTES, convert.PART_BYTES + 1, 3 * convert.PART_BYTES, 13_000_001])
def test_parts_add_up_and_no_message_exceeds_3_mib(size: int) -> None:
    """Appending the parts gives the file; the last one carries its SHA-256, every one the fields of the event."""
    data = bytes(range(256)) * (size // 256 + 1)
    image = EncodedImage(data[:size], ImageFormat.PNG, 2048, 1536)
    stored = StoredResult.of(image, Done("jobs/one", None, 9, 0.5, StopReason.ITERATIONS))
    event = Event(7, 1, datetime.now(UTC), Finished(stored, image.data))

    messages = list(convert.event_to_proto(event))

    assert all(style_transfer_service_pb2.StylizeResponse(event=message).ByteSize() <= LIMIT for message in messages)
    assert b"".join(message.result.image.data for message in messages) == image.data
    offset = 0
    for message in messages:
        assert (message.sequence, message.result.iteration, message.result.loss) == (7, 9, 0.5)
        assert (message.result.image.offset, message.result.image.total_bytes) == (offset, size)
        offset += len(message.result.image.data)
    assert [message.result.image.sha256 for message in messages] == [""] * (len(messages) - 1) + [image.sha256]


def test_state_names_match() -> None:
    """Every state of the server is a state of the contract, and the other way round."""
    names = {name.removeprefix("JOB_STATE_").lower() for name in job_pb2.JobState.DESCRIPTOR.values_by_name} - {
        "unspecified"
    }
    assert names == set(JobState)


def test_stop_reasons_match() -> None:
    """Every reason of the core, and the server's own, is a reason of the contract, and the other way round."""
    names = {name.removeprefix("STOP_REASON_").lower() for name in job_pb2.StopReason.DESCRIPTOR.values_by_name} - {
        "unspecified"
    }
    assert names == {*StopReason, FINISHED}


def test_image_formats_match() -> None:
    """Every format of the server is a format of the contract, and the other way round."""
    names = {name.removeprefix("IMAGE_FORMAT_") for name in image_pb2.ImageFormat.DESCRIPTOR.values_by_name} - {
        "UNSPECIFIED"
    }
    assert names == set(ImageFormat)


def test_defaults_are_complete() -> None:
    """A job's options have every field set, so that a client never has to know a default; of lists that is `none`."""
    message = convert.options_to_proto(StylizeOptions())
    absent = {field.name for field in message.DESCRIPTOR.fields} - {field.name for field, _ in message.ListFields()}
    assert {name: getattr(StylizeOptions(), name) for name in absent} == {"scale_iterations": ()}
