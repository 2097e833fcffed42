"""Exported files, in the runtimes that they are meant for."""

from __future__ import annotations

import dataclasses
import functools
import io
import os
import re
import resource
import subprocess
import sys
import sysconfig
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path

import onnx
import pytest
import safetensors.torch
import torch
from torch import Tensor

from nst_model import (
    CARDS,
    DEFAULT_MODEL,
    ExportFormat,
    ExportGraph,
    ExportPrecision,
    ExportSpec,
    InvalidArtifact,
    InvalidOption,
    Padding,
    Pooling,
    UnknownModel,
    export,
    load_graph,
    load_weights,
    read_description,
    write_artifact,
)
from nst_model.architecture import VGG16
from nst_model.exports import EXAMPLE_SIZES, graph_module
from nst_model.traced import round_weights
from nst_model.weights import FeatureWeights
from tests.conftest import TINY_WIDTHS, random_state
from tests.model.graphs import (
    SIZES,
    Graph,
    assert_alike,
    distance,
    expected,
    flat,
    inputs_for,
    loaded,
    noise,
    positional,
)

Exported = Callable[[ExportSpec], bytes]

SHALLOW = {"content_layers": ("relu2_2",), "style_layers": ("relu1_1", "relu2_1")}
"""Layers of a network that is traced in seconds."""


def spec_of(graph: ExportGraph, format: ExportFormat, *, deep: bool = False, **rest: object) -> ExportSpec:
    """Return a spec for a model of the tests, down to relu5_1 or only to relu2_2."""
    layers: dict[str, object] = {}
    if not deep:
        match graph:
            case ExportGraph.FEATURES:
                layers = {"layers": ("relu1_1", "relu2_2")}
            case ExportGraph.GRAMS:
                layers = {"style_layers": SHALLOW["style_layers"]}
            case _:
                layers = dict(SHALLOW)
    return ExportSpec(model="vgg16", graph=graph, format=format, **layers, **rest)  # type: ignore[arg-type]


@pytest.fixture(scope="session")
def exported(plain_weights: FeatureWeights) -> Exported:
    """Export once for all tests."""
    return functools.cache(lambda spec: export(plain_weights, spec))


def assert_parity(weights: FeatureWeights, spec: ExportSpec, graph: Graph, tolerance: float = 1e-5) -> None:
    """Fail unless a graph yields what the engine does, at every size, of noise and of flat pictures."""
    for inputs in pictures(weights, spec):
        assert_alike(graph(inputs), expected(weights, spec, inputs), tolerance)


def pictures(weights: FeatureWeights, spec: ExportSpec) -> Iterator[dict[str, Tensor]]:
    """Yield the inputs of a graph for noise and for flat pictures, at sizes that it was not traced with."""
    for size in SIZES:
        assert not {*size[1:]} & {*EXAMPLE_SIZES.values()}
        for image in (noise(*size), flat(*size)):
            yield inputs_for(weights, spec, image)


@pytest.mark.parametrize("padding", [Padding.ZEROS, Padding.MIRROR])
@pytest.mark.parametrize("pooling", Pooling)
@pytest.mark.parametrize("graph", ExportGraph)
def test_torchscript_is_the_engine(
    exported: Exported, plain_weights: FeatureWeights, graph: ExportGraph, pooling: Pooling, padding: Padding
) -> None:
    """All four graphs, every pooling and padding, down to relu5_1."""
    spec = spec_of(graph, ExportFormat.TORCHSCRIPT, deep=True, pooling=pooling, padding=padding)
    assert_parity(plain_weights, spec, loaded(exported(spec)))


