"""Whole runs of the fast objective against a plain one in float64, by the same optimizer from the same start."""

from __future__ import annotations

from typing import Any

import pytest
import safetensors.torch
import torch
from torch.nn import functional as F

from nst_model import FeatureModel, Precision, Style, StylizeOptions
from nst_model.architecture import VGG16
from nst_model.descent import Closure, Descent, minimize
from nst_model.losses import trace_of_root
from nst_model.memory import peak_bytes
from nst_model.objective import Losses
from nst_model.scales import scales
from nst_model.stylization import Stylization, content_targets, of_size, size_of
from nst_model.weights import FeatureWeights, load_weights
from tests.conftest import random_state
from tests.model.textbook import Textbook

ITERATIONS = 30


class Plain:
    """The textbook's objective with its gradient by autograd, in float64, as the optimizer calls an objective."""

    def __init__(self, textbook: Textbook, content: torch.Tensor, style: torch.Tensor, options: StylizeOptions) -> None:
        self.style_layers = list(options.style_layers)
        self._textbook, self._content, self._options = textbook, content, options
        features = textbook.features(style, options.pooling)
        self._grams = {layer: textbook.gram(features[layer]) for layer in options.style_layers}

    def loss_and_gradient(self, image: torch.Tensor, *_: object) -> tuple[Losses, torch.Tensor]:
        """Return the losses of a picture and the total's gradient."""
        leaf, options = image.detach().requires_grad_(True), self._options
        total, content, style = self._textbook.losses(
            leaf,
            self._content,
            self._grams,
            style_layers=options.style_layers,
            content_layers=options.content_layers,
            style_weight=options.style_weight,
            content_weight=options.content_weight,
            pooling=options.pooling,
        )
        gradient = torch.autograd.grad(total, leaf)[0]
        none = torch.zeros((), dtype=torch.float64)
        return Losses(total.detach(), content.detach(), none, none, torch.stack(style).detach()), gradient


def smooth(seed: int) -> torch.Tensor:
    """Return a smooth random picture, (1, 3, 48, 64)."""
    small = torch.rand(1, 3, 12, 12, generator=torch.Generator().manual_seed(seed))
    return F.interpolate(small, size=(48, 64), mode="bilinear")


