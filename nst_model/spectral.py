"""The initial inverse Hessian of L-BFGS by frequency and place, each of which has a curvature of its own.

A picture is (…, H, W), its channels C whatever comes before. Frequencies are in cycles a pixel, from 0 to √½.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

BANDS = 12
"""Radial bands of frequency, evenly spaced by their logarithm. More gain nothing, nor do orientations."""

DECAY = 0.98
"""Decay of the running sums, from pair to pair."""

LEAST, MOST = 1 / 20, 50.0
"""Bounds of a band's inverse curvature, as multiples of the newest pair's."""

PLACES_DECAY = 0.95
"""Decay of the running sums of places, from pair to pair."""

PLACES_BOUND = 8.0
"""A place's inverse curvature is at most this many times their geometric mean, and at least as small a part of it."""

BLUR_PX = 5
"""Edge of the box by which a place's sums are smoothed, twice."""


class Spectral:
    """H₀ = √Γ·D·√Γ: Γ a diagonal in the picture's Fourier domain, D one in the picture, both learnt from the pairs.

    Γ has for each channel and radial band γ² = Σ|ŝ|² / Σ|ŷ|², both summed over the band and over pairs, each pair
    divided by |y|² and those before it decayed. γ = Σ ŝ·ŷ / Σ|ŷ|², which the scalar of L-BFGS corresponds to, is worse.
    A frequency between the middles of two bands has a share in both, so γ is continuous, unlike with sharp bands.

    D has for each place the same of what Γ leaves, s/√Γ and y·√Γ, of all channels, smoothed; its geometric mean is 1.

    Args:
        like: a picture, (…, H, W): shape, type and device of all that come.

    Attributes:
        bands: (2, C, BANDS), sums of s and of y.
        places: (2, H, W), sums of s and of y. The two are all there is to remember.
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
        self.bands = torch.zeros((2, math.prod(self._shape[:-2]), BANDS), dtype=like.dtype, device=like.device)
        self.places = torch.zeros((2, height, width), dtype=like.dtype, device=like.device)

    def learn(self, pair: Tensor, gamma: Tensor, taken: Tensor) -> None:
        """Take in a pair (2, n), s and y, and the scalar that fits it, if it is `taken`, a truth on the device."""
        spectrum = self._spectrum(pair.view(2, *self._shape))
        power = (torch.view_as_real(spectrum).square().sum(dim=-1) * self._copies).view(*self.bands.shape[:2], -1)
        found = (power @ self._shares) / pair[1].square().sum()
        self.bands.copy_(torch.where(taken, DECAY * self.bands + found, self.bands))
        root = self._by_frequency(gamma.to(pair)).sqrt()
        left = self._picture(torch.stack((spectrum[0] / root, spectrum[1] * root)))
        there = _blurred(left.square().view(2, -1, *self._shape[-2:]).sum(dim=1))
        there = there / there[1].mean()
        self.places.copy_(torch.where(taken, PLACES_DECAY * self.places + there, self.places))

    def times(self, q: Tensor, gamma: Tensor) -> Tensor:
        """Return H₀·q, both (n,). The scalar `gamma` bounds each band's, and stands in where nothing is known.

        Where q is 0 so is the product: what the objective does not see, such as what lies outside all regions, is not
        moved along with the frequencies of the rest.
        """
        root = self._by_frequency(gamma.to(q)).sqrt()
        half = self._picture(self._spectrum(q.view(self._shape)) * root) * self._by_place()
        product = self._picture(self._spectrum(half) * root).flatten()
        return product.masked_fill_(q == 0, 0.0)

    def _by_frequency(self, scalar: Tensor) -> Tensor:
        """Return Γ, (…, H, W // 2 + 1)."""
        by_band = (self.bands[0] / self.bands[1]).sqrt().clamp(LEAST * scalar, MOST * scalar)
        by_band = torch.where(self.bands[1] > 0, by_band, scalar)
        return (by_band.log() @ self._shares.t()).exp().view(*self._shape[:-1], -1)

    def _by_place(self) -> Tensor:
        """Return D, (H, W)."""
        logarithm = (self.places[0] / self.places[1]).log() / 2
        # Where nothing was learnt, it is 0/0; where nothing has moved, its logarithm is infinite.
        logarithm = torch.where(logarithm.isfinite(), logarithm, 0.0)
        bound = math.log(PLACES_BOUND)
        return (logarithm - logarithm.mean()).clamp(-bound, bound).exp()

    def _spectrum(self, x: Tensor) -> Tensor:
        """Return the spectrum of pictures (…, H, W)."""
        spectrum: Tensor = torch.fft.rfft2(x, norm="ortho")
        return spectrum

    def _picture(self, spectrum: Tensor) -> Tensor:
        """Return the pictures of a spectrum, (…, H, W)."""
        pictures: Tensor = torch.fft.irfft2(spectrum, s=self._shape[-2:], norm="ortho")
        return pictures


def _blurred(x: Tensor) -> Tensor:
    """Return x (2, H, W), smoothed."""
    for _ in range(2):
        x = F.avg_pool2d(F.pad(x, [BLUR_PX // 2] * 4, mode="reflect"), BLUR_PX, stride=1)
    return x


def _shares(height: int, width: int) -> Tensor:
    """Return the share of each frequency of `rfft2` in each band, (H · (W // 2 + 1), BANDS); each one's sum to 1."""
    radius = torch.hypot(torch.fft.fftfreq(height)[:, None], torch.fft.rfftfreq(width))
    lowest, highest = 1 / max(height, width), math.sqrt(0.5)
    place = (radius.clamp_min(lowest) / lowest).log() / math.log(highest / lowest) * (BANDS - 1)
    return (1 - (place[..., None] - torch.arange(BANDS)).abs()).clamp_min(0).flatten(0, 1)
