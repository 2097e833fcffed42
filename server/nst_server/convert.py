"""Between the contract's messages and the server's own types: the only module that knows both."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Collection, Iterator, Mapping
from datetime import UTC, datetime, timedelta
from enum import StrEnum
from typing import Any

from google.protobuf import struct_pb2, timestamp_pb2
from google.protobuf.descriptor import FieldDescriptor
from google.rpc import code_pb2

from nst.v1 import (
    file_pb2,
    image_pb2,
    image_service_pb2,
    job_pb2,
    model_service_pb2,
    options_pb2,
    style_service_pb2,
    style_transfer_service_pb2,
)
from nst_model import InvalidOption, ModelCard, Precision, Preset, StylizeOptions, UnknownModel
from nst_model.export_spec import ExportSpec
from nst_model.options import MAX_WEIGHT, PRESETS, bounds_of, default_of
from nst_server.errors import InvalidField, NotFound
from nst_server.exports import ExportedFile
from nst_server.frames import Frame, PreviewSpec
from nst_server.images import EncodedImage, Encoding, ImageFormat
from nst_server.jobs import (
    Event,
    Finished,
    Heartbeat,
    JobSnapshot,
    JobState,
    StateChanged,
    StoredResult,
)
from nst_server.library import Upload
from nst_server.messages import Progressed
from nst_server.requests import ImageName, JobRequest, JobStyle, JobUpdate, Source
from nst_server.storage.records import ImageRecord
from nst_server.styles import StoredImage, Style, StyleFile

PART_BYTES = 2 * 1024 * 1024
"""Image bytes in one message; with everything around them it stays far below the contract's 3 MiB."""

PREVIEW_ENCODING = Encoding(ImageFormat.JPEG, 85)
RESULT_ENCODING = Encoding(ImageFormat.PNG, 95)
DEEP_RESULTS = (ImageFormat.PNG, ImageFormat.TIFF)
"""Formats of results that may have 16 bits a channel."""
PREVIEW_INTERVAL, PREVIEW_SIZE_PX = 1, 512

MASKS = ("region", "style_region")

REQUEST_ID = re.compile(r"[A-Za-z0-9._-]{1,64}")

OPTION_TYPES = {
    int: options_pb2.OPTION_TYPE_INTEGER,
    float: options_pb2.OPTION_TYPE_NUMBER,
}

JOB_ERROR_CODES = {
    "WORKER_DIED": code_pb2.UNAVAILABLE,
    "GIVEN_UP": code_pb2.ABORTED,
    "OUT_OF_MEMORY": code_pb2.RESOURCE_EXHAUSTED,
    "MODEL_UNAVAILABLE": code_pb2.FAILED_PRECONDITION,
    "INTERNAL": code_pb2.INTERNAL,
    # What was accepted, and is refused when its turn comes.
    "NOT_FOUND": code_pb2.NOT_FOUND,
    "INVALID_FIELD": code_pb2.INVALID_ARGUMENT,
    "MODEL_NOT_FETCHED": code_pb2.FAILED_PRECONDITION,
    "STORAGE_READ_ONLY": code_pb2.FAILED_PRECONDITION,
    "STORAGE_DAMAGED": code_pb2.DATA_LOSS,
}
"""What a job can fail of, which is the list in the contract's JobError."""


def options_from_proto(message: options_pb2.StylizeOptions) -> StylizeOptions:
    """Return the options of a message, defaults filled in. Raises InvalidField."""
    try:
        return StylizeOptions.of(**_given(message))
    except InvalidOption as error:
        raise InvalidField(f"options.{error.field}", error.reason) from error


def _given(message: options_pb2.StylizeOptions) -> dict[str, Any]:
    """Return the options that a message has, by name. Raises InvalidField for an unknown choice."""
    given: dict[str, Any] = {}
    for field in message.DESCRIPTOR.fields:
        if _is_map(field):
            if weights := dict(getattr(message, field.name)):
                given[field.name] = weights
        elif field.is_repeated:
            if values := list(getattr(message, field.name)):
                given[field.name] = values
        elif field.enum_type is not None:
            if number := getattr(message, field.name):
                given[field.name] = _choice_name(field, number, f"options.{field.name}")
        elif message.HasField(field.name):
            given[field.name] = getattr(message, field.name)
    return given


def options_to_proto(options: StylizeOptions) -> options_pb2.StylizeOptions:
    """Return options as a message with every field set."""
    message = options_pb2.StylizeOptions()
    for field in message.DESCRIPTOR.fields:
        value = getattr(options, field.name)
        if _is_map(field):
            getattr(message, field.name).update(value)
        elif field.is_repeated:
            getattr(message, field.name).extend(value)
        elif field.enum_type is not None:
            setattr(message, field.name, _choice_number(field, value))
        else:
            setattr(message, field.name, value)
    return message


