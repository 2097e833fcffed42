"""The canonical unit: the mean activation of every layer over a set of images that the project makes by itself.

The set is half 1/f noise and half dead leaves (Lee, Mumford and Huang, 2001), which between them have the power
spectrum, the edges and the colour statistics of natural images. docs/calibration.md compares it with photographs.
"""

from __future__ import annotations

import dataclasses
import functools
import math

import torch
from torch import Tensor

from nst_model.errors import WeightsCorrupt
from nst_model.options import Pooling
from nst_model.weights import FeatureWeights

SIZE_PX = 256
IMAGES_OF_A_KIND = 4

# Covariance of natural RGB values: channels share most of their variation (Ruderman, Cronin and Chiao, 1998).
_OPPONENT = torch.tensor([[0.577, 0.707, 0.408], [0.577, 0.0, -0.816], [0.577, -0.707, 0.408]])
_OPPONENT_SPREAD = torch.tensor([1.0, 0.25, 0.12])


def calibrate(weights: FeatureWeights) -> FeatureWeights:
    """Return `weights` with `mean_activation` measured over the calibration set, for each pooling."""
    from nst_model.network import build_trunk  # noqa: PLC0415 - the network needs the weights' module, and it this one

    ones = dict.fromkeys(weights.architecture.layers, 1.0)
    raw = dataclasses.replace(weights, mean_activation=dict.fromkeys(Pooling, ones))
    images = calibration_images()
    measured = {
        pooling: mean_activations(build_trunk(raw, weights.architecture.layers, pooling=pooling), images)
        for pooling in Pooling
    }
    dead = [layer for means in measured.values() for layer, mean in means.items() if not 0 < mean < math.inf]
    if dead:
        raise WeightsCorrupt(
            f"the weights of {weights.name} never excite {dead[0]}: they are not those of a trained network"
        )
    return dataclasses.replace(weights, mean_activation=measured)


def mean_activations(trunk: torch.nn.Module, images: Tensor) -> dict[str, float]:
    """Return each tapped layer's mean activation over `images`, (N, 3, H, W) RGB in [0, 1]."""
    totals: dict[str, float] = {}
    with torch.inference_mode():
        for image in images:
            for layer, features in trunk(image[None]).items():
                totals[layer] = totals.get(layer, 0.0) + features.mean().item() / len(images)
    return totals


@functools.cache
def calibration_images() -> Tensor:
    """Return the calibration set, (8, 3, 256, 256) RGB in [0, 1]; always the same."""
    random = torch.Generator().manual_seed(2016)
    noise = [one_over_f_noise(SIZE_PX, random) for _ in range(IMAGES_OF_A_KIND)]
    leaves = [dead_leaves(SIZE_PX, random) for _ in range(IMAGES_OF_A_KIND)]
    return torch.stack(noise + leaves)


def one_over_f_noise(size_px: int, random: torch.Generator) -> Tensor:
    """Return noise whose amplitude falls as 1/f and whose channels correlate like nature's, (3, H, W) in [0, 1]."""
    fy = torch.fft.fftfreq(size_px)[:, None]
    fx = torch.fft.rfftfreq(size_px)[None]
    amplitude = 1 / torch.hypot(fy, fx).clamp(min=1 / size_px)
    amplitude[0, 0] = 0
    white = torch.fft.rfft2(torch.randn(3, size_px, size_px, generator=random))
    planes = torch.fft.irfft2(white * amplitude, s=(size_px, size_px))
    planes = planes / planes.std(dim=(1, 2), keepdim=True)
    return _colours(planes.flatten(1)).view(3, size_px, size_px)


def dead_leaves(size_px: int, random: torch.Generator) -> Tensor:
    """Return discs that occlude one another, radii r with density 1/r³, (3, H, W) in [0, 1]."""
    radii = _power_law_radii(4000, 2.0, size_px / 3, random)
    centres = torch.rand(len(radii), 2, generator=random) * size_px
    colours = _colours(torch.randn(3, len(radii), generator=random))
    image = colours[:, :1, None].expand(3, size_px, size_px).clone()
    for (cy, cx), radius, colour in zip(centres.tolist(), radii.tolist(), colours.T, strict=True):
        top, left = max(0, int(cy - radius)), max(0, int(cx - radius))
        window = image[:, top : int(cy + radius) + 2, left : int(cx + radius) + 2]
        y = torch.arange(top, top + window.shape[1])[:, None]
        x = torch.arange(left, left + window.shape[2])[None]
        window[:, (y - cy) ** 2 + (x - cx) ** 2 < radius**2] = colour[:, None]
    return image


def _power_law_radii(count: int, smallest: float, largest: float, random: torch.Generator) -> Tensor:
    # Inverse of the cumulative distribution of p(r) ~ r^-3.
    u = torch.rand(count, generator=random)
    return (smallest**-2 - u * (smallest**-2 - largest**-2)) ** -0.5


def _colours(standard: Tensor) -> Tensor:
    """Turn (3, n) standard normals into n RGB values in [0, 1] with natural correlations."""
    return (0.45 + 0.18 * _OPPONENT @ (standard * _OPPONENT_SPREAD[:, None]) * 3**0.5).clamp(0, 1)
