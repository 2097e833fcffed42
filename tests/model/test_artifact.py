"""What artifacts say of themselves, and what is said of files that are none or not whole."""

from __future__ import annotations

import io
import json
import pickle
import re
import struct
import subprocess
import sys
import tracemalloc
import zipfile
from collections.abc import Callable, Mapping
from contextlib import nullcontext as nothing
from pathlib import Path

import onnx
import pytest
import safetensors.torch
import torch

from nst_model import (
    ExportFormat,
    ExportSpec,
    InvalidArtifact,
    StyleFile,
    StylizeOptions,
    export,
    load_graph,
    read_description,
)
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
    """One bit of the content, of the description, or of what is between them, anywhere."""
    data = bytearray(files[kind])
    places = {*range(3, len(data), len(data) // 150)}
    if kind in ("torchscript", "pt2"):
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            for entry in archive.infolist():
                places |= {*range(entry.header_offset, entry.header_offset + 64)}
            places |= {*range(archive.start_dir, archive.start_dir + 100), *range(len(data) - 60, len(data))}
    for place in places:
        data[place] ^= 4
        with pytest.raises(InvalidArtifact):
            read_description(bytes(data))
        data[place] ^= 4
    assert read_description(bytes(data))


def test_another_version_is_named(files: Mapping[str, bytes]) -> None:
    """Even if nothing else of it could be read."""
    newer = {**read_description(files["onnx"]), "format_version": FORMAT_VERSION + 1}
    for data in (sealed_archive({"new": b"x"}, newer), sealed_onnx(b"", newer), sealed_safetensors({}, newer)):
        with pytest.raises(InvalidArtifact, match=r"format version 2; this program reads version 1"):
            read_description(data)


@pytest.mark.parametrize("kind", ["banana", ["graph"], None])
def test_other_kinds_are_refused(kind: object) -> None:
    """Neither a graph nor a style, whatever else is said."""
    with pytest.raises(InvalidArtifact, match="neither graph nor style but"):
        read_description(sealed_onnx(b"", {"format_version": FORMAT_VERSION, "kind": kind}))


class Trap:
    """What leaves a trace when it is unpickled."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> tuple[Callable[..., object], tuple[object, ...]]:
        return Path.touch, (self.trace,)


Members = dict[str, bytes]


@pytest.fixture
def trace(tmp_path: Path) -> Path:
    """What is there after a `Trap` was run."""
    return tmp_path / "it ran"


@pytest.fixture
def ours(files: Mapping[str, bytes]) -> Members:
    """What there is in a pt2 file of ours but for the description."""
    with zipfile.ZipFile(io.BytesIO(files["pt2"])) as archive:
        found = {name.removeprefix("archive/"): archive.read(name) for name in archive.namelist()}
    del found["extra/nst.json"]
    return found


def test_pickles_in_disguise_are_refused_and_not_run(trace: Path, tmp_path: Path) -> None:
    """A bare one, and one as PyTorch writes it, whatever the file is called."""
    saved = io.BytesIO()
    torch.save(Trap(trace), saved)
    for data, message in (
        (pickle.dumps(Trap(trace)), "is a pickle, which could run any program and is never loaded"),
        (saved.getvalue(), "no artifact of this project"),
    ):
        for name in ("model.pt", "model.onnx", "a.style.safetensors"):
            (tmp_path / name).write_bytes(data)
            with pytest.raises(InvalidArtifact, match=message):
                read_description(tmp_path / name)
        with pytest.raises(InvalidArtifact):
            StyleFile.from_bytes(data)
    assert not trace.exists()


WEIGHTS, CONSTANTS = (f"data/{kind}/model_{kind}_config.json" for kind in ("weights", "constants"))


def pickled_weight(spelling: str) -> Callable[[Members, Trap], Members]:
    """Return what makes torch unpickle a weight of an archive, with `use_pickle` spelled so."""

    def alter(ours: Members, trap: Trap) -> Members:
        saved = io.BytesIO()
        torch.save(trap, saved)
        config = ours[WEIGHTS].replace(b'"use_pickle": false', spelling.encode(), 1)
        [path, *_] = (entry["path_name"] for entry in json.loads(config)["config"].values())
        return {WEIGHTS: config, f"data/weights/{path}": saved.getvalue()}

    return alter


def pickled_constant(prefix: str) -> Callable[[Members, Trap], Members]:
    """Return what adds a constant that torch unpickles for the name of its file alone."""

    def alter(ours: Members, trap: Trap) -> Members:
        [entry, *_] = json.loads(ours[WEIGHTS])["config"].values()
        entry["path_name"] = f"{prefix}0"
        return {
            CONSTANTS: json.dumps({"config": {"x": entry}}).encode(),
            f"data/constants/{prefix}0": pickle.dumps(trap, 2),
        }

    return alter


def in_program(before: str, after: str) -> Callable[[Members, Trap], Members]:
    """Return what replaces something in a program; TRAP in `after` is a Python expression that leaves the trace."""

    def alter(ours: Members, trap: Trap) -> Members:
        evil = f"__import__('pathlib').Path('{trap.trace}').touch()"
        program = re.sub(before, lambda _: after.replace("TRAP", evil), ours["models/model.json"].decode(), count=1)
        assert program != ours["models/model.json"].decode()
        return {"models/model.json": program.encode()}

    return alter


@pytest.mark.filterwarnings("ignore")  # torch warns of what is wrong with them
@pytest.mark.parametrize(
    "alter",
    [
        pytest.param(pickled_weight('"use_pickle": true'), id="pickled weight"),
        pytest.param(pickled_weight('"use_pickle" : true'), id="with a space"),
        pytest.param(pickled_weight(r'"use_pickl\u0065": true'), id="with an escape"),
        pytest.param(pickled_weight('"use_pickle": 1'), id="with a 1"),
        pytest.param(pickled_constant("opaque_obj_"), id="opaque object"),
        pytest.param(pickled_constant("custom_obj_"), id="custom object"),
        pytest.param(in_program('"expr_str": "[^"]*"', '"expr_str": "TRAP"'), id="expression that sympy evaluates"),
        pytest.param(
            in_program(r'"guards_code": \[\]', '"guards_code": ["TRAP is None"]'), id="guard that Python compiles"
        ),
        pytest.param(
            in_program(r"torch\.ops\.aten\.relu_\.default", "torch.ops.aten.from_file.default"), id="another operator"
        ),
        pytest.param(
            in_program('"in_spec": "', '"in_spec": "' + r"null\"" * 60 + "x"),
            id="text that could be matched in many ways",
        ),
        pytest.param(lambda *_: {"data/aotinductor/model/a.so": b"\x7fELF"}, id="native code"),
        pytest.param(lambda ours, _: {"data/sample_inputs/model.pt": ours[WEIGHTS]}, id="example inputs"),
        pytest.param(lambda *_: {"models/model.json": b"[" * 100_000}, id="too deep to be read"),
        pytest.param(lambda *_: {CONSTANTS: b'{"config": [1]}'}, id="not as torch writes it"),
    ],
)
def test_programs_in_a_pt2_file_are_refused_and_not_run(
    files: Mapping[str, bytes], ours: Members, trace: Path, alter: Callable[[Members, Trap], Members]
) -> None:
    """Whatever torch would unpickle, evaluate or compile while it loads an archive that is otherwise ours."""
    data = sealed_archive(ours | alter(ours, Trap(trace)), read_description(files["pt2"]))
    for read in (read_description, load_graph):
        with pytest.raises(InvalidArtifact, match=r"could run something|never loaded|cannot be read"):
            read(data)
    assert not trace.exists()


def test_archives_that_two_readers_read_otherwise_are_refused(files: Mapping[str, bytes]) -> None:
    """A member twice, a compressed one, one outside of the archive's folder, one that no model has."""
    described = read_description(files["torchscript"])
    for name, compression in (
        ("archive/version", zipfile.ZIP_STORED),
        ("archive/code/bomb.py", zipfile.ZIP_DEFLATED),
        ("../../etc/passwd", zipfile.ZIP_STORED),
    ):
        buffer = io.BytesIO(sealed_archive({"version": b"x" * 1000}, described))
        with zipfile.ZipFile(buffer, "a") as archive, pytest.warns(UserWarning) if "version" in name else nothing():
            archive.writestr(name, b"x" * 1000, compression)
        with pytest.raises(InvalidArtifact, match="has more in it than its members"):
            read_description(buffer.getvalue())
    with pytest.raises(InvalidArtifact, match=r"'serialized_exported_program\.json' in the file may be a program"):
        read_description(sealed_archive({"serialized_exported_program.json": b"{}"}, described))


def archive_of_many() -> bytes:
    """Return an archive of more members than any model has."""
    return sealed_archive({f"code/{number}.py": b"" for number in range(20_000)}, {"format_version": FORMAT_VERSION})


def header_of(size: int) -> bytes:
    """Return a style file with a header of that many bytes."""
    text = b"[" + b"[]," * (size // 3) + b"[]]"
    return struct.pack("<Q", len(text) + 4) + b'{"":' + text


@pytest.mark.parametrize(
    "data",
    [b"\x0a\x00" * (1 << 21), b"\x08\x00" * (1 << 21), archive_of_many(), header_of(1 << 23)],
    ids=["fields", "numbers", "members", "header"],
)
def test_bombs_are_refused_at_once(data: bytes) -> None:
    """A few megabytes of empty parts take neither memory nor time."""
    tracemalloc.start()
    try:
        with pytest.raises(InvalidArtifact, match=r"has more than 1000|at most 1048576 are read"):
            read_description(data)
        assert tracemalloc.get_traced_memory()[1] < 1 << 20
    finally:
        tracemalloc.stop()


def test_texts_that_cannot_be_encoded_are_refused(files: Mapping[str, bytes]) -> None:
    """Half of a surrogate pair in a tensor's name or in a description, and numbers that JSON has not."""
    described = read_description(files["style"])
    header = b'{"__metadata__":{"nst.json":"{}"},"\\ud800":{"dtype":"F32","shape":[0],"data_offsets":[0,0]}}'
    with pytest.raises(InvalidArtifact, match="surrogates not allowed"):
        read_description(struct.pack("<Q", len(header)) + header)
    for said in (b'"\\ud800"', b"NaN"):
        data = sealed_onnx(b"", {**described, "display_name": "replaced"}).replace(b'"replaced"', said.ljust(10))
        with pytest.raises(InvalidArtifact, match="description cannot be read"):
            read_description(data)


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
