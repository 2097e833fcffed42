"""Each loss against a case computed by hand, a float64 reference, and finite differences."""

from __future__ import annotations

import math
from typing import Any

import pytest
import scipy.linalg
import torch

from nst_model.losses import (
    CONTENT_LOSSES,
    STYLE_LOSSES,
    covariance,
    covariance_root,
    gram,
    inverse_root,
    mixed_targets,
    quantiles,
    style_targets,
    trace_of_root,
)
from nst_model.objective import outlines, total_variation
from nst_model.options import ContentLoss, StyleLoss

DISTRIBUTIONS = [loss for loss in StyleLoss if loss not in (StyleLoss.DIRECT, StyleLoss.CROSS)]
"""Losses that see which features there are, and not where."""


ONE = torch.ones((), dtype=torch.float64)


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    """Return positive random numbers of mean 1."""
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * 2


def style_loss(loss: StyleLoss, style: torch.Tensor, features: torch.Tensor) -> torch.Tensor:
    """Return a style loss of features against a style's features."""
    value: torch.Tensor = STYLE_LOSSES[loss](as_double(style_targets(style, loss)))(features, ONE)[0]
    return value


def content_loss(loss: ContentLoss, features: torch.Tensor, content: torch.Tensor) -> float:
    """Return a content loss of features against the content's."""
    return float(CONTENT_LOSSES[loss]()(features, ONE, content)[0])


