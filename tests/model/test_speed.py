"""Guards against becoming slow: ratios of processor time, interleaved, so that other work matters little, and counts.

What fails is a loss of a fifth against what was measured.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterator, Mapping

import pytest
import torch
from torch.nn import functional as F

from nst_model import FeatureModel, Pooling, Precision, Style, StylizeOptions, gram, stylize
from nst_model.architecture import VGG16
from nst_model.calibration import dead_leaves, one_over_f_noise
from nst_model.descent import Closure
from nst_model.lbfgs import LBFGS
from nst_model.options import Curvature, relative
from nst_model.stylization import content_targets
from nst_model.weights import FeatureWeights
from tests.conftest import random_state

Picture = Callable[[int, int, int], torch.Tensor]

HEIGHT, WIDTH = 96, 128
ROUNDS = 5
MOST = {("gatys", "textbook"): 0.90, ("fine", "gatys"): 1.13, ("bf16", "textbook"): 0.48, ("ten steps", "gatys"): 0.38}
"""Measured ratios of processor time, on a processor with AVX-512 and its bf16 instructions."""

ITERATIONS = 100
MOST_ITERATIONS = 0.44
"""Measured ratio of the iterations that `fine` needs with Curvature.SPECTRAL and UNIFORM, ITERATIONS, to one loss."""


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


def ten_steps(picture: Picture, options: StylizeOptions) -> Callable[[], object]:
    """Return ten steps of L-BFGS as the options have it, on random gradients: the work is the same for all."""
    spectral = options.curvature is Curvature.SPECTRAL
    optimizer = LBFGS(picture(HEIGHT, WIDTH, 1)[None], options.history, spectral=spectral)
    gradients = itertools.cycle(picture(HEIGHT, WIDTH, seed)[None] - 0.5 for seed in range(2, 6))
    loss = torch.tensor(1.0)

    def steps() -> None:
        for gradient in itertools.islice(gradients, 10):
            optimizer.step(gradient, loss)

    return steps


def processor_seconds(works: Mapping[str, Callable[[], object]]) -> dict[str, float]:
    """Return the least processor time of each, of several rounds in which they take turns.

    The least, because other work on the machine only ever makes it longer.
    """
    seconds: dict[str, list[float]] = {name: [] for name in works}
    for work in works.values():
        work()
    for _ in range(ROUNDS):
        for name, work in works.items():
            began = time.process_time()
            work()
            seconds[name].append(time.process_time() - began)
    return {name: min(found) for name, found in seconds.items()}


def losses(model: FeatureModel, seed: int, curvature: Curvature) -> Iterator[float]:
    """Yield the losses of `fine` at one scale, on pictures whose spectrum is that of photographs."""
    random = torch.Generator().manual_seed(seed)
    content, style = one_over_f_noise(64, random)[:, :48], dead_leaves(64, random)
    options = StylizeOptions(
        iterations=ITERATIONS, first_size_px=64, curvature=curvature, precision=Precision.FP32, size_px=64
    )
    return (iterate.loss for iterate in stylize(model, content, [Style(style)], options))


def test_an_iteration_is_no_slower_than_it_was(full_model: FeatureModel, picture: Picture) -> None:
    """An evaluation against the textbook's in fp32, that of `fine` and steps of L-BFGS against that of `gatys`.

    In bf16 only where the processor multiplies it.
    """
    fp32 = StylizeOptions.of("gatys", precision=Precision.FP32)
    fine = StylizeOptions(precision=Precision.FP32)
    works = {
        "textbook": textbook(full_model, picture, fp32),
        "gatys": closure(full_model, picture, fp32),
        "fine": closure(full_model, picture, fine),
        "ten steps": ten_steps(picture, fp32),
    }
    if full_model.precision(StylizeOptions()) is Precision.BF16:
        works["bf16"] = closure(full_model, picture, StylizeOptions.of("gatys", precision=Precision.BF16))
    seconds = processor_seconds(works)
    found = {pair: seconds[pair[0]] / seconds[pair[1]] for pair in MOST if pair[0] in works}
    assert all(ratio < MOST[pair] / 0.8 for pair, ratio in found.items()), found


def test_no_more_iterations_are_needed_than_were(tiny_model: FeatureModel) -> None:
    """The spectral curvature is soon where the uniform one is after ITERATIONS."""
    needed, seeds = 0, (1, 2)
    for seed in seeds:
        *_, end = losses(tiny_model, seed, Curvature.UNIFORM)
        spectral = losses(tiny_model, seed, Curvature.SPECTRAL)
        needed += len(list(itertools.takewhile(lambda loss, end=end: loss > end, spectral)))
    assert needed < MOST_ITERATIONS / 0.8 * len(seeds) * ITERATIONS, needed
