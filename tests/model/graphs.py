"""Exported graphs in the runtimes that they are meant for, and what the engine says they must yield."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import onnxruntime
import torch
from torch import Tensor

from nst_model import ExportGraph, ExportSpec, StylizeOptions, gram, load_graph, read_description
from nst_model.network import build_trunk
from nst_model.objective import Objective
from nst_model.options import relative
from nst_model.weights import FeatureWeights

Tensors = Mapping[str, Tensor]
"""Inputs or outputs of a graph, by the names in its description."""

Graph = Callable[[Tensors], dict[str, Tensor]]

WEIGHTS = {"content_weight": 1.5, "style_weight": 30.0, "tv_weight": 5.0}

SIZES = [(1, 16, 16), (1, 61, 47), (1, 24, 130), (1, 97, 17), (2, 33, 52)]
"""Batch, height and width: the smallest, odd, wide, tall, and two pictures. None is what graphs are traced with."""


def loaded(data: bytes) -> Graph:
    """Return an exported graph in its runtime, called with nothing but what its description says."""
    description = read_description(data)
    names = [value["name"] for value in description["outputs"]]
    if description["format"] == "onnx":
        session = onnxruntime.InferenceSession(data, providers=["CPUExecutionProvider"])

        def run(inputs: Tensors) -> dict[str, Tensor]:
            found = session.run(names, {name: tensor.numpy() for name, tensor in inputs.items()})
            return {name: torch.from_numpy(array) for name, array in zip(names, found, strict=True)}

        return run
    module = load_graph(data)

    def call(inputs: Tensors) -> dict[str, Tensor]:
        with torch.no_grad():
            found = module(*positional(inputs))
        return found if isinstance(found, dict) else dict(zip(names, found, strict=True))

    return call


def positional(inputs: Tensors) -> list[Tensor | dict[str, Tensor]]:
    """Return the arguments of a graph in TorchScript or pt2: the image, then dictionaries by layer, then weights."""
    arguments: dict[str, Tensor | dict[str, Tensor]] = {}
    for name, tensor in inputs.items():
        role, _, layer = name.partition(".")
        if layer:
            arguments.setdefault(role, {})[layer] = tensor  # type: ignore[index]
        else:
            arguments[name] = tensor
    return list(arguments.values())


def noise(batch: int, height: int, width: int, seed: int = 0) -> Tensor:
    """Return pictures in which no two neighbours are alike."""
    return torch.rand(batch, 3, height, width, generator=torch.Generator().manual_seed(seed))


def flat(batch: int, height: int, width: int) -> Tensor:
    """Return pictures of one colour each: every pooling has four equal values."""
    colours = torch.tensor([[0.5, 0.3, 0.7], [0.0, 1.0, 0.25]])[:batch]
    return colours[:, :, None, None].expand(batch, 3, height, width).contiguous()


def inputs_for(weights: FeatureWeights, spec: ExportSpec, image: Tensor) -> dict[str, Tensor]:
    """Return all inputs of a graph for a picture, with a content and a style that are unlike it.

    Were the style noise as bright as the picture, losses would be small differences of Gram matrices nearly alike.
    """
    if spec.graph in (ExportGraph.FEATURES, ExportGraph.GRAMS):
        return {"image": image}
    trunk = build_trunk(weights, {*spec.content_layers, *spec.style_layers}, pooling=spec.pooling, padding=spec.padding)
    options = options_of(spec)
    content = trunk(noise(*image.shape[::2], image.shape[3], seed=8))
    style = trunk(noise(1, 50, 41, seed=9) * 0.3)
    shares = {"content": relative(options.content_layers), "style": relative(options.style_layers)}
    return {
        "image": image,
        **{f"content.{layer}": content[layer] for layer in spec.content_layers},
        **{f"style.{layer}": gram(style[layer]) for layer in spec.style_layers},
        "content_weights": options.content_weight * torch.tensor([shares["content"][la] for la in spec.content_layers]),
        "style_weights": options.style_weight * torch.tensor([shares["style"][la] for la in spec.style_layers]),
        "tv_weight": torch.tensor(options.tv_weight),
    }


def options_of(spec: ExportSpec) -> StylizeOptions:
    """Return the options of the engine's objective that a graph is the same as."""
    return StylizeOptions.of(
        "gatys",
        pooling=spec.pooling,
        padding=spec.padding,
        precision="fp32",
        content_layers={layer: number + 1 for number, layer in enumerate(spec.content_layers)},
        style_layers={layer: number + 1 for number, layer in enumerate(spec.style_layers)},
        **WEIGHTS,
    )


def expected(weights: FeatureWeights, spec: ExportSpec, inputs: Tensors) -> dict[str, Tensor]:
    """Return what the engine makes of the inputs, each picture by itself: its trunk, its losses, and autograd."""
    layers = {*spec.layers, *spec.content_layers, *spec.style_layers}
    trunk = build_trunk(weights, layers, pooling=spec.pooling, padding=spec.padding)
    pictures = [_expected_of_one(trunk, spec, inputs, number) for number in range(len(inputs["image"]))]
    return {name: torch.stack([one[name] for one in pictures]) for name in pictures[0]}


def _expected_of_one(trunk: torch.nn.Module, spec: ExportSpec, inputs: Tensors, number: int) -> dict[str, Tensor]:
    image = inputs["image"][number : number + 1]
    if spec.graph in (ExportGraph.FEATURES, ExportGraph.GRAMS):
        features = trunk(image)
        if spec.graph is ExportGraph.FEATURES:
            return {layer: features[layer][0] for layer in spec.layers}
        moments: dict[str, Tensor] = {}
        for layer in spec.style_layers:
            moments[f"{layer}.mean"] = features[layer].mean(dim=(2, 3))[0]
            moments[f"{layer}.gram"] = gram(features[layer])
        return moments
    targets = {layer: {"gram": inputs[f"style.{layer}"], "mean": torch.zeros(())} for layer in spec.style_layers}
    objective = Objective(trunk, [targets], options_of(spec))  # type: ignore[arg-type]
    content = {layer: inputs[f"content.{layer}"][number : number + 1] for layer in spec.content_layers}
    losses, gradient = objective.loss_and_gradient(image, content)
    features = trunk(image)
    each = [torch.nn.functional.mse_loss(features[layer], content[layer]) for layer in spec.content_layers]
    style = dict(zip(objective.style_layers, losses.style, strict=True))
    found = {
        "total": losses.total,
        "content": torch.stack(each),
        "style": torch.stack([style[layer] for layer in spec.style_layers]),
        "variation": losses.variation,
    }
    return found | ({"gradient": gradient[0]} if spec.graph is ExportGraph.CLOSURE else {})


def distance(found: Tensor, wanted: Tensor) -> float:
    """Return the L2 norm of the difference relative to what is wanted; 0 if both are 0."""
    difference = torch.linalg.vector_norm(found.double() - wanted.double())
    return float(difference / torch.linalg.vector_norm(wanted.double()).clamp_min(1e-30))


def assert_alike(found: Tensors, wanted: Tensors, tolerance: float) -> None:
    """Fail unless every output is there, in order, of its shape, and within a relative L2 distance."""
    assert list(found) == list(wanted)
    for name, tensor in wanted.items():
        assert found[name].shape == tensor.shape, name
        assert found[name].dtype == torch.float32, name
        assert distance(found[name], tensor) <= tolerance, f"{name}: {distance(found[name], tensor):.1e}"
