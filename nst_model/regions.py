"""Regions: which part of the picture takes which style, and how far the network's features belong to it.

After the guided Gram matrices of Gatys, Ecker, Bethge, Hertzmann and Shechtman (2017), "Controlling Perceptual
Factors in Neural Style Transfer". Masks are (H, W) in [0, 1].
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from nst_model.architecture import Architecture
from nst_model.errors import InvalidOption


def partition(masks: Sequence[Tensor], *, rest: bool) -> Tensor:
    """Return regions (R, H, W) that sum to 1 at every pixel, or to less where nothing was asked for.

    Args:
        masks: of one size. They are divided by their sum where it is above 1.
        rest: whether what they leave over is a region of its own, the last one.
    """
    stacked = torch.stack([mask.clamp(0, 1) for mask in masks])
    total = stacked.sum(dim=0)
    regions = stacked / total.clamp_min(1)
    return torch.cat((regions, (1 - total).clamp_min(0)[None])) if rest else regions


def fitting(masks: Tensor, size: Sequence[int]) -> Tensor:
    """Return masks (R, H, W) averaged to another height and width, on the CPU."""
    # MPS cannot average over windows that do not divide the picture, so all that is done with masks is done here.
    averaged: Tensor = F.interpolate(masks.cpu().float()[None], size=list(size), mode="area")[0]
    return averaged


def layer_weights(
    regions: Tensor, size: Sequence[int], layers: Iterable[str], architecture: Architecture
) -> dict[str, Tensor]:
    """Return layer → weights of its positions in each region, (R, positions), each row summing to 1.

    A feature sees as far as its receptive field. One at a region's edge is half made of what lies beyond, and to
    match it with the style would leak the style outward, so weights fall to 0 at the edge and are whole where the
    receptive field lies inside; in a region that is smaller than the receptive field, its middle stands for it.

    Args:
        regions: (R, H, W); every one has a pixel above 0.
        size: height and width of the picture that the features are of, pixels.
        layers: the layers wanted.
        architecture: of the feature model.
    """
    found = {}
    for convolution in architecture.convolutions:
        if convolution.layer not in layers:
            continue
        stride = convolution.stride_px
        positions = (max(1, size[0] // stride), max(1, size[1] // stride))
        here = fitting(regions, positions)
        sight = architecture.receptive_field_px(convolution.layer) // stride // 2
        inside = F.avg_pool2d(here[None], 2 * sight + 1, stride=1, padding=sight, count_include_pad=False)[0]
        # As much as the region's own depth, where it lies deepest within itself.
        depth = torch.where(here > 0, inside, torch.zeros_like(inside)).amax(dim=(1, 2), keepdim=True)
        inside = inside * here.amax(dim=(1, 2), keepdim=True) / depth
        weights = (2 * torch.minimum(here, inside) - here).clamp_min(0).flatten(1)
        found[convolution.layer] = weights / weights.sum(dim=1, keepdim=True)
    return found


@dataclass(frozen=True)
class Layout:
    """Which styles belong where.

    Attributes:
        members: for each region, the places of its styles in the caller's list.
        regions: (R, H, W), summing to 1 or less at every pixel; None for one region everywhere.
    """

    members: tuple[tuple[int, ...], ...]
    regions: Tensor | None

    @classmethod
    def of(cls, masks: Sequence[Tensor | None], weights: Sequence[float]) -> Layout:
        """Return the layout of styles, each with its mask, None for wherever no mask is, and its weight.

        Masks are of one size. Equal ones are one region. A region that is nowhere, or whose styles weigh nothing, is
        left out. Raises InvalidOption if none is left.
        """
        everywhere = tuple(place for place, mask in enumerate(masks) if mask is None)
        if len(everywhere) == len(masks):
            return cls((everywhere,), None)
        different, members = _grouped(masks)
        regions = partition(different, rest=bool(everywhere))
        if everywhere:
            members.append(everywhere)
        areas = regions.mean(dim=(1, 2)).tolist()
        kept = [
            region
            for region, group in enumerate(members)
            if areas[region] > 0 and any(weights[place] > 0 for place in group)
        ]
        if not kept:
            raise InvalidOption("styles", "must have a weight above 0 somewhere in the picture")
        return cls(tuple(members[region] for region in kept), regions[kept])


def _grouped(masks: Sequence[Tensor | None]) -> tuple[list[Tensor], list[tuple[int, ...]]]:
    """Return the different masks, and for each the places where it stands."""
    different: list[Tensor] = []
    members: list[tuple[int, ...]] = []
    for place, mask in enumerate(masks):
        if mask is None:
            continue
        same = next((number for number, other in enumerate(different) if torch.equal(mask, other)), None)
        if same is None:
            different.append(mask)
            members.append((place,))
        else:
            members[same] += (place,)
    return different, members
