"""Colour: painting luminance only, and giving the styles the photograph's colours before the start.

After Gatys, Bethge, Hertzmann and Shechtman (2016), "Preserving Color in Neural Artistic Style Transfer". Pictures are
(3, H, W), RGB in [0, 1]. Luminance is the Y of YIQ; the chroma is what differs from it, in RGB.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from nst_model.options import Color

LUMA = (0.299, 0.587, 0.114)
"""Weights of red, green and blue in the luminance (ITU-R BT.601)."""

LEAST_VARIANCE = 1e-5
"""Added to the variance of every colour direction, so that a picture of few colours has a covariance to invert."""


def luminance(picture: Tensor) -> Tensor:
    """Return the luminance of a picture, (1, H, W)."""
    red, green, blue = LUMA  # as numbers: a tensor of them would be copied to the device, and waited for
    return red * picture[:1] + green * picture[1:2] + blue * picture[2:]


def gray(picture: Tensor) -> Tensor:
    """Return a picture's luminance as a picture without chroma, (3, H, W)."""
    return luminance(picture).expand(3, -1, -1).contiguous()


def with_luminance(photo: Tensor, painted: Tensor) -> Tensor:
    """Return `photo` with the luminance of `painted`, of the same shape, and its own chroma, exactly.

    Where no colour in [0, 1] has that luminance and that chroma, the nearest luminance that has is taken.
    """
    chroma = photo - luminance(photo)
    darkest = -chroma.amin(dim=0, keepdim=True)
    brightest = 1 - chroma.amax(dim=0, keepdim=True)
    return chroma + luminance(painted).clamp(darkest, brightest)


def matched_luminance(style: Tensor, photo: Tensor) -> Tensor:
    """Return `style` in grey, with the mean and the standard deviation of the photograph's luminance."""
    own, wanted = luminance(style), luminance(photo)
    scale = wanted.std() / own.std().clamp_min(1e-4)
    return ((own - own.mean()) * scale + wanted.mean()).clamp(0, 1).expand(3, -1, -1).contiguous()


def recolored(style: Tensor, photo: Tensor, color: Color) -> Tensor:
    """Return `style` with the colours of the photograph, as `color` says; as it is for Color.STYLE."""
    match color:
        case Color.STYLE:
            return style
        case Color.LUMINANCE:
            return matched_luminance(style, photo)
        case Color.HISTOGRAM:
            return _with_histogram(style, photo)
        case _:
            return _with_moments(style, photo, color)


def moments(picture: Tensor) -> tuple[Tensor, Tensor]:
    """Return the mean (3,) and the covariance (3, 3) of a picture's colours, fp64 on the CPU."""
    pixels = picture.flatten(1).cpu().double()
    mean = pixels.mean(dim=1)
    centred = pixels - mean[:, None]
    covariance = centred @ centred.T / pixels.shape[1] + LEAST_VARIANCE * torch.eye(3, dtype=torch.float64)
    return mean, covariance


def _with_moments(style: Tensor, photo: Tensor, color: Color) -> Tensor:
    """Move the style's colours by a linear map, so that mean and covariance are the photograph's."""
    mean, covariance = moments(style)
    wanted_mean, wanted = moments(photo)
    match color:
        case Color.CHOLESKY:
            turn = torch.linalg.cholesky(wanted) @ torch.linalg.inv(torch.linalg.cholesky(covariance))
        case Color.PCA:
            turn = _root(wanted) @ torch.linalg.inv(_root(covariance))
        case _:
            root = _root(covariance)
            inverse = torch.linalg.inv(root)
            turn = inverse @ _root(root @ wanted @ root) @ inverse
    shift = wanted_mean - turn @ mean
    moved: Tensor = turn.to(style) @ style.flatten(1) + shift.to(style)[:, None]
    return moved.view_as(style).clamp(0, 1)


def _root(matrix: Tensor) -> Tensor:
    values, vectors = torch.linalg.eigh(matrix)
    root: Tensor = (vectors * values.clamp_min(0).sqrt()) @ vectors.T
    return root


def _with_histogram(style: Tensor, photo: Tensor) -> Tensor:
    """Give each channel the photograph's distribution, keeping the order of the style's values."""
    order = style.flatten(1).argsort(dim=1, stable=True)
    wanted = photo.flatten(1).sort(dim=1).values
    values = F.interpolate(wanted[None], size=order.shape[1], mode="linear", align_corners=True)[0]
    return torch.empty_like(values).scatter_(1, order, values).view_as(style)
