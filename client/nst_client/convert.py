"""Messages of the contract, made into this package's types. The only module that reads resources off the wire."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import UTC, datetime
from enum import StrEnum
from typing import Any, TypeVar

import grpc
from google.protobuf.descriptor import EnumDescriptor
from google.protobuf.timestamp_pb2 import Timestamp

from nst.v1 import (
    image_service_pb2,
    job_pb2,
    model_service_pb2,
    options_pb2,
    style_service_pb2,
    style_transfer_service_pb2,
)
from nst_client.options import choice_name, read_fields
from nst_client.resources import (
    Job,
    JobFailure,
    JobResult,
    JobState,
    Layer,
    Model,
    ModelState,
    Numbers,
    OptionDescription,
    OptionType,
    OptionValue,
    PreparedGrams,
    Preset,
    StopReason,
    StoredImage,
    Style,
    StyleFile,
    StyleImage,
)

EnumT = TypeVar("EnumT", bound=StrEnum)

STATUS_NAMES = {status.value[0]: status.name for status in grpc.StatusCode}


def named(kind: type[EnumT], enum: EnumDescriptor, number: int) -> EnumT:
    """Return the member for a number of the wire; `unknown` for one that this client does not know."""
    name = choice_name(enum, number)
    return kind(name) if name in set(kind) else kind("unknown")


def job(message: job_pb2.Job) -> Job:
    """Return the job that a message holds."""
    return Job(
        name=message.name,
        state=named(JobState, job_pb2.JobState.DESCRIPTOR, message.state),
        model=message.model,
        options=read_fields(message.options),
        width=message.width,
        height=message.height,
        create_time=_time(message, "create_time"),
        start_time=_time(message, "start_time"),
        end_time=_time(message, "end_time"),
        queue_position=message.queue_position,
        device=message.device,
        precision=choice_name(options_pb2.Precision.DESCRIPTOR, message.precision) if message.precision else "",
        progress=Numbers(**numbers(message.progress)) if message.HasField("progress") else None,
        error=_job_failure(message.error) if message.HasField("error") else None,
        result=_job_result(message.result) if message.HasField("result") else None,
        attempt=message.attempt,
        estimated_start_time=_time(message, "estimated_start_time"),
        sequence=message.sequence,
        request_id=message.request_id,
    )


def numbers(message: job_pb2.Progress) -> dict[str, Any]:
    """Return the fields of `Numbers` that a message holds."""
    return {
        "iteration": message.iteration,
        "iterations": message.iterations,
        "loss": message.loss,
        "content_loss": message.content_loss,
        "tv_loss": message.tv_loss,
        "laplacian_loss": message.laplacian_loss,
        "style_losses": dict(sorted(message.style_losses.items())),
        "elapsed_s": message.elapsed_s,
        "iterations_per_second": message.iterations_per_second,
        "remaining_s": message.remaining_s,
    }


def stored_image(message: image_service_pb2.StoredImage) -> StoredImage:
    """Return the stored image that a message holds."""
    return StoredImage(
        name=message.name,
        total_bytes=message.total_bytes,
        width=message.width,
        height=message.height,
        media_type=message.media_type,
        create_time=_time(message, "create_time"),
    )


def style(message: style_service_pb2.Style) -> Style:
    """Return the style that a message holds."""
    return Style(
        name=message.name,
        display_name=message.display_name,
        images=tuple(_style_image(image) for image in message.images),
        create_time=_time(message, "create_time"),
        prepared=tuple(
            PreparedGrams(model=grams.model, size_px=grams.size_px, layers=tuple(grams.layers))
            for grams in message.prepared
        ),
        file=_style_file(message.file) if message.HasField("file") else None,
    )


def model(message: model_service_pb2.Model) -> Model:
    """Return the feature model that a message holds."""
    return Model(
        name=message.name,
        display_name=message.display_name,
        description=message.description,
        state=named(ModelState, model_service_pb2.ModelState.DESCRIPTOR, message.state),
        is_default=message.is_default,
        layers=tuple(
            Layer(
                name=layer.name,
                channels=layer.channels,
                stride_px=layer.stride_px,
                receptive_field_px=layer.receptive_field_px,
            )
            for layer in message.layers
        ),
        license=message.license,
        sha256=message.sha256,
    )


def option_description(message: options_pb2.OptionDescription) -> OptionDescription:
    """Return the description of an option that a message holds."""
    kind = named(OptionType, options_pb2.OptionType.DESCRIPTOR, message.type)
    return OptionDescription(
        name=message.name,
        type=kind,
        default=_default(message, kind),
        minimum=message.minimum if message.HasField("minimum") else None,
        maximum=message.maximum if message.HasField("maximum") else None,
        choices=tuple(message.choices),
        unit=message.unit,
        description=message.description,
    )


def preset(message: style_transfer_service_pb2.PresetDescription) -> Preset:
    """Return the preset that a message holds."""
    return Preset(name=message.name, description=message.description, options=read_fields(message.options))


def time(message: Timestamp) -> datetime:
    """Return a moment of the wire, UTC."""
    moment: datetime = message.ToDatetime(tzinfo=UTC)
    return moment


def _time(message: job_pb2.Job | style_service_pb2.Style | image_service_pb2.StoredImage, name: str) -> datetime | None:
    return time(getattr(message, name)) if message.HasField(name) else None


def _job_failure(message: job_pb2.JobError) -> JobFailure:
    code = STATUS_NAMES.get(message.code, str(message.code))
    return JobFailure(code=code, reason=message.reason, message=message.message)


def _job_result(message: job_pb2.JobResult) -> JobResult:
    return JobResult(
        image=message.image,
        total_bytes=message.total_bytes,
        iteration=message.iteration,
        loss=message.loss,
        stop_reason=named(StopReason, job_pb2.StopReason.DESCRIPTOR, message.stop_reason),
    )


def _style_file(message: style_service_pb2.StyleFile) -> StyleFile:
    return StyleFile(
        sha256=message.sha256,
        total_bytes=message.total_bytes,
        model=message.model,
        model_sha256=message.model_sha256,
        pooling=choice_name(options_pb2.Pooling.DESCRIPTOR, message.pooling),
        padding=choice_name(options_pb2.Padding.DESCRIPTOR, message.padding),
        sizes_px=tuple(message.sizes_px),
        layers=tuple(message.layers),
        images=tuple(_style_image(image) for image in message.images),
    )


def _style_image(message: style_service_pb2.StyleImage) -> StyleImage:
    weight = message.weight if message.HasField("weight") else None
    return StyleImage(sha256=message.sha256, width=message.width, height=message.height, weight=weight)


def _default(message: options_pb2.OptionDescription, kind: OptionType) -> OptionValue | None:
    if not message.HasField("default_value"):
        return None
    from google.protobuf import json_format  # noqa: PLC0415 - only this needs it

    value: OptionValue = json_format.MessageToDict(message.default_value)
    if isinstance(value, Mapping):
        return dict(sorted(value.items()))
    # google.protobuf.Value knows one kind of number, the double.
    if kind is OptionType.INTEGERS and isinstance(value, list):
        return [int(entry) for entry in value]
    return int(value) if kind is OptionType.INTEGER and isinstance(value, float) else value