@pytest.mark.parametrize(
    ("graph", "pooling", "padding", "deep"),
    [
        (ExportGraph.FEATURES, Pooling.MAX, Padding.ZEROS, True),
        (ExportGraph.GRAMS, Pooling.L2, Padding.REPLICATE, True),
        (ExportGraph.OBJECTIVE, Pooling.AVERAGE, Padding.ZEROS, False),
        (ExportGraph.CLOSURE, Pooling.MAX, Padding.ZEROS, False),
        (ExportGraph.CLOSURE, Pooling.AVERAGE, Padding.REPLICATE, False),
        (ExportGraph.CLOSURE, Pooling.L2, Padding.ZEROS, False),
    ],
)
def test_pt2_is_the_engine(
    exported: Exported,
    plain_weights: FeatureWeights,
    graph: ExportGraph,
    pooling: Pooling,
    padding: Padding,
    deep: bool,
) -> None:
    """All four graphs, every pooling, at sizes that were never seen."""
    spec = spec_of(graph, ExportFormat.PT2, deep=deep, pooling=pooling, padding=padding)
    assert_parity(plain_weights, spec, loaded(exported(spec)))


@pytest.mark.parametrize(
    ("graph", "pooling", "padding"),
    [
        (ExportGraph.FEATURES, Pooling.MAX, Padding.ZEROS),
        (ExportGraph.FEATURES, Pooling.AVERAGE, Padding.REPLICATE),
        (ExportGraph.GRAMS, Pooling.MAX, Padding.REPLICATE),
        (ExportGraph.GRAMS, Pooling.AVERAGE, Padding.ZEROS),
        (ExportGraph.OBJECTIVE, Pooling.MAX, Padding.ZEROS),
        (ExportGraph.OBJECTIVE, Pooling.AVERAGE, Padding.ZEROS),
        (ExportGraph.CLOSURE, Pooling.MAX, Padding.ZEROS),
        (ExportGraph.CLOSURE, Pooling.AVERAGE, Padding.REPLICATE),
        (ExportGraph.CLOSURE, Pooling.L2, Padding.ZEROS),
    ],
)
def test_onnx_is_the_engine(
    exported: Exported, plain_weights: FeatureWeights, graph: ExportGraph, pooling: Pooling, padding: Padding
) -> None:
    """In onnxruntime; the closure of a real network has a test of its own below."""
    spec = spec_of(graph, ExportFormat.ONNX, pooling=pooling, padding=padding)
    data = exported(spec)
    assert_checked(data)
    assert_parity(plain_weights, spec, loaded(data))


def assert_checked(data: bytes) -> None:
    """Fail unless ONNX's own checker is content, and the file is what its description says."""
    model = onnx.load_from_string(data)
    onnx.checker.check_model(model, full_check=True)
    description = read_description(data)
    assert [(entry.domain, entry.version) for entry in model.opset_import] == [("", description["opset"])]
    assert len(model.graph.node) == description["nodes"]
    for values, described in ((model.graph.input, "inputs"), (model.graph.output, "outputs")):
        found = [
            (value.name, [edge.dim_param or edge.dim_value for edge in value.type.tensor_type.shape.dim])
            for value in values
        ]
        assert found == [(value["name"], value["shape"]) for value in description[described]]
        assert {value.type.tensor_type.elem_type for value in values} == {onnx.TensorProto.FLOAT}


@pytest.fixture(scope="module")
def real_closure(real_cache: None) -> bytes:
    """The closure of the default model's own weights in ONNX: the layers of the paper, max pooling."""
    return export(load_weights(DEFAULT_MODEL), ExportSpec())


@pytest.mark.usefixtures("real_cache")
def test_real_closure_in_onnx(real_closure: bytes) -> None:
    """A real network, all of it, is the engine's."""
    weights = load_weights(DEFAULT_MODEL)
    assert_checked(real_closure)
    graph = loaded(real_closure)
    jumps = 0
    for inputs in pictures(weights, ExportSpec()):
        found, wanted = graph(inputs), expected(weights, ExportSpec(), inputs)
        slope, true = found.pop("gradient"), wanted.pop("gradient")
        assert_alike(found, wanted, 1e-5)
        assert distance(slope, true) < 1e-2
        jumps += distance(slope, true) > 1e-5
    # Of half a million ReLUs and maxima one may lie so near to changing sides that another way of rounding moves it;
    # then the gradient jumps.
    assert jumps <= 2


