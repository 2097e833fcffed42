"""Exports: a feature model as a file for another runtime.

Each graph of `portable.py` in each format of `ExportFormat`, with a description inside (`artifact.py`). The same
weights and spec give the same bytes with the same versions of torch and onnx, and nothing in a file tells where it was
made.
"""

from __future__ import annotations

import io
import os
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim

from nst_model import artifact, torchscript, traced
from nst_model.cache import FORMAT
from nst_model.errors import InvalidArtifact
from nst_model.export_spec import ExportFormat, ExportGraph, ExportPrecision, ExportSpec
from nst_model.models import model_card
from nst_model.network import build_trunk
from nst_model.options import MARGIN_PX, Padding
from nst_model.portable import Closure, Features, Grams, Ladder, Objective
from nst_model.scales import MIN_EDGE_PX
from nst_model.weights import FeatureWeights

Value = dict[str, Any]
"""An input or output of a graph: `name`, `dtype`, and `shape` of numbers and names such as `batch` and `width//8`."""

EXAMPLE_SIZES = {"batch": 2, "height": 70, "width": 86}
"""Of the pictures that graphs are traced with. Nothing in a graph may depend on them."""


def export(weights: FeatureWeights, spec: ExportSpec) -> bytes:
    """Return the file that `spec` asks for, made of `weights`, which are those of the model that it names.

    Takes a second for TorchScript, some ten for PT2 and up to half a minute for ONNX, and the memory of a few copies of
    the weights.
    """
    assert weights.name == spec.model, (weights.name, spec.model)
    description = describe(weights, spec)
    module = graph_module(weights, spec)
    if spec.precision is ExportPrecision.FP16:
        traced.round_weights(module)
    if spec.format is ExportFormat.TORCHSCRIPT:
        return artifact.sealed_archive(torchscript.members(module), description)
    program = traced.program(module, example(weights, spec), _dynamic_shapes(spec))
    if spec.format is ExportFormat.PT2:
        return artifact.sealed_archive(traced.pt2_members(program), description)
    model = traced.onnx_model(program, description["inputs"], description["outputs"])
    if spec.precision is ExportPrecision.FP16:
        traced.halve_weights(model)
    description["nodes"] = len(model.graph.node)
    return artifact.sealed_onnx(model.SerializeToString(deterministic=True), description)


def load_graph(source: Path | bytes, device: torch.device | str = "cpu") -> Callable[..., Any]:
    """Return the module of an exported graph in TorchScript or PT2, after the file was verified.

    Raises InvalidArtifact, also for what torch does not load; OSError.
    """
    data = artifact.content_of(source)
    description = artifact.read_description(data)
    match description.get("format"):
        case ExportFormat.TORCHSCRIPT:
            return torchscript.load(data, device)
        case ExportFormat.PT2:
            return torch.export.load(io.BytesIO(data)).module().to(device)
        case other:
            raise InvalidArtifact(f"the file has format {other}, which torch does not load")


def write_artifact(data: bytes, path: Path) -> None:
    """Write a file whole or not at all: under a temporary name beside it, settled on the disk, then renamed.

    A link keeps pointing where it points; a device or a pipe is written to directly. Raises OSError, naming a file.
    """
    target = path.resolve()
    partial = target.with_name(f".{target.name}.{uuid.uuid4().hex}.partial")
    try:
        if target.exists() and not target.is_file():
            target.write_bytes(data)
            return
        with partial.open("xb") as stream:
            stream.write(data)
            stream.flush()
            os.fsync(stream.fileno())
        partial.replace(target)
    except OSError as error:
        error.filename = error.filename or str(path)  # a full disk does not say which file
        raise
    finally:
        partial.unlink(missing_ok=True)


def graph_module(weights: FeatureWeights, spec: ExportSpec) -> nn.Module:
    """Return the module that is exported, on the CPU, in eager mode."""
    layers = {*spec.layers, *spec.content_layers, *spec.style_layers}
    trunk = build_trunk(weights, layers, pooling=spec.pooling, padding=spec.padding)
    ladder = Ladder(trunk, flipping=spec.format is ExportFormat.ONNX)
    match spec.graph:
        case ExportGraph.FEATURES:
            module: nn.Module = Features(ladder, spec.layers)
        case ExportGraph.GRAMS:
            module = Grams(ladder, spec.style_layers)
        case ExportGraph.OBJECTIVE:
            module = Objective(ladder, spec.content_layers, spec.style_layers)
        case ExportGraph.CLOSURE:
            module = Closure(ladder, spec.content_layers, spec.style_layers)
    return module.eval()