def describe_options() -> Iterator[options_pb2.OptionDescription]:
    """Yield the description of every option, in the order of the contract's field numbers."""
    fields = {field.name: field for field in dataclasses.fields(StylizeOptions)}
    for described in sorted(options_pb2.StylizeOptions.DESCRIPTOR.fields, key=lambda field: field.number):
        default = default_of(fields[described.name])
        bounds = bounds_of(described.name)
        message = options_pb2.OptionDescription(
            name=described.name,
            minimum=bounds.minimum,
            maximum=bounds.maximum,
            unit=bounds.unit,
            description=bounds.description,
        )
        if isinstance(default, StrEnum):
            message.type = options_pb2.OPTION_TYPE_CHOICE
            message.choices.extend(type(default))
            message.default_value.string_value = default
        elif isinstance(default, Mapping):
            message.type = options_pb2.OPTION_TYPE_LAYER_WEIGHTS
            message.default_value.struct_value.CopyFrom(_struct(default))
        elif isinstance(default, tuple):
            message.type = options_pb2.OPTION_TYPE_INTEGERS
            message.default_value.list_value.SetInParent()  # an empty list is a value, too
            message.default_value.list_value.extend(default)
        elif isinstance(default, bool):
            message.type = options_pb2.OPTION_TYPE_BOOLEAN
            message.default_value.bool_value = default
        else:
            message.type = OPTION_TYPES[type(default)]
            message.default_value.number_value = default
        yield message


def describe_presets() -> Iterator[style_transfer_service_pb2.PresetDescription]:
    """Yield what each preset stands for."""
    for preset in Preset:
        yield style_transfer_service_pb2.PresetDescription(
            name=preset, description=PRESETS[preset].description, options=options_to_proto(StylizeOptions.of(preset))
        )


def weight_from_proto(message: Any, field: str) -> float:
    """Return the `weight` of a message, 1 if it has none. Raises InvalidField."""
    weight = float(message.weight) if message.HasField("weight") else 1.0
    if not math.isfinite(weight):
        raise InvalidField(field, f"must be finite, not {weight}")
    if not 0 <= weight <= MAX_WEIGHT:
        raise InvalidField(field, f"must be from 0 to {MAX_WEIGHT:g}, not {weight}")
    return weight


def request_from_proto(message: style_transfer_service_pb2.StylizeRequest) -> JobRequest:
    """Return what a Stylize request asks for, defaults filled in. Raises InvalidField."""
    options = options_from_proto(_with_init(message))
    styles = [_style_input(style, f"styles[{index}]") for index, style in enumerate(message.styles)]
    return JobRequest(
        content=_source(message.content) or b"",
        styles=styles,
        init_image=_source(message.init_image) or b"",
        request_id=_request_id(message.request_id),
        cancel_on_disconnect=message.cancel_on_disconnect if message.HasField("cancel_on_disconnect") else True,
        model=message.model,
        options=options,
        preview=preview_from_proto(message.preview),
        output=encoding_from_proto(message.output, RESULT_ENCODING, "output", DEEP_RESULTS),
    )


def style_images_from_proto(message: style_service_pb2.Style) -> list[tuple[Source, float]]:
    """Return the images of a style to be created, each with its weight. Raises InvalidField."""
    return [
        (_source(image.image) or b"", weight_from_proto(image, f"style.images[{index}].weight"))
        for index, image in enumerate(message.images)
    ]


def update_from_proto(message: style_transfer_service_pb2.UpdateJobRequest) -> JobUpdate:
    """Return how a job is to be changed. Raises InvalidField."""
    paused = message.paused if message.HasField("paused") else None
    if paused and message.finish:
        raise InvalidField("paused", "must not go with finish: a job that is to end cannot wait")
    return JobUpdate(_given(message.options), paused, message.finish)


def states_from_proto(numbers: Collection[int]) -> list[JobState]:
    """Return the states that jobs are wanted in. Raises InvalidField."""
    found = []
    for index, number in enumerate(numbers):
        if number == 0 or number not in job_pb2.JobState.values():
            raise InvalidField(f"states[{index}]", f"has no choice number {number}")
        found.append(JobState(job_pb2.JobState.Name(number).removeprefix("JOB_STATE_").lower()))
    return found


