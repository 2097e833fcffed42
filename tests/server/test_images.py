"""Image files in: every mode becomes the right RGB pixels, everything else is refused, and nothing else is raised."""

from __future__ import annotations

import io
import random
import struct
import zlib
from typing import Any

import numpy as np
import pytest
from PIL import Image

from nst_server import images
from nst_server.errors import InvalidField
from nst_server.images import Encoding, ImageFormat
from tests.conftest import picture_bytes
from tests.server.conftest import opened, saved

MAX_PIXELS = 100_000_000


def decoded(data: bytes) -> np.ndarray:
    """Return an image file's pixels, HWC uint8."""
    picture = images.decode(data, "content.data", MAX_PIXELS)
    assert picture.mode == "RGB"
    return np.asarray(picture)


def flat(mode: str, colour: Any, file_format: str = "PNG", **options: Any) -> bytes:
    """Return a file of one colour, 20×16 px."""
    return saved(Image.new(mode, (20, 16), colour), file_format, **options)


def png(colour_type: int, depth: int, pixel: bytes, *chunks: tuple[bytes, bytes]) -> bytes:
    """Return a PNG of one colour, 20×16 px, written by hand: Pillow writes fewer kinds than it reads."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", 20, 16, depth, colour_type, 0, 0, 0)
    rows = (b"\0" + pixel * 20) * 16
    parts = (chunk(b"IHDR", header), *(chunk(*each) for each in chunks), chunk(b"IDAT", zlib.compress(rows)))
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts) + chunk(b"IEND", b"")


PALETTE = (b"PLTE", bytes((10, 20, 30, 200, 100, 50)))

MODES: dict[str, tuple[bytes, tuple[int, int, int], int]] = {
    "RGB": (flat("RGB", (10, 20, 30)), (10, 20, 30), 0),
    "grey": (flat("L", 77), (77, 77, 77), 0),
    "1 bit white": (flat("1", 1), (255, 255, 255), 0),
    "1 bit black": (flat("1", 0), (0, 0, 0), 0),
    "palette": (png(3, 8, b"\1", PALETTE), (200, 100, 50), 0),
    "palette, transparent": (png(3, 8, b"\1", PALETTE, (b"tRNS", b"\xff\x00")), (255, 255, 255), 0),
    "palette, half transparent": (png(3, 8, b"\1", PALETTE, (b"tRNS", b"\xff\x80")), (227, 177, 152), 1),
    "alpha, transparent": (flat("RGBA", (10, 20, 30, 0)), (255, 255, 255), 0),
    "alpha, opaque": (flat("RGBA", (10, 20, 30, 255)), (10, 20, 30), 0),
    "alpha, half": (flat("RGBA", (0, 100, 200, 128)), (127, 177, 227), 1),
    "grey and alpha": (flat("LA", (0, 128)), (127, 127, 127), 1),
    "grey, transparent colour": (png(0, 8, b"\x40", (b"tRNS", b"\x00\x40")), (255, 255, 255), 0),
    "16-bit grey, mid-tone": (png(0, 16, b"\x80\x00"), (128, 128, 128), 0),
    "16-bit grey, dark": (png(0, 16, b"\x01\x01"), (1, 1, 1), 0),
    "16-bit grey, white": (png(0, 16, b"\xff\xff"), (255, 255, 255), 0),
    "16-bit grey, transparent colour": (png(0, 16, b"\x40\x40", (b"tRNS", b"\x40\x40")), (255, 255, 255), 0),
    "16-bit RGB": (png(2, 16, b"\x80\x00\xff\xff\x00\x00"), (128, 255, 0), 0),
    "16-bit RGB and alpha": (png(6, 16, b"\x00\x00\x00\x00\x00\x00\x80\x00"), (127, 127, 127), 1),
    "16-bit grey and alpha": (png(4, 16, b"\x80\x00\xff\xff"), (128, 128, 128), 0),
    "16-bit TIFF": (flat("I;16", 0x8000, "TIFF"), (128, 128, 128), 0),
    "CMYK white": (flat("CMYK", (0, 0, 0, 0), "JPEG", quality=100), (255, 255, 255), 1),
    "CMYK cyan": (flat("CMYK", (255, 0, 0, 0), "JPEG", quality=100), (0, 255, 255), 2),
    "CMYK black": (flat("CMYK", (0, 0, 0, 255), "TIFF"), (0, 0, 0), 0),
    "JPEG": (flat("RGB", (128, 128, 128), "JPEG"), (128, 128, 128), 1),
    "grey JPEG": (flat("L", 50, "JPEG"), (50, 50, 50), 1),
    "WebP": (flat("RGB", (10, 200, 30), "WEBP", lossless=True), (10, 200, 30), 0),
    "WebP with alpha": (flat("RGBA", (10, 20, 30, 0), "WEBP", lossless=True), (255, 255, 255), 0),
    "BMP": (flat("RGB", (10, 20, 30), "BMP"), (10, 20, 30), 0),
    "TIFF": (flat("RGB", (10, 20, 30), "TIFF", compression="tiff_lzw"), (10, 20, 30), 0),
}


@pytest.mark.parametrize("mode", MODES)
def test_every_mode_becomes_the_right_rgb(mode: str) -> None:
    """Grey is repeated, 16 bits are scaled to 8, ink becomes light, what is transparent lies over white."""
    data, colour, tolerance = MODES[mode]
    pixels = decoded(data)

    assert pixels.shape == (16, 20, 3)
    assert np.abs(pixels.astype(int) - colour).max() <= tolerance, pixels[0, 0]


@pytest.mark.parametrize("file_format", ["JPEG", "PNG", "WEBP", "TIFF"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied(orientation: int, file_format: str) -> None:
    """For each of the eight orientations the upright picture comes out: shape and corners are where they belong."""
    upright = np.zeros((32, 48, 3), np.uint8)
    upright[:16, :24] = (255, 0, 0)
    upright[:16, 24:] = (0, 255, 0)
    upright[16:, :24] = (0, 0, 255)
    stored = {
        1: lambda a: a,
        2: np.fliplr,
        3: lambda a: np.rot90(a, 2),
        4: np.flipud,
        5: lambda a: a.swapaxes(0, 1),
        6: lambda a: np.rot90(a, 1),
        7: lambda a: np.rot90(a, 2).swapaxes(0, 1),
        8: lambda a: np.rot90(a, -1),
    }[orientation](upright)
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = saved(Image.fromarray(np.ascontiguousarray(stored)), file_format, exif=exif, quality=100)

    pixels = decoded(data)

    assert pixels.shape == upright.shape
    assert np.abs(pixels.astype(int) - upright)[4:12, 4:20].max() < 12
    assert np.abs(pixels.astype(int) - upright).mean() < 6


@pytest.mark.parametrize("file_format", ["JPEG", "PNG", "WEBP"])
def test_broken_metadata_does_not_matter(file_format: str) -> None:
    """A whole picture with EXIF data that is none is as good as one without."""
    data = flat("RGB", (9, 9, 9), file_format, exif=b"Exif\0\0garbage")
    assert decoded(data).shape == (16, 20, 3)


def test_first_of_several_pictures_is_used() -> None:
    """A TIFF of two pages gives the first, an animated WebP its first frame."""
    pages = [Image.new("RGB", (20, 16), (50 + index, 0, 0)) for index in range(2)]
    for file_format in ("TIFF", "WEBP"):
        buffer = io.BytesIO()
        pages[0].save(buffer, file_format, save_all=True, append_images=pages[1:], lossless=True)
        assert tuple(decoded(buffer.getvalue())[0, 0]) == (50, 0, 0)


REFUSED: dict[str, tuple[bytes, str]] = {
    "nothing": (b"", "is empty"),
    "text": (b"a photograph of a cat", "is no image"),
    "zeros": (bytes(1000), "is no image"),
    "GIF": (flat("P", 1, "GIF"), "is no image"),
    "PDF": (flat("RGB", 1, "PDF"), "is no image"),
    "FITS": (b"SIMPLE  =                    T".ljust(80) + b"BITPIX  =                    8".ljust(80), "is no image"),
    "ICO": (flat("RGB", 1, "ICO"), "is no image"),
    "EPS": (flat("RGB", 1, "EPS"), "is no image"),
    "PNG signature only": (b"\x89PNG\r\n\x1a\n", "is"),
    "1×1": (picture_bytes(1, 1), "has 1×1 px; each edge must have at least 16 px"),
    "15×100": (picture_bytes(15, 100), "15×100 px"),
    "1×5000": (picture_bytes(1, 5000), "1×5000 px"),
    "too long": (saved(Image.new("L", (20_001, 16))), "at most 20000 px"),
    "floating-point TIFF": (flat("F", 0.5, "TIFF"), "content.data has floating-point pixels"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_what_is_no_usable_image_is_refused(kind: str) -> None:
    """InvalidField names the field and says what is wrong."""
    data, problem = REFUSED[kind]
    with pytest.raises(InvalidField, match=problem) as caught:
        decoded(data)
    assert caught.value.field == "content.data"


@pytest.mark.parametrize("file_format", ["PNG", "JPEG", "WEBP", "TIFF", "BMP"])
@pytest.mark.parametrize("share", [0.02, 0.2, 0.5, 0.9, 0.98])
def test_truncated_files_are_refused(file_format: str, share: float) -> None:
    """Wherever the file breaks off, it is refused."""
    data = picture_bytes(200, 150, format=file_format)
    with pytest.raises(InvalidField):
        decoded(data[: int(len(data) * share)])


def test_huge_claims_are_refused_before_anything_is_decoded(monkeypatch: pytest.MonkeyPatch) -> None:
    """A header that claims 50,000×50,000 pixels costs no memory: it is refused by what it claims."""
    small = picture_bytes(32, 32)
    header = bytearray(small)
    header[16:24] = struct.pack(">II", 50_000, 50_000)
    header[29:33] = struct.pack(">I", zlib.crc32(bytes(header[12:29])))

    with pytest.raises(InvalidField, match=r"50000×50000 px; at most 100 megapixels"):
        decoded(bytes(header))


def test_pixel_limit_is_the_operators() -> None:
    """A picture at the limit passes, one pixel row more is refused with the numbers."""
    images.decode(picture_bytes(1000, 1000), "content.data", 1_000_000)
    with pytest.raises(InvalidField, match=r"1000×1001 px; at most 1 megapixels"):
        images.decode(picture_bytes(1000, 1001), "content.data", 1_000_000)


def test_mutated_files_raise_nothing_but_invalid_field() -> None:
    """Three hundred files with random damage: each gives RGB pixels or InvalidField, never anything else."""
    dice = random.Random(0)
    exif = Image.Exif()
    exif[0x0112] = 6
    exif[0x010E] = "a description"
    sources = [picture_bytes(40, 30, format=kind) for kind in ("PNG", "JPEG", "WEBP", "TIFF", "BMP")]
    sources += [data for data, _, _ in MODES.values()]
    sources += [saved(opened(picture_bytes(40, 30)), kind, exif=exif) for kind in ("JPEG", "PNG", "WEBP", "TIFF")]
    for _ in range(300):
        data = bytearray(dice.choice(sources))
        for _ in range(dice.choice((1, 1, 2, 8))):
            match dice.randrange(4):
                case 0:
                    data[dice.randrange(len(data))] ^= 1 << dice.randrange(8)
                case 1:
                    del data[dice.randrange(len(data)) :]
                case 2:
                    at = dice.randrange(len(data))
                    data[at : at + dice.randrange(8)] = dice.randbytes(dice.randrange(8))
                case 3:
                    at = dice.randrange(min(64, len(data)))
                    data[at : at + 4] = dice.choice((b"\xff" * 4, b"\0" * 4, b"\x7f\xff\xff\xff"))
            if not data:
                break
        try:
            picture = images.decode(bytes(data), "content.data", 1_000_000)
        except InvalidField:
            continue
        assert picture.mode == "RGB"
        assert min(picture.size) >= 16


@pytest.mark.parametrize(
    ("size", "longer", "expected"),
    [((96, 64), 48, (32, 48)), ((64, 96), 48, (48, 32)), ((20, 20), 512, (512, 512)), ((1000, 333), 100, (33, 100))],
)
def test_fit_scales_the_longer_edge(size: tuple[int, int], longer: int, expected: tuple[int, int]) -> None:
    """The longer edge gets the length asked for, the shorter one follows; small pictures are scaled up."""
    assert images.fit(Image.new("RGB", size), longer, "content.data").shape == (*expected, 3)


def test_fit_refuses_what_becomes_too_thin() -> None:
    """16×5000 px would be 2×512: InvalidField with both sizes."""
    with pytest.raises(InvalidField, match=r"16×5000 px, too thin: scaled to 512 px it would be 2×512 px"):
        images.fit(Image.new("RGB", (16, 5000)), 512, "content.data")


@pytest.mark.parametrize("file_format", list(ImageFormat))
def test_encode_gives_the_size_and_format_asked_for(file_format: ImageFormat) -> None:
    """As large as asked for, in the format asked for."""
    pixels = np.full((40, 60, 3), 100, np.uint8)
    for size in ((30, 20), (60, 40), (120, 80)):
        encoded = images.encode(pixels, Encoding(file_format, 90), size)
        picture = opened(encoded.data)
        assert picture.format == file_format
        assert picture.size == size == (encoded.width, encoded.height)
        assert np.abs(np.asarray(picture.convert("RGB")).astype(int) - 100).max() <= 3


@pytest.mark.parametrize(
    ("size", "longer", "expected"),
    [((60, 40), 30, (30, 20)), ((40, 60), 30, (20, 30)), ((60, 40), 500, (60, 40)), ((4096, 16), 64, (64, 1))],
)
def test_previews_are_scaled_down_and_never_up(size: tuple[int, int], longer: int, expected: tuple[int, int]) -> None:
    """At most the longer edge asked for, at least one pixel."""
    assert images.preview_size(*size, longer) == expected


def test_png_is_lossless_and_jpeg_keeps_full_colour_resolution() -> None:
    """PNG gives the same pixels back; JPEG is 4:4:4."""
    pixels = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    assert np.array_equal(np.asarray(opened(images.encode(pixels, Encoding(ImageFormat.PNG, 1)).data)), pixels)
    jpeg: Any = opened(images.encode(pixels, Encoding(ImageFormat.JPEG, 90)).data)
    assert {layer[1:3] for layer in jpeg.layer} == {(1, 1)}
