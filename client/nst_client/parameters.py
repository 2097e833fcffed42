"""The parameters of a picture's making, which every result carries: JSON in its EXIF field ImageDescription."""

from __future__ import annotations

import io
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from nst_client.errors import ImageNotReadableError, InvalidArgumentError
from nst_client.images import DESCRIPTION, ImageSource, is_pil_image, read_image
from nst_client.options import OPTIONS, options_message
from nst_client.resources import OptionValue, StopReason


@dataclass(frozen=True, kw_only=True)
class StyleRecord:
    """A style as it was when a picture was made."""

    name: str | None
    """Resource name, `styles/{style}`; None for an image that was brought along."""
    sha256: tuple[str, ...]
    """SHA-256 of each of its image files, 64 lowercase hexadecimal digits."""
    weight: float
    """Share relative to the other styles'."""
    region_sha256: str | None
    """SHA-256 of the mask's file; None without a region."""
    style_region_sha256: str | None
    """SHA-256 of the mask's file; None if all of the style image was used."""


@dataclass(frozen=True, kw_only=True)
class Parameters:
    """How a picture was made: `stylize(photo, styles, model=made.model, **made.options)` makes it again.

    Given the same images, with the same masks and the same picture to start from.
    """

    version: str
    """Version of the server that made it."""
    model: str
    """Name of the feature model."""
    model_sha256: str
    """SHA-256 of the file that the model's weights were published in."""
    options: Mapping[str, OptionValue] = field(hash=False)
    """Every option, by the name of its keyword argument."""
    content_sha256: str
    """SHA-256 of the photograph's file."""
    styles: tuple[StyleRecord, ...]
    init_image_sha256: str | None
    """SHA-256 of the file of the picture it started from; None if it started from none."""
    loss: float
    """The objective at this picture; NaN if it was not a number."""
    iteration: int
    """The iteration whose picture this is."""
    stop_reason: StopReason
    """Why the optimization ended there."""


def read_parameters(source: ImageSource) -> Parameters:
    """Return how a picture was made: a result in PNG, JPEG, WebP or TIFF, as path, bytes or PIL image.

    Raises ImageNotReadableError if it is no image file, and InvalidArgumentError if it carries no parameters, or
    those of a newer version, which this client does not understand.
    """
    name = repr(os.fspath(source)) if isinstance(source, str | os.PathLike) else "the picture"
    recorded = _recorded(_description(source, name=name), name=name)
    try:
        parameters = _parameters(recorded)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise InvalidArgumentError(f"the parameters in {name} are damaged: {error!r}") from error
    _check_options(parameters, name=name)
    return parameters


def _description(source: ImageSource, *, name: str) -> object:
    from PIL import Image  # noqa: PLC0415 - costs more to import than this whole package

    if is_pil_image(source):
        return source.getexif().get(DESCRIPTION)
    data = read_image(source, field="picture")
    try:
        with Image.open(io.BytesIO(data)) as image:
            return image.getexif().get(DESCRIPTION)
    except Exception as error:  # PIL raises a dozen kinds for a file that is damaged.
        raise ImageNotReadableError(f"{name} is not an image file that can be read: {error}") from error


def _recorded(description: object, *, name: str) -> dict[str, Any]:
    try:
        recorded = json.loads(description) if isinstance(description, str) else None
    except ValueError:
        recorded = None
    if not isinstance(recorded, dict) or "nst" not in recorded:
        raise InvalidArgumentError(
            f"{name} carries no parameters of nst: it was made by something else, or a program has removed them"
        )
    return recorded


def _parameters(recorded: Mapping[str, Any]) -> Parameters:
    reason = recorded["stop_reason"]
    return Parameters(
        version=str(recorded["nst"]),
        model=str(recorded["model"]),
        model_sha256=str(recorded["model_sha256"]),
        options=dict(recorded["options"]),
        content_sha256=str(recorded["content_sha256"]),
        styles=tuple(_style(style) for style in recorded["styles"]),
        init_image_sha256=recorded.get("init_image_sha256"),
        # JSON has no word for what is not a number.
        loss=float("nan") if recorded["loss"] is None else float(recorded["loss"]),
        iteration=int(recorded["iteration"]),
        stop_reason=StopReason(reason) if reason in set(StopReason) else StopReason.UNKNOWN,
    )


def _style(recorded: Mapping[str, Any]) -> StyleRecord:
    return StyleRecord(
        name=recorded.get("name"),
        sha256=tuple(recorded["sha256"]),
        weight=float(recorded["weight"]),
        region_sha256=recorded.get("region_sha256"),
        style_region_sha256=recorded.get("style_region_sha256"),
    )


def _check_options(parameters: Parameters, *, name: str) -> None:
    newer = f"{name} is from a newer version, nst {parameters.version}"
    unknown = sorted(set(parameters.options) - set(OPTIONS.fields_by_name))
    if unknown:
        raise InvalidArgumentError(f"{newer}: this client does not know its options {', '.join(unknown)}")
    try:
        options_message(parameters.options)
    except InvalidArgumentError as error:
        raise InvalidArgumentError(f"{newer}: {error}", field=error.field) from error