def preview_from_proto(message: style_transfer_service_pb2.Preview) -> PreviewSpec:
    """Return which previews are wanted, defaults filled in. Raises InvalidField."""
    interval = message.interval if message.HasField("interval") else PREVIEW_INTERVAL
    size_px = message.size_px if message.HasField("size_px") else PREVIEW_SIZE_PX
    _check_range("preview.interval", interval, 0, 10_000)
    _check_range("preview.size_px", size_px, 16, 4096)
    encoding = encoding_from_proto(message.encoding, PREVIEW_ENCODING, "preview.encoding")
    return PreviewSpec(interval, size_px, encoding, message.every_frame)


def encoding_from_proto(
    message: image_pb2.Encoding, default: Encoding, field: str, deep: Collection[ImageFormat] = ()
) -> Encoding:
    """Return how to encode, `default` filled in; formats in `deep` may have 16 bits a channel. Raises InvalidField."""
    quality = message.quality if message.HasField("quality") else default.quality
    _check_range(f"{field}.quality", quality, 1, 100)
    file_format = _image_format(message, field) if message.format else default.format
    bit_depth = message.bit_depth if message.HasField("bit_depth") else default.bit_depth
    if bit_depth != 8 and not (bit_depth == 16 and file_format in deep):
        raise InvalidField(f"{field}.bit_depth", f"must be 8, or 16 for results in PNG and TIFF, not {bit_depth}")
    return Encoding(file_format, quality, bit_depth)


def export_from_proto(message: model_service_pb2.ExportModelRequest, default_model: str) -> ExportSpec:
    """Return what of which model is to be exported, defaults filled in. Raises InvalidField and NotFound."""
    given: dict[str, Any] = {"model": message.model.removeprefix("models/") or default_model}
    for field in message.DESCRIPTOR.fields:
        value = getattr(message, field.name)
        if field.enum_type is not None and value:
            given[field.name] = _choice_name(field, value, field.name)
        elif field.is_repeated and value:
            given[field.name] = tuple(value)
    try:
        return ExportSpec(**given)
    except InvalidOption as error:
        raise InvalidField(error.field, error.reason) from error
    except UnknownModel as error:
        raise NotFound("model", str(error)) from error


def page_from_proto(page_size: int) -> int:
    """Return how many to list on a page. Raises InvalidField."""
    _check_range("page_size", page_size, 0, 100)
    return page_size or 50


def event_to_proto(event: Event, estimated_start_s: float | None = None) -> Iterator[job_pb2.JobEvent]:
    """Yield the messages of an event: one, or as many as its image needs; see `job_to_proto` for the estimate."""
    match event.payload:
        case JobSnapshot():
            yield _event(event, snapshot=job_to_proto(event.payload, estimated_start_s))
        case StateChanged():
            job = job_to_proto(event.payload.job, estimated_start_s)
            yield _event(event, state_change=job_pb2.StateChange(job=job))
        case Progressed():
            yield _event(event, progress=progress_to_proto(event.payload))
        case Frame(image, iteration, skipped):
            for part in image_to_proto(image):
                yield _event(event, frame=job_pb2.Frame(iteration=iteration, skipped=skipped, image=part))
        case Finished(result, data):
            reason = _stop_reason(result)
            for part in image_to_proto(EncodedImage(data, result.format, result.width, result.height)):
                message = job_pb2.Result(image=part, iteration=result.iteration, loss=result.loss, stop_reason=reason)
                yield _event(event, result=message)
        case Heartbeat():
            yield _event(event, heartbeat=job_pb2.Heartbeat())


def image_to_proto(image: EncodedImage) -> Iterator[image_pb2.ImagePart]:
    """Yield the parts of an image, in order."""
    total = len(image.data)
    for offset in range(0, total, PART_BYTES):
        data = image.data[offset : offset + PART_BYTES]
        yield image_pb2.ImagePart(
            format=image_pb2.ImageFormat.Value(f"IMAGE_FORMAT_{image.format}"),
            width=image.width,
            height=image.height,
            total_bytes=total,
            offset=offset,
            data=data,
            sha256=image.sha256 if offset + len(data) == total else "",
        )