def test_halved_weights_are_the_rounded_models(exported: Exported, plain_weights: FeatureWeights) -> None:
    """fp16 in the file, fp32 everywhere else: half the size, and the gradient of the model of the rounded weights."""
    spec = spec_of(ExportGraph.CLOSURE, ExportFormat.ONNX, pooling=Pooling.L2)
    data = exported(dataclasses.replace(spec, precision=ExportPrecision.FP16))
    assert_checked(data)
    assert kernel_bytes(data) == kernel_bytes(exported(spec)) / 2
    graph, rounded = loaded(data), graph_module(plain_weights, spec)
    round_weights(rounded)
    for inputs in pictures(plain_weights, spec):
        found, wanted = graph(inputs), expected(plain_weights, spec, inputs)
        with torch.no_grad():
            assert distance(found["gradient"], rounded(*positional(inputs))[-1]) < 1e-5
        assert_alike({**found, "gradient": wanted["gradient"]}, wanted, 2e-3)


def kernel_bytes(data: bytes) -> int:
    """Return how much room the convolutions' weights take in an ONNX file."""
    tensors = onnx.load_from_string(data).graph.initializer
    return sum(len(tensor.raw_data) for tensor in tensors if tensor.dims[2:] == [3, 3])


@pytest.mark.usefixtures("real_cache")
def test_losses_of_a_real_network_with_rounded_weights() -> None:
    """They are the engine's to 2e-3, since each kernel sums to what it did."""
    weights = load_weights(DEFAULT_MODEL)
    spec = ExportSpec(graph=ExportGraph.OBJECTIVE)
    module, rounded = graph_module(weights, spec), graph_module(weights, spec)
    round_weights(rounded)
    for name, kernels in rounded.named_buffers():
        if kernels.ndim == 4 and kernels.shape[2] == 3:
            assert torch.equal(kernels, kernels.half().float())
            sums = kernels.sum(dim=(2, 3)) - module.get_buffer(name).sum(dim=(2, 3))
            assert sums.abs().max() <= 2e-3 * kernels.abs().max()
    for inputs in pictures(weights, spec):
        with torch.no_grad():
            found = dict(zip(("total", "content", "style", "variation"), rounded(*positional(inputs)), strict=True))
        assert_alike(found, expected(weights, spec, inputs), 2e-3)


