"""Image files as pictures, for the command line. The server has its own way, which takes more kinds of them."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
from PIL import Image, ImageCms, ImageOps, UnidentifiedImageError
from torch import Tensor

from nst_model.errors import InvalidImage
from nst_model.scales import MIN_EDGE_PX
from nst_model.stylization import from_pixels

FORMATS = ("JPEG", "PNG", "WEBP", "TIFF")


def read_picture(file: Path, longer_edge_px: int) -> Tensor:
    """Return the picture of an image file, (3, H, W) RGB in [0, 1], upright, scaled, what is transparent over white.

    Raises InvalidImage for what is no image of FORMATS, or too thin; OSError.
    """
    data = file.read_bytes()
    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as opened:
            picture = _srgb(ImageOps.exif_transpose(opened))
    except (UnidentifiedImageError, OSError, ValueError, Image.DecompressionBombError) as error:
        raise InvalidImage(f"{file} is no image of the formats {', '.join(FORMATS)}: {error}") from None
    scale = longer_edge_px / max(picture.size)
    width, height = (round(edge * scale) for edge in picture.size)
    if min(width, height) < MIN_EDGE_PX:
        raise InvalidImage(f"{file} would be {width}×{height} px; each edge must be at least {MIN_EDGE_PX} px")
    return from_pixels(np.asarray(picture.resize((width, height), Image.Resampling.LANCZOS)))


def _srgb(picture: Image.Image) -> Image.Image:
    if picture.has_transparency_data:
        picture = Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture.convert("RGBA"))
    profile = picture.info.get("icc_profile")
    rgb = picture.convert("RGB")
    if profile and picture.mode in ("RGB", "RGBA"):
        own = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        converted = ImageCms.profileToProfile(rgb, own, ImageCms.createProfile("sRGB"))
        assert converted is not None
        return converted
    return rgb
