"""Files that the server makes: asked for, fetched whole whatever the connection does, written, and brought back."""

from __future__ import annotations

import hashlib
import json
import pickle
import resource
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest
import torch

import nst_model
from nst.v1 import (
    file_pb2,
    model_service_pb2,
    model_service_pb2_grpc,
    options_pb2,
    style_service_pb2,
    style_service_pb2_grpc,
)
from nst_client import (
    BrokenStreamError,
    Client,
    ClientClosedError,
    ExportedFile,
    InvalidArgumentError,
    UnavailableError,
)
from nst_model.artifact import sealed_safetensors
from tests.client.test_cli import ended, nst, spawned

CODE = grpc.StatusCode
DATA = bytes(range(256)) * 4
NAME = "tiny-closure.onnx"
PART = 100

__all__ = ["nst"]  # a fixture


class Maker(model_service_pb2_grpc.ModelServiceServicer):
    """Makes one file, in parts; its calls fail as they are told to."""

    def __init__(self, data: bytes = DATA, part: int = PART) -> None:
        self.data = data
        self.part = part
        self.requests: list[Any] = []
        self.left = threading.Event()
        """Set when a client leaves a stream."""
        self.breaks: list[int] = []
        """At which offset each call breaks off, the first first."""
        self.making_s = 0.0
        """How long the file is being made, after a sign of life."""
        self.sent: Callable[[file_pb2.FilePart], file_pb2.FilePart | None] = lambda part: part
        """What is done to a part before it is sent."""

    def ExportModel(self, request: Any, context: grpc.ServicerContext) -> Iterator[Any]:  # noqa: N802
        """Send the file."""
        left = threading.Event()
        context.add_callback(left.set)
        context.add_callback(self.left.set)
        self.requests.append(type(request).FromString(request.SerializeToString()))
        if self.making_s:
            yield file_pb2.FilePart()
            left.wait(self.making_s)
        sha256 = hashlib.sha256(self.data).hexdigest()
        offset = request.offset if request.sha256 in {"", sha256} else 0
        breaks_at = self.breaks.pop(0) if self.breaks else None
        begun = False
        while offset < len(self.data) or not begun:
            if breaks_at is not None and offset >= breaks_at:
                context.abort(CODE.UNAVAILABLE, "Socket closed")
            data, begun = self.data[offset : offset + self.part], True
            part = file_pb2.FilePart(
                offset=offset, data=data, total_bytes=len(self.data), sha256=sha256, file_name=NAME
            )
            if (part := self.sent(part)) is not None:
                yield part
            offset += self.part
        if breaks_at is not None:
            context.abort(CODE.UNAVAILABLE, "Socket closed")


class Shelf(style_service_pb2_grpc.StyleServiceServicer):
    """Gives and takes one style file."""

    def __init__(self) -> None:
        self.requests: list[Any] = []
        self.style = style_service_pb2.Style(name="styles/sea", display_name="The sea")
        self.style.create_time.FromSeconds(1_700_000_000)
        file = self.style.file
        file.sha256, file.total_bytes, file.model, file.model_sha256 = "ab" * 32, 2_400_000, "models/tiny", "cd" * 32
        file.pooling, file.padding = options_pb2.POOLING_AVERAGE, options_pb2.PADDING_MIRROR
        file.sizes_px.extend([256, 512])
        file.layers.extend(["relu1_1", "relu2_1"])
        file.images.add(sha256="ef" * 32, weight=2)
        self.style.prepared.add(model="models/tiny", size_px=256, layers=["relu1_1", "relu2_1"])

    def ExportStyle(self, request: Any, _context: Any) -> Iterator[Any]:  # noqa: N802
        """Send it."""
        self.requests.append(request)
        yield file_pb2.FilePart(
            data=b"moments",
            total_bytes=7,
            sha256=hashlib.sha256(b"moments").hexdigest(),
            file_name="sea.style.safetensors",
        )

    def ImportStyle(self, request: Any, context: grpc.ServicerContext) -> Any:  # noqa: N802
        """Take it."""
        self.requests.append(request)
        if request.data.startswith(b"\x80"):
            context.abort(CODE.INVALID_ARGUMENT, "data is a pickle, which is never loaded")
        return self.style

    def GetStyle(self, _request: Any, _context: Any) -> Any:  # noqa: N802
        """Show it."""
        return self.style

    def ListStyles(self, _request: Any, _context: Any) -> Any:  # noqa: N802
        """List it."""
        return style_service_pb2.ListStylesResponse(styles=[self.style])


