"""`nst stylize` with regions, a picture to start from, and `--like`."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from nst.v1 import (
    image_pb2,
    model_service_pb2,
    model_service_pb2_grpc,
    options_pb2,
    style_service_pb2,
    style_service_pb2_grpc,
)
from nst_client import cli
from nst_client.options import options_message

SEA = hashlib.sha256(b"the sea").hexdigest()
MASK = hashlib.sha256(b"mask").hexdigest()


class Models(model_service_pb2_grpc.ModelServiceServicer):
    """Knows the model that the results name."""

    sha256 = "aa" * 32

    def ListModels(self, _request: Any, _context: Any) -> Any:  # noqa: N802
        """List it."""
        model = model_service_pb2.Model(name="models/vgg16-hed", sha256=self.sha256)
        return model_service_pb2.ListModelsResponse(models=[model])


class Styles(style_service_pb2_grpc.StyleServiceServicer):
    """Keeps every style with the one image."""

    def GetStyle(self, request: Any, _context: Any) -> Any:  # noqa: N802
        """Show it."""
        style = style_service_pb2.Style(name=request.name)
        style.images.add(sha256=SEA)
        return style


@pytest.fixture
def nst(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, photo: Path, wave: Path) -> Callable[..., Any]:
    """Return what runs `nst stylize` among photo.png, wave.jpg and mask.png."""
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.chdir(tmp_path)
    Path("mask.png").write_bytes(b"mask")

    def run(command: str, *, address: str = "localhost:1", out: str = "out.png") -> Any:
        monkeypatch.setenv("NST_SERVER", address)
        return CliRunner().invoke(cli.app, ["stylize", *command.split(), "-o", out])

    return run


@pytest.fixture
def service(serve: Any, story: Any) -> Any:
    """Return a server that makes every picture and knows the model and the styles."""
    return serve(story.whole(), Models(), Styles())


@pytest.fixture
def result(tmp_path: Path, recorded: Any, described: Any) -> Callable[..., None]:
    """Return what writes a result with these parameters to result.png."""

    def write(**changes: Any) -> None:
        (tmp_path / "result.png").write_bytes(described(json.dumps(recorded(**changes))))

    return write


def notes(done: Any) -> list[str]:
    """Return what the command has noted."""
    assert done.exit_code == 0, done.stderr
    return [line.removeprefix("note: ") for line in done.stderr.splitlines() if line.startswith("note: ")]


# Regions, and the picture to start from


def test_regions_go_to_their_styles(nst: Any, service: Any, wave: Path) -> None:
    """`--region N=MASK` and `--style-region N=MASK` reach the style of that number, and no other."""
    command = "photo.png wave.jpg@2 styles/sea --region 2=mask.png --style-region 1=wave.jpg --region 1=photo.png"
    done = nst(command, address=service.address)
    assert done.exit_code == 0, done.stderr
    first, second = service.requests[0].styles
    assert (first.weight, first.region.data) == (2, Path("photo.png").read_bytes())
    assert first.style_region.data == wave.read_bytes()
    assert (second.style, second.region.data, second.HasField("style_region")) == ("styles/sea", b"mask", False)


def test_start_and_encoding_flags(nst: Any, service: Any) -> None:
    """`--init-image`, `--bit-depth` and the formats by name reach their fields; init is left to the server."""
    command = "photo.png wave.jpg --init-image mask.png --bit-depth 16 --preview-format tiff --preview-size 64"
    nst(command, address=service.address)
    [request] = service.requests
    assert request.init_image.data == b"mask"
    assert request.options == options_pb2.StylizeOptions()
    assert request.output == image_pb2.Encoding(format="IMAGE_FORMAT_PNG", bit_depth=16)
    assert request.preview.encoding.format == image_pb2.IMAGE_FORMAT_TIFF


@pytest.mark.parametrize("name", ["o.tif", "o.tiff"])
def test_tiff_by_its_name(name: str, nst: Any, serve: Any, story: Any, picture: Any) -> None:
    """A name that ends in .tif asks for TIFF, and the file holds the bytes that came."""
    server = serve(story.whole(kind="TIFF"))
    done = nst("photo.png wave.jpg", address=server.address, out=name)
    assert done.exit_code == 0, done.stderr
    assert server.requests[0].output.format == image_pb2.IMAGE_FORMAT_TIFF
    assert Path(name).read_bytes() == picture("TIFF")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--region mask.png", "must be like 1=mask.png, not 'mask.png'"),
        ("--region 1=", "must be like 1=mask.png, not '1='"),
        ("--region sky=mask.png", "must be like 1=mask.png, not 'sky=mask.png'"),
        ("--region 0=mask.png", "'0=mask.png': styles are numbered 1 to 1"),
        ("--style-region 2=mask.png", "'2=mask.png': styles are numbered 1 to 1"),
        ("--region 1=mask.png --region 1=m.png", "'1=m.png': style 1 has a mask already"),
        ("--region 1=nope.png", "styles[0].region: there is no file 'nope.png'"),
        ("--style-region 1=nope.png", "styles[0].style_region: there is no file 'nope.png'"),
        ("--init-image nope.png", "init_image: there is no file 'nope.png'"),
        ("--like nope.png", "picture: there is no file 'nope.png'"),
        ("--like photo.png", "'photo.png' carries no parameters of nst"),
        ("--like mask.png", "'mask.png' is not an image file that can be read"),
        ("--bit-depth many", "--bit-depth"),
    ],
)
def test_wrong_flags_exit_with_2(flags: str, message: str, nst: Any, service: Any) -> None:
    """What is wrong with the new flags is found before anything is sent, and said with the value in it."""
    done = nst(f"photo.png wave.jpg {flags}", address=service.address)
    assert done.exit_code == 2
    assert message in done.stderr
    assert service.requests == []


# --like


def test_like_makes_it_again(nst: Any, service: Any, result: Any, recorded: Any) -> None:
    """With the same photograph and style, `--like` asks for the same options and model, and has nothing to note."""
    result()
    done = nst("photo.png wave.jpg --like result.png", address=service.address)
    assert notes(done) == []
    [request] = service.requests
    assert request.options == options_message(recorded()["options"])
    assert request.model == "vgg16-hed"
    assert [style.weight for style in request.styles] == [0]


def test_flags_win_over_the_example(nst: Any, service: Any, result: Any, recorded: Any) -> None:
    """A flag given beside `--like` replaces that option alone; iterations also replace those of each scale."""
    result()
    command = "photo.png wave.jpg --like result.png --seed 9 --style-layers relu3_1 --no-deterministic --model vgg19"
    done = nst(command, address=service.address)
    assert notes(done) == []
    expected = {**recorded()["options"], "seed": 9, "style_layers": {"relu3_1": 1.0}, "deterministic": False}
    assert service.requests[0].options == options_message(expected)
    assert service.requests[0].model == "vgg19"
    nst("photo.png wave.jpg --like result.png --iterations 3", address=service.address)
    assert service.requests[1].options.iterations == 3
    assert list(service.requests[1].options.scale_iterations) == []
    assert service.requests[1].options.size_px == 64


def test_preset_beside_the_example(nst: Any, service: Any, result: Any) -> None:
    """`--preset` beside `--like` leaves of the picture's options its size and its seed."""
    result()
    nst("photo.png wave.jpg --like result.png --preset gatys --iterations 4", address=service.address)
    expected = options_message({"preset": "gatys", "size_px": 64, "seed": 3, "iterations": 4})
    assert service.requests[0].options == expected


