"""Image files in and out, by Pillow: what the outside sends is decoded here, and nowhere else.

Pixels are HWC uint8 in [0, 255], sRGB.
"""

from __future__ import annotations

import functools
import hashlib
import importlib.metadata
import io
import json
import struct
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image, ImageCms, ImageOps, UnidentifiedImageError

from nst_server import deep_images
from nst_server.errors import InvalidField

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from nst_server.deep_images import DeepPixels

    Pixels = NDArray[np.uint8]
    Mask = NDArray[np.uint8]  # HW, 255 where it is opaque

READABLE = ("JPEG", "PNG", "WEBP", "TIFF", "BMP")
MIN_EDGE_PX = 16
MAX_EDGE_PX = 20_000
SPREAD_PX = 1024
"""Longer edge, at most, at which colours are spread into what is transparent."""

IMAGE_DESCRIPTION, SOFTWARE, PREDICTOR = 0x010E, 0x0131, 0x013D
"""Tags of EXIF and TIFF."""

Image.MAX_IMAGE_PIXELS = None  # our own bound names the field and is checked before anything is decoded


class ImageFormat(StrEnum):
    """A file format that pictures are encoded in; the values are Pillow's names."""

    JPEG = "JPEG"
    PNG = "PNG"
    WEBP = "WEBP"
    TIFF = "TIFF"


@dataclass(frozen=True)
class Encoding:
    """How a picture is encoded. `quality`, 1 to 100, does not matter to PNG and TIFF, which alone may have 16 bits."""

    format: ImageFormat
    quality: int
    bit_depth: int = 8


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


@dataclass(frozen=True)
class Kind:
    """What an image file says of itself; width and height in pixels, upright."""

    width: int
    height: int
    media_type: str


def kind_of(data: bytes) -> Kind:
    """Return what an image file that has been decoded before says of itself."""
    with Image.open(io.BytesIO(data), formats=READABLE) as picture:
        width, height = ImageOps.exif_transpose(picture).size if picture.getexif().get(0x0112, 1) > 4 else picture.size
        return Kind(width, height, Image.MIME[picture.format or ""])


def decode(data: bytes, field: str, max_pixels: int) -> Image.Image:
    """Return the RGB picture in an image file, transparent parts over white; otherwise as `decode_with_alpha`."""
    picture = decode_with_alpha(data, field, max_pixels)
    return _over_white(picture) if picture.mode == "RGBA" else picture


def decode_with_alpha(data: bytes, field: str, max_pixels: int) -> Image.Image:
    """Return the picture in an image file, upright, in sRGB: RGB, or RGBA if anything in it is transparent.

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
            return _srgb(_upright(picture), field)
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


def stretch(picture: Image.Image, size: tuple[int, int]) -> Pixels:
    """Return a picture's RGB pixels, scaled to a width and height; what is transparent is filled."""
    picture = _filled(picture) if picture.mode == "RGBA" else picture
    return np.asarray(picture.resize(size, Image.Resampling.LANCZOS))


def mask(picture: Image.Image, size: tuple[int, int], field: str) -> Mask:
    """Return a mask's luminance, scaled to a width and height.

    Raises InvalidField unless it has their proportions, to within a pixel of the smaller of the two, and is not black.
    """
    across, down = (wanted / own for wanted, own in zip(size, picture.size, strict=True))
    if abs(across / down - 1) > 1.5 * max(1 / min(size), 1 / min(picture.size)):
        raise InvalidField(
            field,
            f"is {picture.width}×{picture.height} px; it must have the proportions of {size[0]}×{size[1]}",
        )
    found = np.asarray(picture.convert("L").resize(size, Image.Resampling.BOX))
    if not found.any():
        raise InvalidField(field, "is black everywhere, so it selects nothing")
    return found


def fit_with_alpha(picture: Image.Image, longer_edge_px: int, field: str) -> tuple[Pixels, Mask | None]:
    """Return as `fit` the RGB pixels of a picture and, if it is RGBA, its alpha.

    What is transparent takes on the colours around it: those that a file stores there are nobody's intention, and
    white would be a fringe around whatever was cut out.
    """
    if picture.mode == "RGB":
        return fit(picture, longer_edge_px, field), None
    alpha = picture.getchannel("A")
    return fit(_filled(picture), longer_edge_px, field), fit(alpha, longer_edge_px, field)


def preview_size(width: int, height: int, longer_edge_px: int) -> tuple[int, int]:
    """Return the width and height of a preview, pixels: at most `longer_edge_px` on the longer edge."""
    scale = min(1.0, longer_edge_px / max(width, height))
    return max(1, round(width * scale)), max(1, round(height * scale))


def encode(
    pixels: Pixels | DeepPixels,
    encoding: Encoding,
    size: tuple[int, int] | None = None,
    *,
    alpha: Mask | None = None,
    parameters: Mapping[str, Any] | None = None,
) -> EncodedImage:
    """Return pixels as an image file with an sRGB profile.

    Args:
        pixels: RGB, of the encoding's bit depth.
        encoding: format, quality and bit depth.
        size: width and height to scale to, for 8 bits only.
        alpha: of any size; JPEG, which has none, is laid over white.
        parameters: of the picture's making, ready for JSON, to be embedded as EXIF data.
    """
    tags = {} if parameters is None else _tags(parameters)
    if encoding.bit_depth == 16:
        return _encode_deep(pixels, encoding.format, alpha, tags)
    picture = Image.fromarray(pixels)
    picture = _scaled(picture, size or picture.size)
    if alpha is not None:
        picture.putalpha(_scaled(Image.fromarray(alpha), picture.size))
    buffer, exif = io.BytesIO(), _exif(tags)
    match encoding.format:
        case ImageFormat.JPEG:
            opaque = picture if alpha is None else _over_white(picture)
            opaque.save(buffer, "JPEG", quality=encoding.quality, subsampling=0, icc_profile=srgb_profile(), exif=exif)
        case ImageFormat.PNG:
            picture.save(buffer, "PNG", compress_level=4, icc_profile=srgb_profile(), exif=exif)
        case ImageFormat.WEBP:
            picture.save(buffer, "WEBP", quality=encoding.quality, method=2, icc_profile=srgb_profile(), exif=exif)
        case ImageFormat.TIFF:
            directory = {**tags, PREDICTOR: 2}  # differences of neighbours, which Deflate makes more of
            compression = "tiff_adobe_deflate"
            picture.save(buffer, "TIFF", compression=compression, icc_profile=srgb_profile(), tiffinfo=directory)
    return EncodedImage(buffer.getvalue(), encoding.format, *picture.size)


