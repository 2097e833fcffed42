"""Image files in: every mode becomes the right sRGB pixels, everything else is refused, and nothing else is raised.

And out: what is in them besides pixels, in each format and depth.
"""

from __future__ import annotations

import io
import json
import random
import struct
import zlib
from typing import Any

import numpy as np
import pytest
import pyvips
from PIL import Image, ImageCms, ImageDraw

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


def icc(space: bytes, connection: bytes, **tags: bytes) -> bytes:
    """Return an ICC profile, version 2: of what is printed, if of inks, else of a screen."""
    table, data = b"", b""
    for name, content in tags.items():
        table += name.encode() + struct.pack(">II", 128 + 4 + 12 * len(tags) + len(data), len(content))
        data += content + bytes(-len(content) % 4)
    device = b"prtr" if space == b"CMYK" else b"mntr"
    white = struct.pack(">3i", 63190, 65536, 54061)  # D50, in units of 1/65,536
    header = bytes(4) + b"\x02\x40\0\0" + device + space + connection + struct.pack(">6H", 2000, 1, 1, 0, 0, 0)
    header += b"acsp" + bytes(28) + white + bytes(48)
    rest = struct.pack(">I", len(tags)) + table + data
    return struct.pack(">I", 4 + len(header) + len(rest)) + header + rest


def inks() -> bytes:
    """Return an ICC lookup table from CMYK to Lab: the first ink is red, black is black, the others leave paper."""
    ramp = bytes(range(256))
    nodes = b"".join(
        bytes((0, 128, 128)) if key else bytes((135, 200, 190)) if first else bytes((255, 128, 128))
        for first in range(2)
        for _ in range(4)
        for key in range(2)
    )
    matrix = struct.pack(">9i", 65536, 0, 0, 0, 65536, 0, 0, 0, 65536)
    return b"mft1" + bytes(4) + bytes((4, 3, 2, 0)) + matrix + ramp * 4 + nodes + ramp * 3


EXCHANGED = images.srgb_profile().replace(b"rXYZ", b"----").replace(b"gXYZ", b"rXYZ").replace(b"----", b"gXYZ")
"""sRGB, but what is red is called green, and green red."""

D50 = b"XYZ " + bytes(4) + struct.pack(">3i", 63190, 65536, 54061)
LINEAR_GREY = icc(b"GRAY", b"XYZ ", wtpt=D50, kTRC=b"curv" + bytes(4) + struct.pack(">IHxx", 1, 256))
RED_CYAN = icc(b"CMYK", b"Lab ", wtpt=D50, A2B0=inks())

DEEP = [ImageFormat.PNG, ImageFormat.TIFF]
ENCODINGS = [(file_format, 8) for file_format in ImageFormat] + [(file_format, 16) for file_format in DEEP]


def deep_pixels(data: bytes) -> np.ndarray:
    """Return a file's pixels, HWC uint16, as libvips reads them."""
    pixels: np.ndarray = pyvips.Image.new_from_buffer(data, "").numpy()
    assert pixels.dtype == np.uint16
    return pixels


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
    for kind in ("JPEG", "PNG", "WEBP", "TIFF"):
        sources.append(saved(opened(picture_bytes(40, 30)), kind, exif=exif, icc_profile=images.srgb_profile()))
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


@pytest.mark.parametrize("file_format", ["JPEG", "PNG", "WEBP", "TIFF"])
def test_embedded_profiles_are_converted_to_srgb(file_format: str) -> None:
    """A file whose profile says that its red is green and its green red comes out with the two exchanged."""
    picture = opened(picture_bytes(48, 32))
    quality = {"WEBP": {"lossless": True}, "JPEG": {"quality": 100, "subsampling": 0}}.get(file_format, {})
    without = saved(picture, file_format, **quality)
    data = saved(picture, file_format, icc_profile=EXCHANGED, **quality)

    assert np.abs(decoded(data).astype(int) - decoded(without)[..., [1, 0, 2]]).max() <= 1


def test_profiles_of_other_colour_spaces_are_converted() -> None:
    """Grey, ink, a palette, and grey of 16 bits; what is transparent stays so."""
    linear_half = 188  # sRGB of half the light
    grey = Image.new("L", (20, 16), 128)
    assert np.abs(decoded(saved(grey, icc_profile=LINEAR_GREY)).astype(int) - linear_half).max() <= 1
    deep = png(0, 16, b"\x80\x00", (b"iCCP", b"linear\0\0" + zlib.compress(LINEAR_GREY)))
    assert np.abs(decoded(deep).astype(int) - linear_half).max() <= 1

    ink = Image.new("CMYK", (20, 16), (255, 0, 0, 0))
    for file_format in ("TIFF", "JPEG"):
        red, green, blue = decoded(saved(ink, file_format, icc_profile=RED_CYAN, quality=100))[8, 8]
        assert red > 200, "its first ink is red"
        assert max(green, blue) < 60

    palette = png(3, 8, b"\1", (b"iCCP", b"exchanged\0\0" + zlib.compress(EXCHANGED)), PALETTE)
    assert np.abs(decoded(palette)[0, 0].astype(int) - (100, 200, 50)).max() <= 1

    for mode, colour, profile, expected in (
        ("RGBA", (200, 100, 50, 90), EXCHANGED, (100, 200, 50, 90)),
        ("LA", (128, 90), LINEAR_GREY, (188, 188, 188, 90)),
    ):
        data = flat(mode, colour, icc_profile=profile)
        pixels = np.asarray(images.decode_with_alpha(data, "content.data", MAX_PIXELS))
        assert np.abs(pixels.astype(int) - expected).max() <= 1


