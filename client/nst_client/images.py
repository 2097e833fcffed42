"""Images: what a caller may bring, and the pictures that come back. PIL is imported only when pixels are needed."""

from __future__ import annotations

import io
import os
import sys
from dataclasses import dataclass, field
from enum import StrEnum
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias, TypeGuard

from nst_client.errors import ImageNotReadableError, InvalidArgumentError
from nst_client.files import read_file, write_whole

if TYPE_CHECKING:
    from PIL import Image

ImageSource: TypeAlias = "str | os.PathLike[str] | bytes | Image.Image | Picture"
"""An image brought along: the path of a file, the bytes of a file, a PIL image, or a picture from a server."""

DESCRIPTION = 0x010E
"""The EXIF field ImageDescription, in which a result carries the parameters of its making."""

DESCRIPTIVE_FIELDS = (DESCRIPTION, 0x0131, 0x0132, 0x013B, 0x8298)
"""EXIF fields that stay true when a picture is encoded again: besides, Software, DateTime, Artist and Copyright."""


class ImageFormat(StrEnum):
    """A file format in which the server encodes pictures."""

    UNKNOWN = "unknown"
    """A format that is newer than this client."""
    JPEG = "jpeg"
    PNG = "png"
    WEBP = "webp"
    TIFF = "tiff"


FORMAT_OF_SUFFIX = {
    ".jpg": ImageFormat.JPEG,
    ".jpeg": ImageFormat.JPEG,
    ".png": ImageFormat.PNG,
    ".webp": ImageFormat.WEBP,
    ".tif": ImageFormat.TIFF,
    ".tiff": ImageFormat.TIFF,
}

RE_ENCODING: dict[ImageFormat, dict[str, object]] = {
    ImageFormat.JPEG: {"quality": 95, "subsampling": "4:4:4"},
    ImageFormat.PNG: {},
    ImageFormat.WEBP: {"quality": 95},
    ImageFormat.TIFF: {"compression": "tiff_deflate"},
}
"""What Pillow is told for each format."""


@dataclass(frozen=True, kw_only=True)
class Picture:
    """An encoded picture from the server, whole and checked against its SHA-256."""

    data: bytes = field(repr=False)
    """The bytes of an image file."""
    format: ImageFormat
    """The file's format."""
    width: int
    """Pixels."""
    height: int
    """Pixels."""

    @cached_property
    def image(self) -> Image.Image:
        """The picture as a PIL image, RGB or RGBA of 8 bits a channel; decoded at the first use."""
        from PIL import Image  # noqa: PLC0415 - costs more to import than this whole package

        image = Image.open(io.BytesIO(self.data))
        image.load()
        return image

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write the picture to a file, in one step, and return the path.

        The bytes are written as they came, unless the suffix names another format (`.png`, `.jpg`, `.jpeg`,
        `.webp`, `.tif`, `.tiff`): then the picture is encoded again, with 8 bits a channel, at quality 95 if that
        format is lossy. Colour profile and parameters stay, and so does transparency; only JPEG knows none, and
        transparent parts are laid over white.

        Raises InvalidArgumentError for any other suffix, and OSError if the file cannot be written.
        """
        wanted = format_of_path(path)
        return write_whole(path, self.data if wanted is self.format else self._encoded_as(wanted))

    def _encoded_as(self, wanted: ImageFormat) -> bytes:
        from PIL import Image  # noqa: PLC0415 - costs more to import than this whole package

        settings = dict(RE_ENCODING[wanted])
        described = self.image.getexif()
        exif = Image.Exif()
        exif.update({field: described[field] for field in DESCRIPTIVE_FIELDS if field in described})
        if exif:
            settings["exif"] = exif
        if "icc_profile" in self.image.info:
            settings["icc_profile"] = self.image.info["icc_profile"]
        opaque = wanted is ImageFormat.JPEG or not self.image.has_transparency_data
        buffer = io.BytesIO()
        image = over_white(self.image) if opaque else self.image.convert("RGBA")
        image.save(buffer, wanted.upper(), **settings)
        return buffer.getvalue()


def over_white(image: Image.Image) -> Image.Image:
    """Return the image in RGB, its transparent parts laid over white."""
    from PIL import Image  # noqa: PLC0415 - costs more to import than this whole package

    if not image.has_transparency_data:
        return image.convert("RGB")
    layer = image.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", layer.size, "white"), layer).convert("RGB")


def format_of_path(path: str | os.PathLike[str]) -> ImageFormat:
    """Return the format that a file's name stands for; raise InvalidArgumentError if it stands for none."""
    suffix = Path(path).suffix.lower()
    if suffix not in FORMAT_OF_SUFFIX:
        known = ", ".join(FORMAT_OF_SUFFIX)
        raise InvalidArgumentError(f"the file name {os.fspath(path)!r} must end in one of {known}")
    return FORMAT_OF_SUFFIX[suffix]


def read_image(source: object, *, field: str) -> bytes:
    """Return the bytes of an image file; `field` is the request's field that an error names.

    Files and bytes go as they are: the server decodes them and says what is wrong with them. A PIL image becomes
    a PNG, turned as its EXIF orientation says. Raises ImageNotReadableError, and InvalidArgumentError for anything
    that is no image source.
    """
    if isinstance(source, bytes | bytearray | memoryview):
        return bytes(source)
    if isinstance(source, str | os.PathLike):
        return read_file(source, field=field, kind=ImageNotReadableError)
    if isinstance(source, Picture):
        return source.data
    if is_pil_image(source):
        return _png_of(source, field=field)
    kind = type(source).__name__
    raise InvalidArgumentError(f"{field} must be a path, the bytes of a file or a PIL image, not {kind}", field=field)


def is_pil_image(source: object) -> TypeGuard[Image.Image]:
    """Whether the source is a PIL image."""
    # A caller who holds a PIL image has imported PIL; nobody else has to.
    module = sys.modules.get("PIL.Image")
    return module is not None and isinstance(source, module.Image)


def _png_of(image: Image.Image, *, field: str) -> bytes:
    from PIL import ImageOps  # noqa: PLC0415 - the caller has imported PIL, this package has not

    upright = ImageOps.exif_transpose(image)
    if upright.mode == "F":
        raise InvalidArgumentError(f"{field} has floating-point pixels, whose range is unknown", field=field)
    if upright.mode == "I":
        upright = upright.convert("I;16")
    elif upright.mode not in {"1", "L", "LA", "P", "RGB", "RGBA", "I;16"}:
        upright = upright.convert("RGBA" if upright.has_transparency_data else "RGB")
    buffer = io.BytesIO()
    # Level 1: the file lives for one call, so time counts more than size.
    upright.save(buffer, "PNG", compress_level=1)
    return buffer.getvalue()
