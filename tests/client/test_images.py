"""Images as callers bring them, and pictures as they come back."""

import io
import os
import resource
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image, ImageCms

from nst_client import ImageFormat, ImageNotReadableError, InvalidArgumentError, Picture, images
from nst_client.files import MAX_FILE_BYTES, write_whole
from nst_client.images import read_image


def decoded(data: bytes) -> Image.Image:
    """Return the image in a file's bytes."""
    return Image.open(io.BytesIO(data))


def test_files_and_bytes_go_as_they_are(photo: Path) -> None:
    """A path, as a string or not, and bytes of any kind give the file's own bytes: nothing is encoded twice."""
    data = photo.read_bytes()
    for source in (photo, str(photo), data, bytearray(data), memoryview(data)):
        assert read_image(source, field="content") == data


def test_missing_file_is_named(tmp_path: Path) -> None:
    """A path that does not exist is an error with the field and the path in it."""
    with pytest.raises(ImageNotReadableError, match=r"styles\[1\]: there is no file '.*nope.jpg'") as caught:
        read_image(tmp_path / "nope.jpg", field="styles[1]")
    assert caught.value.field == "styles[1]"


def test_directory_is_no_image(tmp_path: Path) -> None:
    """What cannot be read says why."""
    with pytest.raises(ImageNotReadableError, match=r"cannot read .*: Is a directory"):
        read_image(tmp_path, field="content")


def test_huge_file_is_not_read(tmp_path: Path) -> None:
    """A file that no message could hold is refused by its length, before a byte is read."""
    with (tmp_path / "huge.tiff").open("wb") as file:
        file.truncate(MAX_FILE_BYTES + 1)
    with pytest.raises(ImageNotReadableError, match="has 1073741825 bytes; at most 1073741824"):
        read_image(tmp_path / "huge.tiff", field="content")


def test_anything_else_is_refused() -> None:
    """An array or a number is no image source, and the error says what is."""
    with pytest.raises(InvalidArgumentError, match=r"content must be a path, .* or a PIL image, not int"):
        read_image(5, field="content")  # type: ignore[arg-type]


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "I;16", "CMYK", "YCbCr", "HSV", "RGBa", "I"])
def test_pil_images_of_every_mode_become_png(mode: str) -> None:
    """A PIL image of any mode is sent as a PNG of its size."""
    image = decoded(read_image(Image.new(mode, (9, 7)), field="content"))
    assert (image.format, image.size) == ("PNG", (9, 7))


def test_grey_of_32_bits_keeps_its_16() -> None:
    """A mid-grey stays one."""
    assert decoded(read_image(Image.new("I", (9, 7), 0x8000), field="content")).getpixel((0, 0)) == 0x8000


def test_transparency_survives() -> None:
    """So that the server lays it over white."""
    assert decoded(read_image(Image.new("RGBa", (9, 7)), field="content")).mode == "RGBA"


def test_floating_point_pixels_are_refused() -> None:
    """Nobody knows what is white."""
    with pytest.raises(InvalidArgumentError, match="content has floating-point pixels"):
        read_image(Image.new("F", (9, 7)), field="content")


def test_pil_image_keeps_its_pixels() -> None:
    """What a caller holds as RGB arrives bit for bit."""
    image = Image.effect_mandelbrot((20, 16), (-2, -1, 1, 1), 50).convert("RGB")
    assert decoded(read_image(image, field="content")).tobytes() == image.tobytes()


def test_pil_image_is_turned_as_its_file_would_be(tmp_path: Path) -> None:
    """A photograph opened with PIL gives the same upright picture as its path."""
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (9, 7)).save(tmp_path / "lying.jpg", exif=exif)
    with Image.open(tmp_path / "lying.jpg") as lying:
        upright = decoded(read_image(lying, field="content"))
    assert upright.size == (7, 9)
    assert 0x0112 not in upright.getexif()


def test_without_pil_imported_nothing_is_a_pil_image(monkeypatch: pytest.MonkeyPatch) -> None:
    """Telling PIL images apart needs no import of PIL."""
    monkeypatch.delitem(sys.modules, "PIL.Image")
    with pytest.raises(InvalidArgumentError, match="not object"):
        read_image(object(), field="content")  # type: ignore[arg-type]
    assert "PIL.Image" not in sys.modules


@pytest.fixture
def png(picture: Callable[..., bytes]) -> Picture:
    """Return a picture as it comes from the server."""
    return Picture(data=picture("PNG"), format=ImageFormat.PNG, width=8, height=6)


def test_picture_decodes_when_asked(png: Picture) -> None:
    """`image` is a PIL image, decoded once."""
    assert png.image.size == (8, 6)
    assert png.image is png.image


