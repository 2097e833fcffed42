"""The margin: mirrored, optimized along, and never seen."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.nn import functional as F

import nst_model
from nst_model import FeatureModel, Style, StylizeOptions
from nst_model.adam import Adam
from nst_model.margin import mirrored, trimmed
from nst_model.objective import interpreted
from nst_model.options import MARGIN_PX

Picture = Callable[[int, int, int], torch.Tensor]


def test_mirrored_repeats_everything_but_the_edge(picture: Picture) -> None:
    """As torch reflects, whatever comes before the last two dimensions."""
    one = picture(20, 33, 1)
    assert torch.equal(mirrored(one, 7), F.pad(one, [7, 7, 7, 7], mode="reflect"))
    assert torch.equal(mirrored(one[None], 19)[0], mirrored(one, 19))
    assert torch.equal(mirrored(one, 0), one)


def test_a_margin_wider_than_the_picture_goes_to_and_fro() -> None:
    """Where torch gives up."""
    row = torch.tensor([[0.0, 1.0, 2.0], [0.0, 1.0, 2.0]])
    assert mirrored(row, 5)[0].tolist() == [1, 0, 1, 2, 1, 0, 1, 2, 1, 0, 1, 2, 1]


def test_trimmed_takes_the_margin_off_again(picture: Picture) -> None:
    """To the byte."""
    one = picture(16, 40, 2)
    assert torch.equal(trimmed(mirrored(one, 16), 16), one)
    assert torch.equal(trimmed(one, 0), one)


@pytest.mark.parametrize("optimizer", ["lbfgs", "adam"])
def test_iterates_have_the_pictures_size_at_every_scale(
    tiny_model: FeatureModel, picture: Picture, optimizer: str
) -> None:
    """Nobody sees the margin; the start is the photograph itself."""
    photo = picture(40, 56, 1)
    options = StylizeOptions(padding="mirror", iterations=2, first_size_px=28, optimizer=optimizer)
    iterates = list(nst_model.stylize(tiny_model, photo, [Style(picture(48, 48, 2))], options))
    assert [tuple(i.picture.shape[1:]) for i in iterates[::2]] == [(20, 28), (29, 40), (40, 56), (40, 56)]
    assert float((iterates[-1].picture - photo).abs().max()) > 0
    single = StylizeOptions(padding="mirror", iterations=1, first_size_px=512)
    assert torch.equal(next(nst_model.stylize(tiny_model, photo, [Style(photo)], single)).picture, photo)


@pytest.mark.parametrize("style_loss", ["direct", "cross", "gram", "covariance", "sliced"])
def test_a_picture_in_its_own_style_has_nothing_to_gain(
    tiny_model: FeatureModel, picture: Picture, style_loss: str
) -> None:
    """The style is seen with a margin too, so that every statistic and every position agree."""
    photo = picture(40, 56, 1)
    options = StylizeOptions(padding="mirror", style_loss=style_loss, iterations=1, first_size_px=512, tv_weight=0)
    start = next(nst_model.stylize(tiny_model, photo, [Style(photo)], options))
    assert start.loss == pytest.approx(0, abs=1e-7)


def test_a_style_mask_has_a_margin_as_the_picture_has(tiny_model: FeatureModel, picture: Picture) -> None:
    """What a mask selects is what the mirrored mask selects of the mirrored picture."""
    style, left = picture(40, 48, 2), torch.zeros(40, 48)
    left[:, :20] = 1
    found = tiny_model.style_targets(Style(style, mask=left), StylizeOptions(padding="mirror"))
    large = Style(mirrored(style, MARGIN_PX), mask=mirrored(left, MARGIN_PX))
    expected = tiny_model.style_targets(large, StylizeOptions(padding="replicate"))
    for layer, targets in expected.items():
        torch.testing.assert_close(found[layer]["gram"], targets["gram"])


def test_a_region_of_everything_changes_nothing(tiny_model: FeatureModel, picture: Picture) -> None:
    """Masks that are white everywhere; the loss of the start, which rounding has not told apart yet."""
    photo, style = picture(40, 56, 1), picture(48, 48, 2)
    options = StylizeOptions(padding="mirror", iterations=1, first_size_px=512)
    everywhere = torch.ones(10, 14)
    plain, masked = (
        next(nst_model.stylize(tiny_model, photo, [each], options)).loss
        for each in (Style(style), Style(style, region=everywhere, mask=everywhere))
    )
    assert masked == pytest.approx(plain, rel=1e-4)


def test_the_losses_are_those_of_the_picture_with_its_margin(tiny_model: FeatureModel, picture: Picture) -> None:
    """Whoever evaluates an objective mirrors the picture first."""
    photo, style, options = (
        picture(40, 56, 1),
        Style(picture(48, 48, 2)),
        StylizeOptions(padding="mirror", iterations=1),
    )
    start = next(nst_model.stylize(tiny_model, photo, [style], options.of(first_size_px=512)))
    objective = tiny_model.objective([tiny_model.style_targets(style, options)], options)
    large = mirrored(photo, MARGIN_PX)
    with interpreted():
        losses = objective(large[None], objective.content_targets(large[None]))
    assert start.loss == pytest.approx(float(losses.total), rel=1e-5)


def test_the_margins_pixels_are_work_too(tiny_model: FeatureModel, picture: Picture) -> None:
    """An iteration at a coarse scale takes more of the time than the picture's own pixels say."""
    options = StylizeOptions(padding="mirror", iterations=2, first_size_px=28)
    iterates = list(nst_model.stylize(tiny_model, picture(40, 56, 1), [Style(picture(48, 48, 2))], options))
    pixels = [(height + 32) * (width + 32) for height, width in ((20, 28), (29, 40), (40, 56))]
    total = 2 * sum(pixels) + pixels[-1]
    assert [i.work for i in iterates[:3]] == pytest.approx(
        [pixels[0] / total, 2 * pixels[0] / total, (2 * pixels[0] + pixels[1]) / total]
    )