def as_double(targets: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return targets in float64, the fixed directions too."""
    return {name: tensor.double() for name, tensor in targets.items()}


def test_gram_by_hand() -> None:
    """Two channels, two positions: (1, 3) and (2, 0)."""
    features = torch.tensor([[[[1.0, 3.0]], [[2.0, 0.0]]]])
    assert gram(features).tolist() == [[5.0, 1.0], [1.0, 2.0]]
    assert covariance(features).tolist() == [[1.0, -1.0], [-1.0, 1.0]]


@pytest.mark.parametrize(
    ("loss", "expected"),
    [
        # One channel: the style has values 1 and 3 (mean 2, second moment 5, variance 1), the picture 2 and 6.
        (StyleLoss.GRAM, (20 - 5) ** 2),
        (StyleLoss.COVARIANCE, (4 - 1) ** 2),
        (StyleLoss.MEAN_STD, (4 - 2) ** 2 + (2 - 1) ** 2),
        (StyleLoss.WASSERSTEIN, (4 - 2) ** 2 + (2 - 1) ** 2),
        (StyleLoss.DIRECT, ((2 - 1) ** 2 + (6 - 3) ** 2) / 2),
        (StyleLoss.CROSS, ((2 * 1 + 6 * 3) / 2 - 5) ** 2),
    ],
)
def test_style_losses_by_hand(loss: StyleLoss, expected: float) -> None:
    """Small enough to compute in the head."""
    style, features = (torch.tensor([[[values]]], dtype=torch.float64) for values in ([1.0, 3.0], [2.0, 6.0]))
    assert float(style_loss(loss, style, features)) == pytest.approx(expected, rel=1e-6)


def test_sliced_loss_by_hand() -> None:
    """Along one direction, sorted values: the quantile functions run from 1 to 3 and from 2 to 6."""
    style, features = (torch.tensor([[[values]]], dtype=torch.float64) for values in ([3.0, 1.0], [2.0, 6.0]))
    steps = torch.linspace(0, 1, 512, dtype=torch.float64)
    expected = (((2 + 4 * steps) - (1 + 2 * steps)) ** 2).mean()
    assert float(style_loss(StyleLoss.SLICED, style, features)) == pytest.approx(float(expected), rel=1e-6)


@pytest.mark.parametrize("height", [1, 15])
def test_wasserstein_agrees_with_the_closed_form(height: int) -> None:
    """Against the formula with scipy's matrix square root, float64; with few positions and with many."""
    style, features = random(1, 6, 20, 20, seed=1), random(1, 6, height, 4, seed=2)
    k, wanted = covariance(features).numpy(), covariance(style).numpy()
    root = scipy.linalg.sqrtm(wanted).real
    cross = scipy.linalg.sqrtm(root @ k @ root).real
    means = features.mean(dim=(0, 2, 3)) - style.mean(dim=(0, 2, 3))
    expected = float(means.square().sum()) + (k + wanted - 2 * cross).trace()
    assert float(style_loss(StyleLoss.WASSERSTEIN, style, features)) == pytest.approx(expected / 6, rel=1e-5)


@pytest.mark.parametrize("channels", [1, 64])
def test_wasserstein_of_a_style_of_one_colour(channels: int) -> None:
    """Its covariance is zero to rounding, on both sides of it: what is left is the picture's own spread."""
    style = random(1, channels, 1, 1, seed=1).float().expand(1, channels, 40, 40) * 30
    features = random(1, channels, 20, 20, seed=2).float()
    loss = STYLE_LOSSES[StyleLoss.WASSERSTEIN](style_targets(style, StyleLoss.WASSERSTEIN))
    means = (features.mean(dim=(0, 2, 3)) - style[0, :, 0, 0]).square().mean()
    expected = means + covariance(features).trace() / channels
    assert float(loss(features, ONE.float())[0]) == pytest.approx(float(expected), rel=0.02)


def test_weighted_quantiles_of_one_position() -> None:
    """Are that one value."""
    found = quantiles(torch.full((1, 2, 1, 1), 3.0), torch.eye(2), torch.ones(1))
    assert torch.equal(found, torch.full((2, 512), 3.0))


def test_inverse_roots() -> None:
    """The inverse root, squared, is the inverse; the trace of the root is the sum of the eigenvalues' roots."""
    a = random(8, 8, seed=3)
    matrix = a @ a.t() + torch.eye(8, dtype=torch.float64)
    inverse = inverse_root(matrix)
    torch.testing.assert_close(inverse @ inverse @ matrix, torch.eye(8, dtype=torch.float64), atol=1e-5, rtol=0)
    expected = torch.linalg.eigvalsh(matrix).sqrt().sum()
    torch.testing.assert_close(trace_of_root(matrix), expected, atol=0, rtol=1e-6)


def test_small_eigenvalues_are_damped_and_rounding_below_zero_does_no_harm() -> None:
    """An eigenvalue of a millionth counts an eighth of its root; one a little below 0 gives a finite inverse."""
    small = inverse_root(torch.tensor([1.0, 1e-6]).diag())
    assert float(small[1, 1]) == pytest.approx(134, rel=0.02)
    below = inverse_root(torch.tensor([1.0, -1e-6]).diag())
    assert float(below.abs().max()) < 150


@pytest.mark.parametrize("loss", list(StyleLoss))
def test_style_losses_vanish_at_the_style(loss: StyleLoss) -> None:
    """Nothing is closer to the style than the style."""
    style = random(1, 5, 12, 12)
    assert float(style_loss(loss, style, style)) == pytest.approx(0, abs=1e-4)


@pytest.mark.parametrize("loss", DISTRIBUTIONS)
def test_where_features_stand_does_not_matter(loss: StyleLoss) -> None:
    """Shifting circularly, flipping and shuffling the positions changes nothing."""
    style, features = random(1, 5, 12, 12, seed=1), random(1, 5, 12, 12, seed=2)
    expected = float(style_loss(loss, style, features))
    shuffle = torch.randperm(144, generator=torch.Generator().manual_seed(4))
    moved = [
        features.roll((3, 5), dims=(2, 3)),
        features.flip(3),
        features.flatten(2)[:, :, shuffle].view(1, 5, 12, 12),
    ]
    assert [float(style_loss(loss, style, other)) for other in moved] == pytest.approx([expected] * 3, rel=1e-6)


@pytest.mark.parametrize("loss", [StyleLoss.DIRECT, StyleLoss.CROSS])
def test_where_features_stand_matters_to_the_direct_ones(loss: StyleLoss) -> None:
    """The style itself, shifted, is no longer the style."""
    style = random(1, 5, 12, 12)
    assert float(style_loss(loss, style, style.roll(3, dims=2))) > 0.01


@pytest.mark.parametrize("loss", list(ContentLoss))
def test_content_losses_vanish_at_the_content(loss: ContentLoss) -> None:
    """And are positive elsewhere."""
    content = random(1, 5, 9, 9)
    assert content_loss(loss, content, content) == pytest.approx(0, abs=1e-9)
    assert content_loss(loss, random(1, 5, 9, 9, seed=1), content) > 1e-3


def test_content_losses_by_hand() -> None:
    """Two positions, two channels: (1, 0) and (0, 1) against (1, 0) and (1, 0)."""
    content = torch.tensor([[[[1.0, 0.0]], [[0.0, 1.0]]]])
    features = torch.tensor([[[[1.0, 1.0]], [[0.0, 0.0]]]])
    found = {loss: content_loss(loss, features, content) for loss in ContentLoss}
    assert found == pytest.approx(
        {
            ContentLoss.SQUARED_ERROR: 2 / 4,
            ContentLoss.INNER_PRODUCT: 1 - 1 / (math.sqrt(2) * math.sqrt(2)),
            ContentLoss.COSINE: 1 - (1 + 0) / 2,
            # Distances: content 0 1 / 1 0, features all 0; each column sums to 1 and to 0.
            ContentLoss.SELF_SIMILARITY: 1.0,
        },
        abs=1e-6,
    )


@pytest.mark.parametrize("loss", [ContentLoss.INNER_PRODUCT, ContentLoss.COSINE, ContentLoss.SELF_SIMILARITY])
def test_contrast_is_invisible_to_directions(loss: ContentLoss) -> None:
    """Scaling all features leaves the loss alone; the squared error sees it."""
    features, content = random(1, 5, 9, 9, seed=1), random(1, 5, 9, 9, seed=2)
    expected = content_loss(loss, features, content)
    assert content_loss(loss, 7 * features, content) == pytest.approx(expected, rel=1e-6)
    bright, plain = (content_loss(ContentLoss.SQUARED_ERROR, times * features, content) for times in (7, 1))
    assert bright > 2 * plain


def test_scaling_each_position_is_invisible_to_the_cosine_only() -> None:
    """Light and shade: the inner product of whole maps sees them."""
    features, content = random(1, 5, 9, 9, seed=1), random(1, 5, 9, 9, seed=2)
    shaded = features * random(1, 1, 9, 9, seed=3)
    cosine, cosine_shaded = (content_loss(ContentLoss.COSINE, x, content) for x in (features, shaded))
    inner, inner_shaded = (content_loss(ContentLoss.INNER_PRODUCT, x, content) for x in (features, shaded))
    assert cosine_shaded == pytest.approx(cosine, rel=1e-6)
    assert inner_shaded != pytest.approx(inner, rel=1e-2)


@pytest.mark.parametrize("weighted", [False, True], ids=["everywhere", "region"])
@pytest.mark.parametrize(("height", "channels"), [(8, 4), (1, 12)], ids=["many positions", "few positions"])
@pytest.mark.parametrize("loss", list(StyleLoss))
def test_style_gradients_by_finite_differences(loss: StyleLoss, height: int, channels: int, weighted: bool) -> None:
    """Central differences along random directions, float64; with weights of positions, and with few positions."""
    style, features = random(1, channels, 8, 9, seed=1), random(1, channels, height, 9, seed=2)
    weights = random(height * 9, seed=3) if weighted else None
    module = STYLE_LOSSES[loss](as_double(style_targets(style, loss)))
    _check_returned_gradient(
        lambda x, scale: module(x, scale, None if weights is None else weights / weights.sum()), features
    )


@pytest.mark.parametrize("loss", list(ContentLoss))
def test_content_gradients_by_finite_differences(loss: ContentLoss) -> None:
    """Central differences along random directions, float64."""
    content, features = random(1, 4, 8, 9, seed=1), random(1, 4, 8, 9, seed=2)
    _check_returned_gradient(lambda x, scale: CONTENT_LOSSES[loss]()(x, scale, content), features)


def in_both_precisions(loss: StyleLoss, features: torch.Tensor) -> tuple[tuple[torch.Tensor, torch.Tensor], ...]:
    """Return loss and gradient of features rounded to bf16, computed as they are and in float64."""
    targets = style_targets(random(1, 24, 20, 20, seed=1).float(), loss)
    here = features.bfloat16().contiguous(memory_format=torch.channels_last)
    exact = STYLE_LOSSES[loss](as_double(targets))(here.double(), 3 * ONE)
    return STYLE_LOSSES[loss](targets)(here, torch.tensor(3.0)), exact


@pytest.mark.parametrize("near", [True, False], ids=["near the style", "far from it"])
@pytest.mark.parametrize("loss", list(StyleLoss))
def test_style_losses_of_bf16_features_are_those_of_the_same_numbers_in_float64(loss: StyleLoss, near: bool) -> None:
    """What is rounded is the gradient and, of a moment, its distance from the style's: also where that is small."""
    features = random(1, 24, 20, 20, seed=1) * 1.02 if near else random(1, 24, 16, 16, seed=2)
    (value, gradient), (expected, towards) = in_both_precisions(loss, features)
    assert value.dtype == torch.float32
    assert gradient.dtype == torch.bfloat16
    assert float(value) == pytest.approx(float(expected), rel=0.01, abs=1e-5)
    assert float((gradient.double() - towards).norm()) < 0.05 * float(towards.norm())


@pytest.mark.parametrize("loss", list(StyleLoss))
def test_flat_features_in_bf16_have_a_loss_and_a_finite_gradient(loss: StyleLoss) -> None:
    """A picture of one colour, as a run from gray begins with: what is left of its covariance is rounding."""
    (value, gradient), (expected, _) = in_both_precisions(loss, random(1, 24, 1, 1, seed=3).expand(1, 24, 16, 16))
    assert float(value) == pytest.approx(float(expected), rel=0.01)
    assert gradient.isfinite().all()


def test_total_variation_by_hand() -> None:
    """One bright pixel in 3×3: four neighbours across an edge, four across a corner at half weight."""
    image = torch.zeros(1, 1, 3, 3)
    image[0, 0, 1, 1] = 1
    # Padded to 5×5 there are 12 vertical and 12 horizontal pairs, 16 of each diagonal; two of each touch the pixel.
    assert float(total_variation(image)[0]) == pytest.approx((2 / 12 + 2 / 12 + 0.5 * (2 / 16 + 2 / 16)) / 3)
    assert float(total_variation(torch.full((1, 3, 8, 8), 0.7))[0]) == 0


def test_total_variation_of_magnitudes_by_hand() -> None:
    """A step of height 1: half as much for half the height, where squares give a quarter."""
    step = torch.zeros(1, 3, 8, 8, dtype=torch.float64)
    step[:, :, :, 4:] = 1
    one, half = (float(total_variation(height * step, absolute=True)[0]) for height in (1.0, 0.5))
    assert one == pytest.approx(float(total_variation(step)[0]), rel=0.01)
    assert half == pytest.approx(0.5 * one, rel=0.01)
    assert float(total_variation(torch.zeros_like(step), absolute=True)[0]) == 0


@pytest.mark.parametrize("absolute", [False, True])
@pytest.mark.parametrize("size", [(16, 16), (17, 33)])
def test_total_variation_comes_with_its_gradient(size: tuple[int, int], absolute: bool) -> None:
    """Autograd's of the value, edges and corners included; on flat pictures 0."""
    image = random(1, 3, *size, seed=3).requires_grad_()
    value, gradient = total_variation(image, absolute)
    torch.testing.assert_close(gradient, torch.autograd.grad(value, image)[0])
    assert not total_variation(torch.full((1, 3, *size), 0.7), absolute)[1].any()


def test_outlines_by_hand() -> None:
    """One white block of 4×4 pixels in black: -4 there, 1 beside it, of the averages."""
    image = torch.zeros(1, 3, 20, 20)
    image[:, :, 8:12, 8:12] = 1
    found = outlines(image)[0, 0]
    assert found.shape == (5, 5)
    assert found[2, 2] == -4
    assert found[1, 2] == found[2, 1] == found[2, 3] == found[3, 2] == 1
    assert float(found.sum()) == 0


def test_quantiles_of_styles_mix_to_their_barycentre() -> None:
    """Half-way between two distributions on a line lies the one whose quantiles are half-way."""
    low, high = (
        as_double(style_targets(random(1, 3, 10, 10, seed=seed) + shift, StyleLoss.SLICED))
        for seed, shift in ((1, 0), (2, 5))
    )
    mixed = mixed_targets([(0.5, low), (0.5, high)])
    torch.testing.assert_close(mixed["quantiles"], (low["quantiles"] + high["quantiles"]) / 2)
    torch.testing.assert_close(mixed["directions"], low["directions"])


def _check_gradient(function: object, x: torch.Tensor) -> None:
    gradient = torch.autograd.grad(function(x), x)[0]  # type: ignore[operator]
    generator = torch.Generator().manual_seed(5)
    for _ in range(4):
        direction = torch.randn(x.shape, generator=generator, dtype=torch.float64)
        step = 1e-6
        with torch.no_grad():
            slope = (function(x + step * direction) - function(x - step * direction)) / (2 * step)  # type: ignore[operator]
        assert float(slope) == pytest.approx(float((gradient * direction).sum()), rel=2e-3, abs=1e-8)


def _check_returned_gradient(module: Any, features: torch.Tensor) -> None:
    """Hold the gradient that a module returns, times the scale, against central differences of its loss."""
    gradient = module(features, 3 * ONE)[1]
    generator = torch.Generator().manual_seed(5)
    for _ in range(4):
        direction = torch.randn(features.shape, generator=generator, dtype=torch.float64)
        step = 1e-6
        after, before = (float(module(features + sign * step * direction, ONE)[0]) for sign in (1, -1))
        slope = 3 * (after - before) / (2 * step)
        assert slope == pytest.approx(float((gradient * direction).sum()), rel=2e-3, abs=1e-8)


def test_a_styles_root_is_found_once_and_never_touched() -> None:
    """Whoever overwrites one objective's targets, as a recording's are, does not overwrite another's."""
    style = style_targets(random(1, 12, 9, 9, seed=5), StyleLoss.WASSERSTEIN)
    covariance_root.cache_clear()
    first, second = (STYLE_LOSSES[StyleLoss.WASSERSTEIN](style) for _ in range(2))
    assert covariance_root.cache_info().misses == 1
    expected = dict(second.named_buffers())["root"].clone()
    for buffer in first.buffers():
        buffer.zero_()
    third = STYLE_LOSSES[StyleLoss.WASSERSTEIN](style_targets(random(1, 12, 9, 9, seed=5), StyleLoss.WASSERSTEIN))
    for loss in (second, third):
        assert torch.equal(dict(loss.named_buffers())["root"], expected)
    STYLE_LOSSES[StyleLoss.WASSERSTEIN](style_targets(random(1, 12, 9, 9, seed=6), StyleLoss.WASSERSTEIN))
    assert covariance_root.cache_info().misses == 2