def job_to_proto(job: JobSnapshot, estimated_start_s: float | None = None) -> job_pb2.Job:
    """Return a job as a message; `estimated_start_s` is in how many seconds it will probably get a device."""
    message = job_pb2.Job(
        name=job.name,
        state=job_pb2.JobState.Value(f"JOB_STATE_{job.state.upper()}"),
        model=f"models/{job.model}",
        options=options_to_proto(job.options),
        width=job.width,
        height=job.height,
        create_time=_timestamp(job.create_time),
        start_time=_timestamp(job.start_time),
        end_time=_timestamp(job.end_time),
        queue_position=job.queue_position,
        device=job.device,
        attempt=job.attempt,
        sequence=job.sequence,
        request_id=job.request_id,
    )
    if estimated_start_s is not None:
        message.estimated_start_time.FromDatetime(datetime.now(UTC) + timedelta(seconds=estimated_start_s))
    if job.result is not None:
        message.result.image = f"images/{job.result.sha256}"
        message.result.total_bytes = job.result.total_bytes
        message.result.iteration = job.result.iteration
        message.result.loss = job.result.loss
        message.result.stop_reason = _stop_reason(job.result)
    if job.precision:
        message.precision = options_pb2.Precision.Value(f"PRECISION_{Precision(job.precision).name}")
    if job.progress is not None:
        message.progress.CopyFrom(progress_to_proto(job.progress))
    if job.error is not None:
        message.error.code = JOB_ERROR_CODES.get(job.error.reason, code_pb2.INTERNAL)
        message.error.reason = job.error.reason
        message.error.message = job.error.message
    return message


def progress_to_proto(progress: Progressed) -> job_pb2.Progress:
    """Return an iteration's numbers as a message."""
    return job_pb2.Progress(
        iteration=progress.iteration,
        iterations=progress.iterations,
        loss=progress.loss,
        content_loss=progress.content_loss,
        tv_loss=progress.tv_loss,
        laplacian_loss=progress.laplacian_loss,
        style_losses=progress.style_losses,
        elapsed_s=progress.elapsed_s,
        iterations_per_second=progress.iterations_per_second,
        remaining_s=progress.remaining_s,
    )


def upload_to_proto(upload: Upload) -> image_service_pb2.Upload:
    """Return an upload as a message."""
    return image_service_pb2.Upload(
        name=f"uploads/{upload.id}",
        total_bytes=upload.total_bytes,
        received_bytes=upload.received_bytes,
        image=f"images/{upload.image}" if upload.image else "",
    )


def image_record_to_proto(image: ImageRecord) -> image_service_pb2.StoredImage:
    """Return what is known of a stored image as a message."""
    return image_service_pb2.StoredImage(
        name=f"images/{image.sha256}",
        total_bytes=image.bytes,
        width=image.width,
        height=image.height,
        media_type=image.mime,
        create_time=_timestamp(image.create_time),
    )


def stored_part_to_proto(image: ImageRecord, offset: int, data: bytes) -> image_pb2.ImagePart:
    """Return a part of a stored image as a message."""
    file_format = image.mime.removeprefix("image/").upper()
    known = file_format in ImageFormat.__members__
    return image_pb2.ImagePart(
        format=image_pb2.ImageFormat.Value(f"IMAGE_FORMAT_{file_format if known else 'UNSPECIFIED'}"),
        width=image.width,
        height=image.height,
        total_bytes=image.bytes,
        offset=offset,
        data=data,
        sha256=image.sha256 if offset + len(data) == image.bytes else "",
    )


def file_part_to_proto(file: ExportedFile, offset: int, data: bytes) -> file_pb2.FilePart:
    """Return a part of a file that was made as a message."""
    return file_pb2.FilePart(offset=offset, data=data, total_bytes=file.size, sha256=file.sha256, file_name=file.name)


def style_to_proto(style: Style, prepared: Mapping[tuple[str, int], list[str]]) -> style_service_pb2.Style:
    """Return a stored style as a message; `prepared` maps (model, size in px) to the layers that are on disk."""
    return style_service_pb2.Style(
        name=style.name,
        display_name=style.display_name,
        images=[_style_image_to_proto(image) for image in style.images],
        create_time=_timestamp(style.create_time),
        prepared=[
            style_service_pb2.PreparedGrams(model=f"models/{model}", size_px=size_px, layers=layers)
            for (model, size_px), layers in sorted(prepared.items())
        ],
        file=None if style.file is None else _style_file_to_proto(style.file),
    )


def model_to_proto(card: ModelCard, sha256: str, *, default: bool) -> model_service_pb2.Model:
    """Return a feature model as a message; `sha256` is empty if its weights are not here."""
    architecture = card.architecture
    available = model_service_pb2.MODEL_STATE_AVAILABLE if sha256 else model_service_pb2.MODEL_STATE_NOT_FETCHED
    return model_service_pb2.Model(
        name=f"models/{card.name}",
        display_name=card.display_name,
        description=card.description,
        state=available,
        is_default=default,
        layers=[
            model_service_pb2.Layer(
                name=convolution.layer,
                channels=convolution.channels,
                stride_px=convolution.stride_px,
                receptive_field_px=architecture.receptive_field_px(convolution.layer),
            )
            for convolution in architecture.convolutions
        ],
        license=card.license,
        sha256=sha256,
    )


