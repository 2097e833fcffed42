"""What a caller says, made into the messages of the contract. No network here."""

from __future__ import annotations

import numbers
import os
from collections.abc import Iterable, Mapping
from typing import Any, TypeAlias

from nst.v1 import image_pb2, style_service_pb2, style_transfer_service_pb2
from nst_client.errors import InvalidArgumentError
from nst_client.images import ImageSource, read_image
from nst_client.options import choice_number, options_message
from nst_client.resources import Encoding, Preview, Style, StyleInput, StyleName, StyleSource, Weighted

AnyStyle: TypeAlias = "StyleSource | Weighted[StyleSource] | StyleInput"
"""A style alone, with its weight, or with its weight and regions."""

Styles: TypeAlias = "AnyStyle | Iterable[AnyStyle]"
"""One style or several."""

StyleImages: TypeAlias = "ImageSource | Weighted[ImageSource] | Iterable[ImageSource | Weighted[ImageSource]]"
"""One image or several, each with or without a weight."""

IMAGE_FORMAT = image_pb2.DESCRIPTOR.enum_types_by_name["ImageFormat"]


def stylize_request(
    content: ImageSource,
    styles: Styles,
    *,
    init_image: ImageSource | None,
    model: str | None,
    preview: Preview | None,
    output: Encoding | str | None,
    options: Mapping[str, object],
) -> style_transfer_service_pb2.StylizeRequest:
    """Return the request of Stylize. Raises InvalidArgumentError and its kind, before anything is sent."""
    # The options first: a misspelt name should not wait for a large file to be read.
    return style_transfer_service_pb2.StylizeRequest(
        options=options_message(options),
        preview=None if preview is None else _preview(preview),
        output=None if output is None else _encoding(output, field="output"),
        model=model,
        styles=[_style_input(style, field=f"styles[{index}]") for index, style in enumerate(_listed(styles))],
        content=_image(content, field="content"),
        init_image=_optional_image(init_image, field="init_image"),
    )


def create_style_request(
    images: StyleImages, *, style_id: str | None, display_name: str
) -> style_service_pb2.CreateStyleRequest:
    """Return the request of CreateStyle. Raises ImageNotReadableError and InvalidArgumentError."""
    entries = [_style_image(image, field=f"style.images[{index}]") for index, image in enumerate(_listed(images))]
    return style_service_pb2.CreateStyleRequest(
        style_id=style_id, style=style_service_pb2.Style(display_name=display_name, images=entries)
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


def _image(source: ImageSource, *, field: str) -> image_pb2.Image:
    return image_pb2.Image(data=read_image(source, field=field))


def _optional_image(source: ImageSource | None, *, field: str) -> image_pb2.Image | None:
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
        message.image.data = read_image(style.source, field=field)
    return message


def _with_all_fields(style: AnyStyle) -> StyleInput:
    match style:
        case StyleInput():
            return style
        case Weighted():
            return StyleInput(style.source, weight=style.weight)
    return StyleInput(style)


def _style_image(given: ImageSource | Weighted[ImageSource], *, field: str) -> style_service_pb2.StyleImage:
    source, weight = (given.source, given.weight) if isinstance(given, Weighted) else (given, None)
    return style_service_pb2.StyleImage(image=_image(source, field=field), weight=_weight(weight, field=field))


def _preview(preview: Preview) -> style_transfer_service_pb2.Preview:
    encoding = None if preview.encoding is None else _encoding(preview.encoding, field="preview.encoding")
    return style_transfer_service_pb2.Preview(
        interval=_whole(preview.interval, field="preview.interval"),
        size_px=_whole(preview.size_px, field="preview.size_px"),
        encoding=encoding,
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


def _whole(value: object, *, field: str) -> int | None:
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int) or not -(2**31) <= value < 2**31:
        raise InvalidArgumentError(f"{field} must be a whole number of 32 bits, not {value!r}", field=field)
    return value
