"""Image files of 16 bits a channel, which Pillow reads but does not write.

Samples are HWC uint16 in [0, 65535], RGB or RGBA with the alpha unassociated.
"""

from __future__ import annotations

import io
import struct
import zlib
from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np
from PIL.PngImagePlugin import putchunk
from PIL.TiffImagePlugin import ImageFileDirectory_v2

if TYPE_CHECKING:
    from numpy.typing import NDArray

    DeepPixels = NDArray[np.uint16]

COMPRESS_LEVEL = 4
UP = 2
"""The PNG filter that leaves of each byte its difference from the one above."""


def png(samples: DeepPixels, icc_profile: bytes, exif: bytes) -> bytes:
    """Return samples as a PNG file; `exif` is a TIFF structure, empty for none."""
    height, width, channels = samples.shape
    rows = np.ascontiguousarray(samples, ">u2").view(np.uint8).reshape(height, -1)
    filtered = np.pad(np.diff(rows, axis=0, prepend=np.uint8(0)), ((0, 0), (1, 0)), constant_values=UP)
    file = io.BytesIO(b"\x89PNG\r\n\x1a\n")
    file.seek(0, io.SEEK_END)
    colour_type = 6 if channels == 4 else 2
    putchunk(file, b"IHDR", struct.pack(">IIBBBBB", width, height, 16, colour_type, 0, 0, 0))
    putchunk(file, b"iCCP", b"sRGB\0\0", zlib.compress(icc_profile))
    if exif:
        putchunk(file, b"eXIf", exif)
    putchunk(file, b"IDAT", zlib.compress(filtered.tobytes(), COMPRESS_LEVEL))
    putchunk(file, b"IEND")
    return file.getvalue()


def tiff(samples: DeepPixels, icc_profile: bytes, tags: Mapping[int, str]) -> bytes:
    """Return samples as a TIFF file of one strip, with `tags` of text; see TIFF 6.0, sections 8 and 14."""
    height, width, channels = samples.shape
    differences = np.diff(samples, axis=1, prepend=np.uint16(0))
    strip = zlib.compress(differences.astype("<u2").tobytes(), COMPRESS_LEVEL)
    directory = ImageFileDirectory_v2()
    directory.update(tags)
    directory[256], directory[257] = width, height
    directory[258] = (16,) * channels  # BitsPerSample
    directory[259] = 8  # Compression: Deflate
    directory[262] = 2  # PhotometricInterpretation: RGB
    directory[273] = 0  # StripOffsets, from the end of the directory: `save` adds what lies before
    directory[277] = channels  # SamplesPerPixel
    directory[278] = height  # RowsPerStrip
    directory[279] = len(strip)  # StripByteCounts
    directory[317] = 2  # Predictor: of each sample its difference from the one to its left
    if channels == 4:
        directory[338] = 2  # ExtraSamples: unassociated alpha
    directory[34675] = icc_profile
    file = io.BytesIO()
    directory.save(file)
    file.write(strip)
    return file.getvalue()