@pytest.mark.parametrize(
    "profile",
    [b"no profile", images.srgb_profile()[:300], images.srgb_profile()[:128] + bytes(460)],
    ids=["garbage", "truncated", "no tags"],
)
@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
def test_a_broken_profile_is_ignored(mode: str, profile: bytes) -> None:
    """The picture is whole, so it is taken as if it had none."""
    picture = opened(picture_bytes(40, 30, mode=mode, format="TIFF"))
    assert np.array_equal(decoded(saved(picture, "TIFF", icc_profile=profile)), decoded(saved(picture, "TIFF")))


@pytest.mark.parametrize(("mode", "space"), [("L", "RGB"), ("CMYK", "RGB"), ("RGB", "grey"), ("RGB", "ink")])
def test_a_profile_of_another_colour_space_is_ignored(mode: str, space: str) -> None:
    """As is one that does not fit."""
    profile = {"RGB": EXCHANGED, "grey": LINEAR_GREY, "ink": RED_CYAN}[space]
    picture = opened(picture_bytes(40, 30, mode=mode, format="TIFF"))
    assert np.array_equal(decoded(saved(picture, "TIFF", icc_profile=profile)), decoded(saved(picture, "TIFF")))


@pytest.mark.parametrize(
    ("data", "mode"),
    [
        (flat("RGBA", (10, 20, 30, 254)), "RGBA"),
        (flat("RGBA", (10, 20, 30, 255)), "RGB"),
        (flat("LA", (10, 255)), "RGB"),
        (flat("L", 10), "RGB"),
        (MODES["palette, transparent"][0], "RGBA"),
        (MODES["16-bit grey, transparent colour"][0], "RGBA"),
        (MODES["grey, transparent colour"][0], "RGBA"),
    ],
)
def test_alpha_that_is_opaque_everywhere_is_none(data: bytes, mode: str) -> None:
    """RGBA only if anything is transparent, by whatever means the format has."""
    assert images.decode_with_alpha(data, "content.data", MAX_PIXELS).mode == mode


