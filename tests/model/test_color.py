"""Colour: each mode does what it says."""

from __future__ import annotations

import pytest
import torch

import nst_model
from nst_model import Color, FeatureModel, Style, StylizeOptions, to_pixels
from nst_model.color import LUMA, gray, luminance, matched_luminance, moments, recolored, with_luminance

LINEAR = (Color.CHOLESKY, Color.PCA, Color.SYMMETRIC)


def colourful(height: int, width: int, seed: int, centre: float, spread: float) -> torch.Tensor:
    """Return a picture whose channels correlate, far enough from black and white that a linear map stays inside."""
    random = torch.Generator().manual_seed(seed)
    mixing = torch.rand(3, 3, generator=random)
    noise = torch.randn(3, height * width, generator=random).clamp(-2, 2)
    return (centre + spread * mixing @ noise / 3).clamp(0, 1).view(3, height, width)


def test_luminance_by_hand() -> None:
    """Red, green, blue and white."""
    corners = torch.tensor([[1.0, 0, 0], [0, 1, 0], [0, 0, 1], [1, 1, 1]]).T[:, None]
    assert luminance(corners).flatten().tolist() == pytest.approx([*LUMA, 1.0])


@pytest.mark.parametrize("color", LINEAR)
def test_linear_modes_give_the_photos_mean_and_covariance(color: Color) -> None:
    """Where nothing is clipped, the recoloured style has them to rounding."""
    style, photo = colourful(40, 50, 1, 0.5, 0.15), colourful(30, 45, 2, 0.45, 0.1)
    found, wanted = moments(recolored(style, photo, color)), moments(photo)
    torch.testing.assert_close(found[0], wanted[0], atol=1e-3, rtol=0)
    torch.testing.assert_close(found[1], wanted[1], atol=1e-4, rtol=0)


def test_the_symmetric_mode_moves_colours_least() -> None:
    """It is the optimal transport between the two Gaussians."""
    style, photo = colourful(40, 50, 1, 0.5, 0.15), colourful(30, 45, 2, 0.45, 0.1)
    moved = {color: float((recolored(style, photo, color) - style).square().mean()) for color in LINEAR}
    assert moved[Color.SYMMETRIC] == min(moved.values())
    assert moved[Color.SYMMETRIC] < 0.99 * max(moved.values())


def test_histogram_mode_gives_each_channel_the_photos_values() -> None:
    """The same sorted values, in the order of the style's."""
    style, photo = torch.rand(3, 20, 30), torch.rand(3, 20, 30) ** 2
    found = recolored(style, photo, Color.HISTOGRAM)
    assert torch.equal(found.flatten(1).sort(dim=1).values, photo.flatten(1).sort(dim=1).values)
    assert torch.equal(found.flatten(1).argsort(dim=1), style.flatten(1).argsort(dim=1))


def test_histogram_mode_fits_pictures_of_other_sizes() -> None:
    """Quantile by quantile."""
    found = recolored(torch.rand(3, 20, 30), torch.rand(3, 55, 31) ** 2, Color.HISTOGRAM)
    levels = torch.tensor([0.1, 0.5, 0.9])
    torch.testing.assert_close(found.flatten().quantile(levels), levels**2, atol=0.06, rtol=0)


@pytest.mark.parametrize("color", [*LINEAR, Color.HISTOGRAM, Color.LUMINANCE])
def test_pictures_of_one_colour_are_no_trouble(color: Color) -> None:
    """A covariance of zero has no inverse."""
    flat, other = torch.full((3, 16, 16), 0.3), torch.rand(3, 16, 16)
    for style, photo in ((flat, other), (other, flat), (flat, flat)):
        found = recolored(style, photo, color)
        assert found.isfinite().all()
        assert found.shape == style.shape
        assert 0 <= float(found.min()) <= float(found.max()) <= 1


def test_matched_luminance_has_the_photos_mean_and_spread() -> None:
    """And no chroma."""
    style, photo = colourful(40, 50, 1, 0.3, 0.1), colourful(30, 45, 2, 0.6, 0.05)
    found = matched_luminance(style, photo)
    assert torch.equal(found[0], found[1])
    assert float(found.mean()) == pytest.approx(float(luminance(photo).mean()), abs=1e-4)
    assert float(found[0].std()) == pytest.approx(float(luminance(photo).std()), rel=1e-3)


def test_chroma_is_kept_exactly_and_stays_in_range() -> None:
    """Whatever the painted luminance is."""
    photo, painted = torch.rand(3, 20, 20), 3 * torch.rand(3, 20, 20) - 1
    found = with_luminance(photo, painted)
    torch.testing.assert_close(found - luminance(found), photo - luminance(photo), atol=1e-6, rtol=0)
    assert float(found.min()) >= -1e-6
    assert float(found.max()) <= 1 + 1e-6


def test_luminance_mode_keeps_the_photos_chroma_to_rounding(tiny_model: FeatureModel) -> None:
    """Of a whole run, of every picture it shows, in the bytes that go out; and the luminance is painted."""
    photo, style = torch.rand(3, 40, 48), torch.rand(3, 40, 40)
    options = StylizeOptions(color="luminance", iterations=4, first_size_px=32, tv_weight=0)
    iterates = list(nst_model.stylize(tiny_model, photo, [Style(style)], options))
    photo_bytes, shown = (
        torch.from_numpy(to_pixels(p)).permute(2, 0, 1).double() for p in (photo, iterates[-1].picture)
    )
    chroma, wanted = shown - luminance(shown), photo_bytes - luminance(photo_bytes)
    assert float((chroma - wanted).abs().max()) <= 2.0  # of 255: each of four numbers is rounded
    assert float((luminance(shown) - luminance(photo_bytes)).abs().mean()) > 2
    assert all(iterate.picture.isfinite().all() for iterate in iterates)


def test_recoloured_styles_are_not_kept_under_the_styles_name(tiny_model: FeatureModel) -> None:
    """A cache of targets by name must not see them."""
    names = []

    def targets_of(style: Style, options: StylizeOptions) -> dict[str, dict[str, torch.Tensor]]:
        names.append(style.name)
        return tiny_model.style_targets(style, options)

    for color in ("style", "pca"):
        options = StylizeOptions(color=color, iterations=1, first_size_px=512)
        style = Style(torch.rand(3, 32, 32), name="starry")
        list(nst_model.stylize(tiny_model, torch.rand(3, 32, 32), [style], options, targets_of=targets_of))
    assert names == ["starry", ""]


def test_gray_has_no_chroma() -> None:
    """Three equal channels."""
    found = gray(torch.rand(3, 8, 8))
    assert torch.equal(found[0], found[2])
