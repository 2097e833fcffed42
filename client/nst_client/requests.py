"""What a caller says, made into the messages of the contract. No network here."""

from __future__ import annotations

import numbers
import os
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, TypeAlias

from google.protobuf.descriptor import EnumDescriptor

from nst.v1 import image_pb2, job_pb2, model_service_pb2, options_pb2, style_service_pb2, style_transfer_service_pb2
from nst_client.errors import InvalidArgumentError
from nst_client.files import read_file
from nst_client.images import read_image
from nst_client.options import choice_number, options_message
from nst_client.resources import (
    AnyImage,
    Encoding,
    ExportedFile,
    ImageName,
    Job,
    JobResult,
    JobState,
    Model,
    Preview,
    StoredImage,
    Style,
    StyleInput,
    StyleName,
    StyleSource,
    Weighted,
)

AnyStyle: TypeAlias = "StyleSource | Weighted[StyleSource] | StyleInput"
"""A style alone, with its weight, or with its weight and regions."""

Styles: TypeAlias = "AnyStyle | Iterable[AnyStyle]"
"""One style or several."""

StyleImages: TypeAlias = "AnyImage | Weighted[AnyImage] | Iterable[AnyImage | Weighted[AnyImage]]"
"""One image or several, each with or without a weight."""

StyleFileSource: TypeAlias = "str | os.PathLike[str] | bytes | ExportedFile"
"""A style file brought along: its path, its bytes, or what `export_style` returned."""

IMAGE_FORMAT = image_pb2.DESCRIPTOR.enum_types_by_name["ImageFormat"]

STEERABLE = frozenset(
    {
        "content_weight",
        "style_weight",
        "tv_weight",
        "laplacian_weight",
        "content_layers",
        "style_layers",
        "iterations",
        "scale_iterations",
    }
)
"""The options that a job may be given anew; see the contract's UpdateJobRequest."""

MAX_REQUEST_BYTES = 24 << 20
"""Images that would make a request larger are uploaded before it: servers take 32 MiB unless set otherwise."""


def stylize_request(
    content: AnyImage,
    styles: Styles,
    *,
    init_image: AnyImage | None,
    model: str | None,
    preview: Preview | None,
    output: Encoding | str | None,
    request_id: str | None,
    options: Mapping[str, object],
) -> style_transfer_service_pb2.StylizeRequest:
    """Return the request of Stylize, for a job that outlives its stream; without a `request_id` it gets a new one.

    Raises InvalidArgumentError and its kind, before anything is sent.
    """
    # The options first: a misspelt name should not wait for a large file to be read.
    return style_transfer_service_pb2.StylizeRequest(
        options=options_message(options),
        preview=preview_message(preview),
        request_id=new_request_id() if request_id is None else request_id,
        cancel_on_disconnect=False,
        output=None if output is None else _encoding(output, field="output"),
        model=model,
        styles=[_style_input(style, field=f"styles[{index}]") for index, style in enumerate(_listed(styles))],
        content=_image(content, field="content"),
        init_image=_optional_image(init_image, field="init_image"),
    )


def new_request_id() -> str:
    """Return a name for a request that no other has: 128 bits by chance, as 32 hexadecimal digits."""
    return os.urandom(16).hex()


def images_to_upload(request: style_transfer_service_pb2.StylizeRequest) -> Iterator[tuple[str, image_pb2.Image]]:
    """Yield the images that are to be replaced by names, each with its field, until the request is small enough.

    The largest come first.
    """
    images = [("content", request.content), ("init_image", request.init_image)]
    for index, style in enumerate(request.styles):
        field = f"styles[{index}]"
        images += [
            (field, style.image),
            (f"{field}.region", style.region),
            (f"{field}.style_region", style.style_region),
        ]
    for field, image in sorted(images, key=lambda entry: len(entry[1].data), reverse=True):
        if request.ByteSize() <= MAX_REQUEST_BYTES:
            return
        yield field, image


def watch_request(
    job: str | Job, *, after_sequence: int, preview: Preview | None
) -> style_transfer_service_pb2.WatchJobRequest:
    """Return the request of WatchJob. Raises InvalidArgumentError."""
    if isinstance(after_sequence, bool) or not isinstance(after_sequence, int) or not 0 <= after_sequence < 2**63:
        raise InvalidArgumentError(
            f"after_sequence must be a whole number, 0 at least, not {after_sequence!r}", field="after_sequence"
        )
    return style_transfer_service_pb2.WatchJobRequest(
        name=job_name(job), after_sequence=after_sequence, preview=preview_message(preview)
    )