def test_stored_styles_of_the_example(nst: Any, service: Any, result: Any) -> None:
    """Without STYLE, the picture's stored styles are used, with their shares; regions count among them."""
    stored = [
        {"sha256": [SEA], "weight": 2.0, "name": "styles/sea"},
        {"sha256": [SEA], "weight": 0.5, "name": "styles/sky"},
    ]
    result(styles=stored)
    done = nst("photo.png --like result.png --region 2=mask.png", address=service.address)
    assert notes(done) == []
    sea, sky = service.requests[0].styles
    assert (sea.style, sea.weight, sea.HasField("region")) == ("styles/sea", 2, False)
    assert (sky.style, sky.weight, sky.region.data) == ("styles/sky", 0.5, b"mask")


def test_style_that_nobody_keeps_must_be_named(nst: Any, service: Any, result: Any) -> None:
    """Without STYLE, a picture whose style was brought along says which, and nothing is sent."""
    result()
    done = nst("photo.png --like result.png", address=service.address)
    assert done.exit_code == 2
    assert "style 1 of result.png is an image that is not kept on the server: name every STYLE" in done.stderr
    assert service.requests == []


def test_start_of_the_example(nst: Any, service: Any, result: Any, recorded: Any) -> None:
    """A picture started from another needs that one, or another start; `--init-image` replaces any start."""
    result(options={**recorded()["options"], "init": "image"}, init_image_sha256=MASK)
    done = nst("photo.png wave.jpg --like result.png", address=service.address)
    assert done.exit_code == 2
    assert f"result.png was started from a picture (SHA-256 {MASK}): bring it with --init-image" in done.stderr
    assert service.requests == []
    done = nst("photo.png wave.jpg --like result.png --init-image mask.png", address=service.address)
    assert notes(done) == []
    done = nst("photo.png wave.jpg --like result.png --init-image wave.jpg", address=service.address)
    assert notes(done) == ["another picture to start from than result.png's"]
    assert not any(request.options.init for request in service.requests)
    nst("photo.png wave.jpg --like result.png --init noise", address=service.address)
    assert service.requests[2].options.init == options_pb2.INIT_NOISE
    result()
    nst("photo.png wave.jpg --like result.png --init-image mask.png", address=service.address)
    assert service.requests[3].init_image.data == b"mask"
    assert not service.requests[3].options.init