@pytest.mark.parametrize("stored", [(255, 255, 255), (0, 0, 0), (0, 255, 0)])
@pytest.mark.parametrize("longer", [64, 200, 500])
def test_a_cutout_has_no_fringe(stored: tuple[int, int, int], longer: int) -> None:
    """A disc of one colour is of that colour to the picture's edges, whatever the file stores where it is not."""
    large = Image.new("L", (800, 600))
    ImageDraw.Draw(large).ellipse((200, 100, 500, 400), fill=255)
    alpha = large.resize((200, 150), Image.Resampling.BOX)
    picture = Image.new("RGB", alpha.size, stored)
    picture.paste((200, 30, 60), mask=alpha.point(lambda value: 255 if value else 0))
    picture.putalpha(alpha)

    pixels, kept = images.fit_with_alpha(picture, longer, "content.data")

    assert pixels.shape[:2] == (longer * 3 // 4, longer)
    assert np.abs(pixels.astype(int) - (200, 30, 60)).max() <= 2
    assert kept is not None
    assert np.array_equal(kept, images.fit(alpha, longer, "content.data"))


def test_gaps_take_on_the_nearest_colours() -> None:
    """Left of a gap stays left: right stays right, and opaque pixels are what they were."""
    pixels = np.zeros((60, 90, 4), np.uint8)
    pixels[:, :30], pixels[:, 60:] = (255, 0, 0, 255), (0, 0, 255, 255)

    filled, _ = images.fit_with_alpha(Image.fromarray(pixels), 90, "content.data")

    assert np.array_equal(filled[:, :30], pixels[:, :30, :3])
    assert np.array_equal(filled[:, 60:], pixels[:, 60:, :3])
    assert filled[:, 30:33, 0].min() > 2 * int(filled[:, 30:33, 2].max())
    assert filled[:, 57:60, 2].min() > 2 * int(filled[:, 57:60, 0].max())
    assert filled[..., 1].max() == 0


def test_a_single_pixel_colours_what_is_around_it() -> None:
    """What is nearest counts, however little there is of it and however much of something else."""
    pixels = np.zeros((64, 128, 4), np.uint8)
    pixels[:, 64:], pixels[32, 20] = (0, 0, 255, 255), (255, 0, 0, 255)

    filled, _ = images.fit_with_alpha(Image.fromarray(pixels), 128, "content.data")

    near = filled[31:34, 19:22].astype(int)
    assert (near[..., 0] > 2 * near[..., 2]).all()


def test_nothing_but_transparency_is_no_error() -> None:
    """It has no colours to take on, and nobody will see any."""
    pixels, alpha = images.fit_with_alpha(Image.new("RGBA", (20, 17)), 20, "content.data")
    assert pixels.shape == (17, 20, 3)
    assert alpha is not None
    assert alpha.max() == 0


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


@pytest.mark.parametrize("file_format", list(ImageFormat))
def test_alpha_is_carried_into_the_file(file_format: ImageFormat) -> None:
    """Scaled to the file's size, colours left as they are; JPEG, which has none, is laid over white."""
    pixels = np.full((32, 48, 3), (200, 100, 50), np.uint8)
    alpha = np.zeros((64, 96), np.uint8)
    alpha[:, 48:], alpha[:, 72:] = 128, 255
    picture = opened(images.encode(pixels, Encoding(file_format, 95), (24, 16), alpha=alpha).data)

    assert picture.size == (24, 16)
    found = np.asarray(picture)[8, [4, 15, 21]].astype(int)
    if file_format is ImageFormat.JPEG:
        assert np.abs(found - [(255, 255, 255), (227, 177, 152), (200, 100, 50)]).max() <= 6
    else:
        assert found[:, 3].tolist() == [0, 128, 255]
        assert np.abs(found[1:, :3] - (200, 100, 50)).max() <= 3


@pytest.mark.parametrize("file_format", DEEP)
@pytest.mark.parametrize("transparent", [False, True])
def test_sixteen_bits_are_lossless(file_format: ImageFormat, transparent: bool) -> None:
    """Other readers find every one of 65,536 levels and the alpha; Pillow finds the same picture in 8 bits."""
    pixels = np.random.default_rng(0).permutation(65_536).astype(np.uint16).reshape(128, 512, 1).repeat(3, 2)
    pixels[..., 1], pixels[..., 2] = pixels[::-1, :, 0], 65_535
    alpha = np.arange(512, dtype=np.uint16).clip(0, 255).astype(np.uint8)[None].repeat(128, 0) if transparent else None
    encoded = images.encode(pixels, Encoding(file_format, 95, 16), alpha=alpha, parameters={"a": 1})

    expected = pixels if alpha is None else np.dstack((pixels, alpha * np.uint16(257)))
    assert np.array_equal(deep_pixels(encoded.data), expected)
    assert (encoded.format, encoded.width, encoded.height) == (file_format, 512, 128)
    picture = opened(encoded.data)
    assert picture.mode == ("RGBA" if transparent else "RGB")
    assert np.abs(np.asarray(picture) - expected / 257).max() <= 1


@pytest.mark.parametrize(("file_format", "bit_depth"), ENCODINGS)
def test_every_file_says_that_it_is_srgb(file_format: ImageFormat, bit_depth: int) -> None:
    """An ICC profile is embedded, whose date is not that of the file, and which changes nothing when read here."""
    pixels = np.full((20, 30, 3), 100, np.uint8).astype(f"uint{bit_depth}")
    data = images.encode(pixels, Encoding(file_format, 90, bit_depth)).data

    embedded = ImageCms.ImageCmsProfile(io.BytesIO(opened(data).info["icc_profile"]))
    assert ImageCms.getProfileDescription(embedded).startswith("sRGB")
    assert embedded.profile.creation_date is not None
    assert embedded.profile.creation_date.year == 2000
    assert np.array_equal(decoded(data), np.asarray(opened(data)))
    assert 0x010E not in opened(data).getexif()


@pytest.mark.parametrize(("file_format", "bit_depth"), ENCODINGS)
@pytest.mark.parametrize("transparent", [False, True])
def test_parameters_are_embedded(file_format: ImageFormat, bit_depth: int, transparent: bool) -> None:
    """Pillow finds them in every format and depth, as ASCII; the same picture gives the same bytes."""
    pixels = np.full((20, 30, 3), 100, np.uint8).astype(f"uint{bit_depth}")
    alpha = np.full((20, 30), 99, np.uint8) if transparent else None
    parameters = {"title": "é🎨", "weights": [1.5, None], "long": "x" * 20_000}
    encoding = Encoding(file_format, 90, bit_depth)
    data = images.encode(pixels, encoding, alpha=alpha, parameters=parameters).data

    exif = opened(data).getexif()
    assert exif[0x010E].isascii()
    assert json.loads(exif[0x010E]) == parameters
    assert exif[0x0131].startswith("nst 0.")
    assert data == images.encode(pixels, encoding, alpha=alpha, parameters=parameters).data


def test_png_is_lossless_and_jpeg_keeps_full_colour_resolution() -> None:
    """PNG gives the same pixels back; JPEG is 4:4:4."""
    pixels = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    assert np.array_equal(np.asarray(opened(images.encode(pixels, Encoding(ImageFormat.PNG, 1)).data)), pixels)
    jpeg: Any = opened(images.encode(pixels, Encoding(ImageFormat.JPEG, 90)).data)
    assert {layer[1:3] for layer in jpeg.layer} == {(1, 1)}