# Fetching


def test_a_file_is_fetched_whole(caller: Any, serve: Any) -> None:
    """Every argument arrives, the bytes are the file's, and progress is told from its making to its end."""
    maker = Maker()
    maker.making_s = 0.01
    told: list[tuple[int, int | None]] = []
    file = caller.call(
        serve(maker).address,
        "export_model",
        "tiny",
        graph="closure",
        format="onnx",
        precision="fp16",
        layers=["relu1_1", "relu2_1"],
        content_layers=["relu3_1"],
        style_layers=("relu4_1",),
        pooling="average",
        padding="zeros",
        on_progress=lambda received, total: told.append((received, total)),
    )
    assert file == ExportedFile(data=DATA, name=NAME, sha256=hashlib.sha256(DATA).hexdigest())
    [request] = maker.requests
    assert (request.model, request.offset, request.sha256) == ("tiny", 0, "")
    assert (request.graph, request.format, request.precision) == (4, 2, 2)
    assert (list(request.layers), list(request.content_layers)) == (["relu1_1", "relu2_1"], ["relu3_1"])
    assert list(request.style_layers) == ["relu4_1"]
    assert (request.pooling, request.padding) == (options_pb2.POOLING_AVERAGE, options_pb2.PADDING_ZEROS)
    assert told == [(0, None), *((min(end, 1024), 1024) for end in range(100, 1101, 100))]


def test_what_is_left_out_is_the_servers_choice(caller: Any, serve: Any) -> None:
    """No default of the server's is restated here."""
    maker = Maker()
    caller.call(serve(maker).address, "export_model")
    assert [field.name for field, _ in maker.requests[0].ListFields()] == []


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"graph": "clojure"}, "graph must be one of features, grams, objective, closure, not 'clojure'"),
        ({"format": "pickle"}, "format must be one of torchscript, onnx, pt2, not 'pickle'"),
        ({"precision": "fp8"}, "precision must be one of fp32, fp16, not 'fp8'"),
        ({"pooling": "min"}, "pooling must be one of max, average, l2, not 'min'"),
        ({"padding": "none"}, "padding must be one of zeros, replicate, mirror, not 'none'"),
        ({"layers": [1]}, "layers must be a list of names, not of 1"),
    ],
)
def test_what_there_is_not_is_not_asked_for(caller: Any, serve: Any, wrong: dict[str, Any], message: str) -> None:
    """A choice that the contract does not have is named, with those that it has, before anything is sent."""
    maker = Maker()
    with pytest.raises(InvalidArgumentError, match=message) as caught:
        caller.call(serve(maker).address, "export_model", **wrong)
    assert caught.value.field == next(iter(wrong))
    assert not maker.requests


def test_a_download_that_breaks_off_goes_on_where_it_broke(caller: Any, serve: Any) -> None:
    """What has arrived is not sent again, however often the connection breaks, and the whole is the file."""
    maker = Maker()
    maker.breaks = [200, 200, 700]
    assert caller.call(serve(maker).address, "export_model").data == DATA
    assert [request.offset for request in maker.requests] == [0, 200, 200, 700]
    sha256 = hashlib.sha256(DATA).hexdigest()
    assert [request.sha256 for request in maker.requests] == ["", sha256, sha256, sha256]


def test_another_servers_file_begins_anew(caller: Any, serve: Any) -> None:
    """If a server comes back as a newer one, whose file is another, no byte of the first file is in the result."""
    maker = Maker()
    maker.breaks = [300]

    def newer(part: file_pb2.FilePart) -> file_pb2.FilePart:
        if part.offset == 200:
            maker.data = DATA[::-1][:900]
        return part

    maker.sent = newer
    file = caller.call(serve(maker).address, "export_model")
    assert file.data == DATA[::-1][:900]
    assert file.sha256 == hashlib.sha256(file.data).hexdigest()