def describe(weights: FeatureWeights, spec: ExportSpec) -> dict[str, Any]:
    """Return what the file says of itself, but for what is known only when it is written."""
    card = model_card(spec.model)
    roles = {"layers": spec.layers, "content_layers": spec.content_layers, "style_layers": spec.style_layers}
    named = {layer for layers in roles.values() for layer in layers}
    convolutions = [convolution for convolution in card.architecture.convolutions if convolution.layer in named]
    return {
        "format_version": artifact.FORMAT_VERSION,
        "kind": "graph",
        "graph": spec.graph.value,
        "format": spec.format.value,
        "precision": spec.precision.value,
        **artifact.producer(),
        "torch_version": torch.__version__.partition("+")[0],
        "opset": traced.OPSET if spec.format is ExportFormat.ONNX else None,
        "nodes": None,
        "model": card.name,
        "model_display_name": card.display_name,
        "license": card.license,
        "weights_sha256": weights.sha256,
        "architecture": card.architecture.name,
        **{role: list(layers) for role, layers in roles.items()},
        "channels": {convolution.layer: _channels(weights, convolution.layer) for convolution in convolutions},
        "stride_px": {convolution.layer: convolution.stride_px for convolution in convolutions},
        "pooling": spec.pooling.value,
        "padding": spec.padding.value,
        "margin_px": MARGIN_PX if spec.padding is Padding.MIRROR else 0,
        "input": {
            "layout": "NCHW",
            "colors": "RGB",
            "range": [0, 1],
            "minimum_edge_px": MIN_EDGE_PX,
            "batch": "any",
        },
        "normalization": {
            "mean": [round(value, 7) for value in weights.mean.tolist()],
            "mean_activation": 1,
            "calibration": FORMAT,
        },
        "inputs": inputs_of(weights, spec),
        "outputs": outputs_of(weights, spec),
    }


def inputs_of(weights: FeatureWeights, spec: ExportSpec) -> list[Value]:
    """Return the inputs of a graph, in their order."""
    image = _value("image", "batch", 3, "height", "width")
    if spec.graph in (ExportGraph.FEATURES, ExportGraph.GRAMS):
        return [image]
    return [
        image,
        *(_value(f"content.{layer}", *_feature_shape(weights, layer)) for layer in spec.content_layers),
        *(_value(f"style.{layer}", *[_channels(weights, layer)] * 2) for layer in spec.style_layers),
        _value("content_weights", len(spec.content_layers)),
        _value("style_weights", len(spec.style_layers)),
        _value("tv_weight"),
    ]


def outputs_of(weights: FeatureWeights, spec: ExportSpec) -> list[Value]:
    """Return the outputs of a graph, in their order."""
    if spec.graph is ExportGraph.FEATURES:
        return [_value(layer, *_feature_shape(weights, layer)) for layer in spec.layers]
    if spec.graph is ExportGraph.GRAMS:
        return [
            value
            for layer in spec.style_layers
            for value in (
                _value(f"{layer}.mean", "batch", _channels(weights, layer)),
                _value(f"{layer}.gram", "batch", *[_channels(weights, layer)] * 2),
            )
        ]
    losses = [
        _value("total", "batch"),
        _value("content", "batch", len(spec.content_layers)),
        _value("style", "batch", len(spec.style_layers)),
        _value("variation", "batch"),
    ]
    if spec.graph is ExportGraph.CLOSURE:
        losses.append(_value("gradient", "batch", 3, "height", "width"))
    return losses


def example(weights: FeatureWeights, spec: ExportSpec) -> tuple[Any, ...]:
    """Return arguments to trace the module with."""
    random = torch.Generator().manual_seed(0)
    tensors = {
        value["name"]: torch.rand([_edge(edge) for edge in value["shape"]], generator=random)
        for value in inputs_of(weights, spec)
    }
    return arguments(spec, tensors)


def arguments(spec: ExportSpec, tensors: dict[str, Tensor]) -> tuple[Any, ...]:
    """Return the arguments of a graph's module, of its inputs by name."""
    if spec.graph in (ExportGraph.FEATURES, ExportGraph.GRAMS):
        return (tensors["image"],)
    return (
        tensors["image"],
        {layer: tensors[f"content.{layer}"] for layer in spec.content_layers},
        {layer: tensors[f"style.{layer}"] for layer in spec.style_layers},
        tensors["content_weights"],
        tensors["style_weights"],
        tensors["tv_weight"],
    )


def _dynamic_shapes(spec: ExportSpec) -> tuple[Any, ...]:
    picture = {0: Dim.DYNAMIC, 2: Dim.DYNAMIC, 3: Dim.DYNAMIC}
    if spec.graph in (ExportGraph.FEATURES, ExportGraph.GRAMS):
        return (picture,)
    content = dict.fromkeys(spec.content_layers, picture)
    style: dict[str, dict[int, Any]] = {layer: {} for layer in spec.style_layers}
    return picture, content, style, {}, {}, {}


def _edge(edge: int | str) -> int:
    """Return how long an edge of a shape is in the example."""
    if isinstance(edge, int):
        return edge
    name, _, stride = edge.partition("//")
    return EXAMPLE_SIZES[name] // int(stride or 1)


def _value(name: str, *shape: int | str) -> Value:
    return {"name": name, "dtype": "float32", "shape": list(shape)}


def _channels(weights: FeatureWeights, layer: str) -> int:
    return len(weights.convolutions[layer][1])


def _feature_shape(weights: FeatureWeights, layer: str) -> tuple[int | str, ...]:
    stride = next(c.stride_px for c in weights.architecture.convolutions if c.layer == layer)
    edges = [edge if stride == 1 else f"{edge}//{stride}" for edge in ("height", "width")]
    return "batch", _channels(weights, layer), *edges
