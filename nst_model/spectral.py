"""The initial inverse Hessian of L-BFGS by frequency: fine detail and broad shapes have curvatures of their own.

A picture is (…, H, W), its channels C whatever comes before. Frequencies are in cycles a pixel, from 0 to √½.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

BANDS = 12
"""Radial bands of frequency, evenly spaced by their logarithm. More gain nothing, nor do orientations."""

DECAY = 0.98
"""Decay of the running sums, from pair to pair."""

LEAST, MOST = 1 / 20, 50.0
"""Bounds of a band's inverse curvature, as multiples of the newest pair's."""


class Spectral:
    """A diagonal in the picture's Fourier domain, for each channel and radial band one number γ, learnt from the pairs.

    γ² = Σ|ŝ|² / Σ|ŷ|², both summed over the band and over pairs, each pair divided by |y|² and those before it decayed.
    γ = Σ ŝ·ŷ / Σ|ŷ|², which the scalar of L-BFGS corresponds to, is worse. A frequency between the middles of two
    bands has a share in both, so γ is continuous, unlike with sharp bands.

    Args:
        like: a picture, (…, H, W): shape, type and device of all that come.

    Attributes:
        sums: (2, C, BANDS), those of s and of y: all there is to remember.
    """

    def __init__(self, like: Tensor) -> None:
        self._shape = like.shape
        height, width = self._shape[-2:]
        self._shares = _shares(height, width).to(like)
        # A transform of real numbers leaves out the columns that mirror others.
        self._copies = torch.full((width // 2 + 1,), 2.0).to(like)
        self._copies[0] = 1
        if width % 2 == 0:
            self._copies[-1] = 1
        self.sums = torch.zeros((2, math.prod(self._shape[:-2]), BANDS), dtype=like.dtype, device=like.device)

    def learn(self, pair: Tensor, taken: Tensor) -> None:
        """Take in a pair (2, n), s and y, if it is `taken`, a truth on the device."""
        spectrum = torch.view_as_real(torch.fft.rfft2(pair.view(2, *self._shape), norm="ortho"))
        power = (spectrum.square().sum(dim=-1) * self._copies).view(*self.sums.shape[:2], -1)
        found = (power @ self._shares) / pair[1].square().sum()
        self.sums.copy_(torch.where(taken, DECAY * self.sums + found, self.sums))

    def times(self, q: Tensor, gamma: Tensor) -> Tensor:
        """Return H₀·q, both (n,). The scalar `gamma` bounds each band's, and stands in where nothing is known.

        Where q is 0 so is the product: what the objective does not see, such as what lies outside all regions, is not
        moved along with the frequencies of the rest.
        """
        scalar = gamma.to(q)
        by_band = (self.sums[0] / self.sums[1]).sqrt().clamp(LEAST * scalar, MOST * scalar)
        by_band = torch.where(self.sums[1] > 0, by_band, scalar)
        factors = (by_band.log() @ self._shares.t()).exp().view(*self._shape[:-1], -1)
        spectrum = torch.fft.rfft2(q.view(self._shape), norm="ortho") * factors
        product: Tensor = torch.fft.irfft2(spectrum, s=self._shape[-2:], norm="ortho").flatten()
        return product.masked_fill_(q == 0, 0.0)


def _shares(height: int, width: int) -> Tensor:
    """Return the share of each frequency of `rfft2` in each band, (H · (W // 2 + 1), BANDS); each one's sum to 1."""
    radius = torch.hypot(torch.fft.fftfreq(height)[:, None], torch.fft.rfftfreq(width))
    lowest, highest = 1 / max(height, width), math.sqrt(0.5)
    place = (radius.clamp_min(lowest) / lowest).log() / math.log(highest / lowest) * (BANDS - 1)
    return (1 - (place[..., None] - torch.arange(BANDS)).abs()).clamp_min(0).flatten(0, 1)
