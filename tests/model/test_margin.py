"""The margin: mirrored, optimized along, and never seen."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch.nn import functional as F

import nst_model
from nst_model import FeatureModel, Style, StylizeOptions
from nst_model.adam import Adam
from nst_model.margin import mirrored, trimmed
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


def test_style_masks_and_regions_have_a_margin(tiny_model: FeatureModel, picture: Picture) -> None:
    """A mask that is white everywhere changes nothing."""
    photo, style = picture(40, 56, 1), picture(48, 48, 2)
    options = StylizeOptions(padding="mirror", iterations=2, first_size_px=28)
    everywhere = torch.ones(10, 14)
    plain, masked = (
        [i.loss for i in nst_model.stylize(tiny_model, photo, [each], options)]
        for each in (Style(style), Style(style, region=everywhere, mask=everywhere))
    )
    assert masked == pytest.approx(plain, rel=0.01)


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


def test_adams_moments_keep_their_place() -> None:
    """Carried to another size they stay with the picture: what stood in the margin does not creep in."""
    margin = MARGIN_PX
    small, large = (torch.full((1, 3, edge, edge), 0.5) for edge in (20 + 2 * margin, 40 + 2 * margin))
    adam = Adam(small, 0.1)
    gradient = mirrored(torch.ones(1, 3, 20, 20), margin)
    gradient[..., :margin] = -1
    adam.observe(gradient)
    adam.step(np.ones(1), 1.0)
    carried = adam.carried(large, margin)
    carried.observe(torch.zeros_like(large))
    carried.step(np.ones(1), 1.0)
    moved = trimmed(carried.x - large, margin)
    assert float(moved.max()) < -0.01
    assert float(moved.std()) == pytest.approx(0, abs=1e-6)
