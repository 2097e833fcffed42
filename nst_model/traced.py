"""Graphs as `torch.export` traces them, and as ONNX."""

from __future__ import annotations

import io
import zipfile
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import onnx
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import nn

OPSET = 20
"""Version of ONNX's operators; onnxruntime has them since 1.17."""

_KEPT = ("val", "tensor_meta")
"""What of a node's metadata belongs to the program; the rest tells where it came from."""


def program(
    module: nn.Module, arguments: tuple[Any, ...], dynamic_shapes: tuple[Any, ...]
) -> torch.export.ExportedProgram:
    """Return a module traced with example arguments, of whose sizes it depends on none that `dynamic_shapes` names."""
    # Oblivious: that an edge of the deepest layer is longer than 1 is not taken for granted. What cannot be proved of
    # sizes in general, such as that the content is as large as the picture, is asked at run time.
    oblivious = torch.fx.experimental._config.patch(backed_size_oblivious=True)  # type: ignore[attr-defined]
    with torch.no_grad(), oblivious:
        traced = torch.export.export(
            module, arguments, dynamic_shapes=dynamic_shapes, prefer_deferred_runtime_asserts_over_guards=True
        )
    traced.example_inputs = None
    for node in traced.graph.nodes:
        node.meta = {key: value for key, value in node.meta.items() if key in _KEPT}
    return traced


def pt2_members(traced: torch.export.ExportedProgram) -> dict[str, bytes]:
    """Return what a file of the program has to contain, by name in the archive."""
    buffer = io.BytesIO()
    torch.export.save(traced, buffer)
    with zipfile.ZipFile(buffer) as archive:
        found = {path.partition("/")[2]: archive.read(path) for path in archive.namelist()}
    return {name: content for name, content in found.items() if name != ".data/serialization_id"}


def onnx_model(
    traced: torch.export.ExportedProgram, inputs: Sequence[Mapping[str, Any]], outputs: Sequence[Mapping[str, Any]]
) -> onnx.ModelProto:
    """Return the program as an ONNX model, its inputs and outputs named and shaped as described (see `exports.py`)."""
    exported = torch.onnx.export(
        traced,
        dynamo=True,
        external_data=False,
        input_names=[value["name"] for value in inputs],
        output_names=[value["name"] for value in outputs],
        opset_version=OPSET,
        verbose=False,
    )
    assert exported is not None
    model = exported.model_proto
    for node in model.graph.node:
        del node.metadata_props[:]
        node.doc_string = ""
    del model.graph.value_info[:]
    for info, value in zip([*model.graph.input, *model.graph.output], [*inputs, *outputs], strict=True):
        assert info.name == value["name"], (info.name, value["name"])
        del info.metadata_props[:]
        info.type.tensor_type.ClearField("shape")
        for edge in value["shape"]:
            dimension = info.type.tensor_type.shape.dim.add()
            if isinstance(edge, int):
                dimension.dim_value = edge
            else:
                dimension.dim_param = edge
        info.type.tensor_type.shape.SetInParent()
    return model


def round_weights(module: nn.Module) -> None:
    """Make the kernels (…, 3, 3) of a module ones that fp16 can hold, each of which sums to what it did.

    What rounds one entry off is given to the next: most of a picture is nearly flat at the scale of a kernel, which
    there sees its own sum only. Losses of flat pictures are ten times nearer to the whole weights' than with each entry
    rounded by itself.
    """
    for kernels in module.buffers():
        if kernels.shape[2:] == (3, 3):
            entries = kernels.flatten(2)
            left = torch.zeros_like(entries[..., 0])
            for place in range(9):
                wanted = entries[..., place] + left
                entries[..., place] = wanted.half().float()
                left = wanted - entries[..., place]
            kernels.copy_(entries.view_as(kernels))


def halve_weights(model: onnx.ModelProto) -> None:
    """Keep kernels, which are rounded, as fp16, and make fp32 of them again at the beginning of the graph."""
    casts = []
    for tensor in model.graph.initializer:
        if tensor.dims[2:] == [3, 3]:
            name, halves = tensor.name, numpy_helper.to_array(tensor).astype(np.float16)
            tensor.CopyFrom(numpy_helper.from_array(halves, f"{name}.fp16"))
            casts.append(helper.make_node("Cast", [tensor.name], [name], f"cast_{name}", to=TensorProto.FLOAT))
    nodes = list(model.graph.node)
    del model.graph.node[:]
    model.graph.node.extend([*casts, *nodes])