def test_picture_does_not_print_its_bytes(png: Picture) -> None:
    """A repr is for reading: no megabytes in it."""
    assert len(repr(png)) < 100


def test_save_writes_the_bytes_as_they_came(png: Picture, tmp_path: Path) -> None:
    """Under its own format's name a picture is not encoded again."""
    assert png.save(tmp_path / "out.PNG").read_bytes() == png.data


KINDS = [("o.jpg", "JPEG"), ("o.jpeg", "JPEG"), ("o.webp", "WEBP"), ("o.tif", "TIFF"), ("o.TIFF", "TIFF")]


@pytest.mark.parametrize(("name", "kind"), KINDS)
def test_save_keeps_the_suffixs_word(png: Picture, tmp_path: Path, name: str, kind: str) -> None:
    """A file named .jpg is a JPEG, whatever came."""
    png.save(tmp_path / name)
    with Image.open(tmp_path / name) as image:
        assert (image.format, image.size) == (kind, (8, 6))


def transparent(kind: str) -> Picture:
    """Return a picture whose left half is transparent red, with a description and a colour profile."""
    image = Image.new("RGBA", (8, 6), (255, 0, 0, 0))
    image.paste((0, 0, 255, 255), (4, 0, 8, 6))
    exif = Image.Exif()
    exif[images.DESCRIPTION] = '{"nst": "1"}'
    buffer = io.BytesIO()
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    image.save(buffer, kind, exif=exif, icc_profile=profile, **({"lossless": True} if kind == "WEBP" else {}))
    return Picture(data=buffer.getvalue(), format=ImageFormat(kind.lower()), width=8, height=6)


@pytest.mark.parametrize("target", ["o.jpg", "o.png", "o.webp", "o.tif"])
@pytest.mark.parametrize("source", ["PNG", "WEBP", "TIFF"])
def test_save_in_another_format_keeps_what_it_can_hold(source: str, target: str, tmp_path: Path) -> None:
    """Parameters, colour profile and transparency survive; where JPEG knows none, white shines through."""
    picture = transparent(source)
    picture.save(tmp_path / target)
    with Image.open(tmp_path / target) as image:
        assert dict(image.getexif()).get(images.DESCRIPTION) == '{"nst": "1"}'
        assert image.info["icc_profile"] == picture.image.info["icc_profile"]
        if target == "o.jpg":
            assert image.mode == "RGB"
            assert min(image.getpixel((1, 3))) > 245
        else:
            assert image.mode == "RGBA"
            assert (image.getpixel((1, 3))[3], image.getpixel((6, 3))[3]) == (0, 255)


def test_save_as_tiff_is_compressed_and_lossless(picture: Callable[..., bytes], tmp_path: Path) -> None:
    """A TIFF made here is no larger than need be, and bit for bit the picture."""
    given = Picture(data=picture("PNG", size=(200, 100)), format=ImageFormat.PNG, width=200, height=100)
    path = given.save(tmp_path / "o.tif")
    assert path.stat().st_size < 200 * 100
    with Image.open(path) as image:
        assert image.tobytes() == given.image.tobytes()


@pytest.mark.parametrize("name", ["out", "out.pdf"])
def test_save_refuses_other_suffixes(png: Picture, tmp_path: Path, name: str) -> None:
    """A suffix that stands for no format is an error that lists those that do, and writes nothing."""
    with pytest.raises(InvalidArgumentError, match=r"must end in one of \.jpg, \.jpeg, \.png, \.webp, \.tif, \.tiff"):
        png.save(tmp_path / name)
    assert list(tmp_path.iterdir()) == []


def test_file_is_whole_or_not_there(tmp_path: Path) -> None:
    """When the disk is full, the old file stays and nothing is left beside it."""
    target = tmp_path / "out.png"
    target.write_bytes(b"old")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
    try:
        with pytest.raises(OSError, match="File too large"):
            write_whole(target, bytes(2000))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert target.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [target]


def test_link_keeps_pointing(tmp_path: Path) -> None:
    """Writing to a link writes what it points to."""
    (tmp_path / "link.png").symlink_to(tmp_path / "real.png")
    write_whole(tmp_path / "link.png", b"new")
    assert (tmp_path / "link.png").is_symlink()
    assert (tmp_path / "real.png").read_bytes() == b"new"


def test_device_is_written_to(tmp_path: Path) -> None:
    """A pipe is written to, not replaced by a file."""
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    try:
        write_whole(pipe, b"through")
        assert os.read(reader, 100) == b"through"
    finally:
        os.close(reader)
    assert pipe.is_fifo()