@pytest.mark.parametrize("format", [ExportFormat.TORCHSCRIPT, ExportFormat.PT2])
def test_torch_is_enough(exported: Exported, tmp_path: Path, format: ExportFormat) -> None:
    """A process that has torch and nothing of this project loads the closure and calls it without gradients."""
    file = tmp_path / "closure"
    file.write_bytes(exported(spec_of(ExportGraph.CLOSURE, format, pooling=Pooling.L2)))
    load = {
        ExportFormat.TORCHSCRIPT: "torch.jit.load(FILE)",
        ExportFormat.PT2: "torch.export.load(FILE).module()",
    }[format]
    program = (
        "import sys, warnings; warnings.simplefilter('ignore'); import torch\n"
        f"FILE = {str(file)!r}\n"
        f"module = {load}\n"
        "image, c = torch.rand(1, 3, 24, 31), 16\n"
        "content = {'relu2_2': torch.rand(1, c, 12, 15)}\n"
        "style = {layer: torch.rand(c, c) for layer in ('relu1_1', 'relu2_1')}\n"
        "with torch.inference_mode():\n"
        "    found = module(image, content, style, torch.ones(1), torch.ones(2), torch.ones(()))\n"
        "assert [tuple(t.shape) for t in found] == [(1,), (1, 1), (1, 2), (1,), (1, 3, 24, 31)]\n"
        "assert not any(name.startswith('nst_model') for name in sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True)


@pytest.mark.parametrize("format", ExportFormat)
def test_inputs_of_another_shape_are_refused(
    exported: Exported, plain_weights: FeatureWeights, format: ExportFormat
) -> None:
    """No runtime spreads one row, pixel, channel or picture over the others."""
    spec = spec_of(ExportGraph.CLOSURE, format, pooling=Pooling.L2)
    graph, inputs = loaded(exported(spec)), inputs_for(plain_weights, spec, noise(1, 32, 40))
    assert graph(inputs)
    image, content, style = inputs["image"], inputs["content.relu2_2"], inputs["style.relu1_1"]
    for other in (
        *({"content.relu2_2": part} for part in (content[:, :, :-1], content[:, :, :1], content[:, :, :1, :1])),
        {"content.relu2_2": content[:, :, :, :1]},
        {"content.relu2_2": content[:, :1]},
        {"content.relu2_2": content.reshape(1, 16, 8, 40)},
        {"content.relu2_2": content.repeat(2, 1, 1, 1)},
        {"image": image.repeat(2, 1, 1, 1)},
        {"image": image[:, :1]},
        *({"style.relu1_1": part} for part in (style[:1], style[:, :1], style[0])),
    ):
        changed = {name: tensor.contiguous() for name, tensor in other.items()}
        with pytest.raises(Exception, match=r"shape|size|dimension|rank|Eq\(|rows and columns|Concat"):
            graph(inputs | changed)


@pytest.mark.parametrize("model", CARDS)
def test_every_model_is_exported(model: str, tmp_path: Path) -> None:
    """VGG-16 and VGG-19, each of their layers, with what their card says in the file."""
    card = CARDS[model]
    file = tmp_path / "weights.safetensors"
    safetensors.torch.save_file(random_state(card.architecture, TINY_WIDTHS), file)
    weights = load_weights(model, file)
    spec = ExportSpec(model=model, format=ExportFormat.TORCHSCRIPT, style_layers=card.architecture.layers)
    data = export(weights, spec)
    graph, inputs = loaded(data), inputs_for(weights, spec, noise(1, 40, 33))
    assert_alike(graph(inputs), expected(weights, spec, inputs), 1e-5)
    description = read_description(data)
    assert description["model"] == model
    assert description["license"] == card.license
    assert description["weights_sha256"] == weights.sha256
    assert description["architecture"] == card.architecture.name
    assert description["style_layers"] == list(card.architecture.layers)
    assert description["channels"]["relu3_1"] == TINY_WIDTHS[2]
    assert description["stride_px"]["relu3_1"] == 4


@pytest.mark.parametrize(
    "spec",
    [
        spec_of(ExportGraph.CLOSURE, ExportFormat.TORCHSCRIPT),
        spec_of(ExportGraph.FEATURES, ExportFormat.PT2),
        spec_of(ExportGraph.GRAMS, ExportFormat.ONNX),
    ],
    ids=lambda spec: spec.format.value,
)
def test_same_bytes_in_another_process(exported: Exported, tmp_path: Path, spec: ExportSpec) -> None:
    """Whatever either process did before, and with another seed of its hashes."""
    for other in ExportGraph:  # TorchScript numbers types in the order in which it meets them
        exported(spec_of(other, ExportFormat.TORCHSCRIPT, deep=True))
    weights = tmp_path / "weights.safetensors"
    safetensors.torch.save_file(random_state(VGG16, (16, 16, 16, 16, 16)), weights)
    program = (
        "import sys; from pathlib import Path; import nst_model\n"
        f"weights = nst_model.load_weights('vgg16', Path({str(weights)!r}))\n"
        f"spec = nst_model.ExportSpec(**{ {name: value for name, value in vars(spec).items() if value}!r})\n"
        "sys.stdout.buffer.write(nst_model.export(weights, spec))\n"
    )
    program = re.sub(r"<\w+\.\w+: ('\w+')>", r"\1", program)
    environment = {**os.environ, "PYTHONHASHSEED": "7"}
    done = subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, env=environment)
    assert done.stdout == exported(spec)