class PlainFine:
    """The objective of `fine` without a margin: the Wasserstein distance and the total variation, by autograd."""

    def __init__(self, textbook: Textbook, content: torch.Tensor, style: torch.Tensor, options: StylizeOptions) -> None:
        self.style_layers = list(options.style_layers)
        self._textbook, self._options = textbook, options
        (self._content_layer,) = options.content_layers
        self._content = textbook.features(content)[self._content_layer]
        self._style = {}
        for layer, features in textbook.features(style).items():
            mean, covariance = self._moments(features)
            values, vectors = torch.linalg.eigh(covariance)
            root = (vectors * values.clamp_min(0).sqrt()) @ vectors.t()
            self._style[layer] = mean, covariance.trace(), root

    def loss_and_gradient(self, image: torch.Tensor, *_: object) -> tuple[Losses, torch.Tensor]:
        """Return the losses of a picture and the total's gradient."""
        leaf, options = image.detach().requires_grad_(True), self._options
        features = self._textbook.features(leaf)
        content = (features[self._content_layer] - self._content).square().mean()
        style = torch.stack([self._distance(layer, features[layer]) for layer in self.style_layers])
        weights = torch.tensor(list(options.style_layers.values()), dtype=torch.float64)
        variation = self._variation(leaf)
        total = options.content_weight * content + options.style_weight * (style @ weights) / weights.sum()
        total = total + options.tv_weight * variation
        gradient = torch.autograd.grad(total, leaf)[0]
        none = torch.zeros((), dtype=torch.float64)
        return Losses(total.detach(), content.detach(), variation.detach(), none, style.detach()), gradient

    def _distance(self, layer: str, features: torch.Tensor) -> torch.Tensor:
        mean, variance, root = self._style[layer]
        own, covariance = self._moments(features)
        spread = covariance.trace() + variance - 2 * trace_of_root(root @ covariance @ root)
        return (own - mean).square().mean() + spread / len(mean)

    def _moments(self, features: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        rows = features[0].flatten(1)
        mean = rows.mean(dim=1)
        return mean, (rows - mean[:, None]) @ (rows - mean[:, None]).t() / rows.shape[1]

    def _variation(self, x: torch.Tensor) -> torch.Tensor:
        x = F.pad(x, [1, 1, 1, 1], mode="replicate")
        straight = (x[..., 1:-1, 1:] - x[..., 1:-1, :-1], x[..., 1:, 1:-1] - x[..., :-1, 1:-1])
        diagonal = (x[..., 1:, 1:] - x[..., :-1, :-1], x[..., 1:, :-1] - x[..., :-1, 1:])
        means = [sum(d.square().mean() for d in differences) for differences in (straight, diagonal)]
        return (means[0] + means[1] / 2) / 3


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> tuple[FeatureWeights, Textbook]:
    """Weights of the published widths: a few channels are matched to a ten-thousandth, and what is left is chance."""
    state, file = random_state(VGG16, (64, 128, 256, 512, 512)), tmp_path_factory.mktemp("wide") / "wide.safetensors"
    safetensors.torch.save_file(state, file)
    weights = load_weights("vgg16", file)
    return weights, Textbook(state, VGG16, weights.mean_activation)


def test_a_run_from_coarse_to_fine_follows_the_plain_one_in_float64(wide: tuple[FeatureWeights, Textbook]) -> None:
    """Twenty iterations within 1 %, in fp32; the loss at the end, as float64 sees it, within 1 %, in bf16 5 %.

    Where it is bf16, L-BFGS's memory is, too.
    """
    weights, textbook = wide
    content, style = smooth(1)[0], smooth(2)[0]
    given: dict[str, Any] = {"first_size_px": 45, "padding": "zeros", "scale_iterations": (9, 14)}
    options = StylizeOptions(**given)
    edges = scales(64, 48, 45)
    descent, picture, exact = Descent(options, [edge**2 for edge in edges], None), content.double(), []
    for edge in edges:
        small, small_style = (of_size(x, size_of(x, edge)) for x in (content, style))
        plain = PlainFine(textbook, small[None], small_style[None], options)
        descent.closure = Closure(plain, {})
        descent.begin(of_size(picture, small.shape[1:])[None])
        exact += list(descent.iterates())
        picture = exact[-1].picture if descent.picture is None else descent.picture[0]
    assert len(exact) == 24
    for precision, tolerance in ((Precision.FP32, 0.01), (Precision.BF16, 0.05)):
        options = StylizeOptions(**given, precision=precision)
        peak = peak_bytes(options, 48, 64, VGG16)
        model = FeatureModel(weights, "cpu", peak if precision is Precision.FP32 else peak - 1)
        assert model.memory(options, 48, 64) == (20, 4 if precision is Precision.FP32 else 2)
        found = list(Stylization(model, content, [Style(style)], options))
        if precision is Precision.FP32:
            assert [i.loss for i in found[:21]] == pytest.approx([i.loss for i in exact[:21]], rel=0.01)
        reached = float(plain.loss_and_gradient(found[-1].picture[None].double())[0].total)
        assert reached == pytest.approx(exact[-1].loss, rel=tolerance), precision


def test_a_run_follows_the_textbooks_in_float64(wide: tuple[FeatureWeights, Textbook]) -> None:
    """Twenty iterations within 1 %, in fp32; the loss at the end, as float64 sees it, within 1 %, in bf16 5 %."""
    weights, textbook = wide
    model = FeatureModel(weights, "cpu")
    content, style = smooth(1), smooth(2)
    start = 0.5 + 0.5 * (content - 0.5)
    given: dict[str, Any] = {"iterations": ITERATIONS, "content_weight": 30.0}
    options = StylizeOptions.of("gatys", **given)
    plain = Plain(textbook, content, style, options)
    exact = list(minimize(plain, {}, start.double(), options))
    for precision, tolerance in ((Precision.FP32, 0.01), (Precision.BF16, 0.05)):
        here = StylizeOptions.of("gatys", **given, precision=precision)
        objective = model.objective([model.style_targets(Style(style[0]), here)], here)
        found = list(minimize(objective, content_targets(objective, content[0]), start, here))
        if precision is Precision.FP32:
            assert [i.loss for i in found[:21]] == pytest.approx([i.loss for i in exact[:21]], rel=0.01)
        reached = float(plain.loss_and_gradient(found[-1].picture[None].double())[0].total)
        assert reached == pytest.approx(exact[-1].loss, rel=tolerance), precision
