"""What artifacts say of themselves, and what is said of files that are none or not whole."""

from __future__ import annotations

import io
import json
import pickle
import subprocess
import sys
import zipfile
from collections.abc import Callable, Mapping
from contextlib import nullcontext as nothing
from pathlib import Path

import onnx
import pytest
import safetensors.torch
import torch

from nst_model import ExportFormat, ExportSpec, InvalidArtifact, StyleFile, StylizeOptions, export, read_description
from nst_model.artifact import FORMAT_VERSION, sealed_archive, sealed_onnx, sealed_safetensors
from nst_model.preparation import prepare_style
from nst_model.stylization import FeatureModel, Style
from nst_model.weights import FeatureWeights

KINDS = ("torchscript", "pt2", "onnx", "style")


@pytest.fixture(scope="module")
def files(tiny_weights: FeatureWeights) -> dict[str, bytes]:
    """An artifact of each kind."""
    specs = {
        format.value: ExportSpec(model="vgg16", graph="features", format=format, layers=("relu1_1", "relu1_2"))  # type: ignore[arg-type]
        for format in ExportFormat
    }
    options = StylizeOptions(size_px=32, first_size_px=32, precision="fp32")  # type: ignore[arg-type]
    picture = torch.rand(3, 32, 24, generator=torch.Generator().manual_seed(1))
    style = prepare_style(FeatureModel(tiny_weights, "cpu"), [Style(picture, name="ab" * 32)], options)
    return {name: export(tiny_weights, spec) for name, spec in specs.items()} | {"style": style.to_bytes()}


def test_description_says_what_a_file_contains(files: Mapping[str, bytes]) -> None:
    """In one order in all formats, and readable from a path as well."""
    described = {kind: read_description(files[kind]) for kind in KINDS}
    graphs = [described[format.value] for format in ExportFormat]
    assert all(list(graph) == list(graphs[0]) for graph in graphs)
    assert [graph["format"] for graph in graphs] == ["torchscript", "onnx", "pt2"]
    assert {(graph["kind"], graph["graph"], graph["model"], graph["license"]) for graph in graphs} == {
        ("graph", "features", "vgg16", "BSD-3-Clause")
    }
    assert graphs[0]["inputs"] == [{"name": "image", "dtype": "float32", "shape": ["batch", 3, "height", "width"]}]
    assert [output["name"] for output in graphs[0]["outputs"]] == ["relu1_1", "relu1_2"]
    assert graphs[0]["normalization"]["mean"] == [0.485, 0.456, 0.406]
    assert described["style"]["kind"] == "style"
    assert described["style"]["sizes_px"] == [32]


def test_descriptions_are_read_without_torch(files: Mapping[str, bytes], tmp_path: Path) -> None:
    """By the standard library alone: so does a client, and the server's front."""
    for kind, data in files.items():
        (tmp_path / kind).write_bytes(data)
    program = (
        "import sys; from pathlib import Path; from nst_model.artifact import read_description\n"
        f"for file in Path({str(tmp_path)!r}).iterdir(): print(read_description(file)['kind'])\n"
        "assert not {'torch', 'numpy', 'onnx', 'safetensors', 'google.protobuf'} & sys.modules.keys()\n"
    )
    done = subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, text=True)
    assert sorted(done.stdout.split()) == ["graph", "graph", "graph", "style"]


def test_descriptions_are_where_each_formats_readers_find_them(files: Mapping[str, bytes], tmp_path: Path) -> None:
    """As extra file, metadata of the model, or metadata of the tensors, and the same text in all."""
    extra = {"nst.json": ""}
    torch.jit.load(io.BytesIO(files["torchscript"]), _extra_files=extra)  # type: ignore[no-untyped-call]
    assert json.loads(extra["nst.json"]) == read_description(files["torchscript"])
    extra = {"nst.json": ""}
    torch.export.load(io.BytesIO(files["pt2"]), extra_files=extra)
    assert json.loads(extra["nst.json"]) == read_description(files["pt2"])
    entry = onnx.load_from_string(files["onnx"]).metadata_props[-1]
    assert (entry.key, json.loads(entry.value)) == ("nst.json", read_description(files["onnx"]))
    (tmp_path / "style").write_bytes(files["style"])
    with safetensors.safe_open(tmp_path / "style", framework="np") as archive:
        assert json.loads(archive.metadata()["nst.json"]) == read_description(files["style"])


