"""The scripted model against the textbook, in float64."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch

from nst_model import FeatureModel, Padding, Pooling, Precision, Style, StylizeOptions, gram, script
from nst_model.architecture import VGG16, VGG19, Architecture
from nst_model.network import build_trunk
from nst_model.objective import Objective, interpreted
from nst_model.options import ContentLoss, StyleLoss
from nst_model.regions import layer_weights
from nst_model.weights import FeatureWeights, load_weights
from tests.conftest import random_state
from tests.model.textbook import Textbook

SIZES = [(64, 48), (67, 53), (33, 95), (16, 16)]
TOLERANCE = 1e-4

Picture = Callable[[int, int, int], torch.Tensor]


def relative_error(found: torch.Tensor, expected: torch.Tensor) -> float:
    """Return ‖found - expected‖ / ‖expected‖."""
    return float((found.double() - expected).norm() / expected.norm())


@pytest.mark.parametrize(("height", "width"), SIZES)
@pytest.mark.parametrize("pooling", list(Pooling))
def test_every_layers_features_and_grams_agree(
    tiny_weights: FeatureWeights, tiny_textbook: Textbook, picture: Picture, height: int, width: int, pooling: Pooling
) -> None:
    """Features and Gram matrices of all thirteen layers, at several sizes, odd ones too."""
    image = picture(height, width, 3)[None]
    trunk = build_trunk(tiny_weights, VGG16.layers, pooling=pooling)

    found = trunk(image)

    expected = tiny_textbook.features(image, pooling)
    assert list(found) == list(VGG16.layers)
    for layer in VGG16.layers:
        assert relative_error(found[layer], expected[layer]) < TOLERANCE, layer
        assert relative_error(gram(found[layer]), tiny_textbook.gram(expected[layer])) < TOLERANCE, layer


def test_replicated_edge_is_the_textbooks_on_a_larger_picture(
    tiny_weights: FeatureWeights, tiny_textbook: Textbook, picture: Picture
) -> None:
    """Replicate padding gives the first layer what zero padding gives inside a picture whose edges were repeated."""
    image = picture(21, 30, 3)[None]
    found = build_trunk(tiny_weights, ["relu1_1"], padding=Padding.REPLICATE)(image)["relu1_1"]
    larger = torch.nn.functional.pad(image, [2, 2, 2, 2], mode="replicate")
    expected = tiny_textbook.features(larger)["relu1_1"][:, :, 2:-2, 2:-2]
    assert relative_error(found, expected) < TOLERANCE


@pytest.mark.parametrize("architecture", [VGG16, VGG19], ids=lambda a: a.name)
def test_full_width_networks_agree(architecture: Architecture, picture: Picture, tmp_path: Path) -> None:
    """VGG-16 and VGG-19 at their published widths, by torchvision's key names, from a file."""
    state = random_state(architecture, (64, 128, 256, 512, 512))
    safetensors.torch.save_file(state, tmp_path / "weights.safetensors")
    weights = load_weights(architecture.name, tmp_path / "weights.safetensors")
    image = picture(37, 50, 4)[None]

    found = build_trunk(weights, architecture.layers)(image)

    expected = Textbook(state, architecture, weights.mean_activation).features(image)
    for layer in architecture.layers:
        assert relative_error(found[layer], expected[layer]) < TOLERANCE, layer


@pytest.mark.parametrize(("height", "width"), SIZES)
@pytest.mark.parametrize("pooling", list(Pooling))
def test_losses_and_gradient_agree(
    tiny_model: FeatureModel, tiny_textbook: Textbook, picture: Picture, height: int, width: int, pooling: Pooling
) -> None:
    """Total, content and every style loss of the scripted module, and the gradient to the image."""
    options = StylizeOptions.of(
        "gatys",
        style_layers={"relu1_2": 2, "relu3_1": 1, "relu5_1": 0.5},
        content_layers={"relu2_2": 1, "relu4_2": 3},
        pooling=pooling,
        precision=Precision.FP32,
    )
    image, content, style = (picture(height, width, seed)[None] for seed in (5, 6, 7))
    objective = tiny_model.objective([tiny_model.style_targets(Style(style[0]), options)], options)

    with interpreted():
        losses, gradient = objective.loss_and_gradient(image, objective.content_targets(content))

    unknown = image.double().requires_grad_(True)
    total, content_loss, style_losses = tiny_textbook.losses(
        unknown,
        content,
        {layer: tiny_textbook.gram(tiny_textbook.features(style, pooling)[layer]) for layer in options.style_layers},
        style_layers=options.style_layers,
        content_layers=options.content_layers,
        style_weight=options.style_weight,
        content_weight=options.content_weight,
        pooling=pooling,
    )
    assert relative_error(losses.total, total.detach()) < TOLERANCE
    assert relative_error(losses.content, content_loss.detach()) < TOLERANCE
    assert relative_error(losses.style, torch.stack(style_losses).detach()) < TOLERANCE
    assert relative_error(gradient, torch.autograd.grad(total, unknown)[0]) < TOLERANCE