def update_request(
    job: str | Job, *, paused: bool | None, finish: bool, options: Mapping[str, object]
) -> style_transfer_service_pb2.UpdateJobRequest:
    """Return the request of UpdateJob. Raises InvalidArgumentError and its kind."""
    changes = options_message(options)
    return style_transfer_service_pb2.UpdateJobRequest(
        name=job_name(job),
        options=changes if options else None,
        paused=paused,  # type: ignore[arg-type]
        finish=finish,
    )


def list_jobs_request(states: Iterable[JobState | str]) -> style_transfer_service_pb2.ListJobsRequest:
    """Return the request of ListJobs' first page. Raises InvalidArgumentError."""
    # A single state could be iterated too, letter by letter.
    chosen = [states] if isinstance(states, str) else list(states)
    chosen_numbers: Any = [
        choice_number(job_pb2.JobState.DESCRIPTOR, state, field=f"states[{index}]")
        for index, state in enumerate(chosen)
    ]
    return style_transfer_service_pb2.ListJobsRequest(states=chosen_numbers)


def job_name(job: str | Job) -> str:
    """Return the name to send for a job: with `jobs/`, whether or not a string has it."""
    return job.name if isinstance(job, Job) else f"jobs/{job.removeprefix('jobs/')}"


def image_name(image: object) -> str | None:
    """Return the name of an image on the server; None for one that is brought along."""
    match image:
        case ImageName() | StoredImage():
            return image.name
        case JobResult():
            return image.image
    return None


def stored_image_name(image: str | AnyImage) -> str:
    """Return the name to send for an image on the server; a plain string is a name here.

    Raises InvalidArgumentError for an image that is not on it.
    """
    name = image if isinstance(image, str) else image_name(image)
    if name is None:
        kind = type(image).__name__
        raise InvalidArgumentError(f"image must be the name of an image on the server, not {kind}", field="image")
    return name


def create_style_request(
    images: StyleImages, *, style_id: str | None, display_name: str
) -> style_service_pb2.CreateStyleRequest:
    """Return the request of CreateStyle. Raises ImageNotReadableError and InvalidArgumentError."""
    entries = [_style_image(image, field=f"style.images[{index}]") for index, image in enumerate(_listed(images))]
    return style_service_pb2.CreateStyleRequest(
        style_id=style_id, style=style_service_pb2.Style(display_name=display_name, images=entries)
    )


def export_style_request(
    style: str | StyleName | Style, *, model: str | None, options: Mapping[str, object]
) -> style_service_pb2.ExportStyleRequest:
    """Return the request of ExportStyle. Raises InvalidArgumentError and its kind."""
    return style_service_pb2.ExportStyleRequest(
        name=style_name(style), model=model, options=options_message(options) if options else None
    )


def import_style_request(
    source: StyleFileSource, *, style_id: str | None, display_name: str
) -> style_service_pb2.ImportStyleRequest:
    """Return the request of ImportStyle. Raises InvalidArgumentError."""
    if isinstance(source, ExportedFile):
        data = source.data
    elif isinstance(source, bytes | bytearray | memoryview):
        data = bytes(source)
    elif isinstance(source, str | os.PathLike):
        data = read_file(source, field="source")
    else:
        kind = type(source).__name__
        raise InvalidArgumentError(f"source must be the path of a style file or its bytes, not {kind}", field="source")
    return style_service_pb2.ImportStyleRequest(style_id=style_id, display_name=display_name, data=data)


def export_model_request(
    model: str | Model | None,
    *,
    graph: str | None,
    format: str | None,
    precision: str | None,
    layers: Iterable[str],
    content_layers: Iterable[str],
    style_layers: Iterable[str],
    pooling: str | None,
    padding: str | None,
) -> model_service_pb2.ExportModelRequest:
    """Return the request of ExportModel. Raises InvalidArgumentError."""
    return model_service_pb2.ExportModelRequest(
        model=model.name if isinstance(model, Model) else model,
        graph=_choice(model_service_pb2.ExportGraph.DESCRIPTOR, graph, field="graph"),
        format=_choice(model_service_pb2.ExportFormat.DESCRIPTOR, format, field="format"),
        precision=_choice(model_service_pb2.ExportPrecision.DESCRIPTOR, precision, field="precision"),
        layers=_texts(layers, field="layers"),
        content_layers=_texts(content_layers, field="content_layers"),
        style_layers=_texts(style_layers, field="style_layers"),
        pooling=_choice(options_pb2.Pooling.DESCRIPTOR, pooling, field="pooling"),
        padding=_choice(options_pb2.Padding.DESCRIPTOR, padding, field="padding"),
    )