def test_a_file_asked_for_from_its_end_is_whole(caller: Any, serve: Any) -> None:
    """When the connection breaks after the last byte, the answer without data is enough."""
    maker = Maker()
    maker.breaks = [len(DATA)]
    assert caller.call(serve(maker).address, "export_model").data == DATA
    assert [request.offset for request in maker.requests] == [0, len(DATA)]


def altered(part: file_pb2.FilePart, at: int, **changes: Any) -> file_pb2.FilePart:
    """Return a part, changed if it is the one at an offset."""
    if part.offset == at:
        for name, value in changes.items():
            setattr(part, name, value)
    return part


@pytest.mark.parametrize(
    ("sent", "message"),
    [
        (lambda part: altered(part, 300, data=bytes(100)), "tiny-closure.onnx arrived damaged"),
        (lambda part: None if part.offset == 300 else part, "part at byte 400 of 1024 does not continue the 300 bytes"),
        (lambda part: altered(part, 300, sha256="00" * 32), "does not continue"),
        (lambda part: altered(part, 300, total_bytes=9), "does not continue"),
        (lambda part: altered(part, 0, offset=1), "part at byte 1 of 1024 does not continue the 0 bytes"),
        (lambda part: None if part.offset == 1000 else part, "the file ended after 1000 of 1024 bytes"),
        (lambda _: file_pb2.FilePart(), "the file ended after 0 of 0 bytes"),
    ],
    ids=["data", "gap", "hash", "length", "late start", "early end", "nothing"],
)
def test_a_damaged_file_is_never_returned(caller: Any, serve: Any, sent: Any, message: str) -> None:
    """Whatever contradicts the announced length and SHA-256 is a BrokenStreamError."""
    maker = Maker()
    maker.sent = sent
    with pytest.raises(BrokenStreamError, match=message):
        caller.call(serve(maker).address, "export_model")


def test_a_server_that_does_not_come_back_is_said(caller: Any, serve: Any) -> None:
    """Patience is bounded; it is renewed by every part, signs of life included."""
    maker = Maker()
    maker.breaks = [100] * 50
    caller.settings["patience_s"] = 0.5
    with pytest.raises(UnavailableError):
        caller.call(serve(maker).address, "export_model")
    assert 2 <= len(maker.requests) < 50


def test_who_stops_reading_hangs_up(caller: Any, serve: Any) -> None:
    """An exception in `on_progress` ends the call on the server, which makes the file for nobody then."""
    maker = Maker()
    maker.making_s = 30

    def give_up(received: int, total: int | None) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        caller.call(serve(maker).address, "export_model", on_progress=give_up)
    assert maker.left.wait(5)


# Styles


def test_a_style_file_is_fetched(caller: Any, serve: Any) -> None:
    """The options of the jobs that it is for arrive, and misspelt ones are named here."""
    shelf = Shelf()
    address = serve(shelf).address
    file = caller.call(address, "export_style", "sea", model="tiny", size_px=256, style_layers={"relu1_1": 1})
    assert (file.data, file.name) == (b"moments", "sea.style.safetensors")
    [request] = shelf.requests
    assert (request.name, request.model) == ("sea", "tiny")
    assert request.options == options_pb2.StylizeOptions(size_px=256, style_layers={"relu1_1": 1})
    with pytest.raises(InvalidArgumentError, match="there is no option 'size': did you mean 'size_px'"):
        caller.call(address, "export_style", "sea", size=256)