def test_finite_differences_confirm_the_textbooks_gradient(tiny_textbook: Textbook, picture: Picture) -> None:
    """The oracle itself is checked: central differences along random directions, float64."""
    image, content, style = (picture(20, 24, seed)[None].double() for seed in (8, 9, 10))
    layers = {"relu2_1": 1.0, "relu4_1": 1.0}
    grams = {layer: tiny_textbook.gram(tiny_textbook.features(style)[layer]) for layer in layers}

    def total(x: torch.Tensor) -> torch.Tensor:
        weights: dict[str, Any] = {"style_layers": layers, "content_layers": {"relu3_2": 1.0}}
        return tiny_textbook.losses(x, content, grams, **weights, style_weight=3.0, content_weight=1.0)[0]

    unknown = image.clone().requires_grad_(True)
    gradient = torch.autograd.grad(total(unknown), unknown)[0]
    random = torch.Generator().manual_seed(11)
    for _ in range(5):
        direction = torch.randn(image.shape, generator=random, dtype=torch.float64)
        direction /= direction.norm()
        step = 1e-6
        slope = (total(image + step * direction) - total(image - step * direction)) / (2 * step)
        assert float(slope) == pytest.approx(float((gradient * direction).sum()), rel=1e-5)


@pytest.mark.parametrize("style_loss", list(StyleLoss))
@pytest.mark.parametrize("content_loss", list(ContentLoss))
def test_scripted_module_is_the_eager_one_bit_for_bit(
    tiny_weights: FeatureWeights, picture: Picture, style_loss: StyleLoss, content_loss: ContentLoss
) -> None:
    """TorchScript changes nothing, for every combination of losses: losses and gradient are identical.

    So are those of the content itself, with its targets from the same pass.
    """
    options = StylizeOptions(
        style_loss=style_loss, content_loss=content_loss, style_layers={"relu1_1": 1, "relu3_1": 1}
    )
    model = FeatureModel(tiny_weights, "cpu")
    eager = Objective(model.trunk(options), [model.style_targets(Style(picture(40, 44, 1)), options)], options)
    image, content = picture(41, 35, 2)[None], picture(41, 35, 3)[None]

    losses, gradient = eager.loss_and_gradient(image, eager.content_targets(content))
    scripted = script(eager)
    with interpreted():
        scripted_losses, scripted_gradient = scripted.loss_and_gradient(image, scripted.content_targets(content))
        begun = scripted.begin(content)
        separate = scripted.loss_and_gradient(content, begun[0])

    assert torch.equal(begun[0]["relu4_2"], eager.content_targets(content)["relu4_2"])
    assert all(torch.equal(one, other) for one, other in zip(begun[1], separate[0], strict=True))
    assert torch.equal(begun[2], separate[1])
    assert all(torch.equal(one, other) for one, other in zip(losses, scripted_losses, strict=True))
    assert torch.equal(gradient, scripted_gradient)


@pytest.mark.parametrize("pooling", list(Pooling))
@pytest.mark.parametrize("style_loss", list(StyleLoss))
def test_scripted_module_is_the_eager_one_with_every_extra(
    tiny_weights: FeatureWeights, picture: Picture, style_loss: StyleLoss, pooling: Pooling
) -> None:
    """Two regions, outlines, and the total variation of magnitudes: bit for bit, the first pass and the others."""
    options = StylizeOptions(
        style_loss=style_loss,
        pooling=pooling,
        laplacian_weight=3,
        tv_norm="l1",
        style_layers={"relu1_1": 1, "relu3_1": 1},
    )
    model = FeatureModel(tiny_weights, "cpu")
    styles = [model.style_targets(Style(picture(40, 44, seed)), options) for seed in (1, 4)]
    eager = Objective(model.trunk(options), styles, options, (0.3, 0.7))
    image, content = picture(41, 35, 2)[None], picture(41, 35, 3)[None]
    left = torch.zeros(41, 35)
    left[:, :15] = 1
    regions = layer_weights(torch.stack((left, 1 - left)), (41, 35), eager.style_layers, VGG16)

    losses, gradient = eager.loss_and_gradient(image, eager.content_targets(content), regions)
    scripted = script(eager)
    with interpreted():
        targets, *begun = scripted.begin(content, regions)
        separate = scripted.loss_and_gradient(content, targets, regions)
        scripted_losses, scripted_gradient = scripted.loss_and_gradient(image, targets, regions)

    assert float(losses.laplacian) > 0
    assert all(torch.equal(one, other) for one, other in zip(losses, scripted_losses, strict=True))
    assert torch.equal(gradient, scripted_gradient)
    assert all(torch.equal(one, other) for one, other in zip(begun[0], separate[0], strict=True))
    assert torch.equal(begun[1], separate[1])


