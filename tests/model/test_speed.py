"""Guards against becoming slow: ratios of processor time, interleaved, so that other work matters little.

What fails is a loss of a fifth against what was measured.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping

import pytest
import torch
from torch.nn import functional as F

from nst_model import FeatureModel, Pooling, Precision, Style, StylizeOptions, gram
from nst_model.architecture import VGG16
from nst_model.descent import Closure
from nst_model.options import relative
from nst_model.stylization import content_targets
from nst_model.weights import FeatureWeights
from tests.conftest import random_state

Picture = Callable[[int, int, int], torch.Tensor]

HEIGHT, WIDTH = 96, 128
ROUNDS = 5
MOST = {("gatys", "textbook"): 0.90, ("fine", "gatys"): 1.13, ("bf16", "textbook"): 0.48}
"""Measured ratios of processor time, on a processor with AVX-512 and its bf16 instructions."""


@pytest.fixture
def full_model() -> FeatureModel:
    """A VGG-16 of the published widths, with random weights, which need no calibration to take their time."""
    state = random_state(VGG16, (64, 128, 256, 512, 512))
    convolutions = {
        c.layer: (state[f"features.{c.index}.weight"], state[f"features.{c.index}.bias"]) for c in VGG16.convolutions
    }
    means = dict.fromkeys(Pooling, dict.fromkeys(VGG16.layers, 1.0))
    return FeatureModel(FeatureWeights("random", VGG16, convolutions, torch.full((3,), 0.45), means, ""), "cpu")


def closure(model: FeatureModel, picture: Picture, options: StylizeOptions) -> Callable[[], object]:
    """Return one evaluation of the product's objective and its gradient."""
    image, content, style = (picture(HEIGHT, WIDTH, seed) for seed in (1, 2, 3))
    objective = model.objective([model.style_targets(Style(style), options)], options)
    evaluate = Closure(objective, content_targets(objective, content))
    return lambda: evaluate(image[None])


def textbook(model: FeatureModel, picture: Picture, options: StylizeOptions) -> Callable[[], object]:
    """Return one evaluation as a tutorial has it: eager, by autograd, fp32."""
    image, content, style = (picture(HEIGHT, WIDTH, seed)[None] for seed in (1, 2, 3))
    stages = [(s.name, s.weight.contiguous(), s.bias, s.pooled) for s in model.trunk(options).stages]

    def features(x: torch.Tensor) -> dict[str, torch.Tensor]:
        found = {}
        for name, weight, bias, pooled in stages:
            x = F.relu(F.conv2d(F.avg_pool2d(x, 2) if pooled else x, weight, bias, padding=1))
            found[name] = x
        return found

    with torch.no_grad():
        grams = {layer: gram(there) for layer, there in features(style).items()}
        there = features(content)["relu4_2"]

    def evaluate() -> object:
        leaf = image.clone().requires_grad_(True)
        here = features(leaf)
        loss = F.mse_loss(here["relu4_2"], there)
        for layer, weight in relative(options.style_layers).items():
            loss = loss + options.style_weight * weight * F.mse_loss(gram(here[layer]), grams[layer])
        return torch.autograd.grad(loss, leaf)

    return evaluate


def processor_seconds(works: Mapping[str, Callable[[], object]]) -> dict[str, float]:
    """Return the median processor time of each, of several rounds in which they take turns."""
    seconds: dict[str, list[float]] = {name: [] for name in works}
    for work in works.values():
        work()
    for _ in range(ROUNDS):
        for name, work in works.items():
            began = time.process_time()
            work()
            seconds[name].append(time.process_time() - began)
    return {name: statistics.median(found) for name, found in seconds.items()}


def test_an_evaluation_is_no_slower_than_it_was(full_model: FeatureModel, picture: Picture) -> None:
    """Against the textbook's in fp32, and `fine` against `gatys`; in bf16 only where the processor multiplies it."""
    fp32 = StylizeOptions.of("gatys", precision=Precision.FP32)
    fine = StylizeOptions(precision=Precision.FP32)
    works = {
        "textbook": textbook(full_model, picture, fp32),
        "gatys": closure(full_model, picture, fp32),
        "fine": closure(full_model, picture, fine),
    }
    if full_model.precision(StylizeOptions()) is Precision.BF16:
        works["bf16"] = closure(full_model, picture, StylizeOptions.of("gatys", precision=Precision.BF16))
    seconds = processor_seconds(works)
    found = {pair: seconds[pair[0]] / seconds[pair[1]] for pair in MOST if pair[0] in works}
    assert all(ratio < MOST[pair] / 0.8 for pair, ratio in found.items()), found