def test_a_style_file_is_brought(caller: Any, serve: Any, tmp_path: Path) -> None:
    """By its path, its bytes, or as it was fetched; what comes back says for what it can be used."""
    shelf = Shelf()
    address = serve(shelf).address
    path = tmp_path / "sea.style.safetensors"
    path.write_bytes(b"moments")
    file = ExportedFile(data=b"moments", name=path.name, sha256=hashlib.sha256(b"moments").hexdigest())
    for source in (path, str(path), b"moments", bytearray(b"moments"), file):
        style = caller.call(address, "import_style", source, style_id="sea", display_name="The sea")
    assert [request.data for request in shelf.requests] == [b"moments"] * 5
    assert (shelf.requests[0].style_id, shelf.requests[0].display_name) == ("sea", "The sea")
    assert style.file is not None
    assert (style.file.model, style.file.pooling, style.file.padding) == ("models/tiny", "average", "mirror")
    assert (style.file.sizes_px, style.file.layers) == ((256, 512), ("relu1_1", "relu2_1"))
    assert [(image.sha256, image.weight) for image in style.file.images] == [("ef" * 32, 2)]
    assert style.images == ()


def test_a_style_file_that_is_not_there_is_named(caller: Any, serve: Any, tmp_path: Path) -> None:
    """Its path and the field, and nothing is sent."""
    shelf = Shelf()
    address = serve(shelf).address
    with pytest.raises(InvalidArgumentError, match=r"source: there is no file .*none"):
        caller.call(address, "import_style", tmp_path / "none")
    with pytest.raises(InvalidArgumentError, match="source must be the path of a style file or its bytes, not int"):
        caller.call(address, "import_style", 1)
    assert not shelf.requests


# Files


def test_a_file_goes_where_it_is_wanted(tmp_path: Path) -> None:
    """Under the name given; into a directory under its own, which cannot lead out of it."""
    file = ExportedFile(data=b"abc", name="../../x.onnx", sha256="")
    assert file.save(tmp_path / "y.onnx") == tmp_path / "y.onnx"
    assert file.save(tmp_path) == tmp_path / "x.onnx"
    assert (tmp_path / "x.onnx").read_bytes() == (tmp_path / "y.onnx").read_bytes() == b"abc"
    assert len(list(tmp_path.iterdir())) == 2


# The command line


@pytest.mark.parametrize(
    ("suffix", "expected"), [(".pt", "TORCHSCRIPT"), (".onnx", "ONNX"), (".pt2", "PT2"), (".bin", "UNSPECIFIED")]
)
def test_export_knows_the_format_by_the_files_name(
    nst: Any, serve: Any, tmp_path: Path, suffix: str, expected: str
) -> None:
    """`nst export MODEL -o FILE`: the suffix is enough, and what was written is said on stderr alone."""
    maker = Maker()
    out = tmp_path / f"closure{suffix}"
    done = nst("export", "tiny", "-o", out, "--graph", "closure", address=serve(maker).address)
    assert (done.exit_code, done.stdout) == (0, "")
    assert out.read_bytes() == DATA
    assert done.stderr == f"wrote {out}: 1024 bytes, sha256 {hashlib.sha256(DATA).hexdigest()}\n"
    [request] = maker.requests
    assert (request.model, request.graph) == ("tiny", 4)
    assert request.format == model_service_pb2.ExportFormat.Value(f"EXPORT_FORMAT_{expected}")
    assert [path.name for path in tmp_path.iterdir()] == [out.name]


def test_export_into_a_directory_and_to_stdout(nst: Any, serve: Any, tmp_path: Path) -> None:
    """A directory gets the server's name for the file; stdout its bytes and nothing else."""
    address = serve(Maker()).address
    assert nst("export", "tiny", "-o", tmp_path, "--quiet", address=address).stderr == ""
    assert (tmp_path / NAME).read_bytes() == DATA
    done = nst("export", "tiny", "-o", "-", address=address)
    assert (done.stdout_bytes, done.stderr.split(":")[0]) == (DATA, "wrote stdout")