CHOICES: dict[str, tuple[Any, ...]] = {
    "style_loss": tuple(StyleLoss),
    "content_loss": tuple(ContentLoss),
    "pooling": tuple(Pooling),
    "padding": tuple(Padding),
    "precision": (Precision.FP32, Precision.BF16),
    "tv_norm": ("l1", "l2"),
    "laplacian_weight": (0.0, 3.0),
    "regions": (1, 2),
}


def pairwise(choices: dict[str, tuple[Any, ...]]) -> list[dict[str, Any]]:
    """Return few combinations in which every two choices meet."""
    open_pairs = {
        (one, a, other, b)
        for one, other in itertools.combinations(choices, 2)
        for a in choices[one]
        for b in choices[other]
    }
    found: list[dict[str, Any]] = []
    random = np.random.default_rng(1)

    def met(combination: dict[str, Any]) -> set[tuple[str, Any, str, Any]]:
        pairs = itertools.combinations(combination.items(), 2)
        return {(one, a, other, b) for (one, a), (other, b) in pairs} & open_pairs

    while open_pairs:
        tries = [{name: values[random.integers(len(values))] for name, values in choices.items()} for _ in range(200)]
        best = max(tries, key=lambda combination: len(met(combination)))
        open_pairs -= met(best)
        found.append(best)
    return found


@pytest.mark.parametrize("combination", pairwise(CHOICES), ids=lambda choice: "-".join(str(v) for v in choice.values()))
def test_every_two_choices_can_be_scripted_together(
    tiny_weights: FeatureWeights, picture: Picture, combination: dict[str, Any]
) -> None:
    """And give the eager module's losses and gradient, bit for bit."""
    given = dict(combination)
    count = given.pop("regions")
    options = StylizeOptions(**given, style_layers={"relu1_1": 1, "relu3_1": 1})
    model = FeatureModel(tiny_weights, "cpu")
    styles = [model.style_targets(Style(picture(40, 44, seed)), options) for seed in range(count)]
    eager = Objective(model.trunk(options), styles, options, (0.3, 0.7)[:count])
    image, content = picture(41, 35, 2)[None], picture(41, 35, 3)[None]
    left = torch.zeros(41, 35)
    left[:, :15] = 1
    masks = torch.stack((left, 1 - left))
    regions = layer_weights(masks, (41, 35), eager.style_layers, VGG16) if count == 2 else None
    losses, gradient = eager.loss_and_gradient(image, eager.content_targets(content), regions)
    scripted = script(eager)
    with interpreted():
        again, gradient_again = scripted.loss_and_gradient(image, scripted.content_targets(content), regions)
    assert all(torch.equal(one, other) for one, other in zip(losses, again, strict=True))
    assert torch.equal(gradient, gradient_again)


def test_bf16_stays_close_to_fp32(tiny_model: FeatureModel, picture: Picture) -> None:
    """bf16 features give losses within a few percent; Gram matrices and losses stay fp32."""
    content, style = picture(48, 48, 1), picture(48, 48, 2)
    found = {}
    for precision in (Precision.FP32, Precision.BF16):
        options = StylizeOptions.of("gatys", precision=precision)
        targets = tiny_model.style_targets(Style(style), options)
        assert all(matrix.dtype == torch.float32 for at_layer in targets.values() for matrix in at_layer.values())
        objective = tiny_model.objective([targets], options)
        with interpreted():
            losses, gradient = objective.loss_and_gradient(content[None], objective.content_targets(content[None]))
        assert losses.total.dtype == gradient.dtype == torch.float32
        found[precision] = float(losses.total)
    assert found[Precision.BF16] == pytest.approx(found[Precision.FP32], rel=0.05)
    assert found[Precision.BF16] != found[Precision.FP32]