@pytest.mark.parametrize("format", ExportFormat)
def test_no_path_of_this_machine_is_in_a_file(exported: Exported, format: ExportFormat) -> None:
    """Neither of the project, nor of Python, nor of a source file."""
    data = exported(spec_of(ExportGraph.CLOSURE, format, pooling=Pooling.L2))
    parts = [data]
    if data.startswith(b"PK"):
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            assert not [name for name in archive.namelist() if "debug" in name]
            parts = [name.encode() + archive.read(name) for name in archive.namelist()]
    here = {
        Path(__file__).parents[2],
        Path(torch.__file__).parents[1],
        Path(sys.prefix),
        Path(sysconfig.get_path("stdlib")),
        Path.home(),
    }
    for part in parts:
        for path in here - {Path("/")}:
            assert str(path).encode() not in part
        assert not re.findall(rb"[\w/]+\.py\W", part.replace(b"portable.py", b"").replace(b"network.py", b"")) or (
            part.startswith(b"archive/code/")
        )


def test_loading_verifies_first(exported: Exported) -> None:
    """`load_graph` loads nothing that was altered, nor what torch cannot load."""
    data = bytearray(exported(spec_of(ExportGraph.FEATURES, ExportFormat.TORCHSCRIPT)))
    data[len(data) // 2] ^= 1
    with pytest.raises(InvalidArtifact, match=r"altered or damaged|truncated or damaged"):
        load_graph(bytes(data))
    with pytest.raises(InvalidArtifact, match="format onnx, which torch does not load"):
        load_graph(exported(spec_of(ExportGraph.GRAMS, ExportFormat.ONNX)))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"graph": "loss"}, "graph must be one of features, grams, objective, closure, not 'loss'"),
        ({"format": "tflite"}, "format must be one of torchscript, onnx, pt2, not 'tflite'"),
        ({"precision": "int8"}, "precision must be one of fp32, fp16, not 'int8'"),
        ({"pooling": "min"}, "pooling must be one of max, average, l2, not 'min'"),
        ({"precision": "fp16", "format": "pt2"}, "precision must be fp32 for the format pt2; only onnx has fp16"),
        ({"style_layers": ("relu4_4",)}, r"style_layers\[relu4_4\] is no layer of vgg16; did you mean relu4_\d"),
        ({"content_layers": ("conv1",)}, r"content_layers\[conv1\] is no layer of vgg16; it has relu1_1, "),
        ({"layers": ("relu1_1",)}, "layers must be empty for the graph closure, which takes content_layers and style"),
        ({"style_layers": ("relu1_1",) * 2}, "style_layers must name each layer once, not relu1_1, relu1_1"),
    ],
)
def test_what_cannot_be_exported_is_refused_by_name(given: dict[str, str], message: str) -> None:
    """Field, value and what would do."""
    with pytest.raises(InvalidOption, match=message):
        ExportSpec(model="vgg16", **given)  # type: ignore[arg-type]


def test_unknown_model_is_refused_by_name() -> None:
    """And the nearest one named."""
    with pytest.raises(UnknownModel, match="did you mean vgg19"):
        ExportSpec(model="vgg-19")


def test_layers_have_one_order() -> None:
    """That of the network, so that the same request is the same file however its layers were ordered."""
    spec = ExportSpec(model="vgg16", style_layers=("relu3_1", "relu1_1"))
    assert spec.style_layers == ("relu1_1", "relu3_1")
    assert spec == ExportSpec(model="vgg16", style_layers=("relu1_1", "relu3_1"))
    assert ExportSpec(model="vgg19").style_layers == ("relu1_1", "relu2_1", "relu3_1", "relu4_1", "relu5_1")