@pytest.mark.parametrize("kind", KINDS)
def test_truncated_files_are_refused(files: Mapping[str, bytes], kind: str) -> None:
    """Wherever they end."""
    data = files[kind]
    for length in {0, 1, 7, 8, 9, 100, *range(0, len(data), len(data) // 40), *range(len(data) - 40, len(data))}:
        with pytest.raises(InvalidArtifact):
            read_description(data[:length])


@pytest.mark.parametrize("kind", KINDS)
def test_files_with_something_behind_them_are_refused(files: Mapping[str, bytes], kind: str) -> None:
    """Whatever is there no digest covers."""
    for more in (b"\0", b"more", files[kind]):
        with pytest.raises(InvalidArtifact):
            read_description(files[kind] + more)


@pytest.mark.parametrize("kind", KINDS)
def test_altered_files_are_refused(files: Mapping[str, bytes], kind: str) -> None:
    """One bit of the content or of the description, anywhere. An archive's paddings and dates are neither."""
    data = bytearray(files[kind])
    places = range(3, len(data), len(data) // 150)
    if kind in ("torchscript", "pt2"):
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            starts = [
                (entry.header_offset + 30 + len(entry.filename) + len(entry.extra), entry.file_size)
                for entry in archive.infolist()
                if entry.file_size
            ]
        places = [start + offset for start, size in starts for offset in {0, size // 2, size - 1}]  # type: ignore[assignment]
    for place in places:
        data[place] ^= 4
        with pytest.raises(InvalidArtifact):
            read_description(bytes(data))
        data[place] ^= 4
    assert read_description(bytes(data))


def test_another_version_is_named(files: Mapping[str, bytes]) -> None:
    """Even if nothing else of it could be read."""
    newer = {**read_description(files["onnx"]), "format_version": FORMAT_VERSION + 1}
    for data in (sealed_archive({"data": b"x"}, newer), sealed_onnx(b"", newer), sealed_safetensors({}, newer)):
        with pytest.raises(InvalidArtifact, match=r"format version 2; this program reads version 1"):
            read_description(data)


class Trap:
    """What leaves a trace when it is unpickled."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> tuple[Callable[..., object], tuple[object, ...]]:
        return Path.touch, (self.trace,)


def test_pickles_in_disguise_are_refused_and_not_run(files: Mapping[str, bytes], tmp_path: Path) -> None:
    """A bare one, one as PyTorch writes it, and one among the members of a pt2 archive that is otherwise ours."""
    trace = tmp_path / "it ran"
    described = read_description(files["pt2"])
    with zipfile.ZipFile(io.BytesIO(files["pt2"])) as archive:
        ours = {name.removeprefix("archive/"): archive.read(name) for name in archive.namelist()}
    del ours["extra/nst.json"]
    saved = io.BytesIO()
    torch.save(Trap(trace), saved)
    weights = {
        "data/weights/model_weights_config.json": ours["data/weights/model_weights_config.json"].replace(
            b"false", b"true"
        )
    }
    for data, message in (
        (pickle.dumps(Trap(trace)), "is a pickle, which could run any program and is never loaded"),
        (saved.getvalue(), "no artifact of this project"),
        (
            sealed_archive(ours | {"data/sample_inputs/model.pt": saved.getvalue()}, described),
            "pt in the file has a pickle",
        ),
        (sealed_archive(ours | weights, described), "_weights_config.json in the file has a pickle"),
    ):
        for name in ("model.pt", "model.onnx", "a.style.safetensors"):
            (tmp_path / name).write_bytes(data)
            with pytest.raises(InvalidArtifact, match=message):
                read_description(tmp_path / name)
        with pytest.raises(InvalidArtifact):
            StyleFile.from_bytes(data)
    assert not trace.exists()


def test_archives_that_two_readers_read_otherwise_are_refused(files: Mapping[str, bytes]) -> None:
    """A member twice, a compressed one, one outside of the archive's folder."""
    described = read_description(files["torchscript"])
    for name, compression, message in (
        ("archive/data", zipfile.ZIP_STORED, "archive/data' in it is compressed, twice"),
        ("archive/bomb", zipfile.ZIP_DEFLATED, "archive/bomb' in it is compressed"),
        ("../../etc/passwd", zipfile.ZIP_STORED, "passwd' in it is .* or not in archive/"),
    ):
        buffer = io.BytesIO(sealed_archive({"data": b"x" * 1000}, described))
        with zipfile.ZipFile(buffer, "a") as archive, pytest.warns(UserWarning) if "data" in name else nothing():
            archive.writestr(name, b"x" * 1000, compression)
        with pytest.raises(InvalidArtifact, match=message):
            read_description(buffer.getvalue())


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\x08",
        b"PK\x03\x04",
        b"PK\x03\x04" + bytes(100),
        b"\xff" * 64,
        b"{}",
        bytes(8) + b"{}",
        b"\x89PNG\r\n" * 9,
    ],
)
def test_other_files_are_refused(data: bytes) -> None:
    """Whatever they are, in words and not in a traceback."""
    with pytest.raises(InvalidArtifact, match="the file"):
        read_description(data)


def test_standard_files_of_others_are_refused(tiny_weights_file: Path) -> None:
    """A model of ONNX and tensors that this project did not write have no description."""
    with pytest.raises(InvalidArtifact, match="no artifact of this project"):
        read_description(tiny_weights_file)
    graph = onnx.helper.make_graph([], "empty", [], [])
    with pytest.raises(InvalidArtifact, match="no artifact of this project: it has no description at its end"):
        read_description(onnx.helper.make_model(graph).SerializeToString())