@pytest.mark.parametrize(("style_loss", "size"), [("direct", (40, 56)), ("cross", (40, 56)), ("gram", (24, 24))])
def test_what_is_compared_by_position_has_the_pictures_size(
    tiny_model: FeatureModel, picture: Picture, style_loss: str, size: tuple[int, int]
) -> None:
    """Else the style's margin would be stretched into the picture."""
    asked = []

    def targets_of(style: Style, options: StylizeOptions) -> Any:
        asked.append(tuple(style.picture.shape[1:]))
        return tiny_model.style_targets(style, options)

    options = StylizeOptions(padding="mirror", style_loss=style_loss, iterations=1, first_size_px=512)
    styles = [Style(picture(24, 24, 2))]
    list(nst_model.stylize(tiny_model, picture(40, 56, 1), styles, options, targets_of=targets_of))
    assert asked == [size]


def test_the_edge_is_a_place_like_any_other(tiny_model: FeatureModel, picture: Picture) -> None:
    """The first step is as long there as elsewhere, which it is not without a margin."""

    def at_edge(padding: str) -> float:
        options = StylizeOptions(padding=padding, iterations=1, first_size_px=512)
        start, after = nst_model.stylize(tiny_model, picture(96, 96, 1), [Style(0.5 * picture(96, 96, 2))], options)
        step = (after.picture - start.picture).square().mean(dim=0).sqrt()
        edge = torch.cat((step[0], step[-1], step[:, 0], step[:, -1]))
        return float(edge.mean() / step[32:-32, 32:-32].mean())

    assert at_edge("mirror") == pytest.approx(1, abs=0.1)
    assert abs(at_edge("zeros") - 1) > 0.15


def test_adams_moments_keep_their_place_and_scale() -> None:
    """Carried to another size they stay with the picture, and what stood in the margin does not creep in.

    The objective is a mean over pixels, so the gradient of each is as 1 by their number.
    """
    margin = MARGIN_PX
    small, large = (torch.full((1, 3, edge, edge), 0.5) for edge in (20 + 2 * margin, 40 + 2 * margin))
    adam = Adam(small, 0.1)
    gradient = mirrored(torch.ones(1, 3, 20, 20), margin)
    gradient[..., :margin] = -1
    adam.step(gradient, torch.ones(()))
    carried = adam.carried(large, margin)
    finer = (52 / 72) ** 2
    torch.testing.assert_close(carried._mean, torch.full_like(large, 0.1 * finer))
    torch.testing.assert_close(carried._square, torch.full_like(large, 0.01 * finer**2))


def test_adam_is_told_of_the_margin(
    tiny_model: FeatureModel, picture: Picture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """When it goes from one scale to the next."""
    told: list[int] = []
    real = Adam.carried

    def carried(self: Adam, start: torch.Tensor, margin_px: int = 0) -> Adam:
        told.append(margin_px)
        return real(self, start, margin_px)

    monkeypatch.setattr(Adam, "carried", carried)
    for padding in ("mirror", "replicate"):
        options = StylizeOptions(padding=padding, optimizer="adam", iterations=1, first_size_px=28)
        list(nst_model.stylize(tiny_model, picture(40, 56, 1), [Style(picture(48, 48, 2))], options))
    assert told == [16, 16, 0, 0]