def test_export_takes_every_flag(nst: Any, serve: Any, tmp_path: Path) -> None:
    """Each reaches its field; lists are separated by commas."""
    maker = Maker()
    flags = ["--format", "onnx", "--precision", "fp16", "--layers", "relu1_1,relu2_1", "--content-layers", "relu3_1"]
    flags += ["--pooling", "l2", "--padding", "replicate", "--style-layers", "relu4_1"]
    assert nst("export", "tiny", "-o", tmp_path, *flags, address=serve(maker).address).exit_code == 0
    [request] = maker.requests
    assert (request.format, request.precision, request.pooling, request.padding) == (2, 2, 3, 2)
    assert list(request.style_layers) == ["relu4_1"]
    assert (list(request.layers), list(request.content_layers)) == (["relu1_1", "relu2_1"], ["relu3_1"])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["-o", "x.onnx", "--format", "pt2"], "'x.onnx' does not name a file of format pt2"),
        (["-o", "none/x.onnx"], "there is no directory 'none'"),
        ([], "must not be empty"),
        (["--graph", "clojure"], "'clojure' is not one of 'features', 'grams', 'objective', 'closure'"),
    ],
)
def test_export_checks_before_it_asks(
    nst: Any, serve: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, arguments: list[str], message: str
) -> None:
    """What cannot work is exit code 2, and the server makes nothing."""
    monkeypatch.chdir(tmp_path)
    maker = Maker()
    done = nst("export", "tiny" if arguments else "", *arguments, address=serve(maker).address)
    assert (done.exit_code, maker.requests) == (2, [])
    assert message in " ".join(done.stderr.replace("│", " ").split())


def test_export_to_a_full_disk(nst: Any, serve: Any, tmp_path: Path) -> None:
    """The message names the file; the old one stays, and nothing is left beside it."""
    file = tmp_path / "x.onnx"
    file.write_bytes(b"old")
    address = serve(Maker()).address
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(DATA) // 2, limits[1]))
    try:
        done = nst("export", "tiny", "-o", file, address=address)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert done.exit_code == 1
    assert done.stderr.splitlines()[-1] == f"nst: File too large: '{file}'"
    assert file.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [file]


def test_export_to_a_reader_that_leaves(serve: Any) -> None:
    """A file that was not read to its end is no success, even where Python does not buffer stdout."""
    address = serve(Maker(bytes(200_000), part=50_000)).address
    process = spawned("export", "tiny", "-o", "-", address=address, unbuffered=True)
    assert process.stdout is not None
    assert process.stdout.read(10) == bytes(10)
    process.stdout.close()
    assert process.wait(20) == 1
    assert process.stderr is not None
    process.stderr.close()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_interrupted_export_leaves_nothing(serve: Any, tmp_path: Path, eventually: Any, number: signal.Signals) -> None:
    """Ctrl-C while the server is making the file: exit code 130, no file, and the server is told."""
    maker = Maker()
    maker.making_s = 30
    process = spawned("export", "tiny", "-o", tmp_path / "x.onnx", address=serve(maker).address)
    eventually(lambda: bool(maker.requests))
    time.sleep(0.3)
    process.send_signal(number)
    code, out, err = ended(process)
    assert (code, out) == (130, b"")
    assert err.splitlines() == ["the server is making the file", "nst: interrupted"]
    assert maker.left.wait(5)
    assert list(tmp_path.iterdir()) == []


def test_export_says_that_the_connection_broke(nst: Any, serve: Any, tmp_path: Path) -> None:
    """And that it stands again; the file is whole."""
    maker = Maker()
    maker.breaks = [500]
    done = nst("export", "tiny", "-o", tmp_path / "x", address=serve(maker).address)
    assert done.stderr.splitlines()[:2] == ["connection lost, trying again", "connected again"]
    assert (tmp_path / "x").read_bytes() == DATA