def test_nothing_half_written_is_left(tmp_path: Path) -> None:
    """When the disk is full, the error names the file, what was there stays, and nothing is left beside it."""
    file = tmp_path / "file"
    write_artifact(b"old", file)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
    try:
        with pytest.raises(OSError, match=f"File too large: '{file}'"):
            write_artifact(bytes(100_000), file)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert file.read_bytes() == b"old"
    write_artifact(b"new", file)
    assert file.read_bytes() == b"new"
    assert list(tmp_path.iterdir()) == [file]


def test_links_and_pipes_are_written_to(tmp_path: Path) -> None:
    """And not replaced by a file."""
    (tmp_path / "link").symlink_to(tmp_path / "real")
    write_artifact(b"new", tmp_path / "link")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "real").read_bytes() == b"new"
    os.mkfifo(tmp_path / "pipe")
    reader = os.open(tmp_path / "pipe", os.O_RDONLY | os.O_NONBLOCK)
    try:
        write_artifact(b"through", tmp_path / "pipe")
        assert os.read(reader, 100) == b"through"
    finally:
        os.close(reader)
    assert (tmp_path / "pipe").is_fifo()


def test_files_without_end_are_refused(tmp_path: Path) -> None:
    """Instead of being read until there is no memory left."""
    with pytest.raises(InvalidArtifact, match="more than 268435456 bytes"):
        read_description(Path("/dev/zero"))


def test_command_line_exports_and_inspects(tiny_weights_file: Path, tmp_path: Path) -> None:
    """`nst-model export` and `nst-model inspect`: to a file, a folder or stdout; errors are one line, at once."""

    def run(*arguments: str | Path) -> subprocess.CompletedProcess[bytes]:
        command = [sys.executable, "-m", "nst_model", *map(str, arguments)]
        return subprocess.run(command, capture_output=True, check=False, cwd=tmp_path)

    assert run("fetch", "vgg16", "--file", tiny_weights_file).returncode == 0
    grams = ("export", "vgg16", "--graph", "grams", "--style-layers", "relu2_1,relu1_1")
    written = run(*grams, "--format", "torchscript")
    assert written.stdout == b"vgg16-grams-max-zeros-fp32.pt\n", written.stderr
    data = (tmp_path / "vgg16-grams-max-zeros-fp32.pt").read_bytes()
    assert (
        b'"style_layers": [\n    "relu1_1",\n    "relu2_1"\n  ]'
        in run("inspect", "vgg16-grams-max-zeros-fp32.pt").stdout
    )
    (tmp_path / "folder").mkdir()
    assert run(*grams, "--format", "torchscript", "-o", "folder").stdout == b"folder/vgg16-grams-max-zeros-fp32.pt\n"
    assert (tmp_path / "folder" / "vgg16-grams-max-zeros-fp32.pt").read_bytes() == data
    assert run(*grams, "-o", "named.pt").stdout == b"named.pt\n"
    assert (tmp_path / "named.pt").read_bytes() == data
    assert run(*grams, "--format", "torchscript", "-o", "-").stdout == data
    assert not (tmp_path / "-").exists()
    for arguments, message in (
        (("export", "vgg"), "no feature model is called 'vgg'"),
        (("export", "vgg16", "--content-layers", "relu9_1"), "content_layers[relu9_1] is no layer of vgg16"),
        (("export", "vgg16", "-o", "no/where"), "output: there is no folder 'no'"),
        (
            ("export", "vgg16", "--format", "torchscript", "-o", "x.onnx"),
            "format must be onnx for a file called 'x.onnx', not torchscript",
        ),
        (("export", "vgg16", "--format", "onnx", "-o", "x.pt"), "format must be torchscript for a file called 'x.pt'"),
        (("inspect", tiny_weights_file), "no artifact of this project"),
        (("inspect", "nowhere"), "No such file or directory: 'nowhere'"),
    ):
        failed = run(*arguments)
        assert failed.returncode == 1
        assert message in failed.stderr.decode()
        assert len(failed.stderr.splitlines()) == 1, failed.stderr