@functools.cache
def srgb_profile() -> bytes:
    """Return an ICC profile of sRGB, the same bytes each time."""
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    return profile[:24] + struct.pack(">6H", 2000, 1, 1, 0, 0, 0) + profile[36:]  # in place of the present time


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


def _srgb(picture: Image.Image, field: str) -> Image.Image:
    profile = picture.info.get("icc_profile")
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
    alpha = picture.convert("RGBA").getchannel("A") if picture.has_transparency_data else None
    rgb = _converted(picture, profile)
    if alpha is None or alpha.getextrema() == (255, 255):
        return rgb
    return Image.merge("RGBA", (*rgb.split(), alpha))


def _converted(picture: Image.Image, profile: bytes | None) -> Image.Image:
    """Return a picture's colours as sRGB: by its ICC profile, if it has one that fits."""
    own = {"1": "L", "L": "L", "LA": "L", "CMYK": "CMYK"}.get(picture.mode, "RGB")
    if profile:
        try:
            embedded = ImageCms.ImageCmsProfile(io.BytesIO(profile))
            converted = ImageCms.profileToProfile(
                picture.convert(own), embedded, ImageCms.createProfile("sRGB"), outputMode="RGB"
            )
        except Exception:  # a broken profile, or another colour space's, around a picture that is whole
            pass
        else:
            assert converted is not None
            return converted
    return picture.convert("RGB")


def _over_white(picture: Image.Image) -> Image.Image:
    white = Image.new("RGBA", picture.size, "white")
    return Image.alpha_composite(white, picture).convert("RGB")


def _filled(picture: Image.Image) -> Image.Image:
    small = picture.copy()
    small.thumbnail((SPREAD_PX, SPREAD_PX), Image.Resampling.BOX)
    layers = np.asarray(small, np.float32) / 255
    layers[..., :3] *= layers[..., 3:]
    spread = (_spread(layers) * 255).clip(0, 255).round().astype(np.uint8)
    background = Image.fromarray(spread).resize(picture.size, Image.Resampling.BILINEAR)
    background.paste(picture, mask=picture.getchannel("A"))
    return background


def _spread(layers: NDArray[np.floating]) -> NDArray[np.floating]:
    """Return the colours (H, W, 3) of premultiplied RGBA layers (H, W, 4), laid over those around them.

    The colours around are the picture's own at half its size, spread in the same way ("push and pull", Gortler et al.,
    The Lumigraph, 1996), so that however wide a gap is, it is closed by what is next to it.
    """
    height, width = layers.shape[:2]
    if height == width == 1:
        colour: NDArray[np.floating] = layers[..., :3] / np.maximum(layers[..., 3:], 1e-6)
        return colour
    even = np.pad(layers, ((0, height % 2), (0, width % 2), (0, 0)))
    half = even[::2, ::2] + even[1::2, ::2] + even[::2, 1::2] + even[1::2, 1::2]
    half /= np.maximum(half[..., 3:], 1)  # one known pixel in four is as good as four
    bands = [Image.fromarray(band) for band in np.moveaxis(_spread(half), 2, 0)]
    box = (0, 0, width / 2, height / 2)
    around = [band.resize((width, height), Image.Resampling.BILINEAR, box) for band in bands]
    behind = np.stack([np.asarray(band, np.float32) for band in around], -1)
    return layers[..., :3] + (1 - layers[..., 3:]) * behind


def _scaled(picture: Image.Image, size: tuple[int, int]) -> Image.Image:
    if size == picture.size:
        return picture
    much_smaller = 2 * size[0] <= picture.width
    return picture.resize(size, Image.Resampling.BOX if much_smaller else Image.Resampling.BICUBIC)


def _encode_deep(
    pixels: Pixels | DeepPixels, file_format: ImageFormat, alpha: Mask | None, tags: Mapping[int, str]
) -> EncodedImage:
    assert pixels.dtype == np.uint16
    height, width = pixels.shape[:2]
    samples = pixels.astype(np.uint16, copy=False)
    if alpha is not None:
        samples = np.dstack((samples, alpha.astype(np.uint16) * 257))
    if file_format is ImageFormat.PNG:
        data = deep_images.png(samples, srgb_profile(), _exif(tags).removeprefix(b"Exif\0\0"))
    else:
        data = deep_images.tiff(samples, srgb_profile(), tags)
    return EncodedImage(data, file_format, width, height)


def _tags(parameters: Mapping[str, Any]) -> dict[int, str]:
    return {
        IMAGE_DESCRIPTION: json.dumps(parameters, allow_nan=False),
        SOFTWARE: f"nst {importlib.metadata.version('nst-service')}",
    }


def _exif(tags: Mapping[int, str]) -> bytes:
    exif = Image.Exif()
    exif.update(tags)
    return exif.tobytes() if tags else b""
