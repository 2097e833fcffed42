"""Image files in and out, by Pillow: what the outside sends is decoded here, and nowhere else.

Pixels are HWC uint8 in [0, 255], RGB.
"""

from __future__ import annotations

import hashlib
import io
import warnings
from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from nst_server.errors import InvalidField

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Pixels = NDArray[np.uint8]

READABLE = ("JPEG", "PNG", "WEBP", "TIFF", "BMP")
MIN_EDGE_PX = 16
MAX_EDGE_PX = 20_000

Image.MAX_IMAGE_PIXELS = None  # our own bound names the field and is checked before anything is decoded


class ImageFormat(StrEnum):
    """A file format that pictures are encoded in; the values are Pillow's names."""

    JPEG = "JPEG"
    PNG = "PNG"
    WEBP = "WEBP"


@dataclass(frozen=True)
class Encoding:
    """How a picture is encoded. `quality`, 1 to 100, does not matter to PNG."""

    format: ImageFormat
    quality: int


@dataclass(frozen=True)
class EncodedImage:
    """An image file."""

    data: bytes
    format: ImageFormat
    width: int
    height: int

    @property
    def sha256(self) -> str:
        """SHA-256 of the file, 64 lowercase hexadecimal digits."""
        return hashlib.sha256(self.data).hexdigest()


def decode(data: bytes, field: str, max_pixels: int) -> Image.Image:
    """Return the RGB picture in an image file, upright, transparent parts over white.

    Raises InvalidField, naming `field`, if it is empty, of another format, broken, too small, or larger than
    `max_pixels`; the last is found out before anything is decoded.
    """
    if not data:
        raise InvalidField(field, "is empty; it must be the bytes of an image file")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow warns of harmless oddities in files that are not ours
            picture = Image.open(io.BytesIO(data), formats=READABLE)
            _check_size(*picture.size, field, max_pixels)
            picture.load()
            return _rgb(_upright(picture), field)
    except InvalidField:
        raise
    except UnidentifiedImageError:
        raise InvalidField(field, f"is no image that can be read; readable are {', '.join(READABLE)}") from None
    except Exception as error:  # decoders raise whatever the file makes them stumble over
        raise InvalidField(field, f"is a broken image file: {error}") from None


def fit(picture: Image.Image, longer_edge_px: int, field: str) -> Pixels:
    """Return a picture's pixels, scaled to `longer_edge_px` on the longer edge. Raises InvalidField if too thin."""
    scale = longer_edge_px / max(picture.size)
    width, height = (max(1, round(edge * scale)) for edge in picture.size)
    if min(width, height) < MIN_EDGE_PX:
        raise InvalidField(
            field,
            f"is {picture.width}×{picture.height} px, too thin: scaled to {longer_edge_px} px it would be "
            f"{width}×{height} px, and each edge needs at least {MIN_EDGE_PX} px",
        )
    return np.asarray(picture.resize((width, height), Image.Resampling.LANCZOS))


def preview_size(width: int, height: int, longer_edge_px: int) -> tuple[int, int]:
    """Return the width and height of a preview, pixels: at most `longer_edge_px` on the longer edge."""
    scale = min(1.0, longer_edge_px / max(width, height))
    return max(1, round(width * scale)), max(1, round(height * scale))


def encode(pixels: Pixels, encoding: Encoding, size: tuple[int, int] | None = None) -> EncodedImage:
    """Return pixels as an image file, scaled to `size` (width, height) if given."""
    picture = Image.fromarray(pixels)
    if size is not None and size != picture.size:
        much_smaller = 2 * size[0] <= picture.width
        picture = picture.resize(size, Image.Resampling.BOX if much_smaller else Image.Resampling.BICUBIC)
    buffer = io.BytesIO()
    match encoding.format:
        case ImageFormat.JPEG:
            picture.save(buffer, "JPEG", quality=encoding.quality, subsampling=0)
        case ImageFormat.PNG:
            picture.save(buffer, "PNG", compress_level=4)
        case ImageFormat.WEBP:
            picture.save(buffer, "WEBP", quality=encoding.quality, method=2)
    return EncodedImage(buffer.getvalue(), encoding.format, *picture.size)


def _check_size(width: int, height: int, field: str, max_pixels: int) -> None:
    if width * height > max_pixels:
        raise InvalidField(field, f"has {width}×{height} px; at most {max_pixels / 1e6:g} megapixels are accepted")
    if max(width, height) > MAX_EDGE_PX:
        raise InvalidField(field, f"has {width}×{height} px; each edge may have at most {MAX_EDGE_PX} px")
    if min(width, height) < MIN_EDGE_PX:
        raise InvalidField(field, f"has {width}×{height} px; each edge must have at least {MIN_EDGE_PX} px")


def _upright(picture: Image.Image) -> Image.Image:
    try:
        return ImageOps.exif_transpose(picture)
    except Exception:  # broken metadata, of whatever kind, around a picture that is whole
        return picture


def _rgb(picture: Image.Image, field: str) -> Image.Image:
    if picture.mode.startswith("I;16") or picture.mode == "I":
        # Pillow's own conversion clips 16-bit grey at 255 in place of scaling it.
        deep, transparent = np.asarray(picture), picture.info.get("transparency")
        picture = Image.fromarray((deep / 257.0).clip(0, 255).round().astype(np.uint8))
        if transparent is not None:
            picture.putalpha(Image.fromarray(np.where(deep == transparent, 0, 255).astype(np.uint8)))
    if picture.mode == "F":
        raise InvalidField(
            field, "has floating-point pixels, whose range is unknown; save it with 8 or 16 bits a channel"
        )
    if picture.has_transparency_data:
        rgba = picture.convert("RGBA")
        white = Image.new("RGBA", rgba.size, "white")
        return Image.alpha_composite(white, rgba).convert("RGB")
    return picture.convert("RGB")