def _style_image_to_proto(image: StoredImage) -> style_service_pb2.StyleImage:
    return style_service_pb2.StyleImage(
        weight=image.weight, sha256=image.sha256, width=image.width, height=image.height
    )


def _style_file_to_proto(file: StyleFile) -> style_service_pb2.StyleFile:
    return style_service_pb2.StyleFile(
        sha256=file.sha256,
        total_bytes=file.size,
        model=f"models/{file.model}",
        model_sha256=file.model_sha256,
        pooling=options_pb2.Pooling.Value(f"POOLING_{file.pooling.upper()}"),
        padding=options_pb2.Padding.Value(f"PADDING_{file.padding.upper()}"),
        sizes_px=file.sizes_px,
        layers=file.layers,
        images=[_style_image_to_proto(image) for image in file.images],
    )


def _with_init(message: style_transfer_service_pb2.StylizeRequest) -> options_pb2.StylizeOptions:
    """Return a request's options; a picture to start from implies that it is what to start from."""
    image, init = options_pb2.INIT_IMAGE, message.options.init
    if init == image and not message.HasField("init_image"):
        raise InvalidField("init_image", "is missing; options.init image starts from it")
    if not message.HasField("init_image"):
        return message.options
    if init not in (options_pb2.INIT_UNSPECIFIED, image):
        raise InvalidField("init_image", "is given, but options.init is not image; leave one of them out")
    options = options_pb2.StylizeOptions(init=image)
    options.MergeFrom(message.options)
    return options


def _style_input(message: style_transfer_service_pb2.StyleInput, field: str) -> JobStyle:
    weight = weight_from_proto(message, f"{field}.weight")
    masks: dict[str, Any] = {name: _source(getattr(message, name)) for name in MASKS if message.HasField(name)}
    match message.WhichOneof("source"):
        case "style":
            if not message.style:
                raise InvalidField(f"{field}.style", "is empty; it must be the name of a style")
            return JobStyle(weight, name=message.style, **masks)
        case "image":
            return JobStyle(weight, files=((_source(message.image), 1.0),), **masks)
        case _:
            raise InvalidField(field, "must have a style or an image")


def _source(message: image_pb2.Image) -> Source:
    return ImageName(message.name) if message.WhichOneof("source") == "name" else message.data


def _request_id(text: str) -> str:
    if text and not REQUEST_ID.fullmatch(text):
        raise InvalidField("request_id", f"must be at most 64 of A–Z, a–z, 0–9, -, _ and ., not {text!r}")
    return text


def _stop_reason(result: StoredResult) -> Any:
    return job_pb2.StopReason.Value(f"STOP_REASON_{result.stop_reason.upper()}")


def _image_format(message: image_pb2.Encoding, field: str) -> ImageFormat:
    if message.format not in image_pb2.ImageFormat.values():
        raise InvalidField(f"{field}.format", f"has no choice number {message.format}")
    return ImageFormat[image_pb2.ImageFormat.Name(message.format).removeprefix("IMAGE_FORMAT_")]


def _event(event: Event, **payload: Any) -> job_pb2.JobEvent:
    return job_pb2.JobEvent(
        sequence=event.sequence, attempt=event.attempt, event_time=_timestamp(event.time), **payload
    )


def _check_range(field: str, value: int, minimum: int, maximum: int) -> None:
    if not minimum <= value <= maximum:
        raise InvalidField(field, f"must be from {minimum} to {maximum}, not {value}")


def _is_map(field: FieldDescriptor) -> bool:
    return field.message_type is not None and field.message_type.GetOptions().map_entry


def _choice_prefix(field: FieldDescriptor) -> str:
    zero: str = field.enum_type.values_by_number[0].name
    return zero.removesuffix("UNSPECIFIED")


def _choice_name(field: FieldDescriptor, number: int, path: str) -> str:
    value = field.enum_type.values_by_number.get(number)
    if value is None:
        raise InvalidField(path, f"has no choice number {number}")
    return str(value.name.removeprefix(_choice_prefix(field)).lower())


def _choice_number(field: FieldDescriptor, choice: StrEnum) -> int:
    return int(field.enum_type.values_by_name[_choice_prefix(field) + choice.upper()].number)


def _struct(values: Mapping[str, float]) -> struct_pb2.Struct:
    struct = struct_pb2.Struct()
    struct.update(dict(values))
    return struct


def _timestamp(moment: datetime | None) -> timestamp_pb2.Timestamp | None:
    if moment is None:
        return None
    message = timestamp_pb2.Timestamp()
    message.FromDatetime(moment)
    return message
