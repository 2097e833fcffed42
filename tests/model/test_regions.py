"""Regions: masks partition unity, statistics are taken inside, and little leaks out."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

import nst_model
from nst_model import FeatureModel, InvalidImage, InvalidOption, Style, StyleLoss, StylizeOptions
from nst_model.architecture import VGG16
from nst_model.descent import Closure
from nst_model.losses import STYLE_LOSSES, covariance, gram, style_targets
from nst_model.margin import mirrored
from nst_model.regions import Layout, layer_weights, partition
from nst_model.stylization import _Scene

Picture = Callable[[int, int, int], torch.Tensor]


def halves(height: int, width: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the masks of the left and of the right half."""
    left = torch.zeros(height, width)
    left[:, : width // 2] = 1
    return left, 1 - left


def test_masks_partition_unity() -> None:
    """Overlaps are shared, and what is left over is the last region."""
    masks = [torch.rand(12, 9, generator=torch.Generator().manual_seed(seed)) for seed in (1, 2, 3)]
    regions = partition(masks, rest=True)
    assert len(regions) == 4
    torch.testing.assert_close(regions.sum(dim=0), torch.ones(12, 9))
    assert float(regions.min()) >= 0
    torch.testing.assert_close(partition([masks[0] / 2], rest=False)[0], masks[0] / 2)


def test_layer_weights_sum_to_one_and_stay_inside() -> None:
    """At every layer; none where the mask is black."""
    left, right = halves(96, 160)
    found = layer_weights(torch.stack((left, right)), (96, 160), VGG16.layers, VGG16)
    assert list(found) == list(VGG16.layers)
    for layer, weights in found.items():
        stride = next(c.stride_px for c in VGG16.convolutions if c.layer == layer)
        torch.testing.assert_close(weights.sum(dim=1), torch.ones(2))
        assert float(weights.min()) >= 0
        map_ = weights[0].view(96 // stride, 160 // stride)
        assert float(map_[:, 80 // stride :].sum()) == 0


@pytest.mark.parametrize("layer", ["relu1_1", "relu5_1"])
def test_soft_masks_weigh_softly(layer: str) -> None:
    """From one region to the other along a ramp, every position belongs to one or to the other."""
    ramp = torch.linspace(0, 1, 512).expand(64, 512)
    weights = layer_weights(torch.stack((ramp, 1 - ramp)), (64, 512), [layer], VGG16)[layer]
    both = weights.sum(dim=0)
    assert float(both.min()) > 0.5 * float(both.mean())


def test_weights_shrink_from_the_edge_with_the_receptive_field() -> None:
    """A position weighs nothing right at a straight edge, and fully once its receptive field lies inside."""
    left, right = halves(64, 512)
    found = layer_weights(torch.stack((left, right)), (64, 512), ["relu3_1"], VGG16)["relu3_1"][0].view(16, 128)
    row = found[8, :64] / found.max()
    sees = VGG16.receptive_field_px("relu3_1") // 4  # positions
    assert float(row[-1]) < 0.2
    assert float(row[63 - sees // 2 - 1]) == pytest.approx(1.0)
    assert bool((row[-sees // 2 :].diff() <= 1e-9).all())


@pytest.mark.parametrize("shape", ["ring", "thin", "dot", "grey"])
def test_odd_regions_keep_some_weight_at_every_layer(shape: str) -> None:
    """Rings, lines, single pixels and half-tones: never empty, never NaN."""
    y, x = torch.meshgrid(torch.arange(128.0), torch.arange(128.0), indexing="ij")
    radius = torch.hypot(y - 64, x - 64)
    mask = {
        "ring": ((radius > 50) & (radius < 54)).float(),
        "thin": (x == 17).float(),
        "dot": ((x == 3) & (y == 99)).float(),
        "grey": torch.full((128, 128), 0.2),
    }[shape]
    for weights in layer_weights(mask[None], (128, 128), VGG16.layers, VGG16).values():
        assert weights.isfinite().all()
        assert float(weights.sum()) == pytest.approx(1, rel=1e-4)


@pytest.mark.parametrize("loss", list(StyleLoss))
def test_weights_of_one_and_zero_choose_positions(loss: StyleLoss) -> None:
    """Statistics over half the positions are those of that half alone."""
    random = torch.Generator().manual_seed(0)
    features, style = (torch.rand(1, 5, 6, 8, generator=random, dtype=torch.float64) for _ in range(2))
    left = torch.zeros(6, 8, dtype=torch.float64)
    left[:, :4] = 1 / 24
    half = style[:, :, :, :4] if loss in (StyleLoss.DIRECT, StyleLoss.CROSS) else style
    whole = {name: tensor.double() for name, tensor in style_targets(style, loss).items()}
    targets = {name: tensor.double() for name, tensor in style_targets(half, loss).items()}
    one = torch.ones((), dtype=torch.float64)
    weighted, _ = STYLE_LOSSES[loss](whole)(features, one, left.flatten())
    alone, _ = STYLE_LOSSES[loss](targets)(features[:, :, :, :4], one)
    # Quantiles between so few values are drawn a little differently.
    tolerance = 0.15 if loss is StyleLoss.SLICED else 1e-5
    assert float(weighted) == pytest.approx(float(alone), rel=tolerance)


def test_weighted_moments_by_hand() -> None:
    """Two positions, weighing 3 to 1."""
    features = torch.tensor([[[[1.0, 3.0]], [[2.0, 0.0]]]])
    weights = torch.tensor([0.75, 0.25])
    assert gram(features, weights).tolist() == [[3.0, 1.5], [1.5, 3.0]]
    assert covariance(features, weights).tolist() == [[0.75, -0.75], [-0.75, 0.75]]


@pytest.mark.parametrize("loss", [loss for loss in StyleLoss if loss not in (StyleLoss.DIRECT, StyleLoss.CROSS)])
def test_equal_weights_change_nothing(loss: StyleLoss) -> None:
    """They are the mean."""
    random = torch.Generator().manual_seed(1)
    features, style = (torch.rand(1, 5, 12, 12, generator=random, dtype=torch.float64) for _ in range(2))
    module = STYLE_LOSSES[loss]({name: tensor.double() for name, tensor in style_targets(style, loss).items()})
    equal = torch.full((144,), 1 / 144, dtype=torch.float64)
    one = torch.ones((), dtype=torch.float64)
    assert float(module(features, one, equal)[0]) == pytest.approx(
        float(module(features, one)[0]), rel=0.1 if loss is StyleLoss.SLICED else 1e-9
    )


def test_layout_groups_equal_masks() -> None:
    """Styles of one region are mixed, whatever they weigh."""
    quarter = torch.zeros(8, 8)
    quarter[:4, :4] = 1
    layout = Layout.of([quarter, None, quarter.clone()], [1.5, 1, 0.5])
    assert layout.members == ((0, 2), (1,))
    assert layout.regions is not None
    assert torch.equal(layout.regions, torch.stack((quarter, 1 - quarter)))


def test_layout_without_masks_is_one_region() -> None:
    """The plain way costs nothing."""
    layout = Layout.of([None, None], [1, 2])
    assert (layout.members, layout.regions) == (((0, 1),), None)


@pytest.mark.parametrize("padding", ["replicate", "mirror"])
def test_regions_share_the_style_loss_by_area(tiny_model: FeatureModel, picture: Picture, padding: str) -> None:
    """So that every pixel is painted alike; a margin's pixels count as much as others."""
    band = torch.zeros(64, 96)
    band[:, :12] = 1
    options = StylizeOptions(padding=padding, first_size_px=512)
    styles = [Style(picture(48, 48, 1), region=band), Style(picture(48, 48, 2))]
    scene = _Scene(tiny_model, picture(64, 96, 3), styles, options, tiny_model.style_targets)
    closure = scene.closure(96, at_content=False, stop=None)
    assert closure is not None
    assert closure._regions is not None
    (shares,) = {tuple(layer.shares.tolist()) for layer in closure._objective.style.children()}
    margin = options.margin_px
    # The edge itself is not repeated: a band 12 px wide has 11 of its own and 5 of the other's in 16 px of margin.
    mirrored_px = 12 + min(margin, 11)
    assert shares[0] == pytest.approx(mirrored_px / (96 + 2 * margin))
    assert sum(shares) == pytest.approx(1)
    # Deep in each region, where weights are whole, a position pulls as hard as in the other.
    pull = [share * float(weights.max()) for share, weights in zip(shares, closure._regions["relu1_1"], strict=True)]
    assert pull[0] == pytest.approx(pull[1], rel=0.2)


def test_layout_leaves_out_what_is_nowhere() -> None:
    """A mask that covers all leaves nothing over; a style without weight takes no region."""
    full, (left, right) = torch.ones(8, 8), halves(8, 8)
    assert Layout.of([full, None], [1, 1]).members == ((0,),)
    assert Layout.of([left, right], [1, 0]).members == ((0,),)
    with pytest.raises(InvalidOption, match="styles must have a weight above 0 somewhere"):
        Layout.of([left], [0])


def test_each_region_is_pulled_to_its_own_style(tiny_model: FeatureModel) -> None:
    """A red style on the left and a blue one on the right colour their halves."""
    size = (48, 96)
    left, right = halves(*size)
    red, blue = (torch.full((3, 48, 48), 0.1) for _ in range(2))
    red[0], blue[2] = 0.9, 0.9
    noise = 0.1 * torch.rand(3, 48, 48)
    options = StylizeOptions(
        iterations=30, first_size_px=512, style_layers={"relu1_1": 1}, content_weight=0, tv_weight=0
    )
    styles = [Style(red + noise, region=left), Style(blue + noise, region=right)]
    last = list(nst_model.stylize(tiny_model, torch.full((3, *size), 0.5), styles, options))[-1].picture
    redness = (last[0] - last[2]).mean(dim=0)
    assert float(redness[:40].mean()) > 0.3
    assert float(redness[56:].mean()) < -0.3


@pytest.mark.parametrize("padding", ["replicate", "mirror"])
@pytest.mark.parametrize("layer", ["relu2_1", "relu3_1"])
def test_guidance_limits_the_leakage(tiny_model: FeatureModel, picture: Picture, layer: str, padding: str) -> None:
    """Of the style's gradient, far less falls outside the region than with a plain mask at each layer."""
    left, right = halves(64, 192)
    options = StylizeOptions(style_layers={layer: 1}, content_weight=0, tv_weight=0, padding=padding, first_size_px=512)
    style = Style(picture(64, 64, 1), region=left)
    nothing = Style(picture(64, 64, 1), region=right, weight=0)
    scene = _Scene(tiny_model, picture(64, 192, 3), [style, nothing], options, tiny_model.style_targets)
    guided = scene.closure(192, at_content=False, stop=None)
    assert guided is not None
    assert guided._regions is not None

    image, mask = (mirrored(of, options.margin_px) for of in (picture(64, 192, 2)[None], left[None]))
    positions = [edge // (2 if layer == "relu2_1" else 4) for edge in image.shape[2:]]
    plain = torch.nn.functional.adaptive_avg_pool2d(mask, positions).flatten(1)
    unguided = Closure(guided._objective, guided._targets, {layer: plain / plain.sum()})

    def outside(closure: Closure) -> float:
        _, gradient = closure(image)
        energy = gradient.square().sum(dim=1)
        return float(energy[mask == 0].sum() / energy.sum())

    leaked = outside(unguided)
    assert leaked > 0
    assert outside(guided) < 0.2 * leaked


def test_a_style_mask_chooses_part_of_the_style(tiny_model: FeatureModel, picture: Picture) -> None:
    """Far from the mask's edge the statistics are those of the part alone."""
    left, _ = halves(64, 192)
    whole = picture(64, 192, 3)
    whole[:, :, 96:] *= 0.2
    options = StylizeOptions(style_layers={"relu1_1": 1})
    masked = tiny_model.style_targets(Style(whole, mask=left), options)["relu1_1"]
    alone = tiny_model.style_targets(Style(whole[:, :, :94]), options)["relu1_1"]
    both = tiny_model.style_targets(Style(whole), options)["relu1_1"]
    error = float((masked["mean"] - alone["mean"]).norm() / alone["mean"].norm())
    assert error < 0.05
    assert float((both["mean"] - alone["mean"]).norm() / alone["mean"].norm()) > 5 * error


def test_bad_masks_are_refused(tiny_model: FeatureModel, picture: Picture) -> None:
    """The message names the style and what is wrong."""
    content, style = picture(32, 32, 1), picture(32, 32, 2)

    def run(style: Style, **options: object) -> None:
        next(iter(nst_model.stylize(tiny_model, content, [style], StylizeOptions(**options))))  # type: ignore[arg-type]

    with pytest.raises(InvalidImage, match=r"styles\[0\]\.region is black everywhere"):
        run(Style(style, region=torch.zeros(32, 32)))
    with pytest.raises(InvalidImage, match=r"styles\[0\]\.mask must have shape \(H, W\), not \(3, 32, 32\)"):
        run(Style(style, mask=torch.ones(3, 32, 32)))
    with pytest.raises(InvalidOption, match="style_loss direct compares position by position"):
        run(Style(style, mask=torch.ones(32, 32)), style_loss="direct")
