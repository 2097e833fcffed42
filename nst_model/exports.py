"""Exports: a feature model as a file for another runtime.

Each graph of `portable.py` in each format of `ExportFormat`, with a description inside (`artifact.py`). The same weights, spec and
versions of torch and onnx give the same bytes; nothing in a file tells where it was made.
"""

from __future__ import annotations

import contextlib
import io
import os
import tempfile
import warnings
import zipfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from nst_model import artifact
from nst_model.cache import FORMAT
from nst_model.export_spec import ExportFormat, ExportGraph, ExportSpec
from nst_model.models import model_card
from nst_model.network import build_trunk
from nst_model.options import MARGIN_PX, Padding
from nst_model.portable import Closure, Features, Grams, Ladder, Objective
from nst_model.scales import MIN_EDGE_PX
from nst_model.weights import FeatureWeights

DTYPE = "float32"
OPSET = 20


def export(weights: FeatureWeights, spec: ExportSpec) -> bytes:
    """Return the file that `spec` asks for, made of `weights`, which must be those of the model that it names.

    Takes some seconds to half a minute, and memory for a few copies of the weights.
    """
    assert weights.name == spec.model, (weights.name, spec.model)
    description = describe(weights, spec)
    module = graph_module(weights, spec)
    match spec.format:
        case ExportFormat.TORCHSCRIPT:
            return _torchscript(module, description)
        case ExportFormat.ONNX:
            return _onnx(module, weights, spec, description)
        case ExportFormat.PT2:
            raise NotImplementedError
    raise AssertionError(spec.format)


def write_artifact(data: bytes, path: Path) -> None:
    """Write a file whole or not at all: under a temporary name beside it, settled on the disk, then renamed."""
    handle, partial = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".partial")
    try:
        with os.fdopen(handle, "wb") as stream:
            stream.write(data)
            stream.flush()
            os.fsync(stream.fileno())
        Path(partial).replace(path)
    finally:
        with contextlib.suppress(FileNotFoundError):
            Path(partial).unlink()


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
    convolutions = [c for c in card.architecture.convolutions if c.layer in named]
    margin_px = MARGIN_PX if spec.padding is Padding.MIRROR else 0
    return {
        "format_version": artifact.FORMAT_VERSION,
        "kind": "graph",
        "graph": spec.graph.value,
        "format": spec.format.value,
        "precision": spec.precision.value,
        **artifact.producer(),
        "torch_version": torch.__version__.partition("+")[0],
        "opset": OPSET if spec.format is ExportFormat.ONNX else None,
        "model": card.name,
        "model_display_name": card.display_name,
        "license": card.license,
        "weights_sha256": weights.sha256,
        "architecture": card.architecture.name,
        **{role: list(layers) for role, layers in roles.items()},
        "channels": {c.layer: len(weights.convolutions[c.layer][1]) for c in convolutions},
        "stride_px": {c.layer: c.stride_px for c in convolutions},
        "pooling": spec.pooling.value,
        "padding": spec.padding.value,
        "margin_px": margin_px,
        "input": {
            "layout": "NCHW",
            "colors": "RGB",
            "range": [0, 1],
            "minimum_edge_px": MIN_EDGE_PX,
            "batch": "any",
        },
        "normalization": {
            "mean": [round(value, 8) for value in weights.mean.tolist()],
            "mean_activation": 1,
            "calibration": FORMAT,
        },
        "inputs": inputs_of(weights, spec),
        "outputs": outputs_of(weights, spec),
    }


def inputs_of(weights: FeatureWeights, spec: ExportSpec) -> list[dict[str, Any]]:
    """Return name, type and shape of each input of a graph, in their order."""
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


def outputs_of(weights: FeatureWeights, spec: ExportSpec) -> list[dict[str, Any]]:
    """Return name, type and shape of each output of a graph, in their order."""
    match spec.graph:
        case ExportGraph.FEATURES:
            return [_value(layer, *_feature_shape(weights, layer)) for layer in spec.layers]
        case ExportGraph.GRAMS:
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
    """Return arguments to trace the module with; of no shape that it may depend on."""
    random = torch.Generator().manual_seed(0)

    def tensor(name: str) -> Tensor:
        sizes = {"batch": 2, "height": 70, "width": 86}
        shape = next(value["shape"] for value in inputs_of(weights, spec) if value["name"] == name)
        edges = [eval(edge, {}, sizes) if isinstance(edge, str) else edge for edge in shape]  # noqa: S307
        return torch.rand(edges, generator=random)

    if spec.graph in (ExportGraph.FEATURES, ExportGraph.GRAMS):
        return (tensor("image"),)
    return (
        tensor("image"),
        {layer: tensor(f"content.{layer}") for layer in spec.content_layers},
        {layer: tensor(f"style.{layer}") for layer in spec.style_layers},
        tensor("content_weights"),
        tensor("style_weights"),
        tensor("tv_weight"),
    )


def _value(name: str, *shape: int | str) -> dict[str, Any]:
    return {"name": name, "dtype": DTYPE, "shape": list(shape)}


def _channels(weights: FeatureWeights, layer: str) -> int:
    return len(weights.convolutions[layer][1])


def _feature_shape(weights: FeatureWeights, layer: str) -> tuple[int | str, ...]:
    stride = next(c.stride_px for c in weights.architecture.convolutions if c.layer == layer)
    edges = [edge if stride == 1 else f"{edge}//{stride}" for edge in ("height", "width")]
    return "batch", _channels(weights, layer), *edges


def _torchscript(module: nn.Module, description: dict[str, Any]) -> bytes:
    buffer = io.BytesIO()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", r"`torch\.jit\.\w+` is deprecated")
        torch.jit.save(torch.jit.script(module), buffer)
    with zipfile.ZipFile(buffer) as archive:
        members = {name.partition("/")[2]: archive.read(name) for name in archive.namelist()}
    kept = {name: data for name, data in members.items() if not name.endswith((".debug_pkl", "serialization_id"))}
    return artifact.sealed_archive(kept, description)


def _onnx(module: nn.Module, weights: FeatureWeights, spec: ExportSpec, description: dict[str, Any]) -> bytes:
    arguments = example(weights, spec)
    dynamic = torch.export.Dim.DYNAMIC
    shapes: Any = ({0: dynamic, 2: dynamic, 3: dynamic},)
    if len(arguments) > 1:
        shapes += (
            {layer: {0: dynamic, 2: dynamic, 3: dynamic} for layer in spec.content_layers},
            {layer: {} for layer in spec.style_layers},
            {},
            {},
            {},
        )
    with torch.no_grad():
        program = torch.onnx.export(
            module,
            arguments,
            dynamo=True,
            external_data=False,
            dynamic_shapes=shapes,
            input_names=[value["name"] for value in inputs_of(weights, spec)],
            output_names=[value["name"] for value in outputs_of(weights, spec)],
            opset_version=OPSET,
            verbose=False,
        )
    assert program is not None
    model = program.model_proto
    for node in model.graph.node:
        node.ClearField("metadata_props")
        node.ClearField("doc_string")
    del model.graph.value_info[:]
    return artifact.sealed_onnx(
        model.SerializeToString(deterministic=True), {**description, "nodes": len(model.graph.node)}
    )
