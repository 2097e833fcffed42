"""The four graphs as modules: the engine's objective, with the backward pass written out."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from nst_model import ExportGraph, ExportSpec, Padding, Pooling
from nst_model.architecture import VGG16
from nst_model.exports import graph_module
from nst_model.margin import mirrored
from nst_model.portable import pool, pool_slope
from nst_model.weights import FeatureWeights
from tests.model.graphs import SIZES, assert_alike, distance, expected, flat, inputs_for, noise, positional
from tests.model.textbook import Textbook


def closure(weights: FeatureWeights, **spec: object) -> torch.nn.Module:
    """Return the closure as it is compiled and traced."""
    return graph_module(weights, ExportSpec(model="vgg16", **spec))  # type: ignore[arg-type]


@pytest.mark.parametrize("padding", [Padding.ZEROS, Padding.REPLICATE])
@pytest.mark.parametrize("pooling", Pooling)
@pytest.mark.parametrize("format", ["torchscript", "onnx"])
def test_gradient_is_that_of_the_losses(
    tiny_weights: FeatureWeights, pooling: Pooling, padding: Padding, format: str
) -> None:
    """To the last digits of float64, as autograd sees it; where the picture is flat and where it is not."""
    spec = ExportSpec(model="vgg16", pooling=pooling, padding=padding, format=format)  # type: ignore[arg-type]
    module = graph_module(tiny_weights, spec).double()
    for image in (noise(2, 37, 50), flat(2, 33, 18), torch.cat((noise(1, 20, 41), flat(1, 21, 41)), dim=2)):
        inputs = {name: tensor.double() for name, tensor in inputs_for(tiny_weights, spec, image).items()}
        picture = inputs["image"].requires_grad_(True)
        total, *_, gradient = module(*positional(inputs))
        wanted = torch.autograd.grad(total.sum(), picture)[0]
        assert distance(gradient.detach(), wanted) < 1e-13


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("padding", Padding)
@pytest.mark.parametrize("pooling", Pooling)
def test_closure_is_the_engines(
    plain_weights: FeatureWeights, pooling: Pooling, padding: Padding, size: tuple[int, int, int]
) -> None:
    """Losses and gradient, of noise and of flat pictures, each picture of a batch by itself."""
    spec = ExportSpec(model="vgg16", pooling=pooling, padding=padding)
    module = graph_module(plain_weights, spec)
    for image in (noise(*size), flat(*size)):
        inputs = inputs_for(plain_weights, spec, image)
        with torch.no_grad():
            found = dict(
                zip(("total", "content", "style", "variation", "gradient"), module(*positional(inputs)), strict=True)
            )
        assert_alike(found, expected(plain_weights, spec, inputs), 1e-5)


@pytest.mark.parametrize("graph", [ExportGraph.FEATURES, ExportGraph.GRAMS])
def test_features_and_moments_are_the_engines(plain_weights: FeatureWeights, graph: ExportGraph) -> None:
    """Of every layer down to the last one."""
    layers = {"layers": VGG16.layers} if graph is ExportGraph.FEATURES else {"style_layers": VGG16.layers}
    spec = ExportSpec(model="vgg16", graph=graph, **layers)  # type: ignore[arg-type]
    module = graph_module(plain_weights, spec)
    for size in SIZES:
        with torch.no_grad():
            found = module(noise(*size))
        assert_alike(found, expected(plain_weights, spec, {"image": noise(*size)}), 1e-5)


@pytest.mark.parametrize("pooling", Pooling)
def test_closure_is_the_textbooks(tiny_weights: FeatureWeights, tiny_textbook: Textbook, pooling: Pooling) -> None:
    """Gatys et al. (2016), plainly in float64 and differentiated by autograd."""
    spec = ExportSpec(model="vgg16", pooling=pooling, content_layers=("relu2_2", "relu4_2"))
    image, content, style = noise(1, 45, 38), noise(1, 45, 38, seed=1), noise(1, 31, 64, seed=2)
    there, made = tiny_textbook.features(content, pooling), tiny_textbook.features(style, pooling)
    grams = {layer: tiny_textbook.gram(made[layer]) for layer in spec.style_layers}
    picture = image.double().requires_grad_(True)
    total, _, wanted = tiny_textbook.losses(
        picture,
        content,
        grams,
        style_layers=dict.fromkeys(spec.style_layers, 1.0),
        content_layers=dict.fromkeys(spec.content_layers, 1.0),
        style_weight=30,
        content_weight=2,
        pooling=pooling,
    )
    slope = torch.autograd.grad(total, picture)[0]

    with torch.no_grad():
        found, _, each, _, gradient = graph_module(tiny_weights, spec)(
            image,
            {layer: there[layer].float() for layer in spec.content_layers},
            {layer: grams[layer].float() for layer in spec.style_layers},
            torch.full((2,), 1.0),
            torch.full((5,), 6.0),
            torch.tensor(0.0),
        )

    assert distance(found[0], total.detach()) < 1e-5
    assert distance(each[0], torch.stack(wanted).detach()) < 1e-5
    assert distance(gradient, slope) < 1e-5


def test_what_is_equal_goes_to_the_first() -> None:
    """Max pooling's slope, bit for bit as torch has it: flat, in steps, falling, with odd edges."""
    steps = torch.arange(3 * 9 * 7).reshape(1, 3, 9, 7)
    for values in (
        torch.ones(2, 3, 8, 6),
        (steps // 2).float(),
        (steps // 7).float(),
        -(steps % 5).float(),
        noise(1, 9, 7),
    ):
        x = values.requires_grad_(True)
        pooled = F.max_pool2d(x, 2)
        slope = noise(*pooled.shape[::2], pooled.shape[3])
        wanted = torch.autograd.grad(pooled, x, slope)[0]
        assert torch.equal(pool_slope(slope, x.detach(), pool(x.detach(), "max"), "max"), wanted)


def test_mirrored_pictures_are_as_the_engine_mirrors_them(tiny_weights: FeatureWeights) -> None:
    """With padding mirror the graph is that of replicate, of a picture that the caller continued by 16 px."""
    image = noise(1, 30, 33)
    found = [
        graph_module(tiny_weights, ExportSpec(model="vgg16", graph=ExportGraph.GRAMS, padding=padding))(
            mirrored(image, 16)
        )
        for padding in (Padding.MIRROR, Padding.REPLICATE)
    ]
    assert all(torch.equal(one, other) for one, other in zip(found[0].values(), found[1].values(), strict=True))


def test_no_gradient_is_kept(tiny_weights: FeatureWeights) -> None:
    """Under autograd or not, the closure returns the same and asks for nothing to be remembered."""
    spec = ExportSpec(model="vgg16")
    module, inputs = graph_module(tiny_weights, spec), inputs_for(tiny_weights, spec, noise(1, 32, 32))
    outside = module(*positional(inputs))
    with torch.inference_mode():
        inside = module(*positional(inputs))
    assert not any(tensor.requires_grad for tensor in outside)
    assert all(torch.equal(one, other) for one, other in zip(outside, inside, strict=True))