def style_name(style: str | StyleName | Style) -> str:
    """Return the name to send for a stored style; a plain string is a name here."""
    return style if isinstance(style, str) else style.name


def _listed(sources: Any) -> list[Any]:
    # A string, bytes or an image could be iterated too, and is one source all the same.
    several = isinstance(sources, Iterable) and not isinstance(
        sources, str | bytes | bytearray | memoryview | os.PathLike
    )
    return list(sources) if several else [sources]


def _weight(weight: object, *, field: str) -> float | None:
    if weight is None:
        return None
    if isinstance(weight, bool) or not isinstance(weight, numbers.Real):
        raise InvalidArgumentError(f"{field}: the weight must be a number, not {weight!r}", field=f"{field}.weight")
    return float(weight)


def _image(source: Any, *, field: str) -> image_pb2.Image:
    if (name := image_name(source)) is not None:
        return image_pb2.Image(name=name)
    return image_pb2.Image(data=read_image(source, field=field))


def _optional_image(source: AnyImage | None, *, field: str) -> image_pb2.Image | None:
    return None if source is None else _image(source, field=field)


def _style_input(given: AnyStyle, *, field: str) -> style_transfer_service_pb2.StyleInput:
    style = _with_all_fields(given)
    message = style_transfer_service_pb2.StyleInput(
        weight=_weight(style.weight, field=field),
        region=_optional_image(style.region, field=f"{field}.region"),
        style_region=_optional_image(style.style_region, field=f"{field}.style_region"),
    )
    if isinstance(style.source, StyleName | Style):
        message.style = style.source.name
    else:
        message.image.CopyFrom(_image(style.source, field=field))
    return message


def _with_all_fields(style: AnyStyle) -> StyleInput:
    match style:
        case StyleInput():
            return style
        case Weighted():
            return StyleInput(style.source, weight=style.weight)
    return StyleInput(style)


def _style_image(given: AnyImage | Weighted[AnyImage], *, field: str) -> style_service_pb2.StyleImage:
    source, weight = (given.source, given.weight) if isinstance(given, Weighted) else (given, None)
    return style_service_pb2.StyleImage(image=_image(source, field=field), weight=_weight(weight, field=field))


def preview_message(preview: Preview | None) -> style_transfer_service_pb2.Preview | None:
    """Return the message for which frames are wanted. Raises InvalidArgumentError."""
    if preview is None:
        return None
    encoding = None if preview.encoding is None else _encoding(preview.encoding, field="preview.encoding")
    return style_transfer_service_pb2.Preview(
        interval=_whole(preview.interval, field="preview.interval"),
        size_px=_whole(preview.size_px, field="preview.size_px"),
        encoding=encoding,
        every_frame=preview.every_frame,
    )


def _encoding(encoding: Encoding | str, *, field: str) -> image_pb2.Encoding:
    if isinstance(encoding, str):
        encoding = Encoding(format=encoding)
    number = None
    if encoding.format is not None:
        number = choice_number(IMAGE_FORMAT, encoding.format, field=f"{field}.format")
    quality = _whole(encoding.quality, field=f"{field}.quality")
    bit_depth = _whole(encoding.bit_depth, field=f"{field}.bit_depth")
    return image_pb2.Encoding(format=number, quality=quality, bit_depth=bit_depth)  # type: ignore[arg-type]


def _choice(enum: EnumDescriptor, value: str | None, *, field: str) -> Any:
    return None if value is None else choice_number(enum, value, field=field)


def _texts(values: Iterable[str], *, field: str) -> list[str]:
    # A single name could be iterated too, letter by letter.
    listed = [values] if isinstance(values, str) else list(values)
    for value in listed:
        if not isinstance(value, str):
            raise InvalidArgumentError(f"{field} must be a list of names, not of {value!r}", field=field)
    return listed


def _whole(value: object, *, field: str) -> int | None:
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int) or not -(2**31) <= value < 2**31:
        raise InvalidArgumentError(f"{field} must be a whole number of 32 bits, not {value!r}", field=field)
    return value