def test_styles_export_and_import(nst: Any, serve: Any, tmp_path: Path) -> None:
    """There and back; importing prints the name alone, so that a script can use it."""
    shelf = Shelf()
    address = serve(shelf).address
    flags = ["--model", "tiny", "--size-px", 256, "--preset", "gatys", "--style-layers", "relu1_1,relu2_1=2"]
    done = nst("styles", "export", "sea", "-o", tmp_path, *flags, address=address)
    assert (done.exit_code, done.stdout) == (0, "")
    path = tmp_path / "sea.style.safetensors"
    assert path.read_bytes() == b"moments"
    options = options_pb2.StylizeOptions(size_px=256, preset="PRESET_GATYS", style_layers={"relu1_1": 1, "relu2_1": 2})
    assert (shelf.requests[0].name, shelf.requests[0].model, shelf.requests[0].options) == ("sea", "tiny", options)

    done = nst("styles", "import", path, "--id", "sea", "--display-name", "The sea", address=address)
    assert (done.exit_code, done.stdout, done.stderr) == (0, "styles/sea\n", "")
    assert (shelf.requests[1].style_id, shelf.requests[1].display_name) == ("sea", "The sea")
    [line] = nst("styles", "import", path, "--json", address=address).stdout.splitlines()
    assert json.loads(line)["file"]["sizes_px"] == [256, 512]

    path.write_bytes(b"\x80\x04.")
    done = nst("styles", "import", path, address=address)
    assert (done.exit_code, done.stderr) == (2, "nst: data is a pickle, which is never loaded\n")


def test_styles_show_says_what_an_imported_style_is_for(nst: Any, serve: Any) -> None:
    """Model, pooling, padding, sizes and layers, and what it was made of; the list says that it was imported."""
    address = serve(Shelf()).address
    assert "imported" in nst("styles", "list", address=address).stdout
    shown = nst("styles", "show", "sea", address=address).stdout.splitlines()
    assert shown == [
        "styles/sea",
        "The sea",
        "created 2023-11-14 22:13 UTC",
        f"imported, 2.4 MB, sha256 {'ab' * 32}",
        f"for models/tiny, pooling average, padding mirror; of weights {'cd' * 32}",
        f"image, weight 2, sha256 {'ef' * 32}",
        "prepared for models/tiny at 256 px: relu1_1, relu2_1",
    ]


def test_a_closed_client_fetches_nothing(serve: Any) -> None:
    """Closing a client in the middle of a download ends it, in the thread that waits, too."""
    maker = Maker()
    maker.making_s = 30
    client = Client(serve(maker).address)
    errors: list[BaseException] = []

    def fetch() -> None:
        try:
            client.export_model()
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=fetch)
    thread.start()
    deadline = time.monotonic() + 5
    while not maker.requests:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    client.close()
    thread.join(5)
    assert [type(error) for error in errors] == [ClientClosedError]
    assert maker.left.wait(5)


# What is in a file


