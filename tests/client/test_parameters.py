"""What a result says of its making, read back."""

from __future__ import annotations

import io
import json
import math
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from nst_client import (
    Client,
    ImageFormat,
    ImageNotReadableError,
    InvalidArgumentError,
    Parameters,
    Picture,
    StopReason,
    StyleRecord,
    read_parameters,
)
from nst_client.options import options_message


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "TIFF"])
def test_parameters_of_every_format(kind: str, recorded: Any, described: Any, tmp_path: Path) -> None:
    """Whatever the server wrote is there again, from a path, from bytes and from a PIL image."""
    mixed = [
        {"sha256": ["11" * 32, "22" * 32], "weight": 2.0, "name": "styles/sea"},
        {"sha256": ["33" * 32], "weight": 1.0, "region_sha256": "44" * 32, "style_region_sha256": "55" * 32},
    ]
    data = described(json.dumps(recorded(styles=mixed, init_image_sha256="66" * 32)), kind)
    path = tmp_path / "r.bin"
    path.write_bytes(data)
    expected = Parameters(
        version="0.1.0",
        model="vgg16-hed",
        model_sha256="aa" * 32,
        options=recorded()["options"],
        content_sha256=recorded()["content_sha256"],
        styles=(
            StyleRecord(
                name="styles/sea",
                sha256=("11" * 32, "22" * 32),
                weight=2.0,
                region_sha256=None,
                style_region_sha256=None,
            ),
            StyleRecord(
                name=None, sha256=("33" * 32,), weight=1.0, region_sha256="44" * 32, style_region_sha256="55" * 32
            ),
        ),
        init_image_sha256="66" * 32,
        loss=0.5,
        iteration=7,
        stop_reason=StopReason.ITERATIONS,
    )
    for source in (path, str(path), data, Image.open(io.BytesIO(data))):
        assert read_parameters(source) == expected


@pytest.mark.parametrize("name", ["o.png", "o.jpg", "o.webp", "o.tif"])
def test_parameters_survive_save(name: str, recorded: Any, described: Any, tmp_path: Path) -> None:
    """A picture saved in another format still says how it was made."""
    data = described(json.dumps(recorded()), "TIFF")
    path = Picture(data=data, format=ImageFormat.TIFF, width=8, height=6).save(tmp_path / name)
    assert read_parameters(path) == read_parameters(data)


def test_options_go_back_into_stylize(serve: Any, story: Any, recorded: Any, described: Any) -> None:
    """`stylize(photo, style, **parameters.options)` asks for the same options, and what is given beside them wins."""
    server = serve(story.whole())
    parameters = read_parameters(described(json.dumps(recorded())))
    with Client(server.address) as client:
        client.stylize(b"p", b"s", **parameters.options).result()
        client.stylize(b"p", b"s", **{**parameters.options, "seed": 9}).result()
    same, other = (request.options for request in server.requests)
    assert same == options_message(recorded()["options"])
    assert list(same.scale_iterations) == [9, 5]
    assert (same.seed, other.seed, other.size_px) == (3, 9, 64)


def test_what_is_newer_but_harmless(recorded: Any, described: Any) -> None:
    """A field or a reason to stop that this client does not know, and a loss without a number, do no harm."""
    text = json.dumps(recorded(camera="x", stop_reason="bored", loss=None))
    parameters = read_parameters(described(text))
    assert parameters.stop_reason is StopReason.UNKNOWN
    assert math.isnan(parameters.loss)


@pytest.mark.parametrize("text", [None, "a holiday", "5", '"nst"', '{"title": "x"}', "{", "[]"])
def test_picture_without_parameters(text: str | None, described: Any, tmp_path: Path) -> None:
    """A picture that something else made is an error that says so, with its name."""
    path = tmp_path / "holiday.png"
    path.write_bytes(described(text))
    with pytest.raises(InvalidArgumentError, match=r"holiday.png' carries no parameters of nst: it was made by"):
        read_parameters(path)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"grain": 3, "fog": 1}, r"is from a newer version, nst 2.0: this client does not know its options fog, grain"),
        (
            {"style_loss": "neural"},
            r"is from a newer version, nst 2.0: style_loss must be one of gram, .* not 'neural'",
        ),
    ],
)
def test_parameters_of_a_newer_version(options: dict[str, Any], message: str, recorded: Any, described: Any) -> None:
    """Options that this client does not know are an error: the picture could not be made again without them."""
    with pytest.raises(InvalidArgumentError, match=message):
        read_parameters(described(json.dumps(recorded(nst="2.0", options=options))))


@pytest.mark.parametrize(
    "change", [{"styles": [{"weight": 1}]}, {"options": 5}, {"iteration": "x"}, {"styles": ["a"]}, {"loss": {}}]
)
def test_damaged_parameters(change: dict[str, Any], recorded: Any, described: Any) -> None:
    """What is not as the server writes it is an error of ours."""
    with pytest.raises(InvalidArgumentError, match="the parameters in the picture are damaged"):
        read_parameters(described(json.dumps(recorded(**change))))


def test_no_picture_at_all(tmp_path: Path) -> None:
    """A missing file and one that is no image are told apart."""
    with pytest.raises(ImageNotReadableError, match="there is no file"):
        read_parameters(tmp_path / "nope.png")
    with pytest.raises(ImageNotReadableError, match="the picture is not an image file that can be read"):
        read_parameters(b"text")