def other(**changes: Any) -> dict[str, Any]:
    """Return the parameters of one style that differs."""
    return {"styles": [{"sha256": ["00" * 32], "weight": 1.0, **changes}]}


WAVE = "photo.png wave.jpg"


@pytest.mark.parametrize(
    ("command", "changes", "noted"),
    [
        ("mask.png wave.jpg", {}, ["another photograph than result.png's"]),
        (WAVE, {"model_sha256": "bb" * 32}, ["the model vgg16-hed has other weights than result.png's"]),
        (f"{WAVE} --model vgg19", {"model_sha256": "bb" * 32}, []),
        (WAVE, other(), ["style 1 is another than result.png's"]),
        ("photo.png styles/sea", other(), ["style 1 is another than result.png's"]),
        ("photo.png styles/sea", other(sha256=[SEA]), []),
        (
            "photo.png styles/sea",
            other(sha256=[SEA], region_sha256=MASK),
            ["style 1 has no region; result.png's has one"],
        ),
        ("photo.png styles/sea --region 1=mask.png", other(sha256=[SEA], region_sha256=MASK), []),
        ("photo.png styles/sea --region 1=mask.png", other(sha256=[SEA]), []),
        (
            "photo.png styles/sea --style-region 1=wave.jpg",
            other(sha256=[SEA], style_region_sha256=MASK),
            ["the style region of style 1 is another than result.png's"],
        ),
        (f"{WAVE} wave.jpg", {}, ["another number of styles (2) than result.png's (1)"]),
        (
            "photo.png styles/a@3 styles/b",
            {"styles": [{"sha256": [SEA], "weight": 1.0}, {"sha256": [SEA], "weight": 1.0}]},
            ["the styles are mixed in other shares than result.png's"],
        ),
        (
            "photo.png styles/a@4 styles/b@2",
            {"styles": [{"sha256": [SEA], "weight": 2.0}, {"sha256": [SEA], "weight": 1.0}]},
            [],
        ),
    ],
)
def test_what_is_no_longer_as_it_was_is_noted(
    *, command: str, changes: dict[str, Any], noted: list[str], nst: Any, service: Any, result: Any
) -> None:
    """Whatever will make another picture is noted on stderr; the picture is made all the same."""
    result(**changes)
    done = nst(f"{command} --like result.png", address=service.address)
    assert notes(done) == noted
    assert len(service.requests) == 1
    assert Path("out.png").exists()


def test_quiet_notes_nothing(nst: Any, service: Any, result: Any) -> None:
    """`--quiet` is silent about differences too."""
    result(content_sha256="00")
    assert nst("photo.png wave.jpg --like result.png -q", address=service.address).output == ""


def test_without_like_nothing_else_is_asked(nst: Any, serve: Any, story: Any) -> None:
    """Without `--like`, a server that answers Stylize alone is enough."""
    assert nst("photo.png wave.jpg", address=serve(story.whole()).address).exit_code == 0


def test_help_explains_like_and_preset(nst: Any) -> None:
    """What happens with both is in the help."""
    text = " ".join(CliRunner().invoke(cli.app, ["stylize", "--help"], env={"COLUMNS": "900"}).stdout.split())
    assert "with --preset only its size_px and seed are taken" in text