@pytest.fixture(scope="module")
def artifacts(tiny_weights_file: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """An exported model and a style file, written by the core."""
    weights = nst_model.load_weights("vgg16", tiny_weights_file)
    spec = nst_model.ExportSpec(model="vgg16", graph="closure", format="torchscript", padding="mirror")
    style = nst_model.Style(torch.rand(3, 48, 64), name="ab" * 32)
    options = nst_model.StylizeOptions(size_px=64, first_size_px=40, precision="fp32")
    kept = nst_model.prepare_style(nst_model.FeatureModel(weights, "cpu"), [style], options, display_name="The [sea]")
    folder = tmp_path_factory.mktemp("artifacts")
    found = {"model": folder / "closure.pt", "style": folder / "sea.style.safetensors"}
    found["model"].write_bytes(nst_model.export(weights, spec))
    found["style"].write_bytes(kept.to_bytes())
    return found


def test_inspect_says_what_a_model_is(nst: Any, artifacts: dict[str, Path]) -> None:
    """`nst inspect FILE` needs no server: graph, format, model, licence, contract of the input, names and shapes."""
    done = nst("inspect", artifacts["model"])
    assert (done.exit_code, done.stderr) == (0, "")
    lines = done.stdout.splitlines()
    assert lines[0].startswith(f"{artifacts['model']}: ")
    assert lines[0].endswith(", whole and unaltered")
    assert lines[1].startswith("graph      closure, torchscript, fp32, torch ")
    assert lines[2] == "model      vgg16: VGG-16 (ImageNet), licence BSD-3-Clause"
    assert "network    vgg16, pooling max, padding mirror" in lines
    assert "margin     mirror the picture by 16 px on each side first" in lines
    assert "inputs     image            float32 (batch, 3, height, width)" in lines
    assert "           gradient         float32 (batch, 3, height, width)" in lines
    assert lines[-1].startswith("made by nst-service ")


def test_inspect_says_what_a_style_is(nst: Any, artifacts: dict[str, Path]) -> None:
    """Model, sizes, layers, and the images that it was made of."""
    lines = nst("inspect", artifacts["style"]).stdout.splitlines()
    assert lines[1] == "style      The [sea], safetensors, fp32"
    assert "sizes      45, 64 px" in lines
    assert "layers     relu1_1, relu2_1, relu3_1, relu4_1, relu5_1" in lines
    assert f"image      share 1, sha256 {'ab' * 32}" in lines


def test_terminals_are_told_nothing_by_a_file(nst: Any, serve: Any, artifacts: dict[str, Path], tmp_path: Path) -> None:
    """Control characters in names are shown as escapes, of files and of styles on a server."""
    described = nst_model.read_description(artifacts["style"])
    evil = "\x1b]0;owned\x07\x9b31m\u202e"
    file = tmp_path / "a.style.safetensors"
    file.write_bytes(sealed_safetensors({}, {**described, "display_name": evil, "layers": [evil]}))
    shelf = Shelf()
    shelf.style.display_name = evil
    address = serve(shelf).address
    for arguments in (("inspect", file), ("styles", "show", "sea"), ("styles", "list")):
        done = nst(*arguments, address=address)
        assert done.exit_code == 0, done.stderr
        assert all(line.isprintable() for line in done.stdout.splitlines()), done.stdout
        assert r"\x1b]0;owned\x07\x9b31m\u202e" in done.stdout


def test_inspect_for_programs(nst: Any, artifacts: dict[str, Path]) -> None:
    """`--json` prints the description as it stands in the file, on one line."""
    for file in artifacts.values():
        [line] = nst("inspect", file, "--json").stdout.splitlines()
        assert json.loads(line) == nst_model.read_description(file)


def test_inspect_refuses_what_is_not_as_it_was_written(nst: Any, artifacts: dict[str, Path], tmp_path: Path) -> None:
    """Truncated, damaged, altered, a pickle, something else, nothing: exit code 2 and one line that says which."""
    model = artifacts["model"].read_bytes()
    bad = {
        "truncated": model[: len(model) // 2],
        "damaged": model.replace(b"relu4_2", b"relu4_3"),
        "altered": artifacts["style"].read_bytes().replace(b"The [sea]", b"The [see]"),
        "pickle": pickle.dumps({"weights": 1}),
        "no artifact": b"hello",
        "surrogates": b"\x60"
        + bytes(7)
        + b'{"__metadata__":{"nst.json":"{}"},"\\ud800":{"dtype":"F32","shape":[0],"data_offsets":[0,0]}}'.ljust(96),
        "neither graph nor style": sealed_safetensors({}, {"format_version": 1, "kind": ["graph"]}),
    }
    for what, data in bad.items():
        (tmp_path / "file").write_bytes(data)
        done = nst("inspect", tmp_path / "file")
        assert (done.exit_code, done.stdout) == (2, ""), what
        [line] = done.stderr.splitlines()
        assert line.startswith(f"nst: '{tmp_path / 'file'}': ")
        assert what in line
    done = nst("inspect", "/dev/zero")
    assert (done.exit_code, "more than" in done.stderr) == (2, True)
    for path in (tmp_path, tmp_path / "none"):
        done = nst("inspect", path)
        assert done.exit_code == 2
        assert done.stderr.startswith(f"nst: cannot read '{path}': ")


def test_inspect_imports_no_torch(artifacts: dict[str, Path]) -> None:
    """It works in a client's installation, and at once."""
    code = (
        "import sys; from nst_client.inspection import read_description; read_description(sys.argv[1]);"
        "print(*sorted({name.partition('.')[0] for name in sys.modules}))"
    )
    command = [sys.executable, "-c", code, str(artifacts["style"])]
    loaded = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
    assert not {"torch", "numpy", "safetensors", "onnx"} & set(loaded)
